"""Step 1, sample: how the calls of a vector env are laid out as one record."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.batch import Trajectory, Tree, map_tensors
from understudy.control.quick import Quick
from understudy.control.spaces import stacked


class Call(NamedTuple):
    """One call of `step`, everything [rows, ...]: where it was made, what it led to, and which rows chose in it.

    `after` is None where no row ended in it. `said` is the log-prob of the action, or what its `Quick` makes that of.
    """

    obs: Tree
    after: Tree
    action: np.ndarray
    said: np.ndarray
    chosen: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def lay_out(calls: list[Call], last: Tree, state: Tensor | None, quick: Quick | None) -> Trajectory:
    """Lay calls, last observations of episodes, and the observation after it all, out as one record [rows, T].

    Every call has two slots, the choice and what it led to; one more holds `last`. Kept are the choices that were made,
    the last observations of episodes, and `last` where no episode ended just before it; they move up to the left.

    Args:
        calls: K of them.  last: the observations after the last call, [rows, ...].  state: before the first, [rows, S].
        quick: what made log-probs out of what was said; None where that is what was said.
    """
    seen, after, action, said, chosen, reward, died, cut = zip(*calls, strict=True)
    keep = np.stack([stacked(chosen), stacked(died) | stacked(cut)], axis=1).reshape(-1, len(chosen[0])).T
    # the last slot, unless the one that was kept before it is an end
    keep = np.column_stack([keep, (keep * np.arange(keep.shape[1])).max(axis=1) % 2 == 0])
    slot = np.argsort(~keep, axis=1, kind="stable")[:, : keep.sum(axis=1).max()]
    call, led, row = slot >> 1, slot & 1, np.arange(len(slot))[:, None]

    def up(trees: Any, at: np.ndarray) -> Tree:
        """What stands at a place, counted by trees and rows, of trees [rows, ...] -> [rows, T, ...]."""
        if isinstance(trees[0], dict):
            return {name: up([tree[name] for tree in trees], at) for name in trees[0]}
        return torch.from_numpy(np.concatenate([*trees, np.zeros_like(trees[0])]).take(at * len(row) + row, axis=0))

    # what a call led to stands behind the observations it was made at; it is read only where an episode ended in it
    behind = len(calls) + np.cumsum([tree is not None for tree in (*after, None)])
    obs = up([*seen, last, *(tree for tree in after if tree is not None)], np.where(led, behind[call], call))
    old, said = (None, said) if quick is None else quick.sampled(said, action)
    at = np.where(keep[row, slot] > led, call, len(calls))  # behind the calls stand zeros, for what is no choice
    old = map_tensors(lambda x: up(x.numpy(), at), old)
    action, said, chosen, reward, died, cut = (up(x, at) for x in (action, said, chosen, reward, died, cut))
    return Trajectory(obs, action, said, chosen, reward.float(), died, cut, state, old)
