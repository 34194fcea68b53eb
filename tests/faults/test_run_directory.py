"""A run's directory under attack: damaged lines, two writers, kills between two files, leftovers, memory of long runs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import understudy
from tests.faults import killed
from understudy.control import ppo
from understudy.run import lineage, metrics
from understudy.run.config import RequestError
from understudy.run.metrics import Metrics, read_metrics
from understudy.run.store import Run

SMALL: dict[str, Any] = {
    "env": "CartPole-v1",
    "num_envs": 2,
    "num_steps_per_env": 8,
    "num_epochs": 1,
    "steps": 96,
    "seed": 3,
    "quiet": True,
}


def run_of(out: Path, **fields) -> ppo.Config:
    return ppo.Config(output_dir=str(out), **SMALL | fields)


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six iterations with checkpoints 000002, 000004 and 000006; copied before anything is done to it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    ppo.train(run_of(path, checkpoint_every=2))
    return path


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


# metrics


DAMAGES = {
    "a byte": lambda line: b"\x00" + line[1:],
    "a bit": lambda line: line.replace(b'"steps"', b'"steps', 1),
    "no object": lambda line: b"[1, 2]\n",
    "no iteration": lambda line: b'{"steps": 3}\n',
    "too deep": lambda line: b"[" * 100_000 + b"\n",
    "too long": lambda line: b" " * (metrics.MAX_LINE_BYTES + 10) + b"\n",
    "a number too long": lambda line: b'{"iteration": ' + b"1" * 5000 + b"}\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_of_metrics_costs_that_line_alone(damage, run, capsys):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = DAMAGES[damage](lines[1])
    (run / "metrics.jsonl").write_bytes(b"".join(lines))

    again = understudy.resume(run, steps=112)

    assert [line["iteration"] for line in again.metrics] == [1, 3, 4, 5, 6, 7]
    assert [line["iteration"] for line in read_metrics(run)] == [1, 3, 4, 5, 6, 7]
    assert (run / "metrics-damaged-1.jsonl").read_bytes() == b"".join(lines)
    [event] = events(run, "metrics_damaged")
    assert (event["lines"], event["count"]) == ([2], 1)
    assert "metrics-damaged-1.jsonl" in capsys.readouterr().err


def test_a_line_that_a_kill_cut_off_is_no_damage(run, capsys):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 7, "ste')

    assert [line["iteration"] for line in understudy.resume(run).metrics] == [1, 2, 3, 4, 5, 6]
    assert not list(run.glob("metrics-damaged*")) and capsys.readouterr().err == ""


def test_a_last_line_without_its_end_is_kept_when_it_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"iteration": 1}\n{"iteration": 2}')

    kept, damaged, *_ = metrics.drop_metrics_after(tmp_path, 5)

    assert (len(kept), damaged) == (2, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"iteration": 1}\n{"iteration": 2}\n'


def long_metrics(path: Path, monkeypatch) -> Metrics:
    """Ten lines, the last four of which are in memory."""
    monkeypatch.setattr(metrics, "MAX_RECENT", 4)
    made = Run(path)
    for number in range(10):
        made.log({"iteration": number + 1, "steps": 3 * number})
    made.close()
    assert len(made.metrics.recent) == 4
    return made.metrics


PLACES = [0, 5, 6, 9, -1, -10, slice(None), slice(7, 9), slice(2, 8, 2), slice(-3, None), slice(None, None, -3)]


@pytest.mark.parametrize("place", [*PLACES, slice(8, 2, -1), slice(5, 5)], ids=str)
def test_metrics_of_a_long_run_are_a_sequence_of_all_lines(place, tmp_path, monkeypatch):
    lines = long_metrics(tmp_path, monkeypatch)

    assert len(lines) == 10
    assert lines[place] == [{"iteration": n + 1, "steps": 3 * n} for n in range(10)][place]


def test_metrics_of_a_long_run_can_be_walked_through_and_have_an_end(tmp_path, monkeypatch):
    lines = long_metrics(tmp_path, monkeypatch)

    assert [line["iteration"] for line in lines] == [*range(1, 11)]
    with pytest.raises(IndexError):
        lines[10]


def test_a_long_file_of_metrics_is_cut_without_being_held(tmp_path, monkeypatch):
    long_metrics(tmp_path, monkeypatch)

    kept, damaged, copy, dropped = metrics.drop_metrics_after(tmp_path, 7)

    assert (len(kept), len(kept.recent), damaged, copy) == (7, 4, [], None)
    assert dropped == [{"iteration": n + 1, "steps": 3 * n} for n in (7, 8, 9)]
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [*range(1, 8)]


# one writer


def test_a_second_run_of_one_process_on_a_directory_is_refused(run):
    first = understudy.control.ppo.iterate(run_of(run.parent / "other"))
    next(first)

    with pytest.raises(RequestError, match="is open in another process or in an unfinished run of this one"):
        Run.reopen(run.parent / "other")
    first.close()
    assert understudy.resume(run.parent / "other").metrics[-1]["iteration"] == 6


def test_a_file_that_is_read_does_not_end_the_lock(run):
    """A POSIX record lock would end when any handle of the file is closed."""
    first, _ = Run.reopen(run)
    (run / "lock").read_bytes()

    child = os.fork()
    if child == 0:
        try:
            Run.reopen(run)
        except RequestError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    first.close()


def test_of_two_threads_on_a_directory_one_is_refused(tmp_path):
    outcomes, both = [], threading.Barrier(2)

    def train() -> None:
        both.wait()
        try:
            made = Run.create(str(tmp_path / "run"), "run", {})
            both.wait()
            made.close()
            outcomes.append("made")
        except RequestError:
            outcomes.append("refused")
            both.wait()

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["made", "refused"]


def test_a_fork_does_not_hold_a_run_whose_process_is_done_with_it(run):
    first, _ = Run.reopen(run)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        first.close()  # nothing of the parent's
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(RequestError, match="is open in another process"):
            Run.reopen(run)
        first.close()
        Run.reopen(run)[0].close()
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)


def test_runs_without_a_name_begun_at_once_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [Run.create(None, "ppo", {}) for _ in range(3)]

    assert [one.path.name for one in made] == ["ppo-1", "ppo-2", "ppo-3"]
    for one in made:
        one.close()


# beginnings


@pytest.mark.parametrize("output_dir", ["far/run", None, "there"])
@pytest.mark.parametrize("most_bytes", [10, 1000, 8000], ids=["lineage", "config", "rows"])
def test_a_start_that_the_disk_refuses_leaves_nothing(output_dir, most_bytes, tmp_path, monkeypatch):
    """A real refusal by the system: files of the fork may not have more bytes than this."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    files = {"data.jsonl": lambda file: file.write_text("x" * 9000)} if most_bytes == 8000 else None

    def begin() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        try:
            Run.create(output_dir, "ppo", {"config": {"text": "x" * 5000}}, {"links": ["x" * 50]}, files=files)
        except RequestError as error:
            sys.exit(3 if "cannot be written to (File too large)" in str(error) else 4)

    assert killed.in_fork(begin) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert {path.name for path in (tmp_path / "there").iterdir()} <= {"lock"}


def test_what_was_in_a_directory_stays_where_a_start_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="cannot be written to"):
        Run.create(str(tmp_path), "ppo", {}, files={"data.jsonl": lambda file: os.mkdir(tmp_path)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "notes.txt"]


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.mark.parametrize("after", range(3))
def test_a_run_that_is_killed_while_it_is_made_is_a_run_or_its_directory_can_be_used(after, tmp_path, monkeypatch):
    replace, left = os.replace, after

    def kills(source, target):
        nonlocal left
        if left:
            replace(source, target)
        if left < 2:
            raise Killed
        left -= 1

    monkeypatch.setattr(os, "replace", kills)
    with pytest.raises(Killed):  # before the first file has its name, after it, after the second
        ppo.train(run_of(tmp_path / "run", env="tests.faults.own_envs:SaysItself"))
    monkeypatch.undo()

    files = {name for name in ("config.json", "lineage.json") if (tmp_path / "run" / name).exists()}
    assert files == ({"lineage.json"} if after == 1 else {"lineage.json", "config.json"} if after == 2 else set())
    if after == 2:
        assert understudy.resume(tmp_path / "run").metrics[-1]["steps"] == 96
    else:
        assert ppo.train(run_of(tmp_path / "run")).metrics[-1]["steps"] == 96
        assert lineage.verify(lineage.read_chain(tmp_path / "run"))


@pytest.mark.parametrize("removed", ["config.json", "all files", "all but checkpoints"])
def test_what_is_left_of_a_removed_run_is_not_gone_on_with(removed, run):
    for path in run.iterdir():
        if path.name == removed or (removed != "config.json" and path.is_file()):
            path.unlink()
        elif removed == "all but checkpoints" and path.name != "checkpoints":
            shutil.rmtree(path)

    with pytest.raises(RequestError, match=r"holds .*checkpoints.* of an earlier run: choose another"):
        ppo.train(run_of(run))
    assert {"000002", "000004", "000006"} <= {path.name for path in (run / "checkpoints").iterdir()}


def test_empty_folders_and_files_of_the_users_own_are_no_run(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/notes.txt").write_text("mine")

    assert ppo.train(run_of(tmp_path / "run")).metrics[-1]["steps"] == 96


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "metrics.jsonl.part", "lock", "checkpoints/000009"])
def test_a_pipe_in_a_run_is_refused_and_not_waited_for(name, run):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)

    with pytest.raises(RequestError, match="is a pipe, a socket or a device"):
        understudy.resume(run)


def test_a_pipe_in_the_directory_of_a_new_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/events.jsonl")

    with pytest.raises(RequestError, match=r"holds events.jsonl of an earlier run"):
        ppo.train(run_of(tmp_path / "run"))


def test_a_resume_that_is_refused_lets_go_of_the_run(run):
    (run / "checkpoints/000006/state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(RequestError, match="which is damaged"):
            understudy.resume(run, checkpoint="000006")
    config = (run / "config.json").read_bytes()
    with pytest.raises(RequestError, match="env is 'Nothing-v0'"):
        understudy.resume(run, env="Nothing-v0")
    assert (run / "config.json").read_bytes() == config
    assert understudy.resume(run).metrics[-1]["iteration"] == 6


def test_a_run_is_shown_by_its_recipe_steps_and_score(tmp_path):
    run = Run.create(str(tmp_path / "run"), "ppo", {"recipe": "control ppo", "config": {}})
    assert repr(run) == f"<Run '{tmp_path / 'run'}': control ppo, 0 steps>"
    run.log({"iteration": 1, "steps": 4096, "episode_return_mean": 50.25})
    run.close()

    assert repr(run) == f"<Run '{tmp_path / 'run'}': control ppo, 4,096 steps, episode_return_mean 50.25>"
