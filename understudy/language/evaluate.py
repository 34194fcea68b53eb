"""Evaluation, held constant: prompts kept apart, a seed for each row, intervals, and the reference on the same prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from understudy.language.collect import Said, Sampler
from understudy.language.judge import Judge, distinct_n, row_of
from understudy.language.model import Policy, Reference
from understudy.reduce import clusters, mean_interval, share_interval
from understudy.run.seeds import derive

PURPOSE = "evaluate"
SHARES = ("win_rate", "stopped", "reference_stopped")
FAR = 3.0
"""Times `kl_reference_target` from which on a KL is far over it."""
SCORES = ("score", "gold", "reference_score", "reference_gold")  # shares where all of them are 0 or 1


@torch.no_grad()
def evaluate(
    policy: Policy, sampler: Sampler, judge: Judge, gold: Judge | None, reference: Reference, *, rows: int
) -> dict:
    """What a policy says to held-out prompts, with seeds that depend on the prompts alone.

    `score`, `gold`, `kl` (nats a completion, the exact KL summed over its tokens), `length`, `stopped`; `win_rate` against
    the reference's own answers, same prompts and seeds, ties by half: means with `_low` and `_high`, 95 %, in which the
    rows of a prompt count as a cluster. `distinct_4`. `rows` completions of `prompts` different prompts.
    """
    which = [i % len(sampler) for i in range(rows)]
    said = answers(policy, sampler, which)
    theirs = answers(reference.policy, sampler, which)
    text = said.record.obs
    distribution, _ = policy(text)
    kl = distribution.kl(reference(text)).sum(dim=1)
    scored, other = judge(said.judged), judge(theirs.judged).score
    verdict = scored.score
    length = torch.tensor([float(len(c.own)) for c in said.completions])
    measured: dict[str, Tensor] = {"score": verdict, "kl": kl.cpu(), "length": length}
    won = (verdict > other).float() + 0.5 * (verdict == other).float()
    measured["win_rate"] = torch.where(verdict.isnan() | other.isnan(), float("nan"), won)
    measured["stopped"] = torch.tensor([float(c.stopped) for c in said.completions])
    measured["reference_stopped"] = torch.tensor([float(c.stopped) for c in theirs.completions])
    if gold is not None:
        golden = gold(said.judged)
        scored, measured["gold"] = scored._replace(gold=golden), golden.score
        measured["reference_gold"] = gold(theirs.judged).score
    measured["reference_score"] = other
    cluster = clusters([prompt.ids for prompt in said.prompts])
    found: dict = {"rows": len(which), "prompts": len(cluster.unique())}
    for name, x in measured.items():
        known = ~x.isnan()
        is_share = name in SHARES or (("score" in name or "gold" in name) and bool(((x == 0) | (x == 1))[known].all()))
        interval = share_interval if is_share else mean_interval
        found[name], found[f"{name}_low"], found[f"{name}_high"] = interval(x[known], cluster[known])
    found["distinct_4"] = distinct_n([c.own for c in said.completions], 4)
    found["reference_distinct_4"] = distinct_n([c.own for c in theirs.completions], 4)
    found["samples"] = [
        {"prompt": p.text, "completion": c, "reference": r, **row_of(scored, row)}
        for row, (p, c, r) in enumerate(
            zip(said.prompts, said.judged.completions, theirs.judged.completions, strict=True)
        )
    ]
    return found


def answers(policy: Policy, sampler: Sampler, which: list[int]) -> Said:
    """Answers with seeds made of each prompt's own tokens and how often it came before, whatever the run's seed."""
    before: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for i in which:
        ids = tuple(sampler.prompts[i].ids)
        seeds.append(derive(0, PURPOSE, before[ids], *ids))
        before[ids] += 1
    return sampler.answer(policy, which, seeds)


def ended_worse(line: Mapping[str, Any], *, kl_target: float = 0.0) -> str | None:
    """What the last evaluation says against a run, in one sentence; None where it did not end worse than it began.

    A run ended worse if its policy scores below the reference with 95 % confidence (mean and win rate), if the KL to the
    reference is above three times its target, or if the policy collapsed: the share of its completions that end, or
    their distinct 4-grams where they are long enough to have some, are less than half of the reference's.

    Args:
        line: metrics with `evaluation_...`, as in the last line of metrics.jsonl.
        kl_target: `kl_reference_target`, nats a completion; 0 for none.
    """
    known = {name: x for name, x in line.items() if x is not None and x == x}  # nan, in JSON null: equal scores
    found = {name.removeprefix("evaluation_"): x for name, x in known.items() if name.startswith("evaluation_")}
    reasons = []
    score = found.get("score", math.inf)
    low, high = found.get("score_low", score), found.get("score_high", score)
    if high < found.get("reference_score", -math.inf) and found.get("win_rate_high", 1.0) < 0.5:
        reasons.append(
            f"its score {found['score']:.3g} [{low:.3g}, {high:.3g}] is below the reference's {found['reference_score']:.3g}"
        )
    if kl_target and found.get("kl", 0) > FAR * kl_target:
        reasons.append(f"its KL to the reference is {found['kl']:.3g} nats, where kl_reference_target is {kl_target:g}")
    measured = [("stopped", "the share of completions that end")]
    measured += [("distinct_4", "distinct 4-grams")] if found.get("length", math.inf) >= 4 else []
    for name, what in measured:
        if found.get(name, 0) < found.get(f"reference_{name}", 0) / 2:
            reasons.append(
                f"the policy collapsed ({what}: {found[name]:.2g}, the reference's {found[f'reference_{name}']:.2g})"
            )
    if not reasons:
        return None
    return f"the run ended worse than it began: {', and '.join(reasons)}; lower learning_rate"
