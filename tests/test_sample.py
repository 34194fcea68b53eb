"""Step 1: one choice of a policy, and the samplers against their own probabilities."""

import pytest
import torch
from torch.testing import assert_close

from tests.records import ACTIONS, Adder, Blind, Table, seeded
from understudy.sample import sample_action

OBS = torch.tensor([[0], [3], [4]])


def test_a_choice_is_one_action_and_one_logprob_a_row():
    choice = sample_action(Table(), OBS, generator=seeded())

    assert choice.action.shape == choice.logprob.shape == (3,)
    assert choice.state is None


def test_the_logprob_of_a_choice_is_what_the_policy_gives_it():
    table = Table()

    choice = sample_action(table, OBS, generator=seeded())

    expected = table.logits.log_softmax(-1)[OBS[:, 0]].gather(1, choice.action[:, None])[:, 0]
    assert_close(choice.logprob, expected.detach())


def test_without_sampling_the_choice_is_the_most_likely_action():
    table = Table()

    choice = sample_action(table, OBS, generator=seeded(), sample=False)

    assert_close(choice.action, table.logits[OBS[:, 0]].argmax(-1))


def test_equal_seeds_make_equal_choices():
    obs = torch.zeros(200, 1, dtype=torch.long)

    assert_close(
        sample_action(Table(), obs, generator=seeded(7)).action, sample_action(Table(), obs, generator=seeded(7)).action
    )


def test_other_seeds_make_other_choices():
    obs = torch.zeros(200, 1, dtype=torch.long)

    assert not sample_action(Table(), obs, generator=seeded(7)).action.equal(
        sample_action(Table(), obs, generator=seeded(8)).action
    )


def test_held_noise_makes_the_same_choice_again():
    table = Table()
    noise = table(OBS)[0].noise(seeded())

    assert_close(sample_action(table, OBS, noise=noise).action, table(OBS)[0].action_from_noise(noise)[:, 0])


def test_held_noise_is_not_drawn_again():
    generator = seeded()
    before = generator.get_state()

    sample_action(Table(), OBS, generator=generator, noise=torch.zeros(3, 1, ACTIONS))

    assert generator.get_state().equal(before)


def test_a_choice_asks_for_no_gradient():
    assert not sample_action(Table(), OBS, generator=seeded()).logprob.requires_grad


def test_a_choice_that_is_a_parameter_may_be_changed_in_place():
    choice = sample_action(Blind(1, 1), torch.zeros(1, 1), sample=False)

    choice.action.add_(1)

    assert_close(choice.action, torch.ones(1, 1))


@pytest.mark.parametrize(("start", "state"), [(False, [[12.0]]), (True, [[2.0]])])
def test_a_recurrent_policy_hands_on_its_state_and_forgets_it_at_a_start(start, state):
    choice = sample_action(
        Adder(), torch.tensor([[2.0]]), torch.tensor([[10.0]]), torch.tensor([[start]]), generator=seeded()
    )

    assert_close(choice.state, torch.tensor(state))
