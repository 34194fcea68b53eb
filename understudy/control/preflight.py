"""What must hold before the first step: the environment keeps to its own spaces."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from understudy.control.environment import check_spaces
from understudy.control.masks import mask_of, random_allowed
from understudy.control.spaces import lost_in_float32, outside
from understudy.run.config import RequestError

STEPS = 3


def check_env(name: str, env: gymnasium.Env, *, seed: int) -> str:
    """Reset and step a fresh environment a few times, inside its action masks, and close it.

    Returns:
        The entry of the observation of which float32 loses what is seen; empty where there is none.

    Raises:
        RequestError: a space no policy can use; an observation outside its space; a reward that is no finite number; an
            end that is no bool; an action mask of the wrong width, or one that allows nothing.
    """
    rng, seen = np.random.default_rng(seed), list[Any]()
    try:
        check_spaces(name, env.observation_space, env.action_space)
        obs, info = env.reset(seed=seed)
        _observation(name, "reset", env.observation_space, obs)
        env.action_space.seed(seed)
        for step in range(STEPS):
            seen.append(obs)
            allowed = _mask(name, env.action_space, obs, info)
            action = env.action_space.sample() if allowed is None else random_allowed(env.action_space, allowed, rng)
            obs, reward, terminated, truncated, info = env.step(action)
            _observation(name, f"step {step}", env.observation_space, obs)
            if np.asarray(reward).ndim != 0 or not np.isfinite(float(reward)):
                raise RequestError(f"env {name!r} pays reward {reward!r} at step {step}: must be one finite number")
            for what, flag in (("terminated", terminated), ("truncated", truncated)):
                if not isinstance(flag, bool | np.bool_):
                    raise RequestError(f"env {name!r} returns {what} {flag!r} at step {step}: must be a bool")
            if terminated or truncated:
                break
        return lost_in_float32(env.observation_space, [*seen, obs])
    except (RequestError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a user's environment raises, said in a sentence
        raise RequestError(
            f"env {name!r} raises {type(error).__name__} in its first steps: {error}; mend it"
        ) from error
    finally:
        env.close()


def _mask(name: str, space: gymnasium.Space, obs: Any, info: dict[str, Any]) -> np.ndarray | None:
    try:
        return mask_of(space, obs, info)
    except ValueError as error:
        raise RequestError(f"env {name!r} gives an action mask that does not fit: {error}") from error


def _observation(name: str, when: str, space: gymnasium.Space, obs: Any) -> None:
    problem = outside(space, obs, "observation")
    if problem:
        raise RequestError(
            f"env {name!r} breaks its own observation_space at {when}: {problem}; mend the space or the env"
        )
