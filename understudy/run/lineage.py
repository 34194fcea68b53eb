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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from understudy.run.checkpoint import CorruptFileError, sha256
from understudy.run.config import RequestError
from understudy.run.installation import DISTRIBUTION
from understudy.run.store import SCHEMA, read_config, read_versioned_json, sanitize, write_json
from understudy.run.trust import sign_code

FILE = "lineage.json"
PACKAGES = ("torch", "numpy", "safetensors", "gymnasium", "transformers", "tokenizers", "peft")
MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"})
"""Endings of the files that a model's directory is told by."""
REPRODUCIBILITY_INPUTS = ("config", "code", "packages", "processor")
"""What a run's numbers depend on besides what it reads."""
MAX_CHAIN_DEPTH, MAX_CHAIN_RUNS = 64, 1000  # runs in a row, and in all, of a chain


class DigestCheck(NamedTuple):
    """What became of one digest since it was written down."""

    run: Path
    what: str
    state: str
    """"same", "differs", "gone" (not on this machine, or no file that is read), or "unknown" where it cannot be computed."""
    was: str
    now: str


def make_link(role: str, path: Path, *, suffixes: frozenset[str] | None = None) -> dict[str, Any]:
    """A file or a directory that a run reads, by its digests.

    Args:
        suffixes: of the files that count, where it is a directory; None for all. Folders count one level down.

    Raises:
        RequestError: a file of it is nearly all holes, or no plain file.
    """
    try:
        files = file_digests(path, suffixes)
    except CorruptFileError as error:
        raise RequestError(f"{role} is '{path}', and {error}: name another") from error
    entry: dict[str, Any] = {"role": role, "path": str(path.resolve()), "files": files}
    for run in (path, path.parent):
        if path.is_dir() and (run / FILE).is_file():
            entry |= {"run": str(run.resolve()), "lineage": sha256(run / FILE)}
            break
    return entry


def file_digests(path: Path, suffixes: frozenset[str] | None = None) -> dict[str, str]:
    """The SHA-256 of a file, or of each file of a directory by its relative name; hidden ones do not count."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file())
    files_by_name = {file.relative_to(path).as_posix(): file for file in files}
    return {
        name: sha256(file)
        for name, file in files_by_name.items()
        if not any(part.startswith(".") for part in Path(name).parts) and (suffixes is None or file.suffix in suffixes)
    }


def combined_digest(link: dict[str, Any]) -> str:
    """One digest for all files of a link: the file's own where there is one."""
    files = link.get("files") or {}
    return str(next(iter(files.values()))) if len(files) == 1 else data_digest(files)


def data_digest(data: Any) -> str:
    """The SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(sanitize(data), sort_keys=True).encode()).hexdigest()


def config_digest(fields: dict[str, Any]) -> str:
    """The digest of a config; where the run is written does not count."""
    return data_digest({name: value for name, value in fields.items() if name != "output_dir"})


def make_lineage(recipe: str, fields: dict[str, Any], links: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    """The lineage.json of a run that begins.

    Args:
        fields: its config's.  more: what else is to be known by its digest.
    """
    versions = {name: version for name in PACKAGES if (version := _package_version(name))}
    lineage = {
        "schema": SCHEMA,
        "recipe": recipe,
        "code": code_version(),
        "packages": {"python": platform.python_version(), **versions},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "seed": fields.get("seed"),
        "config": config_digest(fields),
        "links": links,
        **extra,
    }
    vouched = sign_code(fields)
    return lineage | ({} if vouched is None else {"vouched": vouched})


def resume_lineage(path: Path, lineage: dict[str, Any]) -> list[str]:
    """Check that a run that goes on still reads what it began with; one without a lineage.json gets this one.

    Args:
        lineage: what `make_lineage` gives of it now.

    Returns:
        Which of `MADE_BY` are not known to be what they were when the run last went on; they are written down.

    Raises:
        RequestError: data, model or another link has changed since the run began.
    """
    if not (path / FILE).exists():
        write_json(path / FILE, lineage)
        return [*REPRODUCIBILITY_INPUTS]
    written = read_lineage(path)
    _require_unchanged(written.get("links") or [], lineage["links"])
    before = _as_dict(written.get("went_on")) or written
    lineage = lineage | {"config": config_digest(read_config(path).get("config") or {})}  # the run's, until `extend`
    changed = [name for name in REPRODUCIBILITY_INPUTS if before.get(name) != lineage[name]]
    if changed:
        add_digests(path, went_on={name: lineage[name] for name in REPRODUCIBILITY_INPUTS})
    return changed


def rewrite_config(path: Path, document: dict[str, Any], fields: dict[str, Any]) -> None:
    """Write a run's config anew. Killed anywhere in here, config.json and lineage.json still belong together.

    Until config.json has its new fields, lineage.json holds both digests.

    Args:
        document: config.json as it is.  fields: the config that it is to hold.
    """
    has_lineage = (path / FILE).exists()
    if has_lineage:
        now = config_digest(fields)
        went_on = _as_dict(read_lineage(path).get("went_on"))
        again = {"went_on": went_on | {"config": now}} if went_on else {}
        add_digests(path, config=now, config_before=config_digest(document.get("config") or {}), **again)
    write_json(path / "config.json", document | {"config": fields})
    if has_lineage:
        settle_config_digest(path, fields)


def settle_config_digest(path: Path, fields: dict[str, Any]) -> None:
    """Leave one digest of a run's config in its lineage.json, where a kill within `extend` left two."""
    if (path / FILE).exists() and "config_before" in (lineage := read_lineage(path)):
        write_json(
            path / FILE, {k: x for k, x in lineage.items() if k != "config_before"} | {"config": config_digest(fields)}
        )


def add_digests(path: Path, **digests: Any) -> None:
    """Add digests that are known only once everything is loaded."""
    write_json(path / FILE, (read_lineage(path) if (path / FILE).exists() else {"schema": SCHEMA}) | digests)


def read_lineage(path: Path) -> dict[str, Any]:
    """A run's lineage.json, which may be anybody's.

    Raises:
        RequestError: there is none, or it is none of ours.
    """
    lineage = read_versioned_json(path / FILE, f"run is '{path}', which holds no readable {FILE}")
    links = lineage.get("links", [])
    if not isinstance(links, list) or not all(map(_is_link, links)):
        raise RequestError(f"run is '{path}', whose {FILE} has links that are none: give the directory of a run")
    return lineage


def code_version() -> dict[str, Any]:
    """This package: its version, the digest of its source, and the commit where it is a checkout."""
    package = Path(__file__).parents[1]
    source = {str(file.relative_to(package)): sha256(file) for file in sorted(package.rglob("*.py"))}
    version = {"understudy": _package_version(DISTRIBUTION), "sha256": data_digest(source)}
    return version | ({"commit": commit} if (commit := _read_commit(package.parent / ".git")) else {})


def read_chain(path: Path) -> dict[str, Any]:
    """A run's lineage with that of every run it leads to: each link has its `from`, where it was made by a run.

    A run that several links lead to has its lineage at the first of them, the others are `repeated`. A link to a run that
    is gone has neither.
    """
    return _read_chain(path, set())


def _read_chain(path: Path, visited: set[Path], depth: int = 1) -> dict[str, Any]:
    lineage = read_lineage(path)
    visited.add(path.resolve())
    links = []
    for link in lineage.get("links", []):
        run = Path(link["run"]) if "run" in link else None
        if run is None or not os.path.isfile(run / FILE) or depth == MAX_CHAIN_DEPTH or len(visited) == MAX_CHAIN_RUNS:
            links.append(link)
        elif run.resolve() in visited:
            links.append(link | {"repeated": True})
        else:
            links.append(link | {"from": _read_chain(run, visited, depth + 1)})
    return lineage | {"run": str(path), "links": links}


def format_chain(lineage: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A chain as lines: a run, under it its links, under each the run that it was made by."""
    code = lineage.get("code") or {}
    code_text = f"understudy {code.get('understudy')}" + (
        f" at {str(code['commit'])[:10]}" if code.get("commit") else ""
    )
    summary = (
        f"{lineage.get('recipe')}, seed {lineage.get('seed')}, config {_shorten(lineage.get('config'))}, {code_text}"
    )
    yield f"{indent}{lineage['run']}  {summary}"
    for link in lineage["links"]:
        origin = "  (its run is above)" if "repeated" in link else "  (its run is gone)" if "run" in link else ""
        origin = "" if "from" in link else origin
        yield f"{indent}  {link.get('role')}: {link.get('path')}  {_shorten(combined_digest(link))}{origin}"
        if "from" in link:
            yield from format_chain(link["from"], indent + "    ")
    for name in ("reference", "tokenizer", "template"):
        if isinstance(lineage.get(name), str):
            yield f"{indent}  {name} by content: {_shorten(lineage[name])}"


def verify(lineage: dict[str, Any]) -> Iterator[DigestCheck]:
    """Recompute every digest of a chain that can be recomputed from files, run by run."""
    run = Path(lineage["run"])
    current = config_digest(read_config(run).get("config") or {})
    recorded = str(lineage.get("config"))
    yield _make_check(run, "config", current if current == lineage.get("config_before") else recorded, current)
    for field, files in _as_dict(_as_dict(lineage.get("vouched")).get("code")).items():
        for file, recorded in _as_dict(files).items():
            yield _make_check(run, f"code {field} {file}", str(recorded), _digest_or_none(Path(file)))
    for link in lineage["links"]:
        path, subject = run / link.get("path", ""), f"{link.get('role')} {link.get('path')}"
        is_file = os.path.isfile(path)
        if not link.get("files"):
            yield DigestCheck(run, subject, "unknown", "", "")
        for name, recorded in (link.get("files") or {}).items():
            file = path if is_file else path / name
            current = _digest_or_none(file) if is_file or _is_inside(file, path) else None
            yield _make_check(run, subject if is_file else f"{link.get('role')} {file}", str(recorded), current)
        if "run" in link:
            current = _digest_or_none(Path(link["run"]) / FILE)
            yield _make_check(run, f"lineage of {link['run']}", str(link.get("lineage")), current)
        if "from" in link:
            yield from verify(link["from"])


def changed_digest(link: dict[str, Any], run: Path) -> str | None:
    """The digest that a link's files have now, where all are there and it is another than was written; else None.

    Args:
        run: whose link it is; the path of what lies in the run's own directory is relative to it.
    """
    path = run / str(link.get("path"))
    is_file = os.path.isfile(path)
    files = {name: _digest_or_none(path if is_file else path / name) for name in link.get("files") or {}}
    if None in files.values():
        return None
    current = combined_digest({"files": files})
    return None if current == combined_digest(link) else current


def _require_unchanged(old_links: list[dict[str, Any]], links: list[dict[str, Any]]) -> None:
    """Refuse a link that is there as before, with other files. What the user names anew is another link."""
    new_links = {(link["role"], link["path"]): link for link in links}
    for old in old_links:
        new = new_links.get((old.get("role"), old.get("path")))
        if new is not None and new["files"] != old.get("files"):
            raise RequestError(
                f"{old['role']} is '{old['path']}', whose digest is {combined_digest(new)[:12]}..., the run began with "
                f"{combined_digest(old)[:12]}...: put back the files it had"
            )


def require_same_files(path: Path, links: list[dict[str, Any]], roles: Iterable[str]) -> None:
    """Refuse to measure a run by other files than those it read, wherever they lie now.

    Args:
        links: what its config leads to now.  roles: of the links that count.

    Raises:
        RequestError: with the two digests.
    """
    recorded = read_lineage(path).get("links") if (path / FILE).exists() else None
    for old in filter(_is_link, recorded or []):
        now = [link for link in links if link["role"] == old.get("role")]
        if old.get("role") not in roles or any(link["files"] == old.get("files") for link in now):
            continue
        digest = f"has the digest {combined_digest(now[0])[:12]}..." if now else "is not there"
        raise RequestError(
            f"{old['role']} is '{now[0]['path'] if now else old.get('path')}', which {digest}, and the run began with "
            f"{combined_digest(old)[:12]}... ('{old.get('path')}'): put back the files it had, or name others with "
            f"--{'evaluation-data' if 'data' in old['role'] else old['role']}"
        )


def _is_link(entry: Any) -> bool:
    """Whether an entry of a lineage.json, which may be anybody's, has the form of a link."""
    if not isinstance(entry, dict) or not isinstance(entry.get("files", {}), dict):
        return False
    paths = [entry.get("path", ""), entry.get("run", ""), *entry.get("files", {})]
    return all(isinstance(path, str) and "\0" not in path for path in paths)


def _is_inside(file: Path, path: Path) -> bool:
    """Whether a file lies in a directory, or is a link in it, as in Hugging Face's cache."""
    try:
        return file.is_symlink() or file.resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError):  # a name that is too long; links in a circle
        return False


def _digest_or_none(file: Path) -> str | None:
    """A file's digest; None where it is gone, or is not read."""
    try:
        return sha256(file) if os.path.isfile(file) else None
    except (OSError, CorruptFileError):
        return None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _make_check(run: Path, subject: str, recorded: str, current: str | None) -> DigestCheck:
    state = "gone" if current is None else "same" if current == recorded else "differs"
    return DigestCheck(run, subject, state, recorded, current or "")


def _shorten(digest: Any) -> str:
    return str(digest)[:12]


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_commit(git: Path) -> str | None:
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
