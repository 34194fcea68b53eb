"""Rename symbols by their definitions, in one pass: pyright finds every reference, dictionary keys and strings follow rules.

A table line is `FILE SCOPE NEW`: SCOPE is `name` (module level), `Class.name` (method, field or attribute set on self),
`function:name` or `Class.method:name` (parameter or local variable).
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path


class Lsp:
    def __init__(self, root: Path):
        self.root = root
        self.p = subprocess.Popen(
            [str(root / ".venv/bin/pyright-langserver"), "--stdio"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=root,
        )
        self.n = itertools.count(1)
        self.q = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        uri = root.as_uri()
        self.req(
            "initialize",
            {
                "processId": os.getpid(),
                "rootUri": uri,
                "capabilities": {
                    "workspace": {
                        "configuration": True,
                        "workspaceEdit": {"documentChanges": True},
                        "workspaceFolders": True,
                    },
                    "textDocument": {"rename": {"prepareSupport": True}},
                },
                "workspaceFolders": [{"uri": uri, "name": "r"}],
            },
        )
        self.note("initialized", {})

    def _send(self, m):
        b = json.dumps({"jsonrpc": "2.0", **m}).encode()
        self.p.stdin.write(b"Content-Length: %d\r\n\r\n" % len(b) + b)
        self.p.stdin.flush()

    def _read(self):
        f = self.p.stdout
        while True:
            n = 0
            while line := f.readline().strip():
                if line.lower().startswith(b"content-length"):
                    n = int(line.split(b":")[1])
            if not n:
                return
            m = json.loads(f.read(n))
            if "method" in m and "id" in m:
                self._send(
                    {
                        "id": m["id"],
                        "result": [{} for _ in m["params"]["items"]]
                        if m["method"] == "workspace/configuration"
                        else None,
                    }
                )
            elif "id" in m:
                self.q.put(m)

    def req(self, method, params, timeout=900):
        i = next(self.n)
        self._send({"id": i, "method": method, "params": params})
        while True:
            m = self.q.get(timeout=timeout)
            if m["id"] == i:
                if "error" in m:
                    raise RuntimeError(m["error"])
                return m["result"]

    def note(self, method, params):
        self._send({"method": method, "params": params})

    def open(self, path: Path):
        self.note(
            "textDocument/didOpen",
            {"textDocument": {"uri": path.as_uri(), "languageId": "python", "version": 1, "text": path.read_text()}},
        )

    def rename(self, path: Path, line: int, col: int, new: str):
        return self.req(
            "textDocument/rename",
            {"textDocument": {"uri": path.as_uri()}, "position": {"line": line, "character": col}, "newName": new},
        )


def find(tree: ast.Module, lines: list[str], scope: str) -> tuple[int, int]:
    """0-based line and column of the name that a scope defines."""
    where, _, local = scope.partition(":")
    _body, node = tree.body, tree
    parts = where.split(".") if where else []
    last = parts[-1] if not local else None
    for part in parts if local else parts[:-1]:
        node = next(
            n
            for n in ast.walk(node)
            if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) and n.name == part
        )
    name = local or last

    def at(n, word):
        return n.lineno - 1, lines[n.lineno - 1].index(word, n.col_offset)

    if local:
        a = node.args
        for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
            if arg is not None and arg.arg == name:
                return arg.lineno - 1, arg.col_offset
        for n in sorted(
            (n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)),
            key=lambda n: (n.lineno, n.col_offset),
        ):
            return n.lineno - 1, n.col_offset
        for n in ast.walk(node):
            if isinstance(n, (ast.FunctionDef,)) and n.name == name:
                return n.lineno - 1, lines[n.lineno - 1].index(name, n.col_offset + 4)
        raise LookupError(scope)
    for n in node.body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and n.name == name:
            return n.lineno - 1, lines[n.lineno - 1].index(
                name, n.col_offset + (4 if not isinstance(n, ast.ClassDef) else 6)
            )
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id == name:
            return n.target.lineno - 1, n.target.col_offset
        if isinstance(n, ast.Assign):
            for t in ast.walk(n):
                if isinstance(t, ast.Name) and t.id == name and isinstance(t.ctx, ast.Store):
                    return t.lineno - 1, t.col_offset
    for n in ast.walk(node):  # self.name = ...
        if (
            isinstance(n, ast.Attribute)
            and n.attr == name
            and isinstance(n.ctx, ast.Store)
            and isinstance(n.value, ast.Name)
            and n.value.id == "self"
        ):
            return n.end_lineno - 1, n.end_col_offset - len(name)
    raise LookupError(scope)


def collect(root: Path, table: list[tuple[str, str, str]], wait: float = 0):
    import time

    lsp = Lsp(root)
    edits: dict[Path, dict[tuple[int, int], tuple[int, str, str]]] = defaultdict(dict)
    wrong = []
    files = sorted({f for f, _, _ in table})
    for f in files:
        lsp.open(root / f)
    time.sleep(wait)
    for f, scope, new in table:
        path = root / f
        text = path.read_text()
        lines = text.splitlines()
        if isinstance(scope, tuple):
            old = scope[2]
            if (at := place(root, f, *scope[:2])) is None:
                wrong.append((f, scope, "line gone"))
                continue
            line, col = at
        else:
            try:
                line, col = find(ast.parse(text), lines, scope)
            except (LookupError, StopIteration, ValueError):
                wrong.append((f, scope, "not found"))
                continue
            old = scope.split(":")[-1].split(".")[-1]
        try:
            r = lsp.rename(path, line, col, new)
        except RuntimeError as e:
            wrong.append((f, scope, str(e)))
            continue
        if not r:
            wrong.append((f, scope, "no edits"))
            continue
        for change in r.get("documentChanges", []):
            p = Path(change["textDocument"]["uri"].removeprefix("file://"))
            for e in change["edits"]:
                s, t = e["range"]["start"], e["range"]["end"]
                key = (s["line"], s["character"])
                value = (t["character"], old, e["newText"])
                if key in edits[p] and edits[p][key] != value:
                    wrong.append((f, scope, f"conflict at {p}:{key}"))
                edits[p][key] = value
    lsp.p.kill()
    return edits, wrong


def apply(edits) -> list[str]:
    wrong = []
    for path, some in edits.items():
        lines = path.read_text().splitlines(keepends=True)
        for (line, col), (end, old, new) in sorted(some.items(), reverse=True):
            there = lines[line][col:end]
            if there != old:
                wrong.append(f"{path}:{line + 1}:{col}: {there!r} is not {old!r} -> {new!r}")
                continue
            lines[line] = lines[line][:col] + new + lines[line][end:]
        path.write_text("".join(lines))
    return wrong


BASE = "e5f67eb"  # the commit that lines beginning with #@ count their lines at


def place(root: Path, f: str, line: int, col: int) -> tuple[int, int] | None:
    """Where a place at BASE is now: the line with the same text, the nearest one."""
    old = subprocess.run(
        ["git", "show", f"{BASE}:{f}"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()[line - 1]
    same = [i for i, there in enumerate((root / f).read_text().splitlines()) if there == old]
    return (min(same, key=lambda i: abs(i - line + 1)), col) if same else None


def read_table(path: Path) -> list[tuple]:
    rows = []
    for text in path.read_text().splitlines():
        if text.startswith("#@"):
            f, line, col, old, new = text[2:].split()[:5]
            rows.append((f, (int(line), int(col), old), new))
        elif text.strip() and not text.startswith("#"):
            rows.append(tuple(text.split()[:3]))
    return rows


if __name__ == "__main__":
    root = Path(sys.argv[1])
    table = [x for p in sys.argv[2:] for x in read_table(Path(p))]
    edits, wrong = collect(root, table)
    print(sum(map(len, edits.values())), "edits in", len(edits), "files")
    print(*wrong, sep="\n")
    print(*apply(edits), sep="\n")
