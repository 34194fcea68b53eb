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
from understudy.language import config, stage
from understudy.language.cast import in_pieces, next_reference_coef, open_cast, pay, reference_charge, reweigh
from understudy.language.generate import Engine
from understudy.language.model import Policy
from understudy.language.stage import Iterations
from understudy.language.tokens import SampledTokens, TokenDistribution
from understudy.language.trust_region import stop_early, verify
from understudy.objective import Losses, adapt_kl_coef, critic_alone, ppo, ppo_penalty, with_pretraining
from understudy.reduce import masked_mean, standardize
from understudy.run.config import Count, NonNegative, Positive, Range, RequestError, Unit, Whole
from understudy.run.store import Resume, Run
from understudy.update import update
from understudy.value import next_value


@dataclass(frozen=True, kw_only=True)
class Config(config.Rollouts):
    """PPO on prompts: every published variant is a field."""

    critic: Literal["shared", "separate", "top"] = "shared"
    """V as a linear output on the policy's trunk, on a trunk of its own (the reward model's, where reward is one), or on
    top layers of its own above the policy's lower ones."""
    critic_layers: Count = 1
    """Layers of its own of a critic that is top."""
    critic_init: Literal["zero", "normal"] = "zero"
    """A fresh value head begins at 0, or at random with deviation 1/sqrt(H + 1)."""
    critic_learning_rate: Annotated[float, Range(0, 1000)] = 0.0
    """The critic's own step size; 0 for learning_rate."""
    critic_max_grad_norm: NonNegative = 0.0
    """Bound on the critic's own gradient; 0 for one joint bound."""
    critic_warmup: Whole = 0
    """Iterations at the start in which the critic alone learns."""
    epochs: Count = 4
    """Passes over the record."""
    minibatches: Count = 4
    """Optimizer steps a pass."""
    gamma: Unit = 1.0
    """Discount per token."""
    lam: Unit = 0.95
    """GAE's lambda of the advantages."""
    lam_value: Unit | None = None
    """Lambda of the critic's targets; the same by default (VAPO: 1)."""
    objective: Literal["clip", "penalty"] = "clip"
    """Surrogate: clipped ratio, or ratio minus kl_coef * KL(old, new), exact."""
    clip: Positive = 0.2
    """How far the ratio may go from 1 before it is clipped."""
    kl_coef: NonNegative = 1.0
    """Coefficient of KL(old, new) in the penalty objective, initial where it adapts."""
    adaptive_kl_target: NonNegative = 0.0
    """KL(old, new) in nats a token that an adaptive kl_coef aims at, by doubling and halving; 0 for a fixed one."""
    target_kl: NonNegative = 0.0
    """End the update before a minibatch whose KL(old, new) is above this, in nats a token; 0 for off."""
    value_coef: NonNegative = 0.1
    """Coefficient of the critic's error."""
    value_clip: NonNegative = 0.2
    """How far the value may go from the old one before its loss is clipped; 0 for off."""
    entropy_coef: NonNegative = 0.0
    """Coefficient of the entropy bonus."""
    standardize: Literal["none", "minibatch", "batch"] = "batch"
    """Over what advantages are standardised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.off_policy != "none" and self.standardize == "minibatch":
            raise RequestError("standardize is 'minibatch': it would undo the weights of off_policy; use batch or none")

    def needs(self) -> list[tuple[bool, str, str]]:
        clipped, penalty = self.objective == "clip", self.objective == "penalty"
        return [
            *super().needs(),
            (self.critic == "top", "critic_layers", "has no effect on this critic: make critic top"),
            (
                self.epochs * self.minibatches > 1,
                "target_kl",
                "has no effect on a single step: raise epochs or minibatches",
            ),
            (clipped, "clip", "has no effect in this objective: make objective clip"),
            (penalty, "kl_coef", "is of KL(old, new) in objective penalty: the reference's is kl_reference_coef"),
            (penalty, "adaptive_kl_target", "has no effect in this objective: make objective penalty"),
            (
                self.kl_coef > 0,
                "adaptive_kl_target",
                "has no effect on a kl_coef of 0, which stays 0: give kl_coef a value above 0",
            ),
        ]


def iterate(cfg: Config, *, engine: Engine | None = None, resume: Resume | None = None) -> Iterations:
    """The loop itself, an iteration at a time: log, evaluate or break between them. An `engine` of one's own may sample."""
    with open_cast("ppo", cfg, engine, resume=resume) as (run, cast):
        policy, kept = cast.policy, run.kept
        kept.setdefault("kl_coef", cfg.kl_coef)
        kept.setdefault("kl_reference_coef", cfg.kl_reference_coef)
        while run.on:
            kl_coef, reference_coef = kept["kl_coef"], kept["kl_reference_coef"]
            rate = run.schedule()
            said = cast.sampler.collect(
                policy, first=run.rows, which=run.next_rows(len(cast.sampler), cfg.rows)
            )  # 1 sample
            verdict = cast.judged(said)
            said, weight, weights = reweigh(policy, said, cfg)
            paid = cast.constrain(verdict)
            record, reward, referred = pay(said, paid, cast.reference, reference_coef, cfg)  # 2 score
            old, value = look(policy, record, cfg)  # 3 value
            batch = weigh_up(record, reward, value, old, referred, cfg)  # 4 advantage
            batch = Batch.of(batch, advantage=weight * batch.advantage, mix=cast.pretraining(len(batch)))
            warming = run.iteration < cfg.critic_warmup
            for parameter in policy.actor_parameters():
                parameter.requires_grad_(not warming)
            metrics = update(  # 5 update
                policy,
                cast.optimizer,
                batch,
                partial(critic_alone, value_clip=cfg.value_clip)
                if warming
                else surrogate(cfg, kl_coef, reference_coef),
                epochs=cfg.epochs,
                minibatches=cfg.minibatches,
                max_grad_norm=cfg.max_grad_norm,
                micro=cfg.micro or None,
                prepare=standardized if cfg.standardize == "minibatch" else None,
                steer=None if warming else stop_early(cfg.target_kl),
                guard=run.guard,
                verify=dict if warming else verify(policy, batch, cfg),
                generator=run.shuffle,
            )
            policy.version += int(metrics["optimizer_steps"])
            moved = metrics["optimizer_steps"] > 0 and not warming  # else a KL says nothing about its coefficient
            run.steps += int(said.record.mask.sum())
            metrics |= cast.observe(said, verdict, batch, reward, referred)
            metrics |= {"kl_reference_coef": reference_coef, "learning_rate": rate} | weights
            if cfg.objective == "penalty":
                metrics |= {"kl_coef": kl_coef, "kl_old": kl_since(policy, batch)}
                if cfg.adaptive_kl_target and moved:
                    kept["kl_coef"] = adapt_kl_coef(kl_coef, metrics["kl_old"], target=cfg.adaptive_kl_target)
            if moved:
                kept["kl_reference_coef"] = next_reference_coef(reference_coef, metrics["kl_reference"], cfg)
            if not run.on or run.due(cfg.evaluate_every):
                metrics |= cast.evaluate()
            yield from run.report(metrics)
        return run.run


def train(cfg: Config, *, engine: Engine | None = None, resume: Resume | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return stage.drain(iterate(cfg, engine=engine, resume=resume))


def look(policy: Policy, record: Trajectory, cfg: Config) -> tuple[Any, Tensor]:
    """What is kept of the policy that sampled, and V at every column."""
    sampled = SampledTokens(record.action, record.logprob)
    if cfg.objective == "clip" and cfg.critic == "separate":  # what the policy says is known, and V needs none of it
        return sampled, in_pieces(policy.value, record.obs, cfg.micro)
    distribution, value = in_pieces(policy, record.obs, cfg.micro)
    return distribution.frozen() if cfg.objective == "penalty" else sampled, value


def weigh_up(
    record: Trajectory, reward: Tensor, value: Tensor, old: Any, referred: TokenDistribution, cfg: Config
) -> Batch:
    """The record with GAE's advantages and the critic's targets, each with a lambda of its own."""
    ends = record.terminated, record.truncated, record.mask
    following = next_value(value, record)
    advantage = gae(reward, value, following, *ends, gamma=cfg.gamma, lam=cfg.lam)
    lam_value = cfg.lam if cfg.lam_value is None else cfg.lam_value
    towards = (
        advantage if lam_value == cfg.lam else gae(reward, value, following, *ends, gamma=cfg.gamma, lam=lam_value)
    )
    reference = referred if cfg.kl_reference == "exact" else referred.log_prob(record.action)
    found = {"value": value, "advantage": advantage, "target": towards + value, "old": old, "reference": reference}
    batch = Batch.of(record, **found)
    return standardized(batch) if cfg.standardize == "batch" else batch


def surrogate(cfg: Config, kl_coef: float, reference_coef: float) -> Callable[[Any, Batch], Losses]:
    """The objective that the config describes, with the coefficients as they now are."""
    charge = reference_charge(reference_coef, cfg)
    chosen = partial(ppo, clip=cfg.clip) if cfg.objective == "clip" else partial(ppo_penalty, kl_coef=kl_coef)
    objective = partial(
        chosen, value_coef=cfg.value_coef, entropy_coef=cfg.entropy_coef, value_clip=cfg.value_clip, charge=charge
    )
    if cfg.pretraining is None:
        return objective
    return partial(with_pretraining, objective=objective, coef=cfg.pretraining_coef)


def standardized(batch: Batch) -> Batch:
    return Batch.of(batch, advantage=standardize(batch.advantage, batch.mask))


@torch.no_grad()
def kl_since(policy: Policy, batch: Batch) -> float:
    """Mean KL(old, new) a token over the record, after the update."""
    return float(masked_mean(batch.old.kl(policy(batch.obs)[0]), batch.mask))
