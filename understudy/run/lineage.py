"""Where a run comes from: the digests of everything it began with, in its lineage.json; and the chain back from there.

A link names what was read, by path and by the SHA-256 of every file; where that was made by a run, it names that run and
the digest of its lineage too. So a policy leads back to the base model, and a changed file anywhere on the way shows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from understudy.run.checkpoint import Damaged, sha256
from understudy.run.config import RequestError
from understudy.run.installation import DISTRIBUTION
from understudy.run.store import SCHEMA, plain, read_config, read_schema, write_json
from understudy.run.trust import vouch

FILE = "lineage.json"
PACKAGES = ("torch", "numpy", "safetensors", "gymnasium", "transformers", "tokenizers", "peft")
MODEL = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"})
"""Endings of the files that a model's directory is told by."""
MADE_BY = ("config", "code", "packages", "processor")
"""What a run's numbers depend on besides what it reads."""
LONGEST, MOST = 64, 1000  # runs in a row, and in all, of a chain


class Check(NamedTuple):
    """What became of one digest since it was written down."""

    run: Path
    what: str
    state: str
    """"same", "differs", "gone" (not on this machine, or no file that is read), or "unknown" where it cannot be computed."""
    was: str
    now: str


def link(role: str, path: Path, *, endings: frozenset[str] | None = None) -> dict[str, Any]:
    """A file or a directory that a run reads, by its digests.

    Args:
        endings: of the files that count, where it is a directory; None for all. Folders count one level down.

    Raises:
        RequestError: a file of it is nearly all holes, or no plain file.
    """
    try:
        files = digests(path, endings)
    except Damaged as error:
        raise RequestError(f"{role} is '{path}', and {error}: name another") from error
    found: dict[str, Any] = {"role": role, "path": str(path.resolve()), "files": files}
    for run in (path, path.parent):
        if path.is_dir() and (run / FILE).is_file():
            found |= {"run": str(run.resolve()), "lineage": sha256(run / FILE)}
            break
    return found


def digests(path: Path, endings: frozenset[str] | None = None) -> dict[str, str]:
    """The SHA-256 of a file, or of each file of a directory by its relative name; hidden ones do not count."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file())
    inside = {file.relative_to(path).as_posix(): file for file in files}
    return {
        name: sha256(file)
        for name, file in inside.items()
        if not any(part.startswith(".") for part in Path(name).parts) and (endings is None or file.suffix in endings)
    }


def digest_of(link: dict[str, Any]) -> str:
    """One digest for all files of a link: the file's own where there is one."""
    files = link.get("files") or {}
    return str(next(iter(files.values()))) if len(files) == 1 else of_data(files)


def of_data(data: Any) -> str:
    """The SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain(data), sort_keys=True).encode()).hexdigest()


def of_config(fields: dict[str, Any]) -> str:
    """The digest of a config; where the run is written does not count."""
    return of_data({name: value for name, value in fields.items() if name != "out"})


def describe(recipe: str, fields: dict[str, Any], links: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The lineage.json of a run that begins.

    Args:
        fields: its config's.  more: what else is to be known by its digest.
    """
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    about = {
        "schema": SCHEMA,
        "recipe": recipe,
        "code": code(),
        "packages": {"python": platform.python_version(), **versions},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "seed": fields.get("seed"),
        "config": of_config(fields),
        "links": links,
        **more,
    }
    signed = vouch(fields)
    return about | ({} if signed is None else {"vouched": signed})


def go_on(path: Path, about: dict[str, Any]) -> list[str]:
    """Check that a run that goes on still reads what it began with; one without a lineage.json gets this one.

    Args:
        about: what `describe` gives of it now.

    Returns:
        Which of `MADE_BY` are not known to be what they were when the run last went on; they are written down.

    Raises:
        RequestError: data, model or another link has changed since the run began.
    """
    if not (path / FILE).exists():
        write_json(path / FILE, about)
        return [*MADE_BY]
    written = read_lineage(path)
    _unchanged(written.get("links") or [], about["links"])
    before = _mapping(written.get("went_on")) or written
    about = about | {"config": of_config(read_config(path).get("config") or {})}  # the run's, until `extend`
    changed = [name for name in MADE_BY if before.get(name) != about[name]]
    if changed:
        note(path, went_on={name: about[name] for name in MADE_BY})
    return changed


def extend(path: Path, about: dict[str, Any], fields: dict[str, Any]) -> None:
    """Write a run's config anew. Killed anywhere in here, config.json and lineage.json still belong together.

    Until config.json has its new fields, lineage.json holds both digests.

    Args:
        about: config.json as it is.  fields: the config that it is to hold.
    """
    had = (path / FILE).exists()
    if had:
        now = of_config(fields)
        went_on = _mapping(read_lineage(path).get("went_on"))
        again = {"went_on": went_on | {"config": now}} if went_on else {}
        note(path, config=now, config_before=of_config(about.get("config") or {}), **again)
    write_json(path / "config.json", about | {"config": fields})
    if had:
        settle_config(path, fields)


def settle_config(path: Path, fields: dict[str, Any]) -> None:
    """Leave one digest of a run's config in its lineage.json, where a kill within `extend` left two."""
    if (path / FILE).exists() and "config_before" in (about := read_lineage(path)):
        write_json(
            path / FILE, {k: x for k, x in about.items() if k != "config_before"} | {"config": of_config(fields)}
        )


def note(path: Path, **digests: Any) -> None:
    """Add digests that are known only once everything is loaded."""
    write_json(path / FILE, (read_lineage(path) if (path / FILE).exists() else {"schema": SCHEMA}) | digests)


def read_lineage(path: Path) -> dict[str, Any]:
    """A run's lineage.json, which may be anybody's.

    Raises:
        RequestError: there is none, or it is none of ours.
    """
    about = read_schema(path / FILE, f"run is '{path}', which holds no readable {FILE}")
    links = about.get("links", [])
    if not isinstance(links, list) or not all(map(_is_link, links)):
        raise RequestError(f"run is '{path}', whose {FILE} has links that are none: give the directory of a run")
    return about


def code() -> dict[str, Any]:
    """This package: its version, the digest of its source, and the commit where it is a checkout."""
    package = Path(__file__).parents[1]
    source = {str(file.relative_to(package)): sha256(file) for file in sorted(package.rglob("*.py"))}
    found = {"understudy": _version(DISTRIBUTION), "sha256": of_data(source)}
    return found | ({"commit": commit} if (commit := _commit(package.parent / ".git")) else {})


def chain(path: Path) -> dict[str, Any]:
    """A run's lineage with that of every run it leads to: each link has its `from`, where it was made by a run.

    A run that several links lead to has its lineage at the first of them, the others are `repeated`. A link to a run that
    is gone has neither.
    """
    return _chain(path, set())


def _chain(path: Path, visited: set[Path], depth: int = 1) -> dict[str, Any]:
    about = read_lineage(path)
    visited.add(path.resolve())
    links = []
    for one in about.get("links", []):
        run = Path(one["run"]) if "run" in one else None
        if run is None or not os.path.isfile(run / FILE) or depth == LONGEST or len(visited) == MOST:
            links.append(one)
        elif run.resolve() in visited:
            links.append(one | {"repeated": True})
        else:
            links.append(one | {"from": _chain(run, visited, depth + 1)})
    return about | {"run": str(path), "links": links}


def tree(about: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A chain as lines: a run, under it its links, under each the run that it was made by."""
    made = about.get("code") or {}
    by = f"understudy {made.get('understudy')}" + (f" at {str(made['commit'])[:10]}" if made.get("commit") else "")
    what = f"{about.get('recipe')}, seed {about.get('seed')}, config {_short(about.get('config'))}, {by}"
    yield f"{indent}{about['run']}  {what}"
    for one in about["links"]:
        origin = "  (its run is above)" if "repeated" in one else "  (its run is gone)" if "run" in one else ""
        origin = "" if "from" in one else origin
        yield f"{indent}  {one.get('role')}: {one.get('path')}  {_short(digest_of(one))}{origin}"
        if "from" in one:
            yield from tree(one["from"], indent + "    ")
    for name in ("reference", "tokenizer", "template"):
        if isinstance(about.get(name), str):
            yield f"{indent}  {name} by content: {_short(about[name])}"


def verify(about: dict[str, Any]) -> Iterator[Check]:
    """Recompute every digest of a chain that can be recomputed from files, run by run."""
    run = Path(about["run"])
    now = of_config(read_config(run).get("config") or {})
    was = str(about.get("config"))
    yield _compared(run, "config", now if now == about.get("config_before") else was, now)
    for field, files in _mapping(_mapping(about.get("vouched")).get("code")).items():
        for file, was in _mapping(files).items():
            yield _compared(run, f"code {field} {file}", str(was), _digest(Path(file)))
    for one in about["links"]:
        path, what = run / one.get("path", ""), f"{one.get('role')} {one.get('path')}"
        alone = os.path.isfile(path)
        if not one.get("files"):
            yield Check(run, what, "unknown", "", "")
        for name, was in (one.get("files") or {}).items():
            file = path if alone else path / name
            now = _digest(file) if alone or _is_inside(file, path) else None
            yield _compared(run, what if alone else f"{one.get('role')} {file}", str(was), now)
        if "run" in one:
            now = _digest(Path(one["run"]) / FILE)
            yield _compared(run, f"lineage of {one['run']}", str(one.get("lineage")), now)
        if "from" in one:
            yield from verify(one["from"])


def changed(one: dict[str, Any], run: Path) -> str | None:
    """The digest that a link's files have now, where all are there and it is another than was written; else None.

    Args:
        run: whose link it is; the path of what lies in the run's own directory is relative to it.
    """
    path = run / str(one.get("path"))
    alone = os.path.isfile(path)
    files = {name: _digest(path if alone else path / name) for name in one.get("files") or {}}
    if None in files.values():
        return None
    now = digest_of({"files": files})
    return None if now == digest_of(one) else now


def _unchanged(before: list[dict[str, Any]], links: list[dict[str, Any]]) -> None:
    """Refuse a link that is there as before, with other files. What the user names anew is another link."""
    now = {(one["role"], one["path"]): one for one in links}
    for old in before:
        new = now.get((old.get("role"), old.get("path")))
        if new is not None and new["files"] != old.get("files"):
            raise RequestError(
                f"{old['role']} is '{old['path']}', whose digest is {digest_of(new)[:12]}..., the run began with "
                f"{digest_of(old)[:12]}...: put back the files it had"
            )


def _is_link(one: Any) -> bool:
    """Whether an entry of a lineage.json, which may be anybody's, has the form of a link."""
    if not isinstance(one, dict) or not isinstance(one.get("files", {}), dict):
        return False
    paths = [one.get("path", ""), one.get("run", ""), *one.get("files", {})]
    return all(isinstance(path, str) and "\0" not in path for path in paths)


def _is_inside(file: Path, path: Path) -> bool:
    """Whether a file lies in a directory, or is a link in it, as in Hugging Face's cache."""
    try:
        return file.is_symlink() or file.resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError):  # a name that is too long; links in a circle
        return False


def _digest(file: Path) -> str | None:
    """A file's digest; None where it is gone, or is not read."""
    try:
        return sha256(file) if os.path.isfile(file) else None
    except (OSError, Damaged):
        return None


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _compared(run: Path, what: str, was: str, now: str | None) -> Check:
    state = "gone" if now is None else "same" if now == was else "differs"
    return Check(run, what, state, was, now or "")


def _short(digest: Any) -> str:
    return str(digest)[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(git: Path) -> str | None:
    """The commit that a checkout is at, read from its files; None where it is none."""
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text().strip()
        packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except OSError:
        return None
