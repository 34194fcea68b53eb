"""Exact resume: whatever kills a run, and wherever, it is gone on with to the bytes of a run that was not killed.

A few moments of every recipe here; `make faults` takes twenty of each.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation

import understudy
from tests.faults import killed
from tests.faults.own_envs import SaysItself
from tests.rehearsed import furnish
from understudy.control import ppo
from understudy.control.envs import state as standing
from understudy.control.training import TrainingRun
from understudy.run import checkpoint
from understudy.run.config import RequestError
from understudy.run.store import Run

FEW = {  # by name of the run, moments that differ in kind from one to the next
    "reinforce": [
        ("step", 3),
        ("renamed", 4),
    ],  # the last of its checkpoints has its name, older ones are not dropped yet
    "actor-critic": [("renamed", 2)],
    "ppo": [("restore", 1), ("fsync", 12)],
    "ppo-compiled": [("iteration", 6)],
    "ppo-kl-penalty": [("iteration", 6)],
    "ppo-recurrent": [("step", 30)],
    "ppo-long-episodes": [("step", 80), ("iteration", 27)],
    "ppo-native": [("fsynced", 17)],
    "ppo-async": [("step", 50)],
    "ppo-supervised": [("step", 50)],
    "ppo-remembering-env": [("iteration", 8)],
    "ppo-env-with-state": [("rename", 3)],
    "sft": [("step", 7)],
    "reward-model": [("rename", 2)],
    "language-ppo": [("step", 20), ("restored", 1)],
    "grpo": [("fsync", 30)],
    "language-reinforce": [("iteration", 5)],
    "dpo": [("iteration", 1)],
}
SMALL = {
    "env": "CartPole-v1",
    "num_envs": 2,
    "num_steps_per_env": 8,
    "num_epochs": 1,
    "steps": 96,
    "seed": 3,
    "quiet": True,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("name", FEW)
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(name, home, tmp_path):
    assert killed.trained(name, home, tmp_path / "whole") == 0
    whole = killed.digests(tmp_path / "whole")

    for kind, number in FEW[name]:
        assert killed.survives(name, (kind, number), home, tmp_path / f"{kind}-{number}", whole) == ""


@pytest.mark.parametrize("lost", ["shuffle", "walker", "running_returns", "optimizer"])
def test_what_a_checkpoint_holds_is_needed(lost, home, tmp_path, monkeypatch):
    """The control of the test above: with a part of the state left out, the bytes differ."""
    assert killed.trained("ppo", home, tmp_path / "whole") == 0
    assert killed.trained("ppo", home, tmp_path / "run", ("iteration", 7)) == -signal.SIGKILL
    load = checkpoint.load_state

    def forgetful(path):
        found = load(path)
        fresh = torch.Generator().manual_seed(0).get_state()
        if lost == "optimizer":
            found["optimizer"]["param_groups"][0]["betas"] = (0.0, 0.999)
        elif lost == "walker":
            found["run"]["walker"]["generator"] = fresh
        else:
            found["run"][lost] = fresh if lost == "shuffle" else torch.zeros(4, dtype=torch.float64)
        return found

    monkeypatch.setattr("understudy.control.training.load_state", forgetful)

    assert killed.resumed(tmp_path / "run") == 0
    assert killed.digests(tmp_path / "run") != killed.digests(tmp_path / "whole")


def run_of(out: Path, **fields) -> ppo.Config:
    return ppo.Config(output_dir=str(out), **SMALL | fields)


def test_checkpoints_and_evaluations_change_no_byte_of_a_run(tmp_path):
    plain = ppo.train(run_of(tmp_path / "plain", checkpoint_every=1000))
    busy = ppo.train(run_of(tmp_path / "busy", checkpoint_every=1, evaluate_every=1, evaluate_episodes=1))

    assert (plain.path / "policy/policy.safetensors").read_bytes() == (
        busy.path / "policy/policy.safetensors"
    ).read_bytes()


def test_the_newest_checkpoints_stay_and_older_ones_go(tmp_path):
    run = ppo.train(run_of(tmp_path / "run", checkpoint_every=1, keep_checkpoints=2))

    assert checkpoint.list_checkpoints(run.path / "checkpoints") == ["000005", "000006"]


def test_without_a_word_there_are_five_checkpoints_over_a_run(tmp_path, monkeypatch):
    written = []
    write = checkpoint.write_partial

    def counted(folder, name, save):
        written.append(name)
        return write(folder, name, save)

    monkeypatch.setattr(checkpoint, "write_partial", counted)
    ppo.train(run_of(tmp_path / "run", steps=16 * 30))

    assert written == [f"{n:06d}" for n in range(6, 31, 6)]


def files_of(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints 000002, 000004 and 000006."""
    path = tmp_path_factory.mktemp("finished") / "run"
    ppo.train(run_of(path, checkpoint_every=2))
    return path


def copy_of(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "a bit flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "optimizer.safetensors", "policy.json", "policy.safetensors", "state.json", "state.safetensors"],
)
def test_a_damaged_checkpoint_is_put_away_and_the_one_before_is_used(damage, name, finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path)
    DAMAGES[damage](run / "checkpoints/000006" / name)

    again = understudy.resume(run)

    assert again.metrics[-1]["iteration"] == 6
    assert name in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoints/quarantine").iterdir() if path.is_dir()] == ["000006-1"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event.get("checkpoint") for event in events if event["kind"] == "resumed"] == ["000004"]


def test_where_all_are_damaged_nothing_is_begun_anew(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    for name in checkpoint.list_checkpoints(run / "checkpoints"):
        (run / "checkpoints" / name / "state.json").write_text("{}")

    with pytest.raises(RequestError, match="whose checkpoints are all damaged"):
        understudy.resume(run)
    assert len(list((run / "checkpoints/quarantine").glob("0*-1"))) == 3


def test_a_checkpoint_that_is_named_is_the_one_used_or_none(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    (run / "checkpoints/000004/state.json").write_text("{}")

    with pytest.raises(RequestError, match=r"checkpoint is '000004', which is damaged"):
        understudy.resume(run, checkpoint="000004")
    with pytest.raises(RequestError, match=r"checkpoint is '7': must be one of 000002, 000004, 000006"):
        understudy.resume(run, checkpoint="7")
    assert understudy.resume(run, checkpoint="000002").metrics[-1]["iteration"] == 6
    assert checkpoint.list_checkpoints(run / "checkpoints") == ["000002", "000004", "000006"]


def test_newer_checkpoints_than_the_one_named_are_set_aside(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path)
    was = (run / "checkpoints/000006/state.json").read_bytes()

    understudy.resume(run, checkpoint="000002", steps=160)  # another learning rate from there on

    assert "the newer 000004, 000006 are in" in capsys.readouterr().err
    assert (run / "checkpoints/quarantine/000006-1/state.json").read_bytes() == was
    checkpoint.verify(run / "checkpoints/000006")
    assert (run / "checkpoints/000006/state.json").read_bytes() != was
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    [aside] = [event for event in events if event["kind"] == "checkpoints_set_aside"]
    assert aside["names"] == ["000004", "000006"]


def test_more_steps_extend_a_run_and_are_written_down(finished, tmp_path):
    run = copy_of(finished, tmp_path)

    again = understudy.resume(run, steps=160)

    assert again.metrics[-1]["steps"] == 160
    assert json.loads((run / "config.json").read_text())["config"]["steps"] == 160
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["extended"] == {"from": 96, "to": 160}
    with pytest.raises(RequestError, match="steps is 100: must be 160 or more"):
        understudy.resume(run, steps=100)


def test_another_schema_is_refused_by_its_number(finished, tmp_path):
    path = copy_of(finished, tmp_path) / "checkpoints/000006"
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))

    with pytest.raises(checkpoint.CorruptFileError, match="has schema 99, this version reads 1"):
        checkpoint.verify(path)


def test_a_second_process_on_a_run_is_refused(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        Run.reopen(run)
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(RequestError, match="which is open in another process"):
            understudy.resume(run)
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)
    assert understudy.resume(run).metrics[-1]["iteration"] == 6  # the lock of a dead process holds nobody


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_exits_as_it_should_and_resumes_to_the_same_bytes(number, status, tmp_path):
    fields = {"steps": 1600, "checkpoint_every": 1000}
    ppo.train(run_of(tmp_path / "whole", **fields))

    def signalled() -> None:
        report = TrainingRun.finish_iteration

        def raising(self, metrics):
            if self.iteration == 40:
                os.kill(os.getpid(), number)
            yield from report(self, metrics)

        TrainingRun.finish_iteration = raising
        try:
            ppo.train(run_of(tmp_path / "run", **fields))
        except KeyboardInterrupt:
            sys.exit(130)

    assert killed.in_fork(signalled) == status
    assert checkpoint.list_checkpoints(tmp_path / "run/checkpoints") == ["000041"]
    understudy.resume(tmp_path / "run")
    policies = [(tmp_path / run / "policy/policy.safetensors").read_bytes() for run in ("whole", "run")]
    assert policies[0] == policies[1]


def seconds_to_leave() -> float:
    """How long an interpreter that has loaded what we load takes to end, which on a busy machine is seconds by itself."""
    code = "import understudy.control.ppo; print(1, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        process.wait()
        return time.monotonic() - began


def test_a_second_interrupt_exits_within_two_seconds_and_harms_nothing(tmp_path):
    code = "import sys; from understudy.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [
        "control",
        "ppo",
        "--env",
        "tests.faults.own_envs:Slow",
        "--steps",
        "100000",
        "--out",
        str(tmp_path / "run"),
    ]
    words += ["--num-envs", "1", "--num-steps-per-env", "80", "--checkpoint-every", "1", "--compile", "off"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=root, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.list_checkpoints(tmp_path / "run/checkpoints"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(timeout=20) == 130
        assert time.monotonic() - began < 2 + seconds_to_leave()
    finally:
        process.kill()
        process.communicate()
    found, wrong = checkpoint.find_newest(tmp_path / "run/checkpoints")
    assert found is not None and not wrong


def test_a_disk_that_refuses_a_checkpoint_does_not_end_the_run_at_once(tmp_path, monkeypatch, capsys):
    refusals = iter([True, True, False, True, True, True])

    def full(*_):
        if next(refusals):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)

    with pytest.raises(OSError, match=r"3 checkpoints in a row could not be written .*`understudy resume"):
        ppo.train(run_of(tmp_path / "run", checkpoint_every=1))
    assert checkpoint.list_checkpoints(tmp_path / "run/checkpoints") == ["000003"]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert "could not be written" in capsys.readouterr().err


def test_metrics_that_cannot_be_written_are_said_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").mkdir()

    run = ppo.train(run_of(tmp_path / "run"))

    assert len(run.metrics) == 6
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1


def test_an_env_that_does_not_come_back_is_said_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    """Its noise has no seed, and it was not found out at the start: no replay can bring it back."""
    monkeypatch.setattr("understudy.control.envs.sources.has_reproducible_resets", lambda *_: True)
    config = run_of(tmp_path / "run", env="tests.faults.own_envs:Unseeded", checkpoint_every=2)
    iterations = ppo.iterate(config)
    next(iterations)
    next(iterations)
    iterations.close()

    run = understudy.resume(tmp_path / "run")

    assert "does not come back to where it stood" in capsys.readouterr().err
    assert run.metrics[-1]["steps"] == 96
    assert '"resume_inexact"' in (tmp_path / "run/events.jsonl").read_text()


def test_episodes_that_are_too_long_to_replay_are_cut_at_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("understudy.control.rollout.MAX_REPLAY_STEPS", 5)
    fields = {"env": "Pendulum-v1", "checkpoint_every": 2}
    whole = ppo.train(run_of(tmp_path / "whole", **fields))
    iterations = ppo.iterate(run_of(tmp_path / "run", **fields))
    for _ in range(3):
        next(iterations)
    iterations.close()
    shutil.rmtree(tmp_path / "run/checkpoints/000003")  # not one of the uninterrupted run's

    run = understudy.resume(tmp_path / "run")

    policies = [(path / "policy/policy.safetensors").read_bytes() for path in (whole.path, run.path)]
    assert policies[0] == policies[1]
    assert whole.metrics[-1]["episodes"] == 0  # each was cut, none was finished


def test_a_row_that_waits_begins_so_that_all_rows_end_together():
    assert [w.tolist() for w in standing.replay_schedule([3, 1])] == [[True, False], [True, False], [True, True]]


def test_the_way_back_is_the_first_that_an_env_allows():
    def sync(make, mode=AutoresetMode.DISABLED):
        return SyncVectorEnv([make] * 2, autoreset_mode=mode)

    assert standing.choose_restore_method(sync(SaysItself), resets_are_reproducible=False) == "snapshot"
    assert (
        standing.choose_restore_method(
            gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point"), resets_are_reproducible=True
        )
        == "snapshot"
    )
    assert (
        standing.choose_restore_method(sync(lambda: gymnasium.make("CartPole-v1")), resets_are_reproducible=True)
        == "replay"
    )
    assert (
        standing.choose_restore_method(sync(lambda: gymnasium.make("CartPole-v1")), resets_are_reproducible=False)
        == "renew"
    )
    assert (
        standing.choose_restore_method(
            sync(lambda: gymnasium.make("CartPole-v1"), AutoresetMode.NEXT_STEP), resets_are_reproducible=True
        )
        == "renew"
    )


def test_an_env_that_remembers_is_found_out():
    assert standing.has_reproducible_resets(gymnasium.make("CartPole-v1"), 3)
    assert not standing.has_reproducible_resets(NormalizeObservation(gymnasium.make("CartPole-v1")), 3)


def shared_state(path: Path) -> str:
    return repr(checkpoint.load_state(path)["run"]["shared_generators"]["numpy"])


def test_an_env_whose_constructor_draws_is_made_anew_with_the_same_numbers(tmp_path):
    fields = {"env": "tests.faults.own_envs:Draws", "checkpoint_every": 2}
    before = np.random.get_state()
    np.random.seed(7)
    whole = ppo.train(run_of(tmp_path / "whole", **fields))
    np.random.seed(7)
    iterations = ppo.iterate(run_of(tmp_path / "run", **fields))
    for _ in range(3):
        next(iterations)
    iterations.close()
    np.random.seed(8)

    run = understudy.resume(tmp_path / "run")
    np.random.set_state(before)

    last = run.list_checkpoints()[-1]
    states = [shared_state(path / "checkpoints" / last) for path in (whole.path, run.path)]
    policies = [(path / "policy/policy.safetensors").read_bytes() for path in (whole.path, run.path)]
    assert states[0] == states[1] and policies[0] == policies[1]


class Overwrites(SaysItself):
    """Writes over the action that it is given."""

    get_state = set_state = None
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.drift = 0.0
        return super().reset(seed=seed)

    def step(self, action):
        self.place += float(action[0])
        action[:] = 7.0
        return super().step(0)


def test_an_env_that_writes_over_its_action_comes_back(tmp_path, capsys):
    assert standing.has_reproducible_resets(Overwrites(), 3)
    fields = {"env": "tests.faults.test_resume:Overwrites", "checkpoint_every": 2}
    whole = ppo.train(run_of(tmp_path / "whole", **fields))
    iterations = ppo.iterate(run_of(tmp_path / "run", **fields))
    for _ in range(3):
        next(iterations)
    iterations.close()

    run = understudy.resume(tmp_path / "run")
    policies = [(path / "policy/policy.safetensors").read_bytes() for path in (whole.path, run.path)]
    assert policies[0] == policies[1] and "does not come back" not in capsys.readouterr().err


class FailsAtFirst(SaysItself):
    """A reset with a seed that three divides fails."""

    get_state = set_state = None

    def reset(self, *, seed=None, options=None):
        if seed is not None and seed % 3 == 0:
            raise RuntimeError("not this one")
        self.drift = 0.0
        return super().reset(seed=seed)


def test_a_fault_in_a_reset_leaves_resume_exact_and_its_restart_counted(tmp_path, capsys):
    fields = {"env": "tests.faults.test_resume:FailsAtFirst", "checkpoint_every": 2, "vectorization": "fault_tolerant"}
    whole = ppo.train(run_of(tmp_path / "whole", **fields))
    iterations = ppo.iterate(run_of(tmp_path / "run", **fields))
    for _ in range(3):
        next(iterations)
    iterations.close()

    run = understudy.resume(tmp_path / "run")
    policies = [(path / "policy/policy.safetensors").read_bytes() for path in (whole.path, run.path)]
    assert policies[0] == policies[1] and "does not come back" not in capsys.readouterr().err
    counts = [
        checkpoint.load_state(path / "checkpoints" / run.list_checkpoints()[-1])["run"]["walker"]["restarted"]
        for path in (whole.path, run.path)
    ]
    assert counts[0] == counts[1] and sum(counts[0]) > 0


def test_state_of_every_kind_comes_back(tmp_path):
    generator = np.random.default_rng(3)
    tree = {
        "tensor": torch.arange(3, dtype=torch.float64),
        "array": np.array([[1, 2]], dtype=np.uint16),
        "list": [1, 2.5, None, True, "text", float("inf")],
        "tuple": (1, (2,)),
        3: generator,
    }

    checkpoint.save_state(tmp_path, tree)
    found = checkpoint.load_state(tmp_path)

    assert torch.equal(found["tensor"], tree["tensor"])
    assert found["array"].dtype == np.uint16 and (found["array"] == tree["array"]).all()
    assert found["list"] == tree["list"] and found["tuple"] == tree["tuple"]
    assert found[3] == generator.bit_generator.state
    with pytest.raises(TypeError, match="a object cannot be part of a checkpoint"):
        checkpoint.save_state(tmp_path, {"x": object()})
