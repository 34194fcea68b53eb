"""Runs of other people: arguments of known wrappers and environments that would write files, take memory or hang."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium.wrappers
import pytest

import understudy
from understudy.cli import main
from understudy.control import ppo
from understudy.run import trust
from understudy.run.config import RequestError
from understudy.run.foreign import SAFE_WRAPPERS, restricted_settings

CONFIG: dict[str, Any] = {
    "env": "CartPole-v1",
    "num_envs": 1,
    "num_steps_per_env": 8,
    "num_epochs": 1,
    "steps": 8,
    "quiet": True,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "run"
    ppo.train(ppo.Config(output_dir=str(path), **CONFIG))
    return path


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "run"))


def reconfigure(run: Path, **fields) -> None:
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(about | {"config": about["config"] | fields}))


WRITES = "RecordVideo video_folder=anywhere"
ASKED = {
    "a folder": {"wrappers": [WRITES]},
    "a folder, by its module": {"wrappers": ["gymnasium.wrappers:RecordVideo video_folder=anywhere"]},
    "a folder, further down": {"wrappers": ["gymnasium.wrappers.rendering:RecordVideo video_folder=anywhere"]},
    "a window": {"wrappers": ["HumanRendering"]},
    "a stack of gigabytes": {"wrappers": ["FrameStackObservation stack_size=100000000"]},
    "a stack that is negative": {"wrappers": ["FrameStackObservation stack_size=-100000000"]},
    "stacks on each other": {
        "wrappers": ["FrameStackObservation stack_size=16", "FrameStackObservation stack_size=16"]
    },
    "a picture of gigabytes": {"wrappers": ["ResizeObservation shape=[100000,100000]"]},
    "a list of lists": {"wrappers": ["ResizeObservation shape=[[1,2],[3]]"]},
    "no number": {"wrappers": ["DelayObservation delay=.inf"]},
    "another argument": {"wrappers": ["TimeLimit max_episode_steps=10 folder=x"]},
    "an episode without end": {"wrappers": ["TimeLimit max_episode_steps=1000000000000"]},
    "a word as a number": {"wrappers": ["DelayObservation delay=x"]},
    "a path as a word": {"wrappers": ["FrameStackObservation stack_size=2 padding_type=/etc/passwd"]},
    "nothing": {"wrappers": [""]},
    "a file of the environment": {"env_options": {"xml_file": "/etc/passwd"}},
    "a file above": {"env_options": {"x": {"y": ["..\\up"]}}},
    "a large world": {"env_options": {"size": 10**9}},
    "a large world, below": {"env_options": {"x": [{"size": -1e9}]}},
    "a deep option": {"env_options": {"x": [[[[[[[[[[1]]]]]]]]]]}},
    "many options": {"env_options": {"x": [0] * 20_000}},
    "environments": {"num_envs": 10**9},
    "rows": {"num_steps_per_env": 10**12},
    "threads": {"num_threads": 2**31},
}


@pytest.mark.parametrize("fields", ASKED.values(), ids=ASKED)
def test_arguments_that_reach_files_or_memory_are_refused_of_anybodys_run(fields, run, capsys):
    reconfigure(run, **fields)

    [field] = fields
    for verb in (["evaluate", str(run), "--episodes", "1"], ["resume", str(run), "--steps", "16"]):
        assert main(verb) == 2
        said = capsys.readouterr().err
        assert f"has {field} " in said and "not known to be yours" in said
    assert not Path("anywhere").exists()


@pytest.mark.parametrize("spec", ["regex:(a+)+$", "regex:x*0.5"])
def test_a_pattern_of_anybodys_run_is_refused(spec, run):
    with pytest.raises(RequestError, match=r"has reward 'regex:.*a pattern that may take for ever"):
        trust.require_trusted_code(run, {"reward": [spec]})
    trust.require_trusted_code(run, {"reward": [spec]}, overridden={"reward"})


ALLOWED = {
    "wrappers": ("TimeLimit max_episode_steps=20", "TimeAwareObservation", "FrameStackObservation stack_size=4"),
    "env_options": {"sutton_barto_reward": True},
}


def test_ordinary_arguments_of_anybodys_run_are_allowed(tmp_path):
    run = ppo.train(ppo.Config(output_dir=str(tmp_path / "run"), **CONFIG, **ALLOWED)).path
    lineage = json.loads((run / "lineage.json").read_text())
    assert "vouched" not in lineage

    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert understudy.resume(run, steps=16).metrics[-1]["steps"] == 16


def test_the_users_own_run_may_have_any_arguments(tmp_path):
    fields = {"wrappers": ("FrameStackObservation stack_size=20",), "env_options": {"render_mode": None}}
    run = ppo.train(ppo.Config(output_dir=str(tmp_path / "run"), **CONFIG, **fields)).path

    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert understudy.resume(run, steps=16).metrics[-1]["steps"] == 16
    reconfigure(run, wrappers=["FrameStackObservation stack_size=21"])
    assert main(["evaluate", str(run), "--episodes", "1"]) == 2


def test_arguments_that_the_user_names_are_the_users(run):
    reconfigure(run, env_options={"render_mode": "/x"}, wrappers=[WRITES])

    words = ["evaluate", str(run), "--episodes", "1", "--env-options", "{}", "--wrappers"]
    assert main(words) == 0
    assert understudy.resume(run, steps=16, wrappers=(), env_options={}).metrics[-1]["steps"] == 16


def test_all_wrappers_of_the_list_are_gymnasiums_with_their_arguments():
    for name, arguments in SAFE_WRAPPERS.items():
        known = inspect.signature(getattr(gymnasium.wrappers, name)).parameters
        assert arguments.keys() <= known.keys(), name
        assert not {"func", "video_folder", "episode_trigger"} & arguments.keys()


def test_two_values_of_a_field_vouch_for_themselves_alone():
    long = {"x": "/" + "a" * 300}
    texts = {one.text for options in (long, long | {"y": 1}) for one in restricted_settings({"env_options": options})}

    assert len(texts) == 2


def nested(depth: int) -> dict:
    tree: dict = {}
    for _ in range(depth):
        tree = {"x": tree}
    return tree


def doubled(times: int) -> list:
    tree: list = [0]
    for _ in range(times):
        tree = [tree, tree]
    return tree


@pytest.mark.parametrize("options", [nested(5000), nested(33), {"x": doubled(40)}, {"x": [0] * 100_001}])
def test_options_that_are_deep_or_double_themselves_are_refused(options):
    with pytest.raises(
        RequestError, match=r"env_options is .*must be nested at most 32 deep, with at most 100,000 entries"
    ):
        ppo.Config(**CONFIG, env_options=options)


def test_options_as_deep_and_large_as_they_may_be_are_taken():
    ppo.Config(**CONFIG, env_options=nested(32) | {"y": [0] * 99_000})


@pytest.mark.parametrize("field", ["steps", "seed", "learning_rate", "num_envs"])
def test_a_number_of_thousands_of_digits_is_refused_without_being_written_out(field):
    with pytest.raises(RequestError, match=f"{field} is of type int: must be a (whole|finite) number") as found:
        ppo.Config(**CONFIG | {field: 10**5000})
    assert len(str(found.value)) < 200
