"""Step 1, sample: a vector env whose environments may hang, crash, raise or break their word; each is restarted alone.

Every environment lives in a process of its own. These are forked by one more process, the nursery, which is forked when the
vector env is made: restarts never fork a trainer whose threads are at work, and environments need not be picklable. When
the trainer ends, however that comes, the nursery ends them all.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from typing import IO, Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array, iterate

from understudy.control.infos import ExactInfos, sendable
from understudy.control.parallel import CLOSE_SECONDS
from understudy.control.spaces import leaves, outside
from understudy.run.children import end_with_parent
from understudy.run.config import RequestError
from understudy.run.seeds import derive

START_SECONDS = 60.0
"""How long an environment may take to be made."""
_ALL = "those of all environments"
LOOK_SECONDS = 1.0
"""How often a wait looks up: the nursery for its trainer, the trainer for whether it was itself stopped meanwhile."""


@dataclass(frozen=True)
class Fault:
    """A call that an environment did not answer, or not with what its spaces promise."""

    env: int
    """Which: its row."""
    seed: int | None
    """The seed its row was last reset with; None where it never got one."""
    episode: int
    """Episodes that this seed's episode lies back, which went on with its generator: 0 for the seed's own."""
    step: int
    """Steps of the episode that were answered: the number of the one that was not."""
    what: str
    """hung, crashed, raised, or broke: an observation, reward, end or info that is not what it must be."""
    message: str
    """It in a sentence."""
    traceback: str
    """Python's, of the exception, or of where the process hung or was hit by a signal; empty after SIGKILL or an exit."""


class RestartsSpent(RuntimeError):
    """One fault more than restarts were allowed."""


class _Failure(NamedTuple):
    what: str
    message: str
    traceback: str


class _Broken(ValueError):
    """What an environment returned is not what it must be."""


class Supervised(ExactInfos, VectorEnv):
    """Environments in processes of their own; one that fails is restarted, and its episode ends where it was last seen.

    At the call that it leaves unanswered its row holds the last observation that it gave, reward 0, not terminated but
    truncated, and `info["fault"]` a `Fault` (`info["_fault"]` tells in which rows). The row then begins a new episode with a
    new seed, as its autoreset mode has it. A failure in a reset is mended within it. At every step observations are checked
    against their space, and they and rewards for being finite. Where nothing fails, it is `SyncVectorEnv` to the bit.

    Args:
        make_envs: a function for each environment; all spaces must be equal.
        step_timeout: seconds that a step or a reset may take; None for no limit.
        bounds: whether an observation outside the bounds of its space is a fault.
        restarts: how many are allowed, over all environments; one more fault raises `RestartsSpent`.

    Attributes:
        faults: every `Fault` so far, for whoever wants to note and clear them; `restarted` counts on, for each row.
        seeds: what each row was last reset with.

    Raises:
        RequestError: an environment cannot be made, or its observations are no arrays.
    """

    def __init__(
        self,
        make_envs: Sequence[Callable[[], gymnasium.Env]],
        *,
        step_timeout: float | None,
        restarts: int = 100,
        bounds: bool = True,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        self._owner: int | None = None  # until there is something to close
        if not hasattr(os, "fork"):
            raise RequestError("vectorization is 'supervised', which needs fork, and this system has none: use async")
        about = apart(lambda: _describe(make_envs[0]), "env 0", seconds=START_SECONDS)
        try:
            list(leaves(about["observation_space"]))
        except ValueError as error:
            raise RequestError(f"env 0 cannot be supervised: its {error}") from error
        self.num_envs, self.autoreset_mode = len(make_envs), AutoresetMode(autoreset_mode)
        self.step_timeout, self.restarts = step_timeout, restarts
        self.metadata = about["metadata"] | {"autoreset_mode": self.autoreset_mode}
        self.render_mode, self.spec = about["render_mode"], about["spec"]
        self.single_observation_space, self.single_action_space = about["observation_space"], about["action_space"]
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.faults: list[Fault] = []
        self.restarted = [0] * self.num_envs
        self._memory = create_empty_array(self.single_observation_space, self.num_envs, fn=_shared)
        self._seen = create_empty_array(self.single_observation_space, self.num_envs)  # s_t, out of the workers' reach
        self._pairs = list(zip(_flat(self._seen), _flat(self._memory), strict=True))
        self.seeds: list[int | None] = [None] * self.num_envs
        self._episodes, self._steps = [0] * self.num_envs, [0] * self.num_envs
        self._over: np.ndarray = np.zeros(self.num_envs, dtype=bool)
        self._reborn: set[int] = set()  # restarted, and not yet reset: their next seed is new
        self._unborn: set[int] = set()  # started, and not yet heard of
        self._call = 0
        self._pipes: dict[int, Connection] = {}
        self._polls: dict[int, select.poll] = {}
        spaces = self.single_observation_space, self.single_action_space
        shared = spaces, self._memory
        self._work = [_Work(make, *shared, row, self.autoreset_mode, bounds) for row, make in enumerate(make_envs)]
        self._nursery = _Nursery(self._work)
        self._owner = os.getpid()
        for row in range(self.num_envs):
            self._begin(row)
        for row, answer in self._born(range(self.num_envs)).items():
            if isinstance(answer, _Failure):
                how = self._end(row, answer)
                self.close()
                raise RequestError(f"env {row} cannot be made: {how.message}; mend it") from _Elsewhere(how.traceback)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes: in every row, or where `options["reset_mask"]`, bool [rows], is True.

        Args:
            seed: one for each row, None for none; or a number, to which the row's own is added.
        """
        asked = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        options = options and {name: value for name, value in options.items() if name != "reset_mask"}
        seeds = [None] * self.num_envs if seed is None else seed
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + row for row in range(self.num_envs)]
        if np.shape(asked) != (self.num_envs,) or len(seeds) != self.num_envs:
            raise ValueError(f"reset_mask is {np.shape(asked)}, seeds are {len(seeds)}: both must be {self.num_envs}")
        info = self._reset({int(row): seeds[row] for row in np.flatnonzero(asked)}, options, {})
        return _copied(self._seen), info

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every row; a row that is over is reset instead, in NEXT_STEP mode."""
        if self.autoreset_mode is AutoresetMode.DISABLED and self._over.any():
            raise ValueError(f"env {int(np.argmax(self._over))} is over: reset it before the next step")
        fresh = [row for row in range(self.num_envs) if self._over[row]]
        asked = {row: ("step", (action,)) for row, action in enumerate(iterate(self.action_space, actions))}
        asked |= {row: ("reset", (self._sow(row, None), None)) for row in fresh}
        reward = np.zeros(self.num_envs)
        ended: np.ndarray = np.zeros((2, self.num_envs), dtype=bool)
        info: dict[str, Any] = {}
        failed: dict[int, _Failure] = {}
        for row, answer in self._ask(asked).items():
            if isinstance(answer, _Failure):
                failed[row] = answer
            else:
                reward[row], *ended[:, row], told = answer
                self._steps[row] += row not in fresh
                self._add_info(info, told, row)  # in place
        self._look(row for row in range(self.num_envs) if row not in failed)
        self._over = ended[0] | ended[1]
        self._mend(failed, set(fresh), ended, info)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            for row in np.flatnonzero(self._over):
                self._steps[row], self._episodes[row] = 0, self._episodes[row] + 1
            self._over[:] = False
        return _copied(self._seen), reward, ended[0], ended[1], info

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What a method or attribute of every environment gives.

        Raises:
            RuntimeError: one of them fails at it; where it no longer lives, its next step says so.
        """
        answers = self._ask({row: ("call", (name, args, kwargs)) for row in range(self.num_envs)})
        for row, answer in answers.items():
            if isinstance(answer, _Failure):
                raise RuntimeError(f"env {row}, asked for {name!r}: {answer.message}") from _Elsewhere(answer.traceback)
        return tuple(answer for (answer,) in answers.values())

    def render(self) -> tuple[Any, ...]:
        """A frame of every environment."""
        return self.call("render")

    def close_extras(self, **kwargs: Any) -> None:
        """Let the environments close, and end those that do not within `CLOSE_SECONDS`."""
        if self._owner != os.getpid():  # nothing was begun, or a fork of another's
            return
        self._call += 1
        for pipe in self._pipes.values():
            with contextlib.suppress(OSError):
                pipe.send((self._call, "close", ()))
        left = CLOSE_SECONDS
        for row, pipe in self._pipes.items():
            _, left = self._hear(row, self._call, left)
            pipe.close()
        self._nursery.close()

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            self.close()

    def _reset(self, seeds: dict[int, int | None], options: Any, info: dict[str, Any]) -> dict[str, Any]:
        """Reset some rows until each stands; what `info` says of them, faults on the way too."""
        while seeds:
            asked = {row: ("reset", (self._sow(row, seed), options)) for row, seed in seeds.items()}
            answers = self._ask(asked)
            failed = {row: answer for row, answer in answers.items() if isinstance(answer, _Failure)}
            for row, answer in answers.items():
                if row not in failed:
                    self._add_info(info, answer[-1], row)  # in place
                    self._over[row] = False
            self._look(row for row in answers if row not in failed)
            for row, failure in failed.items():
                self._add_info(info, {"fault": self._restart(row, failure)}, row)
            seeds = dict.fromkeys(failed)
        return info

    def _sow(self, row: int, seed: int | None) -> int | None:
        """The seed of a row's next episode: as given; new for a row that was restarted; else its generator's own."""
        if seed is None and row in self._reborn:
            seed = derive(self.seeds[row] or 0, "restart", row, self.restarted[row])
        self._reborn.discard(row)
        self._episodes[row] = 0 if seed is not None else self._episodes[row] + 1
        self.seeds[row] = self.seeds[row] if seed is None else int(seed)
        self._steps[row] = 0
        return seed

    def _mend(self, failed: dict[int, _Failure], fresh: set[int], ended: np.ndarray, info: dict[str, Any]) -> None:
        """Restart the rows that did not answer a step, and reset them where that is due in this very call."""
        for row, failure in failed.items():
            told: dict[str, Any] = {"fault": self._restart(row, failure)}
            if row not in fresh:
                ended[1, row] = self._over[row] = True
                if self.autoreset_mode is AutoresetMode.SAME_STEP:
                    told["final_obs"] = copy.deepcopy(list(iterate(self.observation_space, self._seen))[row])
            self._add_info(info, told, row)  # in place
        now = failed if self.autoreset_mode is AutoresetMode.SAME_STEP else fresh & failed.keys()
        self._reset(dict.fromkeys(now), None, info)

    def _restart(self, row: int, failure: _Failure) -> Fault:
        """End what is left of an environment and begin it anew; the fault, written down."""
        failure = self._end(row, failure)
        about = self.seeds[row], self._episodes[row], self._steps[row]
        fault = Fault(row, *about, *failure)
        self.faults.append(fault)
        if sum(self.restarted) == self.restarts:
            raise RestartsSpent(
                f"all {self.restarts} restarts of environments are spent, and env {row} failed again at step {fault.step} "
                f"of an episode of seed {fault.seed}: {fault.message}; mend the environment"
            )
        self._begin(row)
        self.restarted[row] += 1
        self._reborn.add(row)
        return fault

    def _begin(self, row: int) -> None:
        pipe = self._pipes[row] = self._nursery.begin(row)
        _limit(pipe, self.step_timeout)  # of a message that breaks off in the middle
        self._polls[row] = select.poll()
        self._polls[row].register(pipe, select.POLLIN)
        self._unborn.add(row)

    def _end(self, row: int, failure: _Failure) -> _Failure:
        """End a row's process; the failure with what that tells of it."""
        self._pipes.pop(row).close()
        how, words = self._nursery.end(row, hung=failure.what == "hung")
        if failure.what == "crashed":
            failure = failure._replace(message=f"its process ended with {how}")
        if failure.what == "request":
            failure = failure._replace(what="raised")
        return failure if failure.traceback else failure._replace(traceback=words)

    def _ask(self, requests: Mapping[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        """Every worker's answer to its request, or a `_Failure`, within the time limit."""
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("these environments are closed: make new ones")
        answers = self._born(row for row in requests if row in self._unborn)
        answers = {row: answer for row, answer in answers.items() if isinstance(answer, _Failure)}
        self._call += 1
        asked = [row for row in requests if row not in answers]
        for row in asked:
            with contextlib.suppress(OSError):  # heard below
                self._pipes[row].send((self._call, *requests[row]))
        left = math.inf if self.step_timeout is None else self.step_timeout
        for row in asked:
            answers[row], left = self._hear(row, self._call, left)
            if answers[row] is None:
                answers[row] = _Failure("hung", f"no answer within {self.step_timeout:g} s", "")
        return answers

    def _born(self, rows: Iterable[int]) -> dict[int, Any]:
        """What the workers of these rows said when their environments were made, or how that failed."""
        left, answers = START_SECONDS, {}
        for row in list(rows):
            answers[row], left = self._hear(row, 0, left)
            self._unborn.discard(row)
            if answers[row] is None:
                answers[row] = _Failure("hung", f"not made within {START_SECONDS:g} s", "")
        return answers

    def _hear(self, row: int, call: int, left: float) -> tuple[Any, float]:
        """A worker's answer to a call, a `_Failure`, or None where the time is up; and the seconds that are left.

        Time in which this process was itself stopped (Ctrl-Z) does not count.
        """
        poll, since = self._polls[row], time.monotonic()
        while True:
            wait = min(max(left, 0), LOOK_SECONDS)
            ready = poll.poll(1000 * wait)
            now = time.monotonic()
            left, since = left - min(now - since, wait), now
            if ready:
                try:
                    answered, failure, answer = self._pipes[row].recv()
                except BlockingIOError:
                    return None, left
                except Exception:  # the end of the process, or what is left of a message
                    return _Failure("crashed", "", ""), left
                if answered == call:  # not the answer to a call that an interrupt broke off
                    return (answer if failure is None else _Failure(*failure)), left
            elif left <= 0:
                return None, left

    def _look(self, rows: Iterable[int]) -> None:
        """Take in the observations of rows that answered."""
        rows = list(rows)
        for seen, memory in self._pairs:
            if len(rows) == self.num_envs:
                np.copyto(seen, memory)
            else:
                seen[rows] = memory[rows]


class _Elsewhere(Exception):
    """The traceback of an exception in another process, as its cause here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def apart(function: Callable[[], Any], who: str, *, seconds: float | None) -> Any:
    """What a function returns in a process of its own, a fork of this one, which is ended in any case.

    Raises:
        RequestError: it raised that; or, with `who` in front: it raised anything else, took longer, or ended its process.
    """
    ours, theirs = Pipe()

    def life() -> None:
        _send(theirs, None, function)

    pid, words = _lone(life)
    theirs.close()
    answered = False
    try:
        answered = ours.poll(seconds)
        _, failure, answer = (
            ours.recv() if answered else (None, _Failure("hung", f"no answer within {seconds:g} s", ""), 0)
        )
    except (EOFError, OSError):
        failure, answer = _Failure("crashed", "", ""), None
    finally:
        ours.close()
        how, last = _buried(pid, words, hung=not answered)
    if failure is None:
        return answer
    what, message, there = failure
    if what != "request":
        message = f"{who} cannot be made or used: {message or f'its process ended with {how}'}; mend it"
    raise RequestError(message) from _Elsewhere(there or last)


class _Nursery:
    """The trainer's end of the process that begins and ends workers."""

    def __init__(self, work: list[_Work]) -> None:
        self.work = work
        self._open()

    def begin(self, row: int) -> Connection:
        """A new worker in this row; the way to talk to it."""
        ours, theirs = Pipe()
        for _ in range(2):
            try:
                self.control.send(("begin", row, False))
                send_handle(self.control, theirs.fileno(), self.pid)
                break
            except OSError:  # someone ended the nursery, and its workers with it
                self.close()
                self._open()
        theirs.close()
        return ours

    def end(self, row: int, *, hung: bool) -> tuple[str, str]:
        """How a row's worker ended, which is sure now, and the last words of its fault handler."""
        try:
            self.control.send(("end", row, hung))
            return self.control.recv()
        except (OSError, EOFError):
            return _ALL, ""

    def close(self) -> None:
        """End every worker, and the nursery."""
        self.control.close()
        until = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < until:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return
            time.sleep(0.005)
        _ended(self.pid)

    def _open(self) -> None:
        self.control, theirs = Pipe()
        trainer = os.getpid()

        def life() -> None:
            self.control.close()
            _nurse(theirs, trainer, self.work)

        self.pid = _fork(life)
        theirs.close()
        _limit(self.control, CLOSE_SECONDS)


def _nurse(control: Connection, trainer: int, work: list[_Work]) -> None:
    """The nursery's life: begin and end workers, as long as the trainer lives."""
    workers: dict[int, tuple[int, IO[bytes]]] = {}
    try:
        while os.getppid() == trainer:
            if not control.poll(LOOK_SECONDS):
                continue
            what, row, hung = control.recv()
            if what == "end":
                worker = workers.pop(row, None)  # None: it went with an earlier nursery
                control.send(_buried(*worker, hung=hung) if worker else (_ALL, ""))
            else:
                pipe = Connection(recv_handle(control))

                def life(row: int = row, pipe: Connection = pipe) -> None:
                    control.close()
                    work[row].live(pipe)

                workers[row] = _lone(life)
                pipe.close()
    except (EOFError, OSError):
        pass  # the trainer has ended, or closed
    finally:
        for pid, words in workers.values():
            _buried(pid, words, hung=False)


def _lone(life: Callable[[], None]) -> tuple[int, IO[bytes]]:
    """A fork that ends with this process and leads all that it starts: its id, and where its fault handler writes."""
    words, parent = tempfile.TemporaryFile(), os.getpid()  # noqa: SIM115  # it lives as long as the fork

    def alone() -> None:
        end_with_parent()
        if os.getppid() != parent:
            return
        # no session of its own: that would be scheduled apart from the trainer (Linux's autogroup), at half the speed
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable(words, all_threads=False)
        faulthandler.register(signal.SIGUSR1, words, all_threads=False)
        life()

    return _fork(alone), words


def _buried(pid: int, words: IO[bytes], *, hung: bool) -> tuple[str, str]:
    """End a worker and all that it started: how it ended, and the last words of its fault handler."""
    if hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)  # where does it hang?
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    how = _ended(pid)
    words.seek(0)
    with words:
        return how, words.read().decode(errors="replace")


def _ended(pid: int) -> str:
    """End a process of ours, if it has not, and say how it ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    names = {number.value: number.name for number in signal.Signals}
    return f"exit code {code}" if code >= 0 else f"signal {names.get(-code, -code)}"


class _Work:
    """What a worker does: one environment, asked until it fails, is told to close, or nobody is left to ask."""

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        spaces: Any,
        memory: Any,
        row: int,
        mode: AutoresetMode,
        bounds: bool,
    ) -> None:
        self.make, self.spaces, self.memory, self.row, self.bounds = make, spaces, memory, row, bounds
        self.same_step = mode is AutoresetMode.SAME_STEP
        self.env: Any = None

    def live(self, pipe: Connection) -> None:
        asks = {"step": self.step, "reset": self.reset, "call": self.call, "close": self.close}
        call, what, given, ask = 0, "begin", (), self.begin
        with contextlib.suppress(EOFError, OSError):  # of this pipe: the trainer is gone
            while (_send(pipe, call, ask, *given) or what == "call") and what != "close":
                call, what, given = pipe.recv()
                ask = asks[what]

    def begin(self) -> str:
        self.env = self.make()
        mine = self.env.observation_space, self.env.action_space
        if mine != self.spaces:
            raise ValueError(f"its spaces are {mine}, those of env 0 {self.spaces}: all must be equal")
        return "ready"

    def reset(self, seed: int | None, options: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self.keep(obs)
        return 0.0, False, False, _told(info)

    def step(self, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.keep(obs)
        for name, end in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(end, bool | np.bool_):
                raise _Broken(f"{name} is {end!r}: must be a bool")
        answer = _paid(reward), bool(terminated), bool(truncated), _told(info)
        if self.same_step and (terminated or truncated):
            *_, begun = self.reset(None, None)
            return *answer[:3], {"final_info": answer[3], "final_obs": obs} | begun
        return answer

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any]:
        found = self.env.get_wrapper_attr(name)
        return (found(*args, **kwargs) if callable(found) else found,)

    def close(self) -> str:
        self.env.close()
        return "closed"

    def keep(self, obs: Any) -> None:
        """Hand an observation on, if it lies in its space."""
        if problem := outside(self.spaces[0], obs, "observation", bounds=self.bounds):
            raise _Broken(problem)
        _write(self.memory, self.row, obs)


def _send(pipe: Connection, call: int | None, ask: Callable[..., Any], *given: Any) -> bool:
    """Send (call, None, answer), or (call, `_Failure`, None) where there is none; whether there was one."""
    try:
        answer = call, None, ask(*given)
    except BaseException as error:  # SystemExit too
        answer = call, _account(error), None
    try:
        pipe.send(answer)
    except OSError:
        raise
    except Exception as error:  # it cannot be pickled
        answer = call, _account(error), None
        pipe.send(answer)
    return answer[1] is None


def _describe(make: Callable[[], gymnasium.Env]) -> dict[str, Any]:
    """What the trainer must know of an environment."""
    env = make()
    about = {name: getattr(env, name) for name in ("observation_space", "action_space", "render_mode", "spec")}
    try:
        ForkingPickler.dumps(about["spec"])
    except Exception:  # an entry point that is no module's
        about["spec"] = None
    env.close()
    return about | {"metadata": dict(env.metadata)}


def _paid(reward: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(reward, str | bytes) and np.ndim(reward) == 0 and math.isfinite(reward):
            return float(reward)
    raise _Broken(f"reward is {reward!r}: must be one finite number")


def _told(info: Any) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise _Broken(f"info is {info!r}: must be a dict")
    info = {name: told for name, told in info.items() if name != "fault"} if "fault" in info else info
    return sendable(info)


def _account(error: BaseException) -> _Failure:
    """An exception as what can be sent."""
    said, there = " ".join(str(error).split()), "".join(traceback.format_exception(error))
    if isinstance(error, RequestError | _Broken):
        return _Failure("request" if isinstance(error, RequestError) else "broke", said, there)
    return _Failure("raised", f"{type(error).__name__}: {said}", there)


def _fork(life: Callable[[], None]) -> int:
    """A new process that lives through `life` and ends, deaf to SIGINT and SIGTERM, which are the trainer's; its id."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()  # or it would be written twice
    ours = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12, where threads run: they do not in `life`
        pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    try:
        for number in ours:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        life()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _limit(pipe: Connection, seconds: float | None) -> None:
    """No read or write of this pipe waits longer; it raises BlockingIOError."""
    whole = int(seconds or 0)
    value = struct.pack("ll", whole, int(1e6 * ((seconds or 0) - whole)))
    with socket.socket(fileno=os.dup(pipe.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that forks share."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=mmap.mmap(-1, max(size, 1)))


def _flat(tree: Any) -> Iterator[np.ndarray]:
    """The arrays of a batched observation."""
    if isinstance(tree, dict | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _flat(part)
    else:
        yield tree


def _copied(tree: Any) -> Any:
    """The same with its arrays copied."""
    if isinstance(tree, dict):
        return {name: _copied(part) for name, part in tree.items()}
    return tuple(map(_copied, tree)) if isinstance(tree, tuple) else tree.copy()


def _write(tree: Any, row: int, obs: Any) -> None:
    """Put one observation into its row."""
    if isinstance(tree, dict | tuple):
        for name in tree if isinstance(tree, dict) else range(len(tree)):
            _write(tree[name], row, obs[name])
    else:
        tree[row] = obs
