"""REINFORCE in environments (Williams 1992): whole episodes, as many from every row; five steps, in order, in one loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from understudy.advantage import group_relative, leave_one_out, reward_to_go
from understudy.batch import Batch, Trajectory
from understudy.control import config, training
from understudy.control.envs.sources import EnvLike, resolve_env_fields
from understudy.control.training import Iterations, OptionalModule, OptionalResumePoint
from understudy.objective import huber_error, policy_gradient
from understudy.reduce import explained_variance, standardize
from understudy.reward import episode_score
from understudy.run.config import PositiveInt, RequestError
from understudy.run.store import Run
from understudy.update import update
from understudy.value import estimate_values


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """REINFORCE and what it is compared with: nothing, its own mean, a learned value, or the group's other episodes."""

    num_envs: PositiveInt = 8
    """Copies of the environment; with a group baseline, a multiple of group_size."""
    episodes: PositiveInt = 1
    """Whole episodes an iteration, in every copy; one with a group baseline."""
    baseline: Literal["none", "standardize", "value", "group", "leave_one_out"] = "standardize"
    """What the reward-to-go is held against; group and leave_one_out compare episodes from one start state."""
    group_size: PositiveInt = 4
    """Episodes from one start state, for the group baselines."""
    scale_by_std: bool = True
    """Divide the group baseline by the group's standard deviation (GRPO)."""
    learning_rate: config.LearningRate = 1e-3
    """Adam's step size at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_grouped and self.group_size < 2:
            raise RequestError(
                f"group_size is {self.group_size}: baseline {self.baseline} compares the episodes of a group, so it must be "
                "2 or more"
            )
        if self.is_grouped and self.num_envs % self.group_size:
            raise RequestError(
                f"num_envs is {self.num_envs}: must be a multiple of group_size {self.group_size} with this baseline"
            )
        if self.is_grouped and self.episodes != 1:
            raise RequestError(f"episodes is {self.episodes}: must be 1 with baseline {self.baseline}, one score a row")

    def fields_without_effect(self) -> dict[str, str]:
        reason = f"baseline is {self.baseline!r}"
        reasons = {} if self.is_grouped else {"group_size": reason, "scale_by_std": reason}
        if self.baseline == "leave_one_out":
            reasons["scale_by_std"] = reason
        if self.baseline != "value":
            reasons["value_coef"] = reason
        if self.is_grouped and not self.normalize_reward:
            reasons["gamma"] = f"{reason}, which compares undiscounted sums"
        return super().fields_without_effect() | reasons

    @property
    def is_grouped(self) -> bool:
        return self.baseline in ("group", "leave_one_out")


def iterate(
    cfg: Config,
    *,
    env: EnvLike = None,
    evaluation_env: EnvLike = None,
    policy: OptionalModule = None,
    resume: OptionalResumePoint = None,
) -> Iterations:
    """The loop itself, an iteration at a time."""
    cfg = resolve_env_fields(cfg, env)
    group_size = cfg.group_size if cfg.is_grouped else 1
    with training.open_run(
        "reinforce", cfg, env, policy, evaluation_env=evaluation_env, group_size=group_size, resume=resume
    ) as run:
        while run.is_active:
            learning_rate = run.update_learning_rate()
            trajectory = run.collector.collect_episodes(run.policy, cfg.episodes)  # 1 sample
            rewards = run.compute_rewards(trajectory)  # 2 score: the environment pays, and constraints charge
            old_distribution, value = estimate_values(run.policy, trajectory)  # 3 value
            batch = compute_advantages(trajectory, rewards, value, old_distribution, cfg)  # 4 advantage
            objective = partial(
                policy_gradient,
                value_coef=cfg.value_coef if cfg.baseline == "value" else 0.0,
                entropy_coef=cfg.entropy_coef,
                value_loss_fn=huber_error,
            )
            metrics = update(  # 5 update
                run.policy,
                run.optimizer,
                batch,
                objective,
                num_epochs=1,
                num_minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                on_nonfinite=run.guard,
                generator=run.shuffle_generator,
            )
            run.policy.update_normalizers(trajectory)
            if cfg.baseline == "value":
                metrics["explained_variance"] = float(explained_variance(value, batch.target, batch.mask))
            yield from run.finish_iteration(metrics | {"learning_rate": learning_rate})
        return run.run


def train(
    cfg: Config,
    *,
    env: EnvLike = None,
    evaluation_env: EnvLike = None,
    policy: OptionalModule = None,
    resume: OptionalResumePoint = None,
) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened.

    Args:
        env: your own environment or vector env, or a function that makes one copy, instead of the config's id.
        evaluation_env: where `env` is an object: a second one for evaluation, or a function that makes one copy.
        policy: your own `Policy`, or a network, `network(obs) -> distribution, value`.
    """
    return training.run_to_end(iterate(cfg, env=env, evaluation_env=evaluation_env, policy=policy, resume=resume))


def compute_advantages(
    trajectory: Trajectory, rewards: torch.Tensor, value: torch.Tensor, old_distribution: Any, cfg: Config
) -> Batch:
    """The record with its rewards-to-go as targets, and as advantages what the baseline leaves of them."""
    target = reward_to_go(rewards, trajectory.terminated, trajectory.truncated, trajectory.mask, gamma=cfg.gamma)
    if cfg.is_grouped:
        score = episode_score(rewards, trajectory.mask)
        group_ids = torch.arange(len(score), device=score.device) // cfg.group_size
        row_advantage = (
            leave_one_out(score, group_ids)
            if cfg.baseline == "leave_one_out"
            else group_relative(score, group_ids, scale_by_std=cfg.scale_by_std)
        )
        advantage = row_advantage[:, None] * trajectory.mask
    elif cfg.baseline == "value":
        advantage = (target - value) * trajectory.mask
    else:
        advantage = standardize(target, trajectory.mask) if cfg.baseline == "standardize" else target
    return Batch.of(trajectory, value=value, advantage=advantage, target=target, old_distribution=old_distribution)
