"""Environments for the tests: random ones of any spaces, and probes whose values and best returns are known."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from understudy.control.spaces import MASK, mask_width

OBSERVATIONS = {
    "vector": spaces.Box(-2.0, 2.0, (3,)),
    "image": spaces.Box(0, 255, (5, 6, 3), np.uint8),
    "Dict": spaces.Dict(
        {
            "arm": spaces.Dict({"joints": spaces.Box(-1.0, 1.0, (2, 2)), "grip": spaces.Discrete(3, start=1)}),
            "camera": spaces.Box(0, 255, (4, 4), np.uint8),
            "lamps": spaces.MultiBinary(2),
        }
    ),
    "Tuple": spaces.Tuple(
        [spaces.Box(-1.0, 1.0, (2,)), spaces.MultiDiscrete([2, 3]), spaces.Tuple([spaces.Discrete(2)])]
    ),
}
ACTIONS = {
    "Discrete": spaces.Discrete(3, start=-1),
    "MultiDiscrete": spaces.MultiDiscrete([[2, 3], [2, 2]]),
    "MultiBinary": spaces.MultiBinary((1, 3)),
    "Box": spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32)),
}
MODES = {mode.name: mode for mode in (AutoresetMode.DISABLED, AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)}


class Anything(gymnasium.Env):
    """Random observations and rewards; refuses a masked action, and one outside its space.

    Episodes are `length` steps, terminated and truncated in turn. With `masked` there is a random action mask: in the
    observation where that is a Dict, in `info` otherwise. At a last observation the mask allows nothing.
    """

    def __init__(self, observation: str, action: str, *, length: int, masked: bool = False):
        self.action_space = ACTIONS[action]
        self.observation_space = OBSERVATIONS[observation]
        self.masked, self.length, self.episode = masked, length, 0
        self.allowed: np.ndarray | None = None
        if masked and observation == "Dict":
            width = mask_width(self.action_space)
            own = OBSERVATIONS[observation].spaces
            self.observation_space = spaces.Dict(own | {MASK: spaces.MultiBinary(width)})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.step_number, self.episode = 0, self.episode + 1
        return self._seen()

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        assert self.allowed is None or is_allowed(self.action_space, action, self.allowed), "a masked action"
        self.step_number += 1
        over = self.step_number == self.length
        obs, info = self._seen(last=over)
        return obs, float(self.np_random.normal()), over and self.episode % 2 == 0, over and self.episode % 2 == 1, info

    def _seen(self, *, last: bool = False) -> tuple[Any, dict[str, Any]]:
        obs = self.observation_space.sample()
        if not self.masked:
            return obs, {}
        self.allowed = np.zeros(mask_width(self.action_space), np.int8) if last else random_mask(self)
        if isinstance(self.observation_space, spaces.Dict):
            return obs | {MASK: self.allowed}, {}
        return obs, {MASK: self.allowed}


def sizes(space: gymnasium.Space) -> list[int]:
    """How many ways each part of a discrete action can go."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    return space.nvec.reshape(-1).tolist() if isinstance(space, spaces.MultiDiscrete) else [2] * space.sample().size


def random_mask(env: gymnasium.Env) -> np.ndarray:
    """Each part allows one random way to go, and every other with probability 1/2."""
    parts = []
    for size in sizes(env.action_space):
        part = env.np_random.random(size) < 0.5
        part[env.np_random.integers(size)] = True
        parts.append(part)
    return np.concatenate(parts).astype(np.int8)


def is_allowed(space: gymnasium.Space, action: Any, allowed: np.ndarray) -> bool:
    """Whether a mask allows every part of an action."""
    starts = np.cumsum([0, *sizes(space)[:-1]])
    return bool(allowed[starts + np.reshape(action - getattr(space, "start", 0), -1)].all())


def vector(makers: Any, mode: AutoresetMode = AutoresetMode.DISABLED) -> SyncVectorEnv:
    return SyncVectorEnv(makers, autoreset_mode=mode)


def anything(observation: str, action: str, *, masked: bool = False, mode: str = "DISABLED") -> SyncVectorEnv:
    """Two rows: one whose episodes end inside a row of 6 and at its last column, one whose row ends in mid-episode."""
    return vector(
        [lambda n=n: Anything(observation, action, length=n, masked=masked) for n in (3, 4)],
        MODES[mode],
    )
