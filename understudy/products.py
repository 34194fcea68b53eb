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

THERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # its name may change
LARGE = 2**20
"""Multiplications from which on oneDNN is quicker, its preparation of the weights included."""
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's malloc.h


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, as `torch.nn.functional.linear`. x [..., K], weight [M, K], bias [M] -> [..., M]."""
    if not _suits(x, weight, x.numel() * weight.shape[0]):
        return functional.linear(x, weight, bias)
    rows = x.numel() // max(x.shape[-1], 1)
    if torch.is_grad_enabled():
        found = _Linear.apply(x.reshape(rows, x.shape[-1]), weight, bias)
    else:
        found = _by_onednn(x.reshape(rows, x.shape[-1]), weight, bias)
    return found if x.ndim == 2 else found.view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(x, self.weight, self.bias)


class Tanh(nn.Module):
    """tanh(x), as 2 sigmoid(2x) - 1: torch's own takes ten times as long for float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return _Tanh.apply(x)


def rounded(rows: int) -> int:
    """`rows` or somewhat more: 16 different numbers a doubling.

    oneDNN makes a kernel for each number of rows, in 0.4 ms and half a MiB, and keeps a thousand.
    """
    step = max(16, 2 ** (rows.bit_length() - 5))
    return -(-rows // step) * step


def keep_freed() -> None:
    """Let this process keep the memory that its tensors free, where its allocator is glibc's.

    Else pieces of some MiB go back to the system, which clears them page by page when they are asked for again. 32 MiB is
    the largest piece that every glibc lets its heap have.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if option is not None:
        option(MMAP_THRESHOLD, 2**25)
        option(TRIM_THRESHOLD, 2**31 - 1)


def _suits(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    return (
        multiplications >= LARGE
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and THERE
        and not torch.is_autocast_enabled("cpu")
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# An operation of our own, for torch's compiler takes the weights of oneDNN's own for constants. It costs some microseconds
# more, wherever something is to learn: while `make_fx` traces for understudy/compiled.py, torch.compiler.is_compiling() is
# False.
_library = torch.library.Library("understudy", "DEF")
_library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("product", _by_onednn, "CPU")
torch.library.register_fake("understudy::product", lambda x, weight, bias: x.new_empty(len(x), len(weight)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.understudy.product(x, weight, bias)


class _Linear(Function):
    """Its gradients are products of the same sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if of_x else None,
            _of_weight(grad, x) if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )


class _Tanh(Function):
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


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad' x, [M, K]. The wider of the two is the product's right side: up to twice as quick."""
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t(), x.t())
    return _product(x.t(), grad.t()).t()
