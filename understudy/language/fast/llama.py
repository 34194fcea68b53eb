"""Llama-like trunks in few operations a layer: one token a row for the sampler, whole rows for whoever scores or learns.

Hugging Face says what a model is. On a CPU, though, its small models cost their calls and their passes over memory as much
as their products, padding costs what tokens cost, and torch's fused attention takes three times what batched products take
for one query, twice for short rows. So where a trunk is one of `SUPPORTED_MODELS`, with nothing put into it or hung on it,
this is the same function of the same parameters: tests/test_fast_llama.py holds the two side by side, and
`Policy.verify_separable_head` compares them before a run.
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

from understudy.fast.linear import linear, round_up_rows

SUPPORTED_MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")  # rotary positions that depend on how long a row has become
MAX_STORED_ATTENTION_WEIGHTS = (
    2**22
)  # attention weights of a layer that are kept, 16 MiB; more than that are made again in the backward pass


class WritableLayerCache(Protocol):
    """One layer's keys and values, [slots, heads, D, columns] and [slots, heads, columns, D]."""

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights as they are multiplied with. Q: queries of a key-value head."""

    qkv: Tensor
    """[heads (Q + 2) D, H]: a head's queries, its key and its value below each other; the norm before them in it.

    Of queries and key the two parts of a pair that is turned stand beside each other: scores are the same.
    """
    qkv_bias: Tensor | None
    """What is added to that, [heads (Q + 2) D]."""
    qk_norm: Tensor | None
    """Weights of the norms of queries and key, [Q + 1, D] (Qwen3)."""
    out: Tensor
    gate: Tensor
    up: Tensor
    """[I, H], as `gate`: the norm before them in them."""
    down: Tensor
    act: Callable[[Tensor], Tensor]
    is_sliding: bool
    """It sees a window only."""

    def transposed(self) -> LayerWeights:
        """The same with its matrices column by column."""
        matrices = {name: getattr(self, name) for name in ("qkv", "out", "gate", "up", "down")}
        return replace(self, **{name: matrix.t().contiguous().t() for name, matrix in matrices.items()})


class FastLlama:
    """A trunk of `SUPPORTED_MODELS` with its weights laid out anew; for as long as they do not change.

    Args:
        few: rows at a time: weights are copied as oneDNN takes them soonest, column by column. Nothing learns through them.
    """

    def __init__(self, trunk: Any, *, is_column_major: bool = False) -> None:
        config, attention = trunk.config, trunk.layers[0].self_attn
        self.num_kv_heads, self.num_queries_per_kv_head, self.head_dim = (
            config.num_key_value_heads,
            attention.num_key_value_groups,
            attention.head_dim,
        )
        self.eps, self.window = config.rms_norm_eps, getattr(config, "sliding_window", None) or 0
        layer_types = getattr(config, "layer_types", None)
        layer_types = layer_types or ["full_attention" if not self.window else "sliding_attention"] * len(trunk.layers)
        self.embed_tokens, self.norm_weight, self.rotary_emb = trunk.embed_tokens, trunk.norm.weight, trunk.rotary_emb
        self.layers = [
            self._layer_weights(layer, layer_type) for layer, layer_type in zip(trunk.layers, layer_types, strict=True)
        ]
        if is_column_major:
            self.layers = [layer.transposed() for layer in self.layers]

    def _layer_weights(self, layer: Any, layer_type: str) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        qkv = self._stack_heads([p.weight for p in projections])
        qkv_bias = None if attention.q_proj.bias is None else self._stack_heads([p.bias for p in projections])
        qk_norm = None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm.weight] * self.num_queries_per_kv_head + [attention.k_norm.weight]
            qk_norm = torch.stack([norm.view(2, -1).t().flatten() for norm in norms])
        mlp_norm = layer.post_attention_layernorm.weight
        return LayerWeights(
            qkv * layer.input_layernorm.weight,
            qkv_bias,
            qk_norm,
            attention.o_proj.weight,
            mlp.gate_proj.weight * mlp_norm,
            mlp.up_proj.weight * mlp_norm,
            mlp.down_proj.weight,
            mlp.act_fn,
            layer_type == "sliding_attention",
        )

    def _stack_heads(self, tensors: Sequence[Tensor]) -> Tensor:
        """What belongs to queries, keys and values, each [its heads D, ...], as in `Layer.joint`."""
        queries, keys, values = (
            tensor.view(self.num_kv_heads, -1, 2, self.head_dim // 2, *tensor.shape[1:]) for tensor in tensors
        )
        stacked = (
            queries.transpose(2, 3),
            keys.transpose(2, 3),
            values.view(*values.shape[:2], -1, 2, *values.shape[4:]),
        )
        return torch.cat(stacked, dim=1).flatten(0, 3)

    def rotary(self, num_positions: int) -> Tensor:
        """What turns a head's queries and key at positions below `num_positions`, complex [places, Q + 1, D / 2].

        The queries' are scaled by 1 / sqrt(D).
        """
        angles = self.rotary_emb(self.norm_weight, torch.arange(num_positions, device=self.norm_weight.device)[None])
        cos, sin = (part[0, :, : self.head_dim // 2].to(_compute_dtype(part.dtype)) for part in angles)
        scale = cos.new_tensor([self.head_dim**-0.5] * self.num_queries_per_kv_head + [1.0])[:, None]
        return torch.complex(cos, sin)[:, None] * scale

    def decode_step(
        self,
        tokens: Tensor,
        rotary_factors: Tensor,
        layer_caches: Sequence[WritableLayerCache],
        full_mask: Tensor,
        window_mask: Tensor,
    ) -> Tensor:
        """The last hidden states after one token more a row.

        Args:
            tokens: [slots].
            rotary_factors: `turning` of each one's position, [slots, Q + 1, D / 2].
            layer_caches: of every layer; it takes the new key and value and gives all in use.
            full_mask: what is added to a score, [slots, columns]: 0 where it is seen, else very negative.
            window_mask: the same for layers that see a window only.

        Returns:
            [slots, H].
        """
        full_mask_per_head = full_mask.repeat_interleave(self.num_kv_heads, dim=0)[:, None]
        window_mask_per_head = (
            full_mask_per_head
            if window_mask is full_mask
            else window_mask.repeat_interleave(self.num_kv_heads, dim=0)[:, None]
        )
        x = embedding(tokens, self.embed_tokens.weight)
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            qkv = self._qkv(x, layer)
            rotated = _apply_rotary(qkv[:, :, :-1], rotary_factors[:, None])
            keys, values = layer_cache.write(rotated[:, :, -1], qkv[:, :, -1])
            queries, mask = (
                rotated[:, :, :-1].flatten(0, 1),
                window_mask_per_head if layer.is_sliding else full_mask_per_head,
            )
            attended = _bmm_attention(queries, keys.flatten(0, 1), values.flatten(0, 1), mask)
            x = self._mlp(x + linear(attended.view(len(x), -1), layer.out), layer)
        return _rms_norm(x, self.eps) * self.norm_weight

    def prefill(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Rows from their beginning, [B, T] -> the last hidden states, [B, T, H]; of each layer keys and values to store.

        Keys and values are [B, heads, T, D].
        """
        B, T = ids.shape
        rotary_factors, num_padded = self.rotary(T)[:, None], round_up_rows(ids.numel())
        x, stored = embedding(pad(ids.flatten(), (0, num_padded - ids.numel())), self.embed_tokens.weight), []
        for layer in self.layers:
            qkv = self._qkv(x, layer)[: ids.numel()].view(B, T, self.num_kv_heads, -1, self.head_dim)
            rotated = _apply_rotary(qkv[..., :-1, :], rotary_factors).permute(0, 2, 3, 1, 4)
            keys, values = rotated[:, :, -1], qkv[..., -1, :].transpose(1, 2)
            stored.append((keys, values))
            attention_inputs = rotated[:, :, :-1], keys, values
            attended = self._attention(
                *(part.flatten(0, 1) for part in attention_inputs), self._attention_mask(T, layer.is_sliding)
            )
            attended = attended.unflatten(0, (B, self.num_kv_heads)).permute(0, 3, 1, 2, 4).reshape(ids.numel(), -1)
            x = self._mlp(x + linear(pad(attended, (0, 0, 0, num_padded - ids.numel())), layer.out), layer)
        return (_rms_norm(x, self.eps) * self.norm_weight)[: ids.numel()].view(B, T, -1), stored

    def forward(self, ids: Tensor, num_columns: Tensor, output_mask: Tensor) -> Tensor:
        """The last hidden states of rows from their beginning, [B, T, H]; 0 where they are not wanted.

        A row of which nothing is asked is not read. Rows attend in groups of about one length, so padding costs next to
        nothing; what rows have alike until the first that is asked of them is read once. What is read is rounded up by
        tokens that nobody hears or asks.

        Args:
            ids: [B, T].
            num_columns: how many columns of a row are read, [B].
            output_mask: bool [B, T]: where something is asked; within what is needed.
        """
        length, position = ids.shape[1], torch.arange(ids.shape[1], device=ids.device)
        prefix_row, prefix_length = _find_shared_prefixes(ids, output_mask)
        is_row_needed = output_mask.any(dim=1)
        is_row_needed[0] |= ~is_row_needed.any()  # so that there is something to attend to
        is_needed = (position < num_columns[:, None]) & is_row_needed[:, None]
        is_shared = (
            is_needed
            & (position < prefix_length[:, None])
            & (prefix_row != torch.arange(len(ids), device=ids.device))[:, None]
        )
        row, column = (is_needed & ~is_shared).nonzero(as_tuple=True)
        token_index = torch.zeros_like(ids).index_put((row, column), torch.arange(len(row), device=ids.device))
        token_index = torch.where(
            is_shared, token_index[prefix_row], token_index
        )  # which of the tokens that are read stands at a place
        output_index = output_mask[row, column].nonzero()[:, 0]
        groups = [
            (ids.new_tensor(rows), width)
            for rows, width in _group_rows_by_length(torch.where(is_row_needed, num_columns, 0).tolist())
        ]
        row_offset, row_width, offset = torch.zeros_like(num_columns), torch.zeros_like(num_columns), 0
        for rows, width in groups:
            row_offset[rows], row_width[rows] = offset + width * torch.arange(len(rows), device=ids.device), width
            offset += width * len(rows)
        num_vectors = self.num_kv_heads * (self.num_queries_per_kv_head + 2)
        first_index = _flat_index(row, column, row_offset, row_width, num_vectors)
        attended_index = _flat_index(
            row, column, row_offset, row_width, self.num_kv_heads * self.num_queries_per_kv_head
        )
        shared_positions = is_shared.nonzero()
        repeat_index = _flat_index(shared_positions[:, 0], shared_positions[:, 1], row_offset, row_width, num_vectors)
        vector = torch.arange(num_vectors, device=ids.device)[:, None]
        gather_index = torch.cat(
            [(token_index[rows, None, :width] * num_vectors + vector).flatten() for rows, width in groups]
        )
        group_shapes = [(len(rows) * self.num_kv_heads, width) for rows, width in groups]
        num_padded = round_up_rows(len(row))
        attended_index = pad(
            attended_index.view(len(row), self.num_kv_heads * self.num_queries_per_kv_head),
            (0, 0, 0, num_padded - len(row)),
        )
        rotary_factors = self.rotary(length).transpose(0, 1).contiguous()
        sliding_kinds = {layer.is_sliding for layer in self.layers}
        masks = {sliding: [self._attention_mask(width, sliding) for _, width in groups] for sliding in sliding_kinds}
        x = self.embed_tokens(pad(ids[row, column], (0, num_padded - len(row))))
        for layer in self.layers:
            rotated = _GatherAndRotate.apply(
                self._qkv(x, layer), gather_index, first_index, repeat_index, group_shapes, rotary_factors
            )
            attended = [
                self._attention(*rotated[3 * i : 3 * i + 3], mask).reshape(-1, self.head_dim)
                for i, mask in enumerate(masks[layer.is_sliding])
            ]
            if layer is self.layers[-1]:  # of its tokens, only those that are asked about
                padded_output_index = pad(output_index, (0, round_up_rows(len(output_index)) - len(output_index)))
                x, attended_index = x[padded_output_index], attended_index[padded_output_index]
            attended = (attended[0] if len(attended) == 1 else torch.cat(attended))[attended_index].flatten(1)
            x = self._mlp(x + linear(attended, layer.out), layer)
        x = _rms_norm(x[: len(output_index)], self.eps) * self.norm_weight
        output_order = torch.zeros_like(row).index_put(
            (output_index,), torch.arange(len(output_index), device=ids.device)
        )
        return x.new_zeros(*ids.shape, x.shape[-1]).index_put(
            output_mask.nonzero(as_tuple=True), x[output_order[token_index[output_mask]]]
        )

    def _qkv(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """Queries, key and value of each token and head, not turned yet: [N, heads, Q + 2, D]."""
        qkv = linear(_rms_norm(x, self.eps), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(len(x), self.num_kv_heads, self.num_queries_per_kv_head + 2, self.head_dim)
        if layer.qk_norm is None:
            return qkv
        normed = rms_norm(qkv[:, :, :-1], (self.head_dim,), eps=self.eps) * layer.qk_norm
        return torch.cat((normed, qkv[:, :, -1:]), dim=2)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """[N, H] -> [N, H]: the part of a layer behind attention."""
        y = _rms_norm(x, self.eps)
        return x + linear(layer.act(linear(y, layer.gate)) * linear(y, layer.up), layer.down)

    def _attention_mask(self, length: int, is_sliding: bool) -> Tensor:
        """What is added to the scores of a row, [Q length, length]; queries of one head stand below each other."""
        column = torch.arange(length, device=self.norm_weight.device)
        distance = column[:, None] - column
        is_visible = (distance >= 0) & (distance < self.window) if is_sliding else distance >= 0
        mask = self.norm_weight.new_zeros(is_visible.shape).masked_fill(
            ~is_visible, torch.finfo(self.norm_weight.dtype).min / 2
        )
        return mask.repeat(self.num_queries_per_kv_head, 1)

    def _attention(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """queries [n, Q, T, D], keys, values [n, T, D], mask [Q T, T] -> what each query hears, [n, Q, T, D]."""
        if len(queries) * mask.numel() <= MAX_STORED_ATTENTION_WEIGHTS:
            return _bmm_attention(queries.flatten(1, 2), keys.transpose(1, 2), values, mask).view_as(queries)
        keys, values = (part[:, None].expand_as(queries) for part in (keys, values))
        return scaled_dot_product_attention(queries, keys, values, mask[: queries.shape[2]], scale=1.0)


def build_fast_llama(trunk: Any, *, for_whole_rows: bool = False) -> FastLlama | None:
    """A trunk as its parameters now are, in part copied; None where it is not known to be this simple.

    Args:
        for_whole_rows: for whole rows: not in half precision, and not where activations are to be made again in the
            backward pass.
    """
    if not _is_supported(trunk):
        return None
    recomputes_activations = any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules())
    if for_whole_rows:
        return None if recomputes_activations or trunk.dtype.itemsize < 4 else FastLlama(trunk)
    return FastLlama(trunk, is_column_major=trunk.device.type == "cpu")


def _is_supported(trunk: Any) -> bool:
    if type(trunk).__name__ not in SUPPORTED_MODELS or not type(trunk).__module__.startswith("transformers."):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in trunk.modules()):
        return False  # somebody watches or changes what it does
    if any(rope_type in getattr(trunk.rotary_emb, "rope_type", "") for rope_type in LENGTH_DEPENDENT_ROPE_TYPES):
        return False
    blocks = [block for layer in trunk.layers for block in (layer.self_attn, layer.mlp)]
    if len(trunk.layers) != trunk.config.num_hidden_layers or type(trunk.embed_tokens) is not nn.Embedding:
        return False
    linear_layers = [part for block in blocks for part in block.children() if hasattr(part, "in_features")]
    bias_free_layers = [part for layer in trunk.layers for part in (layer.self_attn.o_proj, *layer.mlp.children())]
    return (
        all(type(part) is nn.Linear for part in linear_layers)  # no adapter, no quantised weights
        and all(getattr(part, "bias", None) is None for part in bias_free_layers)
        and trunk.rotary_emb.inv_freq.numel() * 2 == trunk.layers[0].self_attn.head_dim
    )


def _bmm_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """queries [n, Q, D], keys [n, D, T], values [n, T, D], mask [n or 1, Q, T] or [Q, T] -> [n, Q, D]."""
    score = torch.baddbmm(mask, queries, keys)
    weight = score.softmax(dim=-1, dtype=_compute_dtype(score.dtype))
    return torch.bmm(weight.to(values.dtype), values)


def _find_shared_prefixes(ids: Tensor, output_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first row whose columns up to the first wanted one are the same, [B]; how many columns these are, [B]."""
    prefix_length = torch.where(output_mask.any(dim=1), output_mask.int().argmax(dim=1) + 1, 0)
    first_row: dict[tuple[int, ...], int] = {}
    prefixes = [tuple(row[:end]) for row, end in zip(ids.tolist(), prefix_length.tolist(), strict=True)]
    return ids.new_tensor([first_row.setdefault(key, row) for row, key in enumerate(prefixes)]), prefix_length


def _group_rows_by_length(num_columns: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows of about one length, the longest first, and the width of each group; without rows that need nothing."""
    groups: list[tuple[list[int], int]] = []
    for row in sorted((row for row, columns in enumerate(num_columns) if columns), key=lambda row: -num_columns[row]):
        if not groups or 4 * num_columns[row] < 3 * groups[-1][1]:
            groups.append(([], num_columns[row]))
        groups[-1][0].append(row)
    return groups


def _flat_index(row: Tensor, column: Tensor, row_offset: Tensor, row_width: Tensor, num_vectors: int) -> Tensor:
    """Where tokens at these rows and columns stand, flat: [N parts], in that order.

    A row has [parts, width] places, behind those of `row_offset` columns before it; begin, width [B].
    """
    vector = torch.arange(num_vectors, device=row.device)
    return ((row_offset[row] * num_vectors + column)[:, None] + vector * row_width[row][:, None]).flatten()


class _GatherAndRotate(Function):
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
        qkv: Tensor,
        gather_index: Tensor,
        first_index: Tensor,
        repeat_index: Tensor,
        group_shapes: list[tuple[int, int]],
        rotary_factors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gather_index, first_index, repeat_index, rotary_factors)
        ctx.shape, ctx.shapes = qkv.shape, group_shapes
        flat, outputs = qkv.reshape(-1, qkv.shape[-1]).index_select(0, gather_index), []
        for rows in _split_groups(flat, qkv.shape[2], group_shapes):
            _as_complex(rows[:, :-1]).mul_(rotary_factors[:, : rows.shape[2]])
            outputs += [rows[:, :-2], rows[:, -2], rows[:, -1]]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gather_index, first_index, repeat_index, rotary_factors = ctx.saved_tensors
        grads, inverse_factors = (
            grad_outputs[0].new_empty(len(gather_index), ctx.shape[-1]),
            rotary_factors.conj().resolve_conj(),
        )
        for i, grad in enumerate(_split_groups(grads, ctx.shape[2], ctx.shapes)):
            queries, keys, values = grad_outputs[3 * i : 3 * i + 3]
            torch.cat((queries, keys[:, None], values[:, None]), dim=1, out=grad)
            _as_complex(grad[:, :-1]).mul_(inverse_factors[:, : grad.shape[2]])
        grad_qkv = grads.new_zeros(ctx.shape)
        flat = grad_qkv.view(-1, ctx.shape[-1])
        torch.index_select(grads, 0, first_index, out=flat[: len(first_index)])
        flat.index_add_(0, gather_index[repeat_index], grads.index_select(0, repeat_index))
        return grad_qkv, None, None, None, None, None


def _split_groups(flat: Tensor, num_vectors: int, group_shapes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Vectors [N, D] group by group, each [rows heads, parts, T, D]."""
    groups = flat.split([rows * num_vectors * width for rows, width in group_shapes])
    for group, (rows, width) in zip(groups, group_shapes, strict=True):
        yield group.view(rows, num_vectors, width, flat.shape[-1])


def _as_complex(x: Tensor) -> Tensor:
    """[..., D] as complex numbers that share its memory, [..., D / 2]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _apply_rotary(x: Tensor, rotary_factors: Tensor) -> Tensor:
    """Vectors [..., D], each turned, complex [..., D / 2]."""
    return torch.view_as_real(_as_complex(x.to(_compute_dtype(x.dtype))) * rotary_factors).flatten(-2).to(x.dtype)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for a type: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last dimension, [N, H] (Zhang & Sennrich 2019, eq. 4), without weights."""
    return _RMSNorm.apply(x, eps) if torch.is_grad_enabled() else (x * _inverse_rms(x, eps)).to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_compute_dtype(x.dtype))
    return torch.addcmul(_scalar(eps, norm.dtype, norm.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@lru_cache(maxsize=16)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """It as a tensor [], made once."""
    return torch.full((), value, dtype=dtype, device=device)


class _RMSNorm(Function):
    """`_rms_norm`, in three passes backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normed, inverse = ctx.saved_tensors
        projection = torch.linalg.vecdot(grad, normed)[:, None] / -normed.shape[-1]
        return torch.addcmul(grad, normed, projection).mul_(inverse), None
