"""Checks of a user's own network: an answer that no recipe can learn from is refused in one sentence."""

from __future__ import annotations

from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from understudy.control.envs.make import imported, one_line_message
from understudy.control.envs.spaces import MASK_KEY, mask_sizes
from understudy.distribution import Categorical, MultiCategorical
from understudy.run.config import RequestError
from understudy.run.guard import ran_out_of_memory
from understudy.run.origin import user_error_location

REQUIRED_METHODS = ("noise", "action_from_noise", "mode", "log_prob", "entropy")
SUM_TOLERANCE = 1e-3  # of probabilities, by how much it may differ from 1
MIN_PROBABILITY = 1e-6  # a probability below this counts as none


def named_network(text: str) -> nn.Module:
    """The network that FILE.py:NAME or module:NAME is, or that it makes when it is called without arguments.

    Raises:
        RequestError: there is none.
    """
    made = imported("policy", text)
    try:
        made = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise RequestError(
            f"policy is {text!r}, which raises {type(error).__name__} when it is called without arguments: "
            f"{one_line_message(error)}; name a function that makes the network"
        ) from error
    if not isinstance(made, nn.Module):
        raise RequestError(f"policy is {text!r}, which makes a {type(made).__name__}: it must make a torch.nn.Module")
    return made


def call_and_check(network: nn.Module, given: tuple[Any, ...], action_space: gymnasium.Space) -> tuple[Any, bool]:
    """What a network says, if a recipe can learn from it.

    Args:
        given: observations [B, T, ...], and with memory the state and the starts.

    Returns:
        The answer, and whether all there is to check was seen: where observations have a mask, one that forbids something.

    Raises:
        RequestError: it raises; it is no distribution and value [B, T] (with memory also a state); its log-probs are not
            normalised; it gives probability to an action that the mask forbids.
    """
    obs = given[0]
    called = f"observations {_describe_shapes(obs)}"
    try:
        found = network(*given)
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        place = user_error_location(error)
        raise RequestError(
            f"policy is a network of your own, which raises {type(error).__name__} when it is called with {called}: "
            f"{' '.join(str(error).split())[:200]}{f' ({place})' if place else ''}"
        ) from error
    parts = 3 if len(given) == 3 else 2
    wanted = "distribution, value, state" if parts == 3 else "distribution, value"
    if not isinstance(found, tuple) or len(found) != parts:
        raise _refusal_error(f"returns {type(found).__name__}: must return {wanted}")
    distribution, value = found[:2]
    if lacking := [name for name in REQUIRED_METHODS if not hasattr(distribution, name)]:
        raise _refusal_error(
            f"returns a {type(distribution).__module__}.{type(distribution).__name__} without {', '.join(lacking)}: "
            "return one of understudy.distribution, as Categorical.of(logits)"
        )
    shape = tuple(next(iter(obs.values())).shape if isinstance(obs, dict) else obs.shape)[:2]
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        has = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"that is a {type(value).__name__}"
        raise _refusal_error(f"returns a value {has} for {called}: must be a Tensor [B, T], {list(shape)}")
    allowed = obs.get(MASK_KEY) if isinstance(obs, dict) else None
    return found, _check_probabilities(distribution, allowed, action_space)


@torch.no_grad()
def _check_probabilities(distribution: Any, allowed: Tensor | None, action_space: gymnasium.Space) -> bool:
    """Whether a mask that forbids something was among what was checked, or there is none to wait for."""
    if isinstance(distribution, Categorical):
        parts = [distribution]
    elif isinstance(distribution, MultiCategorical):
        parts = list(distribution.parts.values())
    else:
        return True
    for part in parts:
        if float((part.logp.logsumexp(dim=-1)).abs().max()) > SUM_TOLERANCE:
            raise _refusal_error(
                "returns a Categorical whose probabilities do not sum to 1: make it with Categorical.of(logits), which "
                "normalises them"
            )
    if allowed is None:
        return True
    sizes = mask_sizes(action_space)
    if len(parts) != len(sizes):
        return True
    for part, mask in zip(parts, allowed.bool().split(sizes, dim=-1), strict=True):
        chosen = mask.any(dim=-1, keepdim=True)  # elsewhere nothing is chosen
        most = float(part.logp.exp().masked_fill(mask | ~chosen, 0).max())
        if most > MIN_PROBABILITY:
            raise _refusal_error(
                f"gives probability {most:.2g} to an action that the mask forbids: make its distribution with "
                f"Categorical.of(logits, obs[{MASK_KEY!r}])"
            )
    return not bool(allowed.all())


def _refusal_error(problem: str) -> RequestError:
    return RequestError(f"policy is a network of your own, which {problem}")


def _describe_shapes(obs: Any) -> str:
    """Observations by their shapes."""
    if isinstance(obs, dict):
        return "{" + ", ".join(f"{name!r}: {list(x.shape)}" for name, x in obs.items()) + "}"
    return str(list(obs.shape))
