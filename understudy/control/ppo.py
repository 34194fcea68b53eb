"""PPO in environments (Schulman et al. 2017): five steps, in order, in one loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from understudy.advantage import gae
from understudy.batch import Batch, Trajectory
from understudy.control import config, training
from understudy.control.envs.sources import EnvLike, resolve_env_fields
from understudy.control.fast.optimizer import adam
from understudy.control.policy import Policy
from understudy.control.training import Iterations, OptionalModule, OptionalResumePoint, TrainingRun
from understudy.fast.compiled_update import CompiledUpdate, is_compiler_available
from understudy.objective import adapt_kl_old_coef, ppo, ppo_penalty
from understudy.reduce import explained_variance, masked_mean, standardize
from understudy.run.config import NonNegativeFloat, PositiveFloat, PositiveInt, RequestError, UnitInterval
from understudy.run.store import Run
from understudy.update import update
from understudy.value import estimate_values, next_value

MIN_STEPS_TO_COMPILE = 12_000
"""Optimizer steps from which on they are compiled, which takes 12 s without a cache, 2 with one (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """PPO: every published variant is a field."""

    num_steps_per_env: PositiveInt = 128
    """Env calls an iteration; num_envs times as many steps, reset rows of self-resetting envs apart."""
    num_epochs: PositiveInt = 10
    """Passes over the record."""
    num_minibatches: PositiveInt = 4
    """Optimizer steps a pass."""
    lam: UnitInterval = 0.95
    """GAE's lambda, from 0 (TD error) to 1 (Monte Carlo)."""
    objective: Literal["clip", "penalty"] = "clip"
    """Surrogate: clipped ratio, or ratio minus kl_coef * KL(old, new), exact."""
    clip: PositiveFloat = 0.2
    """How far the ratio may go from 1 before it is clipped."""
    clip_schedule: Literal["constant", "linear"] = "constant"
    """How clip goes on: constant, or linear to 0 over the run's steps."""
    value_clip: NonNegativeFloat = 0.0
    """How far the value may go from the old one before its loss is clipped; 0 for off."""
    kl_old_coef: NonNegativeFloat = 1.0
    """Coefficient of the KL penalty, initial where it adapts."""
    adaptive_kl_target: NonNegativeFloat = 0.0
    """KL(old, new) in nats an adaptive coefficient aims at, by doubling and halving; 0 for a fixed one."""
    target_kl: NonNegativeFloat = 0.0
    """End the update before a minibatch whose mean KL(old, new) is above this, in nats; 0 for off."""
    desired_kl: NonNegativeFloat = 0.0
    """KL in nats around which the learning rate is divided or multiplied by 1.5 every minibatch (rsl_rl); 0 for off."""
    normalize_advantage: Literal["none", "minibatch", "batch"] = "minibatch"
    """Over what advantages are standardised."""
    recompute_advantages: bool = False
    """Compute values and advantages anew before every epoch."""
    reshuffle: bool = True
    """Draw a new order for every epoch, instead of one an iteration."""
    clip_grad_apart: bool = False
    """Bound the gradients of actor and critic each by max_grad_norm, instead of jointly."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the optimizer step, which takes some seconds once; auto: where the run is long enough to win them back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_minibatches > self.num_envs * self.num_steps_per_env:
            raise RequestError(
                f"num_minibatches is {self.num_minibatches}: an iteration has num_envs {self.num_envs} times "
                f"num_steps_per_env {self.num_steps_per_env} "
                "steps, and a minibatch needs at least one"
            )

    def fields_without_effect(self) -> dict[str, str]:
        field_names = (
            ["clip", "clip_schedule"] if self.objective == "penalty" else ["kl_old_coef", "adaptive_kl_target"]
        )
        reasons: dict[str, str] = dict.fromkeys(field_names, f"objective is {self.objective!r}")
        if not self.value_coef:
            reasons["value_clip"] = "value_coef is 0"
        if self.num_epochs == 1:
            reasons |= {"recompute_advantages": "num_epochs is 1", "reshuffle": "num_epochs is 1"}
        return super().fields_without_effect() | reasons


def iterate(
    cfg: Config,
    *,
    env: EnvLike = None,
    evaluation_env: EnvLike = None,
    policy: OptionalModule = None,
    resume: OptionalResumePoint = None,
) -> Iterations:
    """The loop itself, an iteration at a time: log, evaluate or break between them."""
    cfg, update_function = resolve_compile(resolve_env_fields(cfg, env), is_user_policy=policy is not None)
    with training.open_run(
        "ppo", cfg, env, policy, evaluation_env=evaluation_env, optimizer=make_optimizer, resume=resume
    ) as run:
        while run.is_active:
            kl_old_coef = run.recipe_state.setdefault("kl_old_coef", cfg.kl_old_coef)
            learning_rate, clip = (
                run.update_learning_rate(),
                cfg.clip * (run.progress_remaining if cfg.clip_schedule == "linear" else 1),
            )
            surrogate = (
                partial(ppo, clip=clip) if cfg.objective == "clip" else partial(ppo_penalty, kl_old_coef=kl_old_coef)
            )
            trajectory = run.collector.collect(run.policy, cfg.num_steps_per_env)  # 1 sample
            rewards = run.compute_rewards(trajectory)  # 2 score: the environment pays, and constraints charge
            old_distribution, value = estimate_values(run.policy, trajectory)  # 3 value
            batch = compute_advantages(trajectory, rewards, value, old_distribution, cfg)  # 4 advantage
            metrics = update_function(  # 5 update
                run.policy,
                run.optimizer,
                batch,
                partial(surrogate, value_coef=cfg.value_coef, entropy_coef=cfg.entropy_coef, value_clip=cfg.value_clip),
                num_epochs=cfg.num_epochs,
                num_minibatches=cfg.num_minibatches,
                max_grad_norm=cfg.max_grad_norm,
                recompute=partial(recompute_advantages, run.policy, rewards, cfg) if cfg.recompute_advantages else None,
                transform_minibatch=standardize_advantages if cfg.normalize_advantage == "minibatch" else None,
                on_minibatch=partial(on_minibatch, run.optimizer, cfg) if cfg.target_kl or cfg.desired_kl else None,
                reshuffle=cfg.reshuffle,
                on_nonfinite=run.guard,
                generator=run.shuffle_generator,
            )
            if cfg.objective == "penalty":
                metrics |= adapt_kl_penalty(run, batch, cfg, was_skipped="updates_skipped" in metrics)
            run.policy.update_normalizers(trajectory)
            metrics["explained_variance"] = float(explained_variance(batch.value, batch.target, batch.mask))
            yield from run.finish_iteration(metrics | {"learning_rate": learning_rate, "clip": clip})
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


def resolve_compile(cfg: Config, *, is_user_policy: bool) -> tuple[Config, Any]:
    """The config with `compile` as on or off, and `update` or its compiled form.

    A function of the config, of whether the policy is the user's own, and of whether there is a compiler. On, where the
    optimizer steps to come are worth it (`python bench/compile_pays.py`).

    Raises:
        RequestError: on, with what cannot be compiled.
    """
    not_compilable = {
        "rnn_type": cfg.rnn_type != "none",
        "exploration": cfg.exploration == "gsde",
        "recompute_advantages": cfg.recompute_advantages,
        "target_kl": cfg.target_kl > 0,
        "desired_kl": cfg.desired_kl > 0,
        "clip_grad_apart": cfg.clip_grad_apart,
        "device": not cfg.device.startswith("cpu"),
    }
    reason = next((f"{name} is {getattr(cfg, name)!r}" for name, is_set in not_compilable.items() if is_set), None)
    if cfg.compile == "on" and (is_user_policy or reason):
        raise RequestError(
            f"compile is 'on', but {reason or 'the policy is your own'}, which only runs uncompiled: leave it auto"
        )
    if cfg.compile == "on" and not is_compiler_available():
        raise RequestError("compile is 'on', and there is no C++ compiler: install g++, or start with compile off")
    num_optimizer_steps = (
        math.ceil(cfg.steps / (cfg.num_envs * cfg.num_steps_per_env)) * cfg.num_epochs * cfg.num_minibatches
    )
    is_worthwhile = (
        num_optimizer_steps >= MIN_STEPS_TO_COMPILE
        and not is_user_policy
        and reason is None
        and is_compiler_available()
    )
    if cfg.compile == "on" or (cfg.compile == "auto" and is_worthwhile):
        return replace(cfg, compile="on"), CompiledUpdate(cfg.num_steps_per_env, varying=("clip", "kl_old_coef")).update
    return replace(cfg, compile="off"), update


def compute_advantages(
    trajectory: Trajectory, rewards: torch.Tensor, value: torch.Tensor, old_distribution: Any, cfg: Config
) -> Batch:
    """The record with GAE's advantages and the critic's targets A + V; standardised where that is over the batch."""
    ends = trajectory.terminated, trajectory.truncated, trajectory.mask
    advantage = gae(rewards, value, next_value(value, trajectory), *ends, gamma=cfg.gamma, lam=cfg.lam)
    batch = Batch.of(
        trajectory, value=value, advantage=advantage, target=advantage + value, old_distribution=old_distribution
    )
    return standardize_advantages(batch) if cfg.normalize_advantage == "batch" else batch


def recompute_advantages(policy: Policy, rewards: torch.Tensor, cfg: Config, batch: Batch) -> Batch:
    """The record as the critic sees it now; what the actor is held against stays (Andrychowicz et al. 2021, sec. 3.5)."""
    _, value = estimate_values(policy, batch)
    return compute_advantages(batch, rewards, value, batch.old_distribution, cfg)


def standardize_advantages(batch: Batch) -> Batch:
    return Batch.of(batch, advantage=standardize(batch.advantage, batch.mask))


def on_minibatch(optimizer: torch.optim.Optimizer, cfg: Config, metrics: dict[str, float]) -> bool:
    """Before an optimizer step: let the KL set the learning rate, or end the update, where the config says so."""
    kl = metrics["kl_old"]
    if cfg.desired_kl:
        for group in optimizer.param_groups:
            if kl > 2 * cfg.desired_kl:
                group["lr"] = max(group["lr"] / 1.5, 1e-5)
            elif 0 < kl < cfg.desired_kl / 2:
                group["lr"] = min(group["lr"] * 1.5, 1e-2)
    return 0 < cfg.target_kl < kl


def adapt_kl_penalty(run: TrainingRun, batch: Batch, cfg: Config, *, was_skipped: bool) -> dict[str, float]:
    """The penalty's coefficient and the KL it led to; with a target, another coefficient for the next iteration.

    The KL is that of the policy that acted: it is measured before the observations' scale moves. A skipped update has led to
    none, and leaves the coefficient.
    """
    coef, kl = run.recipe_state["kl_old_coef"], measure_kl_old(run.policy, batch)
    if cfg.adaptive_kl_target and not was_skipped:
        run.recipe_state["kl_old_coef"] = adapt_kl_old_coef(coef, kl, target=cfg.adaptive_kl_target)
    return {"kl_old_coef": coef, "kl_old": kl}


@torch.no_grad()
def measure_kl_old(policy: Policy, batch: Batch) -> float:
    """Mean KL(old, new) over the record, after the update."""
    distribution, _ = estimate_values(policy, batch)
    return float(masked_mean(batch.old_distribution.kl(distribution), batch.mask))


def make_optimizer(policy: Policy, cfg: Config) -> torch.optim.Optimizer:
    """One Adam; with clip_grad_apart, actor and critic as groups with a bound each."""
    optimizer = adam(policy, cfg)
    if cfg.clip_grad_apart:
        critic = [p for name, p in policy.named_parameters() if name.startswith(("network.critic", "network.value"))]
        critic_ids = {id(p) for p in critic}
        actor = [p for p in policy.parameters() if id(p) not in critic_ids]
        optimizer.param_groups.clear()
        for group in (actor, critic):
            optimizer.add_param_group({"params": group, "max_grad_norm": cfg.max_grad_norm})
    return optimizer
