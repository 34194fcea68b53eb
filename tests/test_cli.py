"""The command line: what it refuses and how, what it prints, what it leaves behind."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from understudy import load
from understudy.cli import main
from understudy.control import ppo
from understudy.distribution import Categorical
from understudy.run.installation import install_hint

SMALL = ["--num-envs", "2", "--num-steps-per-env", "8", "--hidden", "4", "--num-epochs", "1", "--quiet"]


def test_a_command_without_standard_output_ends_as_it_should(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`

    assert main(["--help"]) == 0


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with the tests' own environments importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return tmp_path


def refused(capsys, argv, code, *words):
    """The program ends with `code` and says one sentence, without a traceback, that holds all `words`."""
    assert main([str(word) for word in argv]) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert "Traceback" not in said.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


WRONG_REQUESTS = {
    "no env": ([], ["env is missing", "--env CartPole-v1"]),
    "unknown env": (["--env", "CartPole-v2x"], ["CartPole-v2x", "did you mean 'CartPole-v1'"]),
    "unknown module": (["--env", "nowhere:Thing-v0"], ["'nowhere'", "cannot be imported"]),
    "unknown flag": (["--env", "CartPole-v1", "--gama", "0.9"], ["--gama", "did you mean '--gamma'"]),
    "stray word": (["--env", "CartPole-v1", "stray"], ["stray"]),
    "flag without value": (["--env", "CartPole-v1", "--gamma"], ["--gamma"]),
    "not a number": (["--env", "CartPole-v1", "--steps", "many"], ["steps is 'many'", "whole number"]),
    "nan": (["--env", "CartPole-v1", "--gamma", "nan"], ["gamma is nan", "finite"]),
    "infinite": (["--env", "CartPole-v1", "--learning-rate", "inf"], ["learning_rate is inf", "finite"]),
    "above its range": (["--env", "CartPole-v1", "--gamma", "1.5"], ["gamma is 1.5", "between 0 and 1"]),
    "below its range": (["--env", "CartPole-v1", "--num-envs", "0"], ["num_envs is 0", "between 1 and 1e+06"]),
    "above what float32 holds": (["--env", "CartPole-v1", "--clip", "1e40"], ["clip is 1e+40", "1.7e+38"]),
    "a timeout beyond the clock": (["--env", "CartPole-v1", "--step-timeout", "1e300"], ["step_timeout is 1e+300"]),
    "more threads than any machine has": (["--env", "CartPole-v1", "--num-threads", "2147483648"], ["threads", "1024"]),
    "unknown device": (["--env", "CartPole-v1", "--device", "banana"], ["device is 'banana'", "try cpu"]),
    "a device that holds nothing": (["--env", "CartPole-v1", "--device", "meta"], ["device is 'meta'", "try cpu"]),
    "no device": (["--env", "CartPole-v1", "--device="], ["device is ''", "try cpu"]),
    "a device too many": (["--env", "CartPole-v1", "--device", "cuda:99"], ["device is 'cuda:99'", "try cpu"]),
    "a network beyond memory": (["--env", "CartPole-v1", "--hidden", "1000000", "1000000"], ["memory", "hidden"]),
    "too long a name": (["--env", "CartPole-v1", "--init-from", "a" * 5000], ["aaa", "too long"]),
    "more minibatches than steps": (
        ["--env", "CartPole-v1", "--num-minibatches", "2049"],
        ["minibatches is 2049", "128"],
    ),
    "a step of any size": (["--env", "CartPole-v1", "--learning-rate", "1e30"], ["learning_rate", "up to 1000"]),
    "copies beyond memory": (["--env", "CartPole-v1", "--num-envs", "1e12"], ["num_envs is 1000000000000"]),
    "a render mode that is no word": (["--env", "CartPole-v1", "--env-options", '{"render_mode": 5}'], ["render_mode"]),
    "at an open end": (["--env", "CartPole-v1", "--clip", "0"], ["clip is 0.0", "above 0"]),
    "no such choice": (["--env", "CartPole-v1", "--rnn-type", "elephant"], ["elephant", "gru"]),
    "options that are no JSON": (["--env", "CartPole-v1", "--env-options", "{x"], ["env_options", "JSON"]),
    "options the env has not": (["--env", "CartPole-v1", "--env-options", '{"x": 1}'], ["env_options", "'x'"]),
    "unknown wrapper": (["--env", "CartPole-v1", "--wrappers", "FrameStack"], ["FrameStack", "did you mean"]),
    "wrapper without arguments": (
        ["--env", "CartPole-v1", "--wrappers", "FrameStackObservation"],
        ["FrameStackObservation", "stack_size"],
    ),
    "unknown preset": (["--env", "CartPole-v1", "--preset", "zoo"], ["preset is 'zoo'", "cleanrl"]),
    "init without a policy": (["--env", "CartPole-v1", "--init-from", "."], ["init_from is '.'", "holds no policy"]),
    "missing config file": (["--config", "none.yaml"], ["config is 'none.yaml'", "cannot be read"]),
    "no native vector env": (["--env", "Acrobot-v1", "--vectorization", "native"], ["'native'", "use sync"]),
    "integer Box": (["--env", "badly_behaved:IntegerBox"], ["Box of int32", "MultiDiscrete"]),
    "unsupported observation": (["--env", "badly_behaved:Talks"], ["Text", "not supported"]),
    "observation of a wrong shape": (["--env", "badly_behaved:WrongShape"], ["observation_space", "(3,)", "(2,)"]),
    "observation out of bounds": (["--env", "badly_behaved:OutOfBounds"], ["observation[0] is 7", "-1 to 1"]),
    "reward that is nan at once": (["--env", "badly_behaved:NanRewardAtOnce"], ["reward nan", "finite"]),
    "env that raises at once": (["--env", "badly_behaved:RaisesAtOnce"], ["the simulator is not there", "mend it"]),
}


@pytest.mark.parametrize("case", WRONG_REQUESTS)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(here, capsys, case):
    flags, words = WRONG_REQUESTS[case]

    refused(capsys, ["control", "ppo", "--quiet", *flags], 2, *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["contrl"], ["verb is 'contrl'", "did you mean 'control'"]),
        (["control", "pop"], ["recipe is 'pop'", "did you mean 'ppo'"]),
        (["evaluate", "nothing-here"], ["nothing-here", "config.json"]),
        (["compare", "nothing-here"], ["nothing-here", "config.json"]),
        (["evaluate"], ["run", "--help"]),
        (["control", "reinforce", "--env", "CartPole-v1", "--preset", "cleanrl"], ["cleanrl", "reinforce"]),
        (
            ["control", "reinforce", "--env", "CartPole-v1", "--baseline", "group", "--group-size", "1"],
            ["group_size is 1", "2 or more"],
        ),
        (
            ["control", "reinforce", "--env", "CartPole-v1", "--baseline", "group", "--num-envs", "6"],
            ["num_envs is 6", "multiple of group_size 4"],
        ),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_right_one(here, capsys, argv, words):
    refused(capsys, argv, 2, *words)


MISSING = {
    "Box2D": ["--env", "LunarLander-v3"],
    "mujoco": ["--env", "HalfCheetah-v5"],
    "envpool": ["--env", "CartPole-v1", "--vectorization", "envpool"],
    "moviepy": ["--env", "CartPole-v1", "--video"],
}


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_extra_is_named_with_its_pip_line(here, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package or "mujoco" in name or "box2d" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    extra = {"Box2D": "box2d", "moviepy": "video"}.get(package, package)

    refused(capsys, ["control", "ppo", "--quiet", "--steps", "32", *MISSING[package]], 2, install_hint(extra))
    assert not Path("runs").exists()


@pytest.mark.parametrize("sink", ["tensorboard", "wandb", "trackio"])
def test_a_missing_sink_is_named_with_its_pip_line(here, capsys, sink):
    if importlib.util.find_spec(sink):
        pytest.skip(f"{sink} is installed")

    refused(capsys, ["control", "ppo", "--env", "CartPole-v1", "--quiet", "--log", sink], 2, install_hint(sink))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("NanObservationLater", ["observation", "not finite", "env 0", "after 4 steps"]),
        ("NanRewardLater", ["reward is nan", "env 0", "episode 0"]),
        (
            "RaisesLater",
            [
                "the simulator went away; in badly_behaved.py, line 76; the traceback is in 'run/events.jsonl'",
                "`understudy resume run` goes on from checkpoint 000003",
            ],
        ),
    ],
)
def test_an_env_that_fails_later_ends_the_run_with_1_and_keeps_what_was_saved(here, capsys, env, words):
    flags = ["--checkpoint-every", "1", "--num-envs", "2", "--num-steps-per-env", "1", "--num-minibatches", "1"]
    flags += ["--compile", "off", "--out", "run"]

    refused(capsys, ["control", "ppo", "--quiet", "--env", f"badly_behaved:{env}", *flags], 1, *words)
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["000001", "000002", "000003"]
    failed = json.loads(Path("run/events.jsonl").read_text().splitlines()[-1])
    assert failed["kind"] == "failed"
    assert "Traceback" in failed["traceback"]


SILENT = {
    "RaisesSilentlyLater": ("sync", "StopIteration was raised within an iteration"),
    "RaisesGeneratorExitLater": ("sync", "GeneratorExit was raised within an iteration"),
    "RaisesMemoryErrorLater": ("sync", "memory ran out (MemoryError): lower num_envs (now 2)"),
    "EndsItsProcessLater": ("async", "the process of copy 0 has ended (exit code 7)"),
}


@pytest.mark.parametrize("env", SILENT)
def test_an_env_that_fails_without_a_word_is_explained(here, capsys, env):
    vectorization, said = SILENT[env]
    flags = ["--checkpoint-every", "1", "--num-envs", "2", "--num-steps-per-env", "1", "--num-minibatches", "1"]
    flags += ["--compile", "off", "--out", "run", "--vectorization", vectorization]
    place = "in badly_behaved.py, line 85" if vectorization == "sync" else "vectorization to fault_tolerant"

    words = [said, place, "`understudy resume run` goes on from", "000003"]
    refused(capsys, ["control", "ppo", "--quiet", "--env", f"badly_behaved:{env}", *flags], 1, *words)
    assert not Path("run/policy").exists()
    failed = json.loads(Path("run/events.jsonl").read_text().splitlines()[-1])
    assert failed["kind"] == "failed" and "Traceback" in failed["traceback"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("RaisesWhenClosed", ["raises RuntimeError when it is closed: the window was gone", "badly_behaved.py, line"]),
        ("RaisesGeneratorExitAtOnce", ["raises GeneratorExit in its first steps", "badly_behaved.py, line"]),
    ],
)
def test_an_env_that_fails_in_preflight_is_refused_by_its_line(here, capsys, env, words):
    refused(capsys, ["control", "ppo", "--env", f"badly_behaved:{env}", *SMALL, "--out", "run"], 2, *words)
    assert not Path("run").exists()


def test_an_env_that_fails_when_a_run_closes_it_leaves_the_run_whole(here, capsys):
    argv = ["control", "ppo", "--env", "badly_behaved:RaisesWhenClosedLater", *SMALL, "--steps", "16", "--out", "run"]
    assert main(argv) == 0
    assert "raises RuntimeError when it is closed: the window was gone" in capsys.readouterr().err
    assert Path("run/policy/policy.json").exists()


def test_an_env_that_fails_in_evaluation_is_named_by_its_line(here, capsys):
    assert main(["control", "ppo", "--env", "badly_behaved:Plain", *SMALL, "--steps", "16", "--out", "run"]) == 0
    capsys.readouterr()
    argv = ["evaluate", "run", "--env", "badly_behaved:RaisesGeneratorExitLater"]
    refused(capsys, argv, 1, "GeneratorExit", "in badly_behaved.py, line 85")


def test_a_run_is_never_written_over(here, capsys):
    flags = ["control", "ppo", "--env", "CartPole-v1", "--steps", "32", "--out", "run", *SMALL]
    assert main(flags) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()

    refused(capsys, flags, 2, "output_dir is 'run'", "holds a run already")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_run_ends_with_what_to_type_next(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "64", "--out", "run", *SMALL]) == 0

    assert capsys.readouterr().out.splitlines()[-1] == "Next: understudy evaluate run"


def test_a_run_leaves_the_directory_the_contract_names(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "64", "--out", "run", *SMALL]) == 0

    assert {path.name for path in Path("run").iterdir()} >= {"config.json", "metrics.jsonl", "checkpoints", "policy"}
    config = json.loads(Path("run/config.json").read_text())["config"]
    assert (config["env"], config["num_envs"], config["preset"], config["gamma"]) == ("CartPole-v1", 2, "tuned", 0.98)
    assert not [path for path in Path("run").rglob("*") if path.suffix in (".pt", ".pth", ".pkl")]


def test_the_last_line_of_json_output_is_the_summary(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "64", "--out", "run", "--json", *SMALL]) == 0

    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(summary) == {
        *("run", "steps", "seconds", "train_seconds", "startup_seconds", "episode_return_mean", "solved_at"),
    }
    assert (summary["run"], summary["steps"], summary["solved_at"]) == ("run", 64, None)


def test_flags_override_the_config_file_which_overrides_the_preset(here, capsys):
    Path("c.yaml").write_text("env: CartPole-v1\ngamma: 0.9\nhidden: [4]\nlam: 0.5\n")

    assert (
        main(["control", "ppo", "--config", "c.yaml", "--gamma", "0.8", "--steps", "32", "--quiet", "--out", "r"]) == 0
    )
    config = json.loads(Path("r/config.json").read_text())["config"]
    assert (config["gamma"], config["lam"], config["hidden"], config["num_epochs"]) == (0.8, 0.5, [4], 4)


def test_an_unknown_field_in_the_config_file_is_refused_with_the_nearest(here, capsys):
    Path("c.yaml").write_text("env: CartPole-v1\nnum_step_per_env: 3\n")

    refused(capsys, ["control", "ppo", "--config", "c.yaml"], 2, "'num_step_per_env'", "num_steps_per_env")


def test_evaluate_writes_what_compare_reads(here, capsys):
    for seed in "12":
        flags = ["--env", "CartPole-v1", "--steps", "32", "--seed", seed, "--out", seed, *SMALL]
        assert main(["control", "ppo", *flags]) == 0
        assert main(["evaluate", seed, "--episodes", "3"]) == 0
    capsys.readouterr()

    assert main(["compare", "1", "2", "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert (group["seeds"], group["measure"]) == ([1, 2], "evaluation return")
    assert group["scores"][0] == sum(json.loads(Path("1/evaluation.json").read_text())["returns"]) / 3


def test_evaluate_gives_the_same_returns_every_time(here, capsys):
    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "32", "--out", "run", *SMALL]) == 0
    capsys.readouterr()

    said = []
    for _ in range(2):
        assert main(["evaluate", "run", "--episodes", "3", "--sample", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["returns"])
    assert said[0] == said[1]


def test_a_network_of_ones_own_is_named_in_commands(here, capsys):
    network = Actor().eval()
    fields = {
        "env": "CartPole-v1",
        "num_envs": 2,
        "num_steps_per_env": 8,
        "num_minibatches": 1,
        "num_epochs": 1,
        "quiet": True,
    }
    ppo.train(ppo.Config(**fields, steps=16, output_dir="run"), policy=network)

    refused(capsys, ["evaluate", "run"], 2, "policy is missing", "--policy my_net.py:MyNet")
    named = ["--policy", "test_cli:Actor"]
    assert main(["evaluate", "run", "--episodes", "2", *named]) == 0
    assert main(["show", "run", "--steps", "1", *named]) == 0
    assert capsys.readouterr().out.startswith("2 episodes, mode actions: return ")
    refused(capsys, ["resume", "run", "--steps", "32"], 2, "began with a network of your own", "--policy my_net.py")
    assert main(["resume", "run", "--steps", "32", *named]) == 0
    assert "32 steps" in capsys.readouterr().out
    refused(capsys, ["evaluate", "run", "--policy", "test_cli:Path"], 2, "makes a", "must make a torch.nn.Module")
    refused(capsys, ["evaluate", "run", "--policy", "test_cli:Actr"], 2, "did you mean 'Actor'?")


class Actor(torch.nn.Linear):
    """A network of someone's own, for CartPole."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, obs):
        found = super().forward(obs)
        return Categorical.of(found[..., :2]), found[..., 2]


def test_a_file_without_a_class_is_refused_with_its_classes(here, capsys):
    Path("mine.py").write_text(
        "raise SystemExit\nclass Cart:\n    pass\nclass _Own:\n    pass\nclass Pole:\n    pass\n"
    )

    for env in ("mine.py", "mine.py:"):
        refused(capsys, ["control", "ppo", "--env", env], 2, "write mine.py:CLASS; it has Cart, Pole")
    refused(capsys, ["control", "ppo", "--env", "none.py"], 2, "there is no file 'none.py'", "FILE.py:CLASS")


def test_evaluate_imports_no_code_that_only_the_run_names(here, capsys):
    flags = ["--env", "badly_behaved:Plain", "--steps", "32", "--out", "run", *SMALL]
    assert main(["control", "ppo", *flags]) == 0
    assert main(["evaluate", "run", "--episodes", "2"]) == 0  # the user's own run, the code as it was
    capsys.readouterr()
    lineage = Path("run/lineage.json")
    lineage.write_text(lineage.read_text().replace('"signature": "', '"signature": "0'))  # somebody else's

    refused(capsys, ["evaluate", "run"], 2, "badly_behaved:Plain", "--env")
    assert main(["evaluate", "run", "--env", "badly_behaved:Plain", "--episodes", "2"]) == 0


def test_every_field_is_a_flag_with_a_line_of_help(here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["control", "ppo", "--help"])

    assert stop.value.code == 0
    said = re.sub(r"[^\S\n]+", " ", capsys.readouterr().out)
    for flag in ("--env", "--gamma", "--learning-rate", "--preset", "--device", "--target-kl", "--evaluate-every"):
        assert flag in said
    assert "Discount per step" in said


def test_help_answers_without_torch_in_half_a_second():
    before = os.times()
    said = subprocess.run([sys.executable, "-m", "understudy", "--help"], capture_output=True, text=True, check=True)
    after = os.times()

    assert "understudy control ppo" in said.stdout
    # processor time: wall time depends on who else is running
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


def test_interrupting_saves_the_policy_and_exits_130(here, capsys, monkeypatch):
    from understudy.control.training import TrainingRun

    report = TrainingRun.finish_iteration

    def interrupted(self, metrics):
        if self.iteration == 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield from report(self, metrics)

    monkeypatch.setattr(TrainingRun, "finish_iteration", interrupted)

    assert main(["control", "ppo", "--env", "CartPole-v1", "--steps", "999", "--out", "run", *SMALL]) == 130
    assert load("run").action_space.n == 2
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["000002"]
    stopped = "understudy: stopped; `understudy resume run` goes on from checkpoint 000002"
    assert capsys.readouterr().err.splitlines()[-1] == stopped
