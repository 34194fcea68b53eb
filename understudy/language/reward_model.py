"""A reward model: learn to score as people chose (Bradley-Terry), or as they labelled (logistic), and say how well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.batch import LabelledText, PreferencePairs
from understudy.language import config, training
from understudy.language.data import records
from understudy.language.data.records import pad_for_scoring, read_rows
from understudy.language.model.forward import check_forward_consistency
from understudy.language.model.policy import model_dir
from understudy.language.model.reward_model import RewardModel
from understudy.language.training import Iterations
from understudy.objective import binary_label_loss, bradley_terry_loss
from understudy.reduce import cluster_ids, fraction_interval
from understudy.run.config import LearningRate, NonNegativeFloat, PositiveInt, RequestError, check_effects
from understudy.run.seeds import seed_shared_generators
from understudy.run.store import ResumePoint, Run, write_json
from understudy.update import update


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Pairs `chosen` and `rejected` with an optional `margin`, or `text` with a `label` from 0 to 1."""

    learning_rate: LearningRate = 1e-4
    """AdamW's step size after the warm-up."""
    num_epochs: PositiveInt = 1
    """Passes over the data; published reward models make one."""
    batch_size: PositiveInt = 16
    """Pairs or labelled texts an optimizer step sees; the last of an epoch may have fewer."""
    center_coef: NonNegativeFloat = 0.0
    """Coefficient of (s_chosen + s_rejected)^2, which holds the scores of pairs around 0."""
    normalize: Literal["none", "mean", "both"] = "both"
    """What is taken out of scores, over the learned-from texts: nothing, the mean, or mean and deviation."""

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
    seed_shared_generators(cfg.seed)  # a fresh score head is drawn by torch's own
    source = (
        model_dir(cfg.model, "reward_model")
        if model_dir(cfg.model, "policy") == cfg.model
        else model_dir(cfg.model, "policy")
    )
    model = RewardModel.from_pretrained(
        source,
        stop=cfg.stop,
        chat_template=cfg.chat_template,
        add_bos=cfg.add_bos,
        packing=cfg.packing,
        gradient_checkpointing=cfg.gradient_checkpointing,
        trust_remote_code=cfg.trust_remote_code,
    )
    model.to(device=cfg.device, dtype=getattr(torch, cfg.dtype))
    train_rows, held_out_rows = load_training_rows(model, cfg)
    check_forward_consistency(model, [ids for row in train_rows for ids in token_sequences(row)])
    objective: Any = (
        binary_label_loss if model.input_format == "text" else partial(bradley_terry_loss, center_coef=cfg.center_coef)
    )
    total_tokens = cfg.num_epochs * sum(map(num_tokens, train_rows))
    optimizer = training.adamw(cfg, training.trainable_parameter_group(model))
    options = {"total_steps": cfg.total_tokens or total_tokens, "folder": "reward_model", "resume": resume}
    with training.open_run("reward-model", cfg, model, optimizer, **options) as run:
        while run.is_active:
            learning_rate = run.update_learning_rate()
            indices = run.next_minibatch(len(train_rows), cfg.batch_size)
            batch = collate([train_rows[i] for i in indices]).to(cfg.device)
            run.steps += sum(num_tokens(train_rows[i]) for i in indices)
            metrics = update(  # 5 update
                model,
                optimizer,
                batch,
                objective,
                num_epochs=1,
                num_minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size or None,
                on_nonfinite=run.guard,
                generator=run.shuffle_generator,
            )
            if not run.is_active:
                set_score_normalization(model, train_rows, cfg.normalize)
            if held_out_rows and (not run.is_active or run.is_due(cfg.evaluate_every)):
                evaluation = evaluate_reward_model(model, held_out_rows)
                write_json(run.run.path / "evaluation.json", evaluation | {"after_steps": run.steps})
                metrics |= {f"evaluation_{name}": x for name, x in evaluation.items() if isinstance(x, int | float)}
            yield from run.finish_iteration(metrics | {"learning_rate": learning_rate})
        return run.run


def train(cfg: Config, *, resume: ResumePoint | None = None) -> Run:
    """Train to the end; `run.path / "reward_model"` holds the model, evaluation.json how good it is."""
    return training.run_to_end(iterate(cfg, resume=resume))


def load_training_rows(model: RewardModel, cfg: Config) -> tuple[list[Any], list[Any]]:
    """Rows to learn from and rows kept for evaluation: labelled texts where there is a label, else pairs.

    Pairs of one prompt are all learned from, or all kept. The model remembers which of the two it reads.
    """
    rows = read_rows(cfg.data, **cfg.reading_options)
    limit = records.Limit.of(model.model, cfg.max_length)
    columns = records.column_names(rows)
    model.input_format = "text" if "label" in columns and not {"chosen", "rejected"} & {*columns} else "completion"
    if model.input_format == "text" and cfg.center_coef:
        raise RequestError(
            f"center_coef is {cfg.center_coef}, which has no effect on labelled texts: give pairs, or leave center_coef out"
        )
    make_all: Any = records.make_labelled_examples if model.input_format == "text" else records.make_preferences

    def make_records(rows: Sequence[records.Row], source: str) -> Sequence[Any]:
        data = make_all(rows, model.tokenizer, max_length=limit, too_long=cfg.too_long)
        records.check_ids(data, model.model)
        model.warnings += data.make_warnings(source)
        return data

    key: Any = (lambda row: (row.ids, row.label)) if model.input_format == "text" else training.preference_split_key
    train_rows, held_out_rows, warnings = training.split_data(rows, make_records, cfg, key)
    model.warnings += warnings
    if model.input_format == "text":
        model.warnings += check_labels([row.label for row in train_rows])
    return train_rows, held_out_rows


def check_labels(labels: Sequence[float]) -> list[str]:
    """Refuse labels that are all the same; the sentence to print where all are on one side of 0.5.

    Raises:
        RequestError: there is one label only, which any model that ignores the text gets right.
    """
    low, high = min(labels), max(labels)
    if low == high:
        raise RequestError(
            f"label is {low:g} in each of the {len(labels)} rows to learn from, which teach nothing: give good and bad texts"
        )
    if low > 0.5 or high <= 0.5:
        return [f"all labels lie between {low:g} and {high:g}, on one side of 0.5: the accuracy says nothing"]
    return []


def collate(data: Sequence[Any]) -> PreferencePairs | LabelledText:
    """Rows of data as one padded record."""
    if isinstance(data[0], records.LabelledExample):
        return LabelledText(pad_for_scoring([row.ids for row in data]), torch.tensor([[row.label] for row in data]))
    chosen, rejected = pad_for_scoring([row.chosen for row in data]), pad_for_scoring([row.rejected for row in data])
    return PreferencePairs(chosen, rejected, torch.tensor([[row.margin] for row in data]))


def num_tokens(row: Any) -> int:
    """Tokens of a row of data."""
    return len(row.ids) if isinstance(row, records.LabelledExample) else len(row.chosen) + len(row.rejected)


@torch.no_grad()
def set_score_normalization(model: RewardModel, data: Sequence[Any], mode: str) -> None:
    """Store the scores' mean and deviation over these texts in the model (Ziegler et al. 2019, sec. 2.1)."""
    model.mean, model.scale = 0.0, 1.0
    if mode != "none":
        raw = model.score([ids for row in data for ids in token_sequences(row)])
        model.mean = float(raw.mean())
        model.scale = float(raw.std().clamp(min=1e-6)) if mode == "both" and len(raw) > 1 else 1.0


def token_sequences(row: Any) -> list[tuple[int, ...]]:
    return [row.ids] if isinstance(row, records.LabelledExample) else [row.chosen, row.rejected]


@torch.no_grad()
def evaluate_reward_model(model: RewardModel, data: Sequence[Any]) -> dict[str, Any]:
    """How good the model is on rows it did not learn from.

    `accuracy` with its 95 % interval, in which the pairs of a prompt, or equal texts, count as a cluster;
    `calibration_error`, the gap between how sure it is and how often it is right, averaged over ten equal bins of sureness;
    `length_correlation` of score and length (of the differences, for
    pairs); `length_baseline`, the accuracy of always preferring the longer (or the shorter, if that is better).
    """
    if isinstance(data[0], records.LabelledExample):
        logit = model.score([row.ids for row in data]) * model.scale + model.mean
        length = torch.tensor([float(len(row.ids)) for row in data])
        is_positive = torch.tensor([row.label > 0.5 for row in data])
        cluster = cluster_ids([row.ids for row in data])
        baseline = float(((length > length.median()) == is_positive).float().mean())
    else:
        chosen, rejected = (model.score([getattr(row, side) for row in data]) for side in ("chosen", "rejected"))
        logit = (chosen - rejected) * model.scale
        length = torch.tensor([float(len(row.chosen) - len(row.rejected)) for row in data])
        is_positive = torch.ones(len(data), dtype=torch.bool)
        baseline = records.longer_is_chosen(data)
        cluster = cluster_ids(list(map(training.preference_split_key, data)))
    is_correct = ((logit > 0) == is_positive).float()
    accuracy, low, high = fraction_interval(is_correct, cluster)
    return {
        "rows": len(data),
        "prompts": len(cluster.unique()),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "calibration_error": calibration_error(logit.abs().sigmoid(), is_correct),
        "length_correlation": correlation(logit, length),
        "length_baseline": max(baseline, 1 - baseline),
        "score_mean": model.mean,
        "score_scale": model.scale,
    }


def calibration_error(confidence: Tensor, is_correct: Tensor, *, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015): |mean sureness - share that is right|, weighted by bin. [N]."""
    bin_index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [
        (confidence[bin_index == b].mean() - is_correct[bin_index == b].mean()).abs() * (bin_index == b).float().mean()
        for b in bin_index.unique().tolist()
    ]
    return float(torch.stack(gaps).sum())


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, 0 where one of them does not vary. [N]."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0
