"""Step 2, score: what `info` says each step costs, beside the record, in any autoreset mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from understudy.batch import Trajectory
from understudy.control.envs.infos import get_info_value
from understudy.run.config import RequestError


class CostRecorder(VectorWrapper):
    """Writes down every step's costs on their way from the environments to a walker, and lays them out as its record is.

    The cost of an episode's last step is `info["final_info"]`'s where the environments reset in the same step. What `info`
    says at a reset is no cost. A call that a supervised environment left unanswered has none; it is in no record either.
    """

    def __init__(self, envs: VectorEnv, names: Sequence[str]) -> None:
        super().__init__(envs)
        self.names = list(names)
        self.autoreset_mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.done = np.zeros(self.num_envs, dtype=bool)  # the episode ended in the last call
        self.episode_costs = np.zeros((len(names), self.num_envs))  # of the open episodes, up to the last record
        self.calls: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # whose episodes ended in it, and what it cost: [names, rows]
        self.info_keys = ""  # what else info holds

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        if "reset_mask" in (options or {}):
            self.done = self.done & ~np.array((options or {})["reset_mask"])  # now, for it may be popped below
        else:
            self.done[:], self.episode_costs[:] = False, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        result: Any = self.env.step(actions)
        stepped = ~self.done if self.autoreset_mode is AutoresetMode.NEXT_STEP else np.ones(self.num_envs, dtype=bool)
        self.done = (np.array(result[2], dtype=bool) | np.array(result[3], dtype=bool)) & stepped
        reset_in_step = self.done & (self.autoreset_mode is AutoresetMode.SAME_STEP)
        cost = np.full((len(self.names), self.num_envs), np.nan)
        for rows, info in ((stepped & ~reset_in_step, result[4]), (reset_in_step, result[4].get("final_info", {}))):
            for name_costs, name in zip(cost, self.names, strict=True):
                _read_costs(name, info, rows, name_costs)
            self.info_keys = self.info_keys or ", ".join(
                key for key in map(str, info) if not key.startswith(("_", "final_"))
            )
        self.calls.append((self.done.copy(), cost))
        return result

    def collect_costs(
        self, trajectory: Trajectory, masks: Sequence[np.ndarray]
    ) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """The costs of the record that was just walked, [B, T] by name; and the sums of the episodes that ended in it.

        Args:
            masks: which rows chose, bool [rows], in each of the calls that the record is made of.

        Raises:
            RequestError: a step has no cost.
        """
        calls, self.calls = self.calls[-len(masks) :], []  # before them stand those of a replay, if any
        costs, mask = np.stack([cost for _, cost in calls]), np.stack(masks)
        for index, name in enumerate(self.names):
            missing = np.isnan(costs[:, index]) & mask
            if missing.any():
                raise RequestError(
                    f"constraint names {name!r}, which info lacks after a step of env {np.argwhere(missing)[0][1]}; it has "
                    f"{self.info_keys or 'nothing'}: name a number that info holds at every step"
                )
        costs, finished_costs = np.where(mask[:, None], costs, 0.0), [[] for _ in self.names]
        for (done, _), cost, call_mask in zip(calls, costs, mask, strict=True):
            self.episode_costs += cost
            for index, row in np.ndindex(*self.episode_costs.shape):
                if done[row] and call_mask[row]:
                    finished_costs[index].append(float(self.episode_costs[index, row]))
            self.episode_costs[:, done] = 0
        trajectory_mask = trajectory.mask.cpu().numpy()
        padded = np.zeros((len(self.names), *trajectory_mask.shape))
        for row in range(self.num_envs):
            padded[:, row, trajectory_mask[row]] = costs[mask[:, row], :, row].T
        tensors = torch.from_numpy(padded).to(trajectory.reward)
        return dict(zip(self.names, tensors, strict=True)), dict(zip(self.names, finished_costs, strict=True))

    @property
    def state(self) -> list[list[float]]:
        """What a run that goes on must know again, between records."""
        return self.episode_costs.tolist()

    def load_state(self, state: list[list[float]]) -> None:
        """Put back what `state` gave, once the environments stand where they stood."""
        self.episode_costs = np.array(state)


def _read_costs(name: str, info: Any, rows: np.ndarray, out: np.ndarray) -> None:
    """Write what `info` says of these rows over nan; where it says nothing, nan stays.

    Raises:
        RequestError: it is no number.
        FloatingPointError: it is not a finite one.
    """
    for row in np.flatnonzero(rows):
        value = get_info_value(info, name, int(row))
        if value is None:
            continue
        try:
            out[row] = float(value)
        except (TypeError, ValueError):
            raise RequestError(
                f"constraint names {name!r}, and info has {value!r} there in env {row}: it must be a number"
            ) from None
        if not np.isfinite(out[row]):
            raise FloatingPointError(
                f"info[{name!r}] is {out[row]} in env {row}, which is not finite: mend the environment"
            )
