"""Gymnasium's spaces as arrays and Tensors: observations in, executable actions out, both as JSON for a saved policy.

A plain observation space gives one Tensor, [B, ...]; Dict and Tuple spaces, nested or not, give a dict of Tensors by path
("camera", "arm.joints", "0"). An action mask is one more entry, `action_mask`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

MASK_KEY = "action_mask"
OBS_KEY = "obs"
MAX_SPACE_ENTRIES = 2**24
"""Entries of a space that is read from a file, all its leaves together: sixteen megapixels."""
UNBOUNDED_LIMIT = 1e6
"""Bounds of an action beyond this stand for none: actions are not scaled to them."""
MIN_IMAGE_SIZE = 8
"""Height and width from which on bytes are pixels; MiniGrid's 7 x 7 x 3, say, are categories."""


def leaf_spaces(space: gymnasium.Space, path: str = "") -> Iterator[tuple[str, gymnasium.Space]]:
    """The plain spaces inside an observation space, by path; a plain space is its own only leaf, called "obs".

    Raises:
        ValueError: a leaf is of a kind that cannot be a Tensor (Text, Graph, Sequence, ...), or a key is no string.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for name, inner in items:
            if isinstance(space, spaces.Dict) and not isinstance(name, str):
                raise ValueError(f"observation_space has the key {name!r}, which is no string: name it {str(name)!r}")
            yield from leaf_spaces(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        yield path or OBS_KEY, space
    else:
        raise ValueError(
            f"observation_space has {type(space).__name__}{f' at {path!r}' if path else ''}, which is not supported: "
            "use Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these"
        )


def check_observation_space(space: gymnasium.Space) -> None:
    """Raises ValueError, naming the entry, where a policy cannot read observations of this space."""
    paths = [path for path, _ in leaf_spaces(space)]
    if duplicates := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"observation_space has two entries that are called {duplicates[0]!r}: rename one of them")
    if not any(math.prod(leaf.shape or ()) for path, leaf in leaf_spaces(space) if path != MASK_KEY):
        raise ValueError(f"observation_space is {space}, in which a policy sees no number: add an entry")


def feature_spaces(space: gymnasium.Space) -> dict[str, gymnasium.Space]:
    """The leaves a network sees: all but the action mask."""
    return {path: leaf for path, leaf in leaf_spaces(space) if path != MASK_KEY}


def spaces_match(one: gymnasium.Space, other: gymnasium.Space) -> bool:
    """Whether a policy for one observation space reads observations of the other: bounds may differ."""
    shapes = (
        [(path, leaf.shape if isinstance(leaf, spaces.Box) else leaf) for path, leaf in leaf_spaces(x)]
        for x in (one, other)
    )
    return next(shapes) == next(shapes)


def make_obs_reader(
    space: gymnasium.Space, *, keep_float64: bool = False
) -> Callable[[Any], np.ndarray | dict[str, np.ndarray]]:
    """Reads batched observations of a space, as the space nests them, as fresh arrays [B, ...].

    Args:
        keep_float64: numbers that float32 cannot hold are read as float64.
    """
    converters = {path: _make_converter(leaf, path, keep_float64) for path, leaf in leaf_spaces(space)}
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return converters[OBS_KEY]
    return lambda obs: {path: converters[path](x) for path, x in zip(converters, _leaf_values(space, obs), strict=True)}


def read_obs(
    space: gymnasium.Space, obs: Any, allowed: np.ndarray | None = None, *, keep_float64: bool = False
) -> Tensor | dict[str, Tensor]:
    """One batched observation as `reader` reads it; `allowed` [B, width] joins as `action_mask`."""
    tree = to_tensors(make_obs_reader(space, keep_float64=keep_float64)(obs))
    if allowed is None:
        return tree
    return (tree if isinstance(tree, dict) else {OBS_KEY: tree}) | {MASK_KEY: torch.tensor(allowed, dtype=torch.bool)}


def to_tensors(tree: Any) -> Any:
    """A tree of arrays as Tensors that share their memory."""
    return {name: torch.from_numpy(x) for name, x in tree.items()} if isinstance(tree, dict) else torch.from_numpy(tree)


def to_arrays(tree: Any) -> Any:
    """The other way."""
    return {name: x.numpy() for name, x in tree.items()} if isinstance(tree, dict) else tree.numpy()


def find_violation(space: gymnasium.Space, obs: Any, path: str, *, check_bounds: bool = True) -> str:
    """What puts an observation outside its space, or an empty text.

    Numbers are compared with a Box's bounds in its own dtype: as a float64, 0.1 is below a bound of float32 0.1.

    Args:
        check_bounds: whether the bounds of Boxes count.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, dict) or set(obs) != set(space.spaces):
            keys = sorted(obs) if isinstance(obs, dict) else type(obs).__name__
            return f"{path} has {keys}, the space {sorted(space.spaces)}"
        return next(
            (
                p
                for k, inner in space.spaces.items()
                if (p := find_violation(inner, obs[k], f"{path}.{k}", check_bounds=check_bounds))
            ),
            "",
        )
    if isinstance(space, spaces.Tuple):
        if not isinstance(obs, tuple) or len(obs) != len(space.spaces):
            return f"{path} is {type(obs).__name__}, the space a tuple of {len(space.spaces)}"
        parts = enumerate(zip(space.spaces, obs, strict=True))
        return next(
            (
                p
                for i, (inner, part) in parts
                if (p := find_violation(inner, part, f"{path}.{i}", check_bounds=check_bounds))
            ),
            "",
        )
    array = np.asarray(obs)
    if array.dtype.kind not in ("biuf" if np.issubdtype(space.dtype, np.floating) else "biu"):
        return f"{path} is of {array.dtype}, the space of {space.dtype}"
    if array.shape != (space.shape or ()):
        return f"{path} has shape {array.shape}, the space {space.shape}"
    if isinstance(space, spaces.Box):
        if not np.isfinite(array).all():
            return f"{path} is not finite: {array.reshape(-1)[:4]}"
        if array.dtype != space.dtype and np.issubdtype(space.dtype, np.floating):
            with np.errstate(over="ignore"):
                array = array.astype(space.dtype)
        below, above = array < space.low, array > space.high
        if check_bounds and (below | above).any():
            index = tuple(int(i) for i in np.argwhere(below | above)[0])
            return f"{path}{list(index)} is {array[index]:g}, the space allows {space.low[index]:g} to {space.high[index]:g}"
        return ""
    return "" if space.contains(array) else f"{path} is {obs!r}, the space {space}"


def is_image(space: gymnasium.Space) -> bool:
    """A Box of uint8 whose bounds are 0 and 255 throughout, and whose height and width are 8 or more.

    Anything else of uint8, such as a board with values 0 to 2, is numbers.
    """
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) < 2:
        return False
    height, width = image_size(space.shape)
    return min(height, width) >= MIN_IMAGE_SIZE and bool((space.low == 0).all() and (space.high == 255).all())


def channels_last(shape: tuple[int, ...]) -> bool:
    """Whether an image [H, W], [H, W, C], [C, H, W] or [K, H, W, C] has its channels in the last dimension."""
    return len(shape) > 2 and shape[-1] <= min(shape[-3], shape[-2])


def image_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """The height and width of an image of this shape."""
    height, width = shape[-3:-1] if channels_last(shape) else shape[-2:]
    return height, width


def exceeds_float32(space: gymnasium.Space) -> bool:
    """A Box of numbers that float32 cannot hold: float64, and whole numbers of 32 bits or more."""
    return isinstance(space, spaces.Box) and not np.can_cast(space.dtype, np.float32)


def lost_in(dtype: type[np.floating], space: gymnasium.Space, observations: Sequence[Any]) -> str:
    """The entry of which numbers of this dtype would lose what is seen, with its values; empty where there is none.

    That is where the rounding of some observations varies by more than a tenth of what they vary by.
    """
    for (path, leaf), *values in zip(
        leaf_spaces(space), *(_leaf_values(space, obs) for obs in observations), strict=True
    ):
        if path != MASK_KEY and exceeds_float32(leaf):
            seen = np.array(values).reshape(len(values), -1)
            held = seen.astype(dtype).astype(np.float64)
            if seen.dtype.kind in "iu" and np.abs(held).max(initial=0) >= 2**53:  # as float64 it would not be exact
                seen = seen.astype(object)
            varies, held = (seen - seen[:1]).astype(np.float64), held - held[:1]
            lost = (varies - held).std(axis=0) > 0.1 * varies.std(axis=0)
            if lost.any():
                return f"{path!r} (such as {seen[0, np.argmax(lost)]})"
    return ""


def is_batched(space: gymnasium.Space, obs: Any) -> bool:
    """Whether an observation has a batch dimension, told by its first leaf's number of dimensions."""
    _, leaf = next(leaf_spaces(space))
    return np.ndim(next(_leaf_values(space, obs))) > len(leaf.shape or ())


def checked_batch(space: gymnasium.Space, obs: Any) -> bool:
    """Whether an observation, of one row or of several, has a batch dimension.

    Raises:
        ValueError: it has another form, shape or kind of numbers than the space.
    """
    try:
        found = list(zip(leaf_spaces(space), map(np.asarray, _leaf_values(space, obs)), strict=True))
        batched = is_batched(space, obs)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        has = f"the keys {sorted(map(str, obs))}" if isinstance(obs, dict) else f"a {type(obs).__name__}"
        raise ValueError(f"obs is {has}, which does not fit observation_space {space}") from error
    for (path, leaf), array in found:
        name, shape = "obs" if path == OBS_KEY else f"obs of {path!r}", tuple(leaf.shape or ())
        if array.shape[batched:] != shape:
            batch = ", or [B, ...] of them" if not batched else f" in each of its {len(array)} rows"
            raise ValueError(f"{name} has shape {list(array.shape)}: must be {list(shape)}{batch}, as in {leaf}")
        if array.dtype.kind not in ("biuf" if np.issubdtype(leaf.dtype, np.floating) else "biu"):
            raise ValueError(f"{name} is of {array.dtype}: must be numbers of {leaf.dtype}, as in {leaf}")
    return batched


def add_batch_dim(space: gymnasium.Space, obs: Any) -> Any:
    """The same observation as a batch of one."""
    if isinstance(space, spaces.Dict):
        return {name: add_batch_dim(inner, obs[name]) for name, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(add_batch_dim(inner, part) for inner, part in zip(space.spaces, obs, strict=True))
    return np.asarray(obs)[None]


def mask_sizes(space: gymnasium.Space) -> list[int]:
    """How many entries an action mask has for each dimension of this action space; none where it can have no mask.

    Discrete: n. MultiDiscrete: its sizes. MultiBinary: 2 a bit (may be 0, may be 1).
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.reshape(-1).tolist()
    return [2] * math.prod(space.shape) if isinstance(space, spaces.MultiBinary) else []


def mask_width(space: gymnasium.Space) -> int:
    """How wide an action mask of this action space is, all its dimensions flat; 0 where it can have none."""
    return sum(mask_sizes(space))


def all_forbidden(space: gymnasium.Space, allowed: Tensor) -> Tensor:
    """Rows of an action mask [B, W] that leave the action, or one of its dimensions, nothing to choose from. [B]."""
    parts = allowed.split(mask_sizes(space), dim=-1)
    return ~torch.stack([part.any(dim=-1) for part in parts]).all(dim=0)


def check_action_space(space: gymnasium.Space) -> None:
    """Raises ValueError, naming the space, where a policy cannot act in it."""
    if isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"action_space is {space}, a Box of {space.dtype}, which is not supported: rounding would break the "
            "log-probs; use MultiDiscrete, or a Box of float32"
        )
    if isinstance(space, spaces.Box) and 0 in space.shape:
        raise ValueError(f"action_space is {space}, which has no number in it: there is nothing to choose")
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise ValueError(
            f"action_space is {type(space).__name__}, which is not supported: use Discrete, MultiDiscrete, MultiBinary, Box"
        )


def is_far_from_unit(space: gymnasium.Space) -> bool:
    """Whether a Box has finite bounds that a policy does not explore whose actions begin around 0 with a spread of 1.

    That is, in any dimension: half the width is below 0.1 or above 10, or 0 lies outside the bounds.
    """
    if not isinstance(space, spaces.Box):
        return False
    middle, half, bounded = _middle_and_half(space)
    return bool((bounded & (half > 0) & ((half < 0.1) | (half > 10) | (np.abs(middle) > half))).any())


def resolve_squash(space: gymnasium.Space, squash: str) -> str:
    """How actions get to their bounds, with "auto" decided: "scale" where these are far from -1 to 1, else "clip"."""
    return squash if squash != "auto" else "scale" if is_far_from_unit(space) else "clip"


def to_env_action(space: gymnasium.Space, action: np.ndarray, squash: str) -> np.ndarray:
    """What the environment receives for actions [B, ...] as the distribution sampled them: valid in the space.

    Args:
        squash: for a Box, "clip" to the bounds; "scale", which maps -1 to 1 to the bounds first; or "tanh" scaled to them.
            A dimension without finite bounds (for "scale", of more than 1e6) is clipped.
    """
    choice = action.reshape(-1, *(space.shape or ()))
    if isinstance(space, spaces.Box):
        return _apply_bounds(space, choice, squash)
    return np.add(choice, getattr(space, "start", 0), dtype=space.dtype, casting="unsafe")


def fast_stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """np.stack, which takes ten times as long for many small arrays."""
    return np.concatenate(arrays).reshape(len(arrays), *arrays[0].shape)


def half_width(space: spaces.Box) -> Tensor:
    """Half the width of each action dimension, [D]; 0 where a bound is infinite and tanh does not apply."""
    low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
    bounded = np.isfinite(low) & np.isfinite(high)
    return torch.tensor(np.where(bounded, (np.where(bounded, high, 0) - np.where(bounded, low, 0)) / 2, 0.0)).float()


def space_to_json(space: gymnasium.Space) -> dict[str, Any]:
    """A space as plain data; bounds as numbers or "inf"/"-inf" strings."""
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {name: space_to_json(inner) for name, inner in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [space_to_json(inner) for inner in space.spaces]}
    if isinstance(space, spaces.Box):
        low, high = (_bounds_to_json(x) for x in (space.low, space.high))
        return {"kind": "Box", "shape": list(space.shape), "dtype": space.dtype.name, "low": low, "high": high}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": space.dtype.name}
    if isinstance(space, spaces.MultiDiscrete):
        numbers = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"kind": "MultiDiscrete", **numbers, "dtype": space.dtype.name}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": space.n}
    raise ValueError(f"a {type(space).__name__} space cannot be saved")


def space_from_json(data: dict[str, Any]) -> gymnasium.Space:
    """The space that `to_json` wrote.

    Raises:
        ValueError: it is none of ours, or too large to be one. Of what is no such data at all, KeyError or TypeError.
    """
    if (num_entries := _num_entries(data)) > MAX_SPACE_ENTRIES:
        raise ValueError(f"a space of {num_entries:,} entries is more than the {MAX_SPACE_ENTRIES:,} that are read")
    return _space_from_json(data)


def _num_entries(data: dict[str, Any]) -> int:
    """How many numbers a space holds, or how wide it is one-hot: told before anything of that size is made."""
    kind = data["kind"]
    if kind in ("Dict", "Tuple"):
        inner = data["spaces"]
        return len(inner) + sum(map(_num_entries, inner.values() if kind == "Dict" else inner))
    if kind == "Box":
        return math.prod(map(operator.index, data["shape"]))
    if kind == "Discrete":
        return operator.index(data["n"])
    if kind == "MultiDiscrete":
        return int(np.sum(np.abs(np.array(data["nvec"], np.float64))))
    sizes = data["n"]
    return math.prod(sizes) if isinstance(sizes, list) else operator.index(sizes)


def _space_from_json(data: dict[str, Any]) -> gymnasium.Space:
    kind = data["kind"]
    if kind == "Dict":
        # pairs, for Dict sorts a dict, and a space may not be sorted: its order is that of the weights
        return spaces.Dict([(name, _space_from_json(inner)) for name, inner in data["spaces"].items()])
    if kind == "Tuple":
        return spaces.Tuple([_space_from_json(inner) for inner in data["spaces"]])
    if kind == "Box":
        dtype = np.dtype(data["dtype"])
        low, high = (np.broadcast_to(np.array(data[bound], dtype), data["shape"]) for bound in ("low", "high"))
        return spaces.Box(low, high, dtype=dtype.type)
    if kind == "Discrete":
        # Gymnasium before 1.2 knows int64 only, and no dtype
        dtype_options: dict[str, Any] = {} if data["dtype"] == "int64" else {"dtype": np.dtype(data["dtype"]).type}
        return spaces.Discrete(data["n"], start=data["start"], **dtype_options)
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(data["nvec"], start=data["start"], dtype=np.dtype(data["dtype"]).type)
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"])
    raise ValueError(f"kind is {kind!r}, must be Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple")


def _middle_and_half(space: spaces.Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The middle and half the width of each action dimension, and whether its bounds are finite and meant as bounds."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = (
        np.isfinite(low) & np.isfinite(high) & (np.abs(low) <= UNBOUNDED_LIMIT) & (np.abs(high) <= UNBOUNDED_LIMIT)
    )
    low, high = np.where(bounded, low, 0.0), np.where(bounded, high, 0.0)
    return (low + high) / 2, (high - low) / 2, bounded


def _apply_bounds(space: spaces.Box, value: np.ndarray, squash: str) -> np.ndarray:
    if squash == "scale":
        middle, half, bounded = _middle_and_half(space)
        value = np.where(bounded, middle + half * value.astype(np.float64), value)
    if squash == "tanh":
        value = value.astype(np.float64)
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        # float64: bounds as wide as float32 goes are further apart than float32 goes
        low, high = (np.where(bounded, x.astype(np.float64), 0.0) for x in (space.low, space.high))
        value = np.where(bounded, low + (np.tanh(value) + 1) * 0.5 * (high - low), value)
    return np.minimum(np.maximum(value, space.low), space.high).astype(space.dtype)


def _leaf_values(space: gymnasium.Space, obs: Any) -> Iterator[Any]:
    """The leaves of an observation, in the order of `leaves`."""
    if isinstance(space, spaces.Dict):
        for name, inner in space.spaces.items():
            yield from _leaf_values(inner, obs[name])
    elif isinstance(space, spaces.Tuple):
        for inner, part in zip(space.spaces, obs, strict=True):
            yield from _leaf_values(inner, part)
    else:
        yield obs


def _make_converter(space: gymnasium.Space, path: str, keep_float64: bool) -> Callable[[Any], np.ndarray]:
    """Makes a leaf's own array: images stay uint8, discrete ones count from 0, whatever the space starts at."""
    if path == MASK_KEY:
        return lambda array: np.array(array, dtype=bool).reshape(len(array), -1)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return lambda array: np.asarray(array, dtype=np.int64) - space.start
    dtype = np.uint8 if is_image(space) else np.float64 if keep_float64 and exceeds_float32(space) else np.float32
    return lambda array: np.array(array, dtype=dtype)


def _bounds_to_json(x: np.ndarray) -> Any:
    """One number where all are equal, else a nested list; infinities as strings, which numpy reads back."""
    values = np.where(np.isfinite(x), x.astype(object), x.astype(str).astype(object))
    return values.reshape(-1).tolist()[0] if x.size and (x == x.reshape(-1)[0]).all() else values.tolist()
