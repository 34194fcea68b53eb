"""The help page of a recipe: every field with its line and default, in groups, and what a newcomer asks next."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import shutil
import textwrap
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

GROUPS = {  # the first group with a pattern that fits a field's name; one that fits none belongs to optimisation
    "environment": "env env_* wrappers vectorization step_timeout num_envs",
    "model": (
        "model init_* hidden activation shared rnn_* orthogonal squash log_std scalar_std "
        "critic critic_layers critic_init dtype lora* train_layers reference reference_mode trust_remote_code"
    ),
    "data": (
        "data data_* evaluation_data columns unconditional held_out chat_template add_bos stop max_length too_long "
        "packing train_on pretraining"
    ),
    "sampling": (
        "num_steps_per_env episodes exploration noise_hold completions_per_iteration max_new_tokens fixed_length "
        "temperature max_num_seqs group_size dynamic_sampling_rounds keep_special_tokens reply max_turns"
    ),
    "reward": (
        "reward reward_* gold gamma normalize_reward truncation truncation_penalty missing_eos_penalty whiten_rewards "
        "constraint* kl_reference* overlong*"
    ),
    "optimisation": "",
    "run, evaluation and logging": (
        "steps total_tokens seed output_dir preset device num_threads log log_* checkpoint_every "
        "keep_checkpoints evaluate* evaluation* log_samples stop_at_return fail_if_worse video preflight quiet"
    ),
}

SHORT_FLAGS = {"--out": "--output-dir"}
"""A short way to write a flag."""


def show_help(
    config_class: Any, defaults: dict[str, Any], *, prog: str, usage: str, epilog: str, note: str = ""
) -> None:
    """Print a recipe's help and exit.

    Args:
        defaults: values other than the config's own, such as those of a preset; `note` says whose they are.
        usage: what a command needs at least.
        epilog: paragraphs below the flags, printed as they are.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} {usage} [FLAG ...]",
        description=f"{inspect.getdoc(config_class)} {note}".strip(),
        epilog=epilog,
        add_help=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width),
    )
    parser.add_argument_group("from a file").add_argument(
        "--config", metavar="FILE", help="YAML file that sets any of the fields below; flags go over it"
    )
    docs, hints = field_docs(config_class), get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for group in GROUPS:
        names = [name for name in fields if group_of(name) == group]
        section = parser.add_argument_group(group) if names else parser
        for name in names:
            default = defaults.get(name, _default(fields[name]))
            text = (
                docs[name] if default is dataclasses.MISSING else f"{docs[name]} (default: {_format_default(default)})"
            )
            _add_flag(section, name, hints[name], text.replace("%", "%%"))
    print(parser.format_help(), end="")
    raise SystemExit(0)


def group_of(name: str) -> str:
    """The group that a field's help is printed in."""
    matching = (
        group for group, patterns in GROUPS.items() if any(fnmatch(name, pattern) for pattern in patterns.split())
    )
    return next(matching, "optimisation")


def field_docs(config_class: Any) -> dict[str, str]:
    """The docstring beneath each field of a dataclass and of those it extends, on one line."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for line, docstring in zip(body.body, body.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(docstring, ast.Expr):
                docs[ast.unparse(line.target)] = " ".join(ast.literal_eval(docstring.value).split())
    return docs


def _add_flag(section: Any, name: str, hint: Any, text: str) -> None:
    """One flag with its line of help."""
    flag = "--" + name.replace("_", "-")
    short_flags = [short for short, long in SHORT_FLAGS.items() if long == flag]
    if hint is bool:
        section.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    options = {"nargs": "*"} if get_origin(hint) is tuple else {}
    if options or type(None) in get_args(hint):
        hint = get_args(hint)[0]
    metavar = {int: "INT", float: "FLOAT", str: "TEXT"}.get(hint, "JSON")
    if get_origin(hint) is Literal:
        metavar = "{" + ",".join(map(str, get_args(hint))) + "}"
    section.add_argument(*short_flags, flag, metavar=metavar, help=text, **options)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _format_default(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
