"""What reliability costs: the share of a run's time that checkpoints take, and copies of the state before an update.

    python bench/checkpoint_cost.py

Default settings: `understudy control ppo --env CartPole-v1`, and every stage of `understudy rehearse`. Time that a run
spends writing checkpoints or waiting for the disk to have them, and inside the copy that `update` makes, over the seconds
from its first step until it is closed. Writes bench/results/checkpoint_cost.json, which docs/reliability.md shows.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from understudy import update as room
from understudy.cli import main
from understudy.control import training as control_stage
from understudy.language import training as language_stage
from understudy.run.store import Run

RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"


class Clock:
    """Seconds spent inside some functions, of which one may call another, and calls of the first of them."""

    def __init__(self, *functions: tuple[Any, str]) -> None:
        self.seconds, self.calls, self.depth = 0.0, 0, 0
        for number, (owner, name) in enumerate(functions):
            setattr(owner, name, self.wrap(getattr(owner, name), counts=number == 0))

    def wrap(self, own: Callable[..., Any], *, counts: bool) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            self.depth += 1
            try:
                return own(*args, **options)
            finally:
                self.depth -= 1
                self.calls += counts
                if not self.depth:
                    self.seconds += time.perf_counter() - began

        return call

    def take(self) -> tuple[float, int]:
        """What has come together since the last time."""
        found = self.seconds, self.calls
        self.seconds, self.calls = 0.0, 0
        return found


class Copies:
    """The module `copy` as `understudy.update` sees it, with a clock on `deepcopy`."""

    deepcopy = staticmethod(copy.deepcopy)


def measure() -> dict[str, dict[str, float]]:
    """By run: train seconds, and the seconds and shares of checkpoints and copies."""
    found: dict[str, dict[str, float]] = {}
    stages = [(stage.TrainingRun, "checkpoint") for stage in (control_stage, language_stage)]
    checkpoints, room.copy = Clock((Run, "checkpoint"), (Run, "wait_for_checkpoint"), *stages), Copies()
    copies = Clock((room.copy, "deepcopy"))
    log = Run.log

    def logged(self: Run, metrics: dict[str, Any]) -> None:
        log(self, metrics)
        last[self.path] = metrics | {"at": time.perf_counter()}

    last: dict[Path, dict[str, Any]] = {}
    Run.log = logged
    close = Run.close

    def closed(self: Run) -> None:
        close(self)
        (written, count), (copied, kept) = checkpoints.take(), copies.take()
        train = last[self.path]["seconds"] + time.perf_counter() - last[self.path]["at"]
        size = sum(file.stat().st_size for file in sorted((self.path / "checkpoints").iterdir())[-1].rglob("*"))
        found[self.path.name] = {
            "train_seconds": train,
            "iterations": last[self.path]["iteration"],
            "checkpoints": count,
            "checkpoint_bytes": size,
            "checkpoint_seconds": written,
            "checkpoint_share": written / train,
            "copies": kept,
            "copy_seconds": copied,
            "copy_share": copied / train,
        }
        print(self.path.name, json.dumps(found[self.path.name]), flush=True)

    Run.close = closed
    with tempfile.TemporaryDirectory() as folder:
        assert main(["control", "ppo", "--env", "CartPole-v1", "--quiet", "--out", f"{folder}/cartpole"]) == 0
        assert main(["rehearse", "--out", f"{folder}/rehearsal"]) == 0
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps({"runs": measure(), "machine": machine}, indent=2) + "\n")
