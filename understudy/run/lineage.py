"""Where a run comes from: the digests of everything it began with, in its lineage.json; and the chain back from there.

A link names what was read, by path and by the SHA-256 of every file; where that was made by a run, it names that run and
the digest of its lineage too. So a policy leads back to the base model, and a changed file anywhere on the way shows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from understudy.run.checkpoint import sha256
from understudy.run.config import RequestError
from understudy.run.installation import DISTRIBUTION
from understudy.run.store import SCHEMA, plain, read_config, read_schema, write_json
from understudy.run.trust import vouch

FILE = "lineage.json"
PACKAGES = ("torch", "numpy", "safetensors", "gymnasium", "transformers", "tokenizers", "peft")
MODEL = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"})
"""Endings of the files that a model's directory is told by."""
LONGEST = 64  # runs in a chain


class Check(NamedTuple):
    """What became of one digest since it was written down."""

    run: Path
    what: str
    state: str
    """"same", "differs", "gone" (or not on this machine), or "unknown" where it cannot be computed."""
    was: str
    now: str


def link(role: str, path: Path, *, endings: frozenset[str] | None = None) -> dict[str, Any]:
    """A file or a directory that a run reads, by its digests.

    Args:
        endings: of the files that count, where it is a directory; None for all. Folders count one level down.
    """
    found: dict[str, Any] = {"role": role, "path": str(path.resolve()), "files": digests(path, endings)}
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
    return next(iter(files.values())) if len(files) == 1 else of_data(files)


def of_data(data: Any) -> str:
    """The SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain(data), sort_keys=True).encode()).hexdigest()


def of_config(fields: dict[str, Any]) -> str:
    """The digest of a config; where the run is written does not count."""
    return of_data({name: value for name, value in fields.items() if name != "out"})


def begin(path: Path, recipe: str, fields: dict[str, Any], links: list[dict[str, Any]], **more: Any) -> None:
    """Write lineage.json at a run's start. Of a run that goes on, check that it still reads what it began with.

    Args:
        path: the run's directory.  fields: its config's.  more: what else is to be known by its digest.

    Raises:
        RequestError: data, model or another link has changed since the run began.
    """
    if (path / FILE).exists():
        _unchanged(read_lineage(path).get("links") or [], links)
        return
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    about = {
        "schema": SCHEMA,
        "recipe": recipe,
        "code": code(),
        "packages": {"python": platform.python_version(), **versions},
        "seed": fields.get("seed"),
        "config": of_config(fields),
        "links": links,
        **more,
    }
    signed = vouch(fields)
    write_json(path / FILE, about | ({} if signed is None else {"vouched": signed}))


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
    whole = isinstance(links, list) and all(isinstance(x, dict) and isinstance(x.get("files", {}), dict) for x in links)
    if not whole or not all(isinstance(x.get("path", ""), str) and isinstance(x.get("run", ""), str) for x in links):
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

    A link to a run that is gone, or that led here, has none.
    """
    return _chain(path, ())


def _chain(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    about = read_lineage(path)
    here = (*above, path.resolve())
    links = []
    for one in about.get("links", []):
        run = Path(one["run"]) if "run" in one else None
        goes_on = run is not None and (run / FILE).is_file() and run.resolve() not in here and len(here) < LONGEST
        links.append(one | ({"from": _chain(run, here)} if goes_on and run is not None else {}))
    return about | {"run": str(path), "links": links}


def tree(about: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A chain as lines: a run, under it its links, under each the run that it was made by."""
    made = about.get("code") or {}
    by = f"understudy {made.get('understudy')}" + (f" at {str(made['commit'])[:10]}" if made.get("commit") else "")
    what = f"{about.get('recipe')}, seed {about.get('seed')}, config {_short(about.get('config'))}, {by}"
    yield f"{indent}{about['run']}  {what}"
    for one in about["links"]:
        origin = "" if "from" in one else ("  (its run is gone)" if "run" in one else "")
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
    yield _compared(run, "config", str(about.get("config")), now)
    for field, files in ((about.get("vouched") or {}).get("code") or {}).items():
        for file, was in files.items():
            path = Path(file)
            yield _compared(run, f"code {field} {file}", str(was), sha256(path) if path.is_file() else None)
    for one in about["links"]:
        path, what = Path(one["path"]), f"{one.get('role')} {one['path']}"
        if not one.get("files"):
            yield Check(run, what, "unknown", "", "")
        for name, was in (one.get("files") or {}).items():
            file = path if path.is_file() else path / name
            inside = path.is_file() or file.resolve().is_relative_to(path.resolve()) or file.is_symlink()
            now = sha256(file) if inside and file.is_file() else None
            yield _compared(run, what if path.is_file() else f"{one.get('role')} {file}", str(was), now)
        if "run" in one:
            other = Path(one["run"]) / FILE
            now = sha256(other) if other.is_file() else None
            yield _compared(run, f"lineage of {one['run']}", str(one.get("lineage")), now)
        if "from" in one:
            yield from verify(one["from"])


def changed(one: dict[str, Any]) -> str | None:
    """The digest that a link's files have now, where all are there and it is another than was written; else None."""
    path = Path(str(one.get("path")))
    files = {name: path if path.is_file() else path / name for name in one.get("files") or {}}
    if not all(file.is_file() for file in files.values()):
        return None
    now = digest_of({"files": {name: sha256(file) for name, file in files.items()}})
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
