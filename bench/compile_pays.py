"""From how many optimizer steps on compiling them pays: `python bench/compile_pays.py`, bench/results/compile_pays.json.

One minibatch of PPO on CartPole's and HalfCheetah's networks, plain and compiled, by turns, one thread; and the seconds that
tracing and compiling take without any cache. `PAYS` in understudy/control/ppo.py is the largest of the break-even points.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # nothing is there yet
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import gymnasium
import torch

from understudy.batch import Batch, Trajectory, map_tensors
from understudy.control.config import NetworkConfig
from understudy.control.policy import Policy
from understudy.control.ppo import Config, standardize_advantages
from understudy.control.training import adam
from understudy.fast.compiled_update import CompiledUpdate
from understudy.objective import ppo
from understudy.update import update

RESULTS = Path(__file__).parent / "results" / "compile_pays.json"
SIZES = [("CartPole-v1", 64), ("CartPole-v1", 128), ("HalfCheetah-v5", 64), ("HalfCheetah-v5", 512)]
STEPS, ROUNDS = 20, 7


def record_of(env: gymnasium.Env, policy: Policy, steps: int) -> Batch:
    obs = torch.randn(1, steps, *(env.observation_space.shape or ()))
    with torch.no_grad():
        found, value = policy(obs)
        action = found.sample()
        logprob = found.log_prob(action)
    blank = torch.zeros(1, steps)
    record = Trajectory(obs, action, logprob, blank == 0, blank, blank > 0, blank > 0)
    old = map_tensors(torch.Tensor.detach, found)
    return Batch.of(
        record, value=value, advantage=torch.randn(1, steps), target=torch.randn(1, steps), old_distribution=old
    )


def measured(name: str, rows: int) -> dict[str, float | str]:
    """Seconds of an optimizer step, plain and compiled, and of compiling it."""
    env = gymnasium.make(name)
    policy = Policy.build(env.observation_space, env.action_space, NetworkConfig(), seed=1)
    record, optimizer = record_of(env, policy, rows * STEPS), adam(policy, Config(env=name))
    objective = partial(ppo, clip=0.2, value_coef=0.5, entropy_coef=0.01)
    options = {
        "num_epochs": 1,
        "num_minibatches": STEPS,
        "max_grad_norm": 0.5,
        "transform_minibatch": standardize_advantages,
    }
    generator = torch.Generator()

    def seconds(step: Callable[..., object]) -> float:
        since = time.perf_counter()
        step(policy, optimizer, record, objective, generator=generator, on_nonfinite=lambda _: None, **options)
        return time.perf_counter() - since

    compiled = CompiledUpdate(rows * STEPS, varying=("clip",)).update
    first = seconds(compiled)
    turns = [(seconds(update), seconds(compiled)) for _ in range(ROUNDS)]
    plain, fast = (statistics.median(side) / STEPS for side in zip(*turns, strict=True))
    pays = round(first / (plain - fast))
    return {"env": name, "rows": rows, "plain": plain, "compiled": fast, "compiling": first, "pays_from": pays}


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for size in SIZES:
        found.append(measured(*size))
        print(found[-1], flush=True)
    about = {"torch": torch.__version__, "threads": 1, "rows": found}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
