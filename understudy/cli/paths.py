"""Paths as the command line prints them."""

from __future__ import annotations

import os
from pathlib import Path


def short(path: Path) -> str:
    """A path as one would type it: from the current folder where it is inside, else whole."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
