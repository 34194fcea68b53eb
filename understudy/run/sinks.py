"""Where metrics may also go: TensorBoard, Weights & Biases, trackio. Each an extra; metrics.jsonl is the truth."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from understudy.run.installation import need_package


class Sink(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


def check_sinks(names: tuple[str, ...]) -> None:
    """Raise `RequestError` for a sink whose package is missing."""
    for name in names:
        need_package(name, name, f"log has {name!r}")


def open_sinks(names: tuple[str, ...], path: Path, config: dict[str, Any]) -> list[Sink]:
    """A sink for each of "tensorboard", "wandb", "trackio". One that fails, or cannot be reached, ends no run."""
    kinds = {"tensorboard": TensorBoard, "wandb": Tracker, "trackio": Tracker}
    return [Steady(name, lambda name=name: kinds[name](name, path, config)) for name in names]


class Steady:
    """A sink whose failures are said once, and then passed over: metrics.jsonl has everything.

    Args:
        make: opens it.
    """

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self.name, self.failed = name, False
        self.sink: Sink | None = None
        try:
            self.sink = make()
        except Exception as error:  # whatever a tracker raises
            self._say(error)

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.sink is not None:
            try:
                self.sink.log(metrics, step)
            except Exception as error:
                self._say(error)

    def close(self) -> None:
        if self.sink is not None:
            try:
                self.sink.close()
            except Exception as error:
                self._say(error)

    def _say(self, error: Exception) -> None:
        if not self.failed:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"understudy: {self.name} fails ({said}); the run goes on, metrics.jsonl is whole", file=sys.stderr)
        self.failed = True


class TensorBoard:
    """Scalars under RUN/tensorboard."""

    def __init__(self, name: str, path: Path, config: dict[str, Any]) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(path / "tensorboard")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """wandb and trackio, which share one interface."""

    def __init__(self, name: str, path: Path, config: dict[str, Any]) -> None:
        self.module = importlib.import_module(name)
        self.module.init(project="understudy", name=path.name, config=config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        self.module.finish()
