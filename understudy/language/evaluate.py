"""Evaluation, held constant: prompts kept apart, a seed for each row, intervals, and the reference on the same prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from understudy.language.model.policy import Policy, Reference
from understudy.language.rewards.reward_sum import RewardSum, distinct_n, row_to_dict
from understudy.language.rollout.sampler import Rollout, Sampler
from understudy.reduce import cluster_ids, fraction_interval, mean_interval
from understudy.run.seeds import derive_seed

PURPOSE = "evaluate"
FRACTION_METRICS = ("win_rate", "stopped", "reference_stopped")
MAX_KL_TARGET_RATIO = 3.0
"""Times `kl_reference_target` from which on a KL is far over it."""
SCORE_METRICS = ("score", "gold", "reference_score", "reference_gold")  # shares where all of them are 0 or 1


@torch.no_grad()
def evaluate(
    policy: Policy,
    sampler: Sampler,
    reward_sum: RewardSum,
    gold_sum: RewardSum | None,
    reference: Reference,
    *,
    num_rows: int,
) -> dict:
    """What a policy says to held-out prompts, with seeds that depend on the prompts alone.

    `score`, `gold`, `kl` (nats a completion, the exact KL summed over its tokens), `length`, `stopped`; `win_rate` against
    the reference's own answers, same prompts and seeds, ties by half: means with `_low` and `_high`, 95 %, in which the
    rows of a prompt count as a cluster. `distinct_4`. `rows` completions of `prompts` different prompts.
    """
    prompt_indices = [i % len(sampler) for i in range(num_rows)]
    rollout = sample_evaluation_rollout(policy, sampler, prompt_indices)
    reference_rollout = sample_evaluation_rollout(reference.policy, sampler, prompt_indices)
    tokens = rollout.trajectory.obs
    distribution, _ = policy(tokens)
    kl = distribution.kl(reference(tokens)).sum(dim=1)
    scores, reference_score = reward_sum(rollout.scoring_input), reward_sum(reference_rollout.scoring_input).score
    score = scores.score
    length = torch.tensor([float(len(c.policy_ids)) for c in rollout.completions])
    measurements: dict[str, Tensor] = {"score": score, "kl": kl.cpu(), "length": length}
    wins = (score > reference_score).float() + 0.5 * (score == reference_score).float()
    measurements["win_rate"] = torch.where(score.isnan() | reference_score.isnan(), float("nan"), wins)
    measurements["stopped"] = torch.tensor([float(c.stopped) for c in rollout.completions])
    measurements["reference_stopped"] = torch.tensor([float(c.stopped) for c in reference_rollout.completions])
    if gold_sum is not None:
        gold_scores = gold_sum(rollout.scoring_input)
        scores, measurements["gold"] = scores._replace(gold=gold_scores), gold_scores.score
        measurements["reference_gold"] = gold_sum(reference_rollout.scoring_input).score
    measurements["reference_score"] = reference_score
    cluster = cluster_ids([prompt.ids for prompt in rollout.prompts])
    evaluation: dict = {"rows": len(prompt_indices), "prompts": len(cluster.unique())}
    for name, x in measurements.items():
        is_known = ~x.isnan()
        is_fraction = name in FRACTION_METRICS or (
            ("score" in name or "gold" in name) and bool(((x == 0) | (x == 1))[is_known].all())
        )
        interval = fraction_interval if is_fraction else mean_interval
        evaluation[name], evaluation[f"{name}_low"], evaluation[f"{name}_high"] = interval(
            x[is_known], cluster[is_known]
        )
    evaluation["distinct_4"] = distinct_n([c.policy_ids for c in rollout.completions], 4)
    evaluation["reference_distinct_4"] = distinct_n([c.policy_ids for c in reference_rollout.completions], 4)
    evaluation["samples"] = [
        {"prompt": p.text, "completion": c, "reference": r, **row_to_dict(scores, row)}
        for row, (p, c, r) in enumerate(
            zip(
                rollout.prompts,
                rollout.scoring_input.completions,
                reference_rollout.scoring_input.completions,
                strict=True,
            )
        )
    ]
    return evaluation


def sample_evaluation_rollout(policy: Policy, sampler: Sampler, prompt_indices: list[int]) -> Rollout:
    """Answers with seeds made of each prompt's own tokens and how often it came before, whatever the run's seed."""
    num_seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for i in prompt_indices:
        ids = tuple(sampler.prompts[i].ids)
        seeds.append(derive_seed(0, PURPOSE, num_seen[ids], *ids))
        num_seen[ids] += 1
    return sampler.sample(policy, prompt_indices, seeds)


def explain_ended_worse(metrics: Mapping[str, Any], *, kl_reference_target: float = 0.0) -> str | None:
    """What the last evaluation says against a run, in one sentence; None where it did not end worse than it began.

    A run ended worse if its policy scores below the reference with 95 % confidence (mean and win rate), if the KL to the
    reference is above three times its target, or if the policy collapsed: the share of its completions that end, or
    their distinct 4-grams where they are long enough to have some, are less than half of the reference's.

    Args:
        metrics: metrics with `evaluation_...`, as in the last line of metrics.jsonl.
        kl_reference_target: `kl_reference_target`, nats a completion; 0 for none.
    """
    present = {name: x for name, x in metrics.items() if x is not None and x == x}  # nan, in JSON null: equal scores
    evaluation = {name.removeprefix("evaluation_"): x for name, x in present.items() if name.startswith("evaluation_")}
    reasons = []
    score = evaluation.get("score", math.inf)
    low, high = evaluation.get("score_low", score), evaluation.get("score_high", score)
    if high < evaluation.get("reference_score", -math.inf) and evaluation.get("win_rate_high", 1.0) < 0.5:
        reasons.append(
            f"its score {evaluation['score']:.3g} [{low:.3g}, {high:.3g}] is below the reference's "
            f"{evaluation['reference_score']:.3g}"
        )
    if kl_reference_target and evaluation.get("kl", 0) > MAX_KL_TARGET_RATIO * kl_reference_target:
        reasons.append(
            f"its KL to the reference is {evaluation['kl']:.3g} nats, where kl_reference_target is {kl_reference_target:g}"
        )
    measured = [("stopped", "the share of completions that end")]
    measured += [("distinct_4", "distinct 4-grams")] if evaluation.get("length", math.inf) >= 4 else []
    for name, description in measured:
        if evaluation.get(name, 0) < evaluation.get(f"reference_{name}", 0) / 2:
            reasons.append(
                f"the policy collapsed ({description}: {evaluation[name]:.2g}, the reference's "
                f"{evaluation[f'reference_{name}']:.2g})"
            )
    if not reasons:
        return None
    return f"the run ended worse than it began: {', and '.join(reasons)}; lower learning_rate"
