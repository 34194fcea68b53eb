"""The record both worlds share: its checks, its rows, its steps, and what a policy says about it."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests.records import Adder, Table, flags, random_batch, record, row
from understudy.batch import Batch, LabelledText, PreferencePairs, TokenBatch, map_tensors, policy_forward
from understudy.distribution import Categorical, SquashedGaussian


@pytest.mark.parametrize("name", ["behavior_logprob", "reward", "terminated", "truncated"])
def test_a_field_of_another_shape_than_the_mask_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} is \(1, 3\), mask is \(1, 2\): both must be \[B, T\]"):
        record(flags(1, 1), **{name: flags(1, 1, 0)})


def test_a_record_of_three_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"mask is \(1, 2, 1\): both must be \[B, T\]"):
        record(flags(1, 1)[..., None])


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"mask is torch.float32, must be bool"):
        record(row(1, 1))


def test_the_length_of_a_record_is_its_number_of_rows():
    assert len(record(torch.ones(2, 3).bool())) == 2


def test_an_episode_ends_where_it_terminates_and_where_it_is_truncated():
    taken = record(flags(1, 0, 1, 0, 1), terminated=flags(1, 0, 0, 0, 0), truncated=flags(0, 0, 1, 0, 0))

    assert_close(taken.ended, flags(1, 0, 1, 0, 0))


def test_an_episode_starts_two_columns_after_an_end():
    # s0 end, last observation, then s0' of the next episode
    taken = record(flags(1, 0, 1, 1, 0, 1), terminated=flags(1, 0, 0, 0, 0, 0), truncated=flags(0, 0, 0, 1, 0, 0))

    assert_close(taken.start, flags(0, 0, 1, 0, 0, 1))


def test_a_record_of_one_column_starts_nothing():
    assert_close(record(flags(1), terminated=flags(1)).start, flags(0))


def test_rows_of_a_batch_keep_every_field_of_theirs():
    batch = random_batch(0, Table())

    some = batch[torch.tensor([4, 1])]

    for name in (
        "obs",
        "action",
        "behavior_logprob",
        "mask",
        "reward",
        "terminated",
        "truncated",
        "value",
        "advantage",
        "target",
    ):
        assert_close(getattr(some, name), getattr(batch, name)[[4, 1]])
    assert_close(some.old_distribution.logp, batch.old_distribution.logp[[4, 1]])


def test_rows_of_a_batch_bring_their_own_recurrent_state():
    batch = random_batch(0, Table())
    batch = Batch.of(batch, state=torch.arange(6.0)[:, None])

    assert_close(batch[1:3].state, torch.tensor([[1.0], [2.0]]))


def test_the_steps_of_a_batch_are_the_chosen_ones_in_order():
    batch = random_batch(1, Table())

    steps = batch.flatten_steps()

    for name in (
        "obs",
        "action",
        "behavior_logprob",
        "reward",
        "terminated",
        "truncated",
        "value",
        "advantage",
        "target",
    ):
        assert_close(getattr(steps, name), getattr(batch, name)[batch.mask][:, None])
    assert_close(steps.old_distribution.logp, batch.old_distribution.logp[batch.mask][:, None])


def test_every_step_of_a_batch_is_a_chosen_row_of_one_column():
    batch = random_batch(1, Table())

    assert_close(batch.flatten_steps().mask, torch.ones(int(batch.mask.sum()), 1).bool())


def test_steps_apart_have_no_recurrent_state():
    batch = Batch.of(random_batch(0, Table()), state=torch.zeros(6, 1))

    assert batch.flatten_steps().state is None


def test_what_is_given_replaces_what_the_record_has():
    batch = random_batch(0, Table())

    assert_close(Batch.of(batch, value=batch.value + 1).value, batch.value + 1)


def test_what_is_not_given_stays():
    batch = random_batch(0, Table())

    assert Batch.of(batch, value=batch.value + 1).target is batch.target


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record(flags(1)).mask = flags(0)


def test_mapping_reaches_every_tensor_of_a_tree():
    tree = {"a": torch.ones(2), "b": {"c": Categorical(torch.zeros(3))}}

    mapped = map_tensors(lambda x: x + 1, tree)

    assert_close(mapped["a"], 2 * torch.ones(2))
    assert_close(mapped["b"]["c"].logp, torch.ones(3))


@pytest.mark.parametrize("leaf", [None, 3, "text", Categorical])
def test_mapping_leaves_what_is_not_a_tensor(leaf):
    assert map_tensors(lambda x: x + 1, {"leaf": leaf})["leaf"] is leaf


def test_mapping_leaves_what_all_steps_share():
    squashed = SquashedGaussian(torch.zeros(4, 2), torch.zeros(4, 2), half_width=torch.ones(2))

    mapped = map_tensors(lambda x: x[:1], squashed)

    assert mapped.mean.shape == (1, 2)
    assert mapped.half_width is squashed.half_width


def test_a_policy_without_state_is_asked_about_the_observations_alone():
    table, batch = Table(), random_batch(0, Table())

    distribution, value = policy_forward(table, batch)

    assert_close(value, table.values[batch.obs])
    assert_close(distribution.logp, table.logits[batch.obs].log_softmax(-1))


def test_a_recurrent_policy_begins_with_the_records_state_and_forgets_it_at_a_start():
    # the state before column 0 is 10; the last observation (3) is still the first episode's, the next one begins at 0
    taken = record(flags(1, 1, 0, 1), obs=row(1, 2, 3, 4), terminated=flags(0, 1, 0, 0), state=torch.tensor([[10.0]]))

    _, value = policy_forward(Adder(), taken)

    assert_close(value, row(11, 13, 16, 4))


def test_the_length_of_text_pairs_and_labelled_text_is_their_number_of_rows():
    text = TokenBatch(torch.zeros(2, 5).long(), torch.ones(2, 5).bool())

    assert len(text) == 2
    assert len(PreferencePairs(text, text, torch.zeros(2, 1))) == 2
    assert len(LabelledText(text, torch.zeros(2, 1))) == 2


def test_what_text_chooses_at_a_column_is_the_token_to_its_right():
    text = TokenBatch(torch.tensor([[7, 8, 9]]), torch.tensor([[True, True, False]]))

    assert text.action.tolist() == [[8, 9, 0]]
