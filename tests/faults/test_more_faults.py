"""Faults that are no environment's, no judge's and no update's: disks, clocks, trackers, spikes, odd spaces and prompts."""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import understudy
from tests.faults import killed, report, table
from tests.rehearsed import furnish, ppo_config
from understudy import update as room
from understudy.control import ppo
from understudy.language import ppo as language_ppo
from understudy.run import checkpoint
from understudy.run.config import RequestError
from understudy.run.spikes import find_spikes

SMALL = {
    "env": "CartPole-v1",
    "num_envs": 2,
    "num_steps_per_env": 8,
    "num_epochs": 1,
    "steps": 96,
    "seed": 3,
    "quiet": True,
}


def run_of(out, **fields) -> ppo.Config:
    return ppo.Config(output_dir=str(out), **SMALL | fields)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


# the table itself


def test_every_test_of_the_table_is_there():
    for row in table.ROWS:
        for test in row.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (report.ROOT / file).read_text(), f"{row.name}: {test}"


@pytest.mark.parametrize("name", killed.NAMES)
def test_the_twenty_moments_are_of_the_kinds_that_they_are_said_to_be(name):
    chosen = killed.moments(name, report.SEED, syncs=30, renames=4, steps=90, iterations=30)
    kinds = [kind for kind, _ in chosen]

    assert len(chosen) == 20
    assert sum(kind in ("fsync", "fsynced", "rename", "renamed") for kind in kinds) >= 6
    assert ("step", 1) in chosen  # before the first checkpoint
    assert "restore" in kinds and "restored" in kinds


def test_long_episodes_are_old_and_at_their_end_when_they_are_to_be(home, tmp_path):
    """At checkpoint 10, 80 steps of 8 a rollout; at 25, 200 of 200. The kills at 13 and 27 resume there."""
    recipe, config = killed.configured("ppo-long-episodes", home, tmp_path / "run")
    lengths, iterations = {}, recipe.iterate(config)
    for line in iterations:
        lengths[line["iteration"]] = iterations.gi_frame.f_locals["run"].collector.lengths.tolist()

    assert config.checkpoint_every == 5
    assert lengths[10] == [80, 80] and lengths[25] == [0, 0]
    assert {("iteration", 13), ("iteration", 27)} < set(killed.moments("ppo-long-episodes", 1, 30, 4, 90, 30))


# the disk


def test_files_that_may_not_grow_end_the_run_in_a_sentence_and_leave_no_part_of_a_checkpoint(tmp_path):
    """A real refusal by the system, not a hook: files of this process may not have more than 5000 bytes."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            ppo.train(run_of(tmp_path / "run", checkpoint_every=1))
        except OSError as error:
            (tmp_path / "said").write_text(str(error))
            sys.exit(3)

    assert killed.in_fork(small) == 3
    assert "3 checkpoints in a row could not be written" in (tmp_path / "said").read_text()
    assert "understudy resume" in (tmp_path / "said").read_text()
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert killed.resumed(tmp_path / "run") == 0
    assert checkpoint.list_checkpoints(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("where", ["a file", "under a file", "/proc"])
def test_a_directory_that_cannot_be_made_is_refused_before_anything_is_learned(where, tmp_path):
    (tmp_path / "file").write_text("")
    out = {"a file": tmp_path / "file", "under a file": tmp_path / "file/run", "/proc": "/proc/run"}[where]

    with pytest.raises(RequestError, match=r"output_dir is .* which cannot be made"):
        ppo.train(run_of(out))


def test_a_directory_that_vanishes_is_made_again_at_the_next_checkpoint(tmp_path, capsys):
    iterations = ppo.iterate(run_of(tmp_path / "run", checkpoint_every=3))
    next(iterations)
    shutil.rmtree(tmp_path / "run")
    list(iterations)

    assert capsys.readouterr().err.count("cannot be written") == 1
    found, wrong = checkpoint.find_newest(tmp_path / "run/checkpoints")
    assert found is not None and found.name == "000006" and not wrong
    assert understudy.load(tmp_path / "run")


@pytest.fixture
def everybodys():
    """A directory that other users can come to, as that of pytest is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("when", ["from the start", "later"])
def test_a_directory_that_may_not_be_written_to_ends_the_run_in_a_sentence(when, everybodys):
    """By a user who is not root, whom no permission stops."""

    def confined() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            if when == "from the start":
                (everybodys / "closed").mkdir(mode=0o500)
                ppo.train(run_of(everybodys / "closed/run"))
            else:
                iterations = ppo.iterate(run_of(everybodys / "run", checkpoint_every=1))
                next(iterations)
                next(iterations)
                iterations.gi_frame.f_locals["run"].run.wait_for_checkpoint()  # the first checkpoint, whole
                (everybodys / "run/checkpoints").chmod(0o500)
                list(iterations)
        except (RequestError, OSError) as error:
            (everybodys / "said").write_text(f"{type(error).__name__}: {error}")
            sys.exit(3)

    assert killed.in_fork(confined) == 3
    said = (everybodys / "said").read_text()
    if when == "from the start":
        assert said.startswith("RequestError: output_dir is ") and "which cannot be made (Permission denied)" in said
    else:
        assert "3 checkpoints in a row could not be written" in said and "Permission denied" in said
        found, wrong = checkpoint.find_newest(everybodys / "run/checkpoints")
        assert found is not None and not wrong


def test_a_disk_that_says_it_wrote_and_did_not_is_found_out_when_it_is_read_back(tmp_path, monkeypatch, capsys):
    seal, calls = checkpoint.write_manifest, 0

    def lying(path):
        nonlocal calls
        calls += 1
        seal(path)
        if calls == 2:
            file = path / "state.json"
            file.write_text(file.read_text().replace("0", "1", 1))

    monkeypatch.setattr(checkpoint, "write_manifest", lying)
    run = ppo.train(run_of(tmp_path / "run", checkpoint_every=2, keep_checkpoints=9))

    assert checkpoint.list_checkpoints(run.path / "checkpoints") == ["000002", "000006"]
    assert "checkpoint 000004 could not be written" in capsys.readouterr().err


def test_a_checkpoint_gets_its_name_when_all_that_is_in_it_is_on_the_disk(tmp_path, monkeypatch):
    done, sync, rename = [], checkpoint.sync, os.rename

    def syncing(path):
        done.append(path.relative_to(tmp_path).as_posix())
        sync(path)

    def renaming(old, new):
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(checkpoint, "sync", syncing)
    monkeypatch.setattr(os, "rename", renaming)

    def save(path):
        (path / "inside").mkdir()
        for name in ("a", "inside/b"):
            (path / name).write_text(name)

    aside = checkpoint.write_partial(tmp_path, "000001", save)
    checkpoint.finalize(aside, "000001", keep=1)

    part = ".000001.part"
    assert done[:3] == [f"{part}/a", f"{part}/inside/b", f"{part}/manifest.json"]
    assert set(done[3:5]) == {part, f"{part}/inside"}
    assert done[5:] == ["rename", "."]


def test_a_file_that_is_missing_is_said_to_be(tmp_path):
    checkpoint.save_state(tmp_path, {"iteration": 3})
    checkpoint.write_manifest(tmp_path)
    (tmp_path / "state.safetensors").unlink()

    with pytest.raises(checkpoint.CorruptFileError, match=r"state.safetensors' is missing"):
        checkpoint.verify(tmp_path)


def test_a_state_of_another_form_is_refused_by_its_number(tmp_path):
    checkpoint.save_state(tmp_path, {"iteration": 3})
    file = tmp_path / "state.json"
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 2'))

    with pytest.raises(checkpoint.CorruptFileError, match="has schema 2, this version reads 1"):
        checkpoint.load_state(tmp_path)


def test_json_with_more_bytes_than_are_read_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2, 3]")

    assert checkpoint.read_json(tmp_path / "a.json", max_bytes=9) == [1, 2, 3]
    with pytest.raises(checkpoint.CorruptFileError, match="has more than"):
        checkpoint.read_json(tmp_path / "a.json", max_bytes=8)


def test_what_a_killed_write_left_behind_is_no_part_of_the_next(tmp_path):
    (tmp_path / ".000001.part/old").mkdir(parents=True)

    aside = checkpoint.write_partial(tmp_path, "000001", lambda path: (path / "new").touch())

    assert [path.name for path in aside.iterdir()] == ["new"]


# what environments give, in a vector env of Gymnasium's


class Odd(gymnasium.Env):
    """Episodes of nine steps; the sixth gives what it should not."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, wrong) -> None:
        self.wrong, self.now = wrong, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.now += 1
        given = {"obs": np.zeros(2, np.float32), "reward": 1.0, "over": self.now == 9, "cut": False, "info": {}}
        given |= self.wrong if self.now == 6 else {}
        return tuple(given.values())


STOPS = {
    "an observation of nan": {"obs": np.array([np.nan, 0])},
    "an infinite observation": {"obs": np.array([0, np.inf])},
    "an observation of objects": {"obs": np.array([None, 0])},
    "complex numbers": {"obs": np.array([1j, 0])},
    "three numbers for two": {"obs": np.zeros(3)},
    "one number for two": {"obs": np.float32(0)},
    "a batch of one": {"obs": np.zeros((1, 2))},
    "text for an observation": {"obs": "nothing"},
    "no observation": {"obs": None},
    "a reward of nan": {"reward": np.nan},
    "an infinite reward": {"reward": -np.inf},
    "no reward": {"reward": None},
    "an array of one for a reward": {"reward": np.array([1.0])},
    "a complex reward": {"reward": 1j},
    "an array for an end": {"over": np.array([True, False])},
    "a list for an info": {"info": []},
    "no info": {"info": None},
}


@pytest.mark.parametrize("name", STOPS)
def test_what_is_no_observation_reward_end_or_info_ends_the_run_at_its_step(name, tmp_path):
    """Without supervision there is nobody to mask it; what was learned before is whole."""
    iterations = ppo.iterate(
        run_of(tmp_path / "run", num_envs=1, num_steps_per_env=5, checkpoint_every=1), env=Odd(STOPS[name])
    )
    next(iterations)  # five steps
    with pytest.raises((FloatingPointError, ValueError, TypeError, AttributeError)):
        next(iterations)

    stage = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in stage] == ["failed"]
    found, wrong = checkpoint.find_newest(tmp_path / "run/checkpoints")
    assert found is not None and found.name == "000001" and not wrong
    assert all(x.isfinite().all() for x in checkpoint.load_tensors(found / "policy.safetensors").values())


# the clock


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_changes_no_byte(jump, tmp_path, monkeypatch):
    ppo.train(run_of(tmp_path / "whole", checkpoint_every=2))
    now, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return now() + (jump if calls > 6 else 0.0)

    monkeypatch.setattr(time, "time", jumping)
    ppo.train(run_of(tmp_path / "run", checkpoint_every=2))

    assert calls > 6
    assert killed.digests(tmp_path / "run") == killed.digests(tmp_path / "whole")


# trackers


OUTAGE = """
def _fail(where):
    if where == {where!r}:
        raise ConnectionError("503\\nservice unavailable")

def init(**given): _fail("opening")
def log(metrics, step): _fail("logging")
def finish(): _fail("closing")
"""


@pytest.mark.parametrize("where", ["opening", "logging", "closing"])
@pytest.mark.parametrize("world", ["control", "language"])
def test_a_tracker_that_fails_is_said_once_and_ends_no_run(world, where, home, tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text(OUTAGE.format(where=where))  # a tracker's package that fails there
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if world == "control":
        run, plain = (ppo.train(run_of(tmp_path / n, log=x)) for n, x in (("run", ("wandb",)), ("plain", ())))
    else:
        configs = (ppo_config(home, tmp_path / n, log=x) for n, x in (("run", ("wandb",)), ("plain", ())))
        run, plain = map(language_ppo.train, configs)

    assert capsys.readouterr().err.count("wandb fails (ConnectionError: 503 service unavailable)") == 1
    assert killed.digests(run.path) == killed.digests(plain.path)


# spikes


@pytest.mark.parametrize("metric", ["loss", "grad_norm"])
@pytest.mark.parametrize("lasts", [1, 5])
@pytest.mark.parametrize("at", [30, 150])
def test_a_spike_is_found_in_every_line_it_lasts(metric, lasts, at):
    draw = np.random.default_rng(0)
    value = 1 + 0.1 * draw.standard_normal(200)
    value[at : at + lasts] *= 100
    lines = [{"iteration": i + 1, "loss": 1.0, "grad_norm": 1.0, metric: x} for i, x in enumerate(value.tolist())]

    found = find_spikes(lines)

    assert [(spike["iteration"], spike["metric"]) for spike in found] == [(at + 1 + i, metric) for i in range(lasts)]
    assert all(spike["median"] == pytest.approx(1, abs=0.1) for spike in found)


def test_a_spike_is_held_against_the_lines_before_it_alone():
    # median 2 of 1, 2, 3 seven times over; deviations |x - 2| are 1, 0, 1: MAD 1; 2 + 10 * 1.4826 = 16.826
    lines = [{"iteration": i, "loss": float(i % 3 + 1)} for i in range(21)]

    assert find_spikes([*lines, {"iteration": 21, "loss": 16.8}]) == []
    (found,) = find_spikes([*lines, {"iteration": 21, "loss": 16.9}])
    assert found == {"iteration": 21, "metric": "loss", "value": 16.9, "median": 2, "deviation": pytest.approx(1.4826)}


def test_before_twenty_lines_nothing_is_a_spike_and_what_is_missing_is_no_line():
    lines = [{"iteration": i, "loss": 1.0 + i % 2} for i in range(19)] + [{"iteration": 19, "loss": None}]
    lines += [{"iteration": 20, "loss": float("nan")}, {"iteration": 21}]

    assert find_spikes([*lines, {"iteration": 22, "loss": 1e9}]) == []
    assert len(find_spikes([*lines, {"iteration": 22, "loss": 1.0}, {"iteration": 23, "loss": 1e9}])) == 1


def test_what_hardly_moves_has_no_spikes_and_what_falls_is_none():
    # median 5, MAD 0: the deviation is taken to be 5 / 100, so that a spike is above 5 + 10 * 0.05 = 5.5
    lines = [{"iteration": i, "loss": 5.0} for i in range(21)]

    assert find_spikes([*lines, {"iteration": 21, "loss": 5.4}]) == []
    assert len(find_spikes([*lines, {"iteration": 21, "loss": 5.6}])) == 1
    assert find_spikes([*lines, {"iteration": 21, "loss": -500.0}]) == []
    # of a negative median too: -5 + 0.5
    negative = [{"iteration": i, "loss": -5.0} for i in range(21)]
    assert find_spikes([*negative, {"iteration": 21, "loss": -4.6}]) == []


@pytest.mark.parametrize("before", [20, 100])
def test_the_line_itself_is_none_of_those_it_is_held_against(before):
    # half of them 1, half of them 3: the median is 2, and would be 3 with the spike among them, or without the first
    lines = [{"iteration": i, "loss": 1.0 if i % 2 == 0 else 3.0} for i in range(before)]

    *_, found = find_spikes([*lines, {"iteration": before, "loss": 100.0}])

    assert (found["iteration"], found["median"]) == (before, 2)


def test_what_is_zero_throughout_has_no_spikes():
    assert find_spikes([{"iteration": i, "grad_norm": 0.0} for i in range(30)]) == []


@pytest.mark.parametrize("count", [90, 260, 5000])
def test_lines_looked_at_in_pieces_give_what_they_give_at_once(count):
    draw = np.random.default_rng(1)
    value = draw.standard_normal(count) * (1 + 40 * (draw.random(count) > 0.97))
    lines = [{"iteration": i, "loss": x} for i, x in enumerate(value.tolist())]
    cuts = [0, 17, 31, 40, count // 2, count]

    pieces = [spike for low, high in itertools.pairwise(cuts) for spike in find_spikes(lines[:high], first_line=low)]

    assert pieces == find_spikes(lines) and len(pieces) > 0


def test_spikes_of_a_run_are_events_and_change_nothing(tmp_path, monkeypatch):
    clip, calls = room._clip_gradients, 0

    def hundredfold(optimizer, bound):
        nonlocal calls
        calls += 1
        if calls == 100:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad *= 1000
        return clip(optimizer, bound)

    monkeypatch.setattr(room, "_clip_gradients", hundredfold)
    run = ppo.train(run_of(tmp_path / "run", steps=16 * 30, num_minibatches=4))

    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [(e["iteration"], e["metric"]) for e in events if e["kind"] == "spike"] == [(25, "grad_norm")]
    assert run.metrics[-1]["steps"] == 480


# action spaces


class Acts(gymnasium.Env):
    """Episodes of five steps; whatever is done must be in its space."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, action_space) -> None:
        self.action_space, self.now = action_space, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action) if isinstance(self.action_space, spaces.Box) else action)
        self.now += 1
        return np.zeros(2, np.float32), 1.0, self.now == 5, False, {}


EDGES = {
    "Discrete from 3": (spaces.Discrete(4, start=3), True),
    "Discrete below 0": (spaces.Discrete(2, start=-1), True),
    "one action": (spaces.Discrete(1), True),
    "MultiDiscrete": (spaces.MultiDiscrete([2, 5]), True),
    "MultiDiscrete in a square": (spaces.MultiDiscrete([[2, 3], [4, 5]]), True),
    "MultiBinary": (spaces.MultiBinary(3), True),
    "an unbounded Box": (spaces.Box(-np.inf, np.inf, (2,)), True),
    "a half-bounded Box": (spaces.Box(np.array([0, -1], np.float32), np.array([np.inf, 1], np.float32)), True),
    "a Box of float64": (spaces.Box(-1, 1, (2, 2), np.float64), True),
    "a Box of no dimension": (spaces.Box(-1, 1, ()), True),
    "a Box of whole numbers": (spaces.Box(0, 5, (2,), np.int64), False),
    "a Box of no number": (spaces.Box(-1, 1, (0,)), False),
    "Dict": (spaces.Dict({"a": spaces.Discrete(2)}), False),
    "Tuple": (spaces.Tuple([spaces.Discrete(2)]), False),
    "Text": (spaces.Text(5), False),
    "Sequence": (spaces.Sequence(spaces.Discrete(2)), False),
}


@pytest.mark.parametrize("name", EDGES)
def test_an_action_space_at_the_edge_is_learned_in_or_refused_before_there_is_a_run(name, tmp_path):
    space, learned = EDGES[name]
    config = run_of(tmp_path / "run", env="acts", num_envs=1, steps=16)
    if learned:
        run = ppo.train(config, env=Acts(space))
        assert run.metrics[-1]["optimizer_steps"] > 0
        assert all(p.isfinite().all() for p in understudy.load(run.path).parameters())
    else:
        with pytest.raises((RequestError, ValueError), match="action_space is"):
            ppo.train(config, env=Acts(space))
        assert not (tmp_path / "run").exists()


# prompts and completions


ODD = {
    "special tokens": ("<s> </s> the old", True),
    "an unknown word": ("zzz", True),
    "a null character": ("the \x00 old", True),
    "words right to left": ("\u202ethe old", True),
    "a lone surrogate": ("the \ud800 old", False),
    "empty": ("", False),
    "more than the context": ("the " * 2000, False),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_prompts_are_read_or_refused_with_their_row(kind, home, tmp_path):
    prompt, read = ODD[kind]
    rows = [{"prompt": "the old"}, {"prompt": prompt}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ppo_config(
        home,
        tmp_path / "run",
        data=str(tmp_path / "rows.jsonl"),
        total_tokens=20,
        completions_per_iteration=4,
        evaluate_rows=1,
    )
    if read:
        run = language_ppo.train(config)
        assert run.metrics[-1]["optimizer_steps"] > 0
    else:
        with pytest.raises(RequestError, match="row 2"):
            language_ppo.train(config)
