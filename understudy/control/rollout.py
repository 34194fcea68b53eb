"""Step 1, sample: walk a vector env, in any autoreset mode, and hand on one record in the one layout.

Each episode's last observation, and the observation after a row's last step, stand in the record as masked columns; rows
are padded on the right. NEXT_STEP envs return such a column by themselves, and spend a step on it that is no choice; for
SAME_STEP (`info["final_obs"]`) and DISABLED (we reset finished rows ourselves) it is written here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from understudy.batch import Trajectory, Tree, map_tensors
from understudy.control.envs.fault_tolerant import FaultTolerantVectorEnv
from understudy.control.envs.infos import get_info_value
from understudy.control.envs.make import SeededResets, autoreset_mode, seeds_rows
from understudy.control.envs.masks import flatten_mask
from understudy.control.envs.spaces import (
    MASK_KEY,
    OBS_KEY,
    all_forbidden,
    make_obs_reader,
    mask_width,
    to_arrays,
    to_tensors,
)
from understudy.control.envs.state import (
    MAX_REPLAY_STEPS,
    MAX_UNFOLDED_CALLS,
    ActionLog,
    RestoreMethod,
    replay_schedule,
    restore_snapshot,
    snapshot,
)
from understudy.control.fast.numpy_actor import NumpyActor, make_numpy_actor
from understudy.control.record_layout import Call, build_trajectory
from understudy.run.config import RequestError
from understudy.sample import sample_action

SUCCESS_KEYS = ("success", "is_success")
"""Keys of info under which environments say whether an episode succeeded."""


class Episode(NamedTuple):
    """A finished episode: undiscounted return, length in steps, row, number within its row, whether it was cut.

    `info` holds numbers of its last step's info: `success`, from `is_success` or `success`, and those that are asked for.
    """

    episode_return: float
    length: int
    row: int
    number: int
    truncated: bool
    info: dict[str, float] = {}  # noqa: RUF012  # never written to


class RolloutCollector:
    """Walks a vector env with a policy and remembers where every row stands between records.

    Args:
        envs: any `gymnasium.vector.VectorEnv`; its mode is `metadata["autoreset_mode"]`, NEXT_STEP where it says none.
        seed_of: (row, episode index) -> the seed of that episode. Rows reset by us get it; others where they allow it.
        generator: the randomness of the choices.
        noise_interval: noise is drawn anew every `noise_interval` calls.
        sample: draw from the policy's distribution; otherwise take its mode.
        log_info: keys of info whose numbers at an episode's last step are kept.
        exact: observations that float32 cannot hold are recorded as float64.
    """

    def __init__(
        self,
        envs: VectorEnv,
        *,
        seed_of: Callable[[int, int], int],
        generator: torch.Generator | None = None,
        noise_interval: int = 1,
        device: str = "cpu",
        sample: bool = True,
        log_info: Sequence[str] = (),
        keep_float64: bool = False,
    ) -> None:
        self.envs, self.seed_of, self.generator, self.noise_interval, self.device = (
            envs,
            seed_of,
            generator,
            noise_interval,
            device,
        )
        self.sample, self.log_info = sample, log_info
        self.num_envs = envs.num_envs
        self.autoreset_mode = autoreset_mode(envs)
        self.can_seed_rows = seeds_rows(envs)
        self.read_obs = make_obs_reader(envs.single_observation_space, keep_float64=keep_float64)
        self.num_steps = self.num_calls = 0
        self.finished_episodes: deque[Episode] = deque(maxlen=100_000)
        self.episode = np.full(self.num_envs, -1)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        self.needs_reset = np.zeros(self.num_envs, dtype=bool)  # NEXT_STEP: the next call resets this row
        self.is_fault_tolerant = isinstance(envs.unwrapped, FaultTolerantVectorEnv)
        self.start = torch.zeros(self.num_envs, 1, dtype=torch.bool, device=device)  # states are zeroed at ends, below
        self.recurrent_state: Tensor | None = None
        self.noise: Tensor | None = None
        self.has_action_mask: bool | None = None  # whether `info` gives action masks; told by the first reset
        self.current_obs: Tree = None
        self.numpy_actor: NumpyActor | None = (
            None  # the form in which the policy of this record chooses, where it has one
        )
        self.faulted_rows = np.zeros(self.num_envs, dtype=bool)  # rows whose choice met a fault
        self.all_rows, self.no_rows = (
            np.ones(self.num_envs, dtype=bool),
            np.zeros(self.num_envs, dtype=bool),
        )  # never written to
        self.num_finished = np.zeros(self.num_envs, dtype=np.int64)  # episodes of this walk
        self.abandoned_rows = (
            self.no_rows
        )  # rows whose episode from the last record was cut without a step that ended it
        self.restart_seeds: dict[
            int, int
        ] = {}  # of open episodes that began with another seed, after a fault in a reset
        self.calls: list[Call] = []  # the calls of this record, or of the last
        self.action_log: ActionLog | None = None  # what a replay of the open episodes takes, where one is asked for

    def reset(self) -> None:
        """Begin a new episode in every row."""
        # one number for all rows, however many each has played: rows that share their seeds begin from one state
        self.episode[:] = self.episode.max() + 1
        for sub_env in getattr(self.envs.unwrapped, "envs", ()):
            if isinstance(sub_env, SeededResets):
                sub_env.episode = int(self.episode[0]) - 1
        seeds: Any = [self.seed_of(row, int(index)) for row, index in enumerate(self.episode)]
        if not self.can_seed_rows:  # native vector envs share one generator: it is seeded once
            seeds = seeds[0] if self.current_obs is None else None
        obs, info = self.envs.reset(seed=seeds)
        self.returns[:], self.lengths[:], self.needs_reset = 0, 0, self.no_rows
        self.recurrent_state = None
        self.has_action_mask = MASK_KEY in info if self.has_action_mask is None else self.has_action_mask
        self.current_obs = self._process_obs(obs, info, choosing=np.ones(self.num_envs, dtype=bool))
        if self.action_log is not None:
            self.action_log.begin_episodes(np.ones(self.num_envs, dtype=bool))

    @property
    def masks(self) -> list[np.ndarray]:
        """Which rows chose, in each call of the last record."""
        return [call.mask for call in self.calls]

    def collect(self, policy: Any, num_steps: int) -> Trajectory:
        """The record of the next `num_steps` calls of the env; [rows, T], T >= steps + 1."""
        return self._collect(policy, lambda calls: self.all_rows if len(calls) < num_steps else None)

    def collect_episodes(self, policy: Any, num_episodes: int) -> Trajectory:
        """The record of `num_episodes` whole, fresh episodes in every row: as many from a slow row as from a fast one."""
        self.reset()
        return self._collect(
            policy, lambda _: rows if (rows := self.num_finished < num_episodes).any() else None, whole_episodes=True
        )

    def play_episodes(
        self, policy: Any, num_episodes: int, should_stop: Callable[[], bool] | None = None
    ) -> list[Episode] | None:
        """Play `num_episodes` whole, fresh episodes in every row without keeping a record; None where `should_stop`
        ended it."""
        self.reset()
        self.recurrent_state = policy.initial_state(self.num_envs)
        self.numpy_actor = make_numpy_actor(policy, self)
        self.num_finished[:] = 0
        while (self.num_finished < num_episodes).any():
            self._step(policy, self.num_finished < num_episodes)
            if should_stop is not None and should_stop():
                return None
        episodes = list(self.finished_episodes)
        self.finished_episodes.clear()
        return episodes

    def state(self, method: RestoreMethod) -> dict[str, Any]:
        """Where this walker and its environments stand, between records; what `stand` takes.

        Where they are to be renewed, the open episodes end here, uncounted: so they do where one is too long to replay.
        """
        if method == "renew" or (method == "replay" and self.lengths.max() > MAX_REPLAY_STEPS):
            self.abandon_episodes()
        state = {
            name: getattr(self, name)
            for name in ("num_steps", "num_calls", "noise", "has_action_mask", "generator", "episode")
        }
        if isinstance(envs := self.envs.unwrapped, FaultTolerantVectorEnv):
            seeds = enumerate(zip(envs.seeds, self.episode, strict=True))
            restart_seeds = {
                row: seed for row, (seed, index) in seeds if seed not in (None, self.seed_of(row, int(index)))
            }
            state |= {"restarted": envs.num_restarts, "restart_seeds": restart_seeds}
        if method == "restart":
            state["had_open_episodes"] = self.current_obs is not None
        elif self.current_obs is not None:
            state |= {name: getattr(self, name) for name in ("returns", "lengths", "needs_reset", "recurrent_state")}
            state["current_obs"] = to_tensors(self.current_obs)
            state |= {"envs": snapshot(self.envs)} if method == "snapshot" else {}
            state |= {} if self.action_log is None else {"action_log": self.action_log.state()}
        return state

    def abandon_episodes(self) -> None:
        """Leave the open episodes: the next record begins new ones. The last one's rows are bootstrapped, as ever."""
        self.current_obs = self.recurrent_state = None
        self.returns[:], self.lengths[:], self.needs_reset = 0, 0, self.no_rows

    def load_state(self, state: dict[str, Any], policy: Any) -> bool:
        """Stand where `standing` was asked, in fresh environments; False where they came back otherwise.

        Then the rows begin new episodes, and the run goes on without being the one that was interrupted.
        """
        had_open_episodes = state.get("had_open_episodes", False)
        for name in state.keys() - {"generator", "envs", "action_log", "current_obs", "had_open_episodes", "restarted"}:
            setattr(self, name, state[name])
        if isinstance(envs := self.envs.unwrapped, FaultTolerantVectorEnv):
            envs.num_restarts = list(state.get("restarted", envs.num_restarts))
        self.current_obs = to_arrays(state["current_obs"]) if "current_obs" in state else None
        if self.generator is not None and len(state["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(state["generator"])  # a device of another kind begins its own stream
        self.recurrent_state, self.noise = (
            None if x is None else x.to(self.device) for x in (self.recurrent_state, self.noise)
        )
        if self.current_obs is None:
            return not had_open_episodes
        if "envs" in state:
            restore_snapshot(self.envs, state["envs"])
        elif self.action_log is not None and not self._replay_actions(state["action_log"], policy):
            self.abandon_episodes()
            return False
        return True

    def _replay_actions(self, log_state: dict[str, Any], policy: Any) -> bool:
        """Do every open episode's executed actions again, from its seed; whether all came back as it was.

        All rows end together, so that one vector env does it through `reset` and `step` alone: a row that waits is reset
        again and again, and takes its own first action meanwhile, or the policy's where it has none.
        """
        saved_obs, all_rows = self.current_obs, np.ones(self.num_envs, dtype=bool)
        replayed_log, actions = ActionLog(self.num_envs), log_state["actions"]
        seeds: Any = [self._episode_seed(row) for row in range(self.num_envs)]
        obs, info = self.envs.reset(seed=seeds)
        self.current_obs = self._process_obs(obs, info, choosing=all_rows)
        obs_column = map_tensors(lambda x: x[:, None].to(self.device), to_tensors(saved_obs))
        filler_action = sample_action(policy, obs_column, self.recurrent_state, self.start, sample=False).action
        filler_action = policy.to_env_action(filler_action.cpu().numpy())
        was_started = np.zeros(self.num_envs, dtype=bool)
        schedule = replay_schedule([len(done) for done in actions])
        for call_index, is_started in enumerate(schedule):
            if call_index and not was_started.all():
                obs, info = self._reset_rows(~was_started, info)
                self.current_obs = self._process_obs(obs, info, choosing=all_rows)
            if call_index and (is_started & ~was_started).any():
                replayed_log.begin_episodes(is_started & ~was_started)
            positions = [
                call_index - (len(schedule) - len(done)) if is_started[row] else 0 for row, done in enumerate(actions)
            ]
            env_action = np.stack(
                [done[positions[row]] if len(done) else filler_action[row] for row, done in enumerate(actions)]
            )
            env_action, previous_obs = env_action.astype(filler_action.dtype, copy=False), self.current_obs
            obs, reward, _, _, info = self.envs.step(env_action.copy())
            replayed_log.calls.append(
                (env_action, previous_obs, np.asarray(reward, dtype=np.float64), np.zeros_like(is_started))
            )
            self.current_obs, was_started = self._process_obs(obs, info, choosing=is_started), is_started
        if schedule and not was_started.all():
            obs, info = self._reset_rows(~was_started, info)
            replayed_log.begin_episodes(~was_started)
            self.current_obs = self._process_obs(obs, info, choosing=all_rows)
        replayed_log.fold_calls()
        self.action_log, self.restart_seeds = replayed_log, {}
        actual, expected = list(_leaf_arrays(self.current_obs)), list(_leaf_arrays(saved_obs))
        is_same = len(actual) == len(expected) and all(map(np.array_equal, actual, expected))
        return is_same and [digest.hexdigest() for digest in replayed_log.digests] == log_state["digests"]

    def _collect(
        self, policy: Any, select_rows: Callable[..., np.ndarray | None], *, whole_episodes: bool = False
    ) -> Trajectory:
        """Call the env for as long as `select_rows` names rows, given the calls made."""
        self.abandoned_rows = self.no_rows
        if self.current_obs is None:
            self.reset()
            self.abandoned_rows = self.all_rows
        self.recurrent_state = (
            policy.initial_state(self.num_envs) if self.recurrent_state is None else self.recurrent_state
        )
        initial_state, self.numpy_actor, self.calls, self.num_finished[:] = (
            self.recurrent_state,
            make_numpy_actor(policy, self),
            (calls := []),
            0,
        )
        while (rows := select_rows(calls)) is not None:
            calls.append(self._step(policy, rows))
            if np.count_nonzero(self.faulted_rows):
                initial_state = self._truncate_faulted(calls, initial_state, whole_episodes)
        if self.action_log is not None and len(self.action_log.calls) >= MAX_UNFOLDED_CALLS:
            self.action_log.fold_calls()
        trajectory = build_trajectory(calls, self.current_obs, initial_state, self.numpy_actor)
        self.num_steps += int(trajectory.mask.sum())
        return trajectory if self.device == "cpu" else map_tensors(lambda x: x.to(self.device), trajectory)

    def _truncate_faulted(self, calls: list[Call], initial_state: Tensor | None, whole_episodes: bool) -> Tensor | None:
        """Rows whose last choice met a fault: their last answered step is truncated; of a whole episode nothing is left.

        So s_t stands masked after step t - 1. At a record's first call it is the last column of the record before, and
        this one begins with the new episode; the recurrent states before this record, so that they fit.
        """
        for row in np.flatnonzero(self.faulted_rows) if whole_episodes else ():
            for call in reversed(calls[:-1]):
                if not call.mask[row] or call.terminated[row] or call.truncated[row]:
                    break
                call.mask[row] = False
        if len(calls) > 1:
            last_call = calls[-2]
            last_call.truncated[:] |= self.faulted_rows & last_call.mask & ~last_call.terminated
            calls[-2] = last_call._replace(next_obs=calls[-1].obs if last_call.next_obs is None else last_call.next_obs)
            return initial_state
        self.abandoned_rows = self.abandoned_rows | self.faulted_rows
        if initial_state is not None:
            initial_state = torch.where(
                torch.from_numpy(self.faulted_rows).to(self.device)[:, None], 0.0, initial_state
            )
        return initial_state

    def _step(self, policy: Any, mask: np.ndarray) -> Call:
        """One choice for every row, one call of the env, and whatever resets it brings."""
        action, policy_output = (
            self.numpy_actor(self.current_obs) if self.numpy_actor else self._sample_actions(policy, self.current_obs)
        )
        env_action = policy.to_env_action(action)
        # a copy: an environment may write over the action that it is given
        obs, reward, terminated, truncated, info = self.envs.step(env_action.copy() if self.action_log else env_action)
        # a copy: a vector env may write over its own arrays next time
        call = Call(
            self.current_obs,
            None,
            action,
            policy_output,
            mask,
            np.array(reward, dtype=np.float64),
            self.no_rows,
            self.no_rows,
        )
        has_events = self.is_fault_tolerant or any(map(np.count_nonzero, (terminated, truncated, self.needs_reset)))
        call, done = self._mask_resets(call, terminated, truncated, info) if has_events else (call, self.no_rows)
        if np.count_nonzero(np.isfinite(call.reward)) < self.num_envs:
            raise self._not_finite_error("reward", call.reward)
        self.num_calls, self.returns = self.num_calls + 1, self.returns + call.reward
        self.lengths = self.lengths + ~self.needs_reset
        if self.action_log is not None:
            self.action_log.calls.append((env_action, call.obs, call.reward, done))
        if has_events and np.count_nonzero(done | self.needs_reset):
            return self._finish_episodes(call, done, obs, info)
        self.current_obs = self._process_obs(obs, info, choosing=self.all_rows)
        return call

    def _mask_resets(self, call: Call, terminated: Any, truncated: Any, info: Any) -> tuple[Call, np.ndarray]:
        """The call as the rows that heard it have it, and which of them are over. A death at the time limit is a death."""
        stepped = ~self.needs_reset
        terminated, truncated = (
            np.asarray(terminated, dtype=bool) & stepped,
            np.asarray(truncated, dtype=bool) & stepped,
        )
        self.faulted_rows = info.get("_fault", self.no_rows) & stepped if self.is_fault_tolerant else self.no_rows
        mask, reward = call.mask & stepped & ~self.faulted_rows, np.where(stepped, call.reward, 0.0)
        masked_terminated, masked_done = terminated & mask, (done := terminated | truncated) & mask
        self.num_finished += masked_done
        return Call(*call[:4], mask, reward, masked_terminated, masked_done ^ masked_terminated), done

    def _sample_actions(self, policy: Any, obs: Tree) -> tuple[np.ndarray, np.ndarray]:
        """What the policy chooses, and its log-prob, [rows, ...]; its state and its noise are kept."""
        obs_column, is_noise_held = (
            map_tensors(lambda x: x[:, None].to(self.device), to_tensors(obs)),
            self.num_calls % self.noise_interval,
        )
        options = {"generator": self.generator, "noise": self.noise if is_noise_held else None, "sample": self.sample}
        action, logprob, self.recurrent_state, self.noise = sample_action(
            policy, obs_column, self.recurrent_state, self.start, **options
        )
        return action.cpu().numpy(), logprob.cpu().numpy()

    def _finish_episodes(self, call: Call, done: np.ndarray, obs: Any, info: Any) -> Call:
        """Episodes end or begin: the call with what it led to; and what is seen where the next choices are made."""
        # the true last observations; nothing is chosen there
        final_obs = (
            self._final_obs(info, done) if self.autoreset_mode is AutoresetMode.SAME_STEP and done.any() else obs
        )
        call = Call(call.obs, self._process_obs(final_obs, info, choosing=self.no_rows), *call[2:])
        episode_fields: Any = self.returns, self.lengths, np.arange(self.num_envs), self.episode, call.truncated
        finished_rows = (done & call.mask).nonzero()[0].tolist()
        episode_infos = [self._episode_info(info, row) if info or self.log_info else {} for row in finished_rows]
        self.finished_episodes.extend(
            Episode(*(x.item(row) for x in episode_fields), info=episode_info)
            for row, episode_info in zip(finished_rows, episode_infos, strict=True)
        )
        self.returns[done], self.lengths[done] = 0, 0  # made anew in every call
        if self.recurrent_state is not None:
            self.recurrent_state = torch.where(
                torch.from_numpy(done | self.needs_reset).to(self.device)[:, None], 0.0, self.recurrent_state
            )
        self.episode = self.episode + (self.needs_reset if self.autoreset_mode is AutoresetMode.NEXT_STEP else done)
        if self.autoreset_mode is AutoresetMode.DISABLED:
            obs, info = self._reset_rows(done, info)
        self.needs_reset = done if self.autoreset_mode is AutoresetMode.NEXT_STEP else self.no_rows
        # seen already, unless rows were reset since, or who chooses must have a mask
        is_obs_read = self.autoreset_mode is AutoresetMode.NEXT_STEP and isinstance(call.next_obs, np.ndarray)
        self.current_obs = call.next_obs if is_obs_read else self._process_obs(obs, info, choosing=~self.needs_reset)
        return call

    def _episode_info(self, info: Any, row: int) -> dict[str, float]:
        """What the info of an episode's last step holds under `is_success` or `success`, and under the keys asked for.

        Raises:
            RequestError: there is no number under a key asked for.
        """
        final_info = info.get("final_info", {}) if self.autoreset_mode is AutoresetMode.SAME_STEP else info
        values = {}
        for key in SUCCESS_KEYS:
            value = np.asarray(get_info_value(final_info, key, row))
            if value.size == 1 and value.dtype.kind in "biuf":
                values["success"] = float(value.item())
        for key in self.log_info:
            value = get_info_value(final_info, key, row)
            try:
                values[key] = float(value)  # pyright: ignore[reportArgumentType]
            except (TypeError, ValueError):
                available = ", ".join(str(name) for name in final_info if not str(name).startswith("_")) or "nothing"
                raise RequestError(
                    f"log_info names {key!r}, and info has {value!r} there at the end of an episode; it has "
                    f"{available}: name a "
                    "number"
                ) from None
        return values

    def _final_obs(self, info: Any, done: np.ndarray) -> Any:
        """SAME_STEP: the last observations that `info` holds of the rows that are over; any of them in the other rows."""
        if "final_obs" not in info:
            raise ValueError(
                'info has no "final_obs", though autoreset_mode is SAME_STEP and an episode ended: give it'
            )
        space, finals = self.envs.single_observation_space, list(info["final_obs"])
        finals = [finals[row if done[row] else np.argmax(done)] for row in range(self.num_envs)]
        empty = gymnasium.vector.utils.create_empty_array(space, n=self.num_envs)
        return gymnasium.vector.utils.concatenate(space, finals, empty)

    def _reset_rows(self, done: np.ndarray, info: Any) -> tuple[Any, Any]:
        """Begin new episodes in the rows that are over; the rows' observations, and what `info` says of each."""
        seeds: Any = [self._episode_seed(row) if done[row] else None for row in range(self.num_envs)]
        # a fresh dict every time: SyncVectorEnv pops the key
        obs, reset_info = self.envs.reset(seed=seeds, options={"reset_mask": done.copy()})
        return obs, self._merge_mask_infos(info, reset_info, done) if self.has_action_mask else reset_info

    def _episode_seed(self, row: int) -> int:
        """The seed of a row's episode."""
        return self.restart_seeds.get(row, self.seed_of(row, int(self.episode[row])))

    def _process_obs(self, obs: Any, info: Any, *, choosing: np.ndarray) -> Tree:
        """The observations as arrays, with the action mask where `info` gives one; refused where not finite."""
        tree = self.read_obs(obs)
        if isinstance(tree, dict) or self.has_action_mask or MASK_KEY in info:
            tree = self._add_action_mask(tree, info, choosing)
        for path, leaf in tree.items() if isinstance(tree, dict) else [(OBS_KEY, tree)]:
            if leaf.dtype.kind == "f" and np.count_nonzero(np.isfinite(leaf)) < leaf.size:
                raise self._not_finite_error(f"observation {path!r}", leaf)
        return tree

    def _not_finite_error(self, name: str, values: np.ndarray) -> FloatingPointError:
        """The refusal of observations or rewards [rows, ...], at the first that is not finite."""
        row, *index = np.argwhere(~np.isfinite(values))[0]
        return FloatingPointError(
            f"{name} is {values[row, *index]} in env {row}, after {self.lengths[row]} steps of its episode "
            f"{self.episode[row]} (from 0), which is not finite: mend the environment, or wrap it"
        )

    def _add_action_mask(self, tree: Tree, info: Any, choosing: np.ndarray) -> Tree:
        """The observations with the action mask, if any; refused where it leaves a row that chooses nothing to choose."""
        if self.has_action_mask or MASK_KEY in info:
            tree = (tree if isinstance(tree, dict) else {OBS_KEY: tree}) | {
                MASK_KEY: self._read_action_mask(info, choosing)
            }
        if MASK_KEY in tree:
            is_empty = all_forbidden(self.envs.single_action_space, torch.from_numpy(tree[MASK_KEY])).numpy() & choosing
            if is_empty.any():
                row = int(np.flatnonzero(is_empty)[0])
                raise ValueError(
                    f"{MASK_KEY} allows no action in env {row}, after {self.lengths[row]} steps of its episode "
                    f"{self.episode[row]} (from 0): allow at least one, in every dimension"
                )
        return tree

    def _read_action_mask(self, info: Any, choosing: np.ndarray) -> np.ndarray:
        """The action mask of `info`, bool [rows, width]; rows that choose nothing here may do anything."""
        if not self.has_action_mask:
            raise ValueError(
                f'info["{MASK_KEY}"] was missing at the first reset: give it at every reset and step, or never'
            )
        allowed = np.ones((self.num_envs, mask_width(self.envs.single_action_space)), dtype=bool)
        is_present = np.broadcast_to(info.get(f"_{MASK_KEY}", MASK_KEY in info), self.num_envs)
        for row in np.flatnonzero(choosing):
            if not is_present[row]:
                raise ValueError(
                    f'info["{MASK_KEY}"] is missing in env {row}: give it at every reset and step, or never'
                )
            flat = flatten_mask(info[MASK_KEY][row])
            if len(flat) != allowed.shape[1]:
                raise ValueError(
                    f'info["{MASK_KEY}"] has {len(flat)} entries in env {row}, must have {allowed.shape[1]} for '
                    f"{self.envs.single_action_space}"
                )
            allowed[row] = flat
        return allowed

    def _merge_mask_infos(self, info: Any, reset_info: Any, done: np.ndarray) -> dict[str, Any]:
        """The action masks of a step and of the resets after it, as one `info`."""
        masks, is_present = np.full(self.num_envs, None, dtype=object), np.zeros(self.num_envs, dtype=bool)
        for source, rows in ((info, ~done), (reset_info, done)):
            source_rows = np.broadcast_to(source.get(f"_{MASK_KEY}", MASK_KEY in source), self.num_envs) & rows
            for row in np.flatnonzero(source_rows):
                masks[row] = source[MASK_KEY][row]
            is_present |= source_rows
        return {MASK_KEY: masks, f"_{MASK_KEY}": is_present}


def _leaf_arrays(tree: Tree) -> Iterator[np.ndarray]:
    yield from tree.values() if isinstance(tree, dict) else [tree]
