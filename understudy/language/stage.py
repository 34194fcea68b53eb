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

from understudy.constrain import Bounds
from understudy.language import ancestry
from understudy.language.config import IN_MEMORY, Config, Rollouts
from understudy.language.data import Table
from understudy.language.lora import ADAPTER
from understudy.language.optimizer import AdamW
from understudy.language.text import Preference, Row, read
from understudy.products import keep_freed
from understudy.run import lineage
from understudy.run.checkpoint import load_state
from understudy.run.config import RequestError, to_json
from understudy.run.guard import Guard, note_failure, out_of_memory, way_on
from understudy.run.interrupt import Interrupt, closed_at_exit
from understudy.run.metrics import combine
from understudy.run.paths import short
from understudy.run.progress import Progress
from understudy.run.seeds import derive, generator, restore_shared_generators, shared_generators
from understudy.run.sinks import check_sinks, open_sinks
from understudy.run.store import Resume, Run, due, load_optimizer, process_seconds

GOES_ON = {"iteration", "steps", "rows", "kept", "unlogged", "shuffle"}  # of a stage, in its checkpoint
Iterations = Generator[dict[str, Any], None, Run]  # a line of metrics each; the run in the end


class Stage:
    """The open run of a recipe.

    Attributes:
        steps: tokens chosen, or learned from, so far.  rows: sequences so far.
        kept: numbers of the recipe's own that go on from iteration to iteration; a checkpoint holds them.
        bounds: the run's constraints, where it has any.
        function_states: gives what functions of the user's remember, as plain JSON, for a checkpoint.
        restored_states: the same, of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        cfg: Config,
        run: Run,
        model: Any,
        optimizer: torch.optim.Optimizer,
        total: int,
        folder: str,
        progress: Progress,
        interrupt: Interrupt,
    ) -> None:
        self.cfg, self.run, self.model, self.optimizer, self.total = cfg, run, model, optimizer, total
        self.folder, self.progress, self.interrupt = folder, progress, interrupt
        self.kept: dict[str, Any] = {}
        self.guard = Guard(self)
        self.sinks = open_sinks(cfg.log, run.path, to_json(cfg))
        self.shuffle = generator(cfg.seed, "shuffle")
        self.bounds: Bounds | None = None
        self.function_states: Callable[[], dict[str, Any]] = dict
        self.restored_states: dict[str, Any] = {}
        self.iteration = self.steps = self.rows = self.saved = 0
        self.unlogged: list[dict[str, float]] = []
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.train_started = time.time()
        run.startup_seconds = process_seconds()

    @property
    def on(self) -> bool:
        """Whether another iteration is due."""
        return self.steps < self.total and self.run.stopped is None

    def schedule(self) -> float:
        """Set the learning rates of the coming iteration; returns that of the first group.

        With t the share of the run that is done and w the warm-up's: the stated rate times t/w while t < w, so that it is
        reached at the first iteration with t >= w. It then stays, or falls to 0 over the rest of the run: by 1 - u
        (linear) or (1 + cos(pi u)) / 2 (cosine), where u goes from 0 at that iteration to 1 at the end.
        """
        done = min(1.0, self.steps / self.total)
        if done < self.cfg.warmup:
            factor = (done + 1 / max(self.total, 1)) / self.cfg.warmup
        else:
            start = self.kept.setdefault("decay_from", self.steps) if self.cfg.warmup else 0
            fallen = min(1.0, (self.steps - start) / max(self.total - start, 1))
            share = {"constant": 1.0, "linear": 1 - fallen, "cosine": 0.5 + 0.5 * math.cos(math.pi * fallen)}
            factor = share[self.cfg.learning_rate_schedule]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor * (self.bounds.pace if self.bounds else 1.0) * self.kept.get("lr_scale", 1.0)
        return self.optimizer.param_groups[0]["lr"]

    def next_rows(self, size: int, count: int, *, each: int = 1) -> list[int]:
        """Which of `size` rows of the data come next, `count` of them: every one once an epoch, in an order of its own.

        Args:
            each: how many rows of the run are made of one row of the data; they follow each other.
        """
        found = []
        for number in range(self.rows // each, self.rows // each + count):
            epoch, place = divmod(number, size)
            found += [int(_order(self.cfg.seed, epoch, size)[place])] * each
        self.rows += count * each
        return found

    def next_minibatch(self, size: int, count: int) -> list[int]:
        """The next rows of an epoch over `size` rows, at most `count` of them: the last minibatch of an epoch is smaller."""
        return self.next_rows(size, min(count, size - self.rows % size))

    def due(self, every: int) -> bool:
        """Whether what happens every so many iterations happens in the one that is now being closed."""
        return bool(every) and (self.iteration + 1) % every == 0

    def settle(self, metrics: dict[str, float]) -> dict[str, float]:
        """Answer the bounds that this iteration broke, before it is closed; the metrics of them all."""
        if self.bounds is None:
            return {}
        found = self.bounds.close(metrics, self.model, self.optimizer, self.tell)
        self.run.stopped = self.bounds.stopped
        self.kept["bounds"] = self.bounds.state
        return found

    def tell(self, kind: str, **about: Any) -> None:
        """An event, which is said too where it is not one of many."""
        self.run.event(kind, iteration=self.iteration + 1, steps=self.steps, **about)
        if about.get("response") != "hold":
            self.progress.say(about["text"])

    def report(self, metrics: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Close an iteration: log, show and checkpoint when due. Yields its line."""
        self.iteration += 1
        if metrics["optimizer_steps"]:
            self.guard.accept()
        self.unlogged.append(metrics)
        if self.iteration % self.cfg.log_every == 0 or not self.on:
            iterations, self.unlogged = self.unlogged, []
            line: dict[str, Any] = {"iteration": self.iteration, "steps": self.steps, "rows": self.rows}
            line |= combine(iterations)
            seconds = time.time() - self.train_started
            left = max(0, self.total - self.steps) * seconds / max(self.steps, 1)
            line |= {"seconds": seconds, "steps_per_second": self.steps / seconds, "seconds_left": left}
            self.run.log(line)
            for sink in self.sinks:
                sink.log({name: x for name, x in line.items() if isinstance(x, float | int)}, self.steps)
            self.progress.show(line, now=not self.on)
            yield line
        if due(self.cfg.checkpoint_every, self.iteration, self.steps - self.saved, self.total):
            self.checkpoint()
        if self.interrupt.heard() and self.on:
            self.finish()
            self.interrupt.obey()

    def checkpoint(self) -> None:
        """Write everything that the coming iterations depend on under checkpoints/ITERATION, once.

        Samples and the order of rows are functions of the seed and of counters; of the model, what the optimizer holds is
        written as it is, since a model in Hugging Face's layout may hold it otherwise (merged, say).
        """
        name = f"{self.iteration:06d}"
        if name in self.run.checkpoints():
            return
        self.saved = self.steps
        state = {name: getattr(self, name) for name in GOES_ON} | {
            "seconds": time.time() - self.train_started,
            "version": getattr(self.model, "version", 0),
            "learned": self._learning(),
            "shared_generators": shared_generators(),
            "functions": np.frombuffer(json.dumps(self.function_states()).encode(), np.uint8),
        }
        self.run.checkpoint(name, self.model.save, self.optimizer, state, keep=self.cfg.keep_checkpoints)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: everything as it was when it was written."""
        found = load_state(path)
        load_optimizer(path, self.optimizer, found["optimizer"])
        state = found["run"]
        for name in GOES_ON - {"shuffle"}:
            setattr(self, name, state[name])
        self.shuffle.set_state(state["shuffle"])
        self.train_started = time.time() - state["seconds"]
        self.saved = self.steps
        if hasattr(self.model, "version"):
            self.model.version = state["version"]
        if "functions" in state:  # not in checkpoints of earlier versions
            self.restored_states = dict(json.loads(state["functions"].tobytes()))
        for parameter, value in zip(self._learning(), state["learned"], strict=True):
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
        self.run.settle()

    def _learning(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@closed_at_exit
def open_stage(
    recipe: str,
    cfg: Config,
    model: Any,
    optimizer: torch.optim.Optimizer,
    *,
    total: int,
    folder: str = "policy",
    resume: Resume | None = None,
) -> Generator[Stage]:
    """A run's directory, its progress and sinks; the model is saved in `folder` at the end, however that comes.

    Args:
        resume: the run to go on with, instead of a new one.
    """
    keep_freed()
    origin = ancestry.describe(recipe, cfg, model.tokenizer)
    check_sinks(cfg.log)
    if resume is None:
        description = {"recipe": f"language {recipe}", "config": to_json(cfg)}
        run = Run.create(cfg.out, f"{recipe}-s{cfg.seed}", description, origin)
        for name in IN_MEMORY:
            if isinstance(rows := getattr(cfg, name, None), Table):
                rows.write(run.path / f"{name}.jsonl")
    else:
        run = resume.run
        run.changed += lineage.go_on(run.path, origin)
    for remark in model.remarks:
        run.event("remark", text=remark)
        if not cfg.quiet:
            print(remark, file=sys.stderr)
    title = f"{recipe} {cfg.model} seed {cfg.seed} -> {short(run.path)}"
    with Progress(title, total, quiet=cfg.quiet) as progress, Interrupt(quiet=cfg.quiet) as interrupt, closing(run):
        stage = Stage(cfg, run, model, optimizer, total, folder, progress, interrupt)
        if resume is not None:
            resume.restore(stage)
        try:
            yield stage
        except (KeyboardInterrupt, SystemExit) as error:
            error.add_note(way_on(run))
            raise  # what could be saved is saved: an iteration that is not whole is not
        except GeneratorExit:
            stage.finish()
            raise
        except torch.OutOfMemoryError as error:
            refusal = out_of_memory(error, run, _smaller(cfg))
            note_failure(run, refusal)
            raise refusal from error
        except BaseException as error:
            note_failure(run, error)
            raise
        else:
            stage.finish()
        finally:
            for sink in stage.sinks:
                sink.close()


def _smaller(cfg: Config) -> str:
    """What to ask less of where memory is short, dearest first."""
    slots = f", slots (now {cfg.slots})" if isinstance(cfg, Rollouts) else ""
    return f"lower micro (now {cfg.micro or 'all rows at once'}){slots}, or set checkpointing"


def same_reference(run: Run, digest: str) -> None:
    """Write down which reference a run is held to; refuse one that is not what is written there already.

    Raises:
        RequestError: a run that goes on would be held to another reference than it began with.
    """
    written = lineage.read_lineage(run.path).get("reference", digest)
    if written != digest:
        raise RequestError(
            f"reference has the digest {digest[:12]}..., the run began with {str(written)[:12]}...: "
            "put back the model it had"
        )
    lineage.note(run.path, reference=digest)


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


def all_of(model: nn.Module) -> dict[str, Any]:
    """Every parameter that learns, as one group."""
    return {"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}


def hold_out(rows: Sequence[Sequence[Any]], count: int) -> tuple[list[int], list[int]]:
    """Split row numbers into those to learn from and those kept for evaluation, by the rows' content alone.

    At most a quarter is kept, and none of fewer than 8 different rows: equal rows go to the same side. What `rows` holds
    of a row is what decides: given prompts alone, all rows of a prompt go to the same side.
    """
    keys = [derive(0, "hold out", *map(str, row)) for row in rows]
    sizes, most = Counter(keys), len(rows) // 4
    if len(sizes) < 8:
        return list(range(len(rows))), []
    kept: set[int] = set()
    size = 0
    for key in sorted(sizes):
        if size >= min(count, most):
            break
        if size + sizes[key] <= most:
            kept.add(key)
            size += sizes[key]
    return [i for i, key in enumerate(keys) if key not in kept], [i for i, key in enumerate(keys) if key in kept]


def divide(
    rows: Sequence[Row], make: Callable[[Sequence[Row], str], Sequence[Any]], cfg: Config, key: Callable[[Any], Any]
) -> tuple[list[Any], list[Any], list[str]]:
    """The records to learn from, those to evaluate on, and what is to be said: see `held_out` and `evaluation_data`.

    Args:
        rows: of `data`.  make: rows and the name of their file -> records.  key: what decides a record's side.
    """
    data = make(rows, cfg.data)
    if cfg.evaluation_data is None:
        learned, kept = hold_out([key(record) for record in data], cfg.held_out)
        return [data[i] for i in learned], [data[i] for i in kept], []
    try:
        found = make(read(cfg.evaluation_data, columns=cfg.reading["columns"]), cfg.evaluation_data)
    except RequestError as error:
        raise RequestError(f"evaluation_data is {cfg.evaluation_data!r}: {error}") from None
    known = {key(record) for record in data}
    both = sum(key(record) in known for record in found)
    said = f"{both} of the {len(found)} rows of evaluation_data '{cfg.evaluation_data}' are learned from, too"
    return list(data), list(found), [f"{said}: leave them out of one of the files"] if both else []


def asked(pair: Preference) -> tuple[Any, ...]:
    """What decides the side of a pair in `hold_out`: its prompt, or all of it where the prompt is not known."""
    return (pair.prompt,) if pair.prompt else (pair.chosen, pair.rejected)


def drain(iterations: Iterations) -> Run:
    """Run a recipe's iterations to their end; the run they made."""
    while True:
        try:
            next(iterations)
        except StopIteration as stop:
            return stop.value


_orders: dict[tuple[int, int, int], torch.Tensor] = {}


def _order(seed: int, epoch: int, size: int) -> torch.Tensor:
    key = (seed, epoch, size)
    if key not in _orders:
        _orders.clear()
        _orders[key] = torch.randperm(size, generator=torch.Generator().manual_seed(derive(seed, "order", epoch)))
    return _orders[key]
