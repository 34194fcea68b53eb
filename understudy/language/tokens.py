"""What a policy says about the next token: hidden states and a head, made into log-probs only where something was chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WHOLE = 2**24  # logits kept whole, 64 MiB of float32; more than that are made, used and forgotten chunk by chunk
PIECE = (
    2**22
)  # logits of a chunk, 16 MiB: memory of that size is used again, where more is asked of the system each time


@dataclass(frozen=True)
class Head:
    """From hidden states [N, H] to logits [N, V]: the output embedding, and what the model does after it."""

    project: nn.Module
    """[N, H] -> [N, V]."""
    scale: float = 1.0
    """What the logits are multiplied by (Cohere, Granite)."""
    softcap: float = 0.0
    """c tanh(logits / c) (Gemma 2); 0 for off."""
    temperature: float = 1.0
    """Sampling temperature. It is part of the policy: what samples also scores."""

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.project(hidden).float()
        logits = (
            logits if self.scale == 1.0 else logits * self.scale
        )  # a pass over all of them, saved where it does nothing
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def frozen(self) -> Head:
        """The same head with a copy of its weights, which no update reaches."""
        return replace(self, project=copy.deepcopy(self.project).requires_grad_(False))


@dataclass(frozen=True)
class TokenDistribution:
    """A categorical over the vocabulary at every column where something was chosen; 0 everywhere else.

    Logits [B, T, V] never exist: they are made for the chosen columns only, once if they fit `WHOLE`, else in chunks that
    are recomputed in the backward pass.
    """

    hidden: Tensor
    """[B, T, H]."""
    mask: Tensor
    """bool [B, T]: where something was chosen."""
    head: Head = field(metadata={"shared": True})

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """Uniform in [0, 1), [B, T]."""
        return torch.rand(self.mask.shape, generator=generator, device=self.mask.device)

    def at(self, noise: Tensor) -> Tensor:
        """The token of given noise, int64 [B, T]: see `pick`."""
        return self._each(pick, noise)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.at(self.noise(generator))

    def mode(self) -> Tensor:
        return self._each(lambda logp: logp.argmax(dim=-1))

    def log_prob(self, action: Tensor) -> Tensor:
        """action: int64 [B, T] -> [B, T]."""
        return self._each(lambda logp, token: logp.gather(-1, token[:, None])[:, 0], action)

    def entropy(self) -> Tensor:
        """-sum p log p in nats, [B, T]."""
        return self._each(lambda logp: -(logp.exp() * logp).sum(dim=-1))

    def kl(self, other: TokenDistribution) -> Tensor:
        """KL(self, other) over the whole vocabulary in nats, [B, T]; `other` keeps its hidden states, not its logits."""

        def divergence(logp: Tensor, hidden: Tensor) -> Tensor:
            return (logp.exp() * (logp - other.head(hidden).log_softmax(dim=-1))).sum(dim=-1)

        return self._each(divergence, other.hidden)

    def frozen(self) -> TokenDistribution:
        """The same distribution, which no update of the policy changes: for the exact KL(old, new)."""
        return TokenDistribution(self.hidden.detach(), self.mask, self.head.frozen())

    @cached_property
    def _chosen(self) -> Tensor:
        return self.hidden[self.mask]

    @cached_property
    def _logp(self) -> Tensor | None:
        """Log-probs at the chosen columns, [N, V]; None where they are more than `WHOLE`."""
        width = self._width
        return None if len(self._chosen) * width > WHOLE else self.head(self._chosen).log_softmax(dim=-1)

    @property
    def _width(self) -> int:
        return getattr(self.head.project, "out_features", 0) or self.head(self._chosen[:1]).shape[-1]

    def _each(self, function: Callable[..., Tensor], *others: Tensor) -> Tensor:
        """`function(logp [n, V], *others [n, ...]) -> [n]` at the chosen columns, laid out as [B, T]."""
        picked = [other[self.mask] for other in others]
        if self._logp is not None:
            found = function(self._logp, *picked)
        else:
            rows = max(1, PIECE // self._width)

            def chunk(hidden: Tensor, *rest: Tensor) -> Tensor:
                return function(self.head(hidden).log_softmax(dim=-1), *rest)

            pieces = zip(self._chosen.split(rows), *(other.split(rows) for other in picked), strict=True)
            found = torch.cat([checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces])  # pyright: ignore
        return torch.zeros(self.mask.shape, dtype=found.dtype, device=found.device).masked_scatter(self.mask, found)


def pick(logp: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability is above the noise. logp [N, V], noise [N] in [0, 1) -> int64 [N]."""
    total = logp.exp().cumsum(dim=-1)
    below = torch.nextafter(total[:, -1:], torch.zeros_like(total[:, -1:]))  # so that there is always one above
    return torch.searchsorted(total, torch.minimum(noise[:, None].to(total.dtype) * total[:, -1:], below), right=True)[
        :, 0
    ]


@dataclass(frozen=True)
class SampledTokens:
    """All that is kept of the policy that sampled: the tokens and their log-probs. Enough to estimate its KL."""

    action: Tensor
    logprob: Tensor

    def kl(self, other: TokenDistribution) -> Tensor:
        """KL(self, other), estimated from the tokens: r - 1 - log r with r = other / self (Schulman 2020, k3). [B, T]."""
        gap = torch.where(other.mask, other.log_prob(self.action) - self.logprob, 0.0)
        return gap.exp() - 1 - gap
