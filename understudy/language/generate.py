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

from understudy.batch import Text, Trajectory
from understudy.language.cache import Grid
from understudy.language.reading import TOLERANCE, distance, ran_out_of_memory
from understudy.language.tokens import pick, truncate
from understudy.run.config import RequestError

if TYPE_CHECKING:
    from understudy.language.model import Policy

Ends = Callable[[Sequence[int], Sequence[int]], bool]
"""Whether a completion is at its end with its last token: (prompt, ids so far) -> bool."""
STEP = 8  # slots are left in steps of so many: oneDNN makes a kernel for each number of rows


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
    chosen: list[bool] | None = None
    """Which of them the policy chose, the first and the last always; None for all."""
    messages: list[dict[str, Any]] | None = None
    """The same as chat where others spoke in it too; None for one answer."""

    @property
    def turn(self) -> int:
        """Where the policy's last turn begins."""
        return 0 if self.chosen is None else len(self.chosen) - self.chosen[::-1].index(False)

    @property
    def own(self) -> list[int]:
        """The tokens that the policy chose."""
        return self.ids if self.chosen is None else [i for i, own in zip(self.ids, self.chosen, strict=True) if own]


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
    ends: Ends | None = None,
    sample: bool = True,
    slots: int = 64,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Completion]:
    """Continue each prompt until a stop id, until it `ends`, or for `limit` tokens.

    Args:
        prompts: token ids, each at least one.
        seeds: one a prompt; equal seeds, prompts and parameters give equal completions, whoever the neighbours.
        starts: how many of its `limit` tokens each prompt already holds, at its end; none by default. A token's randomness
            hangs on its seed and its place, so a completion that is taken up again goes on as it would have.
        ends: asked after each token whether it was the last, as `Tokenizer.at_stop_string` says it.
        sample: draw from the policy at its temperature; otherwise its likeliest token.
        slots: how many rows are continued at a time.
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
    training = policy.training
    policy.eval()  # in training mode, a model that recomputes activations keeps no cache
    try:
        if policy.cached is None:
            settle_sampling(policy, prompts)
        if policy.cached:
            kept = partial(truncate, top_k=top_k, top_p=top_p)
            return _generate_in_slots(
                policy, prompts, limit, stops, seeds, starts, ends, kept if sample else None, slots
            )
        drawn = {"do_sample": True, "temperature": policy.temperature, "top_k": top_k, "top_p": top_p} if sample else {}
        return list(_generate_by_hugging_face(policy, prompts, limit, stops, seeds, starts, ends, drawn))
    finally:
        policy.train(training)


def _generate_in_slots(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stops: frozenset[int],
    seeds: Sequence[int],
    starts: Sequence[int],
    ends: Ends | None,
    truncated: Callable[[Tensor], Tensor] | None,
    slots: int,
) -> list[Completion]:
    noise = [torch.rand(limit, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.stack([*noise, torch.zeros(limit)]).to(policy.device)
    desk = _Desk(policy, noise, stops, starts, limit, truncated, None if ends is None else _Ended(ends, prompts))
    idle = slots = min(slots, len(prompts))
    capacity = max(len(p) - start for p, start in zip(prompts, starts, strict=True)) + limit
    grid = Grid(policy, slots, capacity, max(map(len, prompts)))
    owner = torch.full((slots,), -1, device=policy.device)  # the row each slot works on; -1 for none
    tokens = torch.zeros(slots, dtype=torch.long, device=policy.device)
    waiting = deque(range(len(prompts)))
    while waiting or idle < len(owner):
        if waiting and idle >= max(1, len(owner) // 4):  # some prompts together are cheaper than one by one
            working = (owner < 0).nonzero()[: len(waiting), 0]
            whose = torch.tensor([waiting.popleft() for _ in working], device=owner.device)
            hidden = grid.read(working.tolist(), [prompts[row] for row in whose.tolist()])
            owner, idle = owner.index_copy(0, working, whose), idle - len(working)
        else:
            count = -(-(len(owner) - idle) // STEP) * STEP
            if not waiting and count < len(owner):
                moved = (owner[count:] >= 0).nonzero()[:, 0] + count
                into = (owner[:count] < 0).nonzero()[: len(moved), 0]
                grid.close_up(moved, into, count)
                owner, tokens = (part.index_copy(0, into, part[moved])[:count] for part in (owner, tokens))
                idle -= slots - count
                slots = count
            working, whose, hidden = None, owner, grid.step(tokens)
        said, ended = desk.choose(whose, hidden)
        tokens = said if working is None else tokens.index_copy(0, working, said)
        if ended is not None and bool(ended.any()):
            left = whose.masked_fill(ended, -1)
            owner, idle = left if working is None else owner.index_copy(0, working, left), idle + int(ended.sum())
            grid.length.masked_fill_(owner < 0, 0)
    return desk.completions()


class _Ended:
    """Which rows are at the end of their text."""

    def __init__(self, ends: Ends, prompts: Sequence[Sequence[int]]) -> None:
        self.ends, self.prompts = ends, prompts
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.rows: set[int] = set()

    def __call__(self, rows: Tensor, token: Tensor) -> Tensor:
        """The rows that say one token more, [n] -> whether it is their last, bool [n]."""
        for row, said in zip(rows.tolist(), token.tolist(), strict=True):
            if row >= 0:
                self.ids[row].append(said)
                if self.ends(self.prompts[row], self.ids[row]):
                    self.rows.add(row)
        return torch.tensor([row in self.rows for row in rows.tolist()], device=rows.device)


class _Desk:
    """Chooses the next token of some rows and writes it down. Row -1, the last one, is nobody's."""

    def __init__(
        self,
        policy: Policy,
        noise: Tensor,
        stops: frozenset[int],
        starts: Sequence[int],
        limit: int,
        truncated: Callable[[Tensor], Tensor] | None,  # probabilities [n, V] -> those to draw from; None for no draw
        ended: _Ended | None,
    ) -> None:
        self.head, self.noise, self.limit, self.version = policy.head, noise, limit, policy.version
        self.truncated = truncated
        self.stops, self.starts, self.ended = stops, [*starts, 0], ended
        self.stop_ids = torch.tensor(sorted(stops), dtype=torch.long, device=noise.device)
        self.count = torch.tensor(self.starts, device=noise.device)
        self.rows = self.at = torch.zeros(0, dtype=torch.long, device=noise.device)  # who spoke last, and where
        self.left = 0  # tokens that the longest of them may still say
        self.said: list[tuple[Tensor, ...]] = []  # rows, places, tokens and their log-probs

    @torch.inference_mode()
    def choose(self, rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """rows [n], hidden [n, H] -> the tokens [n], and whether each was its row's last, bool [n]; None for nobody's.

        The same rows go on one place further without being looked up.
        """
        if rows is self.rows:
            at = self.at + 1
        else:
            self.count[self.rows] = self.at + 1
            self.count[-1] = 0
            at = self.count[rows]
            self.left = self.limit - int(at.max())
        self.rows, self.at, self.left = rows, at, self.left - 1
        logit = self.head(hidden)
        p = logit.softmax(dim=-1)
        if self.truncated is None:
            token = logit.argmax(dim=-1)
        else:
            p = self.truncated(p)
            token = pick(p, self.noise[rows, at])
        self.said.append((rows, at, token, p.gather(-1, token[:, None])[:, 0].log()))
        last = at + 1 == self.limit if self.left == 0 else None
        if self.stops:
            stopped = (token[:, None] == self.stop_ids).any(dim=1)
            last = stopped if last is None else last | stopped
        if self.ended is not None:
            stopped = self.ended(rows, token)
            last = stopped if last is None else last | stopped
        return token, None if last is None else last & (rows >= 0)

    def completions(self) -> list[Completion]:
        rows, at, token, logprob = (torch.cat(parts).cpu() for parts in zip(*self.said, strict=True))
        if logprob.isnan().any():
            raise FloatingPointError(
                "the policy's probabilities are no numbers: its weights are ruined; lower learning_rate"
            )
        ids = torch.zeros(self.noise.shape, dtype=torch.long).index_put((rows, at), token).tolist()
        logprobs = torch.zeros(self.noise.shape).index_put((rows, at), logprob).tolist()
        end = torch.tensor(self.starts).index_put((rows,), torch.ones_like(rows), accumulate=True).tolist()
        texts = set() if self.ended is None else self.ended.rows
        return [
            Completion(ids[row][a:b], logprobs[row][a:b], ids[row][b - 1] in self.stops or row in texts, self.version)
            for row, (a, b) in enumerate(zip(self.starts[:-1], end[:-1], strict=True))
        ]


def _generate_by_hugging_face(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stops: frozenset[int],
    seeds: Sequence[int],
    starts: Sequence[int],
    ends: Ends | None,
    drawn: dict[str, Any],
) -> Iterator[Completion]:
    """Row by row through `model.generate`, for a model whose cache we do not know.

    The settings that the model came with (min_p, a repetition penalty, suppressed tokens) are set aside meanwhile. The
    log-probs are those of the distribution that was sampled from, so that any setting left would be noticed.
    """
    model = policy.model
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for prompt, seed, start in zip(prompts, seeds, starts, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash((seed, start)) if start else seed)  # a turn must not repeat how it began
                ids = torch.tensor([list(prompt)], device=policy.device)
                criteria = None if ends is None else [partial(_at_end, ends, len(prompt))]
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),  # a pad id in a prompt is a token like any other
                    max_new_tokens=limit - start,
                    eos_token_id=sorted(stops) or None,
                    pad_token_id=0,
                    output_scores=True,
                    return_dict_in_generate=True,
                    stopping_criteria=criteria,
                    **drawn,
                )
            ids = out.sequences[0, len(prompt) :]
            score = torch.stack(out.scores)[:, 0].float() / (1.0 if drawn else policy.temperature)
            chosen = score.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
            said = Completion(ids.tolist(), chosen.tolist(), int(ids[-1]) in stops, policy.version)
            yield said if ends is None else cut_at_end(said, prompt, ends)
    finally:
        model.generation_config = own


def _at_end(ends: Ends, start: int, ids: Tensor, _: Any, **__: Any) -> Tensor:
    """`ends` as one of Hugging Face's stopping criteria, of one row whose prompt has `start` tokens."""
    row = ids[0].tolist()
    return torch.tensor([ends(row[:start], row[start:])], device=ids.device)


def cut_at_end(said: Completion, prompt: Sequence[int], ends: Ends) -> Completion:
    """A completion up to where it ends; what was said behind that was never to be sampled."""
    for end in range(1, len(said.ids) + 1):
        if ends(prompt, said.ids[:end]):
            return replace(said, ids=said.ids[:end], logprob=said.logprob[:end], stopped=True)
    return said


def lay_out(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], *, endless: bool = False
) -> Trajectory:
    """Prompts and what followed as one right-padded record; rewards are zeros until `score`.

    The column after a row's last choice holds the last token: what a cut row is bootstrapped from. What others said in it
    stands between its choices, masked: one episode, whose end is at its last choice.

    Args:
        endless: the task has no end but the limit, so reaching it terminates.
    """
    length = [len(p) + len(c.ids) for p, c in zip(prompts, completions, strict=True)]
    shape = len(length), max(length)
    ids, logprob = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    mask, terminated, truncated = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for row, (prompt, said) in enumerate(zip(prompts, completions, strict=True)):
        first, end = len(prompt) - 1, length[row] - 1
        ids[row, : end + 1] = torch.tensor([*prompt, *said.ids])
        logprob[row, first:end] = torch.tensor(said.logprob)
        mask[row, first:end] = True if said.chosen is None else torch.tensor(said.chosen)
        (terminated if said.stopped or endless else truncated)[row, end - 1] = True
    text = Text(ids, mask)
    return Trajectory(text, text.action, logprob, mask, torch.zeros(shape), terminated, truncated)


def settle_sampling(policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
    """Sample from our cache only where it gives the log-probs of a pass without it; a remark where it does not.

    Raises:
        RequestError: Hugging Face's `generate` does not give them either.
    """
    if policy.fast:
        policy.cached = True
        if not (problem := sampling_problem(policy, prompts)):
            return
        policy.remarks.append(f"the key-value cache {problem}: Hugging Face's generate samples instead, row by row")
    policy.cached = False
    if problem := sampling_problem(policy, prompts):
        raise not_sampled(policy, problem)


def _short_and_long(prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Three of the prompts: the shortest between two of the longest."""
    ordered = sorted(prompts, key=len)
    return [ordered[-1], ordered[0], ordered[-1]]


def not_sampled(policy: Policy, problem: str) -> RequestError:
    """The refusal of a model that no way of sampling suits."""
    return RequestError(
        f"model is a {type(policy.model).__name__}, which cannot be sampled from (Hugging Face's generate {problem}): give "
        "another, or train it without samples, by sft or dpo"
    )


def sampling_problem(policy: Policy, prompts: Sequence[Sequence[int]]) -> str:
    """What is wrong with sampling on the policy's path, as the end of a sentence; empty where nothing is."""
    try:
        gap = check_cache(policy, _short_and_long(prompts))
    except Exception as error:  # whatever a model raises that is handed a cache it does not expect
        return failing(error)
    return "" if gap <= 4 * TOLERANCE[policy.model.dtype] else f"is {gap:.2g} nats from a pass without it"


def failing(error: Exception) -> str:
    """An exception as the end of a sentence. That memory ran out says nothing about the model, and is raised on."""
    if ran_out_of_memory(error):
        raise error
    return f"fails on this model ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


@torch.no_grad()
def check_cache(policy: Policy, prompts: Sequence[Sequence[int]], *, steps: int = 4) -> float:
    """The distance in nats between the log-probs of our cache and those of an uncached pass, on real prompts.

    They take turns in one slot, so that the ring comes round: some models count columns where they should count places.
    """
    said = generate(policy, prompts, limit=steps, stops=frozenset(), seeds=range(len(prompts)), slots=1)
    record = lay_out(prompts, said)
    distribution, _ = policy(record.obs)
    return distance(distribution.log_prob(record.action)[record.mask], record.logprob[record.mask])
