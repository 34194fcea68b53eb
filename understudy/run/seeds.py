"""All randomness of a run comes from here: a generator for each purpose, a seed for each episode."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^31) that depends on the run's seed and on everything that says what it is for."""
    text = "/".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 33


def make_generator(seed: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of a run for one purpose; no two purposes share a stream.

    >>> make_generator(1, "sample").initial_seed() == make_generator(1, "shuffle").initial_seed()
    False
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose))


def seed_shared_generators(seed: int) -> None:
    """Seed the generators that belong to no one, so that code of a user's that draws from them begins anew as it began.

    Those of torch (all devices), NumPy and Python, in this process; none of ours draws from them.
    """
    torch.manual_seed(seed)
    np.random.seed(derive_seed(seed, "numpy"))
    random.seed(derive_seed(seed, "python"))


def shared_generator_states() -> dict[str, Any]:
    """The states of the generators that belong to no one: a user's network or environment may draw from them."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def restore_shared_generators(states: dict[str, Any]) -> None:
    """Put back what `shared_generators` gave."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


@contextmanager
def preserve_shared_generators() -> Iterator[None]:
    """What happens in here moves none of them."""
    states = shared_generator_states()
    try:
        yield
    finally:
        restore_shared_generators(states)
