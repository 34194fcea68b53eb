"""The key-value cache of generation: a ring of columns, one for each token that all slots read at one time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from understudy.language.fast.llama import build_fast_llama

if TYPE_CHECKING:
    from understudy.language.model.policy import Policy


class LayerCache(DynamicLayer):
    """One layer's keys and values for all slots, pre-allocated: [slots, heads, D, capacity], [slots, heads, capacity, D].

    Keys lie as the product with a query wants them.
    """

    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, kv_cache: KVCache) -> None:
        super().__init__()
        self.kv_cache = kv_cache

    def write_prompts(self, slots: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Read prompts take their slots: columns [n, P]; keys, values [n, heads, P, D]."""
        if not self.is_initialized:
            num_slots, capacity = self.kv_cache.mask.shape
            self.keys = keys.new_zeros(num_slots, keys.shape[1], keys.shape[3], capacity)
            self.values = values.new_zeros(num_slots, values.shape[1], capacity, values.shape[3])
            self.is_initialized = True
        self.keys[slots[:, None], :, :, columns] = keys.transpose(1, 2)
        self.values[slots[:, None], :, columns] = values.transpose(1, 2)

    def compact(self, source_slots: Tensor, destination_slots: Tensor, num_slots: int) -> None:
        self.keys, self.values = (
            _compact(tensor, source_slots, destination_slots, num_slots) for tensor in (self.keys, self.values)
        )

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new column, [slots, heads, D]; the columns in use."""
        self.keys[..., self.kv_cache.column] = keys
        self.values[:, :, self.kv_cache.column] = values
        return self.keys[..., : self.kv_cache.num_used_columns], self.values[:, :, : self.kv_cache.num_used_columns]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same as Hugging Face's modules ask for it: [slots, heads, 1, D]."""
        keys, values = self.write(key_states[:, :, 0], value_states[:, :, 0])
        return keys.transpose(2, 3), values

    def get_seq_length(self) -> int:
        return self.kv_cache.num_used_columns


class KVCache:
    """The cache of all layers. What is read at one time stands in one column for all slots, so it is written in one piece.

    Columns are a ring: a prompt is put behind the column that comes next, and what a slot sees are its last `length` ones.
    No row is longer than the ring, so what is written over belongs to nobody.

    Args:
        capacity: the longest that a row may become.
        longest: prompt that is ever read.
    """

    def __init__(self, policy: Policy, num_slots: int, capacity: int, max_prompt_length: int) -> None:
        config, dtype = policy.model.config.get_text_config(), policy.model.dtype
        self.trunk = policy.trunk
        self.fast_llama = build_fast_llama(self.trunk)
        self.rotary_factors = None if self.fast_llama is None else self.fast_llama.rotary(capacity)
        self.layers = [LayerCache(self) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.num_columns_written, self.column, self.num_used_columns = (
            max_prompt_length,
            max_prompt_length,
            max_prompt_length,
        )  # columns so far; the last one; those in use
        self.length = torch.zeros(num_slots, dtype=torch.long, device=policy.device)
        self.masked_value = torch.finfo(dtype).min / 2  # what is added to the score of a column that is not seen
        self.mask = torch.full((num_slots, capacity), self.masked_value, dtype=dtype, device=policy.device)
        self.column_index = torch.arange(capacity, device=policy.device)
        layer_types = getattr(config, "layer_types", None) or []
        if unknown := {*layer_types} - {"full_attention", "sliding_attention"}:
            raise NotImplementedError(f"its layers are of the kind {', '.join(sorted(unknown))}")
        self.window = (
            getattr(config, "sliding_window", None) if not layer_types or "sliding_attention" in layer_types else None
        )
        self.has_mixed_layers = "sliding_attention" in layer_types

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts into slots, equal ones once; the hidden state at each prompt's last token, [n, H]."""
        unique_prompts = list(dict.fromkeys(map(tuple, prompts)))
        index_of_prompt = {prompt: i for i, prompt in enumerate(unique_prompts)}
        device, width = self.length.device, max(map(len, unique_prompts))
        index = torch.tensor([index_of_prompt[tuple(p)] for p in prompts], device=device)
        ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in unique_prompts], device=device)
        if self.fast_llama is not None:
            hidden, stored = self.fast_llama.prefill(ids)
        else:
            dynamic_cache = Cache(layer_class_to_replicate=DynamicLayer)
            hidden = self.trunk(input_ids=ids, past_key_values=dynamic_cache, use_cache=True).last_hidden_state
            layers: list[Any] = dynamic_cache.layers
            stored = [(layer.keys, layer.values) for layer in layers]
        slot_index, length = torch.tensor(slots, device=device), torch.tensor([len(p) for p in prompts], device=device)
        capacity = len(self.column_index)
        first_column = self.num_columns_written - length[:, None]
        columns = (
            first_column + self.column_index[:width]
        ) % capacity  # of padding too: it is written over before it is seen
        for layer_cache, (keys, values) in zip(self.layers, stored, strict=True):
            layer_cache.write_prompts(slot_index, columns, keys[index], values[index])
        self.num_used_columns = capacity if int(first_column.max()) + width > capacity else self.num_used_columns
        self.length[slot_index] = length
        age = (self.num_columns_written - 1 - self.column_index) % capacity  # how long ago a column was written
        self.mask[slot_index] = self.mask.new_zeros(()).where(age < length[:, None], self.masked_value)
        return hidden[index, length - 1]

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Read one token more in every slot: [slots] -> hidden states [slots, H]."""
        capacity = len(self.column_index)
        self.column = self.num_columns_written % capacity
        self.num_columns_written += 1
        self.num_used_columns = max(self.num_used_columns, min(self.num_columns_written, capacity))
        self.mask[:, self.column] = 0.0
        full_mask = window_mask = self.mask[:, : self.num_used_columns]
        if self.window is not None:
            age = (self.column - self.column_index[: self.num_used_columns]) % capacity
            window_mask = full_mask.where(age < self.window, self.masked_value)
        if self.fast_llama is not None and self.rotary_factors is not None:
            with torch.inference_mode():
                rotary_factors = self.rotary_factors.index_select(0, self.length)
                hidden = self.fast_llama.decode_step(tokens, rotary_factors, self.layers, full_mask, window_mask)
        else:
            hidden = self._decode_step_by_modules(tokens, full_mask, window_mask)
        self.length += 1
        return hidden

    def _decode_step_by_modules(self, tokens: Tensor, full_mask: Tensor, window_mask: Tensor) -> Tensor:
        """`step` by the trunk's own modules."""
        attention_mask: Any = window_mask[:, None, None] if self.window is not None else full_mask[:, None, None]
        if self.has_mixed_layers:
            attention_mask = {
                "full_attention": full_mask[:, None, None],
                "sliding_attention": window_mask[:, None, None],
            }
        output = self.trunk(
            input_ids=tokens[:, None],
            position_ids=self.length[:, None],
            attention_mask=attention_mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, 0]

    def compact(self, source_slots: Tensor, destination_slots: Tensor, num_slots: int) -> None:
        """Go on with the first `num_slots` slots alone, some of which give their places to others behind them."""
        for layer in self.layers:
            layer.compact(source_slots, destination_slots, num_slots)
        self.length, self.mask = (
            _compact(tensor, source_slots, destination_slots, num_slots) for tensor in (self.length, self.mask)
        )


def _compact(rows: Tensor, source_rows: Tensor, destination_rows: Tensor, num_rows: int) -> Tensor:
    """The first `num_rows` of the rows, the moved ones among them."""
    rows[destination_rows] = rows[source_rows]
    return rows[:num_rows]
