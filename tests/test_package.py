"""The package as it is installed: few dependencies, each with a reason, and public names in order."""

import re
import tomllib
from pathlib import Path

import pytest

import understudy
from tests.rehearsed import furnish, ppo_config, reward_config, sft_config
from understudy.control import ppo as control
from understudy.language import ppo, reward_model, sft

BOTH = {"iteration", "steps", "seconds", "steps_per_second", "seconds_left", "epochs", "optimizer_steps"}
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_core_has_at_most_twelve_direct_dependencies():
    assert len(PROJECT["dependencies"]) <= 12


def test_every_dependency_has_its_reason_in_decisions():
    decisions = (ROOT / "docs" / "decisions.md").read_text()
    for requirement in PROJECT["dependencies"]:
        name = re.split(r"[<>=]", requirement)[0]
        assert f"| {name} |" in decisions, name


def test_public_names_are_sorted_and_there():
    assert understudy.__all__ == sorted(understudy.__all__)
    assert all(hasattr(understudy, name) for name in understudy.__all__)


def test_every_metric_of_a_ppo_run_is_explained(tmp_path):
    config = control.Config(
        env="CartPole-v1", num_envs=2, num_steps_per_env=8, steps=16, evaluate_every=1, evaluate_episodes=1, quiet=True
    )
    run = control.train(
        control.Config(**(vars(config) | {"objective": "penalty", "output_dir": str(tmp_path / "run")}))
    )
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text()))

    assert set(run.metrics[0]) <= explained


@pytest.fixture(scope="module")
def explained() -> set[str]:
    return set(re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text().partition("## Language models")[2]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def unexplained(run, explained: set[str]) -> set[str]:
    """Metrics of a run that the language section does not name; those that both worlds have are in the first table."""
    names = {re.sub("_(low|high)$", "", name) for line in run.metrics for name in line}
    return names - explained - BOTH


def test_every_metric_of_sft_is_explained(home, explained, tmp_path):
    run = sft.train(sft_config(home, tmp_path / "run"))

    assert unexplained(run, explained) == set()


def test_every_metric_of_a_reward_model_is_explained(home, explained, tmp_path):
    run = reward_model.train(reward_config(home, tmp_path / "run"))

    assert unexplained(run, explained) == set()


def test_every_metric_of_ppo_on_language_models_is_explained(home, explained, tmp_path):
    texts = {"pretraining": str(home / "texts.jsonl"), "reward": ("length", "repetition"), "gold": "length"}
    run = ppo.train(ppo_config(home, tmp_path / "clip", **texts))
    other = ppo.train(ppo_config(home, tmp_path / "penalty", objective="penalty", kl_reference="exact"))

    assert "score_NAME" in explained
    assert unexplained(run, explained) == {"score_length", "score_repetition"}
    assert unexplained(other, explained) == set()
