"""The KL trust region and early stopping of language runs: what is measured, what is undone, and when a run ended worse."""

import copy
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tests.records import Table, random_batch, seeded
from tests.rehearsed import furnish
from understudy import resume
from understudy.batch import Batch, TokenBatch
from understudy.cli import main
from understudy.cli.rehearse import ended_worse as rehearsal_ended_worse
from understudy.cli.rehearse import shortfalls
from understudy.language import grpo, ppo, reinforce
from understudy.language.evaluate import explain_ended_worse
from understudy.language.model.policy import Policy
from understudy.language.trust_region import TrustRegion
from understudy.objective import ppo as clipped
from understudy.update import UpdateRejected, update

RECIPES = {
    "ppo": (ppo, {"num_epochs": 1, "num_minibatches": 1}),
    "grpo": (grpo, {"group_size": 4}),
    "reinforce": (reinforce, {"group_size": 4}),
}
STOPS = tuple(map(str, range(2, 170)))  # an untrained model ends most of its completions
SMALL = {
    "completions_per_iteration": 8,
    "max_new_tokens": 6,
    "total_tokens": 60,
    "reward": "length:4",
    "preflight": False,
    "quiet": True,
    "log_samples": 0,
}
SMALL |= {"evaluate_rows": 4}
WILD = {"learning_rate": 0.3, "learning_rate_schedule": "constant", "total_tokens": 90, "stop": STOPS}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("trust"))


def train(recipe, home, out, **fields):
    module, own = RECIPES[recipe]
    data = str(home / "prompts.jsonl")
    return module.train(module.Config(model=str(home), data=data, output_dir=str(out), **SMALL | own | fields))


def by_ids(prompts, completion_ids, **_):
    """Tells almost all completions apart, so that every group has something to learn from."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def events(run, kind):
    lines = (run.path / "events.jsonl").read_text().splitlines() if (run.path / "events.jsonl").exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def some_rows(rows, columns=7):
    ids = torch.randint(4, 60, (rows, columns), generator=seeded(1))
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, 2:5] = True
    mask[0, 4] = False
    nothing = torch.zeros(rows, columns)
    return Batch(
        obs=TokenBatch(ids, mask),
        action=TokenBatch(ids, mask).action,
        behavior_logprob=nothing,
        reward=nothing,
        terminated=mask & False,
        truncated=mask & False,
        mask=mask,
        value=nothing,
        advantage=nothing,
        target=nothing,
    )


def region(policy, batch, *, max_kl=1e9, fraction=1 / 16, micro=0):
    fields = {"trust_region_kl": max_kl, "trust_region_fraction": fraction, "micro_batch_size": micro}
    return TrustRegion(policy, batch, SimpleNamespace(**fields))  # pyright: ignore[reportArgumentType]


def moved(policy, by=0.3):
    generator = seeded(2)
    for parameter in policy.model.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("micro", [0, 3])
def test_the_kl_is_the_slow_sum_over_the_measured_rows(home, micro):
    policy, batch = Policy.from_pretrained(home), some_rows(20)
    before = copy.deepcopy(policy.model)
    measure = region(policy, batch, fraction=0.5, micro=micro)
    moved(policy)

    total, count = 0.0, 0
    for row in range(0, 20, 2):  # every second of 20 rows
        old, new = (
            m(batch.obs.ids[row][None]).logits[0].detach().double().log_softmax(-1) for m in (before, policy.model)
        )
        for column in batch.mask[row].nonzero()[:, 0].tolist():
            total += sum(float(p.exp() * (p - q)) for p, q in zip(old[column], new[column], strict=True))
            count += 1
    assert_close(measure()["kl_update"], total / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "measured"), [(4, 4), (8, 8), (64, 8), (256, 16)])
def test_a_sixteenth_of_the_rows_is_measured_at_least_eight(home, rows, measured):
    assert len(region(Policy.from_pretrained(home), some_rows(rows)).tokens) == measured


def test_rows_that_teach_nothing_are_not_measured(home):
    policy, batch = Policy.from_pretrained(home), some_rows(64)
    batch.mask[::2] = False  # dropped, or without a score: every eighth row is among them
    measure = region(policy, batch, max_kl=1e-3)
    moved(policy)

    assert len(measure.tokens) == 8 and bool(measure.mask.any(dim=1).all())
    with pytest.raises(UpdateRejected):
        measure()
    batch.mask[:] = False
    assert region(policy, batch)() == {}


def test_a_policy_that_stays_has_a_kl_of_zero_and_passes(home):
    measure = region(Policy.from_pretrained(home), some_rows(8), max_kl=1e-9)
    assert measure() == {"kl_update": 0.0}


@pytest.mark.parametrize("broken", [0.5, math.nan])
def test_a_kl_above_the_bound_or_not_a_number_is_rejected(home, broken):
    policy = Policy.from_pretrained(home)
    measure = region(policy, some_rows(8), max_kl=1e-3)
    moved(policy, by=broken)

    with pytest.raises(UpdateRejected, match=r"above trust_region_kl 0\.001"):
        measure()


@pytest.mark.parametrize("steps", [(1, 1), (2, 2)])
def test_an_update_that_is_rejected_leaves_no_trace(steps):
    policy, batch, reasons = Table(), random_batch(0, Table(), rows=6), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    objective = partial(clipped, clip=0.2, value_coef=0.5, entropy_coef=0.0)
    sizes = {"num_epochs": steps[0], "num_minibatches": steps[1], "max_grad_norm": 0.5, "generator": seeded(0)}
    update(policy, optimizer, batch, objective, **sizes)
    before = copy.deepcopy((policy.state_dict(), optimizer.state_dict()))
    at_the_end = []

    def reject():
        at_the_end.append(copy.deepcopy(policy.state_dict()))
        raise UpdateRejected("too far", {"kl_update": 7.0})

    metrics = update(policy, optimizer, batch, objective, **sizes, on_nonfinite=reasons.append, verify=reject)

    assert metrics == {"updates_skipped": 1, "optimizer_steps": 0, "epochs": 0, "kl_update": 7.0}
    assert [str(reason) for reason in reasons] == ["too far"]
    assert_close((policy.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert not torch.equal(at_the_end[0]["values"], before[0]["values"])  # there was something to undo


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_undoes_an_update_that_went_too_far(home, tmp_path, recipe, capsys):
    run = train(recipe, home, tmp_path / "run", **WILD, reward=by_ids, trust_region_kl=1e-6, quiet=False)
    start = Policy.from_pretrained(home).model.state_dict()
    end = Policy.from_pretrained(run.path / "policy").model.state_dict()

    rejected = events(run, "update_rejected")
    rates = [line["learning_rate"] for line in run.metrics]
    assert len(rejected) == len(run.metrics) >= 3
    assert_close(rates[:3], [0.3, 0.15, 0.075])  # halved by each
    assert all(line["kl_update"] > 1e-6 and line["optimizer_steps"] == 0 for line in run.metrics)
    assert all(torch.equal(end[name], tensor) for name, tensor in start.items())
    assert capsys.readouterr().err.count("is undone") == 1  # said once, counted in events.jsonl


def test_a_halved_learning_rate_is_back_after_ten_updates(home, tmp_path):
    run = train("ppo", home, tmp_path / "run", learning_rate=1e-9, learning_rate_schedule="constant", total_tokens=1)
    guard = SimpleNamespace(run=run, iteration=0, recipe_state={"lr_scale": 0.5}, cfg=SimpleNamespace(quiet=True))
    from understudy.run.guard import Guard

    scales = []
    for _ in range(12):
        Guard(guard).accept()
        scales.append(guard.recipe_state["lr_scale"])
    assert_close(scales[0], 0.5 * 2**0.1)
    assert_close(scales[9:], [1.0, 1.0, 1.0])


def test_a_run_inside_the_region_is_the_run_without_one(home, tmp_path):
    ends = []
    for name, bound in (("with", 0.3), ("without", 0.0)):
        run = train("ppo", home, tmp_path / name, learning_rate=1e-4, trust_region_kl=bound)
        ends.append(Policy.from_pretrained(run.path / "policy").model.state_dict())
        assert ("kl_update" in run.metrics[0]) == (name == "with")
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_that_was_rejected_resumes_to_the_same_bytes(home, tmp_path):
    fields = WILD | {"trust_region_kl": 0.02, "learning_rate": 0.01, "checkpoint_every": 2, "keep_checkpoints": 9}
    run = train("ppo", home, tmp_path / "run", **fields)
    end = (run.path / "policy" / "model.safetensors").read_bytes()
    scales = [event["lr_scale"] for event in events(run, "update_rejected")]
    assert scales  # else nothing is shown

    again = resume(run.path, checkpoint="000002")

    assert (again.path / "policy" / "model.safetensors").read_bytes() == end
    assert again.metrics[-1]["learning_rate"] == run.metrics[-1]["learning_rate"]


@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_target_kl_ends_an_update_early(home, tmp_path, recipe):
    fields = {
        "num_epochs": 4,
        "num_minibatches": 2,
        "learning_rate": 0.01,
        "trust_region_kl": 0.0,
        "total_tokens": 20,
        "stop": STOPS,
    }
    whole = train(recipe, home, tmp_path / "whole", **fields)
    ended = train(recipe, home, tmp_path / "ended", **fields, target_kl=1e-3)

    assert whole.metrics[0]["optimizer_steps"] == 8
    assert 1 <= ended.metrics[0]["optimizer_steps"] < 8


# how a run ended

FINE = {
    "score": 0.5,
    "score_low": 0.4,
    "score_high": 0.6,
    "reference_score": 0.3,
    "win_rate_high": 0.7,
    "kl": 5.0,
    "stopped": 0.9,
    "reference_stopped": 1.0,
    "distinct_4": 0.6,
    "reference_distinct_4": 0.9,
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"score": 0.2, "score_low": 0.1, "score_high": 0.29, "win_rate_high": 0.49}, "score 0.2 [0.1, 0.29] is below"),
        ({"score": 0.2, "score_low": 0.1, "score_high": 0.31, "win_rate_high": 0.49}, None),  # the interval holds it
        ({"score": 0.2, "score_low": 0.1, "score_high": 0.29, "win_rate_high": 0.51}, None),
        ({"kl": 19.0}, "its KL to the reference is 19 nats, where kl_reference_target is 6"),
        ({"kl": 17.0}, None),
        ({"stopped": 0.4}, "share of completions that end: 0.4, the reference's 1"),
        ({"distinct_4": 0.4}, "distinct 4-grams: 0.4, the reference's 0.9"),
        ({"distinct_4": 0.0, "length": 2.9}, None),  # too short to have any
    ],
)
def test_an_evaluation_says_whether_a_run_ended_worse(changed, words):
    found = explain_ended_worse(
        {f"evaluation_{name}": x for name, x in (FINE | changed).items()}, kl_reference_target=6.0
    )

    assert (found is None) if words is None else words in found


def test_a_line_without_an_evaluation_says_nothing():
    assert explain_ended_worse({"score_mean": -9.0}, kl_reference_target=1.0) is None


def test_a_run_that_ended_worse_exits_1_where_asked(home, tmp_path, capsys):
    words = (
        f"language ppo --model {home} --data {home}/prompts.jsonl --reward length:4 --completions-per-iteration 8 "
        "--max-new-tokens 6 --total-tokens 9"
    )
    far = f"--kl-reference-target 1e-9 --evaluate-rows 4 --no-preflight --quiet --out {tmp_path}/run --fail-if-worse"

    assert main([*words.split(), *far.split()]) == 1
    assert "Warning: the run ended worse than it began: its KL to the reference is" in capsys.readouterr().out
    assert "ended_worse" in (tmp_path / "run" / "events.jsonl").read_text()

    assert main(["resume", f"{tmp_path}/run", "--steps", "18", "--fail-if-worse", "--json"]) == 1
    assert "the run ended worse than it began" in json.loads(capsys.readouterr().out.splitlines()[-1])["ended_worse"]
    assert main(["resume", f"{tmp_path}/run"]) == 0
    said = capsys.readouterr()
    assert "Warning: the run ended worse than it began" in said.out and "nothing was left to do" in said.err

    assert main(["resume", f"{tmp_path}/run", "--steps", "18", "--fail-if-worse", "--json"]) == 1
    assert "the run ended worse than it began" in json.loads(capsys.readouterr().out.splitlines()[-1])["ended_worse"]
    assert main(["resume", f"{tmp_path}/run"]) == 0
    said = capsys.readouterr()
    assert "Warning: the run ended worse than it began" in said.out and "nothing was left to do" in said.err


def test_fail_if_worse_is_refused_where_nothing_is_compared(home, tmp_path, capsys):
    words = f"language sft --model {home} --data {home}/texts.jsonl --fail-if-worse --out {tmp_path}/run"

    assert main(words.split()) == 2
    assert "fail_if_worse" in capsys.readouterr().err


REHEARSED = {
    "gap_closed": 0.7,
    "kl": 3.0,
    "sft": {"true_score": 0.3, "distinct_4": 0.9, "grammatical": 0.9, "copied": 0.0},
    "ppo": {"true_score": 0.5, "distinct_4": 0.8, "grammatical": 0.8, "copied": 0.0},
}


@pytest.mark.parametrize(
    ("changed", "after", "missed", "worse"),
    [
        ({}, {}, [], False),
        ({"gap_closed": 0.4}, {}, ["PPO closes 40% of the gap, which is less than 50%"], False),
        ({"kl": 11.0}, {}, ["its KL to SFT is 11 nats, above 10"], False),
        ({}, {"distinct_4": 0.7}, ["its distinct-4 is 0.700, below 0.8 of SFT's, 0.720"], False),
        ({}, {"copied": 0.5}, ["50% of its sentences are copied from the demonstrations"], False),
        ({"gap_closed": -0.1}, {"true_score": 0.2}, ["PPO closes -10% of the gap, which is less than 50%"], True),
        ({"kl": 31.0}, {}, ["its KL to SFT is 31 nats, above 10"], True),
        ({}, {"grammatical": 0.4}, ["40% of its sentences are grammatical, under half of SFT's share"], True),
    ],
)
def test_a_rehearsal_names_what_it_missed(changed, after, missed, worse):
    found = {**REHEARSED, **changed, "ppo": {**REHEARSED["ppo"], **after}}

    assert shortfalls(found) == missed
    assert rehearsal_ended_worse(found) == worse
