"""GRPO (Shao et al. 2024) and its family: several answers to each prompt, each judged against the others of its group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.advantage import group_relative
from understudy.batch import Batch
from understudy.language import config, stage
from understudy.language.cast import Cast, next_reference_coef, open_cast, pay, reference_charge, reweigh
from understudy.language.collect import Said
from understudy.language.generate import Engine
from understudy.language.judge import Verdict
from understudy.language.stage import Iterations, Stage
from understudy.language.tokens import SampledTokens
from understudy.language.trust_region import stop_early, verify
from understudy.objective import cispo, grpo, gspo, with_pretraining
from understudy.reduce import per_budget, per_row, per_step
from understudy.run.config import Count, NonNegative, Positive, RequestError, Whole
from understudy.run.store import Resume, Run
from understudy.score import episode_score, overlong
from understudy.update import update

OBJECTIVES = {"grpo": grpo, "gspo": gspo, "cispo": cispo}


@dataclass(frozen=True, kw_only=True)
class Config(config.Rollouts):
    """GRPO on prompts. Dr. GRPO: scale off, aggregate budget. DAPO: clip_high 0.28, aggregate step, resample, overlong."""

    group: Count = 8
    """Answers to each prompt; rows / group prompts an iteration."""
    scale: bool = True
    """Divide by the group's standard deviation; off for Dr. GRPO."""
    aggregate: Literal["row", "step", "budget"] = "row"
    """What weighs the same: every row (GRPO), every token (DAPO), or a token as one of limit (Dr. GRPO)."""
    objective: Literal["grpo", "gspo", "cispo"] = "grpo"
    """Ratio a token, clipped; ratio a row, clipped (GSPO); clipped weight on every token (CISPO)."""
    clip: Positive = 0.2
    """How far the ratio may go below 1 before it is clipped."""
    clip_high: NonNegative = 0.0
    """How far it may go above 1; 0 for the same as clip (DAPO: 0.28)."""
    epochs: Count = 1
    """Passes over the record."""
    minibatches: Count = 1
    """Optimizer steps a pass."""
    target_kl: NonNegative = 0.0
    """End the update before a minibatch whose KL(old, new) is above this, in nats a token; 0 for off."""
    entropy_coef: NonNegative = 0.0
    """Coefficient of the entropy bonus."""
    resample: Whole = 0
    """How often prompts whose answers all score the same are replaced by others (DAPO's dynamic sampling)."""
    overlong: Whole = 0
    """Tokens before the limit over which a completion is charged, up to 1 at the limit (DAPO); 0 for off."""
    kl_reference: Literal["reward", "k2", "k3", "exact"] = "k3"
    """KL to the reference: paid token by token (k1), or in the loss: k2, ratio-weighted k3, or exact."""
    kl_reference_coef: NonNegative = 0.0
    """Its coefficient, initial where it adapts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 2 or self.rows % self.group:
            raise RequestError(f"group is {self.group}: must be 2 or more, and rows ({self.rows}) a multiple of it")
        if self.truncation == "bootstrap":
            raise RequestError("truncation is 'bootstrap': there is no critic to bootstrap from; use another, or ppo")
        if self.objective == "gspo" and self.aggregate != "row":
            raise RequestError(f"aggregate is {self.aggregate!r}: GSPO's ratio is a row's; use aggregate row")

    def needs(self) -> list[tuple[bool, str, str]]:
        return [
            *super().needs(),
            (
                self.epochs * self.minibatches > 1,
                "target_kl",
                "has no effect on a single step: raise epochs or minibatches",
            ),
            (
                not self.fixed_length,
                "overlong",
                "has no effect where every completion has the same length: give max_new instead",
            ),
            (
                False,
                "whiten_rewards",
                "scales rewards token by token, where GRPO compares whole completions: use scale",
            ),
        ]


def iterate(cfg: Config, *, engine: Engine | None = None, resume: Resume | None = None) -> Iterations:
    """The loop itself, an iteration at a time: log, evaluate or break between them. An `engine` of one's own may sample."""
    weigh = {"row": per_row, "step": per_step, "budget": partial(per_budget, budget=cfg.limit)}[cfg.aggregate]
    with open_cast("grpo", cfg, engine, resume=resume) as (run, cast):
        policy, kept = cast.policy, run.kept
        kept.setdefault("kl_reference_coef", cfg.kl_reference_coef)
        while run.on:
            reference_coef = kept["kl_reference_coef"]
            rate = run.schedule()
            said, verdict, equal = sample_groups(run, cast, cfg)  # 1 sample, and judge
            said, weight, weights = reweigh(policy, said, cfg)
            score = cast.constrain(verdict) + charge_for_length(said, cfg)
            record, reward, referred = pay(said, score, cast.reference, reference_coef, cfg)  # 2 score
            members = torch.arange(cfg.rows, device=policy.device) // cfg.group  # 3 value: what the group scores
            advantage = compare(episode_score(reward, record.mask), members, record.mask.any(dim=1), scale=cfg.scale)
            batch = Batch.of(  # 4 advantage: better or worse than the others of the group
                record,
                value=torch.zeros_like(reward),
                advantage=weight * advantage[:, None] * record.mask,
                target=torch.zeros_like(reward),
                old=SampledTokens(record.action, record.logprob),
                reference=referred if cfg.kl_reference == "exact" else referred.log_prob(record.action),
                mix=cast.pretraining(cfg.rows),
            )
            metrics = update(  # 5 update
                policy,
                cast.optimizer,
                batch,
                surrogate(cfg, reference_coef),
                epochs=cfg.epochs,
                minibatches=cfg.minibatches,
                max_grad_norm=cfg.max_grad_norm,
                micro=cfg.micro or None,
                weigh=weigh,
                steer=stop_early(cfg.target_kl),
                guard=run.guard,
                verify=verify(policy, batch, cfg),
                generator=run.shuffle,
            )
            policy.version += int(metrics["optimizer_steps"])
            metrics |= cast.observe(said, verdict, batch, reward, referred)
            metrics |= {"kl_reference_coef": reference_coef, "learning_rate": rate, "groups_equal": equal} | weights
            if metrics["optimizer_steps"]:
                kept["kl_reference_coef"] = next_reference_coef(reference_coef, metrics["kl_reference"], cfg)
            if not run.on or run.due(cfg.evaluate_every):
                metrics |= cast.evaluate()
            yield from run.report(metrics)
        return run.run


def train(cfg: Config, *, engine: Engine | None = None, resume: Resume | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return stage.drain(iterate(cfg, engine=engine, resume=resume))


def sample_groups(run: Stage, cast: Cast, cfg: Config) -> tuple[Said, Verdict, float]:
    """`group` answers to each of rows / group prompts, judged; and the share of groups whose scores were all the same.

    With `resample`, such groups are replaced, at most that many times; what is then still missing is filled with them.
    Rows and tokens of all rounds are counted, also of groups that are not learned from.
    """
    wanted, kept, dull = cfg.rows // cfg.group, [], []
    asked = 0
    for _ in range(cfg.resample + 1):
        first, count = run.rows, wanted - len(kept)
        which = run.next_rows(len(cast.sampler), count, each=cfg.group)
        said = cast.sampler.collect(cast.policy, which, first=first)
        run.steps += int(said.record.mask.sum())
        verdict = cast.judged(said)
        paid = cast.paid(verdict)
        asked += count
        for place in range(count):
            rows = slice(place * cfg.group, (place + 1) * cfg.group)
            score = paid[rows]
            found = score[~score.isnan()]
            same = len(found) < 2 or bool((found == found[0]).all())
            (dull if same else kept).append((said, verdict, rows))
        if not cfg.resample:
            return said, verdict, len(dull) / asked
        if len(kept) == wanted:
            break
    return *_gathered((kept + dull)[:wanted], cast), len(dull) / asked


def _gathered(groups: list[tuple[Said, Verdict, slice]], cast: Cast) -> tuple[Said, Verdict]:
    """Groups of several rounds as one."""
    prompts = [prompt for said, _, rows in groups for prompt in said.prompts[rows]]
    completions = [completion for said, _, rows in groups for completion in said.completions[rows]]
    verdict = _one_verdict([(verdict, rows) for _, verdict, rows in groups])
    said = cast.sampler.written_down(prompts, completions, cast.policy.device)
    return replace(said, rows=[row for said, _, rows in groups for row in said.rows[rows]]), verdict


def _one_verdict(found: list[tuple[Verdict, slice]]) -> Verdict:
    """Rows of several verdicts as one."""
    parts = {name: torch.cat([verdict.parts[name][rows] for verdict, rows in found]) for name in found[0][0].parts}
    golds = [(verdict.gold, rows) for verdict, rows in found if verdict.gold is not None]
    return Verdict(torch.cat([v.score[rows] for v, rows in found]), parts, _one_verdict(golds) if golds else None)


def charge_for_length(said: Said, cfg: Config) -> Tensor:
    """What DAPO's overlong shaping takes off each score, [B]."""
    length = torch.tensor([float(len(completion.ids)) for completion in said.completions])
    return overlong(length, limit=cfg.limit, margin=cfg.overlong) if cfg.overlong else torch.zeros_like(length)


def compare(score: Tensor, group: Tensor, there: Tensor, *, scale: bool) -> Tensor:
    """`group_relative` among the rows that are there; 0 for the others. All [B]."""
    advantage = torch.zeros_like(score)
    if there.any():
        advantage[there] = group_relative(score[there], group[there], scale=scale)
    return advantage


def surrogate(cfg: Config, reference_coef: float) -> Any:
    """The objective that the config describes."""
    objective = partial(
        OBJECTIVES[cfg.objective],
        low=cfg.clip,
        high=cfg.clip_high or cfg.clip,
        entropy_coef=cfg.entropy_coef,
        charge=reference_charge(reference_coef, cfg),
    )
    return with_pretrained(objective, cfg)


def with_pretrained(objective: Any, cfg: config.Rollouts) -> Any:
    if cfg.pretraining is None:
        return objective
    return partial(with_pretraining, objective=objective, coef=cfg.pretraining_coef)
