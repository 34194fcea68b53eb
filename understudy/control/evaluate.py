"""Evaluation, held constant: frozen scales, seeds never used in training, the environment's own reward."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import torch
from gymnasium.vector import VectorEnv

from understudy.control.config import Config
from understudy.control.envs.sources import EnvSource
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.run.config import RequestError
from understudy.run.seeds import derive_seed, make_generator

EVALUATION_SEED = 20_261_121  # of every evaluation, whatever the run's seed


class Evaluation(NamedTuple):
    """What an evaluation came to."""

    returns: list[float]
    """Undiscounted returns of the environment's own reward, in the order of the episodes' seeds."""
    success_rate: float | None
    """The share of episodes whose last info says `is_success` or `success`; None where none says it, true or false."""
    num_success_reports: int
    """Episodes whose last info says it; where others do, one that does not is a failure."""
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
        require_spaces_of(policy, envs)
        source.refuse_shared_evaluation_copies(envs)
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
        sum(successes) / num_episodes if successes else None,
        len(successes),
        sum(episode.number in evaluation_envs[episode.row].truncated_episodes for episode in finished_episodes),
    )


def require_spaces_of(policy: Policy, envs: VectorEnv) -> None:
    """Refuse environments that a policy cannot act in.

    Raises:
        RequestError: observations or actions are of another kind or shape than those the policy has learned from. Their
            bounds may differ.
    """
    sides = (policy.observation_space, envs.single_observation_space), (policy.action_space, envs.single_action_space)
    for (own, other), name in zip(sides, ("observation_space", "action_space"), strict=True):
        if _layout(own) != _layout(other):
            raise RequestError(
                f"env has the {name} {other}, and the policy's is {own}: evaluate it in an environment of the same spaces"
            )


def _layout(space: gymnasium.Space) -> Any:
    """What of a space a network's layers and the meaning of its outputs hang on; the bounds of a Box do not count."""
    if isinstance(space, gymnasium.spaces.Box):
        return "Box", space.shape, space.dtype
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: _layout(part) for name, part in space.spaces.items()}
    if isinstance(space, gymnasium.spaces.Tuple):
        return [_layout(part) for part in space.spaces]
    return space


def episode_seed(number: int, seed: int = EVALUATION_SEED) -> int:
    """The seed of an evaluation's episode, counted from 0; the same in however many copies it is played."""
    return derive_seed(seed, "evaluate", number % 50, number // 50)


class EvaluationInterrupted(Exception):
    """An evaluation that a signal ended."""
