"""Step 2, score: what `info` says each step costs, beside the record, in any autoreset mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from understudy.batch import Trajectory
from understudy.control.infos import entry
from understudy.run.config import RequestError


class Costs(VectorWrapper):
    """Writes down every step's costs on their way from the environments to a walker, and lays them out as its record is.

    The cost of an episode's last step is `info["final_info"]`'s where the environments reset in the same step. What `info`
    says at a reset is no cost. A call that a supervised environment left unanswered has none; it is in no record either.
    """

    def __init__(self, envs: VectorEnv, names: Sequence[str]) -> None:
        super().__init__(envs)
        self.names = list(names)
        self.mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.over = np.zeros(self.num_envs, dtype=bool)  # the episode ended in the last call
        self.sums = np.zeros((len(names), self.num_envs))  # of the open episodes, up to the last record
        self.calls: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # whose episodes ended in it, and what it cost: [names, rows]
        self.known = ""  # what else info holds

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        if "reset_mask" in (options or {}):
            self.over = self.over & ~np.array((options or {})["reset_mask"])  # now, for it may be popped below
        else:
            self.over[:], self.sums[:] = False, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        found: Any = self.env.step(actions)
        made = ~self.over if self.mode is AutoresetMode.NEXT_STEP else np.ones(self.num_envs, dtype=bool)
        self.over = (np.array(found[2], dtype=bool) | np.array(found[3], dtype=bool)) & made
        last = self.over & (self.mode is AutoresetMode.SAME_STEP)
        cost = np.full((len(self.names), self.num_envs), np.nan)
        for rows, info in ((made & ~last, found[4]), (last, found[4].get("final_info", {}))):
            for into, name in zip(cost, self.names, strict=True):
                _read(name, info, rows, into)
            self.known = self.known or ", ".join(key for key in map(str, info) if not key.startswith(("_", "final_")))
        self.calls.append((self.over.copy(), cost))
        return found

    def record(
        self, traj: Trajectory, chosen: Sequence[np.ndarray]
    ) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """The costs of the record that was just walked, [B, T] by name; and the sums of the episodes that ended in it.

        Args:
            chosen: which rows chose, bool [rows], in each of the calls that the record is made of.

        Raises:
            RequestError: a step has no cost.
        """
        calls, self.calls = self.calls[-len(chosen) :], []  # before them stand those of a replay, if any
        costs, made = np.stack([cost for _, cost in calls]), np.stack(chosen)
        for place, name in enumerate(self.names):
            missing = np.isnan(costs[:, place]) & made
            if missing.any():
                raise RequestError(
                    f"constraint names {name!r}, which info lacks after a step of env {np.argwhere(missing)[0][1]}; it has "
                    f"{self.known or 'nothing'}: name a number that info holds at every step"
                )
        costs, whole = np.where(made[:, None], costs, 0.0), [[] for _ in self.names]
        for (over, _), cost, choice in zip(calls, costs, made, strict=True):
            self.sums += cost
            for place, row in np.ndindex(*self.sums.shape):
                if over[row] and choice[row]:
                    whole[place].append(float(self.sums[place, row]))
            self.sums[:, over] = 0
        mask = traj.mask.cpu().numpy()
        laid = np.zeros((len(self.names), *mask.shape))
        for row in range(self.num_envs):
            laid[:, row, mask[row]] = costs[made[:, row], :, row].T
        tensors = torch.from_numpy(laid).to(traj.reward)
        return dict(zip(self.names, tensors, strict=True)), dict(zip(self.names, whole, strict=True))

    @property
    def state(self) -> list[list[float]]:
        """What a run that goes on must know again, between records."""
        return self.sums.tolist()

    def restore(self, state: list[list[float]]) -> None:
        """Put back what `state` gave, once the environments stand where they stood."""
        self.sums = np.array(state)


def _read(name: str, info: Any, rows: np.ndarray, into: np.ndarray) -> None:
    """Write what `info` says of these rows over nan; where it says nothing, nan stays.

    Raises:
        RequestError: it is no number.
        FloatingPointError: it is not a finite one.
    """
    for row in np.flatnonzero(rows):
        value = entry(info, name, int(row))
        if value is None:
            continue
        try:
            into[row] = float(value)
        except (TypeError, ValueError):
            raise RequestError(
                f"constraint names {name!r}, and info has {value!r} there in env {row}: it must be a number"
            ) from None
        if not np.isfinite(into[row]):
            raise FloatingPointError(
                f"info[{name!r}] is {into[row]} in env {row}, which is not finite: mend the environment"
            )
