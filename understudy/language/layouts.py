"""Layouts of published data, brought into our columns. What was read as what becomes a sentence for the user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from understudy.language.data import Row, at_row, column_names
from understudy.run.config import RequestError, is_deep

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
SPEAKERS |= {"observation": "tool", "function_response": "tool", "function_call": "assistant"}
"""Roles of ShareGPT's `from`; any other stays as it is."""


class Arranged(NamedTuple):
    """Rows in our columns, and sentences about what was brought there."""

    rows: Sequence[Row]
    notes: list[str]


def arrange(rows: Sequence[Row], *, chat: bool, conversations: str | None = "messages") -> Arranged:
    """Rows with the columns of ShareGPT (`conversations`) and Alpaca (`instruction`, `input`, `output`) under our names.

    Args:
        chat: whether there is a chat template: Alpaca's instructions then are a user's turn, and else a line of text.
        conversations: our name for the column of ShareGPT; None where it is not wanted.
    """
    there, notes = {*column_names(rows)}, []
    source = next((name for name in ("conversations", "conversation") if name in there), None)
    if source is not None and conversations is not None and conversations not in there:
        rows = [{conversations if name == source else name: cell for name, cell in row.items()} for row in rows]
        notes.append(f"the column {source!r} (ShareGPT) is read as {conversations!r}")
    if {"instruction", "output"} <= there and not there & {"prompt", "completion", "text", "messages", "chosen"}:
        rows = [_alpaca(row, chat) for row in rows]
        columns = "'instruction' and 'input'" if "input" in there else "'instruction'"
        notes.append(f"the columns {columns} (Alpaca) are read as the prompt, 'output' as the completion")
    return Arranged(rows, notes)


def read_cells(rows: Sequence[Row], texts: Sequence[str]) -> Arranged:
    """Rows whose cells of text or chat have one form, and whose prompts are apart from what follows them.

    Messages written as JSON become messages, where they are a list of complete ones; their parts of text become one; text
    beside a chat becomes a message of it; a prompt that is repeated at the beginning of what follows it is taken out there.

    Raises:
        RequestError: a message has something other than text; some rows repeat their prompt and others do not.
    """
    made = []
    for number, row in enumerate(rows, 1):
        with at_row(number):
            made.append({**row, **{name: _cell(name, row[name]) for name in texts if name in row}})
    sides = [name for name in texts if name != "prompt"]
    if "prompt" not in texts or not sides:
        return Arranged(made, [])
    made, notes = _one_kind(made, sides)
    repeated = [_repeats(row, sides) for row in made]
    chat = any(isinstance(row.get("prompt"), list) for row in made)
    if not any(repeated) or (not chat and sum(repeated) <= len(made) / 2):
        return Arranged(made, notes)
    if not all(repeated):
        number, name = repeated.index(False) + 1, " and ".join(sides)
        raise RequestError(
            f"row {number}: {name} does not begin with its prompt, as {sum(repeated)} of the {len(made)} rows do: "
            "take the prompt out of all of them, or leave out the column 'prompt'"
        )
    notes.append(f"{' and '.join(sides)} begin with their prompt in every row: it is read once")
    return Arranged([{**row, **{name: row[name][len(row["prompt"]) :] for name in sides}} for row in made], notes)


def _alpaca(row: Row, chat: bool) -> Row:
    asked = "\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    if not chat:
        return row | {"prompt": f"{asked}\n" if asked else "", "completion": row.get("output")}
    answer = [{"role": "assistant", "content": row.get("output")}]
    return row | {"prompt": [{"role": "user", "content": asked}], "completion": answer}


def _cell(name: str, cell: Any) -> Any:
    """A cell of text, or the messages that it holds."""
    if isinstance(cell, str) and cell.lstrip()[:1] == "[":
        with suppress(ValueError, RecursionError):
            cell = found if _is_written_chat(found := json.loads(cell)) else cell
    messages: Any = [cell] if isinstance(cell, dict) else cell
    if name == "messages" and isinstance(cell, str) and cell.strip():
        raise RequestError(f"messages is {cell[:40]!r}: must be a list of messages, or its JSON")
    return [_message(name, at, one) for at, one in enumerate(messages, 1)] if _is_chat(messages) else cell


def _is_chat(cell: Any) -> bool:
    several: list[Any] = [cell] if isinstance(cell, dict) else cell if isinstance(cell, list) else []
    return bool(several) and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in several)


def _is_written_chat(found: Any) -> bool:
    """Whether the JSON in a cell of text is a chat: a list of messages with a role and a content or tool calls, or with
    ShareGPT's from and value. Any other JSON is text like any other."""
    return isinstance(found, list) and bool(found) and not is_deep(found) and all(map(_is_written_message, found))


def _is_written_message(one: Any) -> bool:
    if not isinstance(one, dict):
        return False
    speaker, said = (one.get(name) for name in (("role", "content") if "role" in one else ("from", "value")))
    return isinstance(speaker, str) and (isinstance(said, str | list) or (said is None and bool(one.get("tool_calls"))))


def _message(name: str, number: int, given: dict[str, Any]) -> dict[str, Any]:
    """A message as templates have it: a role, text as content, and nothing that is None."""
    message = {key: x for key, x in given.items() if x is not None and key not in ("from", "value")}
    if "role" not in given:
        speaker = str(given.get("from"))
        message = {"role": SPEAKERS.get(speaker, speaker), "content": given.get("value"), **message}
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("reasoning_content")):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(name, number, part) for part in content)
    if not isinstance(content, str):
        raise RequestError(
            f"{name} is {str(given)[:60]}: message {number} has no text; each message must be an object with a role and "
            "a content, or with tool_calls"
        )
    return {**message, "content": content}


def _part(name: str, number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(
        f"{name} has a part of {str(kind)!r} in message {number}: only text can be read; leave the row out"
    )


def _one_kind(rows: Sequence[Row], sides: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Rows whose prompt is chat where what follows is, and the other way round."""
    made, count, notes = [], {"text": 0, "chat": 0}, []
    for number, row in enumerate(rows, 1):
        prompt, cells = row.get("prompt"), [row.get(name) for name in sides]
        if isinstance(prompt, str) and prompt.strip() and all(isinstance(cell, list) and cell for cell in cells):
            with at_row(number):
                row, count["text"] = {**row, "prompt": _asked(prompt, cells, sides)}, count["text"] + 1
        elif isinstance(prompt, list) and prompt and all(isinstance(cell, str) and cell.strip() for cell in cells):
            answers = {name: [{"role": "assistant", "content": row[name]}] for name in sides}
            row, count["chat"] = {**row, **answers}, count["chat"] + 1
        made.append(row)
    if count["text"]:
        notes.append(f"the prompt is text and {' and '.join(sides)} chat: it is read as what the user says in them")
    if count["chat"]:
        notes.append(f"the prompt is chat and {' and '.join(sides)} text: it is read as what the assistant says")
    return made, notes


def _asked(prompt: str, cells: Sequence[Any], sides: Sequence[str]) -> Any:
    """The messages that a prompt of text stands for: those before the answers, or one of the user's."""
    first, longest = cells[0], min(map(len, cells)) - 1
    asked = first[: next((at for at in range(longest) if any(cell[at] != first[at] for cell in cells)), longest)]
    if not asked:
        return [{"role": "user", "content": prompt}]
    if not any(one["content"].strip() == prompt.strip() for one in asked):
        raise RequestError(
            f"the prompt is text that {' and '.join(sides)} do not hold: give it as messages, or leave it out"
        )
    return asked


def _repeats(row: Row, sides: Sequence[str]) -> bool:
    """Whether everything that follows a prompt begins with it and goes on."""
    prompt, cells = row.get("prompt"), [row.get(name) for name in sides]
    if not prompt or not all(isinstance(cell, type(prompt)) for cell in cells):
        return False
    return all(len(cell) > len(prompt) and cell[: len(prompt)] == prompt for cell in cells if cell is not None)
