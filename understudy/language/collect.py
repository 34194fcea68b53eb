"""Step 1, sample: prompts from the data, completions from the policy, as a record and as what a judge reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from understudy.batch import Trajectory, map_tensors
from understudy.language.generate import Completion, generate, lay_out
from understudy.language.judge import Sampled
from understudy.language.model import Policy
from understudy.language.text import Prompt, Tokenizer
from understudy.run.seeds import derive


@dataclass(frozen=True)
class Said:
    """What a policy said to some prompts: B rows, every field in the same order."""

    prompts: list[Prompt]
    completions: list[Completion]
    record: Trajectory
    judged: Sampled


class Sampler:
    """Lets a policy answer prompts. A row's randomness is its own: (seed, number) decide what it says.

    Args:
        limit: tokens a completion may have.
        endless: there is no end but the limit; reaching it terminates.
        slots: rows continued at a time.
    """

    def __init__(
        self, prompts: Sequence[Prompt], tokenizer: Tokenizer, *, limit: int, endless: bool, seed: int, slots: int
    ) -> None:
        self.prompts, self.tokenizer, self.limit, self.endless = prompts, tokenizer, limit, endless
        self.seed, self.slots = seed, slots

    def __len__(self) -> int:
        return len(self.prompts)

    def collect(self, policy: Policy, which: Sequence[int], *, first: int) -> Said:
        """Answers to the prompts of these numbers. `first` is the first row's number in the run; the others follow it."""
        return self.answer(policy, which, [derive(self.seed, "sample", first + i) for i in range(len(which))])

    def answer(self, policy: Policy, which: Sequence[int], seeds: Sequence[int]) -> Said:
        """Answers to the prompts of these numbers, each from a seed."""
        prompts = [self.prompts[i] for i in which]
        completions = generate(
            policy,
            [prompt.ids for prompt in prompts],
            limit=self.limit,
            stops=frozenset() if self.endless else self.tokenizer.stops,
            seeds=seeds,
            slots=self.slots,
        )
        return self.written_down(prompts, completions, policy.device)

    def written_down(self, prompts: list[Prompt], completions: list[Completion], device: torch.device) -> Said:
        """Prompts and completions as a record and as text."""
        record = lay_out([prompt.ids for prompt in prompts], completions, endless=self.endless)
        return Said(
            prompts, completions, map_tensors(lambda x: x.to(device), record), self.judged(prompts, completions)
        )

    def judged(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sampled:
        """The same as text: chat is answered in chat."""
        texts = [self._continued(prompt.ids, said.ids) for prompt, said in zip(prompts, completions, strict=True)]
        said: list[Any] = [
            text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        shown: list[Any] = [prompt.text for prompt in prompts]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        cut = [not (completion.stopped or self.endless) for completion in completions]
        return Sampled(shown, said, [completion.ids for completion in completions], cut, columns)

    def _continued(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """A completion's text as it stands behind its prompt: some tokenizers drop the blank in front of a text."""
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(ids)
