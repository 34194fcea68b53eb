"""Whose code may be run because a run's config names it: the one rule, for both worlds, `evaluate` and `resume`.

A run may be anybody's. What its config names as code is imported only where it is an installed package (and then it must
be an environment or a wrapper: the caller checks that), or where the user's own run wrote down, at its start and under a
key that only the user has, that it is the same name and the same files, none of them in the run's directory. Whatever the
user names on the command line is the user's. Nothing is imported to find this out.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.machinery
import importlib.util
import json
import os
import secrets
import site
import sysconfig
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from understudy.run.checkpoint import CorruptFileError, read_json, sha256
from understudy.run.config import RequestError
from understudy.run.foreign import restricted_settings


class CodeReference(NamedTuple):
    """Code that a config names: in this field, under this name, run out of these files."""

    field: str
    name: str
    files: tuple[Path, ...]
    """Its packages' own first; () where it is not found."""
    is_module: bool
    """A module's attribute; else a file's function."""


def code_references(fields: dict[str, Any]) -> list[CodeReference]:
    """All code that a config names: module:NAME or FILE.py:NAME as env or wrapper, file.py:function as reward or reply."""
    references = []
    for field in ("env", "wrappers"):
        specs = fields.get(field) or ()
        for text in (specs,) if isinstance(specs, str) else specs:
            words = str(text).split()
            module, colon, _ = (words[0] if words else "").rpartition(":")
            if colon and module.endswith(".py"):
                files = (Path(module),) if Path(module).is_file() else ()
                references.append(
                    CodeReference(field, f"{Path(module).resolve()}:{words[0].rpartition(':')[2]}", files, False)
                )
            elif colon:
                references.append(CodeReference(field, words[0], module_files(module), True))
    for field in ("reward", "gold", "reply"):
        specs = fields.get(field) or ()
        for text in (specs,) if isinstance(specs, str) else specs:
            file, _, function = str(text).rpartition(":")
            if str(text).startswith("function "):
                references.append(CodeReference(field, str(text), (), False))  # an object of a process that is gone
            elif file.endswith(".py") and Path(file).is_file():
                references.append(
                    CodeReference(field, f"{Path(file).resolve()}:{function.partition('*')[0]}", (Path(file),), False)
                )
    if fields.get("trust_remote_code"):
        references.append(CodeReference("trust_remote_code", "whatever comes with its models", (), False))
    return references


def require_trusted_code(run: Path, fields: dict[str, Any], *, overridden: Collection[str] = ()) -> list[CodeReference]:
    """Refuse code that a run's config names and that nobody vouches for, and arguments that only one's own run may have.

    Args:
        run: the run's directory.  fields: its config's.  given: fields that the user names now, whatever they hold.

    Returns:
        What is an installed package's: it may be imported, to see whether it is an environment or a wrapper.

    Raises:
        RequestError: code is in the run's directory, or is neither installed nor what the user's own run wrote down; or an
            argument reaches files or memory, and the run is not the user's.
    """
    installed, signed_code = [], _read_signed_code(run)
    for code in code_references(fields):
        if code.field in overridden:
            continue
        files = [file.resolve() for file in code.files]
        if not files:
            reason = "which is not found here"
        elif any(file.is_relative_to(run.resolve()) for file in files):
            reason = "which is inside the run itself"
        elif code.is_module and all(_is_installed(file) for file in files):
            installed.append(code)
            continue
        else:
            digests, began = _code_digests(code), signed_code.get(f"{code.field} {code.name}")
            if digests and began == digests:
                continue
            reason = "which is no installed package's, and not what a run of yours began with"
            if began:
                changed = [Path(file).name for file in digests if began.get(file) != digests[file]]
                reason = f"which your run began with, but {', '.join(changed) or 'one of its files'} has changed since"
        raise RequestError(
            f"run '{run}' names code as its {code.field} ({code.name!r}), {reason}: "
            f"name it yourself with --{code.field.replace('_', '-')}"
        )
    for field, text, reason, fix in restricted_settings(fields):
        if field not in overridden and f"{field} {text}" not in signed_code:
            raise RequestError(
                f"run '{run}' has {field} {text[:200]!r}, {reason}, and is not known to be yours: "
                f"{fix.format(field.replace('_', '-'))}"
            )
    return installed


def sign_code(fields: dict[str, Any]) -> dict[str, Any] | None:
    """What a run writes down at its start of code and unusual arguments that its config names, signed with the user's key.

    None where there is neither. Without a key, which needs a directory that can be written to, nothing is signed.
    """
    codes = {f"{code.field} {code.name}": _code_digests(code) for code in code_references(fields) if code.files}
    codes |= {f"{field} {text}": {} for field, text, *_ in restricted_settings(fields)}
    if not codes:
        return None
    key = _user_key(create=True)
    return {"code": codes, "signature": None if key is None else _sign(key, codes)}


def module_files(module: str) -> tuple[Path, ...]:
    """The files that importing a module runs, its packages' first, found without importing anything; () where not found."""
    parts = module.split(".")
    if not all(part.isidentifier() and part != "__main__" for part in parts):
        return ()
    files: list[Path] = []
    search_paths: list[str] | None = None
    for depth in range(len(parts)):
        name = ".".join(parts[: depth + 1])
        try:
            # of a top name this imports nothing; of one further down it would import its packages
            find_spec = importlib.machinery.PathFinder.find_spec
            spec = find_spec(name, search_paths) if depth else importlib.util.find_spec(name)
        except (ImportError, AttributeError, ValueError):
            return ()
        if spec is None or (spec.origin in ("built-in", "frozen")):
            return ()
        search_paths = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if spec.origin is not None:
            if not Path(spec.origin).is_file():
                return ()
            files.append(Path(spec.origin))
        if depth + 1 < len(parts) and search_paths is None:
            return ()
    return tuple(files)


def _is_installed(file: Path) -> bool:
    """Whether a file lies where packages are installed. The standard library has no environments, and does not count."""
    site_dirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    site_dirs |= {site.getusersitepackages()} if site.ENABLE_USER_SITE else set()
    return any(file.is_relative_to(Path(site_dir).resolve()) for site_dir in site_dirs)


def _code_digests(code: CodeReference) -> dict[str, str]:
    try:
        return {str(file.resolve()): sha256(file) for file in code.files}
    except CorruptFileError:  # nobody's code is a large file of holes
        return {}


def _read_signed_code(run: Path) -> dict[str, Any]:
    """The code that lineage.json says the run began with, where its signature is the user's."""
    try:
        signed = read_json(run / "lineage.json")["vouched"]
        codes, signature, key = signed["code"], signed["signature"], _user_key(create=False)
        if key is not None and hmac.compare_digest(_sign(key, codes).encode(), str(signature).encode()):
            return codes
    except (CorruptFileError, KeyError, TypeError):
        pass
    return {}


def _sign(key: bytes, codes: dict[str, Any]) -> str:
    return hmac.new(key, json.dumps(codes, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _user_key(*, create: bool) -> bytes | None:
    """The user's own key, in a file that only the user reads; None where there is none, and none can be made."""
    state_home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state_home) / "understudy" / "key"
    try:
        if create and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"key.{os.getpid()}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(secrets.token_bytes(32))
            try:
                os.link(temporary, file)  # the first of two processes wins
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        key = file.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return key if len(key) == 32 else None
