"""`init_optimizer`: a run begins with another's policy, and with the moments and step counts of its optimizer."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from understudy import load, resume
from understudy.cli import main
from understudy.control import actor_critic, ppo, reinforce
from understudy.control.fast.optimizer import adam as adam_of
from understudy.control.fast.optimizer import load_moments
from understudy.fast import compiled_update
from understudy.run.checkpoint import list_checkpoints
from understudy.run.config import RequestError
from understudy.run.store import Run, read_optimizer_state

FIELDS = {"env": "CartPole-v1", "num_envs": 2, "hidden": (4,), "steps": 64, "max_grad_norm": 1e9, "quiet": True}
OF = {
    ppo: {"num_steps_per_env": 8, "num_epochs": 1, "num_minibatches": 1, "compile": "off"},
    actor_critic: {"num_steps_per_env": 8},
    reinforce: {},
}
RMSPROP = {"optimizer": "rmsprop"}
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def config(recipe, out: Path, **fields):
    """PPO's and actor-critic's runs make an update of all that every 16 steps brought; no gradient is clipped."""
    return recipe.Config(**(FIELDS | OF[recipe] | {"output_dir": str(out)} | fields))


def train(recipe, out: Path, **fields):
    return recipe.train(config(recipe, out, **fields))


def kept(run) -> list[dict[str, torch.Tensor]]:
    """What the optimizer keeps of each parameter at the newest checkpoint."""
    state = read_optimizer_state(run.path / "checkpoints" / list_checkpoints(run.path / "checkpoints")[-1])
    return [state[number] for number in sorted(state)]


def parameters(run, *, apart: bool = False) -> list[torch.Tensor]:
    """Of a run's policy, in the optimizer's order: `apart`, the critic's come last."""
    named = list(load(run.path).named_parameters())
    named.sort(key=lambda each: apart and each[0].startswith(("network.critic", "network.value")))
    return [parameter.detach() for _, parameter in named]


def adam(was, g):
    """The step after four others (Kingma and Ba 2015, alg. 1)."""
    m, v = 0.9 * was["exp_avg"] + 0.1 * g, 0.999 * was["exp_avg_sq"] + 0.001 * g**2
    return 0.03 * m / (1 - 0.9**5) / ((v / (1 - 0.999**5)).sqrt() + 1e-3)


def rmsprop(was, g):
    return 0.03 * g / ((0.99 * was["square_avg"] + 0.01 * g**2).sqrt() + 1e-3)


@pytest.mark.parametrize(
    ("recipe", "fields", "step"),
    [
        (ppo, {}, adam),
        pytest.param(ppo, {"compile": "on"}, adam, marks=compiler),
        (ppo, {"clip_grad_apart": True}, adam),
        (actor_critic, {}, adam),
        (actor_critic, RMSPROP, rmsprop),
    ],
    ids=["plain", "compiled", "groups", "actor-critic", "rmsprop"],
)
def test_the_first_update_goes_on_from_the_saved_moments(recipe, fields, step, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compiled_update, "_compile", torch.enable_grad()
    )  # what would be compiled, which takes 10 s, as it is
    first = train(recipe, tmp_path / "first", **fields)  # four updates
    begun = {"init_from": str(first.path), "steps": 16, "learning_rate": 0.03, "adam_eps": 1e-3}
    went_on = train(recipe, tmp_path / "on", **begun, **fields, init_optimizer=True)
    plain = fields | OF[recipe] | ({"optimizer": "adam"} if recipe is actor_critic else {})
    fresh = train(recipe, tmp_path / "fresh", **begun, **plain)  # the same update without moments, which leaves 0.1 g

    before, after = (parameters(run, apart="clip_grad_apart" in fields) for run in (first, went_on))
    for was, of, p, q in zip(kept(first), kept(fresh), before, after, strict=True):
        torch.testing.assert_close(q, p - step(was, of["exp_avg"] / 0.1), rtol=1e-4, atol=1e-6)  # float32
        assert float(was["step"]) == 4
    assert all(float(x["step"]) == 5 for x in kept(went_on))


def test_a_recipe_without_a_critic_keeps_its_actors_moments(tmp_path):
    first = train(reinforce, tmp_path / "first", baseline="none")
    went_on = train(
        reinforce, tmp_path / "on", baseline="none", init_from=str(first.path), init_optimizer=True, steps=1
    )

    assert len(kept(first)) == 4 and [float(x["step"]) - 1 for x in kept(went_on)] == [
        float(x["step"]) for x in kept(first)
    ]


def test_a_policy_is_given_no_moments_but_those_beside_it(tmp_path):
    first = train(ppo, tmp_path / "first", checkpoint_every=1)
    folder = first.path / "checkpoints"
    shutil.copytree(folder / "000002", first.path / "best")
    begun = {"init_optimizer": True, "steps": 16}
    for name, place in (("whole", "checkpoints/000003"), ("best", "best"), ("policy", "policy")):
        train(ppo, tmp_path / name, init_from=str(first.path / place), **begun)
    assert [float(kept(Run(tmp_path / name))[0]["step"]) - 1 for name in ("whole", "best", "policy")] == [3, 2, 4]

    (folder / "000004" / "state.json").write_text("{")  # which is damaged, and stays where it is
    with pytest.raises(RequestError, match=r"none of its checkpoints \(000003, 000002\) is that of '.*/policy'"):
        train(ppo, tmp_path / "on", init_from=str(first.path), **begun)
    assert (folder / "000004").is_dir() and not (folder / "quarantine").exists()
    assert not (tmp_path / "on").exists()


def test_where_the_moments_came_from_is_in_the_lineage(tmp_path):
    first = train(ppo, tmp_path / "first")
    went_on = train(ppo, tmp_path / "on", init_from=str(first.path), init_optimizer=True, steps=16)

    links = json.loads((went_on.path / "lineage.json").read_text())["links"]
    assert {one["role"]: Path(one["path"]).name for one in links} == {"init": "policy", "init_optimizer": "000004"}
    assert main(["lineage", str(went_on.path), "--verify"]) == 0


def test_a_resumed_run_needs_the_moments_it_began_with_no_more(tmp_path):
    first = train(ppo, tmp_path / "first")
    begun = {"init_from": str(first.path), "init_optimizer": True}
    whole = train(ppo, tmp_path / "whole", **begun, steps=64)
    went_on = train(ppo, tmp_path / "on", **begun, steps=32)
    shutil.rmtree(first.path)

    assert all(map(torch.equal, parameters(resume(went_on.path, steps=64)), parameters(whole)))


REFUSED = {
    "no init": (ppo, {"init_from": None}, "init_from is not set, so it has no effect"),
    "a policy": (ppo, {"init_from": "alone"}, "no run with a whole checkpoint"),
    "damaged": (ppo, {"init_from": "damaged"}, "no run with a whole checkpoint"),
    "another optimizer": (actor_critic, RMSPROP, r"keeps \['exp_avg', 'exp_avg_sq', 'step'\], and this run's"),
    "other groups": (ppo, {"clip_grad_apart": True}, r"groups of \[8\] parameters, and this run's of \[4, 4\]"),
    "without a critic": (ppo, {"init_from": "actor"}, "did not move all parameters that learn here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_moments_that_do_not_fit_are_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(ppo, Path("first"))
    if case == "a policy":
        shutil.copytree("first/policy", "alone")
    if case == "damaged":
        shutil.copytree("first", "damaged")
        for file in Path("damaged/checkpoints").glob("*/optimizer.safetensors"):
            file.write_bytes(b"")
    if case == "without a critic":
        train(reinforce, Path("actor"), baseline="none")
    recipe, fields, words = REFUSED[case]
    fields = {"init_from": "first", "hidden": (64, 64)} | fields

    with pytest.raises(RequestError, match=f"^init_optimizer is True, .*{words}.*: (name a run|leave it)"):
        train(recipe, Path("on"), **fields, init_optimizer=True)
    assert not Path("on").exists()


def test_init_beside_a_policy_of_ones_own_is_refused(tmp_path):
    first = train(ppo, tmp_path / "first")

    with pytest.raises(RequestError, match=r"^init_from is '.*', which has no effect beside a policy of your own"):
        ppo.train(config(ppo, tmp_path / "on", init_from=str(first.path)), policy=load(first.path))


def test_without_the_field_a_run_begins_with_a_fresh_optimizer(tmp_path):
    first = train(ppo, tmp_path / "first")
    runs = [train(ppo, tmp_path / name, init_from=str(first.path), steps=16) for name in "ab"]

    assert [float(kept(run)[0]["step"]) for run in runs] == [1, 1]


def test_moments_of_other_shapes_are_refused(tmp_path):
    first = train(ppo, tmp_path / "first")
    cfg = config(ppo, tmp_path / "on", init_from=str(first.path))
    wide = adam_of(load(train(ppo, tmp_path / "wide", hidden=(5,)).path), cfg)

    with pytest.raises(RequestError, match=r"exp_avg of shape \[4, 4\], and this run's \[5, 4\]"):
        load_moments(wide, cfg, first.path / "policy")
