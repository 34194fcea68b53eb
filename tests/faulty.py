"""Environments that hang, crash, raise or break their word, at a step that is known."""

import ctypes
import os
import signal
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces

AT = 5  # the step that fails: the fifth
BAD = 1  # the seed of the episode that fails, and in a vector env of seeds 0, 1, 2 its row


def stop(env):
    os.kill(os.getpid(), signal.SIGSTOP)


def hit(number, env):
    os.kill(os.getpid(), number)


def fly(env):
    ctypes.string_at(0)  # a segmentation fault


def hang(env):
    time.sleep(10_000)


def fail(env):
    raise RuntimeError("the simulator\nwent away")


def returns(**wrong):
    """What a step returns instead."""
    return lambda env: wrong


class Faulty(gymnasium.Env):
    """obs is [seed, steps], reward the steps, 7 of them an episode; that of the seed BAD goes wrong at its fifth step."""

    observation_space: spaces.Space = spaces.Box(0, 2**31, (2,), np.float64)
    action_space: spaces.Space = spaces.Discrete(3)
    render_mode = "ansi"

    def __init__(self, fault=None, when="step", closed=None):
        self.fault, self.when, self.closed = fault, when, closed
        self.seed, self.count = 0, 0

    def reset(self, *, seed=None, options=None):
        self.seed, self.count = self.seed + 100 if seed is None else seed, 0
        if self.when == "reset" and self.seed == BAD and self.fault:
            return self.fault(self)["obs"], {}
        return self.obs(), {}

    def step(self, action):
        self.count += 1
        wrong = {}
        if self.when == "step" and self.seed == BAD and self.count == AT and self.fault:
            wrong = self.fault(self)
        given = {"obs": self.obs(), "reward": float(self.count), "terminated": self.count == 7, "truncated": False}
        given = given | {"info": {"count": self.count}} | wrong
        return tuple(given.values())[: 3 if "short" in wrong else 5]

    def obs(self):
        return np.array([self.seed, self.count], dtype=np.float64)

    def render(self):
        return f"{self.seed}/{self.count}"

    def pid(self):
        return os.getpid()

    def close(self):
        if self.closed is not None:
            Path(self.closed).write_text("closed")


class Often(Faulty):
    """Goes wrong at step `seed % 4 + 1` of every episode whose seed is even; the first episode of row 0 at its first."""

    def step(self, action):
        if self.seed % 2 == 0 and self.count == self.seed % 4:
            raise RuntimeError("again")
        return super().step(action)


class Wild(Faulty):
    """Every fourth episode or so goes wrong at its third step, in a way that follows from its seed."""

    kinds = (fail, partial(hit, signal.SIGKILL), returns(obs=np.array([np.nan, 0])), returns(reward=np.inf))

    def __init__(self, calm=False):
        super().__init__()
        self.calm = calm

    def step(self, action):
        wrong = self.seed % 4 == 0 and self.count == 2 and not self.calm
        answer = dict(enumerate(super().step(action)))
        for name, value in (self.kinds[self.seed // 4 % 4](self) if wrong else {}).items():
            answer[("obs", "reward").index(name)] = value
        return tuple(answer.values())


class WearsOut(Faulty):
    """Good for 60 steps in all, over all its copies; then nothing but faults."""

    def __init__(self, file):
        super().__init__()
        self.file = Path(file)

    def step(self, action):
        with self.file.open("a") as file:
            file.write(".")
        if self.file.stat().st_size > 60:
            raise RuntimeError("worn out")
        return super().step(action)


class HangsOnce(Faulty):
    """At its fifth step, if no copy of it has before."""

    def __init__(self, file):
        super().__init__()
        self.file = Path(file)

    def step(self, action):
        if self.count == AT - 1 and not self.file.exists():
            self.file.touch()
            hang(self)
        return super().step(action)


class HangsAtOnce(Faulty):
    def step(self, action):
        return hang(self)
