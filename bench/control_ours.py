"""Understudy's side of bench/control.py: one PPO run through the public API, a line of JSON an iteration.

With `profile` among the job's keys the last line holds the seconds of an iteration by step, warm-up left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from understudy.control import ppo
from understudy.control.policy import Policy
from understudy.control.presets import preset
from understudy.control.rollout import RolloutCollector
from understudy.fast.compiled_update import CompiledUpdate

WARMUP = 3
PARTS = [  # what is timed: its name, where it stands, what it is part of
    ("1 sample", RolloutCollector, "collect"),
    ("of it: environments", None, "step"),
    ("2 score", Policy, "normalize_reward"),
    ("3 value", ppo, "estimate_values"),
    ("4 advantage", ppo, "compute_advantages"),
    ("5 update", ppo, "update"),
    ("5 update", CompiledUpdate, "update"),
]


def main(job: dict[str, Any]) -> None:
    """job: `steps`, `seed`, `device`, `threads`, `out`, and `fields`, a config's."""
    given = {"num_threads": job["threads"]} | job["fields"]
    common = {
        "steps": job["steps"],
        "seed": job["seed"],
        "device": job["device"],
        "output_dir": job["out"],
        "quiet": True,
    }
    spent = watched() if "profile" in job else {}
    marks = []
    for line in ppo.iterate(preset(ppo.Config, **(given | common))):
        window = min(line["episodes"], 100)
        print(json.dumps({"steps": line["steps"], "window": window, "mean": line["episode_return_mean"]}), flush=True)
        marks.append(time.perf_counter())
        if len(marks) == WARMUP:
            spent.update(dict.fromkeys(spent, 0.0))
    if spent:
        count = len(marks) - WARMUP
        print(json.dumps({"whole": (marks[-1] - marks[WARMUP - 1]) / count} | {k: v / count for k, v in spent.items()}))


def watched() -> dict[str, float]:
    """Seconds spent in each part of an iteration from now on."""
    spent = {name: 0.0 for name, *_ in PARTS}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - since

        return run

    for name, owner, attribute in PARTS:
        if owner is not None:
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))

    def walk_in(self: RolloutCollector, envs: Any) -> None:  # more than once, where a checkpoint renews them
        envs.step = timed("of it: environments", envs.step)
        vars(self)["walked"] = envs

    RolloutCollector.envs = property(lambda self: vars(self)["walked"], walk_in)  # pyright: ignore[reportAttributeAccessIssue]
    return spent


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
