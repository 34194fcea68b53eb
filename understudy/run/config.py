"""Configuration: what values a field may have, how a config becomes JSON, the nearest name to a misspelt one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class RequestError(ValueError):
    """The request was wrong (a flag, config, data or file): one sentence with the field, the value and the mend."""


@dataclass(frozen=True)
class Range:
    """The values a number may take, both ends included unless `exclude_low` is set."""

    low: float = -math.inf
    high: float = math.inf
    exclude_low: bool = False

    def contains(self, value: float) -> bool:
        return (
            (self.low < value if self.exclude_low else self.low <= value)
            and value <= self.high
            and math.isfinite(value)
        )

    def __str__(self) -> str:
        if self.high < math.inf:
            return (
                f"between {self.low:g} and {self.high:g}"
                if not self.exclude_low
                else f"above {self.low:g}, up to {self.high:g}"
            )
        return f"above {self.low:g}" if self.exclude_low else f"{self.low:g} or more"


MAX_DEPTH, MAX_ENTRIES = 32, 100_000
"""Levels and entries that a field which is a dict may have."""
UnitInterval = Annotated[float, Range(0, 1)]
PositiveFloat = Annotated[float, Range(0, exclude_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
LearningRate = Annotated[float, Range(0, 1000, exclude_low=True)]
PositiveInt = Annotated[int, Range(1)]
Size = Annotated[int, Range(1, 1_000_000)]  # of what is in memory together
NonNegativeInt = Annotated[int, Range(0)]
Seconds = Annotated[float, Range(0, 10_000_000, exclude_low=True)]
Temperature = Annotated[float, Range(1e-6, 1e6)]
Threads = Annotated[int, Range(1, 1024)]
MAX_MAGNITUDE = float(2**127)  # of numbers in a config: tensors of float32 hold no larger power of 2


def check_fields(config: Any) -> None:
    """Raise `RequestError` for the first field whose value is of the wrong kind or out of range.

    A float that is a whole number becomes an int where the field takes no float.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        problem = _describe_problem(hint, value)
        if problem and isinstance(value, float) and value.is_integer() and not _describe_problem(hint, int(value)):
            object.__setattr__(config, name, int(value))  # 1e5, which is a float in Python
        elif problem:
            raise RequestError(f"{name} is {format_value(value)}: must be {problem}")


def check_effects(config: Any, requirements: Iterable[tuple[bool, str, str]]) -> None:
    """Raise `RequestError` for the first field that differs from its default while the others leave it without effect.

    Args:
        requirements: whether some fields have an effect, their names with spaces between, and why not and what to do,
            as the middle of the sentence "NAME is VALUE, which ..., or leave NAME out".
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for has_effect, names, reason in requirements:
        for name in () if has_effect else names.split():
            value = getattr(config, name)
            if value != fields[name].default:
                raise RequestError(f"{name} is {value!r}, which {reason}, or leave {name} out")


def to_dict(config: Any) -> dict[str, Any]:
    """Every field of a config as plain data."""
    return dataclasses.asdict(config)


def parse_fields(config_class: Any, data: dict[str, Any], source: str) -> dict[str, Any]:
    """Plain data as a config's fields: lists become tuples; an unknown field is refused with the nearest name."""
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in data:
        if name not in known:
            raise RequestError(f"{source} has {name!r}, which is no field of this recipe{did_you_mean(name, known)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name closest to a misspelt one, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_deep(tree: Any, max_levels: int = 2 * MAX_DEPTH) -> bool:
    """Whether dicts and lists in each other have more levels than this: what is done to them may recurse."""
    level = [tree]
    for _ in range(max_levels + 1):
        level = [
            part
            for value in level
            for part in (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            )
        ]
        if not level:
            return False
    return True


def format_value(value: Any) -> str:
    """A value for an error: without its middle where it is long, by its type where it is deep or cannot be written."""
    try:
        text = repr(value) if _is_small(value) else f"of type {type(value).__name__}"
    except ValueError:  # a whole number of thousands of digits
        return f"of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-30:]}"


def _is_small(tree: Any) -> bool:
    """Whether a tree of dicts and lists is neither deep nor large; a part that is in it several times counts each time."""
    budget, pending = MAX_ENTRIES, [(tree, 0)]
    while pending and budget > 0:
        value, depth = pending.pop()
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if depth > MAX_DEPTH or len(parts) > budget:
            return False
        budget -= 1
        pending += [(part, depth + 1) for part in parts]
    return not pending


def _is_finite(tree: Any) -> bool:
    """Whether config.json can hold all of a tree's numbers."""
    if isinstance(tree, dict | list | tuple):
        return all(map(_is_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, int | float) or abs(tree) <= sys.float_info.max


def _describe_problem(hint: Any, value: Any) -> str:
    """What is wrong with a value, as the end of the sentence "must be ..."; empty where nothing is."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        problem = _describe_problem(args[0], value)
        ranges = [mark for mark in args[1:] if isinstance(mark, Range)]
        return problem or next((str(mark) for mark in ranges if not mark.contains(value)), "")
    if origin in (Union, types.UnionType):
        problems = [_describe_problem(arg, value) for arg in args]
        return "" if "" in problems else " or ".join(dict.fromkeys(problems))
    if origin is Literal:
        return "" if value in args else "one of " + ", ".join(map(str, args))
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a tuple"
        return next((f"a tuple whose entries are {p}" for x in value if (p := _describe_problem(args[0], x))), "")
    if hint is float:
        is_valid = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return (
            ("" if abs(value) <= MAX_MAGNITUDE else f"at most {MAX_MAGNITUDE:.2g} in size")
            if is_valid
            else "a finite number"
        )
    if hint is int:
        is_valid = isinstance(value, int) and not isinstance(value, bool)
        return "a whole number" if not is_valid else "" if abs(value) < 2**63 else "a whole number below 2^63"
    if hint is type(None):
        return "" if value is None else "none"
    if origin is dict and isinstance(value, dict):
        if not _is_small(value):
            return f"nested at most {MAX_DEPTH} deep, with at most {MAX_ENTRIES:,} entries"
        return "" if _is_finite(value) else "without numbers that are not finite, or of thousands of digits"
    expected_type = origin or hint
    return "" if expected_type is Any or isinstance(value, expected_type) else f"a {expected_type.__name__}"
