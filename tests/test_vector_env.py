"""Our vector env of one process is Gymnasium's."""

import copy
from collections import UserDict

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from understudy.control.envs.make import make
from understudy.control.fast.vector_env import FastDiscrete, FastMultiDiscrete, FastSyncVectorEnv, use_fast_action_space

SPACES = {
    "box": spaces.Box(-1, 1, (2, 3)),
    "discrete": spaces.Discrete(5, start=2),
    "dict": spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.MultiBinary(3)}),
    "tuple": spaces.Tuple((spaces.Box(0, 255, (4,), np.uint8), spaces.Discrete(3))),
}
ACTIONS = {"one": spaces.Discrete(3), "several": spaces.MultiDiscrete([2, 3]), "floats": spaces.Box(-1, 1, (2,))}


class Drawn(gymnasium.Env):
    """Everything is drawn; `info` says something now and then, and what was done."""

    def __init__(self, observation: spaces.Space, action: spaces.Space) -> None:
        self.observation_space, self.action_space = copy.deepcopy((observation, action))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        draw = self.np_random.random(4)
        info = {"did": np.array(action), "drawn": draw[0]} if draw[0] < 0.5 else {}
        return self.observation_space.sample(), float(draw[1]), bool(draw[2] < 0.1), bool(draw[3] < 0.1), info


@pytest.mark.parametrize("observation", SPACES)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_step_is_that_of_gymnasium_to_the_bit(observation, action):
    def both(kind):
        makers = [lambda: Drawn(SPACES[observation], ACTIONS[action])] * 3
        return kind(makers, autoreset_mode=AutoresetMode.DISABLED)

    ours, theirs = both(FastSyncVectorEnv), both(SyncVectorEnv)
    assert_same(ours.reset(seed=[1, 2, 3]), theirs.reset(seed=[1, 2, 3]))
    theirs.action_space.seed(0)
    for _ in range(40):
        actions = theirs.action_space.sample()
        mine, other = ours.step(actions), theirs.step(actions)
        assert_same(mine, other)
        if (over := other[2] | other[3]).any():
            seeds = [4, 5, 6]
            again = [x.reset(seed=seeds, options={"reset_mask": over.copy()}) for x in (ours, theirs)]
            assert_same(*again)


ODD = {
    "wider numbers": (np.float64([0.1, 0.2]), 1, False, False, {}),
    "whole numbers": (np.arange(2), np.int64(3), np.bool_(True), np.bool_(False), {}),
    "a list": ([0.5, 0.25], np.float32(0.1), 1, 0, {}),
    "numbers for ends": (np.zeros(2, np.float32), True, 1.5, 0.0, {}),
    "no reward": (np.zeros(2, np.float32), None, False, False, {}),
    "an info of its own kind": (np.zeros(2, np.float32), 1.0, False, False, UserDict(a=1)),
    "a complex observation": (np.array([1j, 0]), 1.0, False, False, {}),
    "a complex reward": (np.zeros(2, np.float32), 1j, False, False, {}),
    "a reward of two": (np.zeros(2, np.float32), np.ones(2), False, False, {}),
    "an end of two": (np.zeros(2, np.float32), 1.0, np.array([True, False]), False, {}),
    "objects": (np.array([None, 0.0]), 1.0, False, False, {}),
    "text": ("nothing", 1.0, False, False, {}),
    "no observation": (None, 1.0, False, False, {}),
    "another shape": (np.zeros(3, np.float32), 1.0, False, False, {}),
    "a row too many": (np.zeros((1, 2), np.float32), 1.0, False, False, {}),
    "a list for an info": (np.zeros(2, np.float32), 1.0, False, False, []),
    "no info": (np.zeros(2, np.float32), 1.0, False, False, None),
    "four things": (np.zeros(2, np.float32), 1.0, False, {}),
}


@pytest.mark.parametrize("given", ODD)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_an_environment_should_not_give_is_taken_or_refused_as_gymnasium_does(given, rows):
    def of(kind):
        envs = kind([lambda: Saying(ODD[given])] * rows, autoreset_mode=AutoresetMode.DISABLED)
        envs.reset()
        try:
            return envs.step(np.zeros(rows, np.int64))
        except Exception as wrong:
            return isinstance(wrong, TypeError | ValueError | AttributeError)

    assert_same(of(FastSyncVectorEnv), of(SyncVectorEnv))


class Saying(gymnasium.Env):
    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def __init__(self, said) -> None:
        self.said = said

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return self.said


def test_rows_are_what_sync_makes():
    envs = make("CartPole-v1", num_envs=2)

    assert type(envs) is FastSyncVectorEnv
    assert type(envs.single_action_space) is FastDiscrete  # within what Gymnasium wraps it in
    envs.close()


ASKED = [
    np.array([0, 3]), np.array([1, 6]), np.array([1, 3]), np.array([-1, 6]), np.array([2, 4]), np.array([0, 7]),
    np.array([0, 3], np.int8), np.array([1, 3], np.int8), np.array([1, 3], np.uint64), np.array([1.0, 3.0]),
    np.array([[1, 3]]), np.array([1]), np.array([], np.int64), np.array(["1", "3"]), np.array([1, None]),
    [1, 3], [2, 3], (1, 6), 1, "13", None, np.array([True, True]), np.array([1, -(2**63)]), np.array([1, 2**63 - 1]),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int64, np.int8])
@pytest.mark.parametrize("asked", ASKED, ids=repr)
def test_choices_hold_what_their_space_holds(asked, dtype):
    theirs = spaces.MultiDiscrete([3, 4], dtype=dtype, start=[-1, 3], seed=1)

    assert_same_space(FastMultiDiscrete(copy.deepcopy(theirs)), theirs, asked)


ASKED_ALONE = [
    *range(-3, 5), *map(np.int64, range(-3, 5)), *map(np.int32, (-2, 2)), *ASKED, np.array(1), np.array(7), True,
    np.bool_(1), 1.0, np.float64(1), 2**70, np.uint64(2**64 - 1), np.int64(2**63 - 1),
]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED_ALONE, ids=repr)
def test_a_choice_holds_what_its_space_holds(asked):
    theirs = spaces.Discrete(4, start=-2, seed=1)

    assert_same_space(FastDiscrete(copy.deepcopy(theirs)), theirs, asked)


def assert_same_space(ours, theirs, asked):
    def told(space):
        try:
            return space.contains(asked)
        except Exception as wrong:
            return type(wrong)

    assert told(ours) is told(theirs)
    assert ours == theirs and theirs == ours and repr(ours) == repr(theirs)
    assert_same(ours.sample(), theirs.sample())  # their own randomness goes on


class Asking(gymnasium.Env):
    """Says of each action whether it is in its space; what that space is, is a property's to say, or its own."""

    observation_space = spaces.Box(-1, 1, (1,))

    def __init__(self, kind) -> None:
        self.action_space = spaces.MultiDiscrete([2, 3]) if kind == "several" else spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(self.action_space.contains(action)), False, False, {}


@pytest.mark.parametrize(("kind", "made"), [("one", FastDiscrete), ("several", FastMultiDiscrete)])
def test_environments_are_answered_by_choices(kind, made):
    envs = make("tests.test_vector_env:Asking", num_envs=2, options={"kind": kind})
    envs.reset()

    assert type(envs.single_action_space) is made
    inside = np.zeros((2, 2) if kind == "several" else 2, np.int64)
    assert [envs.step(inside + 2 * k)[1].tolist() for k in range(2)] == [[1, 1], [0, 0]]


def test_a_space_that_is_no_attribute_stays():
    class Property(Asking):
        action_space = property(lambda self: spaces.Discrete(2), lambda self, space: None)

    use_fast_action_space(env := Property("one"))

    assert type(env.action_space) is spaces.Discrete


def test_a_native_vector_env_steps_as_gymnasium_made_it_and_refuses_what_it_refuses():
    ours = make("CartPole-v1", num_envs=3, vectorization="native")
    theirs = gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point")

    assert_same(ours.reset(seed=1), theirs.reset(seed=1))
    for action in np.random.default_rng(0).integers(0, 2, (60, 3)):
        assert_same(ours.step(action), theirs.step(action))
    assert type(ours.action_space) is FastMultiDiscrete
    for envs in (ours, theirs):
        with pytest.raises(AssertionError, match="invalid"):
            envs.step(np.array([0, 1, 2]))


def assert_same(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        mine, theirs = tuple(mine.values()), tuple(theirs.values())
    if isinstance(mine, tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
        return
    assert np.asarray(mine).dtype == np.asarray(theirs).dtype
    np.testing.assert_array_equal(mine, theirs)
