"""REINFORCE on language models (Williams 1992; Ahmadian et al. 2024): an answer's reward to go, minus a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from understudy.advantage import leave_one_out, reward_to_go
from understudy.batch import Batch
from understudy.language import config, training
from understudy.language.grpo import add_pretraining_loss
from understudy.language.model.token_distribution import SampledTokens
from understudy.language.rlhf import (
    compute_rewards,
    next_reference_coef,
    off_policy_weights,
    open_rlhf_run,
    reference_kl_penalty,
)
from understudy.language.rollout.generate import Engine
from understudy.language.training import Iterations
from understudy.language.trust_region import make_trust_region_check
from understudy.objective import policy_gradient, squared_error
from understudy.reduce import masked_mean, standardize
from understudy.reward import episode_score
from understudy.run.config import NonNegativeFloat, PositiveInt, RequestError, UnitInterval
from understudy.run.store import ResumePoint, Run
from understudy.update import update


@dataclass(frozen=True, kw_only=True)
class Config(config.RolloutConfig):
    """One optimizer step an iteration, on what was just sampled: no ratio, nothing to clip."""

    baseline: Literal["none", "moving", "leave_one_out", "standardize"] = "leave_one_out"
    """What is taken off: nothing; a moving mean of scores; the mean of the group's others (RLOO); the batch's mean and
    deviation (REINFORCE++)."""
    group_size: PositiveInt = 4
    """Answers to each prompt, for leave_one_out."""
    baseline_decay: UnitInterval = 0.9
    """How much of the moving mean stays, an iteration."""
    gamma: UnitInterval = 1.0
    """Discount per token."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "leave_one_out" and (
            self.group_size < 2 or self.completions_per_iteration % self.group_size
        ):
            raise RequestError(
                f"group_size is {self.group_size}: must be 2 or more, and completions_per_iteration "
                f"({self.completions_per_iteration}) a multiple of it"
            )
        if self.truncation == "bootstrap":
            raise RequestError("truncation is 'bootstrap': there is no critic to bootstrap from; use another, or ppo")

    def needs(self) -> list[tuple[bool, str, str]]:
        is_leave_one_out, is_moving_mean = self.baseline == "leave_one_out", self.baseline == "moving"
        return [
            *super().needs(),
            (is_leave_one_out, "group_size", "has no effect on this baseline: make baseline leave_one_out"),
            (is_moving_mean, "baseline_decay", "has no effect on this baseline: make baseline moving"),
            (
                not is_leave_one_out,
                "gamma",
                "has no effect where completions are compared whole: take another baseline",
            ),
            (
                not (is_leave_one_out or is_moving_mean),
                "whiten_rewards",
                "scales rewards token by token, where this baseline is of whole completions: take standardize or none",
            ),
        ]


def iterate(cfg: Config, *, engine: Engine | None = None, resume: ResumePoint | None = None) -> Iterations:
    """The loop itself, an iteration at a time: log, evaluate or break between them. An `engine` of one's own may sample."""
    group_size = cfg.group_size if cfg.baseline == "leave_one_out" else 1
    with open_rlhf_run("reinforce", cfg, engine, resume=resume) as (run, models):
        policy, recipe_state = models.policy, run.recipe_state
        recipe_state.setdefault("kl_reference_coef", cfg.kl_reference_coef)
        while run.is_active:
            reference_coef = recipe_state["kl_reference_coef"]
            learning_rate = run.update_learning_rate()
            rollout = models.sampler.collect(
                policy,
                first_row=run.rows,
                prompt_indices=run.next_rows(
                    len(models.sampler), cfg.completions_per_iteration // group_size, num_repeats=group_size
                ),
            )  # 1 sample
            scores = models.score_completions(rollout)
            rollout, importance_weight, off_policy_metrics = off_policy_weights(policy, rollout, cfg)
            constrained_score = models.apply_constraints(scores)
            trajectory, reward, reference_distribution = compute_rewards(
                rollout, constrained_score, models.reference, reference_coef, cfg
            )  # 2 score
            score = episode_score(reward, trajectory.mask)  # 3 value: a baseline stands for it
            row_mask = trajectory.mask.any(dim=1)
            mean_score = float(masked_mean(score, row_mask))
            baseline = recipe_state.get("baseline", mean_score)
            if row_mask.any():  # rows without a score say nothing about the mean
                recipe_state["baseline"] = (
                    cfg.baseline_decay * baseline + (1 - cfg.baseline_decay) * mean_score
                    if "baseline" in recipe_state
                    else mean_score
                )
            returns = reward_to_go(
                reward, trajectory.terminated, trajectory.truncated, trajectory.mask, gamma=cfg.gamma
            )
            advantage = subtract_baseline(returns, score, row_mask, trajectory.mask, baseline, cfg)  # 4 advantage
            batch = Batch.of(
                trajectory,
                value=torch.zeros_like(reward),
                advantage=importance_weight * advantage,
                target=returns,
                old_distribution=SampledTokens(trajectory.action, trajectory.behavior_logprob),
                reference=reference_distribution
                if cfg.kl_reference == "exact"
                else reference_distribution.log_prob(trajectory.action),
                pretraining_text=models.next_pretraining_text(cfg.completions_per_iteration),
            )
            objective = partial(
                policy_gradient,
                value_coef=0.0,
                entropy_coef=cfg.entropy_coef,
                value_loss_fn=squared_error,
                kl_penalty=reference_kl_penalty(reference_coef, cfg),
            )
            metrics = update(  # 5 update
                policy,
                models.optimizer,
                batch,
                add_pretraining_loss(objective, cfg),
                num_epochs=1,
                num_minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size or None,
                on_nonfinite=run.guard,
                verify=make_trust_region_check(policy, batch, cfg),
                generator=run.shuffle_generator,
            )
            policy.version += int(metrics["optimizer_steps"])
            run.steps += int(rollout.trajectory.mask.sum())
            metrics |= models.log_rollout(rollout, scores, batch, reward, reference_distribution)
            metrics |= {"kl_reference_coef": reference_coef, "learning_rate": learning_rate} | off_policy_metrics
            metrics |= {"baseline": baseline} if cfg.baseline == "moving" else {}
            if metrics["optimizer_steps"]:
                recipe_state["kl_reference_coef"] = next_reference_coef(reference_coef, metrics["kl_reference"], cfg)
            if not run.is_active or run.is_due(cfg.evaluate_every):
                metrics |= models.evaluate()
            yield from run.finish_iteration(metrics)
        return run.run


def train(cfg: Config, *, engine: Engine | None = None, resume: ResumePoint | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return training.run_to_end(iterate(cfg, engine=engine, resume=resume))


def subtract_baseline(
    returns: Tensor, score: Tensor, row_mask: Tensor, mask: Tensor, baseline: float, cfg: Config
) -> Tensor:
    """Reward to go [B, T] against the config's baseline. score and there: [B].

    leave_one_out compares whole answers, score for score (RLOO); the others leave each token what is still to come.
    """
    if cfg.baseline == "leave_one_out":
        group_index = torch.arange(len(score), device=score.device) // cfg.group_size
        advantage = torch.zeros_like(score)
        if row_mask.any():
            advantage[row_mask] = leave_one_out(score[row_mask], group_index[row_mask])
        return advantage[:, None] * mask
    if cfg.baseline == "standardize":
        return standardize(returns, mask)
    return torch.where(mask, returns - (baseline if cfg.baseline == "moving" else 0.0), 0.0)
