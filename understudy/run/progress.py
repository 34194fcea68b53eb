"""Live progress: a table of the last iterations on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

MAX_ROWS = 10  # iterations that the table shows
MAX_BARS = 40  # bars of the trend at most; even
BARS = "▁▂▃▄▅▆▇█"
Columns = tuple[tuple[str, str, str], ...]  # metric, heading, format; the first one after the counts is the trend's

COUNTS: Columns = (("steps", "steps", "{:,.0f}"), ("steps_per_second", "steps/s", "{:,.0f}"))
TIME_LEFT: Columns = (("seconds_left", "time left", "{}"),)
CONTROL: Columns = (
    ("episode_return_mean", "return", "{:.1f}"),
    ("episode_length_mean", "length", "{:.0f}"),
    ("explained_variance", "explained variance", "{:.2f}"),
    ("kl_old", "KL(old, new)", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("entropy_estimate", "entropy", "{:.3f}"),
)
LANGUAGE: Columns = (
    ("score_mean", "score", "{:.3f}"),
    ("gold_mean", "gold", "{:.3f}"),
    ("kl_reference", "KL(reference)", "{:.2f}"),
    ("length_mean", "length", "{:.1f}"),
    ("stopped", "ended", "{:.0%}"),
    ("finished_fraction", "ended", "{:.0%}"),
)
SUPERVISED: Columns = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.0%}"),
    ("evaluation_loss", "held-out loss", "{:.4f}"),
    ("evaluation_accuracy", "held-out accuracy", "{:.0%}"),
)


def columns_for(metrics: dict[str, Any]) -> Columns:
    """The columns that fit the recipe whose metrics these are."""
    kinds = (("episode_return_mean", CONTROL), ("score_mean", LANGUAGE))
    fitting = next((columns for name, columns in kinds if name in metrics), SUPERVISED)
    return *COUNTS, *fitting, *TIME_LEFT


class Trend:
    """A number over the whole run as a line of bars, each the mean of an equal share of the iterations."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.iterations_per_bar = 1  # iterations a bar
        self.pending: list[float] = []  # iterations of the next bar

    def add(self, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            return
        self.pending.append(value)
        if len(self.pending) == self.iterations_per_bar:
            self.means.append(sum(self.pending) / self.iterations_per_bar)
            self.pending.clear()
        if len(self.means) == MAX_BARS:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self.iterations_per_bar *= 2

    def __str__(self) -> str:
        low, high = min(self.means, default=0.0), max(self.means, default=0.0)
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(BARS[round((mean - low) * scale)] for mean in self.means)


class Progress:
    """Shows metrics as they come; `quiet` shows nothing. To be used in a `with` block."""

    def __init__(self, title: str, total_steps: int, *, quiet: bool = False, interval: float = 5.0) -> None:
        self.title, self.total_steps, self.quiet = title, total_steps, quiet
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal and not quiet else None
        self.interval = interval if self.live is None else 0.25
        self.last_drawn = 0.0
        self.lines: deque[dict[str, Any]] = deque(maxlen=MAX_ROWS)
        self.trend = Trend()

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            if self.lines:
                self.live.update(self._table(), refresh=True)
            self.live.__exit__(None, None, None)

    def show(self, metrics: dict[str, Any], *, force: bool = False) -> None:
        """Show an iteration: at most four times a second on a terminal, every `every` seconds as lines."""
        if not self.quiet:
            self._show(metrics, force)

    def _show(self, metrics: dict[str, Any], force: bool) -> None:
        self.lines.append(metrics)
        self.trend.add(metrics.get(columns_for(metrics)[len(COUNTS)][0]))
        if force or time.monotonic() - self.last_drawn >= self.interval:
            self.last_drawn = time.monotonic()
            if self.live is None:
                cells = (
                    f"{heading} {_format_value(metrics[name], format_spec)}"
                    for name, heading, format_spec in _present_columns(metrics)
                )
                self._write(f"{self.title}: " + "  ".join(cells))
            else:
                self.live.update(self._table(), refresh=True)

    def print_message(self, text: str) -> None:
        """A line of its own, above the display where there is one."""
        if self.quiet:
            return
        if self.live is None:
            self._write(f"understudy: {text}")
        else:
            self.console.print(f"understudy: {text}", markup=False, highlight=False, soft_wrap=True)

    def _write(self, line: str) -> None:
        try:
            print(line, file=sys.stderr, flush=True)
        except BrokenPipeError:  # nobody reads any longer; metrics.jsonl has everything
            self.quiet = True

    def _table(self) -> Table:
        newest = self.lines[-1]
        columns = _present_columns(newest)
        fraction_done = min(1.0, newest["steps"] / self.total_steps)
        table = Table(title=self.title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
        for _, heading, _ in columns:
            table.add_column(heading, justify="right")
        for metrics in self.lines:
            table.add_row(*(_format_value(metrics.get(name), format_spec) for name, _, format_spec in columns))
        bar = "█" * round(40 * fraction_done) + "░" * (40 - round(40 * fraction_done)) + f" {fraction_done:.0%}"
        table.caption = f"{bar}\n{columns[len(COUNTS)][1]} {self.trend}"
        return table


def _present_columns(metrics: dict[str, Any]) -> Columns:
    return tuple(column for column in columns_for(metrics) if column[0] in metrics)


def _format_value(value: Any, format_spec: str) -> str:
    if value is None or value != value:
        return "-"
    if format_spec == "{}":
        return f"{int(value) // 60}:{int(value) % 60:02d}"
    return format_spec.format(value)
