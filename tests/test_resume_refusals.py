"""`understudy resume` of finished runs, and of runs that should go on with other settings."""

from pathlib import Path

import pytest

import understudy
from tests.rehearsed import furnish, sft_config
from tests.test_cli import SMALL, here, refused
from understudy.cli import main
from understudy.language import sft
from understudy.run.config import RequestError

__all__ = ["here"]  # a fixture


@pytest.fixture
def run(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "32", "--out", "run", *SMALL]) == 0
    capsys.readouterr()
    return Path("run")


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate=1e-3", "--no-orthogonal", "--gamma"])
def test_another_setting_names_the_way_to_a_new_run(run, capsys, flag):
    words = "cannot change", "--init run", "--init-optimizer keeps the optimizer's moments"
    refused(capsys, ["resume", "run", flag, "0.5"], 2, flag.partition("=")[0], *words)


def test_another_setting_of_a_language_run_names_model(tmp_path, capsys):
    path = sft.train(sft_config(furnish(tmp_path), tmp_path / "run")).path

    refused(capsys, ["resume", path, "--epochs", "9"], 2, "--epochs cannot change", f"--model {path}")


def test_resume_in_python_takes_no_other_setting(run):
    with pytest.raises(RequestError, match=r"^gamma cannot change in a run that goes on: .* --init run .*--init-opt"):
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
    assert "--steps M extends it" in said.err and "--init run" in said.err
    assert said.out.startswith("32 steps")

    assert main(["resume", "run", "--steps", "64"]) == 0
    assert "finished" not in capsys.readouterr().err


def test_a_finished_run_without_metrics_is_one_sentence(run, capsys):
    Path("run/metrics.jsonl").unlink()

    refused(capsys, ["resume", "run"], 2, "no metrics", "evaluate")
