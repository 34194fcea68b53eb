"""Layouts of published data, brought into our columns. What was read as what becomes a sentence for the user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from understudy.language.data.files import Row, column_names, errors_at_row
from understudy.run.config import RequestError, is_deep

ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLE_NAMES |= {"observation": "tool", "function_response": "tool", "function_call": "assistant"}
"""Roles of ShareGPT's `from`; any other stays as it is."""


class ConvertedRows(NamedTuple):
    """Rows in our columns, and sentences about what was brought there."""

    rows: Sequence[Row]
    notes: list[str]


def convert_layout(
    rows: Sequence[Row], *, has_chat_template: bool, conversation_column: str | None = "messages"
) -> ConvertedRows:
    """Rows with the columns of ShareGPT (`conversations`) and Alpaca (`instruction`, `input`, `output`) under our names.

    Args:
        has_chat_template: whether there is a chat template: Alpaca's instructions then are a user's turn, and else a
            line of text.
        conversation_column: our name for the column of ShareGPT; None where it is not wanted.
    """
    available, notes = {*column_names(rows)}, []
    source = next((name for name in ("conversations", "conversation") if name in available), None)
    if source is not None and conversation_column is not None and conversation_column not in available:
        rows = [{conversation_column if name == source else name: cell for name, cell in row.items()} for row in rows]
        notes.append(f"the column {source!r} (ShareGPT) is read as {conversation_column!r}")
    if {"instruction", "output"} <= available and not available & {
        "prompt",
        "completion",
        "text",
        "messages",
        "chosen",
    }:
        rows = [_convert_alpaca(row, has_chat_template) for row in rows]
        columns = "'instruction' and 'input'" if "input" in available else "'instruction'"
        notes.append(f"the columns {columns} (Alpaca) are read as the prompt, 'output' as the completion")
    return ConvertedRows(rows, notes)


def normalize_cells(rows: Sequence[Row], text_columns: Sequence[str]) -> ConvertedRows:
    """Rows whose cells of text or chat have one form, and whose prompts are apart from what follows them.

    Messages written as JSON become messages, where they are a list of complete ones; their parts of text become one; text
    beside a chat becomes a message of it; a prompt that is repeated at the beginning of what follows it is taken out there.

    Raises:
        RequestError: a message has something other than text; some rows repeat their prompt and others do not.
    """
    converted = []
    for number, row in enumerate(rows, 1):
        with errors_at_row(number):
            converted.append(
                {**row, **{name: _normalize_cell(name, row[name]) for name in text_columns if name in row}}
            )
    completion_columns = [name for name in text_columns if name != "prompt"]
    if "prompt" not in text_columns or not completion_columns:
        return ConvertedRows(converted, [])
    converted, notes = _match_prompt_format(converted, completion_columns)
    repeats_prompt = [_repeats_prompt(row, completion_columns) for row in converted]
    is_chat = any(isinstance(row.get("prompt"), list) for row in converted)
    if not any(repeats_prompt) or (not is_chat and sum(repeats_prompt) <= len(converted) / 2):
        return ConvertedRows(converted, notes)
    if not all(repeats_prompt):
        number, name = repeats_prompt.index(False) + 1, " and ".join(completion_columns)
        raise RequestError(
            f"row {number}: {name} does not begin with its prompt, as {sum(repeats_prompt)} of the "
            f"{len(converted)} rows do: "
            "take the prompt out of all of them, or leave out the column 'prompt'"
        )
    notes.append(f"{' and '.join(completion_columns)} begin with their prompt in every row: it is read once")
    return ConvertedRows(
        [{**row, **{name: row[name][len(row["prompt"]) :] for name in completion_columns}} for row in converted], notes
    )


def _convert_alpaca(row: Row, has_chat_template: bool) -> Row:
    question = "\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    if not has_chat_template:
        return row | {"prompt": f"{question}\n" if question else "", "completion": row.get("output")}
    answer = [{"role": "assistant", "content": row.get("output")}]
    return row | {"prompt": [{"role": "user", "content": question}], "completion": answer}


def _normalize_cell(name: str, cell: Any) -> Any:
    """A cell of text, or the messages that it holds."""
    if isinstance(cell, str) and cell.lstrip()[:1] == "[":
        with suppress(ValueError, RecursionError):
            cell = parsed if _is_written_chat(parsed := json.loads(cell)) else cell
    messages: Any = [cell] if isinstance(cell, dict) else cell
    if name == "messages" and isinstance(cell, str) and cell.strip():
        raise RequestError(f"messages is {cell[:40]!r}: must be a list of messages, or its JSON")
    return (
        [_normalize_message(name, number, message) for number, message in enumerate(messages, 1)]
        if _is_chat(messages)
        else cell
    )


def _is_chat(cell: Any) -> bool:
    messages: list[Any] = [cell] if isinstance(cell, dict) else cell if isinstance(cell, list) else []
    return bool(messages) and all(
        isinstance(message, dict) and ("role" in message or "from" in message) for message in messages
    )


def _is_written_chat(found: Any) -> bool:
    """Whether the JSON in a cell of text is a chat: a list of messages with a role and a content or tool calls, or with
    ShareGPT's from and value. Any other JSON is text like any other."""
    return isinstance(found, list) and bool(found) and not is_deep(found) and all(map(_is_written_message, found))


def _is_written_message(one: Any) -> bool:
    if not isinstance(one, dict):
        return False
    speaker, said = (one.get(name) for name in (("role", "content") if "role" in one else ("from", "value")))
    return isinstance(speaker, str) and (isinstance(said, str | list) or (said is None and bool(one.get("tool_calls"))))


def _normalize_message(name: str, number: int, raw: dict[str, Any]) -> dict[str, Any]:
    """A message as templates have it: a role, text as content, and nothing that is None."""
    message = {key: x for key, x in raw.items() if x is not None and key not in ("from", "value")}
    if "role" not in raw:
        sender = str(raw.get("from"))
        message = {"role": ROLE_NAMES.get(sender, sender), "content": raw.get("value"), **message}
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("reasoning_content")):
        content = ""
    if isinstance(content, list):
        content = "".join(_part_text(name, number, part) for part in content)
    if not isinstance(content, str):
        raise RequestError(
            f"{name} is {str(raw)[:60]}: message {number} has no text; each message must be an object with a role and "
            "a content, or with tool_calls"
        )
    return {**message, "content": content}


def _part_text(name: str, number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(
        f"{name} has a part of {str(kind)!r} in message {number}: only text can be read; leave the row out"
    )


def _match_prompt_format(rows: Sequence[Row], completion_columns: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Rows whose prompt is chat where what follows is, and the other way round."""
    converted, counts, notes = [], {"text": 0, "chat": 0}, []
    for number, row in enumerate(rows, 1):
        prompt, cells = row.get("prompt"), [row.get(name) for name in completion_columns]
        if isinstance(prompt, str) and prompt.strip() and all(isinstance(cell, list) and cell for cell in cells):
            with errors_at_row(number):
                row, counts["text"] = (
                    {**row, "prompt": _shared_prompt_messages(prompt, cells, completion_columns)},
                    counts["text"] + 1,
                )
        elif isinstance(prompt, list) and prompt and all(isinstance(cell, str) and cell.strip() for cell in cells):
            answers = {name: [{"role": "assistant", "content": row[name]}] for name in completion_columns}
            row, counts["chat"] = {**row, **answers}, counts["chat"] + 1
        converted.append(row)
    if counts["text"]:
        notes.append(
            f"the prompt is text and {' and '.join(completion_columns)} chat: it is read as what the user says in them"
        )
    if counts["chat"]:
        notes.append(
            f"the prompt is chat and {' and '.join(completion_columns)} text: it is read as what the assistant says"
        )
    return converted, notes


def _shared_prompt_messages(prompt: str, cells: Sequence[Any], completion_columns: Sequence[str]) -> Any:
    """The messages that a prompt of text stands for: those before the answers, or one of the user's."""
    first_cell, max_shared = cells[0], min(map(len, cells)) - 1
    prompt_messages = first_cell[
        : next(
            (
                position
                for position in range(max_shared)
                if any(cell[position] != first_cell[position] for cell in cells)
            ),
            max_shared,
        )
    ]
    if not prompt_messages:
        return [{"role": "user", "content": prompt}]
    if not any(message["content"].strip() == prompt.strip() for message in prompt_messages):
        raise RequestError(
            f"the prompt is text that {' and '.join(completion_columns)} do not hold: give it as messages, or leave it out"
        )
    return prompt_messages


def _repeats_prompt(row: Row, completion_columns: Sequence[str]) -> bool:
    """Whether everything that follows a prompt begins with it and goes on."""
    prompt, cells = row.get("prompt"), [row.get(name) for name in completion_columns]
    if not prompt or not all(isinstance(cell, type(prompt)) for cell in cells):
        return False
    return all(len(cell) > len(prompt) and cell[: len(prompt)] == prompt for cell in cells if cell is not None)
