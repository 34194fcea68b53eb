"""Step 3: V as it is now, and V after each step in the layout of the record."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.records import Blind, Table, flags, random_record, record, row, seeded
from understudy import value as value_module
from understudy.batch import Batch
from understudy.fast.linear import round_up_rows
from understudy.value import estimate_values, next_value


def test_an_estimate_is_the_policys_value_at_every_column():
    table, taken = Table(), random_record(0)

    distribution, value = estimate_values(table, taken)

    assert_close(value, table.values[taken.obs].detach())
    assert_close(distribution.log_prob(taken.action), table(taken.obs)[0].log_prob(taken.action).detach())


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("rows", [2, 4])
def test_a_record_that_is_read_in_pieces_is_the_same(monkeypatch, memory, rows):
    table, taken = Table(memory=memory), random_record(0)
    size = rows * taken.mask.shape[1]
    distribution, value = estimate_values(table, taken)
    for few_or_many in ("MIN_CHUNKED_STEPS", "CHUNK_STEPS"):
        monkeypatch.setattr(value_module, few_or_many, size)
    read = []
    table.register_forward_pre_hook(lambda _, given: read.append(len(given[0])))

    pieces, in_pieces = estimate_values(table, taken)

    last = (6 % rows) * size // rows
    assert read == ([rows] if memory else [size]) * (6 // rows) + ([2] if memory else [round_up_rows(last)]) * (
        last > 0
    )
    assert_close((pieces.logp, in_pieces), (distribution.logp, value), rtol=0, atol=0)


def test_a_fresh_record_keeps_what_sampled_it_and_a_batch_is_asked_anew():
    table, taken = Table(), random_record(0)
    sampled, value = estimate_values(table, taken)
    table.value = lambda obs: table.values[obs]
    told = replace(taken, old_distribution=sampled)
    with torch.no_grad():
        table.logits += torch.arange(table.logits.shape[-1])

    kept, again = estimate_values(table, told)
    anew, _ = estimate_values(table, Batch.of(told, value=value, advantage=value, target=value))

    assert torch.equal(kept.logp, sampled.logp) and torch.equal(again, value)
    assert_close(anew.logp, table(taken.obs)[0].logp.detach())
    assert (anew.logp - sampled.logp).abs().max() > 0.1


def test_no_gradient_flows_through_an_estimate():
    distribution, value = estimate_values(Table(), random_record(0))

    assert not value.requires_grad
    assert not distribution.logp.requires_grad


def test_no_gradient_flows_through_an_estimate_that_is_a_parameter():
    distribution, value = estimate_values(Blind(1, 2), record(flags(1, 1)))

    assert not value.requires_grad
    assert not distribution.mean.requires_grad


def test_v_after_a_step_is_v_at_the_next_step():
    assert_close(next_value(row(1, 2, 3), record(flags(1, 1, 0))), row(2, 3, 0))


def test_v_after_a_truncated_step_is_v_of_its_last_observation():
    # control layout: s0 s1, last observation, s0', last observation
    taken = record(flags(1, 1, 0, 1, 0), truncated=flags(0, 1, 0, 0, 0))
    assert_close(next_value(row(1, 2, 3, 4, 5), taken), row(2, 3, 0, 5, 0))


def test_v_after_a_terminated_step_never_comes_from_the_next_episode():
    taken = record(flags(1, 0, 1, 0), terminated=flags(1, 0, 0, 0))
    assert_close(next_value(row(1, 2, 3, 4), taken), row(2, 0, 4, 0))


def test_text_that_was_not_chosen_is_stepped_over():
    # text layout: prompt, a1, tool tool, a2, eos
    taken = record(flags(0, 1, 0, 0, 1, 1, 0), terminated=flags(0, 0, 0, 0, 0, 1, 0))
    assert_close(next_value(row(1, 2, 3, 4, 5, 6, 7), taken), row(0, 5, 0, 0, 6, 7, 0))


def test_v_after_the_last_step_of_a_cut_row_is_v_at_the_column_to_the_right():
    # padding further right (9) is not looked at
    assert_close(next_value(row(1, 2, 9, 9), record(flags(1, 0, 0, 0))), row(2, 0, 0, 0))


def test_a_step_in_the_last_column_has_only_its_own_v():
    assert_close(next_value(row(1, 2), record(flags(1, 1))), row(2, 2))


@pytest.mark.parametrize("seed", range(4))
def test_v_after_a_step_is_the_slow_references(seed):
    taken = random_record(seed)
    value = torch.randn(taken.mask.shape, generator=seeded(seed), dtype=torch.float64)

    expected = torch.zeros_like(value)
    for b, t in taken.mask.nonzero().tolist():
        later = [c for c in range(t + 1, value.shape[1]) if taken.mask[b, c]]
        over = bool(taken.terminated[b, t]) or bool(taken.truncated[b, t]) or not later
        expected[b, t] = value[b, t + 1] if over else value[b, later[0]]

    assert_close(next_value(value, taken), expected)
