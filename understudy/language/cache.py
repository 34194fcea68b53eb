"""The key-value cache of generation: a ring of columns, one for each token that all slots read at one time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from understudy.language.lean import lean

if TYPE_CHECKING:
    from understudy.language.model import Policy


class Slots(DynamicLayer):
    """One layer's keys and values for all slots, pre-allocated: [slots, heads, D, capacity], [slots, heads, capacity, D].

    Keys lie as the product with a query wants them.
    """

    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def put(self, slots: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Read prompts take their slots: columns [n, P]; keys, values [n, heads, P, D]."""
        if not self.is_initialized:
            slot_count, capacity = self.grid.mask.shape
            self.keys = keys.new_zeros(slot_count, keys.shape[1], keys.shape[3], capacity)
            self.values = values.new_zeros(slot_count, values.shape[1], capacity, values.shape[3])
            self.is_initialized = True
        self.keys[slots[:, None], :, :, columns] = keys.transpose(1, 2)
        self.values[slots[:, None], :, columns] = values.transpose(1, 2)

    def close_up(self, moved: Tensor, into: Tensor, count: int) -> None:
        self.keys, self.values = (_closed_up(part, moved, into, count) for part in (self.keys, self.values))

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new column, [slots, heads, D]; the columns in use."""
        self.keys[..., self.grid.column] = keys
        self.values[:, :, self.grid.column] = values
        return self.keys[..., : self.grid.width], self.values[:, :, : self.grid.width]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same as Hugging Face's modules ask for it: [slots, heads, 1, D]."""
        keys, values = self.write(key_states[:, :, 0], value_states[:, :, 0])
        return keys.transpose(2, 3), values

    def get_seq_length(self) -> int:
        return self.grid.width


class Grid:
    """The cache of all layers. What is read at one time stands in one column for all slots, so it is written in one piece.

    Columns are a ring: a prompt is put behind the column that comes next, and what a slot sees are its last `length` ones.
    No row is longer than the ring, so what is written over belongs to nobody.

    Args:
        capacity: the longest that a row may become.
        longest: prompt that is ever read.
    """

    def __init__(self, policy: Policy, slots: int, capacity: int, longest: int) -> None:
        config, dtype = policy.model.config.get_text_config(), policy.model.dtype
        self.trunk = policy.trunk
        self.lean = lean(self.trunk)
        self.turning = None if self.lean is None else self.lean.turning(capacity)
        self.layers = [Slots(self) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.time, self.column, self.width = longest, longest, longest  # columns so far; the last one; those in use
        self.length = torch.zeros(slots, dtype=torch.long, device=policy.device)
        self.hidden = torch.finfo(dtype).min / 2  # what is added to the score of a column that is not seen
        self.mask = torch.full((slots, capacity), self.hidden, dtype=dtype, device=policy.device)
        self.place = torch.arange(capacity, device=policy.device)
        kinds = getattr(config, "layer_types", None) or []
        if unknown := {*kinds} - {"full_attention", "sliding_attention"}:
            raise NotImplementedError(f"its layers are of the kind {', '.join(sorted(unknown))}")
        self.window = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
        self.mixed = "sliding_attention" in kinds

    def read(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts into slots, equal ones once; the hidden state at each prompt's last token, [n, H]."""
        unique = list(dict.fromkeys(map(tuple, prompts)))
        number = {prompt: i for i, prompt in enumerate(unique)}
        device, width = self.length.device, max(map(len, unique))
        index = torch.tensor([number[tuple(p)] for p in prompts], device=device)
        ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in unique], device=device)
        if self.lean is not None:
            hidden, stored = self.lean.begin(ids)
        else:
            seen = Cache(layer_class_to_replicate=DynamicLayer)
            hidden = self.trunk(input_ids=ids, past_key_values=seen, use_cache=True).last_hidden_state
            layers: list[Any] = seen.layers
            stored = [(layer.keys, layer.values) for layer in layers]
        where, length = torch.tensor(slots, device=device), torch.tensor([len(p) for p in prompts], device=device)
        capacity = len(self.place)
        first = self.time - length[:, None]
        columns = (first + self.place[:width]) % capacity  # of padding too: it is written over before it is seen
        for own, (keys, values) in zip(self.layers, stored, strict=True):
            own.put(where, columns, keys[index], values[index])
        self.width = capacity if int(first.max()) + width > capacity else self.width
        self.length[where] = length
        behind = (self.time - 1 - self.place) % capacity  # how long ago a column was written
        self.mask[where] = self.mask.new_zeros(()).where(behind < length[:, None], self.hidden)
        return hidden[index, length - 1]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token more in every slot: [slots] -> hidden states [slots, H]."""
        capacity = len(self.place)
        self.column = self.time % capacity
        self.time += 1
        self.width = max(self.width, min(self.time, capacity))
        self.mask[:, self.column] = 0.0
        far = near = self.mask[:, : self.width]
        if self.window is not None:
            behind = (self.column - self.place[: self.width]) % capacity
            near = far.where(behind < self.window, self.hidden)
        if self.lean is not None and self.turning is not None:
            with torch.inference_mode():
                turn = self.turning.index_select(0, self.length)
                hidden = self.lean.step(tokens, turn, self.layers, far, near)
        else:
            hidden = self._by_modules(tokens, far, near)
        self.length += 1
        return hidden

    def _by_modules(self, tokens: Tensor, far: Tensor, near: Tensor) -> Tensor:
        """`step` by the trunk's own modules."""
        sees: Any = near[:, None, None] if self.window is not None else far[:, None, None]
        if self.mixed:
            sees = {"full_attention": far[:, None, None], "sliding_attention": near[:, None, None]}
        out = self.trunk(
            input_ids=tokens[:, None],
            position_ids=self.length[:, None],
            attention_mask=sees,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, 0]

    def close_up(self, moved: Tensor, into: Tensor, count: int) -> None:
        """Go on with the first `count` slots alone, some of which give their places to others behind them."""
        for layer in self.layers:
            layer.close_up(moved, into, count)
        self.length, self.mask = (_closed_up(part, moved, into, count) for part in (self.length, self.mask))


def _closed_up(rows: Tensor, moved: Tensor, into: Tensor, count: int) -> Tensor:
    """The first `count` of the rows, the moved ones among them."""
    rows[into] = rows[moved]
    return rows[:count]
