"""What must hold before the first step, on real prompts. A check that fails refuses to start and names the mend."""

from __future__ import annotations

from typing import Any


def check(cast: Any) -> None:
    """Placeholder until the checks stand."""
