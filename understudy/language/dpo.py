"""DPO (Rafailov et al. 2023): from preferences to a policy without a reward model, a critic or a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.batch import PreferencePairs, TokenBatch
from understudy.language import config, training
from understudy.language.data.records import (
    Limit,
    Preference,
    Row,
    check_ids,
    common_prefix_length,
    longer_is_chosen,
    make_preferences,
    pad_sequences,
    read_rows,
)
from understudy.language.model.forward import check_forward_consistency
from understudy.language.model.policy import Policy, model_dir, module_digest
from understudy.language.provenance import check_reference
from understudy.language.sft import load_policy, select_trainable_parameters
from understudy.language.training import Iterations
from understudy.objective import Losses, dpo_loss
from understudy.reduce import cluster_ids, fraction_interval
from understudy.run.config import LearningRate, PositiveFloat, PositiveInt, UnitInterval, check_effects
from understudy.run.seeds import seed_shared_generators
from understudy.run.store import ResumePoint, Run, write_json
from understudy.update import update

EVALUATION_BATCH_SIZE = 32  # pairs a pass without gradient reads at a time


@dataclass(frozen=True, kw_only=True)
class Config(config.FineTuningConfig):
    """Pairs `chosen` and `rejected`, with or without a `prompt`."""

    learning_rate: LearningRate = 1e-5
    """AdamW's step size after the warm-up."""
    num_epochs: PositiveInt = 1
    """Passes over the data."""
    batch_size: PositiveInt = 16
    """Pairs an optimizer step sees; the last of an epoch may have fewer."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss: DPO's own, or IPO's squared one."""
    beta: PositiveFloat = 0.1
    """How dear it is to leave the reference (DPO's beta)."""
    label_smoothing: UnitInterval = 0.0
    """Share of labels taken to be wrong (cDPO); for sigmoid."""
    reference: str | None = None
    """Directory of the frozen reference; by default the policy as it starts."""

    def needs(self) -> list[tuple[bool, str, str]]:
        return [
            *super().needs(),
            (self.total_tokens == 0, "num_epochs", "has no effect beside a number of tokens: leave total_tokens out"),
            (
                self.held_out > 0 or self.evaluation_data is not None,
                "evaluate_every",
                "has no effect without rows to evaluate on: make held_out more than 0",
            ),
            (self.loss_type == "sigmoid", "label_smoothing", "has no effect with IPO's loss: make loss_type sigmoid"),
        ]


def iterate(cfg: Config, *, resume: ResumePoint | None = None) -> Iterations:
    """The loop itself, an optimizer step at a time."""
    if resume is None:
        check_effects(cfg, cfg.needs())
    torch.set_num_threads(cfg.num_threads)
    seed_shared_generators(cfg.seed)
    policy = load_policy(cfg)
    train_pairs, held_out_pairs = load_preferences(policy, cfg)
    check_forward_consistency(policy, [pair.chosen for pair in train_pairs])
    reference_logprobs, reference_digest = compute_reference_logprobs(
        policy, {"train": train_pairs, "held_out": held_out_pairs}, cfg
    )
    select_trainable_parameters(policy, cfg)
    objective = make_objective(cfg)
    total_tokens = cfg.num_epochs * sum(map(num_tokens, train_pairs))
    optimizer = training.adamw(cfg, training.trainable_parameter_group(policy))
    with training.open_run(
        "dpo", cfg, policy, optimizer, total_steps=cfg.total_tokens or total_tokens, resume=resume
    ) as run:
        training.check_reference_digest(run.run, reference_digest)
        while run.is_active:
            learning_rate = run.update_learning_rate()
            indices = run.next_minibatch(len(train_pairs), cfg.batch_size)
            pairs = collate([train_pairs[i] for i in indices], reference_logprobs["train"][indices]).to(cfg.device)
            run.steps += sum(num_tokens(train_pairs[i]) for i in indices)
            metrics = update(  # 5 update
                policy,
                optimizer,
                pairs,
                objective,
                num_epochs=1,
                num_minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size or None,
                on_nonfinite=run.guard,
                generator=run.shuffle_generator,
            )
            if held_out_pairs and (not run.is_active or run.is_due(cfg.evaluate_every)):
                evaluation = evaluate_preferences(policy, held_out_pairs, reference_logprobs["held_out"], objective)
                write_json(run.run.path / "evaluation.json", evaluation | {"after_steps": run.steps})
                metrics |= {f"evaluation_{name}": x for name, x in evaluation.items() if isinstance(x, int | float)}
            yield from run.finish_iteration(metrics | {"learning_rate": learning_rate})
        return run.run


def train(cfg: Config, *, resume: ResumePoint | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, evaluation.json how often it prefers what people did."""
    return training.run_to_end(iterate(cfg, resume=resume))


def make_objective(cfg: Config) -> Callable[[Any, PreferencePairs], Losses]:
    """The objective that the config describes."""
    return partial(dpo_loss, beta=cfg.beta, label_smoothing=cfg.label_smoothing, loss_type=cfg.loss_type)


def load_preferences(policy: Policy, cfg: Config) -> tuple[list[Preference], list[Preference]]:
    """The pairs to learn from, and those kept for evaluation; those of one prompt are on one side."""
    limit = Limit.of(policy.model, cfg.max_length)

    def make_pairs(rows: Sequence[Row], source: str) -> Sequence[Preference]:
        data = make_preferences(rows, policy.tokenizer, max_length=limit, too_long=cfg.too_long)
        check_ids(data, policy.model)
        policy.warnings += data.make_warnings(source)
        return data

    train_pairs, held_out_pairs, warnings = training.split_data(
        read_rows(cfg.data, **cfg.reading_options), make_pairs, cfg, training.preference_split_key
    )
    policy.warnings += warnings
    return train_pairs, held_out_pairs


def compute_reference_logprobs(
    policy: Policy, data: dict[str, list[Preference]], cfg: Config
) -> tuple[dict[str, Tensor], str]:
    """What the reference says of the data, and its digest. It is asked once, before anything learns, and not kept: where it
    is the policy as it starts, there is no copy of that.
    """
    source = cfg.reference
    trust_remote_code = cfg.trust_remote_code
    loaded_policy = (
        None
        if source is None
        else Policy.from_pretrained(model_dir(source, "policy"), trust_remote_code=trust_remote_code)
    )
    if source is not None:
        check_reference(source, loaded_policy, policy)
    reference = policy if loaded_policy is None else loaded_policy.to(cfg.device)
    if reference is not policy:
        check_forward_consistency(reference, [pair.chosen for pair in data["train"]])
    return {name: compute_pair_logprobs(reference, pairs) for name, pairs in data.items()}, module_digest(
        reference.model
    )


def num_tokens(pair: Preference) -> int:
    """Tokens of a pair."""
    return len(pair.chosen) + len(pair.rejected)


def shared_prefix_length(pair: Preference) -> int:
    """How many tokens both sides begin with: the prompt, or as much of it as cannot matter."""
    return max(1, common_prefix_length(pair.chosen, pair.rejected))


def collate(pairs: Sequence[Preference], reference: Tensor | None = None) -> PreferencePairs:
    """Pairs as one padded record. What both sides begin with has the same log-prob in both, and is left out of the sums."""
    starts = [shared_prefix_length(pair) for pair in pairs]
    chosen, rejected = (
        pad_sequences([pair.chosen for pair in pairs], starts),
        pad_sequences([pair.rejected for pair in pairs], starts),
    )
    return PreferencePairs(chosen, rejected, torch.tensor([[pair.margin] for pair in pairs]), reference)


@torch.no_grad()
def compute_pair_logprobs(
    policy: Policy, data: Sequence[Preference], *, micro_batch_size: int = EVALUATION_BATCH_SIZE
) -> Tensor:
    """A policy's log-probs of both sides, summed over the tokens that tell them apart, [N, 2]; on the CPU."""
    logprobs = [torch.zeros(0, 2)]
    for start in range(0, len(data), micro_batch_size):
        pairs = collate(data[start : start + micro_batch_size]).to(policy.device)
        logprobs.append(
            torch.stack([_sum_logprobs(policy, text) for text in (pairs.chosen, pairs.rejected)], dim=1).cpu()
        )
    return torch.cat(logprobs)


def _sum_logprobs(policy: Policy, text: TokenBatch) -> Tensor:
    return torch.where(text.mask, policy(text)[0].log_prob(text.action), 0.0).sum(dim=1)


@torch.no_grad()
def evaluate_preferences(
    policy: Policy, data: Sequence[Preference], reference_logprobs: Tensor, objective: Any
) -> dict[str, Any]:
    """On pairs it did not learn from: how often the chosen side gained more than the rejected, with its 95 % interval,
    in which the pairs of a prompt count as a cluster.
    """
    batch_metrics: list[dict[str, Tensor]] = []
    for start in range(0, len(data), EVALUATION_BATCH_SIZE):
        pairs = collate(
            data[start : start + EVALUATION_BATCH_SIZE], reference_logprobs[start : start + EVALUATION_BATCH_SIZE]
        )
        batch_metrics.append(objective(policy, pairs.to(policy.device))[1])
    metrics = {name: torch.cat([values[name] for values in batch_metrics]) for name in batch_metrics[0]}
    cluster = cluster_ids(list(map(training.preference_split_key, data)))
    accuracy, low, high = fraction_interval(metrics["accuracy"][:, 0].cpu(), cluster)
    names = ("loss", "margin", "chosen_logratio", "rejected_gain")
    means = {name: float(metrics[name].mean()) for name in names}
    baseline = longer_is_chosen(data)
    return {
        "rows": len(data),
        "prompts": len(cluster.unique()),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_baseline": max(baseline, 1 - baseline),
        **means,
    }
