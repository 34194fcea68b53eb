"""Where metrics may also go: TensorBoard, Weights & Biases, trackio. Each an extra; metrics.jsonl is the truth."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from understudy.run.installation import require_package


class Tracker(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise `RequestError` for a sink whose package is missing."""
    for name in names:
        require_package(name, name, f"log has {name!r}")


def open_trackers(names: tuple[str, ...], path: Path, config: dict[str, Any]) -> list[Tracker]:
    """A sink for each of "tensorboard", "wandb", "trackio". One that fails, or cannot be reached, ends no run."""
    tracker_types = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker, "trackio": WandbTracker}
    return [FaultTolerantTracker(name, lambda name=name: tracker_types[name](name, path, config)) for name in names]


class FaultTolerantTracker:
    """A sink whose failures are said once, and then passed over: metrics.jsonl has everything.

    Args:
        make: opens it.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self.name, self.has_failed = name, False
        self.tracker: Tracker | None = None
        try:
            self.tracker = open_tracker()
        except Exception as error:  # whatever a tracker raises
            self._report_failure(error)

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.tracker is not None:
            try:
                self.tracker.log(metrics, step)
            except Exception as error:
                self._report_failure(error)

    def close(self) -> None:
        if self.tracker is not None:
            try:
                self.tracker.close()
            except Exception as error:
                self._report_failure(error)

    def _report_failure(self, error: Exception) -> None:
        if not self.has_failed:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(
                f"understudy: {self.name} fails ({message}); the run goes on, metrics.jsonl is whole", file=sys.stderr
            )
        self.has_failed = True


class TensorBoardTracker:
    """Scalars under RUN/tensorboard."""

    def __init__(self, name: str, path: Path, config: dict[str, Any]) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(path / "tensorboard")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """wandb and trackio, which share one interface."""

    def __init__(self, name: str, path: Path, config: dict[str, Any]) -> None:
        self.module = importlib.import_module(name)
        self.module.init(project="understudy", name=path.name, config=config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        self.module.finish()
