"""Every fault of the table, injected: `make faults`. Prints what became of them and writes docs/reliability.md.

    python -m tests.faults.report [--only NAME ...] [--page]

Twenty moments at which a run is killed, for every run of tests/faults/killed.py; then the tests of the table. Raw results
are in bench/results/reliability.json; --page writes the page from them without running anything.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as tree
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults import killed
from tests.faults.table import ROWS
from tests.rehearsed import furnish

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "reliability.md"
SEED = 1


def kill(names: list[str]) -> dict[str, Any]:
    """By run: how often each thing happened in it, and what differed after each moment, nothing where it is survived."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        home = furnish(Path(folder) / "home")
        for name in names:
            counts = killed.counts(name, home, Path(folder) / name)
            whole = killed.digests(Path(folder) / name)
            became = []
            for number, moment in enumerate(killed.moments(name, SEED, **counts)):
                out = Path(folder) / f"{name}-{number}"
                became.append([*moment, killed.survives(name, moment, home, out, whole)])
            found[name] = {"counts": counts, "moments": became, "files": len(whole)}
            bad = [x for x in became if x[2]]
            print(f"{name}: {len(became) - len(bad)} of {len(became)} survived {bad or ''}", flush=True)
    return found


def run_tests() -> dict[str, dict[str, int]]:
    """By test of the table: how many of its cases passed, failed and were skipped."""
    wanted = list(dict.fromkeys(test for row in ROWS for test in row.tests))
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={told}", *wanted]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(tree.parse(told).iter("testcase"))
    found = {test: {"passed": 0, "failed": 0, "skipped": 0} for test in wanted}
    for case in cases:
        name = case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", "").split("[")[0]
        outcome = {child.tag for child in case}
        how = "failed" if outcome & {"failure", "error"} else "skipped" if "skipped" in outcome else "passed"
        if name in found:
            found[name][how] += 1
    return found


def summed(found: dict[str, Any]) -> dict[str, int]:
    """Faults injected and survived; runs that lost steps, and runs that ended as if well with other bytes."""
    moments = [moment for run in found["killed"].values() for moment in run["moments"]]
    files = [reason for *_, reason in moments if ".safetensors" in reason or "metrics.jsonl" in reason]
    total = {"injected": len(moments), "survived": sum(not reason for *_, reason in moments)}
    seen = {test: kinds for row in ROWS for test, kinds in row.tests.items()}
    for test, kinds in seen.items():
        cases = found["tests"][test]
        total["injected"] += kinds * (cases["passed"] + cases["failed"])
        total["survived"] += kinds * cases["passed"]
    total["lost_steps"] = sum("metrics.jsonl" in reason for *_, reason in moments)
    total["silent_corruptions"] = len(files)
    return total


def page(found: dict[str, Any]) -> str:
    """docs/reliability.md."""
    total = summed(found)
    lines = [
        "# Reliability",
        "",
        "Written by `make faults` from what it injects; raw results in `bench/results/reliability.json`. A fault is",
        "survived where the run goes on or is resumed to the same bytes, or ends cleanly in a sentence, as its row says.",
        "Bytes are those of every safetensors file, of metrics but for what a clock says, and of samples (CPU, float32).",
        "",
        f"**{total['injected']} faults injected, {total['survived']} survived, {total['lost_steps']} runs lost steps, "
        f"{total['silent_corruptions']} silent corruptions.**",
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + ".",
        "",
        "## SIGKILL at twenty moments of each run",
        "",
        "Killed, resumed, and its digests compared with those of a run that was not killed. Ten of the twenty moments are",
        "before or after a sync or rename of a checkpoint write, one is before the first optimizer step, one at the first",
        "iteration's end, two are in a resumption, the others are steps and ends of iterations drawn by chance. Of",
        "`ppo-long-episodes`, one resumes 80 steps into episodes, and one where episodes ended at a rollout's last column.",
        "",
        "| run | writes | steps, ends | resumptions | survived | files compared |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in found["killed"].items():
        kinds = [kind for kind, *_ in run["moments"]]
        writes = sum(kind in ("fsync", "fsynced", "rename", "renamed") for kind in kinds)
        steps = sum(kind in ("step", "iteration") for kind in kinds)
        good = sum(not reason for *_, reason in run["moments"])
        cells = name, writes, steps, len(kinds) - writes - steps, f"{good} of {len(kinds)}", run["files"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "## By row",
        "",
        "| row | fault | what is to happen | kinds | result | tests |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        cases = {test: found["tests"].get(test, {"passed": 0, "failed": 0, "skipped": 0}) for test in row.tests}
        passed = sum(kinds * cases[test]["passed"] for test, kinds in row.tests.items())
        failed = sum(kinds * cases[test]["failed"] for test, kinds in row.tests.items())
        skipped = sum(case["skipped"] for case in cases.values())
        result = f"{passed} of {passed + failed}" + (f", {skipped} skipped" if skipped else "") if row.tests else "open"
        files: dict[str, list[str]] = {}
        for test in row.tests:
            file, name = test.split("::")
            files.setdefault(file, []).append(name.removeprefix("test_").replace("_", " "))
        tests = "; ".join(f"`{file}`: {', '.join(names)}" for file, names in files.items())
        lines.append(f"| {row.name} | {row.fault} | {row.expected} | {passed + failed} | {result} | {tests} |")
    cost = RESULTS / "checkpoint_cost.json"
    if cost.exists():
        lines += ["", *costs(json.loads(cost.read_text()))]
    return "\n".join([*lines, ""])


def costs(found: dict[str, Any]) -> list[str]:
    """What checkpoints cost, as bench/checkpoint_cost.py measured it."""
    lines = [
        "## What it costs",
        "",
        "`python bench/checkpoint_cost.py`, default settings: time a run spends writing checkpoints and waiting until they",
        "are synced and read back, which a thread does while it goes on, and copying the state before an update so that it",
        "can come back, as shares of the run's time.",
        "",
        "| run | seconds | checkpoints | bytes each | checkpoints' share | copies' share |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in found["runs"].items():
        cells = f"{run['train_seconds']:.1f}", run["checkpoints"], run["checkpoint_bytes"]
        shares = f"{run['checkpoint_share']:.2%}", f"{run['copy_share']:.2%}"
        lines.append("| " + " | ".join(map(str, (name, *cells, *shares))) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=killed.NAMES, help="these runs, beside what is in the results already"
    )
    parser.add_argument("--page", action="store_true", help="write the page from the results there are")
    args = parser.parse_args()
    file = RESULTS / "reliability.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"killed": {}}
    if not args.page:
        fresh = kill(args.only or list(killed.NAMES))
        found["killed"] = {
            name: (found["killed"] | fresh)[name] for name in killed.NAMES if name in found["killed"] | fresh
        }
        found["tests"] = run_tests()
        names = ("torch", "gymnasium", "transformers", "safetensors")
        found["versions"] = {"python": platform.python_version()} | {name: version(name) for name in names}
        file.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    total = summed(found)
    print("  ".join(f"{name.replace('_', ' ')} {number}" for name, number in total.items()))
    return int(total["injected"] != total["survived"] or total["silent_corruptions"] > 0)


if __name__ == "__main__":
    sys.exit(main())
