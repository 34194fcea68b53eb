"""Text as tokens, before step 1: the tokenizer, and rows of data as prompts, examples, pairs and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import jinja2
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from understudy.batch import Text
from understudy.language.data import Row, column_names, each_row, finite, no_prompt_left_out
from understudy.language.data import read as read
from understudy.language.files import check_files
from understudy.language.lora import base_of, tokenizer_of
from understudy.run.config import RequestError

Messages = list[dict[str, Any]]
"""A chat: `[{"role": ..., "content": ...}, ...]`."""

TooLong = Literal["refuse", "skip", "cut"]
"""What becomes of a row that the context does not hold."""

ANSWER = "\n\nAssistant:"
"""What stands before each answer in a published transcript."""

Record = TypeVar("Record")


DUMMY = "what-the-assistant-says"
"""Words put into the assistant's mouth to see what a chat template writes around them."""


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer and what the library must know about it."""

    hf: PreTrainedTokenizerBase
    stops: frozenset[int]
    """Ids that end a completion; empty where completions have a fixed length."""

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        stop: tuple[str, ...] = (),
        fixed_length: bool = False,
        template: str | None = None,
        trust_remote_code: bool = False,
    ) -> Tokenizer:
        """The tokenizer of a directory or hub id. No code that comes with it is run, unless that is asked for.

        Args:
            stop: in place of the ids in generation_config.json, or else the tokenizer's EOS: each entry one token, as its
                text (`</s>`, a newline) or its id in digits.
            fixed_length: completions have no end, whatever the model says.
            template: a Jinja chat template or the path of one, in place of the tokenizer's own.
        """
        check_files(source, trust_remote_code=trust_remote_code)
        try:
            hf = AutoTokenizer.from_pretrained(tokenizer_of(source), trust_remote_code=trust_remote_code)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise RequestError(f"model is {str(source)!r}: no tokenizer there; name a directory or hub id") from None
        if template is not None:
            hf.chat_template = _template(hf, template)
        if fixed_length:
            return cls(hf, frozenset())
        stops = frozenset(_token_id(hf, entry) for entry in stop) or _own_stops(hf, base_of(source) or source)
        if not stops:
            raise RequestError(
                f"model is {str(source)!r}: it names no stop id; give one with --stop, or --fixed-length N"
            )
        return cls(hf, stops)

    @property
    def bos(self) -> int | None:
        return cast("int | None", self.hf.bos_token_id)

    @property
    def stop(self) -> int | None:
        """The stop id that is put behind a text that has none: EOS if it is a stop, else the lowest."""
        return self.hf.eos_token_id if self.hf.eos_token_id in self.stops else min(self.stops, default=None)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Text: one BOS, if the tokenizer has any, and the text's ids; "" is BOS alone.

        Chat: as the template has it, up to where the assistant begins to speak; of several BOS in front one is kept.
        """
        ids = self._text(prompt) if isinstance(prompt, str) else self._chat(prompt, answer=True)
        if not ids:
            raise RequestError("the prompt is empty and the tokenizer has no BOS to start from: begin with a text")
        return ids

    def encode_completion(self, completion: str | Messages, prompt: str | Messages = "") -> list[int]:
        """What follows `encode_prompt(prompt)`, with a stop id at the end if there is any.

        Text is tokenized with its prompt, so that it reads as it was written. Where a token would lie across the seam,
        which a model that starts from the prompt's ids cannot produce, the completion is tokenized apart.
        Chat: what the template adds to the prompt, less the white space after the turn's end. Where it writes the prompt
        otherwise when an answer follows (dropping earlier thoughts, say), it is what it writes from the answer's beginning
        on: a model that samples starts from the prompt's own ids.
        """
        if isinstance(completion, str):
            if not isinstance(prompt, str):
                raise RequestError("the completion is text and its prompt is chat: give both as text or both as chat")
            before, whole = self._text(prompt), self._text(prompt + completion)
            ids = whole[len(before) :] if whole[: len(before)] == before else _inside(self.hf, completion)
        else:
            if isinstance(prompt, str):
                raise RequestError("the completion is chat and its prompt is text: give both as text or both as chat")
            before, whole = self.encode_prompt(prompt), self._chat([*prompt, *completion], answer=False)
            adds = whole[: len(before)] == before
            ids = self._closed(whole[len(before) :] if adds else _inside(self.hf, self._answer(prompt, completion)))
        return ids if self.stop is None or (ids and ids[-1] in self.stops) else [*ids, self.stop]

    def encode_turn(self, before: Messages, messages: Messages) -> list[int]:
        """The ids between an assistant's turn, which came after `before`, and its next: `messages`, and the call to speak.

        They are the end of a render in which the assistant says something else, to be put behind the ids there are. So
        nothing that was sampled is tokenized again, nor lost to a template that would now write earlier turns otherwise.
        The stop that ended the turn is not among them.
        """
        ids = _inside(self.hf, self._around(before, messages, answer=True)[1])
        end = _inside(self.hf, self._around(before, [], answer=False)[1])
        stop = next((t + 1 for t, token in enumerate(ids) if token in self.stops), 0)
        ended = ids[:stop] == end[:stop] or not self._decode(ids[: stop - 1]).strip()
        return ids[stop:] if stop and ended else ids

    def turn_end(self) -> list[int]:
        """What the chat template writes behind an assistant's words, white space apart; [] where it writes nothing."""
        after = self._around([{"role": "user", "content": "?"}], [], answer=False)[1].strip()
        return _inside(self.hf, after) if after else []

    def encode_text(self, text: str) -> list[int]:
        """Text that is put behind other ids, as it is: no BOS, no stop."""
        return _inside(self.hf, text)

    def continued(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids as it stands behind others': some tokenizers drop the blank in front of a text."""
        front, whole = self._decode(list(before), skip_special_tokens=True), self.decode([*before, *ids])
        return whole[len(front) :] if whole.startswith(front) else self.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens and without the stop it ends with."""
        ids = list(ids)
        while ids and ids[-1] in self.stops:
            ids.pop()
        return self._decode(ids, skip_special_tokens=True)

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, special ones by name, leading blanks kept; for displays."""
        before = self.hf.encode("a", add_special_tokens=False)
        seen = self._decode(before)
        behind = {i: self._decode([*before, i]) for i in set(ids)}
        texts = {i: t[len(seen) :] if t.startswith(seen) else self._decode([i]) for i, t in behind.items()}
        return [texts[i] for i in ids]

    def save(self, path: str | Path) -> None:
        """Everything `load` needs, the template included; stop ids belong in the model's generation_config.json."""
        self.hf.save_pretrained(path)

    def _decode(self, ids: list[int], **options: Any) -> str:
        return str(self.hf.decode(ids, clean_up_tokenization_spaces=False, **options))

    def _text(self, text: str) -> list[int]:
        return self._one_bos(
            [*([] if self.bos is None else [self.bos]), *self.hf.encode(text, add_special_tokens=False, verbose=False)]
        )

    def _chat(self, messages: Messages, *, answer: bool) -> list[int]:
        return self._one_bos(self._render(messages, answer=answer, tokenize=True))

    def _render(self, messages: Messages, *, answer: bool, tokenize: bool) -> Any:
        if not self.hf.chat_template:
            raise RequestError(
                "the data are chat and the tokenizer has no chat template: give one with --template FILE"
            )
        try:
            return self.hf.apply_chat_template(
                messages, add_generation_prompt=answer, tokenize=tokenize, return_dict=False
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise RequestError(f"the chat template refuses messages of roles {roles}: {error}") from None

    def _around(self, before: Messages, after: Messages, *, answer: bool) -> tuple[str, str]:
        """What the chat template writes before an assistant's words between `before` and `after`, and what behind them."""
        messages = [*before, {"role": "assistant", "content": DUMMY}, *after]
        text = self._render(messages, answer=answer, tokenize=False)
        if text.count(DUMMY) != 1:
            raise RequestError(
                "the chat template does not write each of the assistant's turns once, so that what stands before and "
                "behind one cannot be told: give another with --template"
            )
        front, _, behind = text.partition(DUMMY)
        return front, behind

    def _answer(self, prompt: Messages, completion: Messages) -> str:
        """What the chat template writes after the call to speak, which it writes in a prompt that ends with it."""
        asked = self._render(prompt, answer=False, tokenize=False)
        call = self._render(prompt, answer=True, tokenize=False).removeprefix(asked)
        front, _ = self._around(prompt, completion[1:], answer=False)
        at = front.rindex(call) + len(call) if call in front else len(front)
        text = self._render([*prompt, *completion], answer=False, tokenize=False)
        if text[:at] != front[:at]:
            raise RequestError(
                "the chat template writes the prompt otherwise for every answer, so that what is learned from is not what "
                "is sampled: give a template that does not with --template"
            )
        return text[at:]

    def _one_bos(self, ids: list[int]) -> list[int]:
        while self.bos is not None and ids[:2] == [self.bos, self.bos]:
            ids = ids[1:]
        return ids

    def _closed(self, ids: list[int]) -> list[int]:
        """Up to the last stop id, where the template writes only white space after it."""
        end = max((t + 1 for t, token in enumerate(ids) if token in self.stops), default=0)
        return ids[:end] if end and not self._decode(ids[end:]).strip() else ids


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


class Fitted(list[Record]):
    """The records of rows that the context holds, in their order, and how many rows are not among them, or not whole.

    Attributes:
        cut: rows that lost their beginning.  skipped: rows left out for their length.  equal: pairs of equals, left out.
    """

    cut = skipped = equal = 0

    def remark(self, source: str) -> list[str]:
        """The sentence to say about them; none where all rows are there and whole."""
        said = {"cut at the beginning": self.cut, "left out as too long": self.skipped, "left out as equal": self.equal}
        rows = len(self) + self.skipped + self.equal
        counts = ", ".join(f"{count} {what}" for what, count in said.items() if count)
        return [f"of the {rows} rows of '{source}', {counts}: {len(self)} are read"] if counts else []


def prompts(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: TooLong = "refuse",
    unconditional: bool = False,
) -> Fitted[Prompt]:
    """Column `prompt`, text or chat. A prompt is never cut: one that is too long is left out.

    Args:
        unconditional: every row starts from BOS alone; the data then have no column `prompt`.
    """
    room = _Room(max_length, too_long)
    if unconditional and "prompt" in column_names(rows):
        raise RequestError(
            "unconditional is True, but the data have a column 'prompt': remove the column, or leave out --unconditional"
        )

    def one(row: Row, number: int) -> Prompt | None:
        text, others = row.get("prompt", ""), {name: cell for name, cell in row.items() if name != "prompt"}
        ids = tokenizer.encode_prompt(text)
        return None if room.excess("prompt", ids, 0) is None else Prompt(tuple(ids), text, others, number)

    return room.those_of(each_row(rows, one, texts=() if unconditional else ("prompt",)))


def examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, too_long: TooLong = "refuse"
) -> Fitted[Example]:
    """`completion` after `prompt`, else the whole of `text`, else the last turn of `messages`.

    Chat in any of them is learned from in the last turn alone. Published transcripts in `text` are plain text.
    Cut is what comes before that which is learned; where this is not enough, the row is left out.
    """
    room = _Room(max_length, too_long)
    there = {*column_names(rows)}
    whole = [name for name in ("messages", "text") if name in there]
    pair = {"prompt", "completion"} <= there or (not whole and len(there) > 1)
    prompt, name = (("prompt",), "completion") if pair else ((), (*whole, "text")[0])
    if not prompt:
        no_prompt_left_out(rows, (name,), "completion")

    def one(row: Row, number: int) -> Example | None:
        ids, start = _whole(tokenizer, row[name], row["prompt"] if prompt else None)
        excess = room.excess(name, ids, start - 1)
        return None if excess is None else Example(_without(ids, excess, tokenizer), start - excess, number)

    return room.those_of(each_row(rows, one, texts=(*prompt, name)))


def preferences(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, too_long: TooLong = "refuse"
) -> Fitted[Preference]:
    """`chosen` and `rejected`: completions of `prompt` where there is one, else whole texts; `margin` where given.

    Rows whose two sides are the same say nothing and are left out. Cut is what both sides begin with, by as many tokens on
    both; where this is not enough, the row is left out.
    """
    prompt = ("prompt",) if "prompt" in column_names(rows) else ()
    if not prompt:
        no_prompt_left_out(rows, ("chosen", "rejected"))
    room = _Room(max_length, too_long)

    def one(row: Row, number: int) -> Preference | None:
        before = row["prompt"] if prompt else None
        sides = {side: _whole(tokenizer, row[side], before)[0] for side in ("chosen", "rejected")}
        if sides["chosen"] == sides["rejected"]:
            room.equal += 1
            return None
        longer = max(sides, key=lambda side: len(sides[side]))
        excess = room.excess(longer, sides[longer], common(*sides.values()) - 1)
        margin = finite("margin", 0.0 if row.get("margin") is None else row["margin"])
        if excess is None:
            return None
        chosen, rejected = (_without(ids, excess, tokenizer) for ids in sides.values())
        asked = _asked(row["chosen"], row["rejected"]) if before is None else before
        asked = asked if isinstance(asked, str) else json.dumps(asked or "")
        return Preference(chosen, rejected, margin, number, asked)

    pairs = room.those_of(each_row(rows, one, texts=(*prompt, "chosen", "rejected")))
    if room.equal == len(rows):
        raise RequestError(f"chosen equals rejected in each of {len(rows)} rows: give pairs that differ")
    return pairs


def labelled(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, too_long: TooLong = "refuse"
) -> Fitted[Labelled]:
    """`text` and `label`: a number from 0 to 1, or true or false. Cut is the beginning of the text."""
    room = _Room(max_length, too_long)

    def one(row: Row, number: int) -> Labelled | None:
        text = row["text"]
        ids = tokenizer.encode_prompt(text) if isinstance(text, str) else _whole(tokenizer, text, None)[0]
        label = finite("label", row["label"])
        if not 0 <= label <= 1:
            raise RequestError(f"label is {row['label']!r}: must be from 0 (bad) to 1 (good)")
        excess = room.excess("text", ids, len(ids) - 2)
        return None if excess is None else Labelled(_without(ids, excess, tokenizer), label, number)

    return room.those_of(each_row(rows, one, texts=("text",), others=("label",)))


def check_ids(data: Sequence[Example | Preference | Labelled], model: Any) -> None:
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


def pad(sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, *, fill: int = 0) -> Text:
    """Rows padded on the right; the mask is True at t where token t+1 is there and not before the row's start."""
    ids, length = _padded(sequences, fill)
    first = torch.tensor([0] * len(sequences) if starts is None else list(starts))
    following = torch.arange(1, ids.shape[1] + 1)[None, :]
    return Text(ids, (following < length[:, None]) & (following >= first[:, None]))


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
        if len(cell) < 2 or cell[-1]["role"] != "assistant":
            roles = ", ".join(str(m["role"]) for m in cell)
            raise RequestError(f"the messages are of roles {roles}: the last of two or more must be the assistant's")
        prompt, cell = cell[:-1], cell[-1:]
    if prompt is None:
        return [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode_completion(cell)], 1
    before = tokenizer.encode_prompt(prompt)
    return [*before, *tokenizer.encode_completion(cell, prompt)], len(before)


def _asked(chosen: str | Messages, rejected: str | Messages) -> str | Messages:
    """The prompt of whole texts: what two transcripts or chats have in common before the last answer that both give."""
    shared: Any = chosen[: common(chosen, rejected)]
    return shared.rpartition(ANSWER)[0] if isinstance(shared, str) else shared[: len(chosen) - 1]


def _without(ids: list[int], excess: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A row that loses its beginning, but not BOS."""
    kept = int(ids[0] == tokenizer.bos)
    return (*ids[:kept], *ids[kept + excess :])


@dataclass
class _Room:
    """How many tokens a row may have, what becomes of a longer one, and of how many."""

    tokens: int
    too_long: TooLong
    cut: int = 0
    skipped: int = 0
    equal: int = 0

    def excess(self, name: str, ids: list[int], spare: int) -> int | None:
        """Tokens that a row loses at its beginning, at most `spare`; None for a row that is left out."""
        if (excess := len(ids) - self.tokens) <= 0:
            return 0
        if self.too_long == "refuse":
            raise RequestError(
                f"{name} has {len(ids)} tokens, the context holds {self.tokens}: "
                "shorten it or leave it out; --too-long skip leaves out all such rows"
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
                f"too_long is {self.too_long!r} and leaves no row: "
                f"the context holds {self.tokens} tokens; give shorter rows, or a model that reads more"
            )
        return found


def _template(hf: PreTrainedTokenizerBase, template: str) -> str:
    """The text of a template, from a file where it is no text itself; tried once, for its grammar."""
    text = template
    if "{{" not in template and "{%" not in template:
        if not Path(template).is_file():
            raise RequestError(
                f"template is {template!r}: unknown template, neither a file nor Jinja; give one of them"
            )
        text = Path(template).read_text(encoding="utf-8")
    try:
        hf.apply_chat_template([{"role": "user", "content": "?"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"template is {template[:40]!r}: not Jinja in line {error.lineno} ({error.message})"
        ) from None
    except jinja2.TemplateError:
        pass  # it asks for other messages than this one
    return text


def _own_stops(hf: PreTrainedTokenizerBase, source: str | Path) -> frozenset[int]:
    own: Any = None
    with suppress(OSError):  # it has no generation_config.json
        own = GenerationConfig.from_pretrained(source).eos_token_id
    own = hf.eos_token_id if own is None else own
    return frozenset() if own is None else frozenset(own if isinstance(own, list) else [own])


def _token_id(hf: PreTrainedTokenizerBase, entry: str) -> int:
    """The id of one token, named by its digits, its entry in the vocabulary or its text."""
    vocabulary = hf.get_vocab()
    if entry.isdecimal():
        if int(entry) <= (highest := max(vocabulary.values())):
            return int(entry)
        raise RequestError(f"stop is {entry}: the vocabulary has ids from 0 to {highest}")
    if entry in vocabulary:
        return vocabulary[entry]
    for ids in (hf.encode(entry, add_special_tokens=False), _inside(hf, entry)):
        if len(ids) == 1 and ids[0] != hf.unk_token_id:
            return ids[0]
    raise RequestError(f"stop is {entry!r}: must be exactly one token; give a token's text or its id")


def _inside(hf: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of text that is not the first: without the blank that some tokenizers put in front of a text."""
    before, whole = (hf.encode(t, add_special_tokens=False, verbose=False) for t in ("\n", "\n" + text))
    stable = whole[: len(before)] == before
    return whole[len(before) :] if stable else hf.encode(text, add_special_tokens=False, verbose=False)
