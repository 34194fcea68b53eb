"""What the recipes of the language world have in common: the fields of their configs. Defaults live in configs only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from understudy.constraints import Constraint
from understudy.language.data.files import Table
from understudy.reward import TruncationMode
from understudy.run.config import (
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    RequestError,
    Size,
    Temperature,
    Threads,
    UnitInterval,
    check_fields,
)
from understudy.run.device import check_device

IN_MEMORY_FIELDS = ("data", "evaluation_data", "pretraining")
"""Fields that may be rows; a run keeps them as FIELD.jsonl."""


class FunctionSpec(str):
    """A Python function where a config has the text of a SPEC; as JSON it is its name, and its weight where it has one."""

    call: Callable[..., Any]
    weight: float

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionSpec:
        return self  # a function of the user's may hold what cannot be copied

    @classmethod
    def of(cls, call: Callable[..., Any], weight: float = 1.0) -> FunctionSpec:
        spec = cls(
            f"function {getattr(call, '__name__', type(call).__name__)}" + (f"*{weight}" if weight != 1.0 else "")
        )
        spec.call, spec.weight = call, weight
        return spec


def parse_specs(value: Any) -> tuple[str, ...]:
    """A spec or a function, either with a weight as a pair, or several of them, as a tuple."""
    values = value if isinstance(value, tuple | list) and not _is_pair(value) else (value,)
    return tuple(map(_parse_spec, values))


def _parse_spec(value: Any) -> Any:
    spec, weight = value if _is_pair(value) else (value, 1.0)
    if callable(spec):
        return FunctionSpec.of(spec, weight)
    return f"{spec}*{weight}" if _is_pair(value) else value


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], int | float)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of every language recipe."""

    model: str
    """Directory, run or hub id of a causal LM."""
    data: str
    """JSONL, CSV, Parquet or JSON file, directory, or datasets name. In Python also rows (a list of dicts, a
    datasets.Dataset), which the run keeps as data.jsonl."""
    data_config: str | None = None
    """Which configuration of a datasets name, or which folder of a directory, is read."""
    data_split: str = "train"
    """Which split of a datasets name or directory is read."""
    columns: tuple[str, ...] = ()
    """Names in the data for ours, each ours=theirs: prompt=question."""
    total_tokens: NonNegativeInt = 0
    """Tokens chosen (or learned from) in all; 0 for what `epochs` or the recipe's default come to."""
    seed: NonNegativeInt = 0
    """Seed of everything: weights, samples, order."""
    output_dir: str | None = None
    """Directory of the run; runs/NAME-N by default."""
    held_out: NonNegativeInt = 64
    """Rows kept for evaluation, at most a quarter of the data, chosen by their content alone."""
    evaluation_data: str | None = None
    """Rows to evaluate on, in a file like data, instead of rows held out; all of data is then learned from."""
    stop: tuple[str, ...] = ()
    r"""Tokens (text or ids) or longer texts that end a completion; a flag's \n is a line's end; default: the model's."""
    chat_template: str | None = None
    """Jinja chat template, or its file, instead of the tokenizer's own."""
    add_bos: bool = False
    """Begin text with BOS even where the tokenizer adds none of itself; saved with the tokenizer."""
    max_length: PositiveInt = 512
    """Tokens a row of data may have; at most the model's context."""
    too_long: Literal["refuse", "skip", "cut"] = "refuse"
    """A row that is longer: refused, left out, or cut at its beginning where an answer follows; how many is said."""
    device: str = "cpu"
    """Torch device."""
    num_threads: Threads = 1
    """Torch threads; small models are fastest with one or two."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; logits and losses are float32. AdamW keeps float32 copies of bfloat16 parameters that
    learn: 12 bytes each."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""
    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer (auto_map); without it such a model is refused."""
    packing: bool = False
    """Read several rows as one, so that little is spent on padding."""

    learning_rate: LearningRate = 1e-5
    """AdamW's step size after the warm-up."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How it goes on after the warm-up: constant, or down to 0 at the end of the run, in a line or half a cosine."""
    warmup: UnitInterval = 0.0
    """Share w of the run over which the learning rate rises: learning_rate * t/w after a share t < w of the run."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Bound on the gradient's norm."""
    micro_batch_size: NonNegativeInt = 0
    """Rows a single forward pass sees; 0 for a whole minibatch."""

    evaluate_every: NonNegativeInt = 0
    """Iterations between evaluations on held-out rows; 0 for one at the end."""
    checkpoint_every: NonNegativeInt = 0
    """Iterations between checkpoints; 0 for five over the run. A run can go on from each to the bit."""
    keep_checkpoints: PositiveInt = 3
    """How many of the newest checkpoints stay."""
    log_every: PositiveInt = 1
    """Iterations between lines of metrics."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl."""
    quiet: bool = False
    """No progress on the terminal."""

    def __post_init__(self) -> None:
        for name in IN_MEMORY_FIELDS:
            value = getattr(self, name, None)
            if value is not None and not isinstance(value, str):
                stored = str(value) if isinstance(value, os.PathLike) else Table.of(value)
                object.__setattr__(self, name, stored)
        check_fields(self)
        check_device(self.device)
        if self.weight_decay * self.learning_rate >= 1:
            raise RequestError(
                f"weight_decay is {self.weight_decay:g}: times learning_rate {self.learning_rate:g} it must be below 1, "
                "or a step turns every weight around"
            )
        for pair in self.columns:
            if not all(pair.partition("=")):
                raise RequestError(f"columns is {pair!r}: must be ours=theirs, as in prompt=question")
        if len(self.reading_options["columns"]) < len(self.columns):
            raise RequestError(f"columns is {' '.join(self.columns)}, which fills a column twice: keep one")

    def needs(self) -> list[tuple[bool, str, str]]:
        """Which fields have an effect, and what those lack that have none: see `run.config.check_effects`."""
        return [(self.evaluation_data is None, "held_out", "has no effect beside evaluation_data: leave that out")]

    @property
    def reading_options(self) -> dict[str, Any]:
        """How `read` is to read the data: the columns from our names to the data's, the configuration and the split."""
        columns = {our_name: data_name for our_name, _, data_name in (pair.partition("=") for pair in self.columns)}
        return {"columns": columns, "config": self.data_config, "split": self.data_split}


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(Config):
    """Fields of every recipe that ends with a policy: how much of it learns."""

    lora_rank: NonNegativeInt = 0
    """Rank of a low-rank adapter that learns in place of the model's own weights; 0 for off."""
    lora_alpha: Annotated[float, Range(0, 1_000_000, exclude_low=True)] = 32.0
    """Its scale: what it says counts alpha / rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Linear layers that get one, by their last names (q_proj v_proj); all of the trunk's by default."""
    train_layers: NonNegativeInt = 0
    """Layers that learn, counted from the top, with the norm behind them; embeddings and head stand still. 0 for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank and self.train_layers:
            raise RequestError(
                f"train_layers is {self.train_layers} beside lora_rank {self.lora_rank}: an adapter learns in "
                "place of the layers; "
                "leave one of them out"
            )

    def needs(self) -> list[tuple[bool, str, str]]:
        return [
            *super().needs(),
            (
                self.lora_rank > 0,
                "lora_alpha lora_target_modules",
                "has no effect without an adapter: give lora_rank a rank",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(FineTuningConfig):
    """Fields of every recipe that lets the policy answer prompts and be paid for it."""

    total_tokens: NonNegativeInt = 200_000
    """Tokens chosen in all; the run ends at the first iteration boundary at or after it."""
    reward: tuple[str, ...]
    """What is paid: each DIR of a reward model, file.py:function or builtin[:args], optionally *WEIGHT; summed."""
    gold: tuple[str, ...] = ()
    """What is measured and never trained on; specs like those of reward."""
    unconditional: bool = False
    """Sample from BOS alone, for data without prompts: each row is a completion, and its columns go to the rewards."""
    keep_special_tokens: bool = False
    """Completions reach reward functions, replies and samples with special tokens, such as <think>, as text."""
    missing_score: Literal["term", "row"] = "term"
    """What a function that says None, or an empty cell to compare with, leaves out: its term of the sum, or the row. A
    failure always leaves out the row."""
    reply: str | None = None
    """What others say after each turn of the policy, file.py:function: text, ids or messages; None ends the completion."""
    max_turns: PositiveInt = 8
    """Turns the policy has at most, where there is a reply."""
    constraint: tuple[str, ...] = ()
    """Bounds on a mean over completions: repetition<=0.1, then :hold (default), :warn, :stop or :rollback. Bounded is a part
    of gold or reward by its name, a metric by its own, or what a spec measures."""
    constraint_rate: PositiveFloat = 0.1
    """How fast a held bound's multiplier follows: added an iteration for every unit that the mean is outside."""
    constraint_rollbacks: NonNegativeInt = 3
    """How often a run may go back to its last state inside a bound, the learning rate halved, before it stops."""
    reward_timeout: PositiveFloat = 30.0
    """Seconds a file's function may take for a batch."""
    completions_per_iteration: Size = 64
    """Completions an iteration."""
    max_new_tokens: PositiveInt = 64
    """Tokens a completion may have."""
    fixed_length: NonNegativeInt = 0
    """Every completion has this many tokens and no other end; 0 for off."""
    temperature: Temperature = 1.0
    """Of sampling, and of every log-prob."""
    top_k: NonNegativeInt = 0
    """Sample from the k likeliest tokens only; 0 for all. It needs off_policy, which weighs what is sampled so."""
    top_p: Annotated[float, Range(0, 1, exclude_low=True)] = 1.0
    """Sample from the fewest likeliest tokens whose probability reaches this; 1 for all. It needs off_policy, too."""
    max_num_seqs: Size = 64
    """Completions continued at a time."""
    reference: str | None = None
    """Directory of the frozen reference; by default the policy as it starts."""
    reference_mode: Literal["copy", "adapter_off", "frozen_top"] | None = None
    """How the policy's start is kept: whole; as what lora learns beside; as a copy of train_layers alone. By default, what
    takes least memory."""

    off_policy: Literal["none", "truncate", "mask"] = "none"
    """Weights pi / sampler on advantages, for samples of another engine, precision or version: none; cut at off_policy_high;
    0 outside off_policy_low to off_policy_high."""
    off_policy_ratio: Literal["step", "row", "row_mean"] = "step"
    """Whose ratio it is: each token's, the completion's product, or its geometric mean."""
    off_policy_low: NonNegativeFloat = 0.5
    """Lowest weight that is kept where off_policy is mask."""
    off_policy_high: PositiveFloat = 2.0
    """Highest weight."""
    kl_reference: Literal["reward", "k2", "k3", "exact"] = "reward"
    """KL to the reference: paid token by token (k1), or in the loss: k2, ratio-weighted k3, or exact."""
    kl_reference_coef: NonNegativeFloat = 0.05
    """Its coefficient, initial where it adapts."""
    kl_reference_target: NonNegativeFloat = 0.0
    """KL in nats a completion that an adaptive kl_reference_coef aims at; 0 for a fixed one."""
    kl_reference_horizon: PositiveInt = 10_000
    """Completions it takes to change an adaptive kl_reference_coef by up to 20 %."""
    trust_region_kl: NonNegativeFloat = 0.3
    """Bound on KL(old, new) after an update, in nats a token: above it weights and optimizer return to a copy taken before,
    and the learning rate is halved and grows back over 10 updates. 0 for off, which saves the copy: in floats, three times
    what learns."""
    trust_region_fraction: UnitInterval = 1 / 16
    """Share of an iteration's completions on which that KL is measured; at least 8 completions."""
    truncation: TruncationMode = "terminal"
    """A completion cut by max_new: score paid and over, a penalty instead, V bootstrapped from, or row dropped."""
    truncation_penalty: float = -1.0
    """The score of a cut completion where truncation is penalty."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Taken off the score of a cut completion where truncation is terminal."""
    whiten_rewards: bool = False
    """Scale rewards to deviation 1 over the record, keeping their mean."""
    pretraining: str | None = None
    """Text whose -log p is mixed into the loss (PPO-ptx)."""
    pretraining_coef: NonNegativeFloat = 1.0
    """Its coefficient."""

    evaluate_rows: Size = 64
    """Completions an evaluation samples; prompts come again where there are fewer."""
    best_by: Literal["none", "score", "gold"] = "none"
    """Which mean of the evaluations decides the policy that RUN/best holds; none for no such directory."""
    log_samples: NonNegativeInt = 4
    """Completions an iteration keeps under samples/, token by token."""
    preflight: bool = True
    """Check before the first step that sampler, trainer, reference and reward agree."""

    def __post_init__(self) -> None:
        for name in ("reward", "gold"):
            object.__setattr__(self, name, parse_specs(getattr(self, name)))
        if callable(self.reply):
            object.__setattr__(self, "reply", FunctionSpec.of(self.reply))
        super().__post_init__()
        if self.too_long == "cut":
            raise RequestError("too_long is 'cut': a judge would read a prompt that the policy did not; use skip")
        if self.reply is not None and self.fixed_length:
            raise RequestError(
                f"fixed_length is {self.fixed_length}: without a stop no turn ends; give max_new_tokens instead"
            )
        if self.off_policy_low > self.off_policy_high:
            raise RequestError(
                f"off_policy_low is {self.off_policy_low}: must be at most off_policy_high, {self.off_policy_high}"
            )
        if self.best_by == "gold" and not self.gold:
            raise RequestError("best_by is 'gold': nothing is measured as gold; name it in gold, or take score")
        for text in self.constraint:
            Constraint.parse(text)
        if not self.reward:
            raise RequestError("reward is missing: name a reward model's DIR, file.py:function or a builtin")
        problem = self._reference_problem()
        if problem:
            raise RequestError(f"reference_mode is {self.reference_mode!r}{problem}")

    def needs(self) -> list[tuple[bool, str, str]]:
        has_held_constraint, has_rollback = (
            any(Constraint.parse(text).response == response for text in self.constraint)
            for response in ("hold", "rollback")
        )
        has_several_terms = max(len(self.reward), len(self.gold)) > 1
        has_function_file = any(
            ".py" in spec for spec in (*self.reward, *self.gold, *self.constraint, self.reply or "")
        )
        has_free_length, is_off_policy = not self.fixed_length, self.off_policy != "none"
        has_reference_kl, has_kl_target = self.kl_reference_coef > 0, self.kl_reference_target > 0
        return [
            *super().needs(),
            (self.reply is not None, "max_turns", "has no effect without a reply: name one in reply"),
            (self.trust_region_kl > 0, "trust_region_fraction", "has no effect without a bound: set trust_region_kl"),
            (self.evaluate_every > 0, "best_by", "has no effect on one evaluation at the end: set evaluate_every"),
            (has_several_terms, "missing_score", "has no effect on one reward: name several"),
            (
                has_held_constraint,
                "constraint_rate",
                "has no effect without a held constraint: give one that ends in :hold",
            ),
            (
                has_rollback,
                "constraint_rollbacks",
                "has no effect without a constraint that goes back: give one that ends in :rollback",
            ),
            (
                has_function_file,
                "reward_timeout",
                "has no effect without a file.py:function: name one in reward, gold or reply",
            ),
            (
                self.fixed_length <= self.max_new_tokens,
                "max_new_tokens",
                "has no effect with a longer fixed_length: leave that out",
            ),
            (
                has_free_length,
                "truncation truncation_penalty missing_eos_penalty",
                "has no effect with a fixed_length: give max_new_tokens instead",
            ),
            (
                self.truncation == "penalty",
                "truncation_penalty",
                "has no effect with this truncation: make truncation penalty",
            ),
            (
                self.truncation == "terminal",
                "missing_eos_penalty",
                "has no effect with this truncation: make truncation terminal",
            ),
            (
                is_off_policy,
                "off_policy_ratio off_policy_low off_policy_high",
                "has no effect without weights: set off_policy",
            ),
            (
                is_off_policy,
                "top_k top_p",
                "samples from another policy than the one that learns: set off_policy to truncate or mask",
            ),
            (
                self.off_policy != "truncate",
                "off_policy_low",
                "where weights are cut at the top alone: make off_policy mask",
            ),
            (
                has_reference_kl,
                "kl_reference kl_reference_target",
                "has no effect with a kl_reference_coef of 0: give it a value above 0",
            ),
            (has_kl_target, "kl_reference_horizon", "has no effect without a target: set kl_reference_target"),
            (
                self.pretraining is not None,
                "pretraining_coef",
                "has no effect without text: name a file in pretraining",
            ),
        ]

    def _reference_problem(self) -> str:
        """Why the reference cannot be kept as asked for, as the end of a sentence; empty where it can."""
        if self.reference_mode is None:
            return ""
        if self.reference is not None:
            return f" beside reference {self.reference!r}, which is a model of its own: leave one of them out"
        if self.reference_mode == "adapter_off" and not self.lora_rank:
            return " with lora_rank 0: there is no adapter to switch off; give lora_rank a rank, or leave the mode out"
        if self.reference_mode == "frozen_top" and not self.train_layers:
            layers = "the adapter changes every layer" if self.lora_rank else "every layer learns"
            return f" with train_layers 0: {layers}; give train_layers a number, or leave the mode out"
        return ""

    @property
    def limit(self) -> int:
        """Tokens a completion may have."""
        return self.fixed_length or self.max_new_tokens
