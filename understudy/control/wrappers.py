"""The wrappers that this library itself puts around single environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers.utils import RunningMeanStd

from understudy.control.infos import sendable


class SendableInfo(gymnasium.Wrapper):
    """Leaves out of info what cannot be sent to another process."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, sendable(info)

    def step(self, action: Any) -> Any:
        *answer, info = self.env.step(action)
        return *answer, sendable(info)


class Unseeded(gymnasium.Wrapper):
    """Resets an environment that takes no seed without one."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.env.reset(options=options) if options else self.env.reset()


class ClippedObservation(gymnasium.ObservationWrapper):
    """Clips what is seen to the bounds of its space."""

    def observation(self, observation: Any) -> Any:
        return clipped(self.observation_space, observation)


class RewardSum(gymnasium.Wrapper):
    """Stands below other wrappers and sums the environment's own reward until `take` asks for it."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.sum = 0.0

    def step(self, action: Any) -> Any:
        answer = self.env.step(action)
        self.sum += float(answer[1])
        return answer

    def take(self) -> float:
        """The sum since the last call."""
        taken, self.sum = self.sum, 0.0
        return taken


class Evaluated(gymnasium.Wrapper):
    """Gives the environment's own reward, whatever wrappers make of it, and truncates an episode after `max_steps`.

    Attributes:
        cut: the numbers of the episodes that were ended so.
    """

    def __init__(self, env: gymnasium.Env, own: RewardSum, max_steps: int) -> None:
        super().__init__(env)
        self.own, self.max_steps, self.num_steps, self.number = own, max_steps, 0, -1
        self.cut: set[int] = set()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        found = self.env.reset(seed=seed, options=options)
        self.num_steps, self.number = 0, self.number + 1
        self.own.take()  # steps that a wrapper took within the reset
        return found

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = self.env.step(action)
        self.num_steps += 1
        cut = self.num_steps >= self.max_steps and not (terminated or truncated)
        if cut:
            self.cut.add(self.number)
        return obs, self.own.take(), terminated, truncated or cut, info


def clipped(space: gymnasium.Space, observation: Any) -> Any:
    """An observation within the bounds of its space, the space's Boxes at any depth."""
    if isinstance(space, spaces.Dict):
        return {name: clipped(inner, observation[name]) for name, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(clipped(inner, part) for inner, part in zip(space.spaces, observation, strict=True))
    if isinstance(space, spaces.Box):
        return np.clip(np.asarray(observation), space.low, space.high).astype(space.dtype)
    return observation


def running_statistics(env: Any) -> str | None:
    """The name of a wrapper around an environment, or a vector env, that normalises by statistics it goes on updating."""
    while env is not None:
        held = any(isinstance(value, RunningMeanStd) for value in vars(env).values())
        if held and getattr(env, "update_running_mean", True):
            return type(env).__name__
        env = vars(env).get("env")
    return None
