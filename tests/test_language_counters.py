"""What GRPO and RLOO count: rows are completions, every one has a number of its own, tokens are all that were sampled."""

import json

import pytest

from tests.rehearsed import furnish
from understudy.language import grpo, reinforce
from understudy.language.rlhf import RLHFModels

FEW = {
    "completions_per_iteration": 8,
    "group_size": 4,
    "fixed_length": 4,
    "preflight": False,
    "quiet": True,
    "log_samples": 8,
    "evaluate_rows": 1,
}
RECIPES = pytest.mark.parametrize("kind", [grpo, reinforce], ids=lambda kind: kind.__name__.rpartition(".")[2])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("counters"))


def train(kind, home, out, **fields):
    given = {
        "model": str(home),
        "data": str(home / "prompts.jsonl"),
        "reward": "length",
        "total_tokens": 3 * 32,
        **FEW,
        **fields,
    }
    return kind.train(kind.Config(output_dir=str(out), **given))


def samples(run) -> list[dict]:
    files = sorted((run.path / "samples").glob("0*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@RECIPES
def test_rows_are_completions_numbered_one_by_one(home, tmp_path, kind):
    run = train(kind, home, tmp_path / "run")

    assert [line["rows"] for line in run.metrics] == [8, 16, 24]
    assert [line["row"] for line in samples(run)] == list(range(24))


@RECIPES
def test_a_groups_rows_answer_one_prompt(home, tmp_path, kind):
    run = train(kind, home, tmp_path / "run", total_tokens=32)

    prompts = [tuple(line["prompt_ids"]) for line in samples(run)]
    assert len(set(prompts[:4])) == len(set(prompts[4:])) == 1
    assert prompts[0] != prompts[4]


@RECIPES
def test_pretraining_texts_come_in_turn_where_prompts_have_groups(home, tmp_path, kind, monkeypatch):
    read, pretraining = [], RLHFModels.next_pretraining_text

    def listened(cast, count):
        text = pretraining(cast, count)
        read.extend(cast.tokenizer.decode(row.tolist()) for row in text.ids)
        return text

    monkeypatch.setattr(RLHFModels, "next_pretraining_text", listened)
    train(kind, home, tmp_path / "run", pretraining=str(home / "texts.jsonl"), total_tokens=6 * 32)

    texts = [json.loads(line)["text"] for line in (home / "texts.jsonl").read_text().splitlines()]
    assert len(read) == 48
    assert all(found.startswith(text) for found, text in zip(read, texts[8:56], strict=True))


def test_groups_that_are_replaced_are_counted_with_their_tokens(home, tmp_path):
    seen = {}

    def picky(prompts, completion_ids, **_):
        """The answers to every second prompt all score the same."""
        numbers = [seen.setdefault(prompt, len(seen)) for prompt in prompts]
        return [float(ids[0]) if n % 2 else 0.0 for n, ids in zip(numbers, completion_ids, strict=True)]

    run = train(grpo, home, tmp_path / "run", reward=picky, dynamic_sampling_rounds=4, total_tokens=160)

    last = run.metrics[-1]
    assert last["rows"] > 8 * len(run.metrics)
    assert last["steps"] == 4 * last["rows"]
    numbers = [line["row"] for line in samples(run)]
    assert len(set(numbers)) == len(numbers) == 8 * len(run.metrics)
    assert min(numbers) >= 0 and max(numbers) < last["rows"]


def test_samples_hold_every_terms_score_and_gold(home, tmp_path):
    def never(completions):
        return [None] * len(completions)

    run = train(grpo, home, tmp_path / "run", reward=("length*2", never), gold="length:8", total_tokens=32)

    evaluated = json.loads((run.path / "evaluation.json").read_text())["samples"]
    for line in (samples(run)[0], evaluated[0]):
        assert (line["score"], line["terms"]) == (8.0, {"length": 4.0, "never": None})  # four tokens, each counts twice
        assert (line["gold"], line["gold_terms"]) == (-0.5, {"length": -0.5})
