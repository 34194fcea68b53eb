"""A run's directory: config.json, metrics.jsonl, events.jsonl, checkpoints, policy. JSON and safetensors, no pickle."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from understudy.run.config import RequestError

_IMPORTED = time.monotonic()


class Run:
    """One run on disk, and what it has come to so far.

    Attributes:
        path: its directory.  metrics: one dict an iteration, as in metrics.jsonl.
        solved_at: {"steps", "seconds"} of the first time the last-100 mean reached the env's threshold, or None.
        startup_seconds: from process start to the first step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics: list[dict[str, Any]] = []
        self.solved_at: dict[str, float] | None = None
        self.startup_seconds = 0.0

    @classmethod
    def create(cls, out: str | None, name: str, config: dict[str, Any]) -> Run:
        """Make the directory and write config.json. An existing run is never written over.

        Raises:
            RequestError: `out` holds a run already, or cannot be made.
        """
        path = Path(out) if out else _free(Path("runs"), name)
        if (path / "config.json").exists():
            raise RequestError(
                f"out is '{path}', which holds a run already: choose another directory, or remove that one"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"out is '{path}', which cannot be made ({error.strerror}): choose another") from error
        write_json(path / "config.json", config)
        return cls(path)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append an iteration to metrics.jsonl; on disk when this returns, but for the system's own cache."""
        self.metrics.append(metrics)
        self._append("metrics.jsonl", metrics)

    def event(self, kind: str, **about: Any) -> None:
        """Append a finding or happening to events.jsonl."""
        self._append("events.jsonl", {"kind": kind, "time": time.time(), **about})

    def checkpoint(self, name: str, policy: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Write policy, optimizer and state under checkpoints/NAME: aside first, then renamed."""
        final, aside = self.path / "checkpoints" / name, self.path / "checkpoints" / f".{name}.part"
        policy.save(aside)
        tensors, rest = _flatten_optimizer(optimizer)
        save_file(tensors, aside / "optimizer.safetensors")
        write_json(aside / "state.json", state | {"optimizer": rest})
        if final.exists():
            raise FileExistsError(f"{final} exists already")
        os.replace(aside, final)
        return final

    def _append(self, name: str, line: dict[str, Any]) -> None:
        finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        with (self.path / name).open("a") as file:
            file.write(json.dumps(finite) + "\n")


def process_seconds() -> float:
    """Since this process started, imports and all (from /proc where there is one; else since this module was imported)."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a half-written last line is passed over."""
    for line in (path / "metrics.jsonl").read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        RequestError: there is none, or it is not JSON.
    """
    try:
        return json.loads((run / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RequestError(
            f"run is '{run}', which holds no readable config.json: give the directory of a run"
        ) from error


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
    """Put back what `Run.checkpoint` wrote of an optimizer."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def write_json(path: Path, data: Any) -> None:
    """Write aside, then rename: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(plain(data), indent=2) + "\n")
    os.replace(aside, path)


def plain(data: Any) -> Any:
    """The same with what JSON cannot hold mended: a float that is not finite is null, a path is its text."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return str(data) if isinstance(data, Path) else data


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": x.contiguous() for i, entry in state["state"].items() for key, x in entry.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _free(parent: Path, name: str) -> Path:
    """parent/name-1, or the next number that is free."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
