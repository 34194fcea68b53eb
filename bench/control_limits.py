"""What bench/control.py holds a speed against besides peers: bare environment steps, and matrix products alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import torch

# Multiply-adds of an actor 4-64-64-2 and a critic 4-64-64-1, for one observation.
MULTIPLY_ADDS = (4 * 64 + 64 * 64 + 64 * 2) + (4 * 64 + 64 * 64 + 64 * 1)


def flop_per_step(epochs: int) -> int:
    """What PPO on CartPole cannot do without, per chosen step: once forward, and every epoch forward and backward."""
    return 2 * MULTIPLY_ADDS * (1 + 3 * epochs)


def bare_env(job: dict[str, Any]) -> None:
    """Steps of one environment with random actions drawn beforehand, resets included."""
    env = gymnasium.make(job["env"], disable_env_checker=True)
    env.action_space.seed(job["seed"])
    actions = [env.action_space.sample() for _ in range(1000)]
    env.reset(seed=job["seed"])
    for steps in range(1000, job["steps"] + 1, 1000):
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        print(json.dumps({"steps": steps}), flush=True)


def products(job: dict[str, Any]) -> None:
    """The steps there would be if nothing took time but products of 64-wide float32 layers, by `torch.mm`."""
    multiply(job, lambda x, weights, out: torch.mm(x, weights, out=out))


def products_by_onednn(job: dict[str, Any]) -> None:
    """The same by oneDNN, which uses more of some processors."""
    multiply(job, lambda x, weights, out: torch.ops.mkldnn._linear_pointwise(x, weights, None, "none", [], ""))


def multiply(job: dict[str, Any], product: Callable[..., torch.Tensor]) -> None:
    """Products small enough for a cache, and the steps that they would do for."""
    torch.set_num_threads(job["threads"])
    rows, device = 8192, job["device"]
    weights, x, out = torch.randn(64, 64, device=device), torch.randn(rows, 64, device=device), None
    steps, flop = 0.0, 2 * rows * 64 * 64
    while steps < job["steps"]:
        for _ in range(500):
            out = product(x, weights, out)
        if device != "cpu":
            torch.cuda.synchronize()
        steps += 500 * flop / flop_per_step(job["epochs"])
        print(json.dumps({"steps": round(steps)}), flush=True)


if __name__ == "__main__":
    kinds = {"bare_env": bare_env, "products": products, "products_by_onednn": products_by_onednn}
    kinds[sys.argv[1]](json.loads(sys.argv[2]))
