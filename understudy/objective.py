"""Step 5, update: what to minimise. Losses per step, [B, T], never averaged here; metrics per step beside them.

An objective is `(policy, batch) -> (loss, metrics)`; its coefficients are bound with `functools.partial`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from understudy.batch import Batch, consult

Losses = tuple[Tensor, dict[str, Tensor]]  # per step [B, T], and metrics per step


def policy_gradient(
    policy, batch: Batch, *, value_coef: float, entropy_coef: float, value_loss: Callable[[Tensor, Tensor], Tensor]
) -> Losses:
    """-A log pi(a|s) + value_coef * value_loss - entropy_coef * H (Williams 1992; Mnih et al. 2016, sec. 4). [B, T].

    The advantage is a number, not a function: no gradient reaches the critic through it.
    """
    distribution, value = consult(policy, batch)
    logprob = distribution.log_prob(batch.action)
    policy_loss = -batch.advantage * torch.where(batch.mask, logprob, 0.0)
    error = value_loss(value, batch.target) if value_coef else torch.zeros_like(value)
    return _joined(distribution, batch, policy_loss, error, value_coef, entropy_coef)


def ppo(
    policy, batch: Batch, *, clip: float, value_coef: float, entropy_coef: float, value_clip: float = 0.0
) -> Losses:
    """PPO with the clipped surrogate (Schulman et al. 2017, eq. 7 and 9). [B, T]."""
    distribution, value, logprob = _choices(policy, batch)
    policy_loss = clipped_surrogate(logprob, batch.logprob, batch.advantage, low=clip, high=clip)
    error = critic_error(value, batch, clip=value_clip)
    loss, metrics = _joined(distribution, batch, policy_loss, error, value_coef, entropy_coef)
    ratio = (logprob - batch.logprob).detach().exp()
    return loss, metrics | {"ratio": ratio, "clip_fraction": ((ratio - 1).abs() > clip).to(ratio.dtype)}


def ppo_penalty(
    policy, batch: Batch, *, kl_coef: float, value_coef: float, entropy_coef: float, value_clip: float = 0.0
) -> Losses:
    """PPO with the importance-weighted surrogate minus kl_coef * KL(old, new), the KL exact (2017, eq. 8). [B, T]."""
    distribution, value, logprob = _choices(policy, batch)
    ratio = (logprob - batch.logprob).exp()
    policy_loss = kl_coef * batch.old.kl(distribution) - ratio * batch.advantage
    error = critic_error(value, batch, clip=value_clip)
    loss, metrics = _joined(distribution, batch, policy_loss, error, value_coef, entropy_coef)
    return loss, metrics | {"ratio": ratio.detach()}


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


def critic_error(value: Tensor, batch: Batch, *, clip: float) -> Tensor:
    """Half the squared error; with clip > 0, the larger of it and that of V kept within `clip` of the old V. [B, T].

    The clipped form is that of OpenAI's baselines (`ppo2/model.py`), the larger one also where clipping would hide an error.
    """
    error = squared_error(value, batch.target)
    near = batch.value + (value - batch.value).clamp(-clip, clip) if clip else value
    return torch.maximum(error, squared_error(near, batch.target)) if clip else error


def adapt_kl_coef(coef: float, kl: float, *, target: float) -> float:
    """The next coefficient of the KL penalty: halved below target / 1.5, doubled above target * 1.5 (2017, sec. 4)."""
    if kl < target / 1.5:
        return coef / 2
    return coef * 2 if kl > target * 1.5 else coef


def _choices(policy, batch: Batch):
    """Distribution, value and log-prob of the actions taken; where nothing was chosen, the old log-prob: a ratio of 1."""
    distribution, value = consult(policy, batch)
    return distribution, value, torch.where(batch.mask, distribution.log_prob(batch.action), batch.logprob)


def _joined(distribution, batch: Batch, policy_loss, error, value_coef: float, entropy_coef: float):
    entropy = distribution.entropy()
    loss = policy_loss + value_coef * error - entropy_coef * entropy
    metrics = {"loss": loss, "policy_loss": policy_loss, "value_error": error}
    metrics[getattr(distribution, "entropy_name", "entropy")] = entropy  # an estimate is called one
    with torch.no_grad():
        return loss, {name: x.detach() for name, x in metrics.items()} | {"kl_old": batch.old.kl(distribution)}
