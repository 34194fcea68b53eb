"""PPO with a critic on language models (Ziegler et al. 2019; Ouyang et al. 2022): five steps, in order, in one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from understudy.advantage import gae
from understudy.batch import Batch, Trajectory
from understudy.language import config, training
from understudy.language.model.policy import Policy
from understudy.language.model.token_distribution import SampledTokens, TokenDistribution
from understudy.language.rlhf import (
    compute_rewards,
    forward_in_chunks,
    next_reference_coef,
    off_policy_weights,
    open_rlhf_run,
    reference_kl_penalty,
)
from understudy.language.rollout.generate import Engine
from understudy.language.training import Iterations
from understudy.language.trust_region import make_kl_early_stopping, make_trust_region_check
from understudy.objective import Losses, adapt_kl_old_coef, critic_only, ppo, ppo_penalty, with_pretraining
from understudy.reduce import masked_mean, standardize
from understudy.run.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    RequestError,
    UnitInterval,
)
from understudy.run.store import ResumePoint, Run
from understudy.update import update
from understudy.value import next_value


@dataclass(frozen=True, kw_only=True)
class Config(config.RolloutConfig):
    """PPO on prompts: every published variant is a field."""

    critic: Literal["shared", "separate", "top"] = "shared"
    """V as a linear output on the policy's trunk, on a trunk of its own (the reward model's, where reward is one), or on
    top layers of its own above the policy's lower ones."""
    critic_layers: PositiveInt = 1
    """Layers of its own of a critic that is top."""
    critic_init: Literal["zero", "normal"] = "zero"
    """A fresh value head begins at 0, or at random with deviation 1/sqrt(H + 1)."""
    critic_learning_rate: Annotated[float, Range(0, 1000)] = 0.0
    """The critic's own step size; 0 for learning_rate."""
    critic_max_grad_norm: NonNegativeFloat = 0.0
    """Bound on the critic's own gradient; 0 for one joint bound."""
    critic_warmup: NonNegativeInt = 0
    """Iterations at the start in which the critic alone learns."""
    num_epochs: PositiveInt = 4
    """Passes over the record."""
    num_minibatches: PositiveInt = 4
    """Optimizer steps a pass."""
    gamma: UnitInterval = 1.0
    """Discount per token."""
    lam: UnitInterval = 0.95
    """GAE's lambda of the advantages."""
    lam_value: UnitInterval | None = None
    """Lambda of the critic's targets; the same by default (VAPO: 1)."""
    objective: Literal["clip", "penalty"] = "clip"
    """Surrogate: clipped ratio, or ratio minus kl_coef * KL(old, new), exact."""
    clip: PositiveFloat = 0.2
    """How far the ratio may go from 1 before it is clipped."""
    kl_old_coef: NonNegativeFloat = 1.0
    """Coefficient of KL(old, new) in the penalty objective, initial where it adapts."""
    adaptive_kl_target: NonNegativeFloat = 0.0
    """KL(old, new) in nats a token that an adaptive kl_coef aims at, by doubling and halving; 0 for a fixed one."""
    target_kl: NonNegativeFloat = 0.0
    """End the update before a minibatch whose KL(old, new) is above this, in nats a token; 0 for off."""
    value_coef: NonNegativeFloat = 0.1
    """Coefficient of the critic's error."""
    value_clip: NonNegativeFloat = 0.2
    """How far the value may go from the old one before its loss is clipped; 0 for off."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus."""
    normalize_advantage: Literal["none", "minibatch", "batch"] = "batch"
    """Over what advantages are standardised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.off_policy != "none" and self.normalize_advantage == "minibatch":
            raise RequestError(
                "normalize_advantage is 'minibatch': it would undo the weights of off_policy; use batch or none"
            )

    def needs(self) -> list[tuple[bool, str, str]]:
        is_clipped, is_penalty = self.objective == "clip", self.objective == "penalty"
        return [
            *super().needs(),
            (self.critic == "top", "critic_layers", "has no effect on this critic: make critic top"),
            (
                self.num_epochs * self.num_minibatches > 1,
                "target_kl",
                "has no effect on a single step: raise num_epochs or num_minibatches",
            ),
            (is_clipped, "clip", "has no effect in this objective: make objective clip"),
            (
                is_penalty,
                "kl_old_coef",
                "is of KL(old, new) in objective penalty: the reference's is kl_reference_coef",
            ),
            (is_penalty, "adaptive_kl_target", "has no effect in this objective: make objective penalty"),
            (
                self.kl_old_coef > 0,
                "adaptive_kl_target",
                "has no effect on a kl_old_coef of 0, which stays 0: give kl_old_coef a value above 0",
            ),
        ]


def iterate(cfg: Config, *, engine: Engine | None = None, resume: ResumePoint | None = None) -> Iterations:
    """The loop itself, an iteration at a time: log, evaluate or break between them. An `engine` of one's own may sample."""
    with open_rlhf_run("ppo", cfg, engine, resume=resume) as (run, models):
        policy, recipe_state = models.policy, run.recipe_state
        recipe_state.setdefault("kl_old_coef", cfg.kl_old_coef)
        recipe_state.setdefault("kl_reference_coef", cfg.kl_reference_coef)
        while run.is_active:
            kl_old_coef, reference_coef = recipe_state["kl_old_coef"], recipe_state["kl_reference_coef"]
            learning_rate = run.update_learning_rate()
            rollout = models.sampler.collect(
                policy,
                first_row=run.rows,
                prompt_indices=run.next_rows(len(models.sampler), cfg.completions_per_iteration),
            )  # 1 sample
            scores = models.score_completions(rollout)
            rollout, importance_weight, off_policy_metrics = off_policy_weights(policy, rollout, cfg)
            constrained_score = models.apply_constraints(scores)
            trajectory, reward, reference_distribution = compute_rewards(
                rollout, constrained_score, models.reference, reference_coef, cfg
            )  # 2 score
            old_distribution, value = estimate_values(policy, trajectory, cfg)  # 3 value
            batch = compute_advantages(
                trajectory, reward, value, old_distribution, reference_distribution, cfg
            )  # 4 advantage
            batch = Batch.of(
                batch,
                advantage=importance_weight * batch.advantage,
                pretraining_text=models.next_pretraining_text(len(batch)),
            )
            is_critic_warmup = run.iteration < cfg.critic_warmup
            for parameter in policy.actor_parameters():
                parameter.requires_grad_(not is_critic_warmup)
            metrics = update(  # 5 update
                policy,
                models.optimizer,
                batch,
                partial(critic_only, value_clip=cfg.value_clip)
                if is_critic_warmup
                else make_objective(cfg, kl_old_coef, reference_coef),
                num_epochs=cfg.num_epochs,
                num_minibatches=cfg.num_minibatches,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size or None,
                transform_minibatch=standardize_advantages if cfg.normalize_advantage == "minibatch" else None,
                on_minibatch=None if is_critic_warmup else make_kl_early_stopping(cfg.target_kl),
                on_nonfinite=run.guard,
                verify=dict if is_critic_warmup else make_trust_region_check(policy, batch, cfg),
                generator=run.shuffle_generator,
            )
            policy.version += int(metrics["optimizer_steps"])
            was_actor_updated = (
                metrics["optimizer_steps"] > 0 and not is_critic_warmup
            )  # else a KL says nothing about its coefficient
            run.steps += int(rollout.trajectory.mask.sum())
            metrics |= models.log_rollout(rollout, scores, batch, reward, reference_distribution)
            metrics |= {"kl_reference_coef": reference_coef, "learning_rate": learning_rate} | off_policy_metrics
            if cfg.objective == "penalty":
                metrics |= {"kl_old_coef": kl_old_coef, "kl_old": measure_kl_old(policy, batch)}
                if cfg.adaptive_kl_target and was_actor_updated:
                    recipe_state["kl_old_coef"] = adapt_kl_old_coef(
                        kl_old_coef, metrics["kl_old"], target=cfg.adaptive_kl_target
                    )
            if was_actor_updated:
                recipe_state["kl_reference_coef"] = next_reference_coef(reference_coef, metrics["kl_reference"], cfg)
            if not run.is_active or run.is_due(cfg.evaluate_every):
                metrics |= models.evaluate()
            yield from run.finish_iteration(metrics)
        return run.run


def train(cfg: Config, *, engine: Engine | None = None, resume: ResumePoint | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return training.run_to_end(iterate(cfg, engine=engine, resume=resume))


def estimate_values(policy: Policy, trajectory: Trajectory, cfg: Config) -> tuple[Any, Tensor]:
    """What is kept of the policy that sampled, and V at every column."""
    sampled_tokens = SampledTokens(trajectory.action, trajectory.behavior_logprob)
    if cfg.objective == "clip" and cfg.critic == "separate":  # what the policy says is known, and V needs none of it
        return sampled_tokens, forward_in_chunks(policy.value, trajectory.obs, cfg.micro_batch_size)
    distribution, value = forward_in_chunks(policy, trajectory.obs, cfg.micro_batch_size)
    return distribution.frozen() if cfg.objective == "penalty" else sampled_tokens, value


def compute_advantages(
    trajectory: Trajectory,
    reward: Tensor,
    value: Tensor,
    old_distribution: Any,
    reference_distribution: TokenDistribution,
    cfg: Config,
) -> Batch:
    """The record with GAE's advantages and the critic's targets, each with a lambda of its own."""
    end_masks = trajectory.terminated, trajectory.truncated, trajectory.mask
    next_values = next_value(value, trajectory)
    advantage = gae(reward, value, next_values, *end_masks, gamma=cfg.gamma, lam=cfg.lam)
    lam_value = cfg.lam if cfg.lam_value is None else cfg.lam_value
    value_advantage = (
        advantage
        if lam_value == cfg.lam
        else gae(reward, value, next_values, *end_masks, gamma=cfg.gamma, lam=lam_value)
    )
    reference = (
        reference_distribution if cfg.kl_reference == "exact" else reference_distribution.log_prob(trajectory.action)
    )
    fields = {
        "value": value,
        "advantage": advantage,
        "target": value_advantage + value,
        "old_distribution": old_distribution,
        "reference": reference,
    }
    batch = Batch.of(trajectory, **fields)
    return standardize_advantages(batch) if cfg.normalize_advantage == "batch" else batch


def make_objective(cfg: Config, kl_old_coef: float, reference_coef: float) -> Callable[[Any, Batch], Losses]:
    """The objective that the config describes, with the coefficients as they now are."""
    kl_penalty = reference_kl_penalty(reference_coef, cfg)
    policy_objective = (
        partial(ppo, clip=cfg.clip) if cfg.objective == "clip" else partial(ppo_penalty, kl_old_coef=kl_old_coef)
    )
    objective = partial(
        policy_objective,
        value_coef=cfg.value_coef,
        entropy_coef=cfg.entropy_coef,
        value_clip=cfg.value_clip,
        kl_penalty=kl_penalty,
    )
    if cfg.pretraining is None:
        return objective
    return partial(with_pretraining, objective=objective, coef=cfg.pretraining_coef)


def standardize_advantages(batch: Batch) -> Batch:
    return Batch.of(batch, advantage=standardize(batch.advantage, batch.mask))


@torch.no_grad()
def measure_kl_old(policy: Policy, batch: Batch) -> float:
    """Mean KL(old, new) a token over the record, after the update."""
    return float(masked_mean(batch.old_distribution.kl(policy(batch.obs)[0]), batch.mask))
