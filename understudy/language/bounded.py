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
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + BYTES if soft == resource.RLIM_INFINITY else min(used + BYTES, soft)
    before = signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    own = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {BYTES / 2**30:g} GiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, *own)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
