"""Processes that end with the one that started them. The standard library alone: reward workers load this file by path."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Generator

INTERVAL = 1.0
"""Seconds between two looks at which processes a command has started."""


def end_with_parent(parent: int | None = None) -> None:
    """Let the system end this process when its parent ends, also in the middle of a call; Linux does that.

    Args:
        parent: the process that must still be the parent; else it has ended already, and this one ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.name == "posix" and os.getppid() != parent:
        os._exit(1)


def end_group_with_this() -> None:
    """Have whatever this process starts end when it ends, however that comes: all that stays in its process group.

    A guard, which is nobody's child and holds none of our files, waits for the end of this process, and then ends the group.
    """
    if not hasattr(os, "pidfd_open"):
        return
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)

    def end_group() -> None:
        select.select([0], [], [])  # readable when the process has ended
        os.killpg(0, signal.SIGKILL)

    this = os.pidfd_open(os.getpid())
    _start_guard(end_group, this)
    os.close(this)


@contextlib.contextmanager
def end_descendants_if_killed() -> Generator[None]:
    """While in this block, have the processes that this one starts end when it is killed, or ends in any other disorder.

    A guard notes them, and what they start, once a second. Whoever leaves the block in order leaves them alone. Those that
    were there before are never ended. Without Linux's pidfd and lists of children in /proc, nothing is watched.
    """
    this = os.getpid()
    in_order = _guarded(this)
    try:
        yield
    finally:
        if in_order is not None and os.getpid() == this:  # not in a fork that leaves the block
            os.eventfd_write(in_order, 1)
            os.close(in_order)


def _guarded(this: int) -> int | None:
    """Start a guard of what this process starts: the file that tells it of an end in order, None where there is no guard."""
    if not (hasattr(os, "pidfd_open") and os.path.exists(f"/proc/{this}/task/{this}/children")):
        return None
    with contextlib.suppress(OSError):  # a system without pidfd, or one that starts no more processes
        before, ended, in_order = _descendants(this), os.pidfd_open(this), os.eventfd(0)
        _start_guard(lambda: _end_descendants(this, before), ended, in_order)
        os.close(ended)
        return in_order
    return None


def _start_guard(watch: Callable[[], None], *files: int) -> None:
    """Run `watch` in a process that is nobody's child, deaf to signals, with no open files but these, as 0, 1, ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12, where threads run: they do not in `watch`
        child = os.fork()
    if child:
        with contextlib.suppress(ChildProcessError):  # the system has reaped it, where SIGCHLD is ignored
            os.waitpid(child, 0)
        return
    try:
        if os.fork() == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.closerange(len(files), 65_536)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            watch()
    finally:
        os._exit(0)


def _end_descendants(process: int, before: dict[int, str]) -> None:
    """A guard's life. File 0 is readable when the process has ended, file 1 when it has said that it ends in order."""
    os.setsid()  # a signal to the process's group does not end its guard
    started: dict[int, str] = {}
    while not (ready := select.select([0, 1], [], [], INTERVAL)[0]):
        found = _descendants(process, before)
        if 0 not in select.select([0], [], [], 0)[0]:  # else its children are no longer its own
            started = found
    if 1 not in ready:
        for each, time in started.items():
            _kill(each, time)


def _kill(process: int, started: str) -> None:
    """Kill a process and what it has started, if it is still the one that started then."""
    with contextlib.suppress(OSError):  # it has ended
        handle = os.pidfd_open(process)
        if _started(process) == started:
            below = _descendants(process)
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            for each, time in below.items():
                _kill(each, time)
        os.close(handle)


def _descendants(process: int, but: dict[int, str] | None = None) -> dict[int, str]:
    """What a process has started, and what that has, each with the time of its start.

    Args:
        but: these, and what they have started, are left out.
    """
    found: dict[int, str] = {}
    for child in _children(process):
        time = _started(child)
        if time and (but or {}).get(child) != time:
            found |= {child: time} | _descendants(child)
    return found


def _children(process: int) -> list[int]:
    """What the threads of a process have started, and it has not yet waited for."""
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:  # it has ended
        return []
    return [int(child) for thread in threads for child in _read(f"/proc/{process}/task/{thread}/children").split()]


def _started(process: int) -> str:
    """When a process was started, in the system's ticks; empty where it has ended."""
    return "".join(_read(f"/proc/{process}/stat").rpartition(")")[2].split()[19:20])


def _read(file: str) -> str:
    """A file of /proc; empty where its process or thread has ended."""
    try:
        with open(file) as text:
            return text.read()
    except OSError:
        return ""
