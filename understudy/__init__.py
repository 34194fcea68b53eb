"""Understudy: one policy-gradient library for agents in environments and language models under a reward."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy import control as control
    from understudy import language as language

__all__ = ["control", "language", "load", "resume"]


def load(path: Any, policy: Any = None) -> Any:
    """The policy of a run, or of a policy directory: an agent ready to `act`, or a `language.Policy`.

    Imports nothing that the run names.

    Args:
        path: RUN or RUN/policy.
        policy: the network of one's own, or the policy around it, that the run was trained with as `policy`.
    """
    from pathlib import Path

    for folder in (Path(path), Path(path) / "policy"):
        if (folder / "understudy.json").is_file():
            from understudy.language.model.policy import Policy as LanguagePolicy

            return LanguagePolicy.load(folder)
    from understudy.control.policy import Policy, policy_path

    return Policy.load(policy_path(Path(path), "path"), policy)


def resume(run: Any, **options: Any) -> Any:
    """Train a run on to its end: see `understudy.run.resume.resume`."""
    from understudy.run.resume import resume

    return resume(run, **options)


def __getattr__(name: str) -> Any:
    if name in ("control", "language"):  # lazily: `understudy --help` must not wait for torch
        return importlib.import_module(f"understudy.{name}")
    raise AttributeError(f"module 'understudy' has no attribute {name!r}")
