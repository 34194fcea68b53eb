"""A picture of a learning curve."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def plot_learning_curve(
    metrics: Iterable[dict[str, Any]], path: Path, *, title: str, threshold: float | None = None
) -> bool:
    """Draw the mean return of the last 100 episodes against steps as a PNG; False where there is none to draw.

    One point is no curve.
    """
    points = [(m["steps"], m["episode_return_mean"]) for m in metrics if m.get("episode_return_mean") is not None]
    if len(points) < 2:
        return False
    from matplotlib.figure import Figure  # takes half a second, and only here

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), color="#1f5fa8", linewidth=1.8, label="mean return, last 100 episodes")
    if threshold is not None:
        axes.axhline(threshold, color="#888888", linewidth=1, linestyle="--", label=f"solved: {threshold:g}")
    axes.set(title=title, xlabel="steps", ylabel="episode return")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    return True
