"""DPO (Rafailov et al. 2023): from preferences to a policy without a reward model, a critic or a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.batch import Pairs, Text
from understudy.language import config, stage
from understudy.language.ancestry import check_reference
from understudy.language.model import Policy, digest, home
from understudy.language.reading import check_reading
from understudy.language.sft import limit_learning, load_policy
from understudy.language.stage import Iterations
from understudy.language.text import Limit, Preference, Row, check_ids, common, pad, preferences, read
from understudy.objective import Losses, dpo
from understudy.reduce import clusters, share_interval
from understudy.run.config import Count, LearningRate, Positive, Unit, check_effects
from understudy.run.seeds import seed_shared_generators
from understudy.run.store import Resume, Run, write_json
from understudy.update import update

PIECE = 32  # pairs a pass without gradient reads at a time


@dataclass(frozen=True, kw_only=True)
class Config(config.Tuning):
    """Pairs `chosen` and `rejected`, with or without a `prompt`."""

    learning_rate: LearningRate = 1e-5
    """AdamW's step size after the warm-up."""
    epochs: Count = 1
    """Passes over the data."""
    minibatch_rows: Count = 16
    """Pairs an optimizer step sees; the last of an epoch may have fewer."""
    form: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss: DPO's own, or IPO's squared one."""
    kl_reference_coef: Positive = 0.1
    """How dear it is to leave the reference (DPO's beta)."""
    smoothing: Unit = 0.0
    """Share of labels taken to be wrong (cDPO); for sigmoid."""
    reference: str | None = None
    """Directory of the frozen reference; by default the policy as it starts."""

    def needs(self) -> list[tuple[bool, str, str]]:
        return [
            *super().needs(),
            (self.steps == 0, "epochs", "has no effect beside a number of steps: leave steps out"),
            (
                self.held_out > 0 or self.evaluation_data is not None,
                "evaluate_every",
                "has no effect without rows to evaluate on: make held_out more than 0",
            ),
            (self.form == "sigmoid", "smoothing", "has no effect with IPO's loss: make form sigmoid"),
        ]


def iterate(cfg: Config, *, resume: Resume | None = None) -> Iterations:
    """The loop itself, an optimizer step at a time."""
    if resume is None:
        check_effects(cfg, cfg.needs())
    torch.set_num_threads(cfg.threads)
    seed_shared_generators(cfg.seed)
    policy = load_policy(cfg)
    learned, kept = split(policy, cfg)
    check_reading(policy, [pair.chosen for pair in learned])
    referred, began = ask_reference(policy, {"learned": learned, "kept": kept}, cfg)
    limit_learning(policy, cfg)
    objective = loss(cfg)
    total = cfg.epochs * sum(map(size, learned))
    optimizer = stage.adamw(cfg, stage.all_of(policy))
    with stage.open_stage("dpo", cfg, policy, optimizer, total=cfg.steps or total, resume=resume) as run:
        stage.same_reference(run.run, began)
        while run.on:
            rate = run.schedule()
            some = run.next_minibatch(len(learned), cfg.minibatch_rows)
            pairs = gather([learned[i] for i in some], referred["learned"][some]).to(cfg.device)
            run.steps += sum(size(learned[i]) for i in some)
            metrics = update(  # 5 update
                policy,
                optimizer,
                pairs,
                objective,
                epochs=1,
                minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro=cfg.micro or None,
                guard=run.guard,
                generator=run.shuffle,
            )
            if kept and (not run.on or run.due(cfg.evaluate_every)):
                found = examine(policy, kept, referred["kept"], objective)
                write_json(run.run.path / "evaluation.json", found)
                metrics |= {f"evaluation_{name}": x for name, x in found.items() if isinstance(x, int | float)}
            yield from run.report(metrics | {"learning_rate": rate})
        return run.run


def train(cfg: Config, *, resume: Resume | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, evaluation.json how often it prefers what people did."""
    return stage.drain(iterate(cfg, resume=resume))


def loss(cfg: Config) -> Callable[[Any, Pairs], Losses]:
    """The objective that the config describes."""
    return partial(dpo, coef=cfg.kl_reference_coef, smoothing=cfg.smoothing, form=cfg.form)


def split(policy: Policy, cfg: Config) -> tuple[list[Preference], list[Preference]]:
    """The pairs to learn from, and those kept for evaluation; those of one prompt are on one side."""
    limit = Limit.of(policy.model, cfg.max_length)

    def make(rows: Sequence[Row], source: str) -> Sequence[Preference]:
        data = preferences(rows, policy.tokenizer, max_length=limit, too_long=cfg.too_long)
        check_ids(data, policy.model)
        policy.remarks += data.remark(source)
        return data

    learned, kept, said = stage.divide(read(cfg.data, **cfg.reading), make, cfg, stage.asked)
    policy.remarks += said
    return learned, kept


def ask_reference(policy: Policy, data: dict[str, list[Preference]], cfg: Config) -> tuple[dict[str, Tensor], str]:
    """What the reference says of the data, and its digest. It is asked once, before anything learns, and not kept: where it
    is the policy as it starts, there is no copy of that.
    """
    given = cfg.reference
    trust = cfg.trust_remote_code
    other = None if given is None else Policy.from_pretrained(home(given, "policy"), trust_remote_code=trust)
    if given is not None:
        check_reference(given, other, policy)
    reference = policy if other is None else other.to(cfg.device)
    if reference is not policy:
        check_reading(reference, [pair.chosen for pair in data["learned"]])
    return {name: refer(reference, some) for name, some in data.items()}, digest(reference.model)


def size(pair: Preference) -> int:
    """Tokens of a pair."""
    return len(pair.chosen) + len(pair.rejected)


def shared(pair: Preference) -> int:
    """How many tokens both sides begin with: the prompt, or as much of it as cannot matter."""
    return max(1, common(pair.chosen, pair.rejected))


def gather(pairs: Sequence[Preference], reference: Tensor | None = None) -> Pairs:
    """Pairs as one padded record. What both sides begin with has the same log-prob in both, and is left out of the sums."""
    starts = [shared(pair) for pair in pairs]
    chosen, rejected = pad([pair.chosen for pair in pairs], starts), pad([pair.rejected for pair in pairs], starts)
    return Pairs(chosen, rejected, torch.tensor([[pair.margin] for pair in pairs]), reference)


@torch.no_grad()
def refer(policy: Policy, data: Sequence[Preference], *, micro: int = PIECE) -> Tensor:
    """A policy's log-probs of both sides, summed over the tokens that tell them apart, [N, 2]; on the CPU."""
    found = [torch.zeros(0, 2)]
    for at in range(0, len(data), micro):
        pairs = gather(data[at : at + micro]).to(policy.device)
        found.append(torch.stack([_summed(policy, text) for text in (pairs.chosen, pairs.rejected)], dim=1).cpu())
    return torch.cat(found)


def _summed(policy: Policy, text: Text) -> Tensor:
    return torch.where(text.mask, policy(text)[0].log_prob(text.action), 0.0).sum(dim=1)


@torch.no_grad()
def examine(policy: Policy, data: Sequence[Preference], referred: Tensor, objective: Any) -> dict[str, Any]:
    """On pairs it did not learn from: how often the chosen side gained more than the rejected, with its 95 % interval,
    in which the pairs of a prompt count as a cluster.
    """
    found: list[dict[str, Tensor]] = []
    for at in range(0, len(data), PIECE):
        pairs = gather(data[at : at + PIECE], referred[at : at + PIECE])
        found.append(objective(policy, pairs.to(policy.device))[1])
    metrics = {name: torch.cat([piece[name] for piece in found]) for name in found[0]}
    cluster = clusters(list(map(stage.asked, data)))
    accuracy, low, high = share_interval(metrics["accuracy"][:, 0].cpu(), cluster)
    names = ("loss", "margin", "chosen_gain", "rejected_gain")
    means = {name: float(metrics[name].mean()) for name in names}
    longer = [len(pair.chosen) > len(pair.rejected) for pair in data]
    baseline = sum(longer) / len(longer)
    return {
        "rows": len(data),
        "prompts": len(cluster.unique()),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_baseline": max(baseline, 1 - baseline),
        **means,
    }
