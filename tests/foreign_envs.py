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


INF = np.inf
SEES = {  # what shows one of three things: a space, and (thing, random numbers) -> an observation
    "float32": (spaces.Box(-1, 1, (4,)), lambda k, r: np.append(one_hot(k), r.uniform(-1, 1)).astype(np.float32)),
    "float16": (spaces.Box(-1, 1, (3,), np.float16), lambda k, r: one_hot(k).astype(np.float16)),
    "float64 far from 0": (spaces.Box(-INF, INF, (2,), np.float64), lambda k, r: 1e9 + np.array([k, r.uniform(0, 2)])),
    "int64 far from 0": (spaces.Box(0, 2**60, (1,), np.int64), lambda k, r: np.array([10**12 + 7 * k])),
    "int8 board": (spaces.Box(-1, 1, (3, 3), np.int8), lambda k, r: np.roll(np.diag([1, 0, -1]), k, 0).astype(np.int8)),
    "uint8 board": (spaces.Box(0, 2, (3, 3), np.uint8), lambda k, r: np.outer(one_hot(k), [0, 1, 2]).astype(np.uint8)),
    "uint8 memory": (
        spaces.Box(0, 255, (16,), np.uint8),
        lambda k, r: np.append(one_hot(k), [0] * 13).astype(np.uint8),
    ),
    "scalar": (spaces.Box(-1, 1, ()), lambda k, r: np.float32(k - 1)),
    "one bit each": (spaces.MultiBinary(3), lambda k, r: one_hot(k).astype(np.int8)),
    "Discrete from 5": (spaces.Discrete(3, start=5), lambda k, r: k + 5),
    "MultiDiscrete": (spaces.MultiDiscrete([[3, 2]]), lambda k, r: np.array([[k, r.integers(2)]])),
    "grey image": (spaces.Box(0, 255, (9, 9), np.uint8), lambda k, r: picture(k, r)),
    "image, channels last": (spaces.Box(0, 255, (9, 9, 3), np.uint8), lambda k, r: np.stack([picture(k, r)] * 3, -1)),
    "image, channels first": (spaces.Box(0, 255, (2, 9, 9), np.uint8), lambda k, r: np.stack([picture(k, r)] * 2)),
    "float image": (spaces.Box(0, 1, (9, 9)), lambda k, r: (picture(k, r) / 255).astype(np.float32)),
    "Dict with an image": (
        spaces.Dict(camera=spaces.Box(0, 255, (9, 9), np.uint8), clock=spaces.Box(0, 1, (1,))),
        lambda k, r: {"camera": picture(k, r), "clock": r.random(1).astype(np.float32)},
    ),
    "Dict, nested, odd keys": (
        spaces.Dict({"a.b": spaces.Dict({"": spaces.Discrete(3)}), "obs": spaces.Box(0, 1, (1,))}),
        lambda k, r: {"a.b": {"": k}, "obs": r.random(1).astype(np.float32)},
    ),
    "Tuple": (
        spaces.Tuple([spaces.Discrete(2), spaces.Tuple([spaces.MultiBinary(3)])]),
        lambda k, r: (int(r.integers(2)), (one_hot(k).astype(np.int8),)),
    ),
    "Text": (spaces.Text(3), lambda k, r: "abc"[k] * 3),
    "Sequence": (spaces.Sequence(spaces.Discrete(3)), lambda k, r: (k,)),
    "number as key": (spaces.Dict({0: spaces.Discrete(3)}), lambda k, r: {0: k}),  # pyright: ignore
    "one path twice": (
        spaces.Dict({"a.b": spaces.Discrete(3), "a": spaces.Dict({"b": spaces.Discrete(3)})}),
        lambda k, r: {"a.b": k, "a": {"b": k}},
    ),
    "nothing": (spaces.Box(-1, 1, (0,)), lambda k, r: np.zeros(0, np.float32)),
}
DOES = {  # what names it: a space, and (action, thing) -> how right it is, from 0 to 1
    "Discrete": (spaces.Discrete(3), lambda a, k: a == k),
    "Discrete from -2": (spaces.Discrete(3, start=-2), lambda a, k: a + 2 == k),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 2], start=[4, 0]), lambda a, k: np.mean(a - [4, 0] == [k, k % 2])),
    "MultiDiscrete, 2-D": (spaces.MultiDiscrete([[3], [3]]), lambda a, k: np.mean(a == k)),
    "MultiBinary": (spaces.MultiBinary((1, 3)), lambda a, k: np.mean(a[0] == one_hot(k))),
    "Box": (spaces.Box(-1, 1, (1,)), lambda a, k: near(a[0], 0.8 * (k - 1))),
    "Box, 2-D, float64": (spaces.Box(-1, 1, (1, 2), np.float64), lambda a, k: near(a[0, 0], 0.8 * (k - 1))),
    "Box, unbounded": (spaces.Box(-INF, INF, (1,)), lambda a, k: near(a[0], k - 1.0)),
    "Box, half bounded": (spaces.Box(0, INF, (1,)), lambda a, k: near(a[0], k)),
    "Box, 0 to 1000": (spaces.Box(0, 1000, (1,)), lambda a, k: near(a[0] / 500 - 1, 0.8 * (k - 1))),
    "Box, 100 to 200": (spaces.Box(100, 200, (1,)), lambda a, k: near(a[0] / 50 - 3, 0.8 * (k - 1))),
    "Box, 0 to 0.01": (spaces.Box(0, 0.01, (1,)), lambda a, k: near(a[0] * 200 - 1, 0.8 * (k - 1))),
    "Box of whole numbers": (spaces.Box(0, 2, (1,), np.int64), lambda a, k: a[0] == k),
    "Dict": (spaces.Dict(a=spaces.Discrete(3)), lambda a, k: a["a"] == k),
}


def one_hot(k: int) -> np.ndarray:
    return np.eye(3)[k]


def near(x: float, wanted: float) -> float:
    return max(0.0, 1 - abs(float(x) - wanted))


def picture(k: int, rng: np.random.Generator) -> np.ndarray:
    """A bright stripe in the k-th third of a dark picture."""
    image = rng.integers(0, 40, (9, 9), dtype=np.uint8)
    image[:, 3 * k : 3 * k + 3] = 255
    return image


class Guess(gym.Env):
    """Eight steps; each shows one of three things, and the action that names it pays 1. By chance it is about a third.

    Args:
        see, do: how it is shown and how it is named, of `SEES` and `DOES`.
        mask: where an action mask is given that forbids one wrong name: "", "info", "method", "Dict".
        recall: the thing is shown at the first step alone; only the last pays, eight.
        fault: what the environment does wrong: "", "nan reward", "array reward", "four values", "raises".
    """

    def __init__(self, see="float32", do="Discrete", *, mask="", recall=False, fault=""):
        self.show, (self.action_space, self.judge) = see, DOES[do]
        self.observation_space, self.shown = SEES[see]
        self.mask, self.recall, self.fault = mask, recall, fault
        if mask == "Dict":
            width = 5 if do == "MultiDiscrete" else 3
            self.observation_space = spaces.Dict(x=self.observation_space, action_mask=spaces.MultiBinary(width))
        if mask == "method":
            self.action_masks = self.allowed
        if recall:
            self.observation_space = spaces.Box(-1, 1, (4,))
        self.wide = do == "MultiDiscrete"

    def allowed(self):
        mask = np.ones(3, np.int8)
        mask[(self.thing + 1) % 3] = 0
        return np.append(mask, [1, 1]).astype(np.int8) if self.wide else mask

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.thing = int(self.np_random.integers(3))
        return self.look_at(), self.info()

    def look_at(self):
        if self.recall:
            return np.append(one_hot(self.thing) * (self.t == 0), self.t == 2).astype(np.float32)
        seen = self.shown(self.thing, self.np_random)
        return {"x": seen, "action_mask": self.allowed()} if self.mask == "Dict" else seen

    def info(self):
        return {"action_mask": self.allowed()} if self.mask == "info" else {}

    def step(self, action):
        reward = float(self.judge(action, self.thing))
        self.t += 1
        if self.recall:
            return self.look_at(), 8 * reward * (self.t == 3), self.t == 3, False, {}
        self.thing = int(self.np_random.integers(3))
        if self.fault == "raises":
            raise RuntimeError("the simulator has no licence")
        if self.fault:
            reward = float("nan") if self.fault == "nan reward" else [reward, reward]
        return self.look_at(), reward, False, self.t == 8, self.info()


class GuessRows(gym.vector.SyncVectorEnv):
    """A vector env of its own, which resets by itself at the next step."""

    def __init__(self, num_envs=8):
        super().__init__([Guess] * num_envs)


gym.register("foreign/TenSteps-v0", entry_point="tests.foreign_envs:TenSteps")
