"""Step 1, sample: the policy and others speak in turn; what others say is read, and never learned from."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from understudy.language.data.records import Messages, Prompt, Tokenizer
from understudy.language.rewards.reward_sum import ScoringInput, all_columns, select_columns
from understudy.language.rewards.worker import FunctionFault, InProcess, Worker
from understudy.language.rollout.generate import Completion
from understudy.run.config import RequestError
from understudy.run.origin import listed

GenerateFunction = Callable[..., list[Completion]]
"""Continues ids: (prompts, seeds=..., starts=...) -> completions, as `generate` does."""


class ReplyFunction:
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
            self.asked: InProcess | Worker = InProcess(call, output_kind="replies")
            return
        file, _, function = str(spec).rpartition(":")
        if not (file.endswith(".py") and os.path.isfile(file) and function):
            known = listed(str(spec).removesuffix(":"), ast.FunctionDef)
            raise RequestError(
                f"reply is {spec!r}: must be file.py:function of a file that exists, or a Python function{known}"
            )
        try:
            self.asked = Worker(file, function, timeout=timeout, output_kind="replies")
        except FunctionFault as fault:
            raise RequestError(f"reply is {spec!r}: it cannot be imported ({fault.message}); mend the file") from fault

    def __call__(self, scoring_input: ScoringInput, stop_texts: list[str]) -> list[Any]:
        """One reply a row.

        Raises:
            RequestError: the function failed, or said something else. A tool that may fail says so in its reply.
        """
        try:
            replies = self.asked.call(
                select_columns(self.asked.parameters, {**all_columns(scoring_input), "stop": stop_texts})
            )
        except RequestError as error:
            raise RequestError(f"reply is {self.spec!r}: {error}") from None
        except FunctionFault as fault:
            reason = f"{fault.message}; let it answer with the error instead"
            raise RequestError(f"reply is {self.spec!r}: {reason}") from fault
        if len(replies) != len(scoring_input):
            raise RequestError(
                f"reply is {self.spec!r}: it gave {len(replies)} replies to {len(scoring_input)} rows; give one each"
            )
        return replies

    def close(self) -> None:
        """End the worker."""
        self.asked.close()


@dataclass
class _Dialogue:
    """A completion in the making."""

    prompt: Prompt
    seed: int
    ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    messages: Messages = field(default_factory=list)
    stopped: bool = False
    version: int = 0

    def append_turn(self, completion: Completion, tokenizer: Tokenizer) -> None:
        """A turn of the policy's."""
        self.messages.append({"role": "assistant", "content": self._decode(completion.ids, tokenizer)})
        self.ids, self.logprob = [*self.ids, *completion.ids], [*self.logprob, *completion.logprob]
        self.mask += [True] * len(completion.ids)
        self.stopped, self.version = completion.stopped, completion.version

    def append_reply(self, reply: Any, tokenizer: Tokenizer, reply_function: ReplyFunction, limit: int) -> bool:
        """A turn of another's; False where it leaves the policy no room, and the row is cut."""
        ids, messages = self._encode_reply(reply, tokenizer, reply_function)
        if len(self.ids) + len(ids) >= limit:
            self.stopped = False
            return False
        self.ids, self.logprob = [*self.ids, *ids], [*self.logprob, *[0.0] * len(ids)]
        self.mask += [False] * len(ids)
        self.messages += messages
        return True

    def _encode_reply(
        self, reply: Any, tokenizer: Tokenizer, reply_function: ReplyFunction
    ) -> tuple[list[int], Messages]:
        """What another said, as ids and as messages."""
        items: list[Any] = reply if isinstance(reply, list) else [reply]
        if isinstance(reply, str):
            return tokenizer.encode_text(reply), [{"role": "tool", "content": reply}]
        if all(type(item) is int for item in items):
            return items, [{"role": "tool", "content": self._decode(items, tokenizer)}]
        if not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in items):
            raise RequestError(f"reply is {reply_function.spec!r}: it gave {reply!r}; give text, ids, messages or None")
        if isinstance(self.prompt.text, str):
            raise RequestError(
                f"reply is {reply_function.spec!r}: it gave a message to a prompt of text; give text or ids"
            )
        previous_messages = [*self.prompt.text, *self.messages[:-1]]
        is_closed = self.ids[-1] in tokenizer.stops
        return tokenizer.with_template_arguments(self.prompt.columns).encode_turn(
            previous_messages, items, is_closed=is_closed
        ), items

    def stop_text(self, tokenizer: Tokenizer) -> str:
        """What ended the policy's last turn, as text."""
        turn_start, [token] = self.to_completion().last_turn_start, tokenizer.decode_tokens(self.ids[-1:])
        stop_string, _ = tokenizer.find_stop_string([*self.prompt.ids, *self.ids[:turn_start]], self.ids[turn_start:])
        return stop_string or token.strip() or token

    def to_completion(self) -> Completion:
        """The row as it stands."""
        messages = None if isinstance(self.prompt.text, str) or len(self.messages) == 1 else [*self.messages]
        mask = None if all(self.mask) else [*self.mask]
        return Completion(self.ids, self.logprob, self.stopped, self.version, mask, messages)

    def _decode(self, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        return tokenizer.decode_continuation(self.prompt.ids, ids)


def run_dialogue(
    generate: GenerateFunction,
    reply_function: ReplyFunction,
    build_scoring_input: Callable[[list[Prompt], list[Completion]], ScoringInput],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    limit: int,
    max_turns: int,
) -> list[Completion]:
    """What the policy and others say after prompts, in turn. A stop ends a turn; the last turn's stop ends the row.

    Ids are only ever appended, so each token was sampled after the very ids that stand before it. With a `generate` whose
    randomness hangs on seed and place, others who say nothing at all change nothing: what comes is what one completion
    without stops would have been.

    Args:
        build_scoring_input: rows as a judge, and here `reply_function`, is shown them.
        limit: tokens a row may have after its prompt, those of others included. A reply that leaves no room for another
            word of the policy's is not put there: the limit has cut the row.
        max_turns: of the policy, at most; after the last one nobody is asked.
    """
    rows = [_Dialogue(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    active = rows
    for turn in range(max_turns):
        if not active:
            break
        completions = generate(
            [[*row.prompt.ids, *row.ids] for row in active],
            seeds=[row.seed for row in active],
            starts=[len(row.ids) for row in active],
        )
        for row, completion in zip(active, completions, strict=True):
            row.append_turn(completion, tokenizer)
        active = [row for row in active if row.stopped] if turn < max_turns - 1 else []
        if not active:
            break
        scoring_input = build_scoring_input([row.prompt for row in active], [row.to_completion() for row in active])
        replies = zip(active, reply_function(scoring_input, [row.stop_text(tokenizer) for row in active]), strict=True)
        active = [
            row
            for row, reply in replies
            if reply is not None and row.append_reply(reply, tokenizer, reply_function, limit)
        ]
    return [row.to_completion() for row in rows]
