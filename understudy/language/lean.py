"""Llama-like trunks in few operations a layer: one token a row for the sampler, whole rows for whoever scores or learns.

Hugging Face says what a model is. On a CPU, though, its small models cost their calls and their passes over memory as much
as their products, padding costs what tokens cost, and torch's fused attention takes three times what batched products take
for one query, twice for short rows. So where a trunk is one of `KNOWN`, with nothing put into it or hung on it, this is the
same function of the same parameters: tests/test_lean.py holds the two side by side, `Policy.settle` compares before a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import embedding, pad, rms_norm, scaled_dot_product_attention

from understudy.products import linear, rounded

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
GROWING = ("dynamic", "longrope")  # rotary positions that depend on how long a row has become
SHORT = 2**22  # attention weights of a layer that are kept, 16 MiB; more than that are made again in the backward pass


class Store(Protocol):
    """One layer's keys and values, [slots, heads, D, columns] and [slots, heads, columns, D]."""

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Layer:
    """A layer's weights as they are multiplied with. Q: queries of a key-value head."""

    joint: Tensor
    """[heads (Q + 2) D, H]: a head's queries, its key and its value below each other; the norm before them in it.

    Of queries and key the two parts of a pair that is turned stand beside each other: scores are the same.
    """
    offset: Tensor | None
    """What is added to that, [heads (Q + 2) D]."""
    turned_norm: Tensor | None
    """Weights of the norms of queries and key, [Q + 1, D] (Qwen3)."""
    out: Tensor
    gate: Tensor
    up: Tensor
    """[I, H], as `gate`: the norm before them in them."""
    down: Tensor
    act: Callable[[Tensor], Tensor]
    sliding: bool
    """It sees a window only."""

    def transposed(self) -> Layer:
        """The same with its matrices column by column."""
        matrices = {name: getattr(self, name) for name in ("joint", "out", "gate", "up", "down")}
        return replace(self, **{name: matrix.t().contiguous().t() for name, matrix in matrices.items()})


class Lean:
    """A trunk of `KNOWN` with its weights laid out anew; for as long as they do not change.

    Args:
        few: rows at a time: weights are copied as oneDNN takes them soonest, column by column. Nothing learns through them.
    """

    def __init__(self, trunk: Any, *, few: bool = False) -> None:
        config, attention = trunk.config, trunk.layers[0].self_attn
        self.heads, self.queries, self.width = (
            config.num_key_value_heads,
            attention.num_key_value_groups,
            attention.head_dim,
        )
        self.eps, self.window = config.rms_norm_eps, getattr(config, "sliding_window", None) or 0
        kinds = getattr(config, "layer_types", None)
        kinds = kinds or ["full_attention" if not self.window else "sliding_attention"] * len(trunk.layers)
        self.words, self.norm, self.rotary = trunk.embed_tokens, trunk.norm.weight, trunk.rotary_emb
        self.layers = [self._layer(layer, kind) for layer, kind in zip(trunk.layers, kinds, strict=True)]
        if few:
            self.layers = [layer.transposed() for layer in self.layers]

    def _layer(self, layer: Any, kind: str) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        joint = self._together([p.weight for p in parts])
        offset = None if attention.q_proj.bias is None else self._together([p.bias for p in parts])
        turned_norm = None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm.weight] * self.queries + [attention.k_norm.weight]
            turned_norm = torch.stack([norm.view(2, -1).t().flatten() for norm in norms])
        after = layer.post_attention_layernorm.weight
        return Layer(
            joint * layer.input_layernorm.weight,
            offset,
            turned_norm,
            attention.o_proj.weight,
            mlp.gate_proj.weight * after,
            mlp.up_proj.weight * after,
            mlp.down_proj.weight,
            mlp.act_fn,
            kind == "sliding_attention",
        )

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """What belongs to queries, keys and values, each [its heads D, ...], as in `Layer.joint`."""
        queries, keys, values = (part.view(self.heads, -1, 2, self.width // 2, *part.shape[1:]) for part in parts)
        whole = queries.transpose(2, 3), keys.transpose(2, 3), values.view(*values.shape[:2], -1, 2, *values.shape[4:])
        return torch.cat(whole, dim=1).flatten(0, 3)

    def turning(self, places: int) -> Tensor:
        """What turns a head's queries and key at positions below `places`, complex [places, Q + 1, D / 2].

        The queries' are scaled by 1 / sqrt(D).
        """
        angles = self.rotary(self.norm, torch.arange(places, device=self.norm.device)[None])
        cos, sin = (part[0, :, : self.width // 2].to(_exact(part.dtype)) for part in angles)
        scale = cos.new_tensor([self.width**-0.5] * self.queries + [1.0])[:, None]
        return torch.complex(cos, sin)[:, None] * scale

    def step(
        self,
        tokens: Tensor,
        turn: Tensor,
        cache: Sequence[Store],
        far: Tensor,
        near: Tensor,
    ) -> Tensor:
        """The last hidden states after one token more a row.

        Args:
            tokens: [slots].
            turn: `turning` of each one's position, [slots, Q + 1, D / 2].
            cache: of every layer; it takes the new key and value and gives all in use.
            far: what is added to a score, [slots, columns]: 0 where it is seen, else very negative.
            near: the same for layers that see a window only.

        Returns:
            [slots, H].
        """
        seen = far.repeat_interleave(self.heads, dim=0)[:, None]
        windowed = seen if near is far else near.repeat_interleave(self.heads, dim=0)[:, None]
        x = embedding(tokens, self.words.weight)
        for layer, store in zip(self.layers, cache, strict=True):
            joint = self._joint(x, layer)
            turned = _turned(joint[:, :, :-1], turn[:, None])
            keys, values = store.write(turned[:, :, -1], joint[:, :, -1])
            queries, mask = turned[:, :, :-1].flatten(0, 1), windowed if layer.sliding else seen
            heard = _by_products(queries, keys.flatten(0, 1), values.flatten(0, 1), mask)
            x = self._gated(x + linear(heard.view(len(x), -1), layer.out), layer)
        return _normed(x, self.eps) * self.norm

    def begin(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Rows from their beginning, [B, T] -> the last hidden states, [B, T, H]; of each layer keys and values to store.

        Keys and values are [B, heads, T, D].
        """
        B, T = ids.shape
        turning, read = self.turning(T)[:, None], rounded(ids.numel())
        x, stored = embedding(pad(ids.flatten(), (0, read - ids.numel())), self.words.weight), []
        for layer in self.layers:
            joint = self._joint(x, layer)[: ids.numel()].view(B, T, self.heads, -1, self.width)
            turned = _turned(joint[..., :-1, :], turning).permute(0, 2, 3, 1, 4)
            keys, values = turned[:, :, -1], joint[..., -1, :].transpose(1, 2)
            stored.append((keys, values))
            rows = turned[:, :, :-1], keys, values
            heard = self._attend(*(part.flatten(0, 1) for part in rows), self._mask(T, layer.sliding))
            heard = heard.unflatten(0, (B, self.heads)).permute(0, 3, 1, 2, 4).reshape(ids.numel(), -1)
            x = self._gated(x + linear(pad(heard, (0, 0, 0, read - ids.numel())), layer.out), layer)
        return (_normed(x, self.eps) * self.norm)[: ids.numel()].view(B, T, -1), stored

    def read(self, ids: Tensor, needed: Tensor, wanted: Tensor) -> Tensor:
        """The last hidden states of rows from their beginning, [B, T, H]; 0 where they are not wanted.

        A row of which nothing is asked is not read. Rows attend in groups of about one length, so padding costs next to
        nothing; what rows have alike until the first that is asked of them is read once. What is read is rounded up by
        tokens that nobody hears or asks.

        Args:
            ids: [B, T].
            needed: how many columns of a row are read, [B].
            wanted: bool [B, T]: where something is asked; within what is needed.
        """
        length, place = ids.shape[1], torch.arange(ids.shape[1], device=ids.device)
        alike, until = _alike(ids, wanted)
        reads = wanted.any(dim=1)
        reads[0] |= ~reads.any()  # so that there is something to attend to
        within = (place < needed[:, None]) & reads[:, None]
        shared = within & (place < until[:, None]) & (alike != torch.arange(len(ids), device=ids.device))[:, None]
        row, column = (within & ~shared).nonzero(as_tuple=True)
        number = torch.zeros_like(ids).index_put((row, column), torch.arange(len(row), device=ids.device))
        number = torch.where(shared, number[alike], number)  # which of the tokens that are read stands at a place
        asked = wanted[row, column].nonzero()[:, 0]
        groups = [(ids.new_tensor(rows), width) for rows, width in _groups(torch.where(reads, needed, 0).tolist())]
        begin, wide, before = torch.zeros_like(needed), torch.zeros_like(needed), 0
        for rows, width in groups:
            begin[rows], wide[rows] = before + width * torch.arange(len(rows), device=ids.device), width
            before += width * len(rows)
        parts = self.heads * (self.queries + 2)
        laid = _places(row, column, begin, wide, parts)
        heard_at = _places(row, column, begin, wide, self.heads * self.queries)
        elsewhere = shared.nonzero()
        again = _places(elsewhere[:, 0], elsewhere[:, 1], begin, wide, parts)
        part = torch.arange(parts, device=ids.device)[:, None]
        taken = torch.cat([(number[rows, None, :width] * parts + part).flatten() for rows, width in groups])
        shapes = [(len(rows) * self.heads, width) for rows, width in groups]
        read = rounded(len(row))
        heard_at = pad(heard_at.view(len(row), self.heads * self.queries), (0, 0, 0, read - len(row)))
        turning = self.turning(length).transpose(0, 1).contiguous()
        kinds = {layer.sliding for layer in self.layers}
        masks = {sliding: [self._mask(width, sliding) for _, width in groups] for sliding in kinds}
        x = self.words(pad(ids[row, column], (0, read - len(row))))
        for layer in self.layers:
            turned = _Turned.apply(self._joint(x, layer), taken, laid, again, shapes, turning)
            heard = [
                self._attend(*turned[3 * i : 3 * i + 3], mask).reshape(-1, self.width)
                for i, mask in enumerate(masks[layer.sliding])
            ]
            if layer is self.layers[-1]:  # of its tokens, only those that are asked about
                some = pad(asked, (0, rounded(len(asked)) - len(asked)))
                x, heard_at = x[some], heard_at[some]
            heard = (heard[0] if len(heard) == 1 else torch.cat(heard))[heard_at].flatten(1)
            x = self._gated(x + linear(heard, layer.out), layer)
        x = _normed(x[: len(asked)], self.eps) * self.norm
        order = torch.zeros_like(row).index_put((asked,), torch.arange(len(asked), device=ids.device))
        return x.new_zeros(*ids.shape, x.shape[-1]).index_put(wanted.nonzero(as_tuple=True), x[order[number[wanted]]])

    def _joint(self, x: Tensor, layer: Layer) -> Tensor:
        """Queries, key and value of each token and head, not turned yet: [N, heads, Q + 2, D]."""
        joint = linear(_normed(x, self.eps), layer.joint, layer.offset)
        joint = joint.view(len(x), self.heads, self.queries + 2, self.width)
        if layer.turned_norm is None:
            return joint
        normed = rms_norm(joint[:, :, :-1], (self.width,), eps=self.eps) * layer.turned_norm
        return torch.cat((normed, joint[:, :, -1:]), dim=2)

    def _gated(self, x: Tensor, layer: Layer) -> Tensor:
        """[N, H] -> [N, H]: the part of a layer behind attention."""
        y = _normed(x, self.eps)
        return x + linear(layer.act(linear(y, layer.gate)) * linear(y, layer.up), layer.down)

    def _mask(self, length: int, sliding: bool) -> Tensor:
        """What is added to the scores of a row, [Q length, length]; queries of one head stand below each other."""
        column = torch.arange(length, device=self.norm.device)
        behind = column[:, None] - column
        seen = (behind >= 0) & (behind < self.window) if sliding else behind >= 0
        mask = self.norm.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(self.norm.dtype).min / 2)
        return mask.repeat(self.queries, 1)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """queries [n, Q, T, D], keys, values [n, T, D], mask [Q T, T] -> what each query hears, [n, Q, T, D]."""
        if len(queries) * mask.numel() <= SHORT:
            return _by_products(queries.flatten(1, 2), keys.transpose(1, 2), values, mask).view_as(queries)
        keys, values = (part[:, None].expand_as(queries) for part in (keys, values))
        return scaled_dot_product_attention(queries, keys, values, mask[: queries.shape[2]], scale=1.0)


def lean(trunk: Any, *, whole: bool = False) -> Lean | None:
    """A trunk as its parameters now are, in part copied; None where it is not known to be this simple.

    Args:
        whole: for whole rows: not in half precision, and not where activations are to be made again in the backward pass.
    """
    if not _known(trunk):
        return None
    again = any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules())
    if whole:
        return None if again or trunk.dtype.itemsize < 4 else Lean(trunk)
    return Lean(trunk, few=trunk.device.type == "cpu")


def _known(trunk: Any) -> bool:
    if type(trunk).__name__ not in KNOWN or not type(trunk).__module__.startswith("transformers."):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in trunk.modules()):
        return False  # somebody watches or changes what it does
    if any(word in getattr(trunk.rotary_emb, "rope_type", "") for word in GROWING):
        return False
    blocks = [block for layer in trunk.layers for block in (layer.self_attn, layer.mlp)]
    if len(trunk.layers) != trunk.config.num_hidden_layers or type(trunk.embed_tokens) is not nn.Embedding:
        return False
    linear = [part for block in blocks for part in block.children() if hasattr(part, "in_features")]
    plain = [part for layer in trunk.layers for part in (layer.self_attn.o_proj, *layer.mlp.children())]
    return (
        all(type(part) is nn.Linear for part in linear)  # no adapter, no quantised weights
        and all(getattr(part, "bias", None) is None for part in plain)
        and trunk.rotary_emb.inv_freq.numel() * 2 == trunk.layers[0].self_attn.head_dim
    )


def _by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """queries [n, Q, D], keys [n, D, T], values [n, T, D], mask [n or 1, Q, T] or [Q, T] -> [n, Q, D]."""
    score = torch.baddbmm(mask, queries, keys)
    weight = score.softmax(dim=-1, dtype=_exact(score.dtype))
    return torch.bmm(weight.to(values.dtype), values)


def _alike(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The first row whose columns up to the first wanted one are the same, [B]; how many columns these are, [B]."""
    until = torch.where(wanted.any(dim=1), wanted.int().argmax(dim=1) + 1, 0)
    first: dict[tuple[int, ...], int] = {}
    begun = [tuple(row[:end]) for row, end in zip(ids.tolist(), until.tolist(), strict=True)]
    return ids.new_tensor([first.setdefault(key, row) for row, key in enumerate(begun)]), until


def _groups(needed: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows of about one length, the longest first, and the width of each group; without rows that need nothing."""
    groups: list[tuple[list[int], int]] = []
    for row in sorted((row for row, columns in enumerate(needed) if columns), key=lambda row: -needed[row]):
        if not groups or 4 * needed[row] < 3 * groups[-1][1]:
            groups.append(([], needed[row]))
        groups[-1][0].append(row)
    return groups


def _places(row: Tensor, column: Tensor, begin: Tensor, width: Tensor, parts: int) -> Tensor:
    """Where tokens at these rows and columns stand, flat: [N parts], in that order.

    A row has [parts, width] places, behind those of `begin` columns before it; begin, width [B].
    """
    part = torch.arange(parts, device=row.device)
    return ((begin[row] * parts + column)[:, None] + part * width[row][:, None]).flatten()


class _Turned(Function):
    """Tokens' queries, keys and values laid out in rows, queries and keys turned (Su et al. 2021, eq. 34).

    Padding is some token or other: nobody attends to it, for it only follows. Tokens behind those that are laid out stand
    nowhere.

    joint [N, heads, Q + 2, D]; taken: which of its vectors stands where, group by group, each [rows heads (Q + 2) T]; laid:
    where each stands first; again: where a token stands too that several rows have; shapes: of each group rows heads and T;
    turning complex [Q + 1, longest T, D / 2] -> of each group queries [rows heads, Q, T, D]; keys, values [rows heads, T,
    D].
    """

    @staticmethod
    def forward(
        ctx: Any,
        joint: Tensor,
        taken: Tensor,
        laid: Tensor,
        again: Tensor,
        shapes: list[tuple[int, int]],
        turning: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(taken, laid, again, turning)
        ctx.shape, ctx.shapes = joint.shape, shapes
        flat, found = joint.reshape(-1, joint.shape[-1]).index_select(0, taken), []
        for rows in _cut(flat, joint.shape[2], shapes):
            _pairs(rows[:, :-1]).mul_(turning[:, : rows.shape[2]])
            found += [rows[:, :-2], rows[:, -2], rows[:, -1]]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *pulls: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        taken, laid, again, turning = ctx.saved_tensors
        grads, back = pulls[0].new_empty(len(taken), ctx.shape[-1]), turning.conj().resolve_conj()
        for i, grad in enumerate(_cut(grads, ctx.shape[2], ctx.shapes)):
            queries, keys, values = pulls[3 * i : 3 * i + 3]
            torch.cat((queries, keys[:, None], values[:, None]), dim=1, out=grad)
            _pairs(grad[:, :-1]).mul_(back[:, : grad.shape[2]])
        found = grads.new_zeros(ctx.shape)
        flat = found.view(-1, ctx.shape[-1])
        torch.index_select(grads, 0, laid, out=flat[: len(laid)])
        flat.index_add_(0, taken[again], grads.index_select(0, again))
        return found, None, None, None, None, None


def _cut(flat: Tensor, parts: int, shapes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Vectors [N, D] group by group, each [rows heads, parts, T, D]."""
    pieces = flat.split([rows * parts * width for rows, width in shapes])
    for piece, (rows, width) in zip(pieces, shapes, strict=True):
        yield piece.view(rows, parts, width, flat.shape[-1])


def _pairs(x: Tensor) -> Tensor:
    """[..., D] as complex numbers that share its memory, [..., D / 2]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _turned(x: Tensor, turning: Tensor) -> Tensor:
    """Vectors [..., D], each turned, complex [..., D / 2]."""
    return torch.view_as_real(_pairs(x.to(_exact(x.dtype))) * turning).flatten(-2).to(x.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for a type: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def _normed(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last dimension, [N, H] (Zhang & Sennrich 2019, eq. 4), without weights."""
    return _Normed.apply(x, eps) if torch.is_grad_enabled() else (x * _inverse(x, eps)).to(x.dtype)


def _inverse(x: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_exact(x.dtype))
    return torch.addcmul(_scalar(eps, length.dtype, length.device), length, length, value=1 / x.shape[-1]).rsqrt_()


@lru_cache(maxsize=16)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """It as a tensor [], made once."""
    return torch.full((), value, dtype=dtype, device=device)


class _Normed(Function):
    """`_normed`, in three passes backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = _inverse(x, eps)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normed, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, normed)[:, None] / -normed.shape[-1]
        return torch.addcmul(grad, normed, along).mul_(inverse), None
