"""All randomness of a run comes from here: a generator for each purpose, a seed for each episode."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^31) that depends on the run's seed and on everything that says what it is for."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 33


def generator(seed: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of a run for one purpose; no two purposes share a stream.

    >>> generator(1, "sample").initial_seed() == generator(1, "shuffle").initial_seed()
    False
    """
    return torch.Generator(device).manual_seed(derive(seed, purpose))
