"""Step 2, score: scores become rewards. A judge scores rows, [B]; steps are paid, [B, T]."""

from __future__ import annotations

import torch
from torch import Tensor


def at_last_step(score: Tensor, mask: Tensor) -> Tensor:
    """Pay each row's score at its last chosen step: score [B], mask [B, T] -> reward [B, T].

    A row without a chosen step is paid nothing. The only bridge from scores to rewards.
    """
    column = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, column, -1).amax(dim=1)
    return torch.where(column == last[:, None], score[:, None], 0.0)


def episode_score(reward: Tensor, mask: Tensor) -> Tensor:
    """The undiscounted sum of what a row was paid for its chosen steps: reward, mask [B, T] -> score [B]."""
    return torch.where(mask, reward, 0.0).sum(dim=1)
