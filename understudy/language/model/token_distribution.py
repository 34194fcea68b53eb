"""What a policy says about the next token: hidden states and a head, made into log-probs only where something was chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from understudy.distribution import MIN_LOGPROB, Categorical
from understudy.fast.linear import linear, round_up_rows

MAX_STORED_LOGITS = (
    2**22
)  # logits kept whole, 16 MiB of float32; more than that are made, used and forgotten piece by piece
CUMSUM_BLOCK_SIZE = 1024  # tokens of a large vocabulary that are summed up together
MAX_CHUNK_LOGITS = 2**21  # logits of a piece, 8 MiB: they stay near the processor, and their memory is used again


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
        layer = self.linear_layer
        logits = self.project(hidden) if layer is None else linear(hidden, layer.weight, layer.bias)
        logits = logits.float()
        logits = (
            logits if self.scale == 1.0 else logits * self.scale
        )  # a pass over all of them, saved where it does nothing
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    @property
    def linear_layer(self) -> nn.Linear | None:
        """The projection, where it is a linear layer with nothing put into it or hung on it."""
        layer = self.project
        has_hooks = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        return layer if type(layer) is nn.Linear and not has_hooks else None

    def frozen(self) -> Head:
        """The same head with a copy of its weights, which no update reaches."""
        return replace(self, project=copy.deepcopy(self.project).requires_grad_(False))


@dataclass(frozen=True)
class TokenDistribution:
    """A categorical over the vocabulary at every column where something was chosen; 0 everywhere else.

    Logits [B, T, V] never exist: they are made for the chosen columns only, once if they fit `MAX_STORED_LOGITS`,
    else in pieces that are made again in the backward pass.
    """

    hidden: Tensor
    """[B, T, H]."""
    mask: Tensor
    """bool [B, T]: where something was chosen."""
    head: Head = field(metadata={"shared": True})

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """Uniform in [0, 1), [B, T]."""
        return torch.rand(self.mask.shape, generator=generator, device=self.mask.device)

    def action_from_noise(self, noise: Tensor) -> Tensor:
        """The token of given noise, int64 [B, T]: see `pick`."""
        return self._map_chosen(lambda logp, noise: sample_inverse_cdf(logp.exp(), noise), noise)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.action_from_noise(self.noise(generator))

    def mode(self) -> Tensor:
        return self._map_chosen(lambda logp: logp.argmax(dim=-1))

    def log_prob(self, action: Tensor) -> Tensor:
        """action: int64 [B, T] -> [B, T]."""
        if self._has_linear_head:
            return self._scatter_chosen(self._cached_logprob(action)[1])
        return self._map_chosen(lambda logp, token: logp.gather(-1, token[:, None])[:, 0], action)

    def entropy(self) -> Tensor:
        """-sum p log p in nats, [B, T]."""
        if self._logprob_cache and self._logprob_cache[2] is not None and not torch.is_grad_enabled():
            return self._scatter_chosen(self._logprob_cache[2])
        return self._map_chosen(lambda logp: Categorical(logp).entropy())

    def kl(self, other: TokenDistribution) -> Tensor:
        """KL(self, other) over the whole vocabulary in nats, [B, T]; `other` keeps its hidden states, not its logits."""

        def divergence(logp: Tensor, hidden: Tensor) -> Tensor:
            return Categorical(logp).kl(Categorical.of(other.head(hidden)))

        return self._map_chosen(divergence, other.hidden)

    def frozen(self) -> TokenDistribution:
        """The same distribution, which no update of the policy changes: for the exact KL(old, new)."""
        return TokenDistribution(self.hidden.detach(), self.mask, self.head.frozen())

    @property
    def _has_linear_head(self) -> bool:
        """The head is one that `LogProb` knows."""
        layer = self.head.linear_layer
        return layer is not None and layer.weight.dtype.itemsize >= 4 and not self.head.softcap

    @cached_property
    def _logprob_cache(self) -> list[Tensor]:
        """Tokens whose log-probs were asked for, [N]; these; and the entropy that came with them, if it did."""
        return []

    def _cached_logprob(self, action: Tensor) -> list[Tensor]:
        """`_known` of these actions. It is asked for again: by KL(old, new), and the entropy by its metric."""
        token, layer = action[self.mask], self.head.linear_layer
        if layer is not None and not (self._logprob_cache and torch.equal(token, self._logprob_cache[0])):
            slope = self.head.scale / self.head.temperature
            with torch.enable_grad():  # so that who comes first does not matter
                self._logprob_cache[:] = (
                    token,
                    *LogProb.apply(self._chosen_hidden, layer.weight, layer.bias, token, slope),
                )
        return self._logprob_cache

    @cached_property
    def _chosen_hidden(self) -> Tensor:
        return self.hidden[self.mask]

    @cached_property
    def _logp(self) -> Tensor | None:
        """Log-probs at the chosen columns, [N, V]; None where they are more than `WHOLE`."""
        vocabulary_size = self._vocabulary_size
        return (
            None
            if len(self._chosen_hidden) * vocabulary_size > MAX_STORED_LOGITS
            else self.head(self._chosen_hidden).log_softmax(dim=-1)
        )

    @property
    def _vocabulary_size(self) -> int:
        return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[:1]).shape[-1]

    def _map_chosen(self, function: Callable[..., Tensor], *others: Tensor) -> Tensor:
        """`function(logp [n, V], *others [n, ...]) -> [n]` at the chosen columns, laid out as [B, T]."""
        chosen_others = [other[self.mask] for other in others]
        if self._logp is not None:
            values = function(self._logp, *chosen_others)
        else:
            num_rows = max(1, MAX_CHUNK_LOGITS // self._vocabulary_size)

            def apply_to_chunk(hidden: Tensor, *rest: Tensor) -> Tensor:
                return function(self.head(hidden).log_softmax(dim=-1), *rest)

            chunks = zip(
                self._chosen_hidden.split(num_rows), *(other.split(num_rows) for other in chosen_others), strict=True
            )
            values = torch.cat(
                [checkpoint(apply_to_chunk, *chunk_inputs, use_reentrant=False) for chunk_inputs in chunks]
            )  # pyright: ignore
        return self._scatter_chosen(values)

    def _scatter_chosen(self, values: Tensor) -> Tensor:
        """[N] at the chosen columns -> [B, T]."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(self.mask, values)


class LogProb(Function):
    """log p of a token, and the entropy beside it where something is to learn; logits are slope (hidden weight' + bias).

    hidden [N, H], weight [V, H], bias [V] or None, token int64 [N] -> [N], [N] or None; no gradient reaches the entropy.

    Logits are made `MAX_CHUNK_LOGITS` at a time, and again in the backward pass (d log p(a) / d logit = 1_a - p):
    pieces of the vocabulary there, so that each row of the weight's gradient is done at once. Rows are rounded up by
    some that count for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, slope: float
    ) -> tuple[Tensor, Tensor | None]:
        needs_grad, chunk_size, num_rows = (
            any(ctx.needs_input_grad),
            max(1, MAX_CHUNK_LOGITS // len(weight)),
            len(hidden),
        )
        hidden, token = _pad_rows(hidden, round_up_rows(num_rows)), _pad_rows(token, round_up_rows(num_rows))
        finite = None if bias is None else bias.clamp(min=MIN_LOGPROB)  # for 0 log 0 of tokens that it rules out
        chosen, total, entropy = (hidden.new_empty(len(hidden)) for _ in range(3))
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            logit = linear(hidden[rows], weight, finite)
            logit = logit if slope == 1.0 else logit.mul_(slope)
            p, total[rows] = softmax_and_logsumexp(logit)
            chosen[rows] = logit.gather(1, token[rows, None])[:, 0]
            if needs_grad:
                entropy[rows] = total[rows] - torch.linalg.vecdot(p, logit)
        ctx.save_for_backward(hidden, weight, bias, token, total)
        ctx.slope = slope
        entropy = entropy[:num_rows]
        ctx.mark_non_differentiable(entropy)
        return (chosen - total)[:num_rows], entropy if needs_grad else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, token, total = ctx.saved_tensors
        scaled_grad, chunk_size = (
            _pad_rows(grad[:, None] * ctx.slope, len(hidden)),
            max(1, MAX_CHUNK_LOGITS // max(len(hidden), 1)),
        )
        grad_hidden = torch.zeros_like(hidden)
        grad_weight, grad_bias = (
            torch.empty_like(x) if x is not None and x.requires_grad else None for x in (weight, bias)
        )
        for start in range(0, len(weight), chunk_size):
            columns = slice(start, start + chunk_size)
            logit = linear(hidden, weight[columns], None if bias is None else bias[columns])
            logit = logit if ctx.slope == 1.0 else logit.mul_(ctx.slope)
            grad_logit = logit.sub_(total[:, None]).exp_().mul_(-scaled_grad)
            [token_rows] = torch.where((token >= start) & (token < start + chunk_size))
            grad_logit[token_rows, token[token_rows] - start] += scaled_grad[token_rows, 0]
            grad_hidden += linear(grad_logit, weight[columns].t())
            if grad_weight is not None:
                grad_weight[columns] = linear(hidden.t(), grad_logit.t()).t()
            if grad_bias is not None:
                grad_bias[columns] = grad_logit.sum(dim=0)
        return grad_hidden[: len(grad)], grad_weight, grad_bias, None, None


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """[n, ...] with zeros behind it, [rows, ...]."""
    return pad(x, (*(0, 0) * (x.ndim - 1), 0, num_rows - len(x)))


def softmax_and_logsumexp(logit: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logit), [N, V], and log sum exp(logit), [N]: the largest one's probability is exp(it - that).

    A softmax makes its exponentials in half the time that `exp` takes.
    """
    p = logit.softmax(dim=-1)
    return p, logit.amax(dim=-1) - p.amax(dim=-1).log()


def sample_inverse_cdf(p: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability is above the noise. p [N, V], noise [N] in [0, 1) -> int64 [N].

    Of a large vocabulary only the block in which it lies is summed up token by token.
    """
    noise, padding = noise[:, None].to(p.dtype), -p.shape[1] % CUMSUM_BLOCK_SIZE
    if p.shape[1] <= CUMSUM_BLOCK_SIZE:
        cumulative = p.cumsum(dim=-1)
        return _first_above(cumulative, noise * cumulative[:, -1:])
    blocks = (pad(p, (0, padding)) if padding else p).unflatten(1, (-1, CUMSUM_BLOCK_SIZE))
    cumulative = blocks.sum(dim=-1).cumsum(dim=-1)
    level = noise * cumulative[:, -1:]
    block = _first_above(cumulative, level)[:, None]
    cumulative_in_block = blocks.take_along_dim(block[..., None], dim=1)[:, 0].cumsum(dim=-1)
    return block[:, 0] * CUMSUM_BLOCK_SIZE + _first_above(
        cumulative_in_block, level - pad(cumulative, (1, 0)).gather(1, block)
    )


def apply_top_k_top_p(p: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution restricted to its likeliest tokens, [N, V] -> [N, V]; the probabilities kept sum to 1 again.

    Args:
        top_k: how many tokens are kept (Fan et al. 2018, section 5); 0 for all.
        top_p: of these, the fewest likeliest whose probability reaches this share (Holtzman et al. 2020, eq. 2).
    """
    if not top_k and top_p == 1.0:
        return p
    ranked, token = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    if top_p < 1.0:
        probability_before = ranked.cumsum(dim=-1) - ranked
        ranked = ranked.where(probability_before < top_p * ranked.sum(dim=-1, keepdim=True), 0)
    return torch.zeros_like(p).scatter(1, token, ranked / ranked.sum(dim=-1, keepdim=True))


def _first_above(cumulative: Tensor, level: Tensor) -> Tensor:
    """total [N, n], rising, level [N, 1] -> int64 [N]; where none is above, the first that is as high as the last.

    Where totals are NaN it is the last, so that it is an index in any case.
    """
    highest_level = torch.nextafter(cumulative[:, -1:], torch.zeros_like(level))
    index = torch.searchsorted(cumulative, torch.minimum(level, highest_level), right=True)[:, 0]
    return index.clamp_(max=cumulative.shape[1] - 1)


@dataclass(frozen=True)
class SampledTokens:
    """All that is kept of the policy that sampled: the tokens and their log-probs. Enough to estimate its KL."""

    action: Tensor
    logprob: Tensor

    def kl(self, other: TokenDistribution) -> Tensor:
        """KL(self, other), estimated from the tokens: r - 1 - log r with r = other / self (Schulman 2020, k3). [B, T]."""
        gap = torch.where(other.mask, other.log_prob(self.action) - self.logprob, 0.0)
        return gap.exp() - 1 - gap
