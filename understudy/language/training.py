"""What every language recipe walks on: model, optimizer, schedule; and what it does around an iteration."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from understudy.constraints import LagrangianConstraints
from understudy.fast.linear import keep_freed_memory
from understudy.language import provenance
from understudy.language.config import IN_MEMORY_FIELDS, Config, RolloutConfig
from understudy.language.data.files import Table
from understudy.language.data.records import Preference, Row, read_rows
from understudy.language.model.lora import ADAPTER
from understudy.language.model.optimizer import AdamW
from understudy.run import lineage
from understudy.run.checkpoint import load_state
from understudy.run.config import RequestError, to_dict
from understudy.run.guard import Guard, explain_failure, note_failure, resume_command, was_left
from understudy.run.interrupt import InterruptHandler, close_at_exit
from understudy.run.metrics import combine
from understudy.run.paths import short_path
from understudy.run.progress import Progress
from understudy.run.seeds import derive_seed, make_generator, restore_shared_generators, shared_generator_states
from understudy.run.store import ResumePoint, Run, is_checkpoint_due, load_optimizer, process_seconds
from understudy.run.trackers import check_trackers, open_trackers

CHECKPOINT_FIELDS = {
    "iteration",
    "steps",
    "rows",
    "recipe_state",
    "unlogged_metrics",
    "shuffle_generator",
}  # of a stage, in its checkpoint
Iterations = Generator[dict[str, Any], None, Run]  # a line of metrics each; the run in the end


class TrainingRun:
    """The open run of a recipe.

    Attributes:
        steps: tokens chosen, or learned from, so far.  rows: sequences so far.
        recipe_state: numbers of the recipe's own that go on from iteration to iteration; a checkpoint holds them.
        constraints: the run's constraints, where it has any.
        function_states: gives what functions of the user's remember, as plain JSON, for a checkpoint.
        restored_states: the same, of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        cfg: Config,
        run: Run,
        model: Any,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        folder: str,
        progress: Progress,
        interrupt: InterruptHandler,
    ) -> None:
        self.cfg, self.run, self.model, self.optimizer, self.total_steps = cfg, run, model, optimizer, total_steps
        self.folder, self.progress, self.interrupt = folder, progress, interrupt
        self.recipe_state: dict[str, Any] = {}
        self.guard = Guard(self)
        self.trackers = open_trackers(cfg.log, run.path, to_dict(cfg))
        self.shuffle_generator = make_generator(cfg.seed, "shuffle")
        self.constraints: LagrangianConstraints | None = None
        self.function_states: Callable[[], dict[str, Any]] = dict
        self.restored_states: dict[str, Any] = {}
        self.iteration = self.steps = self.rows = self.num_steps_saved = 0
        self.unlogged_metrics: list[dict[str, float]] = []
        self.base_learning_rates = [group["lr"] for group in optimizer.param_groups]
        self.train_started = time.time()
        run.startup_seconds = process_seconds()

    @property
    def is_active(self) -> bool:
        """Whether another iteration is due."""
        return self.steps < self.total_steps and self.run.stop_reason is None

    def update_learning_rate(self) -> float:
        """Set the learning rates of the coming iteration; returns that of the first group.

        With t the share of the run that is done and w the warm-up's: the stated rate times t/w while t < w, so that it is
        reached at the first iteration with t >= w. It then stays, or falls to 0 over the rest of the run: by 1 - u
        (linear) or (1 + cos(pi u)) / 2 (cosine), where u goes from 0 at that iteration to 1 at the end.
        """
        fraction_done = min(1.0, self.steps / self.total_steps)
        if fraction_done < self.cfg.warmup:
            factor = (fraction_done + 1 / max(self.total_steps, 1)) / self.cfg.warmup
        else:
            decay_start = self.recipe_state.setdefault("decay_from", self.steps) if self.cfg.warmup else 0
            decay_progress = min(1.0, (self.steps - decay_start) / max(self.total_steps - decay_start, 1))
            decay_factors = {
                "constant": 1.0,
                "linear": 1 - decay_progress,
                "cosine": 0.5 + 0.5 * math.cos(math.pi * decay_progress),
            }
            factor = decay_factors[self.cfg.learning_rate_schedule]
        for group, base_learning_rate in zip(self.optimizer.param_groups, self.base_learning_rates, strict=True):
            group["lr"] = (
                base_learning_rate
                * factor
                * (self.constraints.lr_scale if self.constraints else 1.0)
                * self.recipe_state.get("lr_scale", 1.0)
            )
        return self.optimizer.param_groups[0]["lr"]

    def next_rows(self, num_data_rows: int, num_rows: int, *, num_repeats: int = 1) -> list[int]:
        """Which of `num_data_rows` rows of the data come next, `num_rows` of them: every one once an epoch, in an
        order of its own.

        Args:
            num_repeats: how many rows of the run are made of one row of the data; they follow each other.
        """
        indices = []
        for number in range(self.rows // num_repeats, self.rows // num_repeats + num_rows):
            epoch, position = divmod(number, num_data_rows)
            indices += [int(_permutation(self.cfg.seed, epoch, num_data_rows)[position])] * num_repeats
        self.rows += num_rows * num_repeats
        return indices

    def next_minibatch(self, num_data_rows: int, batch_size: int) -> list[int]:
        """The next rows of an epoch over `num_data_rows` rows, at most `batch_size` of them: the last minibatch of an
        epoch is smaller."""
        return self.next_rows(num_data_rows, min(batch_size, num_data_rows - self.rows % num_data_rows))

    def is_due(self, interval: int) -> bool:
        """Whether what happens every so many iterations happens in the one that is now being closed."""
        return bool(interval) and (self.iteration + 1) % interval == 0

    def close_constraints(self, metrics: dict[str, float]) -> dict[str, float]:
        """Answer the bounds that this iteration broke, before it is closed; the metrics of them all."""
        if self.constraints is None:
            return {}
        constraint_metrics = self.constraints.close(metrics, self.model, self.optimizer, self.log_event)
        self.run.stop_reason = self.constraints.stop_reason
        self.recipe_state["bounds"] = self.constraints.state
        return constraint_metrics

    def log_event(self, kind: str, **about: Any) -> None:
        """An event, which is said too where it is not one of many."""
        self.run.event(kind, iteration=self.iteration + 1, steps=self.steps, **about)
        if about.get("response") != "hold":
            self.progress.print_message(about["text"])

    def finish_iteration(self, metrics: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Close an iteration: log, show and checkpoint when due. Yields its line."""
        self.iteration += 1
        if metrics["optimizer_steps"]:
            self.guard.accept()
        self.unlogged_metrics.append(metrics)
        if self.iteration % self.cfg.log_every == 0 or not self.is_active:
            iterations, self.unlogged_metrics = self.unlogged_metrics, []
            line: dict[str, Any] = {"iteration": self.iteration, "steps": self.steps, "rows": self.rows}
            line |= combine(iterations)
            seconds = time.time() - self.train_started
            seconds_left = max(0, self.total_steps - self.steps) * seconds / max(self.steps, 1)
            line |= {"seconds": seconds, "steps_per_second": self.steps / seconds, "seconds_left": seconds_left}
            self.run.log(line)
            for tracker in self.trackers:
                tracker.log({name: x for name, x in line.items() if isinstance(x, float | int)}, self.steps)
            self.progress.show(line, force=not self.is_active)
            yield line
        if is_checkpoint_due(
            self.cfg.checkpoint_every, self.iteration, self.steps - self.num_steps_saved, self.total_steps
        ):
            self.checkpoint()
        if self.interrupt.poll_signal() and self.is_active:
            self.finish()
            self.interrupt.exit_by_signal()

    def checkpoint(self) -> None:
        """Write everything that the coming iterations depend on under checkpoints/ITERATION, once.

        Samples and the order of rows are functions of the seed and of counters; of the model, what the optimizer holds is
        written as it is, since a model in Hugging Face's layout may hold it otherwise (merged, say).
        """
        name = f"{self.iteration:06d}"
        if name in self.run.list_checkpoints():
            return
        self.num_steps_saved = self.steps
        state = {name: getattr(self, name) for name in CHECKPOINT_FIELDS} | {
            "seconds": time.time() - self.train_started,
            "version": getattr(self.model, "version", 0),
            "learned": self._trainable_parameters(),
            "shared_generators": shared_generator_states(),
            "functions": np.frombuffer(json.dumps(self.function_states()).encode(), np.uint8),
        }
        self.run.checkpoint(name, self.model.save, self.optimizer, state, keep=self.cfg.keep_checkpoints)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: everything as it was when it was written."""
        saved = load_state(path)
        load_optimizer(path, self.optimizer, saved["optimizer"])
        state = saved["run"]
        for name in CHECKPOINT_FIELDS - {"shuffle_generator"}:
            setattr(self, name, state[name])
        self.shuffle_generator.set_state(state["shuffle_generator"])
        self.train_started = time.time() - state["seconds"]
        self.num_steps_saved = self.steps
        if hasattr(self.model, "version"):
            self.model.version = state["version"]
        if "functions" in state:  # not in checkpoints of earlier versions
            self.restored_states = dict(json.loads(state["functions"].tobytes()))
        for parameter, value in zip(self._trainable_parameters(), state["learned"], strict=True):
            parameter.copy_(value)
        restore_shared_generators(state["shared_generators"])
        self.run.rewind(self.iteration)

    def finish(self) -> None:
        """Save the model and the last checkpoint."""
        if self.iteration:
            self.checkpoint()
        folder = self.run.path / self.folder
        self.model.save(folder)
        if (adapter := folder / ADAPTER).is_dir():
            shutil.rmtree(self.run.path / ADAPTER, ignore_errors=True)
            adapter.rename(self.run.path / ADAPTER)  # what is in `folder` is whole without it
        self.run.wait_for_checkpoint()

    def _trainable_parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@close_at_exit
def open_run(
    recipe: str,
    cfg: Config,
    model: Any,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    folder: str = "policy",
    resume: ResumePoint | None = None,
) -> Generator[TrainingRun]:
    """A run's directory, its progress and sinks; the model is saved in `folder` at the end, however that comes.

    Args:
        resume: the run to go on with, instead of a new one.
    """
    keep_freed_memory()
    origin = provenance.describe_provenance(recipe, cfg, model.tokenizer)
    check_trackers(cfg.log)
    if resume is None:
        description = {"recipe": f"language {recipe}", "config": to_dict(cfg)}
        values = {name: getattr(cfg, name, None) for name in IN_MEMORY_FIELDS}
        files = {f"{name}.jsonl": rows.write for name, rows in values.items() if isinstance(rows, Table)}
        run = Run.create(cfg.output_dir, f"{recipe}-s{cfg.seed}", description, origin, files=files)
    else:
        run = resume.run
        run.changed += lineage.resume_lineage(run.path, origin)
    for warning in model.warnings:
        run.event("remark", text=warning)
        if not cfg.quiet:
            print(warning, file=sys.stderr)
    title = f"{recipe} {cfg.model} seed {cfg.seed} -> {short_path(run.path)}"
    with (
        Progress(title, total_steps, quiet=cfg.quiet) as progress,
        InterruptHandler(quiet=cfg.quiet) as interrupt,
        closing(run),
    ):
        training_run = TrainingRun(cfg, run, model, optimizer, total_steps, folder, progress, interrupt)
        if resume is not None:
            resume.restore(training_run)
        try:
            yield training_run
        except (KeyboardInterrupt, SystemExit) as error:
            error.add_note(resume_command(run))
            raise  # what could be saved is saved: an iteration that is not whole is not
        except BaseException as error:
            if was_left(error):
                training_run.finish()
                raise
            failure = explain_failure(error, run, _memory_advice(cfg))
            note_failure(run, failure)
            if failure is error:
                raise
            raise failure from error
        else:
            training_run.finish()
        finally:
            for tracker in training_run.trackers:
                tracker.close()


def _memory_advice(cfg: Config) -> str:
    """What to ask less of where memory is short, dearest first."""
    slots = f", max_num_seqs (now {cfg.max_num_seqs})" if isinstance(cfg, RolloutConfig) else ""
    return f"lower micro_batch_size (now {cfg.micro_batch_size or 'all rows at once'}){slots}, or set gradient_checkpointing"


def check_reference_digest(run: Run, digest: str) -> None:
    """Write down which reference a run is held to; refuse one that is not what is written there already.

    Raises:
        RequestError: a run that goes on would be held to another reference than it began with.
    """
    recorded_digest = lineage.read_lineage(run.path).get("reference", digest)
    if recorded_digest != digest:
        raise RequestError(
            f"reference has the digest {digest[:12]}..., the run began with {str(recorded_digest)[:12]}...: "
            "put back the model it had"
        )
    lineage.add_digests(run.path, reference=digest)


def adamw(cfg: Config, *groups: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW over parameter groups; each may have its own `lr` and `max_grad_norm`. Half precision has float32 copies."""
    fused = torch.device(cfg.device).type in ("cpu", "cuda")
    return AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=fused,
    )


def trainable_parameter_group(model: nn.Module) -> dict[str, Any]:
    """Every parameter that learns, as one group."""
    return {"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}


def hold_out(rows: Sequence[Sequence[Any]], num_held_out: int) -> tuple[list[int], list[int]]:
    """Split row numbers into those to learn from and those kept for evaluation, by the rows' content alone.

    At most a quarter is kept, and none of fewer than 8 different rows: equal rows go to the same side. What `rows` holds
    of a row is what decides: given prompts alone, all rows of a prompt go to the same side.
    """
    keys = [derive_seed(0, "hold out", *map(str, row)) for row in rows]
    key_counts, max_held_out = Counter(keys), len(rows) // 4
    if len(key_counts) < 8:
        return list(range(len(rows))), []
    held_out_keys: set[int] = set()
    num_selected = 0
    for key in sorted(key_counts):
        if num_selected >= min(num_held_out, max_held_out):
            break
        if num_selected + key_counts[key] <= max_held_out:
            held_out_keys.add(key)
            num_selected += key_counts[key]
    return [i for i, key in enumerate(keys) if key not in held_out_keys], [
        i for i, key in enumerate(keys) if key in held_out_keys
    ]


def split_data(
    rows: Sequence[Row],
    make_records: Callable[[Sequence[Row], str], Sequence[Any]],
    cfg: Config,
    split_key: Callable[[Any], Any],
) -> tuple[list[Any], list[Any], list[str]]:
    """The records to learn from, those to evaluate on, and what is to be said: see `held_out` and `evaluation_data`.

    Args:
        rows: of `records`.  make: rows and the name of their file -> records.  key: what decides a record's side.
    """
    records = make_records(rows, cfg.data)
    if cfg.evaluation_data is None:
        train_indices, held_out_indices = hold_out([split_key(record) for record in records], cfg.held_out)
        return [records[i] for i in train_indices], [records[i] for i in held_out_indices], []
    try:
        evaluation_records = make_records(
            read_rows(cfg.evaluation_data, columns=cfg.reading_options["columns"]), cfg.evaluation_data
        )
    except RequestError as error:
        raise RequestError(f"evaluation_data is {cfg.evaluation_data!r}: {error}") from None
    train_keys = {split_key(record) for record in records}
    num_shared = sum(split_key(record) in train_keys for record in evaluation_records)
    message = (
        f"{num_shared} of the {len(evaluation_records)} rows of evaluation_data '{cfg.evaluation_data}' are learned "
        "from, too"
    )
    return (
        list(records),
        list(evaluation_records),
        [f"{message}: leave them out of one of the files"] if num_shared else [],
    )


def preference_split_key(pair: Preference) -> tuple[Any, ...]:
    """What decides the side of a pair in `hold_out`: its prompt, or all of it where the prompt is not known."""
    return (pair.prompt,) if pair.prompt else (pair.chosen, pair.rejected)


def run_to_end(iterations: Iterations) -> Run:
    """Run a recipe's iterations to their end; the run they made."""
    while True:
        try:
            next(iterations)
        except StopIteration as stop:
            return stop.value


_permutations: dict[tuple[int, int, int], torch.Tensor] = {}


def _permutation(seed: int, epoch: int, size: int) -> torch.Tensor:
    key = (seed, epoch, size)
    if key not in _permutations:
        _permutations.clear()
        _permutations[key] = torch.randperm(
            size, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        )
    return _permutations[key]
