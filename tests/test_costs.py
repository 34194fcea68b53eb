"""What `info` says a step costs stands beside its step, whatever the autoreset mode; and an episode's sum is whole."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from tests.envs import MODES, Diary, Rows, diaries, length_of, scripted, seed_of, walker
from understudy import load, resume
from understudy.control import actor_critic, ppo, reinforce
from understudy.control.envs.costs import CostRecorder
from understudy.run.config import RequestError

DISABLED, SAME_STEP, NEXT_STEP = MODES
IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
WITH_EVERY_ROLLOUT = pytest.mark.parametrize("rollout", [1, 2, 3, 5, 24])
NAMES = ["cost", "fuel"]


def cost_at(row: int, episode: int, step: int) -> float:
    """Of the step taken there."""
    return 100 * row + 10 * episode + step + 1


class Priced(Diary):
    """Diary whose `info` says what the step cost; at a reset it says what no step costs."""

    def step(self, action):
        found = super().step(action)
        cost = cost_at(self.row, self.episode, self.now - 1)
        return *found[:4], {"cost": cost, "fuel": np.float32(-cost), "note": "x"}

    def info(self):
        return {"cost": 1e6, "fuel": 1e6}


def records(walks, costs, rollout, calls=24):
    """(record, costs by step, sums of episodes) of consecutive records."""
    for _ in range(-(-calls // rollout)):
        record = walks.collect(scripted(), rollout)
        yield record, *costs.collect_costs(record, walks.masks)


def priced(mode, rows=4):
    costs = CostRecorder(diaries(mode, rows, Priced), NAMES)
    return walker(costs), costs


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_every_step_has_its_own_cost_and_no_other_column_any(mode, rollout):
    seen = 0
    for record, cost, _ in records(*priced(mode), rollout):
        for b, t in np.ndindex(*record.mask.shape):
            key = record.obs[b, t].int().tolist()
            expected = cost_at(*key) if record.mask[b, t] else 0.0
            assert (cost["cost"][b, t], cost["fuel"][b, t]) == (expected, -expected)
            seen += int(record.mask[b, t])
    assert seen >= 4 * 24 * 2 / 3  # NEXT_STEP spends calls on resets


@WITH_EVERY_ROLLOUT
@IN_EVERY_MODE
def test_an_episodes_sum_is_that_of_all_its_steps_also_across_records(mode, rollout):
    walks, costs = priced(mode)
    whole = []
    for _, _, sums in records(walks, costs, rollout):
        assert sums["fuel"] == [-x for x in sums["cost"]]
        whole += sums["cost"]

    expected = [
        sum(cost_at(e.row, e.number, step) for step in range(length_of(e.row, e.number)))
        for e in walks.finished_episodes
    ]
    assert sorted(whole) == sorted(expected) and len(whole) > 10


@IN_EVERY_MODE
def test_of_whole_episodes_the_chosen_ones_count_and_no_others(mode):
    # rows that are done go on while slow ones finish: that is in no record, and in no sum
    walks, costs = priced(mode)
    for _ in range(2):
        record = walks.collect_episodes(scripted(), 2)
        cost, sums = costs.collect_costs(record, walks.masks)
        keys = [(b, t, record.obs[b, t].int().tolist()) for b, t in record.mask.nonzero().tolist()]
        assert all(cost["cost"][b, t] == cost_at(*key) for b, t, key in keys)
        by_episode: dict = {}
        for b, t, (row, episode, _) in keys:
            by_episode[row, episode] = by_episode.get((row, episode), 0.0) + cost["cost"][b, t].item()
        assert len(by_episode) == 8
        assert sorted(sums["cost"]) == sorted(by_episode.values())


def test_a_reset_of_all_forgets_the_open_episodes():
    walks, costs = priced(DISABLED)
    costs.collect_costs(walks.collect(scripted(), 1), walks.masks)
    assert costs.episode_costs.any()

    walks.reset()
    assert not costs.episode_costs.any()


def test_an_async_vector_env_says_the_same():
    envs = AsyncVectorEnv([Priced] * 2, autoreset_mode=DISABLED)
    try:
        costs = CostRecorder(envs, ["cost"])
        found = [sums["cost"] for *_, sums in records(walker(costs), costs, 5, calls=10)]
    finally:
        envs.close()
    walks, costs = priced(DISABLED, rows=2)
    assert found == [sums["cost"] for *_, sums in records(walks, costs, 5, calls=10)] != [[], []]


def test_calls_before_the_record_are_none_of_its_own():
    # a run that goes on first repeats its open episodes' actions, through the same environments
    walks, costs = priced(DISABLED)
    costs.reset(seed=[seed_of(row, 7) for row in range(4)])
    costs.step(np.zeros(4, dtype=np.int64))

    found = [sums["cost"] for *_, sums in records(walks, costs, 5)]
    assert found == [sums["cost"] for *_, sums in records(*priced(DISABLED), 5)]


class Array(Rows):
    """Gives its costs as a plain array, as native vector envs do."""

    def step(self, actions):
        *found, _ = super().step(actions)
        return *found, {"cost": np.arange(self.num_envs)}


def test_a_plain_array_in_info_is_a_cost_of_every_row():
    costs = CostRecorder(Array(3, DISABLED), ["cost"])
    walks = walker(costs)
    record = walks.collect(scripted(), 4)
    cost, _ = costs.collect_costs(record, walks.masks)

    assert cost["cost"][record.mask].tolist() == [float(b) for b, _ in record.mask.nonzero().tolist()]


# refusals


class Sparse(Diary):
    """Says what a step cost only now and then."""

    def step(self, action):
        found = super().step(action)
        return *found[:4], {"cost": 1.0} if self.now < 2 else {"other": 1.0}


class Worded(Diary):
    def step(self, action):
        return *super().step(action)[:4], {"cost": "much"}


class Endless(Diary):
    def step(self, action):
        return *super().step(action)[:4], {"cost": float("nan")}


@IN_EVERY_MODE
@pytest.mark.parametrize(
    ("diary", "error", "words"),
    [
        (Diary, RequestError, "info lacks after a step of env 0; it has nothing"),
        (Sparse, RequestError, "it has cost"),
        (Worded, RequestError, "'much' there in env 0: it must be a number"),
        (Endless, FloatingPointError, "is nan in env 0"),
    ],
)
def test_what_is_no_number_at_every_step_is_refused(mode, diary, error, words):
    costs = CostRecorder(diaries(mode, 2, diary), ["cost"])

    walks = walker(costs)

    with pytest.raises(error) as refused:
        costs.collect_costs(walks.collect(scripted(), 12), walks.masks)
    assert words in str(refused.value)


# a run


class Fixed(gymnasium.Env):
    """Three steps an episode; whatever one does, a step costs what it is told to, and pays 1."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    price: float = 2.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.now += 1
        return np.zeros(1, np.float32), 1.0, self.now == 3, False, {"cost": self.price}


RECIPES = {"ppo": ppo, "actor-critic": actor_critic, "reinforce": reinforce}


def train(path, *constraint, recipe=ppo, env=Fixed, steps=96, mode=DISABLED, **fields):
    common = {"env": "Fixed", "output_dir": str(path), "quiet": True, "num_envs": 4, "hidden": (4,), "steps": steps}
    sizes = {} if recipe is reinforce else {"num_steps_per_env": 6}
    sizes |= {"compile": "off"} if recipe is ppo else {}  # a long run would be, and a short one it is held against not
    cfg = recipe.Config(**{**common, **sizes, **fields, "constraint": constraint})
    return recipe.train(cfg, env=SyncVectorEnv([env] * 4, autoreset_mode=mode))


@pytest.mark.parametrize("name", RECIPES)
@IN_EVERY_MODE
def test_every_recipe_measures_an_episodes_cost_and_holds_it(tmp_path, name, mode):
    recipe = RECIPES[name]
    run = train(tmp_path, "cost<=5", recipe=recipe, mode=mode)

    # 2 a step, 3 steps: 6, which is 1 outside; so the multiplier rises by 0.1 an iteration
    assert {line["constraint_cost"] for line in run.metrics} == {6.0}
    multipliers = [line["constraint_cost_at_most_multiplier"] for line in run.metrics]
    assert multipliers == pytest.approx([0.1 * (i + 1) for i in range(len(multipliers))])
    assert len(multipliers) >= 3


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_held_is_charged_and_the_return_is_not(tmp_path, name):
    # a step pays 1, or under the bound 1 - multiplier * 2, soon less than nothing: what the critic comes to expect
    recipe, value = RECIPES[name], {}
    fields = {"steps": 1200, "learning_rate": 0.02} | ({"baseline": "value"} if recipe is reinforce else {})
    for limit in (5, 6):
        run = train(tmp_path / str(limit), f"cost<={limit}", recipe=recipe, constraint_rate=0.5, **fields)
        value[limit] = load(run.path)(torch.zeros(1, 1, 1))[1].item()
        assert run.metrics[-1]["episode_return_mean"] == 3.0
    assert value[5] < 0 < value[6]


def test_a_run_stops_at_a_bound_and_says_why(tmp_path):
    run = train(tmp_path, "cost<=5:stop", steps=9600)

    assert len(run.metrics) == 1 and run.stop_reason == "cost is 6: outside cost<=5"
    assert [event["kind"] for event in events(run)] == ["constraint", "stopped"]
    assert (run.path / "policy").is_dir()


def test_a_bound_that_only_warns_changes_no_number(tmp_path):
    warned, free = train(tmp_path / "a", "cost<=5:warn"), train(tmp_path / "b")
    ours, theirs = (load(run.path).state_dict() for run in (warned, free))

    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert [event["kind"] for event in events(warned)] == ["constraint"]


class Rising(Fixed):
    """A step costs more from the fourth episode of a row on."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        self.price = 1.0 if self.episodes <= 4 else 2.0
        return super().reset(seed=seed, options=options)


def test_a_run_goes_back_to_its_last_state_inside_and_stops_when_that_does_not_help(tmp_path):
    # 6 calls an iteration are 2 episodes: inside for two iterations, then outside for good
    run = train(tmp_path, "cost<=5:rollback", env=Rising, steps=9600, constraint_rollbacks=2, learning_rate=0.01)
    before = train(tmp_path / "short", env=Rising, steps=24, learning_rate=0.01)  # one iteration
    ours, theirs = (load(run.path).state_dict() for run in (run, before))

    kinds = [event["kind"] for event in events(run)]
    assert kinds == ["constraint", "rolled_back", "rolled_back", "rolled_back", "stopped"]
    # the state that was inside last is the one the second iteration sampled with, before its update
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert [line["learning_rate"] for line in run.metrics] == [0.01, 0.01, 0.01, 0.005, 0.0025]


def test_a_linear_learning_rate_is_halved_too(tmp_path):
    fields = {"learning_rate": 0.01, "learning_rate_schedule": "linear", "constraint_rollbacks": 1}
    run = train(tmp_path, "cost<=5:rollback", env=Rising, steps=240, **fields)

    # a tenth of the run an iteration; back after the third, and after the fourth, which ends it
    assert [line["learning_rate"] for line in run.metrics] == pytest.approx([0.01, 0.009, 0.008, 0.0035])


class Choosy(Fixed):
    """Six steps; what a step costs is what one does, and more where the episode has a number."""

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed, options=options)
        self.number = self.np_random.random()
        return found

    def step(self, action):
        self.now += 1
        return np.zeros(1, np.float32), float(action), self.now == 6, False, {"cost": float(action) + self.number}


@pytest.mark.parametrize("number", [1, 4, 7, 10])
def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(tmp_path, number):
    constraints = "cost<=5", "cost<=5.5:rollback", "cost>=100:warn"
    fields = {
        "env": "tests.test_costs:Choosy",
        "output_dir": str(tmp_path / "run"),
        "constraint": constraints,
        "num_steps_per_env": 4,
    }
    sizes = {"num_envs": 3, "steps": 144, "hidden": (4,), "quiet": True, "learning_rate": 0.05, "checkpoint_every": 1}
    kept = {"keep_checkpoints": 99, "constraint_rollbacks": 9}
    whole = ppo.train(ppo.Config(**(fields | sizes | kept)))
    ours, lines = load(whole.path).state_dict(), whole.metrics

    again = resume(whole.path, checkpoint=f"{number:06d}")
    theirs = load(again.path).state_dict()

    assert sum(event["kind"] == "rolled_back" for event in events(whole)) >= 2
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    took = ("seconds", "steps_per_second", "seconds_left")
    kept_lines = [[{k: v for k, v in line.items() if k not in took} for line in run] for run in (lines, again.metrics)]
    assert kept_lines[0] == kept_lines[1]


def test_a_cost_that_is_not_there_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="constraint names 'risk'"):
        train(tmp_path, "risk<=5")


def events(run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
