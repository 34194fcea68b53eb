"""Where environments come from: each is trained, evaluated and resumed as itself, or refused in a sentence."""

import json
import os
import signal
from contextlib import closing
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from tests.faults import own_envs
from tests.foreign_envs import (
    CannotBeSeeded,
    Curriculum,
    LooksLikeCartPole,
    NeverEnds,
    OneInstance,
    OnTheBound,
    OutsideItsSpace,
    TenSteps,
)
from understudy import load, resume
from understudy.cli import main
from understudy.control import ppo
from understudy.control.envs import make as environment
from understudy.control.envs.sources import EnvSource
from understudy.control.envs.state import obeys_seed
from understudy.control.evaluate import evaluate
from understudy.run.config import RequestError

HERE = "tests.test_sources"
THERE = "tests.foreign_envs"


def short(tmp_path, **fields):
    common: dict[str, Any] = {"num_envs": 2, "num_steps_per_env": 10, "steps": 60, "num_epochs": 1, "hidden": (4,)}
    common |= {"quiet": True, "compile": "off", "output_dir": str(tmp_path / "run")}
    return ppo.Config(**(common | fields))


def events(run, kind):
    return [
        e for line in (run.path / "events.jsonl").read_text().splitlines() if (e := json.loads(line))["kind"] == kind
    ]


# objects and functions


@pytest.mark.parametrize("evaluation_env", [LooksLikeCartPole, LooksLikeCartPole()], ids=["function", "object"])
def test_an_environment_object_is_evaluated_in_its_own_kind(evaluation_env, tmp_path):
    config = short(tmp_path, env="CartPole-v1", num_envs=1, evaluate_every=1, evaluate_episodes=3)
    run = ppo.train(config, env=LooksLikeCartPole(), evaluation_env=evaluation_env)

    assert {line["evaluation_return_mean"] for line in run.metrics} == {-20.0}  # four steps of -5, never CartPole's


def test_a_function_makes_every_copy_and_those_of_evaluation(tmp_path):
    run = ppo.train(short(tmp_path, evaluate_every=3, evaluate_episodes=2), env=LooksLikeCartPole)

    assert run.metrics[-1]["evaluation_return_mean"] == -20.0
    assert json.loads((run.path / "config.json").read_text())["config"]["num_envs"] == 2
    assert run.metrics[0]["steps"] == 20  # two copies


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"evaluate_every": 1}, "evaluation_env"),
        ({"wrappers": ("ClipReward",)}, "wrappers is"),
        ({"env_options": {"a": 1}}, "env_options is"),
        ({"vectorization": "async"}, "vectorization is"),
        ({"step_timeout": 1.0}, "step_timeout is"),
        ({"num_envs": 5}, "num_envs is 5, but env is an object of 1"),
    ],
    ids=str,
)
def test_a_setting_without_effect_beside_an_object_is_refused(fields, word, tmp_path):
    with pytest.raises(RequestError, match=word):
        ppo.train(short(tmp_path, **({"num_envs": 1} | fields)), env=TenSteps())
    assert not (tmp_path / "run").exists()


ONE = TenSteps()


@pytest.mark.parametrize(
    ("fields", "envs", "field"),
    [
        ({"num_envs": 2}, {"env": lambda: ONE}, "env"),
        ({"num_envs": 3}, {"env": SyncVectorEnv([lambda: ONE] * 3)}, "env"),
        ({"num_envs": 1, "evaluate_every": 1}, {"env": ONE, "evaluation_env": ONE}, "evaluation_env"),
        (
            {"num_envs": 1, "evaluate_every": 1},
            {"env": ONE, "evaluation_env": gymnasium.Wrapper(ONE)},
            "evaluation_env",
        ),
        ({"num_envs": 1, "evaluate_every": 1}, {"env": ONE, "evaluation_env": lambda: ONE}, "evaluation_env"),
        ({"num_envs": 1, "evaluate_every": 1}, {"env": lambda: ONE}, "env"),
        ({"evaluate_every": 1}, {"env": TenSteps, "evaluation_env": lambda: ONE}, "evaluation_env"),
    ],
)
def test_one_object_behind_several_environments_is_refused(fields, envs, field, tmp_path):
    with pytest.raises(RequestError, match=rf"^{field} is .* object.*: (make|pass)"):
        ppo.train(short(tmp_path, **fields), **envs)
    assert not (tmp_path / "run").exists()


def test_evaluation_in_copies_that_are_one_object_is_refused(tmp_path):
    config = short(tmp_path, num_evaluation_envs=2)
    policy = load(ppo.train(short(tmp_path), env=TenSteps).path)
    with pytest.raises(RequestError, match="copies 0 and 1 are one and the same object"):
        evaluate(policy, config, num_episodes=2, source=EnvSource(config, lambda: ONE))


def test_without_any_environment_a_run_is_refused(tmp_path):
    with pytest.raises(RequestError, match="env is missing"):
        ppo.train(short(tmp_path))


def test_a_run_in_an_object_is_named_for_it_and_never_taken_for_another(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ppo.train(short(tmp_path, num_envs=1, output_dir=None), env=TenSteps())
    assert run.path.name.startswith("ppo-TenSteps-s0")

    for words in (["evaluate", str(run.path)], ["resume", str(run.path)]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "--env" in said if words[0] == "evaluate" else "env=..." in said
    assert main(["evaluate", str(run.path), "--env", f"{THERE}:TenSteps", "--episodes", "1"]) == 0
    assert resume(run.path, env=TenSteps(), steps=80).metrics[-1]["steps"] == 80


def test_a_run_of_ones_own_network_is_resumed_with_it_or_refused(tmp_path):
    run = ppo.train(short(tmp_path, env=f"{THERE}:TenSteps", hidden=(64, 64)), policy=Reads())
    with pytest.raises(RequestError, match=r"network of your own.*policy="):
        resume(run.path, steps=80)
    assert resume(run.path, policy=Reads(), steps=80).metrics[-1]["steps"] == 80


@pytest.mark.parametrize("flag", ["--learning-rate", "--no-normalize-obs", "--gamma=0.9"])
def test_a_setting_that_resume_cannot_change_is_refused_with_init(flag, tmp_path, capsys):
    run = ppo.train(short(tmp_path, env=f"{THERE}:TenSteps"))
    words = [flag] if "=" in flag or flag.startswith("--no") else [flag, "0.1"]
    assert main(["resume", str(run.path), *words]) == 2
    said = capsys.readouterr().err
    assert flag.split("=")[0] in said and f"understudy control ppo --init-from {run.path}" in said
    assert main(["resume", str(run.path), "--nonsense"]) == 2
    assert "--nonsense is not a flag of `understudy resume`" in capsys.readouterr().err


def test_a_run_directory_is_flat_whatever_the_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ppo.train(short(tmp_path, env=f"{THERE}:foreign/TenSteps-v0", output_dir=None))
    assert run.path.name.startswith("ppo-foreign-TenSteps-v0-s0") and run.path.parent.name == "runs"


# evaluation


def test_evaluation_gives_the_environments_own_reward(tmp_path):
    wrappers = ("TransformReward func=1", f"{HERE}:Tenth")
    config = short(
        tmp_path, env=f"{THERE}:LooksLikeCartPole", wrappers=wrappers[1:], evaluate_every=3, evaluate_episodes=2
    )
    run = ppo.train(config)

    assert run.metrics[-1]["episode_return_mean"] == pytest.approx(-2.0)  # as it is trained: a tenth
    assert run.metrics[-1]["evaluation_return_mean"] == -20.0


class Tenth(gymnasium.RewardWrapper):
    def reward(self, reward):
        return float(reward) / 10


class Hundredfold(gymnasium.Wrapper):
    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, 100.0 * float(reward), *rest


class Shifted(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return observation


class Flipped(gymnasium.ActionWrapper):
    def action(self, action):
        return 1 - action


@pytest.mark.parametrize("vectorization", ["sync", "fault_tolerant"])
@pytest.mark.parametrize(
    ("wrapper", "solved"),
    [
        ("ClipReward min_reward=0 max_reward=1", None),
        (f"{HERE}:Tenth", None),
        (f"{HERE}:Hundredfold", None),
        ("FlattenObservation", 475.0),
        ("TimeLimit max_episode_steps=100", 475.0),
        (f"{HERE}:Shifted", 475.0),
        (f"{HERE}:Flipped", 475.0),
    ],
)
def test_a_threshold_holds_only_for_rewards_that_no_wrapper_changes(wrapper, solved, vectorization):
    with closing(environment.make("CartPole-v1", num_envs=1, vectorization=vectorization, wrappers=(wrapper,))) as envs:
        assert environment.reward_threshold(envs) == solved


def test_a_threshold_is_read_through_the_wrappers_of_objects_and_vector_envs():
    def local():
        class Local(gymnasium.ObservationWrapper):
            """Cannot be named."""

        return Local(gymnasium.make("CartPole-v1"))

    def of(env):
        with closing(environment.as_vector_env(env, lambda row, episode: 0)) as envs:
            return environment.reward_threshold(envs)

    cart, carts = (
        gymnasium.make("CartPole-v1"),
        gymnasium.make_vec("CartPole-v1", vectorization_mode="vector_entry_point"),
    )
    paid = gymnasium.wrappers.TransformReward(cart, lambda reward: 2 * float(reward))
    assert [of(cart), of(paid), of(local()), of(TenSteps())] == [475.0, None, None, None]
    counted, clipped = (
        gymnasium.wrappers.vector.RecordEpisodeStatistics(carts),
        gymnasium.wrappers.vector.ClipReward(carts, 0),
    )
    assert [of(counted), of(clipped)] == [475.0, None]


gymnasium.register(
    "tests/Wrapped-v0",
    entry_point=f"{HERE}:LooksLikeCartPole",
    reward_threshold=-5.0,  # of episodes that pay -2
    additional_wrappers=(gymnasium.envs.registration.WrapperSpec("Tenth", f"{HERE}:Tenth", {}),),
)


@pytest.mark.parametrize(("wrappers", "solved"), [((), 400), ((f"{HERE}:Tenth",), None)])
def test_the_threshold_of_an_id_is_that_of_its_own_wrappers(wrappers, solved, tmp_path):
    run = ppo.train(short(tmp_path, env="tests/Wrapped-v0", wrappers=wrappers, steps=500))

    assert (run.solved_at or {}).get("steps") == solved  # 100 episodes of 4 steps


def test_a_run_is_not_solved_by_rewards_that_a_wrapper_pays(tmp_path):
    fields = {"env": "CartPole-v1", "num_envs": 4, "num_steps_per_env": 500, "steps": 10_000, "stop_at_return": 1000.0}
    run = ppo.train(short(tmp_path, **fields, wrappers=(f"{HERE}:Hundredfold",)))

    assert run.metrics[-1]["steps"] < 10_000  # the mean return of 100 episodes, as it is logged, is above 1000
    assert run.metrics[-1]["episode_return_mean"] > 1000 and run.solved_at is None
    assert not (run.path / "events.jsonl").exists() or not events(run, "solved")


class Repeated(gymnasium.Wrapper):
    """Two steps for one, and one more within the reset."""

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed)
        obs, *_, info = self.env.step(0)
        return obs, info

    def step(self, action):
        self.env.step(action)
        return self.env.step(action)


def test_steps_within_a_wrapper_count_and_those_within_a_reset_do_not(tmp_path):
    config = short(tmp_path, env=f"{HERE}:Ones", wrappers=(f"{HERE}:Repeated",))
    policy = load(ppo.train(config).path)
    assert evaluate(policy, config, num_episodes=2).returns == [10.0, 10.0]  # 5 steps of 2


class Ones(TenSteps):
    length = 11

    def reward(self, action):
        return 1.0


@pytest.mark.parametrize("wrapper", ["NormalizeObservation", "NormalizeReward"])
def test_wrappers_with_statistics_are_refused_by_name(wrapper, tmp_path):
    with pytest.raises(RequestError, match=f"{wrapper}, whose running statistics .* normalize_obs"):
        ppo.train(short(tmp_path, env="Pendulum-v1", wrappers=(wrapper,)))
    wrapped = getattr(gymnasium.wrappers, wrapper)(gymnasium.make("Pendulum-v1"))
    for env in (wrapped, SyncVectorEnv([lambda: wrapped])):
        with pytest.raises(RequestError, match=wrapper):
            ppo.train(short(tmp_path, num_envs=1), env=env)


def test_evaluation_does_not_depend_on_the_number_of_copies(tmp_path):
    config = short(tmp_path, env=f"{HERE}:SeedPays")
    policy = load(ppo.train(config).path)
    found = [
        evaluate(policy, short(tmp_path, env=f"{HERE}:SeedPays", num_evaluation_envs=n), num_episodes=7).returns
        for n in (1, 3, 50)
    ]
    assert found[0] == found[1] == found[2] and len(set(found[0])) == 7


class SeedPays(TenSteps):
    """Pays what its seed draws."""

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed)
        self.pays = float(self.np_random.random())
        return found

    def reward(self, action):
        return self.pays


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the copy that cannot be made
def test_a_simulator_of_one_instance_is_evaluated_in_one_copy(tmp_path):
    fields = {"env": f"{THERE}:OneInstance", "num_envs": 1, "env_options": {"port": 0}}
    config = short(tmp_path, **fields, num_evaluation_envs=1)
    policy = load(ppo.train(config).path)
    env = OneInstance(port=0)
    port = env.socket.getsockname()[1]
    env.close()
    again = short(tmp_path, **(fields | {"env_options": {"port": port}}), num_evaluation_envs=1)
    assert len(evaluate(policy, again, num_episodes=3).returns) == 3
    with pytest.raises(RequestError, match=r"Address already in use.*num_evaluation_envs to 1"):
        evaluate(policy, short(tmp_path, **(fields | {"env_options": {"port": port}})), num_episodes=3)
    assert OneInstance(port=port).close() is None  # the copy that could be made is closed


@pytest.fixture
def port():
    """One that is free."""
    env = OneInstance(port=0)
    found = env.socket.getsockname()[1]
    env.close()
    return found


@pytest.mark.parametrize("copies", [1, 4])
def test_evaluation_that_cannot_be_beside_training_is_refused_first(copies, tmp_path, port):
    fields = {"env": f"{HERE}:OnePicture", "num_envs": 1, "env_options": {"port": port}}
    words = r"^evaluate_every is 3, .*Address already in use.*set evaluate_every to 0 and evaluate the finished run"
    with pytest.raises(RequestError, match=words) as error:
        ppo.train(short(tmp_path, **fields, evaluate_every=3, num_evaluation_envs=copies))
    assert ("num_evaluation_envs to 1" in str(error.value)) == (copies > 1)
    assert not (tmp_path / "run").exists()
    assert ppo.train(short(tmp_path, **fields)).metrics  # nothing was left open


def test_a_video_that_cannot_be_beside_training_is_refused_first(tmp_path, port):
    fields = {"env": f"{HERE}:OnePicture", "num_envs": 1, "env_options": {"port": port}}
    source = EnvSource(short(tmp_path, **fields, video=True))
    source.check()
    with (
        closing(source.open(lambda row, episode: 0)) as envs,
        pytest.raises(RequestError, match=r"^video is True, .*Address already in use.*set video to False"),
    ):
        source.check_evaluation(envs)


class OnePicture(OneInstance):
    """Has a picture, and leaves no socket where it cannot be made."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"]}  # pyright: ignore

    def __init__(self, port, render_mode=None):
        try:
            super().__init__(port)
        except OSError:
            self.close()
            raise
        self.render_mode = render_mode


class Draws(LooksLikeCartPole):
    """Its making, and each step, draws from the generator that belongs to no one."""

    def __init__(self):
        super().__init__()
        self.bonus = np.random.random()

    def reward(self, action):
        return self.bonus + np.random.random()


def test_the_first_look_at_evaluation_moves_no_shared_generator(tmp_path):
    returns = []
    for name, fields in (("with", {"evaluate_every": 100}), ("without", {})):
        run = ppo.train(
            short(tmp_path, env=f"{HERE}:Draws", output_dir=str(tmp_path / name), exact_resume=False, **fields)
        )
        returns.append([line["episode_return_mean"] for line in run.metrics])
    assert returns[0] == returns[1]


@pytest.mark.parametrize("how", ["object", "function"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("FourValues", "returns 4 values"),
        ("PaysList", r"pays reward \[1.0\]"),
        ("Wide", "choose one of the same spaces"),
    ],
)
def test_preflight_says_what_is_wrong_with_an_evaluation_env(kind, words, how, tmp_path):
    made = globals()[kind]
    config = short(tmp_path, num_envs=1, evaluate_every=1)
    with pytest.raises(RequestError, match=words):
        ppo.train(config, env=TenSteps(), evaluation_env=made() if how == "object" else made)
    assert not (tmp_path / "run").exists()


class Wide(TenSteps):
    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def observe(self):
        return np.zeros(4, np.float32)


def test_an_evaluation_env_may_have_other_bounds(tmp_path):
    bounded = TenSteps()
    bounded.observation_space = gymnasium.spaces.Box(-2, 2, (3,), np.float32)
    assert ppo.train(short(tmp_path, num_envs=1, evaluate_every=1), env=TenSteps(), evaluation_env=bounded).metrics


@pytest.mark.parametrize("how", ["object", "function"])
def test_an_evaluation_env_need_not_take_seeds(how, tmp_path):
    given = CannotBeSeeded() if how == "object" else CannotBeSeeded
    run = ppo.train(short(tmp_path, num_envs=1, evaluate_every=6), env=TenSteps(), evaluation_env=given)
    assert "evaluation_return_mean" in run.metrics[-1]


def test_episodes_without_an_end_are_evaluated_up_to_a_bound(tmp_path, capsys):
    config = short(tmp_path, env=f"{THERE}:NeverEnds", evaluate_every=1, evaluate_episodes=2, evaluation_max_steps=30)
    run = ppo.train(config)

    assert len(events(run, "evaluation_cut")) == 1 and len(run.metrics) == 3  # said once
    assert evaluate(load(run.path), config, num_episodes=5).num_truncated == 5


def test_a_signal_ends_an_evaluation_and_the_run_goes_on_as_if_there_was_none(tmp_path):
    fields = {"env": f"{HERE}:Signals", "evaluate_every": 2, "evaluate_episodes": 2, "checkpoint_every": 1}
    whole = ppo.train(short(tmp_path, **fields, env_options={"at": 0}, output_dir=str(tmp_path / "whole")))
    with pytest.raises(SystemExit) as stopped:
        ppo.train(short(tmp_path, **fields, env_options={"at": 5}))
    assert stopped.value.code == 143

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"]["env_options"] == {"at": 5}
    assert not (tmp_path / "run" / "best").exists()
    Signals.armed = False
    went_on = resume(tmp_path / "run")
    Signals.armed = True
    clocks = {"seconds", "steps_per_second", "seconds_left"}
    assert [{k: x for k, x in line.items() if k not in clocks} for line in went_on.metrics] == [
        {k: x for k, x in line.items() if k not in clocks} for line in whole.metrics
    ]


class Signals(NeverEnds):
    """Only where it is evaluated, which has more steps than a rollout: sends this process SIGTERM."""

    armed = True

    def __init__(self, at=0):
        super().__init__()
        self.at, self.steps = at, 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed, options=options)

    def step(self, action) -> Any:
        self.steps += 1
        if self.at and self.armed and self.steps > 300:
            os.kill(os.getpid(), signal.SIGTERM)
        obs, reward, *_ = super().step(action)
        return obs, reward, False, self.steps >= 310, {}


# what remembers, what cannot be seeded


def levels(run):
    return [line["episode_return_mean"] for line in run.metrics]


def test_an_environment_that_remembers_is_said_to_be_made_anew(tmp_path):
    run = ppo.train(short(tmp_path, env=f"{THERE}:Curriculum"))
    (said,) = events(run, "notice")
    assert "made anew" in said["text"] and "exact_resume" in said["text"] and "five times" in said["text"]


class Counts(Curriculum):
    """Pays the number of its episode at the last step."""

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(self.level * truncated), terminated, truncated, info


@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_without_exact_resume_an_environment_keeps_what_it_remembers(checkpoint_every, tmp_path):
    config = short(tmp_path, env=f"{HERE}:Counts", exact_resume=False, checkpoint_every=checkpoint_every)
    run = ppo.train(config)
    assert levels(run) == [1.0, 1.5, 2.0]  # episodes 1, 2, 3 in both copies
    assert not (run.path / "events.jsonl").exists() or events(run, "notice") == []

    went_on = resume(run.path, steps=80)
    assert len(events(went_on, "resume_inexact")) == 1
    assert went_on.metrics[-1]["episode_return_mean"] == pytest.approx((1 + 2 + 3 + 1) / 4)  # a fresh copy begins at 1


@pytest.mark.parametrize("how", ["sync", "async", "object"])
def test_what_cannot_be_seeded_trains_and_is_marked(how, tmp_path):
    if how == "object":
        run = ppo.train(short(tmp_path, num_envs=1), env=CannotBeSeeded())
    else:
        run = ppo.train(short(tmp_path, env=f"{THERE}:CannotBeSeeded", vectorization=how, checkpoint_every=1))
        assert (
            len(evaluate(load(run.path), short(tmp_path, env=f"{THERE}:CannotBeSeeded"), num_episodes=2).returns) == 2
        )

    assert run.metrics[-1]["steps"] == 60
    assert json.loads((run.path / "config.json").read_text())["reproducible"] is False
    assert "cannot be seeded" in events(run, "notice")[0]["text"]


def test_what_ignores_its_seed_is_promised_nothing(tmp_path):
    fields = {"env": "tests.faults.own_envs:Unseeded", "checkpoint_every": 1}
    run = ppo.train(short(tmp_path, **fields))

    assert json.loads((run.path / "config.json").read_text())["reproducible"] is False
    assert "takes a seed and is not decided by it" in events(run, "notice")[0]["text"]
    assert len(events(resume(run.path, steps=80), "resume_inexact")) == 1


@pytest.mark.parametrize(("env", "obeys"), [("Unseeded", False), ("Draws", True), ("Remembers", True)])
def test_a_seed_is_obeyed_where_fresh_environments_begin_alike(env, obeys):
    assert obeys_seed(getattr(own_envs, env), 3) is obeys


# preflight


def test_bounds_are_compared_in_the_dtype_of_the_space(tmp_path):
    assert ppo.train(short(tmp_path, env=f"{THERE}:OnTheBound")).metrics[-1]["steps"] == 60
    assert ppo.train(short(tmp_path, num_envs=1, output_dir=str(tmp_path / "o")), env=OnTheBound()).metrics


@pytest.mark.parametrize("vectorization", ["sync", "fault_tolerant"])
@pytest.mark.parametrize(("how", "seen"), [("accept", 1.2), ("clip", 1.0)])
def test_what_is_outside_its_space_is_accepted_or_clipped_as_asked(how, seen, vectorization, tmp_path):
    fields = {"env": f"{THERE}:OutsideItsSpace", "vectorization": vectorization}
    with pytest.raises(RequestError, match="set out_of_space to accept or clip"):
        ppo.train(short(tmp_path, **fields))
    Reads.seen = []
    run = ppo.train(short(tmp_path, **fields, out_of_space=how, hidden=(64, 64)), policy=Reads())

    (said,) = events(run, "notice")
    assert "1.2" in said["text"] and np.allclose(Reads.seen[0], seen)


def test_an_object_outside_its_space_is_accepted_where_that_is_asked(tmp_path):
    assert ppo.train(short(tmp_path, num_envs=1, out_of_space="clip"), env=OutsideItsSpace()).metrics
    with pytest.raises(RequestError, match="out_of_space"):
        ppo.train(short(tmp_path, num_envs=1), env=OutsideItsSpace())


def test_out_of_space_is_refused_where_no_observation_is_compared(tmp_path):
    with pytest.raises(RequestError, match="out_of_space is 'clip', but vectorization is 'native'"):
        ppo.train(short(tmp_path, env="CartPole-v1", vectorization="native", out_of_space="clip"))


def reads():
    import torch
    from torch import nn

    from understudy.distribution import Categorical

    class Reads(nn.Module):
        """Notes what it sees."""

        seen: ClassVar[list] = []

        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2))

        def forward(self, obs):
            Reads.seen.append(obs.detach().numpy().copy())
            return Categorical.of(self.logits.expand(*obs.shape[:2], 2)), obs[..., 0]

    return Reads


Reads = reads()


class FourValues(TenSteps):
    def step(self, action) -> Any:
        return super().step(action)[:4]


class PaysList(TenSteps):
    def reward(self, action) -> Any:
        return [1.0]


class InfoIsNone(TenSteps):
    def info(self, action) -> Any:
        return None


class BareReset(TenSteps):
    def reset(self, *, seed=None, options=None) -> Any:
        return super().reset(seed=seed)[0]


class Fails(TenSteps):
    def step(self, action):
        raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FourValues, "returns 4 values from step"),
        (PaysList, r"pays reward \[1.0\]"),
        (InfoIsNone, "gives info None"),
        (BareReset, "from reset: must be the pair obs, info"),
        (Fails, "raises ValueError in its first steps: no such thing"),
    ],
)
@pytest.mark.parametrize("how", ["id", "function", "object", "vector"])
def test_preflight_says_what_is_wrong_however_an_environment_comes(how, kind, words, tmp_path):
    given = {"function": kind, "object": kind(), "vector": SyncVectorEnv([kind]), "id": None}[how]
    fields = {"env": f"{HERE}:{kind.__name__}"} if how == "id" else {}
    with pytest.raises(RequestError, match=words):
        ppo.train(short(tmp_path, num_envs=1, **fields), env=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("env", "word"), [("os:getcwd", "makes a str"), (f"{HERE}:Breaks", "OSError: no display")])
def test_what_makes_no_environment_is_refused(env, word, tmp_path):
    with pytest.raises(RequestError, match=word):
        ppo.train(short(tmp_path, env=env))


class Breaks(TenSteps):
    def __init__(self):
        raise OSError("no display")


# names


def test_an_environment_in_a_file_is_found_from_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_env.py").write_text("from tests.foreign_envs import TenSteps as Mine\n")
    monkeypatch.chdir(tmp_path)
    words = [
        "control",
        "ppo",
        "--steps",
        "40",
        "--num-envs",
        "2",
        "--num-steps-per-env",
        "10",
        "--quiet",
        "--preset",
        "none",
    ]

    for env, out in (("my_own_env.py:Mine", "a"), ("my_own_env:Mine", "b")):
        assert main([*words, "--env", env, "--out", out]) == 0
        assert main(["evaluate", out, "--episodes", "1"]) == 0
        assert main(["resume", out, "--steps", "60"]) == 0
    assert main([*words, "--env", "my_own_env.py:Mein"]) == 2
    assert "did you mean 'Mine'" in capsys.readouterr().err
    assert main([*words, "--env", "absent.py:Mine"]) == 2
    assert "no file 'absent.py'" in capsys.readouterr().err


# infos that are logged


class Succeeds(TenSteps):
    """Succeeds in every second episode, and tells where it was."""

    key = "is_success"

    def reset(self, *, seed=None, options=None):
        self.number = getattr(self, "number", -1) + 1
        return super().reset(seed=seed)

    def info(self, action):
        return {self.key: bool(self.number % 2), "height": float(self.number), "name": "x"} if self.t == 10 else {}


class SucceedsToo(Succeeds):
    key = "success"


@pytest.mark.parametrize("kind", [Succeeds, SucceedsToo])
def test_success_and_chosen_numbers_of_info_are_logged(kind, tmp_path):
    run = ppo.train(short(tmp_path, num_envs=1, steps=40, log_info=("height",)), env=kind())

    numbers = [line["info_height"] for line in run.metrics]
    first = numbers[0]  # preflight reset it before
    assert numbers == [first, first + 0.5, first + 1, first + 1.5]
    assert [line["success_rate"] for line in run.metrics] == [first % 2, 0.5, (1 + first % 2) / 3, 0.5]


@pytest.mark.parametrize("key", ["name", "absent"])
def test_a_chosen_info_that_is_no_number_is_refused(key, tmp_path):
    with pytest.raises(RequestError, match=f"log_info names '{key}'.*height"):
        ppo.train(short(tmp_path, num_envs=1, log_info=(key,)), env=Succeeds())


def test_evaluation_gives_the_success_rate(tmp_path):
    config = short(tmp_path, env=f"{HERE}:Succeeds", num_evaluation_envs=1, exact_resume=False)
    assert evaluate(load(ppo.train(config).path), config, num_episodes=4).success_rate == 0.5


class SucceedsOnly(Succeeds):
    """Says nothing of the episodes in which it fails."""

    def info(self, action):
        return {"is_success": True} if self.t == 10 and self.number % 2 else {}


def test_episodes_that_say_nothing_of_success_count_as_failures(tmp_path, capsys):
    config = short(
        tmp_path, env=f"{HERE}:SucceedsOnly", num_envs=1, steps=40, num_evaluation_envs=1, exact_resume=False
    )
    run = ppo.train(config)
    evaluation = evaluate(load(run.path), config, num_episodes=4)

    assert (evaluation.success_rate, evaluation.num_success_reports) == (0.5, 2)
    assert main(["evaluate", str(run.path), "--episodes", "4"]) == 0
    assert "success rate 0.50 (2 episodes say nothing of it and count as failures)" in capsys.readouterr().out
    assert run.metrics[-1]["success_rate"] == 0.5
    assert len(events(run, "success_unknown")) == 1
