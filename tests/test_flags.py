"""Flags, YAML files and help pages of the command line."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.test_cli import SMALL, here, refused
from understudy import control, language
from understudy.cli import main
from understudy.cli.control import RECIPES as CONTROL
from understudy.cli.flags import parse_flags, parse_number, read_config_file, unescaped
from understudy.cli.help import GROUPS, field_docs, group_of
from understudy.cli.language import RECIPES as LANGUAGE
from understudy.cli.language import REWARDS, _configure
from understudy.cli.peers import PEERS
from understudy.control.ppo import Config
from understudy.language.rewards.reward_sum import BUILTINS
from understudy.run.config import RequestError
from understudy.run.installation import version

__all__ = ["here"]  # a fixture
RECIPE_CONFIGS = [getattr(control, name).Config for name in CONTROL.values()]
RECIPE_CONFIGS += [getattr(language, name).Config for name in LANGUAGE.values()]


DOUBLED = "env_options:\n  a0: &a0 [1, 1]\n" + "".join(f"  a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


def flags(*argv: str) -> dict:
    return parse_flags(Config, list(argv), prog="understudy control ppo")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e5", 100_000), ("1E5", 100_000), ("2.5e3", 2500), ("100.0", 100), ("1_000", 1000), ("-3", -3), ("0", 0)],
)
def test_a_whole_number_may_be_written_as_a_float(text, number):
    assert flags("--steps", text) == {"steps": number}
    assert type(flags("--steps", text)["steps"]) is int


@pytest.mark.parametrize("text", ["1.5", "1e-1", "1e400", "nan", "many", "", "9" * 5000])
def test_what_is_no_whole_number_is_none(text):
    assert parse_number(int, text) is None


def test_flags_become_fields_of_their_types():
    found = flags(
        *("--gamma=0.9", "--num_envs", "2", "--no-orthogonal", "--shared", "--hidden", "8", "4", "--log", "wandb"),
        *(
            "--log-std",
            "-1e-3",
            "--env-options",
            '{"a": [1]}',
            "--out",
            "none",
            "--rnn-type",
            "gru",
            "--log",
            "trackio",
        ),
    )

    assert found == {
        **{"gamma": 0.9, "num_envs": 2, "orthogonal": False, "shared": True, "hidden": (8, 4)},
        **{
            "log_std": -0.001,
            "env_options": {"a": [1]},
            "output_dir": None,
            "rnn_type": "gru",
            "log": ("wandb", "trackio"),
        },
    }


def test_yaml_numbers_are_read_as_flags_are(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 1e5\nlearning-rate: 3e-4\nhidden: 64\nnum_envs: 2.0\nstop_at_return: 1e2\nseed: 7\n")

    assert read_config_file(Config, ["--config", str(file), "--quiet"]) == (
        {
            **{"steps": 100_000, "learning_rate": 3e-4, "hidden": (64,), "num_envs": 2},
            **{"stop_at_return": 100.0, "seed": 7},
        },
        ["--quiet"],
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 1.5", ["steps is 1.5", "whole number"]),
        ("steps: true", ["steps is True", "whole number"]),
        ("env_options: {day: 2020-01-01}", ["2020", "JSON"]),
        ("env_options: {g: .inf}", ["env_options is {'g': inf}", "not finite"]),
        ("env_options: {g: 0x" + "f" * 5000 + "}", ["config has a field that is of type dict", "JSON"]),
        ("steps: 0x" + "f" * 5000, ["steps is of type int", "whole number below 2^63"]),
        ("learning_rate: " + "1" * 5000, ["cannot be read as YAML"]),
        ("learning_rate: 1e999", ["learning_rate is inf", "finite"]),
        ("output_dir: 5", ["output_dir is 5", "str"]),
        ("1: 2", ["config", "1 is no field"]),
        ("- env", ["holds a list"]),
        ("env: [", ["cannot be read as YAML"]),
        ("env_options: " + "{a: " * 5000 + "1" + "}" * 5000, ["config"]),
        (DOUBLED, ["nests"]),
        ("env_options: &a {b: *a}", ["nests"]),
    ],
)
def test_a_yaml_file_of_other_values_is_refused_in_a_sentence(here, capsys, text, words):
    Path("c.yaml").write_text(text)

    refused(capsys, ["control", "ppo", "--config", "c.yaml", "--env", "CartPole-v1"], 2, *words)


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def large(path: Path) -> Path:
    path.write_text("a: " + "x" * 1_000_001)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: "/dev/zero", ["/dev/zero", "plain file"]),
        (fifo, ["plain file"]),
        (lambda path: path.parent, ["plain file"]),
        (large, ["1,000,000"]),
        (lambda path: "", ["has no value"]),
        (lambda path: "a\0b", ["cannot be read"]),
    ],
    ids=["device", "fifo", "directory", "large", "nothing", "nul"],
)
def test_config_must_be_a_plain_file_of_bounded_size(here, capsys, make, words):
    file = str(make(here / "c.yaml"))
    argv = ["control", "ppo", "--config", *([file] if file else [])]

    refused(capsys, argv, 2, *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lineage", "run", "--verfy"], ["--verfy", "did you mean '--verify'"]),
        (["compare", "run", "--jsn"], ["--jsn", "did you mean '--json'"]),
        (["generate", "run", "--promt", "x"], ["--promt", "did you mean '--prompt'"]),
        (["rehearse", "--sed", "1"], ["--sed", "did you mean '--seed'"]),
        (["language", "sft", "--modl", "x"], ["--modl", "did you mean '--model'"]),
        (["control", "ppo", "--no-gamma"], ["--no-gamma"]),
        (["control", "ppo", "--env", "CartPole-v1", "--shared", "yes"], ["'yes'"]),
        (["control", "ppo", "--env-options", "[" * 100_000], ["env_options", "JSON"]),
        (["control", "ppo", "--env", "CartPole-v1", "--env-options", '{"g": 1e999}'], ["env_options is", "not finite"]),
        (["control", "ppo", "--env", "CartPole-v1", "--env-options", f'{{"g": {10**400}}}'], ["env_options", "digits"]),
        (["control", "ppo", "--env", "CartPole-v1", "--steps", "1" * 5000], ["steps", "whole number"]),
        (["language", "sft", "--model", "x", "--data", "y", "--columns", "a=b", "a=c"], ["a=b a=c", "twice"]),
        (["control", "ppo", "--env-options", "[1]"], ["env_options", "JSON object"]),
        (["control", "ppo", "--rnn-type", "gruu"], ["rnn_type is 'gruu'", "did you mean 'gru'"]),
    ],
)
def test_a_wrong_flag_of_any_command_is_named_with_the_nearest(here, capsys, argv, words):
    refused(capsys, argv, 2, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--episods", "2"], ["--episods", "did you mean '--episodes'"]),
        (["--episodes", "2.5"], ["episodes", "2.5", "whole number"]),
    ],
)
def test_a_wrong_flag_of_evaluate_is_named(here, capsys, flags, words):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "16", "--out", "run", *SMALL]) == 0
    capsys.readouterr()

    refused(capsys, ["evaluate", "run", *flags], 2, *words)


def test_every_field_of_every_recipe_has_a_line_and_a_group():
    for config in RECIPE_CONFIGS:
        docs = field_docs(config)
        for name in config.__dataclass_fields__:
            assert docs[name], name
            assert group_of(name) in GROUPS


def helped(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_help_shows_the_defaults_of_the_preset_that_will_be_used(here, capsys):
    page = helped(capsys, "control", "ppo", "--env", "CartPole-v1")
    other = helped(capsys, "control", "ppo")

    assert "preset tuned for CartPole-v1" in page
    assert "Discount per step. (default: 0.98)" in page
    assert "Discount per step. (default: 0.99)" in other
    assert "Discount per step. (default: 0.5)" in helped(capsys, "control", "ppo", "--gamma", "0.5")


def test_help_of_a_language_recipe_names_data_columns_and_builtin_rewards(here, capsys):
    page = helped(capsys, "language", "grpo")

    assert all(f" {name}" in REWARDS for name in BUILTINS)
    assert re.sub(r"\s+", " ", REWARDS).strip() in page
    assert "prompt text, or a list of messages" in page
    assert "chosen, rejected" in helped(capsys, "language", "dpo")
    headings = ["model:", "data:", "sampling:", "reward:", "optimisation:", "run, evaluation and logging:", "example:"]
    assert sorted(headings, key=page.index) == headings


def test_help_of_control_says_how_actions_are_masked(here, capsys):
    assert 'info["action_mask"]' in helped(capsys, "control", "reinforce")


@pytest.fixture
def unread(monkeypatch):
    """A function that makes standard output or error a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    yield lambda name: monkeypatch.setattr(sys, name, stream)
    with contextlib.suppress(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["evaluate", "run", "--episodes", "1"],
        ["evaluate", "run", "--episodes", "1", "--json"],
        ["compare", "run"],
        ["lineage", "run"],
        ["resume", "run", "--steps", "64"],
        ["control", "ppo", "--env", "CartPole-v1", "--steps", "32", "--out", "other", *SMALL],
    ],
)
def test_a_command_whose_reader_has_ended_ends_quietly(here, capsys, unread, argv):
    if argv:
        assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "32", "--out", "run", *SMALL]) == 0
    capsys.readouterr()
    unread("stdout")

    assert main(argv) == 141
    assert capsys.readouterr().err == ""
    sys.stdout.close()  # nothing is left to be written


def test_help_whose_reader_has_ended_ends_quietly(here, capsys, unread):
    unread("stdout")

    assert main(["control", "ppo", "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_a_run_whose_progress_nobody_reads_goes_on_to_its_end(here, unread):
    unread("stderr")
    loud = [flag for flag in SMALL if flag != "--quiet"]

    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "64", "--out", "run", *loud]) == 0
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["steps"] == 64


def test_a_whole_float_in_a_python_config_is_a_whole_number():
    config = Config(env="CartPole-v1", steps=1e5, stop_at_return=1e2)  # pyright: ignore[reportArgumentType]

    assert (config.steps, type(config.steps), type(config.stop_at_return)) == (100_000, int, float)
    with pytest.raises(RequestError, match=r"^steps is 1\.5: must be a whole number"):
        Config(env="CartPole-v1", steps=1.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("own", PEERS)
def test_what_other_libraries_call_a_field_leads_to_fields_of_ours(own):
    known = {field for config in RECIPE_CONFIGS for field in config.__dataclass_fields__}

    assert set(own.split()) <= known


@pytest.mark.parametrize(
    ("recipe", "flag", "own"),
    [
        (control.ppo, "--lr", "--learning-rate, Adam's step size at the start"),
        (control.ppo, "--total-timesteps", "--steps"),
        (control.ppo, "--n-steps", "--num-steps-per-env"),
        (control.ppo, "--batch-size", "--num-minibatches"),
        (control.ppo, "--clip-range", "--clip"),
        (language.sft, "--per-device-train-batch-size", "--batch-size"),
        (language.grpo, "--kl-coef", "--kl-reference-coef"),
        (language.grpo, "--num_generations", "--group-size"),
    ],
)
def test_a_flag_of_another_library_is_answered_with_ours(recipe, flag, own):
    with pytest.raises(RequestError, match=f"is not a flag of `it`: here it is {own}"):
        parse_flags(recipe.Config, [flag, "1"], prog="it")


def test_a_field_of_another_library_in_a_file_is_answered_with_ours(tmp_path):
    (tmp_path / "own.yaml").write_text("n_steps: 128\n")

    with pytest.raises(RequestError, match="'n_steps' is no field of this recipe: here it is num_steps_per_env"):
        read_config_file(control.ppo.Config, ["--config", str(tmp_path / "own.yaml")])


def test_a_name_of_another_library_that_a_recipe_lacks_gets_the_nearest():
    with pytest.raises(RequestError, match=r"--n-steps is not a flag of `it`; did you mean"):
        parse_flags(language.sft.Config, ["--n-steps", "1"], prog="it")


def test_escapes_in_a_stop_of_the_command_line_are_read_and_others_stay():
    assert [*map(unescaped, ["\\n\\n", "a\\tb", "\\\\n", "\\boxed", "###"])] == [
        "\n\n",
        "a\tb",
        "\\n",
        "\\boxed",
        "###",
    ]
    assert _configure(language.sft.Config, ["--model", "m", "--data", "d", "--stop", r"\n\n"], prog="it").stop == (
        "\n\n",
    )


def test_help_of_evaluate_is_of_both_worlds(capsys):
    assert main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Control runs:" in text and "--episodes" in text
    assert "Language runs:" in text and "--evaluation-data" in text


def test_the_program_says_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"understudy {version()}\n"


def test_the_help_of_rewards_has_each_flag_once():
    assert REWARDS.count("--fail-if-worse") == 1
