"""Updates that are not finite: left out, the state before them back bit for bit, noted; three in a row end the run."""

import copy
import importlib
import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import understudy
from tests.faults import killed
from tests.records import Table, random_batch, seeded
from tests.rehearsed import furnish
from understudy import update as room
from understudy.batch import Batch
from understudy.control import ppo
from understudy.objective import ppo as clipped
from understudy.run import checkpoint
from understudy.update import update

SMALL = {
    "env": "CartPole-v1",
    "num_envs": 2,
    "num_steps_per_env": 8,
    "num_epochs": 2,
    "steps": 160,
    "seed": 3,
    "quiet": True,
}
RECIPES = ("reinforce", "actor-critic", "ppo", "ppo-recurrent", *killed.LANGUAGE)


class Scaled(Table):
    """A table with a buffer that every pass moves, as a batch norm has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, obs):
        self.passes += 1
        return super().forward(obs)


def at(tensor, value):
    """The same with its entry in row 3 another number: that row is in some minibatch."""
    changed = tensor.clone()
    changed[3, 1] = value
    return changed


def not_finite_only_backwards(policy, batch, **how):
    """A loss of its own value whose gradient is no number, 0 * sqrt(0), or infinite, sqrt(0)."""
    loss, metrics = clipped(policy, batch, **how)
    if (batch.advantage == 7).any():
        loss = loss + (0 * policy.values.sum()).sqrt()
    if (batch.advantage == 8).any():
        loss = loss + (policy.values - policy.values.detach()).sum().sqrt()
    return loss, metrics


FAULTS = {  # fields of the record, by kind
    "an advantage that is nan": lambda b: {"advantage": at(b.advantage, torch.nan)},
    "an infinite advantage": lambda b: {"advantage": at(b.advantage, torch.inf)},
    "a target that is nan": lambda b: {"target": at(b.target, torch.nan)},
    "an infinite target": lambda b: {"target": at(b.target, -torch.inf)},
    "an infinite ratio": lambda b: {"behavior_logprob": at(b.behavior_logprob, -1e30)},
    "a log-prob of -inf": lambda b: {"behavior_logprob": at(b.behavior_logprob, -torch.inf)},
    "a log-prob that is nan": lambda b: {"behavior_logprob": at(b.behavior_logprob, torch.nan)},
    "a gradient that is nan, of a finite loss": lambda b: {"advantage": at(b.advantage, 7)},
    "an infinite gradient, of a finite loss": lambda b: {"advantage": at(b.advantage, 8)},
}


def whole_record() -> Batch:
    batch = random_batch(0, Table(), rows=6)
    return Batch.of(batch, mask=torch.ones_like(batch.mask), reference=None)


def state_of(policy, optimizer):
    return copy.deepcopy((policy.state_dict(), optimizer.state_dict()))


LATE = 0
"""A seed that shuffles row 3 into the last of four minibatches: three steps are made before what is wrong is met."""


def learn(policy, optimizer, batch, *, epochs=2, minibatches=4, told=None):
    objective = partial(not_finite_only_backwards, clip=0.2, value_coef=0.5, entropy_coef=0.01)
    sizes = {"num_epochs": epochs, "num_minibatches": minibatches, "max_grad_norm": 0.5}
    return update(policy, optimizer, batch, objective, **sizes, on_nonfinite=told, generator=seeded(LATE))


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("steps", [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_an_update_that_is_not_finite_leaves_no_trace(kind, steps):
    batch, told = whole_record(), []
    policy = Scaled()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    learn(policy, optimizer, batch)
    before, buffer_before = state_of(policy, optimizer), policy.passes.item()
    bad, made = Batch.of(batch, **FAULTS[kind](batch)), []
    optimizer.register_step_post_hook(lambda *_: made.append(1))

    metrics = learn(policy, optimizer, bad, epochs=steps[0], minibatches=steps[1], told=told.append)

    assert len(made) == steps[1] - 1  # or there is nothing to undo
    assert metrics == {"updates_skipped": 1, "optimizer_steps": 0, "epochs": 0}
    assert len(told) == 1 and isinstance(told[0], FloatingPointError)
    if steps != (1, 1):
        assert policy.passes.item() == buffer_before
        policy_before, optimizer_before = before
        assert_close(policy.state_dict(), policy_before, rtol=0, atol=0)
        assert_close(optimizer.state_dict(), optimizer_before, rtol=0, atol=0)
    else:
        assert_close(optimizer.state_dict(), before[1], rtol=0, atol=0)
        assert all(torch.equal(p, before[0][name]) for name, p in policy.named_parameters())
    assert all(p.grad is None for p in policy.parameters())


def test_what_comes_after_is_what_comes_without_the_update_that_was_left_out():
    batch = whole_record()
    bad = Batch.of(batch, advantage=at(batch.advantage, torch.nan))
    ends = []
    for records in ([batch, bad, batch], [batch, batch]):
        policy = Table()
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
        for record in records:
            learn(policy, optimizer, record, told=lambda error: None)
        ends.append(state_of(policy, optimizer))

    assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_a_step_size_that_was_steered_comes_back():
    batch, steered = whole_record(), []
    policy = Table()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)

    def steer(metrics):
        optimizer.param_groups[0]["lr"] *= 0.5
        steered.append(metrics)
        return False

    bad = Batch.of(batch, advantage=at(batch.advantage, torch.nan))
    objective = partial(clipped, clip=0.2, value_coef=0.5, entropy_coef=0.0)
    sizes = {"num_epochs": 2, "num_minibatches": 4, "max_grad_norm": 0.5}
    update(
        policy,
        optimizer,
        bad,
        objective,
        **sizes,
        on_minibatch=steer,
        on_nonfinite=lambda error: None,
        generator=seeded(LATE),
    )

    assert len(steered) == 3
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("rows", [0, 6])
def test_a_record_in_which_nothing_was_chosen_is_no_fault(rows):
    """Empty, or masked all over: no step is made, and the guard hears of nothing."""
    batch, told = whole_record(), []
    policy = Table()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    nothing = Batch.of(batch, mask=torch.zeros_like(batch.mask))[:rows]

    metrics = learn(policy, optimizer, nothing, told=told.append)

    assert metrics["optimizer_steps"] == 0 and "updates_skipped" not in metrics and not told


# whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def nan_in_gradients(monkeypatch, calls):
    """From here on, these clippings of gradients (from 1) find one that is not a number."""
    clip, count = room._clip_gradients, 0

    def clipping(optimizer, bound):
        nonlocal count
        count += 1
        if count in calls:
            next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None).grad[...] = (
                torch.nan
            )
        return clip(optimizer, bound)

    monkeypatch.setattr(room, "_clip_gradients", clipping)


def spied(monkeypatch, module):
    """Every update of a recipe: whether it was left out, and whether what learns and its optimizer stayed as they were."""
    seen, own = [], module.update

    def watching(policy, optimizer, *args, **options):
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        before = copy.deepcopy((learned, optimizer.state_dict()))
        metrics = own(policy, optimizer, *args, **options)
        now = (learned, optimizer.state_dict())
        try:
            assert_close(now, before, rtol=0, atol=0)
            seen.append(("updates_skipped" in metrics, True))
        except AssertionError:
            seen.append(("updates_skipped" in metrics, False))
        return metrics

    monkeypatch.setattr(module, "update", watching)
    return seen


def events(path, kind):
    lines = (path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_on_after_an_update_that_was_left_out(name, home, tmp_path, monkeypatch):
    recipe, config = killed.configured(name, home, tmp_path / "run")
    seen = spied(monkeypatch, importlib.import_module(recipe.__name__))
    nan_in_gradients(monkeypatch, {2})

    run = recipe.train(config)

    (event,) = events(run.path, "update_skipped")
    assert "gradient's norm is nan" in event["reason"]
    left_out = [number for number, (skipped, _) in enumerate(seen, 1) if skipped]
    assert left_out == [event["iteration"]]
    assert [same for skipped, same in seen if skipped] == [True]
    assert sum(not same for _, same in seen) >= 2  # others moved it
    assert any(line.get("updates_skipped") for line in run.metrics)


def test_three_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path, monkeypatch):
    """A rollout is 2 epochs of 4 steps: after three updates, the first step of each of the next three."""
    config = ppo.Config(**SMALL, output_dir=str(tmp_path / "run"), checkpoint_every=1)
    nan_in_gradients(monkeypatch, {24 + 3, 27 + 1, 28 + 1})

    with pytest.raises(FloatingPointError, match=r"3 updates in a row .*run/checkpoints/000005'.* `understudy resume "):
        ppo.train(config)

    assert [event["iteration"] for event in events(tmp_path / "run", "update_skipped")] == [4, 5, 6]
    found, wrong = checkpoint.find_newest(tmp_path / "run/checkpoints")
    assert found is not None and found.name == "000005" and not wrong
    weights = [
        checkpoint.load_tensors(tmp_path / f"run/checkpoints/{name}/policy.safetensors")
        for name in ("000003", "000005")
    ]
    assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_before_there_is_a_checkpoint_three_in_a_row_say_so(tmp_path, monkeypatch):
    nan_in_gradients(monkeypatch, {1, 2, 3})

    with pytest.raises(
        FloatingPointError, match=r"3 updates in a row .* no checkpoint under .*start again with another"
    ):
        ppo.train(ppo.Config(**SMALL, output_dir=str(tmp_path / "run"), checkpoint_every=100))


@pytest.mark.parametrize("quiet", [False, True])
def test_an_update_that_was_left_out_is_said_unless_the_run_is_quiet(quiet, tmp_path, monkeypatch, capsys):
    nan_in_gradients(monkeypatch, {9})

    ppo.train(ppo.Config(**SMALL | {"quiet": quiet}, output_dir=str(tmp_path / "run")))

    said = "understudy: update 2 is left out: the gradient's norm is nan" in capsys.readouterr().err
    assert said is not quiet


def test_two_in_a_row_and_two_in_a_row_do_not(tmp_path, monkeypatch):
    nan_in_gradients(monkeypatch, {1, 2, 11, 12})  # a whole update of 8 between them

    run = ppo.train(ppo.Config(**SMALL, output_dir=str(tmp_path / "run")))

    assert [event["iteration"] for event in events(run.path, "update_skipped")] == [1, 2, 4, 5]


def test_a_resumed_run_counts_on(tmp_path, monkeypatch):
    nan_in_gradients(monkeypatch, {9, 10})  # the first steps of the second and the third update
    iterations = ppo.iterate(ppo.Config(**SMALL, output_dir=str(tmp_path / "run"), checkpoint_every=1))
    for _ in range(3):
        next(iterations)
    iterations.close()
    nan_in_gradients(monkeypatch, {1})

    with pytest.raises(FloatingPointError, match="3 updates in a row were left out"):
        understudy.resume(tmp_path / "run")


def test_parameters_that_are_not_finite_are_in_no_checkpoint_and_end_the_run(tmp_path):
    iterations = ppo.iterate(ppo.Config(**SMALL, output_dir=str(tmp_path / "run"), checkpoint_every=1))
    next(iterations)
    next(iterations)
    stage = iterations.gi_frame.f_locals["run"]
    with torch.no_grad():
        next(stage.policy.parameters())[...] = torch.nan

    with pytest.raises(FloatingPointError, match=r"3 updates in a row .*run/checkpoints/00000[12]'"):
        list(iterations)

    found, wrong = checkpoint.find_newest(tmp_path / "run/checkpoints")
    assert not wrong and all(x.isfinite().all() for x in checkpoint.load_tensors(found / "policy.safetensors").values())
    monkey = understudy.resume(tmp_path / "run")
    assert monkey.metrics[-1]["steps"] == 160


# memory


def out_of_memory_at(monkeypatch, owner, attribute, call):
    """The call of this number (from 1) finds no memory left."""
    own, count = getattr(owner, attribute), 0

    def asking(*args, **options):
        nonlocal count
        count += 1
        if count == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(*args, **options)

    monkeypatch.setattr(owner, attribute, asking)


WHERE = {  # run, module, what is called there, and which call
    "forward, control": ("ppo", "understudy.objective", "policy_forward", 30),
    "sampling, control": ("ppo", "understudy.control.rollout", "Call", 70),
    "forward, language": ("language-ppo", "understudy.objective", "policy_forward", 14),
    "generation, language": ("language-ppo", "understudy.language.rollout.sampler", "generate", 5),
    "forward, imitation": ("sft", "understudy.update", "_clip_gradients", 5),
}


@pytest.mark.parametrize("place", WHERE)
def test_out_of_memory_stops_with_advice_and_harms_nothing(place, home, tmp_path, monkeypatch):
    name, module, attribute, call = WHERE[place]
    assert killed.trained(name, home, tmp_path / "whole") == 0
    recipe, config = killed.configured(name, home, tmp_path / "run")

    with monkeypatch.context() as hook, pytest.raises(understudy.run.config.RequestError) as refusal:
        out_of_memory_at(hook, importlib.import_module(module), attribute, call)
        recipe.train(config)

    said = str(refusal.value)
    assert "memory ran out" in said and "lower " in said and "understudy resume" in said and "\n" not in said
    assert killed.resumed(tmp_path / "run") == 0
    assert killed.digests(tmp_path / "run") == killed.digests(tmp_path / "whole")
