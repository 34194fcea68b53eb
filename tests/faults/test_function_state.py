"""What functions of the user's remember: saved with checkpoints where they say it, and noticed where they do not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import understudy
from tests.faults import killed
from tests.rehearsed import furnish, ppo_config
from understudy.language import reinforce as recipe
from understudy.language.rewards import function_state, worker
from understudy.language.rewards.worker import FunctionFault, InProcess, Worker
from understudy.language.rlhf import RLHFModels, close_workers
from understudy.run.config import RequestError

COUNTS = """
calls = 0
def score(completions):
    global calls
    calls += 1
    return [float((calls * len(text)) % 7) for text in completions]
"""
STATE = """
def get_state():
    return {"calls": calls}
def set_state(state):
    global calls
    calls = state["calls"]
"""


class Counts:
    """The same as an object of the same name."""

    __name__ = "score"
    calls = 0

    def __call__(self, completions: list[str]) -> list[float]:
        self.calls += 1
        return [float((self.calls * len(text)) % 7) for text in completions]

    def get_state(self) -> Any:
        return {"calls": self.calls}

    def set_state(self, state: Any) -> None:
        self.calls = state["calls"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture
def reward(tmp_path) -> str:
    (tmp_path / "reward.py").write_text(COUNTS + STATE)
    return f"{tmp_path / 'reward.py'}:score"


def run_of(home: Path, out: Path, **fields: Any) -> recipe.Config:
    given = {
        "model": str(home),
        "data": str(home / "prompts.jsonl"),
        "completions_per_iteration": 8,
        "max_new_tokens": 6,
        "total_tokens": 160,
    }
    given |= {"evaluate_rows": 4, "checkpoint_every": 2, "quiet": True, "preflight": False, "baseline": "none"}
    return recipe.Config(output_dir=str(out), **given | fields)


def trained(cfg: recipe.Config, moment: killed.Moment | None = None) -> int:
    """Train in a fork, to the end or until it is killed."""

    def job() -> None:
        killed.watch_for(moment)
        recipe.train(cfg)

    return killed.in_fork(job)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "events.jsonl").read_text().splitlines() if (out / "events.jsonl").exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> dict[str, str]:
    """What the run that was not interrupted came to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert trained(run_of(home, out, preflight=True, reward=Counts())) == 0
    return killed.digests(out)


@pytest.mark.parametrize("iteration", [1, 4])
def test_a_file_that_says_what_its_function_remembers_resumes_to_the_same_bytes(
    iteration, home, reward, whole, tmp_path
):
    out = tmp_path / "run"
    assert trained(run_of(home, out, preflight=True, reward=reward), ("iteration", iteration)) == -signal.SIGKILL
    assert killed.resumed(out) == 0

    assert killed.digests(out) == whole
    assert not events(out, "resume_inexact")
    assert "resume is exact only" not in str(events(out, "remark"))


def test_an_object_that_says_what_it_remembers_resumes_to_the_same_bytes(home, whole, tmp_path):
    out = tmp_path / "run"
    assert trained(run_of(home, out, preflight=True, reward=Counts()), ("iteration", 4)) == -signal.SIGKILL
    assert killed.resumed(out, reward=Counts()) == 0

    assert killed.digests(out) == whole


def test_a_function_that_does_not_say_what_it_remembers_leads_elsewhere(home, reward, whole, tmp_path):
    """The control of the tests above."""
    Path(reward.rpartition(":")[0]).write_text(COUNTS)
    out = tmp_path / "run"
    assert trained(run_of(home, out, preflight=True, reward=reward), ("iteration", 4)) == -signal.SIGKILL
    assert killed.resumed(out) == 0

    assert killed.digests(out) != whole
    assert "reward.py:score remembers nothing" in str(events(out, "remark"))


def test_a_process_that_is_started_again_gets_the_state_that_was_asked_for_last(reward):
    one = Worker(*reward.rsplit(":", 1), timeout=5.0)
    try:
        for _ in range(3):
            one.call({"completions": ["a"]})
        assert one.get_state() == {"calls": 3}
        one.call({"completions": ["a"]})
        assert one._process is not None
        os.kill(one._process.pid, signal.SIGKILL)
        one._process.wait()

        assert one.call({"completions": ["a"]}) == [4.0]
        one.set_state({"calls": 1})
        assert one.call({"completions": ["a"]}) == [2.0]
    finally:
        one.close()


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ((1, 2), "JSON does not give back"),
        ({1: 2}, "JSON does not give back"),
        (float("nan"), "JSON does not give back"),
        (object(), "not JSON serializable"),
        ("a" * 200, "gave 202 bytes: must be at most 76"),
    ],
    ids=["a tuple", "a number as key", "nan", "an object", "too long"],
)
def test_a_state_that_no_checkpoint_can_hold_is_refused_before_there_is_a_run(state, why, home, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MAX_ANSWER_BYTES", 1100)
    score = Counts()
    monkeypatch.setattr(score, "get_state", lambda: state, raising=False)

    with pytest.raises(RequestError, match=f"reward is 'function score', whose state cannot be saved .*{why}"):
        recipe.train(run_of(home, tmp_path / "run", reward=score))
    assert not (tmp_path / "run").exists()


def test_a_state_of_a_file_that_is_no_json_is_refused_with_its_file(home, reward, tmp_path):
    Path(reward.rpartition(":")[0]).write_text(COUNTS + STATE.replace('{"calls": calls}', "{1, 2}"))

    with pytest.raises(
        RequestError, match=r"reward is '.*reward.py:score', whose state .*set is not JSON serializable"
    ):
        recipe.train(run_of(home, tmp_path / "run", reward=reward))


def test_a_set_state_that_fails_is_refused_before_there_is_a_run(home, tmp_path):
    class Forgets(Counts):
        def set_state(self, state: Any) -> None:
            raise KeyError("steps")

    with pytest.raises(RequestError, match=r"whose set_state does not take what its get_state gave .KeyError: 'steps'"):
        recipe.train(run_of(home, tmp_path / "run", reward=Forgets()))
    assert not (tmp_path / "run").exists()


def test_a_method_has_the_state_of_its_object():
    assert InProcess(Counts().__call__).parameters["has_state"]
    assert not InProcess(score).parameters["has_state"]


def score(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def test_get_state_alone_is_no_state():
    class Half(Counts):
        set_state = None  # pyright: ignore[reportAssignmentType]

    assert not InProcess(Half()).parameters["has_state"]


def test_a_state_that_cannot_be_had_later_is_said_and_the_run_goes_on(home, tmp_path, capsys):
    class Breaks(Counts):
        def get_state(self) -> Any:
            return super().get_state() if self.calls < 3 else 1 / 0

    out = tmp_path / "run"
    run = recipe.train(run_of(home, out, reward=Breaks()))

    assert run.metrics[-1]["steps"] >= 160
    assert "ZeroDivisionError" in events(out, "state_not_saved")[0]["text"]
    assert "whose state cannot be saved" in capsys.readouterr().err

    understudy.resume(out, reward=Counts(), steps=200)
    assert events(out, "resume_inexact")[0]["functions"] == ["reward score"]
    assert "it begins anew" in capsys.readouterr().err


def test_a_function_that_no_longer_has_its_state_is_said_to_begin_anew(home, reward, tmp_path, capsys):
    recipe.train(run_of(home, tmp_path / "run", reward=reward))
    (tmp_path / "other.py").write_text(COUNTS)
    understudy.resume(tmp_path / "run", reward=f"{tmp_path / 'other.py'}:score", steps=200)

    assert events(tmp_path / "run", "resume_inexact")[0]["functions"] == ["reward score"]


def test_gold_constraints_and_replies_have_states_of_their_own(home, tmp_path):
    class Replies(Counts):
        def __call__(self, completions: list[str]) -> list[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.calls += 1
            return [None] * len(completions)

    bound = tmp_path / "bound.py"
    bound.write_text(COUNTS.replace("def score", "def bound") + STATE)
    score, gold, reply = Counts(), Counts(), Replies()
    score.calls, gold.calls, reply.calls = 1, 2, 3
    fields = {
        "reward": score,
        "gold": gold,
        "reply": reply,
        "max_turns": 2,
        "constraint": (f"{bound}:bound <= 3:warn",),
    }
    cast = RLHFModels(ppo_config(home, tmp_path / "run", **fields))
    try:
        states = function_state.get_states(cast)
        assert sorted(states.values(), key=lambda state: state["calls"]) == [{"calls": n} for n in range(4)]
        function_state.set_states(cast, {name: {"calls": state["calls"] + 10} for name, state in states.items()})
        assert (score.calls, gold.calls, reply.calls) == (11, 12, 13)
        assert function_state.unsaved_state_warnings(cast) == []
    finally:
        close_workers(cast)


def test_a_fault_of_a_state_names_the_line_that_raised(tmp_path):
    (tmp_path / "reward.py").write_text(COUNTS + STATE.replace('{"calls": calls}', "1 / 0"))
    one = Worker(str(tmp_path / "reward.py"), "score", timeout=5.0)
    with pytest.raises(FunctionFault) as fault:
        one.get_state()
    one.close()

    assert fault.value.message == "ZeroDivisionError: division by zero (reward.py, line 9)"
