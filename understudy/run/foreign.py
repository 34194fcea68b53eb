"""Arguments in a run's config that could write files, take memory or hang: allowed only in a run of the user's own.

A run may be anybody's. `trust.py` decides whose code is imported; this file bounds what known code is asked to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

MAX_REAL = 1e9
"""Largest number where its size costs nothing."""
WORD = None
"""In place of a largest number: the argument is a word."""
SAFE_WRAPPERS: dict[str, dict[str, float | None]] = {
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
    "ClipReward": {"min_reward": MAX_REAL, "max_reward": MAX_REAL},
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
    "RescaleAction": {"min_action": MAX_REAL, "max_action": MAX_REAL},
    "RescaleObservation": {"min_obs": MAX_REAL, "max_obs": MAX_REAL},
    "ResizeObservation": {"shape": 512},
    "StickyAction": {"repeat_action_probability": 1, "repeat_action_duration": 100},
    "TimeAwareObservation": {"flatten": 1, "normalize_time": 1, "dict_time_key": WORD},
    "TimeLimit": {"max_episode_steps": 1_000_000},
}
"""Gymnasium's wrappers that open no file and no window, their arguments, and the largest magnitude of each."""
MAX_PACKAGED_NUMBER = 1000
"""Largest number in an argument of an installed package's wrapper, which takes nothing but numbers."""
MAX_SIZES = {
    "num_envs": 65_536,
    "num_threads": 1024,
    "num_steps_per_env": 1_000_000,
    "evaluate_episodes": 1_000_000,
    "evaluate_rows": 1_000_000,
    "rnn_hidden_size": 65_536,
    "completions_per_iteration": 65_536,
    "max_num_seqs": 65_536,
    "max_new_tokens": 131_072,
    "max_length": 4_194_304,
    "group_size": 65_536,
    "lora_rank": 65_536,
}
"""Fields whose size is paid for in memory."""
MAX_OPTION_NUMBER, MAX_OPTION_ENTRIES, MAX_EPISODE_STEPS = 10_000, 10_000, 1_000_000
"""Largest number in env_options, most entries of it, and longest episode."""


class RestrictedSetting(NamedTuple):
    """What only the user's own run may ask for: a field, its value as text, and the reason."""

    field: str
    text: str
    reason: str
    fix: str = "name it yourself with --{}"


def restricted_settings(fields: dict[str, Any]) -> Iterator[RestrictedSetting]:
    """Everything in a config that anybody's run may not ask for."""
    wrappers = fields.get("wrappers") or ()
    texts = [str(text) for text in ((wrappers,) if isinstance(wrappers, str) else wrappers)]
    names = [text.split()[0] for text in texts if text.split()]
    for text in texts:
        if reason := _describe_wrapper_problem(text, names):
            yield RestrictedSetting("wrappers", text, reason)
    if reason := _describe_option_problem(fields.get("env_options") or {}):
        yield RestrictedSetting("env_options", json.dumps(fields["env_options"], sort_keys=True, default=str), reason)
    for name, limit in MAX_SIZES.items():
        if not _is_within_limit(fields.get(name), limit):
            yield RestrictedSetting(name, str(fields[name]), f"which is more than {limit:,}", "lower it in config.json")
    for name in ("reward", "gold"):
        specs = fields.get(name) or ()
        for text in (specs,) if isinstance(specs, str) else specs:
            if str(text).startswith("regex:"):
                yield RestrictedSetting(name, str(text), "a pattern that may take for ever")


def _describe_wrapper_problem(text: str, names: list[str]) -> str:
    """What is unusual about a wrapper, as the end of a sentence; empty where nothing is."""
    name, *pairs = text.split() or [""]
    known = SAFE_WRAPPERS.get(name)
    if known is None and ":" not in name:
        return "which is not among the wrappers that open no file and no window"
    if names.count(name) > 1:
        return "which is there more than once"
    if name.startswith("gymnasium.") or len(text) > 1000:
        return "whose arguments are not checked"
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            argument = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            argument = object()
        if known is None and not _is_within_limit(argument, MAX_PACKAGED_NUMBER):
            return f"whose argument {pair!r} is no number up to {MAX_PACKAGED_NUMBER}"
        if known is not None and not (key in known and _is_within_limit(argument, known[key])):
            return f"whose argument {pair!r} is none of {_format_arguments(known)}"
    return ""


def _format_arguments(known: dict[str, float | None]) -> str:
    return (
        ", ".join(key if limit is WORD else f"{key} (up to {limit:g})" for key, limit in known.items())
        or "those it takes"
    )


def _describe_option_problem(options: Any) -> str:
    """What is unusual about an environment's keyword arguments; empty where nothing is."""
    budget, pending = MAX_OPTION_ENTRIES, [("", options, 0)]
    while pending:
        key, value, depth = pending.pop()
        budget -= 1
        if budget < 0 or depth > 8:
            return f"which has more than {MAX_OPTION_ENTRIES:,} entries, or is more than 8 deep"
        if isinstance(value, dict):
            pending += [(str(name), part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(key, part, depth + 1) for part in value]
        elif isinstance(value, str):
            if len(value) > 256 or re.search(r"[/\\~]", value):
                return f"whose {key!r} may be the path of a file"
        elif not _is_within_limit(value, MAX_EPISODE_STEPS if key == "max_episode_steps" else MAX_OPTION_NUMBER):
            return f"whose {key!r} is more than {MAX_OPTION_NUMBER:,}"
    return ""


def _is_within_limit(value: Any, limit: float | None) -> bool:
    """Whether a value, or each of a list, is a number of at most this magnitude, or a word where that is what is wanted."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, list):
        return len(value) <= 64 and all(not isinstance(part, list) and _is_within_limit(part, limit) for part in value)
    if limit is None:
        return isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value) is not None
    return isinstance(value, int | float) and abs(value) <= limit
