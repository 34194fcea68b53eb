"""Ends from outside: signals that are taken away or not answered, generators left open, folders and seeds that move."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import understudy
from understudy.cli import main
from understudy.control import ppo
from understudy.run import checkpoint, interrupt
from understudy.run.interrupt import InterruptHandler

SMALL: dict[str, Any] = {
    "num_envs": 1,
    "num_steps_per_env": 8,
    "num_epochs": 1,
    "num_minibatches": 1,
    "hidden": (4,),
    "quiet": True,
}
HERE = "tests.faults.test_interrupt"
ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


class Walk(gymnasium.Env):
    """Episodes of five steps in a box."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps == 5, False, {}


class Hangs(Walk):
    """Hangs in Python code at the thirtieth step that this process makes, once it was told where to find the run."""

    made = 0

    def step(self, action):
        Hangs.made += 1
        if Hangs.made > 30:
            time.sleep(30)
        return super().step(action)


class Listens(Walk):
    """Takes SIGTERM for itself at every reset."""

    def reset(self, *, seed=None, options=None):
        signal.signal(signal.SIGTERM, lambda *_: None)
        return super().reset(seed=seed)


class Moves(Walk):
    """Changes the working directory when it is made and at every reset."""

    def __init__(self) -> None:
        os.chdir("/")

    def reset(self, *, seed=None, options=None):
        os.chdir("/tmp")
        return super().reset(seed=seed)


class Draws(Walk):
    """Its rewards come from the generators of NumPy and Python that belong to no one."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(np.random.normal() + random.random()), *rest


def config(env: str, out: Path | str | None, **fields) -> ppo.Config:
    return ppo.Config(**SMALL | {"env": f"{HERE}:{env}", "output_dir": str(out), "steps": 40} | fields)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDS)
def test_a_handler_that_an_environment_installs_is_replaced(number):
    with InterruptHandler(quiet=True) as stopping:
        signal.signal(number, lambda *_: None)
        assert not stopping.poll_signal()
        os.kill(os.getpid(), number)

        assert stopping.poll_signal()


@pytest.mark.parametrize("number", ENDS)
def test_an_iteration_that_does_not_end_after_a_signal_is_broken_off(number, monkeypatch, capsys):
    monkeypatch.setattr(interrupt, "GRACE_SECONDS", 0.05)
    began = time.monotonic()

    with pytest.raises(ENDS[number]), InterruptHandler(quiet=True):
        os.kill(os.getpid(), number)
        time.sleep(20)
    assert time.monotonic() - began < 10
    assert "is broken off" in capsys.readouterr().err


def test_an_iteration_may_take_thrice_the_longest_before_it_is_broken_off(monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE_SECONDS", 0.0)
    with InterruptHandler(quiet=True) as stopping:
        stopping.iteration_started -= 100.0  # an iteration of 100 s
        stopping.poll_signal()
        os.kill(os.getpid(), signal.SIGTERM)

        assert stopping.timer is not None and stopping.timer.interval == pytest.approx(300, abs=1)
    assert stopping.timer.finished.is_set()  # an iteration that ends in time ends the timer


def test_a_run_whose_environment_hangs_is_ended_by_one_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(Hangs, "made", 0)
    main_thread = threading.main_thread().ident or 0

    def signals() -> None:
        while Hangs.made <= 30:
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGTERM)

    threading.Thread(target=signals, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        ppo.train(config("Hangs", tmp_path / "run", steps=80, checkpoint_every=2))
    assert stop.value.code == 143
    assert len(checkpoint.list_checkpoints(tmp_path / "run/checkpoints")) > 0

    monkeypatch.setattr(Hangs, "made", -10_000)
    assert understudy.resume(tmp_path / "run").metrics[-1]["steps"] == 80


def test_a_run_whose_environment_takes_sigterm_for_itself_still_obeys_it(tmp_path):
    iterations = ppo.iterate(config("Listens", tmp_path / "run", steps=400))
    next(iterations)
    next(iterations)
    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        for _ in iterations:
            pass


LEFT_OPEN = """
import sys
from understudy.control import ppo
fields = dict(num_envs=2, num_steps_per_env=8, steps=64, quiet=True)
iterations = ppo.iterate(ppo.Config(env="CartPole-v1", output_dir=sys.argv[1], **fields))
next(iterations)
"""


def test_a_generator_left_open_at_the_interpreters_exit_is_saved_and_says_nothing(tmp_path):
    words = [sys.executable, "-c", LEFT_OPEN, str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert checkpoint.list_checkpoints(tmp_path / "run/checkpoints") == ["000001"]
    assert (tmp_path / "run/policy/policy.safetensors").is_file()
    assert understudy.resume(tmp_path / "run").metrics[-1]["steps"] == 64


@pytest.mark.parametrize("out", ["run", None])
def test_an_environment_that_changes_the_folder_does_not_move_the_run(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ppo.train(config("Walk", tmp_path / "first"))
    fields = {"init_from": "first", "evaluate_every": 2, "evaluate_episodes": 1, "checkpoint_every": 2}

    run = ppo.train(ppo.Config(**SMALL, env=f"{HERE}:Moves", output_dir=out, steps=40, **fields))

    assert run.path.parent == (tmp_path if out else tmp_path / "runs") and first.path == tmp_path / "first"
    assert {"config.json", "lineage.json", "metrics.jsonl", "policy", "checkpoints", "best"} <= set(
        os.listdir(run.path)
    )
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run.path.relative_to(tmp_path)), "--episodes", "1"]) == 0
    assert (run.path / "evaluation.json").is_file()


def test_a_run_that_is_gone_on_with_does_not_need_the_policy_it_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ppo.train(config("Walk", "first"))
    ppo.train(config("Walk", "run", init_from="first"))
    (tmp_path / "first").rename(tmp_path / "elsewhere")

    assert understudy.resume("run", steps=80).metrics[-1]["steps"] == 80


def test_a_seed_is_that_of_generators_that_belong_to_no_one_too(tmp_path):
    runs = [ppo.train(config("Draws", tmp_path / str(n), seed=seed)) for n, seed in enumerate((5, 5, 6))]

    returns = [[line["episode_return_mean"] for line in run.metrics] for run in runs]
    assert returns[0] == returns[1] != returns[2]
