"""What must hold before the first step: the environment keeps to its own spaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from understudy.control.envs.make import check_spaces, one_line_message
from understudy.control.envs.masks import find_action_mask, sample_allowed_action
from understudy.control.envs.spaces import find_violation, lost_in
from understudy.control.envs.wrappers import find_running_statistics
from understudy.run.config import RequestError

NUM_STEPS = 3


class Preflight(NamedTuple):
    """What the first steps of an environment tell, where nothing is wrong with it."""

    float32_loss: str
    """The entry of the observation of which float32 loses what is seen; empty where there is none."""
    takes_seed: bool
    """Whether a reset with a seed works; where it does not, one without a seed does."""
    violation: str
    """What is outside the observation space, where that is let pass."""
    lost_for_good: str = ""
    """The entry of which float64 loses what is seen, too."""


def check_env(
    name: str, env: gymnasium.Env, *, seed: int, out_of_space: str = "refuse", keep_open: bool = False
) -> Preflight:
    """Reset and step an environment a few times, inside its action masks, and close it.

    Args:
        out_of_space: "refuse" an observation beyond the bounds of its space; otherwise let it pass.
        keep_open: leave the environment open.

    Raises:
        RequestError: a space no policy can use; an observation outside its space; a reward that is no finite number; an
            end that is no bool; an info that is no dict; an action mask of the wrong width, or one that allows nothing;
            a wrapper whose statistics would be lost.
    """
    rng, observations, violation = np.random.default_rng(seed), list[Any](), ""
    with errors_explained(name, env, keep=keep_open):
        check_spaces(name, env.observation_space, env.action_space)
        check_statistics(name, env)
        (obs, info), takes_seed = _first_reset(name, env, seed)
        env.action_space.seed(seed)
        for step in range(NUM_STEPS + 1):
            when = f"step {step - 1}" if step else "reset"
            violation = violation or check_observation(name, when, env.observation_space, obs, out_of_space)
            check_info(name, when, info)
            observations.append(obs)
            if step == NUM_STEPS:
                break
            allowed = _find_action_mask(name, env.action_space, obs, info)
            action = (
                env.action_space.sample() if allowed is None else sample_allowed_action(env.action_space, allowed, rng)
            )
            obs, reward, terminated, truncated, info = check_step_result(name, env.step(action))
            if np.ndim(reward) != 0 or not np.isfinite(float(reward)):
                raise RequestError(f"env {name!r} pays reward {reward!r} at step {step}: must be one finite number")
            for description, flag in (("terminated", terminated), ("truncated", truncated)):
                if not isinstance(flag, bool | np.bool_):
                    raise RequestError(f"env {name!r} returns {description} {flag!r} at step {step}: must be a bool")
            if terminated or truncated:
                observations.append(obs)
                violation = violation or check_observation(
                    name, f"step {step}", env.observation_space, obs, out_of_space
                )
                break
        lost, for_good = (lost_in(dtype, env.observation_space, observations) for dtype in (np.float32, np.float64))
        return Preflight(lost, takes_seed, violation, for_good)


@contextmanager
def errors_explained(name: str, env: Any, *, keep: bool) -> Iterator[None]:
    """Say in a sentence whatever a user's environment or vector env raises; close it in the end, but for `keep`."""
    when = "in its first steps"
    try:
        try:
            yield
        except BaseException:
            if not keep:
                with suppress(Exception):  # what was raised first is what is said
                    env.close()
            raise
        when = "when it is closed"
        if not keep:
            env.close()
    except RequestError:
        raise
    except (Exception, GeneratorExit) as error:
        raise RequestError(
            f"env {name!r} raises {type(error).__name__} {when}: {one_line_message(error)}; mend it"
        ) from error


def check_statistics(name: str, env: Any) -> None:
    """Refuse an environment, or vector env, with a wrapper that normalises by statistics of its own.

    They are no part of the policy: `act`, evaluation and resume would go on with others.
    """
    wrapper = find_running_statistics(env)
    if wrapper is not None:
        raise RequestError(
            f"env {name!r} has the wrapper {wrapper}, whose running statistics are not saved with the policy: leave it out "
            "and set normalize_obs or normalize_reward, whose statistics are"
        )


def _first_reset(name: str, env: gymnasium.Env, seed: int) -> tuple[Any, bool]:
    try:
        return check_reset_result(name, env.reset(seed=seed)), True
    except RequestError:
        raise
    except Exception as error:
        try:
            return check_reset_result(name, env.reset()), False
        except Exception:
            raise error from None


def check_reset_result(name: str, answer: Any) -> Any:
    """What a reset returns, if it is a pair."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise RequestError(f"env {name!r} returns {type(answer).__name__} from reset: must be the pair obs, info")
    return answer


def check_step_result(name: str, answer: Any) -> Any:
    """What a step returns, if it is the five that it must be."""
    if not isinstance(answer, tuple) or len(answer) != 5:
        what = f"{len(answer)} values" if isinstance(answer, tuple) else f"a {type(answer).__name__}"
        raise RequestError(f"env {name!r} returns {what} from step: must be obs, reward, terminated, truncated, info")
    return answer


def check_info(name: str, when: str, info: Any) -> None:
    """Refuse an info that is no dict."""
    if not isinstance(info, dict):
        raise RequestError(f"env {name!r} gives info {info!r} at {when}: must be a dict")


def _find_action_mask(name: str, space: gymnasium.Space, obs: Any, info: dict[str, Any]) -> np.ndarray | None:
    try:
        return find_action_mask(space, obs, info)
    except ValueError as error:
        raise RequestError(f"env {name!r} gives an action mask that does not fit: {error}") from error


def check_observation(name: str, when: str, space: gymnasium.Space, obs: Any, out_of_space: str) -> str:
    """What is beyond the bounds of the space, if that is let pass; refused otherwise, as is anything else."""
    problem = find_violation(space, obs, "observation", check_bounds=out_of_space == "refuse")
    if problem:
        mend = "mend the space or the env"
        if not find_violation(space, obs, "observation", check_bounds=False):
            mend += ", or set out_of_space to accept or clip"
        raise RequestError(f"env {name!r} breaks its own observation_space at {when}: {problem}; {mend}")
    return find_violation(space, obs, "observation")
