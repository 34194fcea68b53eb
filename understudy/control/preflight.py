"""What must hold before the first step: the environment keeps to its own spaces."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from understudy.control.environment import check_spaces
from understudy.control.spaces import outside
from understudy.run.config import RequestError

STEPS = 3


def check_env(name: str, env: gymnasium.Env, *, seed: int) -> None:
    """Reset and step a fresh environment a few times, and close it.

    Raises:
        RequestError: a space no policy can use; an observation outside its space; a reward that is no finite number; an
            end that is no bool.
    """
    try:
        check_spaces(name, env.observation_space, env.action_space)
        obs, info = env.reset(seed=seed)
        _observation(name, "reset", env.observation_space, obs)
        env.action_space.seed(seed)
        for step in range(STEPS):
            action = env.action_space.sample(mask=_mask(env.action_space, info))
            obs, reward, terminated, truncated, info = env.step(action)
            _observation(name, f"step {step}", env.observation_space, obs)
            if np.asarray(reward).ndim != 0 or not np.isfinite(float(reward)):
                raise RequestError(f"env {name!r} pays reward {reward!r} at step {step}: must be one finite number")
            for what, flag in (("terminated", terminated), ("truncated", truncated)):
                if not isinstance(flag, bool | np.bool_):
                    raise RequestError(f"env {name!r} returns {what} {flag!r} at step {step}: must be a bool")
            if terminated or truncated:
                break
    except (RequestError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a user's environment raises, said in a sentence
        raise RequestError(
            f"env {name!r} raises {type(error).__name__} in its first steps: {error}; mend it"
        ) from error
    finally:
        env.close()


def _mask(space: gymnasium.Space, info: dict[str, Any]) -> Any:
    """The env's own mask in the form `sample` takes, for Discrete spaces; others sample freely."""
    mask = info.get("action_mask")
    return np.asarray(mask, dtype=np.int8) if mask is not None and isinstance(space, spaces.Discrete) else None


def _observation(name: str, when: str, space: gymnasium.Space, obs: Any) -> None:
    problem = outside(space, obs, "observation")
    if problem:
        raise RequestError(
            f"env {name!r} breaks its own observation_space at {when}: {problem}; mend the space or the env"
        )
