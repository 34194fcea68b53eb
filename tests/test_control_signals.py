"""Signals of control are measured with what acted, in the environment's units, and never across a cut."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.foreign_envs import TenSteps
from understudy.batch import Trajectory
from understudy.control import ppo
from understudy.control.normalize import RewardNormalizer

HERE = "tests.test_control_signals"


def fields(tmp_path, **more) -> dict[str, Any]:
    common: dict[str, Any] = {
        "num_envs": 2,
        "num_steps_per_env": 10,
        "steps": 60,
        "num_epochs": 1,
        "hidden": (4,),
        "quiet": True,
        "compile": "off",
    }
    return common | {"output_dir": str(tmp_path / "run")} | more


class FarAway(TenSteps):
    """Observations whose scale moves a lot in the first iterations."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(-1e4, 1e4, (3,), np.float32)

    def observe(self):
        return (50 + 20 * super().observe()).astype(np.float32)


PENALTY = {"objective": "penalty", "adaptive_kl_target": 0.01, "kl_old_coef": 1.0}


def test_an_adaptive_kl_coefficient_is_steered_by_the_policy_that_acted(tmp_path):
    made = fields(tmp_path, env=f"{HERE}:FarAway", normalize_obs=True, learning_rate=1e-12, **PENALTY)
    run = ppo.train(ppo.Config(**made))

    # at this learning rate no policy moves: KL is 0, and the coefficient halves each time
    assert [line["kl_old"] for line in run.metrics] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [line["kl_old_coef"] for line in run.metrics] == [1.0, 0.5, 0.25]


class Huge(TenSteps):
    """Pays a number of which the squared error is infinite in its second episode."""

    def reset(self, *, seed=None, options=None):
        self.count = getattr(self, "count", -1) + 1
        return super().reset(seed=seed)

    def reward(self, action):
        return 3e38 if self.count == 2 else 1.0


def test_a_skipped_update_leaves_the_kl_coefficient(tmp_path):
    made = fields(tmp_path, num_envs=1, steps=40, **PENALTY)
    run = ppo.train(ppo.Config(**made), env=Huge())

    skipped = [line.get("updates_skipped", 0) for line in run.metrics]
    assert sum(skipped) == 1
    coefs = [line["kl_old_coef"] for line in run.metrics]
    after = skipped.index(1) + 1
    assert coefs[after] == coefs[after - 1]
    assert all(b == a / 2 for i, (a, b) in enumerate(itertools.pairwise(coefs)) if i + 1 != after)


# the scale of rewards


def record(reward, ended):
    reward, ended = torch.tensor(reward), torch.tensor(ended)
    zero = torch.zeros_like(reward)
    mask = torch.ones_like(reward, dtype=torch.bool)
    return Trajectory(zero, zero, zero, mask, reward, ended, torch.zeros_like(ended), None, None)


def test_a_running_return_does_not_cross_a_cut():
    scale = RewardNormalizer(gamma=0.5)
    first = record([[1.0, 1.0], [1.0, 1.0]], [[False, False], [False, False]])
    scale.prepare(first, np.zeros(2, dtype=bool))
    scale.update(first)
    assert scale.running_returns.tolist() == [1.5, 1.5]

    second = record([[4.0], [4.0]], [[False], [False]])
    scale.prepare(second, np.array([True, False]))  # row 0 was cut between the records
    scale.update(second)
    assert scale.running_returns.tolist() == [4.0, 0.5 * 1.5 + 4]


def test_the_first_record_is_scaled_by_itself_and_counted_once():
    scale = RewardNormalizer(gamma=0.0)
    only = record([[1.0, 3.0]], [[False, False]])
    scale.prepare(only, np.zeros(1, dtype=bool))

    assert scale(only.reward)[0].tolist() == pytest.approx([1.0, 3.0])  # their deviation is 1
    scale.update(only)
    assert scale.moments.count == 2
    scale.prepare(only, np.zeros(1, dtype=bool))
    assert scale.moments.count == 2
    scale.update(only)
    assert scale.moments.count == 4


class Pays(TenSteps):
    """Every step pays 100 times the action, and costs the action."""

    def reward(self, action):
        return 100.0 * action

    def info(self, action):
        return {"cost": float(action)}


def test_the_first_iteration_under_a_reward_scale_is_scaled(tmp_path):
    run = ppo.train(ppo.Config(**fields(tmp_path, env=f"{HERE}:Pays", normalize_reward=True)))
    errors = [line["value_loss"] for line in run.metrics]
    assert errors[0] < 20 * errors[1]  # unscaled it is some ten thousand times as large


def test_episodes_cut_at_a_checkpoint_leave_no_running_return(tmp_path):
    made = fields(tmp_path, num_steps_per_env=7, steps=70, normalize_reward=True, checkpoint_every=1)
    seen = []
    iterations: Any = ppo.iterate(ppo.Config(**made, env=f"{HERE}:Remembers"))
    for _ in iterations:
        policy = iterations.gi_frame.f_locals["run"].policy
        seen.append(policy.reward_scale.running_returns.tolist())
    # every record begins anew: 7 steps of 1, discounted by 0.99
    assert np.allclose(seen, sum(0.99**k for k in range(7)))


class Remembers(TenSteps):
    """Made anew at every checkpoint, for it sees how often it was reset."""

    level = 0

    def observe(self):
        return np.full(3, self.level / 1000, np.float32)

    def reset(self, *, seed=None, options=None):
        self.level += 1
        return super().reset(seed=seed)

    def reward(self, action):
        return 1.0


def test_init_takes_the_new_gamma_into_the_scale_of_rewards(tmp_path):
    first = ppo.train(ppo.Config(**fields(tmp_path, env=f"{HERE}:Pays", normalize_reward=True, gamma=0.9)))
    more = {
        "init_from": str(first.path),
        "output_dir": str(tmp_path / "second"),
        "normalize_reward": True,
        "gamma": 0.5,
    }
    iterations: Any = ppo.iterate(ppo.Config(**fields(tmp_path, env=f"{HERE}:Pays", **more)))
    next(iterations)
    assert iterations.gi_frame.f_locals["run"].policy.reward_scale.gamma == 0.5
    iterations.close()


def test_multipliers_are_in_units_of_reward_under_a_reward_scale(tmp_path):
    made = fields(tmp_path, env=f"{HERE}:Pays", normalize_reward=True, constraint=("cost<=0",))
    iterations: Any = ppo.iterate(ppo.Config(**made))
    next(iterations)
    run = iterations.gi_frame.f_locals["run"]
    run.constraints.multipliers = dict.fromkeys(run.constraints.multipliers, 100.0)
    run.constraints.rate = 0.0
    traj = run.collector.collect(run.policy, 10)
    paid = run.compute_rewards(traj)
    iterations.close()

    # a step of action 1 pays 100 and is charged 100: nothing is left of it, whatever the scale
    assert paid[traj.mask].abs().max() < 1e-5
