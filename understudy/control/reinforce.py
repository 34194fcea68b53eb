"""REINFORCE in environments (Williams 1992): whole episodes, as many from every row; five steps, in order, in one loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from understudy.advantage import group_relative, leave_one_out, reward_to_go
from understudy.batch import Batch, Trajectory
from understudy.control import config, stage
from understudy.control.sources import Env, resolve
from understudy.control.stage import Begun, Iterations, Net
from understudy.objective import huber_error, policy_gradient
from understudy.reduce import explained_variance, standardize
from understudy.run.config import Count, RequestError
from understudy.run.store import Run
from understudy.score import episode_score
from understudy.update import update
from understudy.value import estimate


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """REINFORCE and what it is compared with: nothing, its own mean, a learned value, or the group's other episodes."""

    num_envs: Count = 8
    """Copies of the environment; with a group baseline, a multiple of group_size."""
    episodes: Count = 1
    """Whole episodes an iteration, in every copy; one with a group baseline."""
    baseline: Literal["none", "standardize", "value", "group", "leave_one_out"] = "standardize"
    """What the reward-to-go is held against; group and leave_one_out compare episodes from one start state."""
    group_size: Count = 4
    """Episodes from one start state, for the group baselines."""
    group_scale: bool = True
    """Divide the group baseline by the group's standard deviation (GRPO)."""
    learning_rate: config.LearningRate = 1e-3
    """Adam's step size at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grouped and self.group_size < 2:
            raise RequestError(
                f"group_size is {self.group_size}: baseline {self.baseline} compares the episodes of a group, so it must be "
                "2 or more"
            )
        if self.grouped and self.num_envs % self.group_size:
            raise RequestError(
                f"num_envs is {self.num_envs}: must be a multiple of group_size {self.group_size} with this baseline"
            )
        if self.grouped and self.episodes != 1:
            raise RequestError(f"episodes is {self.episodes}: must be 1 with baseline {self.baseline}, one score a row")

    def idle(self) -> dict[str, str]:
        held = f"baseline is {self.baseline!r}"
        found = {} if self.grouped else {"group_size": held, "group_scale": held}
        if self.baseline == "leave_one_out":
            found["group_scale"] = held
        if self.baseline != "value":
            found["value_coef"] = held
        if self.grouped and not self.normalize_reward:
            found["gamma"] = f"{held}, which compares undiscounted sums"
        return super().idle() | found

    @property
    def grouped(self) -> bool:
        return self.baseline in ("group", "leave_one_out")


def iterate(
    cfg: Config, *, env: Env = None, evaluation_env: Env = None, policy: Net = None, resume: Begun = None
) -> Iterations:
    """The loop itself, an iteration at a time."""
    cfg = resolve(cfg, env)
    size = cfg.group_size if cfg.grouped else 1
    with stage.open_stage(
        "reinforce", cfg, env, policy, evaluation_env=evaluation_env, group_size=size, resume=resume
    ) as run:
        while run.on:
            rate = run.schedule()
            traj = run.walker.collect_episodes(run.policy, cfg.episodes)  # 1 sample
            paid = run.reward(traj)  # 2 score: the environment pays, and constraints charge
            old, value = estimate(run.policy, traj)  # 3 value
            batch = weigh_up(traj, paid, value, old, cfg)  # 4 advantage
            objective = partial(
                policy_gradient,
                value_coef=cfg.value_coef if cfg.baseline == "value" else 0.0,
                entropy_coef=cfg.entropy_coef,
                value_loss=huber_error,
            )
            metrics = update(  # 5 update
                run.policy,
                run.optimizer,
                batch,
                objective,
                epochs=1,
                minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                guard=run.guard,
                generator=run.shuffle,
            )
            run.policy.gather(traj)
            if cfg.baseline == "value":
                metrics["explained_variance"] = float(explained_variance(value, batch.target, batch.mask))
            yield from run.report(metrics | {"learning_rate": rate})
        return run.run


def train(cfg: Config, *, env: Env = None, evaluation_env: Env = None, policy: Net = None, resume: Begun = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened.

    Args:
        env: your own environment or vector env, or a function that makes one copy, instead of the config's id.
        evaluation_env: where `env` is an object: a second one for evaluation, or a function that makes one copy.
        policy: your own `Policy`, or a network, `network(obs) -> distribution, value`.
    """
    return stage.drain(iterate(cfg, env=env, evaluation_env=evaluation_env, policy=policy, resume=resume))


def weigh_up(traj: Trajectory, paid: torch.Tensor, value: torch.Tensor, old: Any, cfg: Config) -> Batch:
    """The record with its rewards-to-go as targets, and as advantages what the baseline leaves of them."""
    target = reward_to_go(paid, traj.terminated, traj.truncated, traj.mask, gamma=cfg.gamma)
    if cfg.grouped:
        score = episode_score(paid, traj.mask)
        group = torch.arange(len(score), device=score.device) // cfg.group_size
        by_row = (
            leave_one_out(score, group)
            if cfg.baseline == "leave_one_out"
            else group_relative(score, group, scale=cfg.group_scale)
        )
        advantage = by_row[:, None] * traj.mask
    elif cfg.baseline == "value":
        advantage = (target - value) * traj.mask
    else:
        advantage = standardize(target, traj.mask) if cfg.baseline == "standardize" else target
    return Batch.of(traj, value=value, advantage=advantage, target=target, old=old)
