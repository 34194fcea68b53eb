"""Rows of data as token ids, before step 1: prompts, examples, pairs and labelled texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from understudy.batch import Text
from understudy.language.data import FUNCTIONS_OWN, Row, column_names, each_row, finite, no_prompt_left_out
from understudy.language.data import read as read
from understudy.language.fitting import Fitted, Limit, Room, TooLong, without_beginning
from understudy.language.tokenizer import Messages
from understudy.language.tokenizer import Tokenizer as Tokenizer
from understudy.run.config import RequestError

TrainOn = Literal["last", "all"]
"""Which of the assistant's turns are learned from."""

ANSWER = "\n\nAssistant:"
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
    unlearned: tuple[tuple[int, int], ...] = ()
    """Spans after `start`, from a token up to another, which are only read too: what others say between two turns."""

    @property
    def learned(self) -> int:
        """How many of its tokens are imitated."""
        return len(self.ids) - self.start - sum(end - begin for begin, end in self.unlearned)


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
class Labelled:
    """A text and how good it is, from 0 to 1. No stop is put behind it: the data do not say that it ends there."""

    ids: tuple[int, ...]
    label: float
    row: int


def prompts(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | Limit,
    too_long: TooLong = "refuse",
    unconditional: bool = False,
) -> Fitted[Prompt]:
    """Column `prompt`, text or chat. A prompt is never cut: one that is too long is left out.

    Args:
        unconditional: every row starts from BOS alone; the data then have no column `prompt`.
    """
    room = Room.of(tokenizer, max_length, too_long)
    rows = room.read(room.arranged(rows, conversations=None), ("prompt",))
    if unconditional and "prompt" in column_names(rows):
        raise RequestError(
            "unconditional is True, but the data have a column 'prompt': remove the column, or leave out --unconditional"
        )

    room.notes += [
        f"the column {name!r} does not reach functions of {'--reply' if name == 'stop' else '--reward and --reply'}, whose "
        f"argument {name!r} is the run's own: give it another name with --columns NAME={name}"
        for name in column_names(rows)
        if name in (*FUNCTIONS_OWN, "stop")
    ]

    def one(row: Row, number: int) -> Prompt | None:
        text, others = row.get("prompt", ""), {name: cell for name, cell in row.items() if name != "prompt"}
        ids = room.tokenizer_of(row, text).encode_prompt(text)
        room.continued += isinstance(text, list) and text[-1]["role"] == "assistant"
        return None if room.excess("prompt", ids, 0) is None else Prompt(tuple(ids), text, others, number)

    return room.those_of(each_row(rows, one, texts=() if unconditional else ("prompt",)))


def examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | Limit,
    too_long: TooLong = "refuse",
    train_on: TrainOn = "last",
) -> Fitted[Example]:
    """`completion` after `prompt`, else the last turn of `messages`, else the whole of `text`.

    Chat in any of them is learned from in the last turn of the assistant, or in all that follow the prompt. Published
    transcripts in `text` are plain text.
    Cut is what comes before that which is learned; where this is not enough, the row is left out.
    """
    room = Room.of(tokenizer, max_length, too_long)
    rows = room.arranged(rows)
    there = {*column_names(rows)}
    whole = [name for name in ("messages", "text") if name in there]
    pair = {"prompt", "completion"} <= there or (not whole and len(there) > 1)
    prompt, name = (("prompt",), "completion") if pair else ((), (*whole, "text")[0])
    rows = room.read(rows, (*prompt, name))
    if not prompt:
        no_prompt_left_out(rows, (name,), "completion")

    def one(row: Row, number: int) -> Example | None:
        cell, before = row[name], row["prompt"] if prompt else None
        if isinstance(cell, list):
            ids, start, unlearned = _turns(room.tokenizer_of(row, cell), cell, before, train_on)
        elif train_on == "all":
            raise RequestError("train_on is 'all', but the data are text, which has no turns: leave it out")
        else:
            (ids, start), unlearned = _whole(tokenizer, cell, before), []
        if (excess := room.excess(name, ids, start - 1)) is None:
            return None
        shifted = tuple((begin - excess, end - excess) for begin, end in unlearned)
        return Example(without_beginning(ids, excess, tokenizer), start - excess, number, shifted)

    return room.those_of(each_row(rows, one, texts=(*prompt, name)))


def preferences(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int | Limit, too_long: TooLong = "refuse"
) -> Fitted[Preference]:
    """`chosen` and `rejected`: completions of `prompt` where there is one, else whole texts; `margin` where given.

    Rows whose two sides are the same say nothing and are left out. Cut is what both sides begin with, by as many tokens on
    both; where this is not enough, the row is left out.
    """
    room = Room.of(tokenizer, max_length, too_long)
    rows = room.arranged(rows, conversations="prompt")
    there = {*column_names(rows)}
    if {"completion", "label"} <= there and not there & {"chosen", "rejected"}:
        raise RequestError(
            "the data have single completions with a label (the layout of KTO), not the columns chosen and rejected: give "
            "pairs, or learn from the labels with `understudy language reward-model`"
        )
    prompt = ("prompt",) if "prompt" in there else ()
    rows = room.read(rows, (*prompt, "chosen", "rejected"))
    if not prompt:
        no_prompt_left_out(rows, ("chosen", "rejected"))

    def one(row: Row, number: int) -> Preference | None:
        before, own = row["prompt"] if prompt else None, room.tokenizer_of(row, row["chosen"])
        sides = {side: _whole(own, row[side], before)[0] for side in ("chosen", "rejected")}
        if sides["chosen"] == sides["rejected"]:
            room.equal += 1
            return None
        longer = max(sides, key=lambda side: len(sides[side]))
        excess = room.excess(longer, sides[longer], common(*sides.values()) - 1)
        margin = finite("margin", 0.0 if row.get("margin") is None else row["margin"])
        if excess is None:
            return None
        chosen, rejected = (without_beginning(ids, excess, tokenizer) for ids in sides.values())
        asked = _asked(row["chosen"], row["rejected"]) if before is None else before
        asked = asked if isinstance(asked, str) else json.dumps(asked or "")
        return Preference(chosen, rejected, margin, number, asked)

    pairs = room.those_of(each_row(rows, one, texts=(*prompt, "chosen", "rejected")))
    if room.equal == len(rows):
        raise RequestError(f"chosen equals rejected in each of {len(rows)} rows: give pairs that differ")
    return pairs


def labelled(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int | Limit, too_long: TooLong = "refuse"
) -> Fitted[Labelled]:
    """`text`, or `prompt` and `completion`, and `label`: from 0 to 1, or true or false. Cut is the beginning of the text."""
    room = Room.of(tokenizer, max_length, too_long)
    there = {*column_names(rows)}
    if "text" not in there and {"prompt", "completion"} <= there:
        rows = room.read(rows, ("prompt", "completion"))
        each_row(rows, lambda row, number: None, texts=("prompt", "completion"))
        rows = [{**row, "text": row["prompt"] + row["completion"]} for row in rows]
        room.notes.append("'prompt' and 'completion' (KTO) are read as one text")
    rows = room.read(rows, ("text",))

    def one(row: Row, number: int) -> Labelled | None:
        text = row["text"]
        own = room.tokenizer_of(row, text)
        ids = own.encode_prompt(text) if isinstance(text, str) else _whole(own, text, None)[0]
        label = finite("label", row["label"])
        if not 0 <= label <= 1:
            raise RequestError(f"label is {row['label']!r}: must be from 0 (bad) to 1 (good)")
        excess = room.excess("text", ids, len(ids) - 2)
        return None if excess is None else Labelled(without_beginning(ids, excess, tokenizer), label, number)

    return room.those_of(each_row(rows, one, texts=("text",), others=("label",)))


def check_ids(data: Sequence[Prompt | Example | Preference | Labelled], model: Any) -> None:
    """Refuse rows with an id that a model has no embedding for: its tokenizer is not the one it was trained with."""
    vocabulary = model.get_input_embeddings().num_embeddings
    for record in data:
        rows = (record.chosen, record.rejected) if isinstance(record, Preference) else (record.ids,)
        if (highest := max(max(ids, default=0) for ids in rows)) >= vocabulary:
            raise RequestError(
                f"row {record.row}: it has id {highest}, the model has ids from 0 to {vocabulary - 1}: give the model the "
                "tokenizer it was trained with"
            )


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens, letters or messages both begin with."""
    matches = (a == b for a, b in zip(one, other, strict=False))
    return next((i for i, match in enumerate(matches) if not match), min(len(one), len(other)))


def pad(
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int] | None = None,
    unlearned: Sequence[Sequence[tuple[int, int]]] = (),
    *,
    fill: int = 0,
) -> Text:
    """Rows padded on the right; the mask is True at t where token t+1 is there, not before the row's start and in no span of
    `unlearned`.
    """
    ids, length = _padded(sequences, fill)
    first = torch.tensor([0] * len(sequences) if starts is None else list(starts))
    following = torch.arange(1, ids.shape[1] + 1)[None, :]
    mask = (following < length[:, None]) & (following >= first[:, None])
    for row, spans in zip(mask, unlearned, strict=False):
        for begin, end in spans:
            row[begin - 1 : end - 1] = False
    return Text(ids, mask)


def last_token(sequences: Sequence[Sequence[int]], *, fill: int = 0) -> Text:
    """Rows padded on the right; the mask is True at each row's last token, where a text is scored."""
    ids, length = _padded(sequences, fill)
    return Text(ids, torch.arange(ids.shape[1])[None, :] == length[:, None] - 1)


def _padded(sequences: Sequence[Sequence[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = torch.tensor([len(row) for row in sequences])
    widest = int(length.max())
    return torch.tensor([[*row, *[fill] * (widest - len(row))] for row in sequences]), length


def _whole(tokenizer: Tokenizer, cell: str | Messages, prompt: str | Messages | None) -> tuple[list[int], int]:
    """The ids of a prompt and what follows it, and where that begins. Without a prompt: BOS, or the turns before."""
    if prompt is None and not isinstance(cell, str):
        at = _answers(cell)[-1][0]
        prompt, cell = cell[:at], cell[at:]
    if prompt is None:
        return [*tokenizer.front, *tokenizer.encode_completion(cell)], 1
    before = tokenizer.encode_prompt(prompt)
    return [*before, *tokenizer.encode_completion(cell, prompt)], len(before)


def _answers(messages: Messages, after: int = 1) -> list[tuple[int, int]]:
    """The assistant's turns from a message on, each as the first of its messages and the one behind its last.

    Raises:
        RequestError: there is none at the end.
    """
    if len(messages) <= after or messages[-1]["role"] != "assistant":
        roles = ", ".join(str(m["role"]) for m in messages)
        raise RequestError(f"the messages are of roles {roles}: the last of two or more must be the assistant's")
    spoken = [at >= after and m["role"] == "assistant" for at, m in enumerate(messages)]
    begins = [at for at, here in enumerate(spoken) if here and not spoken[at - 1]]
    ends = [at + 1 for at, here in enumerate(spoken) if here and not any(spoken[at + 1 : at + 2])]
    return list(zip(begins, ends, strict=True))


def _turns(
    tokenizer: Tokenizer, cell: Messages, prompt: str | Messages | None, train_on: TrainOn
) -> tuple[list[int], int, list[tuple[int, int]]]:
    """The ids of a chat, where the first turn begins that is learned, and the spans behind it that are only read.

    Turns are put behind each other as in a conversation that is sampled: each answer follows the prompt's own ids.
    """
    if isinstance(prompt, str):
        raise RequestError("the completion is chat and its prompt is text: give both as text or both as chat")
    messages = [*(prompt or []), *cell]
    first, *others = _answers(messages, len(prompt or []) or 1)[-1 if train_on == "last" else 0 :]
    ids = tokenizer.encode_prompt(messages[: first[0]])
    start, unlearned, last = len(ids), [], first[0]
    for begin, end in (first, *others):
        if begin != first[0]:
            between = tokenizer.encode_turn(messages[:last], messages[last + 1 : begin])
            unlearned.append((len(ids), len(ids) + len(between)))
            ids = [*ids, *between]
        ids = [*ids, *tokenizer.encode_completion(messages[begin:end], messages[:begin])]
        last = end - 1
    return ids, start, unlearned


def _asked(chosen: str | Messages, rejected: str | Messages) -> str | Messages:
    """The prompt of whole texts: what two transcripts or chats have in common before the last answer that both give."""
    shared: Any = chosen[: common(chosen, rejected)]
    return shared.rpartition(ANSWER)[0] if isinstance(shared, str) else shared[: len(chosen) - 1]
