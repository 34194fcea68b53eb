"""What correct bootstrapping is worth: PPO on Pendulum-v1, whose every episode is cut by a time limit and never dies.

    python bench/ablation_truncation.py

One arm is the library as it is. The other wraps the environment so that a time limit is reported as a death, which is what
a loop computes that has one `done` for both. All else is equal: seeds, config, number of steps. A seed's score is the mean
return of 100 evaluation episodes of the final policy (mode action, seeds never used in training).

Results go to a file as they come; a second call does only what is missing, then prints the table of docs/decisions.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import torch

from understudy.control import ppo
from understudy.control.evaluate import evaluate
from understudy.control.policy import Policy

ARMS = {"bootstrapped": (), "time limit as death": ("ablation_truncation:TimeLimitAsDeath",)}


class TimeLimitAsDeath(gymnasium.Wrapper):
    """Reports a cut episode as one that died."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, False, info


def config(arm: str, gamma: float, seed: int, steps: int, out: str) -> ppo.Config:
    """The same in both arms but for the wrapper."""
    return ppo.Config(
        env="Pendulum-v1",
        wrappers=ARMS[arm],
        num_envs=4,
        steps=steps,
        num_steps_per_env=1024,
        num_minibatches=64,
        num_epochs=10,
        gamma=gamma,
        lam=0.95,
        learning_rate=1e-3,
        normalize_obs=True,
        normalize_reward=True,
        seed=seed,
        num_threads=1,
        output_dir=out,
        quiet=True,
    )


def score(arm: str, gamma: float, seed: int, steps: int) -> dict[str, float]:
    """Train one seed, and score its final policy."""
    with tempfile.TemporaryDirectory() as directory:
        cfg = config(arm, gamma, seed, steps, f"{directory}/run")
        run = ppo.train(cfg)
        policy = Policy.load(run.path / "policy")
        returns = evaluate(policy, cfg, num_episodes=100).returns
    training = [line["episode_return_mean"] for line in run.metrics if line["episode_return_mean"] is not None]
    return {
        "score": statistics.fmean(returns),
        "last_100_training": training[-1],
        "explained_variance": run.metrics[-1]["explained_variance"],
        "seconds": run.metrics[-1]["seconds"],
    }


def interval(scores: list[float], *, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(scores, size=(draws, len(scores))).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def table(results: list[dict]) -> str:
    lines = ["| gamma | time limit is | mean score [95 % interval] | score of each seed |", "|---|---|---|---|"]
    for gamma in sorted({r["gamma"] for r in results}):
        for arm in ARMS:
            scores = [r["score"] for r in results if (r["arm"], r["gamma"]) == (arm, gamma)]
            if scores:
                low, high = interval(scores)
                each = ", ".join(f"{x:.0f}" for x in scores)
                lines.append(f"| {gamma} | {arm} | {statistics.fmean(scores):.0f} [{low:.0f}, {high:.0f}] | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="seeds an arm, from 0")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.9, 0.99])
    parser.add_argument("--results", type=Path, default=Path("runs/ablation_truncation.jsonl"))
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for gamma in args.gammas:
        for seed in range(args.seeds):
            for arm in ARMS:
                about = {"arm": arm, "gamma": gamma, "seed": seed, "steps": args.steps}
                if not any(about.items() <= result.items() for result in results):
                    results.append(about | score(arm, gamma, seed, args.steps))
                    with args.results.open("a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
                    print(json.dumps(results[-1]), flush=True)
    print(table([r for r in results if r["steps"] == args.steps]))
    print(f"Python {platform.python_version()}, torch {torch.__version__}, gymnasium {gymnasium.__version__}")


if __name__ == "__main__":
    main()
