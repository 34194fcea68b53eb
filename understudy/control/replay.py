"""One episode of a saved policy, step by step: what it saw, did, was paid and expected."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from understudy.control.collect import Walker
from understudy.control.config import Config
from understudy.control.evaluate import SEED, episode_seed
from understudy.control.policy import Policy
from understudy.control.sources import Source
from understudy.control.spaces import MASK
from understudy.run.seeds import generator
from understudy.value import estimate


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
    end: str
    """"terminated", "truncated" or ""."""


@torch.no_grad()
def replay(policy: Policy, cfg: Config, *, episode: int, steps: int, sample: bool) -> list[Step]:
    """The first `steps` steps of an evaluation episode; the same at every call.

    Args:
        episode: its number, from 0: the seeds are those of `evaluate` in any number of copies.
        sample: choose as in training; otherwise the distribution's mode.
    """
    source = Source(cfg)
    source.check()
    envs, _ = source.open_evaluation(1)
    try:
        walker = Walker(
            envs,
            seed_of=lambda _, number: episode_seed(episode + number),
            generator=generator(SEED, "evaluate", cfg.device),
            hold=cfg.hold,
            device=cfg.device,
            sample=sample,
            exact=policy.exact,
        )
        record = walker.collect(policy, steps)
    finally:
        source.close_evaluation(envs)
    value = estimate(policy, record)[1][0].tolist()
    seen = record.obs if isinstance(record.obs, dict) else {"obs": record.obs}
    found: list[Step] = []
    for t in record.mask[0].nonzero()[:, 0].tolist():
        obs = {name: column[0, t].tolist() for name, column in seen.items() if name != MASK or not column[0, t].all()}
        action = policy.executable(record.action[:, t].cpu().numpy())[0]
        end = "terminated" if record.terminated[0, t] else "truncated" if record.truncated[0, t] else ""
        plain = action.tolist() if isinstance(action, np.ndarray | np.generic) else action
        found.append(Step(obs, plain, float(record.reward[0, t]), value[t], end))
        if end:
            break
    return found
