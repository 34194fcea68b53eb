"""Step 3, value: what the critic expects at each step, and after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from understudy.batch import Batch, Trajectory, map_tensors, policy_forward, tensor_leaves
from understudy.fast.linear import round_up_rows
from understudy.sample import ActorCritic

MIN_CHUNKED_STEPS, CHUNK_STEPS = 2**8, 2**13
"""Steps that are read as they come, and those that are read at once: activations of more leave the cache."""


@torch.no_grad()
def estimate_values(policy: ActorCritic, trajectory: Trajectory) -> tuple[Any, Tensor]:
    """The distribution and the value [B, T] of the policy as it is now, at every column of the record.

    A fresh record whose walker told the distribution is asked for the value alone; a `Batch` for both. One batched pass
    also gives V of every episode's true last observation: it stands in the record as a masked column.
    """
    forward = policy_forward if trajectory.old_distribution is None or isinstance(trajectory, Batch) else _forward_value
    distribution, value = (
        forward(policy, trajectory)
        if trajectory.mask.numel() < MIN_CHUNKED_STEPS
        else forward_in_chunks(forward, policy, trajectory)
    )
    # no_grad lets a view of a parameter through, such as the value of a critic that is one number
    return map_tensors(
        Tensor.detach, trajectory.old_distribution if distribution is None else distribution
    ), value.detach()


def next_value(value: Tensor, trajectory: Trajectory) -> Tensor:
    """V after each chosen step, [B, T]; 0 at the other columns.

    It is the value at the next chosen step of the same episode (text that the policy did not choose is stepped over).
    Where the episode or the row has none left, it is the value at the column to the right: the last observation's.
    """
    mask, steps = trajectory.mask, value.shape[1]
    column = torch.arange(steps, device=mask.device)
    at_or_after = torch.where(mask, column, steps).flip(1).cummin(dim=1).values.flip(1)
    following = torch.nn.functional.pad(at_or_after[:, 1:], (0, 1), value=steps)
    index = torch.where(trajectory.ended | (following == steps), (column + 1).clamp(max=steps - 1), following)
    return torch.where(mask, value.gather(1, index), 0.0)


def forward_in_chunks(
    forward: Callable[[Any, Any], tuple[Any, Tensor]], policy: Any, trajectory: Trajectory
) -> tuple[Any, Tensor]:
    """`forward(policy, trajectory)`, which is as `policy_forward`, about `CHUNK_STEPS` steps at a time.

    With memory, whole rows. Without, each column is a row of its own, and the last piece is filled up, so that few numbers
    of rows come.
    """
    shape = trajectory.mask.shape
    if policy.needs_whole_rows:
        rows_per_chunk = max(1, CHUNK_STEPS // shape[1])
        chunks = [
            map_tensors(lambda x, offset=offset: x[offset : offset + rows_per_chunk], trajectory)
            for offset in range(0, shape[0], rows_per_chunk)
        ]
    else:
        flat_obs = map_tensors(lambda x: x.flatten(0, 1).unsqueeze(1), trajectory.obs)
        chunks = [
            SimpleNamespace(obs=map_tensors(partial(_padded_chunk, offset=offset), flat_obs), state=None)
            for offset in range(0, shape.numel(), CHUNK_STEPS)
        ]
    outputs = [dict(zip(("distribution", "value"), forward(policy, chunk), strict=True)) for chunk in chunks]
    joined = [torch.cat(parts)[: shape.numel()] for parts in zip(*map(tensor_leaves, outputs), strict=True)]
    tensors = iter(joined if policy.needs_whole_rows else [x.reshape(*shape, *x.shape[2:]) for x in joined])
    output = map_tensors(lambda _: next(tensors), outputs[0])
    return output["distribution"], output["value"]


def _padded_chunk(x: Tensor, offset: int) -> Tensor:
    """x[at : at + MANY]; where that is less, the last of it again and again behind it."""
    chunk = x[offset : offset + CHUNK_STEPS]
    num_padding = round_up_rows(len(chunk)) - len(chunk) if len(chunk) < CHUNK_STEPS else 0
    return torch.cat([chunk, chunk[-1:].expand(num_padding, *chunk.shape[1:])]) if num_padding else chunk


def _forward_value(policy: Any, trajectory: Any) -> tuple[None, Tensor]:
    """The value alone."""
    return None, policy.value(trajectory.obs)
