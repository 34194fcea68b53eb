"""The KL trust region at three times the rehearsal's learning rate, on and off: `make trust-region`, docs/trust-region.md.

Each of 40 seeds of `make rehearse`, from whose runs under runs/rehearse/ it goes on: the same PPO from the same SFT policy
with the same reward model, once with `trust_region_kl` as it is by default and once with 0. A run fails where it misses the
mark of `understudy rehearse`. Results are saved as they come and not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from understudy import load, update
from understudy.cli import rehearse
from understudy.language import RewardModel, ppo, toy_language
from understudy.language.trust_region import TrustRegion

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "rehearse"
RESULTS = Path(__file__).parent / "results" / "trust_region"
PAGE = ROOT / "docs" / "trust-region.md"
SEEDS = range(20_027, 20_067)
TIMES = 3.0
WAYS = {"on": {}, "off": {"trust_region_kl": 0.0}}


class Clock:
    """Processor seconds spent in some functions."""

    def __init__(self, *places: tuple[Any, str]) -> None:
        self.seconds = 0.0
        for owner, name in places:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **given: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **given)
            finally:
                self.seconds += time.process_time() - began

        return timed


def run(seed: int, way: str) -> dict[str, Any]:
    """One PPO, and what came of it: as `understudy rehearse --json` says it."""
    torch.set_num_threads(1)
    taught, out = RUNS / str(seed), RUNS / f"{seed}-{way}"
    shutil.rmtree(out, ignore_errors=True)
    if not (taught / "rehearsal.json").exists():
        shutil.rmtree(taught, ignore_errors=True)
        rehearse.pipeline(taught, seed, rehearse.FULL_SIZES, report=lambda text: None)
    usual = rehearse.ppo_config(taught, seed, rehearse.FULL_SIZES)
    rates = {name: TIMES * getattr(usual, name) for name in ("learning_rate", "critic_learning_rate")}
    copies = SimpleNamespace(deepcopy=copy.deepcopy)
    update.copy = copies  # pyright: ignore[reportAttributeAccessIssue]  # the copy that an undone update returns to
    clock = Clock((TrustRegion, "__init__"), (TrustRegion, "__call__"), (copies, "deepcopy"))
    began, undone, moved = time.process_time(), 0, []
    for line in ppo.iterate(replace(usual, output_dir=str(out), **rates, **WAYS[way])):
        undone += int(line.get("updates_skipped", 0))
        moved.append(line["kl_reference"])
    seconds = time.process_time() - began
    found = json.loads((taught / "rehearsal.json").read_text())
    shown = toy_language.demonstrations(rehearse.FULL_SIZES.num_demonstrations, seed)
    judge = RewardModel.from_pretrained(taught / "reward_model" / "reward_model")
    policy = load(out)
    found["ppo"], said = rehearse.evaluate_policy(
        policy, judge, {row["prompt"] + row["completion"] for row in shown}, seed, rehearse.FULL_SIZES
    )
    found["kl"] = rehearse.mean_kl(policy, load(taught / "sft"), said)
    found["gap_closed"] = rehearse.gap_closed(found)
    shutil.rmtree(out)
    return {
        "seed": seed,
        "trust_region": way,
        "gap_closed": found["gap_closed"],
        "kl": found["kl"],
        "highest_kl": max(moved),
        "distinct_4": found["ppo"]["distinct_4"] / found["sft"]["distinct_4"],
        "grammatical": found["ppo"]["grammatical"],
        "true_score": found["ppo"]["true_score"],
        "missed": rehearse.shortfalls(found),
        "ended_worse": rehearse.ended_worse(found),
        "updates_undone": undone,
        "cpu_seconds": seconds,
        "guard_seconds": clock.seconds,
        "rates": rates,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }


def saved(seed: int, way: str) -> dict[str, Any]:
    """The result of one run, made in a process of its own where it is not there yet."""
    path = RESULTS / f"{seed}-{way}.json"
    if not path.exists():
        command = [sys.executable, __file__, "--one", str(seed), way]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(path.read_text())


def saved_both(seed: int) -> list[dict[str, Any]]:
    return [saved(seed, way) for way in WAYS]


def page(found: dict[str, list[dict[str, Any]]]) -> str:
    """docs/trust-region.md."""
    on, off = found["on"], found["off"]
    failed = {way: sum(bool(one["missed"]) for one in runs) for way, runs in found.items()}
    worse = {way: sum(one["ended_worse"] for one in runs) for way, runs in found.items()}
    acted = [one["updates_undone"] for one in on]
    less = f", {1 - failed['on'] / failed['off']:.0%} fewer" if failed["off"] else ""
    rates = ", ".join(f"{name} {rate:g}" for name, rate in on[0]["rates"].items())
    used = ", ".join(f"{name} {number}" for name, number in on[0]["versions"].items())
    lines = [
        f"# The trust region at {TIMES:g} times the learning rate",
        "",
        f"`make trust-region` writes this page. The PPO of `understudy rehearse` with {rates}, {TIMES:g} times what "
        f"it has there, on seeds {SEEDS[0]} to {SEEDS[-1]}: from the same SFT policy with the same reward model, "
        "once with the KL trust region as it is by default and once without. A run fails where it misses the mark of the "
        "[rehearsal](rehearse.md). KL: to SFT, of the final policy; highest: of any iteration's completions (k1). "
        f"Versions: {used}.",
        "",
        f"**Failures: {failed['on']} of {len(on)} with the trust region, {failed['off']} of {len(off)} without{less}.** "
        f"Ended worse than they began: {worse['on']} and {worse['off']}. The trust region undid {sum(acted)} updates in "
        f"{sum(map(bool, acted))} runs. The gap closed, median: "
        f"{statistics.median(one['gap_closed'] for one in on):.0%} and "
        f"{statistics.median(one['gap_closed'] for one in off):.0%}. Measurement and copy took "
        f"{sum(one['guard_seconds'] for one in on) / sum(one['cpu_seconds'] for one in on):.1%} of a run's processor time.",
        "",
        "| seed | gap, on | gap, off | KL, on | KL, off | highest, on | highest, off | distinct-4 of SFT's, on | off | "
        "undone | missed, on | missed, off |",
        "|" + "---|" * 12,
    ]
    for one, other in zip(on, off, strict=True):
        cells = [
            f"{one['seed']}",
            *(f"{run['gap_closed']:.0%}" for run in (one, other)),
            *(f"{run['kl']:.1f}" for run in (one, other)),
            *(f"{run['highest_kl']:.1f}" for run in (one, other)),
            *(f"{run['distinct_4']:.2f}" for run in (one, other)),
            f"{one['updates_undone']}",
            *("yes" if run["missed"] else "" for run in (one, other)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--one", nargs=2, metavar=("SEED", "WAY"), help="make one result and no page")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.one:
        seed, way = args.one
        (RESULTS / f"{seed}-{way}.json").write_text(json.dumps(run(int(seed), way)) + "\n")
        return
    with ThreadPoolExecutor(args.workers) as pool:
        results = [one for both in pool.map(saved_both, SEEDS) for one in both]
    PAGE.write_text(page({way: [one for one in results if one["trust_region"] == way] for way in WAYS}))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
