"""Step 1, sample: the policy and others speak in turn; what others say is read, and never learned from."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from understudy.language.generate import Completion
from understudy.language.judge import Sampled, columns_of, taken
from understudy.language.text import Messages, Prompt, Tokenizer
from understudy.language.worker import Fault, InProcess, Worker
from understudy.run.config import RequestError
from understudy.run.origin import listed

Speak = Callable[..., list[Completion]]
"""Continues ids: (prompts, seeds=..., starts=...) -> completions, as `generate` does."""


class Reply:
    """What others say after a turn of the policy: a function of the user's, in process or in a worker.

    It is given what a judge is given, of the rows as they stand, and `stop`: the text of the token, or the stop string, that
    ended each turn. For each row it says None, which ends it; text or ids, which are put behind it as they are; or, in a
    chat, the next message or messages, which the template writes.
    """

    def __init__(self, spec: Any, *, timeout: float) -> None:
        """spec: `file.py:function`, or a Python function.  timeout: seconds a file's function may take for a batch.

        Raises:
            RequestError: there is no such function.
        """
        self.spec = spec
        call = getattr(spec, "call", spec)
        if callable(call):
            self.asked: InProcess | Worker = InProcess(call, says="replies")
            return
        file, _, function = str(spec).rpartition(":")
        if not (file.endswith(".py") and os.path.isfile(file) and function):
            known = listed(str(spec).removesuffix(":"), ast.FunctionDef)
            raise RequestError(
                f"reply is {spec!r}: must be file.py:function of a file that exists, or a Python function{known}"
            )
        try:
            self.asked = Worker(file, function, timeout=timeout, says="replies")
        except Fault as fault:
            raise RequestError(f"reply is {spec!r}: it cannot be imported ({fault.message}); mend the file") from fault

    def __call__(self, sampled: Sampled, stops: list[str]) -> list[Any]:
        """One reply a row.

        Raises:
            RequestError: the function failed, or said something else. A tool that may fail says so in its reply.
        """
        try:
            said = self.asked.ask(taken(self.asked.wants, {**columns_of(sampled), "stop": stops}))
        except RequestError as error:
            raise RequestError(f"reply is {self.spec!r}: {error}") from None
        except Fault as fault:
            what = f"{fault.message}; let it answer with the error instead"
            raise RequestError(f"reply is {self.spec!r}: {what}") from fault
        if len(said) != len(sampled):
            raise RequestError(
                f"reply is {self.spec!r}: it gave {len(said)} replies to {len(sampled)} rows; give one each"
            )
        return said

    def close(self) -> None:
        """End the worker."""
        self.asked.close()


@dataclass
class _Row:
    """A completion in the making."""

    prompt: Prompt
    seed: int
    ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    messages: Messages = field(default_factory=list)
    stopped: bool = False
    version: int = 0

    def take(self, said: Completion, tokenizer: Tokenizer) -> None:
        """A turn of the policy's."""
        self.messages.append({"role": "assistant", "content": self._text(said.ids, tokenizer)})
        self.ids, self.logprob = [*self.ids, *said.ids], [*self.logprob, *said.logprob]
        self.chosen += [True] * len(said.ids)
        self.stopped, self.version = said.stopped, said.version

    def hear(self, answer: Any, tokenizer: Tokenizer, reply: Reply, limit: int) -> bool:
        """A turn of another's; False where it leaves the policy no room, and the row is cut."""
        ids, messages = self._written(answer, tokenizer, reply)
        if len(self.ids) + len(ids) >= limit:
            self.stopped = False
            return False
        self.ids, self.logprob = [*self.ids, *ids], [*self.logprob, *[0.0] * len(ids)]
        self.chosen += [False] * len(ids)
        self.messages += messages
        return True

    def _written(self, answer: Any, tokenizer: Tokenizer, reply: Reply) -> tuple[list[int], Messages]:
        """What another said, as ids and as messages."""
        several: list[Any] = answer if isinstance(answer, list) else [answer]
        if isinstance(answer, str):
            return tokenizer.encode_text(answer), [{"role": "tool", "content": answer}]
        if all(type(one) is int for one in several):
            return several, [{"role": "tool", "content": self._text(several, tokenizer)}]
        if not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in several):
            raise RequestError(f"reply is {reply.spec!r}: it gave {answer!r}; give text, ids, messages or None")
        if isinstance(self.prompt.text, str):
            raise RequestError(f"reply is {reply.spec!r}: it gave a message to a prompt of text; give text or ids")
        before = [*self.prompt.text, *self.messages[:-1]]
        closed = self.ids[-1] in tokenizer.stops
        return tokenizer.for_row(self.prompt.columns).encode_turn(before, several, closed=closed), several

    def stop(self, tokenizer: Tokenizer) -> str:
        """What ended the policy's last turn, as text."""
        turn, [token] = self.done().turn, tokenizer.decode_tokens(self.ids[-1:])
        string, _ = tokenizer.stop_string([*self.prompt.ids, *self.ids[:turn]], self.ids[turn:])
        return string or token.strip() or token

    def done(self) -> Completion:
        """The row as it stands."""
        chat = None if isinstance(self.prompt.text, str) or len(self.messages) == 1 else [*self.messages]
        chosen = None if all(self.chosen) else [*self.chosen]
        return Completion(self.ids, self.logprob, self.stopped, self.version, chosen, chat)

    def _text(self, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        return tokenizer.continued(self.prompt.ids, ids)


def converse(
    speak: Speak,
    reply: Reply,
    show: Callable[[list[Prompt], list[Completion]], Sampled],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    limit: int,
    turns: int,
) -> list[Completion]:
    """What the policy and others say after prompts, in turn. A stop ends a turn; the last turn's stop ends the row.

    Ids are only ever appended, so each token was sampled after the very ids that stand before it. With a `speak` whose
    randomness hangs on seed and place, others who say nothing at all change nothing: what comes is what one completion
    without stops would have been.

    Args:
        show: rows as a judge, and here `reply`, is shown them.
        limit: tokens a row may have after its prompt, those of others included. A reply that leaves no room for another
            word of the policy's is not put there: the limit has cut the row.
        turns: of the policy, at most; after the last one nobody is asked.
    """
    rows = [_Row(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    going = rows
    for turn in range(turns):
        if not going:
            break
        said = speak(
            [[*row.prompt.ids, *row.ids] for row in going],
            seeds=[row.seed for row in going],
            starts=[len(row.ids) for row in going],
        )
        for row, completion in zip(going, said, strict=True):
            row.take(completion, tokenizer)
        going = [row for row in going if row.stopped] if turn < turns - 1 else []
        if not going:
            break
        shown = show([row.prompt for row in going], [row.done() for row in going])
        answers = zip(going, reply(shown, [row.stop(tokenizer) for row in going]), strict=True)
        going = [row for row, answer in answers if answer is not None and row.hear(answer, tokenizer, reply, limit)]
    return [row.done() for row in rows]
