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

MAX_SECONDS, MAX_BYTES = 10.0, 2 * 2**30
"""What one piece of work may take; rendering a chat takes milliseconds and kilobytes."""


@contextmanager
def limit_resources() -> Iterator[None]:
    """Raise `TimeoutError` or `MemoryError` in a block that takes too long or too much.

    Only in the main thread, which alone hears signals, and on Linux; elsewhere nothing is bounded. A single operation of
    Python's own, such as a power with millions of digits, cannot be broken off.
    """
    if not _can_bound():
        yield
        return

    def raise_timeout(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {MAX_SECONDS:g} seconds")

    previous_handler = signal.signal(signal.SIGALRM, raise_timeout)
    previous_timer = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        with bounded_memory(MAX_BYTES):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *previous_timer)
        signal.signal(signal.SIGALRM, previous_handler or signal.SIG_DFL)


@contextmanager
def bounded_memory(max_bytes: int) -> Iterator[None]:
    """Raise `MemoryError` in a block that takes more than this many bytes, where `bounded` bounds anything."""
    if not _can_bound():
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + max_bytes if soft == resource.RLIM_INFINITY else min(used + max_bytes, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {max_bytes / 2**30:g} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _can_bound() -> bool:
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()
