"""`understudy show`: completions token by token, episodes step by step, and files that are anybody's."""

import json
from pathlib import Path

import pytest

from tests.rehearsed import furnish, ppo_config
from tests.test_cli import SMALL, here, refused
from understudy.cli import main
from understudy.language import ppo

__all__ = ["here"]  # a fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two iterations, four samples each."""
    home = furnish(tmp_path_factory.mktemp("home"))
    return ppo.train(ppo_config(home, home / "run", log_samples=4)).path


def shown(capsys, *argv: object) -> list[str]:
    assert main(["show", *map(str, argv)]) == 0
    return capsys.readouterr().out.splitlines()


def objects(capsys, *argv: object) -> list[dict]:
    return [json.loads(line) for line in shown(capsys, *argv, "--json")]


def samples(run: Path) -> list[dict]:
    files = sorted((run / "samples").glob("[0-9]*.jsonl"))
    return [
        json.loads(line) | {"iteration": int(file.stem)} for file in files for line in file.read_text().splitlines()
    ]


def test_the_newest_iteration_is_shown_token_by_token(run, capsys):
    last = [one for one in samples(run) if one["iteration"] == samples(run)[-1]["iteration"]]

    lines = shown(capsys, run)
    headings = [line.split() for line in lines if line.endswith("  token")]
    assert len(headings) == len(last)
    assert headings[0] == ["logprob", "value", "advantage", "reward", "KL", "entropy", "token"]
    at = lines.index(next(line for line in lines if line.endswith("  token")))
    for t, token in enumerate(last[0]["tokens"]):
        cells = lines[at + 1 + t].split(maxsplit=6)
        assert cells[1] == f"{last[0]['value'][t]:.4f}" or float(cells[1]) == 0
        assert cells[-1] == json.dumps(token, ensure_ascii=False)


def test_the_best_and_the_worst_of_all_iterations_are_found(run, capsys):
    scores = sorted((one["score"] for one in samples(run)), reverse=True)

    assert [one["score"] for one in objects(capsys, run, "--best", 2)] == scores[:2]
    assert [one["score"] for one in objects(capsys, run, "--worst", 1)] == scores[-1:]
    both = objects(capsys, run, "--best", 1, "--worst", 1)
    assert [one["score"] for one in both] == [scores[0], scores[-1]]
    assert len(objects(capsys, run, "--best", 999, "--worst", 999)) == len(scores)


def test_completions_are_found_by_row_and_by_iteration(run, capsys):
    row = samples(run)[0]["row"]

    assert {one["row"] for one in objects(capsys, run, "--row", row)} == {row}
    assert {one["iteration"] for one in objects(capsys, run, "--iteration", 1)} == {1}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--row", "99999"], ["row is 99999"]),
        (["--iteration", "99"], ["iteration is 99"]),
        (["--best", "0"], ["best is 0"]),
        (["--steps", "3"], ["steps is 3", "language run"]),
    ],
)
def test_samples_that_are_not_there_are_refused(run, capsys, flags, words):
    refused(capsys, ["show", run, *flags], 2, *words)


HOSTILE = {"tokens": ["\x1b[2J\u202e", "b\nc"], "prompt": "\x1b]0;x\x07", "completion": "\x9b1m", "row": "\x1b[1m"}
HOSTILE |= {
    "value": [1.0, 2.0],
    "\x1b[3m": [0.0, 1.0],
    "score": 1.0,
    "scores": {"\x1b[4m": 2.0},
    "chosen": [True, False],
}


def test_nothing_in_a_sample_reaches_the_terminal_as_it_is(run, tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "samples/000001.jsonl").write_text(json.dumps(HOSTILE) + "\n")

    lines = shown(capsys, tmp_path)
    assert not [char for line in lines for char in line if ord(char) < 32 or 127 <= ord(char) < 160 or char == "\u202e"]
    assert lines[-2].endswith(r'"b\nc"  (not the policy' + "'s)")


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"tokens": 5}', "[" * 100_000, '{"tokens": []}\n{"tokens": ' + "9" * 5000 + "}"]
)
def test_damaged_samples_are_one_sentence(run, tmp_path, capsys, line):
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "samples/000001.jsonl").write_text(line + "\n")

    refused(capsys, ["show", tmp_path], 2, "samples of the run are damaged", "000001.jsonl")


def test_an_episode_of_control_is_shown_step_by_step(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "64", "--out", "run", *SMALL]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run", "--episodes", "1", "--json"]) == 0
    [evaluated] = json.loads(capsys.readouterr().out)["returns"]

    steps = objects(capsys, "run", "--steps", 600)
    assert sum(step["reward"] for step in steps) == evaluated == len(steps)
    assert [bool(step["end_reason"]) for step in steps] == [False] * (len(steps) - 1) + [True]
    assert all(len(step["obs"]["obs"]) == 4 and step["action"] in (0, 1) for step in steps)
    assert objects(capsys, "run", "--steps", 600) == steps
    assert objects(capsys, "run", "--episode", 1, "--steps", 600) != steps

    lines = shown(capsys, "run", "--steps", 3)
    assert lines[0].split() == ["step", "reward", "value", "action", "observation"]
    assert lines[1].split()[1] == "1.000"
    assert lines[-1] == "Episode 0: 3 steps, return 3.00, goes on after 3 steps."


def test_an_episode_without_steps_is_refused(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "64", "--out", "run", *SMALL]) == 0
    capsys.readouterr()

    refused(capsys, ["show", "run", "--steps", "0"], 2, "steps is 0")
    refused(capsys, ["show", "run", "--best", "1"], 2, "best is 1", "control run")


@pytest.mark.parametrize("verb", ["evaluate", "show"])
@pytest.mark.parametrize(
    ("other", "space"),
    [(["--env", "CartPole-v1"], "observation_space"), (["--env-options", '{"actions": 3}'], "action_space")],
)
def test_a_policy_is_not_shown_or_evaluated_in_other_spaces(here, capsys, verb, other, space):
    env = "tests.foreign_envs:TenSteps"
    assert main(["control", "ppo", "--env", env, "--steps", "64", "--out", "run", *SMALL]) == 0
    capsys.readouterr()

    refused(capsys, [verb, "run", *(["--env", env] if other[0] != "--env" else []), *other], 2, f"env has the {space}")


@pytest.mark.parametrize("verb", ["evaluate", "show"])
def test_the_best_policy_of_a_control_run_is_shown_and_evaluated(here, capsys, verb):
    flags = ["--evaluate-every", "1", "--evaluate-episodes", "2", "--steps", "64", "--out", "run", *SMALL]
    assert main(["control", "ppo", "--env", "CartPole-v1", *flags]) == 0
    before = Path("run/config.json").read_bytes()

    assert main([verb, "run/best"]) == 0
    assert Path("run/evaluation-best.json").exists() is (verb == "evaluate")
    assert not Path("run/evaluation.json").exists() and Path("run/config.json").read_bytes() == before
