"""What must hold before the first step, on real prompts. A check that fails refuses to start and names the mend."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from understudy.batch import Batch, Text, map_tensors
from understudy.distribution import Categorical
from understudy.language.collect import Said
from understudy.language.generate import failing, not_sampled, sampling_problem
from understudy.language.model import Policy
from understudy.language.reading import TOLERANCE, trunk_of
from understudy.language.scorer import RewardModel
from understudy.language.text import last_token
from understudy.language.tokens import SampledTokens
from understudy.language.top import Top
from understudy.objective import ppo
from understudy.run.config import RequestError
from understudy.run.seeds import derive
from understudy.update import update

ROWS = 16  # completions that are looked at
TOKENS = 64  # and how long they get at most: the default of max_new
SPREAD = 64  # completions at full length, or an iteration's, before a reward is said to be the same everywhere
# Mean probability below which a stop id counts as never said. Over 32 tokens of stories260K, the id that ends its stories
# has 5e-6, one that it was never shown 7e-11.
NEVER = 1e-8
OUTLIER = 50  # tolerances that a single token may be off in half precision, where only the mean is held to one
WIDER = 5  # columns of padding more


@dataclass(frozen=True)
class Finding:
    """What a check found wrong."""

    check: str
    """The check's name."""
    cause: str
    mend: str
    fatal: bool = True
    """Learning would go wrong, so that it does not begin; otherwise it is only said."""

    def __str__(self) -> str:
        return f"preflight: {self.cause}; {self.mend}"


class Ground:
    """What the checks look at: a cast, and what its policy says to prompts from the whole of the data."""

    def __init__(self, cast: Any) -> None:
        self.cast, self.cfg, self.tokenizer = cast, cast.cfg, cast.tokenizer
        self.policy: Policy = cast.policy
        self.limit = min(cast.sampler.limit, TOKENS)
        self.tolerance = TOLERANCE[self.policy.model.dtype]
        self.vocabulary: int = self.policy.model.get_input_embeddings().num_embeddings

    @cached_property
    def longest(self) -> list[int]:
        """The ids of the longest prompt that is asked."""
        return list(max((self.cast.sampler.prompts[i].ids for i in self._which(ROWS)), key=len))

    @cached_property
    def said(self) -> Said:
        """Completions of `ROWS` prompts, sampled the way the run will sample. Ways that do not suit this model are left."""
        policy, reference = self.policy, self.cast.reference.policy
        for each in (policy, reference):
            each.settle([self.longest])
        if policy.fast and policy.cached is not False:
            policy.cached = True
            said, problem = self._sample_in_slots()
            if said is not None:
                reference.cached = True
                return said
            policy.remarks.append(f"the key-value cache {problem}: Hugging Face's generate samples instead, row by row")
        policy.cached = reference.cached = False
        try:
            return self.ask(ROWS, self.limit)
        except RequestError:
            raise
        except Exception as error:
            raise not_sampled(policy, failing(error)) from error

    @cached_property
    def trained(self) -> Any:
        """The policy's distribution over what it said, as the trainer reads it."""
        return self.read(self.said)

    @cached_property
    def batch(self) -> Batch:
        """A short, a middling and a long row, ready to learn from; advantages of both signs."""
        record = self.said.record
        order = record.mask.sum(dim=1).argsort()
        some = order[[0, len(order) // 2, -1]]
        record = map_tensors(lambda x: x[some], record)
        with torch.no_grad():
            value = self.policy(record.obs)[1]
        advantage = torch.linspace(-1, 1, value.numel(), device=value.device).view_as(value)
        old = SampledTokens(record.action, record.logprob)
        return Batch.of(record, value=value, advantage=advantage, target=value + 1, old=old)

    def ask(self, rows: int, limit: int) -> Said:
        """Completions of prompts from the whole of the data, with seeds that the run does not use."""
        sampler = copy.copy(self.cast.sampler)
        sampler.limit = limit
        return sampler.answer(
            self.policy, self._which(rows), [derive(sampler.seed, "preflight", i) for i in range(rows)]
        )

    @torch.no_grad()
    def read(self, said: Said) -> Any:
        return self.policy(said.record.obs)[0]

    def apart(self, said: Said, distribution: Any) -> float:
        """How far in nats the sampler's log-probs are from a distribution's."""
        return self.largest((distribution.log_prob(said.record.action) - said.record.logprob)[said.record.mask])

    def largest(self, gap: Tensor) -> float:
        """The size of gaps between log-probs of sampled tokens, in nats: the largest.

        In half precision, tokens are off by rounding, now up, now down (stories260K in bfloat16: by 0.02, the worst of
        1024 by 0.2). Their mean estimates the KL and must be as small as a single token's gap elsewhere.
        """
        worst = float(gap.detach().abs().max())
        if torch.finfo(self.policy.model.dtype).bits >= 32:
            return worst
        return max(abs(float(gap.detach().mean())), worst / OUTLIER)

    def gradient(self, batch: Batch, *, micro: int | None = None) -> Tensor:
        """The gradient that the recipe's own update makes of a batch, as one vector; no parameter moves."""
        keeper = _Keeper(self.policy.parameters())
        update(
            self.policy,
            keeper,
            batch,
            partial(ppo, clip=0.2, value_coef=0.1, entropy_coef=0.01),
            epochs=1,
            minibatches=1,
            max_grad_norm=None,
            micro=micro,
            generator=torch.Generator().manual_seed(0),
        )
        keeper.zero_grad(set_to_none=True)
        return torch.cat([gradient.float().flatten() for gradient in keeper.kept])

    def _which(self, rows: int) -> list[int]:
        size = len(self.cast.sampler)
        return [i * size // rows for i in range(rows)]

    def _sample_in_slots(self) -> tuple[Said | None, str]:
        """Completions by our cache; None and what is wrong where it does not suit the model."""
        if problem := sampling_problem(self.policy, [self.cast.sampler.prompts[i].ids for i in self._which(ROWS)]):
            return None, problem
        try:
            said = self.ask(ROWS, self.limit)
        except Exception as error:  # whatever a model raises that is handed a cache it does not expect
            return None, failing(error)
        gap = self.apart(said, self.read(said))
        return (said, "") if gap <= self.tolerance else (None, f"is {gap:.2g} nats from a pass without it")


class _Keeper(torch.optim.Optimizer):
    """Keeps the gradient in place of a step."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.kept: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.kept = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


def check(cast: Any) -> list[Finding]:
    """Look at everything once: what is worth saying. Neither parameters nor any generator of the run are moved.

    Raises:
        RequestError: something is wrong in a way that learning would not survive.
    """
    ground, found = Ground(cast), []
    devices = [cast.policy.device] if cast.policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _uncounted(cast.judge):
        for look in CHECKS:
            finding = look(ground)
            if finding is not None and finding.fatal:
                raise RequestError(f"{finding}, or start as it is with --no-preflight")
            found += [] if finding is None else [finding]
    return found


@torch.no_grad()
def dropout_off(ground: Ground) -> Finding | None:
    """Reading the same twice gives the same."""
    critic = ground.policy.critic
    models: dict[str, Any] = {"policy": ground.policy.model, "reference": ground.cast.reference.policy.model}
    own = None if critic is None or isinstance(critic.trunk, Top) else critic.trunk  # a Top reads no ids
    models |= {} if own is None else {"critic": own}
    models |= {f"reward model {name}": trunk_of(model.model) for name, (model, _) in ground.cast.models.items()}
    for name, model in models.items():
        ids = torch.tensor([ground.longest] * ROWS, device=ground.policy.device)
        ids = ids.clamp(max=model.get_input_embeddings().num_embeddings - 1)
        first, second = (model(input_ids=ids, use_cache=False)[0] for _ in range(2))
        if not torch.allclose(first, second, rtol=ground.tolerance, atol=ground.tolerance):
            return Finding(
                "dropout off",
                f"the {name} reads the same prompt in two ways, so dropout or other noise is on",
                "set every dropout in its config.json to 0",
            )
    return None


def ids_known(ground: Ground) -> Finding | None:
    """Every id of the prompts, and every stop id, is one of the model's."""
    prompts = {max(prompt.ids): f"prompt in row {prompt.row}" for prompt in ground.cast.sampler.prompts}
    ids = {**prompts, **dict.fromkeys(ground.tokenizer.stops, "stop")}
    if (highest := max(ids)) < ground.vocabulary:
        return None
    cause = f"the {ids[highest]} has id {highest}, the model has ids from 0 to {ground.vocabulary - 1}"
    return Finding("ids known", cause, "give the model the tokenizer it was trained with")


def one_bos(ground: Ground) -> Finding | None:
    """No prompt begins with two BOS, and text begins with one, where the tokenizer adds it."""
    bos = ground.tokenizer.bos
    for prompt in ground.cast.sampler.prompts:
        front = next((i for i, token in enumerate(prompt.ids) if token != bos), len(prompt.ids))
        if bos is not None and (front > 1 or (front == 0 and ground.tokenizer.front and isinstance(prompt.text, str))):
            mend = "take it out of the data or the template" if front else "mend the tokenizer's post-processor"
            return Finding("one BOS", f"the prompt in row {prompt.row} begins with {front} BOS instead of one", mend)
    return None


def turn_end_stops(ground: Ground) -> Finding | None:
    """Of what the chat template writes behind an answer, something is a stop id."""
    tokenizer = ground.tokenizer
    if not tokenizer.stops or isinstance(ground.cast.sampler.prompts[0].text, str):
        return None
    end = tokenizer.turn_end()
    if not end or not tokenizer.stops.isdisjoint(end):
        return None
    written, stops = (tokenizer.hf.convert_ids_to_tokens(ids) for ids in (end, sorted(tokenizer.stops)))
    return Finding(
        "turn end stops",
        f"the chat template ends an answer with {' '.join(written)!r}, the stops are {stops}",
        f"give --stop {written[0]!r}",
    )


@torch.no_grad()
def padding_is_no_token(ground: Ground) -> Finding | None:
    """A pad or stop id inside a row is read as any other, and the steps of a record are what was said, stop included."""
    mend = "tell padding by lengths, never by ids"
    hf_pad = ground.tokenizer.hf.pad_token_id
    for token in {*ground.tokenizer.stops, *([] if hf_pad is None else [hf_pad])} & set(range(ground.vocabulary)):
        rows = [[*ground.longest[:1], token, *ground.longest[1:]], ground.longest]
        text = last_token(rows, fill=token).to(ground.policy.device)
        distribution, _ = ground.policy(text)
        ours = Categorical.of(distribution.head(distribution.hidden[text.mask]))
        alone = [torch.tensor([row], device=ours.logp.device) for row in rows]
        logits = torch.cat([ground.policy.model(ids, use_cache=False).logits[:, -1].float() for ids in alone])
        true = Categorical.of(logits / ground.policy.temperature)
        if not float(true.kl(ours).max()) <= ground.tolerance:
            return Finding("padding is no token", f"id {token} inside a row is read as if it were padding", mend)
    record = ground.said.record
    for row, completion in enumerate(ground.said.completions):
        if record.action[row][record.mask[row]].tolist() != completion.own:
            cause = (
                f"of the {len(completion.own)} tokens of a completion, {int(record.mask[row].sum())} count as chosen"
            )
            return Finding("padding is no token", cause, mend)
    return None


def sampler_is_trainer(ground: Ground) -> Finding | None:
    """The log-prob of each token is to the trainer what it was to the sampler."""
    gap = ground.apart(ground.said, ground.trained)
    if gap <= ground.tolerance:
        return None
    return Finding(
        "sampler is trainer",
        f"the log-probs of sampler and trainer are {gap:.2g} nats apart (at most {ground.tolerance:g})",
        "score with the model, temperature and precision that sampled",
    )


@torch.no_grad()
def reference_is_policy(ground: Ground) -> Finding | None:
    """KL(policy, reference) = 0, where the reference is the policy as it starts."""
    if ground.cfg.reference is not None:
        return None
    mask = ground.said.record.mask
    kl = float(ground.trained.kl(ground.cast.reference(ground.said.record.obs))[mask].max())
    if kl <= ground.tolerance:
        return None
    return Finding(
        "reference is policy",
        f"KL(policy, reference) is {kl:.2g} nats at a token and must begin at 0",
        "copy the reference before anything changes the policy",
    )


def first_ratio(ground: Ground) -> Finding | None:
    """pi / pi_old = 1 before the first step, in a pass with gradient."""
    batch = ground.batch
    _, metrics = ppo(ground.policy, batch, clip=0.2, value_coef=0.0, entropy_coef=0.0)
    gap = ground.largest(metrics["ratio"][batch.mask].log())
    if gap <= ground.tolerance:
        return None
    return Finding(
        "first ratio",
        f"the first ratio is e^{gap:.2g} and must be 1",
        "read with gradient as without, in particular with --no-checkpointing and --no-packing",
    )


def padding_moves_nothing(ground: Ground) -> Finding | None:
    """The gradient is the same with more padding, of other ids."""
    batch = ground.batch
    wide: Batch = map_tensors(lambda x: pad(x, (0, WIDER)), batch)
    last = torch.where(wide.mask, torch.arange(wide.mask.shape[1], device=wide.mask.device), 0).amax(dim=1) + 1
    behind = torch.arange(wide.mask.shape[1], device=last.device) > last[:, None]
    obs = Text(torch.where(behind, ground.vocabulary - 1, wide.obs.ids), wide.mask)
    return _moved(ground, "padding moves nothing", "more padding", ground.gradient(Batch.of(wide, obs=obs)))


def split_moves_nothing(ground: Ground) -> Finding | None:
    """The gradient is the same whether a minibatch is read whole or row by row."""
    return _moved(
        ground, "split moves nothing", "another split into micro-batches", ground.gradient(ground.batch, micro=1)
    )


@torch.no_grad()
def stops_reachable(ground: Ground) -> Finding | None:
    """The policy gives stop ids a chance, where nothing else ends a completion."""
    stops, mask = sorted(ground.tokenizer.stops), ground.said.record.mask
    if not stops or ground.tokenizer.stop_strings:
        return None
    total = 0.0
    for row in range(len(mask)):
        logp = ground.trained.head(ground.trained.hidden[row][mask[row]]).log_softmax(dim=-1)
        total += float(logp[:, stops].exp().sum())
    if (mean := total / int(mask.sum())) >= NEVER:
        return None
    names = ground.tokenizer.hf.convert_ids_to_tokens(stops)
    return Finding(
        "stops reachable",
        f"stop is {names}, which the policy says with probability {mean:.1g} a token, so that nothing ever ends",
        "name the token that ends its texts with --stop, or give --fixed-length N",
    )


def cut_share(ground: Ground) -> Finding | None:
    """Most completions end by themselves; known where max_new is not above `TOKENS`."""
    cut = sum(ground.said.judged.truncated)
    if cut <= ROWS / 2 or ground.limit < ground.cast.sampler.limit:
        return None
    return Finding(
        "cut share",
        f"{cut} of {ROWS} completions were cut by max_new {ground.limit}",
        "raise it, choose what a cut completion is worth with --truncation, or give --fixed-length N",
        fatal=False,
    )


def reward_reads_its_own(ground: Ground) -> Finding | None:
    """What a reward model is fed reads, in its own tokenizer, as what was said."""
    for name, (model, part) in ground.cast.models.items():
        fed = _fed(model, part, ground.said)
        texts = [_plain(model.tokenizer.decode(ids)) for ids in fed]
        said = [[_plain(one) for one in _contents(completion)] for completion in ground.said.judged.completions]
        strange = sum(not any(all(one in text for one in turns) for text in texts) for turns in said)
        if strange > ROWS / 2:
            return Finding(
                "reward reads its own",
                f"reward model {name!r} is fed ids that read otherwise in its own tokenizer, in {strange} of {ROWS} rows",
                "train one whose tokenizer knows what the policy says",
            )
    return None


def reward_spreads(ground: Ground) -> Finding | None:
    """Completions get numbers for scores, and not all the same; a rare one is looked for at full length."""
    judge, said = ground.cast.judge, ground.said
    score = judge(said.judged).score
    if _same(score):
        said = ground.ask(max(SPREAD, ground.cfg.rows), ground.cast.sampler.limit)
        score = judge(said.judged).score
    missing, rows = int(score.isnan().sum()), len(score)
    names = ", ".join(judge.parts)
    problem = f" ({judge.last_error})" if judge.last_error else ""
    if missing == rows:
        cause = f"reward {names} gave none of {rows} completions a score{problem}"
        return Finding("reward spreads", cause, "mend it")
    if _same(score):
        different = len(Counter(tuple(completion.ids) for completion in said.completions))
        return Finding(
            "reward spreads",
            f"reward {names} is {float(score[~score.isnan()][0]):g} for all of {rows} completions, {different} of them "
            "different, so that there is nothing to learn",
            "reward what the policy does now and then, or start from one that does it",
        )
    if missing > rows / 2:
        cause = f"reward {names} gave {missing} of {rows} completions no score{problem}"
        return Finding("reward spreads", cause, "mend it; rows without a score teach nothing", fatal=False)
    return None


CHECKS = (  # what would cause other findings comes before them
    dropout_off,
    ids_known,
    one_bos,
    turn_end_stops,
    sampler_is_trainer,
    padding_is_no_token,
    reference_is_policy,
    first_ratio,
    padding_moves_nothing,
    split_moves_nothing,
    stops_reachable,
    cut_share,
    reward_reads_its_own,
    reward_spreads,
)


def _moved(ground: Ground, check: str, what: str, other: Tensor) -> Finding | None:
    own = ground.gradient(ground.batch)
    gap = float((other - own).norm() / own.norm())
    if gap <= ground.tolerance:
        return None
    return Finding(
        check, f"{what} changes the gradient by {gap:.2g} of its length", "let no row read another or padding"
    )


def _fed(model: RewardModel, part: Any, said: Said) -> list[list[int]]:
    """The rows of ids that a reward model reads to score what was said."""
    rows: list[list[int]] = []

    def note(_: nn.Module, given: tuple[Text]) -> None:
        [text] = given
        ends = text.mask.int().argmax(dim=1).tolist()
        rows.extend(ids[: end + 1] for ids, end in zip(text.ids.tolist(), ends, strict=True))

    handle = model.register_forward_pre_hook(note)
    try:
        part(said.judged)
    except (IndexError, RuntimeError):
        pass  # an id that it does not have; its row is noted
    finally:
        handle.remove()
    return rows


def _same(score: Tensor) -> bool:
    there = score[~score.isnan()]
    return len(there) == 0 or bool((there == there[0]).all())


def _contents(completion: Any) -> list[str]:
    """A completion turn by turn."""
    return [completion] if isinstance(completion, str) else [turn.get("content") or "" for turn in completion]


def _plain(text: str) -> str:
    """Without white space and case: what every tokenizer keeps."""
    return "".join(text.split()).casefold()


@contextmanager
def _uncounted(judge: Any) -> Iterator[None]:
    """What goes missing in here is not the run's."""
    before = dict(judge.failures), judge.last_error, set(judge.reported), [*judge.reports]
    try:
        yield
    finally:
        judge.failures, judge.last_error, judge.reported, judge.reports = before
