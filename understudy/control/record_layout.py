"""Step 1, sample: how the calls of a vector env are laid out as one record."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.batch import Trajectory, Tree, map_tensors
from understudy.control.envs.spaces import fast_stack
from understudy.control.fast.numpy_actor import NumpyActor


class Call(NamedTuple):
    """One call of `step`, everything [rows, ...]: where it was made, what it led to, and which rows chose in it.

    `next_obs` is None where no row ended in it. `policy_output` is the log-prob of the action, or what its
    `NumpyActor` makes that of.
    """

    obs: Tree
    next_obs: Tree
    action: np.ndarray
    policy_output: np.ndarray
    mask: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def build_trajectory(
    calls: list[Call], last_obs: Tree, state: Tensor | None, numpy_actor: NumpyActor | None
) -> Trajectory:
    """Lay calls, last observations of episodes, and the observation after it all, out as one record [rows, T].

    Every call has two slots, the choice and what it led to; one more holds `last_obs`. Kept are the choices that were made,
    the last observations of episodes, and `last_obs` where no episode ended just before it; they move up to the left.

    Args:
        calls: K of them.  last: the observations after the last call, [rows, ...].  state: before the first, [rows, S].
        numpy_actor: what made log-probs out of what was said; None where that is what was said.
    """
    call_obs, next_obs, action, policy_output, mask, reward, terminated, truncated = zip(*calls, strict=True)
    keep_slot = (
        np.stack([fast_stack(mask), fast_stack(terminated) | fast_stack(truncated)], axis=1).reshape(-1, len(mask[0])).T
    )
    # the last slot, unless the one that was kept before it is an end
    keep_slot = np.column_stack([keep_slot, (keep_slot * np.arange(keep_slot.shape[1])).max(axis=1) % 2 == 0])
    slot = np.argsort(~keep_slot, axis=1, kind="stable")[:, : keep_slot.sum(axis=1).max()]
    call_index, is_next_obs, row_index = slot >> 1, slot & 1, np.arange(len(slot))[:, None]

    def gather_slots(trees: Any, index: np.ndarray) -> Tree:
        """What stands at a place, counted by trees and rows, of trees [rows, ...] -> [rows, T, ...]."""
        if isinstance(trees[0], dict):
            return {name: gather_slots([tree[name] for tree in trees], index) for name in trees[0]}
        return torch.from_numpy(
            np.concatenate([*trees, np.zeros_like(trees[0])]).take(index * len(row_index) + row_index, axis=0)
        )

    # what a call led to stands behind the observations it was made at; it is read only where an episode ended in it
    next_obs_index = len(calls) + np.cumsum([tree is not None for tree in (*next_obs, None)])
    obs = gather_slots(
        [*call_obs, last_obs, *(tree for tree in next_obs if tree is not None)],
        np.where(is_next_obs, next_obs_index[call_index], call_index),
    )
    old_distribution, policy_output = (
        (None, policy_output) if numpy_actor is None else numpy_actor.distribution_and_logprob(policy_output, action)
    )
    source_index = np.where(
        keep_slot[row_index, slot] > is_next_obs, call_index, len(calls)
    )  # behind the calls stand zeros, for what is no choice
    old_distribution = map_tensors(lambda x: gather_slots(x.numpy(), source_index), old_distribution)
    action, policy_output, mask, reward, terminated, truncated = (
        gather_slots(x, source_index) for x in (action, policy_output, mask, reward, terminated, truncated)
    )
    return Trajectory(obs, action, policy_output, mask, reward.float(), terminated, truncated, state, old_distribution)
