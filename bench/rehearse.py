"""`understudy rehearse` over five seeds: `make rehearse`. Results are saved as they come and not run again.

Done means, in 5 of 5 seeds: PPO closes at least half the gap between the SFT policy and its best of 64 on the true score,
at KL <= 10 nats a completion, distinct-4 >= 0.8 of SFT's, under half of the sentences copied from the SFT data. The seeds
were not looked at before the settings were fixed; tuning used 0, 100 and 101.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "rehearse"
PAGE = ROOT / "docs" / "rehearse.md"
SEEDS = range(1, 6)
HEADINGS = (
    "seed | SFT | PPO | best of 64 | gap closed | KL, nats | distinct-4 | of SFT's | grammatical | copied | "
    "reward model | noise allows | CPU s"
)


def run(seed: int) -> dict[str, Any]:
    """What the command prints as JSON, with the CPU seconds of its process and the versions it ran on."""
    path = RESULTS / f"{seed}.json"
    if not path.exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as out:
            command = [
                sys.executable,
                "-m",
                "understudy",
                "rehearse",
                "--json",
                "--seed",
                str(seed),
                "--out",
                f"{out}/r",
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(done.stdout.splitlines()[-1])
        del found["run"]
        found["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        found["versions"] |= {"python": platform.python_version(), "machine": platform.machine()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(path.read_text())


def passes(found: dict[str, Any]) -> bool:
    """Whether a seed does all that is asked of it."""
    sft, ppo = found["sft"], found["ppo"]
    varied = ppo["distinct_4"] >= 0.8 * sft["distinct_4"]
    return found["gap_closed"] >= 0.5 and found["kl"] <= 10 and varied and ppo["copied"] < 0.5


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
        f"{found['cpu_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def page(seeds: list[dict[str, Any]]) -> str:
    """docs/rehearse.md."""
    good = sum(map(passes, seeds))
    used = ", ".join(f"{name} {number}" for name, number in seeds[0]["versions"].items())
    first = seeds[0]
    samples = [f"| {a} | {b} |" for a, b in zip(first["sft"]["samples"], first["ppo"]["samples"], strict=True)]
    return "\n".join(
        [
            "# The rehearsal over five seeds",
            "",
            "`make rehearse` runs `understudy rehearse --seed N` for N from 1 to 5 and writes this page. The true score is "
            "the rule of `language/rehearsal.py`, which no stage of the training sees; SFT and PPO are means over 512 "
            "sampled completions of 128 openings, best of 64 the mean over those openings of the best of 64 completions by "
            "the SFT policy. KL(PPO, SFT) is exact at every token and summed over a completion. Reward model: accuracy on "
            "400 held-out pairs, next to what the noise in the preferences allows. CPU s: of the process, one thread.",
            "",
            f"**{good} of {len(seeds)} seeds** close at least half the gap at KL <= 10 nats, distinct-4 >= 0.8 of SFT's and "
            "under half of the sentences copied from the SFT data.",
            "",
            f"| {HEADINGS} |",
            "|" + "---|" * (HEADINGS.count("|") + 1),
            *map(line, seeds),
            "",
            "Settings, as in `understudy/cli/rehearse.py`: 20,000 sentences for the base model (learning rate 3e-3, one "
            "pass), 4000 demonstrations (1e-3, two), 6000 preferences (3e-3, two, 32 pairs a step), PPO with a separate "
            "critic: about 40 iterations of 128 completions, two passes in four minibatches, 1e-3, KL coefficient 0.15 paid "
            "token by token. They were chosen on seeds 0, 100 and 101, none of which stands in the table.",
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
            "What seed 1 says to the first five openings:",
            "",
            "| SFT | PPO |",
            "|---|---|",
            *samples,
            "",
        ]
    )


def main() -> None:
    seeds = [run(seed) for seed in SEEDS]
    PAGE.write_text(page(seeds))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
