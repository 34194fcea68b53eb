"""Our vector env of one process is Gymnasium's."""

import copy

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from understudy.control.environment import make
from understudy.control.rows import Rows

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

    ours, theirs = both(Rows), both(SyncVectorEnv)
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


def test_rows_are_what_sync_makes():
    envs = make("CartPole-v1", num_envs=2)

    assert type(envs) is Rows
    envs.close()


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
    assert np.array_equal(mine, theirs)
