"""Spikes: lines of metrics whose loss or gradient stands far above what came before. A finding; nothing is done about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MONITORED_METRICS = ("loss", "grad_norm")
WINDOW, MIN_WINDOW = 100, 20
"""Lines before it that a line is held against, and the fewest that say anything."""
MIN_DEVIATIONS = 10.0
"""Robust standard deviations above the median that make a spike."""
CHUNK_LINES = 4096  # lines at a time, so that windows stay small


def find_spikes(metrics: Sequence[dict[str, Any]], *, first_line: int = 0) -> list[dict[str, Any]]:
    """What stands out in the lines from number `first_line` on: {"iteration", "metric", "value", "median",
    "deviation"} each.

    A value is one where it is above median + 10 * 1.4826 * MAD of the last 100 lines that have the metric, at least 20:
    1.4826 * MAD is the standard deviation of a normal sample (Rousseeuw and Croux 1993), and neither is moved by the
    spikes themselves. The deviation is taken to be at least a hundredth of the median: what hardly moves has no spikes.
    """
    spikes = []
    for name in MONITORED_METRICS:
        line_numbers = [
            i for i in range(max(0, first_line - 2 * WINDOW), len(metrics)) if _is_finite(metrics[i].get(name))
        ]
        values = np.array([metrics[i][name] for i in line_numbers])
        first = max(MIN_WINDOW, int(np.searchsorted(line_numbers, first_line)))
        for low in range(first, len(line_numbers), CHUNK_LINES):
            indices = np.arange(low, min(low + CHUNK_LINES, len(line_numbers)))
            median, deviation = _rolling_median(values, indices)
            for index, line_median, line_deviation in zip(indices, median, deviation, strict=True):
                if values[index] > line_median + MIN_DEVIATIONS * line_deviation:
                    line = {"iteration": metrics[line_numbers[index]]["iteration"], "metric": name}
                    spikes.append(
                        line | {"value": float(values[index]), "median": line_median, "deviation": line_deviation}
                    )
    return sorted(spikes, key=lambda spike: spike["iteration"])


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)  # null in a file, where a resumed run reads it


def _rolling_median(values: np.ndarray, indices: np.ndarray) -> tuple[list[float], list[float]]:
    """The median and the robust deviation of the lines before each place."""
    median, deviation = [], []
    early = indices[indices < WINDOW]
    rows = [values[:index][None] for index in early]
    if len(late := indices[indices >= WINDOW]):
        rows.append(np.lib.stride_tricks.sliding_window_view(values, WINDOW)[late - WINDOW])
    for windows in rows:
        window_median = np.median(windows, axis=1)
        window_deviation = 1.4826 * np.median(np.abs(windows - window_median[:, None]), axis=1)
        median += window_median.tolist()
        deviation += np.maximum(window_deviation, 0.01 * np.abs(window_median)).tolist()
    return median, deviation
