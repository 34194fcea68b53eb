"""The distribution over the next token: what it says by hand, and the same in pieces where the logits are too many."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from understudy.fast import linear
from understudy.language.model import token_distribution
from understudy.language.model.token_distribution import (
    Head,
    SampledTokens,
    TokenDistribution,
    apply_top_k_top_p,
    sample_inverse_cdf,
)

MASK = torch.tensor([[True, True, False], [False, True, True]])


def over(probabilities: torch.Tensor, mask: torch.Tensor | None = None) -> TokenDistribution:
    """A distribution of given probabilities [B, T, V]; its hidden states are their logarithms."""
    mask = torch.ones(probabilities.shape[:2], dtype=torch.bool) if mask is None else mask
    return TokenDistribution(probabilities.log(), mask, Head(nn.Identity()))


def one(*probabilities: float) -> TokenDistribution:
    return over(torch.tensor([[probabilities]]))


def at_random(*, vocabulary: int = 11, seed: int = 0) -> TokenDistribution:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        project = nn.Linear(4, vocabulary)
    hidden = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
    return TokenDistribution(hidden, MASK, Head(project))


def test_log_prob_entropy_and_kl_by_hand():
    half, skewed = one(0.5, 0.5), one(0.25, 0.75)

    assert float(skewed.log_prob(torch.tensor([[1]]))) == pytest.approx(math.log(0.75))
    # -(0.25 log 0.25 + 0.75 log 0.75)
    assert float(skewed.entropy()) == pytest.approx(0.5623, abs=1e-4)
    # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75)
    assert float(half.kl(skewed)) == pytest.approx(0.1438, abs=1e-4)


def test_numbers_of_rows_that_differ_by_chance_are_multiplied_alike(monkeypatch):
    seen = []
    monkeypatch.setattr(
        token_distribution, "linear", lambda x, w, b=None: seen.append((x.shape, w.shape)) or linear.linear(x, w, b)
    )
    for chosen in (3, 4):
        said = at_random()
        mask = torch.arange(6).view(2, 3) < chosen
        TokenDistribution(said.hidden, mask, said.head).log_prob(torch.ones(2, 3, dtype=torch.long)).sum().backward()

    assert seen[:4] == seen[4:]


def test_the_likeliest_token_is_the_mode():
    assert int(one(0.2, 0.5, 0.3).mode()) == 1


@pytest.mark.parametrize(("noise", "token"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2), (0.999999, 2)])
def test_the_token_of_a_noise_is_the_first_whose_cumulative_probability_is_above_it(noise, token):
    assert int(one(0.2, 0.5, 0.3).action_from_noise(torch.tensor([[noise]]))) == token


def test_a_token_without_probability_is_never_drawn():
    never = one(0.0, 1.0, 0.0)

    for noise in (0.0, 0.5, 1 - 2**-24):
        assert int(never.action_from_noise(torch.tensor([[noise]]))) == 1


def test_the_largest_noise_takes_the_last_token_that_has_a_probability():
    # 4095 tokens whose float32 probabilities do not add up to 1, and one that is impossible
    many = torch.cat([torch.full((4095,), 1 / 4095), torch.zeros(1)])

    assert int(sample_inverse_cdf(many[None], torch.tensor([1 - 2**-24]))) == 4094


@pytest.mark.parametrize("width", [8, 11])
def test_a_token_found_by_its_block_is_the_one_found_in_the_whole_vocabulary(monkeypatch, width):
    p = torch.randint(0, 3, (500, width), generator=torch.Generator().manual_seed(0)).float()  # sums without rounding
    p[:, 5] += 1
    noise = torch.rand(500, generator=torch.Generator().manual_seed(1))
    whole = sample_inverse_cdf(p, noise)
    monkeypatch.setattr(token_distribution, "CUMSUM_BLOCK_SIZE", 4)

    assert torch.equal(sample_inverse_cdf(p, noise), whole)


def test_samples_come_as_often_as_their_probability_says():
    drawn = over(torch.tensor([0.2, 0.5, 0.3]).expand(1, 10_000, 3)).sample(torch.Generator().manual_seed(0))

    share = torch.bincount(drawn[0], minlength=3) / 10_000
    assert_close(share, torch.tensor([0.2, 0.5, 0.3]), atol=0.02, rtol=0)  # 4 standard errors of 0.005


def test_where_nothing_was_chosen_everything_is_zero():
    distribution = at_random()

    action = torch.full((2, 3), 7)
    for x in (distribution.log_prob(action), distribution.entropy(), distribution.kl(at_random(seed=1))):
        assert torch.equal(x[~MASK], torch.zeros(2))
        assert (x[MASK] != 0).all()


def test_the_head_scales_caps_and_divides_by_the_temperature():
    # 3 * 2 = 6; 4 tanh(6 / 4) = 3.6206; over 0.5 = 7.2412
    head = Head(nn.Identity(), scale=2.0, softcap=4.0, temperature=0.5)

    assert_close(head(torch.tensor([3.0])), torch.tensor([7.2412]), atol=1e-4, rtol=0)


def test_a_frozen_head_does_not_move_with_the_policy():
    distribution = at_random()
    frozen = distribution.frozen()
    before = frozen.entropy()
    with torch.no_grad():
        distribution.head.project.weight.mul_(2)

    assert torch.equal(TokenDistribution(frozen.hidden, frozen.mask, frozen.head).entropy(), before)
    assert not before.requires_grad


@pytest.mark.parametrize("piece", [11, 2**21])
def test_log_probs_without_all_logits_are_those_of_a_softmax_and_so_are_the_gradients(monkeypatch, piece):
    monkeypatch.setattr(token_distribution, "MAX_CHUNK_LOGITS", piece)
    action, pull = torch.tensor([[3, 4, 0], [0, 5, 6]]), torch.tensor([[1.0, -2.0, 9.0], [9.0, 0.5, 3.0]])
    ours, plain = at_random(), at_random()
    ours = TokenDistribution(ours.hidden, MASK, Head(ours.head.project, scale=2.0, temperature=0.7))
    logits = plain.head.project(plain.hidden[MASK]) * 2.0 / 0.7
    theirs = logits.log_softmax(dim=-1)

    said = ours.log_prob(action)[MASK]
    assert_close(said, theirs.gather(1, action[MASK][:, None])[:, 0])
    with torch.no_grad():
        assert_close(ours.entropy()[MASK], -(theirs.exp() * theirs).sum(dim=-1))
    (said * pull[MASK]).sum().backward()
    (theirs.gather(1, action[MASK][:, None])[:, 0] * pull[MASK]).sum().backward()
    assert_close(ours.hidden.grad, plain.hidden.grad)
    for here, there in zip(ours.head.project.parameters(), plain.head.project.parameters(), strict=True):
        assert_close(here.grad, there.grad)


def test_log_probs_of_other_tokens_are_found_anew():
    distribution = at_random()
    first = distribution.log_prob(torch.full((2, 3), 1))

    assert not torch.equal(distribution.log_prob(torch.full((2, 3), 2)), first)
    assert torch.equal(distribution.log_prob(torch.full((2, 3), 1)), first)


def measured(distribution: TokenDistribution, other: TokenDistribution) -> list[torch.Tensor]:
    """Numbers and gradients of everything it says."""
    action = torch.tensor([[3, 4, 0], [0, 5, 6]])
    said = [distribution.log_prob(action), distribution.entropy(), distribution.kl(other)]
    sum(x.sum() for x in said).backward()
    found = [*said, distribution.mode(), distribution.action_from_noise(torch.full((2, 3), 0.37))]
    return [x.detach() for x in [*found, distribution.hidden.grad, distribution.head.project.weight.grad]]


def test_logits_made_in_pieces_give_the_same_numbers_and_gradients(monkeypatch):
    whole = measured(at_random(), at_random(seed=1))
    monkeypatch.setattr(token_distribution, "MAX_STORED_LOGITS", 11)
    monkeypatch.setattr(token_distribution, "MAX_CHUNK_LOGITS", 11)  # one row of logits at a time

    pieces = measured(at_random(), at_random(seed=1))

    assert at_random()._logp is None
    for here, there in zip(whole, pieces, strict=True):
        assert_close(here, there)


def test_the_kl_of_sampled_tokens_is_k3():
    # new / old = 0.9 / 0.5: 1.8 - 1 - log 1.8
    old = SampledTokens(torch.tensor([[1]]), torch.tensor([[math.log(0.5)]]))

    assert float(old.kl(one(0.1, 0.9))) == pytest.approx(0.8 - math.log(1.8), abs=1e-6)


def test_the_kl_of_sampled_tokens_is_zero_where_nothing_was_chosen():
    old = SampledTokens(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -50.0))

    assert torch.equal(old.kl(at_random())[~MASK], torch.zeros(2))


@pytest.mark.parametrize("size", [5, 1000])
def test_probabilities_that_are_no_numbers_still_pick_a_token(size):
    assert 0 <= int(sample_inverse_cdf(torch.full((1, size), torch.nan), torch.tensor([0.5]))) < size


class RulesOut(nn.Linear):
    """Logits of -inf for every token from 7 on, as models have them whose vocabulary is padded."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).masked_fill(torch.arange(self.out_features) >= 7, -torch.inf)


def ruled_out(how: str, seed: int) -> TokenDistribution:
    """11 tokens, of which the last 4 are ruled out by a bias of -inf or by the module, or absent."""
    made = at_random(seed=seed)
    project = made.head.project
    with torch.no_grad():
        if how == "bias":
            project.bias[7:] = -torch.inf
        elif how == "module":
            project.__class__ = RulesOut
        else:
            made.head.project.weight, made.head.project.bias = (
                nn.Parameter(x[:7].double()) for x in (project.weight, project.bias)
            )
    hidden = made.hidden.detach().to(project.weight.dtype).requires_grad_()
    return TokenDistribution(hidden, MASK, Head(project, temperature=0.7))


@pytest.mark.parametrize("piece", [11, 2**21])
@pytest.mark.parametrize("how", ["bias", "module"])
def test_tokens_ruled_out_are_as_if_they_were_not_there(monkeypatch, how, piece):
    theirs = measured(ruled_out("absent", 0), ruled_out("absent", 1))  # in float64
    monkeypatch.setattr(token_distribution, "MAX_STORED_LOGITS", piece)
    monkeypatch.setattr(token_distribution, "MAX_CHUNK_LOGITS", piece)

    ours = measured(ruled_out(how, 0), ruled_out(how, 1))
    for here, there in zip(ours[:-1], theirs[:-1], strict=True):
        assert_close(here, there.to(here.dtype))
    assert_close(ours[-1][:7], theirs[-1].float())  # of the weights
    assert torch.equal(ours[-1][7:], torch.zeros(4, 4))

    distribution, expected = ruled_out(how, 0), ruled_out("absent", 0)
    distribution.log_prob(torch.zeros(2, 3, dtype=torch.long))
    with torch.no_grad():  # as it came with the log-probs
        assert_close(distribution.entropy(), expected.entropy().float())


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (2, 1.0, [0.0, 0.625, 0.375, 0.0]),  # 0.5 / 0.8 and 0.3 / 0.8
        (0, 0.7, [0.0, 0.625, 0.375, 0.0]),  # 0.5 is not yet 0.7
        (0, 0.5, [0.0, 1.0, 0.0, 0.0]),
        (3, 0.9, [0.15 / 0.95, 0.5 / 0.95, 0.3 / 0.95, 0.0]),  # 0.8 is not yet 0.9 of 0.95
    ],
)
def test_truncated_probabilities_are_the_likeliest_and_sum_to_one(top_k, top_p, kept):
    p = torch.tensor([[0.15, 0.5, 0.3, 0.05]])

    assert_close(apply_top_k_top_p(p, top_k=top_k, top_p=top_p), torch.tensor([kept]))
