"""Where metrics may also go: TensorBoard, Weights & Biases, trackio. Each an extra; metrics.jsonl is the truth."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

from understudy.run.config import RequestError


class Sink(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


def open_sinks(names: tuple[str, ...], path: Path, config: dict[str, Any]) -> list[Sink]:
    """A sink for each of "tensorboard", "wandb", "trackio".

    Raises:
        RequestError: its package is missing.
    """
    return [
        {"tensorboard": TensorBoard, "wandb": Tracker, "trackio": Tracker}[name](name, path, config) for name in names
    ]


class TensorBoard:
    """Scalars under RUN/tensorboard."""

    def __init__(self, name: str, path: Path, config: dict[str, Any]) -> None:
        self.writer = _module("torch.utils.tensorboard", name).SummaryWriter(path / "tensorboard")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """wandb and trackio, which share one interface."""

    def __init__(self, name: str, path: Path, config: dict[str, Any]) -> None:
        self.module = _module(name, name)
        self.module.init(project="understudy", name=path.name, config=config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        self.module.finish()


def _module(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(f"log has {name!r}, whose package is missing: pip install 'understudy[{name}]'") from error
