"""Statistics over seeds (Agarwal et al. 2021): interquartile mean, bootstrap intervals, probability of improvement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def iqm(scores: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half of the scores; a score on the border of it counts by the part that is inside.

    >>> iqm([0, 1, 2, 9])
    1.5
    """
    ordered = np.sort(np.asarray(scores, dtype=float))
    edges = np.arange(len(ordered) + 1) / len(ordered)
    weight = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return float((ordered * weight).sum() / weight.sum())


def bootstrap_interval(
    scores: Sequence[float],
    statistic: Callable[[np.ndarray], float] = iqm,
    *,
    level: float = 0.95,
    num_draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over seeds; the same numbers give the same interval."""
    generator, values = np.random.default_rng(seed), np.asarray(scores, dtype=float)
    resampled = [statistic(generator.choice(values, len(values))) for _ in range(num_draws)]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def probability_of_improvement(scores: Sequence[float], baseline_scores: Sequence[float]) -> float:
    """How often a seed of ours is above a seed of theirs, ties by half.

    >>> probability_of_improvement([1, 2], [0, 2])
    0.625
    """
    a, b = np.asarray(scores, dtype=float)[:, None], np.asarray(baseline_scores, dtype=float)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())
