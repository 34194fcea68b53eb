"""Both worlds call the same function objects: what trains CartPole trains a language model."""

import pytest

from understudy import advantage, constraints, objective, reduce, update, value
from understudy.control import ppo as control
from understudy.control import training as control_stage
from understudy.language import ppo as language
from understudy.language import rlhf as language_cast

SHARED = {
    "gae": advantage.gae,
    "next_value": value.next_value,
    "ppo": objective.ppo,
    "ppo_penalty": objective.ppo_penalty,
    "adapt_kl_old_coef": objective.adapt_kl_old_coef,
    "update": update.update,
    "standardize": reduce.standardize,
    "masked_mean": reduce.masked_mean,
}


@pytest.mark.parametrize("name", ["LagrangianConstraints", "Constraint"])
def test_both_worlds_hold_to_the_same_bounds(name):
    assert getattr(control_stage, name) is getattr(language_cast, name) is getattr(constraints, name)


@pytest.mark.parametrize("name", SHARED)
def test_both_recipes_of_ppo_call_the_same(name):
    assert getattr(control, name) is getattr(language, name) is SHARED[name]
