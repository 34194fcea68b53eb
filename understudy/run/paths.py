"""A run's paths: absolute inside, so that an environment may change the working directory; short where they are printed."""

from __future__ import annotations

import os
from pathlib import Path


def short_path(path: Path) -> str:
    """A path as one would type it: from the current folder where it is inside, else whole."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def absolute_path(path: str | Path) -> Path:
    """A path that stays the same when the working directory changes; links are not followed."""
    return Path(os.path.abspath(path))
