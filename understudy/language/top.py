"""The top of a trunk apart from the rest: its last layers and the norm behind them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from understudy.language.reading import trunk_of
from understudy.run.config import RequestError

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What each of the trunk's top layers was called with, in order."""


class Top(nn.Module):
    """Copies of a trunk's last layers and of its last norm, which read on from what the trunk's lower layers found out.

    The lower layers are the trunk's own: they are read once for both, and no gradient flows back into them from here. (Where
    both losses are to shape them, a value head on the shared trunk is the cheaper way.) Masks and positions are what the
    trunk itself gives its layers, so whatever it can read, this can: packed rows, windows, recomputed activations.
    """

    def __init__(self, trunk: Any, count: int) -> None:
        super().__init__()
        layers, norm = layers_of(trunk)
        self.layers = copy.deepcopy(layers[-count:])
        self.norm = copy.deepcopy(norm)

    @contextmanager
    def watch(self, trunk: nn.Module) -> Iterator[Calls]:
        """What the trunk's layers beside ours are called with, while this is open."""
        calls: Calls = []
        layers = layers_of(trunk)[0][-len(self.layers) :]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            for layer in layers
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, calls: Calls) -> Tensor:
        """[B, T, H], from what the first of the trunk's layers beside ours was given."""
        hidden = _hidden(calls[0]).detach()
        for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
            rest = {name: x for name, x in kwargs.items() if name != "hidden_states"}
            out = layer(hidden, *args[1:], **rest)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.norm(hidden)

    def follow(self, calls: Calls, **given: Any) -> SimpleNamespace:
        """In the place of a trunk: what it would be given is in the calls already."""
        return SimpleNamespace(last_hidden_state=self(calls))


def make_top(model: Any, count: int) -> Top:
    """The top `count` layers of a causal LM's trunk, as copies.

    Raises:
        RequestError: it has fewer layers, or its layers read apart do not give what they give in place.
    """
    check_count(model, "critic_layers", count)
    trunk = trunk_of(model)
    top = Top(trunk, count)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(9, device=model.device)[None] % vocabulary
    with torch.no_grad(), top.watch(trunk) as calls:
        inside = trunk(input_ids=ids, use_cache=False).last_hidden_state
        gap = float((top(calls) - inside).abs().max() / inside.abs().max())
    if not gap <= 1e-3:
        raise RequestError(
            f"critic is 'top': the top layers of a {type(model).__name__} read apart are {gap:.2g} from themselves in "
            "place; use critic shared or separate"
        )
    return top


def below(model: Any, count: int) -> frozenset[str]:
    """The names of all of a causal LM's parameters but those of its top `count` layers and of the norm behind them.

    Embeddings and head are below, whether they are tied or not.

    Raises:
        RequestError: it has fewer layers, or they cannot be told apart.
    """
    check_count(model, "train_layers", count)
    layers, norm = layers_of(trunk_of(model))
    above = {id(p) for part in (*layers[-count:], norm) for p in part.parameters()}
    return frozenset(name for name, p in model.named_parameters() if id(p) not in above)


def check_count(model: Any, field: str, count: int) -> None:
    """Raise `RequestError` where a model has not that many layers, or they cannot be told apart."""
    try:
        layers, _ = layers_of(trunk_of(model))
    except LookupError:
        raise RequestError(
            f"{field} is {count}: which the layers of a {type(model).__name__} are is not known; leave it out"
        ) from None
    if count > len(layers):
        raise RequestError(f"{field} is {count}: the model has {len(layers)} layers; lower it")


def layers_of(trunk: Any) -> tuple[nn.ModuleList, nn.Module]:
    """A trunk's layers and the norm behind them.

    Raises:
        LookupError: not exactly one list of that many layers with one norm after it.
    """
    parts = list(trunk.children())
    depth = trunk.config.get_text_config().num_hidden_layers
    lists = [i for i, part in enumerate(parts) if isinstance(part, nn.ModuleList) and len(part) == depth]
    norms = [part for part in parts[lists[0] :] if "norm" in type(part).__name__.lower()] if lists else []
    if len(lists) != 1 or len(norms) != 1:
        raise LookupError(f"{len(lists)} lists of {depth} layers, {len(norms)} norms after them")
    return parts[lists[0]], norms[0]


def _hidden(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]
