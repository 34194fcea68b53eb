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


LOSS_FIX, GRAD_NORM_FIX = (
    "look at rewards, advantages and targets",
    "lower learning_rate or max_grad_norm",
)  # what mends them


def update(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    objective: Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]],
    *,
    num_epochs: int,
    num_minibatches: int,
    max_grad_norm: float | None,
    micro_batch_size: int | None = None,
    loss_weights: Callable[[Tensor], Tensor] = per_step,
    recompute: Callable[[Batch], Batch] | None = None,
    transform_minibatch: Callable[[Batch], Batch] | None = None,
    on_minibatch: Callable[[dict[str, float]], bool] | None = None,
    reshuffle: bool = True,
    on_nonfinite: Callable[[ArithmeticError], None] | None = None,
    verify: Callable[[], dict[str, float]] = dict,
    generator: torch.Generator,
) -> dict[str, float]:
    """Improve the policy on a record: `num_epochs` passes over it in shuffled minibatches, one optimizer step each.

    A policy without memory learns from the chosen steps alone, shuffled; one with memory from whole rows. One weight a
    minibatch step is built before it is cut into micro-batches, so any cut gives the same gradient. A minibatch without
    a chosen step makes no optimizer step.

    Args:
        batch: a `Batch`; or what else a policy with memory learns from: `TokenBatch`, `PreferencePairs`, `LabelledText`.
        objective: `(policy, batch) -> loss per step, metrics per step`.
        num_minibatches: how many an epoch is split into, sizes differing by at most one; at most one a row.
        max_grad_norm: joint bound on the gradient's norm; None for none. A parameter group with a `max_grad_norm` of its
            own is clipped apart by that.
        micro_batch_size: rows a single forward pass sees; None for a whole minibatch.
        loss_weights: mask [B, T] -> weights [B, T] of losses and metrics.
        recompute: makes the record anew before every epoch but the first (advantages under the current critic).
        transform_minibatch: what needs a whole minibatch before it is cut (advantage standardisation).
        on_minibatch: sees a minibatch's metrics before its optimizer step; True ends the update without that step.
        reshuffle: draw a new order for every epoch; otherwise one for them all.
        on_nonfinite: told of a loss or gradient that is not finite, and then the update is left out: parameters, buffers and
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
    minibatch_metrics, num_optimizer_steps, epoch, order = [], 0, 0, None
    is_undoable = on_nonfinite and (num_epochs * num_minibatches > 1 or verify is not dict)
    snapshot = copy.deepcopy((optimizer, [*policy.buffers()])) if is_undoable else None
    try:
        for epoch in range(1, num_epochs + 1):
            batch = recompute(batch) if recompute is not None and epoch > 1 else batch
            samples = batch if policy.needs_whole_rows else batch.flatten_steps()
            if reshuffle or order is None:
                order = torch.randperm(len(samples), generator=generator, device=generator.device).to(
                    samples.mask.device
                )
            shuffled, minibatch_metrics = samples[order], []
            for rows in minibatch_slices(len(samples), num_minibatches):
                minibatch = shuffled[rows] if transform_minibatch is None else transform_minibatch(shuffled[rows])
                if not minibatch.mask.any():
                    continue
                metrics = _backward(
                    policy, optimizer, minibatch, objective, loss_weights(minibatch.mask), micro_batch_size
                )
                if on_minibatch is not None and on_minibatch(mean_metrics([metrics])):
                    return (
                        mean_metrics(minibatch_metrics or [metrics])
                        | {"optimizer_steps": num_optimizer_steps, "epochs": epoch}
                        | verify()
                    )
                metrics["grad_norm"] = _clip_gradients(optimizer, max_grad_norm)
                optimizer.step()
                num_optimizer_steps += 1
                minibatch_metrics.append(metrics)
        return mean_metrics(minibatch_metrics) | {"optimizer_steps": num_optimizer_steps, "epochs": epoch} | verify()
    except (FloatingPointError, UpdateRejected) as error:
        return undo_update(error, on_nonfinite, policy, optimizer, snapshot)


def _backward(
    policy, optimizer, minibatch, objective, weight: Tensor, micro_batch_size: int | None
) -> dict[str, Tensor]:
    """Leave the minibatch's gradient in the parameters, micro-batch by micro-batch; its weighted metrics."""
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for rows in [slice(None)] if micro_batch_size is None else _micro_batch_slices(len(minibatch), micro_batch_size):
        loss, metrics = objective(policy, minibatch[rows])
        total = (loss * weight[rows]).sum()
        require_finite("loss", total, LOSS_FIX).backward()
        if metrics:  # all in one pass
            means = (torch.stack(list(metrics.values())) * weight[rows]).sum(dim=(1, 2))
            totals = {name: totals.get(name, 0.0) + mean for name, mean in zip(metrics, means, strict=True)}
    return totals


def _clip_gradients(optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Tensor:
    """Clip the groups with a bound of their own apart, the others jointly; the norm of them all before that."""
    joint = [p for group in optimizer.param_groups if group.get("max_grad_norm") is None for p in group["params"]]
    limits = [
        (g["params"], group_max_norm)
        for g in optimizer.param_groups
        if (group_max_norm := g.get("max_grad_norm")) is not None
    ]
    limits += [(joint, math.inf if max_grad_norm is None else max_grad_norm)] if joint else []
    norm = torch.stack([torch.nn.utils.clip_grad_norm_(*limit) for limit in limits]).norm()
    return require_finite("gradient's norm", norm, GRAD_NORM_FIX)


def require_finite(name: str, value: Tensor, fix: str) -> Tensor:
    """An update's loss or gradient; refused where it is not finite."""
    if not math.isfinite(value.item()):
        raise FloatingPointError(f"the {name} is {value.item()}: {fix}")
    return value


@torch.no_grad()
def undo_update(
    error: ArithmeticError, on_nonfinite: Any, policy: Any, optimizer: Any, snapshot: Any
) -> dict[str, float]:
    """Undo an update that is not finite or was rejected: back to `snapshot`, where steps were made since; tell the guard."""
    if on_nonfinite is None:
        raise error
    if snapshot is not None:
        optimizer_copy, buffers = snapshot
        for group, group_copy in zip(optimizer.param_groups, optimizer_copy.param_groups, strict=True):
            for parameter, value in zip(group["params"], group_copy["params"], strict=True):
                parameter.copy_(value)
        for buffer, value in zip(policy.buffers(), buffers, strict=True):
            buffer.copy_(value)
        optimizer.load_state_dict(optimizer_copy.state_dict())
    optimizer.zero_grad(set_to_none=True)
    on_nonfinite(error)
    return {"updates_skipped": 1.0, "optimizer_steps": 0.0, "epochs": 0.0} | getattr(error, "metrics", {})


def minibatch_slices(size: int, parts: int) -> list[slice]:
    """At most `parts` slices of `size` rows, none empty, their sizes differing by at most one."""
    parts = max(1, min(parts, size))
    return [slice(-(-size * i // parts), -(-size * (i + 1) // parts)) for i in range(parts)]


def _micro_batch_slices(size: int, micro_batch_size: int) -> list[slice]:
    return [slice(low, low + micro_batch_size) for low in range(0, size, micro_batch_size)]


def mean_metrics(minibatch_metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Each metric's mean over minibatches."""
    return {
        name: float(torch.stack([metrics[name] for metrics in minibatch_metrics]).mean())
        for name in (minibatch_metrics[0] if minibatch_metrics else ())
    }
