"""A resumed run is compared with what the interrupted one had logged: it is said where it comes to other numbers."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import understudy
from tests.faults import killed
from tests.faults.own_envs import CountsForAll
from tests.faults.test_function_state import COUNTS, STATE, events
from tests.rehearsed import furnish, ppo_config
from understudy.control import ppo
from understudy.language import ppo as language_ppo
from understudy.run import metrics
from understudy.run.store import Run

SAID = "does not come to what it was before the interruption"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return furnish(tmp_path_factory.mktemp("home"))


def control(out: Path, env: str = "CountsNothing", **fields: Any) -> ppo.Config:
    given = {
        "num_envs": 2,
        "num_steps_per_env": 8,
        "num_epochs": 1,
        "num_minibatches": 1,
        "hidden": (4,),
        "steps": 96,
        "quiet": True,
    }
    given |= {"env": f"tests.faults.own_envs:{env}", "checkpoint_every": 2}
    return ppo.Config(output_dir=str(out), **given | fields)


def language(home: Path, out: Path, **fields: Any) -> language_ppo.Config:
    return ppo_config(
        home, out, **{"total_tokens": 260, "checkpoint_every": 2, "num_epochs": 1, "num_minibatches": 1} | fields
    )


def is_killed(recipe: Any, config: Any) -> None:
    """Train until just before the sixth line. The second checkpoint has begun, so the first is whole, and maybe both are."""

    def job() -> None:
        killed.watch_for(("iteration", 6))
        recipe.train(config)

    assert killed.in_fork(job) == -signal.SIGKILL


@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize("world", ["control", "language"])
def test_what_remembers_beside_the_checkpoint_is_found_out_on_resume(
    world, differs, home, tmp_path, capsys, monkeypatch
):
    """An environment that counts in a global; a reward function that counts, without a state and with one."""
    out = tmp_path / "run"
    monkeypatch.setattr(CountsForAll, "episodes", 0)
    if world == "control":
        is_killed(ppo, control(out, "CountsForAll" if differs else "CountsNothing"))
    else:
        (tmp_path / "reward.py").write_text(COUNTS + ("" if differs else STATE))
        is_killed(language_ppo, language(home, out, reward=f"{tmp_path / 'reward.py'}:score"))
    understudy.resume(out)

    found = events(out, "resume_differs")
    assert len(found) == capsys.readouterr().err.count(SAID) == differs
    if differs:
        assert found[0]["iteration"] in (3, 5)
        metric = found[0]["metrics"]["episode_return_mean" if world == "control" else "score_mean"]
        assert metric.keys() == {"before", "now"}


def test_a_run_that_begins_anew_is_compared_from_its_first_iteration(home, tmp_path):
    (tmp_path / "reward.py").write_text("calls = 3" + COUNTS.replace("calls = 0\n", ""))
    spec = f"{tmp_path / 'reward.py'}:score"
    is_killed(language_ppo, language(home, tmp_path / "run", reward=spec, preflight=True, checkpoint_every=9))
    understudy.resume(tmp_path / "run")  # preflight, which called the function before, has been passed

    assert events(tmp_path / "run", "resume_differs")[0]["iteration"] == 1


def test_other_settings_are_not_compared(tmp_path):
    is_killed(ppo, control(tmp_path / "run", learning_rate_schedule="linear"))
    understudy.resume(tmp_path / "run", steps=128)

    assert not events(tmp_path / "run", "resume_differs")
    assert events(tmp_path / "run", "resumed")[0]["not_compared"] == ["steps"]


def test_other_versions_are_not_compared_and_the_next_resume_goes_by_them(tmp_path):
    out = tmp_path / "run"
    is_killed(ppo, control(out))
    lineage = json.loads((out / "lineage.json").read_text())
    packages = lineage["packages"]
    (out / "lineage.json").write_text(json.dumps(lineage | {"packages": packages | {"torch": "2.9"}}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line | {"loss": 7.0}) + "\n" for line in lines))

    def goes_on() -> None:
        killed.watch_for(("iteration", 2))
        understudy.resume(out)

    assert killed.in_fork(goes_on) == -signal.SIGKILL  # one iteration has a line again
    assert not events(out, "resume_differs")
    assert events(out, "resumed")[0]["not_compared"] == ["packages"]
    about = json.loads((out / "lineage.json").read_text())
    assert (about["packages"]["torch"], about["went_on"]["packages"]) == ("2.9", packages)

    understudy.resume(out)
    assert "not_compared" not in events(out, "resumed")[1]
    assert not events(out, "resume_differs")


@pytest.mark.parametrize("world", ["control", "language"])
def test_only_the_metrics_of_the_clock_differ_between_two_runs(world, home, tmp_path, monkeypatch):
    """A new metric that depends on the time must be named in `CLOCK`, or every resumed run would be said to differ."""
    now, lines = time.time, []
    for rate in (1, 3):
        monkeypatch.setattr(time, "time", lambda rate=rate: rate * now())
        out = tmp_path / str(rate)
        config = control(out) if world == "control" else language(home, out)
        run = ppo.train(config) if world == "control" else language_ppo.train(config)
        lines.append(list(metrics.read_metrics(run.path)))

    pairs = list(zip(*lines, strict=True))
    assert {name for one, other in pairs for name in one if one[name] != other[name]} == metrics.CLOCK_METRICS


def test_lines_are_compared_as_the_file_has_them(tmp_path, capsys):
    run = Run(tmp_path)
    run.log({"iteration": 1, "loss": float("nan"), "info_time": 1.0, "seconds": 1.0})
    run.log({"iteration": 2, "loss": 0.1 + 0.2, "seconds": 2.0})
    run.log({"iteration": 3, "loss": 1.0})
    run.log({"iteration": 4, "loss": 1.0})
    run.rewind(0)
    run.log({"iteration": 1, "loss": float("inf"), "info_time": 2.0, "seconds": 5.0})
    run.log({"iteration": 2, "loss": 0.1 + 0.2, "seconds": 6.0})
    assert capsys.readouterr().err == ""

    run.log({"iteration": 3, "loss": 1.0, "kl_old": 0.5})
    run.log({"iteration": 4, "loss": 2.0})  # once is enough
    run.close()

    assert [(found["iteration"], found["metrics"]) for found in events(tmp_path, "resume_differs")] == [
        (3, {"kl_old": {"before": None, "now": 0.5}})
    ]
    assert "iteration 3" in capsys.readouterr().err
