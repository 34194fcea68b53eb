"""What a policy says about its next choice: sample, log_prob, entropy, kl. Parameters are [..., K] or [..., D].

`action` and `log_prob` are the distribution's own: what an environment receives is the policy's business. Entropy and KL
run over allowed actions only, with finite arithmetic. `sample` is `at(noise(generator))`, so noise can be held for a while.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
MIN_LOGPROB = -1e30
"""What log-probs of -inf count as where they are weighted by their probability, so that 0 log 0 and its gradient are 0."""


class Distribution(Protocol):
    """The one interface of both worlds. Leading dimensions are [B, T]."""

    def noise(self, generator: torch.Generator | None) -> Tensor: ...
    def action_from_noise(self, noise: Tensor) -> Tensor: ...
    def sample(self, generator: torch.Generator | None = None) -> Tensor: ...
    def mode(self) -> Tensor: ...
    def log_prob(self, action: Tensor) -> Tensor: ...
    def entropy(self) -> Tensor: ...
    def kl(self, other: Self) -> Tensor: ...


@dataclass(frozen=True)
class Categorical:
    """One of K. `logp` holds normalised log-probabilities, [..., K]; a disallowed action has a finite, huge negative one."""

    logp: Tensor

    @classmethod
    def of(cls, logits: Tensor, allowed: Tensor | None = None) -> Categorical:
        """From logits [..., K], over the actions where `allowed` (bool, [..., K]) is True."""
        if allowed is not None:
            logits = torch.where(allowed, logits, torch.finfo(logits.dtype).min / 2)
        return cls(logits.log_softmax(dim=-1))

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """Gumbel noise, [..., K]."""
        exponential = torch.empty_like(self.logp).exponential_(generator=generator)
        return -exponential.clamp(min=torch.finfo(self.logp.dtype).tiny).log()

    def action_from_noise(self, noise: Tensor) -> Tensor:
        """The action of given noise: argmax(logp + noise), [...] int64 (Gumbel 1954)."""
        return (self.logp + noise).argmax(dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.action_from_noise(self.noise(generator))

    def mode(self) -> Tensor:
        return self.logp.argmax(dim=-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """action: [...] int64 -> [...]."""
        return self.logp.gather(-1, action[..., None])[..., 0]

    def entropy(self) -> Tensor:
        """-sum p log p, in nats, [...]."""
        return -(self.logp.exp() * self.logp.clamp(min=MIN_LOGPROB)).sum(dim=-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self, other) in nats, [...]; both over the same allowed actions."""
        return (self.logp.exp() * torch.where(self.logp > MIN_LOGPROB, self.logp - other.logp, 0.0)).sum(dim=-1)


@dataclass(frozen=True)
class MultiCategorical:
    """Several independent categoricals side by side; their log-probs, entropies and KLs add up. Actions are [..., D]."""

    parts: dict[str, Categorical]

    @classmethod
    def of(cls, logits: Tensor, sizes: tuple[int, ...], allowed: Tensor | None = None) -> MultiCategorical:
        """From logits [..., sum(sizes)] and, with a mask, `allowed` of the same shape."""
        masks = [None] * len(sizes) if allowed is None else allowed.split(sizes, dim=-1)
        pairs = zip(logits.split(sizes, dim=-1), masks, strict=True)
        return cls({str(i): Categorical.of(part, mask) for i, (part, mask) in enumerate(pairs)})

    def noise(self, generator: torch.Generator | None) -> Tensor:
        return torch.cat([part.noise(generator) for part in self.parts.values()], dim=-1)

    def action_from_noise(self, noise: Tensor) -> Tensor:
        noise_parts = noise.split([part.logp.shape[-1] for part in self.parts.values()], dim=-1)
        return torch.stack(
            [
                part.action_from_noise(part_noise)
                for part, part_noise in zip(self.parts.values(), noise_parts, strict=True)
            ],
            dim=-1,
        )

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.action_from_noise(self.noise(generator))

    def mode(self) -> Tensor:
        return torch.stack([part.mode() for part in self.parts.values()], dim=-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """action: [..., D] int64 -> [...]."""
        return sum_tensors(part.log_prob(action[..., i]) for i, part in enumerate(self.parts.values()))

    def entropy(self) -> Tensor:
        return sum_tensors(part.entropy() for part in self.parts.values())

    def kl(self, other: MultiCategorical) -> Tensor:
        return sum_tensors(part.kl(other.parts[name]) for name, part in self.parts.items())


@dataclass(frozen=True)
class Bernoulli:
    """D independent yes-or-no choices; `logits` [..., D] are log-odds of 1. Actions are [..., D] int64."""

    logits: Tensor

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """Uniform in [0, 1), [..., D]."""
        return torch.rand(self.logits.shape, generator=generator, dtype=self.logits.dtype, device=self.logits.device)

    def action_from_noise(self, noise: Tensor) -> Tensor:
        return (noise < self.logits.sigmoid()).long()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.action_from_noise(self.noise(generator))

    def mode(self) -> Tensor:
        return (self.logits > 0).long()

    def log_prob(self, action: Tensor) -> Tensor:
        sign = 2 * action.to(self.logits.dtype) - 1
        return torch.nn.functional.logsigmoid(sign * self.logits).sum(dim=-1)

    def entropy(self) -> Tensor:
        return self._outcomes().entropy().sum(dim=-1)

    def kl(self, other: Bernoulli) -> Tensor:
        return self._outcomes().kl(other._outcomes()).sum(dim=-1)

    def _outcomes(self) -> Categorical:
        """1 and 0, [..., D, 2]."""
        return Categorical(torch.nn.functional.logsigmoid(torch.stack([self.logits, -self.logits], dim=-1)))


@dataclass(frozen=True)
class DiagonalGaussian:
    """D independent normals; `mean` and `log_std` are [..., D]. Actions are [..., D], unbounded."""

    mean: Tensor
    log_std: Tensor

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """Standard normal, [..., D]."""
        return torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)

    def action_from_noise(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * noise

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.action_from_noise(self.noise(generator))

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density, [...]."""
        z = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - HALF_LOG_2PI).sum(dim=-1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, [...]."""
        return (self.log_std + HALF_LOG_2PI + 0.5).sum(dim=-1)

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """log(s'/s) + (s^2 + (m - m')^2) / 2s'^2 - 1/2, summed over D."""
        variance_ratio = (2 * (self.log_std - other.log_std)).exp()
        shift = ((self.mean - other.mean) * (-other.log_std).exp()).square()
        return (other.log_std - self.log_std + 0.5 * (variance_ratio + shift - 1)).sum(dim=-1)


@dataclass(frozen=True)
class SquashedGaussian(DiagonalGaussian):
    """A normal whose action is squashed by tanh and scaled by `half_width` [D] before it acts.

    `action` stays the unsquashed sample, which no rounding of tanh can spoil; `log_prob` is the density of the *squashed*
    action, with the Jacobian. KL is exact, for squashing is one-to-one. The entropy has no closed form: it is estimated,
    and its metric's name says so. A dimension whose half width is 0 has no bounds to be scaled to, and is not squashed.
    """

    entropy_name: ClassVar[str] = "entropy_estimate"

    half_width: Tensor = field(metadata={"shared": True})

    def log_prob(self, action: Tensor) -> Tensor:
        return super().log_prob(action) - self._log_jacobian(action).sum(dim=-1)

    def entropy(self) -> Tensor:
        """Entropy of the normal plus E[log |d squashed / d action|], by a quadrature whose range suits the deviation.

        Up to a deviation of 1 it runs over the normal: 20 nodes, Gauss-Hermite (error below 3e-6). A wider normal would be
        sampled too coarsely around 0, where the slope bends; there it runs over |x| (see `_expected_slope`; 1e-8).
        """
        nodes, weights = _hermite(self.mean.dtype, self.mean.device)
        points = self.mean[..., None, :] + self.log_std.exp()[..., None, :] * nodes[:, None]
        expected = (self._log_jacobian(points) * weights[:, None]).sum(dim=-2)
        expected = torch.where(self.log_std > 0, self._add_log_half_width(self._expected_slope()), expected)
        return super().entropy() + expected.sum(dim=-1)

    def _expected_slope(self) -> Tensor:
        """E[log(1 - tanh(x)^2)] = 2 (log 2 - E|x| - E[log(1 + exp(-2|x|))]), for deviations of 1 or more.

        E|x| is the folded normal's mean (Leone et al. 1961); the last term, by 20 nodes of Gauss-Legendre on |x| < 9.
        """
        std = self.log_std.clamp(min=0).exp()
        z = self.mean / std
        folded = std * math.sqrt(2 / math.pi) * (-0.5 * z.square()).exp() + self.mean * torch.erf(z / math.sqrt(2))
        nodes, weights = _legendre(9.0, self.mean.dtype, self.mean.device)
        weights = weights * torch.log1p((-2 * nodes).exp())
        sides = torch.stack([nodes, -nodes])[..., None]
        density = (-0.5 * ((sides - self.mean[..., None, None, :]) / std[..., None, None, :]).square()).exp()
        bend = (density.sum(dim=-3) * weights[:, None]).sum(dim=-2) / (std * math.sqrt(2 * math.pi))
        return 2 * (math.log(2) - folded - bend)

    def _log_jacobian(self, action: Tensor) -> Tensor:
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), without cancellation
        return self._add_log_half_width(2 * (math.log(2) - action - torch.nn.functional.softplus(-2 * action)))

    def _add_log_half_width(self, slope: Tensor) -> Tensor:
        squashed = self.half_width > 0
        return torch.where(squashed, slope + torch.where(squashed, self.half_width, 1.0).log(), 0.0)


@dataclass(frozen=True)
class StateNoiseGaussian(DiagonalGaussian):
    """Noise that is a linear function of the state's features (gSDE; Raffin et al. 2021, eq. 3-5).

    noise = features @ E, with E [F, D] drawn from N(0, weight_std^2) and held for some steps; so, over the draw of E,
    each action is normal with variance features^2 @ weight_std^2: that is `log_std`, and the log-probs are its own.
    """

    features: Tensor
    weight_std: Tensor = field(metadata={"shared": True})

    @classmethod
    def from_features(cls, mean: Tensor, features: Tensor, weight_log_std: Tensor) -> StateNoiseGaussian:
        """mean [..., D], features [..., F], weight_log_std [F, D]."""
        weight_std = weight_log_std.exp()
        variance = features.square() @ weight_std.square()
        return cls(mean, 0.5 * (variance + 1e-6).log(), features, weight_std)

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """A standard normal for every weight, [..., F, D]."""
        shape = (*self.mean.shape[:-1], *self.weight_std.shape)
        return torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)

    def action_from_noise(self, noise: Tensor) -> Tensor:
        return self.mean + (self.features[..., None, :] @ (noise * self.weight_std))[..., 0, :]


def sum_tensors(terms: object) -> Tensor:
    """The sum of some Tensors."""
    return torch.stack(list(terms)).sum(dim=0)  # pyright: ignore[reportArgumentType]


def _hermite(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(z)], z standard normal, 20 of them."""
    nodes, weights = _gauss(torch.arange(1, 20, dtype=torch.float64).sqrt())
    return nodes.to(device, dtype), weights.to(device, dtype)


def _legendre(upper: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the integral from 0 to `upper`, 20 of them."""
    k = torch.arange(1, 20, dtype=torch.float64)
    nodes, weights = _gauss(k / (4 * k.square() - 1).sqrt())
    return (upper * (nodes + 1) / 2).to(device, dtype), (upper * weights).to(device, dtype)


def _gauss(off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights, of sum 1, of the quadrature whose Jacobi matrix has this off-diagonal (Golub & Welsch 1969)."""
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, vectors[0].square()
