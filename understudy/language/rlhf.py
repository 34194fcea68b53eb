"""Who plays in RLHF: policy, critic, reference, judges and prompts; and what is written down of their play."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from understudy.batch import Batch, TokenBatch, Trajectory
from understudy.constraints import Constraint, LagrangianConstraints
from understudy.language import preflight, training
from understudy.language.best import save_if_best
from understudy.language.config import FunctionSpec, RolloutConfig
from understudy.language.data.records import (
    Example,
    Limit,
    Prompt,
    Row,
    Tokenizer,
    check_ids,
    make_examples,
    make_prompts,
    read_rows,
)
from understudy.language.evaluate import evaluate, explain_ended_worse
from understudy.language.model.forward import check_forward_consistency
from understudy.language.model.policy import Policy, Reference, model_dir
from understudy.language.model.reward_model import RewardModel, load_reward_model
from understudy.language.model.token_distribution import TokenDistribution
from understudy.language.model.top_layers import frozen_parameter_names
from understudy.language.provenance import check_reference, check_reward_model_provenance
from understudy.language.rewards import function_state
from understudy.language.rewards.reward_sum import FunctionReward as JudgeFunction
from understudy.language.rewards.reward_sum import RewardSum, RewardTerm, Scores, distinct_n, row_to_dict
from understudy.language.rollout.generate import Engine, generate
from understudy.language.rollout.multi_turn import ReplyFunction
from understudy.language.rollout.sampler import Rollout, Sampler
from understudy.language.sft import collate_examples, load_policy, select_trainable_parameters
from understudy.language.training import TrainingRun
from understudy.objective import ReferenceKLPenalty, kl_exact, kl_k2, kl_k3, scale_penalty
from understudy.reduce import effective_sample_fraction, explained_variance, importance_weight, masked_mean, whiten
from understudy.reward import adapt_kl_reference_coef, handle_truncation, kl_reward, reward_at_last_step
from understudy.run import lineage
from understudy.run.config import RequestError, check_effects
from understudy.run.interrupt import close_at_exit
from understudy.run.redact import printable, redact
from understudy.run.seeds import seed_shared_generators
from understudy.run.store import ResumePoint, write_json

CONSTRAINT_METRICS = (
    "score_mean",
    "score_missing_fraction",
    "kl_reference",
    "length_mean",
    "stopped",
    "distinct_4",
    "gold_mean",
)
"""Metrics of `observe` that a constraint may name."""
KL_PENALTIES = {"k2": kl_k2, "k3": kl_k3, "exact": kl_exact}
ROWS_PER_FORWARD = 64  # rows a pass without gradient reads at a time
REFERENCE_ROW_DIVISOR = 4  # one row in so many is read by a reference that nothing is held to


class RLHFModels:
    """The models of a run, its data, and its notebook."""

    def __init__(self, cfg: Any, engine: Engine | None = None) -> None:
        self.cfg = cfg
        self.reward_models: dict[str, tuple[RewardModel, RewardTerm]] = {}
        self.has_fixed_length = bool(cfg.fixed_length)
        critic_fields = ("critic", "critic_init", "critic_layers")
        critic_options = {name: getattr(cfg, name) for name in critic_fields if hasattr(cfg, name)}
        self.policy = load_policy(
            cfg, has_fixed_length=self.has_fixed_length, temperature=cfg.temperature, **critic_options
        )
        self.tokenizer: Tokenizer = self.policy.tokenizer
        self.reward_sum = self._make_reward_sum(cfg.reward, "reward")
        self.gold_sum = self._make_reward_sum(cfg.gold, "gold") if cfg.gold else None
        self.measured_sum = self.gold_sum  # and what constraints measure besides
        self.constraints = self._make_constraints() if cfg.constraint else None
        self._init_critic_from_reward_model()
        self.reference = self._make_reference()
        select_trainable_parameters(self.policy, cfg)
        name = "fixed_length" if self.has_fixed_length else "max_new_tokens"
        limit = Limit.of(self.policy.model, cfg.max_length, num_completion_tokens=cfg.limit, field_name=name)
        if limit.max_tokens < 1:
            raise RequestError(f"{name} is {cfg.limit}: the model's context leaves no room for a prompt; lower it")

        def load_prompts(rows: Sequence[Row], source: str) -> Sequence[Prompt]:
            options = {"max_length": limit, "too_long": cfg.too_long, "unconditional": cfg.unconditional}
            records = make_prompts(rows, self.tokenizer, **options)
            check_ids(records, self.policy.model)
            self.policy.warnings += records.make_warnings(source)
            return records

        rows = read_rows(cfg.data, **cfg.reading_options)
        train_prompts, held_out_prompts, warnings = training.split_data(
            rows, load_prompts, cfg, lambda prompt: prompt.ids
        )
        self.policy.warnings += warnings
        self.has_held_out_rows = bool(held_out_prompts)
        self.reply_function = None if cfg.reply is None else ReplyFunction(cfg.reply, timeout=cfg.reward_timeout)
        self.sampler = self._make_sampler(train_prompts, self._engine_with_truncation(engine))
        self.evaluation_sampler = self._make_sampler(held_out_prompts or train_prompts)
        self.pretraining_examples = self._load_pretraining_examples()
        for policy in (self.policy, self.reference.policy):
            check_forward_consistency(policy, [prompt.ids for prompt in self.sampler.prompts])
        self.optimizer = self._make_optimizer()
        self.run: TrainingRun

    @property
    def functions(self) -> dict[str, JudgeFunction | ReplyFunction]:
        """The user's functions, each by the field that it came from and its name."""
        judges = {"reward": self.reward_sum} | ({} if self.measured_sum is None else {"gold": self.measured_sum})
        found = {f"{field} {name}": part for field, judge in judges.items() for name, part in judge.functions.items()}
        return found | ({} if self.reply_function is None else {"reply": self.reply_function})

    def score_completions(self, rollout: Rollout) -> Scores:
        """What the judges say; under `gold` what is only measured."""
        scores = self.reward_sum(rollout.scoring_input)
        gold = None if self.measured_sum is None else self.measured_sum(rollout.scoring_input)
        self._warn_about_missing()
        return scores._replace(gold=gold)

    def subtract_constraint_costs(self, scores: Scores) -> Tensor:
        """Scores as they are paid, [B]: less what held constraints charge, at their multipliers of now."""
        return (
            scores.score
            if self.constraints is None
            else self.constraints.subtract_constraint_costs(scores.score, _measured_terms(scores))
        )

    def apply_constraints(self, scores: Scores) -> Tensor:
        """The same, once the multipliers have followed what these rows come to."""
        if self.constraints is not None:
            means = {name: float(term_score.nanmean()) for name, term_score in _measured_terms(scores).items()}
            self.constraints.begin(means, self.policy, self.optimizer)
        return self.subtract_constraint_costs(scores)

    def _warn_about_missing(self) -> None:
        """Print, and note in events.jsonl, which scores went missing in a way that they had not before."""
        for judge in (self.reward_sum, self.gold_sum, self.measured_sum):
            while judge is not None and judge.reports:
                text = printable(redact(judge.reports.pop(0)))
                if (run := getattr(self, "run", None)) is not None:
                    run.log_event("scores_missing", text=text)
                else:
                    print(f"understudy: {text}", file=sys.stderr)

    def next_pretraining_text(self, num_rows: int) -> TokenBatch | None:
        """The iteration's rows of pretraining text, `num_rows` of them, if any is mixed in; they come in turn."""
        if not self.pretraining_examples:
            return None
        first = (self.run.iteration + 1) * num_rows
        return collate_examples(
            [self.pretraining_examples[(first + i) % len(self.pretraining_examples)] for i in range(num_rows)]
        ).to(self.policy.device)

    def compute_evaluation(self, num_rows: int) -> dict[str, Any]:
        """What `language.evaluate.evaluate` measures on held-out prompts, and the specs that it was measured by."""
        evaluation = evaluate(
            self.policy, self.evaluation_sampler, self.reward_sum, self.gold_sum, self.reference, num_rows=num_rows
        )
        self._warn_about_missing()
        return evaluation | {"specs": {"reward": list(self.cfg.reward), "gold": list(self.cfg.gold)}}

    def evaluate(self) -> dict[str, float]:
        """Held-out prompts and seeds of their own; written to evaluation.json, samples and all."""
        evaluation = self.compute_evaluation(self.cfg.evaluate_rows)
        path, iteration = self.run.run.path, self.run.iteration + 1
        with self._tolerate_write_errors():
            write_json(
                path / "evaluation.json",
                {
                    **evaluation,
                    "held_out": self.has_held_out_rows,
                    "iteration": iteration,
                    "after_steps": self.run.steps,
                },
            )
            (path / "samples").mkdir(exist_ok=True)
            write_json(path / "samples" / f"evaluation-{iteration:06d}.json", evaluation["samples"])
            if self.cfg.best_by != "none":
                save_if_best(self.run, evaluation, self.cfg.best_by)
                evaluation["best"] = self.run.recipe_state.get("best", math.nan)
        return {f"evaluation_{name}": x for name, x in evaluation.items() if isinstance(x, int | float)}

    @torch.no_grad()
    def log_rollout(
        self, rollout: Rollout, scores: Scores, batch: Batch, reward: Tensor, reference_distribution: TokenDistribution
    ) -> dict[str, float]:
        """An iteration in numbers; some of its completions, token by token, go to samples/."""
        has_reference_logprob = isinstance(batch.reference, Tensor)  # else the whole distribution is kept there
        reference_logprob = batch.reference if has_reference_logprob else reference_distribution.log_prob(batch.action)
        kl = torch.where(reference_distribution.mask, batch.behavior_logprob - reference_logprob, 0.0)
        row_mask = reference_distribution.mask.any(dim=1)
        policy_ids = [completion.policy_ids for completion in rollout.completions]
        metrics = {
            "score_mean": float(scores.score.nanmean()),
            "score_missing_fraction": float(scores.score.isnan().float().mean()),
            "kl_reference": float(kl.sum() / row_mask.sum().clamp(min=1)),
            "length_mean": sum(map(len, policy_ids)) / len(policy_ids),
            "stopped": sum(completion.stopped for completion in rollout.completions) / len(policy_ids),
            "distinct_4": distinct_n(policy_ids, 4),
            "explained_variance": float(explained_variance(batch.value, batch.target, batch.mask)),
        }
        if len(scores.terms) > 1:
            metrics |= {f"score_{name}": float(term_score.nanmean()) for name, term_score in scores.terms.items()}
        if scores.gold is not None and self.cfg.gold:
            metrics["gold_mean"] = float(scores.gold.score.nanmean())
        metrics |= self.run.close_constraints(metrics)
        self._write_samples(rollout, scores, batch, reward, kl)
        return metrics

    def _write_samples(self, rollout: Rollout, scores: Scores, batch: Batch, reward: Tensor, kl: Tensor) -> None:
        num_samples = min(self.cfg.log_samples, len(batch))
        if not num_samples:
            return
        entropy = self.policy(batch.obs[:num_samples])[0].entropy()
        columns = {
            "logprob": batch.behavior_logprob,
            "value": batch.value,
            "advantage": batch.advantage,
            "reward": reward,
            "kl_reference": kl,
            "entropy": entropy,
        }
        lines, logged_scores = [], scores if self.cfg.gold else scores._replace(gold=None)
        for i in range(num_samples):
            chosen_columns = rollout.trajectory.mask[i].nonzero()[:, 0].tolist()
            span = slice(
                chosen_columns[0], chosen_columns[-1] + 1
            )  # what others said in between has its place in every column
            line = {
                "row": rollout.row_numbers[i],
                "version": rollout.completions[i].version,
                "prompt": rollout.prompts[i].text,
                "completion": rollout.scoring_input.completions[i],
                "prompt_ids": list(rollout.prompts[i].ids),
                "completion_ids": rollout.completions[i].ids,
                "tokens": self.tokenizer.decode_tokens(rollout.completions[i].ids),
                "chosen": rollout.trajectory.mask[i, span].tolist(),
                "stopped": rollout.completions[i].stopped,
                **row_to_dict(logged_scores, i),
                **{name: [round(x, 6) for x in column[i, span].tolist()] for name, column in columns.items()},
            }
            lines.append(json.dumps(line, ensure_ascii=False))
        path = self.run.run.path / "samples" / f"{self.run.iteration + 1:06d}.jsonl"
        with self._tolerate_write_errors():
            path.parent.mkdir(exist_ok=True)
            path.write_text(redact("\n".join(lines)) + "\n", encoding="utf-8")

    @contextmanager
    def _tolerate_write_errors(self) -> Generator[None]:
        """A disk that refuses what a run does not go on from is said, once, and the run goes on."""
        try:
            yield
        except OSError as error:
            if not self.run.run.has_reported_write_failure:
                print(f"understudy: samples cannot be written ({error}); the run goes on", file=sys.stderr)
            self.run.run.has_reported_write_failure = True

    def _make_reward_sum(self, specs: Sequence[str], field: str) -> RewardSum:
        def load_term(source: str) -> RewardTerm:
            options = {"trust_remote_code": self.cfg.trust_remote_code}
            model = (
                load_reward_model(model_dir(source, "reward_model"), **options)
                .to(self.cfg.device)
                .requires_grad_(False)
                .eval()
            )
            check_reward_model_provenance(model_dir(source, "reward_model"), model.tokenizer)
            term = model.make_reward_term(self.tokenizer)
            if field == "reward":
                self.reward_models[source] = model, term
            return term

        parsed_specs: list[Any] = [
            (spec.call, spec.weight) if isinstance(spec, FunctionSpec) else spec for spec in specs
        ]
        options = {"timeout": self.cfg.reward_timeout, "missing": self.cfg.missing_score}
        return RewardSum.of(parsed_specs, load_model=load_term, field=field, **options)

    def _make_constraints(self) -> LagrangianConstraints:
        """The constraints. What is neither measured already nor a metric is a spec, and is measured beside gold.

        A builtin with an argument is no part by the builtin's name: `length` of a reward `length:40` is the length.
        """
        constraints = LagrangianConstraints(
            [Constraint.parse(text) for text in self.cfg.constraint],
            rate=self.cfg.constraint_rate,
            max_rollbacks=self.cfg.constraint_rollbacks,
        )
        spec_sums = [(self.cfg.reward, self.reward_sum), *([(self.cfg.gold, self.gold_sum)] if self.gold_sum else [])]
        spec_names = [pair for specs, reward_sum in spec_sums for pair in zip(specs, reward_sum.terms, strict=True)]
        term_names = {name for spec, name in spec_names if not spec.startswith(f"{name}:")}
        for constraint in constraints.constraints.values():
            if constraint.response == "hold" and constraint.name in {*CONSTRAINT_METRICS} - term_names:
                raise RequestError(
                    f"constraint is '{constraint}', and {constraint.name} is a metric, which no completion can "
                    "be charged for: "
                    f"write '{constraint}:warn', :stop or :rollback"
                )
        unmeasured_names = [name for name in constraints.names if name not in {*term_names, *CONSTRAINT_METRICS}]
        if unmeasured_names:
            judge = self._make_reward_sum(unmeasured_names, "constraint")
            terms = [(name, 0.0, term) for name, (_, term) in zip(unmeasured_names, judge.terms.values(), strict=True)]
            self.measured_sum = RewardSum(
                terms + [(name, *part) for name, part in (self.gold_sum.terms.items() if self.gold_sum else ())],
                missing=self.cfg.missing_score,
            )
            self.measured_sum.field = "gold"
        return constraints

    def _init_critic_from_reward_model(self) -> None:
        """A separate critic begins as the reward model, where the reward is one that speaks the policy's tokens."""
        if getattr(self.cfg, "critic", "none") == "separate" and len(self.reward_models) == 1:
            [(model, reward_term)] = self.reward_models.values()
            weight = next(term_weight for term_weight, term in self.reward_sum.terms.values() if term is reward_term)
            if model.tokenizer.hf.get_vocab().items() >= self.tokenizer.hf.get_vocab().items():
                self.policy.critic = model.make_critic(weight=weight).to(self.cfg.device)

    def _make_reference(self) -> Reference:
        if self.cfg.reference is None:
            return Reference(self.policy, shared_parameters=self._shared_parameters())
        source = self.cfg.reference
        options = {"dtype": self.policy.model.dtype, "packing": self.cfg.packing, "temperature": self.cfg.temperature}
        options["trust_remote_code"] = self.cfg.trust_remote_code
        try:
            reference_policy = Policy.from_pretrained(model_dir(source, "policy"), **options)
        except RequestError as error:
            raise RequestError(f"reference is {source!r}: {error}") from None
        check_reference(source, reference_policy, self.policy)
        return Reference(reference_policy.to(self.cfg.device))

    def _shared_parameters(self) -> list[nn.Parameter]:
        """What the reference need not copy: beside an adapter everything, below `train_layers` what lies there."""
        if self.cfg.reference_mode == "copy":
            return []
        frozen_names = frozen_parameter_names(self.policy.model, self.cfg.train_layers) if self.cfg.train_layers else ()
        return [p for name, p in self.policy.model.named_parameters() if self.cfg.lora_rank or name in frozen_names]

    def _engine_with_truncation(self, engine: Engine | None) -> Engine | None:
        """The engine given, or our own generation from the likeliest tokens alone, which is one too; None for neither."""
        top_k, top_p = self.cfg.top_k, self.cfg.top_p
        if not top_k and top_p == 1.0:
            return engine
        if engine is not None:
            raise RequestError(
                f"top_k is {top_k} and top_p {top_p:g} beside an engine of your own, which samples as it "
                "does: leave them out"
            )
        ends = (
            self.tokenizer.ends_with_stop_string if self.tokenizer.stop_strings and not self.has_fixed_length else None
        )
        return partial(generate, max_num_seqs=self.cfg.max_num_seqs, stop_condition=ends, top_k=top_k, top_p=top_p)

    def _make_sampler(self, records: list[Any], engine: Engine | None = None) -> Sampler:
        cfg = self.cfg
        options = {
            "limit": cfg.limit,
            "has_fixed_length": self.has_fixed_length,
            "seed": cfg.seed,
            "max_num_seqs": cfg.max_num_seqs,
        }
        return Sampler(
            records,
            self.tokenizer,
            **options,
            reply_function=self.reply_function,
            max_turns=cfg.max_turns,
            engine=engine,
        )

    def _load_pretraining_examples(self) -> list[Example]:
        if self.cfg.pretraining is None:
            return []
        limit = Limit.of(self.policy.model, self.cfg.max_length)
        try:
            records = make_examples(
                read_rows(self.cfg.pretraining), self.tokenizer, max_length=limit, too_long=self.cfg.too_long
            )
            check_ids(records, self.policy.model)
        except RequestError as error:
            raise RequestError(f"pretraining is {self.cfg.pretraining!r}: {error}") from None
        self.policy.warnings += records.make_warnings(self.cfg.pretraining)
        return records

    def _make_optimizer(self) -> torch.optim.Optimizer:
        cfg = self.cfg
        if self.policy.critic is None:
            return training.adamw(cfg, {"params": self.policy.actor_parameters()})
        critic_group: dict[str, Any] = {"params": self.policy.critic_parameters()}
        if cfg.critic_learning_rate:
            critic_group["lr"] = cfg.critic_learning_rate
        if cfg.critic_max_grad_norm:
            critic_group["max_grad_norm"] = cfg.critic_max_grad_norm
        return training.adamw(cfg, {"params": self.policy.actor_parameters()}, critic_group)


@close_at_exit
def open_rlhf_run(
    recipe: str, cfg: Any, engine: Engine | None = None, *, resume: ResumePoint | None = None
) -> Generator[tuple[TrainingRun, RLHFModels]]:
    """A run with everybody in place: preflight checked, digests written, judges closed at the end."""
    if resume is None:
        check_effects(cfg, cfg.needs())
    torch.set_num_threads(cfg.num_threads)
    seed_shared_generators(cfg.seed)  # a fresh value head is drawn by torch's own
    models = RLHFModels(cfg, engine)
    try:
        states = function_state.get_states(models)  # what cannot be saved is refused now, and not at a checkpoint
        findings = preflight.run_checks(models) if cfg.preflight and resume is None else []
        for text in () if cfg.quiet else map(str, findings):
            print(printable(text), file=sys.stderr)
        function_state.set_states(models, states)  # preflight's calls are none of the run's
        not_saved = function_state.unsaved_state_warnings(models)
        models.policy.warnings += not_saved if resume is not None else []  # where it matters it is printed
        with training.open_run(
            recipe, cfg, models.policy, models.optimizer, total_steps=cfg.total_tokens, resume=resume
        ) as run:
            models.run, run.constraints = run, models.constraints
            run.function_states = partial(function_state.save, models)
            if resume is not None and resume.checkpoint is not None:
                function_state.restore(models, run.restored_states)
            if models.constraints is not None and "bounds" in run.recipe_state:
                models.constraints.restore(run.recipe_state["bounds"])
                run.run.stop_reason = models.constraints.stop_reason
            training.check_reference_digest(run.run, models.reference.digest)
            for text in not_saved if resume is None else ():
                run.run.event("remark", text=text)
            for finding in findings:
                run.run.event("preflight", check=finding.check, text=str(finding))
            lineage.add_digests(
                run.run.path, **{f"reward {name}": model.digest for name, (model, _) in models.reward_models.items()}
            )
            yield run, models
            _report_if_ended_worse(run, cfg)
    finally:
        close_workers(models)


def _report_if_ended_worse(run: TrainingRun, cfg: RolloutConfig) -> None:
    """Say it, and write an event, where a run ended worse than it began."""
    text = (
        explain_ended_worse(run.run.metrics[-1], kl_reference_target=cfg.kl_reference_target)
        if run.run.metrics
        else None
    )
    run.run.ended_worse = text
    if text is not None:
        run.run.event("ended_worse", iteration=run.iteration, text=text)
        if not cfg.quiet:
            print(f"understudy: {text}", file=sys.stderr)


def close_workers(models: RLHFModels) -> None:
    """End the judges' workers."""
    for reward_sum in (models.reward_sum, models.measured_sum):
        if reward_sum is not None:
            reward_sum.close()
    if models.reply_function is not None:
        models.reply_function.close()


@torch.no_grad()
def off_policy_weights(
    policy: Policy, rollout: Rollout, cfg: RolloutConfig
) -> tuple[Rollout, Tensor, dict[str, float]]:
    """What was said, with its log-probs under the policy as the update begins; what each step counts, [B, T]; metrics.

    The policy's own fresh samples need none of it: without `off_policy` all count 1.
    """
    trajectory = rollout.trajectory
    if cfg.off_policy == "none":
        return rollout, torch.ones_like(trajectory.behavior_logprob), {}
    old_logprob = forward_in_chunks(policy, trajectory.obs, cfg.micro_batch_size)[0].log_prob(trajectory.action)
    options = {"ratio": cfg.off_policy_ratio, "low": cfg.off_policy_low, "high": cfg.off_policy_high}
    weight = importance_weight(
        old_logprob, trajectory.behavior_logprob, trajectory.mask, mode=cfg.off_policy, **options
    )
    metrics = {
        "importance_weight_mean": float(masked_mean(weight, trajectory.mask)),
        "effective_sample_fraction": float(effective_sample_fraction(weight, trajectory.mask)),
        "kl_sampler": float(masked_mean(trajectory.behavior_logprob - old_logprob, trajectory.mask)),
    }
    return replace(rollout, trajectory=replace(trajectory, behavior_logprob=old_logprob)), weight, metrics


def _measured_terms(scores: Scores) -> dict[str, Tensor]:
    """Every part of a verdict by name, [B]; gold's where reward has one of the same name."""
    return scores.terms if scores.gold is None else scores.terms | scores.gold.terms


def compute_rewards(
    rollout: Rollout, score: Tensor, reference: Reference, reference_coef: float, cfg: RolloutConfig
) -> tuple[Trajectory, Tensor, TokenDistribution]:
    """The record as its ends and scores leave it, its rewards [B, T], and what the reference says of it.

    At a coefficient of 0 the reference is only looked at, by some of the rows: its mask is False at the others.
    """
    trajectory, score = rollout.trajectory, score.to(rollout.trajectory.mask.device)
    score, terminated, truncated, mask = handle_truncation(
        score,
        trajectory.terminated,
        trajectory.truncated,
        trajectory.mask,
        mode=cfg.truncation,
        penalty=cfg.truncation_penalty,
        missing_eos_penalty=cfg.missing_eos_penalty,
    )
    trajectory = replace(
        trajectory, terminated=terminated, truncated=truncated, mask=mask, obs=replace(trajectory.obs, mask=mask)
    )
    reference_tokens = (
        trajectory.obs
        if reference_coef
        else replace(trajectory.obs, mask=mask & _rows_read_by_reference(len(mask), cfg)[:, None].to(mask.device))
    )
    reference_distribution = forward_in_chunks(reference, reference_tokens, cfg.micro_batch_size)
    reward = reward_at_last_step(score, mask)
    if cfg.kl_reference == "reward":
        reward = reward + kl_reward(
            trajectory.behavior_logprob, reference_distribution.log_prob(trajectory.action), mask, coef=reference_coef
        )
    return trajectory, whiten(reward, mask) if cfg.whiten_rewards else reward, reference_distribution


def _rows_read_by_reference(num_rows: int, cfg: RolloutConfig) -> Tensor:
    """Which rows are read by a reference whose coefficient is 0, bool [B]: all where its KL steers something.

    Else the first quarter, for prompts come in a random order, and those that are written down token by token.
    """
    needs_all_rows = cfg.kl_reference_target or cfg.constraint
    return torch.arange(num_rows) < (
        num_rows if needs_all_rows else max(cfg.log_samples, -(-num_rows // REFERENCE_ROW_DIVISOR))
    )


def next_reference_coef(coef: float, kl: float, cfg: RolloutConfig) -> float:
    """The coefficient of the KL to the reference in the coming iteration, after `kl` nats a completion in this one."""
    if not cfg.kl_reference_target:
        return coef
    target, horizon = cfg.kl_reference_target, cfg.kl_reference_horizon
    return adapt_kl_reference_coef(coef, kl, target=target, num_rows=cfg.completions_per_iteration, horizon=horizon)


def reference_kl_penalty(coef: float, cfg: RolloutConfig) -> ReferenceKLPenalty | None:
    """The KL to the reference as a charge in the loss; None where it is paid as a reward, or costs nothing."""
    return None if cfg.kl_reference == "reward" or not coef else scale_penalty(KL_PENALTIES[cfg.kl_reference], coef)


@torch.no_grad()
def forward_in_chunks(model: Any, tokens: TokenBatch, micro_batch_size: int) -> Any:
    """What a policy, its critic or a reference says of many rows, read some at a time."""
    chunk_size = micro_batch_size or ROWS_PER_FORWARD
    outputs = [model(tokens[start : start + chunk_size]) for start in range(0, len(tokens), chunk_size)]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    if isinstance(outputs[0], tuple):
        distributions, values = zip(*outputs, strict=True)
        return _concatenate(distributions), torch.cat(values)
    return _concatenate(outputs)


def _concatenate(distributions: Sequence[TokenDistribution]) -> TokenDistribution:
    hidden, mask = (
        torch.cat([distribution.hidden for distribution in distributions]),
        torch.cat([piece.mask for piece in distributions]),
    )
    return TokenDistribution(hidden, mask, distributions[0].head)
