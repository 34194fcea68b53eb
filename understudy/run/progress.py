"""Live progress: a display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

# metric, heading, format
SHOWN = [
    ("steps", "steps", "{:,.0f}"),
    ("steps_per_second", "steps/s", "{:,.0f}"),
    ("episode_return_mean", "return (last 100)", "{:.1f}"),
    ("kl_old", "KL(old, new)", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("entropy_estimate", "entropy (estimate)", "{:.3f}"),
    ("explained_variance", "explained variance", "{:.2f}"),
    ("seconds_left", "time left", "{}"),
]


class Progress:
    """Shows metrics as they come; `quiet` shows nothing. To be used in a `with` block."""

    def __init__(self, title: str, total: int, *, quiet: bool = False, every: float = 5.0) -> None:
        self.title, self.total, self.quiet = title, total, quiet
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal and not quiet else None
        self.every = every if self.live is None else 0.125
        self.last = 0.0

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.__exit__(None, None, None)

    def show(self, metrics: dict[str, Any], *, now: bool = False) -> None:
        """Show an iteration: at most eight times a second on a terminal, every `every` seconds as lines."""
        if not self.quiet and (now or time.monotonic() - self.last >= self.every):
            self._draw(metrics)

    def say(self, text: str) -> None:
        """A line of its own, above the display where there is one."""
        if not self.quiet:
            self.console.print(f"understudy: {text}", markup=False, highlight=False, soft_wrap=True)

    def _draw(self, metrics: dict[str, Any]) -> None:
        self.last = time.monotonic()
        cells = [(heading, _text(metrics.get(name), form)) for name, heading, form in SHOWN if name in metrics]
        if self.live is None:
            print(
                f"{self.title}: " + "  ".join(f"{heading} {text}" for heading, text in cells),
                file=sys.stderr,
                flush=True,
            )
            return
        table = Table(title=self.title, title_justify="left")
        for heading, _ in cells:
            table.add_column(heading, justify="right")
        table.add_row(*(text for _, text in cells))
        done = min(1.0, metrics["steps"] / self.total)
        table.caption = "█" * round(40 * done) + "░" * (40 - round(40 * done)) + f" {done:.0%}"
        self.live.update(table, refresh=True)


def _text(value: Any, form: str) -> str:
    if value is None or value != value:
        return "-"
    if form == "{}":
        return f"{int(value) // 60}:{int(value) % 60:02d}"
    return form.format(value)
