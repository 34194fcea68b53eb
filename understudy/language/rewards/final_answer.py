"""The number that a text gives as its final answer: marked by `####` or `\\boxed{}`, or else the last one."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

# a sign counts where nothing stands before it that it could subtract from; commas stand between thousands
SIGN = r"(?:(?<![\w)])(?P<sign>[-\u2212+]))?"
DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
LATEX_FRACTION = r"\\[dt]?frac\s*\{\s*(?P<over>[0-9]+)\s*\}\s*\{\s*(?P<under>[0-9]+)\s*\}"
NUMBER = re.compile(
    rf"{SIGN}\$?(?:{LATEX_FRACTION}|(?P<plain>{DECIMAL})(?:[eE](?P<power>[-+]?[0-9]{{1,3}})(?![0-9.])|\s?/\s?(?P<by>[0-9]+)(?![0-9./]))?)"
)
LATEX_SPACING = re.compile(r"\\[,!;: ]|(?<=[0-9])\{,\}(?=[0-9])")  # LaTeX's, within a number: 1\,000 or 1{,}000
SHORT_LATEX_FRACTION = re.compile(r"(\\[dt]?frac)\s*([0-9])\s*([0-9])")  # \\frac12 is \\frac{1}{2}
BOXED = "\\boxed{"


def final_number(text: str) -> Fraction | None:
    """The answer of a text as an exact number: 3/2, 1.5, \\frac{3}{2} and 15e-1 are equal. None where there is none.

    After the last `####` it is the first number (GSM8K; what follows is no part of the answer), in the last `\\boxed{}` and
    in a text without either mark the last one. A whole number divided by 0 is none.
    """
    _, mark, after = text.rpartition("####")
    if mark:
        matches = NUMBER.search(_normalize_latex(after))
        return None if matches is None else _to_fraction(matches)
    text = _boxed_content(text) if BOXED in text else text
    matches = [*NUMBER.finditer(_normalize_latex(text))]
    return _to_fraction(matches[-1]) if matches else None


def _normalize_latex(text: str) -> str:
    return SHORT_LATEX_FRACTION.sub(r"\1{\2}{\3}", LATEX_SPACING.sub("", text))


def _boxed_content(text: str) -> str:
    """What the last box holds, its own braces included; all that follows where it is not closed."""
    content, depth = text.rpartition(BOXED)[2], 1
    for index, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:index]
    return content


def _to_fraction(match: re.Match[str]) -> Fraction | None:
    numerator, denominator = match["over"] or match["plain"].replace(",", ""), match["under"] or match["by"] or "1"
    number, divisor = (
        Fraction(Decimal(numerator)),
        Fraction(Decimal(denominator)),
    )  # integers from text have a limit, Decimals none
    if divisor == 0:
        return None
    number = number / divisor * Fraction(10) ** int(match["power"] or 0)
    return number if match["sign"] in (None, "+") else -number
