"""Evaluation, held constant: frozen scales, seeds never used in training, the environment's own reward."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from understudy.control.collect import Walker
from understudy.control.config import Config
from understudy.control.policy import Policy
from understudy.control.sources import Source
from understudy.run.seeds import derive, generator

SEED = 20_261_121  # of every evaluation, whatever the run's seed


class Evaluation(NamedTuple):
    """What an evaluation came to."""

    returns: list[float]
    """Undiscounted returns of the environment's own reward, in the order of the episodes' seeds."""
    success_rate: float | None
    """The share of episodes whose last info says `is_success` or `success`; None where it says neither."""
    num_cut: int
    """Episodes that were ended at `evaluation_max_steps`."""

    @property
    def return_mean(self) -> float:
        return statistics.fmean(self.returns)


def evaluate(
    policy: Policy,
    cfg: Config,
    *,
    episodes: int,
    sample: bool = False,
    seed: int = SEED,
    video: Path | None = None,
    source: Source | None = None,
    stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Play whole episodes; the same seeds at every call, in however many copies.

    Args:
        sample: choose as in training, noise held as there; otherwise the distribution's mode.
        video: record the episodes there (needs the extra "video").
        source: where the environments come from; by default from the config.
        stop: asked at every step whether to leave off.

    Raises:
        Stopped: `stop` said so.
    """
    if source is None:
        source = Source(cfg)
        source.check()
    envs, copies = source.open_evaluation(1 if video else min(episodes, cfg.num_evaluation_envs), video, episodes)
    rows = envs.num_envs

    def seed_of(row: int, episode: int) -> int:
        return episode_seed(episode * rows + row, seed)

    try:
        with torch.no_grad():
            walker = Walker(
                envs,
                seed_of=seed_of,
                generator=generator(seed, "evaluate", cfg.device),
                hold=cfg.hold,
                device=cfg.device,
                sample=sample,
                exact=policy.exact,
            )
            played = walker.play(policy, -(-episodes // rows), stop)
    finally:
        source.close_evaluation(envs)
    if played is None:
        raise Stopped
    played = sorted(played, key=lambda e: (e.number, e.row))[:episodes]
    succeeded = [episode.info["success"] for episode in played if "success" in episode.info]
    return Evaluation(
        [episode.episode_return for episode in played],
        statistics.fmean(succeeded) if succeeded else None,
        sum(episode.number in copies[episode.row].cut for episode in played),
    )


def episode_seed(number: int, seed: int = SEED) -> int:
    """The seed of an evaluation's episode, counted from 0; the same in however many copies it is played."""
    return derive(seed, "evaluate", number % 50, number // 50)


class Stopped(Exception):
    """An evaluation that a signal ended."""
