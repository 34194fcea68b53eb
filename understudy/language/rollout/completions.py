"""Prompts as text or chat in, completions as text out: what `Policy.generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from understudy.language.rollout.generate import generate
from understudy.run.config import RequestError

if TYPE_CHECKING:
    from understudy.language.model.policy import Policy

MAX_TOTAL_TOKENS = 2**26
"""Tokens of all completions together, which are in memory until the last of them is there."""


@torch.no_grad()
def complete_prompts(
    policy: Policy,
    prompts: Any,
    *,
    max_new_tokens: int,
    num_completions: int,
    temperature: float | None,
    sample: bool,
    stop: str | Sequence[str],
    seed: int,
) -> list[list[str]]:
    """See `Policy.generate`."""
    for name, value in (("max_new_tokens", max_new_tokens), ("num_completions", num_completions)):
        if value < 1:
            raise RequestError(f"{name} is {value}: must be 1 or more")
    if temperature is not None and not 1e-6 <= temperature <= 1e6:
        raise RequestError(
            f"temperature is {temperature}: must be between 1e-06 and 1e+06; greedy takes the likeliest token"
        )
    if not -(2**63) < seed < 2**63:
        raise RequestError(f"seed is {seed}: must be a whole number between -2^63 and 2^63")
    if policy.tokenizer is None:
        raise RequestError("the policy has no tokenizer: load one from a run, or set policy.tokenizer")
    tokenizer = policy.tokenizer.with_stop([stop] if isinstance(stop, str) else stop)
    is_single_prompt = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    ids = [tokenizer.encode_prompt(prompt) for prompt in ([prompts] if is_single_prompt else prompts)]
    context_length = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if context_length and ids and (longest := max(map(len, ids))) >= context_length:
        raise RequestError(f"prompt has {longest} tokens, the model's context holds {context_length}: shorten it")
    token_limits = [
        min(max_new_tokens, context_length - len(prompt)) if context_length else max_new_tokens for prompt in ids
    ]
    if (num_tokens := num_completions * sum(token_limits)) > MAX_TOTAL_TOKENS:
        raise RequestError(
            f"max_new_tokens is {max_new_tokens} and count {num_completions}: for {len(ids)} prompts that is up "
            f"to {num_tokens:,} tokens, and at "
            f"most {MAX_TOTAL_TOKENS:,} are made at a time; lower one of them"
        )
    stop_condition = tokenizer.ends_with_stop_string if tokenizer.stop_strings else None
    texts: list[list[str]] = [[] for _ in ids]
    previous_temperature, policy.temperature = policy.temperature, temperature or policy.temperature
    try:
        for token_limit in dict.fromkeys(token_limits):
            prompt_indices = [
                i
                for i, prompt_limit in enumerate(token_limits)
                if prompt_limit == token_limit
                for _ in range(num_completions)
            ]
            seeds = [seed + i * num_completions + n % num_completions for n, i in enumerate(prompt_indices)]
            repeated_ids = [ids[i] for i in prompt_indices]
            generated = generate(
                policy,
                repeated_ids,
                limit=token_limit,
                stops=tokenizer.stops,
                seeds=seeds,
                stop_condition=stop_condition,
                sample=sample,
            )
            for i, completion in zip(prompt_indices, generated, strict=True):
                text, (_, stop_length) = (
                    tokenizer.decode(completion.ids),
                    tokenizer.find_stop_string(ids[i], completion.ids),
                )
                texts[i].append(text[: max(0, len(text) - stop_length)])
    finally:
        policy.temperature = previous_temperature
    return texts
