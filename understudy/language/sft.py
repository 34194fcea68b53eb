"""Supervised fine-tuning: imitate completions. Sampling, scoring and advantages fall away; what is left is the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from understudy.language import config, stage
from understudy.language.model import Policy, home
from understudy.language.reading import check_reading
from understudy.language.stage import Iterations
from understudy.language.text import Example, Limit, Row, Tokenizer, TrainOn, check_ids, examples, pad, read
from understudy.objective import imitate
from understudy.run.config import Count, LearningRate, check_effects
from understudy.run.seeds import derive, seed_shared_generators
from understudy.run.store import Resume, Run
from understudy.update import update


@dataclass(frozen=True, kw_only=True)
class Config(config.Tuning):
    """Rows of prompt and completion, text, or chat."""

    train_on: TrainOn = "last"
    """Of a chat, the turns of the assistant that are learned from: the last, or all that follow the prompt."""

    learning_rate: LearningRate = 1e-4
    """AdamW's step size after the warm-up."""
    epochs: Count = 1
    """Passes over the data."""
    minibatch_rows: Count = 16
    """Rows an optimizer step sees; the last of an epoch may have fewer."""

    def needs(self) -> list[tuple[bool, str, str]]:
        return [
            *super().needs(),
            (self.steps == 0, "epochs", "has no effect beside a number of steps: leave steps out"),
            (
                self.held_out > 0 or self.evaluation_data is not None,
                "evaluate_every",
                "has no effect without rows to evaluate on: make held_out more than 0",
            ),
        ]


def iterate(cfg: Config, *, resume: Resume | None = None) -> Iterations:
    """The loop itself, an optimizer step at a time."""
    if resume is None:
        check_effects(cfg, cfg.needs())
    torch.set_num_threads(cfg.threads)
    seed_shared_generators(cfg.seed)
    policy = load_policy(cfg)
    limit_learning(policy, cfg)
    learned, kept = split(policy, cfg)
    check_reading(policy, [example.ids for example in learned])
    tokens = cfg.epochs * sum(example.learned for example in learned)
    optimizer = stage.adamw(cfg, stage.all_of(policy))
    with stage.open_stage("sft", cfg, policy, optimizer, total=cfg.steps or tokens, resume=resume) as run:
        while run.on:
            rate = run.schedule()
            some = run.next_minibatch(len(learned), cfg.minibatch_rows)
            text = pad_examples([learned[i] for i in some]).to(cfg.device)
            run.steps += int(text.mask.sum())
            metrics = update(  # 5 update
                policy,
                optimizer,
                text,
                imitate,
                epochs=1,
                minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro=cfg.micro or None,
                guard=run.guard,
                generator=run.shuffle,
            )
            if kept and (not run.on or run.due(cfg.evaluate_every)):
                loss = mean_loss(policy, kept)
                metrics |= {"evaluation_loss": loss, "evaluation_perplexity": math.exp(min(loss, 50.0))}
            yield from run.report(metrics | {"learning_rate": rate})
        return run.run


def train(cfg: Config, *, resume: Resume | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return stage.drain(iterate(cfg, resume=resume))


def split(policy: Policy, cfg: Config) -> tuple[list[Example], list[Example]]:
    """The data to learn from, and that kept for evaluation."""
    fields = {"max_length": Limit.of(policy.model, cfg.max_length), "too_long": cfg.too_long, "train_on": cfg.train_on}

    def make(rows: Sequence[Row], source: str) -> Sequence[Example]:
        data = examples(rows, policy.tokenizer, **fields)
        check_ids(data, policy.model)
        policy.remarks += data.remark(source)
        return data

    learned, kept, said = stage.divide(read(cfg.data, **cfg.reading), make, cfg, lambda example: example.ids)
    policy.remarks += said
    return learned, kept


def load_policy(cfg: config.Config, *, endless: bool = False, **options) -> Policy:
    """The policy a config names, with its tokenizer; `endless` where its completions have no stop."""
    source = home(cfg.model, "policy")
    policy = Policy.from_pretrained(
        source,
        packing=cfg.packing,
        dtype=getattr(torch, cfg.dtype),
        checkpointing=cfg.checkpointing,
        trust_remote_code=cfg.trust_remote_code,
        **options,
    )
    policy.tokenizer = Tokenizer.load(
        source,
        stop=cfg.stop,
        fixed_length=endless,
        template=cfg.template,
        add_bos=cfg.add_bos,
        keep_special_tokens=getattr(cfg, "keep_special_tokens", False),
        trust_remote_code=cfg.trust_remote_code,
    )
    return policy.to(cfg.device)


def limit_learning(policy: Policy, cfg: config.Tuning) -> None:
    """From here on, what learns is what the config says: a fresh adapter, the top layers, or everything."""
    if cfg.lora:
        seed = derive(cfg.seed, "lora")
        policy.adapt(rank=cfg.lora, alpha=cfg.lora_alpha, targets=cfg.lora_targets, seed=seed)
    if cfg.train_layers:
        policy.train_top(cfg.train_layers)


def pad_examples(some: Sequence[Example]):
    starts, unlearned = [example.start for example in some], [example.unlearned for example in some]
    return pad([example.ids for example in some], starts, unlearned)


@torch.no_grad()
def mean_loss(policy: Policy, data: Sequence[Example], *, micro: int = 32) -> float:
    """Mean -log pi in nats over the tokens that examples teach."""
    total = count = 0.0
    for at in range(0, len(data), micro):
        text = pad_examples(data[at : at + micro]).to(policy.device)
        loss, _ = imitate(policy, text)
        total += float((loss * text.mask).sum())
        count += float(text.mask.sum())
    return total / max(count, 1.0)
