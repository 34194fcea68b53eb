"""Environments of the tests of faults."""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np


class SaysItself(gymnasium.Env):
    """A walk whose drift goes on from episode to episode, and which can say and be told where it stands."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self.drift, self.place, self.steps = 0.0, 0.0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.normal()), 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.drift += 0.01
        self.steps += 1
        self.place += float(self.np_random.normal()) * 0.1 + self.drift + (0.1 if action else -0.1)
        return self._obs(), -abs(self.place), False, self.steps >= 21, {}

    def get_state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "drift": self.drift,
            "place": self.place,
            "steps": self.steps,
            "generator": self.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Stand where `get_state` was asked."""
        self.drift, self.place, self.steps = state["drift"], state["place"], state["steps"]
        self.np_random.bit_generator.state = state["generator"]

    def _obs(self) -> np.ndarray:
        return np.array([self.place, self.drift], dtype=np.float32)


class Slow(SaysItself):
    """A step takes a fiftieth of a second."""

    def step(self, action: Any) -> Any:
        time.sleep(0.02)
        return super().step(action)


class Remembers(SaysItself):
    """It does not say where it stands."""

    get_state = set_state = None


class Draws(Remembers):
    """Its constructor draws from NumPy's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.drift = float(np.random.normal())


class Unseeded(SaysItself):
    """Its noise comes from a generator that no seed reaches. It does not say where it stands."""

    get_state = set_state = None
    noise = np.random.default_rng()

    def _obs(self) -> np.ndarray:
        return super()._obs() + self.noise.normal(size=2).astype(np.float32)


class CountsForAll(gymnasium.Env):
    """Episodes of five steps whose last pays more, the more of them there were in this process after the first eight."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        CountsForAll.episodes += 1
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        more = max(0, self.episodes - 8) if self.steps == 5 else 0
        return np.zeros(2, np.float32), float(more + action), self.steps == 5, False, {}


class CountsNothing(CountsForAll):
    """The same without that."""

    def step(self, action: Any) -> Any:
        obs, _, *ends = super().step(action)
        return obs, float(action), *ends
