"""Every method on CartPole-v1 over twenty seeds: `make methods`. Results are saved as they come and not run again.

The score is the mean return of 100 episodes of the final policy, mode actions, seeds never trained on; `solved` counts the
seeds whose mean return over 100 training episodes reached 475 on the way. A random policy scores about 22.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "methods"
SEEDS = range(201, 221)
ENV = "CartPole-v1"
REINFORCE = {"steps": 100_000, "num_envs": 8, "learning_rate": 3e-3}
ONE_STEP = {
    "steps": 30_000,
    "num_envs": 1,
    "num_steps_per_env": 1,
    "lam": 0.0,
    "gamma": 0.98,
    "optimizer": "adam",
    "value_coef": 0.5,
}
ONE_STEP |= {"learning_rate": 1e-3, "max_grad_norm": 10.0, "entropy_coef": 0.01, "log_every": 500}
ONE_STEP |= {"normalize_obs": True, "normalize_reward": True}  # or one action is left before the critic is right
# name -> recipe, fields over the env's tuned preset
METHODS = {
    "reinforce, plain": ("reinforce", {"baseline": "none", **REINFORCE}),
    "reinforce, standardised": ("reinforce", {"baseline": "standardize", **REINFORCE}),
    "reinforce, learned baseline": ("reinforce", {"baseline": "value", **REINFORCE}),
    "reinforce, group baseline": ("reinforce", {"baseline": "group", **REINFORCE}),
    "reinforce, leave-one-out": ("reinforce", {"baseline": "leave_one_out", **REINFORCE}),
    "actor-critic, one step": ("actor_critic", ONE_STEP),
    "actor-critic, n-step": ("actor_critic", {}),
    "ppo, clip": ("ppo", {}),
    "ppo, KL fixed": ("ppo", {"objective": "penalty", "kl_old_coef": 3.0}),
    "ppo, KL adaptive": ("ppo", {"objective": "penalty", "kl_old_coef": 1.0, "adaptive_kl_target": 0.01}),
}


def run(name: str, seed: int) -> Path:
    path = RESULTS / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
    if path.exists():
        return path
    import importlib

    from understudy import load
    from understudy.control.evaluate import evaluate
    from understudy.control.presets import preset

    recipe, fields = METHODS[name]
    module = importlib.import_module(f"understudy.control.{recipe}")
    with tempfile.TemporaryDirectory() as out:
        config = preset(module.Config, ENV, seed=seed, quiet=True, output_dir=f"{out}/run", **fields)
        began = time.time()
        done = module.train(config)
        returns = evaluate(load(done.path), config, num_episodes=100).returns
        found = {
            "name": name,
            "seed": seed,
            "steps": done.metrics[-1]["steps"],
            "seconds": time.time() - began,
            "score": statistics.fmean(returns),
            "solved_at": done.solved_at,
            "best_training_return": max(m["episode_return_mean"] or 0 for m in done.metrics),
            "optimizer_steps_a_step": sum(m["optimizer_steps"] for m in done.metrics) / len(done.metrics),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    jobs = [(name, seed) for name in METHODS for seed in SEEDS]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        found = [json.loads(path.read_text()) for path in pool.map(run, *zip(*jobs, strict=True))]
    lines = [
        "# Methods on CartPole-v1",
        "",
        "`make methods`: twenty seeds, 201 to 220; the score is the mean of 100 episodes of the final policy (mode actions, "
        "seeds never trained on); solved: seeds whose last-100 training mean reached 475. A random policy scores about 22.",
        "",
        "| method | steps | mean score | solved | scores of the seeds | best training mean of each |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        rows = [f for f in found if f["name"] == name]
        scores = [f["score"] for f in rows]
        best = " ".join(f"{f['best_training_return']:.0f}" for f in rows)
        solved = sum(f["solved_at"] is not None for f in rows)
        lines.append(
            f"| {name} | {rows[0]['steps']:,} | {statistics.fmean(scores):.1f} | {solved} of {len(rows)} | "
            f"{' '.join(f'{s:.0f}' for s in scores)} | {best} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parents[1] / "docs" / "methods.md").write_text(text)


if __name__ == "__main__":
    main()
