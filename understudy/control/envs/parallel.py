"""Environments in processes of their own, through Gymnasium's `AsyncVectorEnv`, closed within a moment whatever happened."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import Any

from gymnasium.vector import AsyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState, _async_worker

from understudy.control.envs.infos import ExactInfos
from understudy.run.children import end_group_with_process, end_with_parent

CLOSE_SECONDS = 5.0
"""How long all environments together may take to close; then they are ended."""

DEATH_SECONDS = 0.2
"""How long a process that has let go of its pipe may take to end."""


class ManagedAsyncVectorEnv(ExactInfos, AsyncVectorEnv):
    """Gymnasium's `AsyncVectorEnv` with exact infos; its processes end with the trainer, and signals are the trainer's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, worker=run_worker, **kwargs)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Let the environments close within `CLOSE_SECONDS`, and end those that do not; all, where a call is unanswered."""
        is_orderly = self._state is AsyncState.DEFAULT and not terminate
        pipes = [pipe for pipe in self.parent_pipes if pipe is not None and not pipe.closed]
        for pipe in pipes if is_orderly else ():
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        deadline = time.monotonic() + (CLOSE_SECONDS if is_orderly else 0)
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def run_worker(*args: Any) -> None:
    """A worker's life. The trainer answers Ctrl-C, which a terminal sends to the workers too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    end_group_with_process()
    _async_worker(*args)


def describe_dead_worker(envs: VectorEnv) -> str:
    """Which copy's process has ended, and what to do, where a vector env of processes has lost one; else ""."""
    processes = envs.unwrapped.processes if isinstance(envs.unwrapped, AsyncVectorEnv) else []
    for copy, process in enumerate(processes):
        process.join(DEATH_SECONDS)
        if process.exitcode is not None:
            return (
                f"the process of copy {copy} has ended (exit code {process.exitcode}): fix what ends it, or set "
                "vectorization to fault_tolerant, which starts such a copy again"
            )
    return ""
