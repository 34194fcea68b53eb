"""How a model reads the rows of a batch, and what is checked of that: causality, no noise, rows that do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

from understudy.batch import Text
from understudy.language.lean import lean
from understudy.run.config import RequestError
from understudy.run.guard import ran_out_of_memory as ran_out_of_memory

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float64: 1e-8}
"""In nats: how far log-probs computed in two right ways may lie apart."""
SHORTEST, LONGEST = 12, 512  # tokens of the rows that are checked
NOISE = ("drop", "jitter")  # parts of the names of rates that make passes in training mode random


def read(trunk: Callable[..., Any], text: Text, *, packing: bool = False) -> Tensor:
    """The trunk's last hidden states, [B, T, H]; 0 at columns that nothing needs.

    Needed are a row's columns from its first choice to the one after its last, from which a cut row is bootstrapped.
    """
    column = torch.arange(text.ids.shape[1], device=text.ids.device)
    needed = (torch.where(text.mask, column, -1).amax(dim=1) + 2).clamp(max=text.ids.shape[1])
    width = int(needed.max())
    if (simple := lean(trunk, whole=True)) is not None:
        wanted = (column >= torch.where(text.mask, column, len(column)).amin(dim=1)[:, None]) & (
            column < needed[:, None]
        )
        hidden = simple.read(text.ids[:, :width], needed, wanted[:, :width])
        return nn.functional.pad(hidden, (0, 0, 0, len(column) - width))
    if packing and len(text) > 1 and int(needed.sum()) < 0.9 * len(text) * width:
        return _read_packed(trunk, text.ids, needed.tolist())
    hidden = trunk(input_ids=text.ids[:, :width], use_cache=False).last_hidden_state
    hidden = torch.where((column[:width] < needed[:, None])[..., None], hidden, 0.0)
    return nn.functional.pad(hidden, (0, 0, 0, text.ids.shape[1] - width))


def _read_packed(trunk: Callable[..., Any], ids: Tensor, needed: list[int]) -> Tensor:
    """Rows side by side in as few rows as first-fit finds; positions that begin again keep them apart."""
    width = max(needed)
    space: list[int] = []
    place: list[tuple[int, int]] = [(0, 0)] * len(needed)
    for row in sorted(range(len(needed)), key=lambda r: -needed[r]):
        packed = next((p for p, used in enumerate(space) if used + needed[row] <= width), len(space))
        if packed == len(space):
            space.append(0)
        place[row] = (packed, space[packed])
        space[packed] += needed[row]
    flat = ids.new_zeros(len(space), width)
    position = torch.zeros_like(flat)
    for row, (packed, at) in enumerate(place):
        flat[packed, at : at + needed[row]] = ids[row, : needed[row]]
        position[packed, at : at + needed[row]] = torch.arange(needed[row], device=ids.device)
    hidden = trunk(input_ids=flat, position_ids=position, use_cache=False).last_hidden_state
    rows = [hidden[packed, at : at + needed[row]] for row, (packed, at) in enumerate(place)]
    return torch.stack([nn.functional.pad(row, (0, 0, 0, ids.shape[1] - len(row))) for row in rows])


class Reader(Protocol):
    """A `Policy` or a `RewardModel`, as the checks below see it."""

    model: Any
    packing: bool
    training: bool
    fast: bool

    def numbers(self, text: Text) -> Tensor:
        """The log-probs of the tokens, or the scores, at the columns where `text.mask` is True, [n]."""
        ...

    def train(self, mode: bool = True) -> Any: ...


def trunk_of(model: Any) -> Any:
    """The part of a model below its head: it turns ids [B, T] into hidden states [B, T, H].

    Raises:
        RequestError: the model does not keep it apart from its head.
    """
    if model.base_model is not model:
        return model.base_model
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:
        raise RequestError(
            f"model is a {type(model).__name__}, whose layers are not kept apart from its head: give another model"
        )
    return parts[0]


def silence_dropout(module: nn.Module) -> None:
    """Switch off every dropout layer, and every attribute of a module that is a rate of dropout.

    The sampler and the trainer then compute the same function, in training mode too.
    """
    for part in module.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        _silence_rates(part, NOISE[:1])


def keep_from_training_mode(*modules: nn.Module | None) -> None:
    """Put modules of transformers into evaluation mode, in which they have gradients, but no dropout and no noise.

    Only where activations are recomputed do they have to be in training mode.
    """
    for module in modules:
        if module is not None and not any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            module.eval()


def check_causal(model: Reader) -> None:
    """Refuse a model in which a later token moves the log-prob, or the score, of an earlier one.

    Raises:
        RequestError: the model reads rows in both directions, so that padding and the answer itself would be seen.
    """
    size, half = SHORTEST, SHORTEST // 2
    vocabulary = model.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, size), generator=torch.Generator().manual_seed(0))
    ids[1, :half] = ids[0, :half]
    mask = torch.arange(size) != half - 1  # its next token is already another one
    text = Text(ids, mask.expand(2, size)).to(model.model.device)
    with torch.no_grad(), _refusing(model):
        one, other = model.numbers(text).unflatten(0, (2, -1))[:, : half - 1]
    if (moved := distance(one, other)) > TOLERANCE[model.model.dtype]:
        raise RequestError(
            f"{_named(model)}, which is not causal: a later token moves what it says of earlier ones by {moved:.2g}; "
            "give a model that was trained to predict the next token (an encoder such as BERT was not)"
        )


def check_reading(model: Reader, rows: Sequence[Sequence[int]]) -> None:
    """Read some rows of the data in each way that training does, and refuse a model for which the ways differ.

    Raises:
        RequestError: dropout or other noise cannot be switched off, padding or a neighbour moves the numbers of a row, or
            `packing` lets the rows that are read as one see each other.
    """
    some, tolerance = _three_of(rows), TOLERANCE[model.model.dtype]
    together = _as_text(some, model.model.device)
    devices = [model.model.device] if model.model.device.type == "cuda" else []
    packing = model.packing
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _refusing(model):
        _check_noise(model, together)
        try:
            model.packing = False
            alone = torch.cat([model.numbers(_as_text([row], model.model.device)) for row in some])
            gap = distance(model.numbers(together), alone)
        finally:
            model.packing = packing
        if gap > 4 * tolerance:
            raise RequestError(
                f"{_named(model)}, which reads its padding: what it says of a row moves by {gap:.2g} beside longer rows; "
                "give another model"
            )
        if packing and not model.fast:
            raise RequestError(
                f"packing is True, but a {type(model.model).__name__} is read through its own logits, row beside row; leave "
                "packing out"
            )
        if packing and (moved := distance(model.numbers(together), alone)) > tolerance + 4 * gap:
            raise RequestError(
                f"packing is True, but a {type(model.model).__name__} lets packed rows see each other: what it says of "
                f"them moves by {moved:.2g}; leave packing out"
            )


def distance(one: Tensor, other: Tensor) -> float:
    """The size of the differences between numbers that should be equal: the largest; in half precision, the mean.

    There, a single token may be off by ten times what all of them are on average. Log-probs that are -inf alike are equal.
    """
    size = torch.where(one == other, 0.0, one - other).detach().abs()
    return float(size.max() if torch.finfo(size.dtype).bits >= 32 else size.mean())


def _three_of(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The longest row, half as many tokens of another, a third as many of a third one: the last two fit into one row."""
    longest = max(rows, key=len)
    size = min(max(len(longest), SHORTEST), LONGEST)
    parts = (longest, size), (rows[0], size // 2), (rows[-1], size // 3)
    return [list(islice(cycle(row), length)) for row, length in parts]


def _as_text(rows: Sequence[Sequence[int]], device: torch.device) -> Text:
    """Padded rows; each column but a row's last one is asked about."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    last = torch.tensor([[len(row) - 1] for row in rows], device=device)
    return Text(ids, torch.arange(width, device=device) < last)


def _check_noise(model: Reader, text: Text) -> None:
    """Compare passes as they are in training with one in evaluation mode; what differs is silenced, or refused by name."""
    mode = model.training
    try:
        truth = model.train(False).numbers(text)
        model.train(True)
        if not _is_random(model, text, truth):
            return
        owners = {id(x): x for part in model.model.modules() for x in (part, *vars(part).values())}
        for owner in owners.values():
            if isinstance(owner, nn.Module | PreTrainedConfig):
                _silence_rates(owner, NOISE)
        if _is_random(model, text, truth):
            raise RequestError(
                f"{_named(model)}, whose {_random_part(model, text)} gives other numbers each time it reads the same rows: "
                "set the rate of its dropout or noise to 0, and leave checkpointing out"
            )
    finally:
        model.train(mode)


def _is_random(model: Reader, text: Text, truth: Tensor) -> bool:
    """Whether one of two passes is not the truth."""
    return max(distance(model.numbers(text), truth) for _ in range(2)) > TOLERANCE[model.model.dtype]


def _random_part(model: Reader, text: Text) -> str:
    """The first module whose output differs between two passes, by its name and class."""
    passes: list[list[tuple[str, Any]]] = [[], []]
    names = {module: name for name, module in model.model.named_modules()}
    for found in passes:
        hooks = [
            module.register_forward_hook(lambda module, _, out, found=found: found.append((names[module], out)))
            for module in names
        ]
        model.numbers(text)
        for hook in hooks:
            hook.remove()
    for (name, out), (other, again) in zip(*passes, strict=False):
        one, two = (x[0] if isinstance(x, tuple) else x for x in (out, again))
        if name != other or (isinstance(one, Tensor) and not torch.equal(one, two)):
            return f"{name or 'model'} ({type(model.model.get_submodule(name)).__name__})"
    return "model"


def _silence_rates(owner: Any, words: Sequence[str]) -> None:
    """Set the rates among an object's own attributes whose names hold one of these words to 0."""
    for name, value in [*vars(owner).items()]:
        if isinstance(value, float) and 0 < value < 1 and any(word in name for word in words):
            setattr(owner, name, 0.0)


@contextmanager
def _refusing(model: Reader) -> Iterator[None]:
    """Whatever a model raises that cannot read rows of tokens, as a sentence."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise RequestError(
            f"{_named(model)}, which cannot read rows of tokens ({problem}): give another model"
        ) from error


def _named(model: Reader) -> str:
    return f"model is '{model.model.config._name_or_path}', a {type(model.model).__name__}"
