"""What ends a run from outside: SIGINT and SIGTERM, and the end of the interpreter.

The first signal is obeyed when the iteration is whole and saved, a second SIGINT at once. An iteration that does not end,
because an environment or a reward function hangs in Python code, is broken off after a while; nothing can break off a call
into C code that hangs but the supervisor of a process of its own (`vectorization fault_tolerant`, reward functions of
a file).
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

GRACE_SECONDS, GRACE_ITERATIONS = 20.0, 3
"""After a signal an iteration may take this many seconds, or this many times the longest so far, before it is broken off."""
P = ParamSpec("P")
T = TypeVar("T")


class InterruptHandler:
    """Notes that the run is to end, while in its `with` block. Only the main thread hears signals.

    Attributes:
        signum: the signal that came, or None.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signum: int | None = None
        self.quiet = quiet
        self.previous_handlers: dict[int, Any] = {}
        self.longest_iteration, self.iteration_started = 0.0, time.monotonic()
        self.timer: threading.Timer | None = None
        self.is_overdue = False  # the iteration has not ended in time
        self.wakeup_pipe: tuple[int, int] | None = None  # a pipe that Python writes each signal to, whoever handles it

    def __enter__(self) -> InterruptHandler:
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }
            self._open_wakeup_pipe()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.wakeup_pipe is not None:
            signal.set_wakeup_fd(-1)
            for descriptor in self.wakeup_pipe:
                os.close(descriptor)
            self.wakeup_pipe = None

    def poll_signal(self) -> bool:
        """Whether a signal has come, also to a handler that an environment installed; asked once an iteration."""
        for number in self.previous_handlers:
            signal.signal(number, self._on_signal)
        arrived = self._read_signals()
        self.signum = self.signum or next((number for number in arrived if number in self.previous_handlers), None)
        now = time.monotonic()
        self.longest_iteration, self.iteration_started = max(self.longest_iteration, now - self.iteration_started), now
        return self.signum is not None

    def _open_wakeup_pipe(self) -> None:
        """Have each signal's number written to a pipe, unless an event loop does so already."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        if (previous_fd := signal.set_wakeup_fd(writer, warn_on_full_buffer=False)) == -1:
            self.wakeup_pipe = reader, writer
        else:
            signal.set_wakeup_fd(previous_fd)
            os.close(reader)
            os.close(writer)

    def _read_signals(self) -> bytes:
        """The numbers of the signals since the last time."""
        try:
            return b"" if self.wakeup_pipe is None else os.read(self.wakeup_pipe[0], 4096)
        except BlockingIOError:
            return b""

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.is_overdue:
            self.exit_by_signal()
        if self.signum is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is not None:
            return
        self.signum = number
        grace = max(GRACE_SECONDS, GRACE_ITERATIONS * self.longest_iteration)
        self.timer = threading.Timer(grace, self._abort_iteration, (grace,))
        self.timer.daemon = True
        self.timer.start()
        if not self.quiet:
            print("understudy: stopping after this iteration; press Ctrl-C again to stop at once", file=sys.stderr)

    def _abort_iteration(self, grace: float) -> None:
        """End an iteration that has not ended in time, from the timer's thread."""
        print(
            f"understudy: the iteration has not ended {grace:.0f} s after the signal and is broken off; "
            "the last checkpoint stays",
            file=sys.stderr,
        )
        self.is_overdue = True
        signal.pthread_kill(threading.main_thread().ident or 0, self.signum or signal.SIGTERM)

    def exit_by_signal(self) -> None:
        """End the run as the signal says, everything being saved: KeyboardInterrupt, or SystemExit(143)."""
        if self.signum == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt


if hasattr(os, "register_at_fork"):  # a signal to a fork is none to its parent
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

_open_generators: weakref.WeakKeyDictionary[Generator[Any], int] = weakref.WeakKeyDictionary()
"""Generators of runs, each with the process that it belongs to."""


def close_at_exit(function: Callable[P, Generator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """`contextmanager`, of a run that is closed before the interpreter is torn down where it was left open until then."""
    make_manager = contextmanager(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        manager = make_manager(*args, **kwargs)
        _open_generators[manager.gen] = os.getpid()
        return manager

    return wrapper


@atexit.register
def _close_open_generators() -> None:
    for generator, pid in list(_open_generators.items()):
        if pid == os.getpid():  # not in a fork of it
            try:
                generator.close()
            except Exception as error:
                print(f"understudy: a run that was left open could not be saved ({error})", file=sys.stderr)
