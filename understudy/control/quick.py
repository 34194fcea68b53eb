"""Step 1, sample: a small network chooses in NumPy, where an operation costs a fraction of a Tensor's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from understudy.control.networks import ActorCritic, Body, CategoricalHead, GaussianHead
from understudy.control.normalize import CLIP, ObsScale
from understudy.distribution import HALF_LOG_2PI, Categorical, DiagonalGaussian
from understudy.sample import Choice, choose

PRODUCTS = 2**18
"""Multiplications of a layer up to which NumPy multiplies in one thread, always in the same order."""
BLOCK = 128
"""Choices for which noise is drawn at once."""
ACTIVATIONS = {
    nn.Tanh: np.tanh,
    nn.ReLU: lambda x: np.maximum(x, 0),
    nn.ELU: lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}


class Quick:
    """`quick(obs, ...) -> Choice`: what `sample.choose` says of a policy as its weights are now, to rounding.

    Noise is drawn for many choices at once; what is left at the end of a record is thrown away.
    """

    def __init__(self, body: Body, head: CategoricalHead | GaussianHead, scale: ObsScale | None) -> None:
        last = head.logits if isinstance(head, CategoricalHead) else head.mean
        self.layers = [_numbers(x) if isinstance(x, nn.Linear) else ACTIVATIONS[type(x)] for x in [*body.mlp, last]]
        self.scale = None if scale is None else tuple(x.numpy() for x in scale.shift_and_width(0))
        self.log_std = None if isinstance(head, CategoricalHead) else head.log_std.detach().numpy()
        self.width = last.out_features
        self.noise: list[np.ndarray] = []

    def __call__(self, obs: Tensor, state=None, start=None, *, generator=None, noise=None, sample=True) -> Choice:
        """obs: float32 [B, 1, D]; there is no state, and no noise that is held."""
        x = obs[:, 0].numpy()
        if self.scale is not None:
            x = np.minimum(np.maximum((x - self.scale[0]) / self.scale[1], -CLIP), CLIP)
        for layer in self.layers:
            x = x @ layer[0] + layer[1] if isinstance(layer, tuple) else layer(x)
        if sample and not self.noise:
            like = torch.empty(BLOCK, len(x), self.width)
            drawn = Categorical(like) if self.log_std is None else DiagonalGaussian(like, like)
            self.noise = list(drawn.noise(generator).numpy()[::-1])
        noise = self.noise.pop() if sample else np.zeros_like(x)
        if self.log_std is None:
            x = x - x.max(axis=1, keepdims=True)
            action = (x + noise).argmax(axis=1)
            logprob = x[np.arange(len(x)), action] - np.log(np.exp(x).sum(axis=1))
        else:
            action = x + np.exp(self.log_std) * noise
            logprob = (-0.5 * noise * noise - self.log_std - np.float32(HALF_LOG_2PI)).sum(axis=1)
        return Choice(torch.from_numpy(action), torch.from_numpy(logprob), None, None)


def chooser(policy: Any, walker: Any) -> Callable[..., Choice]:
    """Who chooses for a walker: the policy by `choose`, or its quick form where it has one."""
    quick = None if walker.hold > 1 or walker.masked else quick_form(policy, walker.rows)
    return partial(quick or partial(choose, policy), generator=walker.generator, sample=walker.sample)


def quick_form(policy: Any, rows: int) -> Quick | None:
    """A policy that chooses in `rows` rows at a time, in NumPy; None where it is not small, or made of something else.

    That is: a vector of floats, an MLP on the CPU; one choice of K, or independent normals.
    """
    network = getattr(policy, "network", None)
    if not isinstance(network, ActorCritic) or policy.memory or policy.device.type != "cpu":
        return None
    body, head, space = network.actor, network.head, policy.observation_space
    plain = space.shape is not None and len(space.shape) == 1 and space.dtype.kind == "f"
    assert isinstance(head, CategoricalHead | GaussianHead)
    one = not (head.sizes or head.bits) if isinstance(head, CategoricalHead) else not (head.state_noise or head.squash)
    weights = list(body.parameters())
    small = rows * max(x.numel() for x in weights) <= PRODUCTS and all(x.dtype == torch.float32 for x in weights)
    return Quick(body, head, policy.obs_scale) if plain and one and small else None


def _numbers(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    """Views of a layer's weights, [inputs, outputs] and [outputs]."""
    return layer.weight.detach().numpy().T, layer.bias.detach().numpy()
