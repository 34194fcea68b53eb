"""One episode of a saved policy, step by step: what it saw, did, was paid and expected."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from understudy.control.config import Config
from understudy.control.envs.sources import EnvSource
from understudy.control.envs.spaces import MASK_KEY
from understudy.control.evaluate import EVALUATION_SEED, episode_seed, require_spaces_of
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.run.seeds import make_generator
from understudy.value import estimate_values


class Step(NamedTuple):
    """A step of an episode."""

    obs: dict[str, Any]
    """What the policy saw, by name, as lists; an action mask among them."""
    action: Any
    """What the environment was given."""
    reward: float
    """In the environment's own units."""
    value: float
    """The critic's estimate before the step, in the units it learns: scaled where rewards are normalised."""
    end_reason: str
    """"terminated", "truncated" or ""."""


@torch.no_grad()
def replay(policy: Policy, cfg: Config, *, episode: int, num_steps: int, sample: bool) -> list[Step]:
    """The first `num_steps` steps of an evaluation episode; the same at every call.

    Args:
        episode: its number, from 0: the seeds are those of `evaluate` in any number of copies.
        sample: choose as in training; otherwise the distribution's mode.
    """
    source = EnvSource(cfg)
    source.check()
    envs, _ = source.open_evaluation(1)
    try:
        require_spaces_of(policy, envs)
        collector = RolloutCollector(
            envs,
            seed_of=lambda _, number: episode_seed(episode + number),
            generator=make_generator(EVALUATION_SEED, "evaluate", cfg.device),
            noise_interval=cfg.noise_interval,
            device=cfg.device,
            sample=sample,
            keep_float64=policy.keeps_float64,
        )
        trajectory = collector.collect(policy, num_steps)
    finally:
        source.close_evaluation(envs)
    value = estimate_values(policy, trajectory)[1][0].tolist()
    obs_entries = trajectory.obs if isinstance(trajectory.obs, dict) else {"obs": trajectory.obs}
    steps: list[Step] = []
    for t in trajectory.mask[0].nonzero()[:, 0].tolist():
        obs = {
            name: column[0, t].tolist()
            for name, column in obs_entries.items()
            if name != MASK_KEY or not column[0, t].all()
        }
        action = policy.to_env_action(trajectory.action[:, t].cpu().numpy())[0]
        end_reason = "terminated" if trajectory.terminated[0, t] else "truncated" if trajectory.truncated[0, t] else ""
        action_value = action.tolist() if isinstance(action, np.ndarray | np.generic) else action
        steps.append(Step(obs, action_value, float(trajectory.reward[0, t]), value[t], end_reason))
        if end_reason:
            break
    return steps
