"""EnvPool, the extra 'understudy-rl[envpool]', walks as Gymnasium does: its episodes replayed, step by step."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.envs import walker
from understudy.control import ppo
from understudy.control.envs import make as environment
from understudy.control.policy import Policy
from understudy.distribution import Categorical
from understudy.run.config import RequestError

envpool = pytest.importorskip("envpool", reason="the extra is missing: pip install 'understudy-rl[envpool]'")

# a Box whose bounds are float64 constants is cast to float32 by EnvPool itself; Gymnasium says so
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")

LIMIT = 24  # a random policy's episodes end both ways


class Pushing(nn.Module):
    """Pushes left or right at random."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, obs):
        return Categorical.of(self.logits.expand(*obs.shape[:2], 2)), obs[..., 0]


def make(**options):
    return environment.make("CartPole-v1", num_envs=3, vectorization="envpool", seed=5, options=options)


def walked(envs, *rollouts):
    policy = Policy(Pushing(), envs.single_observation_space, envs.single_action_space)
    walks = walker(envs)
    return [walks.collect(policy, rollout) for rollout in rollouts], walks


def columns(taken):
    """The records of one walk, side by side: (obs, action, mask, terminated, truncated) by column, row by row."""
    for b in range(len(taken[0])):
        yield [(part, b, t) for part in taken for t in range(part.mask.shape[1])]


def replayed(taken):
    """Each chosen step, with what Gymnasium does there; at an episode's first step its state is set to EnvPool's."""
    env = gymnasium.make("CartPole-v1", max_episode_steps=LIMIT, disable_env_checker=True)
    for row in columns(taken):
        fresh = True
        for part, b, t in row:
            if not part.mask[b, t]:
                continue
            if fresh:
                env.reset(seed=0)
                env.unwrapped.state = part.obs[b, t].double().numpy()
            yield part, b, t, env.step(int(part.action[b, t]))
            fresh = bool(part.ended[b, t])


def test_every_step_of_an_envpool_episode_is_gymnasiums():
    taken, _ = walked(make(max_episode_steps=LIMIT), 40, 7, 1, 33)

    ends = 0
    for part, b, t, (obs, reward, terminated, truncated, _) in replayed(taken):
        # float32 at the first observation; the pole is unstable, so that rounding grows a little over 24 steps
        assert_close(part.obs[b, t + 1], torch.from_numpy(obs), atol=1e-5, rtol=1e-5)
        assert part.reward[b, t] == reward
        assert part.ended[b, t] == (terminated or truncated)
        assert part.truncated[b, t] == truncated  # also where both are, see below
        ends += terminated or truncated
    assert ends > 6


def test_envpool_calls_a_death_at_its_time_limit_a_truncation():
    # Gymnasium says both, and then it is a termination here. EnvPool 1.2.5 hides that the pole fell, so V of a fallen
    # pole is bootstrapped from. When this fails EnvPool tells, and the line above can be made stricter.
    envs = make(max_episode_steps=10)
    envs.reset()
    for _ in range(10):  # pushed one way, poles of this seed fall at steps 8 and 10
        obs, _, terminated, truncated, info = envs.step(np.zeros(3, dtype=np.int64))

    at_limit = info["elapsed_step"] == 10
    assert (np.abs(obs[at_limit, 2]) > 0.2095).all() and at_limit.any()  # fallen, beyond 12 degrees
    assert truncated[at_limit].all() and not terminated[at_limit].any()


def test_both_ends_happen_in_these_records():
    taken, _ = walked(make(max_episode_steps=LIMIT), 40, 7, 1, 33)

    assert sum(int(part.terminated.sum()) for part in taken) > 1
    assert sum(int(part.truncated.sum()) for part in taken) > 1


def test_reset_rows_of_envpool_are_no_steps():
    # every call but a reset is a chosen step, and there is one reset an end, but for ends in the last call
    taken, walks = walked(make(max_episode_steps=LIMIT), 81)

    (part,) = taken
    resets = int(part.ended.sum()) - int(walks.needs_reset.sum())
    assert walks.num_steps == int(part.mask.sum()) == 3 * 81 - resets


def test_episodes_of_envpool_have_the_length_of_their_rows():
    _, walks = walked(make(max_episode_steps=LIMIT), 81)

    assert all(done.length == done.episode_return <= LIMIT for done in walks.finished_episodes)
    assert {done.length == LIMIT for done in walks.finished_episodes if done.truncated} == {True}


def test_the_same_seed_gives_the_same_envpool_walk():
    (first,), _ = walked(make(), 30)
    (second,), _ = walked(make(), 30)

    assert_close((first.obs, first.action), (second.obs, second.action), rtol=0, atol=0)


def test_an_envpool_of_the_users_own_is_walked_as_it_is():
    envs = environment.as_vector_env(
        envpool.make("CartPole-v1", env_type="gymnasium", num_envs=3, seed=5), lambda *_: 0
    )

    (own,), _ = walked(envs, 30)
    (made,), _ = walked(make(), 30)

    assert_close(own.obs, made.obs, rtol=0, atol=0)


def test_a_recipe_trains_and_evaluates_on_envpool(tmp_path):
    cfg = ppo.Config(
        env="CartPole-v1",
        vectorization="envpool",
        num_envs=2,
        steps=60,
        num_steps_per_env=20,
        evaluate_every=1,
        evaluate_episodes=2,
        quiet=True,
        output_dir=str(tmp_path / "run"),
    )
    run = ppo.train(cfg)

    assert run.metrics[-1]["steps"] >= 60
    assert run.metrics[-1]["evaluation_return_mean"] > 0


def test_the_threshold_of_an_envpool_is_its_specs():
    assert environment.reward_threshold(make()) == 475


def test_an_id_that_envpool_does_not_know_is_refused_and_the_nearest_named():
    with pytest.raises(RequestError, match="CartPole-v1"):
        environment.make("CartPoole-v1", num_envs=1, vectorization="envpool")


def test_an_option_that_envpool_does_not_know_is_refused():
    with pytest.raises(RequestError, match="env_options"):
        make(wind=3)
