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
    behavior_logprob: Tensor
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
    old_distribution: Tree = None
    """The distribution that sampled, [B, T, ...]; None where step 3 is to tell."""

    def __post_init__(self) -> None:
        for name in ("behavior_logprob", "reward", "terminated", "truncated"):
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
    pretraining_text: Tree = None
    """A row of pretraining text for each row, [B, T']."""

    @classmethod
    def of(cls, trajectory: Trajectory, **fields: Any) -> Batch:
        """The record with `value`, `advantage`, `target` and `old` added, or some of them replaced."""
        return cls(**{f.name: getattr(trajectory, f.name) for f in dataclasses.fields(trajectory)} | fields)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        """The record of some rows."""
        return map_tensors(lambda x: x[rows], self)

    def flatten_steps(self) -> Batch:
        """The chosen steps alone, each a row of its own: [N, 1, ...]. Only for policies without memory."""
        indices, stateless = self.mask.reshape(-1).nonzero()[:, 0], dataclasses.replace(self, state=None)
        return map_tensors(lambda x: x.flatten(0, 1).index_select(0, indices).unsqueeze(1), stateless)


@dataclass(frozen=True)
class TokenBatch:
    """Token rows, padded on the right, and where in them something was chosen. Also the `obs` of a text `Trajectory`.

    A causal model that reads rows from the left needs no attention mask for padding that only follows.
    """

    ids: Tensor
    """int64 [B, T]; padding is any valid id, for nothing reads it."""
    mask: Tensor
    """bool [B, T]: True at t where token t+1 was chosen or is to be imitated. In `Pairs`: at the token that is scored."""

    def __len__(self) -> int:
        return self.mask.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> TokenBatch:
        return map_tensors(lambda x: x[rows], self)

    def to(self, device: str | torch.device) -> TokenBatch:
        return map_tensors(lambda x: x.to(device), self)

    @property
    def action(self) -> Tensor:
        """The token after each: int64 [B, T], 0 in the last column."""
        return torch.nn.functional.pad(self.ids[:, 1:], (0, 1))


@dataclass(frozen=True)
class PreferencePairs:
    """Preferences: row i of `chosen` was liked better than row i of `rejected`. A pair is one row and is never split.

    In both, `mask` is True where a reward model scores, at a row's last token; or, for DPO, as in any `TokenBatch`:
    before every token of the completion.
    """

    chosen: TokenBatch
    rejected: TokenBatch
    margin: Tensor
    """By how much at least, [B, 1]; 0 where the data do not say."""
    reference: Tensor | None = None
    """The frozen reference's log-probs of chosen and rejected, summed over the masked-in tokens, [B, 2]."""

    def __len__(self) -> int:
        return self.margin.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> PreferencePairs:
        return map_tensors(lambda x: x[rows], self)

    def to(self, device: str | torch.device) -> PreferencePairs:
        return map_tensors(lambda x: x.to(device), self)

    @property
    def mask(self) -> Tensor:
        """bool [B, 1], all True: what a loss a pair is weighted by."""
        return torch.ones_like(self.margin, dtype=torch.bool)


@dataclass(frozen=True)
class LabelledText:
    """Text and what is said of it: row i is good with probability `label`. `mask` as in `PreferencePairs`."""

    text: TokenBatch
    label: Tensor
    """In [0, 1], [B, 1]."""

    def __len__(self) -> int:
        return self.label.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> LabelledText:
        return map_tensors(lambda x: x[rows], self)

    def to(self, device: str | torch.device) -> LabelledText:
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
        field_names = [f.name for f in dataclasses.fields(tree) if not f.metadata.get("shared")]
        return dataclasses.replace(tree, **{name: map_tensors(function, getattr(tree, name)) for name in field_names})
    return tree


def tensor_leaves(tree: Tree) -> list[Tensor]:
    """Every Tensor that `map_tensors` meets, in its order."""
    tensors: list[Tensor] = []
    map_tensors(lambda x: tensors.append(x) or x, tree)
    return tensors


def policy_forward(policy: Any, trajectory: Trajectory) -> tuple[Any, Tensor]:
    """What a policy says at every column of a record: its distribution there and its value [B, T]."""
    return policy(trajectory.obs, *(() if trajectory.state is None else (trajectory.state, trajectory.start)))[:2]
