"""Step 5, update: what to minimise. Losses per step, [B, T], never averaged here; metrics per step beside them.

An objective is `(policy, batch) -> (loss, metrics)`; its coefficients are bound with `functools.partial`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.batch import Batch, LabelledText, PreferencePairs, TokenBatch, policy_forward

Losses = tuple[Tensor, dict[str, Tensor]]  # per step [B, T], and metrics per step
ReferenceKLPenalty = Callable[
    [Any, Tensor, Batch], Tensor
]  # (distribution, logprob, batch) -> what a step is charged, [B, T]


def policy_gradient(
    policy,
    batch: Batch,
    *,
    value_coef: float,
    entropy_coef: float,
    value_loss_fn: Callable[[Tensor, Tensor], Tensor],
    kl_penalty=None,
) -> Losses:
    """-A log pi(a|s) + value_coef * value_loss - entropy_coef * H (Williams 1992; Mnih et al. 2016, sec. 4). [B, T].

    The advantage is a number, not a function: no gradient reaches the critic through it.
    """
    distribution, value = policy_forward(policy, batch)
    logprob = distribution.log_prob(batch.action)
    policy_loss = -batch.advantage * torch.where(batch.mask, logprob, 0.0)
    value_loss = value_loss_fn(value, batch.target) if value_coef else torch.zeros_like(value)
    penalty = kl_penalty and kl_penalty(distribution, logprob, batch)
    return _combine_losses(distribution, batch, policy_loss, value_loss, value_coef, entropy_coef, penalty)


def ppo(
    policy,
    batch: Batch,
    *,
    clip: float,
    value_coef: float,
    entropy_coef: float,
    value_clip: float = 0.0,
    kl_penalty=None,
) -> Losses:
    """PPO with the clipped surrogate (Schulman et al. 2017, eq. 7 and 9), plus what a `Charge` asks for. [B, T]."""
    distribution, value, logprob = _evaluate_actions(policy, batch)
    policy_loss = clipped_surrogate(logprob, batch.behavior_logprob, batch.advantage, low=clip, high=clip)
    value_loss = clipped_value_loss(value, batch, clip=value_clip)
    penalty = kl_penalty and kl_penalty(distribution, logprob, batch)
    loss, metrics = _combine_losses(distribution, batch, policy_loss, value_loss, value_coef, entropy_coef, penalty)
    ratio = (logprob - batch.behavior_logprob).detach().exp()
    return loss, metrics | {"ratio": ratio, "clip_fraction": ((ratio - 1).abs() > clip).to(ratio.dtype)}


def ppo_penalty(
    policy,
    batch: Batch,
    *,
    kl_old_coef: float,
    value_coef: float,
    entropy_coef: float,
    value_clip: float = 0.0,
    kl_penalty=None,
) -> Losses:
    """PPO with the importance-weighted surrogate minus kl_coef * KL(old, new), the KL exact (2017, eq. 8). [B, T]."""
    distribution, value, logprob = _evaluate_actions(policy, batch)
    ratio = (logprob - batch.behavior_logprob).exp()
    policy_loss = kl_old_coef * batch.old_distribution.kl(distribution) - ratio * batch.advantage
    value_loss = clipped_value_loss(value, batch, clip=value_clip)
    penalty = kl_penalty and kl_penalty(distribution, logprob, batch)
    loss, metrics = _combine_losses(distribution, batch, policy_loss, value_loss, value_coef, entropy_coef, penalty)
    return loss, metrics | {"ratio": ratio.detach()}


def grpo(policy, batch: Batch, *, low: float, high: float, entropy_coef: float, kl_penalty=None) -> Losses:
    """The clipped surrogate without a critic, bounds apart (Shao et al. 2024, eq. 3; DAPO's clip-higher, eq. 10). [B, T].

    Which mean it is depends on the weights of `update`: GRPO's is `per_row`, DAPO's `per_step`, Dr. GRPO's `per_budget`.
    """
    distribution, _, logprob = _evaluate_actions(policy, batch)
    loss = clipped_surrogate(logprob, batch.behavior_logprob, batch.advantage, low=low, high=high)
    return _critic_free_losses(
        distribution, batch, logprob, logprob - batch.behavior_logprob, loss, low, high, entropy_coef, kl_penalty
    )


def gspo(policy, batch: Batch, *, low: float, high: float, entropy_coef: float, kl_penalty=None) -> Losses:
    """As `grpo` with one ratio a row, exp(mean over its steps of log pi / pi_old) (Zheng et al. 2025, eq. 5-7). [B, T].

    Rows are whole here: only for policies with memory, and with the weights `per_row`.
    """
    distribution, _, logprob = _evaluate_actions(policy, batch)
    log_ratio = (logprob - batch.behavior_logprob).sum(dim=1, keepdim=True) / batch.mask.sum(dim=1, keepdim=True).clamp(
        min=1
    )
    log_ratio = log_ratio.expand_as(logprob)
    loss = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), batch.advantage, low=low, high=high)
    return _critic_free_losses(distribution, batch, logprob, log_ratio, loss, low, high, entropy_coef, kl_penalty)


def cispo(policy, batch: Batch, *, low: float, high: float, entropy_coef: float, kl_penalty=None) -> Losses:
    """-clip(ratio) * A * log pi, no gradient through the ratio: no step is left out (MiniMax 2025, eq. 4). [B, T]."""
    distribution, _, logprob = _evaluate_actions(policy, batch)
    log_ratio = logprob - batch.behavior_logprob
    loss = -log_ratio.detach().exp().clamp(1 - low, 1 + high) * batch.advantage * logprob
    return _critic_free_losses(distribution, batch, logprob, log_ratio, loss, low, high, entropy_coef, kl_penalty)


def critic_only(policy, batch: Batch, *, value_clip: float = 0.0) -> Losses:
    """The critic's error and nothing else: while it warms up, the actor stands still. [B, T]."""
    _, value = policy_forward(policy, batch)
    value_loss = clipped_value_loss(value, batch, clip=value_clip)
    return value_loss, {"value_loss": value_loss.detach()}


def kl_k2(distribution, logprob: Tensor, batch: Batch) -> Tensor:
    """(log pi - log pi_ref)^2 / 2 at the sampled step, [B, T]: on-policy its gradient is that of KL(pi, pi_ref).

    k2 of Schulman (2020). Its value is a biased estimate; only the gradient is right, and only at ratio 1.
    """
    return 0.5 * (logprob - _reference_logprob(batch)).square()


def kl_k3(distribution, logprob: Tensor, batch: Batch) -> Tensor:
    """ratio * (1/x - 1 + log x), x = pi / pi_ref, [B, T]: k3 weighted by pi / pi_old, through which gradient flows.

    Unbiased in value and gradient for KL(pi, pi_ref), off-policy too (DeepSeek-V3.2 2025, eq. 7). Without the ratio, the
    gradient of k3 is that of KL(pi_ref, pi), which is another thing.
    """
    log_ratio = torch.where(batch.mask, logprob - _reference_logprob(batch), 0.0)
    return (logprob - batch.behavior_logprob).exp() * ((-log_ratio).exp() - 1 + log_ratio)


def kl_exact(distribution, logprob: Tensor, batch: Batch) -> Tensor:
    """KL(pi, pi_ref) over all actions at each step, [B, T]; `batch.reference` is the reference's distribution."""
    return distribution.kl(batch.reference)


def scale_penalty(kl_penalty: ReferenceKLPenalty, coef: float) -> ReferenceKLPenalty:
    """A charge times a coefficient."""
    return lambda distribution, logprob, batch: coef * kl_penalty(distribution, logprob, batch)


def with_pretraining(policy, batch: Batch, *, objective: Callable[[Any, Batch], Losses], coef: float) -> Losses:
    """An objective, plus coef times -log p of pretraining text (PPO-ptx: Ouyang et al. 2022, eq. 2). [B, T].

    Each row brings a row of text; its mean over tokens is charged to every chosen step of the row.
    """
    loss, metrics = objective(policy, batch)
    assert batch.pretraining_text is not None
    token_loss, _ = sft_loss(policy, batch.pretraining_text)
    mean = torch.where(batch.pretraining_text.mask, token_loss, 0.0).sum(dim=1) / batch.pretraining_text.mask.sum(
        dim=1
    ).clamp(min=1)
    row_loss = mean[:, None].expand_as(loss)
    return loss + coef * row_loss, metrics | {"pretraining_loss": row_loss.detach()}


def sft_loss(policy, text: TokenBatch) -> Losses:
    """-log pi of the tokens that were written, where `text.mask` says so: supervised fine-tuning. [B, T]."""
    distribution, _ = policy(text)
    loss = -distribution.log_prob(text.action)
    return loss, {"loss": loss.detach()}


def bradley_terry_loss(reward_model, pairs: PreferencePairs, *, center_coef: float) -> Losses:
    """-log sigmoid(s_chosen - s_rejected - margin) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1), [B, 1].

    Args:
        center_coef: times (s_chosen + s_rejected)^2, which holds the scores' mean near 0 (Eisenstein et al. 2023, eq. 6).
    """
    chosen, rejected = reward_model(pairs.chosen), reward_model(pairs.rejected)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - pairs.margin)
    return loss + center_coef * (chosen + rejected).square(), {
        "loss": loss.detach(),
        "accuracy": (chosen > rejected).to(loss.dtype),
    }


def dpo_loss(
    policy, pairs: PreferencePairs, *, beta: float, label_smoothing: float, loss_type: Literal["sigmoid", "ipo"]
) -> Losses:
    """Direct preference optimisation, [B, 1]. h = log pi / pi_ref of chosen minus that of rejected, summed over tokens.

    sigmoid: -(1 - e) log sigmoid(coef h) - e log sigmoid(-coef h) (Rafailov et al. 2023, eq. 7; e: cDPO's label noise).
    ipo: (h - 1 / (2 coef))^2 (Azar et al. 2023, eq. 17), h over tokens as it stands there: a sum, not a mean.

    Args:
        pairs: `mask` at every token of the completions; `reference` holds both sides' log-probs, [B, 2].
    """
    logprobs = []
    for text in (pairs.chosen, pairs.rejected):
        logprob = policy(text)[0].log_prob(text.action)
        logprobs.append(torch.where(text.mask, logprob, 0.0).sum(dim=1))
    assert pairs.reference is not None
    logratios = torch.stack(logprobs, dim=1) - pairs.reference
    logratio_difference = logratios[:, :1] - logratios[:, 1:]
    if loss_type == "ipo":
        loss = (logratio_difference - 1 / (2 * beta)).square()
    else:
        logsigmoid = torch.nn.functional.logsigmoid
        loss = -(1 - label_smoothing) * logsigmoid(beta * logratio_difference) - label_smoothing * logsigmoid(
            -beta * logratio_difference
        )
    metrics = {"loss": loss, "accuracy": (logratio_difference > 0).to(loss.dtype), "margin": beta * logratio_difference}
    metrics |= {"chosen_logratio": logratios[:, :1], "rejected_gain": logratios[:, 1:]}
    return loss, {name: x.detach() for name, x in metrics.items()}


def binary_label_loss(reward_model, labelled: LabelledText) -> Losses:
    """-[y log sigmoid(s) + (1 - y) log sigmoid(-s)]: a score that is a log-odds, [B, 1]."""
    score = reward_model(labelled.text)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(score, labelled.label, reduction="none")
    return loss, {"loss": loss.detach(), "accuracy": ((score > 0) == (labelled.label > 0.5)).to(loss.dtype)}


def clipped_surrogate(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """Negative PPO-clip surrogate (Schulman et al. 2017, eq. 7); minimise. All [B, T]."""
    ratio = (logprob - old_logprob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def squared_error(value: Tensor, target: Tensor) -> Tensor:
    """(V - target)^2 / 2, per step."""
    return 0.5 * (value - target).square()


def huber_error(value: Tensor, target: Tensor) -> Tensor:
    """|V - target| - 1/2, and (V - target)^2 / 2 where that is within 1 (Huber 1964), per step."""
    return torch.nn.functional.huber_loss(value, target, reduction="none")


def clipped_value_loss(value: Tensor, batch: Batch, *, clip: float) -> Tensor:
    """Half the squared error; with clip > 0, the larger of it and that of V kept within `clip` of the old V. [B, T].

    The clipped form is that of OpenAI's baselines (`ppo2/model.py`), the larger one also where clipping would hide an error.
    """
    value_loss = squared_error(value, batch.target)
    clipped_value = batch.value + (value - batch.value).clamp(-clip, clip) if clip else value
    return torch.maximum(value_loss, squared_error(clipped_value, batch.target)) if clip else value_loss


def adapt_kl_old_coef(coef: float, kl: float, *, target: float) -> float:
    """The next coefficient of the KL penalty: halved below target / 1.5, doubled above target * 1.5 (2017, sec. 4)."""
    if kl < target / 1.5:
        return coef / 2
    return coef * 2 if kl > target * 1.5 else coef


def _critic_free_losses(
    distribution, batch, logprob, log_ratio, policy_loss, low, high, entropy_coef: float, kl_penalty
) -> Losses:
    """The loss and metrics of an objective whose critic is a group of scores."""
    penalty = kl_penalty and kl_penalty(distribution, logprob, batch)
    zeros = torch.zeros_like(policy_loss)
    loss, metrics = _combine_losses(distribution, batch, policy_loss, zeros, 0.0, entropy_coef, penalty)
    ratio = log_ratio.detach().exp()
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    metrics.pop("value_loss")
    return loss, metrics | {"ratio": ratio, "clip_fraction": outside.to(ratio.dtype)}


def _evaluate_actions(policy, batch: Batch):
    """Distribution, value and log-prob of the actions taken; where nothing was chosen, the old log-prob: a ratio of 1."""
    distribution, value = policy_forward(policy, batch)
    return distribution, value, torch.where(batch.mask, distribution.log_prob(batch.action), batch.behavior_logprob)


def _reference_logprob(batch: Batch) -> Tensor:
    """The reference's log-probs, those of the sampler where nothing was chosen."""
    return torch.where(batch.mask, batch.reference, batch.behavior_logprob)


def _combine_losses(
    distribution, batch: Batch, policy_loss, value_loss, value_coef: float, entropy_coef: float, penalty=None
):
    with torch.set_grad_enabled(entropy_coef > 0):  # without a coefficient it is only looked at
        entropy = distribution.entropy()
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    loss, penalty_metrics = (loss, {}) if penalty is None else (loss + penalty, {"kl_penalty": penalty})
    metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss} | penalty_metrics
    metrics[getattr(distribution, "entropy_name", "entropy")] = entropy  # an estimate is called one
    with torch.no_grad():
        return loss, {name: x.detach() for name, x in metrics.items()} | {
            "kl_old": batch.old_distribution.kl(distribution)
        }
