"""The wrappers that this library itself puts around single environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers.utils import RunningMeanStd

from understudy.control.envs.infos import drop_unpicklable


class PicklableInfo(gymnasium.Wrapper):
    """Leaves out of info what cannot be sent to another process."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, drop_unpicklable(info)

    def step(self, action: Any) -> Any:
        *result, info = self.env.step(action)
        return *result, drop_unpicklable(info)


class UnseededReset(gymnasium.Wrapper):
    """Resets an environment that takes no seed without one."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.env.reset(options=options) if options else self.env.reset()


class ClippedObservation(gymnasium.ObservationWrapper):
    """Clips what is seen to the bounds of its space."""

    def observation(self, observation: Any) -> Any:
        return clip_observation(self.observation_space, observation)


class RewardAccumulator(gymnasium.Wrapper):
    """Stands below other wrappers and sums the environment's own reward until `pop_total` asks for it."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.total = 0.0

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.total += float(result[1])
        return result

    def pop_total(self) -> float:
        """The sum since the last call."""
        total, self.total = self.total, 0.0
        return total


class EvaluationWrapper(gymnasium.Wrapper):
    """Gives the environment's own reward, whatever wrappers make of it, and truncates an episode after `max_steps`.

    Attributes:
        truncated_episodes: the numbers of the episodes that were ended so.
    """

    def __init__(self, env: gymnasium.Env, accumulator: RewardAccumulator, max_steps: int) -> None:
        super().__init__(env)
        self.accumulator, self.max_steps, self.num_steps, self.episode_number = accumulator, max_steps, 0, -1
        self.truncated_episodes: set[int] = set()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(seed=seed, options=options)
        self.num_steps, self.episode_number = 0, self.episode_number + 1
        self.accumulator.pop_total()  # steps that a wrapper took within the reset
        return result

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = self.env.step(action)
        self.num_steps += 1
        is_cut = self.num_steps >= self.max_steps and not (terminated or truncated)
        if is_cut:
            self.truncated_episodes.add(self.episode_number)
        return obs, self.accumulator.pop_total(), terminated, truncated or is_cut, info


def clip_observation(space: gymnasium.Space, observation: Any) -> Any:
    """An observation within the bounds of its space, the space's Boxes at any depth."""
    if isinstance(space, spaces.Dict):
        return {name: clip_observation(inner, observation[name]) for name, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(clip_observation(inner, part) for inner, part in zip(space.spaces, observation, strict=True))
    if isinstance(space, spaces.Box):
        return np.clip(np.asarray(observation), space.low, space.high).astype(space.dtype)
    return observation


def find_running_statistics(env: Any) -> str | None:
    """The name of a wrapper around an environment, or a vector env, that normalises by statistics it goes on updating."""
    while env is not None:
        has_statistics = any(isinstance(value, RunningMeanStd) for value in vars(env).values())
        if has_statistics and getattr(env, "update_running_mean", True):
            return type(env).__name__
        env = vars(env).get("env")
    return None
