"""Stable-Baselines3 or SBX for bench/control.py: PPO with the settings given, a line of JSON an iteration."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


class Marks(BaseCallback):
    """Says the steps that have been learned from, and the mean return of the last 100 episodes."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:  # the update before it is over
        if self.num_timesteps:
            self._mark()

    def _on_training_end(self) -> None:
        self._mark()

    def _mark(self) -> None:
        returns = [float(episode["r"]) for episode in self.model.ep_info_buffer or ()]
        mean = statistics.fmean(returns) if returns else None
        print(json.dumps({"steps": self.num_timesteps, "window": len(returns), "mean": mean}), flush=True)


def main(job: dict[str, Any]) -> None:
    """job: `package`, `env`, `n_envs`, `normalize`, `linear` (settings that go to 0), `ppo`, `steps`, `seed`, `device`."""
    envs = make_vec_env(job["env"], n_envs=job["n_envs"], seed=job["seed"])
    if job["normalize"]:
        envs = VecNormalize(envs, clip_obs=10, clip_reward=10, gamma=job["ppo"]["gamma"])
    settings = dict(job["ppo"])
    for name in job["linear"]:
        settings[name] = lambda left, start=settings[name]: start * left
    algorithm = importlib.import_module(job["package"]).PPO
    networks = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
    model = algorithm("MlpPolicy", envs, policy_kwargs=networks, seed=job["seed"], device=job["device"], **settings)
    model.learn(job["steps"], callback=Marks())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
