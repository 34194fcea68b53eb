"""Action masks, in every form in which an environment gives them: read, kept to, and refused where they do not fit."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from tests.foreign_envs import MaskByMethod, MaskInObservation, TenSteps
from tests.probes import ACTIONS, MODES, Anything, is_allowed
from understudy import load
from understudy.control import ppo, reinforce
from understudy.control.envs import make as environment
from understudy.control.envs.checks import check_env
from understudy.control.envs.masks import sample_allowed_action, validate_mask
from understudy.control.envs.spaces import MASK_KEY, mask_width
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.run.config import RequestError

HERE = "tests.test_masks:"


class MaskInDictForTwo(MaskInObservation):
    """Two choices; the mask for both, flat, is a key of the observation. A forbidden action raises."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.MultiDiscrete([4, 3], start=[1, 0])
        self.observation_space = spaces.Dict(
            action_mask=spaces.MultiBinary(7),
            x=self.observation_space["x"],  # pyright: ignore
        )

    def observe(self):
        seen = super().observe()
        self.second = int(self.np_random.integers(3))
        return seen | {"action_mask": np.append(self.allowed, np.eye(3, dtype=np.int8)[self.second])}

    def step(self, action):
        assert action[1] == self.second, "forbidden action"
        return super().step(action[0] - 1)


class MaskByMethodForTwo(MaskByMethod):
    """Two choices; `action_masks()` gives a list with an array for each. A forbidden action raises."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.MultiDiscrete([4, 2])

    def action_masks(self):
        return [self.allowed.astype(bool), np.array([False, True])]

    def step(self, action):
        assert action[1] == 1 and self.allowed[action[0]], "forbidden action"
        return super().step(action[0])


class Masker(gymnasium.Wrapper):
    """A wrapper that has the method, as sb3-contrib's ActionMasker."""

    def action_masks(self):
        return [True, False, False, True]


class WrongWidth(MaskByMethod):
    def action_masks(self):
        return np.ones(3, dtype=bool)


class NothingAllowed(MaskByMethod):
    def action_masks(self):
        return np.zeros(4, dtype=bool)


def walk(envs, steps=25):
    """A walk of a fresh policy; the environments raise, or pay -1, where an action is forbidden."""
    policy = Policy.build(envs.single_observation_space, envs.single_action_space, config(), seed=0)
    walker = RolloutCollector(envs, seed_of=lambda row, episode: 100 * row + episode)
    record = walker.collect(policy, steps)
    envs.close()
    return record


def config(env="any", **fields) -> ppo.Config:
    sizes = {
        "steps": 16,
        "num_envs": 2,
        "num_steps_per_env": 8,
        "num_epochs": 1,
        "num_minibatches": 1,
        "hidden": (4,),
        "log_every": 1000,
    }
    return ppo.Config(env=env, quiet=True, **(sizes | fields))


@pytest.mark.parametrize("vectorization", ["sync", "async", "fault_tolerant"])
def test_action_masks_of_an_environment_are_read(vectorization):
    record = walk(environment.make("tests.foreign_envs:MaskByMethod", num_envs=2, vectorization=vectorization))

    assert (record.reward[record.mask] == 1).all()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_action_masks_of_a_users_own_vector_env_are_read(kind, mode):
    envs = environment.as_vector_env(kind([MaskByMethod] * 2, autoreset_mode=mode), lambda row, episode: row)

    record = walk(envs)

    assert (record.reward[record.mask] == 1).all() and record.ended.any()


class Native(SyncVectorEnv):
    """A vector env whose own `action_masks()` gives one mask a row."""

    def __init__(self, num_envs=2):
        super().__init__([MaskByMethodForTwo] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)

    call = None  # pyright: ignore

    def action_masks(self):
        return np.stack([np.append(env.unwrapped.allowed, [0, 1]) for env in self.envs])  # pyright: ignore


def test_action_masks_of_a_native_vector_env_are_read():
    record = walk(environment.make(f"{HERE}Native", num_envs=3, vectorization="native"))

    assert (record.reward[record.mask] == 1).all() and record.ended.any()


def test_preflight_of_an_object_keeps_to_its_action_masks(tmp_path):
    run = ppo.train(
        ppo.Config(steps=20, num_steps_per_env=10, quiet=True, output_dir=str(tmp_path / "run")),
        env=MaskByMethodForTwo(),
    )

    assert run.metrics[-1]["steps"] == 20


def test_action_masks_of_a_wrapper_are_read():
    record = walk(environment.as_vector_env(Masker(TenSteps(actions=4)), lambda row, episode: row))

    assert set(record.action[record.mask].tolist()) == {0, 3}


class Both(MaskByMethod):
    """Has the method and gives its mask in info: the method is not needed."""

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, {MASK_KEY: self.allowed}

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {MASK_KEY: self.allowed}

    def action_masks(self):
        raise AssertionError("info holds the mask")


def test_a_mask_in_info_goes_before_the_method():
    record = walk(environment.as_vector_env(Both(), lambda row, episode: row))

    assert (record.reward[record.mask] == 1).all()


def test_a_run_whose_environment_has_action_masks_keeps_to_them(tmp_path):
    run = reinforce.train(
        reinforce.Config(
            env="tests.foreign_envs:MaskByMethod",
            steps=40,
            num_envs=2,
            output_dir=str(tmp_path),
            quiet=True,
            log_every=1000,
        )
    )

    assert run.metrics[-1]["episode_return_mean"] == 10


# act


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    path = tmp_path_factory.mktemp("masked")
    ppo.train(config("tests.foreign_envs:MaskByMethod", output_dir=str(path)))
    return load(path)


def test_a_policy_trained_with_masks_asks_for_one(masked):
    with pytest.raises(ValueError, match="action_mask is missing, and this policy was trained with action masks: give"):
        masked.act(np.zeros(4, np.float32))


def test_a_policy_trained_with_masks_keeps_to_the_mask_it_is_given(masked):
    obs = np.zeros((4, 4), np.float32)

    assert masked.act(obs, action_mask=np.eye(4, dtype=bool)).tolist() == [0, 1, 2, 3]
    assert masked.act(obs[0], action_mask=[0, 0, 1, 0]) == 2


def test_a_policy_trained_with_masks_may_be_told_that_all_is_allowed(masked):
    assert masked.act(np.zeros((4, 4), np.float32), action_mask=True).shape == (4,)


def test_a_policy_trained_without_masks_asks_for_none(tmp_path):
    ppo.train(config("tests.foreign_envs:TenSteps", output_dir=str(tmp_path)))

    load(tmp_path).act(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("mask", "problem"), [([1, 1, 1], "has 3 entries: it must have 4 for Discrete"), ([0] * 4, "allows no action")]
)
def test_act_refuses_a_mask_that_does_not_fit(masked, mask, problem):
    with pytest.raises(ValueError, match=f"action_mask {problem}"):
        masked.act(np.zeros(4, np.float32), action_mask=mask)


# preflight


@pytest.mark.parametrize(
    "env", ["tests.foreign_envs:MaskInObservation", HERE + "MaskInDictForTwo", HERE + "MaskByMethodForTwo"]
)
def test_preflight_acts_inside_the_mask(env):
    for seed in range(4):  # unmasked, each step is forbidden three times in four
        check_env(env, environment.make_factory(env)(), seed=seed)


@pytest.mark.parametrize("name", ["Discrete", "MultiDiscrete", "MultiBinary"])
def test_a_random_action_is_one_that_the_mask_allows(name):
    space, rng = ACTIONS[name], np.random.default_rng(0)
    env = Anything("vector", name, length=3, masked=True)
    env.reset(seed=0)

    actions = [sample_allowed_action(space, env.allowed.astype(bool), rng) for _ in range(40)]  # pyright: ignore

    assert all(space.contains(action) and is_allowed(space, action, env.allowed) for action in actions)
    assert len({str(action) for action in actions}) > 1


def test_a_mask_of_every_form_is_read_flat():
    space = spaces.MultiDiscrete([2, 3])
    expected = [True, False, False, True, True]

    for mask in ([1, 0, 0, 1, 1], np.array([1, 0, 0, 1, 1], np.int8), ([1, 0], [0, 1, 1]), [np.eye(2)[0], [0, 1, 1]]):
        assert validate_mask(space, mask).tolist() == expected


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("WrongWidth", r"action_mask has 3 entries: it must have 4 for Discrete\(4\)"),
        ("NothingAllowed", "allows no action"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_the_first_step(tmp_path, name, problem):
    with pytest.raises(RequestError, match=f"gives an action mask that does not fit: .*{problem}"):
        ppo.train(config(HERE + name, output_dir=str(tmp_path / "run")))

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mask", "action", "problem"),
    [
        (spaces.MultiBinary(3), spaces.Discrete(4), "has 'action_mask' of 3 entries: it must have 4"),
        (spaces.MultiBinary(2), spaces.Box(-1, 1, (2,)), "which takes no mask"),
        (
            spaces.Tuple([spaces.MultiBinary(2)] * 2),
            spaces.MultiDiscrete([2, 2]),
            r"as a Tuple: use one MultiBinary\(4\)",
        ),
        (spaces.Discrete(4), spaces.Discrete(4), r"as a Discrete: use one MultiBinary\(4\)"),
    ],
    ids=["width", "Box action", "Tuple", "Discrete"],
)
def test_a_mask_space_that_does_not_fit_is_refused(mask, action, problem):
    with pytest.raises(RequestError, match=problem):
        environment.check_spaces("x", spaces.Dict({MASK_KEY: mask, "x": spaces.Discrete(2)}), action)


def test_an_observation_that_is_a_mask_alone_is_refused():
    with pytest.raises(RequestError, match="in which a policy sees no number"):
        environment.check_spaces("x", spaces.Dict({MASK_KEY: spaces.MultiBinary(2)}), spaces.Discrete(2))


def test_a_mask_is_as_wide_as_its_parts_together():
    assert [mask_width(ACTIONS[name]) for name in ("Discrete", "MultiDiscrete", "MultiBinary", "Box")] == [3, 9, 6, 0]


@pytest.mark.parametrize("mask", [[0.0, -np.inf, 0.0], np.array([0, 2, 1]), [np.nan, 1.0, 1.0]])
def test_a_mask_of_other_values_than_0_and_1_is_refused(mask):
    with pytest.raises(ValueError, match=r"action_mask holds (-inf|2|nan): must be 1 where an action is allowed"):
        validate_mask(gymnasium.spaces.Discrete(3), mask)
