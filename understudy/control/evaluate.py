"""Evaluation, held constant: frozen scales, seeds never used in training, the environment's own reward."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from understudy.control.config import Config
from understudy.control.envs.sources import EnvSource
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.run.seeds import derive_seed, make_generator

EVALUATION_SEED = 20_261_121  # of every evaluation, whatever the run's seed


class Evaluation(NamedTuple):
    """What an evaluation came to."""

    returns: list[float]
    """Undiscounted returns of the environment's own reward, in the order of the episodes' seeds."""
    success_rate: float | None
    """The share of episodes whose last info says `is_success` or `success`; None where it says neither."""
    num_truncated: int
    """Episodes that were ended at `evaluation_max_steps`."""

    @property
    def return_mean(self) -> float:
        return statistics.fmean(self.returns)


def evaluate(
    policy: Policy,
    cfg: Config,
    *,
    num_episodes: int,
    sample: bool = False,
    seed: int = EVALUATION_SEED,
    video: Path | None = None,
    source: EnvSource | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Play whole episodes; the same seeds at every call, in however many copies.

    Args:
        sample: choose as in training, noise held as there; otherwise the distribution's mode.
        video: record the episodes there (needs the extra "video").
        source: where the environments come from; by default from the config.
        should_stop: asked at every step whether to leave off.

    Raises:
        Stopped: `should_stop` said so.
    """
    if source is None:
        source = EnvSource(cfg)
        source.check()
    envs, evaluation_envs = source.open_evaluation(
        1 if video else min(num_episodes, cfg.num_evaluation_envs), video, num_episodes
    )
    num_envs = envs.num_envs

    def seed_of(row: int, episode: int) -> int:
        return episode_seed(episode * num_envs + row, seed)

    try:
        with torch.no_grad():
            collector = RolloutCollector(
                envs,
                seed_of=seed_of,
                generator=make_generator(seed, "evaluate", cfg.device),
                noise_interval=cfg.noise_interval,
                device=cfg.device,
                sample=sample,
                keep_float64=policy.keeps_float64,
            )
            finished_episodes = collector.play_episodes(policy, -(-num_episodes // num_envs), should_stop)
    finally:
        source.close_evaluation(envs)
    if finished_episodes is None:
        raise EvaluationInterrupted
    finished_episodes = sorted(finished_episodes, key=lambda e: (e.number, e.row))[:num_episodes]
    successes = [episode.info["success"] for episode in finished_episodes if "success" in episode.info]
    return Evaluation(
        [episode.episode_return for episode in finished_episodes],
        statistics.fmean(successes) if successes else None,
        sum(episode.number in evaluation_envs[episode.row].truncated_episodes for episode in finished_episodes),
    )


def episode_seed(number: int, seed: int = EVALUATION_SEED) -> int:
    """The seed of an evaluation's episode, counted from 0; the same in however many copies it is played."""
    return derive_seed(seed, "evaluate", number % 50, number // 50)


class EvaluationInterrupted(Exception):
    """An evaluation that a signal ended."""
