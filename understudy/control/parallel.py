"""Environments in processes of their own, through Gymnasium's `AsyncVectorEnv`, closed within a moment whatever happened."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState, _async_worker

from understudy.control.infos import ExactInfos


class Async(ExactInfos, AsyncVectorEnv):
    """Gymnasium's `AsyncVectorEnv` with exact infos; its processes end with the trainer, and signals are the trainer's."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, worker=work, **named)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Close the environments; end them where an exception left a call unanswered."""
        if self._state is AsyncState.DEFAULT and not terminate and all(pipe is not None for pipe in self.parent_pipes):
            super().close_extras(timeout, terminate)
            return
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()


def work(*args: Any) -> None:
    """A worker's life. The trainer answers Ctrl-C, which a terminal sends to the workers too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    _async_worker(*args)


def end_with_parent() -> None:
    """Let the system end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
