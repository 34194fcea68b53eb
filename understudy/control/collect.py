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
from understudy.control.environment import SeededResets, autoreset_mode, seeds_rows
from understudy.control.infos import entry
from understudy.control.layout import Call, lay_out
from understudy.control.masks import flat_mask
from understudy.control.quick import Quick, quick_form
from understudy.control.spaces import MASK, PLAIN, all_forbidden, arrays, mask_width, reader, tensors
from understudy.control.standing import FOLD, LONGEST, Trail, Way, put_back, snapshot, waiting
from understudy.control.supervise import Supervised
from understudy.run.config import RequestError
from understudy.sample import choose

SUCCESS = ("success", "is_success")
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


class Walker:
    """Walks a vector env with a policy and remembers where every row stands between records.

    Args:
        envs: any `gymnasium.vector.VectorEnv`; its mode is `metadata["autoreset_mode"]`, NEXT_STEP where it says none.
        seed_of: (row, episode index) -> the seed of that episode. Rows reset by us get it; others where they allow it.
        generator: the randomness of the choices.
        hold: noise is drawn anew every `hold` calls.
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
        hold: int = 1,
        device: str = "cpu",
        sample: bool = True,
        log_info: Sequence[str] = (),
        exact: bool = False,
    ) -> None:
        self.envs, self.seed_of, self.generator, self.hold, self.device = envs, seed_of, generator, hold, device
        self.sample, self.log_info = sample, log_info
        self.rows = envs.num_envs
        self.mode = autoreset_mode(envs)
        self.seeds_rows = seeds_rows(envs)
        self.read = reader(envs.single_observation_space, exact=exact)
        self.steps = self.calls = 0
        self.finished: deque[Episode] = deque(maxlen=100_000)
        self.episode = np.full(self.rows, -1)
        self.returns, self.lengths = np.zeros(self.rows), np.zeros(self.rows, dtype=np.int64)
        self.pending = np.zeros(self.rows, dtype=bool)  # NEXT_STEP: the next call resets this row
        self.supervised = isinstance(envs.unwrapped, Supervised)
        self.start = torch.zeros(self.rows, 1, dtype=torch.bool, device=device)  # states are zeroed at ends, below
        self.state: Tensor | None = None
        self.noise: Tensor | None = None
        self.masked: bool | None = None  # whether `info` gives action masks; told by the first reset
        self.now: Tree = None
        self.quick: Quick | None = None  # the form in which the policy of this record chooses, where it has one
        self.unanswered = np.zeros(self.rows, dtype=bool)  # rows whose choice met a fault
        self.every, self.none = np.ones(self.rows, dtype=bool), np.zeros(self.rows, dtype=bool)  # never written to
        self.ended = np.zeros(self.rows, dtype=np.int64)  # episodes of this walk
        self.abandoned = self.none  # rows whose episode from the last record was cut without a step that ended it
        self.restart_seeds: dict[
            int, int
        ] = {}  # of open episodes that began with another seed, after a fault in a reset
        self.made: list[Call] = []  # the calls of this record, or of the last
        self.trail: Trail | None = None  # what a replay of the open episodes takes, where one is asked for

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
        self.returns[:], self.lengths[:], self.pending = 0, 0, self.none
        self.state = None
        self.masked = MASK in info if self.masked is None else self.masked
        self.now = self._see(obs, info, choosing=np.ones(self.rows, dtype=bool))
        if self.trail is not None:
            self.trail.begin(np.ones(self.rows, dtype=bool))

    @property
    def chosen(self) -> list[np.ndarray]:
        """Which rows chose, in each call of the last record."""
        return [call.chosen for call in self.made]

    def collect(self, policy: Any, steps: int) -> Trajectory:
        """The record of the next `steps` calls of the env; [rows, T], T >= steps + 1."""
        return self._walk(policy, lambda calls: self.every if len(calls) < steps else None)

    def collect_episodes(self, policy: Any, episodes: int) -> Trajectory:
        """The record of `episodes` whole, fresh episodes in every row: as many from a slow row as from a fast one."""
        self.reset()
        return self._walk(policy, lambda _: rows if (rows := self.ended < episodes).any() else None, whole=True)

    def play(self, policy: Any, episodes: int, stop: Callable[[], bool] | None = None) -> list[Episode] | None:
        """Play `episodes` whole, fresh episodes in every row without keeping a record; None where `stop` ended it."""
        self.reset()
        self.state = policy.initial_state(self.rows)
        self.quick = quick_form(policy, self)
        self.ended[:] = 0
        while (self.ended < episodes).any():
            self._step(policy, self.ended < episodes)
            if stop is not None and stop():
                return None
        played = list(self.finished)
        self.finished.clear()
        return played

    def standing(self, way: Way) -> dict[str, Any]:
        """Where this walker and its environments stand, between records; what `stand` takes.

        Where they are to be renewed, the open episodes end here, uncounted: so they do where one is too long to replay.
        """
        if way == "renew" or (way == "replay" and self.lengths.max() > LONGEST):
            self.forget()
        found = {name: getattr(self, name) for name in ("steps", "calls", "noise", "masked", "generator", "episode")}
        if isinstance(envs := self.envs.unwrapped, Supervised):
            seeds = enumerate(zip(envs.seeds, self.episode, strict=True))
            others = {row: seed for row, (seed, index) in seeds if seed not in (None, self.seed_of(row, int(index)))}
            found |= {"restarted": envs.restarted, "restart_seeds": others}
        if way == "restart":
            found["cut"] = self.now is not None
        elif self.now is not None:
            found |= {name: getattr(self, name) for name in ("returns", "lengths", "pending", "state")}
            found["now"] = tensors(self.now)
            found |= {"envs": snapshot(self.envs)} if way == "snapshot" else {}
            found |= {} if self.trail is None else {"trail": self.trail.state()}
        return found

    def forget(self) -> None:
        """Leave the open episodes: the next record begins new ones. The last one's rows are bootstrapped, as ever."""
        self.now = self.state = None
        self.returns[:], self.lengths[:], self.pending = 0, 0, self.none

    def stand(self, found: dict[str, Any], policy: Any) -> bool:
        """Stand where `standing` was asked, in fresh environments; False where they came back otherwise.

        Then the rows begin new episodes, and the run goes on without being the one that was interrupted.
        """
        cut = found.get("cut", False)
        for name in found.keys() - {"generator", "envs", "trail", "now", "cut", "restarted"}:
            setattr(self, name, found[name])
        if isinstance(envs := self.envs.unwrapped, Supervised):
            envs.restarted = list(found.get("restarted", envs.restarted))
        self.now = arrays(found["now"]) if "now" in found else None
        if self.generator is not None and len(found["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(found["generator"])  # a device of another kind begins its own stream
        self.state, self.noise = (None if x is None else x.to(self.device) for x in (self.state, self.noise))
        if self.now is None:
            return not cut
        if "envs" in found:
            put_back(self.envs, found["envs"])
        elif self.trail is not None and not self._replay(found["trail"], policy):
            self.forget()
            return False
        return True

    def _replay(self, trail: dict[str, Any], policy: Any) -> bool:
        """Do every open episode's executed actions again, from its seed; whether all came back as it was.

        All rows end together, so that one vector env does it through `reset` and `step` alone: a row that waits is reset
        again and again, and takes its own first action meanwhile, or the policy's where it has none.
        """
        now, rows = self.now, np.ones(self.rows, dtype=bool)
        again, actions = Trail(self.rows), trail["actions"]
        seeds: Any = [self._seed(row) for row in range(self.rows)]
        obs, info = self.envs.reset(seed=seeds)
        self.now = self._see(obs, info, choosing=rows)
        seen_at = map_tensors(lambda x: x[:, None].to(self.device), tensors(now))
        spare = choose(policy, seen_at, self.state, self.start, sample=False).action
        spare = policy.executable(spare.cpu().numpy())
        before = np.zeros(self.rows, dtype=bool)
        schedule = waiting([len(done) for done in actions])
        for call, begun in enumerate(schedule):
            if call and not before.all():
                obs, info = self._reset_rows(~before, info)
                self.now = self._see(obs, info, choosing=rows)
            if call and (begun & ~before).any():
                again.begin(begun & ~before)
            at = [call - (len(schedule) - len(done)) if begun[row] else 0 for row, done in enumerate(actions)]
            step = np.stack([done[at[row]] if len(done) else spare[row] for row, done in enumerate(actions)])
            step, seen = step.astype(spare.dtype, copy=False), self.now
            obs, reward, _, _, info = self.envs.step(step.copy())
            again.calls.append((step, seen, np.asarray(reward, dtype=np.float64), np.zeros_like(begun)))
            self.now, before = self._see(obs, info, choosing=begun), begun
        if schedule and not before.all():
            obs, info = self._reset_rows(~before, info)
            again.begin(~before)
            self.now = self._see(obs, info, choosing=rows)
        again.fold()
        self.trail, self.restart_seeds = again, {}
        came, was = list(_leaves(self.now)), list(_leaves(now))
        same = len(came) == len(was) and all(map(np.array_equal, came, was))
        return same and [digest.hexdigest() for digest in again.digests] == trail["digests"]

    def _walk(self, policy: Any, wanted: Callable[..., np.ndarray | None], *, whole: bool = False) -> Trajectory:
        """Call the env while rows are `wanted`, given the calls made."""
        self.abandoned = self.none
        if self.now is None:
            self.reset()
            self.abandoned = self.every
        self.state = policy.initial_state(self.rows) if self.state is None else self.state
        before, self.quick, self.made, self.ended[:] = self.state, quick_form(policy, self), (calls := []), 0
        while (rows := wanted(calls)) is not None:
            calls.append(self._step(policy, rows))
            if np.count_nonzero(self.unanswered):
                before = self._cut(calls, before, whole)
        if self.trail is not None and len(self.trail.calls) >= FOLD:
            self.trail.fold()
        record = lay_out(calls, self.now, before, self.quick)
        self.steps += int(record.mask.sum())
        return record if self.device == "cpu" else map_tensors(lambda x: x.to(self.device), record)

    def _cut(self, calls: list[Call], before: Tensor | None, whole: bool) -> Tensor | None:
        """Rows whose last choice met a fault: their last answered step is truncated; of a whole episode nothing is left.

        So s_t stands masked after step t - 1. At a record's first call it is the last column of the record before, and
        this one begins with the new episode; the recurrent states before this record, so that they fit.
        """
        for row in np.flatnonzero(self.unanswered) if whole else ():
            for call in reversed(calls[:-1]):
                if not call.chosen[row] or call.terminated[row] or call.truncated[row]:
                    break
                call.chosen[row] = False
        if len(calls) > 1:
            last = calls[-2]
            last.truncated[:] |= self.unanswered & last.chosen & ~last.terminated
            calls[-2] = last._replace(after=calls[-1].obs if last.after is None else last.after)
            return before
        self.abandoned = self.abandoned | self.unanswered
        if before is not None:
            before = torch.where(torch.from_numpy(self.unanswered).to(self.device)[:, None], 0.0, before)
        return before

    def _step(self, policy: Any, wanted: np.ndarray) -> Call:
        """One choice for every row, one call of the env, and whatever resets it brings."""
        action, said = self.quick(self.now) if self.quick else self._choose(policy, self.now)
        executed = policy.executable(action)
        # a copy: an environment may write over the action that it is given
        found, reward, terminated, truncated, info = self.envs.step(executed.copy() if self.trail else executed)
        # a copy: a vector env may write over its own arrays next time
        call = Call(self.now, None, action, said, wanted, np.array(reward, dtype=np.float64), self.none, self.none)
        eventful = self.supervised or any(map(np.count_nonzero, (terminated, truncated, self.pending)))
        call, over = self._heard(call, terminated, truncated, info) if eventful else (call, self.none)
        if np.count_nonzero(np.isfinite(call.reward)) < self.rows:
            raise self._no_number("reward", call.reward)
        self.calls, self.returns = self.calls + 1, self.returns + call.reward
        self.lengths = self.lengths + ~self.pending
        if self.trail is not None:
            self.trail.calls.append((executed, call.obs, call.reward, over))
        if eventful and np.count_nonzero(over | self.pending):
            return self._turn(call, over, found, info)
        self.now = self._see(found, info, choosing=self.every)
        return call

    def _heard(self, call: Call, terminated: Any, truncated: Any, info: Any) -> tuple[Call, np.ndarray]:
        """The call as the rows that heard it have it, and which of them are over. A death at the time limit is a death."""
        heard = ~self.pending
        terminated, truncated = np.asarray(terminated, dtype=bool) & heard, np.asarray(truncated, dtype=bool) & heard
        self.unanswered = info.get("_fault", self.none) & heard if self.supervised else self.none
        chosen, reward = call.chosen & heard & ~self.unanswered, np.where(heard, call.reward, 0.0)
        died, ended = terminated & chosen, (over := terminated | truncated) & chosen
        self.ended += ended
        return Call(*call[:4], chosen, reward, died, ended ^ died), over

    def _choose(self, policy: Any, obs: Tree) -> tuple[np.ndarray, np.ndarray]:
        """What the policy chooses, and its log-prob, [rows, ...]; its state and its noise are kept."""
        seen, held = map_tensors(lambda x: x[:, None].to(self.device), tensors(obs)), self.calls % self.hold
        how = {"generator": self.generator, "noise": self.noise if held else None, "sample": self.sample}
        action, logprob, self.state, self.noise = choose(policy, seen, self.state, self.start, **how)
        return action.cpu().numpy(), logprob.cpu().numpy()

    def _turn(self, call: Call, over: np.ndarray, found: Any, info: Any) -> Call:
        """Episodes end or begin: the call with what it led to; and what is seen where the next choices are made."""
        # the true last observations; nothing is chosen there
        last = self._final_obs(info, over) if self.mode is AutoresetMode.SAME_STEP and over.any() else found
        call = Call(call.obs, self._see(last, info, choosing=self.none), *call[2:])
        told: Any = self.returns, self.lengths, np.arange(self.rows), self.episode, call.truncated
        ended = (over & call.chosen).nonzero()[0].tolist()
        numbers = [self._numbers(info, row) if info or self.log_info else {} for row in ended]
        self.finished.extend(
            Episode(*(x.item(row) for x in told), info=own) for row, own in zip(ended, numbers, strict=True)
        )
        self.returns[over], self.lengths[over] = 0, 0  # made anew in every call
        if self.state is not None:
            self.state = torch.where(torch.from_numpy(over | self.pending).to(self.device)[:, None], 0.0, self.state)
        self.episode = self.episode + (self.pending if self.mode is AutoresetMode.NEXT_STEP else over)
        if self.mode is AutoresetMode.DISABLED:
            found, info = self._reset_rows(over, info)
        self.pending = over if self.mode is AutoresetMode.NEXT_STEP else self.none
        # seen already, unless rows were reset since, or who chooses must have a mask
        seen = self.mode is AutoresetMode.NEXT_STEP and isinstance(call.after, np.ndarray)
        self.now = call.after if seen else self._see(found, info, choosing=~self.pending)
        return call

    def _numbers(self, info: Any, row: int) -> dict[str, float]:
        """What the info of an episode's last step holds under `is_success` or `success`, and under the keys asked for.

        Raises:
            RequestError: there is no number under a key asked for.
        """
        last = info.get("final_info", {}) if self.mode is AutoresetMode.SAME_STEP else info
        numbers = {}
        for key in SUCCESS:
            if isinstance(value := entry(last, key, row), bool | int | float | np.number | np.bool_):
                numbers["success"] = float(value)
        for key in self.log_info:
            value = entry(last, key, row)
            try:
                numbers[key] = float(value)  # pyright: ignore[reportArgumentType]
            except (TypeError, ValueError):
                has = ", ".join(str(name) for name in last if not str(name).startswith("_")) or "nothing"
                raise RequestError(
                    f"log_info names {key!r}, and info has {value!r} there at the end of an episode; it has {has}: name a "
                    "number"
                ) from None
        return numbers

    def _final_obs(self, info: Any, over: np.ndarray) -> Any:
        """SAME_STEP: the last observations that `info` holds of the rows that are over; any of them in the other rows."""
        if "final_obs" not in info:
            raise ValueError(
                'info has no "final_obs", though autoreset_mode is SAME_STEP and an episode ended: give it'
            )
        space, finals = self.envs.single_observation_space, list(info["final_obs"])
        finals = [finals[row if over[row] else np.argmax(over)] for row in range(self.rows)]
        empty = gymnasium.vector.utils.create_empty_array(space, n=self.rows)
        return gymnasium.vector.utils.concatenate(space, finals, empty)

    def _reset_rows(self, over: np.ndarray, info: Any) -> tuple[Any, Any]:
        """Begin new episodes in the rows that are over; the rows' observations, and what `info` says of each."""
        seeds: Any = [self._seed(row) if over[row] else None for row in range(self.rows)]
        # a fresh dict every time: SyncVectorEnv pops the key
        found, told = self.envs.reset(seed=seeds, options={"reset_mask": over.copy()})
        return found, self._merged(info, told, over) if self.masked else told

    def _seed(self, row: int) -> int:
        """The seed of a row's episode."""
        return self.restart_seeds.get(row, self.seed_of(row, int(self.episode[row])))

    def _see(self, found: Any, info: Any, *, choosing: np.ndarray) -> Tree:
        """The observations as arrays, with the action mask where `info` gives one; refused where not finite."""
        tree = self.read(found)
        if isinstance(tree, dict) or self.masked or MASK in info:
            tree = self._with_mask(tree, info, choosing)
        for path, leaf in tree.items() if isinstance(tree, dict) else [(PLAIN, tree)]:
            if leaf.dtype.kind == "f" and np.count_nonzero(np.isfinite(leaf)) < leaf.size:
                raise self._no_number(f"observation {path!r}", leaf)
        return tree

    def _no_number(self, what: str, values: np.ndarray) -> FloatingPointError:
        """The refusal of observations or rewards [rows, ...], at the first that is not finite."""
        row, *at = np.argwhere(~np.isfinite(values))[0]
        return FloatingPointError(
            f"{what} is {values[row, *at]} in env {row}, after {self.lengths[row]} steps of its episode "
            f"{self.episode[row]} (from 0), which is not finite: mend the environment, or wrap it"
        )

    def _with_mask(self, tree: Tree, info: Any, choosing: np.ndarray) -> Tree:
        """The observations with the action mask, if any; refused where it leaves a row that chooses nothing to choose."""
        if self.masked or MASK in info:
            tree = (tree if isinstance(tree, dict) else {PLAIN: tree}) | {MASK: self._mask_in(info, choosing)}
        if MASK in tree:
            empty = all_forbidden(self.envs.single_action_space, torch.from_numpy(tree[MASK])).numpy() & choosing
            if empty.any():
                row = int(np.flatnonzero(empty)[0])
                raise ValueError(
                    f"{MASK} allows no action in env {row}, after {self.lengths[row]} steps of its episode "
                    f"{self.episode[row]} (from 0): allow at least one, in every dimension"
                )
        return tree

    def _mask_in(self, info: Any, choosing: np.ndarray) -> np.ndarray:
        """The action mask of `info`, bool [rows, width]; rows that choose nothing here may do anything."""
        if not self.masked:
            raise ValueError(
                f'info["{MASK}"] was missing at the first reset: give it at every reset and step, or never'
            )
        allowed = np.ones((self.rows, mask_width(self.envs.single_action_space)), dtype=bool)
        given = np.broadcast_to(info.get(f"_{MASK}", MASK in info), self.rows)
        for row in np.flatnonzero(choosing):
            if not given[row]:
                raise ValueError(f'info["{MASK}"] is missing in env {row}: give it at every reset and step, or never')
            flat = flat_mask(info[MASK][row])
            if len(flat) != allowed.shape[1]:
                raise ValueError(
                    f'info["{MASK}"] has {len(flat)} entries in env {row}, must have {allowed.shape[1]} for '
                    f"{self.envs.single_action_space}"
                )
            allowed[row] = flat
        return allowed

    def _merged(self, info: Any, told: Any, over: np.ndarray) -> dict[str, Any]:
        """The action masks of a step and of the resets after it, as one `info`."""
        masks, given = np.full(self.rows, None, dtype=object), np.zeros(self.rows, dtype=bool)
        for source, rows in ((info, ~over), (told, over)):
            there = np.broadcast_to(source.get(f"_{MASK}", MASK in source), self.rows) & rows
            for row in np.flatnonzero(there):
                masks[row] = source[MASK][row]
            given |= there
        return {MASK: masks, f"_{MASK}": given}


def _leaves(tree: Tree) -> Iterator[np.ndarray]:
    yield from tree.values() if isinstance(tree, dict) else [tree]
