"""The policy that a run starts with: a fresh one, that of another run, or a user's own network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium
from gymnasium.vector import VectorEnv
from torch import nn

from understudy.control.config import Config, NetworkConfig
from understudy.control.policy import Policy, require_module
from understudy.run.config import RequestError
from understudy.run.seeds import derive_seed


def make_initial_policy(policy: nn.Module | None, cfg: Config, envs: VectorEnv, init: Path | None) -> Policy:
    """The policy of a run: a user's own, or that in `init`, or a fresh one. The spaces must be the environment's."""
    spaces = envs.single_observation_space, envs.single_action_space
    if cfg.exploration != "independent" and not isinstance(spaces[1], gymnasium.spaces.Box):
        raise RequestError(
            f"exploration is {cfg.exploration!r}, but action_space is {spaces[1]}: only noise of a Box can be held; "
            "choose exploration 'independent'"
        )
    normalizer_options = {"scale_obs": cfg.normalize_obs, "scale_reward": cfg.gamma if cfg.normalize_reward else None}
    if policy is not None:
        require_module(policy)
        user_policy = (
            policy if isinstance(policy, Policy) else Policy(policy, *spaces, squash=cfg.squash, **normalizer_options)
        )
        return _check_against_config(user_policy, cfg, "policy is your own")
    if init is None:
        return Policy.build(*spaces, cfg, seed=derive_seed(cfg.seed, "weights"), **normalizer_options)
    loaded = Policy.load(init)
    if (loaded.observation_space, loaded.action_space) != spaces:
        raise RequestError(
            f"init_from is {cfg.init_from!r}, a policy for {loaded.observation_space} and "
            f"{loaded.action_space}, but env has "
            f"{spaces[0]} and {spaces[1]}: choose a policy of the same spaces"
        )
    return _check_against_config(loaded, cfg, f"init_from is {cfg.init_from!r}")


def _check_against_config(policy: Policy, cfg: Config, description: str) -> Policy:
    """The policy, unless the config asks for another one: a field that is not at its default must say what is there.

    How long noise is held is the walker's, for any policy; only gSDE is part of the network.
    """
    policy_fields = (policy.network_config or {}) | {"squash": policy.squash}
    policy_fields |= {
        "normalize_obs": policy.obs_scale is not None,
        "normalize_reward": policy.reward_scale is not None,
    }
    checked_fields = {*NetworkConfig.__dataclass_fields__, *policy_fields} - {"noise_hold"}
    if "gsde" not in (cfg.exploration, policy_fields.get("exploration")):
        checked_fields.remove("exploration")
    for field in dataclasses.fields(cfg):
        requested = getattr(cfg, field.name)
        if field.name in checked_fields and requested not in (field.default, policy_fields.get(field.name)):
            actual = (
                f"which has {policy_fields[field.name]!r}"
                if field.name in policy_fields
                else "which takes none from the config"
            )
            raise RequestError(
                f"{field.name} is {requested!r}, but {description}, {actual}: leave it at {field.default!r}"
            )
    if policy.reward_scale is not None:
        policy.reward_scale.gamma = cfg.gamma  # not the one it was trained with before
    return policy
