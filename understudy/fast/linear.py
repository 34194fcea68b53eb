"""Linear layers on a CPU by whichever of torch's two libraries is quicker there: large float32 products go to oneDNN.

torch hands float32 products to MKL, which uses half of an AVX-512 processor's width where it is not Intel's; oneDNN, which
comes with torch too, uses all of it (docs/decisions.md). Small ones stay with MKL: a call costs less. The choice hangs on
sizes, type and device alone, so a run is the same every time. What products leave behind is as large as what they take:
`keep_freed` has it used again.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)  # its name may change
MIN_ONEDNN_MULTIPLICATIONS = 2**20
"""Multiplications from which on oneDNN is quicker, its preparation of the weights included."""
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's malloc.h


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, as `torch.nn.functional.linear`. x [..., K], weight [M, K], bias [M] -> [..., M]."""
    if not _is_suited_to_onednn(x, weight, x.numel() * weight.shape[0]):
        return functional.linear(x, weight, bias)
    rows = x.numel() // max(x.shape[-1], 1)
    if torch.is_grad_enabled():
        output = _LinearFunction.apply(x.reshape(rows, x.shape[-1]), weight, bias)
    else:
        output = _onednn_linear(x.reshape(rows, x.shape[-1]), weight, bias)
    return output if x.ndim == 2 else output.view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(x, self.weight, self.bias)


class Tanh(nn.Module):
    """tanh(x), as 2 sigmoid(2x) - 1: torch's own takes ten times as long for float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return _TanhFunction.apply(x)


def round_up_rows(rows: int) -> int:
    """`rows` or somewhat more: 16 different numbers a doubling.

    oneDNN makes a kernel for each number of rows, in 0.4 ms and half a MiB, and keeps a thousand.
    """
    step = max(16, 2 ** (rows.bit_length() - 5))
    return -(-rows // step) * step


def keep_freed_memory() -> None:
    """Let this process keep the memory that its tensors free, where its allocator is glibc's.

    Else pieces of some MiB go back to the system, which clears them page by page when they are asked for again. 32 MiB is
    the largest piece that every glibc lets its heap have.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**25)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _is_suited_to_onednn(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    return (
        multiplications >= MIN_ONEDNN_MULTIPLICATIONS
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and HAS_ONEDNN_LINEAR
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# An operation of our own, for torch's compiler takes the weights of oneDNN's own for constants. It costs some microseconds
# more, wherever something is to learn: while `make_fx` traces for fast/compiled_update.py,
# torch.compiler.is_compiling() is False.
_library = torch.library.Library("understudy", "DEF")
_library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("product", _onednn_linear, "CPU")
torch.library.register_fake("understudy::product", lambda x, weight, bias: x.new_empty(len(x), len(weight)))


def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.understudy.product(x, weight, bias)


class _LinearFunction(Function):
    """Its gradients are products of the same sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear_op(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _linear_op(grad, weight.t()) if needs_x else None,
            _weight_gradient(grad, x) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


class _TanhFunction(Function):
    """Its gradient needs but what it gave: nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.rsub(torch.sigmoid(2 * x), -1, alpha=-2)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, y)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad' x, [M, K]. The wider of the two is the product's right side: up to twice as quick."""
    if grad.shape[1] <= x.shape[1]:
        return _linear_op(grad.t(), x.t())
    return _linear_op(x.t(), grad.t()).t()
