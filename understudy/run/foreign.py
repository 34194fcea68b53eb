"""Arguments in a run's config that could write files, take memory or hang: allowed only in a run of the user's own.

A run may be anybody's. `trust.py` decides whose code is imported; this file bounds what known code is asked to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

REAL = 1e9
"""Largest number where its size costs nothing."""
WORD = None
"""In place of a largest number: the argument is a word."""
WRAPPERS: dict[str, dict[str, float | None]] = {
    "AddWhiteNoise": {"probability_of_noise_per_pixel": 1, "is_noise_grayscale": 1},
    "AtariPreprocessing": {
        "noop_max": 100,
        "frame_skip": 100,
        "screen_size": 512,
        "terminal_on_life_loss": 1,
        "grayscale_obs": 1,
        "grayscale_newaxis": 1,
        "scale_obs": 1,
    },
    "Autoreset": {},
    "ClipAction": {},
    "ClipReward": {"min_reward": REAL, "max_reward": REAL},
    "DelayObservation": {"delay": 64},
    "DiscretizeAction": {"bins": 100, "multidiscrete": 1},
    "DiscretizeObservation": {"bins": 100, "multidiscrete": 1},
    "FilterObservation": {"filter_keys": WORD},
    "FlattenObservation": {},
    "FrameStackObservation": {"stack_size": 16, "padding_type": WORD},
    "GrayscaleObservation": {"keep_dim": 1},
    "MaxAndSkipObservation": {"skip": 100},
    "NormalizeObservation": {"epsilon": 1},
    "NormalizeReward": {"gamma": 1, "epsilon": 1},
    "OrderEnforcing": {"disable_render_order_enforcing": 1},
    "PassiveEnvChecker": {},
    "RecordEpisodeStatistics": {"buffer_length": 10_000, "stats_key": WORD},
    "RepeatAction": {"num_repeats": 100},
    "RescaleAction": {"min_action": REAL, "max_action": REAL},
    "RescaleObservation": {"min_obs": REAL, "max_obs": REAL},
    "ResizeObservation": {"shape": 512},
    "StickyAction": {"repeat_action_probability": 1, "repeat_action_duration": 100},
    "TimeAwareObservation": {"flatten": 1, "normalize_time": 1, "dict_time_key": WORD},
    "TimeLimit": {"max_episode_steps": 1_000_000},
}
"""Gymnasium's wrappers that open no file and no window, their arguments, and the largest magnitude of each."""
PACKAGED = 1000
"""Largest number in an argument of an installed package's wrapper, which takes nothing but numbers."""
LARGEST = {
    "num_envs": 65_536,
    "threads": 1024,
    "rollout": 1_000_000,
    "evaluate_episodes": 1_000_000,
    "evaluate_rows": 1_000_000,
    "memory_size": 65_536,
    "rows": 65_536,
    "slots": 65_536,
    "max_new": 131_072,
    "max_length": 4_194_304,
    "group": 65_536,
    "lora": 65_536,
}
"""Fields whose size is paid for in memory."""
OPTION, OPTIONS, EPISODE = 10_000, 10_000, 1_000_000
"""Largest number in env_options, most entries of it, and longest episode."""


class Unusual(NamedTuple):
    """What only the user's own run may ask for: a field, its value as text, and the reason."""

    field: str
    text: str
    why: str
    fix: str = "name it yourself with --{}"


def unusual(fields: dict[str, Any]) -> Iterator[Unusual]:
    """Everything in a config that anybody's run may not ask for."""
    wrappers = fields.get("wrappers") or ()
    texts = [str(text) for text in ((wrappers,) if isinstance(wrappers, str) else wrappers)]
    names = [text.split()[0] for text in texts if text.split()]
    for text in texts:
        if why := _wrapper(text, names):
            yield Unusual("wrappers", text, why)
    if why := _options(fields.get("env_options") or {}):
        yield Unusual("env_options", json.dumps(fields["env_options"], sort_keys=True, default=str), why)
    for name, most in LARGEST.items():
        if not _fits(fields.get(name), most):
            yield Unusual(name, str(fields[name]), f"which is more than {most:,}", "lower it in config.json")
    for name in ("reward", "gold"):
        given = fields.get(name) or ()
        for text in (given,) if isinstance(given, str) else given:
            if str(text).startswith("regex:"):
                yield Unusual(name, str(text), "a pattern that may take for ever")


def _wrapper(text: str, names: list[str]) -> str:
    """What is unusual about a wrapper, as the end of a sentence; empty where nothing is."""
    name, *pairs = text.split() or [""]
    known = WRAPPERS.get(name)
    if known is None and ":" not in name:
        return "which is not among the wrappers that open no file and no window"
    if names.count(name) > 1:
        return "which is there more than once"
    if name.startswith("gymnasium.") or len(text) > 1000:
        return "whose arguments are not checked"
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            given = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            given = object()
        if known is None and not _fits(given, PACKAGED):
            return f"whose argument {pair!r} is no number up to {PACKAGED}"
        if known is not None and not (key in known and _fits(given, known[key])):
            return f"whose argument {pair!r} is none of {_listed(known)}"
    return ""


def _listed(known: dict[str, float | None]) -> str:
    return (
        ", ".join(key if most is WORD else f"{key} (up to {most:g})" for key, most in known.items()) or "those it takes"
    )


def _options(options: Any) -> str:
    """What is unusual about an environment's keyword arguments; empty where nothing is."""
    left, waiting = OPTIONS, [("", options, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > 8:
            return f"which has more than {OPTIONS:,} entries, or is more than 8 deep"
        if isinstance(value, dict):
            waiting += [(str(name), part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, part, depth + 1) for part in value]
        elif isinstance(value, str):
            if len(value) > 256 or re.search(r"[/\\~]", value):
                return f"whose {key!r} may be the path of a file"
        elif not _fits(value, EPISODE if key == "max_episode_steps" else OPTION):
            return f"whose {key!r} is more than {OPTION:,}"
    return ""


def _fits(value: Any, most: float | None) -> bool:
    """Whether a value, or each of a list, is a number of at most this magnitude, or a word where that is what is wanted."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, list):
        return len(value) <= 64 and all(not isinstance(part, list) and _fits(part, most) for part in value)
    if most is None:
        return isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value) is not None
    return isinstance(value, int | float) and abs(value) <= most
