"""`understudy rehearse` over 120 seeds: `make rehearse`. Results are saved as they come and not run again.

The mark of a seed, which the command itself holds it to: PPO closes at least half the gap between the SFT policy and its
best of 64 on the true score, at KL <= 10 nats a completion, distinct-4 >= 0.8 of SFT's, under half of the sentences copied
from the SFT data. The settings were chosen on other seeds and frozen before these were run, once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from understudy.cli.rehearse import ended_worse, shortfalls

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "rehearse"
RUNS = ROOT / "runs" / "rehearse"
PAGE = ROOT / "docs" / "rehearse.md"
SEEDS = range(20_027, 20_147)  # 20,000 to 20,026 were run with higher learning rates
HEADINGS = (
    "seed | SFT | PPO | best of 64 | gap closed | KL, nats | distinct-4 | of SFT's | grammatical | copied | "
    "reward model | noise allows | updates undone | CPU s"
)


def run(seed: int) -> dict[str, Any]:
    """What the command prints as JSON, with its exit code, the CPU seconds of its process and the versions it ran on."""
    path = RESULTS / f"{seed}.json"
    if not path.exists():
        shutil.rmtree(RUNS / str(seed), ignore_errors=True)
        own = ["--seed", str(seed), "--out", str(RUNS / str(seed))]
        command = [sys.executable, "-m", "understudy", "rehearse", "--json", *own]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1):
            raise SystemExit(f"seed {seed} ended with exit code {process.returncode}")
        found = json.loads(printed.splitlines()[-1])
        del found["run"]
        found |= {"exit_code": process.returncode, "cpu_seconds": used.ru_utime + used.ru_stime}
        found["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        found["versions"] |= {"python": platform.python_version(), "machine": platform.machine()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")
    return json.loads(path.read_text())


def line(found: dict[str, Any]) -> str:
    """A seed as a row of the table."""
    sft, ppo = found["sft"], found["ppo"]
    cells = [
        f"{found['seed']}",
        f"{sft['true_score']:.3f}",
        f"{ppo['true_score']:.3f}",
        f"{found['best_of']:.3f}",
        f"{found['gap_closed']:.0%}",
        f"{found['kl']:.1f}",
        f"{ppo['distinct_4']:.3f}",
        f"{ppo['distinct_4'] / sft['distinct_4']:.2f}",
        f"{ppo['grammatical']:.3f}",
        f"{ppo['copied']:.3f}",
        f"{found['reward_model_accuracy']:.3f}",
        f"{found['reward_model_ceiling']:.3f}",
        f"{found['updates_undone']}",
        f"{found['cpu_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


SETTINGS = [
    "Settings, as in `understudy/cli/rehearse.py`: 20,000 sentences for the base model (learning rate 3e-3, one pass), 4000 "
    "demonstrations (1e-3, two), 6000 preferences (3e-3, two, 32 pairs a step), PPO with a separate critic: about 40 "
    "iterations of 128 completions, two passes in four minibatches, 5e-4 (the critic 1e-3), KL coefficient 0.15 paid token "
    "by token; in the first four the critic alone learns. None of the seeds they were chosen on stands in the table.",
    "",
    "All at a learning rate of 1e-3: without the critic's warm-up, on seeds 4711 and 1001 to 1007, explained variance began "
    "below -2 on some, updates left the trust region in 4 of 8 runs and were undone, and 72 to 79 % of the gap were closed; "
    "with it none was undone there, but 7 were in 5 of 19 runs on seeds 20,000 to 20,018, all of which reached the mark. "
    "A learning rate that rises over the first 30 % did not help (KL(old, new) of 0.57 on seed 4711, in iteration 13). "
    "The largest KL(old, new) of any update, in nats a token, the bound being 0.3: at 5e-4, 0.03 to 0.12 on seeds 4711 and "
    "1001 to 1006, 67 to 73 % of the gap closed; at 7e-4, 0.03 to 0.40 on seeds 1001 to 1008 and 20,019 to 20,026, 67 to "
    "81 % closed, and on one of these 16 two updates were undone. "
    "Without trust region and warm-up seed 4711 collapsed: its second update moved the policy by "
    "0.58 nats a token, and KL to SFT rose from 0.4 to 133 nats.",
]


def page(seeds: list[dict[str, Any]]) -> str:
    """docs/rehearse.md."""
    missed = {found["seed"]: texts for found in seeds if (texts := shortfalls(found))}
    worse = [str(found["seed"]) for found in seeds if ended_worse(found)]
    gaps = sorted(found["gap_closed"] for found in seeds)
    undone = [found["updates_undone"] for found in seeds]
    used = ", ".join(f"{name} {number}" for name, number in seeds[0]["versions"].items())
    first = seeds[0]
    samples = [f"| {a} | {b} |" for a, b in zip(first["sft"]["samples"], first["ppo"]["samples"], strict=True)]
    return "\n".join(
        [
            f"# The rehearsal over {len(seeds)} seeds",
            "",
            f"`make rehearse` runs `understudy rehearse --seed N` for N from {SEEDS[0]} to {SEEDS[-1]} and writes "
            "this page. The true score is the rule of `language/toy_language.py`, which no stage of the training "
            "sees; SFT and PPO are means over 512 sampled completions of 128 openings, best of 64 the mean over "
            "those openings of the best of 64 completions by the SFT policy. KL(PPO, SFT) is exact at every token "
            "and summed over a completion. Reward model: accuracy on 400 held-out pairs, next to what the noise "
            "in the preferences allows. Updates undone: by the trust region, of about 40. CPU s: of the process, "
            "one thread.",
            "",
            f"**{len(seeds) - len(missed)} of {len(seeds)} seeds** close at least half the gap at KL <= 10 nats, distinct-4 "
            ">= 0.8 of SFT's and under half of the sentences copied from the SFT data. The gap closed: median "
            f"{statistics.median(gaps):.0%}, from {gaps[0]:.0%} to {gaps[-1]:.0%}. The trust region acted in "
            f"{sum(map(bool, undone))} runs, {sum(undone)} times in all. "
            + (
                f"Ended worse than they began, and exited 1: {', '.join(worse)}."
                if worse
                else "No seed ended worse than it began."
            ),
            "",
            *(
                f"- Seed {seed} missed its mark, and the command says so: {', '.join(texts)}."
                for seed, texts in missed.items()
            ),
            *([""] if missed else []),
            f"| {HEADINGS} |",
            "|" + "---|" * (HEADINGS.count("|") + 1),
            *map(line, seeds),
            "",
            *SETTINGS,
            "",
            "What did not work: a base model pretrained at 1e-2. Its loss is 0.005 lower; on its weights the reward model "
            "gets 0.68 of held-out pairs right, where it gets 0.79 on those pretrained at 3e-3 and 0.82 on weights that are "
            "not trained at all (one plain loop, the same 5000 pairs of seed 100, 1000 held out). Smaller minibatches, more "
            "epochs and other learning rates of the reward model did not make up for that: PPO at a KL coefficient of 0.1 "
            "closed -6 % of the gap on seed 100, with 42 % of its sentences grammatical.",
            "",
            "The KL coefficient, on seeds 100 and 101: 0.3 closes 62 and 60 % of the gap at 1.5 nats; 0.15, 81 and 82 % "
            "at 3.5 and 3.2 nats; 0.1, 92 and 87 % at 4.9 and 4.4 nats, distinct-4 down to 0.86 and 0.91 of SFT's.",
            "",
            f"Versions: {used}.",
            "",
            f"What seed {first['seed']} says to the first five openings:",
            "",
            "| SFT | PPO |",
            "|---|---|",
            *samples,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The rehearsal over 120 seeds.")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="seeds that run at a time, a thread each"
    )
    with ThreadPoolExecutor(parser.parse_args().workers) as pool:
        seeds = list(pool.map(run, SEEDS))
    PAGE.write_text(page(seeds))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
