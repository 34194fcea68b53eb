"""Weights and masked statistics, by hand and against torch on the masked-in entries alone."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.records import flags, row, seeded
from understudy.reduce import (
    cluster_ids,
    effective_sample_fraction,
    explained_variance,
    fraction_interval,
    group_moments,
    importance_weight,
    masked_mean,
    masked_var,
    mean_interval,
    moments,
    per_budget,
    per_row,
    per_step,
    standardize,
    student_t,
    whiten,
)

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
NOTHING = torch.zeros(2, 3).bool()


def scattered(seed: int = 0):
    """Numbers under a random mask; what is masked out is huge."""
    x = torch.randn(4, 6, generator=seeded(seed), dtype=torch.float64)
    mask = torch.rand(4, 6, generator=seeded(seed + 1)) < 0.6
    return torch.where(mask, x, 1e9), mask


def test_a_step_weighs_one_over_the_number_of_steps():
    # four chosen steps in all
    assert_close(per_step(MASK), 0.25 * MASK.float())


def test_a_row_weighs_the_same_however_long_it_is():
    # two rows with a step: 1/2 each; three steps share the first half, one has the second
    expected = torch.tensor([[1 / 6, 1 / 6, 1 / 6, 0], [0, 1 / 2, 0, 0], [0, 0, 0, 0]])
    assert_close(per_row(MASK), expected)


def test_a_step_weighs_one_over_rows_times_budget():
    # 3 rows of 8: 1/24, whatever their lengths
    assert_close(per_budget(MASK, budget=8), MASK / 24)


@pytest.mark.parametrize("weigh", [per_step, per_row])
def test_no_step_weighs_anything_where_none_is_chosen(weigh):
    assert_close(weigh(NOTHING), torch.zeros(2, 3))


def test_the_mean_is_over_chosen_steps():
    # (1 + 2 + 6 + 7) / 4
    x = torch.tensor([[1, 2, 6, 99], [99, 7, 99, 99], [99, 99, 99, 99.0]])
    assert_close(masked_mean(x, MASK), torch.tensor(4.0))


def test_the_mean_of_nothing_is_zero():
    assert_close(masked_mean(torch.ones(2, 3), NOTHING), torch.tensor(0.0))


def test_the_mean_ignores_a_nan_outside_the_mask():
    assert_close(masked_mean(row(3, float("nan")), flags(1, 0)), torch.tensor(3.0))


@pytest.mark.parametrize("seed", range(3))
def test_mean_and_variance_are_those_of_the_chosen_entries(seed):
    x, mask = scattered(seed)

    assert_close(masked_mean(x, mask), x[mask].mean())
    assert_close(masked_var(x, mask), x[mask].var())


def test_the_variance_of_one_entry_or_none_is_zero():
    assert_close(masked_var(row(5, 9), flags(1, 0)), torch.tensor(0.0))
    assert_close(masked_var(row(5, 9), flags(0, 0)), torch.tensor(0.0))


@pytest.mark.parametrize("seed", range(3))
def test_standardized_numbers_have_mean_zero_and_deviation_one(seed):
    x, mask = scattered(seed)

    z = standardize(x + 5, mask)

    assert_close(z[mask].mean(), torch.zeros((), dtype=torch.float64))
    assert_close(z[mask].std(), torch.ones((), dtype=torch.float64))


def test_standardizing_keeps_the_order():
    # mean 3, deviation sqrt((4 + 0 + 4) / 2) = 2
    assert_close(standardize(row(1, 3, 5), flags(1, 1, 1)), row(-1, 0, 1))


def test_two_numbers_are_standardized():
    # mean 2, deviation sqrt((1 + 1) / 1)
    assert_close(standardize(row(1, 3), flags(1, 1)), row(-(0.5**0.5), 0.5**0.5))


def test_standardizing_leaves_zero_outside_the_mask():
    assert_close(standardize(row(1, 3, 7), flags(1, 1, 0))[:, 2], torch.zeros(1))


def test_a_single_number_is_not_standardized():
    assert_close(standardize(row(5, 9), flags(1, 0)), row(5, 0))


@pytest.mark.parametrize("number", [0.1, 7.3, 1234.5])
def test_equal_numbers_are_standardized_to_zero(number):
    assert_close(standardize(row(*[number] * 7), flags(*[1] * 7)), row(*[0] * 7), atol=1e-3, rtol=0)


def test_eps_only_guards_the_division():
    # numbers as small as 1e-4 still come out with deviation 1
    assert_close(standardize(row(1e-4, 3e-4, 5e-4), flags(1, 1, 1)), row(-1, 0, 1), atol=1e-3, rtol=0)


def test_eps_is_added_to_the_deviation():
    # deviation 2, eps 2
    assert_close(standardize(row(1, 3, 5), flags(1, 1, 1), eps=2.0), row(-0.5, 0, 0.5))


def test_a_perfect_critic_explains_everything():
    assert_close(explained_variance(row(1, 2, 3), row(1, 2, 3), flags(1, 1, 1)), torch.tensor(1.0))


def test_a_constant_critic_explains_nothing():
    assert_close(explained_variance(row(9, 9, 9), row(1, 2, 3), flags(1, 1, 1)), torch.tensor(0.0))


def test_a_critic_of_the_wrong_sign_explains_less_than_nothing():
    # target - value is twice the target: 1 - 4 Var / Var
    assert_close(explained_variance(row(-1, -2, -3), row(1, 2, 3), flags(1, 1, 1)), torch.tensor(-3.0))


def test_a_critic_is_judged_at_chosen_steps_only():
    assert_close(explained_variance(row(1, 2, 9), row(1, 2, -9), flags(1, 1, 0)), torch.tensor(1.0))


def test_there_is_nothing_to_explain_where_targets_do_not_vary():
    assert explained_variance(row(1, 2), row(4, 4), flags(1, 1)).isnan()


def test_moments_are_mean_and_population_variance_over_the_first_dimension():
    # column 0: mean 2, ((1-2)^2 + (3-2)^2) / 2 = 1; column 1: mean 5, no spread
    mean, variance = moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))

    assert_close(mean, torch.tensor([2.0, 5.0], dtype=torch.float64))
    assert_close(variance, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_group_moments_are_each_members_size_mean_and_variance():
    # group 7: {1, 3}, mean 2, variance (1 + 1) / 1; group 4: {10}; group 2: {0, 3, 6}, mean 3, variance (9 + 0 + 9) / 2
    x = torch.tensor([1.0, 10, 0, 3, 3, 6])
    size, mean, variance = group_moments(x, torch.tensor([7, 4, 2, 7, 2, 2]))

    assert_close(size, torch.tensor([2.0, 1, 3, 2, 3, 3]))
    assert_close(mean, torch.tensor([2.0, 10, 3, 2, 3, 3]))
    assert_close(variance, torch.tensor([2.0, 0, 9, 2, 9, 9]))


@pytest.mark.parametrize(
    ("rows", "bound"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (30, 2.045), (121, 1.980)]
)
def test_students_t_is_that_of_the_tables(rows, bound):
    assert student_t(rows - 1) == pytest.approx(bound, abs=5e-4)


def test_students_t_comes_to_the_normal_bound():
    assert student_t(100_000) == pytest.approx(1.959964, abs=3e-5)


def test_an_interval_is_students_t_standard_errors_to_either_side():
    # 1 and 3: mean 2, standard deviation sqrt 2, standard error 1, one degree of freedom
    assert mean_interval(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, -10.706, 14.706), abs=1e-3)
    # 1, 2 and 3: mean 2, standard deviation 1, standard error 1 / sqrt 3, two degrees: 4.303 / 1.732 = 2.484
    assert mean_interval(torch.tensor([1.0, 2, 3])) == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)


@pytest.mark.parametrize("copies", [1, 4])
def test_intervals_of_three_units_hold_the_mean_in_95_of_100(copies):
    draw = torch.randn(4000, 3, generator=seeded(0), dtype=torch.float64).repeat_interleave(copies, dim=1)
    cluster = None if copies == 1 else torch.arange(3).repeat_interleave(copies)
    held = [low <= 0 <= high for _, low, high in (mean_interval(x, cluster) for x in draw)]

    # three standard errors of a share of 0.95 in 4000 are 0.010; 1.96 for t would hold it in 0.81
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.01)


def test_one_number_has_no_interval():
    mean, low, high = mean_interval(torch.tensor([5.0]))

    assert mean == 5.0 and math.isnan(low) and math.isnan(high)


def test_rows_of_a_cluster_count_as_one_in_an_interval():
    # each number twice: the cluster sums are -2 and 2 around 2, so the variance is 2 / 1 * (4 + 4) / 4^2 = 1, as of 1 and 3
    x, twice = torch.tensor([1.0, 1, 3, 3]), torch.tensor([7, 7, 9, 9])

    assert mean_interval(x, twice) == pytest.approx(mean_interval(torch.tensor([1.0, 3.0])))


def test_rows_of_a_single_cluster_are_independent():
    x = torch.tensor([1.0, 3.0])

    assert mean_interval(x, torch.zeros(2)) == mean_interval(x)


def test_clusters_that_balance_each_other_narrow_no_interval():
    # the cluster sums are 0, and so would be the interval's width: the variance is that of independent rows, 4/3 / 4 = 1/3,
    # with one degree of freedom for two clusters: 12.706 / sqrt 3 = 7.336
    x = torch.tensor([1.0, 3, 1, 3])

    assert mean_interval(x, torch.tensor([0, 0, 1, 1])) == pytest.approx((2.0, -5.336, 9.336), abs=1e-3)


@pytest.mark.parametrize("number", [0.0, 0.1, 500.0])
def test_numbers_that_are_all_equal_have_no_interval(number):
    mean, low, high = mean_interval(torch.full((7,), number))

    assert mean == pytest.approx(number) and math.isnan(low) and math.isnan(high)


def test_a_shares_interval_is_wilsons():
    # 3 of 4: z^2 = 3.8416, 1 + z^2 / 4 = 1.9604; middle (0.75 + 0.4802) / 1.9604 = 0.62753; half
    # sqrt(3.8416 * (0.1875 / 4 + 3.8416 / 64)) / 1.9604 = 0.32689
    assert fraction_interval(torch.tensor([1.0, 1, 1, 0])) == pytest.approx((0.75, 0.30064, 0.95442), abs=1e-5)


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 0.5101, 1.0), (0.0, 0.0, 0.4899)])
def test_a_share_of_all_or_nothing_has_a_width(share, low, high):
    # 4 of 4: 1 / (1 + 3.8416 / 4) = 0.5101
    assert fraction_interval(torch.full((4,), share)) == pytest.approx((share, low, high), abs=1e-4)


def test_copies_do_not_narrow_a_shares_interval():
    # 3 of 4 prompts, each twice: squares around 3/4 sum to 1.5, those of the cluster sums to 3; the design effect is
    # 3 * 4/3 / (1.5 * 8/7) = 7/3, and eight rows count for 24/7: middle 0.61790, half 0.34136
    rows, prompts = torch.tensor([1.0, 1, 1, 0]).repeat_interleave(2), torch.arange(4).repeat_interleave(2)

    assert fraction_interval(rows, prompts) == pytest.approx((0.75, 0.27654, 0.95926), abs=1e-5)
    assert fraction_interval(torch.ones(8), prompts) == fraction_interval(torch.ones(4))


def test_rows_with_equal_keys_are_a_cluster():
    assert cluster_ids(["b", (1, 2), "b", (1, 3)]).tolist() == [0, 1, 0, 2]


def test_whitening_keeps_the_mean():
    # 1, 3, 5: mean 3, standard deviation 2
    assert_close(whiten(row(1, 3, 5, 99), flags(1, 1, 1, 0)), row(2, 3, 4, 0))


# importance weights: a row of three steps whose pi / mu is 4, 1/4 and 2, and one of a single step with 1/2

RATIOS = torch.tensor([[4, 1 / 4, 99, 2], [99, 1 / 2, 99, 99]])
CHOSEN = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]).bool()
MU = torch.full((2, 4), -3.0)
weights = partial(importance_weight, RATIOS.log() + MU, MU, CHOSEN, low=0.5, high=3.0)


@pytest.mark.parametrize(
    ("how", "ratio", "expected"),
    [
        ("truncate", "step", [[3, 1 / 4, 0, 2], [0, 1 / 2, 0, 0]]),
        ("mask", "step", [[0, 0, 0, 2], [0, 1 / 2, 0, 0]]),  # 4 is above the band and 1/4 below; its ends are in it
        ("truncate", "row", [[2, 2, 0, 2], [0, 1 / 2, 0, 0]]),  # 4 * 1/4 * 2
        ("truncate", "row_mean", [[2 ** (1 / 3)] * 2 + [0, 2 ** (1 / 3)], [0, 1 / 2, 0, 0]]),
    ],
)
def test_a_step_counts_by_how_much_likelier_it_is_to_pi_within_bounds(how, ratio, expected):
    assert_close(weights(mode=how, ratio=ratio), torch.tensor(expected, dtype=torch.float32))


def test_a_row_outside_the_band_counts_nothing_or_the_bound():
    # its ratio, 2, is above 1.5; that of the other, 1/2, is in [1/2, 1.5]
    given = RATIOS.log(), torch.zeros(2, 4), CHOSEN
    masked = importance_weight(*given, mode="mask", ratio="row", low=0.5, high=1.5)
    assert_close(masked, torch.tensor([[0, 0, 0, 0], [0, 0.5, 0, 0]]))
    cut = importance_weight(*given, mode="truncate", ratio="row", low=0.5, high=1.5)
    assert_close(cut, torch.tensor([[1.5, 1.5, 0, 1.5], [0, 0.5, 0, 0]]))


@pytest.mark.parametrize("how", ["truncate", "mask"])
@pytest.mark.parametrize("ratio", ["step", "row", "row_mean"])
def test_a_sampler_that_is_the_policy_weighs_one_and_a_band_holds_its_ends(how, ratio):
    assert_close(importance_weight(MU, MU, CHOSEN, mode=how, ratio=ratio, low=1.0, high=1.0), CHOSEN.float())


@pytest.mark.parametrize(("how", "held"), [("truncate", 2.0), ("mask", 0.0)])
def test_a_ratio_beyond_all_numbers_is_held(how, held):
    # exp(300) is no float32
    weight = importance_weight(
        torch.zeros(1, 3), torch.full((1, 3), -100.0), flags(1, 1, 1), mode=how, ratio="row", low=0.5, high=2.0
    )

    assert_close(weight, torch.full((1, 3), held))


def test_no_gradient_reaches_the_policy_through_a_weight():
    logprob = RATIOS.log().requires_grad_()

    assert not importance_weight(logprob, MU, CHOSEN, mode="truncate", ratio="step", low=0.5, high=2.0).requires_grad


def test_the_effective_share_is_the_square_of_the_sum_over_n_sums_of_squares():
    # (1 + 1 + 2 + 4)^2 / (4 * (1 + 1 + 4 + 16)) = 64 / 88
    share = effective_sample_fraction(torch.tensor([[1, 1, 2, 99], [99, 4, 99, 99], [99, 99, 99, 99.0]]), MASK)
    assert_close(share, torch.tensor(64 / 88))


@pytest.mark.parametrize(("weight", "share"), [((3, 3, 3, 3), 1.0), ((0, 5, 0, 0), 0.25), ((0, 0, 0, 0), 0.0)])
def test_equal_weights_share_all_and_a_single_one_its_part(weight, share):
    assert_close(effective_sample_fraction(row(*weight), flags(1, 1, 1, 1)), torch.tensor(share))
