"""The infos of single environments as one dict, in Gymnasium's layout, with every value exactly as it was given.

Gymnasium stores a key's values in the dtype and shape of the first copy that gives one: beside the int 0, a 0.5 becomes 0,
and a second shape ends the run. Here a key whose values differ in either becomes an array of objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

_NUMBERS = (int, float, bool)
_SENDABLE = (*_NUMBERS, str, bytes, type(None), np.generic)


class ExactInfos:
    """A vector env of single environments that merges their infos with `merge`."""

    num_envs: int

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        return merge(vector_infos, env_info, env_num, num_envs=self.num_envs)


def merge(infos: dict[str, Any], info: Mapping[Any, Any], row: int, *, num_envs: int) -> dict[str, Any]:
    """Add one environment's info to those of all, in place. `infos[key]` is [rows, ...], and `infos["_key"]` says in which
    rows it was given; dicts nest."""
    for key, value in info.items():
        if isinstance(key, str) and key.startswith("_") and key[1:] in info:
            continue  # its place is that of another key's rows
        name, known = f"_{key}", infos.get(key)
        given = infos.get(name)
        given = np.zeros(num_envs, dtype=bool) if given is None else given
        if key == "final_obs":  # an observation, whole, and no info of its own
            infos[key] = np.full(num_envs, None, dtype=object) if known is None else known
            infos[key][row] = value
        elif isinstance(value, dict) and (known is None or isinstance(known, dict)):
            infos[key] = merge(known or {}, value, row, num_envs=num_envs)
        else:
            infos[key] = _stored(known, value, row, given)
        given[row] = True
        infos[name] = given
    return infos


def entry(infos: Mapping[Any, Any], key: Any, row: int) -> Any:
    """What one row of a vector env's infos holds under a key; None where it holds nothing."""
    given = infos.get(f"_{key}", key in infos)
    if not (given[row] if np.ndim(given) else given):
        return None
    value = infos[key]
    if isinstance(value, Mapping):
        inner = value.keys() - {f"_{name}" for name in value}
        return {name: found for name in inner if (found := entry(value, name, row)) is not None}
    return value[row] if isinstance(value, list | tuple) or np.ndim(value) else value


def sendable(info: Any) -> Any:
    """An info without the entries that cannot be pickled."""
    if not isinstance(info, dict) or all(isinstance(value, _SENDABLE) for value in info.values()):
        return info
    return {key: sendable(value) for key, value in info.items() if isinstance(value, dict) or _pickles(value)}


def _pickles(value: Any) -> bool:
    if isinstance(value, _SENDABLE) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
        return True
    try:
        ForkingPickler.dumps(value)
    except Exception:  # whatever a user's object raises
        return False
    return True


def _stored(array: Any, value: Any, row: int, given: np.ndarray) -> np.ndarray:
    """The values of a key, [rows, ...], with that of one more row."""
    shape, dtype = _layout(value)
    if array is None:
        array = np.full(len(given), None, dtype=object) if dtype is object else np.zeros((len(given), *shape), dtype)
    elif isinstance(array, dict) or array.dtype != dtype or array.shape[1:] != shape:
        found = np.full(len(given), None, dtype=object)
        for other in np.flatnonzero(given):
            found[other] = entry({"": array}, "", int(other))
        array = found
    array[row] = value
    return array


def _layout(value: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype that hold a value exactly: `object` for what is no number and no array of numbers."""
    kind = type(value)
    if kind in _NUMBERS:
        return (), object if kind is int and not -(2**63) <= value < 2**63 else np.dtype(kind)
    if issubclass(kind, np.number | np.bool_) or (kind is np.ndarray and value.dtype != object):
        return value.shape, value.dtype
    return (), object
