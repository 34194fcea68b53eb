"""Step 2, score: scores become rewards. A judge scores rows, [B]; steps are paid, [B, T]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TruncationMode = Literal["terminal", "penalty", "bootstrap", "drop"]


def reward_at_last_step(score: Tensor, mask: Tensor) -> Tensor:
    """Pay each row's score at its last chosen step: score [B], mask [B, T] -> reward [B, T].

    A row without a chosen step is paid nothing. The only bridge from scores to rewards.
    """
    column = torch.arange(mask.shape[1], device=mask.device)
    last_step = torch.where(mask, column, -1).amax(dim=1)
    return torch.where(column == last_step[:, None], score[:, None], 0.0)


def episode_score(reward: Tensor, mask: Tensor) -> Tensor:
    """The undiscounted sum of what a row was paid for its chosen steps: reward, mask [B, T] -> score [B]."""
    return torch.where(mask, reward, 0.0).sum(dim=1)


def handle_truncation(
    score, terminated, truncated, mask, *, mode: TruncationMode, penalty: float, missing_eos_penalty: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Say what it means that a limit cut a row short, and leave out rows without a score; the four, as they then are.

    A score that is nan is missing: its row is masked out, never paid zero. score [B]; the others bool [B, T].

    Args:
        mode: "terminal", the score is paid and nothing follows (as published RLHF systems do); "penalty", `penalty` is paid
            instead of the score; "bootstrap", no score is paid and V after the last token stands for what would follow;
            "drop", the row is masked out.
        missing_eos_penalty: taken off the score of a cut row, in "terminal".
    """
    is_cut = (truncated & mask).any(dim=1)
    if mode == "terminal":
        score = torch.where(is_cut, score - missing_eos_penalty, score)
    elif mode != "drop":
        score = torch.where(is_cut, penalty if mode == "penalty" else 0.0, score)
    is_dropped = score.isnan() | (is_cut if mode == "drop" else torch.zeros_like(is_cut))
    if mode in ("terminal", "penalty"):
        terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
    return torch.where(is_dropped, 0.0, score), terminated, truncated, mask & ~is_dropped[:, None]


def kl_reward(logprob: Tensor, reference_logprob: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """-coef * (log pi - log pi_ref) at each chosen step, [B, T]: KL(pi, pi_ref) as pay (Ziegler et al. 2019, eq. 2).

    k1 of Schulman (2020), the only estimator that is exact as a reward; its sum over a row estimates the row's KL.
    """
    return torch.where(mask, coef * (reference_logprob - logprob), 0.0)


def adapt_kl_reference_coef(coef: float, kl: float, *, target: float, num_rows: int, horizon: int) -> float:
    """The next coefficient of the KL to the reference (Ziegler et al. 2019, sec. 2.2).

    coef * (1 + clip(KL / target - 1, -0.2, 0.2) * rows / horizon).

    Args:
        kl: mean KL(pi, pi_ref) of a whole row in nats.  target: what it should be.
        num_rows: sampled this time.  horizon: in rows; how many it takes to change the coefficient by up to 20 %.
    """
    return coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * num_rows / horizon)


def overlong_penalty(length: Tensor, *, limit: int, margin: int) -> Tensor:
    """What a completion of that length is charged, from 0 to -1 (DAPO, Yu et al. 2025, eq. 13). [B].

    Nothing up to limit - margin tokens; from there on evenly down to -1 at limit.
    """
    return -((length - (limit - margin)) / margin).clamp(0, 1)
