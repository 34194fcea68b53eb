"""GRPO (Shao et al. 2024) and its family: several answers to each prompt, each judged against the others of its group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.advantage import group_relative
from understudy.batch import Batch
from understudy.language import config, training
from understudy.language.model.token_distribution import SampledTokens
from understudy.language.rewards.reward_sum import Scores
from understudy.language.rlhf import (
    RLHFModels,
    compute_rewards,
    next_reference_coef,
    off_policy_weights,
    open_rlhf_run,
    reference_kl_penalty,
)
from understudy.language.rollout.generate import Engine
from understudy.language.rollout.sampler import Rollout
from understudy.language.training import Iterations, TrainingRun
from understudy.language.trust_region import make_kl_early_stopping, make_trust_region_check
from understudy.objective import cispo, grpo, gspo, with_pretraining
from understudy.reduce import per_budget, per_row, per_step
from understudy.reward import episode_score, overlong_penalty
from understudy.run.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, RequestError
from understudy.run.store import ResumePoint, Run
from understudy.update import update

OBJECTIVES = {"grpo": grpo, "gspo": gspo, "cispo": cispo}


@dataclass(frozen=True, kw_only=True)
class Config(config.RolloutConfig):
    """GRPO on prompts. Dr. GRPO: scale_by_std off, loss_aggregation token_sum_over_budget.

    DAPO: clip_high 0.28, loss_aggregation token_mean, dynamic_sampling_rounds, overlong.
    """

    group_size: PositiveInt = 8
    """Answers to each prompt; rows / group prompts an iteration."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation; off for Dr. GRPO."""
    loss_aggregation: Literal["sequence_mean_token_mean", "token_mean", "token_sum_over_budget"] = (
        "sequence_mean_token_mean"
    )
    """What weighs the same: every row (GRPO), every token (DAPO), or a token as one of limit (Dr. GRPO)."""
    objective: Literal["grpo", "gspo", "cispo"] = "grpo"
    """Ratio a token, clipped; ratio a row, clipped (GSPO); clipped weight on every token (CISPO)."""
    clip: PositiveFloat = 0.2
    """How far the ratio may go below 1 before it is clipped."""
    clip_high: NonNegativeFloat = 0.0
    """How far it may go above 1; 0 for the same as clip (DAPO: 0.28)."""
    num_epochs: PositiveInt = 1
    """Passes over the record."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps a pass."""
    target_kl: NonNegativeFloat = 0.0
    """End the update before a minibatch whose KL(old, new) is above this, in nats a token; 0 for off."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus."""
    dynamic_sampling_rounds: NonNegativeInt = 0
    """How often prompts whose answers all score the same are replaced by others (DAPO's dynamic sampling)."""
    overlong: NonNegativeInt = 0
    """Tokens before the limit over which a completion is charged, up to 1 at the limit (DAPO); 0 for off."""
    kl_reference: Literal["reward", "k2", "k3", "exact"] = "k3"
    """KL to the reference: paid token by token (k1), or in the loss: k2, ratio-weighted k3, or exact."""
    kl_reference_coef: NonNegativeFloat = 0.0
    """Its coefficient, initial where it adapts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2 or self.completions_per_iteration % self.group_size:
            raise RequestError(
                f"group_size is {self.group_size}: must be 2 or more, and completions_per_iteration "
                f"({self.completions_per_iteration}) a multiple of it"
            )
        if self.truncation == "bootstrap":
            raise RequestError("truncation is 'bootstrap': there is no critic to bootstrap from; use another, or ppo")
        if self.objective == "gspo" and self.loss_aggregation != "sequence_mean_token_mean":
            raise RequestError(
                f"loss_aggregation is {self.loss_aggregation!r}: GSPO's ratio is a row's; use sequence_mean_token_mean"
            )

    def needs(self) -> list[tuple[bool, str, str]]:
        return [
            *super().needs(),
            (
                self.num_epochs * self.num_minibatches > 1,
                "target_kl",
                "has no effect on a single step: raise num_epochs or num_minibatches",
            ),
            (
                not self.fixed_length,
                "overlong",
                "has no effect where every completion has the same length: give max_new_tokens instead",
            ),
            (
                False,
                "whiten_rewards",
                "scales rewards token by token, where GRPO compares whole completions: use scale_by_std",
            ),
        ]


def iterate(cfg: Config, *, engine: Engine | None = None, resume: ResumePoint | None = None) -> Iterations:
    """The loop itself, an iteration at a time: log, evaluate or break between them. An `engine` of one's own may sample."""
    loss_weights = {
        "sequence_mean_token_mean": per_row,
        "token_mean": per_step,
        "token_sum_over_budget": partial(per_budget, budget=cfg.limit),
    }[cfg.loss_aggregation]
    with open_rlhf_run("grpo", cfg, engine, resume=resume) as (run, models):
        policy, recipe_state = models.policy, run.recipe_state
        recipe_state.setdefault("kl_reference_coef", cfg.kl_reference_coef)
        while run.is_active:
            reference_coef = recipe_state["kl_reference_coef"]
            learning_rate = run.update_learning_rate()
            rollout, scores, groups_without_signal = sample_groups(run, models, cfg)  # 1 sample, and judge
            rollout, importance_weight, off_policy_metrics = off_policy_weights(policy, rollout, cfg)
            score = models.apply_constraints(scores) + length_penalty(rollout, cfg)
            trajectory, reward, reference_distribution = compute_rewards(
                rollout, score, models.reference, reference_coef, cfg
            )  # 2 score
            group_index = (
                torch.arange(cfg.completions_per_iteration, device=policy.device) // cfg.group_size
            )  # 3 value: what the group scores
            advantage = group_advantage(
                episode_score(reward, trajectory.mask),
                group_index,
                trajectory.mask.any(dim=1),
                scale_by_std=cfg.scale_by_std,
            )
            batch = Batch.of(  # 4 advantage: better or worse than the others of the group
                trajectory,
                value=torch.zeros_like(reward),
                advantage=importance_weight * advantage[:, None] * trajectory.mask,
                target=torch.zeros_like(reward),
                old_distribution=SampledTokens(trajectory.action, trajectory.behavior_logprob),
                reference=reference_distribution
                if cfg.kl_reference == "exact"
                else reference_distribution.log_prob(trajectory.action),
                pretraining_text=models.next_pretraining_text(cfg.completions_per_iteration),
            )
            metrics = update(  # 5 update
                policy,
                models.optimizer,
                batch,
                make_objective(cfg, reference_coef),
                num_epochs=cfg.num_epochs,
                num_minibatches=cfg.num_minibatches,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size or None,
                loss_weights=loss_weights,
                on_minibatch=make_kl_early_stopping(cfg.target_kl),
                on_nonfinite=run.guard,
                verify=make_trust_region_check(policy, batch, cfg),
                generator=run.shuffle_generator,
            )
            policy.version += int(metrics["optimizer_steps"])
            metrics |= models.log_rollout(rollout, scores, batch, reward, reference_distribution)
            metrics |= {
                "kl_reference_coef": reference_coef,
                "learning_rate": learning_rate,
                "groups_without_signal": groups_without_signal,
            } | off_policy_metrics
            if metrics["optimizer_steps"]:
                recipe_state["kl_reference_coef"] = next_reference_coef(reference_coef, metrics["kl_reference"], cfg)
            if not run.is_active or run.is_due(cfg.evaluate_every):
                metrics |= models.evaluate()
            yield from run.finish_iteration(metrics)
        return run.run


def train(cfg: Config, *, engine: Engine | None = None, resume: ResumePoint | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return training.run_to_end(iterate(cfg, engine=engine, resume=resume))


def sample_groups(run: TrainingRun, models: RLHFModels, cfg: Config) -> tuple[Rollout, Scores, float]:
    """`group` answers to each of rows / group prompts, judged; and the share of groups whose scores were all the same.

    With `resample`, such groups are replaced, at most that many times; what is then still missing is filled with them.
    Rows and tokens of all rounds are counted, also of groups that are not learned from.
    """
    num_groups, informative_groups, uninformative_groups = cfg.completions_per_iteration // cfg.group_size, [], []
    num_sampled = 0
    for _ in range(cfg.dynamic_sampling_rounds + 1):
        first_row, num_missing = run.rows, num_groups - len(informative_groups)
        prompt_indices = run.next_rows(len(models.sampler), num_missing, num_repeats=cfg.group_size)
        rollout = models.sampler.collect(models.policy, prompt_indices, first_row=first_row)
        run.steps += int(rollout.trajectory.mask.sum())
        scores = models.score_completions(rollout)
        constrained_score = models.subtract_constraint_costs(scores)
        num_sampled += num_missing
        for group_number in range(num_missing):
            rows = slice(group_number * cfg.group_size, (group_number + 1) * cfg.group_size)
            group_score = constrained_score[rows]
            valid_score = group_score[~group_score.isnan()]
            is_uninformative = len(valid_score) < 2 or bool((valid_score == valid_score[0]).all())
            (uninformative_groups if is_uninformative else informative_groups).append((rollout, scores, rows))
        if not cfg.dynamic_sampling_rounds:
            return rollout, scores, len(uninformative_groups) / num_sampled
        if len(informative_groups) == num_groups:
            break
    return *_concatenate_groups((informative_groups + uninformative_groups)[:num_groups], models), len(
        uninformative_groups
    ) / num_sampled


def _concatenate_groups(groups: list[tuple[Rollout, Scores, slice]], models: RLHFModels) -> tuple[Rollout, Scores]:
    """Groups of several rounds as one."""
    prompts = [prompt for rollout, _, rows in groups for prompt in rollout.prompts[rows]]
    completions = [completion for said, _, rows in groups for completion in said.completions[rows]]
    scores = _concatenate_scores([(verdict, rows) for _, verdict, rows in groups])
    said = models.sampler.build_rollout(prompts, completions, models.policy.device)
    return replace(said, row_numbers=[row for said, _, rows in groups for row in said.row_numbers[rows]]), scores


def _concatenate_scores(score_slices: list[tuple[Scores, slice]]) -> Scores:
    """Rows of several verdicts as one."""
    terms = {
        name: torch.cat([scores.terms[name][rows] for scores, rows in score_slices])
        for name in score_slices[0][0].terms
    }
    gold_slices = [(verdict.gold, rows) for verdict, rows in score_slices if verdict.gold is not None]
    return Scores(
        torch.cat([scores.score[rows] for scores, rows in score_slices]),
        terms,
        _concatenate_scores(gold_slices) if gold_slices else None,
    )


def length_penalty(rollout: Rollout, cfg: Config) -> Tensor:
    """What DAPO's overlong shaping takes off each score, [B]."""
    length = torch.tensor([float(len(completion.ids)) for completion in rollout.completions])
    return overlong_penalty(length, limit=cfg.limit, margin=cfg.overlong) if cfg.overlong else torch.zeros_like(length)


def group_advantage(score: Tensor, group_index: Tensor, row_mask: Tensor, *, scale_by_std: bool) -> Tensor:
    """`group_relative` among the rows that are there; 0 for the others. All [B]."""
    advantage = torch.zeros_like(score)
    if row_mask.any():
        advantage[row_mask] = group_relative(score[row_mask], group_index[row_mask], scale_by_std=scale_by_std)
    return advantage


def make_objective(cfg: Config, reference_coef: float) -> Any:
    """The objective that the config describes."""
    objective = partial(
        OBJECTIVES[cfg.objective],
        low=cfg.clip,
        high=cfg.clip_high or cfg.clip,
        entropy_coef=cfg.entropy_coef,
        kl_penalty=reference_kl_penalty(reference_coef, cfg),
    )
    return add_pretraining_loss(objective, cfg)


def add_pretraining_loss(objective: Any, cfg: config.RolloutConfig) -> Any:
    if cfg.pretraining is None:
        return objective
    return partial(with_pretraining, objective=objective, coef=cfg.pretraining_coef)
