"""Preflight of a vector env, through its own interface: what one whose copies cannot be had alone must keep to."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

from understudy.control.envs.checks import (
    NUM_STEPS,
    Preflight,
    check_info,
    check_observation,
    check_reset_result,
    check_statistics,
    check_step_result,
    errors_explained,
)
from understudy.control.envs.make import autoreset_mode, check_spaces, seeds_rows
from understudy.control.envs.masks import sample_allowed_action, validate_mask
from understudy.control.envs.spaces import MASK_KEY, lost_in
from understudy.control.envs.state import to_bytes
from understudy.run.config import RequestError
from understudy.run.seeds import derive_seed, preserve_shared_generators


def check_envs(name: str, envs: VectorEnv, *, seed: int, keep: bool = False) -> Preflight:
    """As `check_env`, for a vector env through its own interface; observations beyond their bounds are let pass.

    Args:
        keep: leave it open, for the run that comes: then it is stepped only where the seed of the run's first reset makes
            it start over. One that ignores its seeds could not be put back to where it stood.
    """
    rng, space = np.random.default_rng(seed), envs.single_observation_space
    seeds: Any = [derive_seed(seed, "row", row) for row in range(envs.num_envs)] if seeds_rows(envs) else seed
    with preserve_shared_generators(), errors_explained(name, envs, keep=keep):
        check_spaces(name, space, envs.single_action_space)
        check_statistics(name, envs)
        obs, info = check_reset_result(name, envs.reset(seed=seeds))
        beyond = _check_batch(name, "reset", envs, obs)
        seen, first, steps = _copy_first_rows(envs, obs), to_bytes(obs), NUM_STEPS
        if keep:
            obs, info = check_reset_result(name, envs.reset(seed=seeds))
            steps = NUM_STEPS if to_bytes(obs) == first else 0
        choosing = np.ones(envs.num_envs, dtype=bool)
        for step in range(steps + 1):
            when = f"step {step - 1}" if step else "reset"
            check_info(name, when, info)
            actions = _choose_actions(name, when, envs, obs, info, choosing, rng)
            if step == steps:
                break
            obs, reward, terminated, truncated, info = check_step_result(name, envs.step(actions))
            beyond = beyond or _check_batch(name, f"step {step}", envs, obs)
            _check_column(name, f"pays rewards at step {step}", reward, envs.num_envs, "biuf", "finite numbers")
            for what, flags in (("terminated", terminated), ("truncated", truncated)):
                _check_column(name, f"returns {what} at step {step}", flags, envs.num_envs, "b", "bools")
            seen += _copy_first_rows(envs, obs)
            choosing = ~(np.asarray(terminated) | np.asarray(truncated))
            if not choosing.all() and autoreset_mode(envs) is AutoresetMode.DISABLED:
                break
        lost, for_good = (lost_in(dtype, space, seen) for dtype in (np.float32, np.float64))
        return Preflight(lost, True, beyond, for_good)


def _check_column(name: str, does: str, values: Any, rows: int, kinds: str, what: str) -> None:
    """Refuse what is not one value a copy, of the kinds of NumPy that `kinds` names, and finite."""
    array = np.asarray(values)
    if array.shape != (rows,) or array.dtype.kind not in kinds or not np.isfinite(array).all():
        some = " ".join(str(array.ravel()[:4]).split())
        like = f"of shape {array.shape}" if array.shape != (rows,) else f"{array.dtype}, such as {some}"
        raise RequestError(f"env {name!r} {does} that are {like}: must be {what} of shape ({rows},), one a copy")


def _check_batch(name: str, when: str, envs: VectorEnv, obs: Any) -> str:
    """What of a batch of observations is beyond the bounds of the space; refused where it is no batch of the space's."""
    space = envs.single_observation_space
    batched = batch_space(space, envs.num_envs)
    beyond = check_observation(name, when, batched, obs, "accept")
    if beyond:  # a category that is none is beyond bounds, too: a batch of MultiDiscrete is a Box
        for row, one in enumerate(iterate(batched, obs)):
            check_observation(name, f"{when} in copy {row}", space, one, "accept")
    return beyond


def _copy_first_rows(envs: VectorEnv, obs: Any, max_rows: int = 8) -> list[Any]:
    """The observations of the first copies, which the vector env may write over."""
    rows = iterate(batch_space(envs.single_observation_space, envs.num_envs), obs)
    return [copy.deepcopy(one) for one, _ in zip(rows, range(max_rows), strict=False)]


def _choose_actions(
    name: str,
    when: str,
    envs: VectorEnv,
    obs: Any,
    info: dict[str, Any],
    choosing: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """A random action for each copy, inside its mask; a copy that is over chooses nothing, and its mask does not count."""
    space = copy.deepcopy(envs.single_action_space)  # its own draws are the user's
    space.seed(int(rng.integers(2**31)))
    actions = [space.sample() for _ in choosing]
    masks = info.get(MASK_KEY, obs.get(MASK_KEY) if isinstance(obs, dict) else None)
    if masks is None:
        return np.stack(actions)
    given = np.broadcast_to(info.get(f"_{MASK_KEY}", True), choosing.shape)
    for row in np.flatnonzero(choosing):
        if not given[row]:
            raise RequestError(f"env {name!r} gives no {MASK_KEY} in copy {row} at {when}: give it always, or never")
        try:
            actions[row] = sample_allowed_action(space, validate_mask(space, masks[row]), rng)
        except ValueError as error:
            raise RequestError(f"env {name!r} gives an action mask that does not fit in copy {row}: {error}") from error
    return np.stack(actions)
