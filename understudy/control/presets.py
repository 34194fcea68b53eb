"""Settings shipped as data: tuned ones for well-known environments, and each peer library's defaults."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.resources import files
from typing import Any, TypeVar

from gymnasium import spaces

from understudy.control import environment
from understudy.control.config import Config
from understudy.run.config import RequestError, fields_of

PEERS = ("cleanrl", "sb3", "rsl_rl")
Recipe = TypeVar("Recipe", bound=Config)


def preset(kind: type[Recipe], env: str, preset: str = "tuned", **fields: Any) -> Recipe:
    """A recipe's config for an environment: the preset's settings, then the fields given.

    Args:
        kind: a recipe's Config, `control.ppo.Config` say.
        preset: "tuned" (this env's own; the recipe's defaults where none ships), "none", "cleanrl", "sb3" or "rsl_rl".
    """
    chosen: dict[str, Any] = settings(kind, env, preset) | {"env": env} | fields
    return kind(**chosen)


def settings(kind: type[Config], env: str, preset: str) -> dict[str, Any]:
    """The fields a preset sets, `preset` itself among them."""
    data = json.loads((files("understudy.control") / "presets.json").read_text())
    recipe = kind.__module__.rpartition(".")[2].replace("_", "-")
    if preset == "none":
        found: dict[str, Any] = {}
    elif preset == "tuned":
        found = data["environments"].get(env.rpartition(":")[2], {}).get(recipe, {})
        preset = preset if found else "none"
    elif preset in PEERS:
        by_space = data["peers"][preset].get(recipe)
        if by_space is None:
            raise RequestError(f"preset is {preset!r}, which has no settings for {recipe}: use preset none")
        found = by_space["continuous" if _continuous(env) else "discrete"]
    else:
        raise RequestError(f"preset is {preset!r}: must be one of tuned, none, {', '.join(PEERS)}")
    return fields_of(kind, found, f"preset {preset}") | {"preset": preset}


def refuse_idle(cfg: Config, idle: dict[str, str]) -> None:
    """Refuse a field without effect that has a value of the user's: neither its default nor the preset's.

    Args:
        idle: the fields without effect, and why.
    """
    defaults = {known.name: known.default for known in fields(cfg)}
    for name, why in idle.items():
        value, default = getattr(cfg, name), defaults[name]
        if value != default and value != settings(type(cfg), cfg.env, cfg.preset).get(name):
            raise RequestError(f"{name} is {value!r}, but {why}, so it has no effect: leave it at {default!r}")


def known() -> list[tuple[str, str]]:
    """Every (environment, recipe) with tuned settings."""
    data = json.loads((files("understudy.control") / "presets.json").read_text())
    return [(env, recipe) for env, recipes in data["environments"].items() for recipe in recipes]


def _continuous(env: str) -> bool:
    made = environment.single(env)()
    try:
        return isinstance(made.action_space, spaces.Box)
    finally:
        made.close()
