"""Steps that another policy chose: exact gradients by enumeration, and what the recipes make of it."""

from functools import partial
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from tests.records import ACTIONS, Table, seeded
from understudy.batch import Batch
from understudy.objective import grpo, policy_gradient, ppo, squared_error
from understudy.reduce import importance_weight

WIDE = {"low": 0.0, "high": float("inf")}
OBJECTIVES = {
    "policy_gradient": partial(policy_gradient, value_coef=0.0, entropy_coef=0.0, value_loss=squared_error),
    "ppo": partial(ppo, clip=0.2, value_coef=0.0, entropy_coef=0.0),
    "grpo": partial(grpo, low=0.2, high=0.2, entropy_coef=0.0),
}


class Words:
    """Every completion of `length` words, one a row; pi and mu are tables over what was said so far."""

    def __init__(self, length: int) -> None:
        self.words = torch.tensor(list(product(range(ACTIONS), repeat=length)))
        before, number = torch.zeros(len(self.words), dtype=torch.long), torch.zeros_like(self.words)
        first, size = 0, 1
        for column in range(length):
            number[:, column] = first + before
            before, first, size = before * ACTIONS + self.words[:, column], first + size, size * ACTIONS
        self.prefix, self.mask = number, torch.ones_like(number).bool()
        self.pi, self.mu = Table(1, states=first), Table(2, states=first)
        self.reward = torch.rand(len(self.words), generator=seeded(3), dtype=torch.float64)

    def logprob(self, table: Table) -> torch.Tensor:
        return table(self.prefix)[0].log_prob(self.words).detach()

    def gradient(self, sampler: Table, objective=OBJECTIVES["policy_gradient"], **weighed) -> torch.Tensor:
        """The expected gradient of the loss when `sampler` speaks, summed over all it may say."""
        own, theirs = self.logprob(self.pi), self.logprob(sampler)
        weight = importance_weight(own, theirs, self.mask, **weighed) if weighed else torch.ones_like(own)
        zeros, ended = torch.zeros_like(own), torch.zeros_like(self.mask)
        batch = Batch(
            obs=self.prefix,
            action=self.words,
            logprob=own,
            mask=self.mask,
            reward=zeros,
            terminated=ended,
            truncated=ended,
            value=zeros,
            advantage=weight * self.reward[:, None],
            target=zeros,
            old=self.pi(self.prefix)[0],
        )
        loss, _ = objective(self.pi, batch)
        self.pi.zero_grad()
        (theirs.sum(dim=1, keepdim=True).exp() * loss).sum().backward()
        assert self.pi.logits.grad is not None
        return self.pi.logits.grad.clone()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("how", ["truncate", "mask"])
@pytest.mark.parametrize(("length", "ratio"), [(1, "step"), (1, "row"), (1, "row_mean"), (2, "row"), (3, "row")])
def test_without_a_bound_another_samplers_words_have_the_policys_own_gradient(length, ratio, how, objective):
    words = Words(length)

    found = words.gradient(words.mu, objective, how=how, ratio=ratio, **WIDE)
    assert_close(found, words.gradient(words.pi, objective))


def test_control_unweighted_they_have_another_one():
    words = Words(2)

    assert (words.gradient(words.mu) - words.gradient(words.pi)).abs().max() > 0.05


@pytest.mark.parametrize("ratio", ["step", "row_mean"])
def test_ratios_of_steps_leave_to_the_sampler_what_came_before_and_comes_after(ratio):
    words = Words(2)

    off = (words.gradient(words.mu, how="truncate", ratio=ratio, **WIDE) - words.gradient(words.pi)).norm()
    assert 0.01 < off < (words.gradient(words.mu) - words.gradient(words.pi)).norm()


def one_good_word(how: str, high: float) -> tuple[float, float, float]:
    """Word 0 alone is paid. How much its logit is raised on-policy and off, and its pi / mu."""
    words = Words(1)
    words.reward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    ratio = float((words.logprob(words.pi) - words.logprob(words.mu))[0].exp())
    found = words.gradient(words.mu, how=how, ratio="step", low=0.0, high=high * ratio)
    return -float(words.gradient(words.pi)[0, 0]), -float(found[0, 0]), ratio


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 2.0])
def test_a_bound_below_a_good_words_ratio_raises_it_by_so_much_less(share):
    # E_mu[min(w, C) 1(word 0) grad] = mu(0) min(w, C) grad = min(1, C / w) of E_pi
    on_policy, found, _ = one_good_word("truncate", share)

    assert on_policy > 0
    assert found == pytest.approx(min(1.0, share) * on_policy)


@pytest.mark.parametrize(("share", "left"), [(0.9, 0.0), (1.1, 1.0)])
def test_a_band_that_a_good_words_ratio_is_outside_of_does_not_raise_it(share, left):
    on_policy, found, _ = one_good_word("mask", share)

    assert found == pytest.approx(left * on_policy, abs=1e-12)


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_a_bound_takes_from_the_weights_and_never_adds(how):
    words = Words(2)
    own, theirs = words.logprob(words.pi), words.logprob(words.mu)
    chance = theirs.sum(dim=1).exp()
    means = []
    for high in (0.5, 1.0, 2.0, 4.0, float("inf")):
        weight = importance_weight(own, theirs, words.mask, how=how, ratio="row", low=0.0, high=high)
        means.append(float((chance * weight[:, 0]).sum()))

    assert means == sorted(means)
    assert means[0] < 0.9 and means[-1] == pytest.approx(1.0)  # E_mu[pi / mu] = 1
