"""Supervised fine-tuning: imitate completions. Sampling, scoring and advantages fall away; what is left is the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from understudy.language import config, training
from understudy.language.data.records import (
    Example,
    Limit,
    Row,
    Tokenizer,
    TrainOn,
    check_ids,
    make_examples,
    pad_sequences,
    read_rows,
)
from understudy.language.model.forward import check_forward_consistency
from understudy.language.model.policy import Policy, model_dir
from understudy.language.training import Iterations
from understudy.objective import sft_loss
from understudy.run.config import LearningRate, PositiveInt, check_effects
from understudy.run.seeds import derive_seed, seed_shared_generators
from understudy.run.store import ResumePoint, Run
from understudy.update import update


@dataclass(frozen=True, kw_only=True)
class Config(config.FineTuningConfig):
    """Rows of prompt and completion, text, or chat."""

    train_on: TrainOn = "last"
    """Of a chat, the turns of the assistant that are learned from: the last, or all that follow the prompt."""

    learning_rate: LearningRate = 1e-4
    """AdamW's step size after the warm-up."""
    num_epochs: PositiveInt = 1
    """Passes over the data."""
    batch_size: PositiveInt = 16
    """Rows an optimizer step sees; the last of an epoch may have fewer."""

    def needs(self) -> list[tuple[bool, str, str]]:
        return [
            *super().needs(),
            (self.total_tokens == 0, "num_epochs", "has no effect beside a number of tokens: leave total_tokens out"),
            (
                self.held_out > 0 or self.evaluation_data is not None,
                "evaluate_every",
                "has no effect without rows to evaluate on: make held_out more than 0",
            ),
        ]


def iterate(cfg: Config, *, resume: ResumePoint | None = None) -> Iterations:
    """The loop itself, an optimizer step at a time."""
    if resume is None:
        check_effects(cfg, cfg.needs())
    torch.set_num_threads(cfg.num_threads)
    seed_shared_generators(cfg.seed)
    policy = load_policy(cfg)
    select_trainable_parameters(policy, cfg)
    train_examples, held_out_examples = load_examples(policy, cfg)
    check_forward_consistency(policy, [example.ids for example in train_examples])
    total_tokens = cfg.num_epochs * sum(example.num_target_tokens for example in train_examples)
    optimizer = training.adamw(cfg, training.trainable_parameter_group(policy))
    with training.open_run(
        "sft", cfg, policy, optimizer, total_steps=cfg.total_tokens or total_tokens, resume=resume
    ) as run:
        while run.is_active:
            learning_rate = run.update_learning_rate()
            indices = run.next_minibatch(len(train_examples), cfg.batch_size)
            text = collate_examples([train_examples[i] for i in indices]).to(cfg.device)
            run.steps += int(text.mask.sum())
            metrics = update(  # 5 update
                policy,
                optimizer,
                text,
                sft_loss,
                num_epochs=1,
                num_minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size or None,
                on_nonfinite=run.guard,
                generator=run.shuffle_generator,
            )
            if held_out_examples and (not run.is_active or run.is_due(cfg.evaluate_every)):
                loss = mean_loss(policy, held_out_examples)
                metrics |= {"evaluation_loss": loss, "evaluation_perplexity": math.exp(min(loss, 50.0))}
            yield from run.finish_iteration(metrics | {"learning_rate": learning_rate})
        return run.run


def train(cfg: Config, *, resume: ResumePoint | None = None) -> Run:
    """Train to the end; `run.path` holds the policy, `run.metrics` what happened."""
    return training.run_to_end(iterate(cfg, resume=resume))


def load_examples(policy: Policy, cfg: Config) -> tuple[list[Example], list[Example]]:
    """The data to learn from, and that kept for evaluation."""
    fields = {"max_length": Limit.of(policy.model, cfg.max_length), "too_long": cfg.too_long, "train_on": cfg.train_on}

    def make_records(rows: Sequence[Row], source: str) -> Sequence[Example]:
        data = make_examples(rows, policy.tokenizer, **fields)
        check_ids(data, policy.model)
        policy.warnings += data.make_warnings(source)
        return data

    train_examples, held_out_examples, warnings = training.split_data(
        read_rows(cfg.data, **cfg.reading_options), make_records, cfg, lambda example: example.ids
    )
    policy.warnings += warnings
    return train_examples, held_out_examples


def load_policy(cfg: config.Config, *, has_fixed_length: bool = False, **options) -> Policy:
    """The policy a config names, with its tokenizer; `has_fixed_length` where its completions have no stop."""
    source = model_dir(cfg.model, "policy")
    policy = Policy.from_pretrained(
        source,
        packing=cfg.packing,
        dtype=getattr(torch, cfg.dtype),
        gradient_checkpointing=cfg.gradient_checkpointing,
        trust_remote_code=cfg.trust_remote_code,
        **options,
    )
    policy.tokenizer = Tokenizer.load(
        source,
        stop=cfg.stop,
        has_fixed_length=has_fixed_length,
        chat_template=cfg.chat_template,
        add_bos=cfg.add_bos,
        keep_special_tokens=getattr(cfg, "keep_special_tokens", False),
        trust_remote_code=cfg.trust_remote_code,
    )
    return policy.to(cfg.device)


def select_trainable_parameters(policy: Policy, cfg: config.FineTuningConfig) -> None:
    """From here on, what learns is what the config says: a fresh adapter, the top layers, or everything."""
    if cfg.lora_rank:
        seed = derive_seed(cfg.seed, "lora")
        policy.add_lora_adapter(rank=cfg.lora_rank, alpha=cfg.lora_alpha, targets=cfg.lora_target_modules, seed=seed)
    if cfg.train_layers:
        policy.train_top_layers(cfg.train_layers)


def collate_examples(examples: Sequence[Example]):
    starts, ignored_spans = [example.start for example in examples], [example.ignored_spans for example in examples]
    return pad_sequences([example.ids for example in examples], starts, ignored_spans)


@torch.no_grad()
def mean_loss(policy: Policy, data: Sequence[Example], *, micro_batch_size: int = 32) -> float:
    """Mean -log pi in nats over the tokens that examples teach."""
    total = num_tokens = 0.0
    for start in range(0, len(data), micro_batch_size):
        text = collate_examples(data[start : start + micro_batch_size]).to(policy.device)
        loss, _ = sft_loss(policy, text)
        total += float((loss * text.mask).sum())
        num_tokens += float(text.mask.sum())
    return total / max(num_tokens, 1.0)
