"""REINFORCE on language models (Williams 1992; Ahmadian et al. 2024): an answer's reward to go, minus a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from understudy.advantage import leave_one_out, reward_to_go
from understudy.batch import Batch
from understudy.language import config, stage
from understudy.language.cast import next_reference_coef, open_cast, pay, reference_charge, reweigh
from understudy.language.generate import Engine
from understudy.language.grpo import with_pretrained
from understudy.language.stage import Iterations
from understudy.language.tokens import SampledTokens
from understudy.language.trust_region import verify
from understudy.objective import policy_gradient, squared_error
from understudy.reduce import masked_mean, standardize
from understudy.run.config import Count, NonNegative, RequestError, Unit
from understudy.run.store import Resume, Run
from understudy.score import episode_score
from understudy.update import update


@dataclass(frozen=True, kw_only=True)
class Config(config.Rollouts):
    """One optimizer step an iteration, on what was just sampled: no ratio, nothing to clip."""

    baseline: Literal["none", "moving", "leave_one_out", "whitened"] = "leave_one_out"
    """What is taken off: nothing; a moving mean of scores; the mean of the group's others (RLOO); the batch's mean and
    deviation (REINFORCE++)."""
    group: Count = 4
    """Answers to each prompt, for leave_one_out."""
    moving: Unit = 0.9
    """How much of the moving mean stays, an iteration."""
    gamma: Unit = 1.0
    """Discount per token."""
    entropy_coef: NonNegative = 0.0
    """Coefficient of the entropy bonus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "leave_one_out" and (self.group < 2 or self.rows % self.group):
            raise RequestError(f"group is {self.group}: must be 2 or more, and rows ({self.rows}) a multiple of it")
        if self.truncation == "bootstrap":
            raise RequestError("truncation is 'bootstrap': there is no critic to bootstrap from; use another, or ppo")

    def needs(self) -> list[tuple[bool, str, str]]:
        whole, moving = self.baseline == "leave_one_out", self.baseline == "moving"
        return [
            *super().needs(),
            (whole, "group", "has no effect on this baseline: make baseline leave_one_out"),
            (moving, "moving", "has no effect on this baseline: make baseline moving"),
            (not whole, "gamma", "has no effect where completions are compared whole: take another baseline"),
            (
                not (whole or moving),
                "whiten_rewards",
                "scales rewards token by token, where this baseline is of whole completions: take whitened or none",
            ),
        ]


def iterate(cfg: Config, *, engine: Engine | None = None, resume: Resume | None = None) -> Iterations:
    """The loop itself, an iteration at a time: log, evaluate or break between them. An `engine` of one's own may sample."""
    size = cfg.group if cfg.baseline == "leave_one_out" else 1
    with open_cast("reinforce", cfg, engine, resume=resume) as (run, cast):
        policy, kept = cast.policy, run.kept
        kept.setdefault("kl_reference_coef", cfg.kl_reference_coef)
        while run.on:
            reference_coef = kept["kl_reference_coef"]
            rate = run.schedule()
            said = cast.sampler.collect(
                policy, first=run.rows, which=run.next_rows(len(cast.sampler), cfg.rows // size, each=size)
            )  # 1 sample
            verdict = cast.judged(said)
            said, weight, weights = reweigh(policy, said, cfg)
            paid = cast.constrain(verdict)
            record, reward, referred = pay(said, paid, cast.reference, reference_coef, cfg)  # 2 score
            score = episode_score(reward, record.mask)  # 3 value: a baseline stands for it
            there = record.mask.any(dim=1)
            mean = float(masked_mean(score, there))
            baseline = kept.get("moving", mean)
            kept["moving"] = cfg.moving * baseline + (1 - cfg.moving) * mean if "moving" in kept else mean
            to_go = reward_to_go(reward, record.terminated, record.truncated, record.mask, gamma=cfg.gamma)
            advantage = relative(to_go, score, there, record.mask, baseline, cfg)  # 4 advantage
            batch = Batch.of(
                record,
                value=torch.zeros_like(reward),
                advantage=weight * advantage,
                target=to_go,
                old=SampledTokens(record.action, record.logprob),
                reference=referred if cfg.kl_reference == "exact" else referred.log_prob(record.action),
                mix=cast.pretraining(cfg.rows),
            )
            objective = partial(
                policy_gradient,
                value_coef=0.0,
                entropy_coef=cfg.entropy_coef,
                value_loss=squared_error,
                charge=reference_charge(reference_coef, cfg),
            )
            metrics = update(  # 5 update
                policy,
                cast.optimizer,
                batch,
                with_pretrained(objective, cfg),
                epochs=1,
                minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro=cfg.micro or None,
                guard=run.guard,
                verify=verify(policy, batch, cfg),
                generator=run.shuffle,
            )
            policy.version += int(metrics["optimizer_steps"])
            run.steps += int(said.record.mask.sum())
            metrics |= cast.observe(said, verdict, batch, reward, referred)
            metrics |= {"kl_reference_coef": reference_coef, "learning_rate": rate, "baseline": baseline} | weights
            if metrics["optimizer_steps"]:
                kept["kl_reference_coef"] = next_reference_coef(reference_coef, metrics["kl_reference"], cfg)
            if not run.on or run.due(cfg.evaluate_every):
                metrics |= cast.evaluate()
            yield from run.report(metrics)
        return run.run


def train(cfg: Config, *, engine: Engine | None = None, resume: Resume | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return stage.drain(iterate(cfg, engine=engine, resume=resume))


def relative(to_go: Tensor, score: Tensor, there: Tensor, mask: Tensor, baseline: float, cfg: Config) -> Tensor:
    """Reward to go [B, T] against the config's baseline. score and there: [B].

    leave_one_out compares whole answers, score for score (RLOO); the others leave each token what is still to come.
    """
    if cfg.baseline == "leave_one_out":
        group = torch.arange(len(score), device=score.device) // cfg.group
        advantage = torch.zeros_like(score)
        if there.any():
            advantage[there] = leave_one_out(score[there], group[there])
        return advantage[:, None] * mask
    if cfg.baseline == "whitened":
        return standardize(to_go, mask)
    return torch.where(mask, to_go - (baseline if cfg.baseline == "moving" else 0.0), 0.0)
