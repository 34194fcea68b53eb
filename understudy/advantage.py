"""Step 4, advantage: was the step better or worse than expected? Pure functions of tensors, [B, T] or [B].

Gamma and lambda count choices: traces pass over masked columns inside an episode and never cross an end. A reward on a
masked column between two choices belongs to the choice before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.reduce import group_moments


def reward_to_go(reward, terminated, truncated, mask, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each step to its episode's end (Williams 1992; Sutton & Barto 2018, eq. 13.8).

    G_t = r_t + gamma * G_{t+1}, [B, T]; 0 at masked columns. Nothing is bootstrapped: meant for whole episodes.
    """
    ended = terminated | truncated
    choice_reward = _reward_per_choice(reward, ended, mask)
    return _zero_masked(_backward_sum(choice_reward, _trace_decay(gamma, choice_reward, ended, mask)), mask)


def td_error(reward, value, next_value, terminated, truncated, mask, *, gamma: float) -> Tensor:
    """delta_t = r_t + gamma * V(s_{t+1}) - V(s_t), without V(s_{t+1}) where the step terminated (Sutton & Barto eq. 6.5).

    All [B, T]; 0 at masked columns. A truncated step bootstraps: `next_value` is V of its true last observation.
    """
    choice_reward = _reward_per_choice(reward, terminated | truncated, mask)
    return _zero_masked(choice_reward + gamma * torch.where(terminated, 0.0, next_value) - value, mask)


def gae(reward, value, next_value, terminated, truncated, mask, *, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16): A_t = delta_t + gamma * lam * A_{t+1}.

    The trace stops at `terminated` and `truncated`; only `terminated` also drops V(s_{t+1}). All [B, T]; 0 where masked.
    lam = 0 is the TD error; lam = 1 with V = 0 is the reward-to-go.
    """
    delta = td_error(reward, value, next_value, terminated, truncated, mask, gamma=gamma)
    return _zero_masked(_backward_sum(delta, _trace_decay(gamma * lam, delta, terminated | truncated, mask)), mask)


def group_relative(score: Tensor, group: Tensor, *, scale_by_std: bool, eps: float = 1e-4) -> Tensor:
    """Score minus its group's mean, over the group's standard deviation (Shao et al. 2024, sec. 4.1.2). [B].

    A group of one gets 0: there is nothing to compare it with. So does a group of equal scores.

    Args:
        score: [B] float.  group: [B] int, equal for rows of one prompt or one start state.
        scale_by_std: divide by the standard deviation (n - 1); without it, Dr. GRPO (Liu et al. 2025).
        eps: added to the standard deviation.
    """
    _, mean, variance = group_moments(score, group)
    centred = score - mean
    return centred / (variance.sqrt() + eps) if scale_by_std else centred


def leave_one_out(score: Tensor, group: Tensor) -> Tensor:
    """Score minus the mean of the *other* members of its group (RLOO; Kool et al. 2019, eq. 8; Ahmadian et al. 2024). [B].

    An unbiased baseline: no member's own score is in it. A group of one gets 0.
    """
    size, mean, _ = group_moments(score, group)
    return (score - mean) * size / (size - 1).clamp(min=1)


def _reward_per_choice(reward: Tensor, ended: Tensor, mask: Tensor) -> Tensor:
    """Each choice's pay: its own reward and that of the masked columns up to the next choice of its episode. 0 elsewhere."""
    if torch.equal(masked_reward := _zero_masked(reward, mask), reward):
        return masked_reward
    carry = torch.nn.functional.pad(torch.where(mask[:, 1:] | ended[:, :-1], 0.0, 1.0), (0, 1))
    return _zero_masked(_backward_sum(reward, carry), mask)


def _trace_decay(decay: float, like: Tensor, ended: Tensor, mask: Tensor) -> Tensor:
    """How much of the next column's trace reaches this one: 0 at an end, `decay` at a choice, 1 where masked."""
    return torch.where(ended, 0.0, torch.where(mask, torch.full_like(like, decay), 1.0))


def _backward_sum(x: Tensor, carry: Tensor) -> Tensor:
    """y_t = x_t + carry_t * y_{t+1} along the columns, by doubling: after k rounds y_t holds 2^k terms, or all there are."""
    for shift in (2**k for k in range((x.shape[1] - 1).bit_length())):
        x = torch.cat([torch.addcmul(x[:, :-shift], carry[:, :-shift], x[:, shift:]), x[:, -shift:]], dim=1)
        carry = torch.cat([carry[:, :-shift] * carry[:, shift:], carry[:, -shift:]], dim=1)
    return x


def _zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0)
