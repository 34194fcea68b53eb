"""Step 1 in environments: every autoreset mode gives the same record, and reset rows are nowhere in it."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import nn
from torch.testing import assert_close

from tests.envs import (
    ACTIONS,
    GAMMA,
    MODES,
    Anything,
    Diary,
    Nested,
    Picky,
    Rows,
    action_at,
    allowed_at,
    diaries,
    end_of,
    length_of,
    pay,
    scripted,
    seed_of,
    value_at,
    walker,
)
from understudy.advantage import gae
from understudy.batch import policy_forward
from understudy.control.envs import make as environment
from understudy.control.envs.spaces import all_forbidden
from understudy.control.policy import Policy
from understudy.distribution import Categorical, DiagonalGaussian
from understudy.value import estimate_values, next_value

DISABLED, SAME_STEP, NEXT_STEP = MODES
IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
MAKERS = [diaries, lambda mode: Rows(4, mode)]
OF_EVERY_KIND = pytest.mark.parametrize("make", MAKERS, ids=["SyncVectorEnv", "a user's own VectorEnv"])
LONG = 24
ROLLOUTS = (1, 2, 3, 5, LONG)
WITH_EVERY_ROLLOUT = pytest.mark.parametrize("rollout", ROLLOUTS)


def records(envs, policy, rollout, calls=LONG):
    """Several consecutive records, `calls` env calls in all; the walker too."""
    walks = walker(envs)
    return [walks.collect(policy, rollout) for _ in range(-(-calls // rollout))], walks


def keys(record):
    """(b, t, (row, episode, step)) of every chosen step, in order."""
    return [(b, t, tuple(record.obs[b, t].int().tolist())) for b, t in record.mask.nonzero().tolist()]


def aligned(taken, policy, lam=0.9):
    """What is known of each chosen step, by (row, episode, step); advantages of episodes whole in one record, apart."""
    found, whole = {}, {}
    for record in taken:
        _, value = estimate_values(policy, record)
        after = next_value(value, record)
        ends = record.terminated, record.truncated, record.mask
        advantage = gae(record.reward, value, after, *ends, gamma=GAMMA, lam=lam)
        here = keys(record)
        for b, t, key in here:
            assert key not in found, f"{key} was chosen twice"
            at = [x[b, t] for x in (record.reward, value, after, *ends[:2], record.action, record.behavior_logprob)]
            found[key] = torch.stack([x.float() for x in at])
            steps = {k[2] for _, _, k in here if k[:2] == key[:2]}
            if steps == set(range(length_of(*key[:2]))):
                whole[key] = advantage[b, t]
    return found, whole


# one record, whatever the mode


@WITH_EVERY_ROLLOUT
@OF_EVERY_KIND
@pytest.mark.parametrize("wrong", [0.0, 2.0], ids=["true value", "wrong value"])
def test_chosen_steps_carry_the_same_in_every_mode(rollout, make, wrong):
    policy = scripted(wrong)
    disabled, same, following = (aligned(records(make(mode), policy, rollout)[0], policy)[0] for mode in MODES)

    assert disabled.keys() == same.keys()
    assert len(following) > LONG and following.keys() <= same.keys()  # NEXT_STEP spends calls on resets
    for key in following:
        assert_close(disabled[key], same[key])
        assert_close(following[key], same[key])


@WITH_EVERY_ROLLOUT
@OF_EVERY_KIND
def test_advantages_of_whole_episodes_are_the_same_in_every_mode(rollout, make):
    policy = scripted(wrong=2.0)
    disabled, same, following = (aligned(records(make(mode), policy, rollout)[0], policy)[1] for mode in MODES)

    shared = disabled.keys() & same.keys() & following.keys()
    assert len(shared) > 3
    for key in shared:
        assert abs(same[key]) > 0.5
        assert_close(disabled[key], same[key])
        assert_close(following[key], same[key])


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
@OF_EVERY_KIND
def test_every_chosen_step_is_what_happened(rollout, mode, make):
    found, _ = aligned(records(make(mode), scripted(), rollout)[0], scripted())

    for (row, episode, step), seen in found.items():
        over, end = step + 1 == length_of(row, episode), end_of(row, episode)
        died = over and end != "truncated"
        expected = [pay(row, episode, step), value_at(row, episode, step), value_at(row, episode, step + 1)]
        expected += [died, over and not died, action_at(row, episode, step), 0.0]
        assert_close(seen, torch.tensor(expected).float())


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_advantages_under_the_true_value_are_zero_at_every_step(rollout, mode):
    # in whole and in cut episodes, past terminations and truncations: r + gamma V(s') - V(s) = 0 by construction
    for record in records(diaries(mode), scripted(), rollout)[0]:
        _, value = estimate_values(scripted(), record)
        ends = record.terminated, record.truncated, record.mask
        advantage = gae(record.reward, value, next_value(value, record), *ends, gamma=GAMMA, lam=0.9)
        # float32 at values up to some tens
        assert_close(advantage, torch.zeros_like(advantage), atol=1e-4, rtol=0)


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_advantages_under_a_value_wrong_by_c_are_known(rollout, mode):
    # delta = gamma c - c before the end and at a truncation, -c at a termination; the trace runs to the end of the row
    c, lam = 2.0, 0.9
    for record in records(diaries(mode), scripted(c), rollout)[0]:
        _, value = estimate_values(scripted(c), record)
        ends = record.terminated, record.truncated, record.mask
        advantage = gae(record.reward, value, next_value(value, record), *ends, gamma=GAMMA, lam=lam)
        here = {key: (b, t) for b, t, key in keys(record)}
        for (row, episode, step), (b, t) in here.items():
            expected, weight = 0.0, 1.0
            for later in range(step, length_of(row, episode)):
                if (row, episode, later) not in here:
                    break
                died = later + 1 == length_of(row, episode) and end_of(row, episode) != "truncated"
                expected += weight * (-c if died else GAMMA * c - c)
                weight *= GAMMA * lam
            assert advantage[b, t].item() == pytest.approx(expected, abs=1e-4)


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_no_step_is_lost_or_seen_twice_between_records(rollout, mode):
    found, _ = aligned(records(diaries(mode), scripted(), rollout)[0], scripted())

    for row in range(4):
        mine = sorted(key[1:] for key in found if key[0] == row)
        last, _ = mine[-1]
        whole = [(episode, step) for episode in range(last) for step in range(length_of(row, episode))]
        assert mine[: len(whole)] == whole
        assert mine[len(whole) :] == [(last, step) for step in range(len(mine) - len(whole))]


@IN_EVERY_MODE
def test_ends_fall_on_the_first_and_the_last_column_of_these_records(mode):
    # so the tests above have met both
    first = last = 0
    for record in records(diaries(mode), scripted(), 3)[0]:
        first += int(record.ended[:, 0].sum())
        last += int(record.ended[:, -2].sum())  # its last observation stands in the last column
    assert first and last


def test_an_async_vector_env_walks_as_a_sync_one():
    policy = scripted()
    envs = AsyncVectorEnv([Diary] * 2, autoreset_mode=DISABLED)
    try:
        found, _ = aligned(records(envs, policy, 5, calls=10)[0], policy)
    finally:
        envs.close()
    expected, _ = aligned(records(diaries(DISABLED, rows=2), policy, 5, calls=10)[0], policy)

    assert found.keys() == expected.keys()
    for key in found:
        assert_close(found[key], expected[key])


def test_a_single_env_of_the_users_becomes_a_vector_env_of_one():
    envs = environment.as_vector_env(Diary(), lambda row, episode: 0)

    found, _ = aligned(records(envs, scripted(), 5, calls=10)[0], scripted())

    assert envs.num_envs == 1
    assert (0, 1, 0) in found


# the layout


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_the_last_observation_of_an_episode_stands_masked_after_its_last_step(rollout, mode):
    for record in records(diaries(mode), scripted(), rollout)[0]:
        for b, t in record.ended.nonzero().tolist():
            row, episode, step = record.obs[b, t].int().tolist()
            assert step + 1 == length_of(row, episode)
            assert record.obs[b, t + 1].tolist() == [row, episode, step + 1]
            assert not record.mask[b, t + 1]


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_the_observation_after_a_rows_last_step_stands_masked(rollout, mode):
    for record in records(diaries(mode), scripted(), rollout)[0]:
        for b in record.mask.any(dim=1).nonzero()[:, 0].tolist():
            t = int(record.mask[b].nonzero()[-1])
            row, episode, step = record.obs[b, t].int().tolist()
            assert record.obs[b, t + 1].tolist() == [row, episode, step + 1]
            assert not record.mask[b, t + 1 :].any()


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_columns_between_are_chosen_and_in_order(rollout, mode):
    # so nothing stands in a row but its steps, one last observation an episode, and padding on the right
    for record in records(diaries(mode), scripted(), rollout)[0]:
        for b in range(4):
            used = int(record.mask[b].sum() + record.ended[b].sum())
            last_ended = bool(record.mask[b].any()) and bool(record.ended[b, int(record.mask[b].nonzero()[-1])])
            masked = [t for t in range(used) if not record.mask[b, t]]
            assert masked == [int(t) + 1 for t in record.ended[b].nonzero()[:, 0]]
            assert record.mask.shape[1] >= used + (not last_ended)


@WITH_EVERY_ROLLOUT
def test_a_record_is_no_wider_than_its_longest_row(rollout):
    for record in records(diaries(DISABLED), scripted(), rollout)[0]:
        used = record.mask.sum(dim=1) + record.ended.sum(dim=1)
        last = record.mask.shape[1] - 1 - record.mask.flip(1).int().argmax(dim=1)
        still_open = ~record.ended.gather(1, last[:, None])[:, 0]
        assert record.mask.shape[1] == int((used + still_open).max())


@IN_EVERY_MODE
def test_masked_columns_hold_nothing_but_observations(mode):
    for record in records(diaries(mode), scripted(), 5)[0]:
        for field in (record.action, record.behavior_logprob, record.reward, record.terminated, record.truncated):
            assert not field[~record.mask].any()


@IN_EVERY_MODE
def test_every_field_is_finite_in_the_padding(mode):
    for record in records(diaries(mode), scripted(), 5)[0]:
        assert torch.isfinite(record.obs).all() and torch.isfinite(record.behavior_logprob).all()


def test_a_record_does_not_change_when_the_env_writes_over_its_arrays():
    envs = Rows(2, DISABLED)
    walks = walker(envs)
    record = walks.collect(scripted(), 5)
    before = record.obs.clone(), record.reward.clone()

    walks.collect(scripted(), 5)

    assert_close((record.obs, record.reward), before)


# what counts as a step


@IN_EVERY_MODE
def test_only_chosen_steps_are_counted(mode):
    taken, walks = records(diaries(mode), scripted(), 5)

    assert walks.num_steps == sum(int(record.mask.sum()) for record in taken)


def test_a_reset_row_of_next_step_mode_is_no_step():
    # one row, lengths 3, 1, 4, 1: eight calls are 3, reset, 1, reset, and two of the third episode
    taken, walks = records(diaries(NEXT_STEP, rows=1), scripted(), 8, calls=8)

    assert walks.num_steps == 6
    assert [key for _, _, key in keys(taken[0])] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 2, 0), (0, 2, 1)]


def test_a_row_that_only_resets_has_no_chosen_step():
    # three calls end the first episode; the fourth only resets
    taken, walks = records(diaries(NEXT_STEP, rows=1), scripted(), 1, calls=4)

    assert [int(record.mask.sum()) for record in taken] == [1, 1, 1, 0]
    assert walks.num_steps == 3


@IN_EVERY_MODE
def test_a_termination_at_the_time_limit_is_a_termination(mode):
    found, _ = aligned(records(diaries(mode), scripted(), LONG)[0], scripted())
    both = [(row, episode, length_of(row, episode) - 1) for row, episode, _ in found if end_of(row, episode) == "both"]

    met = [found[key][3:5].tolist() for key in both if key in found]
    assert met
    assert all(ends == [1.0, 0.0] for ends in met)


@IN_EVERY_MODE
def test_a_finished_episode_has_its_return_and_length(mode):
    _, walks = records(diaries(mode), scripted(), 5)

    assert len(walks.finished_episodes) > 10
    for done in walks.finished_episodes:
        assert done.length == length_of(done.row, done.number)
        assert done.episode_return == pytest.approx(sum(pay(done.row, done.number, t) for t in range(done.length)))
        assert done.truncated == (end_of(done.row, done.number) == "truncated")


@pytest.mark.parametrize("episodes", [1, 3])
@IN_EVERY_MODE
def test_whole_episodes_come_in_the_same_number_from_every_row(mode, episodes):
    walks = walker(diaries(mode))
    for _ in range(2):  # the second time fresh ones
        record = walks.collect_episodes(scripted(), episodes)

        for b in range(4):
            mine = [key for row, _, key in keys(record) if row == b]
            begun = sorted({key[1] for key in mine})
            assert len(begun) == episodes == int(record.ended[b].sum())
            assert mine == [(b, e, t) for e in begun for t in range(length_of(b, e))]


@IN_EVERY_MODE
def test_steps_after_a_rows_last_whole_episode_are_not_counted(mode):
    walks = walker(diaries(mode))
    record = walks.collect_episodes(scripted(), 1)

    assert walks.num_steps == int(record.mask.sum()) == 3 + 1 + 4 + 1
    assert sorted((done.row, done.number) for done in walks.finished_episodes) == [(0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize("episodes", [1, 2])
@IN_EVERY_MODE
def test_playing_gives_the_returns_of_whole_episodes(mode, episodes):
    played = walker(diaries(mode)).play_episodes(scripted(), episodes)

    assert sorted((done.row, done.number) for done in played) == [(row, n) for row in range(4) for n in range(episodes)]
    for done in played:
        assert done.episode_return == pytest.approx(sum(pay(done.row, done.number, t) for t in range(done.length)))


def test_rows_reset_by_us_get_the_seeds_of_their_episodes():
    # Diary refuses a reset without a seed, and its row and episode are read from it
    found, _ = aligned(records(diaries(DISABLED), scripted(), LONG)[0], scripted())

    assert {key[0] for key in found} == {0, 1, 2, 3}


class Sloppy(Rows):
    """In NEXT_STEP mode, pays and ends in rows that only reset."""

    def step(self, actions):
        reset = self.ends.any(axis=0)
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, np.where(reset, 7, reward), terminated | reset, truncated | reset, info


def test_what_an_env_says_of_a_row_that_only_resets_does_not_matter():
    policy = scripted()
    taken, walks = records(Sloppy(4, NEXT_STEP), policy, 5)
    expected, _ = aligned(records(Rows(4, NEXT_STEP), policy, 5)[0], policy)

    found, _ = aligned(taken, policy)
    assert found.keys() == expected.keys()
    assert_close(list(found.values()), list(expected.values()))
    assert all(done.episode_return == pytest.approx(paid_in(done.row, done.number)) for done in walks.finished_episodes)


def paid_in(row, episode):
    return sum(pay(row, episode, t) for t in range(length_of(row, episode)))


# memory


class Counter(nn.Module):
    """A recurrent network whose state is 1 + 2 + ... up to the steps seen in this episode, and which acts by it."""

    state_size = 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ACTIONS))

    def forward(self, obs, state, start):
        sums = []
        for t in range(obs.shape[1]):
            state = torch.where(start[:, t, None], 0.0, state) + 1 + obs[:, t, 2:]
            sums.append(state[:, 0])
        value = torch.stack(sums, dim=1)
        return Categorical.of(torch.sin(value[..., None] * torch.arange(ACTIONS)) * self.weight), value, state


def counting():
    return Policy(Counter(), Diary.observation_space, Diary.action_space)


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_a_recurrent_state_knows_the_steps_of_its_own_episode_only(rollout, mode):
    for record in records(diaries(mode), counting(), rollout)[0]:
        step = record.obs[:, 0, 2]  # 1 + 2 + ... + step, before the first chosen step; 0 before a reset
        assert_close(record.state[:, 0], torch.where(record.mask[:, 0], step * (step + 1) / 2, 0.0))


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_a_recurrent_policy_says_of_a_record_what_it_said_when_it_chose(rollout, mode):
    policy = counting()
    for record in records(diaries(mode), policy, rollout)[0]:
        with torch.no_grad():
            distribution, value = policy_forward(policy, record)
        step = record.obs[..., 2]

        assert_close(value[record.mask], ((step + 1) * (step + 2) / 2)[record.mask])
        assert_close(distribution.log_prob(record.action)[record.mask], record.behavior_logprob[record.mask])


@IN_EVERY_MODE
def test_a_recurrent_policy_sees_the_last_observation_of_an_episode(mode):
    # V of a truncated episode's last observation knows the episode: 1 + ... + (length + 1)
    policy = counting()
    for record in records(diaries(mode), policy, 5)[0]:
        _, value = estimate_values(policy, record)
        length = record.obs[..., 2] + 1
        expected = (length + 1) * (length + 2) / 2
        assert_close(next_value(value, record)[record.truncated], expected[record.truncated])


# noise


class Noisy(nn.Module):
    """A Gaussian around 0 of width 1: the action is the noise."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))

    def forward(self, obs):
        mean = self.mean.expand(*obs.shape[:2], 1)
        return DiagonalGaussian(mean, torch.zeros_like(mean)), mean[..., 0]


class Forever(gymnasium.Env):
    """Never ends, pays nothing."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), 0.0, False, False, {}


def noises(hold, *rollouts):
    walks = walker(SyncVectorEnv([Forever] * 2, autoreset_mode=DISABLED), noise_interval=hold)
    policy = Policy(Noisy(), Forever.observation_space, Forever.action_space)
    taken = [walks.collect(policy, rollout) for rollout in rollouts]
    return torch.cat([record.action[record.mask].reshape(2, -1) for record in taken], dim=1), taken


def test_noise_is_drawn_anew_at_every_call():
    noise, _ = noises(1, 6)
    assert len(set(noise.flatten().tolist())) == 12


def test_noise_is_held_for_as_many_calls_as_asked_for_over_records():
    noise, _ = noises(3, 4, 5)  # 9 calls, cut after the fourth

    assert_close(noise[:, 0:3], noise[:, :1].expand(2, 3))
    assert_close(noise[:, 3:6], noise[:, 3:4].expand(2, 3))
    assert_close(noise[:, 6:9], noise[:, 6:7].expand(2, 3))
    assert len(set(noise.flatten().tolist())) == 6


def test_log_probs_under_held_noise_are_the_distributions_own():
    _, (record,) = noises(3, 6)

    distribution, _ = policy_forward(Policy(Noisy(), Forever.observation_space, Forever.action_space), record)

    assert_close(distribution.log_prob(record.action).detach()[record.mask], record.behavior_logprob[record.mask])


def test_without_sampling_the_mode_is_chosen():
    walks = walker(SyncVectorEnv([Forever], autoreset_mode=DISABLED), sample=False)
    record = walks.collect(Policy(Noisy(), Forever.observation_space, Forever.action_space), 4)

    assert not record.action.any()


def test_no_gradient_is_left_in_a_record_or_a_value_of_a_policy_that_looks_at_nothing():
    # under no_grad, a view of a parameter still asks for a gradient
    policy = Policy(Noisy(), Forever.observation_space, Forever.action_space)
    walks = walker(SyncVectorEnv([Forever], autoreset_mode=DISABLED), sample=False)
    record = walks.collect(policy, 4)
    distribution, value = estimate_values(policy, record)

    assert not any(x.requires_grad for x in (record.action, record.behavior_logprob, value, distribution.mean))


# nested observations and action masks


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_nested_observations_keep_their_last_ones(rollout, mode):
    policy = Policy(Anything(), Nested.observation_space, Nested.action_space)
    for record in records(diaries(mode, diary=Nested), policy, rollout)[0]:
        assert set(record.obs) == {"who", "when.0", "when.1"}
        assert_close(10.0 * record.obs["when.0"], record.obs["when.1"][..., 0])
        for b, t in record.mask.nonzero().tolist():  # an episode's next or last observation is one step on
            assert record.obs["when.0"][b, t + 1] == record.obs["when.0"][b, t] + 1
            assert record.obs["who"][b, t + 1].tolist() == record.obs["who"][b, t].tolist()


def picky(mode, rollout, diary=Picky):
    policy = Policy(Anything(), diary.observation_space, diary.action_space)
    return records(diaries(mode, diary=diary), policy, rollout)[0]


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_the_action_mask_in_info_is_that_of_the_observation_it_came_with(rollout, mode):
    for record in picky(mode, rollout):
        for b, t in record.mask.nonzero().tolist():
            row, episode, step = record.obs["obs"][b, t].int().tolist()
            assert record.obs["action_mask"][b, t].tolist() == allowed_at(row, episode, step).astype(bool).tolist()


@IN_EVERY_MODE
def test_a_masked_action_is_never_chosen(mode):
    for record in picky(mode, LONG):
        taken = record.obs["action_mask"].gather(2, record.action[..., None])[..., 0]
        assert taken[record.mask].all()


@IN_EVERY_MODE
def test_anything_is_allowed_where_nothing_is_chosen(mode):
    for record in picky(mode, 5):
        after_an_end = torch.zeros_like(record.mask)
        after_an_end[:, 1:] = record.ended[:, :-1]
        assert record.obs["action_mask"][after_an_end].all()


class NothingAllowed(Picky):
    """Allows nothing at the second step of row 2's first episode."""

    def info(self):
        here = (self.row, self.episode, self.now) == (2, 0, 1)
        return {"action_mask": np.zeros(ACTIONS, dtype=np.int8)} if here else super().info()


class ForgetsItsMask(Picky):
    """Gives no mask at the second step of row 2's first episode."""

    def info(self):
        return {} if (self.row, self.episode, self.now) == (2, 0, 1) else super().info()


class MaskFromTheSecondStep(Picky):
    """Gives no mask at resets."""

    def info(self):
        return super().info() if self.now else {}


class ListMask(Picky):
    """Gives its mask as a list, which Gymnasium hands on as an object."""

    def info(self):
        return {"action_mask": super().info()["action_mask"].tolist()}


class TupleMask(Picky):
    """Gives its mask as one array a dimension, as MultiDiscrete spaces have it (here there is one)."""

    def info(self):
        return {"action_mask": (super().info()["action_mask"],)}


class NarrowMask(Picky):
    """Gives a mask of two actions, where there are three."""

    def info(self):
        return {"action_mask": np.ones(2, dtype=np.int8)}


class DeadEnd(Picky):
    """Allows nothing, and gives no mask, where an episode is over: nothing is chosen there."""

    def info(self):
        left = length_of(self.row, self.episode) - self.now
        if left == 0:
            return {} if self.row % 2 else {"action_mask": np.zeros(ACTIONS, dtype=np.int8)}
        return super().info()


@IN_EVERY_MODE
def test_a_mask_that_allows_nothing_is_refused_and_the_env_named(mode):
    with pytest.raises(ValueError, match="allows no action in env 2"):
        picky(mode, 5, NothingAllowed)


class MaskInObs(Picky):
    """Gives its mask in its observation."""

    observation_space = spaces.Dict({"obs": Diary.observation_space, "action_mask": spaces.MultiBinary(ACTIONS)})

    def obs(self):
        return {"obs": super().obs(), "action_mask": self.allowed()}

    def allowed(self):
        return allowed_at(self.row, self.episode, self.now)

    def info(self):
        return {}


class NothingAllowedInObs(MaskInObs):
    """Allows nothing at the second step of row 2's first episode."""

    def allowed(self):
        return super().allowed() * ((self.row, self.episode, self.now) != (2, 0, 1))


class DeadEndInObs(MaskInObs):
    """Allows nothing where an episode is over."""

    def allowed(self):
        return super().allowed() * (self.now < length_of(self.row, self.episode))


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_an_action_mask_in_the_observation_is_one_in_info(rollout, mode):
    for record, expected in zip(picky(mode, rollout, MaskInObs), picky(mode, rollout), strict=True):
        chosen = expected.mask
        assert_close(record.obs["action_mask"][chosen], expected.obs["action_mask"][chosen])
        assert_close(record.action, expected.action)


@IN_EVERY_MODE
def test_a_mask_in_the_observation_that_allows_nothing_is_refused(mode):
    with pytest.raises(ValueError, match="allows no action in env 2, after 1 steps of its episode 0"):
        picky(mode, 5, NothingAllowedInObs)


@IN_EVERY_MODE
def test_a_mask_in_the_observation_may_allow_nothing_where_an_episode_is_over(mode):
    for record, expected in zip(picky(mode, 5, DeadEndInObs), picky(mode, 5), strict=True):
        assert_close(record.action, expected.action)
        assert_close(record.behavior_logprob, expected.behavior_logprob)


def test_a_mask_must_allow_something_in_every_dimension():
    rows = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    assert all_forbidden(spaces.MultiDiscrete([2, 3]), rows).tolist() == [False, True, True]
    assert all_forbidden(spaces.MultiBinary(2), rows[:, :4]).tolist() == [False, True, True]
    assert all_forbidden(spaces.Discrete(5), rows & False).all()


@IN_EVERY_MODE
@pytest.mark.parametrize("diary", [ForgetsItsMask, MaskFromTheSecondStep])
def test_a_mask_missing_at_some_steps_is_refused(mode, diary):
    with pytest.raises(ValueError, match="give it at every reset and step, or never"):
        picky(mode, 5, diary)


@IN_EVERY_MODE
@pytest.mark.parametrize("diary", [ListMask, TupleMask])
def test_a_mask_may_be_a_list_or_a_tuple_of_arrays(mode, diary):
    for record, expected in zip(picky(mode, 5, diary), picky(mode, 5), strict=True):
        assert_close(record.obs["action_mask"], expected.obs["action_mask"])


def test_a_mask_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match="2 entries in env 0, must have 3"):
        picky(DISABLED, 5, NarrowMask)


@IN_EVERY_MODE
def test_a_mask_at_the_end_of_an_episode_does_not_matter(mode):
    for record, expected in zip(picky(mode, 5, DeadEnd), picky(mode, 5), strict=True):
        assert_close(record.obs["action_mask"], expected.obs["action_mask"])


# what is refused


class PaysNan(Diary):
    """Pays nan at step 1 of row 2's episode 3."""

    def step(self, action):
        at = self.row, self.episode, self.now
        obs, reward, *rest = super().step(action)
        return obs, float("nan") if at == (2, 3, 1) else reward, *rest


class SeesNan(Diary):
    """Observes nan after `steps` steps of row 2's first episode, which has four."""

    steps = 2

    def obs(self):
        obs = super().obs()
        return obs * np.nan if (self.row, self.episode, self.now) == (2, 0, self.steps) else obs


class SeesNanAtTheStart(SeesNan):
    steps = 0


class SeesNanAtTheEnd(SeesNan):
    steps = 4


@IN_EVERY_MODE
def test_a_reward_that_is_no_number_is_refused_and_its_place_named(mode):
    # row 2, lengths 4, 1, 2, 3
    with pytest.raises(FloatingPointError, match="reward is nan in env 2, after 1 steps of its episode 3"):
        records(diaries(mode, diary=PaysNan), scripted(), LONG)


@IN_EVERY_MODE
@pytest.mark.parametrize("diary", [SeesNan, SeesNanAtTheStart, SeesNanAtTheEnd])
def test_an_observation_that_is_no_number_is_refused_and_its_place_named(mode, diary):
    with pytest.raises(FloatingPointError, match=f"in env 2, after {diary.steps} steps of its episode 0"):
        records(diaries(mode, diary=diary), scripted(), LONG)


class Forgetful(Rows):
    """Says SAME_STEP, but loses the last observations."""

    def step(self, actions):
        *result, _ = super().step(actions)
        return *result, {}


def test_a_same_step_env_without_last_observations_is_refused():
    with pytest.raises(ValueError, match="final_obs"):
        records(Forgetful(4, SAME_STEP), scripted(), 5)


# Gymnasium's own native vector env


def native(rows=3, calls=120):
    walks = walker(environment.make("CartPole-v1", num_envs=rows, vectorization="native"))
    policy = Policy(Pushing(), walks.envs.single_observation_space, walks.envs.single_action_space)
    return [walks.collect(policy, 40) for _ in range(calls // 40)], walks


class Pushing(nn.Module):
    """Pushes left or right at random."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, obs):
        return Categorical.of(self.logits.expand(*obs.shape[:2], 2)), obs[..., 0]


def test_a_native_vector_env_is_in_next_step_mode():
    _, walks = native(calls=40)
    assert walks.autoreset_mode is AutoresetMode.NEXT_STEP


def test_every_step_of_a_native_vector_env_obeys_its_physics():
    env = gymnasium.make("CartPole-v1").unwrapped
    taken, walks = native()
    ended = 0
    for record in taken:
        for b, t in record.mask.nonzero().tolist():
            env.reset(seed=0)
            env.state = record.obs[b, t].double().numpy()
            obs, reward, terminated, _, _ = env.step(int(record.action[b, t]))
            # the record's state was rounded to float32 before this step
            assert_close(record.obs[b, t + 1], torch.from_numpy(obs), atol=1e-5, rtol=1e-5)
            assert record.reward[b, t] == reward
            assert record.terminated[b, t] == terminated
            ended += terminated
    assert ended == len(walks.finished_episodes) > 6


def test_episodes_of_a_native_vector_env_begin_at_its_start_states():
    taken, _ = native()
    for record in taken:
        assert (record.obs[record.start & record.mask].abs() <= 0.05).all()
        assert (record.obs[record.ended].abs() > 0.05).any(dim=1).all()


# vector envs of others


class Echo(Rows):
    """At the call that resets a row, it says again that the episode before is over, and pays for that."""

    def step(self, actions):
        said = self.ends.copy()
        obs, paid, terminated, truncated, info = super().step(actions)
        return obs, np.where(said.any(axis=0), 50.0, paid), terminated | said[0], truncated | said[1], info


def test_what_the_call_that_resets_a_row_says_of_it_is_not_heard():
    found, walks = records(Echo(4, NEXT_STEP), scripted(), 5)
    expected, plain = records(Rows(4, NEXT_STEP), scripted(), 5)

    assert_close([vars(record) for record in found], [vars(record) for record in expected])
    assert walks.finished_episodes == plain.finished_episodes


class Asked(Rows):
    """Writes down the seeds that it is asked to begin with."""

    def __init__(self, mode):
        super().__init__(2, mode)
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP], ids=lambda mode: mode.name)
def test_a_vector_env_that_resets_its_rows_itself_is_seeded_once(mode):
    envs = Asked(mode)
    walks = walker(envs)

    walks.reset()
    walks.reset()

    assert envs.seeds == [seed_of(0, 0), None]


def test_a_vector_env_whose_rows_we_reset_is_seeded_row_by_row():
    envs = Asked(DISABLED)
    walker(envs).reset()

    assert envs.seeds == [[seed_of(0, 0), seed_of(1, 0)]]


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_the_rows_of_gymnasiums_vector_envs_are_seeded_one_by_one(kind):
    envs = kind([Diary] * 2, autoreset_mode=SAME_STEP)
    try:
        walks = walker(envs)
        walks.reset()
    finally:
        envs.close()

    assert walks.current_obs.tolist() == [[0, 0, 0], [1, 0, 0]]


class MasksAtOnce(Rows):
    """Gives the masks of all rows without saying of which; a reset's say nothing true of rows that it did not reset."""

    def masks(self):
        return np.stack([allowed_at(env.row, env.episode, env.now) for env in self.envs])

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        begun = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        return obs, {"action_mask": np.where(begun[:, None], self.masks(), 1 - self.masks())}

    def step(self, actions):
        *result, info = super().step(actions)
        return *result, info | {"action_mask": self.masks()}


@IN_EVERY_MODE
def test_masks_may_come_for_all_rows_at_once(mode):
    policy = Policy(Anything(), Diary.observation_space, Diary.action_space)
    for record in records(MasksAtOnce(4, mode), policy, 5)[0]:
        for b, t in record.mask.nonzero().tolist():
            expected = allowed_at(*record.obs["obs"][b, t].int().tolist())
            assert record.obs["action_mask"][b, t].tolist() == expected.astype(bool).tolist()


# groups


@IN_EVERY_MODE
def test_fresh_episodes_have_the_same_number_in_every_row_however_many_a_fast_row_plays(mode):
    # so rows that share their seeds, a group, begin from one state again: rows 1 and 3 have played on after one step
    walks = walker(diaries(mode))
    for _ in range(3):
        record = walks.collect_episodes(scripted(), 1)
        assert len({episode for _, _, (_, episode, _) in keys(record)}) == 1


@IN_EVERY_MODE
def test_an_env_adopted_twice_gets_the_seeds_of_its_second_run(mode):
    envs = environment.as_vector_env(diaries(mode), lambda row, episode: 500 + 1000 * row + episode)
    walks = walker(envs)
    walks.seed_of = lambda row, episode: 500 + 1000 * row + episode

    episodes = {key[1] for part in [walks.collect(scripted(), LONG)] for _, _, key in keys(part)}
    assert min(episodes) == 500
