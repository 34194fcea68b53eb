"""Environments that hang, crash, raise or break their word: restarted alone, and the record says no more than is true."""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from tests.envs import MODES, Anything, Diary, Nested, Picky, seed_of, walker
from tests.faulty import AT, BAD, Faulty, fail, fly, hang, hit, returns, stop
from understudy.control import actor_critic, ppo, reinforce
from understudy.control.envs import fault_tolerant, sources
from understudy.control.envs import make as environment
from understudy.control.envs.fault_tolerant import FaultTolerantVectorEnv, RestartsExhaustedError, run_in_fork
from understudy.control.envs.make import SeededResets
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.run.config import RequestError

DISABLED, SAME_STEP, NEXT_STEP = MODES
IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
PATIENCE = 60.0  # seconds; a machine may be busy
HANG = 1.0  # for those that do hang


# the seven of the table of what AsyncVectorEnv makes of them
SEVEN = {
    "raises": (fail, "raised"),
    "is killed": (partial(hit, signal.SIGKILL), "crashed"),
    "hangs": (hang, "hung"),
    "sees nan": (returns(obs=np.array([np.nan, 0])), "broke"),
    "pays nan": (returns(reward=np.nan), "broke"),
    "sees far out of its space": (returns(obs=np.array([1e12, 0])), "broke"),
    "sees a wrong shape": (returns(obs=np.zeros(3)), "broke"),
}
MORE = {
    "exits": (lambda env: os._exit(3), "crashed"),
    "flies": (fly, "crashed"),
    "is stopped": (stop, "hung"),
    "calls sys.exit": (lambda env: sys.exit(0), "raised"),
    "interrupts": (lambda env: (_ for _ in ()).throw(KeyboardInterrupt), "raised"),
    "loses a connection": (lambda env: (_ for _ in ()).throw(ConnectionResetError), "raised"),
    "sees infinity": (returns(obs=np.array([np.inf, 0])), "broke"),
    "sees text": (returns(obs="nothing"), "broke"),
    "sees None": (returns(obs=None), "broke"),
    "sees objects": (returns(obs=np.array([1, None])), "broke"),
    "sees complex numbers": (returns(obs=np.array([1j, 0])), "broke"),
    "sees one number": (returns(obs=np.float64(1)), "broke"),
    "pays infinity": (returns(reward=np.inf), "broke"),
    "pays None": (returns(reward=None), "broke"),
    "pays text": (returns(reward="1"), "broke"),
    "pays a list": (returns(reward=np.array([1.0])), "broke"),
    "pays a complex number": (returns(reward=1j), "broke"),
    "ends with a number": (returns(terminated=1), "broke"),
    "is cut with None": (returns(truncated=None), "broke"),
    "ends with text": (returns(terminated="no"), "broke"),
    "ends with an array": (returns(terminated=np.array([True, False])), "broke"),
    "says a list": (returns(info=[]), "broke"),
    "says None": (returns(info=None), "broke"),
    "leaves something out": (returns(short=True), "raised"),
}
EVERY_FAULT = pytest.mark.parametrize("name", SEVEN | MORE)


@contextlib.contextmanager
def three(fault, mode=NEXT_STEP, *, timeout=PATIENCE, **options):
    """Three environments, of which the one in row 1 goes wrong."""
    what = {key: options.pop(key) for key in ("when",) if key in options}
    makes = [Faulty, partial(Faulty, fault, **what), Faulty]
    envs = FaultTolerantVectorEnv(makes, step_timeout=timeout, autoreset_mode=mode, **options)
    try:
        yield envs
    finally:
        envs.close()


def until_fault(envs):
    """Reset with seeds 0, 1, 2 and step until the fault; what that step returned."""
    envs.reset(seed=0)
    for _ in range(AT - 1):
        *_, info = envs.step(np.zeros(3, dtype=np.int64))
        assert "fault" not in info
    return envs.step(np.zeros(3, dtype=np.int64))


def gone(pid, seconds=20.0):
    """Whether a process ends within this time; a zombie has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


# one fault


@EVERY_FAULT
def test_a_fault_ends_its_own_episode_at_its_last_observation_and_no_other(name):
    fault, what = (SEVEN | MORE)[name]
    with three(fault, timeout=HANG if what == "hung" else PATIENCE) as envs:
        obs, reward, terminated, truncated, info = until_fault(envs)

        # row 1 has seen [1, 4] and its fifth step has no answer; rows 0 and 2 have made five
        assert obs.tolist() == [[0, 5], [1, 4], [2, 5]]
        assert reward.tolist() == [5, 0, 5]
        assert terminated.tolist() == [False, False, False]
        assert truncated.tolist() == [False, True, False]
        assert info["_fault"].tolist() == [False, True, False]
        fault = info["fault"][1]
        assert (fault.env, fault.seed, fault.episode, fault.step, fault.what) == (1, 1, 0, 4, what)
        assert envs.faults == [fault]

        obs, reward, terminated, truncated, info = envs.step(np.zeros(3, dtype=np.int64))
        new = obs[1, 0]
        assert new not in (0, 1, 2)
        assert obs.tolist() == [[0, 6], [new, 0], [2, 6]]  # NEXT_STEP: a reset is all that this call does in row 1
        assert reward.tolist() == [6, 0, 6] and not truncated.any()
        obs, *_ = envs.step(np.zeros(3, dtype=np.int64))
        assert obs.tolist() == [[0, 7], [new, 1], [2, 7]]


def test_after_a_fault_a_same_step_env_stands_at_a_new_episode_at_once():
    with three(fail, SAME_STEP) as envs:
        obs, reward, _, truncated, info = until_fault(envs)

        assert info["final_obs"][1].tolist() == [1, 4] and info["_final_obs"].tolist() == [False, True, False]
        assert obs[1, 1] == 0 and obs[1, 0] not in (0, 1, 2)
        assert truncated.tolist() == [False, True, False] and reward[1] == 0
        assert envs.step(np.zeros(3, dtype=np.int64))[0][1].tolist() == [obs[1, 0], 1]


def test_after_a_fault_a_row_of_disabled_mode_takes_the_seed_it_is_given():
    with three(fail, DISABLED) as envs:
        until_fault(envs)
        with pytest.raises(ValueError, match="env 1 is over: reset it before the next step"):
            envs.step(np.zeros(3, dtype=np.int64))
        mask = np.array([False, True, False])
        obs, _ = envs.reset(seed=[None, 40, None], options={"reset_mask": mask})

        assert obs.tolist() == [[0, 5], [40, 0], [2, 5]]


def test_new_seeds_are_the_same_every_time_and_differ_from_fault_to_fault():
    class Always(Faulty):
        def step(self, action):
            raise RuntimeError("no")

    found = []
    for _ in range(2):
        envs = FaultTolerantVectorEnv([Always] * 2, step_timeout=PATIENCE, autoreset_mode=SAME_STEP)
        envs.reset(seed=7)
        found.append([envs.step(np.zeros(2, dtype=np.int64))[0][:, 0].tolist() for _ in range(3)])
        envs.close()

    assert found[0] == found[1]
    assert len({seed for seeds in found[0] for seed in seeds}) == 6


def test_faults_in_all_rows_at_once_are_handled_at_once():
    envs = FaultTolerantVectorEnv([partial(Faulty, hang)] * 6, step_timeout=HANG)
    try:
        envs.reset(seed=[BAD] * 6)
        for _ in range(AT - 1):
            envs.step(np.zeros(6, dtype=np.int64))
        since = time.monotonic()
        truncated = envs.step(np.zeros(6, dtype=np.int64))[3]
        took = time.monotonic() - since
    finally:
        envs.close()

    assert truncated.all()
    assert took < 5 * HANG  # one after another would be six


# what is known of it


@pytest.mark.parametrize(
    ("fault", "message", "inside"),
    [
        (fail, "RuntimeError: the simulator went away", 'raise RuntimeError("the simulator'),
        (hang, "no answer within 1 s", "in hang"),
        (fly, "its process ended with signal SIGSEGV", "in fly"),
        (partial(hit, signal.SIGKILL), "its process ended with signal SIGKILL", ""),
        (lambda env: os._exit(3), "its process ended with exit code 3", ""),
        (returns(obs=np.array([-2.0, 0])), "observation[0] is -2, the space allows 0 to 2.14748e+09", "in store_obs"),
        (returns(reward=np.nan), "reward is nan: must be one finite number", "_check_reward"),
    ],
    ids=["raised", "hung", "segmentation fault", "killed", "exited", "out of space", "nan reward"],
)
def test_a_fault_says_what_happened_and_where(fault, message, inside):
    with three(fault, timeout=HANG if fault is hang else PATIENCE) as envs:
        found = until_fault(envs)[-1]["fault"][1]

    assert found.message == message
    assert inside in found.traceback
    assert (found.traceback == "") == (inside == "")


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP], ids=lambda mode: mode.name)
def test_episodes_since_the_seed_are_counted(mode):
    class Later(Faulty):
        def step(self, action):
            if self.seed == 203 and self.count == 2:  # two episodes of 7 steps after the one of seed 3
                raise RuntimeError("late")
            return super().step(action)

    envs = FaultTolerantVectorEnv([Later], step_timeout=PATIENCE, autoreset_mode=mode)
    try:
        envs.reset(seed=3)
        while not envs.faults:
            envs.step(np.zeros(1, dtype=np.int64))
    finally:
        envs.close()

    (fault,) = envs.faults
    assert (fault.seed, fault.episode, fault.step) == (3, 2, 2)


def test_an_environments_own_info_of_that_name_is_no_fault():
    with three(returns(info={"fault": True, "count": 5})) as envs:
        info = until_fault(envs)[-1]

    assert "fault" not in info and info["count"].tolist() == [5, 5, 5]


# resets, and the making of environments


@pytest.mark.parametrize("fault", [fail, hang, partial(hit, signal.SIGKILL), returns(obs=np.array([np.nan, 0]))])
def test_a_fault_in_a_reset_is_mended_within_it(fault):
    with three(fault, when="reset", timeout=HANG if fault is hang else PATIENCE) as envs:
        obs, info = envs.reset(seed=0)

        assert obs[[0, 2]].tolist() == [[0, 0], [2, 0]]
        assert obs[1, 0] not in (0, 1, 2) and obs[1, 1] == 0
        assert info["_fault"].tolist() == [False, True, False]
        assert (info["fault"][1].seed, info["fault"][1].step) == (BAD, 0)


@IN_EVERY_MODE
def test_a_fault_in_the_reset_between_episodes_is_mended(mode):
    class Restless(Faulty):
        def reset(self, *, seed=None, options=None):
            if seed is None:  # so from one episode to the next, in the same process
                raise RuntimeError("once is enough")
            return super().reset(seed=seed)

    envs = FaultTolerantVectorEnv([Restless, Faulty], step_timeout=PATIENCE, autoreset_mode=mode)
    try:
        envs.reset(seed=5)
        obs = None
        for _ in range(8):
            obs, _, terminated, truncated, _ = envs.step(np.zeros(2, dtype=np.int64))
            if mode is DISABLED and (terminated | truncated).any():
                obs, _ = envs.reset(options={"reset_mask": terminated | truncated})
    finally:
        envs.close()

    assert len(envs.faults) == 1
    assert obs is not None and obs[0, 0] not in (5, 6) and obs[1, 0] == 106  # the other row went on by itself


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (partial(Faulty, nonsense=1), "TypeError: Faulty.__init__() got an unexpected keyword argument 'nonsense'"),
        (lambda: os._exit(4), "its process ended with exit code 4"),
        (lambda: fly(None), "its process ended with signal SIGSEGV"),
    ],
)
@pytest.mark.parametrize("row", [0, 1])
def test_an_environment_that_cannot_be_made_is_refused_at_once(make, sentence, row):
    makes = [Faulty, Faulty]
    makes[row] = make
    with pytest.raises(RequestError) as error:
        FaultTolerantVectorEnv(makes, step_timeout=PATIENCE)

    assert str(error.value).startswith(f"env {row} cannot be made")
    assert sentence in str(error.value)


def test_what_takes_too_long_apart_is_refused_and_where_it_hung_is_known():
    with pytest.raises(RequestError, match=r"env 'X' cannot be made or used: no answer within 0.5 s; mend it") as error:
        run_in_fork(lambda: hang(None), "env 'X'", seconds=0.5)

    assert "in hang" in str(error.value.__cause__)


def test_rows_of_unlike_spaces_are_refused():
    with pytest.raises(RequestError, match=r"env 1 cannot be made: ValueError: its spaces are .*: all must be equal"):
        FaultTolerantVectorEnv([Faulty, Diary], step_timeout=PATIENCE)


def test_an_environment_that_cannot_be_made_again_spends_the_restarts(tmp_path):
    class Once(Faulty):
        def __init__(self):
            with (tmp_path / "made").open("a") as file:
                file.write(".")
            if len((tmp_path / "made").read_text()) > 2:  # once to look at it, once to use it
                raise RuntimeError("no more")
            super().__init__(fail)

    envs = FaultTolerantVectorEnv([Once], step_timeout=PATIENCE, max_restarts=3)
    try:
        envs.reset(seed=BAD)
        with pytest.raises(RestartsExhaustedError, match=r"all 3 restarts .* are spent.*RuntimeError: no more"):
            for _ in range(AT + 1):
                envs.step(np.zeros(1, dtype=np.int64))
    finally:
        envs.close()

    assert [fault.message for fault in envs.faults] == [
        "RuntimeError: the simulator went away",
        *["RuntimeError: no more"] * 3,
    ]


# the budget


def test_one_fault_more_than_restarts_are_allowed_ends_it_in_a_sentence():
    class Always(Faulty):
        def step(self, action):
            raise RuntimeError("no")

    envs = FaultTolerantVectorEnv([Faulty, Always], step_timeout=PATIENCE, max_restarts=2, autoreset_mode=SAME_STEP)
    try:
        envs.reset(seed=3)
        envs.step(np.zeros(2, dtype=np.int64))
        envs.step(np.zeros(2, dtype=np.int64))
        with pytest.raises(RestartsExhaustedError) as error:
            envs.step(np.zeros(2, dtype=np.int64))
    finally:
        envs.close()

    seed = envs.faults[-1].seed
    assert str(error.value) == (
        f"all 2 restarts of environments are spent, and env 1 failed again at step 0 of an episode of seed {seed}: "
        "RuntimeError: no; mend the environment"
    )


# processes


def test_closing_lets_environments_close_and_leaves_no_process(tmp_path):
    envs = FaultTolerantVectorEnv(
        [partial(Faulty, closed=tmp_path / str(row)) for row in range(2)], step_timeout=PATIENCE
    )
    pids = [*envs.call("pid"), envs._fork_server.pid]
    (tmp_path / "0").unlink()  # it was looked at, and closed
    envs.close()
    envs.close()

    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        envs.step(np.zeros(2, dtype=np.int64))
    assert all((tmp_path / str(row)).read_text() == "closed" for row in range(2))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_closing_does_not_wait_for_what_hangs(monkeypatch):
    monkeypatch.setattr(fault_tolerant, "CLOSE_SECONDS", 0.5)

    class Clings(Faulty):
        def pid(self):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # what a simulator is
            return os.getpid(), child.pid

        def close(self):
            if self.count:
                time.sleep(1000)

    envs = FaultTolerantVectorEnv([Clings] * 2, step_timeout=PATIENCE)
    pids = [pid for pair in envs.call("pid") for pid in pair]
    envs.reset(seed=0)
    envs.step(np.zeros(2, dtype=np.int64))
    since = time.monotonic()
    envs.close()

    assert time.monotonic() - since < 10
    assert all(gone(pid) for pid in pids)


def test_what_an_environment_started_ends_with_it():
    class Starts(Faulty):
        def pid(self):
            return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid

    envs = FaultTolerantVectorEnv([partial(Starts, fail)], step_timeout=PATIENCE)
    try:
        envs.reset(seed=BAD)
        (pid,) = envs.call("pid")
        while not envs.faults:
            envs.step(np.zeros(1, dtype=np.int64))
        assert gone(pid)
    finally:
        envs.close()


def test_when_the_trainer_is_killed_its_environments_end_even_one_that_hangs():
    reader, writer = os.pipe()

    def train():
        envs = FaultTolerantVectorEnv([Faulty, partial(Faulty, hang)], step_timeout=None)
        bystander = fault_tolerant._fork(
            partial(hang, None)
        )  # it outlives the trainer, and holds copies of all its pipes
        os.write(writer, json.dumps([*envs.call("pid"), envs._fork_server.pid, bystander]).encode())
        envs.reset(seed=0)
        while True:
            envs.step(np.zeros(2, dtype=np.int64))

    trainer = fault_tolerant._fork(train)
    *pids, bystander = json.loads(os.read(reader, 1000))
    time.sleep(0.3)  # by now row 1 hangs
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    os.close(reader)
    os.close(writer)

    ended = [gone(pid) for pid in pids]
    os.kill(bystander, signal.SIGKILL)
    assert ended == [True] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_asks_the_trainer_to_stop_does_not_stop_its_environments(number):
    with three(None) as envs:
        envs.reset(seed=0)
        for pid in (*envs.call("pid"), envs._fork_server.pid):
            os.kill(pid, number)
        envs.step(np.zeros(3, dtype=np.int64))

        assert envs.faults == []


def test_an_interrupted_step_leaves_no_answer_that_is_taken_for_another():
    class Slow(Faulty):
        def step(self, action):
            time.sleep(0.5 if self.seed == 0 else 0)
            return super().step(action)

    def interrupt(*_):
        raise KeyboardInterrupt

    envs = FaultTolerantVectorEnv([Slow], step_timeout=PATIENCE)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        envs.reset(seed=0)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            envs.step(np.zeros(1, dtype=np.int64))
        obs, _ = envs.reset(seed=9)
        assert obs.tolist() == [[9, 0]]
        assert envs.step(np.zeros(1, dtype=np.int64))[0].tolist() == [[9, 1]]
    finally:
        signal.signal(signal.SIGALRM, before)
        envs.close()


def test_the_loss_of_the_nursery_is_survived():
    with three(None) as envs:
        envs.reset(seed=0)
        os.kill(envs._fork_server.pid, signal.SIGKILL)
        assert all(gone(pid) for pid in [envs._fork_server.pid])
        envs.step(np.zeros(3, dtype=np.int64))
        obs, *_ = envs.step(np.zeros(3, dtype=np.int64))

        assert obs[:, 1].tolist() == [0, 0, 0]
        assert [fault.what for fault in envs.faults] == ["crashed"] * 3


@pytest.mark.parametrize("when", ["between two steps", "within a step"])
def test_a_killed_environment_is_back_within_five_seconds_and_its_row_alone_is_cut(when):
    class Slow(Faulty):
        def step(self, action):
            time.sleep(0.5)
            return super().step(action)

    envs = FaultTolerantVectorEnv([Faulty, Slow, Faulty], step_timeout=PATIENCE)
    zeros = np.zeros(3, dtype=np.int64)
    try:
        envs.reset(seed=0)
        envs.step(zeros)
        pid = envs.call("pid")[1]
        timer = threading.Timer(0.1 if when == "within a step" else 0.0, os.kill, (pid, signal.SIGKILL))
        timer.start()
        if when == "between two steps":
            assert gone(pid)
        since = time.monotonic()
        obs, reward, _, truncated, info = envs.step(zeros)
        new, *_ = envs.step(zeros)
        took = time.monotonic() - since
        timer.join()
    finally:
        envs.close()

    assert obs.tolist() == [[0, 2], [1, 1], [2, 2]] and reward.tolist() == [2, 0, 2]
    assert truncated.tolist() == [False, True, False]
    assert info["fault"][1].message == "its process ended with signal SIGKILL"
    assert new[:, 1].tolist() == [3, 0, 3] and new[1, 0] not in (0, 1, 2)
    assert took < 5


def test_a_broken_number_where_the_space_is_of_whole_ones_is_a_fault():
    class Counts(Faulty):
        observation_space = gymnasium.spaces.Box(0, 1000, (2,), np.int64)

        def obs(self):
            return np.array([self.seed, self.count], dtype=np.int64)

    makes = [partial(Counts, returns(obs=np.array([1.5, 2.0])))]
    envs = FaultTolerantVectorEnv(makes, step_timeout=PATIENCE)
    try:
        envs.reset(seed=BAD)
        while not envs.faults:
            envs.step(np.zeros(1, dtype=np.int64))
    finally:
        envs.close()

    assert envs.faults[0].message == "observation is of float64, the space of int64"
    assert envs.faults[0].step == AT - 1


def test_rows_are_processes_of_their_own_and_answer_calls():
    with three(None) as envs:
        envs.reset(seed=4)

        assert len({os.getpid(), *envs.call("pid")}) == 4
        assert envs.render() == ("4/0", "5/0", "6/0")
        with pytest.raises(RuntimeError, match="env 0, asked for 'height': AttributeError"):
            envs.call("height")
        envs.step(np.zeros(3, dtype=np.int64))
        assert envs.faults == []


def test_this_process_keeps_its_own_handlers():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), faulthandler.is_enabled()
    with three(None):
        pass

    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), faulthandler.is_enabled())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


# without faults


def supervised(mode, diary=Diary, rows=4):
    """As `diaries` of tests/envs.py: in modes that reset by themselves, with the seeds of the episodes."""
    seeds = [partial(lambda row: SeededResets(diary(), seed_of, row), row) for row in range(rows)]
    makes = [diary] * rows if mode is DISABLED else seeds
    return FaultTolerantVectorEnv(makes, step_timeout=PATIENCE, autoreset_mode=mode)


def leaves_of(record):
    obs = record.obs if isinstance(record.obs, dict) else {"obs": record.obs}
    rest = {
        name: getattr(record, name)
        for name in ("action", "behavior_logprob", "mask", "reward", "terminated", "truncated")
    }
    return obs | rest


@pytest.mark.parametrize("diary", [Diary, Nested, Picky])
@IN_EVERY_MODE
def test_without_faults_records_are_those_of_a_sync_vector_env_to_the_bit(mode, diary):
    plain = environment.as_vector_env(SyncVectorEnv([diary] * 4, autoreset_mode=mode), seed_of)
    envs = supervised(mode, diary)
    policy = Policy(Anything(), diary.observation_space, diary.action_space)
    try:
        ours, theirs = walker(envs), walker(plain)
        for walk in [lambda w: w.collect_episodes(policy, 2)] + [
            partial(RolloutCollector.collect, policy=policy, num_steps=n) for n in (1, 2, 24)
        ]:
            a, b = leaves_of(walk(ours)), leaves_of(walk(theirs))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
        assert ours.finished_episodes == theirs.finished_episodes and ours.num_steps == theirs.num_steps
    finally:
        envs.close()


@IN_EVERY_MODE
def test_without_faults_every_answer_is_that_of_a_sync_vector_env_to_the_bit(mode):
    makes = [lambda: gymnasium.make("CartPole-v1", max_episode_steps=12)] * 3
    plain, envs = (
        SyncVectorEnv(makes, autoreset_mode=mode),
        FaultTolerantVectorEnv(makes, step_timeout=PATIENCE, autoreset_mode=mode),
    )
    plain.action_space.seed(0)
    try:
        answers = [[e.reset(seed=5)] for e in (plain, envs)]
        for _ in range(40):
            action = plain.action_space.sample()
            for found, e in zip(answers, (plain, envs), strict=True):
                found.append(e.step(action))
                over = found[-1][2] | found[-1][3]
                if mode is DISABLED and over.any():
                    found.append(e.reset(seed=[9, None, 7], options={"reset_mask": over.copy()}))
    finally:
        envs.close()

    for theirs, ours in zip(*answers, strict=True):
        for info in (theirs[-1], ours[-1]):
            info["final_obs"] = list(info.get("final_obs", []))  # an array of arrays cannot be compared
        np.testing.assert_equal(ours, theirs)
        assert ours[0].dtype == theirs[0].dtype
    assert envs.metadata["autoreset_mode"] is mode and envs.observation_space == plain.observation_space
    assert environment.reward_threshold(envs) == 475.0


# a run


HERE = "tests.faulty"
FIELDS = {"num_envs": 4, "steps": 200, "quiet": True, "vectorization": "fault_tolerant", "hidden": (8,)}
RECIPES = {
    "ppo": (ppo, {"num_steps_per_env": 16, "num_epochs": 1}),
    "ppo with memory": (ppo, {"num_steps_per_env": 16, "num_epochs": 1, "rnn_type": "gru", "rnn_hidden_size": 4}),
    "one-step actor-critic": (actor_critic, {"num_steps_per_env": 1}),
    "reinforce": (reinforce, {}),
    "reinforce in groups": (reinforce, {"baseline": "group", "group_size": 2}),
}


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_over_faults_and_writes_each_down(name, tmp_path):
    recipe, fields = RECIPES[name]
    run = recipe.train(recipe.Config(env=f"{HERE}:Wild", output_dir=str(tmp_path / "run"), **(FIELDS | fields)))

    assert run.metrics[-1]["steps"] >= 200
    found = [event for event in events(run.path) if event["kind"] == "env_fault"]
    assert {"raised", "crashed", "broke"} >= {event["what"] for event in found} and len(found) > 3
    assert all(event["seed"] % 4 == 0 and event["step"] == 2 and event["env"] in range(4) for event in found)
    assert all("the simulator" in event["traceback"] for event in found if "RuntimeError: the" in event["message"])
    returns = {line["episode_return_mean"] for line in run.metrics} - {None}
    assert returns == {28.0}  # 1 + ... + 7: what a fault cut short is in no mean


def test_a_run_waits_for_a_step_as_long_as_it_was_told(tmp_path):
    fields = FIELDS | {
        "env_options": {"file": str(tmp_path / "hung")},
        "step_timeout": 1.5,
        "steps": 40,
        "num_steps_per_env": 8,
    }
    run = ppo.train(ppo.Config(env=f"{HERE}:HangsOnce", output_dir=str(tmp_path / "run"), **fields))

    assert {event["message"] for event in events(run.path)} == {"no answer within 1.5 s"}


def test_faults_are_written_down_while_the_run_goes_on(tmp_path):
    config = ppo.Config(
        env=f"{HERE}:Wild", output_dir=str(tmp_path / "run"), num_steps_per_env=16, num_epochs=1, **FIELDS
    )
    written = [(tmp_path / "run" / "events.jsonl").exists() for _ in ppo.iterate(config)]

    assert any(written)


def test_a_run_without_faults_learns_to_the_bit_what_one_of_sync_environments_does(tmp_path):
    wild = {"env": f"{HERE}:Wild", "env_options": {"calm": True}, "num_steps_per_env": 16, "num_epochs": 1}
    policies = []
    for vectorization in ("sync", "fault_tolerant"):
        fields = FIELDS | wild | {"vectorization": vectorization, "output_dir": str(tmp_path / vectorization)}
        policies.append((ppo.train(ppo.Config(**fields)).path / "policy" / "policy.safetensors").read_bytes())

    assert policies[0] == policies[1]


def test_when_the_restarts_are_spent_the_run_is_saved_and_says_so(tmp_path):
    fields = FIELDS | {"env_options": {"file": str(tmp_path / "steps")}, "steps": 10_000, "num_steps_per_env": 8}
    fields |= {"compile": "off"}
    with pytest.raises(
        RestartsExhaustedError, match=r"all 100 restarts of environments are spent, and env . failed again"
    ):
        ppo.train(ppo.Config(env=f"{HERE}:WearsOut", output_dir=str(tmp_path / "run"), **fields))

    *faults, failed = events(tmp_path / "run")
    assert len(faults) == 101 and {event["kind"] for event in faults} == {"env_fault"}
    assert failed["kind"] == "failed" and failed["error"].endswith("RuntimeError: worn out; mend the environment")
    assert (tmp_path / "run" / "policy" / "policy.safetensors").is_file()
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_environment_that_fails_at_once_is_refused_before_there_is_a_run(tmp_path):
    config = ppo.Config(env="tests.badly_behaved:RaisesAtOnce", output_dir=str(tmp_path / "run"), **FIELDS)
    with pytest.raises(
        RequestError, match=r"in its first steps: the simulator is not there \(badly_behaved.py, line 70\); mend it"
    ):
        ppo.train(config)

    assert not (tmp_path / "run").exists()


def test_an_environment_that_hangs_at_once_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "START_SECONDS", 0.1)
    config = ppo.Config(env=f"{HERE}:HangsAtOnce", output_dir=str(tmp_path / "run"), step_timeout=0.1, **FIELDS)
    with pytest.raises(RequestError, match=r"HangsAtOnce' cannot be made or used: no answer within 0.5 s; mend it"):
        ppo.train(config)
