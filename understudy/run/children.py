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

POLL_SECONDS = 1.0
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


def end_group_with_process() -> None:
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

    pidfd = os.pidfd_open(os.getpid())
    _start_guard(end_group, pidfd)
    os.close(pidfd)


@contextlib.contextmanager
def end_descendants_if_killed() -> Generator[None]:
    """While in this block, have the processes that this one starts end when it is killed, or ends in any other disorder.

    A guard notes them, and what they start, once a second. Whoever leaves the block in order leaves them alone. Those that
    were there before are never ended. Without Linux's pidfd and lists of children in /proc, nothing is watched.
    """
    pid = os.getpid()
    clean_exit_fd = _start_descendant_guard(pid)
    try:
        yield
    finally:
        if clean_exit_fd is not None and os.getpid() == pid:  # not in a fork that leaves the block
            os.eventfd_write(clean_exit_fd, 1)
            os.close(clean_exit_fd)


def _start_descendant_guard(pid: int) -> int | None:
    """Start a guard of what this process starts: the file that tells it of an end in order, None where there is no guard."""
    if not (hasattr(os, "pidfd_open") and os.path.exists(f"/proc/{pid}/task/{pid}/children")):
        return None
    with contextlib.suppress(OSError):  # a system without pidfd, or one that starts no more processes
        existing, pidfd, clean_exit_fd = _descendants(pid), os.pidfd_open(pid), os.eventfd(0)
        _start_guard(lambda: _end_descendants(pid, existing), pidfd, clean_exit_fd)
        os.close(pidfd)
        return clean_exit_fd
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


def _end_descendants(pid: int, existing: dict[int, str]) -> None:
    """A guard's life. File 0 is readable when the process has ended, file 1 when it has said that it ends in order."""
    os.setsid()  # a signal to the process's group does not end its guard
    descendants: dict[int, str] = {}
    while not (ready := select.select([0, 1], [], [], POLL_SECONDS)[0]):
        current = _descendants(pid, existing)
        if 0 not in select.select([0], [], [], 0)[0]:  # else its children are no longer its own
            descendants = current
    if 1 not in ready:
        for child, start_time in descendants.items():
            _kill(child, start_time)


def _kill(pid: int, start_time: str) -> None:
    """Kill a process and what it has started, if it is still the one that started then."""
    with contextlib.suppress(OSError):  # it has ended
        pidfd = os.pidfd_open(pid)
        if _start_time(pid) == start_time:
            descendants = _descendants(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            for child, child_start_time in descendants.items():
                _kill(child, child_start_time)
        os.close(pidfd)


def _descendants(pid: int, exclude: dict[int, str] | None = None) -> dict[int, str]:
    """What a process has started, and what that has, each with the time of its start.

    Args:
        exclude: these, and what they have started, are left out.
    """
    descendants: dict[int, str] = {}
    for child in _children(pid):
        start_time = _start_time(child)
        if start_time and (exclude or {}).get(child) != start_time:
            descendants |= {child: start_time} | _descendants(child)
    return descendants


def _children(pid: int) -> list[int]:
    """What the threads of a process have started, and it has not yet waited for."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:  # it has ended
        return []
    return [int(child) for thread in threads for child in _read_proc(f"/proc/{pid}/task/{thread}/children").split()]


def _start_time(pid: int) -> str:
    """When a process was started, in the system's ticks; empty where it has ended."""
    return "".join(_read_proc(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20])


def _read_proc(file: str) -> str:
    """A file of /proc; empty where its process or thread has ended."""
    try:
        with open(file) as text:
            return text.read()
    except OSError:
        return ""
