"""Step 1, sample: walk a vector env, in any autoreset mode, and hand on one record in the one layout.

Each episode's last observation, and the observation after a row's last step, stand in the record as masked columns; rows
are padded on the right. NEXT_STEP envs return such a column by themselves, and spend a step on it that is no choice; for
SAME_STEP (`info["final_obs"]`) and DISABLED (we reset finished rows ourselves) it is written here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from understudy.batch import Trajectory, Tree, map_tensors
from understudy.control.environment import SeededResets
from understudy.control.spaces import MASK, PLAIN, all_forbidden, mask_width, read
from understudy.sample import choose


class Episode(NamedTuple):
    """A finished episode: undiscounted return, length in steps, row, number within its row, whether it was cut."""

    episode_return: float
    length: int
    row: int
    number: int
    truncated: bool


@dataclass
class _Call:
    """One call of `step`: what went in, what came out, which rows chose, which ended."""

    obs: Tree
    action: Tensor
    logprob: Tensor
    chosen: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final: Tree  # observations of the rows that ended, [F, ...]; None where none did


class Walker:
    """Walks a vector env with a policy and remembers where every row stands between records.

    Args:
        envs: any `gymnasium.vector.VectorEnv`; its mode is `metadata["autoreset_mode"]`, NEXT_STEP where it says none.
        seed_of: (row, episode index) -> the seed of that episode. Rows reset by us get it; others where they allow it.
        generator: the randomness of the choices.
        hold: noise is drawn anew every `hold` calls; 0 for every call.
        sample: draw from the policy's distribution; otherwise take its mode.
    """

    def __init__(
        self,
        envs: VectorEnv,
        *,
        seed_of: Callable[[int, int], int],
        generator: torch.Generator | None = None,
        hold: int = 0,
        device: str = "cpu",
        sample: bool = True,
    ) -> None:
        self.envs, self.seed_of, self.generator, self.hold, self.device = envs, seed_of, generator, hold, device
        self.sample = sample
        self.rows = envs.num_envs
        self.mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.seeds_rows = self.mode is AutoresetMode.DISABLED or isinstance(
            envs.unwrapped, SyncVectorEnv | AsyncVectorEnv
        )
        self.steps = self.calls = 0
        self.finished: deque[Episode] = deque(maxlen=100_000)
        self.episode = np.full(self.rows, -1)
        self.returns, self.lengths = np.zeros(self.rows), np.zeros(self.rows, dtype=np.int64)
        self.pending = np.zeros(self.rows, dtype=bool)  # NEXT_STEP: the next call resets this row
        self.state: Tensor | None = None
        self.noise: Tensor | None = None
        self.allowed: np.ndarray | None = None
        self.now: Tree = None

    def reset(self) -> None:
        """Begin a new episode in every row."""
        # one number for all rows, however many each has played: rows that share their seeds begin from one state
        self.episode[:] = self.episode.max() + 1
        for sub in getattr(self.envs.unwrapped, "envs", ()):
            if isinstance(sub, SeededResets):
                sub.episode = int(self.episode[0]) - 1
        seeds: Any = [self.seed_of(row, int(index)) for row, index in enumerate(self.episode)]
        if not self.seeds_rows:  # native vector envs share one generator: it is seeded once
            seeds = seeds[0] if self.now is None else None
        obs, info = self.envs.reset(seed=seeds)
        self.returns[:], self.lengths[:], self.pending[:] = 0, 0, False
        self.state = None
        self.allowed = self._allowed(info, np.ones(self.rows, dtype=bool))
        self._stand(obs)

    def collect(self, policy: Any, steps: int) -> Trajectory:
        """The record of the next `steps` calls of the env; [rows, T], T >= steps + 1."""
        return self._walk(policy, lambda calls, _: calls < steps, whole=False)

    def collect_episodes(self, policy: Any, episodes: int) -> Trajectory:
        """The record of `episodes` whole, fresh episodes in every row: as many from a slow row as from a fast one."""
        self.reset()
        return self._walk(policy, lambda _, ended: bool((ended < episodes).any()), whole=True, episodes=episodes)

    def play(self, policy: Any, episodes: int) -> list[Episode]:
        """Play `episodes` whole, fresh episodes in every row without keeping a record."""
        self.reset()
        self.state = policy.initial_state(self.rows)
        ended = np.zeros(self.rows, dtype=np.int64)
        while (ended < episodes).any():
            call = self._step(policy, ~self.pending & (ended < episodes))
            ended += call.terminated | call.truncated
        played = list(self.finished)
        self.finished.clear()
        return played

    def _walk(
        self, policy: Any, on: Callable[[int, np.ndarray], bool], *, whole: bool, episodes: int = 0
    ) -> Trajectory:
        if self.now is None:
            self.reset()
        if policy.memory and self.state is None:
            self.state = policy.initial_state(self.rows)
        before = None if self.state is None else self.state.clone()
        calls: list[_Call] = []
        ended = np.zeros(self.rows, dtype=np.int64)
        while on(len(calls), ended):
            chosen = ~self.pending if not whole else ~self.pending & (ended < episodes)
            calls.append(self._step(policy, chosen))
            ended += calls[-1].terminated | calls[-1].truncated
        record = lay_out(calls, self.now, before)
        return map_tensors(lambda x: x.to(self.device), record)

    def _step(self, policy: Any, chosen: np.ndarray) -> _Call:
        """One choice for every row, one call of the env, and whatever resets it brings."""
        obs, pending = self.now, self.pending
        if not self.hold or self.calls % self.hold == 0:
            self.noise = None
        seen = map_tensors(lambda x: x[:, None].to(self.device), obs)
        start = torch.zeros(self.rows, 1, dtype=torch.bool, device=self.device)  # the state is zeroed at ends, below
        choice = choose(policy, seen, self.state, start, generator=self.generator, noise=self.noise, sample=self.sample)
        self.noise, self.state = choice.noise, choice.state
        after, reward, terminated, truncated, info = self.envs.step(policy.executable(choice.action))
        reward = np.array(reward, dtype=np.float64)  # a copy: a vector env may write over its own next time
        terminated = np.array(terminated, dtype=bool) & ~pending
        truncated = np.array(truncated, dtype=bool) & ~pending & ~terminated  # a death at the time limit is a death
        over = terminated | truncated
        self._account(chosen, reward)
        final = self._final(after, info, over & chosen)
        self._finish(chosen, over, truncated)
        self.pending = over if self.mode is AutoresetMode.NEXT_STEP else pending
        self._renew(after, info, over, renewed=pending if self.mode is AutoresetMode.NEXT_STEP else over)
        if self.state is not None:
            self.state = torch.where(torch.from_numpy(over | pending).to(self.device)[:, None], 0.0, self.state)
        self.calls += 1
        return _Call(
            obs,
            choice.action.cpu(),
            choice.logprob.cpu(),
            chosen,
            reward,
            terminated & chosen,
            truncated & chosen,
            final,
        )

    def _final(self, after: Any, info: dict[str, Any], ended: np.ndarray) -> Tree:
        """The true last observations of the rows that ended, [F, ...]; None where none did. Nothing is chosen there."""
        if not ended.any():
            return None
        rows = np.flatnonzero(ended)
        same_step = self.mode is AutoresetMode.SAME_STEP
        if same_step and "final_obs" not in info:
            raise ValueError(
                'info has no "final_obs", though an episode ended and autoreset_mode is SAME_STEP: give it'
            )
        found = _stack(self.envs, info["final_obs"][rows]) if same_step else after
        anything = (
            None if self.allowed is None else np.ones((len(rows) if same_step else self.rows, self.allowed.shape[1]))
        )
        tree = self._read(found, anything, rows if same_step else None)
        return tree if same_step else map_tensors(lambda x: x[torch.from_numpy(rows)], tree)

    def _renew(self, after: Any, info: dict[str, Any], over: np.ndarray, renewed: np.ndarray) -> None:
        """Stand where the next choice is made: rows that are over are reset here in DISABLED mode."""
        self.episode += renewed
        ours = self.mode is AutoresetMode.DISABLED and over.any()
        self.allowed = self._allowed(info, ~over if ours else np.ones_like(over))
        if ours:
            seeds: Any = [self.seed_of(row, int(self.episode[row])) if over[row] else None for row in range(self.rows)]
            # a fresh dict every time: SyncVectorEnv pops the key
            after, info = self.envs.reset(seed=seeds, options={"reset_mask": over.copy()})
            reset = self._allowed(info, over)
            self.allowed = (
                None if self.allowed is None or reset is None else np.where(over[:, None], reset, self.allowed)
            )
        self._stand(after)

    def _account(self, chosen: np.ndarray, reward: np.ndarray) -> None:
        """Count steps and returns; refuse a reward that is no number."""
        if not np.isfinite(reward).all():
            row = int(np.flatnonzero(~np.isfinite(reward))[0])
            raise FloatingPointError(
                f"reward is {reward[row]} in env {row} at step {self.lengths[row]} of its episode {self.episode[row]} "
                "(both from 0): mend the environment, or wrap it so that it pays finite rewards"
            )
        self.steps += int(chosen.sum())
        self.returns += np.where(self.pending, 0.0, reward)
        self.lengths += ~self.pending

    def _finish(self, chosen: np.ndarray, over: np.ndarray, truncated: np.ndarray) -> None:
        """Write down the episodes that are over."""
        for row in np.flatnonzero(over):
            if chosen[row]:
                episode = Episode(
                    float(self.returns[row]),
                    int(self.lengths[row]),
                    int(row),
                    int(self.episode[row]),
                    bool(truncated[row]),
                )
                self.finished.append(episode)
            self.returns[row], self.lengths[row] = 0.0, 0

    def _read(self, obs: Any, allowed: np.ndarray | None, rows: np.ndarray | None = None) -> Tree:
        """The observation as Tensors, of all rows or of these; refused where it is not finite."""
        tree = read(self.envs.single_observation_space, obs, allowed)
        for path, leaf in tree.items() if isinstance(tree, dict) else [(PLAIN, tree)]:
            if leaf.is_floating_point() and not torch.isfinite(leaf).all():
                index = int((~torch.isfinite(leaf)).reshape(len(leaf), -1).any(dim=1).nonzero()[0])
                row = index if rows is None else int(rows[index])
                raise FloatingPointError(
                    f"observation {path!r} is not finite in env {row}, after {self.lengths[row]} steps of its episode "
                    f"{self.episode[row]} (from 0): mend the environment"
                )
        return tree

    def _allowed(self, info: dict[str, Any], rows: np.ndarray) -> np.ndarray | None:
        """The action mask from `info`, bool [B, width]; None where the env gives none, or gives it in its observation.

        Rows that `rows` does not name, and rows about to be reset, may do anything: their choice is not used.
        """
        if MASK not in info and self.allowed is None:
            return None
        rows = rows & ~self.pending
        allowed = np.ones((self.rows, mask_width(self.envs.single_action_space)), dtype=bool)
        if not rows.any():
            return allowed
        given = np.broadcast_to(info.get(f"_{MASK}", MASK in info), self.rows)
        if not given[rows].all() or (self.now is not None and self.allowed is None):
            raise ValueError(f'info["{MASK}"] is missing at some resets or steps: give it at every one, or never')
        for row, mask in zip(np.flatnonzero(rows), np.asarray(info[MASK])[rows], strict=True):
            # an array; or, as an object, a list or one array a dimension
            flat = mask.ravel() if isinstance(mask, np.ndarray) else np.concatenate([np.ravel(part) for part in mask])
            if len(flat) != allowed.shape[1]:
                raise ValueError(
                    f'info["{MASK}"] has {len(flat)} entries in env {row}, must have {allowed.shape[1]} for '
                    f"{self.envs.single_action_space}"
                )
            allowed[row] = flat
        return allowed

    def _stand(self, obs: Any) -> None:
        """Make this the observations that the next choices are made at; refuse a mask that leaves none."""
        self.now = self._read(obs, self.allowed)
        if isinstance(self.now, dict) and MASK in self.now:
            empty = all_forbidden(self.envs.single_action_space, self.now[MASK]).numpy() & ~self.pending
            if empty.any():
                row = int(np.flatnonzero(empty)[0])
                raise ValueError(
                    f"{MASK} allows no action in env {row}, after {self.lengths[row]} steps of its episode "
                    f"{self.episode[row]} (from 0): allow at least one, in every dimension"
                )


def lay_out(calls: list[_Call], last: Tree, state: Tensor | None) -> Trajectory:
    """Lay calls, last observations of episodes, and the observation after it all, out as one record [rows, T].

    Args:
        calls: K of them.  last: the observations after the last call, [rows, ...].  state: before the first, [rows, S].
    """
    chosen = np.stack([call.chosen for call in calls])  # [K, rows], as everything here
    terminated, truncated = (np.stack([getattr(call, name) for call in calls]) for name in ("terminated", "truncated"))
    ended = terminated | truncated
    count, rows = chosen.shape
    # a chosen step's column: the choices and the ends (one column each for the last observation) before it in its row
    column = np.cumsum(chosen, axis=0) - 1 + np.cumsum(ended, axis=0) - ended
    used = chosen.sum(axis=0) + ended.sum(axis=0)
    open_ = ~_last_ended(chosen, ended)
    width = int((used + open_).max())

    # where each column's observation comes from: call k of row r is k * rows + r, then `last`, then the finals in order
    finals = np.cumsum(ended.reshape(-1)).reshape(ended.shape) - 1 + (count + 1) * rows
    source = np.tile(count * rows + np.arange(rows)[:, None], (1, width))  # padding repeats the row's last observation
    k, row = np.nonzero(chosen)
    source[row, column[k, row]] = k * rows + row
    e, ended_row = np.nonzero(ended)
    source[ended_row, column[e, ended_row] + 1] = finals[e, ended_row]

    pools = [call.obs for call in calls] + [last] + [call.final for call in calls if call.final is not None]
    obs = _gather(pools, torch.from_numpy(source))
    at = (torch.from_numpy(row), torch.from_numpy(column[k, row]))
    pick = (torch.from_numpy(k), torch.from_numpy(row))

    def place(values: Tensor, dtype: torch.dtype) -> Tensor:
        laid = torch.zeros(rows, width, *values.shape[2:], dtype=dtype)
        laid[at] = values[pick].to(dtype)
        return laid

    action = torch.stack([call.action for call in calls])
    return Trajectory(
        obs=obs,
        action=place(action, action.dtype),
        logprob=place(torch.stack([call.logprob for call in calls]), torch.float32),
        mask=place(torch.from_numpy(chosen), torch.bool),
        reward=place(torch.from_numpy(np.stack([call.reward for call in calls])), torch.float32),
        terminated=place(torch.from_numpy(terminated), torch.bool),
        truncated=place(torch.from_numpy(truncated), torch.bool),
        state=state,
    )


def _last_ended(chosen: np.ndarray, ended: np.ndarray) -> np.ndarray:
    """Whether each row's last chosen step ended its episode, so that its last observation stands there already."""
    last = len(chosen) - 1 - np.argmax(chosen[::-1], axis=0)
    return ended[last, np.arange(chosen.shape[1])]


def _gather(pools: list[Tree], source: Tensor) -> Tree:
    if isinstance(pools[0], dict):
        return {name: _gather([pool[name] for pool in pools], source) for name in pools[0]}
    return torch.cat(pools)[source]


def _stack(envs: VectorEnv, observations: Any) -> Any:
    """Observations of some sub-envs, one by one, as a batch in the space's own nesting."""
    space, count = envs.single_observation_space, len(observations)
    empty = gymnasium.vector.utils.create_empty_array(space, n=count)
    return gymnasium.vector.utils.concatenate(space, list(observations), empty)
