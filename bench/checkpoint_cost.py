"""What reliability costs: the share of a run's time that checkpoints take, and copies of the state before an update.

    python bench/checkpoint_cost.py

Default settings: `understudy control ppo --env CartPole-v1`, and every stage of `understudy rehearse`. Time inside
`Run.checkpoint`, and inside the copy that `update` makes, over the seconds from a run's first step to its last line of
metrics plus its final checkpoint. Writes bench/results/checkpoint_cost.json, which docs/reliability.md shows.
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
from understudy.run.store import Run

RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"


class Clock:
    """Seconds and calls spent inside a function."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, self.calls = 0.0, 0
        self.owner, self.name, self.own = owner, name, getattr(owner, name)
        setattr(owner, name, self.wrap(self.own))

    def wrap(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return own(*args, **options)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

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
    checkpoints, room.copy = Clock(Run, "checkpoint"), Copies()
    copies = Clock(room.copy, "deepcopy")
    log = Run.log

    def logged(run: Run, metrics: dict[str, Any]) -> None:
        log(run, metrics)
        last[run.path] = metrics

    last: dict[Path, dict[str, Any]] = {}
    Run.log = logged
    close = Run.close

    def closed(run: Run) -> None:
        close(run)
        (written, count), (copied, kept) = checkpoints.take(), copies.take()
        train = last[run.path]["seconds"]
        size = sum(file.stat().st_size for file in sorted((run.path / "checkpoints").iterdir())[-1].rglob("*"))
        found[run.path.name] = {
            "train_seconds": train,
            "iterations": last[run.path]["iteration"],
            "checkpoints": count,
            "checkpoint_bytes": size,
            "checkpoint_seconds": written,
            "checkpoint_share": written / train,
            "copies": kept,
            "copy_seconds": copied,
            "copy_share": copied / train,
        }
        print(run.path.name, json.dumps(found[run.path.name]), flush=True)

    Run.close = closed
    with tempfile.TemporaryDirectory() as folder:
        assert main(["control", "ppo", "--env", "CartPole-v1", "--quiet", "--out", f"{folder}/cartpole"]) == 0
        assert main(["rehearse", "--out", f"{folder}/rehearsal"]) == 0
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps({"runs": measure(), "machine": machine}, indent=2) + "\n")
