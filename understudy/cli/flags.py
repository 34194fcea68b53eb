"""A config from the command line: flags over a file over defaults. Every refusal is a sentence."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro
import yaml

from understudy.run.config import RequestError, nearest


def fields_in_file(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What --config's YAML file sets, and the command line without that flag."""
    file, argv = take(argv, "config")
    if file is None:
        return {}, argv
    try:
        given = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise RequestError(
            f"config is {file!r}, which cannot be read as YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(given, dict):
        raise RequestError(f"config is {file!r}, which holds a {type(given).__name__}: must map fields to values")
    return given, argv


def known(kind: Any, argv: list[str], *, prog: str, others: Iterable[str] = ()) -> None:
    """Refuse a flag that is no field, with the nearest that is."""
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    flags |= {"--no-" + flag[2:] for flag in flags} | {"--help"} | {f"--{name}" for name in others}
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and flag not in flags:
            raise RequestError(f"{flag} is not a flag of `{prog}`{nearest(flag, flags)}")


def parse(kind: Any, argv: list[str], start: Any, *, prog: str) -> Any:
    """A config: `start`, with what the flags say."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if getattr(info.type, "__origin__", None) is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: json.loads(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=gathered(kind, argv), default=start, prog=prog, registry=registry)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise RequestError(_sentence(said.getvalue())) from None


def gathered(kind: Any, argv: list[str]) -> list[str]:
    """The command line with a flag of several values, where it stands several times, as one: --log a --log b, --log a b."""
    several = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind) if "tuple" in str(field.type)}
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    into = kept
    for word in argv:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in several:
            into = values.setdefault(flag, [])
            into += [value] if equals else []
            continue
        into = kept if word.startswith("--") else into
        into.append(word)
    return [*kept, *(word for flag, words in values.items() for word in (flag, *words))]


def asks_for_help(argv: list[str]) -> bool:
    return any(word in ("-h", "--help") for word in argv)


def take(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of --NAME in a command line, and the command line without it."""
    for at, word in enumerate(argv):
        if word == f"--{name}" and at + 1 < len(argv):
            return argv[at + 1], argv[:at] + argv[at + 2 :]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1], argv[:at] + argv[at + 1 :]
    return None, argv


def _sentence(text: str) -> str:
    """What tyro's box says, without the box: what stands between its title and its next rule, on one line."""
    lines = [line.strip(" │╭╮╰╯") for line in text.splitlines()][1:]
    lines = ["" if not line.strip("-─") else line for line in lines]
    body = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines))
    return " ".join(" ".join(body).split()).rstrip(".")


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are sentences like everybody's."""

    def error(self, message: str) -> Any:
        raise RequestError(f"{message} (`{self.prog} --help` lists what there is)")
