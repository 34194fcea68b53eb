"""The policy that a run starts with: a fresh one, that of another run, or a user's own network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium
from gymnasium.vector import VectorEnv
from torch import nn

from understudy.control.config import Config, Network
from understudy.control.policy import Policy
from understudy.run.config import RequestError
from understudy.run.seeds import derive


def initial_policy(policy: nn.Module | None, cfg: Config, envs: VectorEnv, init: Path | None) -> Policy:
    """The policy of a run: a user's own, or that in `init`, or a fresh one. The spaces must be the environment's."""
    spaces = envs.single_observation_space, envs.single_action_space
    if cfg.exploration != "independent" and not isinstance(spaces[1], gymnasium.spaces.Box):
        raise RequestError(
            f"exploration is {cfg.exploration!r}, but action_space is {spaces[1]}: only noise of a Box can be held; "
            "choose exploration 'independent'"
        )
    scales = {"scale_obs": cfg.normalize_obs, "scale_reward": cfg.gamma if cfg.normalize_reward else None}
    if policy is not None:
        own = policy if isinstance(policy, Policy) else Policy(policy, *spaces, squash=cfg.squash, **scales)
        return _as_asked(own, cfg, "policy is your own")
    if init is None:
        return Policy.build(*spaces, cfg, seed=derive(cfg.seed, "weights"), **scales)
    loaded = Policy.load(init)
    if (loaded.observation_space, loaded.action_space) != spaces:
        raise RequestError(
            f"init is {cfg.init!r}, a policy for {loaded.observation_space} and {loaded.action_space}, but env has "
            f"{spaces[0]} and {spaces[1]}: choose a policy of the same spaces"
        )
    return _as_asked(loaded, cfg, f"init is {cfg.init!r}")


def _as_asked(policy: Policy, cfg: Config, whose: str) -> Policy:
    """The policy, unless the config asks for another one: a field that is not at its default must say what is there.

    How long noise is held is the walker's, for any policy; only gSDE is part of the network.
    """
    has = (policy.made_of or {}) | {"squash": policy.squash}
    has |= {"normalize_obs": policy.obs_scale is not None, "normalize_reward": policy.reward_scale is not None}
    theirs = {*Network.__dataclass_fields__, *has} - {"noise_hold"}
    if "gsde" not in (cfg.exploration, has.get("exploration")):
        theirs.remove("exploration")
    for field in dataclasses.fields(cfg):
        asked = getattr(cfg, field.name)
        if field.name in theirs and asked not in (field.default, has.get(field.name)):
            there = f"which has {has[field.name]!r}" if field.name in has else "which takes none from the config"
            raise RequestError(f"{field.name} is {asked!r}, but {whose}, {there}: leave it at {field.default!r}")
    if policy.reward_scale is not None:
        policy.reward_scale.gamma = cfg.gamma  # not the one it was trained with before
    return policy
