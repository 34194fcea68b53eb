"""Whether this machine has the device that a run asks for."""

from __future__ import annotations

import torch

from understudy.run.config import RequestError


def check_device(name: str) -> None:
    """Raise `RequestError` for a device that torch does not know or this machine lacks."""
    problem = ""
    try:
        device = torch.device(name)
        if device.type == "cuda":  # counted without starting CUDA: environments may be forked later
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            problem = "" if (device.index or 0) < count else f"torch sees {count} CUDA devices"
        else:
            torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0][:80]
    if problem:
        raise RequestError(f"device is {name!r}, which is not here ({problem}): try cpu")
