"""What travels between the rooms: the record of what a policy chose, [B, T], rows first, padded on the right.

One layout serves both worlds. An env row: `obs[t]` is what the policy saw, `action[t]` what it chose there; each episode's
last observation and the observation after the row's last step stand in the row as masked columns. A text row: `obs[t]` is
token t, `action[t]` token t+1, and prompt and padding are masked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tree = Any  # a Tensor, a dict of Tensors, a dataclass of Tensors, or None


@dataclass(frozen=True)
class Trajectory:
    """What sampling hands on. Every field is [B, T, ...] but `state`; masked entries are finite."""

    obs: Tree
    """What the policy saw: a Tensor, or a dict of Tensors by name."""
    action: Tensor
    """What it chose: [B, T] or [B, T, D]."""
    logprob: Tensor
    """log pi(action | obs) under the policy that sampled it, [B, T]."""
    mask: Tensor
    """bool [B, T]: True where the policy chose; False at prompt, padding, tool output, last observations."""
    reward: Tensor
    """What the environment paid for the step, [B, T]."""
    terminated: Tensor
    """bool [B, T]: nothing follows this step, so nothing is bootstrapped."""
    truncated: Tensor
    """bool [B, T]: the episode was cut after this step; bootstrap from the next column, trace no further."""
    state: Tensor | None = None
    """Recurrent state before column 0, [B, S]; None for a policy without memory."""
    old: Tree = None
    """The distribution that sampled, [B, T, ...]; None where step 3 is to tell."""

    def __post_init__(self) -> None:
        for name in ("logprob", "reward", "terminated", "truncated"):
            if (shape := getattr(self, name).shape) != self.mask.shape or len(shape) != 2:
                raise ValueError(f"{name} is {tuple(shape)}, mask is {tuple(self.mask.shape)}: both must be [B, T]")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask is {self.mask.dtype}, must be bool")

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def ended(self) -> Tensor:
        """bool [B, T]: the episode's last chosen step."""
        return self.terminated | self.truncated

    @property
    def start(self) -> Tensor:
        """bool [B, T]: a new episode begins here, two columns after an end (its last observation stands between)."""
        start = torch.zeros_like(self.mask)
        start[:, 2:] = self.ended[:, :-2]
        return start


@dataclass(frozen=True, kw_only=True)
class Batch(Trajectory):
    """A record ready to learn from: a `Trajectory` with what steps 3 and 4 found out about it."""

    value: Tensor
    """V(obs) when the record was made, [B, T]."""
    advantage: Tensor
    """How much better the step was than expected, [B, T]."""
    target: Tensor
    """What the critic should have said, [B, T]."""
    reference: Tree = None
    """What the frozen reference says of the same steps: its log-probs [B, T], or its distribution."""
    mix: Tree = None
    """A row of pretraining text for each row, [B, T']."""

    @classmethod
    def of(cls, record: Trajectory, **found: Any) -> Batch:
        """The record with `value`, `advantage`, `target` and `old` added, or some of them replaced."""
        return cls(**{f.name: getattr(record, f.name) for f in dataclasses.fields(record)} | found)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        """The record of some rows."""
        return map_tensors(lambda x: x[rows], self)

    def steps(self) -> Batch:
        """The chosen steps alone, each a row of its own: [N, 1, ...]. Only for policies without memory."""
        chosen, stateless = self.mask.reshape(-1).nonzero()[:, 0], dataclasses.replace(self, state=None)
        return map_tensors(lambda x: x.flatten(0, 1).index_select(0, chosen).unsqueeze(1), stateless)


@dataclass(frozen=True)
class Text:
    """Token rows, padded on the right, and where in them something was chosen. Also the `obs` of a text `Trajectory`.

    A causal model that reads rows from the left needs no attention mask for padding that only follows.
    """

    ids: Tensor
    """int64 [B, T]; padding is any valid id, for nothing reads it."""
    mask: Tensor
    """bool [B, T]: True at t where token t+1 was chosen or is to be imitated. In `Pairs`: at the token that is scored."""

    def __len__(self) -> int:
        return self.mask.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Text:
        return map_tensors(lambda x: x[rows], self)

    def to(self, device: str | torch.device) -> Text:
        return map_tensors(lambda x: x.to(device), self)

    @property
    def action(self) -> Tensor:
        """The token after each: int64 [B, T], 0 in the last column."""
        return torch.nn.functional.pad(self.ids[:, 1:], (0, 1))


@dataclass(frozen=True)
class Pairs:
    """Preferences: row i of `chosen` was liked better than row i of `rejected`. A pair is one row and is never split.

    In both, `mask` is True where a reward model scores, at a row's last token; or, for DPO, as in any `Text`: before every
    token of the completion.
    """

    chosen: Text
    rejected: Text
    margin: Tensor
    """By how much at least, [B, 1]; 0 where the data do not say."""
    reference: Tensor | None = None
    """The frozen reference's log-probs of chosen and rejected, summed over the masked-in tokens, [B, 2]."""

    def __len__(self) -> int:
        return self.margin.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Pairs:
        return map_tensors(lambda x: x[rows], self)

    def to(self, device: str | torch.device) -> Pairs:
        return map_tensors(lambda x: x.to(device), self)

    @property
    def mask(self) -> Tensor:
        """bool [B, 1], all True: what a loss a pair is weighted by."""
        return torch.ones_like(self.margin, dtype=torch.bool)


@dataclass(frozen=True)
class Labelled:
    """Text and what is said of it: row i is good with probability `label`. `mask` as in `Pairs`."""

    text: Text
    label: Tensor
    """In [0, 1], [B, 1]."""

    def __len__(self) -> int:
        return self.label.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Labelled:
        return map_tensors(lambda x: x[rows], self)

    def to(self, device: str | torch.device) -> Labelled:
        return map_tensors(lambda x: x.to(device), self)

    @property
    def mask(self) -> Tensor:
        """bool [B, 1], all True."""
        return torch.ones_like(self.label, dtype=torch.bool)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same tree with `function` applied to every Tensor in it; what is not a Tensor stays as it is.

    So does a dataclass field marked `metadata={"shared": True}`: one Tensor for all steps, without their dimensions.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: map_tensors(function, leaf) for name, leaf in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        own = [f.name for f in dataclasses.fields(tree) if not f.metadata.get("shared")]
        return dataclasses.replace(tree, **{name: map_tensors(function, getattr(tree, name)) for name in own})
    return tree


def leaves(tree: Tree) -> list[Tensor]:
    """Every Tensor that `map_tensors` meets, in its order."""
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) or x, tree)
    return found


def consult(policy: Any, record: Trajectory) -> tuple[Any, Tensor]:
    """What a policy says at every column of a record: its distribution there and its value [B, T]."""
    return policy(record.obs, *(() if record.state is None else (record.state, record.start)))[:2]
