"""Environments one after another in this process, with less around each call than Gymnasium's own vector env has."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import concatenate


class Rows(SyncVectorEnv):
    """Gymnasium's vector env, for `AutoresetMode.DISABLED` alone: the walker resets rows. A step gives what its own gives.

    Of an observation space that is no Box, it writes over the observations it gave before.
    """

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        told = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        self._env_obs, *numbers, infos = map(list, zip(*told, strict=True))
        space, merged = self.single_observation_space, {}
        for row, info in enumerate(infos):
            merged = self._add_info(merged, info, row) if info else merged
        plain = isinstance(space, gymnasium.spaces.Box)
        obs = np.array(self._env_obs) if plain else concatenate(space, self._env_obs, self._observations)
        reward, terminated, truncated = map(np.array, numbers)
        return obs, reward, terminated, truncated, merged
