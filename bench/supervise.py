"""What supervision costs: steps per second beside Gymnasium's `AsyncVectorEnv`, and how long a restart takes.

    python bench/supervise.py

Both step HalfCheetah-v5 in four processes with the same actions, in NEXT_STEP mode, by turns (A B B A); the medians are
compared. A restart is timed from the call in which a worker is killed to the first observation of its new episode.
Writes bench/results/supervise.json and the figures of docs/supervise.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, VectorEnv

from understudy.control.envs.fault_tolerant import FaultTolerantVectorEnv

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "supervise.json", ROOT / "docs" / "supervise.md"
BEGIN, END = "<!-- figures of bench/supervise.py -->", "<!-- end of figures -->"


class Mortal(gymnasium.Wrapper):
    """An environment that can be told to kill its process at the next step."""

    doomed = False

    def doom(self) -> None:
        self.doomed = True

    def step(self, action):
        if self.doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.env.step(action)


def make() -> gymnasium.Env:
    return Mortal(gymnasium.make("HalfCheetah-v5", disable_env_checker=True))


def steps_per_second(envs: VectorEnv, actions: list[np.ndarray]) -> float:
    since = time.perf_counter()
    for action in actions:
        envs.step(action)
    return len(actions) * envs.num_envs / (time.perf_counter() - since)


def restart_seconds(envs: FaultTolerantVectorEnv, action: np.ndarray) -> float:
    """From a step in which every worker dies to the first observations of new episodes, over the number of workers."""
    envs.call("doom")
    since = time.perf_counter()
    envs.step(action)
    envs.step(action)  # NEXT_STEP: this one resets
    return (time.perf_counter() - since) / envs.num_envs


def measure(num_envs: int, calls: int, rounds: int) -> dict[str, object]:
    kinds: dict[str, Callable[[], VectorEnv]] = {
        "AsyncVectorEnv": lambda: AsyncVectorEnv([make] * num_envs),
        "Supervised": lambda: FaultTolerantVectorEnv([make] * num_envs, step_timeout=60.0),
    }
    envs = {name: kind() for name, kind in kinds.items()}
    space = envs["AsyncVectorEnv"].action_space
    space.seed(0)
    actions = [space.sample() for _ in range(calls)]
    speeds: dict[str, list[float]] = {name: [] for name in envs}
    for each in envs.values():
        each.reset(seed=0)
        steps_per_second(each, actions[:100])
    before = os.getloadavg()[0]
    for _ in range(rounds):
        for name in (*envs, *reversed(envs)):
            speeds[name].append(steps_per_second(envs[name], actions))
    load = max(before, os.getloadavg()[0])
    restarts = [restart_seconds(envs["Supervised"], actions[0]) for _ in range(5)]  # pyright: ignore[reportArgumentType]
    for each in envs.values():
        each.close()
    median = {name: statistics.median(found) for name, found in speeds.items()}
    return {
        "env": "HalfCheetah-v5",
        "num_envs": num_envs,
        "calls": calls,
        "steps_per_second": speeds,
        "median": median,
        "ratio": median["Supervised"] / median["AsyncVectorEnv"],
        "restart_seconds": statistics.median(restarts),
        "load": load,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "gymnasium": gymnasium.__version__, "numpy": np.__version__},
        "processor": processor(),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def figures(found: dict) -> str:
    median, versions = found["median"], found["versions"]
    rows = len(found["steps_per_second"]["Supervised"])
    return (
        f"| {found['env']}, {found['num_envs']} environments | steps a second, median of {rows} |\n|---|---|\n"
        + "".join(f"| `{name}` | {speed:,.0f} |\n" for name, speed in median.items())
        + f"| ratio | {found['ratio']:.2f} |\n\nA killed worker is back at the first observation of a new episode after "
        f"{1000 * found['restart_seconds']:.0f} ms (median of 5 times {found['num_envs']}).\n\n"
        f"`python bench/supervise.py`; {found['processor']}, {found['cores']} cores, load up to {found['load']:.1f} "
        "(the two kinds by turns, so that both met the same); "
        f"Python {versions['python']}, Gymnasium {versions['gymnasium']}, NumPy {versions['numpy']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-envs", type=int, default=4)
    parser.add_argument("--calls", type=int, default=1000, help="steps of every environment a turn")
    parser.add_argument("--rounds", type=int, default=10, help="of two turns each")
    args = parser.parse_args()
    found = measure(args.num_envs, args.calls, args.rounds)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    page = PAGE.read_text()
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{figures(found)}{END}{tail}")
    print(figures(found))


if __name__ == "__main__":
    main()
