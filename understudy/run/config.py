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
    """The values a number may take, both ends included unless `above` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        if self.high < math.inf:
            return (
                f"between {self.low:g} and {self.high:g}"
                if not self.above
                else f"above {self.low:g}, up to {self.high:g}"
            )
        return f"above {self.low:g}" if self.above else f"{self.low:g} or more"


DEEPEST, MOST = 32, 100_000
"""Levels and entries that a field which is a dict may have."""
Unit = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
LearningRate = Annotated[float, Range(0, 1000, above=True)]
Count = Annotated[int, Range(1)]
Size = Annotated[int, Range(1, 1_000_000)]  # of what is in memory together
Whole = Annotated[int, Range(0)]
Seconds = Annotated[float, Range(0, 10_000_000, above=True)]
Temperature = Annotated[float, Range(1e-6, 1e6)]
Threads = Annotated[int, Range(1, 1024)]
LARGEST = float(2**127)  # of numbers in a config: tensors of float32 hold no larger power of 2


def check(config: Any) -> None:
    """Raise `RequestError` for the first field whose value is of the wrong kind or out of range.

    A float that is a whole number becomes an int where the field takes no float.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        problem = _problem(hint, value)
        if problem and isinstance(value, float) and value.is_integer() and not _problem(hint, int(value)):
            object.__setattr__(config, name, int(value))  # 1e5, which is a float in Python
        elif problem:
            raise RequestError(f"{name} is {shown(value)}: must be {problem}")


def check_effects(config: Any, needs: Iterable[tuple[bool, str, str]]) -> None:
    """Raise `RequestError` for the first field that differs from its default while the others leave it without effect.

    Args:
        needs: whether some fields have an effect, their names with spaces between, and why not and what to do, as the middle
            of the sentence "NAME is VALUE, which ..., or leave NAME out".
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for has_effect, names, lack in needs:
        for name in () if has_effect else names.split():
            value = getattr(config, name)
            if value != fields[name].default:
                raise RequestError(f"{name} is {value!r}, which {lack}, or leave {name} out")


def to_json(config: Any) -> dict[str, Any]:
    """Every field of a config as plain data."""
    return dataclasses.asdict(config)


def fields_of(kind: Any, given: dict[str, Any], source: str) -> dict[str, Any]:
    """Plain data as a config's fields: lists become tuples; an unknown field is refused with the nearest name."""
    known = {field.name for field in dataclasses.fields(kind)}
    for name in given:
        if name not in known:
            raise RequestError(f"{source} has {name!r}, which is no field of this recipe{nearest(name, known)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name closest to a misspelt one, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_deep(tree: Any, most: int = 2 * DEEPEST) -> bool:
    """Whether dicts and lists in each other have more levels than this: what is done to them may recurse."""
    level = [tree]
    for _ in range(most + 1):
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


def shown(value: Any) -> str:
    """A value for an error: without its middle where it is long, by its type where it is deep or cannot be written."""
    try:
        text = repr(value) if _is_small(value) else f"of type {type(value).__name__}"
    except ValueError:  # a whole number of thousands of digits
        return f"of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-30:]}"


def _is_small(tree: Any) -> bool:
    """Whether a tree of dicts and lists is neither deep nor large; a part that is in it several times counts each time."""
    left, waiting = MOST, [(tree, 0)]
    while waiting and left > 0:
        value, depth = waiting.pop()
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if depth > DEEPEST or len(parts) > left:
            return False
        left -= 1
        waiting += [(part, depth + 1) for part in parts]
    return not waiting


def _is_finite(tree: Any) -> bool:
    """Whether config.json can hold all of a tree's numbers."""
    if isinstance(tree, dict | list | tuple):
        return all(map(_is_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, int | float) or abs(tree) <= sys.float_info.max


def _problem(hint: Any, value: Any) -> str:
    """What is wrong with a value, as the end of the sentence "must be ..."; empty where nothing is."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        problem = _problem(args[0], value)
        ranges = [mark for mark in args[1:] if isinstance(mark, Range)]
        return problem or next((str(mark) for mark in ranges if not mark.holds(value)), "")
    if origin in (Union, types.UnionType):
        problems = [_problem(arg, value) for arg in args]
        return "" if "" in problems else " or ".join(dict.fromkeys(problems))
    if origin is Literal:
        return "" if value in args else "one of " + ", ".join(map(str, args))
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a tuple"
        return next((f"a tuple whose entries are {p}" for x in value if (p := _problem(args[0], x))), "")
    if hint is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return ("" if abs(value) <= LARGEST else f"at most {LARGEST:.2g} in size") if good else "a finite number"
    if hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
        return "a whole number" if not good else "" if abs(value) < 2**63 else "a whole number below 2^63"
    if hint is type(None):
        return "" if value is None else "none"
    if origin is dict and isinstance(value, dict):
        if not _is_small(value):
            return f"nested at most {DEEPEST} deep, with at most {MOST:,} entries"
        return "" if _is_finite(value) else "without numbers that are not finite, or of thousands of digits"
    kind = origin or hint
    return "" if kind is Any or isinstance(value, kind) else f"a {kind.__name__}"
