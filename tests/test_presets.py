"""Every preset runs: two iterations of its own settings, as they ship."""

import importlib.util
import itertools

import pytest

from understudy.control import actor_critic, ppo, presets, reinforce
from understudy.run.config import RequestError, parse_fields

RECIPES = {"ppo": ppo, "actor-critic": actor_critic, "reinforce": reinforce}
NEEDS = {"LunarLander": "Box2D", "BipedalWalker": "Box2D"}
MUJOCO = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "Swimmer", "Reacher", "Inverted", "Pusher")
PEERS = [
    (peer, env, recipe)
    for peer in presets.PEERS
    for env in ("CartPole-v1", "Pendulum-v1")
    for recipe in ("ppo", "actor-critic")
    if recipe == "ppo" or peer == "sb3"
]


def uncompiled(recipe, env=None):
    """All presets but one run without the compiler, which takes longer than the rest and has tests of its own."""
    return {"compile": "off"} if recipe == "ppo" and env != "HalfCheetah-v5" else {}


def two_iterations(recipe, config):
    lines = list(itertools.islice(recipe.iterate(config), 2))
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(line["loss"] == line["loss"] for line in lines)


@pytest.mark.parametrize(("env", "recipe"), presets.tuned_presets())
def test_a_tuned_preset_runs_two_iterations(env, recipe, tmp_path):
    package = "mujoco" if env.startswith(MUJOCO) else NEEDS.get(env.split("-")[0])
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    given = uncompiled(recipe, env)
    made = presets.preset(
        RECIPES[recipe].Config, env, quiet=True, log_every=1, output_dir=str(tmp_path / "run"), **given
    )

    assert made.preset == "tuned"
    two_iterations(RECIPES[recipe], made)


@pytest.mark.parametrize(("peer", "env", "recipe"), PEERS)
def test_a_peers_preset_runs_two_iterations(peer, env, recipe, tmp_path):
    kind, given = RECIPES[recipe].Config, uncompiled(recipe)
    two_iterations(
        RECIPES[recipe], presets.preset(kind, env, peer, quiet=True, output_dir=str(tmp_path / "run"), **given)
    )


def test_the_well_known_environments_have_tuned_settings():
    classic = {"CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"}
    box2d = {"LunarLander-v3", "BipedalWalker-v3"}
    mujoco = {f"{name}-v5" for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "Swimmer", "Reacher")}

    assert classic | box2d | mujoco <= {env for env, recipe in presets.tuned_presets() if recipe == "ppo"}


def test_fields_given_win_over_the_preset():
    made = presets.preset(ppo.Config, "CartPole-v1", gamma=0.5)

    assert (made.gamma, made.lam) == (0.5, 0.95)


def test_an_env_without_tuned_settings_gets_the_recipes_defaults_and_says_so():
    made = presets.preset(ppo.Config, "Taxi-v3")

    assert made == ppo.Config(env="Taxi-v3")
    assert made.preset == "none"


def test_a_preset_that_names_no_field_is_refused_with_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'gamma'"):
        parse_fields(ppo.Config, {"gama": 0.9}, "preset x")
