"""A config from the command line: flags over a file over defaults. Every refusal is a sentence."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import stat
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from understudy.cli.help import SHORT_FLAGS, field_docs
from understudy.cli.peers import own_name
from understudy.run.config import RequestError, did_you_mean, format_value

MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_VALUES = 100_000  # aliases in YAML repeat a value without repeating its text


def read_config_file(config_class: Any, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields that --config's YAML file sets, and the command line without that flag."""
    file, argv = take_flag(argv, "config")
    if file is None:
        return {}, argv
    fields = _read_yaml(file)
    names = [field.name for field in dataclasses.fields(config_class)]
    for name in fields:
        if str(name).replace("-", "_") not in names:
            hint = _known_elsewhere(config_class, str(name), "") or did_you_mean(str(name), names)
            raise RequestError(f"config is {file!r}, where {name!r} is no field of this recipe{hint}")
    hints = get_type_hints(config_class)
    fields = {str(name).replace("-", "_"): value for name, value in fields.items()}
    return {name: _convert_yaml(hints[name], value) for name, value in fields.items()}, argv


def parse_flags(config_class: Any, argv: list[str], *, prog: str) -> dict[str, Any]:
    """The fields that a command line sets. A flag of several values may stand several times: --log a --log b, --log a b."""
    hints = get_type_hints(config_class)
    flags = {"--" + name.replace("_", "-") for name in hints}
    switches = {f"--no-{name.replace('_', '-')}" for name, hint in hints.items() if hint is bool}
    fields: dict[str, Any] = {}
    for flag, words in _group_by_flag(argv, prog):
        flag = SHORT_FLAGS.get(flag, flag)
        if flag not in flags | switches:
            hint = _known_elsewhere(config_class, flag, "--") or did_you_mean(flag, flags | switches | {"--config"})
            raise RequestError(f"{flag} is not a flag of `{prog}`{hint}")
        name = flag[2:].replace("-", "_")
        if flag in switches:
            name = name.removeprefix("no_")
        if hints[name] is bool:
            _refuse_stray_words(words, prog)
            fields[name] = flag not in switches
        elif get_origin(hints[name]) is tuple:
            fields[name] = (
                *fields.get(name, ()),
                *(_parse_text(name, get_args(hints[name])[0], word) for word in words),
            )
        elif not words:
            raise RequestError(f"{flag} has no value: write one after it (`{prog} --help` lists the flags)")
        else:
            _refuse_stray_words(words[1:], prog)
            fields[name] = _parse_text(name, hints[name], words[0])
    return fields


def _known_elsewhere(kind: Any, name: str, mark: str) -> str:
    """The end of a refusal where other libraries call a field of ours so, with the field's line of help; else ""."""
    docs = field_docs(kind)
    own = own_name(name.removeprefix("--").replace("-", "_"), docs)
    if own is None:
        return ""
    return f": here it is {mark}{own.replace('_', '-') if mark else own}, {docs[own].rstrip('.')}"


def _group_by_flag(argv: list[str], prog: str) -> list[tuple[str, list[str]]]:
    """Each flag of a command line with the words that follow it; --flag=word is one of them."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag.replace("_", "-"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            _refuse_stray_words([word], prog)
    return groups


def _refuse_stray_words(words: list[str], prog: str) -> None:
    if words:
        raise RequestError(f"{words[0]!r} belongs to no flag: `{prog} --help` lists the flags")


def _parse_text(name: str, hint: Any, text: str) -> Any:
    """A word of the command line as a value of a field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if text.lower() == "none" else _parse_text(name, args[0], text)
    if origin is Literal:
        if text in args:
            return text
        raise RequestError(f"{name} is {text[:60]!r}: must be one of {', '.join(args)}{did_you_mean(text, args)}")
    if hint in (int, float):
        number = parse_number(hint, text)
        if number is None:
            raise RequestError(f"{name} is {text[:60]!r}: must be a {'whole ' if hint is int else ''}number")
        return number
    return parse_json_object(name, text) if origin is dict else text


def unescaped(text: str) -> str:
    """A word of the command line in which \\n, \\t and \\\\ stand for a line's end, a tab and a backslash; others stay."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """A word of the command line that must be a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is {text[:60]!r}, which is no JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{name} is {text[:60]!r}: must be a JSON object, as in '{{\"key\": 1}}'")
    return value


def parse_number(number_type: type, value: Any) -> Any:
    """Text or a number as an int or float, None where it is neither; a whole number may be written 1e5."""
    try:
        if number_type is float:
            return float(value)
        number = float(value)
        is_whole = math.isfinite(number) and number.is_integer()
        return (
            int(value) if "e" not in str(value).lower() and "." not in str(value) else int(number) if is_whole else None
        )
    except (TypeError, ValueError, OverflowError):
        return None


def whole_number(text: str) -> int:
    """An argparse type: a whole number, which may be written 1e5."""
    number = parse_number(int, text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return number


def _convert_yaml(hint: Any, value: Any) -> Any:
    """A value of a YAML file as one of a field's type: YAML reads 1e5 as text, and a list of one is often written bare."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and value is not None:
        return _convert_yaml(args[0], value)
    if origin is dict:
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"config has a field that is {format_value(value)}, which JSON cannot hold ({error})"
            ) from error
    if origin is tuple:
        return tuple(_convert_yaml(args[0], x) for x in (value if isinstance(value, list | tuple) else [value]))
    if hint in (int, float) and isinstance(value, str | float):
        number = parse_number(hint, value)
        return value if number is None else number
    return value


def _read_yaml(file: str) -> dict[Any, Any]:
    """A YAML file that maps fields to values, bounded in size and depth.

    Raises:
        RequestError: it is no such file.
    """
    try:
        if not stat.S_ISREG(Path(file).stat().st_mode):
            raise RequestError(f"config is {file!r}, which is no plain file: name a YAML file")
        if (size := Path(file).stat().st_size) > MAX_CONFIG_BYTES:
            raise RequestError(f"config is {file!r}, which has {size:,} bytes: must be at most {MAX_CONFIG_BYTES:,}")
        data = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"config is {file!r}, which cannot be read as YAML: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(data, dict):
        raise RequestError(f"config is {file!r}, which holds a {type(data).__name__}: must map fields to values")
    try:
        num_values = _count_values(data, MAX_CONFIG_VALUES)
    except RecursionError:
        num_values = MAX_CONFIG_VALUES + 1
    if num_values > MAX_CONFIG_VALUES:
        raise RequestError(f"config is {file!r}, which nests or repeats its values too often: write them out")
    return data


def _count_values(value: Any, limit: int) -> int:
    """How many values a structure holds, aliases counted each time; stops counting above `limit`."""
    total = 1
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if total > limit:
            break
        total += _count_values(inner, limit - total)
    return total


def asks_for_help(argv: list[str]) -> bool:
    return any(word in ("-h", "--help") for word in argv)


def take_flag(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of --NAME in a command line, and the command line without it."""
    for index, word in enumerate(argv):
        if word == f"--{name}":
            if argv[index + 1 : index + 2] == [] or argv[index + 1].startswith("--"):
                raise RequestError(f"--{name} has no value: write one after it")
            return argv[index + 1], argv[:index] + argv[index + 2 :]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1], argv[:index] + argv[index + 1 :]
    return None, argv


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are sentences like everybody's, with the flag nearest to an unknown one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> Any:
        raise RequestError(f"{message} (`{self.prog} --help` lists what there is)")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The values of a command line."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.refuse(unknown[0].split("=")[0], args)
        return args

    def refuse(self, word: str, args: argparse.Namespace) -> NoReturn:
        """Refuse a word that is no flag; `args` is what the other words say."""
        flags: Iterable[str] = self._option_string_actions
        raise RequestError(f"{word} is not a flag of `{self.prog}`{did_you_mean(word, flags)}")
