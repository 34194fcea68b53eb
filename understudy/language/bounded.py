"""A bound on time and memory around somebody else's short piece of work, such as a chat template."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if sys.platform == "linux":
    import resource

SECONDS, BYTES = 10.0, 2 * 2**30
"""What one piece of work may take; rendering a chat takes milliseconds and kilobytes."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise `TimeoutError` or `MemoryError` in a block that takes too long or too much.

    Only in the main thread, which alone hears signals, and on Linux; elsewhere nothing is bounded. A single operation of
    Python's own, such as a power with millions of digits, cannot be broken off.
    """
    if not _can_bound():
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    own = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with within_memory(BYTES):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *own)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


@contextmanager
def within_memory(most: int) -> Iterator[None]:
    """Raise `MemoryError` in a block that takes more than this many bytes, where `bounded` bounds anything."""
    if not _can_bound():
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + most if soft == resource.RLIM_INFINITY else min(used + most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {most / 2**30:g} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _can_bound() -> bool:
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()
