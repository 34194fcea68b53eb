"""Step 5, update: epochs, minibatches, micro-batches, gradient clipping, optimizer steps. One for both worlds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from understudy.batch import Batch
from understudy.reduce import per_step


class UpdateRejected(ArithmeticError):
    """A finished update is not to stand; `metrics` are what was measured to decide it."""

    def __init__(self, reason: str, metrics: dict[str, float]) -> None:
        super().__init__(reason)
        self.metrics = metrics


LOSS, NORM = "look at rewards, advantages and targets", "lower learning_rate or max_grad_norm"  # what mends them


def update(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    record: Any,
    objective: Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]],
    *,
    epochs: int,
    minibatches: int,
    max_grad_norm: float | None,
    micro: int | None = None,
    weigh: Callable[[Tensor], Tensor] = per_step,
    refresh: Callable[[Batch], Batch] | None = None,
    prepare: Callable[[Batch], Batch] | None = None,
    steer: Callable[[dict[str, float]], bool] | None = None,
    reshuffle: bool = True,
    guard: Callable[[ArithmeticError], None] | None = None,
    verify: Callable[[], dict[str, float]] = dict,
    generator: torch.Generator,
) -> dict[str, float]:
    """Improve the policy on a record: `epochs` passes over it in shuffled minibatches, one optimizer step each.

    A policy without memory learns from the chosen steps alone, shuffled; one with memory from whole rows. One weight a
    minibatch step is built before it is cut into micro-batches, so any cut gives the same gradient. A minibatch without
    a chosen step makes no optimizer step.

    Args:
        record: a `Batch`; or what else a policy with memory learns from: `Text`, `Pairs`, `Labelled`.
        objective: `(policy, batch) -> loss per step, metrics per step`.
        minibatches: how many an epoch is split into, sizes differing by at most one; at most one a row.
        max_grad_norm: joint bound on the gradient's norm; None for none. A parameter group with a `max_grad_norm` of its
            own is clipped apart by that.
        micro: rows a single forward pass sees; None for a whole minibatch.
        weigh: mask [B, T] -> weights [B, T] of losses and metrics.
        refresh: makes the record anew before every epoch but the first (advantages under the current critic).
        prepare: what needs a whole minibatch before it is cut (advantage standardisation).
        steer: sees a minibatch's metrics before its optimizer step; True ends the update without that step.
        reshuffle: draw a new order for every epoch; otherwise one for them all.
        guard: told of a loss or gradient that is not finite, and then the update is left out: parameters, buffers and
            optimizer are, bit for bit, what they were before it. Costs a copy of what learns, and of the optimizer, while
            an update makes more than one step.
        verify: called after the last optimizer step; returns further metrics. Where it raises `UpdateRejected`, the update
            is undone and the guard is told, as for one that is not finite; the copy is then made for a single step, too.
        generator: shuffles.

    Returns:
        Each metric averaged over the minibatches of the last epoch begun; `grad_norm` before clipping;
        `optimizer_steps` and `epochs` made; of an update that was left out these alone, 0, and `updates_skipped`, 1;
        what `verify` measured.

    Raises:
        FloatingPointError: without a guard, a loss or gradient is not finite; the parameters stay as they were before
            that step.
    """
    seen, taken, epoch, order = [], 0, 0, None
    undoable = guard and (epochs * minibatches > 1 or verify is not dict)
    before = copy.deepcopy((optimizer, [*policy.buffers()])) if undoable else None
    try:
        for epoch in range(1, epochs + 1):
            record = refresh(record) if refresh is not None and epoch > 1 else record
            batch = record if policy.memory else record.steps()
            if reshuffle or order is None:
                order = torch.randperm(len(batch), generator=generator, device=generator.device).to(batch.mask.device)
            shuffled, seen = batch[order], []
            for rows in split(len(batch), minibatches):
                minibatch = shuffled[rows] if prepare is None else prepare(shuffled[rows])
                if not minibatch.mask.any():
                    continue
                metrics = _backward(policy, optimizer, minibatch, objective, weigh(minibatch.mask), micro)
                if steer is not None and steer(mean_of([metrics])):
                    return mean_of(seen or [metrics]) | {"optimizer_steps": taken, "epochs": epoch} | verify()
                metrics["grad_norm"] = _clip(optimizer, max_grad_norm)
                optimizer.step()
                taken += 1
                seen.append(metrics)
        return mean_of(seen) | {"optimizer_steps": taken, "epochs": epoch} | verify()
    except (FloatingPointError, UpdateRejected) as error:
        return left_out(error, guard, policy, optimizer, before)


def _backward(policy, optimizer, minibatch, objective, weight: Tensor, micro: int | None) -> dict[str, Tensor]:
    """Leave the minibatch's gradient in the parameters, micro-batch by micro-batch; its weighted metrics."""
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for rows in [slice(None)] if micro is None else _pieces(len(minibatch), micro):
        loss, metrics = objective(policy, minibatch[rows])
        total = (loss * weight[rows]).sum()
        finite("loss", total, LOSS).backward()
        if metrics:  # all in one pass
            means = (torch.stack(list(metrics.values())) * weight[rows]).sum(dim=(1, 2))
            totals = {name: totals.get(name, 0.0) + mean for name, mean in zip(metrics, means, strict=True)}
    return totals


def _clip(optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Tensor:
    """Clip the groups with a bound of their own apart, the others jointly; the norm of them all before that."""
    joint = [p for group in optimizer.param_groups if group.get("max_grad_norm") is None for p in group["params"]]
    limits = [(g["params"], own) for g in optimizer.param_groups if (own := g.get("max_grad_norm")) is not None]
    limits += [(joint, math.inf if max_grad_norm is None else max_grad_norm)] if joint else []
    norm = torch.stack([torch.nn.utils.clip_grad_norm_(*limit) for limit in limits]).norm()
    return finite("gradient's norm", norm, NORM)


def finite(what: str, value: Tensor, mend: str) -> Tensor:
    """An update's loss or gradient; refused where it is not finite."""
    if not math.isfinite(value.item()):
        raise FloatingPointError(f"the {what} is {value.item()}: {mend}")
    return value


@torch.no_grad()
def left_out(error: ArithmeticError, guard: Any, policy: Any, optimizer: Any, before: Any) -> dict[str, float]:
    """Undo an update that is not finite or was rejected: back to `before`, where steps were made since; tell the guard."""
    if guard is None:
        raise error
    if before is not None:
        twin, buffers = before
        for group, was in zip(optimizer.param_groups, twin.param_groups, strict=True):
            for parameter, value in zip(group["params"], was["params"], strict=True):
                parameter.copy_(value)
        for buffer, value in zip(policy.buffers(), buffers, strict=True):
            buffer.copy_(value)
        optimizer.load_state_dict(twin.state_dict())
    optimizer.zero_grad(set_to_none=True)
    guard(error)
    return {"updates_skipped": 1.0, "optimizer_steps": 0.0, "epochs": 0.0} | getattr(error, "metrics", {})


def split(size: int, parts: int) -> list[slice]:
    """At most `parts` slices of `size` rows, none empty, their sizes differing by at most one."""
    parts = max(1, min(parts, size))
    return [slice(-(-size * i // parts), -(-size * (i + 1) // parts)) for i in range(parts)]


def _pieces(size: int, micro: int) -> list[slice]:
    return [slice(low, low + micro) for low in range(0, size, micro)]


def mean_of(seen: list[dict[str, Tensor]]) -> dict[str, float]:
    """Each metric's mean over minibatches."""
    return {name: float(torch.stack([metrics[name] for metrics in seen]).mean()) for name in (seen[0] if seen else ())}
