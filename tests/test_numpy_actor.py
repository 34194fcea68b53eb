"""Step 1: a policy in NumPy chooses what the policy chooses."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch.testing import assert_close

from tests.records import seeded
from understudy.batch import map_tensors, policy_forward, tensor_leaves
from understudy.control.config import NetworkConfig
from understudy.control.fast.numpy_actor import NumpyActor, NumpyMLP
from understudy.control.fast.numpy_actor import make_numpy_actor as quick_form_for
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.value import estimate_values

BOX = spaces.Box(-float("inf"), float("inf"), (3,))
NUMBERS = spaces.Box(-1, 1, (2,))


def quick_form(policy: Policy, rows: int, generator: torch.Generator | None = None) -> NumpyActor | None:
    walker = SimpleNamespace(
        num_envs=rows, noise_interval=1, has_action_mask=False, generator=generator, sample=generator is not None
    )
    return quick_form_for(policy, walker)


def policy_for(action, **made_of) -> Policy:
    """A policy whose weights are none of those that a head begins with."""
    policy = Policy.build(BOX, action, NetworkConfig(hidden=(16, 8), **made_of), seed=3, scale_obs=True)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=seeded(0)))
    policy.obs_scale.running_moments[0].update(2 + 3 * torch.randn(50, 3, generator=seeded(1)))
    return policy


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
@pytest.mark.parametrize("action", [spaces.Discrete(4), NUMBERS], ids=["one choice", "numbers"])
def test_actions_have_the_log_probs_that_the_policy_gives_them(action, activation):
    policy = policy_for(action, activation=activation)
    obs = 5 * torch.randn(200, 3, generator=seeded(2))

    quick = quick_form(policy, 200, seeded(3))
    found, said = quick(obs.numpy())
    old, logprob = quick.distribution_and_logprob([said], [found])
    found = torch.from_numpy(found)

    with torch.no_grad():
        distribution, _ = policy(obs[:, None])
        expected = distribution.log_prob(found[:, None])[:, 0]
    assert_close(torch.from_numpy(logprob[0]), expected, rtol=1e-5, atol=1e-5)
    assert_close(old.kl(map_tensors(lambda x: x[:, 0], distribution)), torch.zeros(1, 200), rtol=0, atol=1e-5)
    assert len(found.unique(dim=0)) > 3


def test_one_choice_is_drawn_as_often_as_it_is_likely():
    policy = policy_for(spaces.Discrete(4))
    obs = torch.ones(200, 3)
    quick = quick_form(policy, 200, seeded(4))

    drawn = torch.from_numpy(np.concatenate([quick(obs.numpy())[0] for _ in range(200)]))

    with torch.no_grad():
        likely = policy(obs[:1, None])[0].logp.exp()[0, 0]
    # 40,000 draws: the standard error of a share is at most 0.0025
    assert_close(drawn.bincount(minlength=4) / len(drawn), likely, rtol=0, atol=0.015)


def test_numbers_are_drawn_with_the_mean_and_spread_of_the_policy():
    policy = policy_for(NUMBERS, log_std=-0.5)
    obs = torch.ones(200, 3)
    quick = quick_form(policy, 200, seeded(4))

    drawn = torch.from_numpy(np.concatenate([quick(obs.numpy())[0] for _ in range(200)]))

    with torch.no_grad():
        distribution = policy(obs[:1, None])[0]
    # 40,000 draws of spread 0.6 to 0.9: standard errors below 0.005
    assert_close(drawn.mean(dim=0), distribution.mean[0, 0], rtol=0, atol=0.03)
    assert_close(drawn.std(dim=0), distribution.log_std[0, 0].exp(), rtol=0, atol=0.03)


@pytest.mark.parametrize("action", [spaces.Discrete(4), NUMBERS], ids=["one choice", "numbers"])
def test_without_sampling_it_is_the_mode(action):
    policy = policy_for(action)
    obs = torch.randn(50, 3, generator=seeded(2))

    found, _ = quick_form(policy, 50)(obs.numpy())

    with torch.no_grad():
        assert_close(torch.from_numpy(found), policy(obs[:, None])[0].mode()[:, 0], rtol=1e-5, atol=1e-5)


def test_noise_that_is_held_and_masks_have_no_quick_form():
    policy = Policy.build(BOX, NUMBERS, NetworkConfig(), seed=1)
    plain = {"num_envs": 4, "noise_interval": 1, "has_action_mask": False, "generator": None, "sample": True}

    assert quick_form_for(policy, SimpleNamespace(**plain)) is not None
    assert quick_form_for(policy, SimpleNamespace(**plain | {"noise_interval": 2})) is None
    assert quick_form_for(policy, SimpleNamespace(**plain | {"has_action_mask": True})) is None


@pytest.mark.parametrize(
    ("observation", "action", "made_of", "rows"),
    [
        (BOX, spaces.MultiDiscrete([2, 3]), {}, 4),
        (BOX, NUMBERS, {"squash": "tanh"}, 4),
        (BOX, NUMBERS, {"exploration": "gsde"}, 4),
        (BOX, NUMBERS, {"rnn_type": "gru"}, 4),
        (spaces.Discrete(3), NUMBERS, {}, 4),
        (spaces.Box(0, 255, (36, 36), np.uint8), NUMBERS, {}, 4),
        (spaces.Dict({"a": BOX}), NUMBERS, {}, 4),
    ],
)
def test_other_policies_have_no_quick_form(observation, action, made_of, rows):
    policy = Policy.build(observation, action, NetworkConfig(**made_of), seed=1)

    assert quick_form(policy, rows) is None
    assert quick_form(Policy.build(BOX, NUMBERS, NetworkConfig(), seed=1), 64) is not None


@pytest.mark.parametrize("action", [spaces.Discrete(4), NUMBERS], ids=["one choice", "numbers"])
def test_many_rows_are_chosen_for_by_the_modules(action):
    policy = Policy.build(BOX, action, NetworkConfig(), seed=1, scale_obs=True)
    policy.obs_scale.running_moments[0].update(2 + 3 * torch.randn(50, 3, generator=seeded(1)))
    obs = 5 * torch.randn(65, 3, generator=seeded(2))

    few, many = quick_form(policy, 64, seeded(3)), quick_form(policy, 65, seeded(3))

    assert isinstance(few.compute_dist_params, NumpyMLP) and not isinstance(
        many.compute_dist_params, NumpyMLP
    )  # 65 * 64 * 64 products are more than 2^18
    for mine, theirs in zip(few(obs[:64].numpy()), many(obs[:64].numpy()), strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
def test_a_record_carries_what_it_was_sampled_from_at_every_choice(env, mode):
    envs = SyncVectorEnv([lambda: gymnasium.make(env, max_episode_steps=9)] * 3, autoreset_mode=mode)
    both = envs.single_observation_space, envs.single_action_space
    policy = Policy.build(*both, NetworkConfig(shared=mode is AutoresetMode.SAME_STEP), seed=3, scale_obs=True)
    policy.obs_scale.running_moments[0].update(0.5 + 3 * torch.randn(50, *both[0].shape, generator=seeded(2)))
    walker = RolloutCollector(envs, seed_of=lambda row, episode: 100 * row + episode, generator=seeded(1))

    record = walker.collect(policy, 25)

    assert walker.numpy_actor is not None and record.ended.any()
    with torch.no_grad():
        said, value = policy_forward(policy, record)
    kl = said.kl(record.old_distribution)
    assert_close(kl[record.mask], torch.zeros(int(record.mask.sum())), rtol=0, atol=1e-5)
    assert kl.isfinite().all()
    found, estimated = estimate_values(policy, record)
    assert found is not said and all(map(torch.equal, tensor_leaves(found), tensor_leaves(record.old_distribution)))
    assert_close(estimated, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action", [spaces.Discrete(4), NUMBERS], ids=["one choice", "numbers"])
def test_a_policy_without_hidden_layers_has_a_quick_form_too(action):
    policy = Policy.build(BOX, action, NetworkConfig(hidden=(), orthogonal=False), seed=3)
    obs = torch.randn(50, 3, generator=seeded(2))

    found, _ = quick_form(policy, 50)(obs.numpy())

    with torch.no_grad():
        assert_close(torch.from_numpy(found), policy(obs[:, None])[0].mode()[:, 0], rtol=1e-5, atol=1e-5)


def test_a_wide_head_counts_for_the_size_up_to_which_numpy_multiplies():
    policy = Policy.build(BOX, spaces.Discrete(5000), NetworkConfig(hidden=(8,)), seed=1)

    few, many = quick_form(policy, 6), quick_form(policy, 7)

    # 6 * 8 * 5,000 products are 240,000, 7 of them 280,000: more than 2^18 = 262,144
    assert isinstance(few.compute_dist_params, NumpyMLP) and not isinstance(many.compute_dist_params, NumpyMLP)
