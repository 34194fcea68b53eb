"""Small environments unlike our own: each is a situation that users of other libraries have met and reported."""

import json
import socket

import gymnasium as gym
import numpy as np
from gymnasium import spaces


def notices(run) -> list[str]:
    """What a run said to its user before its first step."""
    events = run.path / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    return [event["text"] for event in map(json.loads, lines) if event["kind"] == "notice"]


class TenSteps(gym.Env):
    """Ten-step episodes; three random numbers are seen; action 1 pays 1."""

    length = 10

    def __init__(self, actions=2):
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = spaces.Discrete(actions)

    def observe(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def reward(self, action):
        return float(action == 1)

    def info(self, action):
        return {}

    def step(self, action):
        self.t += 1
        return self.observe(), self.reward(action), False, self.t >= self.length, self.info(action)


class Seen(TenSteps):
    """What is seen is one of three; that one is to be named."""

    def __init__(self):
        super().__init__(actions=3)
        self.observation_space = spaces.Discrete(3)

    def observe(self):
        self.seen = int(self.np_random.integers(3))
        return self.seen

    def step(self, action):
        right = float(action == self.seen)
        obs, _, terminated, truncated, info = super().step(action)
        return obs, right, terminated, truncated, info


class CostIntOrFloat(TenSteps):
    """A constraint cost that is the int 0 or the float 0.5, as `cost = 0; if ...: cost += 0.5` gives."""

    length = 20

    def info(self, action):
        cost = 0
        if action == 1:
            cost += 0.5
        return {"cost": cost}


class InfoOfChangingShape(TenSteps):
    """An info entry whose shape differs from step to step and from copy to copy."""

    def info(self, action):
        return {"path": np.zeros(1 + int(self.np_random.integers(3)), np.float32)}


class InfoSometimesNone(TenSteps):
    """An info entry that is None at some steps and a number at others."""

    def info(self, action):
        return {"target": None if self.np_random.random() < 0.5 else 3}


class LooksLikeCartPole(TenSteps):
    """CartPole's spaces, but every step pays -5 and episodes have four steps. For use beside env='CartPole-v1'."""

    length = 4

    def __init__(self):
        super().__init__()
        self.observation_space = gym.make("CartPole-v1").observation_space

    def observe(self):
        return np.zeros(4, np.float32)

    def reward(self, action):
        return -5.0


class OneInstance(TenSteps):
    """A simulator that binds a port: one at a time on a machine."""

    def __init__(self, port=47613):
        super().__init__()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", port))
        self.socket.listen()

    def close(self):
        self.socket.close()


class NeverEnds(gym.Env):
    """No termination and no time limit, as process-control simulators have it."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2)
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x = 0.9 * self.x + 0.1 * np.asarray(action)
        return self.x.astype(np.float32), -float((self.x**2).sum()), False, False, {}


class Curriculum(TenSteps):
    """Becomes harder with the episodes played in this object; the level is what is seen."""

    def __init__(self):
        super().__init__()
        self.level = 0

    def observe(self):
        return np.array([self.level / 1000, 0, 0], np.float32)

    def reset(self, *, seed=None, options=None):
        self.level += 1
        return super().reset(seed=seed, options=options)


class Board(gym.Env):
    """A 6 x 7 uint8 board with values 0..2 and one piece; the action names its column. One step; chance is 1/7."""

    def __init__(self):
        self.observation_space = spaces.Box(0, 2, (6, 7), np.uint8)
        self.action_space = spaces.Discrete(7)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.board = np.zeros((6, 7), np.uint8)
        self.column = int(self.np_random.integers(7))
        self.board[self.np_random.integers(6), self.column] = self.np_random.integers(1, 3)
        return self.board.copy(), {}

    def step(self, action):
        return self.board.copy(), float(action == self.column), True, False, {}


class UnixClock(gym.Env):
    """A float64 time stamp is seen; the action says whether it lies in the first half of its minute. 20 steps."""

    def __init__(self, offset=1.7e9):
        self.offset = offset
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = spaces.Discrete(2)

    def observe(self):
        self.second = self.np_random.uniform(-30, 30)
        return np.array([self.offset + self.second])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        reward = float(action == (self.second > 0))
        self.t += 1
        return self.observe(), reward, False, self.t >= 20, {}


class OnTheBound(TenSteps):
    """float64 observations equal to bounds that the space holds as float32."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(0.1, 0.9, (1,), np.float32)

    def observe(self):
        return np.array([self.np_random.choice([0.1, 0.9])])


class OutsideItsSpace(TenSteps):
    """A third-party environment whose observations exceed what it declares."""

    def observe(self):
        return np.full(3, 1.2, np.float32)


class WideAction(gym.Env):
    """Heater power between low and high; the middle is right. One step an episode."""

    def __init__(self, low=0.0, high=1000.0):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Box(low, high, (1,), np.float32)
        self.low, self.high = low, high

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        error = abs(float(action[0]) - (self.low + self.high) / 2) / (self.high - self.low)
        return np.zeros(1, np.float32), -error, True, False, {}


class MaskInObservation(gym.Env):
    """Four actions, one allowed a step; a forbidden one raises. The mask is a key of the observation."""

    def __init__(self):
        self.observation_space = spaces.Dict(
            action_mask=spaces.Box(0, 1, (4,), np.int8), x=spaces.Box(0, 1, (4,), np.float32)
        )
        self.action_space = spaces.Discrete(4)

    def observe(self):
        self.allowed = np.zeros(4, np.int8)
        self.allowed[self.np_random.integers(4)] = 1
        return {"action_mask": self.allowed.copy(), "x": self.np_random.random(4).astype(np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert self.allowed[action], "forbidden action"
        self.t += 1
        return self.observe(), 1.0, False, self.t >= 10, {}


class MaskByMethod(MaskInObservation):
    """The same, with the mask given by a method `action_masks()`, as in sb3-contrib; a forbidden action pays -1."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(0, 1, (4,), np.float32)

    def observe(self):
        return super().observe()["x"]

    def action_masks(self):
        return self.allowed.astype(bool)

    def step(self, action):
        reward = 1.0 if self.allowed[action] else -1.0
        self.t += 1
        return self.observe(), reward, False, self.t >= 10, {}


class KeyNamedObs(TenSteps):
    """A Dict observation whose only key is 'obs'."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict({"obs": spaces.Box(-1, 1, (3,), np.float32)})

    def observe(self):
        return {"obs": super().observe()}


class CannotBeSeeded(TenSteps):
    """A simulator that raises when it is given a seed."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            raise NotImplementedError("this simulator cannot be seeded")
        return super().reset(seed=None)


gym.register("foreign/TenSteps-v0", entry_point="tests.foreign_envs:TenSteps")
