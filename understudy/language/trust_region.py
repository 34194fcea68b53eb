"""Step 5, update: the KL trust region. An update that moved the policy too far from the one that sampled is undone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from understudy.batch import Batch
from understudy.language.config import RolloutConfig
from understudy.language.model.policy import Policy
from understudy.language.model.token_distribution import TokenDistribution
from understudy.reduce import masked_mean
from understudy.update import UpdateRejected

MIN_ROWS = 8
"""Rows that are measured at least, where there are so many."""
MEASURE_BATCH_SIZE = 64
"""Rows that are read at a time."""


def make_trust_region_check(policy: Policy, batch: Batch, cfg: RolloutConfig) -> Callable[[], dict[str, float]]:
    """What `update` is to verify: a `TrustRegion` around the policy as it now is; nothing where `trust_region_kl` is 0."""
    return TrustRegion(policy, batch, cfg) if cfg.trust_region_kl else dict


def make_kl_early_stopping(target_kl: float) -> Callable[[dict[str, float]], bool] | None:
    """What `update` is steered by: end it before a minibatch whose `kl_old` is above the bound; None where that is 0."""
    return (lambda metrics: metrics["kl_old"] > target_kl) if target_kl else None


class TrustRegion:
    """Measures KL(old, new) of one update, exact over the vocabulary, on rows that are chosen before it.

    The bound on the mean KL is TRPO's (Schulman et al. 2015, eq. 12). TRPO searches along its step for a point inside;
    here a step that ends outside is undone and the coming ones are smaller (`Guard`).

    Args:
        policy: as it was when it sampled; its head is copied, for it may learn.
        batch: what the update learns from; every k-th of its rows in which something is chosen is measured.
        cfg: `trust_region_kl` is the bound, in nats a token; `trust_region_fraction` of the rows are measured, at least 8.
    """

    def __init__(self, policy: Policy, batch: Batch, cfg: RolloutConfig) -> None:
        learned = batch.mask.any(dim=1).nonzero()[:, 0]  # a row may have been dropped, or have no score
        num_rows = min(len(learned), max(MIN_ROWS, math.ceil(cfg.trust_region_fraction * len(learned))))
        rows = learned[torch.arange(num_rows, device=learned.device) * len(learned) // max(num_rows, 1)]
        self.policy, self.max_kl, self.micro_batch_size = (
            policy,
            cfg.trust_region_kl,
            cfg.micro_batch_size or MEASURE_BATCH_SIZE,
        )
        self.tokens, self.mask = batch.obs[rows], batch.mask[rows]
        head = policy.head.frozen()
        self.old_distributions = [replace(distribution, head=head) for distribution in self._forward()]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Measure the policy as it now is.

        Returns:
            `kl_update`: mean KL(old, new) over the tokens of the measured rows, in nats; nothing where no row teaches.

        Raises:
            UpdateRejected: it is above the bound, or not a number.
        """
        if not len(self.mask):
            return {}
        pairs = zip(self.old_distributions, self._forward(), strict=True)
        kl = torch.cat([old.kl(new) for old, new in pairs])
        metrics = {"kl_update": float(masked_mean(kl, self.mask))}
        if not metrics["kl_update"] <= self.max_kl:
            raise UpdateRejected(
                f"KL(old, new) is {metrics['kl_update']:.3g} nats a token, above trust_region_kl {self.max_kl:g}",
                metrics,
            )
        return metrics

    @torch.no_grad()
    def _forward(self) -> list[TokenDistribution]:
        return [
            self.policy.distribution(self.tokens[start : start + self.micro_batch_size])
            for start in range(0, len(self.tokens), self.micro_batch_size)
        ]
