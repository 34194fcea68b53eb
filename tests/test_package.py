"""The package as it is installed: few dependencies, each with a reason, and public names in order."""

import re
import tomllib
from pathlib import Path

import understudy

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
    from understudy.control import ppo

    config = ppo.Config(
        env="CartPole-v1", num_envs=2, rollout=8, steps=16, evaluate_every=1, evaluate_episodes=1, quiet=True
    )
    run = ppo.train(ppo.Config(**(vars(config) | {"objective": "penalty", "out": str(tmp_path / "run")})))
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text()))

    assert set(run.metrics[0]) <= explained
