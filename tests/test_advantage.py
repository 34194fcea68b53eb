"""Step 4: by hand, against the textbook's double loop, and the identities between the estimators."""

import pytest
import torch
from torch.testing import assert_close

from tests.records import flags, random_record, row, seeded
from understudy.advantage import gae, group_relative, leave_one_out, reward_to_go, td_error
from understudy.value import next_value

NEVER = flags(0, 0, 0)
ALL = flags(1, 1, 1)


def test_reward_to_go_is_the_discounted_sum_to_the_end():
    # 3; 2 + 0.5 * 3; 1 + 0.5 * 3.5
    G = reward_to_go(row(1, 2, 3), NEVER, NEVER, ALL, gamma=0.5)
    assert_close(G, row(2.75, 3.5, 3))


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_reward_to_go_stops_at_an_end(end):
    # episode one ends at column 1; column 2 is its last observation, paid nothing
    ends = {"terminated": flags(0, 0, 0, 0), "truncated": flags(0, 0, 0, 0)} | {end: flags(0, 1, 0, 0)}
    G = reward_to_go(row(1, 2, 0, 8), **ends, mask=flags(1, 1, 0, 1), gamma=0.5)
    assert_close(G, row(2, 2, 0, 8))


def test_gamma_counts_choices_and_tool_pay_belongs_to_the_choice_before():
    # a1 is paid 1 + (2 + 3) undiscounted; a2 4: 6 + 0.5 * 4
    G = reward_to_go(row(9, 1, 2, 3, 4), flags(0, 0, 0, 0, 1), flags(0, 0, 0, 0, 0), flags(0, 1, 0, 0, 1), gamma=0.5)
    assert_close(G, row(0, 8, 0, 0, 4))


def test_pay_after_an_end_belongs_to_nobody():
    # column 1 is masked and follows an end: its 7 is not the terminated step's
    G = reward_to_go(row(1, 7, 2), flags(1, 0, 0), NEVER, flags(1, 0, 1), gamma=0.5)
    assert_close(G, row(1, 0, 2))


def test_the_td_error_bootstraps_from_the_next_value():
    # 1 + 0.5 * 4 - 2
    assert_close(td_error(row(1), row(2), row(4), flags(0), flags(0), flags(1), gamma=0.5), row(1))


def test_a_terminated_step_does_not_bootstrap():
    # 1 - 2
    assert_close(td_error(row(1), row(2), row(4), flags(1), flags(0), flags(1), gamma=0.5), row(-1))


def test_a_truncated_step_bootstraps():
    # 1 + 0.5 * 4 - 2
    assert_close(td_error(row(1), row(2), row(4), flags(0), flags(1), flags(1), gamma=0.5), row(1))


def test_gae_by_hand():
    # delta = 1 + 0.5 * 2 - 1, 2 + 0.5 * 3 - 2, 3 - 3 = 1, 1.5, 0; decay 0.5 * 0.8 = 0.4: 1 + 0.4 * (1.5 + 0.4 * 0)
    A = gae(row(1, 2, 3), row(1, 2, 3), row(2, 3, 0), flags(0, 0, 1), NEVER, ALL, gamma=0.5, lam=0.8)
    assert_close(A, row(1.6, 1.5, 0))


def test_a_truncated_step_bootstraps_but_cuts_the_trace():
    # delta_0 = 1 + 0.5 * 4 - 2 = 1; step 1 belongs to the next episode and must not leak into it
    A = gae(row(1, 9), row(2, 0), row(4, 0), flags(0, 0), flags(1, 0), flags(1, 1), gamma=0.5, lam=1.0)
    assert_close(A, row(1, 9))


def test_a_trace_passes_over_tool_text_undecayed():
    # delta = 1 + 2 (tool's pay), 8; decay 0.5 once: 3 + 0.5 * 8
    A = gae(row(1, 2, 8), row(0, 5, 0), row(0, 0, 0), flags(0, 0, 1), NEVER, flags(1, 0, 1), gamma=1.0, lam=0.5)
    assert_close(A, row(7, 0, 8))


def test_a_score_above_its_groups_mean_is_positive_over_the_groups_deviation():
    # group 5: {1, 3}, mean 2, deviation sqrt(2); group 0: {4, 4, 10}, mean 6, deviation sqrt((4 + 4 + 16) / 2) = sqrt(12)
    A = group_relative(torch.tensor([1.0, 4, 4, 3, 10]), torch.tensor([5, 0, 0, 5, 0]), scale_by_std=True, eps=0.0)
    assert_close(A, torch.tensor([-(0.5**0.5), -2 / 12**0.5, -2 / 12**0.5, 0.5**0.5, 4 / 12**0.5]))


def test_eps_is_added_to_the_groups_deviation():
    # deviation sqrt(2), eps sqrt(2)
    A = group_relative(torch.tensor([1.0, 3]), torch.tensor([0, 0]), scale_by_std=True, eps=2**0.5)
    assert_close(A, torch.tensor([-(0.125**0.5), 0.125**0.5]))


def test_without_scale_a_score_is_only_centred():
    A = group_relative(torch.tensor([1.0, 4, 4, 3, 10]), torch.tensor([5, 0, 0, 5, 0]), scale_by_std=False)
    assert_close(A, torch.tensor([-1.0, -2, -2, 1, 4]))


def test_a_score_is_compared_with_the_others_of_its_group():
    # 1 - 3; 3 - 1; 4 - (4 + 10) / 2 twice; 10 - (4 + 4) / 2
    A = leave_one_out(torch.tensor([1.0, 4, 4, 3, 10]), torch.tensor([5, 0, 0, 5, 0]))
    assert_close(A, torch.tensor([-2.0, -3, -3, 2, 6]))


@pytest.mark.parametrize("scale", [True, False])
def test_who_is_alone_in_a_group_has_no_advantage(scale):
    score, group = torch.tensor([7.0, 1, 3]), torch.tensor([0, 1, 1])

    assert group_relative(score, group, scale_by_std=scale)[0] == 0
    assert leave_one_out(score, group)[0] == 0


def test_equal_scores_have_no_advantage():
    score, group = torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long)

    assert_close(
        group_relative(score, group, scale_by_std=True), torch.zeros(3), atol=1e-3, rtol=0
    )  # rounding over eps
    assert_close(leave_one_out(score, group), torch.zeros(3))


def choices(record, b: int):
    """Each episode of row b as the textbook has it: the columns of its choices, and what each was paid."""
    found, now = [], []
    for t in range(record.mask.shape[1]):
        if record.mask[b, t]:
            now.append([t, 0.0])
        if now:
            now[-1][1] += float(record.reward[b, t])
        if record.terminated[b, t] or record.truncated[b, t]:
            found, now = [*found, now], []
    return [*found, now]


def slow(record, step):
    """`step(pay of the choices from this one on, their columns)` at every choice."""
    out = torch.zeros_like(record.reward)
    for b in range(len(record)):
        for episode in choices(record, b):
            for i, (t, _) in enumerate(episode):
                columns, pay = zip(*episode[i:], strict=True)
                out[b, t] = step(b, columns, pay)
    return out


def random_case(seed: int):
    record = random_record(seed)
    value = torch.randn(record.mask.shape, generator=seeded(seed), dtype=torch.float64)
    after = next_value(value, record)
    ends = {"terminated": record.terminated, "truncated": record.truncated, "mask": record.mask}

    def delta(b, column, pay):
        bootstrap = 0.0 if record.terminated[b, column] else float(after[b, column])
        return pay + 0.9 * bootstrap - float(value[b, column])

    return record, value, after, ends, delta


@pytest.mark.parametrize("seed", range(6))
def test_reward_to_go_is_the_slow_references(seed):
    record, _, _, ends, _ = random_case(seed)

    expected = slow(record, lambda b, columns, pay: sum(0.9**k * r for k, r in enumerate(pay)))
    assert_close(reward_to_go(record.reward, **ends, gamma=0.9), expected)


@pytest.mark.parametrize("seed", range(6))
def test_the_td_error_is_the_slow_references(seed):
    record, value, after, ends, delta = random_case(seed)

    expected = slow(record, lambda b, columns, pay: delta(b, columns[0], pay[0]))
    assert_close(td_error(record.reward, value, after, **ends, gamma=0.9), expected)


@pytest.mark.parametrize("seed", range(6))
def test_gae_is_the_slow_references(seed):
    record, value, after, ends, delta = random_case(seed)

    def double_loop(b, columns, pay):
        return sum((0.9 * 0.7) ** k * delta(b, t, r) for k, (t, r) in enumerate(zip(columns, pay, strict=True)))

    assert_close(gae(record.reward, value, after, **ends, gamma=0.9, lam=0.7), slow(record, double_loop))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_gae_with_lam_one_and_no_critic_is_reward_to_go(gamma):
    record, value, _, ends, _ = random_case(3)
    zero = torch.zeros_like(value)

    A = gae(record.reward, zero, zero, **ends, gamma=gamma, lam=1.0)
    assert_close(A, reward_to_go(record.reward, **ends, gamma=gamma))


def test_gae_with_lam_zero_is_the_td_error():
    record, value, after, ends, _ = random_case(4)

    A = gae(record.reward, value, after, **ends, gamma=0.9, lam=0.0)
    assert_close(A, td_error(record.reward, value, after, **ends, gamma=0.9))


def test_gae_with_lam_one_is_reward_to_go_minus_v_where_episodes_terminate():
    record, value, after, ends, _ = random_case(5)
    ends |= {"terminated": record.ended, "truncated": torch.zeros_like(record.ended)}
    whole = [b for b in range(len(record)) if record.mask[b].any() and _ends_last(record, b)]

    A = gae(record.reward, value, after, **ends, gamma=0.9, lam=1.0) + torch.where(record.mask, value, 0.0)
    assert_close(A[whole], reward_to_go(record.reward, **ends, gamma=0.9)[whole])


def _ends_last(record, b: int) -> bool:
    return bool(record.ended[b, record.mask[b].nonzero()[-1]])


def test_leave_one_out_is_group_relative_times_n_over_n_minus_one():
    score, group = torch.randn(12, generator=seeded(), dtype=torch.float64), torch.arange(12) // 4

    assert_close(leave_one_out(score, group), group_relative(score, group, scale_by_std=False) * 4 / 3)


@pytest.mark.parametrize(("size", "score"), [(8, 0.7), (3, 5.7), (8, 100.1)])
def test_equal_scores_have_no_advantage_whatever_their_rounding(size, score):
    found = group_relative(torch.full((size,), score), torch.zeros(size).long(), scale_by_std=True)

    assert_close(found, torch.zeros(size), atol=1e-6, rtol=0)
