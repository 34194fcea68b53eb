"""Weights and masked statistics. The only file that averages: losses and metrics go through the same weights."""

from __future__ import annotations

from typing import Literal

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


def importance_weight(
    logprob: Tensor,
    sampled_logprob: Tensor,
    mask: Tensor,
    *,
    how: Literal["truncate", "mask"],
    ratio: Literal["step", "row", "row_mean"],
    low: float,
    high: float,
) -> Tensor:
    """What a step counts that another policy chose, [B, T]: pi / mu, held within bounds; 0 where nothing was chosen.

    It multiplies the advantage, detached, and so the policy loss: pi is the policy as the update begins, whose own ratio
    to it goes on being clipped (Hilton et al. 2022, sec. 3). All [B, T]; rows are one episode each.

    Args:
        logprob: log pi of the steps.  sampled_logprob: log mu, of whoever chose them.
        how: "truncate", min(pi / mu, high) (TIS, Yao et al. 2025): what mu rarely chose counts too little, and the noise is
            bounded; "mask", 0 outside [low, high] and pi / mu within (IcePop, Zhao et al. 2025; MIS, Liu et al. 2025).
        ratio: "step", each step's own: unbiased given what came before it, whose chance it leaves mu's; "row", the product
            over the row's steps, for all of them: unbiased where no bound is met; "row_mean", its geometric mean.
    """
    gap = torch.where(mask, logprob - sampled_logprob, 0.0).detach()
    if ratio != "step":
        gap = gap.sum(dim=1, keepdim=True) / (mask.sum(dim=1, keepdim=True).clamp(min=1) if ratio == "row_mean" else 1)
    weight = gap.exp().expand(mask.shape)
    kept = mask if how == "truncate" else mask & (weight >= low) & (weight <= high)
    return torch.where(kept, weight.clamp(max=high), 0.0)


def effective_share(weight: Tensor, mask: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2): how large a share of n steps drawn from pi itself would tell as much (Kish 1965). In [0, 1].

    1 where all weights are equal, 1/n where one has all; 0 where none has any. weight >= 0, mask: [B, T].
    """
    weight = torch.where(mask, weight, 0.0)
    whole = weight.square().sum() * mask.sum()
    return torch.where(whole > 0, weight.sum().square() / whole, 0.0)


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
    scaled = _centred(x, mask) / (masked_var(x, mask).sqrt() + eps)
    return torch.where(mask.sum() < 2, torch.where(mask, x, 0.0), scaled)


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
