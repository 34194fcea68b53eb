"""What every language recipe walks on: model, optimizer, schedule; and what it does around an iteration."""

from __future__ import annotations

import math
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from understudy.language.config import Config
from understudy.language.text import Preference
from understudy.run.config import to_json
from understudy.run.progress import Progress
from understudy.run.seeds import derive, generator
from understudy.run.sinks import open_sinks
from understudy.run.store import Run, process_seconds

Iterations = Generator[dict[str, Any], None, Run]  # a line of metrics each; the run in the end


class Stage:
    """The open run of a recipe.

    Attributes:
        steps: tokens chosen, or learned from, so far.  rows: sequences so far.
    """

    def __init__(
        self, cfg: Config, run: Run, model: Any, optimizer: torch.optim.Optimizer, total: int, progress: Progress
    ) -> None:
        self.cfg, self.run, self.model, self.optimizer, self.total = cfg, run, model, optimizer, total
        self.progress = progress
        self.sinks = open_sinks(cfg.log, run.path, to_json(cfg))
        self.shuffle = generator(cfg.seed, "shuffle")
        self.iteration = self.steps = self.rows = 0
        self.unlogged: list[dict[str, float]] = []
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.train_started = time.time()
        run.startup_seconds = process_seconds()

    @property
    def on(self) -> bool:
        """Whether another iteration is due."""
        return self.steps < self.total

    def schedule(self) -> float:
        """Set the learning rates of the coming iteration; that of the first group."""
        done = min(1.0, self.steps / self.total)
        left = 1 - done
        share = {"constant": 1.0, "linear": left, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
        factor = share[self.cfg.learning_rate_schedule]
        if done < self.cfg.warmup:
            factor *= (done + 1 / max(self.total, 1)) / self.cfg.warmup
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return self.optimizer.param_groups[0]["lr"]

    def next_rows(self, size: int, count: int) -> list[int]:
        """Which of `size` rows come next, `count` of them: every one once an epoch, in an order of its own."""
        found = []
        for number in range(self.rows, self.rows + count):
            epoch, place = divmod(number, size)
            found.append(int(_order(self.cfg.seed, epoch, size)[place]))
        self.rows += count
        return found

    def due(self, every: int) -> bool:
        """Whether what happens every so many iterations happens in the one that is now being closed."""
        return bool(every) and (self.iteration + 1) % every == 0

    def report(self, metrics: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Close an iteration: log, show and checkpoint when due. Yields its line."""
        checkpoint = self.due(self.cfg.checkpoint_every)
        self.iteration += 1
        self.unlogged.append(metrics)
        if self.iteration % self.cfg.log_every == 0 or not self.on:
            iterations, self.unlogged = self.unlogged, []
            names = dict.fromkeys(name for found in iterations for name in found)
            line: dict[str, Any] = {"iteration": self.iteration, "steps": self.steps, "rows": self.rows}
            line |= {name: statistics.fmean(m[name] for m in iterations if name in m) for name in names}
            seconds = time.time() - self.train_started
            left = max(0, self.total - self.steps) * seconds / max(self.steps, 1)
            line |= {"seconds": seconds, "steps_per_second": self.steps / seconds, "seconds_left": left}
            self.run.log(line)
            for sink in self.sinks:
                sink.log({name: x for name, x in line.items() if isinstance(x, float | int)}, self.steps)
            self.progress.show(line, now=not self.on)
            yield line
        if checkpoint:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write model, optimizer and counters under checkpoints/ITERATION, once."""
        name = f"{self.iteration:06d}"
        if not (self.run.path / "checkpoints" / name).exists():
            state = {"iteration": self.iteration, "steps": self.steps, "rows": self.rows}
            self.run.checkpoint(name, self.model, self.optimizer, state)


@contextmanager
def open_stage(
    recipe: str, cfg: Config, model: Any, optimizer: torch.optim.Optimizer, *, total: int, folder: str = "policy"
) -> Generator[Stage]:
    """A run's directory, its progress and sinks; the model is saved in `folder` at the end, however that comes."""
    run = Run.create(cfg.out, f"{recipe}-s{cfg.seed}", {"recipe": f"language {recipe}", "config": to_json(cfg)})
    for remark in model.remarks:
        run.event("remark", text=remark)
        if not cfg.quiet:
            print(remark, file=sys.stderr)
    with Progress(f"{recipe} {cfg.model} seed {cfg.seed} -> {run.path}", total, quiet=cfg.quiet) as progress:
        stage = Stage(cfg, run, model, optimizer, total, progress)
        try:
            yield stage
        except (KeyboardInterrupt, GeneratorExit):
            _finish(stage, folder)
            raise
        except BaseException as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            run.event("failed", error=said, traceback=traceback.format_exc())
            raise
        else:
            _finish(stage, folder)
        finally:
            for sink in stage.sinks:
                sink.close()


def _finish(stage: Stage, folder: str) -> None:
    if stage.iteration:
        stage.checkpoint()
    stage.model.save(stage.run.path / folder)


def adamw(cfg: Config, *groups: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW over parameter groups; each may have its own `lr` and `max_grad_norm`."""
    fused = torch.device(cfg.device).type in ("cpu", "cuda")
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=fused,
    )


def all_of(model: nn.Module) -> dict[str, Any]:
    """Every parameter as one group."""
    return {"params": list(model.parameters())}


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
