"""Evaluation, held constant: prompts kept apart, a seed for each, intervals, and the reference on the same prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.language.collect import Said, Sampler
from understudy.language.judge import Judge, distinct_n
from understudy.language.model import Policy, Reference
from understudy.reduce import mean_interval
from understudy.run.seeds import derive

PURPOSE = "evaluate"


@torch.no_grad()
def evaluate(
    policy: Policy, sampler: Sampler, judge: Judge, gold: Judge | None, reference: Reference, *, rows: int
) -> dict:
    """What a policy says to held-out prompts, with seeds that depend on the prompts alone.

    `score`, `gold`, `kl` (nats a completion, the exact KL summed over its tokens), `length`: means with `_low` and `_high`,
    95 %; `stopped`, `distinct_4`; `win_rate` against the reference's own answers, same prompts and seeds, ties by half.
    """
    which = [i % len(sampler) for i in range(rows)]
    said = answers(policy, sampler, which)
    theirs = answers(reference.policy, sampler, which)
    text = said.record.obs
    distribution, _ = policy(text)
    kl = distribution.kl(reference(text)).sum(dim=1)
    verdict, other = judge(said.judged).score, judge(theirs.judged).score
    length = torch.tensor([float(len(c.own)) for c in said.completions])
    measured: dict[str, Tensor] = {"score": verdict, "kl": kl.cpu(), "length": length}
    won = (verdict > other).float() + 0.5 * (verdict == other).float()
    measured["win_rate"] = torch.where(verdict.isnan() | other.isnan(), float("nan"), won)
    if gold is not None:
        measured["gold"] = gold(said.judged).score
        measured["reference_gold"] = gold(theirs.judged).score
    measured["reference_score"] = other
    found: dict = {"rows": len(which)}
    for name, x in measured.items():
        found[name], found[f"{name}_low"], found[f"{name}_high"] = mean_interval(x[~x.isnan()])
    found["stopped"] = sum(c.stopped for c in said.completions) / len(which)
    found["distinct_4"] = distinct_n([c.own for c in said.completions], 4)
    found["reference_distinct_4"] = distinct_n([c.own for c in theirs.completions], 4)
    found["samples"] = [
        {"prompt": p.text, "completion": c, "reference": r, "score": None if s != s else s}
        for p, c, r, s in zip(
            said.prompts, said.judged.completions, theirs.judged.completions, verdict.tolist(), strict=True
        )
    ]
    return found


def answers(policy: Policy, sampler: Sampler, which: list[int]) -> Said:
    """Answers with seeds made of each prompt's own tokens and its turn, whatever the run's seed."""
    seeds = [derive(0, PURPOSE, turn // len(sampler), *sampler.prompts[i].ids) for turn, i in enumerate(which)]
    return sampler.answer(policy, which, seeds)
