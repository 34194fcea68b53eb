"""What ends a run from outside: SIGINT and SIGTERM, and the end of the interpreter.

The first signal is obeyed when the iteration is whole and saved, a second SIGINT at once. An iteration that does not end,
because an environment or a reward function hangs in Python code, is broken off after a while; nothing can break off a call
into C code that hangs but the supervisor of a process of its own (`vectorization supervised`, reward functions of a file).
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

GRACE, ITERATIONS = 20.0, 3
"""After a signal an iteration may take this many seconds, or this many times the longest so far, before it is broken off."""
P = ParamSpec("P")
T = TypeVar("T")


class Interrupt:
    """Notes that the run is to end, while in its `with` block. Only the main thread hears signals.

    Attributes:
        signum: the signal that came, or None.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signum: int | None = None
        self.quiet = quiet
        self.before: dict[int, Any] = {}
        self.longest, self.began = 0.0, time.monotonic()
        self.timer: threading.Timer | None = None
        self.late = False  # the iteration has not ended in time
        self.wakeup: tuple[int, int] | None = None  # a pipe that Python writes each signal to, whoever handles it

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
            self._wake_up()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.wakeup is not None:
            signal.set_wakeup_fd(-1)
            for descriptor in self.wakeup:
                os.close(descriptor)
            self.wakeup = None

    def heard(self) -> bool:
        """Whether a signal has come, also to a handler that an environment installed; asked once an iteration."""
        for number in self.before:
            signal.signal(number, self._hear)
        came = self._arrived()
        self.signum = self.signum or next((number for number in came if number in self.before), None)
        now = time.monotonic()
        self.longest, self.began = max(self.longest, now - self.began), now
        return self.signum is not None

    def _wake_up(self) -> None:
        """Have each signal's number written to a pipe, unless an event loop does so already."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        if (other := signal.set_wakeup_fd(writer, warn_on_full_buffer=False)) == -1:
            self.wakeup = reader, writer
        else:
            signal.set_wakeup_fd(other)
            os.close(reader)
            os.close(writer)

    def _arrived(self) -> bytes:
        """The numbers of the signals since the last time."""
        try:
            return b"" if self.wakeup is None else os.read(self.wakeup[0], 4096)
        except BlockingIOError:
            return b""

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.late:
            self.obey()
        if self.signum is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is not None:
            return
        self.signum = number
        grace = max(GRACE, ITERATIONS * self.longest)
        self.timer = threading.Timer(grace, self._break_off, (grace,))
        self.timer.daemon = True
        self.timer.start()
        if not self.quiet:
            print("understudy: stopping after this iteration; press Ctrl-C again to stop at once", file=sys.stderr)

    def _break_off(self, grace: float) -> None:
        """End an iteration that has not ended in time, from the timer's thread."""
        print(
            f"understudy: the iteration has not ended {grace:.0f} s after the signal and is broken off; "
            "the last checkpoint stays",
            file=sys.stderr,
        )
        self.late = True
        signal.pthread_kill(threading.main_thread().ident or 0, self.signum or signal.SIGTERM)

    def obey(self) -> None:
        """End the run as the signal says, everything being saved: KeyboardInterrupt, or SystemExit(143)."""
        if self.signum == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt


if hasattr(os, "register_at_fork"):  # a signal to a fork is none to its parent
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

_open: weakref.WeakKeyDictionary[Generator[Any], int] = weakref.WeakKeyDictionary()
"""Generators of runs, each with the process that it belongs to."""


def closed_at_exit(function: Callable[P, Generator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """`contextmanager`, of a run that is closed before the interpreter is torn down where it was left open until then."""
    make = contextmanager(function)

    @functools.wraps(function)
    def opened(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        manager = make(*args, **kwargs)
        _open[manager.gen] = os.getpid()
        return manager

    return opened


@atexit.register
def _close_open() -> None:
    for generator, process in list(_open.items()):
        if process == os.getpid():  # not in a fork of it
            try:
                generator.close()
            except Exception as error:
                print(f"understudy: a run that was left open could not be saved ({error})", file=sys.stderr)
