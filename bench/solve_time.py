"""Seconds from process start, imports and all, until CartPole-v1 is solved: ten seeds in turn, `make solve-time`.

Solved: the mean return of the last 100 episodes is 475 or more. Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile

SEEDS = range(1, 11)


def main() -> None:
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as out:
            flags = [
                "--env",
                "CartPole-v1",
                "--seed",
                str(seed),
                "--stop-at-return",
                "475",
                "--quiet",
                "--out",
                f"{out}/run",
            ]
            command = [sys.executable, "-m", "understudy", "control", "ppo", *flags, "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        summary = json.loads(done.stdout.splitlines()[-1])
        found.append(summary["solved_at"])
        print(f"seed {seed}: {summary['solved_at']}, startup {summary['startup_seconds']:.1f} s", flush=True)
    solved = [f["seconds"] for f in found if f]
    print(f"solved {len(solved)} of {len(found)}; median {statistics.median(solved):.1f} s, worst {max(solved):.1f} s")


if __name__ == "__main__":
    main()
