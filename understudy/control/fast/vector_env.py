"""Environments in this process, with less around each call than Gymnasium has, and to the bit what Gymnasium gives."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete, MultiDiscrete
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import concatenate

from understudy.control.envs.infos import ExactInfos


class FastSyncVectorEnv(ExactInfos, SyncVectorEnv):
    """Gymnasium's vector env, for `AutoresetMode.DISABLED` alone: the walker resets rows. A step gives what its own gives.

    Of an observation space that is no Box, it writes over the observations it gave before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_box = isinstance(self.single_observation_space, gymnasium.spaces.Box)
        self.shape, self.dtype = self.observation_space.shape, self.observation_space.dtype

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        results = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        self._env_obs, rewards, terminations, truncations, infos = map(list, zip(*results, strict=True))
        merged: dict[str, Any] = {}
        for row, info in enumerate(infos):
            merged = self._add_info(merged, info, row) if info != {} else merged
        reward = np.fromiter(rewards, np.float64, self.num_envs)
        terminated = np.fromiter(terminations, np.bool_, self.num_envs)
        truncated = np.fromiter(truncations, np.bool_, self.num_envs)
        return self._concatenate_obs(), reward, terminated, truncated, merged

    def _concatenate_obs(self) -> Any:
        """Of a Box, one array; any other space, and a wrong shape, is Gymnasium's to lay together or to refuse."""
        if self.is_box:
            obs = np.array(self._env_obs)
            if obs.shape == self.shape:
                return obs.astype(self.dtype, casting="same_kind", copy=False)
        return concatenate(self.single_observation_space, self._env_obs, self._observations)


class FastDiscrete(Discrete):
    """Gymnasium's `Discrete`, the same in all it answers; of an int64 sooner."""

    def __init__(self, space: Discrete) -> None:
        super().__init__(space.n, space._np_random, space.start)
        self.first, self.end = int(space.start), int(space.start) + int(space.n)

    def contains(self, x: Any) -> bool:
        return self.first <= int(x) < self.end if type(x) is np.int64 else super().contains(x)


class FastMultiDiscrete(MultiDiscrete):
    """Gymnasium's `MultiDiscrete`, the same in all it answers; of an array of its own type and shape sooner."""

    def __init__(self, space: MultiDiscrete) -> None:
        super().__init__(space.nvec, space.dtype, space._np_random, space.start)
        self.last = self.start + (self.nvec - 1)

    def contains(self, x: Any) -> bool:
        if isinstance(x, np.ndarray) and x.dtype == self.dtype and x.shape == self._shape:
            return bool(np.count_nonzero((self.start <= x) & (x <= self.last)) == x.size)
        return super().contains(x)


def use_fast_action_space(env: Any) -> None:
    """Let an environment or a vector env, that asks of each action whether it is in its space, be answered sooner."""
    space = vars(env.unwrapped).get("action_space")
    if type(space) is Discrete and space.dtype == np.int64:
        env.unwrapped.action_space = FastDiscrete(space)
    elif type(space) is MultiDiscrete:
        env.unwrapped.action_space = FastMultiDiscrete(space)
