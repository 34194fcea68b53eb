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

from understudy.batch import Batch, Text, Trajectory
from understudy.constrain import Bounds, Constraint
from understudy.language import function_state, preflight, stage
from understudy.language.ancestry import as_declared, check_reference
from understudy.language.best import keep_best
from understudy.language.collect import Said, Sampler
from understudy.language.config import Function, Rollouts
from understudy.language.evaluate import ended_worse, evaluate
from understudy.language.generate import Engine, generate
from understudy.language.judge import Function as JudgeFunction
from understudy.language.judge import Judge, Part, Verdict, distinct_n, row_of
from understudy.language.model import Policy, Reference, home
from understudy.language.reading import check_reading
from understudy.language.scorer import RewardModel, load_reward_model
from understudy.language.sft import limit_learning, load_policy, pad_examples
from understudy.language.stage import Stage
from understudy.language.text import Example, Limit, Prompt, Row, Tokenizer, check_ids, examples, prompts, read
from understudy.language.tokens import TokenDistribution
from understudy.language.top import below
from understudy.language.turns import Reply
from understudy.objective import Charge, kl_exact, kl_k2, kl_k3, scaled
from understudy.reduce import effective_share, explained_variance, importance_weight, masked_mean, whiten
from understudy.run import lineage
from understudy.run.config import RequestError, check_effects
from understudy.run.interrupt import closed_at_exit
from understudy.run.redact import printable, redact
from understudy.run.seeds import seed_shared_generators
from understudy.run.store import Resume, write_json
from understudy.score import adapt_kl_reference, at_last_step, cut_short, kl_reward

OBSERVED = ("score_mean", "score_missing", "kl_reference", "length_mean", "stopped", "distinct_4", "gold_mean")
"""Metrics of `observe` that a constraint may name."""
CHARGES = {"k2": kl_k2, "k3": kl_k3, "exact": kl_exact}
PIECE = 64  # rows a pass without gradient reads at a time
LOOKED_AT = 4  # one row in so many is read by a reference that nothing is held to


class Cast:
    """The models of a run, its data, and its notebook."""

    def __init__(self, cfg: Any, engine: Engine | None = None) -> None:
        self.cfg = cfg
        self.models: dict[str, tuple[RewardModel, Part]] = {}
        self.endless = bool(cfg.fixed_length)
        names = ("critic", "critic_init", "critic_layers")
        critic = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
        self.policy = load_policy(cfg, endless=self.endless, temperature=cfg.temperature, **critic)
        self.tokenizer: Tokenizer = self.policy.tokenizer
        self.judge = self._judge(cfg.reward, "reward")
        self.gold = self._judge(cfg.gold, "gold") if cfg.gold else None
        self.measured = self.gold  # and what constraints measure besides
        self.bounds = self._bounded() if cfg.constraint else None
        self._cast_critic()
        self.reference = self._reference()
        limit_learning(self.policy, cfg)
        name = "fixed_length" if self.endless else "max_new"
        limit = Limit.of(self.policy.model, cfg.max_length, completion=cfg.limit, name=name)
        if limit.tokens < 1:
            raise RequestError(f"{name} is {cfg.limit}: the model's context leaves no room for a prompt; lower it")

        def make(rows: Sequence[Row], source: str) -> Sequence[Prompt]:
            how = {"max_length": limit, "too_long": cfg.too_long, "unconditional": cfg.unconditional}
            found = prompts(rows, self.tokenizer, **how)
            check_ids(found, self.policy.model)
            self.policy.remarks += found.remark(source)
            return found

        rows = read(cfg.data, **cfg.reading)
        learned, kept, said = stage.divide(rows, make, cfg, lambda prompt: prompt.ids)
        self.policy.remarks += said
        self.held_out = bool(kept)
        self.reply = None if cfg.reply is None else Reply(cfg.reply, timeout=cfg.reward_timeout)
        self.sampler = self._sampler(learned, self._truncating(engine))
        self.examiner = self._sampler(kept or learned)
        self.texts = self._texts()
        for each in (self.policy, self.reference.policy):
            check_reading(each, [prompt.ids for prompt in self.sampler.prompts])
        self.optimizer = self._optimizer()
        self.run: Stage

    @property
    def functions(self) -> dict[str, JudgeFunction | Reply]:
        """The user's functions, each by the field that it came from and its name."""
        judges = {"reward": self.judge} | ({} if self.measured is None else {"gold": self.measured})
        found = {f"{field} {name}": part for field, judge in judges.items() for name, part in judge.functions.items()}
        return found | ({} if self.reply is None else {"reply": self.reply})

    def judged(self, said: Said) -> Verdict:
        """What the judges say; under `gold` what is only measured."""
        verdict = self.judge(said.judged)
        gold = None if self.measured is None else self.measured(said.judged)
        self._report_missing()
        return verdict._replace(gold=gold)

    def paid(self, verdict: Verdict) -> Tensor:
        """Scores as they are paid, [B]: less what held constraints charge, at their multipliers of now."""
        return verdict.score if self.bounds is None else self.bounds.charge(verdict.score, _measured(verdict))

    def constrain(self, verdict: Verdict) -> Tensor:
        """The same, once the multipliers have followed what these rows come to."""
        if self.bounds is not None:
            means = {name: float(part.nanmean()) for name, part in _measured(verdict).items()}
            self.bounds.begin(means, self.policy, self.optimizer)
        return self.paid(verdict)

    def _report_missing(self) -> None:
        """Print, and note in events.jsonl, which scores went missing in a way that they had not before."""
        for judge in (self.judge, self.gold, self.measured):
            while judge is not None and judge.reports:
                text = printable(redact(judge.reports.pop(0)))
                if (run := getattr(self, "run", None)) is not None:
                    run.tell("scores_missing", text=text)
                else:
                    print(f"understudy: {text}", file=sys.stderr)

    def pretraining(self, count: int) -> Text | None:
        """The iteration's rows of pretraining text, `count` of them, if any is mixed in; they come in turn."""
        if not self.texts:
            return None
        first = (self.run.iteration + 1) * count
        return pad_examples([self.texts[(first + i) % len(self.texts)] for i in range(count)]).to(self.policy.device)

    def examine(self, rows: int) -> dict[str, Any]:
        """What `language.evaluate.evaluate` measures on held-out prompts, and the specs that it was measured by."""
        found = evaluate(self.policy, self.examiner, self.judge, self.gold, self.reference, rows=rows)
        self._report_missing()
        return found | {"specs": {"reward": list(self.cfg.reward), "gold": list(self.cfg.gold)}}

    def evaluate(self) -> dict[str, float]:
        """Held-out prompts and seeds of their own; written to evaluation.json, samples and all."""
        found = self.examine(self.cfg.evaluate_rows)
        path, number = self.run.run.path, self.run.iteration + 1
        with self._spared():
            write_json(path / "evaluation.json", {**found, "held_out": self.held_out, "iteration": number})
            (path / "samples").mkdir(exist_ok=True)
            write_json(path / "samples" / f"evaluation-{number:06d}.json", found["samples"])
            if self.cfg.best_by != "none":
                keep_best(self.run, found, self.cfg.best_by)
                found["best"] = self.run.kept.get("best", math.nan)
        return {f"evaluation_{name}": x for name, x in found.items() if isinstance(x, int | float)}

    @torch.no_grad()
    def observe(
        self, said: Said, verdict: Verdict, batch: Batch, reward: Tensor, referred: TokenDistribution
    ) -> dict[str, float]:
        """An iteration in numbers; some of its completions, token by token, go to samples/."""
        known = isinstance(batch.reference, Tensor)  # else the whole distribution is kept there
        theirs = batch.reference if known else referred.log_prob(batch.action)
        kl = torch.where(referred.mask, batch.logprob - theirs, 0.0)
        rows = referred.mask.any(dim=1)
        ids = [completion.own for completion in said.completions]
        metrics = {
            "score_mean": float(verdict.score.nanmean()),
            "score_missing": float(verdict.score.isnan().float().mean()),
            "kl_reference": float(kl.sum() / rows.sum().clamp(min=1)),
            "length_mean": sum(map(len, ids)) / len(ids),
            "stopped": sum(completion.stopped for completion in said.completions) / len(ids),
            "distinct_4": distinct_n(ids, 4),
            "explained_variance": float(explained_variance(batch.value, batch.target, batch.mask)),
        }
        if len(verdict.parts) > 1:
            metrics |= {f"score_{name}": float(part.nanmean()) for name, part in verdict.parts.items()}
        if verdict.gold is not None and self.cfg.gold:
            metrics["gold_mean"] = float(verdict.gold.score.nanmean())
        metrics |= self.run.settle(metrics)
        self._write_samples(said, verdict, batch, reward, kl)
        return metrics

    def _write_samples(self, said: Said, verdict: Verdict, batch: Batch, reward: Tensor, kl: Tensor) -> None:
        count = min(self.cfg.samples, len(batch))
        if not count:
            return
        entropy = self.policy(batch.obs[:count])[0].entropy()
        columns = {
            "logprob": batch.logprob,
            "value": batch.value,
            "advantage": batch.advantage,
            "reward": reward,
            "kl_reference": kl,
            "entropy": entropy,
        }
        lines, shown = [], verdict if self.cfg.gold else verdict._replace(gold=None)
        for i in range(count):
            steps = said.record.mask[i].nonzero()[:, 0].tolist()
            span = slice(steps[0], steps[-1] + 1)  # what others said in between has its place in every column
            line = {
                "row": said.rows[i],
                "version": said.completions[i].version,
                "prompt": said.prompts[i].text,
                "completion": said.judged.completions[i],
                "prompt_ids": list(said.prompts[i].ids),
                "completion_ids": said.completions[i].ids,
                "tokens": self.tokenizer.decode_tokens(said.completions[i].ids),
                "chosen": said.record.mask[i, span].tolist(),
                "stopped": said.completions[i].stopped,
                **row_of(shown, i),
                **{name: [round(x, 6) for x in column[i, span].tolist()] for name, column in columns.items()},
            }
            lines.append(json.dumps(line, ensure_ascii=False))
        path = self.run.run.path / "samples" / f"{self.run.iteration + 1:06d}.jsonl"
        with self._spared():
            path.parent.mkdir(exist_ok=True)
            path.write_text(redact("\n".join(lines)) + "\n", encoding="utf-8")

    @contextmanager
    def _spared(self) -> Generator[None]:
        """A disk that refuses what a run does not go on from is said, once, and the run goes on."""
        try:
            yield
        except OSError as error:
            if not self.run.run.silent:
                print(f"understudy: samples cannot be written ({error}); the run goes on", file=sys.stderr)
            self.run.run.silent = True

    def _judge(self, specs: Sequence[str], field: str) -> Judge:
        def load(source: str) -> Part:
            trusted = {"trust_remote_code": self.cfg.trust_remote_code}
            model = (
                load_reward_model(home(source, "reward_model"), **trusted)
                .to(self.cfg.device)
                .requires_grad_(False)
                .eval()
            )
            as_declared(home(source, "reward_model"), model.tokenizer)
            part = model.part(self.tokenizer)
            if field == "reward":
                self.models[source] = model, part
            return part

        given: list[Any] = [(spec.call, spec.weight) if isinstance(spec, Function) else spec for spec in specs]
        how = {"timeout": self.cfg.reward_timeout, "missing": self.cfg.missing_score}
        return Judge.of(given, load_model=load, field=field, **how)

    def _bounded(self) -> Bounds:
        """The constraints. What is neither measured already nor a metric is a spec, and is measured beside gold.

        A builtin with an argument is no part by the builtin's name: `length` of a reward `length:40` is the length.
        """
        bounds = Bounds(
            [Constraint.parse(text) for text in self.cfg.constraint],
            rate=self.cfg.constraint_rate,
            rollbacks=self.cfg.constraint_rollbacks,
        )
        judges = [(self.cfg.reward, self.judge), *([(self.cfg.gold, self.gold)] if self.gold else [])]
        named = [pair for specs, judge in judges for pair in zip(specs, judge.parts, strict=True)]
        there = {name for spec, name in named if not spec.startswith(f"{name}:")}
        for one in bounds.constraints.values():
            if one.response == "hold" and one.name in {*OBSERVED} - there:
                raise RequestError(
                    f"constraint is '{one}', and {one.name} is a metric, which no completion can be charged for: "
                    f"write '{one}:warn', :stop or :rollback"
                )
        own = [name for name in bounds.names if name not in {*there, *OBSERVED}]
        if own:
            judge = self._judge(own, "constraint")
            parts = [(name, 0.0, part) for name, (_, part) in zip(own, judge.parts.values(), strict=True)]
            self.measured = Judge(
                parts + [(name, *part) for name, part in (self.gold.parts.items() if self.gold else ())],
                missing=self.cfg.missing_score,
            )
            self.measured.field = "gold"
        return bounds

    def _cast_critic(self) -> None:
        """A separate critic begins as the reward model, where the reward is one that speaks the policy's tokens."""
        if getattr(self.cfg, "critic", "none") == "separate" and len(self.models) == 1:
            [(model, own)] = self.models.values()
            weight = next(w for w, part in self.judge.parts.values() if part is own)
            if model.tokenizer.hf.get_vocab().items() >= self.tokenizer.hf.get_vocab().items():
                self.policy.critic = model.critic(weight=weight).to(self.cfg.device)

    def _reference(self) -> Reference:
        if self.cfg.reference is None:
            return Reference(self.policy, shared=self._never_learning())
        given = self.cfg.reference
        alike = {"dtype": self.policy.model.dtype, "packing": self.cfg.packing, "temperature": self.cfg.temperature}
        alike["trust_remote_code"] = self.cfg.trust_remote_code
        try:
            other = Policy.from_pretrained(home(given, "policy"), **alike)
        except RequestError as error:
            raise RequestError(f"reference is {given!r}: {error}") from None
        check_reference(given, other, self.policy)
        return Reference(other.to(self.cfg.device))

    def _never_learning(self) -> list[nn.Parameter]:
        """What the reference need not copy: beside an adapter everything, below `train_layers` what lies there."""
        if self.cfg.reference_mode == "copy":
            return []
        frozen = below(self.policy.model, self.cfg.train_layers) if self.cfg.train_layers else ()
        return [p for name, p in self.policy.model.named_parameters() if self.cfg.lora or name in frozen]

    def _truncating(self, engine: Engine | None) -> Engine | None:
        """The engine given, or our own generation from the likeliest tokens alone, which is one too; None for neither."""
        top_k, top_p = self.cfg.top_k, self.cfg.top_p
        if not top_k and top_p == 1.0:
            return engine
        if engine is not None:
            raise RequestError(
                f"top_k is {top_k} and top_p {top_p:g} beside an engine of your own, which samples as it "
                "does: leave them out"
            )
        ends = self.tokenizer.at_stop_string if self.tokenizer.stop_strings and not self.endless else None
        return partial(generate, slots=self.cfg.slots, ends=ends, top_k=top_k, top_p=top_p)

    def _sampler(self, found: list[Any], engine: Engine | None = None) -> Sampler:
        cfg = self.cfg
        own = {"limit": cfg.limit, "endless": self.endless, "seed": cfg.seed, "slots": cfg.slots}
        return Sampler(found, self.tokenizer, **own, reply=self.reply, turns=cfg.turns, engine=engine)

    def _texts(self) -> list[Example]:
        if self.cfg.pretraining is None:
            return []
        limit = Limit.of(self.policy.model, self.cfg.max_length)
        try:
            found = examples(read(self.cfg.pretraining), self.tokenizer, max_length=limit, too_long=self.cfg.too_long)
            check_ids(found, self.policy.model)
        except RequestError as error:
            raise RequestError(f"pretraining is {self.cfg.pretraining!r}: {error}") from None
        self.policy.remarks += found.remark(self.cfg.pretraining)
        return found

    def _optimizer(self) -> torch.optim.Optimizer:
        cfg = self.cfg
        if self.policy.critic is None:
            return stage.adamw(cfg, {"params": self.policy.actor_parameters()})
        critic: dict[str, Any] = {"params": self.policy.critic_parameters()}
        if cfg.critic_learning_rate:
            critic["lr"] = cfg.critic_learning_rate
        if cfg.critic_max_grad_norm:
            critic["max_grad_norm"] = cfg.critic_max_grad_norm
        return stage.adamw(cfg, {"params": self.policy.actor_parameters()}, critic)


@closed_at_exit
def open_cast(
    recipe: str, cfg: Any, engine: Engine | None = None, *, resume: Resume | None = None
) -> Generator[tuple[Stage, Cast]]:
    """A run with everybody in place: preflight checked, digests written, judges closed at the end."""
    if resume is None:
        check_effects(cfg, cfg.needs())
    torch.set_num_threads(cfg.threads)
    seed_shared_generators(cfg.seed)  # a fresh value head is drawn by torch's own
    cast = Cast(cfg, engine)
    try:
        states = function_state.get_states(cast)  # what cannot be saved is refused now, and not at a checkpoint
        findings = preflight.check(cast) if cfg.preflight and resume is None else []
        for text in () if cfg.quiet else map(str, findings):
            print(printable(text), file=sys.stderr)
        function_state.set_states(cast, states)  # preflight's calls are none of the run's
        not_saved = function_state.not_saved(cast)
        cast.policy.remarks += not_saved if resume is not None else []  # where it matters it is printed
        with stage.open_stage(recipe, cfg, cast.policy, cast.optimizer, total=cfg.steps, resume=resume) as run:
            cast.run, run.bounds = run, cast.bounds
            run.function_states = partial(function_state.save, cast)
            if resume is not None and resume.checkpoint is not None:
                function_state.restore(cast, run.restored_states)
            if cast.bounds is not None and "bounds" in run.kept:
                cast.bounds.restore(run.kept["bounds"])
                run.run.stopped = cast.bounds.stopped
            stage.same_reference(run.run, cast.reference.digest)
            for text in not_saved if resume is None else ():
                run.run.event("remark", text=text)
            for finding in findings:
                run.run.event("preflight", check=finding.check, text=str(finding))
            lineage.note(run.run.path, **{f"reward {name}": model.digest for name, (model, _) in cast.models.items()})
            yield run, cast
            _conclude(run, cfg)
    finally:
        close(cast)


def _conclude(run: Stage, cfg: Rollouts) -> None:
    """Say it, and write an event, where a run ended worse than it began."""
    text = ended_worse(run.run.metrics[-1], kl_target=cfg.kl_reference_target) if run.run.metrics else None
    run.run.ended_worse = text
    if text is not None:
        run.run.event("ended_worse", iteration=run.iteration, text=text)
        if not cfg.quiet:
            print(f"understudy: {text}", file=sys.stderr)


def close(cast: Cast) -> None:
    """End the judges' workers."""
    for judge in (cast.judge, cast.measured):
        if judge is not None:
            judge.close()
    if cast.reply is not None:
        cast.reply.close()


@torch.no_grad()
def reweigh(policy: Policy, said: Said, cfg: Rollouts) -> tuple[Said, Tensor, dict[str, float]]:
    """What was said, with its log-probs under the policy as the update begins; what each step counts, [B, T]; metrics.

    The policy's own fresh samples need none of it: without `off_policy` all count 1.
    """
    record = said.record
    if cfg.off_policy == "none":
        return said, torch.ones_like(record.logprob), {}
    own = in_pieces(policy, record.obs, cfg.micro)[0].log_prob(record.action)
    bounds = {"ratio": cfg.off_policy_ratio, "low": cfg.off_policy_low, "high": cfg.off_policy_high}
    weight = importance_weight(own, record.logprob, record.mask, how=cfg.off_policy, **bounds)
    metrics = {
        "weight_mean": float(masked_mean(weight, record.mask)),
        "weight_effective": float(effective_share(weight, record.mask)),
        "kl_sampler": float(masked_mean(record.logprob - own, record.mask)),
    }
    return replace(said, record=replace(record, logprob=own)), weight, metrics


def _measured(verdict: Verdict) -> dict[str, Tensor]:
    """Every part of a verdict by name, [B]; gold's where reward has one of the same name."""
    return verdict.parts if verdict.gold is None else verdict.parts | verdict.gold.parts


def pay(
    said: Said, score: Tensor, reference: Reference, coef: float, cfg: Rollouts
) -> tuple[Trajectory, Tensor, TokenDistribution]:
    """The record as its ends and scores leave it, its rewards [B, T], and what the reference says of it.

    At a coefficient of 0 the reference is only looked at, by some of the rows: its mask is False at the others.
    """
    record, score = said.record, score.to(said.record.mask.device)
    score, terminated, truncated, mask = cut_short(
        score,
        record.terminated,
        record.truncated,
        record.mask,
        how=cfg.truncation,
        penalty=cfg.truncation_penalty,
        missing_eos_penalty=cfg.missing_eos_penalty,
    )
    record = replace(record, terminated=terminated, truncated=truncated, mask=mask, obs=replace(record.obs, mask=mask))
    asked = record.obs if coef else replace(record.obs, mask=mask & _looked_at(len(mask), cfg)[:, None].to(mask.device))
    referred = in_pieces(reference, asked, cfg.micro)
    reward = at_last_step(score, mask)
    if cfg.kl_reference == "reward":
        reward = reward + kl_reward(record.logprob, referred.log_prob(record.action), mask, coef=coef)
    return record, whiten(reward, mask) if cfg.whiten_rewards else reward, referred


def _looked_at(rows: int, cfg: Rollouts) -> Tensor:
    """Which rows are read by a reference whose coefficient is 0, bool [B]: all where its KL steers something.

    Else the first quarter, for prompts come in a random order, and those that are written down token by token.
    """
    every = cfg.kl_reference_target or cfg.constraint
    return torch.arange(rows) < (rows if every else max(cfg.samples, -(-rows // LOOKED_AT)))


def next_reference_coef(coef: float, kl: float, cfg: Rollouts) -> float:
    """The coefficient of the KL to the reference in the coming iteration, after `kl` nats a completion in this one."""
    if not cfg.kl_reference_target:
        return coef
    target, horizon = cfg.kl_reference_target, cfg.kl_reference_horizon
    return adapt_kl_reference(coef, kl, target=target, rows=cfg.rows, horizon=horizon)


def reference_charge(coef: float, cfg: Rollouts) -> Charge | None:
    """The KL to the reference as a charge in the loss; None where it is paid as a reward, or costs nothing."""
    return None if cfg.kl_reference == "reward" or not coef else scaled(CHARGES[cfg.kl_reference], coef)


@torch.no_grad()
def in_pieces(model: Any, text: Text, micro: int) -> Any:
    """What a policy, its critic or a reference says of many rows, read some at a time."""
    size = micro or PIECE
    found = [model(text[at : at + size]) for at in range(0, len(text), size)]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    if isinstance(found[0], tuple):
        distributions, values = zip(*found, strict=True)
        return _joined(distributions), torch.cat(values)
    return _joined(found)


def _joined(pieces: Sequence[TokenDistribution]) -> TokenDistribution:
    hidden, mask = torch.cat([piece.hidden for piece in pieces]), torch.cat([piece.mask for piece in pieces])
    return TokenDistribution(hidden, mask, pieces[0].head)
