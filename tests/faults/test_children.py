"""What environments and reward functions start ends with their trainer, also where that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_interrupt import Walk
from understudy.control.parallel import Async
from understudy.language.worker import Worker

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux 5.3")
REWARD = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path({note!r}).write_text(str(child.pid))
def score(prompts, completions):
    return [0.0] * len(prompts)
"""


class Starts(Walk):
    """Starts a process when it is made, and notes its id."""

    def __init__(self, note: Path) -> None:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        note.write_text(str(child.pid))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(process: int) -> bool:
    until = time.monotonic() + 10
    while is_running(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_running(process)


@pytest.mark.parametrize("killed", ["its worker", "its trainer"])
def test_what_a_reward_function_starts_ends_with(killed, tmp_path):
    note, file = tmp_path / "note", tmp_path / "reward.py"
    file.write_text(REWARD.format(note=str(note)))
    if killed == "its worker":
        worker = Worker(str(file), "score", timeout=60)
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        assert ends(int(note.read_text()))
        worker.close()
    else:
        trainer = os.fork()
        if trainer == 0:
            Worker(str(file), "score", timeout=60)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(trainer, 0)

    assert ends(int(note.read_text()))


def test_what_an_environment_in_a_process_of_its_own_starts_ends_with_the_trainer(tmp_path):
    trainer = os.fork()
    if trainer == 0:
        Async([lambda: Starts(tmp_path / "note")])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(trainer, 0)

    assert ends(int((tmp_path / "note").read_text()))


def test_a_worker_waits_for_no_child_that_is_not_its_own(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(
        "import os\ndef score(prompts, completions):\n    try:\n        os.wait()\n"
        "    except ChildProcessError:\n        return [1.0]\n    return [2.0]\n"
    )
    worker = Worker(str(file), "score", timeout=20)

    assert worker.ask({"prompts": ["a"], "completions": ["b"]}) == [1.0]
    worker.close()
