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

from understudy.batch import TokenBatch
from understudy.language.fast.llama import build_fast_llama
from understudy.run.config import RequestError
from understudy.run.guard import ran_out_of_memory as ran_out_of_memory

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float64: 1e-8}
"""In nats: how far log-probs computed in two right ways may lie apart."""
MIN_CHECKED_TOKENS, MAX_CHECKED_TOKENS = 12, 512  # tokens of the rows that are checked
NOISE_RATE_NAMES = ("drop", "jitter")  # parts of the names of rates that make passes in training mode random


def compute_hidden_states(trunk: Callable[..., Any], text: TokenBatch, *, packing: bool = False) -> Tensor:
    """The trunk's last hidden states, [B, T, H]; 0 at columns that nothing needs.

    Needed are a row's columns from its first choice to the one after its last, from which a cut row is bootstrapped.
    """
    column = torch.arange(text.ids.shape[1], device=text.ids.device)
    num_columns = (torch.where(text.mask, column, -1).amax(dim=1) + 2).clamp(max=text.ids.shape[1])
    width = int(num_columns.max())
    if (fast_llama := build_fast_llama(trunk, for_whole_rows=True)) is not None:
        output_mask = (column >= torch.where(text.mask, column, len(column)).amin(dim=1)[:, None]) & (
            column < num_columns[:, None]
        )
        hidden = fast_llama.forward(text.ids[:, :width], num_columns, output_mask[:, :width])
        return nn.functional.pad(hidden, (0, 0, 0, len(column) - width))
    if packing and len(text) > 1 and int(num_columns.sum()) < 0.9 * len(text) * width:
        return _forward_packed(trunk, text.ids, num_columns.tolist())
    hidden = trunk(input_ids=text.ids[:, :width], use_cache=False).last_hidden_state
    hidden = torch.where((column[:width] < num_columns[:, None])[..., None], hidden, 0.0)
    return nn.functional.pad(hidden, (0, 0, 0, text.ids.shape[1] - width))


def _forward_packed(trunk: Callable[..., Any], ids: Tensor, num_columns: list[int]) -> Tensor:
    """Rows side by side in as few rows as first-fit finds; positions that begin again keep them apart."""
    width = max(num_columns)
    num_used: list[int] = []
    placements: list[tuple[int, int]] = [(0, 0)] * len(num_columns)
    for row in sorted(range(len(num_columns)), key=lambda r: -num_columns[r]):
        packed_row = next((p for p, used in enumerate(num_used) if used + num_columns[row] <= width), len(num_used))
        if packed_row == len(num_used):
            num_used.append(0)
        placements[row] = (packed_row, num_used[packed_row])
        num_used[packed_row] += num_columns[row]
    flat = ids.new_zeros(len(num_used), width)
    position = torch.zeros_like(flat)
    for row, (packed_row, start) in enumerate(placements):
        flat[packed_row, start : start + num_columns[row]] = ids[row, : num_columns[row]]
        position[packed_row, start : start + num_columns[row]] = torch.arange(num_columns[row], device=ids.device)
    hidden = trunk(input_ids=flat, position_ids=position, use_cache=False).last_hidden_state
    rows = [hidden[packed_row, start : start + num_columns[row]] for row, (packed_row, start) in enumerate(placements)]
    return torch.stack([nn.functional.pad(row, (0, 0, 0, ids.shape[1] - len(row))) for row in rows])


class CheckedModel(Protocol):
    """A `Policy` or a `RewardModel`, as the checks below see it."""

    model: Any
    packing: bool
    training: bool
    is_head_separable: bool

    def compute_masked_outputs(self, text: TokenBatch) -> Tensor:
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


def disable_dropout(module: nn.Module) -> None:
    """Switch off every dropout layer, and every attribute of a module that is a rate of dropout.

    The sampler and the trainer then compute the same function, in training mode too.
    """
    for part in module.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        _zero_rates(part, NOISE_RATE_NAMES[:1])


def force_eval_mode(*modules: nn.Module | None) -> None:
    """Put modules of transformers into evaluation mode, in which they have gradients, but no dropout and no noise.

    Only where activations are recomputed do they have to be in training mode.
    """
    for module in modules:
        if module is not None and not any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            module.eval()


def check_causal(model: CheckedModel) -> None:
    """Refuse a model in which a later token moves the log-prob, or the score, of an earlier one.

    Raises:
        RequestError: the model reads rows in both directions, so that padding and the answer itself would be seen.
    """
    length, half = MIN_CHECKED_TOKENS, MIN_CHECKED_TOKENS // 2
    vocabulary = model.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    ids[1, :half] = ids[0, :half]
    mask = torch.arange(length) != half - 1  # its next token is already another one
    text = TokenBatch(ids, mask.expand(2, length)).to(model.model.device)
    with torch.no_grad(), _errors_as_request_errors(model):
        first, second = model.compute_masked_outputs(text).unflatten(0, (2, -1))[:, : half - 1]
    if (difference := distance(first, second)) > TOLERANCE[model.model.dtype]:
        raise RequestError(
            f"{_describe_model(model)}, which is not causal: a later token moves what it says of earlier ones "
            f"by {difference:.2g}; "
            "give a model that was trained to predict the next token (an encoder such as BERT was not)"
        )


def check_forward_consistency(model: CheckedModel, rows: Sequence[Sequence[int]]) -> None:
    """Read some rows of the data in each way that training does, and refuse a model for which the ways differ.

    Raises:
        RequestError: dropout or other noise cannot be switched off, padding or a neighbour moves the numbers of a row, or
            `packing` lets the rows that are read as one see each other.
    """
    sampled_rows, tolerance = _sample_rows(rows), TOLERANCE[model.model.dtype]
    padded = _pad_rows(sampled_rows, model.model.device)
    devices = [model.model.device] if model.model.device.type == "cuda" else []
    packing = model.packing
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _errors_as_request_errors(model):
        _check_noise(model, padded)
        try:
            model.packing = False
            separate_outputs = torch.cat(
                [model.compute_masked_outputs(_pad_rows([row], model.model.device)) for row in sampled_rows]
            )
            gap = distance(model.compute_masked_outputs(padded), separate_outputs)
        finally:
            model.packing = packing
        if gap > 4 * tolerance:
            raise RequestError(
                f"{_describe_model(model)}, which reads its padding: what it says of a row moves by {gap:.2g} "
                "beside longer rows; "
                "give another model"
            )
        if packing and not model.is_head_separable:
            raise RequestError(
                f"packing is True, but a {type(model.model).__name__} is read through its own logits, row beside row; leave "
                "packing out"
            )
        if (
            packing
            and (difference := distance(model.compute_masked_outputs(padded), separate_outputs)) > tolerance + 4 * gap
        ):
            raise RequestError(
                f"packing is True, but a {type(model.model).__name__} lets packed rows see each other: what it says of "
                f"them moves by {difference:.2g}; leave packing out"
            )


def distance(one: Tensor, other: Tensor) -> float:
    """The size of the differences between numbers that should be equal: the largest; in half precision, the mean.

    There, a single token may be off by ten times what all of them are on average. Log-probs that are -inf alike are equal.
    """
    size = torch.where(one == other, 0.0, one - other).detach().abs()
    return float(size.max() if torch.finfo(size.dtype).bits >= 32 else size.mean())


def _sample_rows(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The longest row, half as many tokens of another, a third as many of a third one: the last two fit into one row."""
    longest = max(rows, key=len)
    max_length = min(max(len(longest), MIN_CHECKED_TOKENS), MAX_CHECKED_TOKENS)
    row_lengths = (longest, max_length), (rows[0], max_length // 2), (rows[-1], max_length // 3)
    return [list(islice(cycle(row), length)) for row, length in row_lengths]


def _pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> TokenBatch:
    """Padded rows; each column but a row's last one is asked about."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    last = torch.tensor([[len(row) - 1] for row in rows], device=device)
    return TokenBatch(ids, torch.arange(width, device=device) < last)


def _check_noise(model: CheckedModel, text: TokenBatch) -> None:
    """Compare passes as they are in training with one in evaluation mode; what differs is silenced, or refused by name."""
    mode = model.training
    try:
        expected = model.train(False).compute_masked_outputs(text)
        model.train(True)
        if not _is_random(model, text, expected):
            return
        owners = {id(x): x for part in model.model.modules() for x in (part, *vars(part).values())}
        for owner in owners.values():
            if isinstance(owner, nn.Module | PreTrainedConfig):
                _zero_rates(owner, NOISE_RATE_NAMES)
        if _is_random(model, text, expected):
            raise RequestError(
                f"{_describe_model(model)}, whose {_random_module_name(model, text)} gives other numbers each "
                "time it reads the same rows: "
                "set the rate of its dropout or noise to 0, and leave gradient_checkpointing out"
            )
    finally:
        model.train(mode)


def _is_random(model: CheckedModel, text: TokenBatch, expected: Tensor) -> bool:
    """Whether one of two passes is not the truth."""
    return max(distance(model.compute_masked_outputs(text), expected) for _ in range(2)) > TOLERANCE[model.model.dtype]


def _random_module_name(model: CheckedModel, text: TokenBatch) -> str:
    """The first module whose output differs between two passes, by its name and class."""
    passes: list[list[tuple[str, Any]]] = [[], []]
    names = {module: name for name, module in model.model.named_modules()}
    for outputs in passes:
        hooks = [
            module.register_forward_hook(lambda module, _, out, outputs=outputs: outputs.append((names[module], out)))
            for module in names
        ]
        model.compute_masked_outputs(text)
        for hook in hooks:
            hook.remove()
    for (name, out), (other_name, other_output) in zip(*passes, strict=False):
        first, second = (x[0] if isinstance(x, tuple) else x for x in (out, other_output))
        if name != other_name or (isinstance(first, Tensor) and not torch.equal(first, second)):
            return f"{name or 'model'} ({type(model.model.get_submodule(name)).__name__})"
    return "model"


def _zero_rates(owner: Any, words: Sequence[str]) -> None:
    """Set the rates among an object's own attributes whose names hold one of these words to 0."""
    for name, value in [*vars(owner).items()]:
        if isinstance(value, float) and 0 < value < 1 and any(word in name for word in words):
            setattr(owner, name, 0.0)


@contextmanager
def _errors_as_request_errors(model: CheckedModel) -> Iterator[None]:
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
            f"{_describe_model(model)}, which cannot read rows of tokens ({problem}): give another model"
        ) from error


def _describe_model(model: CheckedModel) -> str:
    return f"model is '{model.model.config._name_or_path}', a {type(model.model).__name__}"
