"""The optimizers of control: torch's own, in a form that starts at once."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from understudy.control.config import Config

IMPORTING = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
"""Methods that torch wraps, so that its compiler leaves them alone: calling one imports that compiler, for 0.6 s."""


def adam(policy: torch.nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """One Adam over all parameters."""
    fused = torch.device(cfg.device).type in ("cpu", "cuda")
    return Adam(policy.parameters(), lr=cfg.learning_rate, eps=cfg.adam_eps, fused=fused)


def _light(kind: Any) -> Any:
    """An optimizer of torch's without those wrappers. Its step is the same function."""
    own = {name: inspect.unwrap(getattr(kind, name)) for name in IMPORTING}
    return type(kind.__name__, (kind,), own | {"step": torch.no_grad()(own["step"])})


Adam, RMSprop = _light(torch.optim.Adam), _light(torch.optim.RMSprop)
