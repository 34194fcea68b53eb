"""Ten seeds of the tuned presets, held to one protocol: `make scores`, or `python bench/scores.py ENV ...`.

A seed's score is the mean return of 100 episodes of the *final* policy: mode actions, frozen scales, seeds never trained
on. Per environment: the interquartile mean over seeds with its bootstrap interval, the same with sampled actions, and the
raw values. Results are saved as they come under bench/results/scores/; a seed found there is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "scores"
STEPS = {"CartPole-v1": 100_000, "Acrobot-v1": 500_000, "Pendulum-v1": 100_000, "MountainCarContinuous-v0": 100_000}
WANTED = {
    "CartPole-v1": ("seeds at 500.0", "9 of 10"),
    "Acrobot-v1": ("IQM at least", -82),
    "Pendulum-v1": ("IQM at least", -190),
    "MountainCarContinuous-v0": ("IQM at least", 90),
}
EPISODES = 100
# 0 to 10 were seen while their presets were tuned; the others were tuned on 100 and up
FIRST_SEED = {"CartPole-v1": 11, "Pendulum-v1": 11}


def run(env: str, seed: int) -> Path:
    """Train one seed and evaluate it; the file with what came of it."""
    path = RESULTS / f"{env}-{seed}.json"
    if path.exists():
        return path
    from understudy import load
    from understudy.control import ppo
    from understudy.control.evaluate import evaluate
    from understudy.control.presets import preset

    with tempfile.TemporaryDirectory() as out:
        config = preset(ppo.Config, env, seed=seed, steps=STEPS[env], quiet=True, output_dir=f"{out}/run")
        began = time.time()
        done = ppo.train(config)
        policy = load(done.path)
        found = {
            "env": env,
            "seed": seed,
            "seconds": time.time() - began,
            "training_return": done.metrics[-1]["episode_return_mean"],
            "mode": evaluate(policy, config, num_episodes=EPISODES).returns,
            "sampled": evaluate(policy, config, num_episodes=EPISODES, sample=True).returns,
            "config": {name: value for name, value in vars(config).items() if name != "out"},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    return path


def row(env: str, paths: list[Path]) -> dict:
    """One environment over its seeds."""
    from understudy.study.statistics import bootstrap_interval, iqm

    found = [json.loads(path.read_text()) for path in paths]
    scores, sampled = ([statistics.fmean(f[how]) for f in found] for how in ("mode", "sampled"))
    return {
        "env": env,
        "steps": STEPS[env],
        "seeds": [f["seed"] for f in found],
        "scores": scores,
        "iqm": iqm(scores),
        "interval": bootstrap_interval(scores),
        "sampled": sampled,
        "sampled_iqm": iqm(sampled),
        "perfect": sum(score == 500.0 for score in scores),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("envs", nargs="*", default=list(STEPS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    seeds = {env: range(FIRST_SEED.get(env, 1), FIRST_SEED.get(env, 1) + args.seeds) for env in args.envs}
    jobs = [(env, seed) for env in args.envs for seed in seeds[env]]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        done = list(zip(jobs, pool.map(run, *zip(*jobs, strict=True)), strict=True))
    import gymnasium
    import torch

    lines = [
        "# Scores of the tuned presets",
        "",
        f"`python bench/scores.py`: {args.seeds} seeds, a seed's score the mean of {EPISODES} episodes of the final policy "
        "(mode actions, frozen scales, seeds never trained on). IQM with 95 % bootstrap interval over seeds.",
        f"Python {platform.python_version()}, torch {torch.__version__}, gymnasium {gymnasium.__version__}, 1 thread a run.",
        "",
        "Seeds 1 to 10; CartPole and Pendulum 11 to 20, lower ones were seen while their presets were chosen. No preset was "
        "tuned on a seed of its row.",
        "",
        "| environment | steps | IQM | interval | sampled actions, IQM | wanted | scores of the seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for env in args.envs:
        r = row(env, [path for (name, _), path in done if name == env])
        wanted = " ".join(map(str, WANTED[env])) + (f" (here {r['perfect']})" if env == "CartPole-v1" else "")
        lines.append(
            f"| {env} | {r['steps']:,} | {r['iqm']:.1f} | {r['interval'][0]:.1f} to {r['interval'][1]:.1f} | "
            f"{r['sampled_iqm']:.1f} | {wanted} | {' '.join(f'{s:.1f}' for s in r['scores'])} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if set(args.envs) == set(STEPS) and args.seeds == 10:
        (Path(__file__).parents[1] / "docs" / "scores.md").write_text(text)


if __name__ == "__main__":
    main()
