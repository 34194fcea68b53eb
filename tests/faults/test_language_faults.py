"""Faults of the language world: tokenizers that do not fit, policies that say one thing, odd data, telling judges."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.faults import killed
from tests.rehearsed import furnish, ppo_config, reward_config, sft_config
from understudy import update as room
from understudy.language import dpo, ppo, reward_model, sft, toy_language
from understudy.language.data.records import Tokenizer, make_labelled_examples, make_prompts
from understudy.language.model.policy import Policy
from understudy.run.config import RequestError

EOS = 2
WORD = 20  # any word of the vocabulary
CANARY = "hf_canarycanarycanary"
ZEBRA = {"prompt": "the zebra", "completion": " smiled .", "chosen": " smiled .", "rejected": " sat ."}
RECIPES = {
    "sft": (sft, sft_config),
    "reward-model": (reward_model, reward_config),
    "ppo": (ppo, lambda home, out, **fields: ppo_config(home, out, preflight=True, **fields)),
    "dpo": (
        dpo,
        lambda home, out, data=None, **fields: dpo.Config(
            model=str(home),
            data=data or str(home / "preferences.jsonl"),
            output_dir=str(out),
            held_out=8,
            quiet=True,
            **fields,
        ),
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture
def other(home, tmp_path):
    """A copy of the home, to be spoiled."""
    return Path(shutil.copytree(home, tmp_path / "other"))


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def swap_two_words(home: Path) -> None:
    """The vocabulary keeps its size, and two ids their neighbour's meaning."""
    about = json.loads((home / "tokenizer.json").read_text())
    ids = about["model"]["vocab"]
    ids.update({word: 41 - i for word, i in ids.items() if i in (WORD, WORD + 1)})
    (home / "tokenizer.json").write_text(json.dumps(about))


# tokenizer and model


@pytest.mark.parametrize("name", RECIPES)
def test_a_token_that_the_model_has_not_is_refused_with_its_row(name, other, tmp_path):
    recipe, config = RECIPES[name]
    tokenizer = toy_language.make_tokenizer()
    tokenizer.add_tokens(["zebra"])  # the model's ids end below it
    tokenizer.save_pretrained(other)
    fine, last = ZEBRA | {"prompt": "the dog"}, {"rejected": " sat zebra ."}
    odd = ZEBRA if name in ("sft", "ppo") else fine | last  # on either side of a pair

    with pytest.raises(
        RequestError, match=r"row \d+:? .*has id 177, the model has ids from 0 to 176.*tokenizer it was"
    ):
        recipe.train(config(other, tmp_path / "run", data=written(tmp_path / "rows.jsonl", [fine, odd] * 8)))
    assert not (tmp_path / "run").exists()


def test_a_text_of_the_pretraining_that_the_model_has_no_token_for_is_refused(other, tmp_path):
    tokenizer = toy_language.make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    texts = written(tmp_path / "texts.jsonl", [{"text": "the zebra smiled ."}])

    with pytest.raises(RequestError, match=r"pretraining is .*row 1: it has id 177"):
        ppo.train(ppo_config(other, tmp_path / "run", pretraining=texts))


@pytest.mark.parametrize("name", ["sft", "reward-model", "dpo"])
def test_tokens_that_no_text_contains_do_no_harm(name, other, tmp_path):
    """Embeddings are often more than there are tokens: to a round number, or for tokens that may come."""
    recipe, config = RECIPES[name]
    model = toy_language.make_model(0)
    model.resize_token_embeddings(192)
    model.save_pretrained(other)

    assert recipe.train(config(other, tmp_path / "run")).metrics[-1]["optimizer_steps"] == 1


def test_a_word_of_a_reference_that_is_another_is_refused_with_both_digests(home, other, tmp_path):
    swap_two_words(other)

    for name in ("ppo", "dpo"):
        recipe, config = RECIPES[name]
        with pytest.raises(
            RequestError, match=r"reference is .* has the digest \w{12}\.\.\., the policy's \w{12}\.\.\."
        ):
            recipe.train(config(home, tmp_path / "run", reference=str(other)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["without a tokenizer", "with a token more"])
def test_a_reference_whose_tokens_are_the_policys_is_taken(how, home, other, tmp_path):
    tokenizer = toy_language.make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    if how == "without a tokenizer":
        for file in other.glob("tokenizer*"):
            file.unlink()

    assert ppo.train(ppo_config(home, tmp_path / "run", reference=str(other))).metrics


def test_a_reference_of_another_size_is_refused_for_pairs_too(home, other, tmp_path):
    model = toy_language.make_model(0)
    model.resize_token_embeddings(192)
    model.save_pretrained(other)

    with pytest.raises(RequestError, match=r"whose vocabulary has 192 tokens, the policy's 177"):
        dpo.train(RECIPES["dpo"][1](home, tmp_path / "run", reference=str(other)))


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_a_tokenizer_that_pads_with_its_end_learns_what_one_with_padding_of_its_own_does(name, home, other, tmp_path):
    """Rows are padded by their lengths; the end is learned, and padding is not, whatever the ids."""
    recipe, config = RECIPES[name]
    tokenizer = toy_language.make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(other)
    more = {"preflight": False} if name == "ppo" else {}
    make = ppo_config if name == "ppo" else config

    weights = [
        (
            recipe.train(make(place, tmp_path / place.name / "run", **more)).path / "policy/model.safetensors"
        ).read_bytes()
        for place in (home, other)
    ]

    assert weights[0] == weights[1]


# what a policy says


def says_only(token: int, home: Path) -> None:
    """The model gives this token all but e^-40 of the probability, whatever it reads."""
    own = toy_language.make_model(0)
    own.config.tie_word_embeddings = False
    model = LlamaForCausalLM(own.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[...] = 0 if "layers" in name and "norm" not in name else 1
        model.lm_head.weight[...] = 0
        model.lm_head.weight[token] = 1  # what it reads is 64 ones, so that this logit is 64 and the others are 0
    model.generation_config = own.generation_config
    model.save_pretrained(home)


@pytest.mark.parametrize(("token", "length", "stopped"), [(EOS, 1, 1.0), (WORD, 6, 0.0)], ids=["at once", "never"])
def test_a_policy_that_ends_at_once_or_never_is_counted_and_harms_nothing(token, length, stopped, other, tmp_path):
    says_only(token, other)

    run = ppo.train(
        ppo_config(other, tmp_path / "run", reward="length", truncation="drop", total_tokens=60, log_samples=2)
    )

    for line in run.metrics:
        assert (line["length_mean"], line["stopped"], line["score_missing_fraction"]) == (length, stopped, 0.0)
        assert line["score_mean"] == length
        assert (line["optimizer_steps"] > 0) == bool(stopped)  # what was cut short is masked: nothing to learn from
        assert "updates_skipped" not in line
    assert all(p.isfinite().all() for p in Policy.load(run.path / "policy").parameters())


# data


def test_a_prompt_of_no_tokens_is_refused_with_its_row(home):
    own = Tokenizer.load(home)
    with pytest.raises(RequestError, match=r"row 2: prompt is empty"):
        make_prompts([{"prompt": "the old"}, {"prompt": " \t"}], own, max_length=9)
    with pytest.raises(RequestError, match=r"row 1: prompt is empty: none of its messages has any text"):
        make_prompts([{"prompt": [{"role": "user", "content": ""}]}], own, max_length=9)
    with pytest.raises(RequestError, match=r"row 2: text is empty"):
        make_labelled_examples([{"text": "the old", "label": 1}, {"text": " ", "label": 0}], own, max_length=9)


MEGABYTE = 2**20


@pytest.mark.parametrize("kind", ["of many words", "of one word", "in a column that nobody reads"])
def test_a_row_of_a_megabyte_is_refused_with_its_row_or_read(kind, home, tmp_path):
    row = {
        "of many words": {"prompt": "the dog " * (MEGABYTE // 8)},
        "of one word": {"prompt": "x" * MEGABYTE},
        "in a column that nobody reads": {"prompt": "the dog", "note": "x" * MEGABYTE},
    }[kind]
    config = ppo_config(home, tmp_path / "run", data=written(tmp_path / "rows.jsonl", [{"prompt": "the dog"}, row]))

    if kind == "of many words":
        with pytest.raises(
            RequestError, match=r"row 2: prompt has 262145 tokens, and the model's context of 64 leaves 58"
        ):
            ppo.train(config)
    else:
        assert ppo.train(config).metrics[-1]["optimizer_steps"] > 0


def test_rows_that_are_all_the_same_are_learned_from_and_none_is_held_out(home, tmp_path):
    config = sft_config(home, tmp_path / "run", data=written(tmp_path / "rows.jsonl", [ZEBRA] * 40))

    run = sft.train(config)

    assert run.metrics[-1]["rows"] == 40 and "evaluation_loss" not in run.metrics[-1]


# the disk


@pytest.mark.parametrize("where", ["samples", "evaluation.json.part"])
def test_samples_that_cannot_be_written_are_said_once_and_the_run_goes_on(where, home, tmp_path, capsys):
    fields = {"log_samples": 2, "evaluate_every": 1, "total_tokens": 120}
    whole = ppo.train(ppo_config(home, tmp_path / "whole", **fields))
    path = tmp_path / "run" / where
    path.parent.mkdir()
    path.mkdir() if "." in where else path.write_text("")
    capsys.readouterr()

    run = ppo.train(ppo_config(home, tmp_path / "run", **fields))

    assert capsys.readouterr().err.count("cannot be written") == 1
    policies = [killed.digests(each.path)["policy/model.safetensors"] for each in (whole, run)]
    assert policies[0] == policies[1]


# spikes


def test_spikes_of_a_language_run_are_events_and_change_nothing(home, tmp_path, monkeypatch):
    """As in the control world: of a spike of one step and of one of five, each line is a finding."""
    plain = sft.train(sft_config(home, tmp_path / "plain", num_epochs=12))
    clip, calls = room._clip_gradients, 0

    def hundredfold(optimizer, bound):
        nonlocal calls
        calls += 1
        norm = clip(optimizer, bound)
        return 100 * norm if calls in (25, 31, 32, 33, 34, 35) else norm

    monkeypatch.setattr(room, "_clip_gradients", hundredfold)
    run = sft.train(sft_config(home, tmp_path / "run", num_epochs=12))

    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    found = [(line["iteration"], line["metric"]) for line in lines if line["kind"] == "spike"]
    assert found == [(n, "grad_norm") for n in (25, 31, 32, 33, 34, 35)]
    weights = [(each.path / "policy/model.safetensors").read_bytes() for each in (plain, run)]
    assert weights[0] == weights[1]


# secrets


TELLS = {
    "prints it": "print(SECRET); print(SECRET, file=sys.stderr); os.write(1, SECRET.encode())",
    "raises it": "raise ValueError(SECRET)",
    "gives it": "return [SECRET] * len(completions)",
}


@pytest.mark.parametrize("how", TELLS)
def test_a_secret_that_a_judge_tells_is_in_no_file_of_a_run(how, home, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", CANARY)
    body = f"    {TELLS[how]}\n    return [1.0] * len(completions)\n"
    head = "import os, sys\nSECRET = os.environ['JUDGE_API_KEY']\ndef score(completions):\n"
    (tmp_path / "mine.py").write_text(head + body)

    run = ppo.train(ppo_config(home, tmp_path / "run", reward=f"{tmp_path / 'mine.py'}:score", log_samples=2))

    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert "metrics.jsonl" in {file.name for file in files}
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]
