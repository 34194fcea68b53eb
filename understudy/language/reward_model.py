"""A reward model: learn to score as people chose (Bradley-Terry), or as they labelled (logistic), and say how well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.batch import Labelled, Pairs
from understudy.language import config, stage, text
from understudy.language.model import home
from understudy.language.reading import check_reading
from understudy.language.scorer import RewardModel
from understudy.language.stage import Iterations
from understudy.language.text import last_token, read
from understudy.objective import classify, prefer
from understudy.reduce import clusters, share_interval
from understudy.run.config import Count, LearningRate, NonNegative, RequestError, check_effects
from understudy.run.seeds import seed_shared_generators
from understudy.run.store import Resume, Run, write_json
from understudy.update import update


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Pairs `chosen` and `rejected` with an optional `margin`, or `text` with a `label` from 0 to 1."""

    learning_rate: LearningRate = 1e-4
    """AdamW's step size after the warm-up."""
    epochs: Count = 1
    """Passes over the data; published reward models make one."""
    minibatch_rows: Count = 16
    """Pairs or labelled texts an optimizer step sees; the last of an epoch may have fewer."""
    center: NonNegative = 0.0
    """Coefficient of (s_chosen + s_rejected)^2, which holds the scores of pairs around 0."""
    normalize: Literal["none", "mean", "both"] = "both"
    """What is taken out of scores, over the learned-from texts: nothing, the mean, or mean and deviation."""

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
    seed_shared_generators(cfg.seed)  # a fresh score head is drawn by torch's own
    source = home(cfg.model, "reward_model") if home(cfg.model, "policy") == cfg.model else home(cfg.model, "policy")
    model = RewardModel.from_pretrained(
        source,
        stop=cfg.stop,
        template=cfg.template,
        add_bos=cfg.add_bos,
        packing=cfg.packing,
        checkpointing=cfg.checkpointing,
        trust_remote_code=cfg.trust_remote_code,
    )
    model.to(device=cfg.device, dtype=getattr(torch, cfg.dtype))
    learned, kept = split(model, cfg)
    check_reading(model, [ids for row in learned for ids in texts(row)])
    objective: Any = classify if model.form == "text" else partial(prefer, center=cfg.center)
    total = cfg.epochs * sum(map(size, learned))
    optimizer = stage.adamw(cfg, stage.all_of(model))
    about = {"total": cfg.steps or total, "folder": "reward_model", "resume": resume}
    with stage.open_stage("reward-model", cfg, model, optimizer, **about) as run:
        while run.on:
            rate = run.schedule()
            some = run.next_minibatch(len(learned), cfg.minibatch_rows)
            batch = gather([learned[i] for i in some]).to(cfg.device)
            run.steps += sum(size(learned[i]) for i in some)
            metrics = update(  # 5 update
                model,
                optimizer,
                batch,
                objective,
                epochs=1,
                minibatches=1,
                max_grad_norm=cfg.max_grad_norm,
                micro=cfg.micro or None,
                guard=run.guard,
                generator=run.shuffle,
            )
            if not run.on:
                normalize(model, learned, cfg.normalize)
            if kept and (not run.on or run.due(cfg.evaluate_every)):
                found = examine(model, kept)
                write_json(run.run.path / "evaluation.json", found)
                metrics |= {f"evaluation_{name}": x for name, x in found.items() if isinstance(x, int | float)}
            yield from run.report(metrics | {"learning_rate": rate})
        return run.run


def train(cfg: Config, *, resume: Resume | None = None) -> Run:
    """Train to the end; `run.path / "reward_model"` holds the model, evaluation.json how good it is."""
    return stage.drain(iterate(cfg, resume=resume))


def split(model: RewardModel, cfg: Config) -> tuple[list[Any], list[Any]]:
    """Rows to learn from and rows kept for evaluation: labelled texts where there is a label, else pairs.

    Pairs of one prompt are all learned from, or all kept. The model remembers which of the two it reads.
    """
    rows = read(cfg.data, **cfg.reading)
    limit = text.Limit.of(model.model, cfg.max_length)
    columns = text.column_names(rows)
    model.form = "text" if "label" in columns and not {"chosen", "rejected"} & {*columns} else "completion"
    if model.form == "text" and cfg.center:
        raise RequestError(
            f"center is {cfg.center}, which has no effect on labelled texts: give pairs, or leave center out"
        )
    kind: Any = text.labelled if model.form == "text" else text.preferences

    def make(rows: Sequence[text.Row], source: str) -> Sequence[Any]:
        data = kind(rows, model.tokenizer, max_length=limit, too_long=cfg.too_long)
        text.check_ids(data, model.model)
        model.remarks += data.remark(source)
        return data

    key: Any = (lambda row: (row.ids, row.label)) if model.form == "text" else stage.asked
    learned, kept, said = stage.divide(rows, make, cfg, key)
    model.remarks += said
    if model.form == "text":
        model.remarks += check_labels([row.label for row in learned])
    return learned, kept


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


def gather(data: Sequence[Any]) -> Pairs | Labelled:
    """Rows of data as one padded record."""
    if isinstance(data[0], text.Labelled):
        return Labelled(last_token([row.ids for row in data]), torch.tensor([[row.label] for row in data]))
    chosen, rejected = last_token([row.chosen for row in data]), last_token([row.rejected for row in data])
    return Pairs(chosen, rejected, torch.tensor([[row.margin] for row in data]))


def size(row: Any) -> int:
    """Tokens of a row of data."""
    return len(row.ids) if isinstance(row, text.Labelled) else len(row.chosen) + len(row.rejected)


@torch.no_grad()
def normalize(model: RewardModel, data: Sequence[Any], what: str) -> None:
    """Store the scores' mean and deviation over these texts in the model (Ziegler et al. 2019, sec. 2.1)."""
    model.mean, model.scale = 0.0, 1.0
    if what != "none":
        raw = model.score([ids for row in data for ids in texts(row)])
        model.mean = float(raw.mean())
        model.scale = float(raw.std().clamp(min=1e-6)) if what == "both" and len(raw) > 1 else 1.0


def texts(row: Any) -> list[tuple[int, ...]]:
    return [row.ids] if isinstance(row, text.Labelled) else [row.chosen, row.rejected]


@torch.no_grad()
def examine(model: RewardModel, data: Sequence[Any]) -> dict[str, Any]:
    """How good the model is on rows it did not learn from.

    `accuracy` with its 95 % interval, in which the pairs of a prompt, or equal texts, count as a cluster;
    `calibration_error`, the gap between how sure it is and how often it is right, averaged over ten equal bins of sureness;
    `length_correlation` of score and length (of the differences, for
    pairs); `length_baseline`, the accuracy of always preferring the longer (or the shorter, if that is better).
    """
    if isinstance(data[0], text.Labelled):
        raw = model.score([row.ids for row in data]) * model.scale + model.mean
        length = torch.tensor([float(len(row.ids)) for row in data])
        truth = torch.tensor([row.label > 0.5 for row in data])
        cluster = clusters([row.ids for row in data])
        longer = length > length.median()
    else:
        chosen, rejected = (model.score([getattr(row, side) for row in data]) for side in ("chosen", "rejected"))
        raw = (chosen - rejected) * model.scale
        length = torch.tensor([float(len(row.chosen) - len(row.rejected)) for row in data])
        truth, longer = torch.ones(len(data), dtype=torch.bool), length > 0
        cluster = clusters(list(map(stage.asked, data)))
    right = ((raw > 0) == truth).float()
    baseline = float((longer == truth).float().mean())
    accuracy, low, high = share_interval(right, cluster)
    return {
        "rows": len(data),
        "prompts": len(cluster.unique()),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "calibration_error": calibration_error(raw.abs().sigmoid(), right),
        "length_correlation": correlation(raw, length),
        "length_baseline": max(baseline, 1 - baseline),
        "score_mean": model.mean,
        "score_scale": model.scale,
    }


def calibration_error(sureness: Tensor, right: Tensor, *, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015): |mean sureness - share that is right|, weighted by bin. [N]."""
    place = (sureness * bins).long().clamp(max=bins - 1)
    gaps = [
        (sureness[place == b].mean() - right[place == b].mean()).abs() * (place == b).float().mean()
        for b in place.unique().tolist()
    ]
    return float(torch.stack(gaps).sum())


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, 0 where one of them does not vary. [N]."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0
