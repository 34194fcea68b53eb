"""The top of a trunk apart from the rest: its last layers and the norm behind them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from understudy.language.model.forward import trunk_of
from understudy.run.config import RequestError

LayerCalls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What each of the trunk's top layers was called with, in order."""


class TopLayers(nn.Module):
    """Copies of a trunk's last layers and of its last norm, which read on from what the trunk's lower layers found out.

    The lower layers are the trunk's own: they are read once for both, and no gradient flows back into them from here. (Where
    both losses are to shape them, a value head on the shared trunk is the cheaper way.) Masks and positions are what the
    trunk itself gives its layers, so whatever it can read, this can: packed rows, windows, recomputed activations.
    """

    def __init__(self, trunk: Any, num_layers: int) -> None:
        super().__init__()
        layers, norm = layers_and_norm(trunk)
        self.layers = copy.deepcopy(layers[-num_layers:])
        self.norm = copy.deepcopy(norm)

    @contextmanager
    def record_calls(self, trunk: nn.Module) -> Iterator[LayerCalls]:
        """What the trunk's layers beside ours are called with, while this is open."""
        calls: LayerCalls = []
        layers = layers_and_norm(trunk)[0][-len(self.layers) :]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            for layer in layers
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, calls: LayerCalls) -> Tensor:
        """[B, T, H], from what the first of the trunk's layers beside ours was given."""
        hidden = _hidden_states_of(calls[0]).detach()
        for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
            other_kwargs = {name: x for name, x in kwargs.items() if name != "hidden_states"}
            output = layer(hidden, *args[1:], **other_kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return self.norm(hidden)

    def forward_as_trunk(self, calls: LayerCalls, **trunk_kwargs: Any) -> SimpleNamespace:
        """In the place of a trunk: what it would be given is in the calls already."""
        return SimpleNamespace(last_hidden_state=self(calls))


def make_top_layers(model: Any, num_layers: int) -> TopLayers:
    """The top `num_layers` layers of a causal LM's trunk, as copies.

    Raises:
        RequestError: it has fewer layers, or its layers read apart do not give what they give in place.
    """
    check_num_layers(model, "critic_layers", num_layers)
    trunk = trunk_of(model)
    top = TopLayers(trunk, num_layers)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(9, device=model.device)[None] % vocabulary
    with torch.no_grad(), top.record_calls(trunk) as calls:
        trunk_output = trunk(input_ids=ids, use_cache=False).last_hidden_state
        gap = float((top(calls) - trunk_output).abs().max() / trunk_output.abs().max())
    if not gap <= 1e-3:
        raise RequestError(
            f"critic is 'top': the top layers of a {type(model).__name__} read apart are {gap:.2g} from themselves in "
            "place; use critic shared or separate"
        )
    return top


def frozen_parameter_names(model: Any, num_layers: int) -> frozenset[str]:
    """The names of all of a causal LM's parameters but those of its top `num_layers` layers and of the norm behind them.

    Embeddings and head are below, whether they are tied or not.

    Raises:
        RequestError: it has fewer layers, or they cannot be told apart.
    """
    check_num_layers(model, "train_layers", num_layers)
    layers, norm = layers_and_norm(trunk_of(model))
    trainable_ids = {id(p) for part in (*layers[-num_layers:], norm) for p in part.parameters()}
    return frozenset(name for name, p in model.named_parameters() if id(p) not in trainable_ids)


def check_num_layers(model: Any, field: str, num_layers: int) -> None:
    """Raise `RequestError` where a model has not that many layers, or they cannot be told apart."""
    try:
        layers, _ = layers_and_norm(trunk_of(model))
    except LookupError:
        raise RequestError(
            f"{field} is {num_layers}: which the layers of a {type(model).__name__} are is not known; leave it out"
        ) from None
    if num_layers > len(layers):
        raise RequestError(f"{field} is {num_layers}: the model has {len(layers)} layers; lower it")


def layers_and_norm(trunk: Any) -> tuple[nn.ModuleList, nn.Module]:
    """A trunk's layers and the norm behind them.

    Raises:
        LookupError: not exactly one list of that many layers with one norm after it.
    """
    parts = list(trunk.children())
    depth = trunk.config.get_text_config().num_hidden_layers
    list_indices = [i for i, part in enumerate(parts) if isinstance(part, nn.ModuleList) and len(part) == depth]
    norms = [part for part in parts[list_indices[0] :] if "norm" in type(part).__name__.lower()] if list_indices else []
    if len(list_indices) != 1 or len(norms) != 1:
        raise LookupError(f"{len(list_indices)} lists of {depth} layers, {len(norms)} norms after them")
    return parts[list_indices[0]], norms[0]


def _hidden_states_of(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]
