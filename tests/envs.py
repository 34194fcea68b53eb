"""Small environments for the tests: all that happens follows from (row, episode, step), and these can be read off obs.

`Diary` writes down what an honest record must hold. Its rewards are made from a known value function, so the true value
of every state is known in closed form, on both sides of a termination and of a truncation.
"""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn

from understudy.control.envs import make as environment
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.distribution import Categorical

ACTIONS = 3
GAMMA = 0.5
MODES = (AutoresetMode.DISABLED, AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)
SCRIPT = (3, 1, 4, 1, 2)  # lengths of episodes, by row + episode
ENDS = ("truncated", "terminated", "truncated", "truncated", "both", "terminated", "terminated")


def seed_of(row: int, episode: int) -> int:
    """The seed of an episode, from which `Diary` reads row and episode again."""
    return 1000 * row + episode


def length_of(row: int, episode: int) -> int:
    return SCRIPT[(row + episode) % len(SCRIPT)]


def end_of(row: int, episode: int) -> str:
    """How an episode ends: terminated, truncated, or both at once, which is a termination."""
    return ENDS[(2 * row + episode) % len(ENDS)]


def action_at(row, episode, step):
    """What the scripted policy does; numbers or tensors."""
    return (row + 2 * episode + step) % ACTIONS


def value_at(row, episode, step):
    """The true value of a state, with discount GAMMA, under the scripted policy; numbers or tensors."""
    return 1 + row + 0.5 * episode + 0.25 * step * step


def pay(row: int, episode: int, step: int) -> float:
    """r = V(s) - GAMMA * V(s'), and V(s') is 0 past a termination: so V is the true value."""
    dies = step + 1 == length_of(row, episode) and end_of(row, episode) != "truncated"
    return value_at(row, episode, step) - (0.0 if dies else GAMMA * value_at(row, episode, step + 1))


class Diary(gymnasium.Env):
    """obs is [row, episode, step]. Any action but the scripted one costs 100. It insists on a seed at every reset."""

    observation_space: spaces.Space = spaces.Box(0, 1000, (3,), np.float32)
    action_space: spaces.Space = spaces.Discrete(ACTIONS)

    def reset(self, *, seed=None, options=None):
        assert seed is not None, "this reset got no seed"
        (self.row, self.episode), self.now = divmod(seed, 1000), 0
        return self.obs(), self.info()

    def step(self, action):
        reward = pay(self.row, self.episode, self.now)
        reward -= 0 if action == action_at(self.row, self.episode, self.now) else 100
        self.now += 1
        over, end = self.now == length_of(self.row, self.episode), end_of(self.row, self.episode)
        return self.obs(), reward, over and end != "truncated", over and end != "terminated", self.info()

    def obs(self):
        return np.array([self.row, self.episode, self.now], dtype=np.float32)

    def info(self) -> dict:
        return {}


class Nested(Diary):
    """Diary whose obs is a Dict with a Tuple inside."""

    observation_space = spaces.Dict(
        {
            "who": spaces.Box(0, 1000, (2,), np.float32),
            "when": spaces.Tuple((spaces.Discrete(1000), spaces.Box(0, 1000, (1,), np.float32))),
        }
    )

    def obs(self):
        late = np.array([10 * self.now], dtype=np.float32)
        return {"who": np.array([self.row, self.episode], dtype=np.float32), "when": (self.now, late)}


class Picky(Diary):
    """Diary that says in info which actions are allowed: never the one before the scripted one. Any allowed one is fine."""

    def info(self):
        return {"action_mask": allowed_at(self.row, self.episode, self.now)}


def allowed_at(row: int, episode: int, step: int) -> np.ndarray:
    return np.array([a != (action_at(row, episode, step) - 1) % ACTIONS for a in range(ACTIONS)], dtype=np.int8)


class Rows(VectorEnv):
    """A user's own vector env of Diaries, in any mode. It hands out the same arrays every time, written over in place."""

    def __init__(self, rows: int, mode: AutoresetMode, diary: type[Diary] = Diary):
        self.metadata = {"autoreset_mode": mode}
        self.num_envs, self.mode = rows, mode
        self.envs = [diary() for _ in range(rows)]
        self.single_observation_space, self.single_action_space = diary.observation_space, diary.action_space
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, rows)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, rows)
        self.episodes = np.full(rows, -1)
        self.seen, self.paid = np.zeros((rows, 3), dtype=np.float32), np.zeros(rows)
        self.ends = np.zeros((2, rows), dtype=bool)

    def reset(self, *, seed=None, options=None):
        for row in np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))):
            self.renew(row)
        return self.seen, {}

    def renew(self, row):
        self.episodes[row] += 1
        self.seen[row], _ = self.envs[row].reset(seed=seed_of(row, self.episodes[row]))
        self.ends[:, row] = False

    def step(self, actions):
        info: dict = {}
        over = self.ends.any(axis=0)
        for row, env in enumerate(self.envs):
            if over[row]:
                assert self.mode is AutoresetMode.NEXT_STEP, "this row should have been reset"
                self.renew(row)
                self.paid[row] = 0
                continue
            self.seen[row], self.paid[row], *self.ends[:, row], _ = env.step(actions[row])
        if self.mode is AutoresetMode.SAME_STEP and self.ends.any():
            ended = self.ends.copy()
            info = {"final_obs": self.seen.copy(), "_final_obs": ended.any(axis=0)}
            for row in np.flatnonzero(ended.any(axis=0)):
                self.renew(row)
            return self.seen, self.paid, *ended, info
        return self.seen, self.paid, *self.ends, info


class Scripted(nn.Module):
    """Acts by the script; its value is the true one, or wrong by `wrong`."""

    def __init__(self, wrong: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.wrong = wrong

    def forward(self, obs: Tensor):
        row, episode, step = obs.unbind(-1)
        scripted = nn.functional.one_hot(action_at(row, episode, step).long() % ACTIONS, ACTIONS)
        return Categorical.of(100.0 * scripted + self.weight), value_at(row, episode, step) + self.wrong


class Anything(nn.Module):
    """Acts at random among what is allowed, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, obs):
        leaf = next(iter(obs.values())) if isinstance(obs, dict) else obs
        logits = self.logits.expand(*leaf.shape[:2], ACTIONS)
        return Categorical.of(logits, obs.get("action_mask") if isinstance(obs, dict) else None), logits[..., 0]


def diaries(mode: AutoresetMode, rows: int = 4, diary: type[gymnasium.Env] = Diary) -> VectorEnv:
    """A SyncVectorEnv in this mode, as a user hands it to a recipe."""
    return environment.as_vector_env(SyncVectorEnv([diary] * rows, autoreset_mode=mode), seed_of)


def scripted(wrong: float = 0.0) -> Policy:
    return Policy(Scripted(wrong), Diary.observation_space, Diary.action_space)


def walker(envs: VectorEnv, **options) -> RolloutCollector:
    return RolloutCollector(envs, seed_of=seed_of, generator=torch.Generator().manual_seed(0), **options)
