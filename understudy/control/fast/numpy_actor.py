"""Step 1, sample: a small network chooses without its critic, and in NumPy, where an operation costs a fraction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from understudy.control.envs.spaces import exceeds_float32, fast_stack
from understudy.control.networks import ActorCriticNetwork, CategoricalHead, FeatureExtractor, GaussianHead
from understudy.control.normalize import CLIP, ObsNormalizer
from understudy.distribution import Categorical, DiagonalGaussian
from understudy.fast.linear import Tanh

MAX_NUMPY_PRODUCTS = 2**18
"""Multiplications of a layer up to which NumPy multiplies in one thread, always in the same order."""
NOISE_BLOCK_SIZE = 128
"""Choices for which noise is drawn at once."""
ACTIVATIONS = {
    Tanh: np.tanh,
    nn.ReLU: lambda x: np.maximum(x, 0),
    nn.ELU: lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}


class NumpyActor:
    """`quick(obs) -> action, said`: what a policy chooses, as its weights are now, to rounding.

    `said` are the numbers that its distribution is made of; `distribution_and_logprob` makes that of those of a whole
    record at once. Noise is drawn for many choices at once, too; what is left at the end of a record is thrown away.
    Without a generator it chooses the mode. `small`: how many rows it chooses for in NumPy, 0 for as many as come, by
    the modules.
    """

    def __init__(
        self,
        actor: FeatureExtractor,
        head: CategoricalHead | GaussianHead,
        obs_normalizer: ObsNormalizer | None,
        generator: torch.Generator | None,
        *,
        num_numpy_rows: int,
        dtype: torch.dtype,
    ) -> None:
        output_layer = _output_layer(head)
        self.compute_dist_params = (
            NumpyMLP(actor, output_layer, obs_normalizer, num_numpy_rows, dtype)
            if num_numpy_rows
            else partial(_torch_dist_params, actor, output_layer, obs_normalizer)
        )
        self.log_std = None if isinstance(head, CategoricalHead) else head.log_std.detach().clone()
        self.num_outputs = output_layer.out_features
        self.generator, self.noise = generator, list[np.ndarray]()

    def __call__(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """obs: [B, D] -> action [B] or [B, K], said [B, K]."""
        dist_params = self.compute_dist_params(obs)
        perturbed = dist_params if self.generator is None else dist_params + self._next_noise(len(dist_params))
        return (perturbed.argmax(axis=1) if self.log_std is None else perturbed), dist_params

    def _next_noise(self, num_rows: int) -> np.ndarray:
        """What is added to what is said, [rows, K]: of the very distributions that the policy has."""
        if not self.noise:
            zeros = torch.zeros(NOISE_BLOCK_SIZE, num_rows, self.num_outputs)
            draws = self._distribution(zeros).noise(self.generator)
            self.noise = list((draws if self.log_std is None else draws * self.log_std.exp()).numpy()[::-1])
        return self.noise.pop()

    def distribution_and_logprob(
        self, dist_params: Sequence[np.ndarray], action: Sequence[np.ndarray]
    ) -> tuple[Any, np.ndarray]:
        """What calls sampled from, [calls, rows, ...], and the log-probs [calls, rows] of what was chosen in them."""
        distribution = self._distribution(torch.from_numpy(fast_stack(dist_params)))
        return distribution, distribution.log_prob(torch.from_numpy(fast_stack(action))).numpy()

    def _distribution(self, dist_params: Tensor) -> Categorical | DiagonalGaussian:
        if self.log_std is None:
            return Categorical.of(dist_params)
        return DiagonalGaussian(dist_params, self.log_std.expand_as(dist_params))


class NumpyMLP:
    """An actor's layers in NumPy, as its weights are now, for `rows` rows of observations of this dtype."""

    def __init__(
        self,
        actor: FeatureExtractor,
        output_layer: nn.Linear,
        obs_normalizer: ObsNormalizer | None,
        num_rows: int,
        dtype: torch.dtype,
    ) -> None:
        linear_layers = [_layer_arrays(x, num_rows) for x in (*actor.mlp, output_layer) if isinstance(x, nn.Linear)]
        activations = [ACTIVATIONS[type(x)] for x in actor.mlp if not isinstance(x, nn.Linear)]
        self.hidden = [(*arrays, activate) for arrays, activate in zip(linear_layers, activations, strict=False)]
        self.output_layer = linear_layers[-1]
        self.mean_and_std = (
            None if obs_normalizer is None else tuple(x.numpy() for x in obs_normalizer.mean_and_std(0, dtype))
        )

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs: [B, D] -> what the last layer says, [B, K]."""
        x = obs
        if self.mean_and_std is not None:
            x = np.minimum(np.maximum((x - self.mean_and_std[0]) / self.mean_and_std[1], -CLIP), CLIP).astype(
                np.float32, copy=False
            )
        for weight, bias, activate in self.hidden:
            x = x.dot(weight)
            x += bias
            x = activate(x)
        weight, bias = self.output_layer
        return x.dot(weight) + bias


@torch.no_grad()
def _torch_dist_params(
    actor: FeatureExtractor, output_layer: nn.Linear, obs_normalizer: ObsNormalizer | None, obs: np.ndarray
) -> np.ndarray:
    """The same for many rows: the critic and all log-probs but the action's are left out."""
    x = torch.from_numpy(obs)
    return output_layer(actor.mlp(x if obs_normalizer is None else obs_normalizer(x))).numpy()


def make_numpy_actor(policy: Any, collector: Any) -> NumpyActor | None:
    """How a policy chooses for a walker, in NumPy where that is small; None where it is made of something else.

    That is: a vector of floats, an MLP on the CPU; one choice of K, or independent normals; no masks, no noise that is held.
    """
    if collector.noise_interval > 1 or collector.has_action_mask:
        return None
    network = getattr(policy, "network", None)
    if not isinstance(network, ActorCriticNetwork) or policy.needs_whole_rows or policy.device.type != "cpu":
        return None
    actor, head, space = network.actor, network.head, policy.observation_space
    is_float_vector = space.shape is not None and len(space.shape) == 1 and space.dtype.kind == "f"
    assert isinstance(head, CategoricalHead | GaussianHead)
    has_plain_distribution = (
        not (head.sizes or head.num_bits)
        if isinstance(head, CategoricalHead)
        else not (head.uses_gsde or head.is_squashed)
    )
    weights = [*actor.parameters(), *_output_layer(head).parameters()]
    if not is_float_vector or not has_plain_distribution or any(x.dtype != torch.float32 for x in weights):
        return None
    num_numpy_rows = (
        collector.num_envs if collector.num_envs * max(x.numel() for x in weights) <= MAX_NUMPY_PRODUCTS else 0
    )
    dtype = torch.float64 if policy.keeps_float64 and exceeds_float32(space) else torch.float32
    return NumpyActor(
        actor,
        head,
        policy.obs_scale,
        collector.generator if collector.sample else None,
        num_numpy_rows=num_numpy_rows,
        dtype=dtype,
    )


def _output_layer(head: CategoricalHead | GaussianHead) -> nn.Linear:
    return head.logits if isinstance(head, CategoricalHead) else head.mean


def _layer_arrays(layer: nn.Linear, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weights, [inputs, outputs], and its bias, [rows, outputs]: adding what is as large takes half as long."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.ascontiguousarray(weight.T), np.full((num_rows, len(bias)), bias)
