"""Constraints on language models: what may be bounded, what is charged, what a run does that breaks one."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from tests.rehearsed import furnish
from understudy import resume
from understudy.language import grpo, ppo, reinforce
from understudy.language.model.policy import Policy
from understudy.language.rewards.reward_sum import RewardSum, Scores
from understudy.language.rlhf import RLHFModels, close_workers, open_rlhf_run
from understudy.run.config import RequestError

RECIPES = {"ppo": ppo, "grpo": grpo, "reinforce": reinforce}
OF_EVERY_RECIPE = pytest.mark.parametrize("name", RECIPES)
FIXED = {
    "fixed_length": 5,
    "completions_per_iteration": 8,
    "preflight": False,
    "quiet": True,
    "log_samples": 0,
    "evaluate_rows": 4,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def config(home, out, *constraint, recipe=ppo, **fields):
    """Completions of 5 tokens, 8 an iteration, three iterations."""
    given = {
        "model": str(home),
        "data": str(home / "prompts.jsonl"),
        "output_dir": str(out),
        "reward": "length:4",
        "total_tokens": 120,
    }
    given |= {"group_size": 4} if recipe is not ppo else {}
    return recipe.Config(**{**given, **FIXED, **fields, "constraint": constraint})


def train(home, out, *constraint, recipe=ppo, **fields):
    return recipe.train(config(home, out, *constraint, recipe=recipe, **fields))


@pytest.fixture
def cast(home, tmp_path):
    opened = []

    def make(*constraint, **fields):
        opened.append(RLHFModels(config(home, tmp_path / "run", *constraint, **fields)))
        return opened[-1]

    yield make
    for one in opened:
        close_workers(one)


def events(run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]


def mine(prompts, completion_ids):
    return [float(len(set(ids))) for ids in completion_ids]


# what may be bounded


@OF_EVERY_RECIPE
def test_a_spec_that_is_no_part_yet_is_measured_for_its_bound(home, tmp_path, name):
    run = train(home, tmp_path / "run", "length<=4", recipe=RECIPES[name])

    # every completion has 5 tokens, 1 too many: the multiplier gains 0.1 an iteration
    assert [line["constraint_length"] for line in run.metrics] == [5.0] * 3
    found = [line["constraint_length_at_most_multiplier"] for line in run.metrics]
    assert found == pytest.approx([0.1, 0.2, 0.3])
    assert not {"gold_mean", "evaluation_gold"} & set(run.metrics[-1])


def test_the_contracts_own_example_runs_as_it_stands(home, tmp_path):
    run = train(home, tmp_path / "run", "repetition<=0.1")

    assert 0 <= run.metrics[-1]["constraint_repetition"] <= 1


def test_a_part_of_reward_and_one_of_gold_are_bounded_by_their_names(home, tmp_path):
    def paid(prompts, completion_ids):
        return [float(ids[0]) for ids in completion_ids]

    run = train(home, tmp_path / "run", "paid>=0", "mine<=5:warn", reward=(paid, "repetition*0"), gold=mine)

    line = run.metrics[0]
    assert line["constraint_paid"] == line["score_paid"] == line["score_mean"]
    assert line["constraint_mine"] == line["gold_mean"]


@pytest.mark.parametrize("gold", [(), ("length:9",)])
def test_a_length_is_a_length_though_one_is_paid_for_how_near_it_is_to_another(home, tmp_path, gold):
    run = train(home, tmp_path / "run", "length<=6", "length:4>=-1:warn", reward=("length:4", "repetition"), gold=gold)

    line = run.metrics[0]
    assert (line["constraint_length"], line["constraint_length:4"]) == (5.0, -0.25)
    assert line["score_length"] == -0.25
    assert line.get("gold_mean") == (pytest.approx(-4 / 9) if gold else None)


def test_a_metric_is_bounded_by_its_name_but_no_row_can_be_charged_for_it(home, tmp_path, cast):
    run = train(home, tmp_path / "run", "kl_reference>=-1:warn")
    assert run.metrics[0]["constraint_kl_reference"] == run.metrics[0]["kl_reference"]

    with pytest.raises(RequestError, match=r"kl_reference is a metric.*write 'kl_reference<=1:warn'"):
        cast("kl_reference<=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [("repetion<=0.1", "did you mean 'repetition'"), ("nowhere.py:f<=1", "there is no file"), ("length:x<=1", "'x'")],
)
def test_what_is_neither_part_nor_metric_nor_spec_is_refused(cast, text, words):
    with pytest.raises(RequestError, match="constraint") as refused:
        cast(text)
    assert words in str(refused.value)


def test_a_constraint_that_is_written_wrong_is_refused_with_the_config(home, tmp_path):
    with pytest.raises(RequestError, match="constraint is 'length'"):
        config(home, tmp_path, "length")


# what is charged


def part(*values: float) -> dict[str, torch.Tensor]:
    return {"length": torch.tensor(values)}


def test_a_held_cost_is_taken_off_each_rows_score(cast):
    made = cast("length<=2", reward="repetition", constraint_rate=0.5)
    verdict = Scores(torch.tensor([1.0, 1.0]), {}, Scores(torch.zeros(2), part(2.0, 4.0)))

    # the mean is 3, 1 too much: multiplier 0.5; 1 - 0.5 * 2 and 1 - 0.5 * 4
    assert_close(made.apply_constraints(verdict), torch.tensor([0.0, -1.0]))
    assert_close(made.subtract_constraint_costs(verdict), torch.tensor([0.0, -1.0]))  # asked again, nothing adapts


def test_a_row_whose_cost_is_missing_is_missing(cast):
    made = cast("length<=2", reward="repetition")
    paid = made.apply_constraints(Scores(torch.ones(2), {}, Scores(torch.zeros(2), part(math.nan, 3.0))))

    # the mean is of those that are there: 0.1 * (3 - 2) = 0.1
    assert paid[0].isnan() and paid[1].item() == pytest.approx(0.7)


def test_a_part_of_weight_zero_is_measured_and_nothing_else():
    judge = RewardSum([("a", 1.0, lambda s: torch.ones(2)), ("b", 0.0, lambda s: torch.tensor([5.0, math.nan]))])
    verdict = judge([None, None])  # pyright: ignore[reportArgumentType]  # only its length is looked at

    assert_close(verdict.score, torch.ones(2))
    assert_close(verdict.terms["b"], torch.tensor([5.0, math.nan]), equal_nan=True)


@OF_EVERY_RECIPE
def test_a_held_bound_teaches_and_one_that_only_warns_changes_nothing(home, tmp_path, name):
    def first(completion_ids, **_):
        return [float(ids[0] % 7) for ids in completion_ids]

    recipe, found = RECIPES[name], {}
    for kind in ("hold", "warn", "none"):
        constraint = () if kind == "none" else (f"first<=0:{kind}",)
        run = train(home, tmp_path / kind, *constraint, recipe=recipe, gold=first, learning_rate=1e-3)
        found[kind] = Policy.from_pretrained(run.path / "policy").model.state_dict()
    assert all(torch.equal(x, found["none"][name]) for name, x in found["warn"].items())
    assert any(not torch.equal(x, found["none"][name]) for name, x in found["hold"].items())


def test_a_group_that_differs_in_its_cost_alone_is_not_replaced(home, tmp_path):
    def alike(prompts, **_):
        return [1.0] * len(prompts)

    fields = {
        "recipe": grpo,
        "reward": alike,
        "gold": mine,
        "max_new_tokens": 12,
        "fixed_length": 12,
        "total_tokens": 12 * 8 * 3,
    }
    held = train(home, tmp_path / "a", "mine<=0", **fields)
    free = train(home, tmp_path / "b", **fields)

    # before the first adaptation the multiplier is 0, and nothing tells the answers apart
    assert [line["groups_without_signal"] for line in free.metrics] == [1.0] * 3
    assert held.metrics[0]["groups_without_signal"] == 1.0 and held.metrics[-1]["groups_without_signal"] < 1.0


# what a run does


@OF_EVERY_RECIPE
def test_a_run_stops_at_a_bound_says_why_and_evaluates_what_it_has(home, tmp_path, name):
    run = train(home, tmp_path / "run", "length<=4:stop", recipe=RECIPES[name])

    assert len(run.metrics) == 1 and run.stop_reason == "length is 5: outside length<=4"
    assert [event["kind"] for event in events(run)][-2:] == ["constraint", "stopped"]
    assert "evaluation_score" in run.metrics[-1] and (run.path / "policy").is_dir()


def late():
    """A function that is 0 in the first two iterations, then 1."""
    calls = iter(range(99))

    def late(prompts):
        return [float(next(calls) >= 2)] * len(prompts)

    return late


def test_a_run_goes_back_to_the_weights_that_were_inside(home, tmp_path):
    fields = {"learning_rate": 1e-2, "learning_rate_schedule": "constant"}
    run = train(home, tmp_path / "run", "late<=0.5:rollback", gold=late(), **fields)
    first = train(home, tmp_path / "first", **(fields | {"total_tokens": 40}))  # one iteration
    ours, theirs = (Policy.from_pretrained(r.path / "policy").model.state_dict() for r in (run, first))

    assert [event["kind"] for event in events(run)][-2:] == ["constraint", "rolled_back"]
    # the state that was inside last is the one the second iteration sampled with, before its update
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_run_that_may_not_go_back_again_stops(home, tmp_path):
    run = train(home, tmp_path / "run", "late<=0.5:rollback", gold=late(), constraint_rollbacks=0, total_tokens=400)

    assert [event["kind"] for event in events(run)][-3:] == ["constraint", "rolled_back", "stopped"]
    assert len(run.metrics) == 3 and run.stop_reason.startswith("late is 1: outside late<=0.5")


def test_the_learning_rate_is_halved_for_every_way_back(home, tmp_path):
    with open_rlhf_run("ppo", config(home, tmp_path / "run", "length<=4:rollback")) as (run, cast):
        before = run.update_learning_rate()
        run.constraints.num_rollbacks = 2
        assert run.update_learning_rate() == before / 4
        assert cast.constraints is run.constraints


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(home, tmp_path, number):
    file = tmp_path / "mine.py"
    file.write_text("def changing(completion_ids):\n    return [float(sum(ids) % 5) for ids in completion_ids]\n")
    constraints = f"{file}:changing<=1.5", f"{file}:changing<=2.1:rollback"
    fields = {
        "learning_rate": 1e-2,
        "total_tokens": 240,
        "checkpoint_every": 1,
        "constraint_rollbacks": 9,
        "constraint_rate": 2.0,
    }
    whole = train(home, tmp_path / "run", *constraints, **fields, keep_checkpoints=99)
    ours = Policy.from_pretrained(whole.path / "policy").model.state_dict()
    lines = [{name: x for name, x in line.items() if "constraint" in name} for line in whole.metrics]

    again = resume(whole.path, checkpoint=f"{number:06d}")
    theirs = Policy.from_pretrained(again.path / "policy").model.state_dict()

    assert any(event["kind"] == "rolled_back" for event in events(whole))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert [{name: x for name, x in line.items() if "constraint" in name} for line in again.metrics] == lines


def test_a_stopped_run_stays_stopped(home, tmp_path):
    run = train(home, tmp_path / "run", "length<=4:stop")
    again = resume(run.path)

    assert len(again.metrics) == 1 and again.stop_reason == run.stop_reason


def test_a_bound_that_breaks_is_said_on_the_way(home, tmp_path, capsys):
    train(home, tmp_path / "run", "length<=4:warn", quiet=False)

    assert "understudy: length is 5: outside length<=4" in capsys.readouterr().err
