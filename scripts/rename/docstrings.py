"""Docstrings and comments that say old names, after the engine's passes: `docstrings.py ROOT [--write]`.

In a function's docstring, the names before colons under Args and words in backticks follow the renames of its parameters and
locals; in a module's, a class's and in comments, words in backticks follow those of definitions. What is left is printed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

from fields import CONTROL, LANGUAGE, METRICS

HERE, ROOT = Path(__file__).parent, Path(sys.argv[1])
scoped: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))  # file -> function -> old -> new
defined: dict[str, dict[str, str]] = defaultdict(dict)
anywhere: dict[str, set[str]] = defaultdict(set)
for table in ("shared", "control", "language_a", "language_b", "late"):
    for line in (HERE / f"{table}.tsv").read_text().splitlines():
        if line.startswith("#") or len(line.split()) < 3:
            continue
        file, scope, new = line.split()[:3]
        owner, colon, name = scope.partition(":")
        if colon:
            scoped[file][owner][name] = new
        else:
            old = owner.split(".")[-1]
            defined[file][old] = new
            anywhere[old].add(new)
for table in (CONTROL, LANGUAGE, METRICS):
    for old, new in table.items():
        anywhere[old].add(new)
OLD_OF = defaultdict(dict)
for file, functions in scoped.items():
    for owner, names in functions.items():
        OLD_OF[file][owner] = names


def new_qualname(file: str, owner: str) -> str:
    return ".".join(defined[file].get(part, part) for part in owner.split("."))


def in_text(text: str, names: dict[str, str], *, args: bool) -> str:
    def backticked(m: re.Match[str]) -> str:
        return "`" + re.sub(r"(?<![\w'\"/-])[A-Za-z_]\w*(?![\w'\"])", lambda w: names.get(w[0], w[0]), m[1]) + "`"

    text = re.sub(r"`([^`\n]+)`", backticked, text)
    if args:
        text = re.sub(
            r"(?m)^(\s+|.*?  )((?:[a-z_]\w*)(?:, [a-z_]\w*)*)(?=: )",
            lambda m: m[1] + ", ".join(names.get(w, w) for w in m[2].split(", ")),
            text,
        )
    return text


def main() -> None:
    write = "--write" in sys.argv
    for path in sorted((ROOT / "understudy").rglob("*.py")):
        file = str(path.relative_to(ROOT))
        source = path.read_text()
        lines = source.split("\n")
        tree = ast.parse(source)
        by_new = {new_qualname(file, owner): names for owner, names in scoped[file].items()}

        def visit(node, qual, by_new=by_new, lines=lines, file=file):
            for child in ast.iter_child_nodes(node):
                name = getattr(child, "name", None)
                inner = f"{qual}.{name}".lstrip(".") if isinstance(child, ast.FunctionDef | ast.ClassDef) else qual
                if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.body:
                    first = child.body[0]
                    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                        names = by_new.get(inner, {}) if isinstance(child, ast.FunctionDef) else {}
                        names = {**defined[file], **names} if isinstance(child, ast.ClassDef) else names
                        fix(lines, first, names)
                visit(child, inner)

        def fix(lines, node, names):
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = in_text(lines[i], names, args=i > node.lineno - 1)

        visit(tree, "")
        new = "\n".join(lines)
        if new != source:
            for a, b in zip(source.split("\n"), lines, strict=True):
                if a != b:
                    print(f"{file}\n  - {a.strip()}\n  + {b.strip()}")
            if write:
                path.write_text(new)


main()
