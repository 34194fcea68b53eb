"""Scales inside the policy: what they gather, when it takes effect, and that evaluation leaves them alone."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.testing import assert_close

from tests.envs import GAMMA, MODES, Diary, diaries, scripted, walker
from tests.foreign_envs import notices
from tests.records import flags, record, row, seeded
from understudy.batch import policy_forward
from understudy.control import actor_critic, ppo, reinforce
from understudy.control.config import NetworkConfig
from understudy.control.envs import make as environment
from understudy.control.evaluate import EVALUATION_SEED, evaluate
from understudy.control.fast.numpy_actor import make_numpy_actor
from understudy.control.normalize import CLIP, ObsNormalizer, RewardNormalizer, RunningMoments
from understudy.control.policy import Policy
from understudy.control.training import open_run
from understudy.run.seeds import derive_seed
from understudy.value import estimate_values

IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


# moments


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_moments_merged_batch_by_batch_are_those_of_the_whole_stream(shape):
    stream = 5 + 3 * torch.randn(60, *shape, generator=seeded(), dtype=torch.float64)
    moments = RunningMoments(shape)
    for piece in stream.split([1, 7, 0, 30, 2, 20]):
        moments.update(piece)

    assert moments.count == 60
    np.testing.assert_allclose(moments.mean.numpy(), stream.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.var.numpy(), stream.numpy().var(axis=0), rtol=1e-12)


def test_moments_of_numbers_far_from_zero_keep_their_variance():
    # sums of squares would lose it: 1e8 squared has no digits left for a variance of 2/3
    moments = RunningMoments(())
    for piece in torch.tensor([1e8 - 1, 1e8, 1e8 + 1], dtype=torch.float64).split(1):
        moments.update(piece)

    assert moments.var.item() == pytest.approx(2 / 3, rel=1e-6)


def test_before_the_first_batch_a_scale_changes_nothing():
    obs = {"obs": row(1, -2, 3)[..., None]}
    assert_close(ObsNormalizer({"obs": (1,)})(obs)["obs"], obs["obs"])
    assert_close(RewardNormalizer(0.9)(row(1, -2, 3)), row(1, -2, 3))


# observations


def test_an_observation_is_scaled_by_its_mean_and_deviation():
    scale = ObsNormalizer({"obs": (2,)})
    # mean (2, 0), variance (1, 16)
    scale.update(record(flags(1, 1), obs={"obs": torch.tensor([[[1.0, 4.0], [3.0, -4.0]]])}))

    assert_close(scale({"obs": torch.tensor([[[4.0, 2.0]]])})["obs"], torch.tensor([[[2.0, 0.5]]]))


def test_a_scaled_observation_stays_within_ten_deviations():
    scale = ObsNormalizer({"obs": (1,)})
    scale.update(record(flags(1, 1), obs={"obs": row(-1, 1)[..., None]}))

    assert_close(scale({"obs": row(-1000, 1000)[..., None]})["obs"], row(-CLIP, CLIP)[..., None])


def test_an_observation_that_never_varies_becomes_zero_and_not_nan():
    scale = ObsNormalizer({"obs": (1,)})
    scale.update(record(flags(1, 1, 1), obs={"obs": row(7, 7, 7)[..., None]}))

    assert_close(scale({"obs": row(7)[..., None]})["obs"], row(0)[..., None])


def test_images_discrete_entries_and_masks_pass_as_they_are():
    parts = {
        "image": spaces.Box(0, 255, (8, 8), np.uint8),
        "kind": spaces.Discrete(3),
        "place": spaces.Box(-1, 1, (2,), np.float32),
    }
    policy = Policy(scripted().network, spaces.Dict(parts), spaces.Discrete(2), scale_obs=True)

    assert policy.obs_scale is not None and policy.obs_scale.names == ["place"]


@pytest.mark.parametrize("rollout", [1, 5, 24])
@IN_EVERY_MODE
def test_observations_are_gathered_from_chosen_steps_each_once(mode, rollout):
    policy = Policy(scripted().network, Diary.observation_space, Diary.action_space, scale_obs=True)
    walks, seen = walker(diaries(mode)), []
    for _ in range(24 // rollout):
        taken = walks.collect(scripted(), rollout)
        policy.update_normalizers(taken)
        seen += [taken.obs[b, t].double() for b, t in taken.mask.nonzero().tolist()]

    assert policy.obs_scale is not None
    (moments,) = policy.obs_scale.running_moments
    stream = torch.stack(seen)
    assert moments.count == len(stream) == walks.num_steps
    assert_close(moments.mean, stream.mean(dim=0))
    assert_close(moments.var, stream.var(dim=0, unbiased=False))


def test_what_a_record_holds_is_not_scaled():
    policy = Policy(scripted().network, Diary.observation_space, Diary.action_space, scale_obs=True, scale_reward=GAMMA)
    plain, scaled = walker(diaries(MODES[0])), walker(diaries(MODES[0]))
    for _ in range(3):
        taken = scaled.collect(scripted(), 5)
        policy.update_normalizers(taken)
        expected = plain.collect(scripted(), 5)
        assert_close((taken.obs, taken.reward), (expected.obs, expected.reward))


# rewards


def slow_running(taken, gamma):
    """Textbook: one discounted return a row, step by step over all records, 0 after an end."""
    running, found = [0.0] * len(taken[0]), []
    for part in taken:
        for b in range(len(part)):
            for t in range(part.mask.shape[1]):
                if part.mask[b, t]:
                    running[b] = gamma * running[b] + part.reward[b, t].item()
                    found.append(running[b])
                    running[b] = 0.0 if part.terminated[b, t] or part.truncated[b, t] else running[b]
    return np.array(found)


def test_a_running_return_decays_by_gamma_and_starts_anew_after_an_end():
    # 2; 0.5 * 2 + 4 = 5 and over; 6. Mean 13/3, mean of squares 65/3, variance 65/3 - 169/9 = 26/9
    scale = RewardNormalizer(0.5)
    scale.update(record(flags(1, 1, 0, 1, 0), reward=row(2, 4, 0, 6, 0), truncated=flags(0, 1, 0, 0, 0)))

    assert scale.moments.var.item() == pytest.approx(26 / 9)
    assert scale.running_returns.tolist() == [6.0]


def test_a_running_return_goes_on_in_the_next_record():
    # 2; 0.5 * 2 + 4 = 5. Mean 3.5, variance 2.25
    scale = RewardNormalizer(0.5)
    scale.update(record(flags(1, 0), reward=row(2, 0)))
    scale.update(record(flags(1, 0), reward=row(4, 0)))

    assert scale.moments.var.item() == pytest.approx(2.25)


@pytest.mark.parametrize("rollout", [1, 5, 24])
@IN_EVERY_MODE
def test_the_running_return_is_the_slow_references(mode, rollout):
    walks, scale = walker(diaries(mode)), RewardNormalizer(0.9)
    taken = [walks.collect(scripted(), rollout) for _ in range(24 // rollout)]
    for part in taken:
        scale.update(part)

    found = slow_running(taken, 0.9)
    assert scale.moments.count == len(found) == walks.num_steps
    np.testing.assert_allclose(scale.moments.mean, found.mean(), rtol=1e-9)
    np.testing.assert_allclose(scale.moments.var, found.var(), rtol=1e-9)


def test_rewards_are_scaled_but_never_centred():
    scale = RewardNormalizer(0.0)  # the running return is the reward: 8 and 12, mean 10, deviation 2
    scale.update(record(flags(1, 1, 0), reward=row(8, 12, 0)))

    assert_close(scale(row(0, 8, -6)), row(0, 4, -3))


def test_rewards_that_never_varied_are_scaled_to_finite_ones():
    scale = RewardNormalizer(0.0)
    scale.update(record(flags(1, 1, 0), reward=row(0, 0, 0)))

    assert_close(scale(row(0, 1)), row(0, CLIP))


def test_a_scaled_reward_stays_within_ten():
    scale = RewardNormalizer(0.0)
    scale.update(record(flags(1, 1, 0), reward=row(8, 12, 0)))

    assert_close(scale(row(1000, -1000)), row(CLIP, -CLIP))


# inside the policy


def test_log_probs_and_values_stay_until_the_record_is_gathered():
    policy, walks = scaled_policy()
    policy.update_normalizers(walks.collect(policy, 30))

    taken = walks.collect(policy, 30)
    now, value = estimate_values(policy, taken)

    assert_close(now.log_prob(taken.action)[taken.mask], taken.behavior_logprob[taken.mask])  # the first ratio is 1
    policy.update_normalizers(taken)
    again, value_later = estimate_values(policy, taken)
    assert torch.equal(again.mean, now.mean)  # what sampled stays what it was
    later, _ = policy_forward(policy, taken)
    assert not torch.allclose(later.mean, now.mean) and not torch.allclose(value_later, value)


def test_ppo_gathers_a_record_after_its_update(tmp_path):
    # one minibatch an iteration meets the very policy that sampled, unless scales moved in between
    run = ppo.train(settings(tmp_path, num_epochs=1, num_minibatches=1))

    assert len(run.metrics) == 2
    # float32: the policy sampled one step at a time and learns from all at once
    assert [line["kl_old"] for line in run.metrics] == pytest.approx([0, 0], abs=1e-9)
    assert [line["ratio"] for line in run.metrics] == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("recipe", [actor_critic, ppo, reinforce], ids=lambda recipe: recipe.__name__)
def test_every_recipe_gathers_every_chosen_step_once(tmp_path, recipe):
    common = {"env": "Pendulum-v1", "env_options": {"max_episode_steps": 10}, "steps": 60, "num_envs": 2}
    scales = {"normalize_obs": True, "normalize_reward": True}
    run = recipe.train(recipe.Config(**common, **scales, hidden=(8,), quiet=True, output_dir=str(tmp_path / "run")))

    policy = Policy.load(run.path / "policy")
    assert policy.obs_scale is not None and policy.reward_scale is not None
    assert policy.obs_scale.running_moments[0].count == policy.reward_scale.moments.count == run.metrics[-1]["steps"]


def test_a_loaded_policy_acts_as_the_one_saved(tmp_path):
    policy, walks = scaled_policy()
    policy.update_normalizers(walks.collect(policy, 30))
    policy.save(tmp_path / "policy")

    obs = walks.envs.observation_space.sample()
    assert_close(Policy.load(tmp_path / "policy").act(obs), policy.act(obs), rtol=0, atol=0)


def test_a_loaded_policy_scales_by_what_was_gathered(tmp_path):
    policy, walks = scaled_policy()
    taken = walks.collect(policy, 30)
    policy.update_normalizers(taken)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")

    assert_close(loaded.normalize_reward(taken.reward), policy.normalize_reward(taken.reward), rtol=0, atol=0)
    assert not torch.equal(loaded.normalize_reward(taken.reward), taken.reward)
    assert_close(loaded.state_dict(), policy.state_dict(), rtol=0, atol=0)


# evaluation


@pytest.fixture
def learned(tmp_path):
    """A short run with both scales: its config and its policy."""
    cfg = settings(tmp_path)
    return cfg, Policy.load(ppo.train(cfg).path / "policy")


def test_evaluation_changes_nothing_in_a_policy(learned):
    cfg, policy = learned
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    running = policy.reward_scale.running_returns.clone()

    evaluate(policy, cfg, num_episodes=3)

    assert_close(policy.state_dict(), before, rtol=0, atol=0)
    assert_close(policy.reward_scale.running_returns, running, rtol=0, atol=0)


def test_evaluation_gives_the_unnormalised_return_of_its_own_seeds(learned):
    cfg, policy = learned
    env = gymnasium.make(cfg.env, **cfg.env_options)
    expected = []
    for row_index in range(3):
        obs, _ = env.reset(seed=derive_seed(EVALUATION_SEED, "evaluate", row_index, 0))
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy.act(obs))
            total, over = total + float(reward), terminated or truncated
        expected.append(total)

    # float32: acting on three rows at once rounds otherwise than on one
    assert evaluate(policy, cfg, num_episodes=3).returns == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sample", [False, True])
def test_evaluating_twice_gives_the_same_returns(learned, sample):
    cfg, policy = learned
    assert (
        evaluate(policy, cfg, num_episodes=3, sample=sample).returns
        == evaluate(policy, cfg, num_episodes=3, sample=sample).returns
    )


class Steady(gymnasium.Env):
    """Eight steps that look alike; pays 1 for the action of the step before."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-10, 10, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.chosen: list[float] = []
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.chosen.append(float(action[0]))
        again = self.chosen[-2:-1] == self.chosen[-1:]
        return np.zeros(2, np.float32), float(again), False, len(self.chosen) == 8, {}


@pytest.mark.parametrize(("exploration", "repeated"), [("held", 6.0), ("independent", 0.0)])
def test_sampling_in_evaluation_holds_noise_as_training_does(exploration, repeated):
    cfg = ppo.Config(env="tests.test_normalize:Steady", hidden=(8,), exploration=exploration, noise_hold=4)
    policy = Policy.build(Steady.observation_space, Steady.action_space, cfg, seed=1)

    # held for four steps of eight: all but the first and the fifth choose as before
    assert evaluate(policy, cfg, num_episodes=3, sample=True).returns == [repeated] * 3


def test_another_seed_of_evaluation_gives_other_returns(learned):
    cfg, policy = learned
    assert (
        evaluate(policy, cfg, num_episodes=3).returns
        != evaluate(policy, cfg, num_episodes=3, seed=EVALUATION_SEED + 1).returns
    )


def test_evaluation_returns_as_many_episodes_as_asked_for(learned):
    cfg, policy = learned
    assert len(evaluate(policy, cfg, num_episodes=51).returns) == 51  # in 50 rows
    assert evaluate(policy, cfg, num_episodes=51).returns[:50] == evaluate(policy, cfg, num_episodes=50).returns


def test_training_with_evaluations_ends_with_the_same_bytes_as_without(tmp_path):
    without = ppo.train(settings(tmp_path, "without"))
    evaluated = ppo.train(settings(tmp_path, "with", evaluate_every=1, evaluate_episodes=2))

    assert "evaluation_return_mean" in evaluated.metrics[-1]
    weights = [(run.path / "policy" / "policy.safetensors").read_bytes() for run in (without, evaluated)]
    assert weights[0] == weights[1]


def settings(tmp_path, name="run", **fields):
    """A few seconds of PPO on a pendulum whose episodes are short."""
    options = {"env": "Pendulum-v1", "env_options": {"max_episode_steps": 20}, "num_envs": 2, "steps": 256}
    options |= {
        "num_steps_per_env": 64,
        "num_epochs": 2,
        "num_minibatches": 2,
        "hidden": (8,),
        "seed": 1,
        "quiet": True,
    }
    options |= {"normalize_obs": True, "normalize_reward": True, "output_dir": str(tmp_path / name)}
    return ppo.Config(**(options | fields))


def scaled_policy():
    """A policy with both scales, and a walker for it."""
    envs = environment.make("Pendulum-v1", num_envs=2, options={"max_episode_steps": 20})
    shape = NetworkConfig(hidden=(8,), orthogonal=False)
    spaces_of = envs.single_observation_space, envs.single_action_space
    return Policy.build(*spaces_of, shape, seed=0, scale_obs=True, scale_reward=0.9), walker(envs)


# float64


def test_what_float32_cannot_hold_is_scaled_before_it_is_cast():
    scale = ObsNormalizer({"obs": (1,)})
    clock = 1.7e9 + torch.arange(-30.0, 31.0, dtype=torch.float64)[:, None]
    scale.running_moments[0].update(clock)

    scaled = scale(clock[None])

    # 61 whole seconds from -30 to 30: the variance is (61^2 - 1) / 12 = 310
    assert_close(scaled, (torch.arange(-30.0, 31.0) / 310**0.5)[None, :, None], rtol=1e-6, atol=1e-6)
    assert isinstance(scaled, torch.Tensor) and scaled.dtype == torch.float32


@pytest.mark.parametrize("small", [True, False], ids=["NumPy", "modules"])
def test_the_sampler_scales_in_float64_too(small):
    space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    policy = Policy.build(
        space, spaces.Discrete(2), NetworkConfig(hidden=(4,), orthogonal=False), seed=0, scale_obs=True
    )
    clock = 1.7e9 + 17 * torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    policy.obs_scale.running_moments[0].update(clock)
    rows = 50 if small else 2**16
    quick = make_numpy_actor(
        policy, SimpleNamespace(num_envs=rows, noise_interval=1, has_action_mask=False, generator=None, sample=False)
    )

    _, logits = quick(clock.numpy())

    with torch.no_grad():
        expected = policy(clock[:, None])[0].logp[:, 0]
    assert_close(torch.from_numpy(logits).log_softmax(dim=-1), expected, rtol=1e-5, atol=1e-6)
    assert expected.std(dim=0).min() > 0.01


@pytest.mark.parametrize(("normalize", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_a_record_is_exact_where_the_policy_scales_it(normalize, dtype, tmp_path):
    cfg = ppo.Config(
        env="tests.foreign_envs:UnixClock", normalize_obs=normalize, quiet=True, output_dir=str(tmp_path / "run")
    )
    with open_run("ppo", cfg, None, None) as run:
        record = run.collector.collect(run.policy, 3)
        action = run.policy.act(np.array([1.7e9]))

        assert record.obs.dtype == dtype and action in (0, 1)


def test_a_run_says_what_float32_loses(tmp_path):
    fields = {
        "steps": 8,
        "num_envs": 1,
        "num_steps_per_env": 8,
        "num_minibatches": 1,
        "num_epochs": 1,
        "log_every": 1000,
    }
    said = []
    for name, normalize in (("plain", False), ("scaled", True)):
        run = ppo.train(
            ppo.Config(
                env="tests.foreign_envs:UnixClock", normalize_obs=normalize, output_dir=str(tmp_path / name), **fields
            )
        )
        said.append(notices(run))

    assert len(said[0]) == 1 and said[1] == []
    assert "observation 'obs' (such as 17" in said[0][0] and "set normalize_obs" in said[0][0]
