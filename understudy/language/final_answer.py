"""The number that a text gives as its final answer: marked by `####` or `\\boxed{}`, or else the last one."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

# a sign counts where nothing stands before it that it could subtract from; commas stand between thousands
SIGN = r"(?:(?<![\w)])(?P<sign>[-\u2212+]))?"
PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
LATEX = r"\\[dt]?frac\s*\{\s*(?P<over>[0-9]+)\s*\}\s*\{\s*(?P<under>[0-9]+)\s*\}"
NUMBER = re.compile(
    rf"{SIGN}\$?(?:{LATEX}|(?P<plain>{PLAIN})(?:[eE](?P<power>[-+]?[0-9]{{1,3}})(?![0-9.])|\s?/\s?(?P<by>[0-9]+)(?![0-9./]))?)"
)
SPACING = re.compile(r"\\[,!;: ]|(?<=[0-9])\{,\}(?=[0-9])")  # LaTeX's, within a number: 1\,000 or 1{,}000
SHORT = re.compile(r"(\\[dt]?frac)\s*([0-9])\s*([0-9])")  # \\frac12 is \\frac{1}{2}
BOXED = "\\boxed{"


def final_number(text: str) -> Fraction | None:
    """The answer of a text as an exact number: 3/2, 1.5, \\frac{3}{2} and 15e-1 are equal. None where there is none.

    After the last `####` it is the first number (GSM8K; what follows is no part of the answer), in the last `\\boxed{}` and
    in a text without either mark the last one. A whole number divided by 0 is none.
    """
    _, mark, after = text.rpartition("####")
    if mark:
        found = NUMBER.search(_plain(after))
        return None if found is None else _value(found)
    text = _boxed(text) if BOXED in text else text
    found = [*NUMBER.finditer(_plain(text))]
    return _value(found[-1]) if found else None


def _plain(text: str) -> str:
    return SHORT.sub(r"\1{\2}{\3}", SPACING.sub("", text))


def _boxed(text: str) -> str:
    """What the last box holds, its own braces included; all that follows where it is not closed."""
    inside, depth = text.rpartition(BOXED)[2], 1
    for at, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[:at]
    return inside


def _value(found: re.Match[str]) -> Fraction | None:
    over, under = found["over"] or found["plain"].replace(",", ""), found["under"] or found["by"] or "1"
    number, divisor = (
        Fraction(Decimal(over)),
        Fraction(Decimal(under)),
    )  # integers from text have a limit, Decimals none
    if divisor == 0:
        return None
    number = number / divisor * Fraction(10) ** int(found["power"] or 0)
    return number if found["sign"] in (None, "+") else -number
