"""The optimizers of control: torch's own, in a form that starts at once."""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from understudy.control.config import Config
from understudy.control.policy import WEIGHTS
from understudy.run.checkpoint import CorruptFileError, list_checkpoints, load_state, sha256, verify
from understudy.run.config import RequestError
from understudy.run.store import read_optimizer_state

WRAPPED_METHODS = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
"""Methods that torch wraps, so that its compiler leaves them alone: calling one imports that compiler, for 0.6 s."""


def adam(policy: torch.nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """One Adam over all parameters."""
    fused = torch.device(cfg.device).type in ("cpu", "cuda")
    return Adam(policy.parameters(), lr=cfg.learning_rate, eps=cfg.adam_eps, fused=fused)


def load_moments(optimizer: torch.optim.Optimizer, cfg: Config, policy: Path) -> Path:
    """Give an optimizer the moments and step counts of another run's; learning rate and the like stay the config's.

    Args:
        policy: the directory of the policy that the run begins with.

    Returns:
        The checkpoint they are from: one that holds this very policy.

    Raises:
        RequestError: there is none, or its optimizer is of another kind, or has other parameters.
    """
    try:
        checkpoint = _with_policy(policy)
        state = _check_state(
            optimizer, read_optimizer_state(checkpoint), load_state(checkpoint)["optimizer"]["param_groups"]
        )
        num_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
        is_complete = len(state) == num_parameters and len({float(entry["step"]) for entry in state.values()}) == 1
        if (
            not is_complete and "value_coef" not in cfg.fields_without_effect()
        ):  # REINFORCE without a critic leaves its parameters alone
            raise ValueError("its optimizer did not move all parameters that learn here, such as the critic's")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"init_optimizer is True, and init_from is {cfg.init_from!r}, but {' '.join(str(error).split())}: "
            "name a run with the "
            "same network and optimizer, or one of its checkpoints, or leave init_optimizer out"
        ) from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return checkpoint


def _with_policy(policy: Path) -> Path:
    """The newest whole checkpoint of a policy's run with the same weights (other moments belong to other weights).

    Raises:
        ValueError: none does.
    """
    folder, whole = policy.parent / "checkpoints", []
    for place in (policy, *(folder / name for name in reversed(list_checkpoints(folder)))):
        with suppress(CorruptFileError, OSError):  # a run that is going on may drop one meanwhile
            verify(place)
            whole.append(place)
            if sha256(place / WEIGHTS) == sha256(policy / WEIGHTS):
                return place
    if not whole:
        raise ValueError("it is no run with a whole checkpoint")
    raise ValueError(
        f"the policy of none of its checkpoints ({', '.join(x.name for x in whole)}) is that of '{policy}'"
    )


def _check_state(optimizer: torch.optim.Optimizer, state: Any, groups: Any) -> Any:
    """The state of another optimizer, with its groups.

    Raises:
        ValueError: this one could not have that state.
    """
    sizes, expected_sizes = ([len(group["params"]) for group in x] for x in (groups, optimizer.param_groups))
    if sizes != expected_sizes:
        raise ValueError(f"its optimizer has groups of {sizes} parameters, and this run's of {expected_sizes}")
    parameters, expected_keys = (
        [p for group in optimizer.param_groups for p in group["params"]],
        STATE_KEYS[type(optimizer)],
    )
    for number, entry in state.items():
        if entry.keys() != expected_keys:
            raise ValueError(f"its optimizer keeps {sorted(entry)}, and this run's {sorted(expected_keys)}")
        for name, tensor in entry.items():
            shape = torch.Size() if name == "step" else parameters[number].shape
            if tensor.shape != shape:
                raise ValueError(f"its optimizer has {name} of shape {[*tensor.shape]}, and this run's {[*shape]}")
    return state


def _without_wrappers(optimizer_class: Any) -> Any:
    """An optimizer of torch's without those wrappers. Its step is the same function."""
    methods = {name: inspect.unwrap(getattr(optimizer_class, name)) for name in WRAPPED_METHODS}
    return type(optimizer_class.__name__, (optimizer_class,), methods | {"step": torch.no_grad()(methods["step"])})


Adam, RMSprop = _without_wrappers(torch.optim.Adam), _without_wrappers(torch.optim.RMSprop)
STATE_KEYS = {Adam: {"step", "exp_avg", "exp_avg_sq"}, RMSprop: {"step", "square_avg"}}
"""What each keeps of a parameter."""
