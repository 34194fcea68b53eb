"""Over-optimisation: the best of n by hand, and fits of curves whose constants are known."""

import math

import numpy as np
import pytest

from understudy.study.overoptimise import Fit, fit, kl_of_best_of_n, mean_of_best_of_n, peak_interval

D = np.linspace(0.2, 4.0, 20)


def best_of(alpha, beta):
    return D * D, D * (alpha - beta * D)


def rl(alpha, beta):
    return D * D, D * (alpha - beta * np.log(D))


def test_the_mean_of_the_best_is_over_all_ways_to_draw():
    by, what = np.array([[3.0, 1.0, 2.0]]), np.array([[10.0, 20.0, 60.0]])

    # of the pairs (3, 1), (3, 2), (1, 2) the best by `by` are 3, 3, 2: 10, 10 and 60
    assert mean_of_best_of_n(by, what, 2) == pytest.approx(80 / 3)
    assert mean_of_best_of_n(by, what, 1) == pytest.approx(30)
    assert mean_of_best_of_n(by, what, 3) == pytest.approx(10)


def test_the_best_is_drawn_prompt_by_prompt():
    by = np.array([[1.0, 2.0], [200.0, 100.0]])

    assert mean_of_best_of_n(by, np.array([[5.0, 7.0], [1.0, 3.0]]), 2) == pytest.approx(4)  # (7 + 1) / 2


def test_a_single_prompt_needs_no_row_of_its_own():
    assert mean_of_best_of_n(np.array([3.0, 1.0, 2.0]), np.array([10.0, 20.0, 60.0]), 2) == pytest.approx(80 / 3)


def test_the_best_of_very_many_has_weights_that_sum_to_one():
    rows = np.ones((1, 4096))

    assert mean_of_best_of_n(rows, rows, 512) == pytest.approx(1)


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=rf"n is {n}, by is \(1, 3\)"):
        mean_of_best_of_n(np.ones((1, 3)), np.ones((1, 3)), n)


def test_the_kl_of_the_best_of_n():
    # log 4 - 3/4 = 1.3863 - 0.75
    assert [kl_of_best_of_n(1), kl_of_best_of_n(4)] == pytest.approx([0.0, 0.6363], abs=1e-4)


def test_best_of_n_is_a_parabola_in_root_kl_with_its_peak_at_half_alpha_over_beta():
    found = fit([best_of(2.0, 0.5)], "best_of")

    assert (found.alpha, found.beta, found.r2) == pytest.approx((2.0, 0.5, 1.0))
    assert found.peak == pytest.approx(4.0)  # d = 2 / (2 * 0.5) = 2
    assert found(4.0) == pytest.approx(2.0)  # 2 * (2 - 0.5 * 2)


def test_rl_bends_with_the_logarithm_and_peaks_at_exp_of_alpha_over_beta_less_one():
    found = fit([rl(1.0, 0.5)], "rl")

    assert (found.alpha, found.beta, found.r2) == pytest.approx((1.0, 0.5, 1.0))
    assert found.peak == pytest.approx(math.exp(2))  # d = exp(1 / 0.5 - 1) = e
    assert found(math.exp(2)) == pytest.approx(math.e * 0.5)  # e * (1 - 0.5 * 1)


@pytest.mark.parametrize("curve", [best_of, rl])
def test_the_peak_is_where_the_curve_is_highest(curve):
    found = fit([curve(1.5, 0.6)], curve.__name__)
    around = [found(found.peak * share) for share in (0.9, 1.0, 1.1)]

    assert max(around) == around[1]


@pytest.mark.parametrize("form", ["best_of", "rl"])
@pytest.mark.parametrize("beta", [-0.1, 0.0])
def test_what_never_bends_down_has_its_peak_at_infinity(form, beta):
    assert Fit(form, alpha=1.0, beta=beta, r2=1.0).peak == math.inf


def test_what_falls_from_the_start_has_its_peak_at_zero():
    assert fit([best_of(-1.0, 0.5)], "best_of").peak == 0.0
    assert fit([rl(-9.0, 0.5)], "rl").peak == pytest.approx(0.0, abs=1e-9)


def test_points_at_zero_say_nothing():
    kl, gain = rl(1.0, 0.5)

    with_zero = fit([(np.append(kl, 0.0), np.append(gain, 0.0))], "rl")
    assert with_zero == fit([(kl, gain)], "rl")
    assert with_zero(0.0) == 0.0


def test_r2_is_what_the_mean_leaves_unexplained_that_the_fit_explains():
    # d = 1, 2; the least squares of d (alpha - beta d) pass through both points; a third at d = 1 lies 1 above the first
    found = fit([([1.0, 4.0, 1.0], [1.0, 3.0, 2.0])], "best_of")

    # between 1 and 2 it passes at 1.5: squared error 0.5; around the mean, 2, the gains have 1 + 1 + 0
    assert found.r2 == pytest.approx(1 - 0.5 / 2)


def test_all_curves_are_fitted_as_one():
    one, other = best_of(1.0, 0.2), best_of(3.0, 0.6)

    found = fit([one, other], "best_of")
    assert (found.alpha, found.beta) == pytest.approx((2.0, 0.4))


def test_the_interval_of_the_peak_is_over_seeds_and_the_same_every_time():
    curves = [best_of(alpha, 0.5) for alpha in (1.0, 2.0, 3.0)]  # peaks at d = 1, 2, 3

    low, high = peak_interval(curves, "best_of")

    assert (low, high) == pytest.approx((1.0, 9.0))  # all three draws the first, or the last: 1 in 27 each
    assert (low, high) == peak_interval(curves, "best_of")
    assert peak_interval(curves[:1], "best_of") == pytest.approx((1.0, 1.0))


def test_an_interval_may_end_at_infinity():
    curves = [best_of(1.0, 0.5), best_of(1.0, -2.0)]

    low, high = peak_interval(curves, "best_of")
    assert low == pytest.approx(1.0)
    assert high == math.inf
