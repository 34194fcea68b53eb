"""Step 1, sample: a small network chooses without its critic, and in NumPy, where an operation costs a fraction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from understudy.control.networks import ActorCritic, Body, CategoricalHead, GaussianHead
from understudy.control.normalize import CLIP, ObsScale
from understudy.control.spaces import is_wide, stacked
from understudy.distribution import Categorical, DiagonalGaussian
from understudy.products import Tanh

PRODUCTS = 2**18
"""Multiplications of a layer up to which NumPy multiplies in one thread, always in the same order."""
BLOCK = 128
"""Choices for which noise is drawn at once."""
ACTIVATIONS = {
    Tanh: np.tanh,
    nn.ReLU: lambda x: np.maximum(x, 0),
    nn.ELU: lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}


class Quick:
    """`quick(obs) -> action, said`: what a policy chooses, as its weights are now, to rounding.

    `said` are the numbers that its distribution is made of; `sampled` makes that of those of a whole record at once.
    Noise is drawn for many choices at once, too; what is left at the end of a record is thrown away. Without a generator it
    chooses the mode. `small`: how many rows it chooses for in NumPy, 0 for as many as come, by the modules.
    """

    def __init__(
        self,
        body: Body,
        head: CategoricalHead | GaussianHead,
        scale: ObsScale | None,
        generator: torch.Generator | None,
        *,
        small: int,
        dtype: torch.dtype,
    ) -> None:
        last = _last(head)
        self.says = Layers(body, last, scale, small, dtype) if small else partial(_by_modules, body, last, scale)
        self.log_std = None if isinstance(head, CategoricalHead) else head.log_std.detach().clone()
        self.width = last.out_features
        self.generator, self.noise = generator, list[np.ndarray]()

    def __call__(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """obs: [B, D] -> action [B] or [B, K], said [B, K]."""
        x = self.says(obs)
        y = x if self.generator is None else x + self._noise(len(x))
        return (y.argmax(axis=1) if self.log_std is None else y), x

    def _noise(self, rows: int) -> np.ndarray:
        """What is added to what is said, [rows, K]: of the very distributions that the policy has."""
        if not self.noise:
            like = torch.zeros(BLOCK, rows, self.width)
            drawn = self._of(like).noise(self.generator)
            self.noise = list((drawn if self.log_std is None else drawn * self.log_std.exp()).numpy()[::-1])
        return self.noise.pop()

    def sampled(self, said: Sequence[np.ndarray], action: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
        """What calls sampled from, [calls, rows, ...], and the log-probs [calls, rows] of what was chosen in them."""
        found = self._of(torch.from_numpy(stacked(said)))
        return found, found.log_prob(torch.from_numpy(stacked(action))).numpy()

    def _of(self, said: Tensor) -> Categorical | DiagonalGaussian:
        if self.log_std is None:
            return Categorical.of(said)
        return DiagonalGaussian(said, self.log_std.expand_as(said))


class Layers:
    """An actor's layers in NumPy, as its weights are now, for `rows` rows of observations of this dtype."""

    def __init__(self, body: Body, last: nn.Linear, scale: ObsScale | None, rows: int, dtype: torch.dtype) -> None:
        linear = [_numbers(x, rows) for x in (*body.mlp, last) if isinstance(x, nn.Linear)]
        then = [ACTIVATIONS[type(x)] for x in body.mlp if not isinstance(x, nn.Linear)]
        self.hidden = [(*numbers, activate) for numbers, activate in zip(linear, then, strict=False)]
        self.last = linear[-1]
        self.scale = None if scale is None else tuple(x.numpy() for x in scale.shift_and_width(0, dtype))

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs: [B, D] -> what the last layer says, [B, K]."""
        x = obs
        if self.scale is not None:
            x = np.minimum(np.maximum((x - self.scale[0]) / self.scale[1], -CLIP), CLIP).astype(np.float32, copy=False)
        for weight, bias, activate in self.hidden:
            x = x.dot(weight)
            x += bias
            x = activate(x)
        weight, bias = self.last
        return x.dot(weight) + bias


@torch.no_grad()
def _by_modules(body: Body, last: nn.Linear, scale: ObsScale | None, obs: np.ndarray) -> np.ndarray:
    """The same for many rows: the critic and all log-probs but the action's are left out."""
    x = torch.from_numpy(obs)
    return last(body.mlp(x if scale is None else scale(x))).numpy()


def quick_form(policy: Any, walker: Any) -> Quick | None:
    """How a policy chooses for a walker, in NumPy where that is small; None where it is made of something else.

    That is: a vector of floats, an MLP on the CPU; one choice of K, or independent normals; no masks, no noise that is held.
    """
    if walker.hold > 1 or walker.masked:
        return None
    network = getattr(policy, "network", None)
    if not isinstance(network, ActorCritic) or policy.memory or policy.device.type != "cpu":
        return None
    body, head, space = network.actor, network.head, policy.observation_space
    plain = space.shape is not None and len(space.shape) == 1 and space.dtype.kind == "f"
    assert isinstance(head, CategoricalHead | GaussianHead)
    one = not (head.sizes or head.bits) if isinstance(head, CategoricalHead) else not (head.state_noise or head.squash)
    weights = [*body.parameters(), *_last(head).parameters()]
    if not plain or not one or any(x.dtype != torch.float32 for x in weights):
        return None
    small = walker.rows if walker.rows * max(x.numel() for x in weights) <= PRODUCTS else 0
    dtype = torch.float64 if policy.exact and is_wide(space) else torch.float32
    return Quick(body, head, policy.obs_scale, walker.generator if walker.sample else None, small=small, dtype=dtype)


def _last(head: CategoricalHead | GaussianHead) -> nn.Linear:
    return head.logits if isinstance(head, CategoricalHead) else head.mean


def _numbers(layer: nn.Linear, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weights, [inputs, outputs], and its bias, [rows, outputs]: adding what is as large takes half as long."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.ascontiguousarray(weight.T), np.full((rows, len(bias)), bias)
