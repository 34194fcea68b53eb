"""Infos of several environments as one: every number exact, and what nobody reads never in the way."""

import multiprocessing
import pickle
import threading
from functools import partial
from multiprocessing.reduction import ForkingPickler

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from tests.envs import Anything, walker
from tests.foreign_envs import CostIntOrFloat, InfoOfChangingShape, InfoSometimesNone, TenSteps
from understudy.control import ppo
from understudy.control.envs import make as environment
from understudy.control.envs.costs import CostRecorder
from understudy.control.envs.infos import drop_unpicklable, get_info_value, merge_info
from understudy.control.policy import Policy

DISABLED = AutoresetMode.DISABLED
MODES = ("sync", "async", "fault_tolerant")


def merged(*infos):
    found: dict = {}
    for row, info in enumerate(infos):
        merge_info(found, info, row, num_envs=len(infos))
    return found


@pytest.mark.parametrize(
    "values",
    [
        (0, 0.5, 0),
        (0.5, 0, True),
        (np.float32(0.1), 0.1, 1),
        (np.int8(1), 300, np.uint64(2**63 + 1)),
        (2**53 + 1, 0.5, 2**70),
        (False, 2, 0.25),
        (np.float16(1), np.float64(1e300), -(2**63)),
    ],
)
def test_merged_infos_hold_every_number_exactly(values):
    infos = merged(*({"cost": value} for value in values))

    assert [get_info_value(infos, "cost", row) for row in range(3)] == list(values)


@pytest.mark.parametrize(
    "values",
    [
        ([0.0], [0.0, 1.0]),
        (None, 3),
        (3, None),
        ("short", "longer text"),
        ({"a": 1}, 2),
        (2, {"a": 1}),
        ({"a": 1}, {"a": 0.5, "b": "x"}),
        (np.zeros(2), np.ones(3, np.int8)),
        (np.zeros(2), 1.0),
        ({1: 2}, {1: 2.5}),
    ],
    ids=str,
)
def test_merged_infos_take_any_two_values_of_a_key(values):
    infos = merged(*({"key": value} for value in values))

    for row, value in enumerate(values):
        found = get_info_value(infos, "key", row)
        assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value


def test_merged_infos_say_in_which_rows_a_key_was_given():
    infos = merged({"a": 1}, {}, {"a": 0.5, "b": {"c": 2}})

    assert [get_info_value(infos, "a", row) for row in range(3)] == [1, None, 0.5]
    assert infos["_a"].tolist() == [True, False, True]
    assert [get_info_value(infos, "b", row) for row in range(3)] == [None, None, {"c": 2}]
    assert infos["b"]["c"].dtype == np.int64  # one kind of number stays an array of it


def test_a_key_like_another_keys_rows_is_left_out():
    infos = merged({"x": 7, "_x": "anything"})
    assert infos["x"].tolist() == [7] and infos["_x"].tolist() == [True]


def test_an_entry_reads_a_plain_array_of_a_native_vector_env():
    infos = {"cost": np.array([1.5, 2.5]), "time": 3}
    assert [get_info_value(infos, "cost", row) for row in range(2)] == [1.5, 2.5]
    assert get_info_value(infos, "time", 1) == 3 and get_info_value(infos, "absent", 0) is None


def test_what_cannot_be_sent_is_left_out_at_any_depth():
    info = {"cost": 1, "lock": threading.Lock(), "deep": {"lock": threading.Lock(), "path": np.zeros(2)}}
    found = drop_unpicklable(info)
    assert found.keys() == {"cost", "deep"} and found["deep"].keys() == {"path"}


def total_cost(envs):
    costs = CostRecorder(envs, ["cost"])
    walks = walker(costs)
    try:
        record = walks.collect(alternating(), 20)
        cost, whole = costs.collect_costs(record, walks.masks)
    finally:
        envs.close()
    return cost["cost"].sum(dim=1).tolist(), whole["cost"]


def alternating():
    """A policy whose actions are those of the copies' numbers: 0, 1, 0, 1."""
    policy = Policy(Anything(), TenSteps().observation_space, spaces.Discrete(3))
    policy.to_env_action = lambda action: np.arange(len(action)) % 2
    return policy


@pytest.mark.parametrize("vectorization", MODES)
def test_costs_of_copies_are_exact_whatever_their_dtypes(vectorization):
    envs = environment.make("tests.foreign_envs:CostIntOrFloat", num_envs=4, vectorization=vectorization)
    by_row, whole = total_cost(envs)

    assert by_row == [0.0, 10.0, 0.0, 10.0]  # 20 steps of 0.5 where the action is 1
    assert sorted(whole) == [0.0, 0.0, 10.0, 10.0]


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_costs_of_a_users_own_vector_env_are_exact(kind):
    envs = environment.as_vector_env(kind([CostIntOrFloat] * 2, autoreset_mode=DISABLED), lambda row, episode: episode)
    assert total_cost(envs)[0] == [0.0, 10.0]


class Unsendable(TenSteps):
    def info(self, action):
        return {"simulator": threading.Lock(), "text": "x" * int(self.np_random.integers(5)), 3: {"deep": (1, "a")}}


@pytest.mark.parametrize("vectorization", MODES)
@pytest.mark.parametrize("env", [InfoOfChangingShape, InfoSometimesNone, Unsendable])
def test_infos_that_nobody_reads_never_matter(env, vectorization, tmp_path):
    fields = {
        "num_envs": 4,
        "num_steps_per_env": 12,
        "steps": 48,
        "hidden": (4,),
        "quiet": True,
        "vectorization": vectorization,
    }
    run = ppo.train(ppo.Config(env=f"{env.__module__}:{env.__name__}", output_dir=str(tmp_path / "run"), **fields))

    assert run.metrics[-1]["steps"] == 48
    events = run.path / "events.jsonl"
    assert not events.exists() or "env_fault" not in events.read_text()


@pytest.mark.parametrize("ends", ["exception", "death"])
def test_async_environments_close_whatever_ended_a_step(ends):
    envs = environment.make("tests.foreign_envs:TenSteps", num_envs=2, vectorization="async")
    inner: gymnasium.vector.AsyncVectorEnv = envs.unwrapped  # pyright: ignore[reportAssignmentType]
    envs.reset()
    if ends == "exception":

        def failing(*_):
            raise RuntimeError("in the trainer")

        inner._add_info = failing  # pyright: ignore[reportAttributeAccessIssue]
    else:
        inner.processes[0].kill()
    with pytest.raises((RuntimeError, EOFError, OSError)):
        envs.step(np.zeros(2, np.int64))

    envs.close()
    assert not any(process.is_alive() for process in inner.processes)


def test_a_maker_works_where_its_id_was_never_registered(monkeypatch):
    sent = ForkingPickler.dumps(environment.make_factory("foreign/TenSteps-v0"))
    monkeypatch.delitem(gymnasium.registry, "foreign/TenSteps-v0")

    made = pickle.loads(sent)()
    assert isinstance(made.unwrapped, TenSteps)


def test_async_environments_work_with_the_start_method_spawn(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", partial(spawning, multiprocessing.get_context))
    envs = environment.make("tests.foreign_envs:foreign/TenSteps-v0", num_envs=1, vectorization="async")
    try:
        assert envs.reset()[0].shape == (1, 3)
    finally:
        envs.close()


def spawning(get_context, method=None):
    return get_context(method or "spawn")
