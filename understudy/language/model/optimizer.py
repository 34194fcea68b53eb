"""AdamW that does not lose small steps in half precision: it keeps float32 copies (Micikevicius et al. 2018, sec. 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASTER = "master"  # the name of the float32 copy in the optimizer's state


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, to the bit, where parameters are float32.

    A parameter in half precision has a float32 copy in the state of the optimizer. The copy takes the step, with moments in
    float32, and the parameter is the copy rounded: bfloat16 has 8 bits of precision, so that steps of 1e-6 would otherwise
    change no weight above 5e-4. This costs 12 bytes a parameter beside its own 2 and the gradient's 2.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        half_parameters = [(p, p.data, p.grad) for p in parameters if p.dtype.itemsize < 4]
        for parameter, half, gradient in half_parameters:
            master = self.state[parameter].pop(MASTER, None)
            if master is None or not torch.equal(master.to(half.dtype), half):  # somebody else has set the parameter
                master = half.float()
            parameter.grad = None
            parameter.data = master
            parameter.grad = gradient.float()
        super().step()
        for parameter, half, gradient in half_parameters:
            parameter.grad = None
            self.state[parameter][MASTER] = parameter.data
            parameter.data = half.copy_(parameter.data)
            parameter.grad = gradient

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; torch alone would round the state to each parameter's own precision."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                        self.state[parameter][name] = value.to(parameter.device, copy=True)
