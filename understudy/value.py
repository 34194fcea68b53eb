"""Step 3, value: what the critic expects at each step, and after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from understudy.batch import STEPS, Batch, Trajectory, consult, in_pieces, map_tensors
from understudy.sample import Policy


@torch.no_grad()
def estimate(policy: Policy, record: Trajectory) -> tuple[Any, Tensor]:
    """The distribution and the value [B, T] of the policy as it is now, at every column of the record.

    A fresh record whose walker told the distribution is asked for the value alone; a `Batch` for both. One batched pass
    also gives V of every episode's true last observation: it stands in the record as a masked column.
    """
    ask = consult if record.old is None or isinstance(record, Batch) else _critique
    distribution, value = ask(policy, record) if record.mask.numel() <= STEPS else in_pieces(ask, policy, record)
    # no_grad lets a view of a parameter through, such as the value of a critic that is one number
    return map_tensors(Tensor.detach, distribution), value.detach()


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


def _critique(policy: Any, record: Trajectory) -> tuple[Any, Tensor]:
    """What is known, and the value."""
    return record.old, policy.value(record.obs)
