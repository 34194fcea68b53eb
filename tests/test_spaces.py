"""Spaces as tensors and as JSON: what a policy sees of them, what an environment receives, what is refused."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.testing import assert_close

from tests.probes import ACTIONS, OBSERVATIONS
from understudy.control.envs.spaces import (
    MASK_KEY,
    add_batch_dim,
    check_action_space,
    check_observation_space,
    feature_spaces,
    half_width,
    is_batched,
    is_image,
    leaf_spaces,
    lost_in,
    mask_width,
    read_obs,
    space_from_json,
    space_to_json,
    to_env_action,
)

INF = np.inf


def box(low, high, dtype=np.float32) -> spaces.Box:
    return spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


EVERY_SPACE = {
    **OBSERVATIONS,
    **ACTIONS,
    "unbounded": spaces.Box(-INF, INF, (2, 2)),
    "half-infinite": box([-INF, 0, -1], [1, INF, 2]),
    "float64": box([0.1], [1e300], np.float64),
    "whole numbers": spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
    "a scalar": box(-1, 2),
    "Discrete of uint8": spaces.Discrete(4, start=2, dtype=np.uint8),
    "MultiDiscrete with a start": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, -1], [2, 7]], dtype=np.int32),
    "one bit": spaces.MultiBinary(1),
    "bits in a square": spaces.MultiBinary((2, 2)),
}


@pytest.mark.parametrize("name", EVERY_SPACE)
def test_a_space_comes_back_from_json_as_it_was(name):
    space = EVERY_SPACE[name]

    assert space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False))) == space


def test_bounds_come_back_exactly():
    space = box([1 / 3, -INF, 1e-45], [2 / 3, INF, 3.4e38])  # equal spaces are only close to each other

    back = space_from_json(json.loads(json.dumps(space_to_json(space))))

    assert isinstance(back, spaces.Box)
    np.testing.assert_array_equal(back.low, space.low)
    np.testing.assert_array_equal(back.high, space.high)


def test_a_dict_keeps_its_order_which_is_that_of_the_weights():
    space = spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Discrete(3))])

    assert list(feature_spaces(space_from_json(json.loads(json.dumps(space_to_json(space)))))) == ["z", "a"]


def test_a_key_that_is_no_string_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="observation_space has the key 0, which is no string: name it '0'"):
        check_observation_space(spaces.Dict({0: spaces.Discrete(2)}))  # pyright: ignore


def test_two_entries_of_one_name_are_refused():
    space = spaces.Dict({"a.b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})})

    with pytest.raises(ValueError, match=r"has two entries that are called 'a\.b': rename one of them"):
        check_observation_space(space)


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (0,)), spaces.Dict({}), spaces.Tuple([]), spaces.Dict({"a": spaces.Box(0, 1, (2, 0))})]
)
def test_an_observation_without_a_number_is_refused(space):
    with pytest.raises(ValueError, match="in which a policy sees no number: add an entry"):
        check_observation_space(space)


@pytest.mark.parametrize("key", ["obs", "a.b", "", "action mask", "."])
def test_an_entry_may_have_any_name(key):
    tree = read_obs(spaces.Dict({key: spaces.Discrete(2)}), {key: np.array([1])})

    assert isinstance(tree, dict) and [x.tolist() for x in tree.values()] == [[1]]


@pytest.mark.parametrize(
    "inner", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), spaces.Graph(spaces.Discrete(2), None)]
)
def test_what_is_no_tensor_is_refused_with_its_place(inner):
    with pytest.raises(ValueError, match=rf"has {type(inner).__name__} at 'a.1', which is not supported: use Box"):
        list(leaf_spaces(spaces.Dict({"a": spaces.Tuple([spaces.Discrete(2), inner])})))


@pytest.mark.parametrize("space", [spaces.Text(5), spaces.Dict({"a": spaces.Discrete(2)}), spaces.Tuple([])])
def test_an_action_space_of_another_kind_is_refused(space):
    with pytest.raises(
        ValueError, match=f"action_space is {type(space).__name__}, which is not supported: use Discrete"
    ):
        check_action_space(space)


def test_a_box_of_whole_numbers_is_refused_as_an_action_space():
    with pytest.raises(ValueError, match="a Box of int32, which is not supported: rounding would break the log-probs"):
        check_action_space(spaces.Box(0, 5, (2,), np.int32))


def test_nested_observations_are_read_leaf_by_leaf():
    space = OBSERVATIONS["Dict"]
    obs = {
        "arm": {"joints": np.ones((2, 2, 2), np.float32), "grip": np.array([1, 3])},
        "camera": np.full((2, 8, 8), 7, np.uint8),
        "lamps": np.array([[0, 1], [1, 1]], np.int8),
    }

    tree = read_obs(space, obs)

    assert isinstance(tree, dict)
    assert {name: (tuple(x.shape), x.dtype) for name, x in tree.items()} == {
        "arm.grip": ((2,), torch.int64),
        "arm.joints": ((2, 2, 2), torch.float32),
        "camera": ((2, 8, 8), torch.uint8),
        "lamps": ((2, 2), torch.float32),
    }
    assert tree["arm.grip"].tolist() == [0, 2]  # its space starts at 1


def test_a_tuple_is_read_by_number():
    tree = read_obs(
        spaces.Tuple([spaces.Discrete(2), spaces.Tuple([spaces.Discrete(3)])]), (np.array([1]), (np.array([2]),))
    )

    assert isinstance(tree, dict)
    assert {name: x.tolist() for name, x in tree.items()} == {"0": [1], "1.0": [2]}


def test_what_was_read_does_not_change_with_the_environments_own_array():
    own = np.zeros((1, 3), np.float32)
    tree = read_obs(OBSERVATIONS["vector"], own)
    own += 1

    assert_close(tree, torch.zeros(1, 3))


def test_a_mask_from_info_joins_the_observation():
    tree = read_obs(OBSERVATIONS["vector"], np.zeros((1, 3)), np.array([[1, 0]]))

    assert isinstance(tree, dict)
    assert tree[MASK_KEY].tolist() == [[True, False]]


def test_a_mask_in_the_observation_is_flat_and_no_feature():
    space = spaces.Dict({"x": spaces.Discrete(2), MASK_KEY: spaces.MultiBinary((2, 2))})
    tree = read_obs(space, {"x": np.array([0]), MASK_KEY: np.array([[[1, 0], [0, 1]]], np.int8)})

    assert isinstance(tree, dict)
    assert tree[MASK_KEY].tolist() == [[True, False, False, True]]
    assert list(feature_spaces(space)) == ["x"]


@pytest.mark.parametrize(("name", "width"), [("Discrete", 3), ("MultiDiscrete", 9), ("MultiBinary", 6), ("Box", 0)])
def test_a_mask_is_as_wide_as_there_are_ways_to_go(name, width):
    assert mask_width(ACTIONS[name]) == width


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_a_batch_is_told_from_a_single_observation(name):
    space = OBSERVATIONS[name]
    obs = space.sample()

    assert not is_batched(space, obs)
    assert is_batched(space, add_batch_dim(space, obs))


@pytest.mark.parametrize(
    ("space", "image"),
    [
        (spaces.Box(0, 255, (8, 9), np.uint8), True),
        (spaces.Box(0, 255, (8, 9, 3), np.uint8), True),
        (spaces.Box(0, 255, (3, 8, 9), np.uint8), True),
        (spaces.Box(0, 255, (4, 8, 9, 3), np.uint8), True),
        (spaces.Box(0, 255, (128,), np.uint8), False),
        (spaces.Box(0, 255, (8, 9), np.float32), False),
        (spaces.Box(0, 255, (7, 7, 3), np.uint8), False),  # MiniGrid's categories
        (spaces.Box(0, 2, (8, 9), np.uint8), False),
        (spaces.Box(0, 254, (8, 9), np.uint8), False),
        (spaces.Box(1, 255, (8, 9), np.uint8), False),
    ],
    ids=str,
)
def test_an_image_has_the_bounds_and_the_size_of_one(space, image):
    assert is_image(space) is image


def test_a_board_of_bytes_is_read_as_its_numbers():
    tree = read_obs(spaces.Box(0, 2, (6, 7), np.uint8), np.full((1, 6, 7), 2, np.uint8))

    assert_close(tree, torch.full((1, 6, 7), 2.0))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.uint32])
def test_numbers_that_float32_cannot_hold_are_read_exactly_where_asked(dtype):
    space = spaces.Box(0, 2**31 - 1, (1,), dtype)
    seen = np.array([[1_700_000_001]], dtype)

    assert read_obs(space, seen, keep_float64=True).tolist() == [[1_700_000_001]]  # pyright: ignore
    assert read_obs(space, seen).tolist() == [[1_700_000_000]]  # pyright: ignore  # a multiple of 128


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.uint8])
def test_numbers_that_float32_holds_are_read_as_float32(dtype):
    space = spaces.Box(0, 100, (1,), dtype)

    assert read_obs(space, np.ones((1, 1), dtype), keep_float64=True).dtype == torch.float32  # pyright: ignore


def test_what_float32_loses_is_named_with_a_value():
    space = spaces.Dict(
        {"clock": spaces.Box(-INF, INF, (2,), np.float64), "x": spaces.Box(-INF, INF, (1,), np.float64)}
    )
    seen = [
        {"clock": np.array([0.5, 1.7e9 + second]), "x": np.array([1e9 * second])} for second in (0.0, 1.0, 2.0, 3.0)
    ]

    assert lost_in(np.float32, space, seen) == "'clock' (such as 1700000000.0)"
    assert lost_in(np.float32, space, [{"clock": np.zeros(2), "x": seen["x"]} for seen in seen]) == ""


@pytest.mark.parametrize(("first", "lost"), [(0, []), (2**24, ["32"]), (2**53, ["32", "64"]), (2**62, ["32", "64"])])
def test_whole_numbers_that_no_float_holds_are_named(first, lost):
    space, seen = spaces.Box(0, 2**63 - 1, (1,), np.int64), [np.array([first + i]) for i in (1, 0, 1, 0)]
    found = {"32": lost_in(np.float32, space, seen), "64": lost_in(np.float64, space, seen)}

    assert found == {bits: f"'obs' (such as {first + 1})" if bits in lost else "" for bits in found}


@pytest.mark.parametrize("squash", ["clip", "tanh"])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-2.0, 3.0, (2, 2)),
        box([-INF, 0.0, -1.0, -INF], [1.0, INF, 2.0, INF]),
        box([0.1, 0.3], [0.1, 1 / 3]),
        spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)),
        box([0.1], [0.7], np.float64),
        spaces.Box(-1.0, 1.0, (2,), np.float16),  # pyright: ignore
    ],
    ids=str,
)
def test_every_number_becomes_an_action_in_the_space(space, squash):
    width = int(np.prod(space.shape))
    far = torch.tensor([-1e30, -50.0, -1.0, -1e-8, 0.0, 0.3, 8.0, 9.5, 1e4])[:, None].expand(-1, width)

    for action in to_env_action(space, far.numpy(), squash):
        assert space.contains(action)


def test_clip_hands_on_what_is_within_the_bounds():
    assert_close(
        to_env_action(box([-1, -1], [1, 1]), np.float32([[0.25, -3.0]]), "clip"), np.array([[0.25, -1]], np.float32)
    )


def test_tanh_is_scaled_to_the_bounds():
    # 1 + (tanh(0) + 1) / 2 * (5 - 1) = 3; tanh(log 3 / 2) = 1/2, so 1 + 3/4 * 4 = 4
    action = to_env_action(spaces.Box(1.0, 5.0, (2,)), np.float32([[0.0, np.log(3) / 2]]), "tanh")

    assert_close(action, np.array([[3.0, 4.0]], np.float32))


def test_tanh_clips_where_a_bound_is_infinite():
    action = to_env_action(box([0, -INF], [INF, 1]), np.float32([[-2.0, 0.5], [7.0, 3.0]]), "tanh")

    assert_close(action, np.array([[0, 0.5], [7, 1]], np.float32))


def test_half_the_width_is_0_where_a_bound_is_infinite():
    assert_close(half_width(box([-1, 0, -INF], [3, INF, INF])), torch.tensor([2.0, 0.0, 0.0]))


def test_discrete_actions_begin_where_their_space_does():
    many = spaces.MultiDiscrete([[2, 3]], start=[[5, -1]])

    assert to_env_action(spaces.Discrete(3, start=-1), np.array([0, 2]), "clip").tolist() == [-1, 1]
    assert to_env_action(many, np.array([[1, 2]]), "clip").tolist() == [[[6, 1]]]


@pytest.mark.parametrize("name", ["Discrete", "MultiDiscrete", "MultiBinary"])
def test_an_executable_action_has_the_dtype_of_its_space(name):
    space: gymnasium.Space = ACTIONS[name]
    width = () if name == "Discrete" else (int(np.prod(space.shape)),)  # pyright: ignore
    action = to_env_action(space, np.ones((1, *width), dtype=np.int64), "clip")[0]

    assert action.dtype == space.dtype and space.contains(action)
