"""What every estimator of the advantage has in common, whatever its formula."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from tests.records import random_record, seeded
from understudy import advantage
from understudy.advantage import gae, group_relative, leave_one_out, reward_to_go, td_error
from understudy.batch import Trajectory, map_tensors
from understudy.value import next_value

SEEDS = pytest.mark.parametrize("seed", range(3))


def _ends(record: Trajectory):
    return {"terminated": record.terminated, "truncated": record.truncated, "mask": record.mask}


STEPWISE = {
    "reward_to_go": lambda record, value: reward_to_go(record.reward, **_ends(record), gamma=0.9),
    "td_error": lambda record, value: td_error(
        record.reward, value, next_value(value, record), **_ends(record), gamma=0.9
    ),
    "gae": lambda record, value: gae(
        record.reward, value, next_value(value, record), **_ends(record), gamma=0.9, lam=0.7
    ),
}
GROUPED = {
    "group_relative": lambda score, group: group_relative(score, group, scale_by_std=True),
    "group_relative_centred": lambda score, group: group_relative(score, group, scale_by_std=False),
    "leave_one_out": leave_one_out,
}
EVERY_STEPWISE = pytest.mark.parametrize("estimator", STEPWISE.values(), ids=STEPWISE)
EVERY_GROUPED = pytest.mark.parametrize("estimator", GROUPED.values(), ids=GROUPED)


def test_every_estimator_of_the_room_is_in_these_tables():
    public = {
        name for name, f in inspect.getmembers(advantage, inspect.isfunction) if f.__module__ == advantage.__name__
    }
    assert {name for name in public if not name.startswith("_")} <= STEPWISE.keys() | GROUPED.keys()


def case(seed: int) -> tuple[Trajectory, torch.Tensor]:
    record = random_record(seed)
    return record, torch.randn(record.mask.shape, generator=seeded(seed), dtype=torch.float64)


@SEEDS
@EVERY_STEPWISE
def test_padding_columns_change_nothing(estimator, seed):
    record, value = case(seed)
    steps = record.mask.shape[1]
    padded = map_tensors(lambda x: torch.cat([x, torch.zeros_like(x[:, :3])], dim=1), record)
    junk = torch.full_like(value[:, :3], 1e3)

    after = estimator(padded, torch.cat([value, junk], dim=1))

    assert_close(after[:, :steps], estimator(record, value))
    assert_close(after[:, steps:], torch.zeros_like(junk))


@SEEDS
@EVERY_STEPWISE
def test_the_order_of_rows_changes_nothing(estimator, seed):
    record, value = case(seed)
    order = torch.randperm(len(record), generator=seeded(seed))

    assert_close(estimator(map_tensors(lambda x: x[order], record), value[order]), estimator(record, value)[order])


@SEEDS
@EVERY_STEPWISE
def test_rows_apart_are_rows_together(estimator, seed):
    record, value = case(seed)

    pieces = [slice(0, 1), slice(1, 4), slice(4, None)]
    apart = [estimator(map_tensors(lambda x, at=at: x[at], record), value[at]) for at in pieces]

    assert_close(torch.cat(apart), estimator(record, value))


@SEEDS
@EVERY_STEPWISE
def test_two_episodes_in_a_row_are_two_episodes_apart(estimator, seed):
    record, value = case(seed)
    together = estimator(record, value)

    for b, t in record.ended.nonzero().tolist():
        # up to the last observation, and from there on
        for at in (slice(0, t + 2), slice(t + 2, None)):
            apart = estimator(map_tensors(lambda x, b=b, at=at: x[b : b + 1, at], record), value[b : b + 1, at])
            assert_close(apart, together[b : b + 1, at])


@SEEDS
@EVERY_STEPWISE
def test_nothing_is_said_of_unchosen_columns(estimator, seed):
    record, value = case(seed)

    assert not estimator(record, value)[~record.mask].any()


@SEEDS
@EVERY_GROUPED
def test_the_order_of_scores_changes_nothing(estimator, seed):
    score, group = torch.randn(9, generator=seeded(seed)), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    order = torch.randperm(9, generator=seeded(seed))

    assert_close(estimator(score[order], group[order]), estimator(score, group)[order])


@EVERY_GROUPED
def test_groups_apart_are_groups_together(estimator):
    score, group = torch.randn(9, generator=seeded()), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])

    apart = [estimator(score[group == g], group[group == g]) for g in range(3)]
    assert_close(torch.cat(apart), estimator(score, group))


@EVERY_GROUPED
def test_the_names_of_groups_change_nothing(estimator):
    score, group = torch.randn(6, generator=seeded()), torch.tensor([0, 0, 1, 1, 2, 2])

    assert_close(estimator(score, 100 - 7 * group), estimator(score, group))


@EVERY_GROUPED
def test_a_bonus_for_a_whole_group_changes_nothing(estimator):
    score, group = torch.randn(6, generator=seeded(), dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 1])

    assert_close(estimator(score + 3.0 * group, group), estimator(score, group))
