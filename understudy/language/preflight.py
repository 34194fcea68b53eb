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

from understudy.batch import Batch, TokenBatch, map_tensors
from understudy.distribution import Categorical
from understudy.language.data.records import pad_for_scoring
from understudy.language.model.forward import TOLERANCE, trunk_of
from understudy.language.model.policy import Policy
from understudy.language.model.reward_model import RewardModel
from understudy.language.model.token_distribution import SampledTokens
from understudy.language.model.top_layers import TopLayers
from understudy.language.rollout.generate import describe_failure, find_sampling_problem, unsupported_model_error
from understudy.language.rollout.sampler import Rollout
from understudy.objective import ppo
from understudy.run.config import RequestError
from understudy.run.seeds import derive_seed
from understudy.update import update

NUM_ROWS = 16  # completions that are looked at
MAX_TOKENS = 64  # and how long they get at most: the default of max_new
NUM_VARIETY_ROWS = (
    64  # completions at full length, or an iteration's, before a reward is said to be the same everywhere
)
# Mean probability below which a stop id counts as never said. Over 32 tokens of stories260K, the id that ends its stories
# has 5e-6, one that it was never shown 7e-11.
MIN_STOP_PROBABILITY = 1e-8
OUTLIER_FACTOR = 50  # tolerances that a single token may be off in half precision, where only the mean is held to one
NUM_EXTRA_COLUMNS = 5  # columns of padding more


@dataclass(frozen=True)
class Finding:
    """What a check found wrong."""

    check: str
    """The check's name."""
    cause: str
    fix: str
    is_fatal: bool = True
    """Learning would go wrong, so that it does not begin; otherwise it is only said."""

    def __str__(self) -> str:
        return f"preflight: {self.cause}; {self.fix}"


class PreflightContext:
    """What the checks look at: a cast, and what its policy says to prompts from the whole of the data."""

    def __init__(self, models: Any) -> None:
        self.models, self.cfg, self.tokenizer = models, models.cfg, models.tokenizer
        self.policy: Policy = models.policy
        self.limit = min(models.sampler.limit, MAX_TOKENS)
        self.tolerance = TOLERANCE[self.policy.model.dtype]
        self.vocabulary_size: int = self.policy.model.get_input_embeddings().num_embeddings

    @cached_property
    def longest_prompt(self) -> list[int]:
        """The ids of the longest prompt that is asked."""
        return list(max((self.models.sampler.prompts[i].ids for i in self._prompt_indices(NUM_ROWS)), key=len))

    @cached_property
    def rollout(self) -> Rollout:
        """Completions of `ROWS` prompts, sampled the way the run will sample. Ways that do not suit this model are left."""
        policy, reference = self.policy, self.models.reference.policy
        for model in (policy, reference):
            model.verify_separable_head([self.longest_prompt])
        if policy.is_head_separable and policy.uses_own_kv_cache is not False:
            policy.uses_own_kv_cache = True
            rollout, problem = self._sample_with_cache()
            if rollout is not None:
                reference.uses_own_kv_cache = True
                return rollout
            policy.warnings.append(
                f"the key-value cache {problem}: Hugging Face's generate samples instead, row by row"
            )
        policy.uses_own_kv_cache = reference.uses_own_kv_cache = False
        try:
            return self.sample(NUM_ROWS, self.limit)
        except RequestError:
            raise
        except Exception as error:
            raise unsupported_model_error(policy, describe_failure(error)) from error

    @cached_property
    def trainer_distribution(self) -> Any:
        """The policy's distribution over what it said, as the trainer reads it."""
        return self.compute_distribution(self.rollout)

    @cached_property
    def batch(self) -> Batch:
        """A short, a middling and a long row, ready to learn from; advantages of both signs."""
        trajectory = self.rollout.trajectory
        order = trajectory.mask.sum(dim=1).argsort()
        rows = order[[0, len(order) // 2, -1]]
        trajectory = map_tensors(lambda x: x[rows], trajectory)
        with torch.no_grad():
            value = self.policy(trajectory.obs)[1]
        advantage = torch.linspace(-1, 1, value.numel(), device=value.device).view_as(value)
        old_distribution = SampledTokens(trajectory.action, trajectory.behavior_logprob)
        return Batch.of(
            trajectory, value=value, advantage=advantage, target=value + 1, old_distribution=old_distribution
        )

    def sample(self, num_rows: int, limit: int) -> Rollout:
        """Completions of prompts from the whole of the data, with seeds that the run does not use."""
        sampler = copy.copy(self.models.sampler)
        sampler.limit = limit
        return sampler.sample(
            self.policy,
            self._prompt_indices(num_rows),
            [derive_seed(sampler.seed, "preflight", i) for i in range(num_rows)],
        )

    @torch.no_grad()
    def compute_distribution(self, rollout: Rollout) -> Any:
        return self.policy(rollout.trajectory.obs)[0]

    def logprob_gap(self, rollout: Rollout, distribution: Any) -> float:
        """How far in nats the sampler's log-probs are from a distribution's."""
        return self.max_gap(
            (distribution.log_prob(rollout.trajectory.action) - rollout.trajectory.behavior_logprob)[
                rollout.trajectory.mask
            ]
        )

    def max_gap(self, gap: Tensor) -> float:
        """The size of gaps between log-probs of sampled tokens, in nats: the largest.

        In half precision, tokens are off by rounding, now up, now down (stories260K in bfloat16: by 0.02, the worst of
        1024 by 0.2). Their mean estimates the KL and must be as small as a single token's gap elsewhere.
        """
        worst = float(gap.detach().abs().max())
        if torch.finfo(self.policy.model.dtype).bits >= 32:
            return worst
        return max(abs(float(gap.detach().mean())), worst / OUTLIER_FACTOR)

    def compute_gradient(self, batch: Batch, *, micro_batch_size: int | None = None) -> Tensor:
        """The gradient that the recipe's own update makes of a batch, as one vector; no parameter moves."""
        recorder = _GradientRecorder(self.policy.parameters())
        update(
            self.policy,
            recorder,
            batch,
            partial(ppo, clip=0.2, value_coef=0.1, entropy_coef=0.01),
            num_epochs=1,
            num_minibatches=1,
            max_grad_norm=None,
            micro_batch_size=micro_batch_size,
            generator=torch.Generator().manual_seed(0),
        )
        recorder.zero_grad(set_to_none=True)
        return torch.cat([gradient.float().flatten() for gradient in recorder.gradients])

    def _prompt_indices(self, num_rows: int) -> list[int]:
        size = len(self.models.sampler)
        return [i * size // num_rows for i in range(num_rows)]

    def _sample_with_cache(self) -> tuple[Rollout | None, str]:
        """Completions by our cache; None and what is wrong where it does not suit the model."""
        if problem := find_sampling_problem(
            self.policy, [self.models.sampler.prompts[i].ids for i in self._prompt_indices(NUM_ROWS)]
        ):
            return None, problem
        try:
            rollout = self.sample(NUM_ROWS, self.limit)
        except Exception as error:  # whatever a model raises that is handed a cache it does not expect
            return None, describe_failure(error)
        gap = self.logprob_gap(rollout, self.compute_distribution(rollout))
        return (rollout, "") if gap <= self.tolerance else (None, f"is {gap:.2g} nats from a pass without it")


class _GradientRecorder(torch.optim.Optimizer):
    """Keeps the gradient in place of a step."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


def run_checks(models: Any) -> list[Finding]:
    """Look at everything once: what is worth saying. Neither parameters nor any generator of the run are moved.

    Raises:
        RequestError: something is wrong in a way that learning would not survive.
    """
    context, findings = PreflightContext(models), []
    devices = [models.policy.device] if models.policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _restore_failure_counts(models.reward_sum):
        for check in CHECKS:
            finding = check(context)
            if finding is not None and finding.is_fatal:
                raise RequestError(f"{finding}, or start as it is with --no-preflight")
            findings += [] if finding is None else [finding]
    return findings


@torch.no_grad()
def dropout_off(context: PreflightContext) -> Finding | None:
    """Reading the same twice gives the same."""
    critic = context.policy.critic
    models: dict[str, Any] = {"policy": context.policy.model, "reference": context.models.reference.policy.model}
    critic_trunk = None if critic is None or isinstance(critic.trunk, TopLayers) else critic.trunk  # a Top reads no ids
    models |= {} if critic_trunk is None else {"critic": critic_trunk}
    models |= {
        f"reward model {name}": trunk_of(model.model) for name, (model, _) in context.models.reward_models.items()
    }
    for name, model in models.items():
        ids = torch.tensor([context.longest_prompt] * NUM_ROWS, device=context.policy.device)
        ids = ids.clamp(max=model.get_input_embeddings().num_embeddings - 1)
        first, second = (model(input_ids=ids, use_cache=False)[0] for _ in range(2))
        if not torch.allclose(first, second, rtol=context.tolerance, atol=context.tolerance):
            return Finding(
                "dropout off",
                f"the {name} reads the same prompt in two ways, so dropout or other noise is on",
                "set every dropout in its config.json to 0",
            )
    return None


def ids_in_vocabulary(context: PreflightContext) -> Finding | None:
    """Every id of the prompts, and every stop id, is one of the model's."""
    prompts = {max(prompt.ids): f"prompt in row {prompt.row}" for prompt in context.models.sampler.prompts}
    ids = {**prompts, **dict.fromkeys(context.tokenizer.stops, "stop")}
    if (highest := max(ids)) < context.vocabulary_size:
        return None
    cause = f"the {ids[highest]} has id {highest}, the model has ids from 0 to {context.vocabulary_size - 1}"
    return Finding("ids known", cause, "give the model the tokenizer it was trained with")


def one_bos(context: PreflightContext) -> Finding | None:
    """No prompt begins with two BOS, and text begins with one, where the tokenizer adds it."""
    bos = context.tokenizer.bos_token_id
    for prompt in context.models.sampler.prompts:
        num_bos = next((i for i, token in enumerate(prompt.ids) if token != bos), len(prompt.ids))
        if bos is not None and (
            num_bos > 1 or (num_bos == 0 and context.tokenizer.prefix_ids and isinstance(prompt.text, str))
        ):
            fix = "take it out of the data or the template" if num_bos else "mend the tokenizer's post-processor"
            return Finding("one BOS", f"the prompt in row {prompt.row} begins with {num_bos} BOS instead of one", fix)
    return None


def turn_end_is_stop(context: PreflightContext) -> Finding | None:
    """Of what the chat template writes behind an answer, something is a stop id."""
    tokenizer = context.tokenizer
    if not tokenizer.stops or isinstance(context.models.sampler.prompts[0].text, str):
        return None
    end = tokenizer.encode_turn_end()
    if not end or not tokenizer.stops.isdisjoint(end):
        return None
    end_tokens, stops = (tokenizer.hf.convert_ids_to_tokens(ids) for ids in (end, sorted(tokenizer.stops)))
    return Finding(
        "turn end stops",
        f"the chat template ends an answer with {' '.join(end_tokens)!r}, the stops are {stops}",
        f"give --stop {end_tokens[0]!r}",
    )


@torch.no_grad()
def padding_is_not_a_token(context: PreflightContext) -> Finding | None:
    """A pad or stop id inside a row is read as any other, and the steps of a record are what was said, stop included."""
    fix = "tell padding by lengths, never by ids"
    pad_token_id = context.tokenizer.hf.pad_token_id
    for token in {*context.tokenizer.stops, *([] if pad_token_id is None else [pad_token_id])} & set(
        range(context.vocabulary_size)
    ):
        rows = [[*context.longest_prompt[:1], token, *context.longest_prompt[1:]], context.longest_prompt]
        tokens = pad_for_scoring(rows, fill=token).to(context.policy.device)
        distribution, _ = context.policy(tokens)
        policy_logprob = Categorical.of(distribution.head(distribution.hidden[tokens.mask]))
        unpadded_rows = [torch.tensor([row], device=policy_logprob.logp.device) for row in rows]
        logits = torch.cat([context.policy.model(ids, use_cache=False).logits[:, -1].float() for ids in unpadded_rows])
        model_logprob = Categorical.of(logits / context.policy.temperature)
        if not float(model_logprob.kl(policy_logprob).max()) <= context.tolerance:
            return Finding("padding is no token", f"id {token} inside a row is read as if it were padding", fix)
    trajectory = context.rollout.trajectory
    for row, completion in enumerate(context.rollout.completions):
        if trajectory.action[row][trajectory.mask[row]].tolist() != completion.policy_ids:
            cause = (
                f"of the {len(completion.policy_ids)} tokens of a completion, {int(trajectory.mask[row].sum())} "
                "count as chosen"
            )
            return Finding("padding is no token", cause, fix)
    return None


def sampler_matches_trainer(context: PreflightContext) -> Finding | None:
    """The log-prob of each token is to the trainer what it was to the sampler."""
    gap = context.logprob_gap(context.rollout, context.trainer_distribution)
    if gap <= context.tolerance:
        return None
    return Finding(
        "sampler is trainer",
        f"the log-probs of sampler and trainer are {gap:.2g} nats apart (at most {context.tolerance:g})",
        "score with the model, temperature and precision that sampled",
    )


@torch.no_grad()
def reference_matches_policy(context: PreflightContext) -> Finding | None:
    """KL(policy, reference) = 0, where the reference is the policy as it starts."""
    if context.cfg.reference is not None:
        return None
    mask = context.rollout.trajectory.mask
    kl = float(context.trainer_distribution.kl(context.models.reference(context.rollout.trajectory.obs))[mask].max())
    if kl <= context.tolerance:
        return None
    return Finding(
        "reference is policy",
        f"KL(policy, reference) is {kl:.2g} nats at a token and must begin at 0",
        "copy the reference before anything changes the policy",
    )


def first_ratio_is_one(context: PreflightContext) -> Finding | None:
    """pi / pi_old = 1 before the first step, in a pass with gradient."""
    batch = context.batch
    _, metrics = ppo(context.policy, batch, clip=0.2, value_coef=0.0, entropy_coef=0.0)
    gap = context.max_gap(metrics["ratio"][batch.mask].log())
    if gap <= context.tolerance:
        return None
    return Finding(
        "first ratio",
        f"the first ratio is e^{gap:.2g} and must be 1",
        "read with gradient as without, in particular with --no-gradient-checkpointing and --no-packing",
    )


def padding_keeps_gradient(context: PreflightContext) -> Finding | None:
    """The gradient is the same with more padding, of other ids."""
    batch = context.batch
    padded: Batch = map_tensors(lambda x: pad(x, (0, NUM_EXTRA_COLUMNS)), batch)
    row_length = (
        torch.where(padded.mask, torch.arange(padded.mask.shape[1], device=padded.mask.device), 0).amax(dim=1) + 1
    )
    is_padding = torch.arange(padded.mask.shape[1], device=row_length.device) > row_length[:, None]
    obs = TokenBatch(torch.where(is_padding, context.vocabulary_size - 1, padded.obs.ids), padded.mask)
    return _compare_gradient(
        context, "padding moves nothing", "more padding", context.compute_gradient(Batch.of(padded, obs=obs))
    )


def micro_batches_keep_gradient(context: PreflightContext) -> Finding | None:
    """The gradient is the same whether a minibatch is read whole or row by row."""
    return _compare_gradient(
        context,
        "split moves nothing",
        "another split into micro-batches",
        context.compute_gradient(context.batch, micro_batch_size=1),
    )


@torch.no_grad()
def stops_reachable(context: PreflightContext) -> Finding | None:
    """The policy gives stop ids a chance, where nothing else ends a completion."""
    stops, mask = sorted(context.tokenizer.stops), context.rollout.trajectory.mask
    if not stops or context.tokenizer.stop_strings:
        return None
    total_probability = 0.0
    for row in range(len(mask)):
        logprob = context.trainer_distribution.head(context.trainer_distribution.hidden[row][mask[row]]).log_softmax(
            dim=-1
        )
        total_probability += float(logprob[:, stops].exp().sum())
    if (mean := total_probability / int(mask.sum())) >= MIN_STOP_PROBABILITY:
        return None
    stop_tokens = context.tokenizer.hf.convert_ids_to_tokens(stops)
    return Finding(
        "stops reachable",
        f"stop is {stop_tokens}, which the policy says with probability {mean:.1g} a token, so that nothing ever ends",
        "name the token that ends its texts with --stop, or give --fixed-length N",
    )


def truncated_fraction(context: PreflightContext) -> Finding | None:
    """Most completions end by themselves; known where max_new is not above `TOKENS`."""
    num_truncated = sum(context.rollout.scoring_input.truncated)
    if num_truncated <= NUM_ROWS / 2 or context.limit < context.models.sampler.limit:
        return None
    return Finding(
        "cut share",
        f"{num_truncated} of {NUM_ROWS} completions were cut by max_new_tokens {context.limit}",
        "raise it, choose what a cut completion is worth with --truncation, or give --fixed-length N",
        is_fatal=False,
    )


def reward_tokenizer_matches(context: PreflightContext) -> Finding | None:
    """What a reward model is fed reads, in its own tokenizer, as what was said."""
    for name, (model, term) in context.models.reward_models.items():
        model_inputs = _reward_model_inputs(model, term, context.rollout)
        texts = [_normalize_text(model.tokenizer.decode(ids)) for ids in model_inputs]
        completion_turns = [
            [_normalize_text(turn) for turn in _turn_texts(completion)]
            for completion in context.rollout.scoring_input.completions
        ]
        num_mismatched = sum(not any(all(one in text for one in turns) for text in texts) for turns in completion_turns)
        if num_mismatched > NUM_ROWS / 2:
            return Finding(
                "reward reads its own",
                f"reward model {name!r} is fed ids that read otherwise in its own tokenizer, in "
                f"{num_mismatched} of {NUM_ROWS} rows",
                "train one whose tokenizer knows what the policy says",
            )
    return None


def reward_varies(context: PreflightContext) -> Finding | None:
    """Completions get numbers for scores, and not all the same; a rare one is looked for at full length."""
    reward_sum, rollout = context.models.reward_sum, context.rollout
    score = reward_sum(rollout.scoring_input).score
    if _all_equal(score):
        rollout = context.sample(
            max(NUM_VARIETY_ROWS, context.cfg.completions_per_iteration), context.models.sampler.limit
        )
        score = reward_sum(rollout.scoring_input).score
    num_missing, num_rows = int(score.isnan().sum()), len(score)
    term_names = ", ".join(reward_sum.terms)
    problem = f" ({reward_sum.last_error})" if reward_sum.last_error else ""
    if num_missing == num_rows:
        cause = f"reward {term_names} gave none of {num_rows} completions a score{problem}"
        return Finding("reward spreads", cause, "mend it")
    if _all_equal(score):
        num_different = len(Counter(tuple(completion.ids) for completion in rollout.completions))
        return Finding(
            "reward spreads",
            f"reward {term_names} is {float(score[~score.isnan()][0]):g} for all of {num_rows} completions, "
            f"{num_different} of them "
            "different, so that there is nothing to learn",
            "reward what the policy does now and then, or start from one that does it",
        )
    if num_missing > num_rows / 2:
        cause = f"reward {term_names} gave {num_missing} of {num_rows} completions no score{problem}"
        return Finding("reward spreads", cause, "fix it; rows without a score teach nothing", is_fatal=False)
    return None


CHECKS = (  # what would cause other findings comes before them
    dropout_off,
    ids_in_vocabulary,
    one_bos,
    turn_end_is_stop,
    sampler_matches_trainer,
    padding_is_not_a_token,
    reference_matches_policy,
    first_ratio_is_one,
    padding_keeps_gradient,
    micro_batches_keep_gradient,
    stops_reachable,
    truncated_fraction,
    reward_tokenizer_matches,
    reward_varies,
)


def _compare_gradient(context: PreflightContext, check: str, change: str, gradient: Tensor) -> Finding | None:
    expected_gradient = context.compute_gradient(context.batch)
    gap = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    if gap <= context.tolerance:
        return None
    return Finding(
        check, f"{change} changes the gradient by {gap:.2g} of its length", "let no row read another or padding"
    )


def _reward_model_inputs(model: RewardModel, term: Any, rollout: Rollout) -> list[list[int]]:
    """The rows of ids that a reward model reads to score what was said."""
    rows: list[list[int]] = []

    def record_input(_: nn.Module, inputs: tuple[TokenBatch]) -> None:
        [tokens] = inputs
        last_columns = tokens.mask.int().argmax(dim=1).tolist()
        rows.extend(ids[: end + 1] for ids, end in zip(tokens.ids.tolist(), last_columns, strict=True))

    handle = model.register_forward_pre_hook(record_input)
    try:
        term(rollout.scoring_input)
    except (IndexError, RuntimeError):
        pass  # an id that it does not have; its row is noted
    finally:
        handle.remove()
    return rows


def _all_equal(score: Tensor) -> bool:
    valid_score = score[~score.isnan()]
    return len(valid_score) == 0 or bool((valid_score == valid_score[0]).all())


def _turn_texts(completion: Any) -> list[str]:
    """A completion turn by turn."""
    return [completion] if isinstance(completion, str) else [turn.get("content") or "" for turn in completion]


def _normalize_text(text: str) -> str:
    """Without white space and case: what every tokenizer keeps."""
    return "".join(text.split()).casefold()


@contextmanager
def _restore_failure_counts(reward_sum: Any) -> Iterator[None]:
    """What goes missing in here is not the run's."""
    before = dict(reward_sum.failures), reward_sum.last_error, set(reward_sum.reported), [*reward_sum.reports]
    try:
        yield
    finally:
        reward_sum.failures, reward_sum.last_error, reward_sum.reported, reward_sum.reports = before
