"""Rows of data within a context: how many tokens each may have, what becomes of longer ones, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from understudy.language.data import Row
from understudy.language.layouts import arrange, read_cells
from understudy.language.tokenizer import Messages, Tokenizer
from understudy.run.config import RequestError

TooLong = Literal["refuse", "skip", "cut"]
"""What becomes of a row that the context does not hold."""

Record = TypeVar("Record")


class Fitted(list[Record]):
    """The records of rows that the context holds, in their order, and how many rows are not among them, or not whole.

    Attributes:
        cut: rows that lost their beginning.  skipped: rows left out for their length.  equal: pairs of equals, left out.
        notes: what else is to be known about how the data were read.
    """

    cut = skipped = equal = 0
    notes: tuple[str, ...] = ()

    def remark(self, source: str) -> list[str]:
        """The sentences to print about them; none where all rows are there, whole, and in our own layout."""
        said = {"cut at the beginning": self.cut, "left out as too long": self.skipped, "left out as equal": self.equal}
        rows = len(self) + self.skipped + self.equal
        counts = ", ".join(f"{count} {what}" for what, count in said.items() if count)
        notes = [f"of '{source}', {note}" for note in self.notes]
        return notes + ([f"of the {rows} rows of '{source}', {counts}: {len(self)} are read"] if counts else [])


class Limit(NamedTuple):
    """How many tokens a row may have, and why, as a clause of a sentence."""

    tokens: int
    reason: str

    @classmethod
    def of(cls, model: Any, max_length: int, *, completion: int = 0, name: str = "max_new") -> Limit:
        """The lower of max_length and what a model's context leaves beside a completion, whose field is `name`."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is None or max_length <= context - completion:
            most = "" if context is None else f" (the model reads {context})"
            return cls(max_length, f"max_length is {max_length}{most}: raise --max-length")
        if not completion:
            return cls(context, f"the model's context is {context}: give a model that reads more")
        flag = name.replace("_", "-")
        left = f"the model's context of {context} leaves {context - completion} beside {name} {completion}"
        return cls(context - completion, f"{left}: lower --{flag}")


@dataclass
class Room:
    """How many tokens a row may have, what becomes of a longer one, and of how many."""

    tokenizer: Tokenizer
    limit: Limit
    too_long: TooLong
    cut: int = 0
    skipped: int = 0
    equal: int = 0
    continued: int = 0
    """Prompts that end with words of the assistant."""
    notes: list[str] = field(default_factory=list)
    arguments: set[str] = field(default_factory=set)
    """What rows have for the chat template."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_length: int | Limit, too_long: TooLong) -> Room:
        given = isinstance(max_length, Limit)
        return cls(tokenizer, max_length if given else Limit(max_length, f"max_length is {max_length}"), too_long)

    def arranged(self, rows: Sequence[Row], *, conversations: str | None = "messages") -> Sequence[Row]:
        """Rows with our names for the columns of published layouts."""
        rows, notes = arrange(rows, chat=bool(self.tokenizer.hf.chat_template), conversations=conversations)
        self.notes += notes
        return rows

    def read(self, rows: Sequence[Row], texts: Sequence[str]) -> Sequence[Row]:
        """Rows with one form of cells."""
        rows, notes = read_cells(rows, texts)
        self.notes += notes
        return rows

    def tokenizer_of(self, row: Row, cell: str | Messages) -> Tokenizer:
        """The tokenizer with what a row has for the chat template; for text, which has none, as it is."""
        made = self.tokenizer if isinstance(cell, str) else self.tokenizer.for_row(row)
        self.arguments |= made.template_arguments.keys()
        return made

    def excess(self, name: str, ids: list[int], spare: int) -> int | None:
        """Tokens that a row loses at its beginning, at most `spare`; None for a row that is left out."""
        if (excess := len(ids) - self.limit.tokens) <= 0:
            return 0
        if self.too_long == "refuse":
            raise RequestError(
                f"{name} has {len(ids)} tokens, and {self.limit.reason}, or shorten it or leave it out; "
                "--too-long skip leaves out all such rows"
            )
        fits = self.too_long == "cut" and excess <= spare
        self.cut, self.skipped = self.cut + fits, self.skipped + (not fits)
        return excess if fits else None

    def those_of(self, made: list[Any]) -> Fitted[Any]:
        """The records without the gaps, and the counts.

        Raises:
            RequestError: every row is too long.
        """
        found: Fitted[Any] = Fitted(record for record in made if record is not None)
        found.cut, found.skipped, found.equal = self.cut, self.skipped, self.equal
        if self.skipped and not found:
            raise RequestError(
                f"too_long is {self.too_long!r} and leaves no row, since {self.limit.reason}, or give shorter rows"
            )
        if unused := self.tokenizer.unused(sorted(self.arguments)):
            self.notes.append(f"{', '.join(unused)} of the rows changes nothing: the chat template does not use it")
        if self.continued:
            self.notes.append(f"{self.continued} prompts end with words of the assistant, which the policy continues")
        found.notes = tuple(self.notes)
        return found


def without_beginning(ids: list[int], excess: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A row that loses its beginning, but not BOS."""
    kept = int(ids[0] == tokenizer.bos)
    return (*ids[:kept], *ids[kept + excess :])
