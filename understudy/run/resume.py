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
from understudy.run.config import RequestError, parse_fields, to_dict
from understudy.run.paths import absolute_path
from understudy.run.store import ResumePoint, Run, read_config
from understudy.run.trust import require_trusted_code

RECIPES = {
    "control": ("reinforce", "actor-critic", "ppo"),
    "language": ("sft", "reward-model", "reinforce", "ppo", "grpo", "dpo"),
}
ROLLOUTS = RECIPES["language"][2:5]
"""Recipes of language whose runs end better or worse than they began."""
IN_MEMORY_FIELDS = {"data", "evaluation_data", "pretraining"}  # fields of which a run may hold the rows itself

START_FLAG = {"control": "--init-from", "language": "--model"}
"""The flag by which a new run begins from another's policy."""
OPTIMIZER_FLAG_HINT = {"control": "; --init-optimizer keeps the optimizer's moments", "language": ""}
"""How it may begin with the optimizer's state, too."""
LENGTH_FIELD = {"control": "steps", "language": "total_tokens"}
"""The field that says how long a run is."""
OVERRIDABLE_FIELDS = {
    "device",
    "env_options",
    "wrappers",
    "reward",
    "gold",
    "reply",
    "trust_remote_code",
    *IN_MEMORY_FIELDS,
}
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
    **overrides: Any,
) -> Run:
    """Train a run on to its end. One that was interrupted anywhere ends with the bytes of one that was not (CPU, float32).

    Args:
        run: its directory.
        checkpoint: the name of one under RUN/checkpoints, and no other; by default the newest that is whole, or the
            beginning where there is none.
        steps: a new total of environment steps or tokens, for a run that is to go on further; schedules then follow it.
        env, evaluation_env, policy: control, a user's own objects or functions, where the run began with them; or, as env,
            the id of its environment; or, as policy, FILE.py:NAME or module:NAME of the network or of what makes it.
        engine: language, who samples, where the run began with one.
        overrides: fields of the config that may name code of the user's: env_options, wrappers, reward, gold, reply,
            trust_remote_code (another value than the run's is said, and written to its config.json); or rows it began
            with: data, pretraining; or device, where the run's own is not here: on another one the run goes on, but not
            to the same bytes.

    Raises:
        RequestError: no run there; it is open in another process; it names code that is not the user's to trust.
    """
    path = absolute_path(run)
    world, name, fields = read_run_config(path)
    recipe = importlib.import_module(f"understudy.{world}.{name.replace('-', '_')}")
    for field in overrides:
        if field not in OVERRIDABLE_FIELDS:
            raise unchangeable_field_error(field, world, run)
    if isinstance(policy, str):
        policy = importlib.import_module("understudy.control.own_network").named_network(policy)
    named_overrides = overrides | ({"env": env} if isinstance(env, str) else {})
    objects_given = (("env", env), ("evaluation_env", evaluation_env), ("policy", policy), ("engine", engine))
    ways = (("env", "an environment object", "my_env.py:MyEnv"), ("policy", "a network of your own", "my_net.py:MyNet"))
    for key, description, example in ways:
        if read_config(path).get(f"own_{key}") and dict(objects_given)[key] is None:
            raise RequestError(
                f"run is '{path}', which began with {description}: resume it in Python, understudy.resume({str(path)!r}, "
                f"{key}=...), or with --{key} {example}"
            )
    objects = {key: x for key, x in objects_given if x is not None and not isinstance(x, str)}
    env_override = {"env"} if env is not None else set()
    for code in require_trusted_code(path, fields, overridden={*named_overrides, *env_override}):
        importlib.import_module("understudy.control.envs.make").check_env_or_wrapper(code.field, code.name)
    config = rebuild_config(recipe.Config, fields | named_overrides | {"output_dir": str(path)})
    for name in IN_MEMORY_FIELDS & named_overrides.keys():
        if str(getattr(config, name)) != str(fields.get(name)):
            raise RequestError(
                f"{name} is {str(getattr(config, name))!r}, and the run began with {str(fields.get(name))!r}: give those"
            )
    length_field = LENGTH_FIELD[world]
    length = getattr(config, length_field)
    if steps is not None and steps < length:
        raise RequestError(f"steps is {steps}: must be {length} or more, what the run has")
    reopened, checkpoint_path = Run.reopen(path, checkpoint)
    try:
        event_fields: dict[str, Any] = {"checkpoint": None if checkpoint_path is None else checkpoint_path.name}
        if config.device != fields.get("device", config.device):
            event_fields |= {"device": {"from": fields["device"], "to": config.device}}
            message = f"understudy: the run was on {fields['device']} and goes on on {config.device}"
            print(f"{message}: resume is exact only on the same device", file=sys.stderr)
        if torch.device(config.device).type != "cpu":
            reopened.changed.append("device")  # exact on none but the CPU
        if checkpoint is not None:
            reopened.changed.append("checkpoint")  # what came after it may have been of fewer steps
        lineage.settle_config_digest(path, fields)
        other = _changed_fields(config, named_overrides.keys() - {"device"}, fields)
        if other:
            event_fields |= {"replaced": other}
            reopened.changed += other
        now = fields | {field: change["to"] for field, change in other.items()}
        if steps is not None and steps != length:
            event_fields |= {"extended": {"from": length, "to": steps}}
            reopened.changed.append("steps")
            config = dataclasses.replace(config, **{length_field: steps})
            now |= {length_field: steps}

        def accepted() -> None:
            for field, change in other.items():
                was, to = change["from"], change["to"]
                print(
                    f"understudy: {field} was {was!r} and is {to!r} from here on, as config.json says", file=sys.stderr
                )
            if now != fields:
                lineage.rewrite_config(path, read_config(path), now)

        return recipe.train(config, resume=ResumePoint(reopened, checkpoint_path, event_fields, accepted), **objects)
    finally:
        reopened.close()


def _changed_fields(config: Any, named: Iterable[str], fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Which of the fields that were named anew are not what the run's config.json holds: from what to what."""
    now = json.loads(json.dumps(to_dict(config), default=str))
    found = {name: {"from": fields.get(name), "to": now[name]} for name in sorted(named)}
    return {
        name: change
        for name, change in found.items()
        if _with_absolute_paths(change["from"]) != _with_absolute_paths(change["to"])
    }


def _with_absolute_paths(value: Any) -> Any:
    """A value with the paths of its code absolute."""
    if isinstance(value, list):
        return [_with_absolute_paths(part) for part in value]
    file, code, name = value.partition(".py:") if isinstance(value, str) else (value, "", "")
    return f"{absolute_path(file)}{code}{name}" if code else value


def unchangeable_field_error(field: str, world: str, run: Any) -> RequestError:
    """The refusal of another setting for a run that goes on, with the way to begin a new one from its policy."""
    return RequestError(
        f"{field} cannot change in a run that goes on: begin a new run from its policy with {START_FLAG[world]} "
        f"{run} and the "
        f"new {field}{OPTIMIZER_FLAG_HINT[world]}"
    )


def read_run_config(path: Path) -> tuple[str, str, dict[str, Any]]:
    """A run's world, recipe and the fields of its config.

    Raises:
        RequestError: config.json is none of ours.
    """
    document = read_config(path)
    world, _, name = str(document.get("recipe", "")).partition(" ")
    fields = document.get("config")
    if name not in RECIPES.get(world, ()) or not isinstance(fields, dict):
        raise RequestError(
            f"run is '{path}', whose config.json names no recipe of this version: give the directory of a run"
        )
    if world == "language":
        data = importlib.import_module("understudy.language.data.files")
        for role in IN_MEMORY_FIELDS & fields.keys():
            if data.IN_MEMORY_DESCRIPTION.fullmatch(str(fields[role])) and (file := path / f"{role}.jsonl").is_file():
                fields[role] = data.Table.restore(fields[role], file)
    return world, name, fields


def rebuild_config(config_class: Any, fields: dict[str, Any]) -> Any:
    """The config that a run's config.json describes.

    Raises:
        RequestError: it lacks a field, or has one or a value that the recipe does not know.
    """
    try:
        return config_class(**parse_fields(config_class, fields, "config.json"))
    except (TypeError, AttributeError) as error:
        raise RequestError(
            f"config.json does not describe a {config_class.__module__} run ({error}): give another"
        ) from error
