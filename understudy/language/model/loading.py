"""Models are loaded from directories that may be anybody's: JSON and safetensors are read, and no code is run."""

from __future__ import annotations

import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from understudy.language.model.lora import base_of, merge_adapter
from understudy.run.checkpoint import CorruptFileError, find_nonfinite, read_json
from understudy.run.config import RequestError
from understudy.run.store import holds_no_policy, recipe_of

CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"}
MAX_CONFIG_BYTES, MAX_JSON_BYTES = (
    16 * 2**20,
    128 * 2**20,
)  # bytes of a config, and of any other JSON, such as a vocabulary
# the largest published causal LMs are within a quarter of each
MAX_MODEL_SIZES = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "vocab_size": 2**23,
    "max_position_embeddings": 2**25,
}


def load_model(model_class: Any, source: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A model of a directory or hub id, none of whose weights is missing; see `load_reported`."""
    model, report = load_model_with_report(model_class, source, dtype=dtype, trust_remote_code=trust_remote_code)
    if missing := sorted(report["missing_keys"]):
        raise RequestError(
            f"model is '{source}', which holds no weights for {', '.join(missing[:3])}{' ...' if missing[3:] else ''} of a "
            f"{type(model).__name__}: give a causal language model with its head"
        )
    return model


def load_model_with_report(
    model_class: Any, source: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of a directory or hub id, and transformers' report of missing and mismatched weights.

    Where the directory holds an adapter, the model is its base with the adapter merged into it. Weights are read from
    safetensors alone, and code that comes with the model is run only where that is asked for. A model without fused
    attention (SDPA) computes its attention plainly (eager).

    Raises:
        RequestError: none can be loaded from there, it has an encoder, or its weights are not finite.
    """
    check_files(source, trust_remote_code=trust_remote_code)
    if base := base_of(source):
        check_files(base, trust_remote_code=trust_remote_code)
        if base_of(base):
            raise RequestError(
                f"model is '{source}', an adapter whose base '{base}' is an adapter too: merge that first"
            )
        model, report = load_model_with_report(
            model_class, base, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
        model = merge_adapter(model, source)
        refuse_nonfinite(model, source)
        return model, report
    check_pickles(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_sizes(config, source)
        check_decoder(config, source)
        options |= {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
        load = partial(model_class.from_pretrained, source, output_loading_info=True, **options)
        # torch's fused attention knows no soft-cap inside (Gemma 2)
        if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
            model, report = load(attn_implementation="eager")
        else:
            try:
                model, report = load(attn_implementation="sdpa")
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                model, report = load(attn_implementation="eager")
        refuse_nonfinite(model, source)
        return model, report
    except RequestError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        if "Unrecognized configuration class" in str(error):
            raise RequestError(
                f"model is '{source}', whose architecture transformers does not load by {model_class.__name__}: "
                "give a model of "
                "another one"
            ) from error
        if not Path(source).exists() and isinstance(error, OSError | ValueError):
            raise RequestError(
                f"model is '{source}': there is no such directory here, and no such model on the Hugging Face hub, if "
                "that can be reached: give a directory or hub id in Hugging Face layout"
            ) from error
        why = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise RequestError(
            f"model is '{source}', which cannot be loaded ({why}): give a directory or hub id in Hugging Face layout"
        ) from error


def refuse_nonfinite(model: Any, source: str | Path) -> None:
    """Refuse a model with a weight that is NaN or infinite: whatever it computes is neither text nor a score."""
    if (name := find_nonfinite(model)) is not None:
        raise RequestError(f"model is '{source}', whose weight {name!r} is not finite: give another, or load it anew")


def attention_warning(model: Any) -> str:
    """A sentence where transformers has no fused attention for a model; empty where it has."""
    config = model.config
    text_config = config.get_text_config()
    is_softcapped = getattr(text_config, "attn_logit_softcapping", None) is not None
    if model._supports_sdpa or is_softcapped or not hasattr(text_config, "num_attention_heads"):
        return ""
    return (
        f"model is '{config._name_or_path}', a {type(model).__name__}, for which transformers has no fused attention "
        "(SDPA): attention is computed plainly (eager), which takes more memory"
    )


def check_files(source: str | Path, *, trust_remote_code: bool) -> None:
    """Refuse a directory whose files are too large, no plain files, or want code of their own to be run. Nothing is loaded.

    Of a hub id there is nothing to see yet: Hugging Face's classes are told to run no code and to read safetensors alone.

    Raises:
        RequestError: naming the file.
    """
    path = Path(source)
    if not path.is_dir():
        return
    _refuse_run(path)
    try:
        for file in path.iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():  # a pipe would be waited for
                raise CorruptFileError(f"'{file}' is no plain file")
            if file.suffix == ".json" and file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
                raise CorruptFileError(f"'{file}' has more than {MAX_JSON_BYTES >> 20} MiB")
        for file in filter(Path.is_file, (path / name for name in CONFIG_FILES)):
            _check_config(read_json(file, max_bytes=MAX_CONFIG_BYTES, allow_links=True), file, trust_remote_code)
        if (index := path / INDEX_FILE).is_file():
            _check_index(read_json(index, max_bytes=MAX_CONFIG_BYTES, allow_links=True), index)
    except CorruptFileError as error:
        raise RequestError(f"model is '{source}', and {error}: give a directory in Hugging Face layout") from error


def _refuse_run(path: Path) -> None:
    """Refuse a run, or a policy, that is not of the kind that was asked for: its own would have been found inside."""
    recipe = recipe_of(path)
    if str(recipe).startswith("control") or (path / "policy.json").is_file():
        what = f"a run of `{recipe}`" if recipe else "a policy of a control run"
        raise RequestError(f"model is '{path}', {what}, which acts in an environment: give a language model")
    if recipe is not None and recipe != "language reward-model" and (path / "policy").is_dir():
        raise RequestError(
            f"model is '{path}', a run of `{recipe}`, which holds a policy: give a reward model, as `language reward-model` "
            "saves it"
        )
    if recipe is not None:
        raise RequestError(f"model is '{path}', {holds_no_policy(path)}")


def check_pickles(source: str | Path) -> None:
    """Refuse a directory whose only weights are pickles, which run code when they are read."""
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        for file in sorted(path.iterdir()):
            if file.suffix in PICKLE_SUFFIXES:
                raise RequestError(
                    f"model is '{source}', whose weights are in '{file.name}', which is not read (a pickle runs code): "
                    "convert it to safetensors"
                )


def check_sizes(config: Any, source: str | Path) -> None:
    """Refuse a model that is larger than any there is, before it is made."""
    text_config = config.get_text_config()
    for name, maximum in MAX_MODEL_SIZES.items():
        for value in x if isinstance(x := getattr(text_config, name, None), list | tuple) else [x]:
            if isinstance(value, int) and value > maximum:
                raise RequestError(f"model is '{source}', whose {name} is {value}: at most {maximum} is read")


def check_decoder(config: Any, source: str | Path) -> None:
    """Refuse a model that has an encoder: `AutoModelForCausalLM` would load half of it, or nothing."""
    if getattr(config, "is_encoder_decoder", False):
        raise RequestError(
            f"model is '{source}', an encoder-decoder ({config.model_type}), and only decoders are trained here: give a "
            "causal language model"
        )


def _check_config(document: Any, file: Path, trust_remote_code: bool) -> None:
    if not isinstance(document, dict):
        raise CorruptFileError(f"'{file}' is no JSON object")
    if document.get("auto_map") and not trust_remote_code:
        raise RequestError(
            f"model is '{file.parent}', whose {file.name} names code of its own to be run (auto_map): read that code, then "
            "set trust_remote_code; or take auto_map out, where transformers knows the model itself"
        )
    if document.get("megatron_config"):
        raise CorruptFileError(f"'{file}' names a module to be imported (megatron_core)")


def _check_index(document: Any, file: Path) -> None:
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict):
        raise CorruptFileError(f"'{file}' has no weight_map")
    for name in set(map(str, names.values())):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise CorruptFileError(f"'{file}' names {name!r}, which is no safetensors file beside it")
