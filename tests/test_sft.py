"""Supervised fine-tuning: what it minimises, how it passes over the data, what it leaves behind."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import FAMILIES, tiny
from tests.rehearsed import furnish, letters, sft_config
from understudy.language import sft
from understudy.language.data.records import Tokenizer
from understudy.language.model.policy import Policy

EVERY = pytest.mark.parametrize(("family", "tied"), [(f, t) for f in FAMILIES for t in (False, True)])
ONE_STEP = {"total_tokens": 1, "held_out": 0, "learning_rate_schedule": "constant"}
SMOOTH = {"learning_rate": 1e-3, "adam_eps": 1e-2}  # a large epsilon: rounding is not made larger by Adam's division


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture
def go(home, tmp_path):
    """Trains with some fields; each run in a directory of its own."""
    count = iter(range(99))

    def train(**fields):
        return sft.train(sft_config(home, tmp_path / f"run{next(count)}", **fields))

    return train


def apart(one, other) -> float:
    """The largest distance between two models' parameters."""
    here, there = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, other))
    return max(float((x - there[name]).abs().max()) for name, x in here.items())


def test_the_loss_is_the_surprise_of_the_completions_tokens_alone(go, home):
    rows = [json.loads(line) for line in (home / "demonstrations.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(home), Tokenizer.load(home)
    surprise = []
    for row in rows:
        prompt = tokenizer.encode_prompt(row["prompt"])
        ids = torch.tensor([*prompt, *tokenizer.encode_completion(row["completion"], row["prompt"])])
        logp = model(ids[None]).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
        surprise += logp[len(prompt) - 1 :].detach().neg().tolist()

    run = go(batch_size=40, **ONE_STEP)

    assert run.metrics[0]["loss"] == pytest.approx(sum(surprise) / len(surprise), abs=1e-4)
    assert run.metrics[0]["steps"] == len(surprise)


def test_every_row_is_learned_from_once_an_epoch(go):
    run = go(num_epochs=3, batch_size=10)

    # 40 rows, of which 8 are kept: 32 an epoch
    assert [line["rows"] for line in run.metrics] == [10, 20, 30, 32, 42, 52, 62, 64, 74, 84, 94, 96]


def test_the_loss_falls_on_rows_it_did_not_learn_from(go):
    run = go(num_epochs=6, learning_rate=5e-3, evaluate_every=1)

    first, last = run.metrics[0], run.metrics[-1]
    assert last["evaluation_loss"] < first["evaluation_loss"] - 0.5
    assert last["evaluation_perplexity"] == pytest.approx(math.exp(last["evaluation_loss"]))


def test_the_first_step_of_adam_is_one_learning_rate_long(go, home):
    assert apart(go(learning_rate=1e-3, **ONE_STEP).path / "policy", home) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    "fields", [{"micro_batch_size": 3}, {"packing": True}, {"gradient_checkpointing": True}], ids=str
)
def test_how_rows_are_read_does_not_change_what_is_learned(go, home, fields):
    together, otherwise = go(**SMOOTH).path / "policy", go(**SMOOTH, **fields).path / "policy"

    assert apart(together, home) > 1e-4
    assert apart(together, otherwise) < 1e-5


def test_a_seed_decides_every_parameter(go):
    one, again, other = (go(seed=seed, learning_rate=1e-3).path / "policy" for seed in (1, 1, 2))

    assert apart(one, again) == 0.0
    assert apart(one, other) > 1e-5


def test_bfloat16_is_what_parameters_are_kept_in(go):
    path = go(dtype="bfloat16").path / "policy"

    assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.bfloat16


def test_only_the_last_turn_of_a_chat_is_learned_from(go, tmp_path):
    turns = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "smiled ."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"

    run = go(data=str(tmp_path / "chat.jsonl"), chat_template=template, **ONE_STEP)

    assert run.metrics[0]["steps"] == 3  # smiled, the full stop, and the stop id
    assert AutoTokenizer.from_pretrained(run.path / "policy").chat_template == template


def test_all_turns_of_a_chat_are_learned_from_where_asked(go, tmp_path):
    turns = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "smiled </s>"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [*turns, *turns]}) + "\n")
    template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"

    run = go(data=str(tmp_path / "chat.jsonl"), chat_template=template, train_on="all", **ONE_STEP)

    assert run.metrics[0]["steps"] == 4  # twice: smiled and the stop


def test_a_stop_that_was_named_is_learned_and_saved(go, home):
    run = go(stop=("<pad>",), **ONE_STEP)

    assert AutoModelForCausalLM.from_pretrained(run.path / "policy").generation_config.eos_token_id == 0
    assert Tokenizer.load(run.path / "policy").stops == {0}


def test_a_run_is_a_model_to_go_on_from(go, home):
    first = go(learning_rate=1e-3)

    again = go(model=str(first.path), learning_rate=1e-12)

    assert apart(again.path / "policy", first.path / "policy") < 1e-8


@EVERY
def test_a_policy_of_every_family_is_learned_saved_and_loaded_as_it_is(family, tied, home, tmp_path):
    tiny(family, tied=tied).save_pretrained(tmp_path / "model")
    letters(pad="<pad>", template="{{ bos_token }}{{ messages[0].content }}").save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a b", "completion": " c d"}, {"prompt": "e", "completion": " f g h i j k l"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    here = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl"), "learning_rate": 1e-3}

    path = sft.train(sft_config(home, tmp_path / "run", **here)).path / "policy"

    plain, ours = AutoModelForCausalLM.from_pretrained(path), Policy.load(path)
    ids = torch.tensor([[1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 2]])
    distribution, _ = ours(ids)
    logp = plain(ids).logits.log_softmax(dim=-1)
    assert ours.is_head_separable
    assert_close(ours.model(ids, use_cache=False).logits, plain(ids).logits, atol=1e-5, rtol=0)
    assert_close(distribution.entropy(), -(logp.exp() * logp).sum(dim=-1), atol=1e-5, rtol=0)
    assert apart(path, tmp_path / "model") > 1e-4
    assert AutoTokenizer.from_pretrained(path).chat_template == "{{ bos_token }}{{ messages[0].content }}"
    assert plain.generation_config.eos_token_id == 2
    assert (plain.config.tie_word_embeddings, plain.generation_config.temperature) == (tied, 1.0)
