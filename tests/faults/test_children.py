"""What environments and reward functions start ends with their trainer, also where that is killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_interrupt import Walk
from understudy.cli import main
from understudy.control import reinforce
from understudy.control.envs.parallel import ManagedAsyncVectorEnv
from understudy.language.rewards.worker import Worker
from understudy.run import children

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


class StartsTwo(Walk):
    """Starts a program and a fork when it is made, and notes their ids. It takes its time."""

    def __init__(self, note: str) -> None:
        program = subprocess.Popen(["sleep", "60"])
        fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        fork.start()
        with open(note, "a") as notes:
            notes.write(f"{program.pid} {fork.pid} ")

    def step(self, action):
        time.sleep(0.01)
        return super().step(action)


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
        ManagedAsyncVectorEnv([lambda: Starts(tmp_path / "note")])
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

    assert worker.call({"prompts": ["a"], "completions": ["b"]}) == [1.0]
    worker.close()


ENV = f"{__name__}:StartsTwo"


def command(note: Path, out: Path) -> None:
    flags = ["--env", ENV, "--env-options", json.dumps({"note": str(note)}), "--out", str(out), "--quiet"]
    main(["control", "reinforce", "--num-envs", "1", *flags])


def library(note: Path, out: Path) -> None:
    options = {"note": str(note)}
    reinforce.train(reinforce.Config(env=ENV, env_options=options, output_dir=str(out), quiet=True, num_envs=1))


@pytest.mark.parametrize(
    ("train", "number", "live"),
    [(command, signal.SIGKILL, False), (command, signal.SIGTERM, True), (library, signal.SIGKILL, True)],
)
def test_what_an_environment_starts_ends_where_the_command_is_killed(train, number, live, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "POLL_SECONDS", 0.05)
    note, out = tmp_path / "note", tmp_path / "run"
    trainer = os.fork()
    if trainer == 0:
        with contextlib.suppress(BaseException):
            train(note, out)
        os._exit(0)
    while is_running(trainer) and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.3)  # the guard has seen them
    os.kill(trainer, number)
    os.waitpid(trainer, 0)

    started = [int(process) for process in note.read_text().split()]
    try:
        time.sleep(0.3)
        assert len(started) >= 2
        assert [not ends(process) if not live else is_running(process) for process in started] == [live] * len(started)
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def test_what_ran_before_the_block_outlives_a_process_that_is_killed_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "POLL_SECONDS", 0.05)
    note = tmp_path / "note"
    trainer = os.fork()
    if trainer == 0:
        before = subprocess.Popen(["sleep", "60"])
        with children.end_descendants_if_killed():
            within = subprocess.Popen(["sleep", "60"])
            time.sleep(0.5)
            note.write_text(f"{before.pid} {within.pid}")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(trainer, 0)

    before, within = map(int, note.read_text().split())
    assert ends(within)
    assert is_running(before)
    os.kill(before, signal.SIGKILL)


def test_a_process_that_only_has_the_number_of_one_that_ended_is_not_killed():
    child = subprocess.Popen(["sleep", "60"])
    children._kill(child.pid, "0")
    assert is_running(child.pid)

    children._kill(child.pid, children._start_time(child.pid))
    assert child.wait() == -signal.SIGKILL
