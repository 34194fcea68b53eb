"""Probe environments: a critic finds a value that is known, a policy the best action; each with a negative control."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from tests.probes import Chain, Task, Tempting, vector
from understudy.control import actor_critic, ppo, reinforce
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.run.seeds import derive_seed

pytestmark = pytest.mark.learning
FOREVER = 10**6  # log_every: one line at the end, and no picture


def learn(path, make, recipe=ppo, *, rows=8, **fields) -> Policy:
    """The policy that a recipe learns in `rows` copies of an environment."""
    envs = vector([make] * rows)
    common = {
        "env": "Probe",
        "output_dir": str(path),
        "quiet": True,
        "log_every": FOREVER,
        "num_envs": rows,
        "hidden": (16,),
    }
    sizes = {"learning_rate": 0.01, "steps": 1500} | (
        {"rnn_hidden_size": 8} if fields.get("memory", "none") != "none" else {}
    )
    if recipe is ppo:
        sizes |= {"num_steps_per_env": 16, "num_epochs": 4, "num_minibatches": 2, "lam": 0.9}
    cfg = recipe.Config(**(common | sizes | fields))
    policy = Policy.build(envs.single_observation_space, envs.single_action_space, cfg, seed=derive_seed(1, "weights"))
    torch.nn.init.zeros_(policy.network.value.weight)  # a critic that expects nothing, so that all it says was learnt
    recipe.train(cfg, env=envs, policy=policy)
    return policy


def mean_return(policy: Policy, make, *, sample: bool = False, episodes: int = 400) -> float:
    """What its most likely actions are paid on average."""
    rows = 20
    generator = torch.Generator().manual_seed(0)
    walker = RolloutCollector(
        vector([make] * rows), seed_of=lambda row, n: derive_seed(99, row, n), generator=generator, sample=sample
    )
    return float(np.mean([episode.episode_return for episode in walker.play_episodes(policy, episodes // rows)]))


def value(policy: Policy, *obs: float) -> float:
    _, found = policy(torch.tensor([[obs]], dtype=torch.float32))
    return found.item()


def at(place: int, length: int) -> list[float]:
    """What a `Chain` says there."""
    return [float(i == place) for i in range(length + 2)]


# the critic


def test_the_value_of_a_constant_reward_is_found(tmp_path):
    policy = learn(tmp_path, lambda: Chain(lambda *_: 1, length=1))

    assert value(policy, *at(0, 1)) == pytest.approx(1, abs=0.05)


def test_control_a_critic_that_does_not_learn_does_not_find_it(tmp_path):
    policy = learn(tmp_path, lambda: Chain(lambda *_: 1, length=1), value_coef=0.0)

    assert abs(value(policy, *at(0, 1)) - 1) > 0.2


class Announced(Task):
    """Pays 1 or -1, as the observation said, whatever one does."""

    def step(self, action):
        return self._obs(), 2.0 * self.target[0] - 1, True, False, {}


def test_a_value_that_stands_in_the_observation_is_found(tmp_path):
    policy = learn(tmp_path, Announced)

    assert value(policy, 1, 1) == pytest.approx(1, abs=0.1)
    assert value(policy, -1, 1) == pytest.approx(-1, abs=0.1)


def test_control_without_that_observation_the_value_is_the_mean(tmp_path):
    policy = learn(tmp_path, lambda: Announced(show="nothing"))

    assert value(policy, 0, 1) == pytest.approx(0, abs=0.4)


@pytest.mark.parametrize("gamma", [0.5, 1.0])  # each the other's control
def test_a_later_reward_is_discounted(tmp_path, gamma):
    policy = learn(tmp_path, lambda: Chain(lambda step, *_: step == 1, length=2), gamma=gamma)

    assert value(policy, *at(0, 2)) == pytest.approx(gamma, abs=0.1)
    assert value(policy, *at(1, 2)) == pytest.approx(1, abs=0.1)
    assert value(policy, *at(2, 2)) == pytest.approx(1, abs=0.1)


def test_a_truncated_episode_is_worth_what_an_endless_one_is(tmp_path):
    # the steps look the same: 1 + 0.5 + 0.25 + ... = 2
    policy = learn(tmp_path, lambda: Chain(lambda *_: 1, length=3, truncate=True, blind=True), gamma=0.5)

    assert value(policy, *at(0, 3)) == pytest.approx(2, abs=0.1)


def test_control_a_terminated_episode_is_worth_less(tmp_path):
    # 1.75, 1.5 and 1 that look the same, and are bootstrapped from one another: V = 1 + 0.5 V 2/3, so 1.5
    policy = learn(tmp_path, lambda: Chain(lambda *_: 1, length=3, blind=True), gamma=0.5, lam=0.0)

    assert value(policy, *at(0, 3)) == pytest.approx(1.5, abs=0.1)


# the policy


@pytest.mark.parametrize("action", ["Discrete", "MultiDiscrete", "MultiBinary"])
def test_the_right_action_is_learnt(tmp_path, action):
    policy = learn(tmp_path, lambda: Task(action))

    assert mean_return(policy, lambda: Task(action), sample=True) > 0.9


@pytest.mark.parametrize("action", ["Discrete", "MultiDiscrete", "MultiBinary"])
def test_control_what_is_not_seen_is_not_learnt(tmp_path, action):
    policy = learn(tmp_path, lambda: Task(action, show="nothing"))

    assert abs(mean_return(policy, lambda: Task(action, show="nothing"))) < 0.2


def test_control_without_an_advantage_nothing_is_learnt(tmp_path):
    # every action pays the same; standardised, the smallest advantage would be as large as any
    policy = learn(tmp_path, Announced, normalize_advantage="none")

    assert abs(mean_return(policy, Task, sample=True)) < 0.5


@pytest.mark.parametrize("squash", ["clip", "tanh"])
def test_a_continuous_target_is_hit(tmp_path, squash):
    policy = learn(tmp_path, lambda: Task("Box"), squash=squash, log_std=-0.5, steps=3000)

    assert mean_return(policy, lambda: Task("Box")) > 0.9


@pytest.mark.parametrize("exploration", ["held", "gsde"])
def test_a_continuous_target_is_hit_with_held_noise(tmp_path, exploration):
    fields = {"exploration": exploration, "noise_hold": 3, "log_std": -1.0}
    policy = learn(tmp_path, lambda: Task("Box"), steps=3000, **fields)

    assert mean_return(policy, lambda: Task("Box")) > 0.9


def test_control_a_continuous_target_that_is_not_seen_is_not_hit(tmp_path):
    # the best that can be done blindly is 0: half way between two targets that are 1 apart, 1 - 4 * 0.5^2 = 0
    policy = learn(tmp_path, lambda: Task("Box", show="nothing"), log_std=-0.5)

    assert mean_return(policy, lambda: Task("Box", show="nothing")) < 0.1


def choice(policy: Policy, length: int) -> float:
    """The probability of action 1 at the first step."""
    distribution, _ = policy(torch.tensor([[at(0, length)]]))
    return distribution.logp[0, 0, 1].exp().item()


def test_credit_goes_to_an_earlier_choice(tmp_path):
    # the first action pays at the second step, whatever is done there
    policy = learn(tmp_path, lambda: Chain(lambda step, first, _: step == 1 and first == 1, length=2))

    assert choice(policy, 2) > 0.9


def test_control_no_credit_goes_back_without_a_future(tmp_path):
    fields = {"gamma": 0.0, "normalize_advantage": "none"}
    policy = learn(tmp_path, lambda: Chain(lambda step, first, _: step == 1 and first == 1, length=2), **fields)

    assert choice(policy, 2) < 0.75  # a drift without a direction


# memory, images, masks


RECALL = {"rows": 16, "num_steps_per_env": 16, "steps": 8000, "learning_rate": 0.01, "entropy_coef": 0.02}


@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_what_was_said_is_recalled_with_memory(tmp_path, memory):
    policy = learn(tmp_path, lambda: Task(delay=1), rnn_type=memory, **RECALL)

    assert mean_return(policy, lambda: Task(delay=1)) > 0.9


def test_control_what_was_said_is_not_recalled_without_memory(tmp_path):
    policy = learn(tmp_path, lambda: Task(delay=1), **RECALL)

    assert abs(mean_return(policy, lambda: Task(delay=1))) < 0.2


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_what_is_in_a_picture_is_seen(tmp_path, memory):
    policy = learn(tmp_path, lambda: Task(show="image"), learning_rate=0.003, steps=2000, rnn_type=memory)

    assert mean_return(policy, lambda: Task(show="image")) > 0.9


class Dark(Task):
    """The picture is black."""

    def _obs(self):
        return 0 * super()._obs()


def test_control_nothing_is_seen_in_the_dark(tmp_path):
    policy = learn(tmp_path, lambda: Dark(show="image"), learning_rate=0.003, steps=2000)

    assert abs(mean_return(policy, lambda: Dark(show="image"))) < 0.2


@pytest.mark.parametrize("memory", ["none", "gru", "lstm"])
def test_a_masked_action_is_never_taken_however_well_it_pays(tmp_path, memory):
    envs = [Tempting(masked=True) for _ in range(4)]
    makers = iter(envs)
    policy = learn(tmp_path, lambda: next(makers), rows=4, steps=800, rnn_type=memory)
    taken = [action for env in envs for action in env.taken]

    assert len(taken) >= 800 and set(taken) == {0, 1}
    assert policy.act(np.zeros(1), action_mask=[1, 1, 0]) == 1 if memory == "none" else taken[-1] in (0, 1)


def test_control_without_the_mask_it_is_the_one_that_is_learnt(tmp_path):
    policy = learn(tmp_path, lambda: Tempting(masked=False), rows=4, steps=800)

    assert policy.act(np.zeros(1)) == 2


# the other recipes

REINFORCED = {"steps": 2000, "learning_rate": 0.03, "rows": 16}


@pytest.mark.parametrize("baseline", ["none", "standardize", "value"])
def test_reinforce_learns_the_right_action(tmp_path, baseline):
    policy = learn(tmp_path, Task, reinforce, baseline=baseline, episodes=4, **REINFORCED)

    assert mean_return(policy, Task, sample=True) > 0.9


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_groups_learn_though_some_start_states_pay_more(tmp_path, baseline):
    # what a start state pays by itself is a thousand times what there is to learn; a group has it in common
    policy = learn(tmp_path, lambda: Task(bonus=1000.0), reinforce, baseline=baseline, **REINFORCED)

    assert mean_return(policy, Task, sample=True) > 0.9


def test_control_without_groups_the_start_states_drown_it(tmp_path):
    returns = []
    for seed in range(4):  # what drowns is learned by chance now and then
        policy = learn(
            tmp_path / str(seed), lambda: Task(bonus=1000.0), reinforce, baseline="none", seed=seed, **REINFORCED
        )
        returns.append(mean_return(policy, Task, sample=True))

    assert sum(found > 0.9 for found in returns) <= 2


def first_observations(tmp_path, **fields) -> list[list[tuple]]:
    """Of every row, the first observations of its episodes."""

    class Remembering(Task):
        def __init__(self):
            super().__init__("MultiBinary")
            self.firsts = []

        def reset(self, **options):
            obs, info = super().reset(**options)
            self.firsts.append((*obs, self.np_random.random()))
            return obs, info

    envs = [Remembering() for _ in range(8)]
    makers = iter(envs)
    learn(tmp_path, lambda: next(makers), reinforce, steps=24, **fields)
    return [env.firsts for env in envs]


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_the_members_of_a_group_start_from_one_state(tmp_path, baseline):
    firsts = first_observations(tmp_path, baseline=baseline, group_size=4)
    firsts[0] = firsts[0][-len(firsts[1]) :]  # the checks before the first step reset the first one besides

    assert all(rows == firsts[0] for rows in firsts[:4]) and all(rows == firsts[4] for rows in firsts[4:])
    assert firsts[0] != firsts[4]
    assert len(set(firsts[0])) == len(firsts[0]) >= 3  # another state every time


def test_control_without_groups_every_row_starts_from_its_own(tmp_path):
    firsts = first_observations(tmp_path, baseline="standardize")

    assert len({rows[0] for rows in firsts}) == 8


@pytest.mark.parametrize("rollout", [1, 5])
def test_actor_critic_learns_the_right_action(tmp_path, rollout):
    fields = {"num_steps_per_env": rollout, "rows": 1 if rollout == 1 else 8, "lam": 0.0 if rollout == 1 else 1.0}
    policy = learn(tmp_path, Task, actor_critic, steps=800 if rollout == 1 else 3000, **fields)

    assert mean_return(policy, Task, sample=True) > 0.9


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_one_step_actor_critic_makes_one_optimizer_step_a_chosen_step(tmp_path, mode):
    cfg = actor_critic.Config(
        env="Probe", output_dir=str(tmp_path), quiet=True, steps=50, num_steps_per_env=1, num_envs=1, lam=0.0
    )
    run = actor_critic.train(cfg, env=vector([lambda: Chain(lambda *_: 1, length=3)], mode))

    assert sum(line["optimizer_steps"] for line in run.metrics) == run.metrics[-1]["steps"] == 50
    assert max(line["optimizer_steps"] for line in run.metrics) == 1
