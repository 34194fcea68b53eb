"""Checkpoints: written aside, synced, renamed, checked by digest when read; a damaged one is put away, never used.

A checkpoint is a directory of safetensors and JSON with a `manifest.json` that names every file, its size and its SHA-256.
It is there whole or not at all: its name is given to it last. Nothing in it is executed, whatever it holds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

SCHEMA = 1
"""Of the manifest and of state.json; a reader refuses another one by its number."""
MAX_SPARSE_BYTES = 2**30
"""Bytes of a file that may be mostly holes; more is refused."""
MAX_JSON_BYTES = 64 * 2**20
"""Bytes of JSON that are read of a checkpoint; more is no state of ours."""


class CorruptFileError(ValueError):
    """A checkpoint that is not what its manifest says: one sentence with the file and what is wrong."""


def write_partial(folder: Path, name: str, save: Callable[[Path], None]) -> Path:
    """Put what is to be the checkpoint `folder/name` into a directory beside it: `save` fills the one it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    partial_dir = folder / f".{name}.part"
    shutil.rmtree(partial_dir, ignore_errors=True)  # of a process that was killed in here
    partial_dir.mkdir()
    with _remove_on_error(partial_dir):
        save(partial_dir)
    return partial_dir


def finalize(partial_dir: Path, name: str, *, keep: int) -> None:
    """Make a checkpoint of what `write` gave, then drop old ones. It is mostly waiting for the disk.

    The order is: the files' sync, the manifest, its sync, the directory's sync, the rename, the parent's sync. Killed
    anywhere, the process leaves either no checkpoint of that name or a whole one.

    Args:
        keep: how many of the newest stay.
    """
    folder = partial_dir.parent
    with _remove_on_error(partial_dir):
        write_manifest(partial_dir)
        verify(partial_dir)  # some file systems say that they wrote, and did not
        os.rename(partial_dir, folder / name)
    sync(folder)
    remove_old(folder, keep=keep)


def remove_old(folder: Path, *, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(folder / old, ignore_errors=True)


@contextmanager
def _remove_on_error(partial_dir: Path) -> Iterator[None]:
    """Leave nothing of a directory that could not be filled."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial_dir, ignore_errors=True)
        if isinstance(error, SafetensorError):  # what it says of a full disk
            raise OSError(" ".join(str(error).split())) from error
        raise


def write_manifest(path: Path) -> None:
    """Sync every file of a directory and write its manifest."""
    files = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        sync(file)
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=2) + "\n")
    sync(manifest)
    for directory in {path, *(p for p in path.rglob("*") if p.is_dir())}:
        sync(directory)


def verify(path: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        Damaged: a file is missing, changed, too much, a link, or outside; or the schema is not ours.
    """
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptFileError(f"'{path / 'manifest.json'}' is no manifest: it has no list of files")
    if manifest.get("schema") != SCHEMA:
        raise CorruptFileError(
            f"'{path}' has schema {manifest.get('schema')!r}, this version reads {SCHEMA}: use the version that wrote it"
        )
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    for name in sorted(present ^ (manifest["files"].keys() | {"manifest.json"})):
        raise CorruptFileError(f"'{path / name}' is {'not in the manifest' if name in present else 'missing'}")
    for name, entry in manifest["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file() or not file.resolve().is_relative_to(path.resolve()):
            raise CorruptFileError(f"'{file}' is no plain file of the checkpoint")
        if (
            not isinstance(entry, dict)
            or file.stat().st_size != entry.get("bytes")
            or sha256(file) != entry.get("sha256")
        ):
            raise CorruptFileError(f"'{file}' is not the file that was written: its digest differs")


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what was found wrong with newer ones.

    Damaged ones move to `folder/quarantine`, with the reason beside them.
    """
    errors = []
    for name in reversed(list_checkpoints(folder)):
        try:
            verify(folder / name)
        except CorruptFileError as error:
            errors.append(str(error))
            _quarantine(folder, name, str(error))
        else:
            return folder / name, errors
    return None, errors


def list_checkpoints(folder: Path) -> list[str]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.name.isdigit() and p.is_dir())


def set_aside_newer(checkpoint: Path) -> list[str]:
    """Quarantine the checkpoints that are newer than this one, from which its run now goes on another way; their names."""
    folder = checkpoint.parent
    newer = [name for name in list_checkpoints(folder) if int(name) > int(checkpoint.name)]
    for name in newer:
        _quarantine(folder, name, f"the run went on from {checkpoint.name}")
    return newer


def _quarantine(folder: Path, name: str, reason: str) -> None:
    quarantine = folder / "quarantine"
    quarantine.mkdir(exist_ok=True)
    number = 1
    while (quarantine / f"{name}-{number}").exists():
        number += 1
    os.rename(folder / name, quarantine / f"{name}-{number}")
    (quarantine / f"{name}-{number}.reason").write_text(reason + "\n")


def save_state(path: Path, tree: Any) -> None:
    """Write a tree of dicts, lists, numbers, text, tensors, arrays and generators as state.json and state.safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps({"schema": SCHEMA, "state": _pack(tree, tensors)}, allow_nan=False)
    (path / "state.json").write_text(text + "\n")
    save_file(tensors, path / "state.safetensors")


def load_state(path: Path) -> Any:
    """What `save_state` wrote; generators come back as their states.

    Raises:
        Damaged: it is none of ours.
    """
    document = read_json(path / "state.json")
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        schema = document.get("schema") if isinstance(document, dict) else None
        raise CorruptFileError(f"'{path / 'state.json'}' has schema {schema!r}, this version reads {SCHEMA}")
    tensors = load_tensors(path / "state.safetensors")
    try:
        return _unpack(document["state"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"'{path / 'state.json'}' is no state that was written by a run") from error


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, allow_links: bool = False) -> Any:
    """JSON of a file that may be anybody's.

    Args:
        max_bytes: bytes that are read; a file with more is none of ours.
        allow_links: whether the file may be a link, as in Hugging Face's cache.

    Raises:
        Damaged: it is missing, no plain file, too large, too deep or no JSON.
    """
    try:
        require_regular_file(path, allow_links=allow_links)
        if path.stat().st_size > max_bytes:
            raise CorruptFileError(f"'{path}' has more than {max_bytes / 2**20:g} MiB: not read")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CorruptFileError):
            raise
        raise CorruptFileError(f"'{path}' cannot be read as JSON ({type(error).__name__})") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that may be anybody's.

    Raises:
        Damaged: it is none.
    """
    with _reading_safetensors(path):
        return load_file(path)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that the header of a safetensors file names; no tensor is read.

    Raises:
        Damaged: it is no such file, or its header does not fit what follows.
    """
    with _reading_safetensors(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)


def find_nonfinite(module: torch.nn.Module) -> str | None:
    """The name of the first weight that is not finite; a buffer may hold infinities, as masks do, but no NaN."""
    for name, weight in module.named_parameters():
        if not weight.isfinite().all():
            return name
    return next((name for name, buffer in module.named_buffers() if buffer.isnan().any()), None)


@contextmanager
def _reading_safetensors(path: Path) -> Iterator[None]:
    """Refuse what is no plain file; say what is wrong with one that is not safetensors."""
    require_regular_file(path)
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(
            f"'{path}' cannot be read as safetensors ({' '.join(str(error).split())[:100]})"
        ) from error


def require_regular_file(path: Path, *, allow_links: bool = False) -> None:
    """Refuse to read what is no plain file, or a large one that is mostly holes and costs its sender nothing.

    Args:
        allow_links: whether it may be a link to one.

    Raises:
        Damaged: it is missing, a link, a directory, a pipe or a device; or sparse.
    """
    try:
        status = path.stat() if allow_links else path.lstat()
    except OSError as error:
        raise CorruptFileError(f"'{path}' is missing or cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise CorruptFileError(f"'{path}' is a link, or is no plain file: not read")
    if status.st_size > MAX_SPARSE_BYTES and _is_sparse(path, status.st_size):
        raise CorruptFileError(
            f"'{path}' has {status.st_size:,} bytes, nearly all of which are a hole in the file: not read"
        )


def _is_sparse(path: Path, size: int) -> bool:
    """Whether less than a 64th of a file is data. A file system that does not know calls everything data."""
    if not hasattr(os, "SEEK_DATA"):
        return False
    position = data = 0
    with path.open("rb") as file:
        for _ in range(10_000):
            try:
                begin = os.lseek(file.fileno(), position, os.SEEK_DATA)
                position = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            except OSError:  # there is no data any more
                break
            data += position - begin
            if 64 * data >= size:
                return False
    return True


def require_regular_files(path: Path, folders: Iterable[str]) -> None:
    """Refuse a directory with a link, a pipe or a device in it, or in these folders of it: it would be written through.

    Raises:
        Damaged: there is one.
    """
    nested_files = (entry for name in folders for entry in (path / name).rglob("*"))
    for entry in itertools.chain(path.iterdir(), nested_files):
        mode = entry.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CorruptFileError(f"'{entry}' is {'a link' if stat.S_ISLNK(mode) else 'a pipe, a socket or a device'}")


def sha256(path: Path) -> str:
    """A file's digest, in hexadecimal.

    Raises:
        Damaged: it is no plain file, or a large one that is mostly holes.
    """
    require_regular_file(path, allow_links=True)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pack(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    def store_tensor(kind: str, tensor: torch.Tensor, **fields: Any) -> dict[str, Any]:
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return {kind: name, **fields}

    if type(tree) in (int, str, bool) or (type(tree) is float and math.isfinite(tree)):
        return tree  # most are, and the rest takes a while to ask for
    if isinstance(tree, torch.Tensor):
        return store_tensor("$tensor", tree)
    if isinstance(tree, torch.Generator):
        return store_tensor("$tensor", tree.get_state())
    if isinstance(tree, np.ndarray | np.generic):
        array = np.ascontiguousarray(tree)
        if array.dtype.hasobject:
            raise TypeError(f"an array of {array.dtype} has no bytes of its own")
        data = torch.from_numpy(np.frombuffer(array.tobytes(), dtype=np.uint8).copy())
        return store_tensor("$array", data, dtype=array.dtype.str, shape=list(np.shape(tree)))
    if isinstance(tree, np.random.Generator):
        return _pack(tree.bit_generator.state, tensors)
    if isinstance(tree, dict):
        return {"$dict": [[_pack(key, tensors), _pack(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple):
        return {"$tuple": [_pack(value, tensors) for value in tree]}
    if isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        return [_pack(value, tensors) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"$float": repr(tree)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a {type(tree).__name__} cannot be part of a checkpoint")


def _unpack(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$array" in tree:
        data = tensors[tree["$array"]].numpy().tobytes()
        return np.frombuffer(data, dtype=np.dtype(tree["dtype"])).reshape(tree["shape"]).copy()
    if "$float" in tree:
        return float(tree["$float"])
    if "$tuple" in tree:
        return tuple(_unpack(value, tensors) for value in tree["$tuple"])
    return {_unpack(key, tensors): _unpack(value, tensors) for key, value in tree["$dict"]}
