"""The work of bench/language.py, said once for us and for peers: prompts, reward, clock, memory. Standard library alone.

A worker is a script that gets one job as JSON, does it in its own process and prints one line of JSON at the end.
"""

from __future__ import annotations

import cProfile
import json
import os
import random
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+-*=:; "
SPECIAL = ("<pad>", "<eos>", "<unk>")
EVEN = frozenset("02468")
HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 128, 4, 4, 2, 352


def sums(count: int = 4096) -> list[dict[str, str]]:
    """Prompts like `12+7=`, a token a character, and their answers."""
    source, found = random.Random(0), []
    for _ in range(count):
        digits = source.randint(1, 4)
        a, b = source.randrange(10**digits), source.randrange(10**digits)
        found.append({"prompt": f"{a}+{b}=", "answer": str(a + b)})
    return found


class Reward:
    """The share of even digits among a completion's characters, for us and for TRL alike; counts the tokens it is shown."""

    __name__ = "even_digits"  # TRL names a metric after it

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return [sum(c in EVEN for c in text) / max(len(text), 1) for text in completions]


class Clock:
    """What one process has to tell: when each iteration ended, its tokens, and how much memory it ever held."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.ends, self.tokens = job, [], []
        self.imported = resident()
        self.profiler = cProfile.Profile() if "profile" in job else None  # of what comes after the warm-up

    def start(self) -> None:
        """The loop begins: imports, loading and setting up are over."""
        self.ends.append(time.time())

    def end(self, tokens: int) -> None:
        """An iteration ended, in which so many tokens were sampled."""
        self.ends.append(time.time())
        self.tokens.append(tokens)
        if self.profiler is not None and len(self.tokens) == self.job["warmup"]:
            self.profiler.enable()
        if self.profiler is not None and self.done:
            self.profiler.disable()
            self.profiler.dump_stats(self.job["profile"])

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.job["warmup"] + self.job["iterations"]

    def report(self, model_bytes: int, *packages: str, peak: int | None = None, **more: Any) -> None:
        """Print it. `model_bytes`: of all models' parameters; `peak`: of a device's memory, where that counts."""
        on_device = peak is not None
        print()
        print(
            json.dumps(
                {
                    "warmup": self.job["warmup"],
                    "seconds": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)],
                    "tokens": self.tokens,
                    "startup": self.ends[0] - self.job["spawned"],
                    "end_to_end": self.ends[-1] - self.job["spawned"],
                    "peak_bytes": peak if on_device else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                    "imports_bytes": 0 if on_device else self.imported,
                    "model_bytes": model_bytes,
                    "load": os.getloadavg()[0],
                    "versions": {name: version(name) for name in packages},
                    **more,
                }
            )
        )


def job() -> dict[str, Any]:
    """What this worker is to do."""
    return json.loads(sys.argv[1])


def resident() -> int:
    """Bytes of memory that this process holds now; what it ever held where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def trunk_flops(lengths: list[int]) -> float:
    """Of reading rows of these lengths once: two a weight and token, and attention's two products over what is behind."""
    weights = HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * INNER)
    behind = sum(n * (n + 1) / 2 for n in lengths)
    return LAYERS * (2 * weights * sum(lengths) + 4 * HIDDEN * behind)


def ppo_flops(lengths: list[int], chosen: int, *, vocabulary: int, epochs: int, critic: str) -> float:
    """What PPO's definition asks for in one iteration; nothing that is computed twice counts twice.

    Sampling reads each row once; the reference and the reward model read it once, and so does whoever says V; an epoch
    reads it forwards and backwards (three times a forward pass), twice where the critic is separate. Logits of a
    chosen token: one row of the head, for the sampler, for the reference and three times an epoch.

    Args:
        lengths: tokens of each row, prompt included.
        chosen: tokens that were sampled, of all rows.
    """
    trunk, head = trunk_flops(lengths), 2.0 * HIDDEN * vocabulary * chosen
    trunks = 2 if critic == "separate" else 1
    return (trunk + head) + (trunk + head) + 2 * trunk + epochs * 3 * (trunks * trunk + head)
