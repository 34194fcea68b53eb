"""Runs side by side, grouped by everything but their seed: the evaluation each one holds, over seeds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from understudy.run.config import RequestError
from understudy.run.metrics import read_metrics
from understudy.run.store import read_config
from understudy.study.statistics import interval, iqm, probability_of_improvement

OWN = ("seed", "out", "quiet", "log", "video")  # fields that make no other experiment


def groups(paths: list[Path]) -> list[dict[str, Any]]:
    """One entry a group of runs that differ in their seed only, in the order given.

    Each: runs, seeds, scores (mean evaluation return, or the last training mean where a run was not evaluated), iqm,
    interval, evaluated, and improvement over the first group.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        about = read_config(path)
        config = {name: value for name, value in about["config"].items() if name not in OWN}
        key = json.dumps([about["recipe"], config], sort_keys=True)
        group = found.setdefault(
            key, {"recipe": about["recipe"], "config": config, "runs": [], "seeds": [], "scores": []}
        )
        score, group["evaluated"] = _score(path)
        group["runs"].append(str(path))
        group["seeds"].append(about["config"].get("seed"))
        group["scores"].append(score)
    result = list(found.values())
    for group in result:
        group["iqm"], group["interval"] = iqm(group["scores"]), interval(group["scores"])
        group["improvement"] = probability_of_improvement(group["scores"], result[0]["scores"])
    return result


def table(found: list[dict[str, Any]]) -> str:
    """The groups as text: what tells each from the first, then its numbers."""
    lines = []
    for group in found:
        first = found[0]["config"]
        differs = [f"{k}={v}" for k, v in group["config"].items() if first.get(k) != v]
        name = f"{group['recipe']} {group['config'].get('env')} " + " ".join(differs)
        low, high = group["interval"]
        lines.append(
            f"{name.strip()}: {len(group['scores'])} runs, IQM {group['iqm']:.1f} [{low:.1f}, {high:.1f}], "
            f"P(above first) {group['improvement']:.2f}, {'evaluated' if group['evaluated'] else 'training return'}: "
            + " ".join(f"{score:.1f}" for score in group["scores"])
        )
    return "\n".join(lines)


def _score(path: Path) -> tuple[float, bool]:
    evaluation = path / "evaluation.json"
    if evaluation.is_file():
        return statistics.fmean(json.loads(evaluation.read_text())["returns"]), True
    means = [m["episode_return_mean"] for m in read_metrics(path) if m.get("episode_return_mean") is not None]
    if not means:
        raise RequestError(f"run '{path}' finished no episode: train it longer, or leave it out")
    return means[-1], False
