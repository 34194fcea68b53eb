"""Weights and masked statistics. The only file that averages: losses and metrics go through the same weights."""

from __future__ import annotations

import torch
from torch import Tensor


def per_step(mask: Tensor) -> Tensor:
    """Every chosen step weighs the same (token mean): mask / number of chosen steps. [B, T], sums to 1, or to 0."""
    return mask / mask.sum().clamp(min=1)


def per_row(mask: Tensor) -> Tensor:
    """Every row weighs the same, shared evenly by its steps (sequence mean). [B, T], sums to 1 over rows with a step."""
    weight = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return weight / mask.any(dim=1).sum().clamp(min=1)


def per_budget(mask: Tensor, *, budget: int) -> Tensor:
    """Every step weighs 1 / (rows * budget), however long its row (Dr. GRPO, Liu et al. 2025, sec. 3). [B, T]."""
    return mask / (mask.shape[0] * budget)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over masked-in entries; 0 where there is none. x, mask: [B, T]."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance over masked-in entries, divided by n - 1 (by 1 for a single one). x, mask: [B, T]."""
    return _centred(x, mask).square().sum() / (mask.sum() - 1).clamp(min=1)


def standardize(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """x with mean 0 and standard deviation 1 over masked-in entries; masked-out entries become 0. x, mask: [B, T].

    A single element has no spread to speak of and is left as it is. `eps` only guards the division.
    """
    if mask.sum() < 2:
        return torch.where(mask, x, 0.0)
    return _centred(x, mask) / (masked_var(x, mask).sqrt() + eps)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with standard deviation 1 over masked-in entries and its mean as it was; masked-out entries become 0. [B, T]."""
    return torch.where(mask, standardize(x, mask) + masked_mean(x, mask), 0.0)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 a constant one, below 0 worse than that.

    nan where the targets do not vary: there is nothing to explain. All [B, T].
    """
    spread = masked_var(target, mask)
    return torch.where(spread > 0, 1 - masked_var(target - value, mask) / spread, float("nan"))


def mean_interval(x: Tensor) -> tuple[float, float, float]:
    """Mean of independent numbers and its 95 % interval by the normal approximation; nan without any. x: [N]."""
    mean, spread = x.double().mean(), x.double().std() if len(x) > 1 else torch.tensor(float("nan"))
    half = float(1.96 * spread / max(len(x), 1) ** 0.5)
    return float(mean), float(mean) - half, float(mean) + half


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the first dimension, in float64. x: [N, ...]."""
    x = x.double()
    return x.mean(dim=0), x.var(dim=0, unbiased=False)


def group_moments(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each member's group size, group mean and group variance (n - 1; 0 for a group of one). x, group: [B] -> [B]."""
    _, index = group.unique(return_inverse=True)
    zeros = torch.zeros(int(index.max()) + 1, dtype=x.dtype, device=x.device)
    size = zeros.index_add(0, index, torch.ones_like(x))
    mean = zeros.index_add(0, index, x) / size
    mean = (
        mean + zeros.index_add(0, index, x - mean[index]) / size
    )  # the first is rounded: equal numbers have no spread
    square = zeros.index_add(0, index, (x - mean[index]).square())
    return size[index], mean[index], (square / (size - 1).clamp(min=1))[index]


def _centred(x: Tensor, mask: Tensor) -> Tensor:
    """x minus its mean over masked-in entries, 0 elsewhere. Twice, for the first mean is rounded: equal numbers become 0."""
    x = x - masked_mean(x, mask)
    return torch.where(mask, x - masked_mean(x, mask), 0.0)
