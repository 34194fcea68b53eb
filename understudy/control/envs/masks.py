"""Action masks: where an environment gives them, whether they fit its actions, and a random action that one allows.

A mask is a top-level entry `action_mask` of a Dict observation, `info["action_mask"]` at every reset and step, or what a
method `action_masks()` returns (the convention of sb3-contrib), which is turned into the second form here.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper

from understudy.control.envs.spaces import MASK_KEY, mask_sizes, mask_width, to_env_action

ACTION_MASKS_METHOD = "action_masks"


class MaskInInfo(gymnasium.Wrapper):
    """Adds what the environment's `action_masks()` returns to every info that another choice follows, unless it is there."""

    def __getattr__(self, name: str) -> Any:
        if name in ("get_state", "set_state"):  # this wrapper has no state: the environment's methods are enough
            return getattr(self.env, name)
        raise AttributeError(name)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, self._with_mask(info)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info if terminated or truncated else self._with_mask(info)

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        return (
            info
            if MASK_KEY in info
            else info | {MASK_KEY: flatten_mask(self.env.get_wrapper_attr(ACTION_MASKS_METHOD)())}
        )


class MasksInInfo(VectorWrapper):
    """The same for a vector env: `masks()` returns one mask a row."""

    def __init__(self, envs: VectorEnv, masks: Any) -> None:
        super().__init__(envs)
        self.masks = masks

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, self._with_masks(info)

    def step(self, actions: Any) -> Any:
        *result, info = self.env.step(actions)
        return *result, self._with_masks(info)

    def _with_masks(self, info: dict[str, Any]) -> dict[str, Any]:
        all_rows = np.ones(self.num_envs, dtype=bool)
        return info if MASK_KEY in info else info | {MASK_KEY: list(self.masks()), f"_{MASK_KEY}": all_rows}


def with_mask(env: gymnasium.Env) -> gymnasium.Env:
    """The environment, whose `action_masks()`, if it has one, is read into info."""
    has_masks = _can_have_mask(env.observation_space, env.action_space) and env.has_wrapper_attr(ACTION_MASKS_METHOD)
    return MaskInInfo(env) if has_masks and not isinstance(env, MaskInInfo) else env


def with_masks(envs: VectorEnv) -> VectorEnv:
    """The vector env, whose own `action_masks()` or that of its environments, if there is one, is read into info."""
    if not _can_have_mask(envs.single_observation_space, envs.single_action_space):
        return envs
    if callable(masks := getattr(envs.unwrapped, ACTION_MASKS_METHOD, None)):
        return MasksInInfo(envs, masks)
    call: Any = getattr(envs.unwrapped, "call", None)
    if isinstance(envs.unwrapped, gymnasium.vector.AsyncVectorEnv) and all(
        call("has_wrapper_attr", ACTION_MASKS_METHOD)
    ):
        return MasksInInfo(envs, lambda: call(ACTION_MASKS_METHOD))
    return envs


def check_mask(observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
    """Raises ValueError where the entry `action_mask` of an observation space is no mask of the action space."""
    if not isinstance(observation_space, spaces.Dict) or MASK_KEY not in observation_space.spaces:
        return
    mask, width = observation_space[MASK_KEY], mask_width(action_space)
    if not width:
        raise ValueError(f"observation_space has {MASK_KEY!r}, but action_space is {action_space}, which takes no mask")
    if not isinstance(mask, spaces.Box | spaces.MultiBinary):
        raise ValueError(f"observation_space has {MASK_KEY!r} as a {type(mask).__name__}: use one MultiBinary({width})")
    if (num_entries := int(np.prod(mask.shape))) != width:
        raise ValueError(
            f"observation_space has {MASK_KEY!r} of {num_entries} entries: it must have {width} for "
            f"action_space {action_space}"
        )


def find_action_mask(action_space: gymnasium.Space, obs: Any, info: dict[str, Any]) -> np.ndarray | None:
    """The mask that came with one observation, bool [width]; None where there is none.

    Raises:
        ValueError: it has the wrong width, or allows nothing.
    """
    mask = info.get(MASK_KEY)
    if mask is None and isinstance(obs, dict):
        mask = obs.get(MASK_KEY)
    return None if mask is None else validate_mask(action_space, mask)


def validate_mask(action_space: gymnasium.Space, mask: Any) -> np.ndarray:
    """A mask of any form as bool [width].

    Raises:
        ValueError: it has the wrong width, holds other values than 0 and 1, or allows nothing.
    """
    allowed, width = flatten_mask(mask), mask_width(action_space)
    if len(allowed) != width:
        raise ValueError(f"{MASK_KEY} has {len(allowed)} entries: it must have {width} for {action_space}")
    if not all(part.any() for part in _split_mask(action_space, allowed)):
        raise ValueError(f"{MASK_KEY} allows no action: allow at least one, in every dimension")
    return allowed


def flatten_mask(mask: Any) -> np.ndarray:
    """A mask given as an array, a list, or one array for each dimension of the action, as bool [width].

    Raises:
        ValueError: it holds other values than 0 and 1, such as logits or the numbers of actions.
    """
    plain = isinstance(mask, np.ndarray) and mask.dtype != object
    flat = mask.ravel() if plain else np.concatenate([np.ravel(part) for part in mask])
    if flat.dtype != bool and not (allowed := (flat == 0) | (flat == 1)).all():
        raise ValueError(
            f"{MASK_KEY} holds {flat[~allowed][0]!s:.20}: must be 1 where an action is allowed and 0 where it is not"
        )
    return flat.astype(bool)


def sample_allowed_action(action_space: gymnasium.Space, allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An action drawn uniformly among those that a mask [width] allows, as the environment takes it."""
    choice = np.array([rng.choice(np.flatnonzero(part)) for part in _split_mask(action_space, allowed)])
    return to_env_action(action_space, choice if isinstance(action_space, spaces.Discrete) else choice[None], "clip")[0]


def _split_mask(action_space: gymnasium.Space, allowed: np.ndarray) -> list[np.ndarray]:
    return np.split(allowed, np.cumsum(mask_sizes(action_space))[:-1])


def _can_have_mask(observation_space: gymnasium.Space, action_space: gymnasium.Space) -> bool:
    in_observation = isinstance(observation_space, spaces.Dict) and MASK_KEY in observation_space.spaces
    return mask_width(action_space) > 0 and not in_observation
