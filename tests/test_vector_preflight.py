"""Preflight of vector envs that a user gives: through their own interface, and without a trace in the run."""

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from tests.foreign_envs import MaskByMethod, TenSteps
from tests.test_sources import FourValues, PaysList, events, short
from understudy.control import ppo
from understudy.control.envs import sources
from understudy.control.envs.checks import Preflight
from understudy.control.envs.vector_checks import check_envs
from understudy.run.config import RequestError

HERE = "tests.test_vector_preflight"
ONES, NEVER = np.ones(2), np.zeros(2, dtype=bool)


class Native(VectorEnv):
    """Two copies that share a generator; they never end. `gives` says what is returned instead of what should be.

    Attributes:
        calls: the names of the methods that were called.
    """

    def __init__(self, num_envs=2, seen: spaces.Space | None = None, mode=AutoresetMode.NEXT_STEP, **gives):
        self.num_envs, self.gives, self.calls = num_envs, gives, []
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = seen or spaces.Box(-1, 1, (3,), np.float32)
        self.single_action_space = spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def observe(self):
        return self.np_random.uniform(-1, 1, (self.num_envs, 3)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            super().reset(seed=seed if isinstance(seed, int) else seed[0])
        self.calls.append("reset")
        return self.gives.get("reset", (self.gives.get("first", self.observe()), self.gives.get("info", {})))

    def step(self, actions):
        self.calls.append("step")
        assert isinstance(actions, np.ndarray) and actions.shape == (self.num_envs,)
        answer = {"obs": self.observe(), "reward": ONES, "terminated": NEVER, "truncated": NEVER, "info": {}}
        return tuple((answer | self.gives)[name] for name in answer)[: self.gives.get("values", 5)]


def masks(*rows, given=None):
    """`info` as Gymnasium lays the infos of copies together."""
    return {
        "action_mask": np.array([*rows, None], dtype=object)[:-1],
        "_action_mask": np.array(given or [True] * len(rows)),
    }


WIDE, NONE, GOOD = np.ones(4, dtype=bool), np.zeros(3, dtype=bool), np.array([False, True, False])
BAD = {
    "four values": ({"values": 4}, "returns 4 values from step"),
    "a reset without info": ({"reset": np.zeros((2, 3))}, "returns ndarray from reset: must be the pair obs, info"),
    "rewards [[x]]": (
        {"reward": np.ones((2, 1))},
        r"pays rewards at step 0 that are of shape \(2, 1\): must be .* \(2,\)",
    ),
    "rewards nan": ({"reward": np.array([1, np.nan])}, r"pays rewards at step 0 that are float64, such as \[ 1. nan\]"),
    "rewards None": ({"reward": np.array([None, 1])}, r"rewards at step 0 that are object, such as \[None 1\]"),
    "ends of 0 and 1": ({"terminated": np.array([0, 1])}, r"terminated at step 0 that are int64, .*must be bools"),
    "one end for all": ({"truncated": np.array(False)}, r"truncated at step 0 that are of shape \(\)"),
    "one observation": ({"obs": np.zeros(3)}, r"at step 0: observation has shape \(3,\), the space \(2, 3\)"),
    "an observation nan": ({"first": np.full((2, 3), np.nan)}, "at reset: observation is not finite"),
    "no category": (
        {"seen": spaces.MultiDiscrete([2, 2]), "first": np.array([[0, 1], [1, 2]])},
        r"at reset in copy 1: observation is array\(\[1, 2\]\), the space MultiDiscrete",
    ),
    "info None": ({"info": None}, "gives info None at reset: must be a dict"),
    "info a list": ({"info": [{}, {}]}, r"gives info \[{}, {}\] at reset: must be a dict"),
    "a wide mask": ({"info": masks(GOOD, WIDE)}, "does not fit in copy 1: action_mask has 4 entries: it must have 3"),
    "a mask of nothing": ({"info": masks(NONE, GOOD)}, "in copy 0: action_mask allows no action"),
    "no mask": ({"info": masks(GOOD, None, given=[True, False])}, "gives no action_mask in copy 1 at reset"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_native_vector_env_is_one_sentence(case, tmp_path):
    gives, words = BAD[case]

    with pytest.raises(RequestError, match=f"^env 'Native' .*{words}"):
        ppo.train(short(tmp_path, num_envs=2), env=Native(**gives))
    assert not (tmp_path / "run").exists()


class Raises(Native):
    def step(self, actions):
        raise ValueError("no such thing")


class NotFinite(TenSteps):
    def observe(self):
        return super().observe() * np.nan


class WideMask(MaskByMethod):
    def action_masks(self):
        return np.ones(3, dtype=bool)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FourValues, "raises ValueError in its first steps: not enough values"),
        (PaysList, r"pays rewards at step 0 that are of shape \(2, 1\)"),
        (NotFinite, "observation is not finite"),
        (WideMask, "does not fit in copy 0: action_mask has 3 entries: it must have 4"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Gymnasium, that a worker raised
def test_what_is_wrong_in_processes_is_one_sentence(kind, words, tmp_path):
    envs = AsyncVectorEnv([kind] * 2)
    with pytest.raises(RequestError, match=f"^env 'AsyncVectorEnv' .*{words}"):
        ppo.train(short(tmp_path, num_envs=2), env=envs)
    assert not (tmp_path / "run").exists()
    envs.close(terminate=True)


class Doubled(VectorWrapper):
    """Pays a column for a row."""

    def step(self, actions):
        obs, reward, *rest = self.env.step(actions)
        return obs, np.stack([reward, reward], axis=1), *rest


def test_wrappers_around_a_vector_env_are_checked_too(tmp_path):
    with pytest.raises(RequestError, match=r"rewards at step 0 that are of shape \(2, 2\)"):
        ppo.train(
            short(tmp_path, num_envs=2),
            env=Doubled(SyncVectorEnv([TenSteps] * 2, autoreset_mode=AutoresetMode.DISABLED)),
        )


@pytest.mark.parametrize("kind", [Raises, Doubled])
def test_a_native_vector_env_by_name_is_checked_too(kind, tmp_path):
    name = "Raises" if kind is Raises else "doubled"
    words = "raises ValueError in its first steps: no such thing" if kind is Raises else r"of shape \(2, 2\)"
    with pytest.raises(RequestError, match=f"^env '{HERE}:{name}' .*{words}"):
        ppo.train(short(tmp_path, env=f"{HERE}:{name}", vectorization="native"))
    assert not (tmp_path / "run").exists()


def doubled(num_envs):
    return Doubled(Native(num_envs))


CLOCKS = {"seconds", "steps_per_second", "seconds_left"}
MADE = {
    "native": Native,
    "masked": lambda: Native(info=masks(GOOD, GOOD)),
    "async": lambda: AsyncVectorEnv([TenSteps] * 2),
    "wrapped": lambda: VectorWrapper(SyncVectorEnv([TenSteps] * 2)),
    "by name": lambda: None,
}


@pytest.mark.parametrize("kind", MADE)
def test_preflight_leaves_no_trace_in_the_run(kind, tmp_path, monkeypatch):
    def train(name):
        fields = {"env": f"{HERE}:Native", "vectorization": "native"} if kind == "by name" else {}
        run = ppo.train(short(tmp_path, output_dir=str(tmp_path / name), **fields), env=MADE[kind]())
        return [{k: x for k, x in line.items() if k not in CLOCKS} for line in run.metrics]

    checked = train("checked")
    monkeypatch.setattr(sources, "check_envs", lambda *_, **__: Preflight("", True, ""))
    assert train("unchecked") == checked


def test_a_vector_env_that_starts_over_by_its_seed_is_stepped_before(tmp_path):
    env = Native()
    ppo.train(short(tmp_path, num_envs=2), env=env)
    assert env.calls[:7] == ["reset", "reset", "step", "step", "step", "reset", "step"]


class Unseeded(Native):
    """Has its seed from the user, and goes on from where it is."""

    def __init__(self):
        super().__init__()
        self._np_random = np.random.default_rng(3)

    def reset(self, *, seed=None, options=None):
        return super().reset()


def test_a_vector_env_that_ignores_seeds_takes_no_step_before_the_runs_own(tmp_path):
    env = Unseeded()
    ppo.train(short(tmp_path, num_envs=2), env=env)
    assert env.calls[:4] == ["reset", "reset", "reset", "step"]


class Draws(Native):
    """Draws from the generator that belongs to no one."""

    def observe(self):
        return np.random.uniform(-1, 1, (2, 3)).astype(np.float32)


def test_a_draw_in_preflight_does_not_move_shared_generators():
    np.random.seed(3)
    check_envs("x", Draws(), seed=1)
    drawn = np.random.random()
    np.random.seed(3)
    assert drawn == np.random.random()


def test_an_episode_that_ends_is_not_stepped_on_where_nothing_resets_it():
    env = Native(mode=AutoresetMode.DISABLED, terminated=np.array([False, True]))
    check_envs("x", env, seed=1)
    assert env.calls == ["reset", "step"] and env.closed


def test_a_copy_that_is_over_needs_no_mask():
    env = Native(terminated=np.array([False, True]), info=masks(GOOD, GOOD))
    step, ended = env.step, masks(GOOD, None, given=[True, False])
    env.step = lambda actions: (*step(actions)[:4], ended)  # pyright: ignore
    check_envs("x", env, seed=1)
    assert env.calls == ["reset", "step", "step", "step"]


def test_masks_are_kept_to():
    env = Native(info=masks(GOOD, GOOD))
    step = env.step
    env.step = lambda actions: (*step(kept_to(actions))[:4], masks(GOOD, GOOD))  # pyright: ignore
    check_envs("x", env, seed=1)


def kept_to(actions):
    assert actions.tolist() == [1, 1]
    return actions


def test_observations_beyond_bounds_are_accepted_and_said_so(tmp_path):
    run = ppo.train(short(tmp_path, num_envs=2), env=Native(obs=np.full((2, 3), 1.5, np.float32)))
    said = events(run, "notice")[-1]["text"]
    assert "1.5" in said and said.endswith("what it gives is accepted")


def test_what_float32_loses_of_a_vector_env_is_said(tmp_path):
    wide = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    run = ppo.train(short(tmp_path, num_envs=2), env=Clock(seen=wide))
    assert "varies by less than float32 can hold" in events(run, "notice")[-1]["text"]


class Clock(Native):
    def observe(self):
        return 1.7e9 + self.np_random.uniform(-1, 1, (2, 3))
