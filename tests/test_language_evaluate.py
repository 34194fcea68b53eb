"""Evaluation of language runs: rows are samples of their own, and intervals know what they are made of."""

import json
import math

import pytest

from tests.rehearsed import furnish, ppo_config
from understudy.language import ppo, toy_language
from understudy.language.evaluate import evaluate, explain_ended_worse, sample_evaluation_rollout
from understudy.language.rlhf import RLHFModels, close_workers

EIGHT = [f"the {name}" for name in toy_language.WORDS["someone"][:8]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def prompts(folder, *texts: str) -> str:
    """A file of these prompts."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(folder / "prompts.jsonl")


@pytest.fixture
def cast(home, tmp_path):
    """The cast of a run that does not begin, whose data are some prompts."""
    opened = []

    def of(*texts: str, **fields) -> RLHFModels:
        opened.append(RLHFModels(ppo_config(home, tmp_path / "run", data=prompts(tmp_path, *texts), **fields)))
        return opened[-1]

    yield of
    for one in opened:
        close_workers(one)


def ids(said) -> list[tuple[int, ...]]:
    return [tuple(completion.ids) for completion in said.completions]


def evaluation(cast: RLHFModels, rows: int) -> dict:
    return evaluate(cast.policy, cast.evaluation_sampler, cast.reward_sum, cast.gold_sum, cast.reference, num_rows=rows)


@pytest.mark.parametrize("texts", [["the dog"], ["the dog"] * 5, ["the dog", "a cat", "the dog"]])
def test_no_two_rows_of_an_evaluation_share_their_randomness(cast, texts):
    opened = cast(*texts, fixed_length=6)

    said = ids(sample_evaluation_rollout(opened.policy, opened.evaluation_sampler, [i % len(texts) for i in range(16)]))
    assert len(set(said)) == 16


def test_a_prompt_that_comes_once_has_the_seed_it_always_had(cast):
    opened = cast("the dog", "a cat", fixed_length=6)
    policy, examiner = opened.policy, opened.evaluation_sampler

    assert (
        ids(sample_evaluation_rollout(policy, examiner, [0, 1]))
        == ids(sample_evaluation_rollout(policy, examiner, [1, 0]))[::-1]
    )
    assert ids(sample_evaluation_rollout(policy, examiner, [0, 1, 0]))[:2] == ids(
        sample_evaluation_rollout(policy, examiner, [0, 1])
    )


def test_policy_and_reference_answer_with_the_same_seeds(cast):
    found = evaluation(cast("the dog", "a cat"), 8)  # the reference is the policy as it starts

    assert [sample["completion"] for sample in found["samples"]] == [sample["reference"] for sample in found["samples"]]
    assert found["win_rate"] == 0.5


def test_rows_and_prompts_are_both_counted(cast):
    found = evaluation(cast("the dog", "a cat", "the dog"), 9)

    assert (found["rows"], found["prompts"]) == (9, 2)


def test_intervals_are_clustered_by_prompt(cast):
    """The score is the prompt's: sixteen rows of two prompts are two numbers, 0 and 2, with a standard error of 1.

    Student's t of one degree of freedom is 12.706.
    """

    def by_prompt(prompts, completions):
        return [2.0 * prompt.startswith("a") for prompt in prompts]

    found = evaluation(cast("the dog", "a cat", reward=by_prompt), 16)

    assert (found["score"], found["score_low"], found["score_high"]) == pytest.approx((1.0, -11.706, 13.706), abs=1e-3)


@pytest.mark.parametrize("name", ["score", "win_rate", "stopped"])
def test_shares_of_all_or_nothing_have_a_width(cast, name):
    def right(completions):
        return [1.0] * len(completions)

    found = evaluation(cast(*EIGHT, reward=right, fixed_length=3), 8)

    assert 0 <= found[f"{name}_low"] < found[f"{name}_high"] <= 1


def test_what_does_not_vary_and_is_no_share_has_no_interval(cast):
    found = evaluation(cast("the dog", "a cat", fixed_length=6), 4)

    assert found["length"] == 6
    assert math.isnan(found["length_low"]) and math.isnan(found["length_high"])


def test_rows_without_a_score_are_in_no_interval(cast):
    def half(completions):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    found = evaluation(cast(*EIGHT, reward=half), 8)

    assert found["score"] == 1.0
    assert found["score_low"] == pytest.approx(0.5101, abs=1e-4)  # Wilson's of 4 of 4


def test_a_runs_metrics_say_how_many_rows_of_how_many_prompts(home, tmp_path):
    data = prompts(tmp_path, "the dog", "a cat")
    run = ppo.train(ppo_config(home, tmp_path / "run", data=data, evaluate_rows=6))

    assert (run.metrics[-1]["evaluation_rows"], run.metrics[-1]["evaluation_prompts"]) == (6, 2)
    assert run.metrics[-1]["evaluation_stopped_low"] < run.metrics[-1]["evaluation_stopped_high"]


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_equal_scores_below_the_references_ended_worse(unknown):
    line = {"evaluation_score": 0.5, "evaluation_score_low": unknown, "evaluation_score_high": unknown}
    line |= {"evaluation_reference_score": 0.7}

    assert "its score 0.5 [0.5, 0.5] is below" in str(explain_ended_worse(line | {"evaluation_win_rate_high": 0.1}))
    assert explain_ended_worse(line | {"evaluation_win_rate_high": 0.6}) is None
    assert explain_ended_worse({"evaluation_score": unknown, "evaluation_score_high": unknown}) is None
