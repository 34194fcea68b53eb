"""Truncation on an MDP whose values are known in closed form: reward 1 a step, cut by a time limit, for ever.

Truncated, every state is worth 1 + gamma + gamma^2 + ... = 1 / (1 - gamma), however near the limit. The negative control is
the same env with its time limit reported as a death: n steps before the end are worth (1 - gamma^n) / (1 - gamma).
"""

import math

import gymnasium
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import nn
from torch.testing import assert_close

from tests.envs import MODES, walker
from understudy.advantage import gae
from understudy.control import actor_critic, ppo
from understudy.control.envs import make as environment
from understudy.control.policy import Policy
from understudy.distribution import Categorical
from understudy.value import estimate_values, next_value

GAMMA, LIMIT = 0.75, 5
WORTH = 1 / (1 - GAMMA)  # 4
IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
WITH_EVERY_ROLLOUT = pytest.mark.parametrize("rollout", [1, 2, 3, 5, 13])


class Wages(gymnasium.Env):
    """Reward 1 a step around a ring; cut when it is once around, or killed. What it sees last is its first state again."""

    observation_space = spaces.Discrete(LIMIT)
    action_space = spaces.Discrete(2)

    def __init__(self, *, dies: bool = False):
        self.dies = dies

    def reset(self, *, seed=None, options=None):
        self.now = 0
        return self.now, {}

    def step(self, action):
        self.now += 1
        over = self.now == LIMIT
        return self.now % LIMIT, 1.0, over and self.dies, over and not self.dies, {}


class Known(nn.Module):
    """A critic that says `worth` of a state with n steps to its time limit; acts at random."""

    def __init__(self, worth):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([worth(LIMIT - step) for step in range(LIMIT)]))

    def forward(self, obs):
        return Categorical.of(torch.zeros(*obs.shape, 2)), self.values[obs]


def for_ever(_: int) -> float:
    return WORTH


def until_death(left: int) -> float:
    return (1 - GAMMA**left) / (1 - GAMMA)


def advantages(mode, rollout, worth, *, dies=False, lam=0.9):
    """(advantage, mask) of consecutive records, and V, side by side."""
    envs = environment.as_vector_env(
        SyncVectorEnv([lambda: Wages(dies=dies)] * 2, autoreset_mode=mode), lambda row, episode: episode
    )
    policy, walks, found = Policy(Known(worth), Wages.observation_space, Wages.action_space), walker(envs), []
    for _ in range(-(-13 // rollout)):
        taken = walks.collect(policy, rollout)
        _, value = estimate_values(policy, taken)
        ends = taken.terminated, taken.truncated, taken.mask
        advantage = gae(taken.reward, value, next_value(value, taken), *ends, gamma=GAMMA, lam=lam)
        found.append(((advantage + value)[taken.mask], advantage[taken.mask]))
    return torch.cat([target for target, _ in found]), torch.cat([advantage for _, advantage in found])


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_under_a_time_limit_the_true_value_is_its_own_target_at_every_step(mode, rollout, lam):
    target, advantage = advantages(mode, rollout, for_ever, lam=lam)

    assert len(target) > 13
    assert_close(target, torch.full_like(target, WORTH))
    assert_close(advantage, torch.zeros_like(advantage), atol=1e-6, rtol=0)


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_a_death_at_the_limit_is_another_mdp_whose_value_is_known_too(mode, rollout):
    _, advantage = advantages(mode, rollout, until_death, dies=True)
    # float32 rounding of the table
    assert_close(advantage, torch.zeros_like(advantage), atol=1e-6, rtol=0)


@IN_EVERY_MODE
def test_a_time_limit_taken_for_a_death_is_not_unbiased(mode):
    # delta is 1 + 0 - 4 = -3 at the last step, and 0.9 * 0.75 of what follows before it
    _, advantage = advantages(mode, 13, for_ever, dies=True)

    expected = torch.tensor([-3 * (0.9 * GAMMA) ** (LIMIT - 1 - step) for step in range(LIMIT)])
    assert_close(advantage[:LIMIT], expected)


# what a critic learns


def values(recipe, tmp_path, *, dies, **fields):
    """What the critic of a short run says of each state before the limit."""
    envs = SyncVectorEnv([lambda: Wages(dies=dies)] * 4, autoreset_mode=gymnasium.vector.AutoresetMode.NEXT_STEP)
    common = {"env": "Wages", "num_envs": 4, "gamma": GAMMA, "value_coef": 1.0, "max_grad_norm": 10.0, "quiet": True}
    common |= {"hidden": (16,), "learning_rate": 0.02, "learning_rate_schedule": "linear"}
    run = recipe.train(recipe.Config(**(common | fields), output_dir=str(tmp_path / "run")), env=envs)
    policy = Policy.load(run.path / "policy")
    with torch.no_grad():
        _, value = policy(torch.arange(LIMIT)[None])
    return value[0]


SETTINGS = [
    (ppo, {"num_steps_per_env": 32, "steps": 3000, "num_epochs": 4}),
    (actor_critic, {"num_steps_per_env": 5, "steps": 6000}),
    (actor_critic, {"num_steps_per_env": 1, "steps": 3000, "lam": 0.0}),
]
OF_EVERY_RECIPE = pytest.mark.parametrize(("recipe", "fields"), SETTINGS, ids=["ppo", "n-step", "one-step"])


@pytest.mark.learning
@OF_EVERY_RECIPE
def test_a_critic_learns_that_a_time_limit_is_no_end(recipe, fields, tmp_path):
    # within 5 % after a few seconds of training
    value = values(recipe, tmp_path, dies=False, **fields)
    assert_close(value, torch.full((LIMIT,), WORTH), rtol=0.05, atol=0)


@pytest.mark.learning
@OF_EVERY_RECIPE
def test_a_critic_learns_that_a_death_is_one(recipe, fields, tmp_path):
    # 3.05, 2.73, 2.31, 1.75, 1: far from 4. Bootstrapping through an end alone tells the two apart
    value = values(recipe, tmp_path, dies=True, **fields)
    assert_close(value, torch.tensor([until_death(LIMIT - step) for step in range(LIMIT)]), rtol=0.05, atol=0.05)
    assert (value < 0.8 * WORTH).all()


def test_an_iteration_that_only_resets_does_not_thin_out_the_metrics_of_the_others(tmp_path):
    # one row, one call an iteration, every sixth a reset; four iterations a line. The policy stays at chance, ln 2
    envs = SyncVectorEnv([Wages], autoreset_mode=gymnasium.vector.AutoresetMode.NEXT_STEP)
    tiny = {"num_envs": 1, "num_steps_per_env": 1, "steps": 24, "log_every": 4, "learning_rate": 1e-9, "hidden": (4,)}
    run = actor_critic.train(
        actor_critic.Config(env="Wages", **tiny, quiet=True, output_dir=str(tmp_path / "run")), env=envs
    )

    assert len(run.metrics) > 5
    assert [line["entropy"] for line in run.metrics] == pytest.approx([math.log(2)] * len(run.metrics), rel=1e-3)
