"""The infos of single environments as one dict, in Gymnasium's layout, with every value exactly as it was given.

Gymnasium stores a key's values in the dtype and shape of the first copy that gives one: beside the int 0, a 0.5 becomes 0,
and a second shape ends the run. Here a key whose values differ in either becomes an array of objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

_NUMBER_TYPES = (int, float, bool)
_PICKLABLE_TYPES = (*_NUMBER_TYPES, str, bytes, type(None), np.generic)


class ExactInfos:
    """A vector env of single environments that merges their infos with `merge_info`."""

    num_envs: int

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        return merge_info(vector_infos, env_info, env_num, num_envs=self.num_envs)


def merge_info(infos: dict[str, Any], info: Mapping[Any, Any], row: int, *, num_envs: int) -> dict[str, Any]:
    """Add one environment's info to those of all, in place. `infos[key]` is [rows, ...], and `infos["_key"]` says in which
    rows it was given; dicts nest."""
    for key, value in info.items():
        if isinstance(key, str) and key.startswith("_") and key[1:] in info:
            continue  # its place is that of another key's rows
        presence_key, stored = f"_{key}", infos.get(key)
        is_present = infos.get(presence_key)
        is_present = np.zeros(num_envs, dtype=bool) if is_present is None else is_present
        if key == "final_obs":  # an observation, whole, and no info of its own
            infos[key] = np.full(num_envs, None, dtype=object) if stored is None else stored
            infos[key][row] = value
        elif isinstance(value, dict) and (stored is None or isinstance(stored, dict)):
            infos[key] = merge_info(stored or {}, value, row, num_envs=num_envs)
        else:
            infos[key] = _store_value(stored, value, row, is_present)
        is_present[row] = True
        infos[presence_key] = is_present
    return infos


def get_info_value(infos: Mapping[Any, Any], key: Any, row: int) -> Any:
    """What one row of a vector env's infos holds under a key; None where it holds nothing."""
    is_present = infos.get(f"_{key}", key in infos)
    if not (is_present[row] if np.ndim(is_present) else is_present):
        return None
    value = infos[key]
    if isinstance(value, Mapping):
        inner_keys = value.keys() - {f"_{name}" for name in value}
        return {
            name: inner_value for name in inner_keys if (inner_value := get_info_value(value, name, row)) is not None
        }
    return value[row] if isinstance(value, list | tuple) or np.ndim(value) else value


def drop_unpicklable(info: Any) -> Any:
    """An info without the entries that cannot be pickled."""
    if not isinstance(info, dict) or all(isinstance(value, _PICKLABLE_TYPES) for value in info.values()):
        return info
    return {
        key: drop_unpicklable(value) for key, value in info.items() if isinstance(value, dict) or _can_pickle(value)
    }


def _can_pickle(value: Any) -> bool:
    if isinstance(value, _PICKLABLE_TYPES) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
        return True
    try:
        ForkingPickler.dumps(value)
    except Exception:  # whatever a user's object raises
        return False
    return True


def _store_value(array: Any, value: Any, row: int, is_present: np.ndarray) -> np.ndarray:
    """The values of a key, [rows, ...], with that of one more row."""
    shape, dtype = _shape_and_dtype(value)
    if array is None:
        array = (
            np.full(len(is_present), None, dtype=object)
            if dtype is object
            else np.zeros((len(is_present), *shape), dtype)
        )
    elif isinstance(array, dict) or array.dtype != dtype or array.shape[1:] != shape:
        values = np.full(len(is_present), None, dtype=object)
        for other_row in np.flatnonzero(is_present):
            values[other_row] = get_info_value({"": array}, "", int(other_row))
        array = values
    array[row] = value
    return array


def _shape_and_dtype(value: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype that hold a value exactly: `object` for what is no number and no array of numbers."""
    value_type = type(value)
    if value_type in _NUMBER_TYPES:
        return (), object if value_type is int and not -(2**63) <= value < 2**63 else np.dtype(value_type)
    if issubclass(value_type, np.number | np.bool_) or (value_type is np.ndarray and value.dtype != object):
        return value.shape, value.dtype
    return (), object
