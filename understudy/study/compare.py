"""Runs side by side, grouped by everything but their seed: one measure that all of them have, over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from understudy.run.checkpoint import CorruptFileError, read_json
from understudy.run.config import RequestError
from understudy.run.metrics import last_steps, read_metrics_reversed
from understudy.run.redact import printable
from understudy.run.store import read_config
from understudy.study.statistics import bootstrap_interval, iqm, probability_of_improvement

IGNORED_FIELDS = ("seed", "output_dir", "quiet", "log", "video")  # fields that make no other experiment
MEASURED_ON = ("env", "env_options", "wrappers", "evaluation_max_steps")
"""Fields of which evaluation.json of a control run has the values that it was evaluated with."""
TASK = ("env", "env_options", "wrappers", "data", "evaluation_data")  # fields that say what a run is measured on
MEASURES = ("evaluation return", "training return", "gold", "score", "accuracy")
"""What runs can be compared by; the first that all of them have is taken. Returns are of control runs, the others of the
evaluations of language runs, where gold and score count as one measure only if they are made of the same specs."""

Measure = tuple[str, tuple[str, ...]]
"""One of `MEASURES`, and the specs it is made of; or, of returns, what else than its own the run was evaluated on."""


def group_runs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One entry a group of runs that differ in their seed only, in the order given.

    Each: recipe, config, runs, seeds, measure, evaluated (how many of its runs were evaluated), scores (of each run, by the
    measure), iqm, interval (None where no two scores differ), and improvement over the first group.

    Raises:
        RequestError: no measure is common to all runs, or two of them are the same experiment with the same seed.
    """
    documents = [read_config(path) for path in paths]
    run_measures = [_read_measures(path, document) for path, document in zip(paths, documents, strict=True)]
    measure = _common_measure(paths, run_measures)
    groups: dict[str, dict[str, Any]] = {}
    for path, document, measures in zip(paths, documents, run_measures, strict=True):
        recipe, seed = document.get("recipe"), document["config"].get("seed")
        config = {name: value for name, value in document["config"].items() if name not in IGNORED_FIELDS}
        empty = {"runs": [], "seeds": [], "measure": measure[0], "evaluated": 0, "scores": []}
        group = groups.setdefault(
            json.dumps([recipe, config], sort_keys=True), {"recipe": recipe, "config": config} | empty
        )
        if seed in group["seeds"]:
            duplicate = group["runs"][group["seeds"].index(seed)]
            raise RequestError(
                f"run '{path}' has the settings and the seed of '{duplicate}': a copy tells nothing new, leave "
                "one of them out"
            )
        group["runs"].append(str(path))
        group["seeds"].append(seed)
        group["evaluated"] += any(name != "training return" for name, _ in measures)
        group["scores"].append(measures[measure])
    result = list(groups.values())
    for group in result:
        scores = group["scores"]
        group["iqm"], group["interval"] = iqm(scores), bootstrap_interval(scores) if len({*scores}) > 1 else None
        group["improvement"] = probability_of_improvement(scores, result[0]["scores"])
    return result


def format_table(groups: list[dict[str, Any]]) -> str:
    """The groups as text for a terminal: what tells each from the first, then its numbers."""
    lines, first = [], groups[0]
    digits = 1 if "return" in first["measure"] else 3
    for group in groups:
        config = group["config"]
        differs = [f"{k}={v}" for k, v in config.items() if first["config"].get(k) != v]
        name = " ".join([str(group["recipe"]), str(config.get("env", config.get("model"))), *differs])
        bounds = [] if group["interval"] is None else [f"{x:.{digits}f}" for x in group["interval"]]
        lines.append(
            f"{name}: {len(group['scores'])} runs, {group['measure']}, IQM {group['iqm']:.{digits}f} "
            f"[{', '.join(bounds) or 'no interval'}], P(above first) {group['improvement']:.2f}: "
            + " ".join(f"{score:.{digits}f}" for score in group["scores"])
        )
    several = [name for name in TASK if len({json.dumps(group["config"].get(name)) for group in groups}) > 1]
    if several:
        lines.append(f"The groups differ in {', '.join(several)}: what they are measured on is not the same.")
    runs, evaluated = sum(len(group["runs"]) for group in groups), sum(group["evaluated"] for group in groups)
    if first["measure"] == "training return" and evaluated:
        lines.append(
            f"{evaluated} of {runs} runs were evaluated: after `understudy evaluate` of all, evaluations compare."
        )
    return "\n".join(printable(line).replace("\n", "\\n") for line in lines)  # a line each, whatever a run's files hold


def _read_measures(path: Path, document: dict[str, Any]) -> dict[Measure, float]:
    """What a run has come to, by every measure that it has."""
    if not isinstance(document.get("config"), dict):
        raise RequestError(f"run is '{path}', whose config.json names no config: give the directory of a run")
    file = path / "evaluation.json"
    try:
        evaluation = read_json(file) if file.exists() else {}
    except CorruptFileError as error:
        raise RequestError(f"run is '{path}', and {error}: evaluate it again with `understudy evaluate`") from error
    if not isinstance(evaluation, dict):
        raise RequestError(f"run is '{path}', whose evaluation.json is no object: evaluate it again")
    if evaluation.get("after_steps") != last_steps(path):
        evaluation = {}  # of a policy that has learned since
    measures: dict[Measure, Any] = {}
    if str(document.get("recipe")).startswith("language"):
        specs = evaluation["specs"] if isinstance(evaluation.get("specs"), dict) else document["config"]
        for name, field in (("gold", "gold"), ("score", "reward"), ("accuracy", "")):
            measures[name, tuple(map(str, specs.get(field) or ()))] = evaluation.get(name)
    else:
        returns = evaluation.get("returns")
        if isinstance(returns, list) and returns and all(map(_is_number, returns)):
            config = document["config"]
            others = [
                f"{name}={json.dumps(x)}" for name in MEASURED_ON if (x := evaluation.get(name)) != config.get(name, x)
            ]
            measures["evaluation return", tuple(others)] = statistics.fmean(returns)
        means = (line.get("episode_return_mean") for line in read_metrics_reversed(path))
        measures["training return", ()] = next(filter(_is_number, means), None)
    return {measure: float(x) for measure, x in measures.items() if _is_number(x)}


def _common_measure(paths: Sequence[Path], run_measures: Sequence[dict[Measure, float]]) -> Measure:
    """The first measure that all runs have."""
    for path, measures in zip(paths, run_measures, strict=True):
        if not measures:
            raise RequestError(
                f"run '{path}' has nothing to compare, neither finished episodes nor an evaluation with a score: "
                f"train it longer, evaluate it with `understudy evaluate {path}`, or leave it out"
            )
    shared = set(run_measures[0]).intersection(*run_measures)
    if not shared:
        kinds = {tuple(measures): path for path, measures in zip(paths, run_measures, strict=True)}
        listing = "; ".join(f"'{path}' has {_format_measures(measures)}" for measures, path in list(kinds.items())[:3])
        raise RequestError(
            f"runs have no measure in common ({listing}): evaluate them alike, with the same --gold SPEC"
        )
    return min(shared, key=lambda measure: MEASURES.index(measure[0]))


def _format_measures(measures: Sequence[Measure]) -> str:
    return ", ".join(name + (f" of {' '.join(specs)}" if specs else "") for name, specs in measures)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -1e300 < x < 1e300
