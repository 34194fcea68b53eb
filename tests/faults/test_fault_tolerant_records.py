"""Step 1 with environments that fail: what stands in the record is what was answered, in every autoreset mode."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.envs import MODES, Anything, Picky, allowed_at, walker
from tests.faulty import Faulty, Often, fail
from understudy.advantage import gae
from understudy.batch import policy_forward
from understudy.control.envs.fault_tolerant import FaultTolerantVectorEnv
from understudy.control.policy import Policy
from understudy.value import estimate_values, next_value

DISABLED, SAME_STEP, NEXT_STEP = MODES
IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
PATIENCE = 60.0  # seconds; a machine may be busy


def leaves_of(record):
    obs = record.obs if isinstance(record.obs, dict) else {"obs": record.obs}
    rest = {
        name: getattr(record, name)
        for name in ("action", "behavior_logprob", "mask", "reward", "terminated", "truncated")
    }
    return obs | rest


class Tall(torch.nn.Module):
    """Chooses anything; the value of [seed, steps] is 10 * steps."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(3))

    def forward(self, obs):
        distribution, _ = Anything.forward(self, obs)  # pyright: ignore
        return distribution, 10 * obs[..., 1]


def faulty_records(*rollouts, fault=fail, mode=DISABLED):
    """Row 0: the fifth step of seed 1 has no answer, seed 2 follows. Row 1 begins with seed 11. Policy, records, walker."""
    policy = Policy(Tall(), Faulty.observation_space, Faulty.action_space)
    envs = FaultTolerantVectorEnv([partial(Faulty, fault), Faulty], step_timeout=PATIENCE, autoreset_mode=mode)
    walks = walker(envs)
    walks.seed_of = lambda row, episode: 10 * row + episode + 1
    try:
        return policy, [walks.collect(policy, rollout) for rollout in rollouts], walks
    finally:
        envs.close()


def test_the_step_before_a_fault_is_truncated_and_what_was_last_seen_stands_masked_after_it():
    policy, (record,), walks = faulty_records(6)
    # row 0: four steps of seed 1; [1, 4], whose step has no answer; a step of seed 2; what it led to
    # row 1: six steps of seed 11; what they led to
    golden = [
        [[1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [2, 0], [2, 1]],
        [[11, 0], [11, 1], [11, 2], [11, 3], [11, 4], [11, 5], [11, 6]],
    ]
    assert record.obs.tolist() == golden
    assert record.mask.int().tolist() == [[1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 0]]
    assert record.reward.tolist() == [[1, 2, 3, 4, 0, 1, 0], [1, 2, 3, 4, 5, 6, 0]]
    assert record.truncated.int().tolist() == [[0, 0, 0, 1, 0, 0, 0], [0] * 7]
    assert not record.terminated.any()
    assert walks.num_steps == 11
    assert list(walks.finished_episodes) == []  # a cut episode has no return

    # V = 10 * steps, gamma 1/2, lambda 1/2, so the trace decays by 1/4
    # delta: 1 + 5 - 0 = 6; 2 + 10 - 10 = 2; 3 + 15 - 20 = -2; 4 + V(1, 4) / 2 - 30 = 4 + 20 - 30 = -6; then a new episode: 6
    # A_3 = -6; A_2 = -2 - 6/4 = -3.5; A_1 = 2 - 3.5/4 = 1.125; A_0 = 6 + 1.125/4 = 6.28125
    _, value = estimate_values(policy, record)
    ends = record.terminated, record.truncated, record.mask
    advantage = gae(record.reward, value, next_value(value, record), *ends, gamma=0.5, lam=0.5)
    assert_close(advantage[0], torch.tensor([6.28125, 1.125, -3.5, -6, 0, 6, 0]))


def test_a_fault_at_a_records_first_call_leaves_the_record_before_as_it_is():
    _, (before, record), _ = faulty_records(4, 2)
    alone = faulty_records(4, fault=None)[1][0]

    assert all(torch.equal(a, b) for a, b in zip(leaves_of(before).values(), leaves_of(alone).values(), strict=True))
    assert before.obs[0, 4].tolist() == [1, 4] and not before.truncated.any()  # it stands there, masked
    assert record.obs[:, :2].tolist() == [[[2, 0], [2, 1]], [[11, 4], [11, 5]]]
    assert record.obs[1, 2].tolist() == [11, 6]  # row 0 has padding there
    assert record.mask.int().tolist() == [[1, 0, 0], [1, 1, 0]]
    assert not record.truncated.any()


def test_a_row_that_only_met_a_fault_has_masked_columns_alone():
    _, (_, record, after), _ = faulty_records(4, 1, 1)

    assert record.mask.int().tolist() == [[0, 0], [1, 0]]
    assert not record.ended.any() and not record.reward[0].any()
    assert after.obs.tolist() == [[[2, 0], [2, 1]], [[11, 5], [11, 6]]]
    assert after.mask.int().tolist() == [[1, 0], [1, 0]]


def test_a_fault_at_a_records_last_call_ends_it_with_what_was_last_seen():
    _, (record, after), _ = faulty_records(5, 1)

    assert record.mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert record.truncated.int().tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6]
    assert record.obs[0, 4].tolist() == [1, 4]
    assert after.obs[0].tolist() == [[2, 0], [2, 1]]


@IN_EVERY_MODE
def test_a_fault_leaves_the_same_record_in_every_mode(mode):
    _, (record,), _ = faulty_records(5, mode=mode)
    _, (disabled,), _ = faulty_records(5)

    ours, theirs = leaves_of(record), leaves_of(disabled)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - {"obs"})
    assert torch.equal(record.obs[:, :5], disabled.obs[:, :5])  # after it the next seed, which may be another


class Sum(torch.nn.Module):
    """A recurrent network whose state is the sum of 1 + steps over what it saw in this episode, and which acts by it."""

    state_size = 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, obs, state, start):
        sums = []
        for t in range(obs.shape[1]):
            state = torch.where(start[:, t, None], 0.0, state) + 1 + obs[:, t, 1:]
            sums.append(state[:, 0])
        value = torch.stack(sums, dim=1)
        logits = torch.sin(value[..., None] * torch.arange(3)) * self.weight
        return Anything.forward(_Logits(logits), obs)[0], value, state


class _Logits:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("rollout", [1, 3, 24])
@IN_EVERY_MODE
def test_among_many_faults_a_recurrent_policy_says_of_a_record_what_it_said_when_it_chose(rollout, mode):
    policy = Policy(Sum(), Often.observation_space, Often.action_space)
    envs = FaultTolerantVectorEnv([Often] * 3, step_timeout=PATIENCE, autoreset_mode=mode)
    walks = walker(envs)
    try:
        taken = [walks.collect(policy, rollout) for _ in range(24 // rollout)]
    finally:
        envs.close()

    assert len(envs.faults) > 8
    assert walks.num_steps == sum(int(record.mask.sum()) for record in taken)
    for record in taken:
        assert not (
            record.terminated & record.truncated
        ).any()  # a fault at a first step: the end before it stays its own
        distribution, value = policy_forward(policy, record)
        assert_close(distribution.log_prob(record.action)[record.mask], record.behavior_logprob[record.mask])
        steps = record.obs[..., 1][record.mask].double()
        assert_close(value[record.mask].double(), (steps + 1) * (steps + 2) / 2)  # 1 + 2 + ... + (steps + 1)
        for name in ("action", "behavior_logprob", "reward", "terminated", "truncated"):
            assert not getattr(record, name)[~record.mask].any()


@IN_EVERY_MODE
def test_whole_episodes_hold_nothing_of_one_that_met_a_fault(mode):
    policy = Policy(Tall(), Often.observation_space, Often.action_space)
    envs = FaultTolerantVectorEnv([Often] * 3, step_timeout=PATIENCE, autoreset_mode=mode)
    walks = walker(envs)
    try:
        record = walks.collect_episodes(policy, 2)
    finally:
        envs.close()

    assert envs.faults
    # seven steps are an episode, paid 1 to 7; between two stands what the first one led to
    for row in range(3):
        mask, reward = record.mask[row], record.reward[row]
        assert reward[mask].tolist() == [1, 2, 3, 4, 5, 6, 7] * 2
        assert int(record.terminated[row].sum()) == 2 and not record.truncated[row].any()
    assert walks.num_steps == int(record.mask.sum()) == 42
    assert [done.episode_return for done in walks.finished_episodes] == [28.0] * 6


def test_playing_passes_over_episodes_that_met_a_fault():
    policy = Policy(Tall(), Often.observation_space, Often.action_space)
    envs = FaultTolerantVectorEnv([Often] * 2, step_timeout=PATIENCE, autoreset_mode=DISABLED)
    try:
        played = walker(envs).play_episodes(policy, 2)
    finally:
        envs.close()

    assert envs.faults
    assert [done.episode_return for done in played] == [28.0] * len(played) and len(played) >= 4


class Mumbles(Picky):
    """Picky that cannot say a mask at the second step of every third episode; then it raises."""

    def info(self):
        if self.episode % 3 == self.now == 1:
            raise RuntimeError("mumble")
        return super().info()


@pytest.mark.parametrize("rollout", [1, 24])
def test_action_masks_are_those_of_their_observations_among_faults_too(rollout):
    policy = Policy(Anything(), Mumbles.observation_space, Mumbles.action_space)
    envs = FaultTolerantVectorEnv([Mumbles] * 3, step_timeout=PATIENCE, autoreset_mode=DISABLED)
    walks = walker(envs)
    try:
        taken = [walks.collect(policy, rollout) for _ in range(24 // rollout)]
    finally:
        envs.close()

    assert envs.faults
    for record in taken:
        for b, t in record.mask.nonzero().tolist():
            allowed = allowed_at(*record.obs["obs"][b, t].int().tolist())
            assert record.obs["action_mask"][b, t].tolist() == allowed.astype(bool).tolist()
            assert allowed[int(record.action[b, t])]
