"""Step 1, sample: prompts from the data, completions from the policy, as a record and as what a judge reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from understudy.batch import Trajectory, map_tensors
from understudy.language.data.records import Prompt, Tokenizer
from understudy.language.model.policy import Policy
from understudy.language.rewards.reward_sum import ScoringInput
from understudy.language.rollout.generate import (
    Completion,
    Engine,
    StopCondition,
    build_trajectory,
    generate,
    trim_at_stop,
)
from understudy.language.rollout.multi_turn import ReplyFunction, run_dialogue
from understudy.run.seeds import derive_seed


@dataclass(frozen=True)
class Rollout:
    """What a policy said to some prompts: B rows, every field in the same order."""

    prompts: list[Prompt]
    completions: list[Completion]
    trajectory: Trajectory
    scoring_input: ScoringInput
    row_numbers: Sequence[int] = ()
    """Each one's number in the run; none where it is of no run."""


class Sampler:
    """Lets a policy answer prompts. A row's randomness is its own: (seed, number) decide what it says.

    Args:
        limit: tokens a completion may have.
        has_fixed_length: there is no end but the limit; reaching it terminates.
        max_num_seqs: rows continued at a time.
        reply_function: who speaks after each of the policy's turns, up to `max_turns` of them; None for one turn.
        engine: who samples in `collect`, in place of our own generation.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        *,
        limit: int,
        has_fixed_length: bool,
        seed: int,
        max_num_seqs: int,
        reply_function: ReplyFunction | None = None,
        max_turns: int = 1,
        engine: Engine | None = None,
    ) -> None:
        self.prompts, self.tokenizer, self.limit, self.has_fixed_length = prompts, tokenizer, limit, has_fixed_length
        self.seed, self.max_num_seqs, self.reply_function, self.max_turns, self.engine = (
            seed,
            max_num_seqs,
            reply_function,
            max_turns,
            engine,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def collect(self, policy: Policy, prompt_indices: Sequence[int], *, first_row: int) -> Rollout:
        """Answers to the prompts of these numbers. `first_row` is the first row's number in the run; the others
        follow it."""
        row_numbers = range(first_row, first_row + len(prompt_indices))
        seeds = [derive_seed(self.seed, "sample", row) for row in row_numbers]
        return replace(self.sample(policy, prompt_indices, seeds, engine=self.engine), row_numbers=row_numbers)

    def sample(
        self, policy: Policy, prompt_indices: Sequence[int], seeds: Sequence[int], *, engine: Engine | None = None
    ) -> Rollout:
        """Answers to the prompts of these numbers, each from a seed; by our own generation where no engine is given."""
        prompts = [self.prompts[i] for i in prompt_indices]
        stops = frozenset() if self.has_fixed_length else self.tokenizer.stops
        stop_condition = (
            self.tokenizer.ends_with_stop_string if self.tokenizer.stop_strings and not self.has_fixed_length else None
        )
        run_engine = (
            partial(generate, max_num_seqs=self.max_num_seqs, stop_condition=stop_condition)
            if engine is None
            else partial(_call_engine, engine, stop_condition)
        )
        continue_prompts = partial(run_engine, policy, limit=self.limit, stops=stops)
        if self.reply_function is None:
            completions = continue_prompts([prompt.ids for prompt in prompts], seeds=seeds, starts=[0] * len(prompts))
        else:
            options = {"limit": self.limit, "max_turns": self.max_turns}
            completions = run_dialogue(
                continue_prompts,
                self.reply_function,
                self.build_scoring_input,
                self.tokenizer,
                prompts,
                seeds,
                **options,
            )
        return self.build_rollout(prompts, completions, policy.device)

    def build_rollout(self, prompts: list[Prompt], completions: list[Completion], device: torch.device) -> Rollout:
        """Prompts and completions as a record and as text."""
        trajectory = build_trajectory(
            [prompt.ids for prompt in prompts], completions, has_fixed_length=self.has_fixed_length
        )
        return Rollout(
            prompts,
            completions,
            map_tensors(lambda x: x.to(device), trajectory),
            self.build_scoring_input(prompts, completions),
        )

    def build_scoring_input(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> ScoringInput:
        """The same as text: chat is answered in chat."""
        answers: list[Any] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = self.tokenizer.decode_continuation(prompt.ids, completion.ids, turn_start=completion.last_turn_start)
            chat = completion.messages or [{"role": "assistant", "content": text}]
            answers.append(text if isinstance(prompt.text, str) else chat)
        questions: list[Any] = [prompt.text for prompt in prompts]
        column_names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in column_names}
        truncated = [not (completion.stopped or self.has_fixed_length) for completion in completions]
        return ScoringInput(questions, answers, [completion.ids for completion in completions], truncated, columns)


def _call_engine(
    engine: Engine,
    stop_condition: StopCondition | None,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    **options: Any,
) -> list[Completion]:
    """What another's engine says, if it is what an engine says; up to where it ends, which an engine need not know."""
    completions = engine(policy, prompts, **options)
    if len(completions) != len(prompts):
        raise ValueError(f"the engine gave {len(completions)} completions to {len(prompts)} prompts: must be one each")
    for row, completion in enumerate(completions):
        if (
            not completion.ids
            or len(completion.ids) != len(completion.logprob)
            or not all(map(math.isfinite, completion.logprob))
        ):
            raise ValueError(
                f"completion {row} of the engine has {len(completion.ids)} tokens and log-probs "
                f"{completion.logprob[:3]}...: "
                "must have at least one token, and a finite log-prob for each"
            )
    return (
        completions
        if stop_condition is None
        else [trim_at_stop(c, prompt, stop_condition) for c, prompt in zip(completions, prompts, strict=True)]
    )
