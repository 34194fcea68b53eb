"""One writer a run: a lock on a file in its directory, which ends with the process that holds it."""

from __future__ import annotations

import os
from pathlib import Path

from understudy.run.config import RequestError

try:
    import fcntl
except ImportError:  # Windows: two writers of one run are then not told apart
    fcntl = None

_handles: set[int] = set()
"""Of the locks that this process holds."""


def acquire(path: Path) -> int | None:
    """Lock a run's directory; the handle to `release`, None on a system without locks.

    The lock belongs to the open file, not to the process: a second run in this process is refused too, and the lock does
    not end when somebody else here reads the file. Forks do not hold it.

    Raises:
        RequestError: the run is open in another process, or in this one.
    """
    if fcntl is None:
        return None
    handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if not isinstance(error, BlockingIOError):  # a file system without locks: nothing tells writers apart there
            return None
        raise RequestError(
            f"output_dir is '{path}', which is open in another process or in an unfinished run of this one: "
            "wait for it, close its generator, or choose another directory"
        ) from error
    _handles.add(handle)
    return handle


def release(handle: int) -> None:
    """Let another writer have the run. A fork has nothing to release."""
    if handle in _handles:
        _handles.remove(handle)
        os.close(handle)


def _release_all() -> None:
    """Close a fork's copies of the handles, or it would hold the locks after its parent has ended."""
    for handle in list(_handles):
        release(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)
