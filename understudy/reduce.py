"""Weights and masked statistics. The only file that averages: losses and metrics go through the same weights."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import cache
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
    behavior_logprob: Tensor,
    mask: Tensor,
    *,
    mode: Literal["truncate", "mask"],
    ratio: Literal["step", "row", "row_mean"],
    low: float,
    high: float,
) -> Tensor:
    """What a step counts that another policy chose, [B, T]: pi / mu, held within bounds; 0 where nothing was chosen.

    It multiplies the advantage, detached, and so the policy loss: pi is the policy as the update begins, whose own ratio
    to it goes on being clipped (Hilton et al. 2022, sec. 3). All [B, T]; rows are one episode each.

    Args:
        logprob: log pi of the steps.  sampled_logprob: log mu, of whoever chose them.
        mode: "truncate", min(pi / mu, high) (TIS, Yao et al. 2025): what mu rarely chose counts too little, and the noise is
            bounded; "mask", 0 outside [low, high] and pi / mu within (IcePop, Zhao et al. 2025; MIS, Liu et al. 2025).
        ratio: "step", each step's own: unbiased given what came before it, whose chance it leaves mu's; "row", the product
            over the row's steps, for all of them: unbiased where no bound is met; "row_mean", its geometric mean.
    """
    log_ratio = torch.where(mask, logprob - behavior_logprob, 0.0).detach()
    if ratio != "step":
        log_ratio = log_ratio.sum(dim=1, keepdim=True) / (
            mask.sum(dim=1, keepdim=True).clamp(min=1) if ratio == "row_mean" else 1
        )
    weight = log_ratio.exp().expand(mask.shape)
    in_bounds = mask if mode == "truncate" else mask & (weight >= low) & (weight <= high)
    return torch.where(in_bounds, weight.clamp(max=high), 0.0)


def effective_sample_fraction(weight: Tensor, mask: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2): how large a share of n steps drawn from pi itself would tell as much (Kish 1965). In [0, 1].

    1 where all weights are equal, 1/n where one has all; 0 where none has any. weight >= 0, mask: [B, T].
    """
    weight = torch.where(mask, weight, 0.0)
    denominator = weight.square().sum() * mask.sum()
    return torch.where(denominator > 0, weight.sum().square() / denominator, 0.0)


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
    target_variance = masked_var(target, mask)
    return torch.where(target_variance > 0, 1 - masked_var(target - value, mask) / target_variance, float("nan"))


def mean_interval(x: Tensor, cluster: Tensor | None = None) -> tuple[float, float, float]:
    """Mean and its 95 % interval (Student 1908); nan without any, and bounds nan where nothing varies. x: [N].

    Rows of one cluster may resemble each other: the variance is the larger of the one of independent rows and the
    cluster-robust one, G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / N^2 (Liang and Zeger 1986), with G - 1 degrees of
    freedom. The rows of a single cluster are independent: it is all there is.

    Args:
        cluster: [N], equal for rows that belong together; each row its own by default.
    """
    mean = float(x.double().mean())
    if len(x) < 2 or bool((x == x[0]).all()):
        return mean, math.nan, math.nan
    groups = 1 if cluster is None else len(cluster.unique())
    error = float(x.double().var() / len(x) * design_effect(x, cluster)) ** 0.5
    half_width = student_t((groups if groups > 1 else len(x)) - 1) * error
    return mean, mean - half_width, mean + half_width


@cache
def student_t(freedom: int) -> float:
    """The bound that |t| with this many degrees of freedom stays below with probability 0.95.

    By bisection of that probability, which is a finite sum in sin and cos of the angle atan(t / sqrt(freedom))
    (Abramowitz and Stegun 1964, 26.7.3 for odd and 26.7.4 for even degrees of freedom).
    """
    odd = freedom % 2
    k = torch.arange(1, max(1, (freedom - odd) // 2), dtype=torch.float64)
    ratio = (2 * k - 1 + odd) / (2 * k + odd)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        terms = 1 + float((ratio * math.cos(angle) ** 2).cumprod(0).sum())
        inside = math.sin(angle) * terms
        if odd:
            inside = 2 / math.pi * (angle + inside * math.cos(angle) * (freedom > 1))
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return freedom**0.5 * math.tan(low)


def fraction_interval(x: Tensor, cluster: Tensor | None = None) -> tuple[float, float, float]:
    """Share and its 95 % interval (Wilson 1927), which has a width also at 0 and at 1; nan without any. x: [N] in [0, 1].

    Rows of one cluster count for as many independent ones as leave the variance of the mean (Korn and Graubard 1998): N
    over the design effect. Where all rows agree that is not known, and every cluster counts for one.

    Args:
        cluster: as for `mean_interval`.
    """
    n, z2 = len(x), 1.96**2
    if n == 0:
        return math.nan, math.nan, math.nan
    fraction = float(x.double().mean())
    num_clusters = 1 if cluster is None else len(cluster.unique())
    n = num_clusters if fraction in (0.0, 1.0) and num_clusters > 1 else n / design_effect(x, cluster)
    center = (fraction + z2 / (2 * n)) / (1 + z2 / n)
    half_width = (z2 * (fraction * (1 - fraction) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return fraction, max(0.0, center - half_width), min(1.0, center + half_width)


def cluster_ids(keys: Sequence[Hashable]) -> Tensor:
    """A number for each row, the same for rows whose keys are equal: int64 [N]."""
    id_by_key = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([id_by_key[key] for key in keys], dtype=torch.long)


def design_effect(x: Tensor, cluster: Tensor | None) -> float:
    """Variance of the mean of rows that come in clusters over that of independent ones, at least 1. x, cluster: [N]."""
    x, total_squares = x.double(), float((x.double() - x.double().mean()).square().sum())
    if cluster is None or total_squares == 0 or len(cluster.unique()) < 2:
        return 1.0
    _, index = cluster.unique(return_inverse=True)
    num_groups = int(index.max()) + 1
    sums = torch.zeros(num_groups, dtype=x.dtype).index_add(0, index, x - x.mean())
    return max(
        1.0, float(sums.square().sum() * num_groups / (num_groups - 1) / (total_squares * len(x) / (len(x) - 1)))
    )


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
