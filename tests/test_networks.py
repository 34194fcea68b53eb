"""Networks: observations of every kind become features, memory reads rows, a head is a distribution of its space."""

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from torch.testing import assert_close

from tests.probes import ACTIONS, OBSERVATIONS, Anything
from tests.records import seeded
from understudy.batch import map_tensors
from understudy.control.config import NetworkConfig
from understudy.control.envs.spaces import MASK_KEY, feature_spaces, mask_width, read_obs
from understudy.control.networks import ActorCriticNetwork, Cnn, FeatureExtractor, RecurrentLayer
from understudy.distribution import Bernoulli, Categorical, DiagonalGaussian, MultiCategorical, SquashedGaussian

KINDS = ("gru", "lstm")


def shape(**fields) -> NetworkConfig:
    return dataclasses.replace(NetworkConfig(hidden=(8,), rnn_hidden_size=4), **fields)


def network(observation: str, action: str = "Discrete", **fields) -> ActorCriticNetwork:
    torch.manual_seed(0)
    return ActorCriticNetwork(OBSERVATIONS[observation], ACTIONS[action], shape(**fields))


def observed(space: gymnasium.Space, rows: int, steps: int, seed: int = 0):
    """Random observations as a network gets them, [rows, steps, ...]."""
    space.seed(seed)
    samples = [space.sample() for _ in range(rows * steps)]
    empty = gymnasium.vector.utils.create_empty_array(space, n=len(samples))
    tree = read_obs(space, gymnasium.vector.utils.concatenate(space, samples, empty))
    return map_tensors(lambda x: x.unflatten(0, (rows, steps)), tree)


def cnn(*dims: int, **options) -> Cnn:
    torch.manual_seed(0)
    return Cnn(dims, **({"orthogonal": True} | options))


def image(*dims: int) -> torch.Tensor:
    return torch.randint(256, dims, generator=seeded(), dtype=torch.uint8)


def test_an_image_has_the_same_features_with_its_channels_first_or_last():
    last = image(2, 3, 5, 6, 3)

    assert_close(cnn(5, 6, 3)(last), cnn(3, 5, 6)(last.movedim(-1, -3)))


def test_a_grey_image_has_the_same_features_with_and_without_a_channel():
    grey = image(2, 3, 5, 6)

    assert_close(cnn(5, 6)(grey), cnn(5, 6, 1)(grey[..., None]))
    assert_close(cnn(5, 6)(grey), cnn(1, 5, 6)(grey[:, :, None]))


def test_a_stack_of_colour_images_is_one_image_of_all_their_channels():
    last = image(2, 3, 4, 5, 6, 3)

    assert_close(cnn(4, 5, 6, 3)(last), cnn(12, 5, 6)(last.movedim(-1, -3).flatten(2, 3)))
    assert_close(cnn(4, 5, 6, 3)(last), cnn(4, 3, 5, 6)(last.movedim(-1, -3)))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_an_image_is_scaled_to_within_1(orthogonal):
    net = cnn(5, 6, 3, orthogonal=orthogonal)

    assert_close(net(torch.full((1, 1, 5, 6, 3), 255, dtype=torch.uint8))[0], net.net(torch.ones(1, 3, 5, 6)))


def test_an_image_from_36_pixels_on_goes_through_the_nature_network():
    convs = [layer for layer in cnn(84, 84, 4).net if isinstance(layer, torch.nn.Conv2d)]

    assert [tuple(conv.weight.shape) for conv in convs] == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert cnn(84, 84, 4).width == 3136  # Mnih et al. 2015, extended data table 1: 64 maps of 7 x 7
    assert cnn(36, 36).width == 64


@pytest.mark.parametrize("dims", [(1, 1), (2, 3), (35, 4)])
def test_a_small_image_has_features_too(dims):
    assert cnn(*dims)(image(2, 3, *dims)).shape == (2, 3, cnn(*dims).width)


class Camera(gymnasium.Env):
    """Each step another image."""

    action_space = spaces.Discrete(2)

    def __init__(self, *dims: int):
        self.observation_space = spaces.Box(0, 255, dims, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(256, size=self.observation_space.shape, dtype=np.uint8), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


@pytest.mark.parametrize("dims", [(14, 13), (14, 13, 3), (3, 14, 13)])
def test_gymnasiums_stack_of_frames_is_read_frame_by_frame(dims):
    env = FrameStackObservation(Camera(*dims), 4)
    obs, _ = env.reset(seed=1)
    for _ in range(3):
        obs, *_ = env.step(0)
    frames = torch.as_tensor(obs)
    channels = frames.movedim(-1, -3) if dims[-1] == 3 else frames

    assert_close(
        cnn(4, *dims)(frames[None, None]), cnn(channels.numel() // 182, 14, 13)(channels.reshape(1, 1, -1, 14, 13))
    )


def test_discrete_observations_are_one_hot():
    body = FeatureExtractor(OBSERVATIONS["Tuple"], shape(hidden=()))
    tree = {"0": torch.tensor([[[0.5, -0.5]]]), "1": torch.tensor([[[1, 0]]]), "2.0": torch.tensor([[1]])}

    assert_close(body(tree), torch.tensor([[[0.5, -0.5, 0, 1, 1, 0, 0, 0, 1.0]]]))


@pytest.mark.parametrize("memory", ["none", *KINDS])
@pytest.mark.parametrize(
    ("observation", "leaf"), [(o, leaf) for o, space in OBSERVATIONS.items() for leaf in feature_spaces(space)]
)
def test_every_part_of_an_observation_reaches_actor_and_critic(observation, leaf, memory):
    net = network(observation, rnn_type=memory)
    one, other = (observed(OBSERVATIONS[observation], 1, 8, seed) for seed in (0, 1))
    changed = other if not isinstance(one, dict) else {**one, leaf: other[leaf]}
    rest = (torch.zeros(1, net.state_size), torch.zeros(1, 8).bool()) if memory != "none" else ()

    (before, value_before, *_), (after, value_after, *_) = net(one, *rest), net(changed, *rest)
    assert not torch.equal(before.logp, after.logp)
    assert not torch.equal(value_before, value_after)


def test_a_mask_is_no_feature():
    net = network("vector")
    x = observed(OBSERVATIONS["vector"], 2, 3)
    _, value = net(x)
    _, masked = net({"obs": x, MASK_KEY: torch.tensor([True, False, False]).expand(2, 3, 3)})

    assert_close(value, masked)


@pytest.mark.parametrize("action", ["Discrete", "MultiDiscrete", "MultiBinary"])
def test_a_mask_that_allows_everything_changes_nothing(action):
    net = network("vector", action)
    x = observed(OBSERVATIONS["vector"], 2, 3)
    free, _ = net(x)
    masked, _ = net({"obs": x, MASK_KEY: torch.ones(2, 3, mask_width(ACTIONS[action])).bool()})
    chosen = free.sample(seeded())

    assert_close(masked.log_prob(chosen), free.log_prob(chosen))
    assert_close(masked.entropy(), free.entropy())


def test_a_bit_can_be_forbidden_to_be_0_or_to_be_1():
    net = network("vector", "MultiBinary")
    allowed = torch.tensor([1, 0, 0, 1, 1, 1]).bool()  # by bit: may be 0, may be 1
    distribution, _ = net({"obs": torch.zeros(1, 50, 3), MASK_KEY: allowed.expand(1, 50, 6)})
    bits = distribution.sample(seeded())[0]

    assert bits[:, 0].eq(0).all() and bits[:, 1].eq(1).all()
    assert 0 < bits[:, 2].sum() < 50


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("Discrete", Categorical),
        ("MultiDiscrete", MultiCategorical),
        ("MultiBinary", Bernoulli),
        ("Box", DiagonalGaussian),
    ],
)
def test_every_action_space_has_its_distribution(action, kind):
    distribution, _ = network("vector", action)(torch.zeros(2, 3, 3))

    assert type(distribution) is kind


def test_a_policy_begins_almost_indifferent():
    # orthogonal rows of length 0.01 on features within tanh's [-1, 1]: logits within 0.01 * sqrt(8)
    distribution, _ = network("vector")(10 * torch.randn(4, 5, 3, generator=seeded()))

    assert (distribution.logp - math.log(1 / 3)).abs().max() < 2 * 0.01 * math.sqrt(8)


def test_orthogonal_weights_have_the_gains_they_say():
    net = network("vector")
    first, gain = net.actor.mlp[0].weight, net.head.logits.weight

    assert_close(first.T @ first, 2 * torch.eye(3))  # 8 x 3: orthogonal columns of length sqrt(2)
    assert_close(gain @ gain.T, 1e-4 * torch.eye(3))
    assert_close(net.value.weight.norm(), torch.tensor(1.0))


def test_without_orthogonal_weights_they_are_torchs():
    net = network("vector", orthogonal=False)
    torch.manual_seed(0)

    assert_close(net.actor.mlp[0].weight, torch.nn.Linear(3, 8).weight)


def test_a_shared_trunk_learns_from_both_and_separate_nets_each_from_their_own():
    def trunk_gradient(part: int, **fields):
        net = network("vector", **fields)
        distribution, value = net(torch.ones(1, 1, 3))
        (distribution.logp[..., 0], value)[part].sum().backward()
        return net.actor.mlp[0].weight.grad

    assert trunk_gradient(1, shared=True).abs().sum() > 0
    assert trunk_gradient(0, shared=True).abs().sum() > 0
    assert trunk_gradient(1) is None


def test_the_deviation_of_a_box_begins_where_it_is_told():
    distribution, _ = network("vector", "Box", log_std=-0.5)(torch.zeros(1, 1, 3))

    assert_close(distribution.log_std, torch.full((1, 1, 2), -0.5))


def test_tanh_leaves_what_has_no_bounds_unsquashed():
    torch.manual_seed(0)
    low, high = np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)
    net = ActorCriticNetwork(OBSERVATIONS["vector"], spaces.Box(low, high), shape(squash="tanh"))
    distribution, _ = net(torch.zeros(1, 1, 3))
    action = torch.tensor([[[0.3, 0.7]]])

    # the first is squashed, its half width 1; the second is a normal as it is
    alone = SquashedGaussian(distribution.mean[..., :1], distribution.log_std[..., :1], half_width=torch.ones(1))
    plain = DiagonalGaussian(distribution.mean[..., 1:], distribution.log_std[..., 1:])
    assert_close(distribution.log_prob(action), alone.log_prob(action[..., :1]) + plain.log_prob(action[..., 1:]))
    assert_close(distribution.entropy(), alone.entropy() + plain.entropy())


def slow(memory: RecurrentLayer, x, state, start):
    """Column by column, the state zeroed by hand."""
    outs = []
    for t in range(x.shape[1]):
        state = torch.where(start[:, t, None], 0.0, state)
        hidden = state[None] if not memory.is_lstm else tuple(h.contiguous() for h in state[None].chunk(2, dim=2))
        out, after = memory.rnn(x[:, t : t + 1], hidden)
        state = torch.cat(after, dim=2)[0] if memory.is_lstm else after[0]
        outs.append(out)
    return torch.cat(outs, dim=1), state


def starts(*rows: str) -> torch.Tensor:
    return torch.tensor([[mark == "s" for mark in marks] for marks in rows])


STARTS = {
    "none": starts("....", "...."),
    "at column 0": starts("s...", "s..."),
    "inside one row": starts("..s.", "...."),
    "at the last column": starts("...s", "...."),
    "everywhere": starts("ssss", ".s.s"),
    "one column": starts("s", "."),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_memory_is_a_loop_whose_state_is_zeroed_at_starts(kind, start):
    torch.manual_seed(0)
    memory = RecurrentLayer(3, 4, kind).double()
    x = torch.randn(*start.shape, 3, dtype=torch.float64)
    state = torch.randn(len(start), memory.state_size, dtype=torch.float64)

    (out, after), (slow_out, slow_after) = memory(x, state, start), slow(memory, x, state, start)
    assert_close(out, slow_out)
    assert_close(after, slow_after)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_loop_for_random_starts(kind):
    torch.manual_seed(1)
    memory = RecurrentLayer(2, 3, kind).double()
    for _ in range(20):
        start = torch.rand(5, 9) < 0.3
        x, state = torch.randn(5, 9, 2).double(), torch.randn(5, memory.state_size).double()
        torch.testing.assert_close(memory(x, state, start), slow(memory, x, state, start))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_learns_across_a_start(kind):
    memory = RecurrentLayer(2, 3, kind)
    x = torch.randn(1, 4, 2, generator=seeded(), requires_grad=True)
    out, _ = memory(x, torch.zeros(1, memory.state_size), starts("..s."))
    out[:, 2:].sum().backward()

    assert x.grad is not None
    assert x.grad[:, :2].abs().max() == 0 and x.grad[:, 2:].abs().min() > 0


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_acting_step_by_step_says_what_one_pass_over_the_row_says(kind, shared):
    net = network("Dict", rnn_type=kind, shared=shared)
    obs = observed(OBSERVATIONS["Dict"], 2, 5)
    start, state = starts("..s..", "s...s"), torch.randn(2, net.state_size, generator=seeded())
    row, value, after = net(obs, state, start)

    for t in range(5):
        step = map_tensors(lambda x, t=t: x[:, t : t + 1], obs)
        now, v, state = net(step, state, start[:, t : t + 1])
        assert_close(now.logp[:, 0], row.logp[:, t])
        assert_close(v[:, 0], value[:, t])
    assert_close(state, after)


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_the_space_of_an_environment_is_that_of_its_network(observation):
    env = Anything(observation, "Discrete", length=3, masked=True)
    net = ActorCriticNetwork(env.observation_space, env.action_space, shape())
    distribution, value = net(observed(env.observation_space, 2, 3))

    assert distribution.logp.shape == (2, 3, 3) and value.shape == (2, 3)
