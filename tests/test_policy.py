"""The policy: it acts on raw observations, is complete once saved, explores with log-probs that are right."""

import dataclasses
import math
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

from tests.foreign_envs import notices
from tests.probes import ACTIONS, OBSERVATIONS, Anything, anything, vector
from tests.records import seeded
from understudy import load
from understudy.control import actor_critic, ppo, preset, reinforce
from understudy.control.config import NetworkConfig
from understudy.control.envs.spaces import to_env_action
from understudy.control.policy import Policy
from understudy.control.presets import refuse_fields_without_effect
from understudy.control.rollout import RolloutCollector
from understudy.distribution import Categorical
from understudy.run.config import RequestError
from understudy.value import estimate_values

SMALL = {"hidden": (8,), "rnn_hidden_size": 4}


def policy(observation="vector", action="Discrete", *, seed=0, **fields) -> Policy:
    shape = NetworkConfig(**(SMALL | fields))
    return Policy.build(OBSERVATIONS[observation], ACTIONS[action], shape, seed=seed)


def observations(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)


def equal(one: Policy, other: Policy) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def short(path, **fields) -> ppo.Config:
    """Two iterations of one pass; `clip_fraction` is the share of steps whose first ratio is further than 1e-5 from 1."""
    sizes = {"steps": 16, "num_steps_per_env": 6, "num_epochs": 1, "num_minibatches": 1, "clip": 1e-5, "log_every": 2}
    network = SMALL if fields.get("memory", "none") != "none" else {"hidden": (8,)}
    return ppo.Config(env="any", output_dir=str(path), quiet=True, **(network | sizes | fields))


def test_weights_depend_on_nothing_but_the_seed():
    torch.manual_seed(1)
    one = policy(seed=7)
    torch.manual_seed(2)
    other = policy(seed=7)

    assert equal(one, other) and not equal(one, policy(seed=8))


def test_fresh_weights_leave_torchs_own_randomness_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    policy(seed=7)

    assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_a_batch_of_observations_gets_a_batch_of_actions():
    own = policy()

    assert own.act(observations(4)).shape == (4,)
    assert own.act(observations(4)[0]).shape == ()


def test_the_action_is_the_mode_unless_sampled():
    own = policy(log_std=-20.0, action="Box")
    mode = own.act(observations(5))

    assert_close(own.act(observations(5)), mode, rtol=0, atol=0)
    assert_close(own.act(observations(5), sample=True, generator=seeded()), mode, atol=1e-6, rtol=0)
    wide = policy(action="Box")
    assert (wide.act(observations(5), sample=True, generator=seeded()) != wide.act(observations(5))).any(axis=1).all()


def test_what_is_sampled_depends_on_the_generator_alone():
    own = policy(action="MultiDiscrete")
    one, again, other = (own.act(observations(9), sample=True, generator=seeded(s)) for s in (1, 1, 2))

    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_a_state_is_carried_from_one_act_to_the_next(memory):
    own = policy(action="Box", rnn_type=memory)
    obs = observations(3)

    state, actions = None, []
    for each in obs:
        action, state = own.act(each, state=state)
        actions.append(action)
    distribution, _, after = own(torch.as_tensor(obs)[None], own.initial_state(1), torch.zeros(1, 3).bool())

    assert_close(np.stack(actions), own.to_env_action(distribution.mean[0].detach().numpy()))
    assert_close(state, after)


def test_a_state_is_forgotten_where_an_episode_starts():
    own = policy(action="Box", rnn_type="gru")
    first, second = observations(2)
    _, state = own.act(first)
    carried, _ = own.act(second, state=state)
    fresh, _ = own.act(second)

    assert_close(own.act(second, state=state, start=True)[0], fresh)
    assert np.abs(carried - fresh).max() > 0


def test_each_row_starts_on_its_own():
    own = policy(rnn_type="gru")
    _, state = own.act(observations(2))
    _, one = own.act(observations(2), state=state, start=[True, False])
    _, fresh = own.act(observations(2))
    _, carried = own.act(observations(2), state=state)

    assert_close(one, torch.stack([fresh[0], carried[1]]))


@pytest.mark.parametrize("sample", [True, False])
def test_a_masked_action_is_never_taken(sample):
    own = policy()
    masks = np.eye(3, dtype=np.int8)[np.arange(30) % 3]
    actions = own.act(observations(30), action_mask=masks, sample=sample, generator=seeded())

    np.testing.assert_array_equal(actions, np.arange(30) % 3 - 1)  # the space starts at -1
    assert own.act(observations(1)[0], action_mask=masks[2]) == 1


def test_a_mask_that_allows_nothing_is_refused():
    with pytest.raises(ValueError, match="action_mask allows no action: allow at least one"):
        policy().act(observations(1)[0], action_mask=np.zeros(3))


@pytest.mark.parametrize("action", ACTIONS)
def test_a_saved_policy_is_complete(tmp_path, action):
    own = policy("Dict", action)
    own.save(tmp_path)
    loaded = load(tmp_path)

    assert equal(own, loaded)
    assert loaded.network_config == own.network_config
    assert (loaded.observation_space, loaded.action_space) == (own.observation_space, own.action_space)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]


def test_an_order_of_keys_that_is_not_sorted_is_kept(tmp_path):
    space = spaces.Dict([("z", spaces.Box(-1.0, 1.0, (2,))), ("a", spaces.Discrete(2))])
    own = Policy.build(space, ACTIONS["Box"], NetworkConfig(**SMALL), seed=0)
    own.save(tmp_path)

    np.testing.assert_array_equal(load(tmp_path).act(space.sample()).shape, (2,))
    obs = {"z": np.array([0.5, -0.5], np.float32), "a": 1}
    np.testing.assert_array_equal(load(tmp_path).act(obs), own.act(obs))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    policy(hidden=(8,)).save(tmp_path / "small")
    policy(hidden=(9,)).save(tmp_path / "large")
    (tmp_path / "large" / "policy.safetensors").rename(tmp_path / "small" / "policy.safetensors")

    with pytest.raises(RequestError, match=r"safetensors does not fit its policy.json: network.*weight.* differ"):
        load(tmp_path / "small")


def test_weights_of_another_kind_of_network_are_refused_by_name(tmp_path):
    policy().save(tmp_path)

    with pytest.raises(RequestError, match=r"does not fit the network given: .*network.actor"):
        load(tmp_path, policy=Plain())


class Plain(nn.Module):
    """A network of someone's own: three actions, one layer used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.value = nn.Linear(3, 1)

    def forward(self, obs):
        x = self.first(obs)
        return Categorical.of(self.again(x)), self.value(x)[..., 0]


def test_a_network_of_ones_own_is_trained_saved_and_loaded(tmp_path):
    network = Plain()
    before = network.first.weight.detach().clone()

    run = ppo.train(plain(tmp_path, learning_rate=0.1), env=anything("vector", "Discrete"), policy=network)

    assert not torch.equal(before, network.first.weight)
    loaded = load(run.path, policy=Plain())
    assert load(run.path, policy=loaded).network is loaded.network
    np.testing.assert_array_equal(
        loaded.act(observations(9)), Policy(network, OBSERVATIONS["vector"], ACTIONS["Discrete"]).act(observations(9))
    )


def plain(path, **fields) -> ppo.Config:
    """As `short`, saying nothing of a network."""
    return dataclasses.replace(short(path, **fields), **{name: getattr(NetworkConfig(), name) for name in SMALL})


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden", (32,)), ("rnn_type", "gru"), ("log_std", -0.5), ("exploration", "gsde"), ("shared", True)],
)
def test_what_a_config_asks_of_a_network_of_ones_own_is_refused(tmp_path, field, value):
    cfg = dataclasses.replace(plain(tmp_path), **{field: value})
    action = "Box" if field == "exploration" else "Discrete"

    with pytest.raises(
        RequestError, match=rf"^{field} is .*, but policy is your own, which takes none from the config: "
    ):
        ppo.train(cfg, env=anything("vector", action), policy=Plain())


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden", (32,)), ("squash", "tanh"), ("scalar_std", True), ("exploration", "gsde"), ("normalize_obs", True)],
)
def test_what_a_config_asks_of_a_policy_that_is_otherwise_is_refused(tmp_path, field, value):
    made = policy(action="Box")
    made.save(tmp_path / "made")
    cfg = dataclasses.replace(plain(tmp_path / "run"), **{field: value})

    with pytest.raises(RequestError, match=rf"^{field} is .*, but policy is your own, which has "):
        ppo.train(cfg, env=anything("vector", "Box"), policy=made)
    with pytest.raises(RequestError, match=rf"^{field} is .*, but init_from is '.*', which has .*: leave it at "):
        ppo.train(dataclasses.replace(cfg, init_from=str(tmp_path / "made")), env=anything("vector", "Box"))


def test_held_noise_is_refused_for_a_policy_that_explores_with_gsde(tmp_path):
    cfg = dataclasses.replace(plain(tmp_path), exploration="held")

    with pytest.raises(RequestError, match=r"^exploration is 'held', but policy is your own, which has 'gsde'"):
        ppo.train(cfg, env=anything("vector", "Box"), policy=policy(action="Box", exploration="gsde"))


def test_a_policy_to_start_from_goes_with_fields_that_say_what_it_is_or_nothing(tmp_path):
    fields = {"squash": "tanh", "exploration": "held", "hidden": (8,), "log_std": -1.0}
    policy(action="Box", **fields).save(tmp_path / "made")

    for said in (fields, {"exploration": "held", "noise_hold": 3}, {}):
        cfg = dataclasses.replace(plain(tmp_path / f"run-{len(said)}"), init_from=str(tmp_path / "made"), **said)
        run = ppo.train(cfg, env=anything("vector", "Box"))
        assert load(run.path).squash == "tanh"


def test_a_network_of_ones_own_is_asked_for_when_loading(tmp_path):
    Policy(Plain(), OBSERVATIONS["vector"], ACTIONS["Discrete"]).save(tmp_path)

    with pytest.raises(
        RequestError, match=r"policy is missing: .*load\(.*, policy=my_network\), or --policy my_net.py:MyNet"
    ):
        load(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_where_they_are_loaded(value, tmp_path):
    broken = policy()
    with torch.no_grad():
        next(broken.network.parameters()).view(-1)[0] = value
    broken.save(tmp_path)

    with pytest.raises(RequestError, match=r"whose weight 'network\..*' is not finite"):
        load(tmp_path)


def test_a_buffer_of_ones_own_network_may_hold_infinities(tmp_path):
    class Masked(Plain):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("mask", torch.tensor(value))

    Policy(Masked(-math.inf), OBSERVATIONS["vector"], ACTIONS["Discrete"]).save(tmp_path / "a")
    Policy(Masked(math.nan), OBSERVATIONS["vector"], ACTIONS["Discrete"]).save(tmp_path / "b")

    assert load(tmp_path / "a", policy=Masked(0.0)).network.mask == -math.inf
    with pytest.raises(RequestError, match=r"whose weight 'network.mask' is not finite"):
        load(tmp_path / "b", policy=Masked(0.0))


def test_an_environment_of_ones_own_is_one_row(tmp_path):
    run = ppo.train(short(tmp_path, log_every=1), env=Anything("vector", "Discrete", length=3))

    assert [line["steps"] for line in run.metrics] == [6, 12, 18]


EXPLORATIONS = [("independent", "clip"), ("independent", "tanh"), ("held", "clip"), ("held", "tanh"), ("gsde", "clip")]


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize(("exploration", "squash"), EXPLORATIONS)
def test_the_first_ratio_is_1_however_a_box_is_explored(tmp_path, exploration, squash, memory):
    cfg = short(tmp_path, exploration=exploration, squash=squash, rnn_type=memory)
    (line,) = ppo.iterate(cfg, env=anything("vector", "Box"))

    assert line["clip_fraction"] == 0


def test_the_first_ratio_is_1_with_tanh_and_a_bound_that_is_infinite(tmp_path):
    class Open(Anything):
        def __init__(self):
            super().__init__("vector", "Box", length=3)
            self.action_space = spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32))

    (line,) = ppo.iterate(short(tmp_path, squash="tanh"), env=vector([Open, Open]))

    assert line["clip_fraction"] == 0
    assert all(math.isfinite(x) for x in line.values() if x is not None)


def test_the_entropy_of_a_squashed_action_is_reported_as_an_estimate(tmp_path):
    (line,) = ppo.iterate(short(tmp_path, squash="tanh"), env=anything("vector", "Box"))

    assert "entropy_estimate" in line and "entropy" not in line


def test_tanh_with_noise_from_features_is_refused():
    with pytest.raises(RequestError, match="exploration is 'gsde' and squash is 'tanh': choose squash 'clip'"):
        ppo.Config(env="any", exploration="gsde", squash="tanh")


@pytest.mark.parametrize("exploration", ["held", "gsde"])
def test_held_noise_is_refused_where_actions_are_not_continuous(tmp_path, exploration):
    with pytest.raises(RequestError, match=f"exploration is '{exploration}', but action_space is Discrete"):
        ppo.train(short(tmp_path, exploration=exploration), env=anything("vector", "Discrete"))


def collected(own: Policy, *, hold: int, steps: int = 7, env=None):
    walker = RolloutCollector(
        env or anything("vector", "Box"),
        seed_of=lambda row, episode: 10 * row + episode,
        generator=seeded(),
        noise_interval=hold,
    )
    record = walker.collect(own, steps)
    distribution, _ = estimate_values(own, record)
    return record, distribution


def test_held_noise_is_held_for_its_calls_and_then_drawn_anew():
    record, distribution = collected(policy(action="Box", log_std=-1.0), hold=3)
    noise = (record.action - distribution.mean) / distribution.log_std.exp()
    calls = noise[1][record.mask[1]]  # [7, D], whatever episodes they are in

    for start, end in ((0, 3), (3, 6), (6, 7)):
        # a difference of rounding, as noise was not kept but found again from the action
        assert_close(calls[start:end], calls[start].expand(end - start, 2), atol=1e-5, rtol=1e-4)
    assert (calls[2] - calls[3]).abs().min() > 1e-3 and (calls[5] - calls[6]).abs().min() > 1e-3


def test_independent_noise_is_drawn_anew_at_every_call():
    record, distribution = collected(policy(action="Box"), hold=1)
    calls = (record.action - distribution.mean)[1][record.mask[1]]

    assert (calls[1:] - calls[:-1]).abs().min() > 1e-3


def test_noise_goes_on_being_held_in_the_next_record():
    own = policy(action="Box")
    walker = RolloutCollector(
        anything("vector", "Box"), seed_of=lambda row, episode: row, generator=seeded(), noise_interval=4
    )
    noise = []
    for _ in range(4):
        record = walker.collect(own, 2)
        noise.append((record.action - estimate_values(own, record)[0].mean)[record.mask].detach())

    assert_close(noise[0], noise[1], atol=1e-5, rtol=1e-4)
    assert_close(noise[2], noise[3], atol=1e-5, rtol=1e-4)
    assert (noise[1] - noise[2]).abs().min() > 1e-3


class Still(gymnasium.Env):
    """The same observation for ever."""

    observation_space = OBSERVATIONS["vector"]
    action_space = ACTIONS["Box"]

    def reset(self, *, seed=None, options=None):
        return np.array([0.5, -1.0, 0.25], np.float32), {}

    def step(self, action):
        return *self.reset()[:1], 0.0, False, False, {}


def test_noise_from_features_is_one_function_for_its_calls():
    own = policy(action="Box", exploration="gsde")
    record, _ = collected(own, hold=3, env=vector([Still, Still]))
    action = record.action[:, :7]

    # where features stay the same, so does the action
    assert_close(action[:, :3], action[:, :1].expand(-1, 3, -1))
    assert_close(action[:, 3:6], action[:, 3:4].expand(-1, 3, -1))
    assert (action[:, 2] - action[:, 3]).abs().min() > 1e-4
    assert (action[0] - action[1]).abs().min() > 1e-4  # every row has a function of its own


def test_noise_from_features_moves_with_the_features():
    record, distribution = collected(policy(action="Box", exploration="gsde"), hold=7)
    noise = (record.action - distribution.mean)[1][record.mask[1]]

    assert (noise[1:] - noise[:-1]).abs().min() > 1e-4


def test_log_probs_of_noise_from_features_are_the_density_over_its_draws():
    own = policy(action="Box", exploration="gsde")
    record, distribution = collected(own, hold=3)
    features = own.network.actor({"obs": record.obs})
    # a sum of normals: variance features^2 @ weight_std^2, to which 1e-6 is added
    std = (features.square() @ own.network.head.log_std.exp().square() + 1e-6).sqrt()
    density = Normal(distribution.mean, std).log_prob(record.action).sum(dim=-1)

    assert_close(record.behavior_logprob[record.mask], density[record.mask])


def test_log_probs_of_held_noise_are_the_density_of_each_action_alone():
    own = policy(action="Box", log_std=-0.5)
    record, distribution = collected(own, hold=3)
    density = Normal(distribution.mean, math.exp(-0.5)).log_prob(record.action).sum(dim=-1)

    assert_close(record.behavior_logprob[record.mask], density[record.mask])


def test_a_squashed_policy_reaches_for_its_bounds_and_stays_within_them(tmp_path):
    received = []

    class Noting(Anything):
        def step(self, action):
            received.append(action)
            return super().step(action)  # which refuses what is outside the space

    cfg = short(tmp_path, squash="tanh", log_std=2.0, steps=60)
    ppo.train(cfg, env=vector([lambda: Noting("vector", "Box", length=4)] * 2))
    low, high = np.min(received, axis=0), np.max(received, axis=0)

    assert np.abs(low - [-1, 0]).max() < 0.01 and np.abs(high - [1, 3]).max() < 0.01


def test_a_policy_of_ones_own_keeps_its_spaces_and_squash():
    own = policy(action="Box", squash="tanh")
    action = torch.tensor([[0.5, 0.5]])

    # -1 + (tanh + 1) / 2 * 2 and 0 + (tanh + 1) / 2 * 3
    tanh = math.tanh(0.5)
    assert_close(own.to_env_action(action.numpy()), np.array([[tanh, 1.5 * (tanh + 1)]], np.float32))


def test_a_directory_without_a_policy_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"path is .*, which holds no policy: give the directory of a run"):
        load(Path(tmp_path))


def test_what_a_policy_is_made_of_makes_it_again():
    made_of = policy(rnn_type="lstm", squash="tanh").network_config

    assert made_of == dataclasses.asdict(NetworkConfig(**made_of))


# actions of a Box


@pytest.mark.parametrize(
    ("low", "high", "far"),
    [
        (-1, 1, False),
        (-2, 2, False),  # Pendulum
        (-0.4, 0.4, False),  # Humanoid
        (0, 1, False),  # CarRacing's gas
        (0, 20, False),
        (0, 1000, True),
        (100, 200, True),
        (1, 2, True),
        (0, 0.01, True),
        (-math.inf, math.inf, False),
        (0, math.inf, False),
        (-1e30, 1e30, False),
        (5, 5, False),  # no choice at all
    ],
)
def test_bounds_far_from_one_are_scaled_to(low, high, far):
    space = spaces.Box(low, high, (1,), np.float32)
    own = Policy.build(OBSERVATIONS["vector"], space, NetworkConfig(hidden=(4,)), seed=0)

    assert own.squash == ("scale" if far else "clip") and own.network_config["squash"] == own.squash  # pyright: ignore


def test_scale_maps_minus_one_and_one_to_the_bounds():
    space = spaces.Box(np.array([100, -3, 0], np.float32), np.array([200, np.inf, 1e30], np.float32))

    action = to_env_action(space, np.float32([[-1, -4, 2], [0, 5, 0], [0.5, 0, 3], [9, 0, 1]]), "scale")

    # 150 + 50 a, clipped; the others have no bounds to be scaled to
    assert action.tolist() == [[100, -3, 2], [150, 5, 0], [175, 0, 3], [200, 0, 1]]


def test_what_auto_came_to_is_saved(tmp_path):
    space = spaces.Box(0, 1000, (1,), np.float32)
    Policy.build(OBSERVATIONS["vector"], space, NetworkConfig(hidden=(4,)), seed=0).save(tmp_path)

    assert Policy.load(tmp_path).squash == "scale"


@pytest.mark.parametrize("squash", ["clip", "scale"])
def test_a_run_that_clips_to_far_bounds_says_so(tmp_path, squash):
    cfg = short(tmp_path, squash=squash)
    cfg = dataclasses.replace(cfg, env="tests.foreign_envs:WideAction", env_options={"low": 100.0, "high": 200.0})
    run = ppo.train(cfg)

    said = notices(run)
    assert len(said) == (squash == "clip") and all("set squash to scale, or to auto" in text for text in said)


# fields without effect


@pytest.mark.parametrize(
    ("recipe", "fields", "idle"),
    [
        (ppo, {"rnn_hidden_size": 8}, "rnn_hidden_size is 8, but rnn_type is 'none'"),
        (ppo, {"noise_hold": 8}, "noise_hold is 8, but exploration is 'independent'"),
        (ppo, {"hidden": (), "activation": "relu"}, "activation is 'relu', but hidden is ()"),
        (ppo, {"step_timeout": 1.0}, "step_timeout is 1.0, but vectorization is 'sync'"),
        (ppo, {"evaluate_episodes": 3}, "evaluate_episodes is 3, but evaluate_every is 0"),
        (ppo, {"constraint_rate": 0.5}, "constraint_rate is 0.5, but no constraint is held"),
        (ppo, {"constraint": ("x<=1:warn",), "constraint_rollbacks": 1}, "but no constraint rolls back"),
        (ppo, {"objective": "penalty", "clip": 0.1}, "clip is 0.1, but objective is 'penalty'"),
        (ppo, {"objective": "penalty", "clip_schedule": "linear"}, "clip_schedule is 'linear', but objective is"),
        (ppo, {"kl_old_coef": 2.0}, "kl_old_coef is 2.0, but objective is 'clip'"),
        (ppo, {"value_coef": 0.0, "value_clip": 0.1}, "value_clip is 0.1, but value_coef is 0"),
        (ppo, {"num_epochs": 1, "recompute_advantages": True}, "recompute_advantages is True, but num_epochs is 1"),
        (ppo, {"num_epochs": 1, "reshuffle": False}, "reshuffle is False, but num_epochs is 1"),
        (actor_critic, {"value_coef": 0.0, "value_loss": "huber"}, "value_loss is 'huber', but value_coef is 0"),
        (reinforce, {"group_size": 2}, "group_size is 2, but baseline is 'standardize'"),
        (reinforce, {"scale_by_std": False}, "scale_by_std is False, but baseline is 'standardize'"),
        (reinforce, {"baseline": "leave_one_out", "scale_by_std": False}, "but baseline is 'leave_one_out'"),
        (reinforce, {"value_coef": 1.0}, "value_coef is 1.0, but baseline is 'standardize'"),
        (reinforce, {"baseline": "group", "gamma": 0.9}, "gamma is 0.9, but baseline is 'group'"),
        (reinforce, {"baseline": "leave_one_out", "gamma": 0.9}, "gamma is 0.9, but baseline is 'leave_one_out'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_without_effect_is_refused(recipe, fields, idle):
    cfg = recipe.Config(env="any", **fields)

    with pytest.raises(RequestError, match=re.escape(idle) + ".*, so it has no effect: leave it at "):
        refuse_fields_without_effect(cfg, cfg.fields_without_effect())


@pytest.mark.parametrize(
    ("env", "fields", "idle"),
    [
        ("TenSteps", {"noise_hold": 8}, "noise_hold is 8, but exploration is 'independent'"),
        ("TenSteps", {"squash": "tanh"}, "squash is 'tanh', but action_space is Discrete(2), no Box"),
        ("TenSteps", {"log_std": -1.0}, "log_std is -1.0, but action_space is Discrete(2), no Box"),
        ("TenSteps", {"scalar_std": True}, "scalar_std is True, but action_space is Discrete(2), no Box"),
        ("Seen", {"normalize_obs": True}, "normalize_obs is True, but observation_space is Discrete(3)"),
    ],
)
def test_a_field_without_effect_in_an_environment_is_refused(tmp_path, env, fields, idle):
    cfg = dataclasses.replace(short(tmp_path / "run"), env=f"tests.foreign_envs:{env}", **fields)

    with pytest.raises(RequestError, match=re.escape(idle)):
        ppo.train(cfg)
    assert not (tmp_path / "run").exists()


def test_gamma_counts_with_a_group_baseline_where_it_scales_rewards():
    assert (
        "gamma"
        not in reinforce.Config(env="any", baseline="group", gamma=0.9, normalize_reward=True).fields_without_effect()
    )


def test_a_field_of_the_preset_may_be_without_effect():
    cfg = preset(ppo.Config, "CartPole-v1", objective="penalty")

    assert cfg.clip_schedule == "linear" and "clip_schedule" in cfg.fields_without_effect()
    refuse_fields_without_effect(cfg, cfg.fields_without_effect())


# no hidden layer


@pytest.mark.parametrize("observation", ["vector", "image", "Dict", "Tuple"])
@pytest.mark.parametrize("memory", ["none", "gru"])
def test_a_network_may_have_no_hidden_layer(tmp_path, observation, memory):
    cfg = short(tmp_path, hidden=(), rnn_type=memory)

    run = ppo.train(cfg, env=anything(observation, "Box"))

    assert run.metrics[-1]["clip_fraction"] == 0
    assert load(run.path).network_config["hidden"] == ()


ODD_OBSERVATIONS = {
    "too short": (np.zeros(2, np.float32), r"obs has shape \[2\]: must be \[3\], or \[B, ...\] of them"),
    "too wide a batch": (np.zeros((5, 4), np.float32), r"obs has shape \[5, 4\]: must be \[3\] in each of its 5 rows"),
    "two batches": (np.zeros((1, 1, 3), np.float32), r"obs has shape \[1, 1, 3\]: must be \[3\] in each"),
    "text": (np.array(["a", "b", "c"]), r"obs is of <U1: must be numbers of float32"),
    "ragged": ([[1.0], [1.0, 2.0]], r"obs is a list, which does not fit observation_space Box"),
}


@pytest.mark.parametrize("name", ODD_OBSERVATIONS)
def test_an_observation_that_does_not_fit_is_refused_in_a_sentence(name):
    obs, message = ODD_OBSERVATIONS[name]

    with pytest.raises(ValueError, match=message):
        policy().act(obs)


def test_an_observation_with_other_keys_is_refused_in_a_sentence():
    space = gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-1, 1, (2,)), "key": gymnasium.spaces.Discrete(3)})
    made = Policy.build(space, gymnasium.spaces.Discrete(2), NetworkConfig(hidden=(4,)), seed=0)

    assert made.act({"place": np.zeros(2), "key": 1}) in (0, 1)
    with pytest.raises(ValueError, match=r"obs is the keys \['place'\], which does not fit"):
        made.act({"place": np.zeros(2)})
    with pytest.raises(ValueError, match=r"obs of 'key' is of float64: must be numbers of int64"):
        made.act({"place": np.zeros(2), "key": 0.5})
