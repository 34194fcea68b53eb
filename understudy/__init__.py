"""Understudy: one policy-gradient library for agents in environments and language models under a reward."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy import control as control

__all__ = ["control", "load"]


def load(path: Any, network: Any = None) -> Any:
    """The policy of a run, or of a policy directory, ready to `act`. Imports nothing that the run names.

    Args:
        path: RUN or RUN/policy.
        network: for a policy around a network of one's own, that network.
    """
    from pathlib import Path

    from understudy.control.policy import Policy, policy_path

    return Policy.load(policy_path(Path(path), "path"), network)


def __getattr__(name: str) -> Any:
    if name == "control":  # lazily: `understudy --help` must not wait for torch
        return importlib.import_module("understudy.control")
    raise AttributeError(f"module 'understudy' has no attribute {name!r}")
