"""Step 3, value: what the critic expects at each step, and after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from understudy.batch import Batch, Trajectory, consult, leaves, map_tensors
from understudy.products import rounded
from understudy.sample import Policy

FEW, MANY = 2**8, 2**13
"""Steps that are read as they come, and those that are read at once: activations of more leave the cache."""


@torch.no_grad()
def estimate(policy: Policy, record: Trajectory) -> tuple[Any, Tensor]:
    """The distribution and the value [B, T] of the policy as it is now, at every column of the record.

    A fresh record whose walker told the distribution is asked for the value alone; a `Batch` for both. One batched pass
    also gives V of every episode's true last observation: it stands in the record as a masked column.
    """
    ask = consult if record.old is None or isinstance(record, Batch) else _critique
    distribution, value = ask(policy, record) if record.mask.numel() < FEW else in_pieces(ask, policy, record)
    # no_grad lets a view of a parameter through, such as the value of a critic that is one number
    return map_tensors(Tensor.detach, record.old if distribution is None else distribution), value.detach()


def next_value(value: Tensor, record: Trajectory) -> Tensor:
    """V after each chosen step, [B, T]; 0 at the other columns.

    It is the value at the next chosen step of the same episode (text that the policy did not choose is stepped over).
    Where the episode or the row has none left, it is the value at the column to the right: the last observation's.
    """
    mask, steps = record.mask, value.shape[1]
    column = torch.arange(steps, device=mask.device)
    at_or_after = torch.where(mask, column, steps).flip(1).cummin(dim=1).values.flip(1)
    following = torch.nn.functional.pad(at_or_after[:, 1:], (0, 1), value=steps)
    index = torch.where(record.ended | (following == steps), (column + 1).clamp(max=steps - 1), following)
    return torch.where(mask, value.gather(1, index), 0.0)


def in_pieces(ask: Callable[[Any, Any], tuple[Any, Tensor]], policy: Any, record: Trajectory) -> tuple[Any, Tensor]:
    """`ask(policy, record)`, which is as `consult`, about `MANY` steps at a time.

    With memory, whole rows. Without, each column is a row of its own, and the last piece is filled up, so that few numbers
    of rows come.
    """
    shape = record.mask.shape
    if policy.memory:
        rows = max(1, MANY // shape[1])
        pieces = [map_tensors(lambda x, at=at: x[at : at + rows], record) for at in range(0, shape[0], rows)]
    else:
        seen = map_tensors(lambda x: x.flatten(0, 1).unsqueeze(1), record.obs)
        pieces = [
            SimpleNamespace(obs=map_tensors(partial(_piece, at=at), seen), state=None)
            for at in range(0, shape.numel(), MANY)
        ]
    found = [dict(zip(("said", "value"), ask(policy, piece), strict=True)) for piece in pieces]
    joined = [torch.cat(parts)[: shape.numel()] for parts in zip(*map(leaves, found), strict=True)]
    whole = iter(joined if policy.memory else [x.reshape(*shape, *x.shape[2:]) for x in joined])
    told = map_tensors(lambda _: next(whole), found[0])
    return told["said"], told["value"]


def _piece(x: Tensor, at: int) -> Tensor:
    """x[at : at + MANY]; where that is less, the last of it again and again behind it."""
    part = x[at : at + MANY]
    behind = rounded(len(part)) - len(part) if len(part) < MANY else 0
    return torch.cat([part, part[-1:].expand(behind, *part.shape[1:])]) if behind else part


def _critique(policy: Any, record: Any) -> tuple[None, Tensor]:
    """The value alone."""
    return None, policy.value(record.obs)
