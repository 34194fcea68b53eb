"""Every action space with every kind of observation, memory, mask and autoreset mode: two iterations, saved and loaded."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium.vector.utils import concatenate, create_empty_array

from tests.probes import ACTIONS, MODES, OBSERVATIONS, Anything, anything, is_allowed
from tests.records import seeded
from understudy import load
from understudy.control import ppo
from understudy.control.config import NetworkConfig
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.value import estimate_values

MASKS = [(action, masked) for action in ACTIONS for masked in ((False,) if action == "Box" else (False, True))]


def acts(policy: Policy, seen: list) -> list:
    """Its actions and states for some observations and masks: one by one, each after the one before, then in one batch."""
    results, state = [], None
    for number, (obs, allowed) in enumerate(seen):
        result = policy.act(obs, state=state, start=number == 1, action_mask=allowed)
        results.append(result)
        state = result[1] if policy.needs_whole_rows else None
    space = policy.observation_space
    together = concatenate(space, [obs for obs, _ in seen], create_empty_array(space, n=len(seen)))
    masks = None if seen[0][1] is None else np.stack([allowed for _, allowed in seen])
    batch = policy.act(together, action_mask=masks)
    return [*results, batch] if policy.needs_whole_rows else [(action, torch.zeros(0)) for action in [*results, batch]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", ["none", "gru", "lstm"])
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize(("action", "masked"), MASKS)
def test_spaces_memory_masks_and_modes_compose(tmp_path, action, masked, observation, memory, mode):
    # one minibatch an epoch: clip_fraction is then the share of steps whose first ratio is further than 1e-5 from 1;
    # the rows' environments themselves refuse an action that is masked or outside the space
    small = {"hidden": (8,), "rnn_type": memory, "num_steps_per_env": 6, "num_epochs": 1, "num_minibatches": 1}
    small |= {} if memory == "none" else {"rnn_hidden_size": 4}
    cfg = ppo.Config(env="Anything", steps=16, clip=1e-5, output_dir=str(tmp_path), quiet=True, log_every=2, **small)
    envs = anything(observation, action, masked=masked, mode=mode)
    policy = Policy.build(envs.single_observation_space, envs.single_action_space, cfg, seed=1)

    (line,) = ppo.iterate(cfg, env=envs, policy=policy)

    assert line["iteration"] == 2
    assert line["clip_fraction"] == 0
    assert all(math.isfinite(x) for x in line.values() if x is not None)

    env = Anything(observation, action, length=3, masked=masked)
    seen = [(env.reset(seed=seed)[0], env.allowed) for seed in range(3)]
    before, after = acts(policy, seen), acts(load(tmp_path), seen)
    for (action_before, state_before), (action_after, state_after) in zip(before, after, strict=True):
        np.testing.assert_array_equal(action_before, action_after)
        assert torch.equal(state_before, state_after)
    *single, batch = [chosen for chosen, _ in after]
    for each, row, (_, allowed) in zip(single, batch, seen, strict=True):
        for choice in (each, row):
            assert env.action_space.contains(choice)
            assert allowed is None or is_allowed(env.action_space, choice, allowed)
        if memory == "none":  # with memory the batch begins three episodes, one by one it is two
            np.testing.assert_allclose(each, row, rtol=1e-6, atol=1e-6)


def second_record(memory: str, mode: str):
    """A policy with memory and its second record, before which one row is in the middle of an episode."""
    shape = NetworkConfig(hidden=(8,), rnn_type=memory, rnn_hidden_size=4, orthogonal=False)
    policy = Policy.build(OBSERVATIONS["vector"], ACTIONS["Box"], shape, seed=1)
    walker = RolloutCollector(
        anything("vector", "Box", mode=mode), seed_of=lambda row, n: 9 * row + n, generator=seeded()
    )
    walker.collect(policy, 5 if mode == "NEXT_STEP" else 6)  # row 0 ends at calls 3, 6, 9, 12, or with resets 3, 7, 11
    return policy, walker.collect(policy, 6)


def furthest_ratio(policy, record) -> float:
    """How far the first ratio is from 1 where it is furthest."""
    distribution, _ = estimate_values(policy, record)
    ratio = (distribution.log_prob(record.action) - record.behavior_logprob).exp()
    return (ratio - 1)[record.mask].abs().max().item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_the_first_ratio_is_1_with_an_end_inside_a_row_and_at_its_last_column(memory, mode):
    policy, record = second_record(memory, mode)
    inside, last = record.ended[:, :-2].any(dim=1), record.ended[:, -2]  # the last column holds a last observation

    assert (inside & last).any() and record.state is not None and record.state.abs().max() > 0
    assert furthest_ratio(policy, record) < 1e-5


@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_control_a_state_that_is_not_zeroed_or_not_kept_moves_the_first_ratio(memory):
    policy, record = second_record(memory, "DISABLED")

    class Forgetless(type(record)):
        start = property(lambda self: torch.zeros_like(self.mask))  # pyright: ignore

    own = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    assert furthest_ratio(policy, Forgetless(**own)) > 1e-3
    assert furthest_ratio(policy, dataclasses.replace(record, state=torch.zeros_like(record.state))) > 1e-3
