"""Processes that end with the one that started them. The standard library alone: reward workers load this file by path."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys


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
    this = os.pidfd_open(os.getpid())
    if child := os.fork():
        os.waitpid(child, 0)
        os.close(this)
        return
    try:
        if os.fork() == 0:
            os.dup2(this, 0)
            os.closerange(1, 65_536)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            select.select([0], [], [])  # readable when the process has ended
            os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(0)
