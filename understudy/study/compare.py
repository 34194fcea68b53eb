"""Runs side by side, grouped by everything but their seed: one measure that all of them have, over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from understudy.run.checkpoint import Damaged, read_json
from understudy.run.config import RequestError
from understudy.run.metrics import newest_first
from understudy.run.redact import printable
from understudy.run.store import read_config
from understudy.study.statistics import interval, iqm, probability_of_improvement

OWN = ("seed", "out", "quiet", "log", "video")  # fields that make no other experiment
TASK = ("env", "env_options", "wrappers", "data", "evaluation_data")  # fields that say what a run is measured on
MEASURES = ("evaluation return", "training return", "gold", "score", "accuracy")
"""What runs can be compared by; the first that all of them have is taken. Returns are of control runs, the others of the
evaluations of language runs, where gold and score count as one measure only if they are made of the same specs."""

Measure = tuple[str, tuple[str, ...]]
"""One of `MEASURES`, and the specs it is made of."""


def groups(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One entry a group of runs that differ in their seed only, in the order given.

    Each: recipe, config, runs, seeds, measure, evaluated (how many of its runs were evaluated), scores (of each run, by the
    measure), iqm, interval (None where no two scores differ), and improvement over the first group.

    Raises:
        RequestError: no measure is common to all runs, or two of them are the same experiment with the same seed.
    """
    described = [read_config(path) for path in paths]
    measured = [_measures(path, about) for path, about in zip(paths, described, strict=True)]
    measure = _common(paths, measured)
    found: dict[str, dict[str, Any]] = {}
    for path, about, measures in zip(paths, described, measured, strict=True):
        recipe, seed = about.get("recipe"), about["config"].get("seed")
        config = {name: value for name, value in about["config"].items() if name not in OWN}
        empty = {"runs": [], "seeds": [], "measure": measure[0], "evaluated": 0, "scores": []}
        group = found.setdefault(
            json.dumps([recipe, config], sort_keys=True), {"recipe": recipe, "config": config} | empty
        )
        if seed in group["seeds"]:
            twin = group["runs"][group["seeds"].index(seed)]
            raise RequestError(
                f"run '{path}' has the settings and the seed of '{twin}': a copy tells nothing new, leave one of them out"
            )
        group["runs"].append(str(path))
        group["seeds"].append(seed)
        group["evaluated"] += any(name != "training return" for name, _ in measures)
        group["scores"].append(measures[measure])
    result = list(found.values())
    for group in result:
        scores = group["scores"]
        group["iqm"], group["interval"] = iqm(scores), interval(scores) if len({*scores}) > 1 else None
        group["improvement"] = probability_of_improvement(scores, result[0]["scores"])
    return result


def table(found: list[dict[str, Any]]) -> str:
    """The groups as text for a terminal: what tells each from the first, then its numbers."""
    lines, first = [], found[0]
    digits = 1 if "return" in first["measure"] else 3
    for group in found:
        config = group["config"]
        differs = [f"{k}={v}" for k, v in config.items() if first["config"].get(k) != v]
        name = " ".join([str(group["recipe"]), str(config.get("env", config.get("model"))), *differs])
        bounds = [] if group["interval"] is None else [f"{x:.{digits}f}" for x in group["interval"]]
        lines.append(
            f"{name}: {len(group['scores'])} runs, {group['measure']}, IQM {group['iqm']:.{digits}f} "
            f"[{', '.join(bounds) or 'no interval'}], P(above first) {group['improvement']:.2f}: "
            + " ".join(f"{score:.{digits}f}" for score in group["scores"])
        )
    several = [name for name in TASK if len({json.dumps(group["config"].get(name)) for group in found}) > 1]
    if several:
        lines.append(f"The groups differ in {', '.join(several)}: what they are measured on is not the same.")
    runs, evaluated = sum(len(group["runs"]) for group in found), sum(group["evaluated"] for group in found)
    if first["measure"] == "training return" and evaluated:
        lines.append(
            f"{evaluated} of {runs} runs were evaluated: after `understudy evaluate` of all, evaluations compare."
        )
    return "\n".join(printable(line).replace("\n", "\\n") for line in lines)  # a line each, whatever a run's files hold


def _measures(path: Path, about: dict[str, Any]) -> dict[Measure, float]:
    """What a run has come to, by every measure that it has."""
    if not isinstance(about.get("config"), dict):
        raise RequestError(f"run is '{path}', whose config.json names no config: give the directory of a run")
    file = path / "evaluation.json"
    try:
        evaluation = read_json(file) if file.exists() else {}
    except Damaged as error:
        raise RequestError(f"run is '{path}', and {error}: evaluate it again with `understudy evaluate`") from error
    if not isinstance(evaluation, dict):
        raise RequestError(f"run is '{path}', whose evaluation.json is no object: evaluate it again")
    found: dict[Measure, Any] = {}
    if str(about.get("recipe")).startswith("language"):
        specs = evaluation["specs"] if isinstance(evaluation.get("specs"), dict) else about["config"]
        for name, field in (("gold", "gold"), ("score", "reward"), ("accuracy", "")):
            found[name, tuple(map(str, specs.get(field) or ()))] = evaluation.get(name)
    else:
        returns = evaluation.get("returns")
        if isinstance(returns, list) and returns and all(map(_is_number, returns)):
            found["evaluation return", ()] = statistics.fmean(returns)
        means = (line.get("episode_return_mean") for line in newest_first(path))
        found["training return", ()] = next(filter(_is_number, means), None)
    return {measure: float(x) for measure, x in found.items() if _is_number(x)}


def _common(paths: Sequence[Path], measured: Sequence[dict[Measure, float]]) -> Measure:
    """The first measure that all runs have."""
    for path, measures in zip(paths, measured, strict=True):
        if not measures:
            raise RequestError(
                f"run '{path}' has nothing to compare, neither finished episodes nor an evaluation with a score: "
                f"train it longer, evaluate it with `understudy evaluate {path}`, or leave it out"
            )
    shared = set(measured[0]).intersection(*measured)
    if not shared:
        kinds = {tuple(measures): path for path, measures in zip(paths, measured, strict=True)}
        have = "; ".join(f"'{path}' has {_listed(measures)}" for measures, path in list(kinds.items())[:3])
        raise RequestError(f"runs have no measure in common ({have}): evaluate them alike, with the same --gold SPEC")
    return min(shared, key=lambda measure: MEASURES.index(measure[0]))


def _listed(measures: Sequence[Measure]) -> str:
    return ", ".join(name + (f" of {' '.join(specs)}" if specs else "") for name, specs in measures)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -1e300 < x < 1e300
