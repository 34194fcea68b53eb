"""Rows of data as token ids, before step 1: prompts, examples, pairs and labelled texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from understudy.batch import TokenBatch
from understudy.language.data.files import (
    RESERVED_COLUMN_NAMES,
    Row,
    check_prompt_not_dropped,
    column_names,
    convert_rows,
    parse_finite,
)
from understudy.language.data.files import read_rows as read_rows
from understudy.language.data.fitting import FilteredRecords, Limit, RecordBuilder, TooLong, cut_beginning
from understudy.language.data.tokenizer import Messages
from understudy.language.data.tokenizer import Tokenizer as Tokenizer
from understudy.run.config import RequestError

TrainOn = Literal["last", "all"]
"""Which of the assistant's turns are learned from."""

ANSWER_MARKER = "\n\nAssistant:"
"""What stands before each answer in a published transcript."""


@dataclass(frozen=True)
class Prompt:
    """What the policy continues."""

    ids: tuple[int, ...]
    text: str | Messages
    """As the data have it; "" where the run is unconditional."""
    columns: dict[str, Any]
    """Every other column of the row."""
    row: int
    """Its number in the data, from 1; the same in the records below."""


@dataclass(frozen=True)
class Example:
    """Something to imitate, from the token at `start` on; those before are only read."""

    ids: tuple[int, ...]
    start: int
    row: int
    ignored_spans: tuple[tuple[int, int], ...] = ()
    """Spans after `start`, from a token up to another, which are only read too: what others say between two turns."""

    @property
    def num_target_tokens(self) -> int:
        """How many of its tokens are imitated."""
        return len(self.ids) - self.start - sum(end - begin for begin, end in self.ignored_spans)


@dataclass(frozen=True)
class Preference:
    """Two texts, prompt and stop included, of which one was liked better, by `margin` at least (0: not said)."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float
    row: int
    prompt: str = ""
    """What both answer, as text, messages as JSON; "" where the data do not tell it from the answers."""


@dataclass(frozen=True)
class LabelledExample:
    """A text and how good it is, from 0 to 1. No stop is put behind it: the data do not say that it ends there."""

    ids: tuple[int, ...]
    label: float
    row: int


def make_prompts(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | Limit,
    too_long: TooLong = "refuse",
    unconditional: bool = False,
) -> FilteredRecords[Prompt]:
    """Column `prompt`, text or chat. A prompt is never cut: one that is too long is left out.

    Args:
        unconditional: every row starts from BOS alone; the data then have no column `prompt`.
    """
    builder = RecordBuilder.of(tokenizer, max_length, too_long)
    rows = builder.normalize_cells(builder.convert_layout(rows, conversation_column=None), ("prompt",))
    if unconditional and "prompt" in column_names(rows):
        raise RequestError(
            "unconditional is True, but the data have a column 'prompt': remove the column, or leave out --unconditional"
        )

    builder.notes += [
        f"the column {name!r} does not reach functions of {'--reply' if name == 'stop' else '--reward and --reply'}, whose "
        f"argument {name!r} is the run's own: give it another name with --columns NAME={name}"
        for name in column_names(rows)
        if name in (*RESERVED_COLUMN_NAMES, "stop")
    ]

    def make_prompt(row: Row, number: int) -> Prompt | None:
        text, columns = row.get("prompt", ""), {name: cell for name, cell in row.items() if name != "prompt"}
        ids = builder.tokenizer_for(row, text).encode_prompt(text)
        builder.num_continued += isinstance(text, list) and text[-1]["role"] == "assistant"
        return (
            None if builder.count_tokens_to_cut("prompt", ids, 0) is None else Prompt(tuple(ids), text, columns, number)
        )

    return builder.collect_records(convert_rows(rows, make_prompt, text_columns=() if unconditional else ("prompt",)))


def make_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | Limit,
    too_long: TooLong = "refuse",
    train_on: TrainOn = "last",
) -> FilteredRecords[Example]:
    """`completion` after `prompt`, else the last turn of `messages`, else the whole of `text`.

    Chat in any of them is learned from in the last turn of the assistant, or in all that follow the prompt. Published
    transcripts in `text` are plain text.
    Cut is what comes before that which is learned; where this is not enough, the row is left out.
    """
    builder = RecordBuilder.of(tokenizer, max_length, too_long)
    rows = builder.convert_layout(rows)
    available = {*column_names(rows)}
    text_columns = [name for name in ("messages", "text") if name in available]
    has_completion = {"prompt", "completion"} <= available or (not text_columns and len(available) > 1)
    prompt_columns, target_column = (("prompt",), "completion") if has_completion else ((), (*text_columns, "text")[0])
    rows = builder.normalize_cells(rows, (*prompt_columns, target_column))
    if not prompt_columns:
        check_prompt_not_dropped(rows, (target_column,), "completion")

    def make_example(row: Row, number: int) -> Example | None:
        cell, prompt_cell = row[target_column], row["prompt"] if prompt_columns else None
        if isinstance(cell, list):
            ids, start, ignored_spans = _encode_turns(builder.tokenizer_for(row, cell), cell, prompt_cell, train_on)
        elif train_on == "all":
            raise RequestError("train_on is 'all', but the data are text, which has no turns: leave it out")
        else:
            (ids, start), ignored_spans = _encode_whole_text(tokenizer, cell, prompt_cell), []
        if (excess := builder.count_tokens_to_cut(target_column, ids, start - 1)) is None:
            return None
        shifted_spans = tuple((begin - excess, end - excess) for begin, end in ignored_spans)
        return Example(cut_beginning(ids, excess, tokenizer), start - excess, number, shifted_spans)

    return builder.collect_records(convert_rows(rows, make_example, text_columns=(*prompt_columns, target_column)))


def make_preferences(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int | Limit, too_long: TooLong = "refuse"
) -> FilteredRecords[Preference]:
    """`chosen` and `rejected`: completions of `prompt` where there is one, else whole texts; `margin` where given.

    Rows whose two sides are the same say nothing and are left out. Cut is what both sides begin with, by as many tokens on
    both; where this is not enough, the row is left out.
    """
    builder = RecordBuilder.of(tokenizer, max_length, too_long)
    rows = builder.convert_layout(rows, conversation_column="prompt")
    available = {*column_names(rows)}
    if {"completion", "label"} <= available and not available & {"chosen", "rejected"}:
        raise RequestError(
            "the data have single completions with a label (the layout of KTO), not the columns chosen and rejected: give "
            "pairs, or learn from the labels with `understudy language reward-model`"
        )
    prompt_columns = ("prompt",) if "prompt" in available else ()
    rows = builder.normalize_cells(rows, (*prompt_columns, "chosen", "rejected"))
    if not prompt_columns:
        check_prompt_not_dropped(rows, ("chosen", "rejected"))

    def make_preference(row: Row, number: int) -> Preference | None:
        prompt_cell, row_tokenizer = (
            row["prompt"] if prompt_columns else None,
            builder.tokenizer_for(row, row["chosen"]),
        )
        sides = {side: _encode_whole_text(row_tokenizer, row[side], prompt_cell)[0] for side in ("chosen", "rejected")}
        if sides["chosen"] == sides["rejected"]:
            builder.num_equal += 1
            return None
        longer_side = max(sides, key=lambda side: len(sides[side]))
        excess = builder.count_tokens_to_cut(longer_side, sides[longer_side], common_prefix_length(*sides.values()) - 1)
        margin = parse_finite("margin", 0.0 if row.get("margin") is None else row["margin"])
        if excess is None:
            return None
        chosen, rejected = (cut_beginning(ids, excess, tokenizer) for ids in sides.values())
        prompt_text = _common_prompt(row["chosen"], row["rejected"]) if prompt_cell is None else prompt_cell
        prompt_text = prompt_text if isinstance(prompt_text, str) else json.dumps(prompt_text or "")
        return Preference(chosen, rejected, margin, number, prompt_text)

    pairs = builder.collect_records(
        convert_rows(rows, make_preference, text_columns=(*prompt_columns, "chosen", "rejected"))
    )
    if builder.num_equal == len(rows):
        raise RequestError(f"chosen equals rejected in each of {len(rows)} rows: give pairs that differ")
    return pairs


def make_labelled_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int | Limit, too_long: TooLong = "refuse"
) -> FilteredRecords[LabelledExample]:
    """`text`, or `prompt` and `completion`, and `label`: from 0 to 1, or true or false. Cut is the beginning of the text."""
    builder = RecordBuilder.of(tokenizer, max_length, too_long)
    available = {*column_names(rows)}
    if "text" not in available and {"prompt", "completion"} <= available:
        rows = builder.normalize_cells(rows, ("prompt", "completion"))
        convert_rows(rows, lambda row, number: None, text_columns=("prompt", "completion"))
        rows = [{**row, "text": row["prompt"] + row["completion"]} for row in rows]
        builder.notes.append("'prompt' and 'completion' (KTO) are read as one text")
    rows = builder.normalize_cells(rows, ("text",))

    def make_labelled_example(row: Row, number: int) -> LabelledExample | None:
        text = row["text"]
        row_tokenizer = builder.tokenizer_for(row, text)
        ids = (
            row_tokenizer.encode_prompt(text)
            if isinstance(text, str)
            else _encode_whole_text(row_tokenizer, text, None)[0]
        )
        label = parse_finite("label", row["label"])
        if not 0 <= label <= 1:
            raise RequestError(f"label is {row['label']!r}: must be from 0 (bad) to 1 (good)")
        excess = builder.count_tokens_to_cut("text", ids, len(ids) - 2)
        return None if excess is None else LabelledExample(cut_beginning(ids, excess, tokenizer), label, number)

    return builder.collect_records(
        convert_rows(rows, make_labelled_example, text_columns=("text",), other_columns=("label",))
    )


def longer_is_chosen(data: Sequence[Preference]) -> float:
    """How often the longer side of a pair is the chosen one, in [0, 1]; pairs of equal length count by half."""
    differences = [len(pair.chosen) - len(pair.rejected) for pair in data]
    return sum((x > 0) + 0.5 * (x == 0) for x in differences) / len(differences)


def check_ids(data: Sequence[Prompt | Example | Preference | LabelledExample], model: Any) -> None:
    """Refuse rows with an id that a model has no embedding for: its tokenizer is not the one it was trained with."""
    vocabulary = model.get_input_embeddings().num_embeddings
    for record in data:
        rows = (record.chosen, record.rejected) if isinstance(record, Preference) else (record.ids,)
        if (highest := max(max(ids, default=0) for ids in rows)) >= vocabulary:
            raise RequestError(
                f"row {record.row}: it has id {highest}, the model has ids from 0 to {vocabulary - 1}: give the model the "
                "tokenizer it was trained with"
            )


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens, letters or messages both begin with."""
    matches = (a == b for a, b in zip(first, second, strict=False))
    return next((i for i, match in enumerate(matches) if not match), min(len(first), len(second)))


def pad_sequences(
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int] | None = None,
    ignored_spans: Sequence[Sequence[tuple[int, int]]] = (),
    *,
    fill: int = 0,
) -> TokenBatch:
    """Rows padded on the right; the mask is True at t where token t+1 is there, not before the row's start and in no span of
    `ignored_spans`.
    """
    ids, length = _pad_ids(sequences, fill)
    first_position = torch.tensor([0] * len(sequences) if starts is None else list(starts))
    next_position = torch.arange(1, ids.shape[1] + 1)[None, :]
    mask = (next_position < length[:, None]) & (next_position >= first_position[:, None])
    for row, spans in zip(mask, ignored_spans, strict=False):
        for begin, end in spans:
            row[begin - 1 : end - 1] = False
    return TokenBatch(ids, mask)


def pad_for_scoring(sequences: Sequence[Sequence[int]], *, fill: int = 0) -> TokenBatch:
    """Rows padded on the right; the mask is True at each row's last token, where a text is scored."""
    ids, length = _pad_ids(sequences, fill)
    return TokenBatch(ids, torch.arange(ids.shape[1])[None, :] == length[:, None] - 1)


def _pad_ids(sequences: Sequence[Sequence[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = torch.tensor([len(row) for row in sequences])
    max_length = int(length.max())
    return torch.tensor([[*row, *[fill] * (max_length - len(row))] for row in sequences]), length


def _encode_whole_text(
    tokenizer: Tokenizer, cell: str | Messages, prompt: str | Messages | None
) -> tuple[list[int], int]:
    """The ids of a prompt and what follows it, and where that begins. Without a prompt: BOS, or the turns before."""
    if prompt is None and not isinstance(cell, str):
        answer_start = _assistant_turns(cell)[-1][0]
        prompt, cell = cell[:answer_start], cell[answer_start:]
    if prompt is None:
        return [*tokenizer.prefix_ids, *tokenizer.encode_completion(cell)], 1
    prompt_ids = tokenizer.encode_prompt(prompt)
    return [*prompt_ids, *tokenizer.encode_completion(cell, prompt)], len(prompt_ids)


def _assistant_turns(messages: Messages, first_message: int = 1) -> list[tuple[int, int]]:
    """The assistant's turns from a message on, each as the first of its messages and the one behind its last.

    Raises:
        RequestError: there is none at the end.
    """
    if len(messages) <= first_message or messages[-1]["role"] != "assistant":
        roles = ", ".join(str(m["role"]) for m in messages)
        raise RequestError(f"the messages are of roles {roles}: the last of two or more must be the assistant's")
    is_assistant = [i >= first_message and m["role"] == "assistant" for i, m in enumerate(messages)]
    begins = [i for i, is_turn in enumerate(is_assistant) if is_turn and not is_assistant[i - 1]]
    ends = [i + 1 for i, is_turn in enumerate(is_assistant) if is_turn and not any(is_assistant[i + 1 : i + 2])]
    return list(zip(begins, ends, strict=True))


def _encode_turns(
    tokenizer: Tokenizer, cell: Messages, prompt: str | Messages | None, train_on: TrainOn
) -> tuple[list[int], int, list[tuple[int, int]]]:
    """The ids of a chat, where the first turn begins that is learned, and the spans behind it that are only read.

    Turns are put behind each other as in a conversation that is sampled: each answer follows the prompt's own ids.
    """
    if isinstance(prompt, str):
        raise RequestError("the completion is chat and its prompt is text: give both as text or both as chat")
    messages = [*(prompt or []), *cell]
    first_turn, *later_turns = _assistant_turns(messages, len(prompt or []) or 1)[-1 if train_on == "last" else 0 :]
    ids = tokenizer.encode_prompt(messages[: first_turn[0]])
    start, ignored_spans, last_message = len(ids), [], first_turn[0]
    for begin, end in (first_turn, *later_turns):
        if begin != first_turn[0]:
            reply_ids = tokenizer.encode_turn(messages[:last_message], messages[last_message + 1 : begin])
            ignored_spans.append((len(ids), len(ids) + len(reply_ids)))
            ids = [*ids, *reply_ids]
        ids = [*ids, *tokenizer.encode_completion(messages[begin:end], messages[:begin])]
        last_message = end - 1
    return ids, start, ignored_spans


def _common_prompt(chosen: str | Messages, rejected: str | Messages) -> str | Messages:
    """The prompt of whole texts: what two transcripts or chats have in common before the last answer that both give."""
    shared_prefix: Any = chosen[: common_prefix_length(chosen, rejected)]
    return (
        shared_prefix.rpartition(ANSWER_MARKER)[0]
        if isinstance(shared_prefix, str)
        else shared_prefix[: len(chosen) - 1]
    )
