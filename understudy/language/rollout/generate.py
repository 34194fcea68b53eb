"""Step 1, sample: continue prompts with a key-value cache of our own, slot by slot.

A slot is a row of the cache. A finished slot is refilled from the queue; prompts that are equal are read once. Each row's
randomness is a stream of its own, so what a row says does not depend on who its neighbours are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from understudy.batch import TokenBatch, Trajectory
from understudy.language.model.forward import TOLERANCE, distance, ran_out_of_memory
from understudy.language.model.token_distribution import apply_top_k_top_p, sample_inverse_cdf
from understudy.language.rollout.kv_cache import KVCache
from understudy.run.config import RequestError

if TYPE_CHECKING:
    from understudy.language.model.policy import Policy

StopCondition = Callable[[Sequence[int], Sequence[int]], bool]
"""Whether a completion is at its end with its last token: (prompt, ids so far) -> bool."""
SLOT_MULTIPLE = 8  # slots are left in steps of so many: oneDNN makes a kernel for each number of rows


@dataclass(frozen=True)
class Completion:
    """What a policy said after a prompt."""

    ids: list[int]
    """The tokens, the stop included."""
    logprob: list[float]
    """log pi of each under the policy that sampled it; 0 where others spoke."""
    stopped: bool
    """It ended by a stop id or a stop string; otherwise the limit cut it."""
    version: int
    """Of the policy that sampled it."""
    mask: list[bool] | None = None
    """Which of them the policy chose, the first and the last always; None for all."""
    messages: list[dict[str, Any]] | None = None
    """The same as chat where others spoke in it too; None for one answer."""

    @property
    def last_turn_start(self) -> int:
        """Where the policy's last turn begins."""
        return 0 if self.mask is None else len(self.mask) - self.mask[::-1].index(False)

    @property
    def policy_ids(self) -> list[int]:
        """The tokens that the policy chose."""
        return (
            self.ids
            if self.mask is None
            else [i for i, is_chosen in zip(self.ids, self.mask, strict=True) if is_chosen]
        )


class Engine(Protocol):
    """Whatever can continue prompts for a policy: token ids in; token ids, log-probs and the policy's version out.

    `generate` is one. Others may be of another precision, elsewhere, or behind the policy they are given by some updates:
    their log-probs are what they sampled with.
    """

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        *,
        limit: int,
        stops: frozenset[int],
        seeds: Sequence[int],
        starts: Sequence[int],
    ) -> list[Completion]: ...


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    stops: frozenset[int],
    seeds: Sequence[int],
    starts: Sequence[int] | None = None,
    stop_condition: StopCondition | None = None,
    sample: bool = True,
    max_num_seqs: int = 64,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Completion]:
    """Continue each prompt until a stop id, until `stop_condition` says so, or for `limit` tokens.

    Args:
        prompts: token ids, each at least one.
        seeds: one a prompt; equal seeds, prompts and parameters give equal completions, whoever the neighbours.
        starts: how many of its `limit` tokens each prompt already holds, at its end; none by default. A token's randomness
            hangs on its seed and its place, so a completion that is taken up again goes on as it would have.
        stop_condition: asked after each token whether it was the last, as `Tokenizer.ends_with_stop_string` says it.
        sample: draw from the policy at its temperature; otherwise its likeliest token.
        max_num_seqs: how many rows are continued at a time.
        top_k, top_p: draw from the likeliest tokens only, as `truncate` says it. The log-probs are those of the truncated
            distribution, so they are above the policy's own by -log of the probability that was kept.

    Raises:
        ValueError: an empty prompt, not one seed a prompt, or a start at the limit.
    """
    starts = [0] * len(prompts) if starts is None else starts
    if not len(starts) == len(seeds) == len(prompts) or not all(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: one each, and no prompt may be empty")
    if not prompts:
        return []
    if max(starts) >= limit:
        raise ValueError(f"a prompt holds {max(starts)} tokens of {limit} already: there is nothing left to say")
    was_training = policy.training
    policy.eval()  # in training mode, a model that recomputes activations keeps no cache
    try:
        if policy.uses_own_kv_cache is None:
            resolve_sampling_path(policy, prompts)
        if policy.uses_own_kv_cache:
            truncate_probabilities = partial(apply_top_k_top_p, top_k=top_k, top_p=top_p)
            return _generate_in_slots(
                policy,
                prompts,
                limit,
                stops,
                seeds,
                starts,
                stop_condition,
                truncate_probabilities if sample else None,
                max_num_seqs,
            )
        sampling_options = (
            {"do_sample": True, "temperature": policy.temperature, "top_k": top_k, "top_p": top_p} if sample else {}
        )
        return list(
            _generate_by_hugging_face(policy, prompts, limit, stops, seeds, starts, stop_condition, sampling_options)
        )
    finally:
        policy.train(was_training)


def _generate_in_slots(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stops: frozenset[int],
    seeds: Sequence[int],
    starts: Sequence[int],
    stop_condition: StopCondition | None,
    truncate_probabilities: Callable[[Tensor], Tensor] | None,
    num_slots: int,
) -> list[Completion]:
    noise = [torch.rand(limit, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.stack([*noise, torch.zeros(limit)]).to(policy.device)
    token_sampler = _TokenSampler(
        policy,
        noise,
        stops,
        starts,
        limit,
        truncate_probabilities,
        None if stop_condition is None else _StopTracker(stop_condition, prompts),
    )
    num_idle = num_slots = min(num_slots, len(prompts))
    capacity = max(len(p) - start for p, start in zip(prompts, starts, strict=True)) + limit
    kv_cache = KVCache(policy, num_slots, capacity, max(map(len, prompts)))
    row_of_slot = torch.full((num_slots,), -1, device=policy.device)  # the row each slot works on; -1 for none
    tokens = torch.zeros(num_slots, dtype=torch.long, device=policy.device)
    pending_rows = deque(range(len(prompts)))
    while pending_rows or num_idle < len(row_of_slot):
        if pending_rows and num_idle >= max(
            1, len(row_of_slot) // 4
        ):  # some prompts together are cheaper than one by one
            filled_slots = (row_of_slot < 0).nonzero()[: len(pending_rows), 0]
            rows = torch.tensor([pending_rows.popleft() for _ in filled_slots], device=row_of_slot.device)
            hidden = kv_cache.prefill(filled_slots.tolist(), [prompts[row] for row in rows.tolist()])
            row_of_slot, num_idle = row_of_slot.index_copy(0, filled_slots, rows), num_idle - len(filled_slots)
        else:
            num_remaining = -(-(len(row_of_slot) - num_idle) // SLOT_MULTIPLE) * SLOT_MULTIPLE
            if not pending_rows and num_remaining < len(row_of_slot):
                source_slots = (row_of_slot[num_remaining:] >= 0).nonzero()[:, 0] + num_remaining
                target_slots = (row_of_slot[:num_remaining] < 0).nonzero()[: len(source_slots), 0]
                kv_cache.compact(source_slots, target_slots, num_remaining)
                row_of_slot, tokens = (
                    tensor.index_copy(0, target_slots, tensor[source_slots])[:num_remaining]
                    for tensor in (row_of_slot, tokens)
                )
                num_idle -= num_slots - num_remaining
                num_slots = num_remaining
            filled_slots, rows, hidden = None, row_of_slot, kv_cache.decode_step(tokens)
        sampled_tokens, is_finished = token_sampler.sample(rows, hidden)
        tokens = sampled_tokens if filled_slots is None else tokens.index_copy(0, filled_slots, sampled_tokens)
        if is_finished is not None and bool(is_finished.any()):
            remaining_rows = rows.masked_fill(is_finished, -1)
            row_of_slot, num_idle = (
                remaining_rows if filled_slots is None else row_of_slot.index_copy(0, filled_slots, remaining_rows),
                num_idle + int(is_finished.sum()),
            )
            kv_cache.length.masked_fill_(row_of_slot < 0, 0)
    return token_sampler.build_completions()


class _StopTracker:
    """Which rows are at the end of their text."""

    def __init__(self, stop_condition: StopCondition, prompts: Sequence[Sequence[int]]) -> None:
        self.stop_condition, self.prompts = stop_condition, prompts
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.finished_rows: set[int] = set()

    def __call__(self, rows: Tensor, token: Tensor) -> Tensor:
        """The rows that say one token more, [n] -> whether it is their last, bool [n]."""
        for row, token_id in zip(rows.tolist(), token.tolist(), strict=True):
            if row >= 0:
                self.ids[row].append(token_id)
                if self.stop_condition(self.prompts[row], self.ids[row]):
                    self.finished_rows.add(row)
        return torch.tensor([row in self.finished_rows for row in rows.tolist()], device=rows.device)


class _TokenSampler:
    """Chooses the next token of some rows and writes it down. Row -1, the last one, is nobody's."""

    def __init__(
        self,
        policy: Policy,
        noise: Tensor,
        stops: frozenset[int],
        starts: Sequence[int],
        limit: int,
        truncate_probabilities: Callable[[Tensor], Tensor]
        | None,  # probabilities [n, V] -> those to draw from; None for no draw
        stop_tracker: _StopTracker | None,
    ) -> None:
        self.head, self.noise, self.limit, self.version = policy.head, noise, limit, policy.version
        self.truncate_probabilities = truncate_probabilities
        self.stops, self.starts, self.stop_tracker = stops, [*starts, 0], stop_tracker
        self.stop_ids = torch.tensor(sorted(stops), dtype=torch.long, device=noise.device)
        self.num_tokens = torch.tensor(self.starts, device=noise.device)
        self.last_rows = self.last_positions = torch.zeros(
            0, dtype=torch.long, device=noise.device
        )  # who spoke last, and where
        self.num_tokens_left = 0  # tokens that the longest of them may still say
        self.sampled_steps: list[tuple[Tensor, ...]] = []  # rows, places, tokens and their log-probs

    @torch.inference_mode()
    def sample(self, rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """rows [n], hidden [n, H] -> the tokens [n], and whether each was its row's last, bool [n]; None for nobody's.

        The same rows go on one place further without being looked up.
        """
        if rows is self.last_rows:
            positions = self.last_positions + 1
        else:
            self.num_tokens[self.last_rows] = self.last_positions + 1
            self.num_tokens[-1] = 0
            positions = self.num_tokens[rows]
            self.num_tokens_left = self.limit - int(positions.max())
        self.last_rows, self.last_positions, self.num_tokens_left = rows, positions, self.num_tokens_left - 1
        logit = self.head(hidden)
        probabilities = logit.softmax(dim=-1)
        if self.truncate_probabilities is None:
            token = logit.argmax(dim=-1)
        else:
            probabilities = self.truncate_probabilities(probabilities)
            token = sample_inverse_cdf(probabilities, self.noise[rows, positions])
        self.sampled_steps.append((rows, positions, token, probabilities.gather(-1, token[:, None])[:, 0].log()))
        is_last = positions + 1 == self.limit if self.num_tokens_left == 0 else None
        if self.stops:
            is_stop = (token[:, None] == self.stop_ids).any(dim=1)
            is_last = is_stop if is_last is None else is_last | is_stop
        if self.stop_tracker is not None:
            is_stop = self.stop_tracker(rows, token)
            is_last = is_stop if is_last is None else is_last | is_stop
        return token, None if is_last is None else is_last & (rows >= 0)

    def build_completions(self) -> list[Completion]:
        rows, positions, token, logprob = (
            torch.cat(tensors).cpu() for tensors in zip(*self.sampled_steps, strict=True)
        )
        if logprob.isnan().any():
            raise FloatingPointError(
                "the policy's probabilities are no numbers: its weights are ruined; lower learning_rate"
            )
        ids = torch.zeros(self.noise.shape, dtype=torch.long).index_put((rows, positions), token).tolist()
        logprobs = torch.zeros(self.noise.shape).index_put((rows, positions), logprob).tolist()
        ends = torch.tensor(self.starts).index_put((rows,), torch.ones_like(rows), accumulate=True).tolist()
        stopped_rows = set() if self.stop_tracker is None else self.stop_tracker.finished_rows
        return [
            Completion(
                ids[row][a:b], logprobs[row][a:b], ids[row][b - 1] in self.stops or row in stopped_rows, self.version
            )
            for row, (a, b) in enumerate(zip(self.starts[:-1], ends[:-1], strict=True))
        ]


def _generate_by_hugging_face(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stops: frozenset[int],
    seeds: Sequence[int],
    starts: Sequence[int],
    stop_condition: StopCondition | None,
    sampling_options: dict[str, Any],
) -> Iterator[Completion]:
    """Row by row through `model.generate`, for a model whose cache we do not know.

    The settings that the model came with (min_p, a repetition penalty, suppressed tokens) are set aside meanwhile. The
    log-probs are those of the distribution that was sampled from, so that any setting left would be noticed.
    """
    model = policy.model
    previous_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for prompt, seed, start in zip(prompts, seeds, starts, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash((seed, start)) if start else seed)  # a turn must not repeat how it began
                ids = torch.tensor([list(prompt)], device=policy.device)
                criteria = (
                    None if stop_condition is None else [partial(_stopping_criterion, stop_condition, len(prompt))]
                )
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),  # a pad id in a prompt is a token like any other
                    max_new_tokens=limit - start,
                    eos_token_id=sorted(stops) or None,
                    pad_token_id=0,
                    output_scores=True,
                    return_dict_in_generate=True,
                    stopping_criteria=criteria,
                    **sampling_options,
                )
            ids = output.sequences[0, len(prompt) :]
            logits = torch.stack(output.scores)[:, 0].float() / (1.0 if sampling_options else policy.temperature)
            logprob = logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
            completion = Completion(ids.tolist(), logprob.tolist(), int(ids[-1]) in stops, policy.version)
            yield completion if stop_condition is None else trim_at_stop(completion, prompt, stop_condition)
    finally:
        model.generation_config = previous_config


def _stopping_criterion(stop_condition: StopCondition, prompt_length: int, ids: Tensor, _: Any, **__: Any) -> Tensor:
    """`stop_condition` as one of Hugging Face's stopping criteria, of one row whose prompt has `prompt_length` tokens."""
    row = ids[0].tolist()
    return torch.tensor([stop_condition(row[:prompt_length], row[prompt_length:])], device=ids.device)


def trim_at_stop(completion: Completion, prompt: Sequence[int], stop_condition: StopCondition) -> Completion:
    """A completion up to where it ends; what was said behind that was never to be sampled."""
    for end in range(1, len(completion.ids) + 1):
        if stop_condition(prompt, completion.ids[:end]):
            return replace(completion, ids=completion.ids[:end], logprob=completion.logprob[:end], stopped=True)
    return completion


def build_trajectory(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], *, has_fixed_length: bool = False
) -> Trajectory:
    """Prompts and what followed as one right-padded record; rewards are zeros until `score`.

    The column after a row's last choice holds the last token: what a cut row is bootstrapped from. What others said in it
    stands between its choices, masked: one episode, whose end is at its last choice.

    Args:
        has_fixed_length: the task has no end but the limit, so reaching it terminates.
    """
    lengths = [len(p) + len(c.ids) for p, c in zip(prompts, completions, strict=True)]
    shape = len(lengths), max(lengths)
    ids, logprob = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    mask, terminated, truncated = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        first, end = len(prompt) - 1, lengths[row] - 1
        ids[row, : end + 1] = torch.tensor([*prompt, *completion.ids])
        logprob[row, first:end] = torch.tensor(completion.logprob)
        mask[row, first:end] = True if completion.mask is None else torch.tensor(completion.mask)
        (terminated if completion.stopped or has_fixed_length else truncated)[row, end - 1] = True
    tokens = TokenBatch(ids, mask)
    return Trajectory(tokens, tokens.action, logprob, mask, torch.zeros(shape), terminated, truncated)


def resolve_sampling_path(policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
    """Sample from our cache only where it gives the log-probs of a pass without it; a remark where it does not.

    Raises:
        RequestError: Hugging Face's `generate` does not give them either.
    """
    if policy.is_head_separable:
        policy.uses_own_kv_cache = True
        if not (problem := find_sampling_problem(policy, prompts)):
            return
        policy.warnings.append(f"the key-value cache {problem}: Hugging Face's generate samples instead, row by row")
    policy.uses_own_kv_cache = False
    if problem := find_sampling_problem(policy, prompts):
        raise unsupported_model_error(policy, problem)


def _shortest_and_longest(prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Three of the prompts: the shortest between two of the longest."""
    ordered = sorted(prompts, key=len)
    return [ordered[-1], ordered[0], ordered[-1]]


def unsupported_model_error(policy: Policy, problem: str) -> RequestError:
    """The refusal of a model that no way of sampling suits."""
    return RequestError(
        f"model is a {type(policy.model).__name__}, which cannot be sampled from (Hugging Face's generate {problem}): give "
        "another, or train it without samples, by sft or dpo"
    )


def find_sampling_problem(policy: Policy, prompts: Sequence[Sequence[int]]) -> str:
    """What is wrong with sampling on the policy's path, as the end of a sentence; empty where nothing is."""
    try:
        gap = measure_cache_error(policy, _shortest_and_longest(prompts))
    except Exception as error:  # whatever a model raises that is handed a cache it does not expect
        return describe_failure(error)
    return "" if gap <= 4 * TOLERANCE[policy.model.dtype] else f"is {gap:.2g} nats from a pass without it"


def describe_failure(error: Exception) -> str:
    """An exception as the end of a sentence. That memory ran out says nothing about the model, and is raised on."""
    if ran_out_of_memory(error):
        raise error
    return f"fails on this model ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


@torch.no_grad()
def measure_cache_error(policy: Policy, prompts: Sequence[Sequence[int]], *, num_tokens: int = 4) -> float:
    """The distance in nats between the log-probs of our cache and those of an uncached pass, on real prompts.

    They take turns in one slot, so that the ring comes round: some models count columns where they should count places.
    """
    completions = generate(
        policy, prompts, limit=num_tokens, stops=frozenset(), seeds=range(len(prompts)), max_num_seqs=1
    )
    trajectory = build_trajectory(prompts, completions)
    distribution, _ = policy(trajectory.obs)
    return distance(
        distribution.log_prob(trajectory.action)[trajectory.mask], trajectory.behavior_logprob[trajectory.mask]
    )
