"""Prompts as text or chat in, completions as text out: what `Policy.generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from understudy.language.generate import generate
from understudy.run.config import RequestError

if TYPE_CHECKING:
    from understudy.language.model import Policy

MOST_TOKENS = 2**26
"""Tokens of all completions together, which are in memory until the last of them is there."""


@torch.no_grad()
def completions(
    policy: Policy,
    prompts: Any,
    *,
    limit: int,
    count: int,
    temperature: float | None,
    sample: bool,
    stop: str | Sequence[str],
    seed: int,
) -> list[list[str]]:
    """See `Policy.generate`."""
    for name, value in (("max_new_tokens", limit), ("count", count)):
        if value < 1:
            raise RequestError(f"{name} is {value}: must be 1 or more")
    if temperature is not None and not 1e-6 <= temperature <= 1e6:
        raise RequestError(
            f"temperature is {temperature}: must be between 1e-06 and 1e+06; greedy takes the likeliest token"
        )
    if policy.tokenizer is None:
        raise RequestError("the policy has no tokenizer: load one from a run, or set policy.tokenizer")
    tokenizer = policy.tokenizer.ending_at([stop] if isinstance(stop, str) else stop)
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    ids = [tokenizer.encode_prompt(prompt) for prompt in ([prompts] if single else prompts)]
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if context and ids and (longest := max(map(len, ids))) >= context:
        raise RequestError(f"prompt has {longest} tokens, the model's context holds {context}: shorten it")
    limits = [min(limit, context - len(prompt)) if context else limit for prompt in ids]
    if (tokens := count * sum(limits)) > MOST_TOKENS:
        raise RequestError(
            f"max_new_tokens is {limit} and count {count}: for {len(ids)} prompts that is up to {tokens:,} tokens, and at "
            f"most {MOST_TOKENS:,} are made at a time; lower one of them"
        )
    ends = tokenizer.at_stop_string if tokenizer.stop_strings else None
    texts: list[list[str]] = [[] for _ in ids]
    before, policy.temperature = policy.temperature, temperature or policy.temperature
    try:
        for most in dict.fromkeys(limits):
            numbers = [i for i, own in enumerate(limits) if own == most for _ in range(count)]
            seeds = [seed + i * count + n % count for n, i in enumerate(numbers)]
            rows = [ids[i] for i in numbers]
            made = generate(policy, rows, limit=most, stops=tokenizer.stops, seeds=seeds, ends=ends, sample=sample)
            for i, completion in zip(numbers, made, strict=True):
                text, (_, over) = tokenizer.decode(completion.ids), tokenizer.stop_string(ids[i], completion.ids)
                texts[i].append(text[: max(0, len(text) - over)])
    finally:
        policy.temperature = before
    return texts
