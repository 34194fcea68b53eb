"""metrics.jsonl, one JSON object an iteration: written and read line by line, so that memory does not grow with the run."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, overload

from understudy.run.checkpoint import CorruptFileError, require_regular_file, sync
from understudy.run.config import RequestError

FILE = "metrics.jsonl"
MAX_RECENT = 4096
"""Lines of a run that are kept in memory."""
BLOCK_BYTES = 2**16
"""Bytes that are read at a time from the end."""
MAX_LINE_BYTES = 2**20
"""Bytes of a line; a longer one is none of ours."""
MAX_COMPARED_LINES = 20
"""Lines that are kept of those that a resumed run writes anew, to compare the new ones with."""
CLOCK_METRICS = frozenset({"seconds", "steps_per_second", "seconds_left"})
"""Metrics that depend on the clock. All others come again when a run is resumed exactly."""


def combine(iterations: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each metric over the iterations of one line: what an evaluation found as it was last, all else on average.

    Iterations without a value (nan) are left out of the average, unless none has one.
    """
    found = {name: [x[name] for x in iterations if name in x] for name in dict.fromkeys(chain(*iterations))}
    return {name: x[-1] if name.startswith("evaluation_") else _mean_of_values(x) for name, x in found.items()}


def _mean_of_values(values: Sequence[float]) -> float:
    return statistics.fmean([x for x in values if not math.isnan(x)] or values)


class MetricsLine(NamedTuple):
    """A line of the file: its number from 1, its bytes (the last of them), and its metrics, None where it cannot be read."""

    number: int
    text: bytes
    metrics: dict[str, Any] | None


class Metrics(Sequence[dict[str, Any]]):
    """The lines of a run so far, as a sequence. The last `MAX_RECENT` are in memory, earlier ones are read from the file."""

    def __init__(self, run: Path) -> None:
        self.run, self.num_lines = run, 0
        self.recent: deque[dict[str, Any]] = deque(maxlen=MAX_RECENT)

    def append(self, line: dict[str, Any]) -> None:
        """Take in a line that was written to the file."""
        self.recent.append(line)
        self.num_lines += 1

    def __len__(self) -> int:
        return self.num_lines

    def __iter__(self) -> Iterator[dict[str, Any]]:
        recent = list(self.recent)
        if num_earlier := self.num_lines - len(recent):
            yield from islice(read_metrics(self.run), num_earlier)
        yield from recent

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        places = range(self.num_lines)[index]  # IndexError where there is none
        first = self.num_lines - len(self.recent)
        if isinstance(places, int):
            return self.recent[places - first] if places >= first else next(islice(self, places, None))
        if places and min(places[0], places[-1]) >= first:
            return [self.recent[place - first] for place in places]
        wanted = places if places.step > 0 else places[::-1]
        lines = list(islice(self, wanted.start, wanted.stop, wanted.step))
        return lines if places.step > 0 else lines[::-1]

    def __repr__(self) -> str:
        return f"Metrics of '{self.run}', {self.num_lines} lines"


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one at a time, none where it has none. Lines that cannot be read are left out.

    Raises:
        RequestError: metrics.jsonl is no plain file.
    """
    return (line.metrics for line in _read_lines(run) if line.metrics is not None)


def read_metrics_reversed(run: Path) -> Iterator[dict[str, Any]]:
    """The same from the last line to the first, so that the newest value of a metric is found in no time."""
    if (file := _metrics_file(run)) is None:
        return
    with file.open("rb") as lines:
        end, rest = lines.seek(0, os.SEEK_END), b""
        while end:
            start = max(0, end - BLOCK_BYTES)
            lines.seek(start)
            rest, *complete_lines = (lines.read(end - start) + rest).split(b"\n")
            rest, end = rest if len(rest) <= MAX_LINE_BYTES else b"", start
            yield from filter(None, map(_parse_line, reversed(complete_lines)))
        yield from filter(None, [_parse_line(rest)])


def last_steps(run: Path) -> int | None:
    """How many steps a run has learned from, by its last line; None where it has none."""
    return next(read_metrics_reversed(run), {}).get("steps")


def drop_metrics_after(run: Path, iteration: int) -> tuple[Metrics, list[int], Path | None, list[dict[str, Any]]]:
    """Drop the lines of a run's metrics.jsonl after an iteration.

    Damaged lines are dropped too, after the whole file was copied aside. An incomplete last line is no damage: a process
    that is killed leaves one.

    Returns:
        The lines that stay, the numbers of damaged lines, the copy, None where no line is damaged, and the first
        `COMPARED` of the lines that are dropped.
    """
    metrics, damaged, dropped = Metrics(run), [], []
    file, partial_file = run / FILE, run / f"{FILE}.part"
    partial_file.unlink(missing_ok=True)
    with partial_file.open("xb") as out:
        for line in _read_lines(run):
            if line.metrics is not None and line.metrics["iteration"] <= iteration:
                metrics.append(line.metrics)
                out.write(line.text if line.text.endswith(b"\n") else line.text + b"\n")
            elif line.metrics is not None:
                dropped += [line.metrics] if len(dropped) < MAX_COMPARED_LINES else []
            elif line.text.endswith(b"\n"):
                damaged.append(line.number)
    copy = _copy_damaged(file) if damaged else None
    sync(partial_file)
    os.replace(partial_file, file)
    return metrics, damaged, copy, dropped


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What two lines of the same iteration disagree about, as they are in the file: each metric's two values.

    Numbers of the environment's infos do not count, for they may be of a clock.
    """
    names = [name for name in {**before, **now} if name not in CLOCK_METRICS and not name.startswith("info_")]
    return {
        name: {"before": before.get(name), "now": now.get(name)} for name in names if before.get(name) != now.get(name)
    }


def _read_lines(run: Path) -> Iterator[MetricsLine]:
    if (file := _metrics_file(run)) is None:
        return
    with file.open("rb") as lines:
        number = 0
        while text := lines.readline(MAX_LINE_BYTES):
            number, metrics = number + 1, _parse_line(text)
            while len(text) == MAX_LINE_BYTES and not text.endswith(b"\n"):  # the rest of a line that is too long
                text = lines.readline(MAX_LINE_BYTES)
            yield MetricsLine(number, text, metrics)


def _metrics_file(run: Path) -> Path | None:
    """A run's metrics.jsonl, None where it has none."""
    file = run / FILE
    if not file.exists():
        return None
    try:
        require_regular_file(file)
    except CorruptFileError as error:
        raise RequestError(f"run is '{run}', and {error}: give the directory of a run") from error
    return file


def _parse_line(text: bytes) -> dict[str, Any] | None:
    try:
        metrics = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return metrics if isinstance(metrics, dict) and type(metrics.get("iteration")) is int else None


def _copy_damaged(file: Path) -> Path:
    """Copy a damaged file to the next free name beside it."""
    number = 1
    while (copy := file.with_name(f"metrics-damaged-{number}.jsonl")).exists():
        number += 1
    shutil.copyfile(file, copy)
    sync(copy)
    return copy
