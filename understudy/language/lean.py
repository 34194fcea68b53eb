"""Step 1, sample: one token more through a Llama-like trunk, in few operations a layer.

Hugging Face says what a model is. Read token by token, though, its small ones cost their calls and not their arithmetic,
and torch's fused attention takes three times what two batched products take for a single query. So where a trunk is one of
`KNOWN`, with nothing put into it or hung on it, this is the same function on the same weights: tests/test_generate.py holds
the two side by side, and preflight compares what was sampled with what the trainer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
GROWING = ("dynamic", "longrope")  # rotary positions that depend on how long a row has become


class Store(Protocol):
    """One layer's keys and values, [slots, heads, D, columns] and [slots, heads, columns, D]."""

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Layer:
    """A layer's weights as they are multiplied with; N: queries of a key-value head."""

    joint: Tensor
    """[H, heads (N + 2) D]: a head's queries, its key and its value side by side."""
    offset: Tensor
    """What is added to that, [heads (N + 2) D]; or one 0."""
    turned_norm: Tensor | None
    """Weights of the norms of queries and key, [N + 1, D] (Qwen3)."""
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    act: Callable[[Tensor], Tensor]
    norms: tuple[Tensor, Tensor]
    """Before attention, and before the gated part."""
    sliding: bool
    """It sees a window only."""


class Lean:
    """A trunk of `KNOWN` for one token a row: see `lean`."""

    def __init__(self, trunk: Any, places: int) -> None:
        config = trunk.config
        self.heads, self.width = config.num_key_value_heads, trunk.layers[0].self_attn.head_dim
        self.scale, self.eps = self.width**-0.5, config.rms_norm_eps
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(trunk.layers)
        if getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None):
            kinds = ["sliding_attention"] * len(trunk.layers)
        self.words, self.norm = trunk.embed_tokens.weight, trunk.norm.weight
        self.layers = [self._layer(layer, kind) for layer, kind in zip(trunk.layers, kinds, strict=True)]
        cos, sin = trunk.rotary_emb(self.words[:1, None], torch.arange(places, device=self.words.device)[None])
        half = self.width // 2
        self.cos, self.sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

    def _layer(self, layer: Any, kind: str) -> Layer:
        attention, gated = layer.self_attn, layer.mlp
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        joint = torch.cat([p.weight.view(self.heads, -1, p.in_features) for p in parts], dim=1).flatten(0, 1)
        offset = joint.new_zeros(1)
        if attention.q_proj.bias is not None:
            offset = torch.cat([p.bias.view(self.heads, -1) for p in parts], dim=1).flatten()
        turned_norm = None
        if hasattr(attention, "q_norm"):
            queries = attention.num_key_value_groups
            turned_norm = torch.stack([*[attention.q_norm.weight] * queries, attention.k_norm.weight])
        return Layer(
            joint.t(),
            offset,
            turned_norm,
            attention.o_proj.weight.t(),
            gated.gate_proj.weight.t(),
            gated.up_proj.weight.t(),
            gated.down_proj.weight.t(),
            gated.act_fn,
            (layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
            kind == "sliding_attention",
        )

    def __call__(self, tokens: Tensor, place: Tensor, cache: Sequence[Store], far: Tensor, near: Tensor) -> Tensor:
        """The last hidden states after one token more.

        Args:
            tokens: [slots].  place: each token's position, [slots].
            cache: of every layer; it takes the new key and value and gives all in use.
            far: what is added to a score, [slots, columns]: 0 where it is seen, else very negative.
            near: the same for layers that see a window only.

        Returns:
            [slots, H].
        """
        seen, windowed = (mask.repeat_interleave(self.heads, dim=0)[:, None] for mask in (far, near))
        cos, sin = (table[place][:, None, None] for table in (self.cos, self.sin))
        x = embedding(tokens, self.words)
        for layer, store in zip(self.layers, cache, strict=True):
            joint = torch.addmm(layer.offset, self._normed(x, layer.norms[0]), layer.joint)
            joint = joint.view(len(x), self.heads, -1, self.width)
            turned = joint[:, :, :-1]
            if layer.turned_norm is not None:
                turned = rms_norm(turned, (self.width,), eps=self.eps) * layer.turned_norm
            turned = torch.addcmul(turned * cos, turned.roll(self.width // 2, dims=-1), sin)
            keys, values = store.write(turned[:, :, -1], joint[:, :, -1])
            mask = windowed if layer.sliding else seen
            heard = self._attend(turned[:, :, :-1].flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), mask)
            x = torch.addmm(x, heard.view(len(x), -1), layer.out)
            y = self._normed(x, layer.norms[1])
            x = torch.addmm(x, layer.act(y @ layer.gate) * (y @ layer.up), layer.down)
        return self._normed(x, self.norm)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """queries [n, N, D], keys [n, D, columns], values [n, columns, D], mask [n, 1, columns] -> [n, N, D]."""
        score = torch.baddbmm(mask, queries, keys, alpha=self.scale)
        weight = score.softmax(dim=-1, dtype=torch.promote_types(score.dtype, torch.float32))
        return torch.bmm(weight.to(values.dtype), values)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.eps)


def lean(trunk: Any, places: int) -> Lean | None:
    """A trunk that reads one token a row at positions below `places`; None where it is not known to be this simple.

    It holds copies of attention's projections, so it is made anew once parameters have changed.
    """
    return Lean(trunk, places) if _known(trunk) else None


def _known(trunk: Any) -> bool:
    if type(trunk).__name__ not in KNOWN or not type(trunk).__module__.startswith("transformers."):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in trunk.modules()):
        return False  # somebody watches or changes what it does
    if any(word in getattr(trunk.rotary_emb, "rope_type", "") for word in GROWING):
        return False
    linear = [part for layer in trunk.layers for block in (layer.self_attn, layer.mlp) for part in block.children()]
    linear = [part for part in linear if hasattr(part, "in_features")]
    plain = [part for layer in trunk.layers for part in (layer.self_attn.o_proj, *layer.mlp.children())]
    return (
        all(type(part) is nn.Linear for part in linear)  # no adapter, no quantised weights
        and all(getattr(part, "bias", None) is None for part in plain)
        and trunk.rotary_emb.inv_freq.numel() * 2 == trunk.layers[0].self_attn.head_dim
    )
