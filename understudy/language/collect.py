"""Step 1, sample: prompts from the data, completions from the policy, as a record and as what a judge reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from understudy.batch import Trajectory, map_tensors
from understudy.language.generate import Completion, Ends, Engine, cut_at_end, generate, lay_out
from understudy.language.judge import Sampled
from understudy.language.model import Policy
from understudy.language.text import Prompt, Tokenizer
from understudy.language.turns import Reply, converse
from understudy.run.seeds import derive


@dataclass(frozen=True)
class Said:
    """What a policy said to some prompts: B rows, every field in the same order."""

    prompts: list[Prompt]
    completions: list[Completion]
    record: Trajectory
    judged: Sampled
    rows: Sequence[int] = ()
    """Each one's number in the run; none where it is of no run."""


class Sampler:
    """Lets a policy answer prompts. A row's randomness is its own: (seed, number) decide what it says.

    Args:
        limit: tokens a completion may have.
        endless: there is no end but the limit; reaching it terminates.
        slots: rows continued at a time.
        reply: who speaks after each of the policy's turns, up to `turns` of them; None for one turn.
        engine: who samples in `collect`, in place of our own generation.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        *,
        limit: int,
        endless: bool,
        seed: int,
        slots: int,
        reply: Reply | None = None,
        turns: int = 1,
        engine: Engine | None = None,
    ) -> None:
        self.prompts, self.tokenizer, self.limit, self.endless = prompts, tokenizer, limit, endless
        self.seed, self.slots, self.reply, self.turns, self.engine = seed, slots, reply, turns, engine

    def __len__(self) -> int:
        return len(self.prompts)

    def collect(self, policy: Policy, which: Sequence[int], *, first: int) -> Said:
        """Answers to the prompts of these numbers. `first` is the first row's number in the run; the others follow it."""
        rows = range(first, first + len(which))
        seeds = [derive(self.seed, "sample", row) for row in rows]
        return replace(self.answer(policy, which, seeds, engine=self.engine), rows=rows)

    def answer(
        self, policy: Policy, which: Sequence[int], seeds: Sequence[int], *, engine: Engine | None = None
    ) -> Said:
        """Answers to the prompts of these numbers, each from a seed; by our own generation where no engine is given."""
        prompts = [self.prompts[i] for i in which]
        stops = frozenset() if self.endless else self.tokenizer.stops
        ends = self.tokenizer.at_stop_string if self.tokenizer.stop_strings and not self.endless else None
        own = partial(generate, slots=self.slots, ends=ends) if engine is None else partial(_checked, engine, ends)
        speak = partial(own, policy, limit=self.limit, stops=stops)
        if self.reply is None:
            completions = speak([prompt.ids for prompt in prompts], seeds=seeds, starts=[0] * len(prompts))
        else:
            told = {"limit": self.limit, "turns": self.turns}
            completions = converse(speak, self.reply, self.judged, self.tokenizer, prompts, seeds, **told)
        return self.written_down(prompts, completions, policy.device)

    def written_down(self, prompts: list[Prompt], completions: list[Completion], device: torch.device) -> Said:
        """Prompts and completions as a record and as text."""
        record = lay_out([prompt.ids for prompt in prompts], completions, endless=self.endless)
        return Said(
            prompts, completions, map_tensors(lambda x: x.to(device), record), self.judged(prompts, completions)
        )

    def judged(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sampled:
        """The same as text: chat is answered in chat."""
        said: list[Any] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = self.tokenizer.continued(prompt.ids, completion.ids, turn=completion.turn)
            chat = completion.messages or [{"role": "assistant", "content": text}]
            said.append(text if isinstance(prompt.text, str) else chat)
        shown: list[Any] = [prompt.text for prompt in prompts]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        cut = [not (completion.stopped or self.endless) for completion in completions]
        return Sampled(shown, said, [completion.ids for completion in completions], cut, columns)


def _checked(
    engine: Engine, ends: Ends | None, policy: Policy, prompts: Sequence[Sequence[int]], **told: Any
) -> list[Completion]:
    """What another's engine says, if it is what an engine says; up to where it ends, which an engine need not know."""
    found = engine(policy, prompts, **told)
    if len(found) != len(prompts):
        raise ValueError(f"the engine gave {len(found)} completions to {len(prompts)} prompts: must be one each")
    for row, said in enumerate(found):
        if not said.ids or len(said.ids) != len(said.logprob) or not all(map(math.isfinite, said.logprob)):
            raise ValueError(
                f"completion {row} of the engine has {len(said.ids)} tokens and log-probs {said.logprob[:3]}...: "
                "must have at least one token, and a finite log-prob for each"
            )
    return found if ends is None else [cut_at_end(c, prompt, ends) for c, prompt in zip(found, prompts, strict=True)]
