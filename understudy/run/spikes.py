"""Spikes: lines of metrics whose loss or gradient stands far above what came before. A finding; nothing is done about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

WATCHED = ("loss", "grad_norm")
WINDOW, LEAST = 100, 20
"""Lines before it that a line is held against, and the fewest that say anything."""
FAR = 10.0
"""Robust standard deviations above the median that make a spike."""
CHUNK = 4096  # lines at a time, so that windows stay small


def spikes(metrics: Sequence[dict[str, Any]], *, after: int = 0) -> list[dict[str, Any]]:
    """What stands out in the lines from number `after` on: {"iteration", "metric", "value", "median", "deviation"} each.

    A value is one where it is above median + 10 * 1.4826 * MAD of the last 100 lines that have the metric, at least 20:
    1.4826 * MAD is the standard deviation of a normal sample (Rousseeuw and Croux 1993), and neither is moved by the
    spikes themselves. The deviation is taken to be at least a hundredth of the median: what hardly moves has no spikes.
    """
    found = []
    for name in WATCHED:
        have = [i for i in range(max(0, after - 2 * WINDOW), len(metrics)) if _finite(metrics[i].get(name))]
        value = np.array([metrics[i][name] for i in have])
        first = max(LEAST, int(np.searchsorted(have, after)))
        for low in range(first, len(have), CHUNK):
            places = np.arange(low, min(low + CHUNK, len(have)))
            median, deviation = _before(value, places)
            for place, middle, spread in zip(places, median, deviation, strict=True):
                if value[place] > middle + FAR * spread:
                    line = {"iteration": metrics[have[place]]["iteration"], "metric": name}
                    found.append(line | {"value": float(value[place]), "median": middle, "deviation": spread})
    return sorted(found, key=lambda spike: spike["iteration"])


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)  # null in a file, where a resumed run reads it


def _before(value: np.ndarray, places: np.ndarray) -> tuple[list[float], list[float]]:
    """The median and the robust deviation of the lines before each place."""
    median, deviation = [], []
    early = places[places < WINDOW]
    rows = [value[:place][None] for place in early]
    if len(late := places[places >= WINDOW]):
        rows.append(np.lib.stride_tricks.sliding_window_view(value, WINDOW)[late - WINDOW])
    for windows in rows:
        middle = np.median(windows, axis=1)
        spread = 1.4826 * np.median(np.abs(windows - middle[:, None]), axis=1)
        median += middle.tolist()
        deviation += np.maximum(spread, 0.01 * np.abs(middle)).tolist()
    return median, deviation
