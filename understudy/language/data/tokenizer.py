"""A tokenizer and its chat template: prompts, completions and turns as ids, and ids as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import jinja2
from tokenizers import processors
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from understudy.language.data.bounded import limit_resources
from understudy.language.model.loading import check_files
from understudy.language.model.lora import base_of, tokenizer_source
from understudy.run.config import RequestError, format_value, is_deep

Messages = list[dict[str, Any]]
"""A chat: `[{"role": ..., "content": ...}, ...]`."""

MARGIN_TOKENS = 4
"""Tokens more than a text has bytes: the first of them may be part of a character, or lose a blank."""
PLACEHOLDER_ANSWER = "what-the-assistant-says"
"""Words put into the assistant's mouth to see what a chat template writes around them."""


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer and what the library must know about it."""

    hf: PreTrainedTokenizerBase
    stops: frozenset[int]
    """Ids that end a completion; empty where completions have a fixed length."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is given besides the messages, such as `tools`."""
    keep_special_tokens: bool = False
    """Whether `decode` writes special tokens, such as `<think>`, as text. The stop at the end is never written."""
    stop_strings: tuple[str, ...] = ()
    """Texts of several tokens that end a completion as soon as they stand in what it reads as."""

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        stop: tuple[str, ...] = (),
        has_fixed_length: bool = False,
        chat_template: str | None = None,
        add_bos: bool = False,
        keep_special_tokens: bool = False,
        trust_remote_code: bool = False,
    ) -> Tokenizer:
        """The tokenizer of a directory or hub id. No code that comes with it is run, unless that is asked for.

        Args:
            stop: what ends a completion, see `ending_at`; by default the stop ids and stop strings of
                generation_config.json, or else the tokenizer's EOS.
            has_fixed_length: completions have no end, whatever the model says.
            chat_template: a Jinja chat template or the path of one, in place of the tokenizer's own.
            add_bos: text begins with BOS even where the tokenizer adds none of itself; `save` keeps it that way.
        """
        check_files(source, trust_remote_code=trust_remote_code)
        try:
            hf = AutoTokenizer.from_pretrained(tokenizer_source(source), trust_remote_code=trust_remote_code)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RequestError(f"model is {str(source)!r}: no tokenizer there; name a directory or hub id") from None
        if chat_template is not None:
            hf.chat_template = _load_chat_template(hf, chat_template)
        if add_bos:
            _begin_with_bos(hf)
        options: dict[str, Any] = {"keep_special_tokens": keep_special_tokens}
        if has_fixed_length:
            return cls(hf, frozenset(), **options)
        stops, stop_strings = _default_stops(hf, base_of(source) or source)
        tokenizer = cls(hf, stops, stop_strings=stop_strings, **options).with_stop(stop)
        if not (tokenizer.stops or tokenizer.stop_strings):
            raise RequestError(
                f"model is {str(source)!r}: it names no stop id; give one with --stop, or --fixed-length N"
            )
        return tokenizer

    def with_stop(self, stop: Sequence[str]) -> Tokenizer:
        """This tokenizer with other ends. An entry that is one token (`</s>`, a newline, an id in digits) is a stop id, and
        those named replace its own. A longer text is a stop string, which ends a completion besides the stop ids.

        Raises:
            RequestError: a text that the tokenizer never writes as it is.
        """
        if not stop:
            return self
        ids = {entry: _token_id(self.hf, entry) for entry in stop}
        stop_strings = tuple(entry for entry, token in ids.items() if token is None)
        for entry in stop_strings:
            decoded = self._decode_after(
                self.hf.encode("a", add_special_tokens=False), _encode_without_prefix(self.hf, entry)
            )
            if not entry or entry not in decoded:
                raise RequestError(
                    f"stop is {entry!r}: must be one token, as text or id, or a text as completions have it, but that one "
                    f"reads {decoded!r} in this tokenizer (special tokens are text only with keep_special_tokens)"
                )
        stops = frozenset(token for token in ids.values() if token is not None)
        return replace(self, stops=stops or self.stops, stop_strings=stop_strings)

    def with_template_arguments(self, row: Mapping[str, Any]) -> Tokenizer:
        """This tokenizer with what a row of data has for the chat template: `tools`, a list of their JSON schemas;
        `enable_thinking`; and `chat_template_kwargs`, an object of further arguments. Lists and objects may be JSON text.

        Raises:
            RequestError: one of them is of another form.
        """
        arguments = dict(_parse_json_cell("chat_template_kwargs", row.get("chat_template_kwargs"), dict) or {})
        if reserved := RESERVED & arguments.keys():
            raise RequestError(f"chat_template_kwargs has {min(reserved)!r}, which is set by the library: leave it out")
        if (tools := _parse_json_cell("tools", row.get("tools"), list)) is not None:
            arguments["tools"] = tools
        if (thinking := row.get("enable_thinking")) not in (None, ""):
            if (lowered := str(thinking).strip().lower()) not in ("true", "false"):
                raise RequestError(f"enable_thinking is {thinking!r}: must be true or false")
            arguments["enable_thinking"] = lowered == "true"
        return replace(self, template_arguments=arguments) if arguments else self

    def unused_arguments(self, names: Sequence[str]) -> list[str]:
        """Those of some arguments that the chat template never names."""
        chat_template = str(self.hf.chat_template or "")
        return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", chat_template)]

    @property
    def bos_token_id(self) -> int | None:
        return cast("int | None", self.hf.bos_token_id)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text: BOS, or nothing."""
        ids = self.hf.encode("a", verbose=False)[:1]
        return ids if ids == [self.bos_token_id] else []

    @property
    def stop_token_id(self) -> int | None:
        """The stop id that is put behind a text that has none: EOS if it is a stop, else the lowest."""
        return self.hf.eos_token_id if self.hf.eos_token_id in self.stops else min(self.stops, default=None)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Text: what `tokenizer(text)` gives, with one BOS or none, and without an end; "" is BOS alone.

        Chat: as the template has it, up to where the assistant begins to speak; of several BOS in front one is kept. An
        assistant's message at the end is not closed: its words follow the call to speak, and the policy continues them.
        """
        if isinstance(prompt, str):
            ids = self._encode_with_bos(prompt) or ([] if self.bos_token_id is None else [self.bos_token_id])
        else:
            ids = self._encode_rendered(
                self._render_prefill(prompt)
                if _is_prefill(prompt)
                else self._render(prompt, add_generation_prompt=True)
            )
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
            prompt_ids, all_ids = self._encode_with_bos(prompt), self._encode_with_bos(prompt + completion)
            ids = (
                all_ids[len(prompt_ids) :]
                if all_ids[: len(prompt_ids)] == prompt_ids
                else _encode_without_prefix(self.hf, completion)
            )
        else:
            if isinstance(prompt, str):
                raise RequestError("the completion is chat and its prompt is text: give both as text or both as chat")
            prompt_ids = self.encode_prompt(prompt)
            all_ids = self._encode_rendered(
                self._render(_join_messages(prompt, completion), add_generation_prompt=False)
            )
            extends_prompt = all_ids[: len(prompt_ids)] == prompt_ids
            ids = self._cut_after_stop(
                all_ids[len(prompt_ids) :]
                if extends_prompt
                else _encode_without_prefix(self.hf, self._render_answer(prompt, completion))
            )
        return ids if self.stop_token_id is None or (ids and ids[-1] in self.stops) else [*ids, self.stop_token_id]

    def encode_turn(self, before: Messages, messages: Messages, *, is_closed: bool = True) -> list[int]:
        """The ids between an assistant's turn, which came after `before`, and its next: `messages`, and the call to speak.

        They are the end of a render in which the assistant says something else, to be put behind the ids there are. So
        nothing that was sampled is tokenized again, nor lost to a template that would now write earlier turns otherwise.
        The stop id that ended the turn is not among them; where none did (not `is_closed`), the turn's end is.
        """
        ids = _encode_without_prefix(
            self.hf, self._render_around_answer(before, messages, add_generation_prompt=True)[1]
        )
        if not is_closed:
            return ids
        end_ids = _encode_without_prefix(
            self.hf, self._render_around_answer(before, [], add_generation_prompt=False)[1]
        )
        stop_end = next((t + 1 for t, token in enumerate(ids) if token in self.stops), 0)
        has_ended = ids[:stop_end] == end_ids[:stop_end] or not self._decode(ids[: stop_end - 1]).strip()
        return ids[stop_end:] if stop_end and has_ended else ids

    def encode_turn_end(self) -> list[int]:
        """What the chat template writes behind an assistant's words, white space apart; [] where it writes nothing."""
        end_text = self._render_around_answer([{"role": "user", "content": "?"}], [], add_generation_prompt=False)[
            1
        ].strip()
        return _encode_without_prefix(self.hf, end_text) if end_text else []

    def encode_text(self, text: str) -> list[int]:
        """Text that is put behind other ids, as it is: no BOS, no stop."""
        return _encode_without_prefix(self.hf, text)

    def decode_continuation(self, before: Sequence[int], ids: Sequence[int], *, turn_start: int = 0) -> str:
        """The text of ids as it stands behind others': some tokenizers drop the blank in front of a text.

        Neither a stop id at their end nor a stop string that the last of them completes, begun in the turn that begins at
        the id number `turn_start`, is part of it.
        """
        prefix_text, full_text = self._decode_text(list(before)), self.decode([*before, *ids])
        text = full_text[len(prefix_text) :] if full_text.startswith(prefix_text) else self.decode(ids)
        return text[: len(text) - self.find_stop_string([*before, *ids[:turn_start]], ids[turn_start:])[1]]

    def find_stop_string(self, before: Sequence[int], ids: Sequence[int]) -> tuple[str, int]:
        """The stop string that the last of ids completes, and how many characters before the end of their text it begins.

        ("", 0) where there is none.
        """
        if not (self.stop_strings and ids) or ids[-1] in self.stops:
            return "", 0
        text, previous_text = self._decode_after(before, ids), self._decode_after(before, ids[:-1])
        matches = [
            (match.start(), string)
            for string in self.stop_strings
            for match in re.finditer(f"(?={re.escape(string)})", text)
            if not previous_text.startswith(string, match.start())
        ]
        start, string = min(matches, default=(len(text), ""))
        return string, len(text) - start

    def ends_with_stop_string(self, before: Sequence[int], ids: Sequence[int]) -> bool:
        """Whether the last of ids completes a stop string. Only the end of them is decoded: a token that writes anything
        writes a byte at least."""
        if ids[-1] in self._skipped_ids:
            return False
        max_ids = max(len(string.encode()) for string in self.stop_strings) + MARGIN_TOKENS
        last_ids = self._last_written_ids(ids, max_ids)
        return bool(
            self.find_stop_string(
                self._last_written_ids(before, MARGIN_TOKENS) if len(last_ids) < max_ids else [], last_ids
            )[0]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text without the stop it ends with, and without special tokens unless they are to be kept."""
        ids = list(ids)
        while ids and ids[-1] in self.stops:
            ids.pop()
        return self._decode_text(ids)

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, special ones by name, leading blanks kept; for displays."""
        before = self.hf.encode("a", add_special_tokens=False)
        prefix_text = self._decode(before)
        decoded = {i: self._decode([*before, i]) for i in set(ids)}
        texts = {
            i: t[len(prefix_text) :] if t.startswith(prefix_text) else self._decode([i]) for i, t in decoded.items()
        }
        return [texts[i] for i in ids]

    def save(self, path: str | Path) -> None:
        """Everything `load` needs, the template included; stop ids belong in the model's generation_config.json."""
        self.hf.save_pretrained(path)

    @cached_property
    def _skipped_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special}
        return frozenset() if self.keep_special_tokens else frozenset({*special, *self.hf.all_special_ids})

    def _last_written_ids(self, ids: Sequence[int], max_ids: int) -> list[int]:
        """The last ids that are written as text, `max_ids` of them."""
        return [*islice((i for i in reversed(ids) if i not in self._skipped_ids), max_ids)][::-1]

    def _decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """All the text of ids as it stands behind others, stops included."""
        prefix_text, full_text = self._decode_text(list(before)), self._decode_text([*before, *ids])
        return full_text[len(prefix_text) :] if full_text.startswith(prefix_text) else self._decode_text(list(ids))

    def _decode_text(self, ids: list[int]) -> str:
        return self._decode(ids, skip_special_tokens=not self.keep_special_tokens)

    def _decode(self, ids: list[int], **options: Any) -> str:
        return str(self.hf.decode(ids, clean_up_tokenization_spaces=False, **options))

    def _encode_with_bos(self, text: str) -> list[int]:
        return self._drop_repeated_bos(
            [*self.prefix_ids, *self.hf.encode(text, add_special_tokens=False, verbose=False)]
        )

    def _encode_rendered(self, rendered: str) -> list[int]:
        """The ids of what a chat template wrote."""
        return self._drop_repeated_bos(self.hf.encode(rendered, add_special_tokens=False, verbose=False))

    def _render_prefill(self, messages: Messages) -> str:
        """A chat up to the words of the assistant's last message, which is not closed."""
        *before, last_message = messages
        if last_message.get("tool_calls"):
            raise RequestError(
                "the prompt ends with tool calls of the assistant: add the tool's answer, or leave them out"
            )
        generation_prompt, text_before = (
            self._render(before, add_generation_prompt=True),
            self._render_around_answer(before, [], add_generation_prompt=False)[0],
        )
        blank = text_before.removeprefix(generation_prompt) if text_before.startswith(generation_prompt) else ""
        return generation_prompt + (blank if blank.isspace() else "") + last_message["content"]

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        if not self.hf.chat_template:
            raise RequestError(
                "the data are chat and the tokenizer has no chat template: give one with --chat-template FILE"
            )
        try:
            with limit_resources():
                text = self.hf.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, tokenize=False, **self.template_arguments
                )
            if len(str(text)) > MAX_RENDERED_CHARACTERS:
                raise ValueError(f"it writes more than {MAX_RENDERED_CHARACTERS:,} characters")
            return str(text)
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise RequestError(
                f"the chat template never ends or grows without bound ({error}): {TEMPLATE_HINT}"
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise RequestError(f"the chat template refuses messages of roles {roles}: {error}") from None

    def _render_around_answer(
        self, before: Messages, after: Messages, *, add_generation_prompt: bool
    ) -> tuple[str, str]:
        """What the chat template writes before an assistant's words between `before` and `after`, and what behind them."""
        messages = [*_join_messages(before, [{"role": "assistant", "content": PLACEHOLDER_ANSWER}]), *after]
        text = (
            self._render_prefill(messages)
            if add_generation_prompt and _is_prefill(after)
            else self._render(messages, add_generation_prompt=add_generation_prompt)
        )
        if text.count(PLACEHOLDER_ANSWER) != 1:
            raise RequestError(
                "the chat template does not write each of the assistant's turns once, so that what stands before and "
                "behind one cannot be told: give another with --chat-template"
            )
        text_before, _, text_after = text.partition(PLACEHOLDER_ANSWER)
        return text_before, text_after

    def _render_answer(self, prompt: Messages, completion: Messages) -> str:
        """What the chat template writes after the call to speak, which it writes in a prompt that ends with it."""
        messages = _join_messages(prompt, completion)
        prefill = str(prompt[-1]["content"]) if _is_prefill(prompt) else ""
        prompt_messages = prompt[:-1] if _is_prefill(prompt) else prompt
        generation_prompt = self._render(prompt_messages, add_generation_prompt=True).removeprefix(
            self._render(prompt_messages, add_generation_prompt=False)
        )
        text_before, _ = self._render_around_answer(prompt_messages, completion[1:], add_generation_prompt=False)
        answer_start = (
            text_before.rindex(generation_prompt) + len(generation_prompt)
            if generation_prompt in text_before
            else len(text_before)
        )
        text = self._render(messages, add_generation_prompt=False)
        _, rendered_prefill, answer = (
            text[answer_start:].partition(prefill) if prefill else ("", "", text[answer_start:])
        )
        if text[:answer_start] != text_before[:answer_start] or rendered_prefill != prefill:
            raise RequestError(
                "the chat template writes the prompt otherwise for every answer, so that what is learned from is not what "
                "is sampled: give a template that does not with --chat-template"
            )
        return answer

    def _drop_repeated_bos(self, ids: list[int]) -> list[int]:
        while self.bos_token_id is not None and ids[:2] == [self.bos_token_id, self.bos_token_id]:
            ids = ids[1:]
        return ids

    def _cut_after_stop(self, ids: list[int]) -> list[int]:
        """Up to the last stop id, where the template writes only white space after it."""
        end = max((t + 1 for t, token in enumerate(ids) if token in self.stops), default=0)
        return ids[:end] if end and not self._decode(ids[end:]).strip() else ids


MAX_RENDERED_CHARACTERS = 50_000_000
"""Characters that a chat template may write of one chat."""
TEMPLATE_HINT = "give another with --chat-template FILE"

RESERVED = {"conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding"}
RESERVED |= {"truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
"""Arguments of `apply_chat_template` that are not the template's."""


def _is_prefill(messages: Messages) -> bool:
    """Whether a chat ends with words of the assistant, which it is to continue."""
    return bool(messages) and messages[-1]["role"] == "assistant"


def _join_messages(before: Messages, after: Messages) -> Messages:
    """A chat and what follows it; the assistant's words that it ends with become the beginning of those that follow."""
    if not (_is_prefill(before) and after and after[0]["role"] == "assistant"):
        return [*before, *after]
    return [*before[:-1], {**after[0], "content": f"{before[-1]['content']}{after[0]['content']}"}, *after[1:]]


def _parse_json_cell(name: str, cell: Any, expected_type: type) -> Any:
    """A list or object, which may be written as JSON; None where there is none."""
    if cell is None or cell == "":
        return None
    with suppress(ValueError, RecursionError):
        cell = json.loads(cell) if isinstance(cell, str) else cell
    if not isinstance(cell, expected_type) or is_deep(cell):
        raise RequestError(
            f"{name} is {format_value(cell)[:40]}: must be {'a list' if expected_type is list else 'an object'}, or its JSON"
        )
    return cell


def _begin_with_bos(hf: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer put BOS before every text, as its own doing, which is saved with it."""
    backend: Any = getattr(hf, "backend_tokenizer", None)
    if hf.bos_token is None or backend is None:
        problem = "has no BOS" if hf.bos_token is None else "cannot be changed"
        raise RequestError(f"add_bos is True, but the tokenizer {problem}: leave out --add-bos")
    if hf.encode("a", verbose=False)[:1] == [hf.bos_token_id]:
        return
    bos = TemplateProcessing(single=f"{hf.bos_token} $A", special_tokens=[(hf.bos_token, hf.bos_token_id)])
    post_processor = backend.post_processor
    backend.post_processor = bos if post_processor is None else processors.Sequence([post_processor, bos])


def _load_chat_template(hf: PreTrainedTokenizerBase, chat_template: str) -> str:
    """The text of a template, from a file where it is no text itself; tried once, for its grammar."""
    text = chat_template
    if "{{" not in chat_template and "{%" not in chat_template:
        if not Path(chat_template).is_file():
            raise RequestError(
                f"chat_template is {chat_template!r}: unknown template, neither a file nor Jinja; give one of them"
            )
        text = Path(chat_template).read_text(encoding="utf-8")
    try:
        with limit_resources():
            hf.apply_chat_template([{"role": "user", "content": "?"}], chat_template=text, tokenize=False)
    except (TimeoutError, MemoryError, RecursionError) as error:
        raise RequestError(
            f"chat_template is {chat_template[:40]!r}, which never ends or grows without bound ({error}): {TEMPLATE_HINT}"
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"chat_template is {chat_template[:40]!r}: not Jinja in line {error.lineno} ({error.message})"
        ) from None
    except jinja2.TemplateError:
        pass  # it asks for other messages than this one
    return text


def _default_stops(hf: PreTrainedTokenizerBase, source: str | Path) -> tuple[frozenset[int], tuple[str, ...]]:
    eos_ids: Any = None
    stop_strings: Any = None
    with suppress(OSError):  # it has no generation_config.json
        config = GenerationConfig.from_pretrained(source)
        eos_ids, stop_strings = config.eos_token_id, config.stop_strings
    eos_ids = hf.eos_token_id if eos_ids is None else eos_ids
    stops = frozenset() if eos_ids is None else frozenset(eos_ids if isinstance(eos_ids, list) else [eos_ids])
    return stops, (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())


def _token_id(hf: PreTrainedTokenizerBase, entry: str) -> int | None:
    """The id of one token, named by its digits, its entry in the vocabulary or its text; None for a text of several."""
    vocabulary = hf.get_vocab()
    if entry.isdecimal():
        if int(entry) <= (highest := max(vocabulary.values())):
            return int(entry)
        raise RequestError(f"stop is {entry}: the vocabulary has ids from 0 to {highest}")
    if entry in vocabulary:
        return vocabulary[entry]
    for ids in (hf.encode(entry, add_special_tokens=False), _encode_without_prefix(hf, entry)):
        if len(ids) == 1 and ids[0] != hf.unk_token_id:
            return ids[0]
    return None


def _encode_without_prefix(hf: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of text that is not the first: without the blank that some tokenizers put in front of a text."""
    before, all_ids = (hf.encode(t, add_special_tokens=False, verbose=False) for t in ("\n", "\n" + text))
    is_stable = all_ids[: len(before)] == before
    return all_ids[len(before) :] if is_stable else hf.encode(text, add_special_tokens=False, verbose=False)
