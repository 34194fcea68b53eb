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

from understudy.control.envs.infos import ExactInfos, drop_unpicklable
from understudy.control.envs.parallel import CLOSE_SECONDS
from understudy.control.envs.spaces import find_violation, leaf_spaces
from understudy.run.children import end_with_parent
from understudy.run.config import RequestError
from understudy.run.seeds import derive_seed

START_SECONDS = 60.0
"""How long an environment may take to be made."""
_ALL_ENDED = "those of all environments"
POLL_SECONDS = 1.0
"""How often a wait looks up: the nursery for its trainer, the trainer for whether it was itself stopped meanwhile."""


@dataclass(frozen=True)
class EnvFault:
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


class RestartsExhaustedError(RuntimeError):
    """One fault more than restarts were allowed."""


class _Failure(NamedTuple):
    what: str
    message: str
    traceback: str


class _InvalidResult(ValueError):
    """What an environment returned is not what it must be."""


class FaultTolerantVectorEnv(ExactInfos, VectorEnv):
    """Environments in processes of their own; one that fails is restarted, and its episode ends where it was last seen.

    At the call that it leaves unanswered its row holds the last observation that it gave, reward 0, not terminated but
    truncated, and `info["fault"]` a `EnvFault` (`info["_fault"]` tells in which rows). The row then begins a new
    episode with a new seed, as its autoreset mode has it. A failure in a reset is mended within it. At every step
    observations are checked against their space, and they and rewards for being finite. Where nothing fails, it is
    `SyncVectorEnv` to the bit.

    Args:
        make_envs: a function for each environment; all spaces must be equal.
        step_timeout: seconds that a step or a reset may take; None for no limit.
        check_bounds: whether an observation outside the bounds of its space is a fault.
        max_restarts: how many are allowed, over all environments; one more fault raises `RestartsExhaustedError`.

    Attributes:
        faults: every `EnvFault` so far, for whoever wants to note and clear them; `num_restarts` counts on, for each row.
        seeds: what each row was last reset with.

    Raises:
        RequestError: an environment cannot be made, or its observations are no arrays.
    """

    def __init__(
        self,
        make_envs: Sequence[Callable[[], gymnasium.Env]],
        *,
        step_timeout: float | None,
        max_restarts: int = 100,
        check_bounds: bool = True,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        self._owner_pid: int | None = None  # until there is something to close
        if not hasattr(os, "fork"):
            raise RequestError(
                "vectorization is 'fault_tolerant', which needs fork, and this system has none: use async"
            )
        description = run_in_fork(lambda: _describe_env(make_envs[0]), "env 0", seconds=START_SECONDS)
        try:
            list(leaf_spaces(description["observation_space"]))
        except ValueError as error:
            raise RequestError(f"env 0 cannot be supervised: its {error}") from error
        self.num_envs, self.autoreset_mode = len(make_envs), AutoresetMode(autoreset_mode)
        self.step_timeout, self.max_restarts = step_timeout, max_restarts
        self.metadata = description["metadata"] | {"autoreset_mode": self.autoreset_mode}
        self.render_mode, self.spec = description["render_mode"], description["spec"]
        self.single_observation_space, self.single_action_space = (
            description["observation_space"],
            description["action_space"],
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.faults: list[EnvFault] = []
        self.num_restarts = [0] * self.num_envs
        self._shared_obs = create_empty_array(self.single_observation_space, self.num_envs, fn=_shared_zeros)
        self._current_obs = create_empty_array(
            self.single_observation_space, self.num_envs
        )  # s_t, out of the workers' reach
        self._obs_pairs = list(zip(_leaf_arrays(self._current_obs), _leaf_arrays(self._shared_obs), strict=True))
        self.seeds: list[int | None] = [None] * self.num_envs
        self._episodes_since_seed, self._episode_steps = [0] * self.num_envs, [0] * self.num_envs
        self._done: np.ndarray = np.zeros(self.num_envs, dtype=bool)
        self._restarted_rows: set[int] = set()  # restarted, and not yet reset: their next seed is new
        self._starting_rows: set[int] = set()  # started, and not yet heard of
        self._call_id = 0
        self._pipes: dict[int, Connection] = {}
        self._polls: dict[int, select.poll] = {}
        spaces = self.single_observation_space, self.single_action_space
        worker_options = spaces, self._shared_obs
        self._workers = [
            _Worker(make, *worker_options, row, self.autoreset_mode, check_bounds) for row, make in enumerate(make_envs)
        ]
        self._fork_server = _ForkServer(self._workers)
        self._owner_pid = os.getpid()
        for row in range(self.num_envs):
            self._start_worker(row)
        for row, answer in self._wait_for_start(range(self.num_envs)).items():
            if isinstance(answer, _Failure):
                failure = self._end_worker(row, answer)
                self.close()
                raise RequestError(f"env {row} cannot be made: {failure.message}; mend it") from _RemoteTraceback(
                    failure.traceback
                )

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes: in every row, or where `options["reset_mask"]`, bool [rows], is True.

        Args:
            seed: one for each row, None for none; or a number, to which the row's own is added.
        """
        reset_mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        options = options and {name: value for name, value in options.items() if name != "reset_mask"}
        seeds = [None] * self.num_envs if seed is None else seed
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + row for row in range(self.num_envs)]
        if np.shape(reset_mask) != (self.num_envs,) or len(seeds) != self.num_envs:
            raise ValueError(
                f"reset_mask is {np.shape(reset_mask)}, seeds are {len(seeds)}: both must be {self.num_envs}"
            )
        info = self._reset_rows({int(row): seeds[row] for row in np.flatnonzero(reset_mask)}, options, {})
        return _copy_tree(self._current_obs), info

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every row; a row that is over is reset instead, in NEXT_STEP mode."""
        if self.autoreset_mode is AutoresetMode.DISABLED and self._done.any():
            raise ValueError(f"env {int(np.argmax(self._done))} is over: reset it before the next step")
        rows_to_reset = [row for row in range(self.num_envs) if self._done[row]]
        requests = {row: ("step", (action,)) for row, action in enumerate(iterate(self.action_space, actions))}
        requests |= {row: ("reset", (self._next_seed(row, None), None)) for row in rows_to_reset}
        reward = np.zeros(self.num_envs)
        ended: np.ndarray = np.zeros((2, self.num_envs), dtype=bool)
        info: dict[str, Any] = {}
        failures: dict[int, _Failure] = {}
        for row, answer in self._send_requests(requests).items():
            if isinstance(answer, _Failure):
                failures[row] = answer
            else:
                reward[row], *ended[:, row], row_info = answer
                self._episode_steps[row] += row not in rows_to_reset
                self._add_info(info, row_info, row)  # in place
        self._copy_obs(row for row in range(self.num_envs) if row not in failures)
        self._done = ended[0] | ended[1]
        self._recover(failures, set(rows_to_reset), ended, info)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            for row in np.flatnonzero(self._done):
                self._episode_steps[row], self._episodes_since_seed[row] = 0, self._episodes_since_seed[row] + 1
            self._done[:] = False
        return _copy_tree(self._current_obs), reward, ended[0], ended[1], info

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What a method or attribute of every environment gives.

        Raises:
            RuntimeError: one of them fails at it; where it no longer lives, its next step says so.
        """
        answers = self._send_requests({row: ("call", (name, args, kwargs)) for row in range(self.num_envs)})
        for row, answer in answers.items():
            if isinstance(answer, _Failure):
                raise RuntimeError(f"env {row}, asked for {name!r}: {answer.message}") from _RemoteTraceback(
                    answer.traceback
                )
        return tuple(answer for (answer,) in answers.values())

    def render(self) -> tuple[Any, ...]:
        """A frame of every environment."""
        return self.call("render")

    def close_extras(self, **kwargs: Any) -> None:
        """Let the environments close, and end those that do not within `CLOSE_SECONDS`."""
        if self._owner_pid != os.getpid():  # nothing was begun, or a fork of another's
            return
        self._call_id += 1
        for pipe in self._pipes.values():
            with contextlib.suppress(OSError):
                pipe.send((self._call_id, "close", ()))
        seconds_left = CLOSE_SECONDS
        for row, pipe in self._pipes.items():
            _, seconds_left = self._receive(row, self._call_id, seconds_left)
            pipe.close()
        self._fork_server.close()

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            self.close()

    def _reset_rows(self, seeds: dict[int, int | None], options: Any, info: dict[str, Any]) -> dict[str, Any]:
        """Reset some rows until each stands; what `info` says of them, faults on the way too."""
        while seeds:
            requests = {row: ("reset", (self._next_seed(row, seed), options)) for row, seed in seeds.items()}
            answers = self._send_requests(requests)
            failures = {row: answer for row, answer in answers.items() if isinstance(answer, _Failure)}
            for row, answer in answers.items():
                if row not in failures:
                    self._add_info(info, answer[-1], row)  # in place
                    self._done[row] = False
            self._copy_obs(row for row in answers if row not in failures)
            for row, failure in failures.items():
                self._add_info(info, {"fault": self._restart(row, failure)}, row)
            seeds = dict.fromkeys(failures)
        return info

    def _next_seed(self, row: int, seed: int | None) -> int | None:
        """The seed of a row's next episode: as given; new for a row that was restarted; else its generator's own."""
        if seed is None and row in self._restarted_rows:
            seed = derive_seed(self.seeds[row] or 0, "restart", row, self.num_restarts[row])
        self._restarted_rows.discard(row)
        self._episodes_since_seed[row] = 0 if seed is not None else self._episodes_since_seed[row] + 1
        self.seeds[row] = self.seeds[row] if seed is None else int(seed)
        self._episode_steps[row] = 0
        return seed

    def _recover(
        self, failures: dict[int, _Failure], reset_by_step: set[int], ended: np.ndarray, info: dict[str, Any]
    ) -> None:
        """Restart the rows that did not answer a step, and reset them where that is due in this very call."""
        for row, failure in failures.items():
            row_info: dict[str, Any] = {"fault": self._restart(row, failure)}
            if row not in reset_by_step:
                ended[1, row] = self._done[row] = True
                if self.autoreset_mode is AutoresetMode.SAME_STEP:
                    row_info["final_obs"] = copy.deepcopy(list(iterate(self.observation_space, self._current_obs))[row])
            self._add_info(info, row_info, row)  # in place
        rows_to_reset = failures if self.autoreset_mode is AutoresetMode.SAME_STEP else reset_by_step & failures.keys()
        self._reset_rows(dict.fromkeys(rows_to_reset), None, info)

    def _restart(self, row: int, failure: _Failure) -> EnvFault:
        """End what is left of an environment and begin it anew; the fault, written down."""
        failure = self._end_worker(row, failure)
        position = self.seeds[row], self._episodes_since_seed[row], self._episode_steps[row]
        fault = EnvFault(row, *position, *failure)
        self.faults.append(fault)
        if sum(self.num_restarts) == self.max_restarts:
            raise RestartsExhaustedError(
                f"all {self.max_restarts} restarts of environments are spent, and env {row} failed again at "
                f"step {fault.step} "
                f"of an episode of seed {fault.seed}: {fault.message}; mend the environment"
            )
        self._start_worker(row)
        self.num_restarts[row] += 1
        self._restarted_rows.add(row)
        return fault

    def _start_worker(self, row: int) -> None:
        pipe = self._pipes[row] = self._fork_server.start_worker(row)
        _set_timeout(pipe, self.step_timeout)  # of a message that breaks off in the middle
        self._polls[row] = select.poll()
        self._polls[row].register(pipe, select.POLLIN)
        self._starting_rows.add(row)

    def _end_worker(self, row: int, failure: _Failure) -> _Failure:
        """End a row's process; the failure with what that tells of it."""
        self._pipes.pop(row).close()
        exit_status, fault_log = self._fork_server.end_worker(row, is_hung=failure.what == "hung")
        if failure.what == "crashed":
            failure = failure._replace(message=f"its process ended with {exit_status}")
        if failure.what == "request":
            failure = failure._replace(what="raised")
        return failure if failure.traceback else failure._replace(traceback=fault_log)

    def _send_requests(self, requests: Mapping[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        """Every worker's answer to its request, or a `_Failure`, within the time limit."""
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("these environments are closed: make new ones")
        answers = self._wait_for_start(row for row in requests if row in self._starting_rows)
        answers = {row: answer for row, answer in answers.items() if isinstance(answer, _Failure)}
        self._call_id += 1
        rows = [row for row in requests if row not in answers]
        for row in rows:
            with contextlib.suppress(OSError):  # heard below
                self._pipes[row].send((self._call_id, *requests[row]))
        seconds_left = math.inf if self.step_timeout is None else self.step_timeout
        for row in rows:
            answers[row], seconds_left = self._receive(row, self._call_id, seconds_left)
            if answers[row] is None:
                answers[row] = _Failure("hung", f"no answer within {self.step_timeout:g} s", "")
        return answers

    def _wait_for_start(self, rows: Iterable[int]) -> dict[int, Any]:
        """What the workers of these rows said when their environments were made, or how that failed."""
        seconds_left, answers = START_SECONDS, {}
        for row in list(rows):
            answers[row], seconds_left = self._receive(row, 0, seconds_left)
            self._starting_rows.discard(row)
            if answers[row] is None:
                answers[row] = _Failure("hung", f"not made within {START_SECONDS:g} s", "")
        return answers

    def _receive(self, row: int, call_id: int, seconds_left: float) -> tuple[Any, float]:
        """A worker's answer to a call, a `_Failure`, or None where the time is up; and the seconds that are left.

        Time in which this process was itself stopped (Ctrl-Z) does not count.
        """
        poll, last_check = self._polls[row], time.monotonic()
        while True:
            wait = min(max(seconds_left, 0), POLL_SECONDS)
            has_message = poll.poll(1000 * wait)
            now = time.monotonic()
            seconds_left, last_check = seconds_left - min(now - last_check, wait), now
            if has_message:
                try:
                    answered_call, failure, answer = self._pipes[row].recv()
                except BlockingIOError:
                    return None, seconds_left
                except Exception:  # the end of the process, or what is left of a message
                    return _Failure("crashed", "", ""), seconds_left
                if answered_call == call_id:  # not the answer to a call that an interrupt broke off
                    return (answer if failure is None else _Failure(*failure)), seconds_left
            elif seconds_left <= 0:
                return None, seconds_left

    def _copy_obs(self, rows: Iterable[int]) -> None:
        """Take in the observations of rows that answered."""
        rows = list(rows)
        for current, shared in self._obs_pairs:
            if len(rows) == self.num_envs:
                np.copyto(current, shared)
            else:
                current[rows] = shared[rows]


class _RemoteTraceback(Exception):
    """The traceback of an exception in another process, as its cause here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_in_fork(function: Callable[[], Any], subject: str, *, seconds: float | None) -> Any:
    """What a function returns in a process of its own, a fork of this one, which is ended in any case.

    Raises:
        RequestError: it raised that; or, with `subject` in front: it raised anything else, took longer, or ended its
            process.
    """
    parent_pipe, child_pipe = Pipe()

    def target() -> None:
        _send_answer(child_pipe, None, function)

    pid, fault_log = _fork_group_leader(target)
    child_pipe.close()
    has_answered = False
    try:
        has_answered = parent_pipe.poll(seconds)
        _, failure, answer = (
            parent_pipe.recv() if has_answered else (None, _Failure("hung", f"no answer within {seconds:g} s", ""), 0)
        )
    except (EOFError, OSError):
        failure, answer = _Failure("crashed", "", ""), None
    finally:
        parent_pipe.close()
        exit_status, log_text = _kill_group(pid, fault_log, is_hung=not has_answered)
    if failure is None:
        return answer
    what, message, remote_traceback = failure
    if what != "request":
        message = f"{subject} cannot be made or used: {message or f'its process ended with {exit_status}'}; mend it"
    raise RequestError(message) from _RemoteTraceback(remote_traceback or log_text)


class _ForkServer:
    """The trainer's end of the process that begins and ends workers."""

    def __init__(self, workers: list[_Worker]) -> None:
        self.workers = workers
        self._start()

    def start_worker(self, row: int) -> Connection:
        """A new worker in this row; the way to talk to it."""
        parent_pipe, child_pipe = Pipe()
        for _ in range(2):
            try:
                self.control.send(("begin", row, False))
                send_handle(self.control, child_pipe.fileno(), self.pid)
                break
            except OSError:  # someone ended the nursery, and its workers with it
                self.close()
                self._start()
        child_pipe.close()
        return parent_pipe

    def end_worker(self, row: int, *, is_hung: bool) -> tuple[str, str]:
        """How a row's worker ended, which is sure now, and the last words of its fault handler."""
        try:
            self.control.send(("end", row, is_hung))
            return self.control.recv()
        except (OSError, EOFError):
            return _ALL_ENDED, ""

    def close(self) -> None:
        """End every worker, and the nursery."""
        self.control.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < deadline:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return
            time.sleep(0.005)
        _kill_and_wait(self.pid)

    def _start(self) -> None:
        self.control, child_control = Pipe()
        trainer_pid = os.getpid()

        def target() -> None:
            self.control.close()
            _run_fork_server(child_control, trainer_pid, self.workers)

        self.pid = _fork(target)
        child_control.close()
        _set_timeout(self.control, CLOSE_SECONDS)


def _run_fork_server(control: Connection, trainer_pid: int, workers: list[_Worker]) -> None:
    """The nursery's life: begin and end workers, as long as the trainer lives."""
    processes: dict[int, tuple[int, IO[bytes]]] = {}
    try:
        while os.getppid() == trainer_pid:
            if not control.poll(POLL_SECONDS):
                continue
            command, row, is_hung = control.recv()
            if command == "end":
                process = processes.pop(row, None)  # None: it went with an earlier nursery
                control.send(_kill_group(*process, is_hung=is_hung) if process else (_ALL_ENDED, ""))
            else:
                pipe = Connection(recv_handle(control))

                def target(row: int = row, pipe: Connection = pipe) -> None:
                    control.close()
                    workers[row].serve(pipe)

                processes[row] = _fork_group_leader(target)
                pipe.close()
    except (EOFError, OSError):
        pass  # the trainer has ended, or closed
    finally:
        for pid, fault_log in processes.values():
            _kill_group(pid, fault_log, is_hung=False)


def _fork_group_leader(target: Callable[[], None]) -> tuple[int, IO[bytes]]:
    """A fork that ends with this process and leads all that it starts: its id, and where its fault handler writes."""
    fault_log, parent_pid = tempfile.TemporaryFile(), os.getpid()  # noqa: SIM115  # it lives as long as the fork

    def run_as_group_leader() -> None:
        end_with_parent()
        if os.getppid() != parent_pid:
            return
        # no session of its own: that would be scheduled apart from the trainer (Linux's autogroup), at half the speed
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable(fault_log, all_threads=False)
        faulthandler.register(signal.SIGUSR1, fault_log, all_threads=False)
        target()

    return _fork(run_as_group_leader), fault_log


def _kill_group(pid: int, fault_log: IO[bytes], *, is_hung: bool) -> tuple[str, str]:
    """End a worker and all that it started: how it ended, and the last words of its fault handler."""
    if is_hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)  # where does it hang?
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    exit_status = _kill_and_wait(pid)
    fault_log.seek(0)
    with fault_log:
        return exit_status, fault_log.read().decode(errors="replace")


def _kill_and_wait(pid: int) -> str:
    """End a process of ours, if it has not, and say how it ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    names = {number.value: number.name for number in signal.Signals}
    return f"exit code {code}" if code >= 0 else f"signal {names.get(-code, -code)}"


class _Worker:
    """What a worker does: one environment, asked until it fails, is told to close, or nobody is left to ask."""

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        spaces: Any,
        shared_obs: Any,
        row: int,
        autoreset_mode: AutoresetMode,
        check_bounds: bool,
    ) -> None:
        self.make_env, self.spaces, self.shared_obs, self.row, self.check_bounds = (
            make,
            spaces,
            shared_obs,
            row,
            check_bounds,
        )
        self.resets_in_same_step = autoreset_mode is AutoresetMode.SAME_STEP
        self.env: Any = None

    def serve(self, pipe: Connection) -> None:
        handlers = {"step": self.step, "reset": self.reset, "call": self.call, "close": self.close}
        call_id, command, args, handler = 0, "begin", (), self.start
        with contextlib.suppress(EOFError, OSError):  # of this pipe: the trainer is gone
            while (_send_answer(pipe, call_id, handler, *args) or command == "call") and command != "close":
                call_id, command, args = pipe.recv()
                handler = handlers[command]

    def start(self) -> str:
        self.env = self.make_env()
        env_spaces = self.env.observation_space, self.env.action_space
        if env_spaces != self.spaces:
            raise ValueError(f"its spaces are {env_spaces}, those of env 0 {self.spaces}: all must be equal")
        return "ready"

    def reset(self, seed: int | None, options: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self.store_obs(obs)
        return 0.0, False, False, _check_info(info)

    def step(self, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.store_obs(obs)
        for name, end in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(end, bool | np.bool_):
                raise _InvalidResult(f"{name} is {end!r}: must be a bool")
        result = _check_reward(reward), bool(terminated), bool(truncated), _check_info(info)
        if self.resets_in_same_step and (terminated or truncated):
            *_, reset_info = self.reset(None, None)
            return *result[:3], {"final_info": result[3], "final_obs": obs} | reset_info
        return result

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any]:
        attribute = self.env.get_wrapper_attr(name)
        return (attribute(*args, **kwargs) if callable(attribute) else attribute,)

    def close(self) -> str:
        self.env.close()
        return "closed"

    def store_obs(self, obs: Any) -> None:
        """Hand an observation on, if it lies in its space."""
        if problem := find_violation(self.spaces[0], obs, "observation", check_bounds=self.check_bounds):
            raise _InvalidResult(problem)
        _write_row(self.shared_obs, self.row, obs)


def _send_answer(pipe: Connection, call_id: int | None, handler: Callable[..., Any], *args: Any) -> bool:
    """Send (call, None, answer), or (call, `_Failure`, None) where there is none; whether there was one."""
    try:
        answer = call_id, None, handler(*args)
    except BaseException as error:  # SystemExit too
        answer = call_id, _describe_error(error), None
    try:
        pipe.send(answer)
    except OSError:
        raise
    except Exception as error:  # it cannot be pickled
        answer = call_id, _describe_error(error), None
        pipe.send(answer)
    return answer[1] is None


def _describe_env(make: Callable[[], gymnasium.Env]) -> dict[str, Any]:
    """What the trainer must know of an environment."""
    env = make()
    description = {name: getattr(env, name) for name in ("observation_space", "action_space", "render_mode", "spec")}
    try:
        ForkingPickler.dumps(description["spec"])
    except Exception:  # an entry point that is no module's
        description["spec"] = None
    env.close()
    return description | {"metadata": dict(env.metadata)}


def _check_reward(reward: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(reward, str | bytes) and np.ndim(reward) == 0 and math.isfinite(reward):
            return float(reward)
    raise _InvalidResult(f"reward is {reward!r}: must be one finite number")


def _check_info(info: Any) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise _InvalidResult(f"info is {info!r}: must be a dict")
    info = {name: value for name, value in info.items() if name != "fault"} if "fault" in info else info
    return drop_unpicklable(info)


def _describe_error(error: BaseException) -> _Failure:
    """An exception as what can be sent."""
    message, traceback_text = " ".join(str(error).split()), "".join(traceback.format_exception(error))
    if isinstance(error, RequestError | _InvalidResult):
        return _Failure("request" if isinstance(error, RequestError) else "broke", message, traceback_text)
    return _Failure("raised", f"{type(error).__name__}: {message}", traceback_text)


def _fork(target: Callable[[], None]) -> int:
    """A new process that lives through `target` and ends, deaf to SIGINT and SIGTERM, which are the trainer's; its id."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()  # or it would be written twice
    trainer_signals = {signal.SIGINT, signal.SIGTERM}
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, trainer_signals)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12, where threads run: they do not in `life`
        pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        return pid
    try:
        for number in trainer_signals:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        target()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _set_timeout(pipe: Connection, seconds: float | None) -> None:
    """No read or write of this pipe waits longer; it raises BlockingIOError."""
    whole_seconds = int(seconds or 0)
    value = struct.pack("ll", whole_seconds, int(1e6 * ((seconds or 0) - whole_seconds)))
    with socket.socket(fileno=os.dup(pipe.fileno())) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _shared_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that forks share."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=mmap.mmap(-1, max(size, 1)))


def _leaf_arrays(tree: Any) -> Iterator[np.ndarray]:
    """The arrays of a batched observation."""
    if isinstance(tree, dict | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaf_arrays(part)
    else:
        yield tree


def _copy_tree(tree: Any) -> Any:
    """The same with its arrays copied."""
    if isinstance(tree, dict):
        return {name: _copy_tree(part) for name, part in tree.items()}
    return tuple(map(_copy_tree, tree)) if isinstance(tree, tuple) else tree.copy()


def _write_row(tree: Any, row: int, obs: Any) -> None:
    """Put one observation into its row."""
    if isinstance(tree, dict | tuple):
        for name in tree if isinstance(tree, dict) else range(len(tree)):
            _write_row(tree[name], row, obs[name])
    else:
        tree[row] = obs
