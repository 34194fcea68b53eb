"""Go on with a run where it stopped: `understudy.resume(RUN)`, for every recipe of both worlds."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from understudy.run import lineage
from understudy.run.config import RequestError, fields_of, to_json
from understudy.run.paths import absolute
from understudy.run.store import Resume, Run, read_config
from understudy.run.trust import permit

RECIPES = {
    "control": ("reinforce", "actor-critic", "ppo"),
    "language": ("sft", "reward-model", "reinforce", "ppo", "grpo", "dpo"),
}
ROLLOUTS = RECIPES["language"][2:5]
"""Recipes of language whose runs end better or worse than they began."""
KEPT_ROWS = {"data", "evaluation_data", "pretraining"}  # fields of which a run may hold the rows itself

START = {"control": "--init", "language": "--model"}
"""The flag by which a new run begins from another's policy."""
MOMENTS = {"control": "; --init-optimizer keeps the optimizer's moments", "language": ""}
"""How it may begin with the optimizer's state, too."""
OWN = {"device", "env_options", "wrappers", "reward", "gold", "reply", "trust_remote_code", *KEPT_ROWS}
"""Fields of a run that `resume` takes anew, besides `steps` and `env`: they may name code or a device, or hold the rows."""


def resume(
    run: Any,
    *,
    checkpoint: str | None = None,
    steps: int | None = None,
    env: Any = None,
    evaluation_env: Any = None,
    policy: Any = None,
    engine: Any = None,
    **own: Any,
) -> Run:
    """Train a run on to its end. One that was interrupted anywhere ends with the bytes of one that was not (CPU, float32).

    Args:
        run: its directory.
        checkpoint: the name of one under RUN/checkpoints, and no other; by default the newest that is whole, or the
            beginning where there is none.
        steps: a new total, for a run that is to go on further; schedules then follow it.
        env, evaluation_env, policy: control, a user's own objects or functions, where the run began with them; or, as env,
            the id of its environment; or, as policy, FILE.py:NAME or module:NAME of the network or of what makes it.
        engine: language, who samples, where the run began with one.
        own: fields of the config that may name code of the user's: env_options, wrappers, reward, gold, reply,
            trust_remote_code (another value than the run's is said, and written to its config.json); or rows it began
            with: data, pretraining; or device, where the run's own is not here: on another one the run goes on, but not
            to the same bytes.

    Raises:
        RequestError: no run there; it is open in another process; it names code that is not the user's to trust.
    """
    path = absolute(run)
    world, name, fields = described(path)
    recipe = importlib.import_module(f"understudy.{world}.{name.replace('-', '_')}")
    for field in own:
        if field not in OWN:
            raise unchangeable(field, world, run)
    if isinstance(policy, str):
        policy = importlib.import_module("understudy.control.own_network").named_network(policy)
    named = own | ({"env": env} if isinstance(env, str) else {})
    given = (("env", env), ("evaluation_env", evaluation_env), ("policy", policy), ("engine", engine))
    ways = (("env", "an environment object", "my_env.py:MyEnv"), ("policy", "a network of your own", "my_net.py:MyNet"))
    for key, what, example in ways:
        if read_config(path).get(f"own_{key}") and dict(given)[key] is None:
            raise RequestError(
                f"run is '{path}', which began with {what}: resume it in Python, understudy.resume({str(path)!r}, "
                f"{key}=...), or with --{key} {example}"
            )
    objects = {key: x for key, x in given if x is not None and not isinstance(x, str)}
    objects_too = {"env"} if env is not None else set()
    for code in permit(path, fields, given={*named, *objects_too}):
        importlib.import_module("understudy.control.environment").check_kind(code.field, code.name)
    config = rebuilt(recipe.Config, fields | named | {"out": str(path)})
    for name in KEPT_ROWS & named.keys():
        if str(getattr(config, name)) != str(fields.get(name)):
            raise RequestError(
                f"{name} is {str(getattr(config, name))!r}, and the run began with {str(fields.get(name))!r}: give those"
            )
    if steps is not None and steps < config.steps:
        raise RequestError(f"steps is {steps}: must be {config.steps} or more, what the run has")
    opened, found = Run.reopen(path, checkpoint)
    try:
        about: dict[str, Any] = {"checkpoint": None if found is None else found.name}
        if config.device != fields.get("device", config.device):
            about |= {"device": {"from": fields["device"], "to": config.device}}
            moved = f"understudy: the run was on {fields['device']} and goes on on {config.device}"
            print(f"{moved}: resume is exact only on the same device", file=sys.stderr)
        if torch.device(config.device).type != "cpu":
            opened.changed.append("device")  # exact on none but the CPU
        if checkpoint is not None:
            opened.changed.append("checkpoint")  # what came after it may have been of fewer steps
        lineage.settle_config(path, fields)
        other = _replaced(config, named.keys() - {"device"}, fields)
        if other:
            about |= {"replaced": other}
            opened.changed += other
        now = fields | {field: change["to"] for field, change in other.items()}
        if steps is not None and steps != config.steps:
            about |= {"extended": {"from": config.steps, "to": steps}}
            opened.changed.append("steps")
            config = dataclasses.replace(config, steps=steps)
            now |= {"steps": steps}

        def accepted() -> None:
            for field, change in other.items():
                was, to = change["from"], change["to"]
                print(
                    f"understudy: {field} was {was!r} and is {to!r} from here on, as config.json says", file=sys.stderr
                )
            if now != fields:
                lineage.extend(path, read_config(path), now)

        return recipe.train(config, resume=Resume(opened, found, about, accepted), **objects)
    finally:
        opened.close()


def _replaced(config: Any, named: Iterable[str], fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Which of the fields that were named anew are not what the run's config.json holds: from what to what."""
    now = json.loads(json.dumps(to_json(config), default=str))
    found = {name: {"from": fields.get(name), "to": now[name]} for name in sorted(named)}
    return {name: change for name, change in found.items() if _placed(change["from"]) != _placed(change["to"])}


def _placed(value: Any) -> Any:
    """A value with the paths of its code absolute."""
    if isinstance(value, list):
        return [_placed(part) for part in value]
    file, code, name = value.partition(".py:") if isinstance(value, str) else (value, "", "")
    return f"{absolute(file)}{code}{name}" if code else value


def unchangeable(field: str, world: str, run: Any) -> RequestError:
    """The refusal of another setting for a run that goes on, with the way to begin a new one from its policy."""
    return RequestError(
        f"{field} cannot change in a run that goes on: begin a new run from its policy with {START[world]} {run} and the "
        f"new {field}{MOMENTS[world]}"
    )


def described(path: Path) -> tuple[str, str, dict[str, Any]]:
    """A run's world, recipe and the fields of its config.

    Raises:
        RequestError: config.json is none of ours.
    """
    about = read_config(path)
    world, _, name = str(about.get("recipe", "")).partition(" ")
    fields = about.get("config")
    if name not in RECIPES.get(world, ()) or not isinstance(fields, dict):
        raise RequestError(
            f"run is '{path}', whose config.json names no recipe of this version: give the directory of a run"
        )
    if world == "language":
        data = importlib.import_module("understudy.language.data")
        for role in KEPT_ROWS & fields.keys():
            if data.IN_MEMORY.fullmatch(str(fields[role])) and (file := path / f"{role}.jsonl").is_file():
                fields[role] = data.Table.restored(fields[role], file)
    return world, name, fields


def rebuilt(kind: Any, fields: dict[str, Any]) -> Any:
    """The config that a run's config.json describes.

    Raises:
        RequestError: it lacks a field, or has one or a value that the recipe does not know.
    """
    try:
        return kind(**fields_of(kind, fields, "config.json"))
    except (TypeError, AttributeError) as error:
        raise RequestError(f"config.json does not describe a {kind.__module__} run ({error}): give another") from error
