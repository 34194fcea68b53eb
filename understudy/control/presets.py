"""Settings shipped as data: tuned ones for well-known environments, and each peer library's defaults."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.resources import files
from typing import Any, TypeVar

from gymnasium import spaces

from understudy.control.config import Config
from understudy.control.envs import make as environment
from understudy.run.config import RequestError, parse_fields

PEERS = ("cleanrl", "sb3", "rsl_rl")
Recipe = TypeVar("Recipe", bound=Config)


def preset(config_class: type[Recipe], env: str, preset: str = "tuned", **fields: Any) -> Recipe:
    """A recipe's config for an environment: the preset's settings, then the fields given.

    Args:
        config_class: a recipe's Config, `control.ppo.Config` say.
        preset: "tuned" (this env's own; the recipe's defaults where none ships), "none", "cleanrl", "sb3" or "rsl_rl".
    """
    field_values: dict[str, Any] = settings(config_class, env, preset) | {"env": env} | fields
    return config_class(**field_values)


def settings(config_class: type[Config], env: str, preset: str) -> dict[str, Any]:
    """The fields a preset sets, `preset` itself among them."""
    data = json.loads((files("understudy.control") / "presets.json").read_text())
    recipe = config_class.__module__.rpartition(".")[2].replace("_", "-")
    if preset == "none":
        values: dict[str, Any] = {}
    elif preset == "tuned":
        values = data["environments"].get(env.rpartition(":")[2], {}).get(recipe, {})
        preset = preset if values else "none"
    elif preset in PEERS:
        by_space = data["peers"][preset].get(recipe)
        if by_space is None:
            raise RequestError(f"preset is {preset!r}, which has no settings for {recipe}: use preset none")
        values = by_space["continuous" if _has_continuous_actions(env) else "discrete"]
    else:
        raise RequestError(f"preset is {preset!r}: must be one of tuned, none, {', '.join(PEERS)}")
    return parse_fields(config_class, values, f"preset {preset}") | {"preset": preset}


def refuse_fields_without_effect(cfg: Config, without_effect: dict[str, str]) -> None:
    """Refuse a field without effect that has a value of the user's: neither its default nor the preset's.

    Args:
        without_effect: the fields without effect, and why.
    """
    defaults = {field.name: field.default for field in fields(cfg)}
    for name, reason in without_effect.items():
        value, default = getattr(cfg, name), defaults[name]
        if value != default and value != settings(type(cfg), cfg.env, cfg.preset).get(name):
            raise RequestError(f"{name} is {value!r}, but {reason}, so it has no effect: leave it at {default!r}")


def tuned_presets() -> list[tuple[str, str]]:
    """Every (environment, recipe) with tuned settings."""
    data = json.loads((files("understudy.control") / "presets.json").read_text())
    return [(env, recipe) for env, recipes in data["environments"].items() for recipe in recipes]


def _has_continuous_actions(env: str) -> bool:
    instance = environment.make_factory(env)()
    try:
        return isinstance(instance.action_space, spaces.Box)
    finally:
        instance.close()
