"""Distributions against torch's of the same name, by hand where torch has none, and samplers against their probabilities."""

import math

import pytest
import torch
from torch import distributions as reference
from torch.testing import assert_close

from tests.records import seeded
from understudy.distribution import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    SquashedGaussian,
    StateNoiseGaussian,
)

DRAWS = 20_000
HALF_WIDTH = torch.tensor([2.0, 0.5], dtype=torch.float64)
ALLOWED = torch.tensor([[True, False, True, True], [False, False, True, False]])


def normal(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def categorical(seed: int = 0):
    logits = 2 * normal(2, 3, 4, seed=seed)
    return Categorical.of(logits), reference.Categorical(logits=logits)


def bernoulli(seed: int = 0):
    logits = 2 * normal(2, 3, 4, seed=seed)
    return Bernoulli(logits), reference.Independent(reference.Bernoulli(logits=logits), 1)


def gaussian(seed: int = 0):
    mean, log_std = normal(2, 3, 4, seed=seed), 0.5 * normal(2, 3, 4, seed=seed + 1)
    return DiagonalGaussian(mean, log_std), reference.Independent(reference.Normal(mean, log_std.exp()), 1)


TORCH = pytest.mark.parametrize("make", [categorical, bernoulli, gaussian])


@TORCH
def test_log_prob_is_torchs(make):
    ours, theirs = make()
    action = theirs.sample()
    assert_close(ours.log_prob(action.long() if make is not gaussian else action), theirs.log_prob(action))


@TORCH
def test_entropy_is_torchs(make):
    ours, theirs = make()
    assert_close(ours.entropy(), theirs.entropy())


@TORCH
def test_kl_is_torchs(make):
    (ours, theirs), (other, their_other) = make(), make(seed=5)
    assert_close(ours.kl(other), reference.kl_divergence(theirs, their_other))


@TORCH
def test_a_distribution_has_no_kl_to_itself(make):
    ours, _ = make()
    assert_close(ours.kl(ours), torch.zeros(2, 3, dtype=torch.float64))


@TORCH
def test_a_sample_is_the_action_at_its_noise(make):
    ours, _ = make()
    assert_close(ours.sample(seeded(3)), ours.action_from_noise(ours.noise(seeded(3))))


def test_the_mode_is_the_most_likely_action():
    assert Categorical.of(torch.tensor([0.1, 2.0, -1.0])).mode() == 1
    assert_close(Bernoulli(torch.tensor([0.1, -0.1])).mode(), torch.tensor([1, 0]))
    assert_close(DiagonalGaussian(torch.tensor([0.3]), torch.zeros(1)).mode(), torch.tensor([0.3]))


def test_an_impossible_yes_is_never_said():
    # the sigmoid of -200 is 0 in float32, and noise can be 0
    assert_close(Bernoulli(torch.tensor([-200.0])).action_from_noise(torch.tensor([0.0])), torch.tensor([0]))


def test_a_normal_action_is_the_mean_plus_noise_in_deviations():
    # 1 + 3 * 2
    ours = DiagonalGaussian(torch.tensor([1.0]), torch.tensor([3.0]).log())
    assert_close(ours.action_from_noise(torch.tensor([2.0])), torch.tensor([7.0]))


def chi_square(counts, probability):
    """Pearson's statistic of drawn counts; far below 30 for up to 7 degrees of freedom (p = 1e-4)."""
    expected = probability * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def test_categorical_draws_have_their_probabilities():
    one = Categorical.of(normal(1, 5).expand(DRAWS, 5))

    counts = one.sample(seeded()).bincount(minlength=5)

    assert chi_square(counts, one.logp[0].exp()) < 30


def test_categorical_draws_under_a_mask_have_the_remaining_probabilities():
    logits = normal(5)
    one = Categorical.of(logits.expand(DRAWS, 5), torch.tensor([True, False, True, True, False]))

    counts = one.sample(seeded()).bincount(minlength=5)

    assert counts[[1, 4]].sum() == 0
    assert chi_square(counts[[0, 2, 3]], logits[[0, 2, 3]].softmax(-1)) < 30


def test_bernoulli_draws_have_their_probabilities_and_are_independent():
    one = Bernoulli(torch.tensor([0.5, -1.0]).expand(DRAWS, 2))

    counts = (one.sample(seeded()) @ torch.tensor([2, 1])).bincount(minlength=4)

    p, q = torch.tensor([0.5, -1.0]).sigmoid()
    assert chi_square(counts, torch.stack([(1 - p) * (1 - q), (1 - p) * q, p * (1 - q), p * q])) < 30


def test_draws_of_several_categoricals_have_their_joint_probabilities():
    logits = normal(5)
    several = MultiCategorical.of(logits.expand(DRAWS, 5), (2, 3))

    counts = (several.sample(seeded()) @ torch.tensor([3, 1])).bincount(minlength=6)

    joint = logits[:2].softmax(-1)[:, None] * logits[2:].softmax(-1)
    assert chi_square(counts, joint.flatten()) < 30


def test_gaussian_draws_have_their_mean_and_deviation():
    mean, log_std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])

    draws = DiagonalGaussian(mean.expand(DRAWS, 2), log_std.expand(DRAWS, 2)).sample(seeded())

    # four standard errors: std / sqrt(DRAWS) of the mean, std / sqrt(2 DRAWS) of the deviation
    assert ((draws.mean(0) - mean).abs() < 4 * log_std.exp() / DRAWS**0.5).all()
    assert ((draws.std(0) - log_std.exp()).abs() < 4 * log_std.exp() / (2 * DRAWS) ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_only_allowed_action_is_always_drawn(dtype):
    logits = torch.tensor([50.0, 50, -50, 50], dtype=dtype).expand(2000, 4)

    assert (Categorical.of(logits, ALLOWED[1]).sample(seeded()) == 2).all()


def test_masked_log_prob_and_entropy_are_those_of_the_allowed_actions_alone():
    logits = normal(4)
    ours, alone = Categorical.of(logits, ALLOWED[0]), reference.Categorical(logits=logits[ALLOWED[0]])

    assert_close(ours.log_prob(torch.tensor(2)), alone.log_prob(torch.tensor(1)))
    assert_close(ours.entropy(), alone.entropy())


def test_masked_kl_is_that_over_the_allowed_actions_alone():
    one, other = normal(4), normal(4, seed=1)

    alone = [reference.Categorical(logits=x[ALLOWED[0]]) for x in (one, other)]
    ours = Categorical.of(one, ALLOWED[0]).kl(Categorical.of(other, ALLOWED[0]))
    assert_close(ours, reference.kl_divergence(*alone))


def test_a_certain_choice_has_finite_entropy_kl_and_gradient():
    logits = torch.zeros(4, requires_grad=True)
    ours = Categorical.of(logits, ALLOWED[1])

    (ours.entropy() + ours.kl(ours) + ours.log_prob(torch.tensor(2))).backward()

    assert_close(ours.entropy(), torch.tensor(0.0))
    assert_close(logits.grad, torch.zeros(4))


def test_several_categoricals_add_up():
    logits, other = normal(3, 5), normal(3, 5, seed=1)
    ours, action = MultiCategorical.of(logits, (2, 3)), torch.tensor([[0, 2], [1, 0], [1, 1]])

    parts = [reference.Categorical(logits=x) for x in logits.split((2, 3), -1)]
    others = [reference.Categorical(logits=x) for x in other.split((2, 3), -1)]
    assert_close(ours.log_prob(action), parts[0].log_prob(action[:, 0]) + parts[1].log_prob(action[:, 1]))
    assert_close(ours.entropy(), parts[0].entropy() + parts[1].entropy())
    kl = sum(reference.kl_divergence(p, q) for p, q in zip(parts, others, strict=True))
    assert_close(ours.kl(MultiCategorical.of(other, (2, 3))), kl)


def test_each_of_several_categoricals_has_its_own_mask_and_mode():
    ours = MultiCategorical.of(torch.tensor([9.0, 0, 9, 1, 0]), (2, 3), torch.tensor([False, True, False, True, True]))

    assert_close(ours.mode(), torch.tensor([1, 1]))


def test_several_categoricals_act_at_their_own_noise():
    ours = MultiCategorical.of(torch.zeros(5), (2, 3))

    assert_close(ours.action_from_noise(torch.tensor([0.0, 1, 0, 0, 2])), torch.tensor([1, 2]))
    assert_close(ours.sample(seeded(3)), ours.action_from_noise(ours.noise(seeded(3))))


def squashed(mean, log_std):
    """Ours, and torch's: the same normal through tanh and a scale."""
    ours = SquashedGaussian(mean, log_std, half_width=HALF_WIDTH)
    squash = [reference.TanhTransform(), reference.AffineTransform(0.0, HALF_WIDTH)]
    base = reference.TransformedDistribution(reference.Normal(mean, log_std.exp()), squash)
    return ours, reference.Independent(base, 1)


def test_a_squashed_log_prob_is_the_density_of_the_squashed_action():
    ours, theirs = squashed(normal(3, 2), 0.3 * normal(3, 2, seed=1))
    action = normal(3, 2, seed=2)

    assert_close(ours.log_prob(action), theirs.log_prob(HALF_WIDTH * action.tanh()))


def test_a_squashed_density_integrates_to_one():
    # over one dimension, on the squashed side: sum of density times width
    ours = SquashedGaussian(torch.full((1,), 0.3), torch.full((1,), -0.5), half_width=torch.tensor([2.0]))
    y = torch.linspace(-1.9999, 1.9999, 4001)

    density = torch.stack([ours.log_prob(x[None]) for x in (y / 2).atanh()]).exp()

    assert_close(torch.trapezoid(density, y), torch.tensor(1.0), atol=1e-3, rtol=0)  # the ends left out


def test_a_squashed_entropy_is_minus_the_mean_log_prob():
    mean, log_std = torch.tensor([0.4, -0.8]), torch.tensor([-0.5, 0.1])
    many = SquashedGaussian(mean.expand(DRAWS, 2), log_std.expand(DRAWS, 2), half_width=torch.tensor([2.0, 0.5]))

    minus = -many.log_prob(many.sample(seeded()))

    assert (many.entropy()[0] - minus.mean()).abs() < 4 * minus.std() / DRAWS**0.5  # four standard errors


@pytest.mark.parametrize("log_std", [-3.0, -0.5, 0.0, 1e-6, 0.5, 1.5, 3.0, 5.0])
@pytest.mark.parametrize("mean", [0.0, 0.7, -3.0, 8.0])
def test_a_squashed_entropy_is_exact_at_every_spread(mean, log_std):
    ours = SquashedGaussian(torch.tensor([mean]), torch.tensor([log_std]), half_width=torch.tensor([2.0]))

    # E[log 2 (1 - tanh(x)^2)], slowly: 200,001 points of the normal within 10 deviations, in float64
    z = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    x = (mean + math.exp(log_std) * z).abs()
    slope = 2 * (math.log(2) - x - torch.log1p((-2 * x).exp()))
    expected = torch.trapezoid(slope * (-0.5 * z.square()).exp(), z) / math.sqrt(2 * math.pi)
    normal = log_std + 0.5 * math.log(2 * math.pi * math.e)
    assert_close(ours.entropy(), (normal + math.log(2) + expected).float(), rtol=2e-6, atol=1e-5)


def test_a_squashed_entropy_has_a_finite_gradient_at_every_spread():
    log_std = torch.tensor([-60.0, -3.0, 0.0, 3.0, 10.0], requires_grad=True)
    mean = torch.tensor([1.0, 50.0, 0.0, -9.0, 3.0], requires_grad=True)

    SquashedGaussian(mean, log_std, half_width=torch.ones(5)).entropy().backward()

    assert log_std.grad is not None and mean.grad is not None
    assert log_std.grad.isfinite().all() and mean.grad.isfinite().all()


def test_a_squashed_entropy_is_that_of_each_step_alone():
    mean, log_std = normal(2, 3, 2), 0.3 * normal(2, 3, 2, seed=1)

    together = squashed(mean, log_std)[0].entropy()

    alone = [[squashed(mean[b, t], log_std[b, t])[0].entropy() for t in range(3)] for b in range(2)]
    assert_close(together, torch.stack([torch.stack(r) for r in alone]))


def test_a_dimension_without_a_width_is_not_squashed():
    mean, log_std, action = torch.tensor([0.3, -0.2]), torch.tensor([0.1, -0.4]), torch.tensor([1.5, 0.7])
    half = SquashedGaussian(mean, log_std, half_width=torch.tensor([0.0, 2.0]))

    plain = DiagonalGaussian(mean[:1], log_std[:1])
    squashed = SquashedGaussian(mean[1:], log_std[1:], half_width=torch.tensor([2.0]))
    assert_close(half.log_prob(action), plain.log_prob(action[:1]) + squashed.log_prob(action[1:]))
    assert_close(half.entropy(), plain.entropy() + squashed.entropy())


def test_a_squashed_log_prob_far_out_is_finite_and_exact():
    # 1 - tanh(x)^2 = 4 exp(-2x) for large x: log density = -x^2/2 - log(2 pi)/2 - log 4 + 2x
    ours = SquashedGaussian(torch.zeros(1), torch.zeros(1), half_width=torch.ones(1))

    expected = -0.5 * 400 - 0.5 * math.log(2 * math.pi) - math.log(4) + 2 * 20
    assert_close(ours.log_prob(torch.tensor([20.0])), torch.tensor(expected))


def test_squashing_keeps_the_kl_of_the_normals():
    one, other = (SquashedGaussian(normal(2, seed=s), normal(2, seed=s + 1), half_width=HALF_WIDTH) for s in (0, 7))

    plain = DiagonalGaussian(one.mean, one.log_std).kl(DiagonalGaussian(other.mean, other.log_std))
    assert_close(one.kl(other), plain)


def state_noise(features):
    mean = torch.tensor([0.5, -1.0]).expand(*features.shape[:-1], 2)
    return StateNoiseGaussian.from_features(mean, features, torch.tensor([[0.1, -0.5], [-1.0, 0.3], [0.0, 0.2]]))


def test_state_noise_is_linear_in_the_features():
    # weight_std of 1: action = mean + features @ E = 0.5 + 1 * 10 + 2 * 20
    ours = StateNoiseGaussian.from_features(torch.tensor([[0.5]]), torch.tensor([[1.0, 2.0]]), torch.zeros(2, 1))

    assert_close(ours.action_from_noise(torch.tensor([[[10.0], [20.0]]])), torch.tensor([[50.5]]))


def test_state_noise_varies_with_the_features_and_the_weights():
    # variance = (1 e^0.4)^2 + (2 e^-1)^2
    log_std = torch.tensor([[0.4], [-1.0]])
    ours = StateNoiseGaussian.from_features(torch.zeros(1), torch.tensor([1.0, 2.0]), log_std)

    variance = math.exp(0.8) + 4 * math.exp(-2)
    assert_close(ours.log_std.exp().square(), torch.tensor([variance]))


def test_one_held_noise_acts_in_many_states():
    features = torch.randn(7, 3, generator=seeded())
    many, noise = state_noise(features), state_noise(features[:1]).noise(seeded(1))

    one_by_one = torch.cat([state_noise(f[None]).action_from_noise(noise) for f in features])
    assert_close(many.action_from_noise(noise.expand(7, 3, 2)), one_by_one)


def test_state_noise_has_a_weight_for_every_row_step_feature_and_dimension():
    assert state_noise(torch.ones(4, 5, 3)).noise(seeded()).shape == (4, 5, 3, 2)


def test_state_noise_has_a_density_even_without_features():
    assert state_noise(torch.zeros(1, 3)).log_prob(torch.zeros(1, 2)).isfinite().all()


def test_every_row_draws_its_own_state_noise():
    first, second = state_noise(torch.ones(2, 3)).sample(seeded())

    assert not first.equal(second)


def test_state_noise_log_prob_is_that_of_the_actions_over_many_draws():
    # the mean log-prob of draws from a normal is minus its entropy: (1 + log 2 pi) / 2 + log std, for each dimension
    many = state_noise(torch.tensor([0.3, -1.2, 0.8]).expand(DRAWS, 3))
    draws = many.sample(seeded())
    fitted = reference.Independent(reference.Normal(draws.mean(0), draws.std(0)), 1)

    # the fit's error is of the order of sqrt(2 / DRAWS)
    assert_close(many.log_prob(draws).mean(), fitted.log_prob(draws).mean(), atol=3e-3, rtol=0)
    assert_close(many.entropy()[0], -many.log_prob(draws).mean(), atol=0.04, rtol=0)


def test_state_noise_is_learnt_through_its_log_prob():
    weights = torch.zeros(3, 2, requires_grad=True)
    ours = StateNoiseGaussian.from_features(torch.zeros(1, 2), torch.tensor([[1.0, 2, 3]]), weights)

    ours.log_prob(torch.zeros(1, 2)).sum().backward()

    # log N(0 | 0, v) = -log(v) / 2 + ...; dv/dw_f = 2 f^2 at w = 0: -f^2 / v with v = 1 + 4 + 9
    assert_close(weights.grad, -torch.tensor([[1.0], [4], [9]]).expand(3, 2) / 14)


def test_choices_of_log_prob_minus_infinity_are_as_if_they_were_not_there():
    some, others = normal(2, 3, seed=0).requires_grad_(), normal(2, 3, seed=1)
    padded, theirs = (torch.nn.functional.pad(x, (0, 2), value=-torch.inf) for x in (some, others))
    found = []
    for ours, other in ((padded, theirs), (some, others)):
        policy, old = Categorical.of(ours), Categorical.of(other)
        values = torch.stack([policy.entropy(), policy.kl(old), old.kl(policy)])
        found.append([values, *torch.autograd.grad(values.sum(), some, retain_graph=True)])

    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected)


def test_a_kl_to_what_rules_out_a_possible_choice_is_infinite():
    assert float(Categorical.of(torch.zeros(2)).kl(Categorical.of(torch.tensor([0.0, -torch.inf])))) == math.inf


def test_a_bit_that_is_certain_has_no_entropy_and_no_kl_to_itself():
    certain = Bernoulli(torch.tensor([torch.inf, -torch.inf]))

    assert float(certain.entropy()) == 0 and float(certain.kl(certain)) == 0
