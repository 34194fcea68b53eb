"""SIGINT and SIGTERM: the first is obeyed when the iteration is whole and saved, a second SIGINT at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Notes that the run is to end, while in its `with` block. Only the main thread hears signals.

    Attributes:
        signum: the signal that came, or None.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signum: int | None = None
        self.quiet = quiet
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.signum is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or number
        if not self.quiet:
            print("understudy: stopping after this iteration; press Ctrl-C again to stop at once", file=sys.stderr)

    def obey(self) -> None:
        """End the run as the signal says, everything being saved: KeyboardInterrupt, or SystemExit(143)."""
        if self.signum == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt
