"""Actor-critic in environments: online, one step at a time (Sutton & Barto 2018, sec. 13.5), or n steps of many copies
at once (A2C; Mnih et al. 2016). Five steps, in order, in one loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from understudy.advantage import gae
from understudy.batch import Batch
from understudy.control import config, training
from understudy.control.envs.sources import EnvLike, resolve_env_fields
from understudy.control.fast.optimizer import RMSprop, adam
from understudy.control.policy import Policy
from understudy.control.training import Iterations, OptionalModule, OptionalResumePoint
from understudy.objective import huber_error, policy_gradient, squared_error
from understudy.reduce import explained_variance, standardize
from understudy.run.config import PositiveInt, UnitInterval
from understudy.run.store import Run
from understudy.update import update
from understudy.value import estimate_values, next_value


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """One optimizer step an iteration. rollout 1, num_envs 1 and lam 0 is the online form: it learns at every step."""

    num_steps_per_env: PositiveInt = 5
    """Env calls an iteration; 1 for the online form."""
    lam: UnitInterval = 1.0
    """GAE's lambda: 1 for n-step returns, 0 for the TD error."""
    value_loss: Literal["squared", "huber"] = "squared"
    """The critic's error: half the square, or Huber's."""
    normalize_advantage: Literal["none", "batch"] = "none"
    """Standardise advantages over the record."""
    learning_rate: config.LearningRate = 7e-4
    """The optimizer's step size at the start."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Adam, or RMSprop with a decay of 0.99 (Mnih et al. 2016, sec. 4; SB3), with adam_eps for its epsilon."""

    def fields_without_effect(self) -> dict[str, str]:
        return super().fields_without_effect() | ({} if self.value_coef else {"value_loss": "value_coef is 0"})


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
    with training.open_run(
        "actor-critic", cfg, env, policy, evaluation_env=evaluation_env, optimizer=make_optimizer, resume=resume
    ) as run:
        objective = partial(
            policy_gradient,
            value_coef=cfg.value_coef,
            entropy_coef=cfg.entropy_coef,
            value_loss_fn=huber_error if cfg.value_loss == "huber" else squared_error,
        )
        while run.is_active:
            learning_rate = run.update_learning_rate()
            trajectory = run.collector.collect(run.policy, cfg.num_steps_per_env)  # 1 sample
            rewards = run.compute_rewards(trajectory)  # 2 score: the environment pays, and constraints charge
            old_distribution, value = estimate_values(run.policy, trajectory)  # 3 value
            ends = trajectory.terminated, trajectory.truncated, trajectory.mask
            advantage = gae(
                rewards, value, next_value(value, trajectory), *ends, gamma=cfg.gamma, lam=cfg.lam
            )  # 4 advantage
            batch = Batch.of(
                trajectory,
                value=value,
                advantage=advantage,
                target=advantage + value,
                old_distribution=old_distribution,
            )
            if cfg.normalize_advantage == "batch":
                batch = Batch.of(batch, advantage=standardize(advantage, batch.mask))
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
            if cfg.num_steps_per_env * cfg.num_envs > 1:
                metrics["explained_variance"] = float(explained_variance(batch.value, batch.target, batch.mask))
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


def make_optimizer(policy: Policy, cfg: Config) -> torch.optim.Optimizer:
    """One Adam, or one RMSprop, over all parameters."""
    if cfg.optimizer == "adam":
        return adam(policy, cfg)
    return RMSprop(policy.parameters(), lr=cfg.learning_rate, alpha=0.99, eps=cfg.adam_eps)
