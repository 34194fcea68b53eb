"""`understudy resume` of finished runs, and of runs that should go on with other settings."""

import json
from pathlib import Path

import pytest

import understudy
from tests.rehearsed import furnish, ppo_config, sft_config
from tests.test_cli import SMALL, here, refused
from understudy.cli import main
from understudy.control import ppo
from understudy.language import ppo as language_ppo
from understudy.language import sft
from understudy.run import lineage
from understudy.run.config import RequestError

__all__ = ["here"]  # a fixture


@pytest.fixture
def run(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "32", "--out", "run", *SMALL]) == 0
    capsys.readouterr()
    return Path("run")


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate=1e-3", "--no-orthogonal", "--gamma"])
def test_another_setting_names_the_way_to_a_new_run(run, capsys, flag):
    words = "cannot change", "--init-from run", "--init-optimizer keeps the optimizer's moments"
    refused(capsys, ["resume", "run", flag, "0.5"], 2, flag.partition("=")[0], *words)


def test_another_setting_of_a_language_run_names_model(tmp_path, capsys):
    path = sft.train(sft_config(furnish(tmp_path), tmp_path / "run")).path

    refused(capsys, ["resume", path, "--num-epochs", "9"], 2, "--num-epochs cannot change", f"--model {path}")


def test_resume_in_python_takes_no_other_setting(run):
    with pytest.raises(
        RequestError, match=r"^gamma cannot change in a run that goes on: .* --init-from run .*--init-opt"
    ):
        understudy.resume("run", gamma=0.5)


@pytest.mark.parametrize("argv", [["evaluate", "run", "--episodes", "1"], ["resume", "run"], ["show", "run"]])
def test_a_run_of_a_device_that_is_not_here_goes_on_on_another(run, capsys, argv):
    path = run / "config.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:99"'))

    refused(capsys, argv, 2, "device is 'cuda:99'", "try cpu")
    assert main([*argv, "--device", "cpu"]) == 0
    assert ("exact only on the same device" in capsys.readouterr().err) == (argv[0] == "resume")


def test_a_finished_run_is_said_to_be_finished(run, capsys):
    assert main(["resume", "run"]) == 0
    said = capsys.readouterr()
    assert "the run was finished" in said.err
    assert "--steps M extends it" in said.err and "--init-from run" in said.err
    assert said.out.startswith("32 steps")

    assert main(["resume", "run", "--steps", "64"]) == 0
    assert "finished" not in capsys.readouterr().err


def test_a_finished_run_without_metrics_is_one_sentence(run, capsys):
    Path("run/metrics.jsonl").unlink()

    refused(capsys, ["resume", "run"], 2, "no metrics", "evaluate")


def test_another_reward_than_the_runs_is_said_and_written_down(tmp_path, capsys):
    home = furnish(tmp_path / "home")
    run = language_ppo.train(ppo_config(home, tmp_path / "run", reward="length:4", total_tokens=1)).path

    understudy.resume(run, steps=100, reward="length:4")
    assert "reward" not in capsys.readouterr().err
    understudy.resume(run, steps=200, reward="length:2")

    assert "reward was ['length:4'] and is ['length:2'] from here on" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["config"]["reward"] == ["length:2"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["replaced"] == {"reward": {"from": ["length:4"], "to": ["length:2"]}}
    assert all(check.state == "same" for check in lineage.verify(lineage.read_chain(run)) if "config" in check.what)


def test_other_options_of_the_environment_are_said_and_evaluated_with(tmp_path, capsys):
    cfg = ppo.Config(
        env="CartPole-v1",
        num_envs=1,
        num_steps_per_env=8,
        num_minibatches=1,
        steps=8,
        quiet=True,
        output_dir=str(tmp_path / "run"),
    )
    run = ppo.train(cfg).path

    understudy.resume(run, steps=16, env_options={"sutton_barto_reward": True})

    assert "env_options was {} and is {'sutton_barto_reward': True}" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["config"]["env_options"] == {"sutton_barto_reward": True}


def test_training_again_from_an_older_checkpoint_is_not_said_to_be_nothing(run, capsys):
    assert main(["resume", "run", "--steps", "64"]) == 0
    oldest = sorted(path.name for path in Path("run/checkpoints").iterdir())[0]
    capsys.readouterr()

    assert main(["resume", "run", "--checkpoint", oldest]) == 0
    assert "finished" not in capsys.readouterr().err


def test_fail_if_worse_is_refused_for_a_run_that_compares_nothing(run, capsys):
    refused(capsys, ["resume", "run", "--fail-if-worse"], 2, "fail_if_worse is given to a run of control ppo")
