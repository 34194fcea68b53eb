"""LoRA (Hu et al. 2022) through peft: a low-rank adapter learns while the model's own weights stand still."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from understudy.language.model.forward import trunk_of
from understudy.run.checkpoint import CorruptFileError, read_json
from understudy.run.config import RequestError, did_you_mean
from understudy.run.guard import ran_out_of_memory
from understudy.run.installation import install_hint

ADAPTER = "adapter"
"""The folder an adapter is saved in, inside a checkpoint and beside a run's merged model."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's own names
MODELS_WITH_KERNELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
KERNEL_WEIGHTS = {"out_proj"}  # their fast kernels take this weight itself: peft refuses to adapt it
ADAPTER_NAME = "default"  # peft's own, for an adapter that was given none


class Adapter:
    """A fresh adapter in a model: W x becomes W x + alpha / rank * B A x, with B = 0 at first, so that nothing changes yet.

    All other parameters of the model are frozen. In half precision, A and B are float32. Experts whose weights are stacked
    in one parameter have an A and a B each.

    Attributes:
        adapted_fraction: of the entries of the trunk's matrices, embeddings aside, how many belong to a matrix that
            is adapted.
        unadapted_names: the last names of the matrices that are not.
    """

    def __init__(self, model: Any, *, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> None:
        """Put it into the model, in place.

        Args:
            targets: last names of the linear layers of the trunk, and of its experts' stacked weights, that get one; () for
                all of them.
            seed: of A; torch's own generator is not moved.

        Raises:
            RequestError: peft is not installed, or a target is no linear layer of the trunk.
        """
        require_peft("lora", rank)
        from peft import LoraConfig, inject_adapter_in_model

        self.model, trunk = model, trunk_of(model)
        linear, stacked = linear_layers(trunk), stacked_weights(trunk)
        called = _called_modules(model, {*linear, *(name.rpartition(".")[0] for name in stacked)})
        names = {_last_names(name) for name in linear if name in called}
        names |= {_last_names(name) for name in stacked if name.rpartition(".")[0] in called}
        chosen = _resolve_targets(
            targets, names - (KERNEL_WEIGHTS if model.config.model_type in MODELS_WITH_KERNELS else set())
        )
        matrices = _matrix_sizes(trunk)
        adapted = {name for name in matrices if _last_names(name.removesuffix(".weight")) in chosen}
        self.adapted_fraction = sum(matrices[name] for name in adapted) / sum(matrices.values())
        self.unadapted_names = sorted({_last_names(name.removesuffix(".weight")) for name in matrices.keys() - adapted})
        self.config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (peft divides by rank, and takes any number)
            target_modules=sorted(chosen & {_last_names(name) for name in linear}),
            target_parameters=sorted({_last_names(name, 2) for name in stacked if _last_names(name) in chosen}) or None,
            fan_in_fan_out=any(isinstance(part, Conv1D) for part in linear.values()),
            base_model_name_or_path=model.config._name_or_path,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(self.config, model)
            except ValueError as error:
                raise RequestError(
                    f"lora_target_modules is {' '.join(sorted(chosen))!r}, which peft does not adapt "
                    f"({' '.join(str(error).split())[:160]}): name others"
                ) from error
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()

    def save(self, path: Path) -> None:
        """A directory that `PeftModel.from_pretrained(base, path)` loads; the weights as they are, to the bit."""
        from peft import get_peft_model_state_dict

        path.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        tensors = {f"base_model.model.{name}": x.detach().cpu().contiguous() for name, x in state.items()}
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        self.config.save_pretrained(str(path))

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """The model's state with the adapter added to its weights, under the names of a model without one.

        The model itself stays as it is. Adapted weights are new tensors, in main memory.
        """
        state = {}
        for name, tensor in self.model.state_dict().items():
            if ".lora_" not in name:
                state[name.replace(".base_layer", "")] = tensor
        for name, module in self.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                parameter_name = getattr(module, "parameter_name", "weight")
                weight = getattr(module.get_base_layer(), parameter_name)
                merged_name = f"{name.replace('.base_layer', '')}.{parameter_name}"
                state[merged_name] = (weight + module.get_delta_weight(ADAPTER_NAME)).to(weight.dtype).cpu()
        return state


def linear_layers(trunk: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a trunk, by their full names; not routers, which give more than their product."""
    return {name: part for name, part in trunk.named_modules() if type(part) in (nn.Linear, Conv1D)}


def stacked_weights(trunk: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that hold a matrix for each expert, [experts, ...], by their full names."""
    return {
        f"{name}.{parameter_name}": weight
        for name, part in trunk.named_modules()
        if not isinstance(part, _ConvNd)
        for parameter_name, weight in part.named_parameters(recurse=False)
        if weight.ndim == 3 and min(weight.shape) > 1
    }


@torch.no_grad()
def _called_modules(model: Any, names: set[str]) -> set[str]:
    """Those of a trunk's modules whose last name belongs to some module that is called when the trunk reads a row.

    The others' weights are used without their forward (Jamba's `dt_proj`): an adapter there would not be heard.
    """
    trunk, called = trunk_of(model), set()
    modules = {trunk.get_submodule(name): _last_names(name) for name in names}
    hooks = [module.register_forward_hook(lambda module, *_: called.add(modules[module])) for module in modules]
    try:
        trunk(input_ids=torch.arange(8, device=model.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name in names if _last_names(name) in called}


def _matrix_sizes(trunk: nn.Module) -> dict[str, int]:
    """The entries of each matrix of a trunk, embeddings aside, by the names of the parameters."""
    return {
        f"{name}.{parameter_name}": weight.numel()
        for name, part in trunk.named_modules()
        if not isinstance(part, nn.Embedding)
        for parameter_name, weight in part.named_parameters(recurse=False)
        if weight.ndim > 1 and "bias" not in parameter_name
    }


def _last_names(name: str, num_names: int = 1) -> str:
    return ".".join(name.split(".")[-num_names:])


def base_of(source: str | Path) -> str | None:
    """The model that the adapter in this directory was made for; None where there is no adapter.

    Raises:
        RequestError: the adapter does not say, or it is one of a classifier, whose head is not the base's.
    """
    file = Path(source) / CONFIG
    if not file.is_file():
        return None
    try:
        adapter_config = read_json(file, allow_links=True)
    except CorruptFileError as error:
        raise RequestError(f"model is '{source}', and {error}: give an adapter in peft's layout") from error
    if not isinstance(adapter_config, dict) or not (Path(source) / WEIGHTS).is_file():
        raise RequestError(f"model is '{source}', an adapter without {WEIGHTS}, the one form that is read: convert it")
    if adapter_config.get("task_type") == "SEQ_CLS":
        raise RequestError(f"model is '{source}', an adapter of a classifier: name the merged model instead")
    base = adapter_config.get("base_model_name_or_path")
    if not base:
        raise RequestError(f"model is '{source}', an adapter that names no base model: write its path into {CONFIG}")
    return base


def tokenizer_source(source: str | Path) -> str | Path:
    """Where a model's tokenizer is: in its directory, or with the base of the adapter that lies there."""
    base = base_of(source)
    return source if base is None or (Path(source) / "tokenizer_config.json").is_file() else base


def merge_adapter(model: Any, source: str | Path) -> Any:
    """A base model with the adapter of a directory added to its weights.

    Raises:
        RequestError: peft is not installed, or the adapter does not fit the model.
    """
    require_peft("model", source)
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(source))
        config.task_type = None  # what is merged need not be what it was learned as: a reward model may begin from it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going away
            merged: Any = PeftModel.from_pretrained(model, str(source), config=config).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise
        raise RequestError(
            f"model is '{source}', an adapter that does not go on its base ({' '.join(str(error).split())[:160]}): put the "
            f"right base_model_name_or_path into {CONFIG}"
        ) from error
    return merged.requires_grad_(True)


def require_peft(field: str, value: object) -> None:
    """Raise `RequestError` where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise RequestError(f"{field} is {str(value)!r}, for which the package peft is missing: {install_hint('lora')}")


def _resolve_targets(targets: tuple[str, ...], names: set[str]) -> set[str]:
    """The last names to adapt, every one of them there."""
    for target in targets:
        if target not in names:
            raise RequestError(
                f"lora_target_modules is {target!r}: the model's linear layers are {', '.join(sorted(names))}"
                f"{did_you_mean(target, names)}"
            )
    return set(targets) or names
