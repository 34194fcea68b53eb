"""Step 1, sample: what a policy is, and one choice of it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class ActorCritic(Protocol):
    """Anything that says how it would act and how much it expects: `policy(obs) -> distribution, value [B, T]`.

    A policy with `needs_whole_rows` reads whole rows. If it is recurrent it is `policy(obs, state, start) ->
    distribution, value, state`: `state` [B, S] before column 0, `start` [B, T] True where an episode begins, so that
        the state is zeroed there.
    """

    @property
    def needs_whole_rows(self) -> bool: ...

    def __call__(self, obs: Any, state: Tensor | None = None, start: Tensor | None = None) -> Any: ...


class SampledAction(NamedTuple):
    """One choice for every row: the action, log pi(action | obs), the state after it, and the noise that made it."""

    action: Tensor
    logprob: Tensor
    state: Tensor | None
    noise: Tensor | None


@torch.no_grad()
def sample_action(
    policy: ActorCritic, obs: Any, state=None, start=None, *, generator=None, noise=None, sample=True
) -> SampledAction:
    """Let the policy choose once a row: obs [B, 1, ...] -> action [B, ...], logprob [B], state [B, S].

    Sampler and scorer are one object: the log-prob comes from the distribution that sampled, so the first ratio is 1.

    Args:
        state, start: for a recurrent policy, [B, S] and bool [B, 1].
        generator: the only source of randomness, a torch.Generator.
        noise: held from an earlier `Choice`, instead of fresh noise.
        sample: without it, the distribution's mode.
    """
    distribution, _, *rest = policy(obs) if state is None else policy(obs, state, start)
    noise = distribution.noise(generator) if sample and noise is None else noise
    # detached, since no_grad lets a view of a parameter through: a policy that looks at nothing returns one
    action = (distribution.action_from_noise(noise) if sample else distribution.mode()).detach()
    return SampledAction(action[:, 0], distribution.log_prob(action)[:, 0], rest[0] if rest else None, noise)
