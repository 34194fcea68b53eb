"""What the spaces and the network of a run mean for its config: fields without effect, and what a user should know first."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium

from understudy.control.envs.checks import Preflight
from understudy.control.envs.spaces import is_far_from_unit
from understudy.control.policy import Policy, normalized_shapes


def policy_warnings(policy: Policy, seen: Preflight) -> Iterator[str]:
    """What a user should know before the first step, a sentence each.

    Args:
        seen: what preflight observed in the first steps of the environment.
    """
    if seen.lost_for_good:
        yield (
            f"observation {seen.lost_for_good} varies by less than float64 can hold, so the policy cannot see it: let the "
            "environment subtract a constant"
        )
    elif seen.float32_loss and not policy.keeps_float64:
        yield (
            f"observation {seen.float32_loss} varies by less than float32 can hold, so the policy cannot see it: "
            "set normalize_obs, which scales it in float64 first, or let the environment subtract a constant"
        )
    if policy.squash == "clip" and is_far_from_unit(policy.action_space):
        yield (
            f"action_space is {policy.action_space}, most of which is not explored, because squash is 'clip' and "
            "actions begin around 0: set squash to scale, or to auto"
        )
    if layers := policy.layers_held_in_eval_mode:
        yield (
            f"the network has {', '.join(layers)}: it stays in evaluation mode, in the update too, because the update must "
            "see the policy that acted"
        )


def env_fields_without_effect(policy: Policy) -> dict[str, str]:
    """The fields that have no effect in an environment of a policy's spaces, and why."""
    observation_space, action_space = policy.observation_space, policy.action_space
    reasons: dict[str, str] = {}
    if not isinstance(action_space, gymnasium.spaces.Box):
        reason = f"action_space is {action_space}, no Box"
        reasons = {"squash": reason, "log_std": reason, "scalar_std": reason}
    if not normalized_shapes(observation_space):
        reasons["normalize_obs"] = f"observation_space is {observation_space}, in which nothing is scaled"
    return reasons
