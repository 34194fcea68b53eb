"""Environments for the tests: random ones of any spaces, and probes whose values and best returns are known."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from understudy.control.envs.spaces import MASK_KEY, mask_width

OBSERVATIONS = {
    "vector": spaces.Box(-2.0, 2.0, (3,)),
    "image": spaces.Box(0, 255, (8, 9, 3), np.uint8),
    "Dict": spaces.Dict(
        {
            "arm": spaces.Dict({"joints": spaces.Box(-1.0, 1.0, (2, 2)), "grip": spaces.Discrete(3, start=1)}),
            "camera": spaces.Box(0, 255, (8, 8), np.uint8),
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
            self.observation_space = spaces.Dict(own | {MASK_KEY: spaces.MultiBinary(width)})

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
            return obs | {MASK_KEY: self.allowed}, {}
        return obs, {MASK_KEY: self.allowed}


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


class Task(gymnasium.Env):
    """One choice an episode, or one after `delay` steps that pay nothing: do what the first observation said.

    The first observation is a hidden target's picture, `show`n as a vector, as an image, or as nothing at all, which is
    the negative control. Pays 1 for every part of the action that is right and -1 for every other; a Box pays
    1 - 4 * distance^2. By chance, or blindly, that is 0 on average for what is discrete, and 2/3 less for a Box.

    Args:
        bonus: paid in addition, times a number in [-1, 1] that depends on the episode's seed alone.
    """

    def __init__(self, action: str = "Discrete", *, show: str = "vector", delay: int = 0, bonus: float = 0.0):
        self.show, self.delay, self.bonus = show, delay, bonus
        self.action_space: gymnasium.Space = {
            "Discrete": spaces.Discrete(2),
            "MultiDiscrete": spaces.MultiDiscrete([2, 2]),
            "MultiBinary": spaces.MultiBinary(2),
            "Box": spaces.Box(-1.0, 1.0, (1,)),
        }[action]
        self.parts = 2 if action.startswith("Multi") else 1
        # the target, and whether it is time to choose
        plain = spaces.Box(-1.0, 1.0, (self.parts + 1,))
        self.observation_space = spaces.Box(0, 255, (8, 8), np.uint8) if show == "image" else plain

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.target, self.now = self.np_random.integers(2, size=self.parts), 0
        self.extra = self.bonus * self.np_random.uniform(-1, 1)
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        if self.now < self.delay:
            self.now += 1
            return self._obs(), 0.0, False, False, {}
        if isinstance(self.action_space, spaces.Box):
            assert self.action_space.contains(action)
            paid = 1 - 4 * float((action[0] - (self.target[0] - 0.5)) ** 2)
        else:
            paid = float(np.mean(np.where(np.reshape(action, -1) == self.target, 1.0, -1.0)))
        return self._obs(), paid + self.extra, True, False, {}

    def _obs(self) -> np.ndarray:
        seen = 2.0 * self.target - 1 if self.now == 0 and self.show != "nothing" else 0.0 * self.target
        if self.show != "image":
            return np.append(seen, float(self.now == self.delay)).astype(np.float32)
        picture = np.zeros((8, 8), np.uint8)  # one bright pixel, anywhere in the left half or the right one
        row, column = self.np_random.integers(8), self.np_random.integers(4)
        picture[row, column + 4 * self.target[0]] = 255
        return picture


class Chain(gymnasium.Env):
    """`length` steps that say where one is, one-hot; `pay(step, first action, action)` is what they pay.

    One is at 0, then at 1, or at 2 after a first action of 1, and one further each step. To the `blind` it is always 0.
    """

    action_space = spaces.Discrete(2)

    def __init__(self, pay: Any, *, length: int, truncate: bool = False, blind: bool = False):
        self.pay, self.length, self.truncate, self.blind = pay, length, truncate, blind
        self.observation_space = spaces.Box(0.0, 1.0, (length + 2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.now, self.first = 0, 0
        return self._obs(), {}

    def step(self, action: int) -> Any:
        self.first = action if self.now == 0 else self.first
        paid = float(self.pay(self.now, self.first, action))
        self.now += 1
        over = self.now == self.length
        return self._obs(), paid, over and not self.truncate, over and self.truncate, {}

    def _obs(self) -> np.ndarray:
        obs = np.zeros(self.length + 2, np.float32)
        obs[0 if self.blind else self.now + self.first] = 1
        return obs


class Tempting(gymnasium.Env):
    """Three actions; the third pays most, and is never allowed. Says what was taken."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Discrete(3)

    def __init__(self, *, masked: bool):
        self.info = {MASK_KEY: np.array([1, 1, 0], np.int8)} if masked else {}
        self.taken: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.now = 0
        return np.zeros(1, np.float32), self.info

    def step(self, action: int) -> Any:
        self.taken.append(int(action))
        self.now += 1
        return np.zeros(1, np.float32), float(action), self.now == 3, False, self.info
