"""Over-optimisation (Gao et al. 2023): how the true score goes with the distance from where a policy began."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["best_of", "rl"]
Curve = tuple[Sequence[float], Sequence[float]]
"""KL in nats, and what was gained since KL 0, at each point of one seed."""


@dataclass(frozen=True)
class Fit:
    """gain = d (alpha - beta d) for best-of-n, d (alpha - beta log d) for RL; d = sqrt(KL) (Gao et al. 2023, sec. 1)."""

    form: Form
    alpha: float
    beta: float
    r2: float
    """1 - squared error over squared deviation from the mean gain; nan where the gain does not vary."""

    def __call__(self, kl: float) -> float:
        """The gain at a KL, 0 at 0.

        >>> Fit("best_of", alpha=2.0, beta=0.5, r2=1.0)(4.0)
        2.0
        """
        d = math.sqrt(kl)
        return d * (self.alpha - self.beta * (d if self.form == "best_of" else math.log(d))) if d > 0 else 0.0

    @property
    def peak(self) -> float:
        """The KL at which the gain is largest: inf where it never falls, 0 where it never rises.

        Best-of-n: d = alpha / (2 beta). RL: d = exp(alpha / beta - 1).
        """
        if self.beta <= 0:
            return math.inf
        if self.form == "best_of":
            return max(0.0, self.alpha / (2 * self.beta)) ** 2
        return math.exp(min(2 * (self.alpha / self.beta - 1), 700.0))


def fit(curves: Sequence[Curve], form: Form) -> Fit:
    """Least squares over the points of all curves; both forms are linear in alpha and beta. Points at KL 0 say nothing."""
    kl, gain = (np.concatenate([np.asarray(curve[i], dtype=float) for curve in curves]) for i in (0, 1))
    d, gain = np.sqrt(kl[kl > 0]), gain[kl > 0]
    bend = d * d if form == "best_of" else d * np.log(d)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -bend], axis=1), gain, rcond=None)
    residual, deviation = gain - (alpha * d - beta * bend), gain - gain.mean()
    r2 = 1 - float(residual @ residual) / float(deviation @ deviation) if deviation.any() else math.nan
    return Fit(form, float(alpha), float(beta), r2)


def peak_interval(
    curves: Sequence[Curve], form: Form, *, level: float = 0.95, num_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval over seeds of the KL at the fit's peak; inf is a value like another."""
    generator = np.random.default_rng(seed)
    peaks = [
        fit([curves[i] for i in generator.integers(len(curves), size=len(curves))], form).peak for _ in range(num_draws)
    ]
    low, high = np.quantile(peaks, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def kl_of_best_of_n(n: int) -> float:
    """KL between the best of n and a single sample, log n - (n - 1) / n nats (Stiennon et al. 2020, app. G.3).

    It is a bound: it is reached where no two samples score the same.

    >>> round(kl_of_best_of_n(2), 4)
    0.1931
    """
    return math.log(n) - (n - 1) / n


def mean_of_best_of_n(ranking_scores: np.ndarray, values: np.ndarray, n: int) -> float:
    """Expected `values` of the best of n by `ranking_scores`, over all ways to draw n of the N samples (Nakano et al.
    2021, app. I).

    Args:
        ranking_scores, values: [..., N], a row a prompt; rows are averaged. n: at most N.
    """
    order = np.argsort(ranking_scores, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    size = ranking_scores.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"n is {n}, by is {ranking_scores.shape}: n must be from 1 to the last of these")
    rank = np.arange(size, n, -1)  # C(i - 1, n - 1) over that of i + 1 is (i - n + 1) / i
    weight = np.concatenate([[n / size], n / size * np.cumprod((rank - n) / (rank - 1))])  # of rank N, N - 1, ..., n
    return float((ordered[..., ::-1][..., : len(weight)] * weight).sum(axis=-1).mean())
