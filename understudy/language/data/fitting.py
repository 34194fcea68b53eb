"""Rows of data within a context: how many tokens each may have, what becomes of longer ones, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from understudy.language.data.files import Row
from understudy.language.data.layouts import convert_layout, normalize_cells
from understudy.language.data.tokenizer import Messages, Tokenizer
from understudy.run.config import RequestError

TooLong = Literal["refuse", "skip", "cut"]
"""What becomes of a row that the context does not hold."""

Record = TypeVar("Record")


class FilteredRecords(list[Record]):
    """The records of rows that the context holds, in their order, and how many rows are not among them, or not whole.

    Attributes:
        num_cut: rows that lost their beginning.  skipped: rows left out for their length.  equal: pairs of equals, left out.
        notes: what else is to be known about how the data were read.
    """

    num_cut = num_skipped = num_equal = 0
    notes: tuple[str, ...] = ()

    def make_warnings(self, source: str) -> list[str]:
        """The sentences to print about them; none where all rows are there, whole, and in our own layout."""
        counts_by_outcome = {
            "cut at the beginning": self.num_cut,
            "left out as too long": self.num_skipped,
            "left out as equal": self.num_equal,
        }
        num_rows = len(self) + self.num_skipped + self.num_equal
        counts = ", ".join(f"{count} {outcome}" for outcome, count in counts_by_outcome.items() if count)
        notes = [f"of '{source}', {note}" for note in self.notes]
        return notes + ([f"of the {num_rows} rows of '{source}', {counts}: {len(self)} are read"] if counts else [])


class Limit(NamedTuple):
    """How many tokens a row may have, and why, as a clause of a sentence."""

    max_tokens: int
    reason: str

    @classmethod
    def of(
        cls, model: Any, max_length: int, *, num_completion_tokens: int = 0, field_name: str = "max_new_tokens"
    ) -> Limit:
        """The lower of max_length and what a model's context leaves beside a completion, whose field is `field_name`."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is None or max_length <= context - num_completion_tokens:
            context_text = "" if context is None else f" (the model reads {context})"
            return cls(max_length, f"max_length is {max_length}{context_text}: raise --max-length")
        if not num_completion_tokens:
            return cls(context, f"the model's context is {context}: give a model that reads more")
        flag = field_name.replace("_", "-")
        explanation = (
            f"the model's context of {context} leaves {context - num_completion_tokens} beside {field_name} "
            f"{num_completion_tokens}"
        )
        return cls(context - num_completion_tokens, f"{explanation}: lower --{flag}")


@dataclass
class RecordBuilder:
    """How many tokens a row may have, what becomes of a longer one, and of how many."""

    tokenizer: Tokenizer
    limit: Limit
    too_long: TooLong
    num_cut: int = 0
    num_skipped: int = 0
    num_equal: int = 0
    num_continued: int = 0
    """Prompts that end with words of the assistant."""
    notes: list[str] = field(default_factory=list)
    template_arguments: set[str] = field(default_factory=set)
    """What rows have for the chat template."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_length: int | Limit, too_long: TooLong) -> RecordBuilder:
        is_limit = isinstance(max_length, Limit)
        return cls(tokenizer, max_length if is_limit else Limit(max_length, f"max_length is {max_length}"), too_long)

    def convert_layout(self, rows: Sequence[Row], *, conversation_column: str | None = "messages") -> Sequence[Row]:
        """Rows with our names for the columns of published layouts."""
        rows, notes = convert_layout(
            rows, has_chat_template=bool(self.tokenizer.hf.chat_template), conversation_column=conversation_column
        )
        self.notes += notes
        return rows

    def normalize_cells(self, rows: Sequence[Row], text_columns: Sequence[str]) -> Sequence[Row]:
        """Rows with one form of cells."""
        rows, notes = normalize_cells(rows, text_columns)
        self.notes += notes
        return rows

    def tokenizer_for(self, row: Row, cell: str | Messages) -> Tokenizer:
        """The tokenizer with what a row has for the chat template; for text, which has none, as it is."""
        tokenizer = self.tokenizer if isinstance(cell, str) else self.tokenizer.with_template_arguments(row)
        self.template_arguments |= tokenizer.template_arguments.keys()
        return tokenizer

    def count_tokens_to_cut(self, name: str, ids: list[int], max_cut: int) -> int | None:
        """Tokens that a row loses at its beginning, at most `max_cut`; None for a row that is left out."""
        if (excess := len(ids) - self.limit.max_tokens) <= 0:
            return 0
        if self.too_long == "refuse":
            raise RequestError(
                f"{name} has {len(ids)} tokens, and {self.limit.reason}, or shorten it or leave it out; "
                "--too-long skip leaves out all such rows"
            )
        can_cut = self.too_long == "cut" and excess <= max_cut
        self.num_cut, self.num_skipped = self.num_cut + can_cut, self.num_skipped + (not can_cut)
        return excess if can_cut else None

    def collect_records(self, records: list[Any]) -> FilteredRecords[Any]:
        """The records without the gaps, and the counts.

        Raises:
            RequestError: every row is too long.
        """
        filtered: FilteredRecords[Any] = FilteredRecords(record for record in records if record is not None)
        filtered.num_cut, filtered.num_skipped, filtered.num_equal = self.num_cut, self.num_skipped, self.num_equal
        if self.num_skipped and not filtered:
            raise RequestError(
                f"too_long is {self.too_long!r} and leaves no row, since {self.limit.reason}, or give shorter rows"
            )
        if unused := self.tokenizer.unused_arguments(sorted(self.template_arguments)):
            self.notes.append(f"{', '.join(unused)} of the rows changes nothing: the chat template does not use it")
        if self.num_continued:
            self.notes.append(
                f"{self.num_continued} prompts end with words of the assistant, which the policy continues"
            )
        filtered.notes = tuple(self.notes)
        return filtered


def cut_beginning(ids: list[int], excess: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A row that loses its beginning, but not BOS."""
    num_bos = int(ids[0] == tokenizer.bos_token_id)
    return (*ids[:num_bos], *ids[num_bos + excess :])
