"""What may be read of a directory in Hugging Face's layout, which may be anybody's: JSON and safetensors, no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from understudy.run.checkpoint import Damaged, read_json
from understudy.run.config import RequestError

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
INDEX = "model.safetensors.index.json"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"}
LARGEST_CONFIG, LARGEST = 16 * 2**20, 128 * 2**20  # bytes of a config, and of any other JSON, such as a vocabulary
# the largest published causal LMs are within a quarter of each
BOUNDS = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "vocab_size": 2**23,
    "max_position_embeddings": 2**25,
}


def check_files(source: str | Path, *, trust_remote_code: bool) -> None:
    """Refuse a directory whose files are too large, no plain files, or want code of their own to be run. Nothing is loaded.

    Of a hub id there is nothing to see yet: Hugging Face's classes are told to run no code and to read safetensors alone.

    Raises:
        RequestError: naming the file.
    """
    path = Path(source)
    if not path.is_dir():
        return
    try:
        for file in path.iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():  # a pipe would be waited for
                raise Damaged(f"'{file}' is no plain file")
            if file.suffix == ".json" and file.is_file() and file.stat().st_size > LARGEST:
                raise Damaged(f"'{file}' has more than {LARGEST >> 20} MiB")
        for file in filter(Path.is_file, (path / name for name in CONFIGS)):
            _check_config(read_json(file, most=LARGEST_CONFIG, links=True), file, trust_remote_code)
        if (index := path / INDEX).is_file():
            _check_index(read_json(index, most=LARGEST_CONFIG, links=True), index)
    except Damaged as error:
        raise RequestError(f"model is '{source}', and {error}: give a directory in Hugging Face layout") from error


def check_pickles(source: str | Path) -> None:
    """Refuse a directory whose only weights are pickles, which run code when they are read."""
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        for file in sorted(path.iterdir()):
            if file.suffix in PICKLED:
                raise RequestError(
                    f"model is '{source}', whose weights are in '{file.name}', which is not read (a pickle runs code): "
                    "convert it to safetensors"
                )


def check_sizes(config: Any, source: str | Path) -> None:
    """Refuse a model that is larger than any there is, before it is made."""
    about = config.get_text_config()
    for name, most in BOUNDS.items():
        for one in x if isinstance(x := getattr(about, name, None), list | tuple) else [x]:
            if isinstance(one, int) and one > most:
                raise RequestError(f"model is '{source}', whose {name} is {one}: at most {most} is read")


def _check_config(about: Any, file: Path, trust_remote_code: bool) -> None:
    if not isinstance(about, dict):
        raise Damaged(f"'{file}' is no JSON object")
    if about.get("auto_map") and not trust_remote_code:
        raise RequestError(
            f"model is '{file.parent}', whose {file.name} names code of its own to be run (auto_map): read that code, then "
            "set trust_remote_code; or take auto_map out, where transformers knows the model itself"
        )
    if about.get("megatron_config"):
        raise Damaged(f"'{file}' names a module to be imported (megatron_core)")


def _check_index(about: Any, file: Path) -> None:
    names = about.get("weight_map") if isinstance(about, dict) else None
    if not isinstance(names, dict):
        raise Damaged(f"'{file}' has no weight_map")
    for name in set(map(str, names.values())):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise Damaged(f"'{file}' names {name!r}, which is no safetensors file beside it")
