"""The second step: where the engine cannot see that a name is a config field. `second.py ROOT`; once only.

Attributes of configs that are typed Any, keys and keywords beside other fields, flags in command lines, names of metrics.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from fields import CONTROL, LANGUAGE, METRICS, keys_of, world_of

ROOT = Path(sys.argv[1])
CFG = re.compile(r"^(.*\.)?(cfg|config|base|tuned|settings|saved)$")
LANGUAGE_FLAGS = re.compile(r"language|--model|--max-new|--reward|--rows|--lora|sft|dpo|reward-model|grpo")


def world(path: Path, tree: ast.Module) -> str:
    if "control" in path.parts:
        return "control"
    if "language" in path.parts:
        return "language"
    return world_of(tree, path)


def table_of(name: str) -> dict[str, str]:
    if name == "?":
        return {k: v for k, v in CONTROL.items() if LANGUAGE.get(k) == v}
    return {"control": CONTROL, "language": LANGUAGE}[name]


def edits_of(path: Path):
    text = path.read_text()
    tree = ast.parse(text)
    w = world(path, tree)
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and CFG.match(ast.unparse(node.value)):
            new = table_of(w).get(node.attr)
            if new:
                # position of the attribute's name: the end of the node
                yield node.end_lineno, node.end_col_offset - len(node.attr.encode()), node.attr, new
    for line, col, old, new, _w, strong, is_dict, _ in keys_of(path):
        if not strong:
            continue
        if new is None:
            new = {k: v for k, v in CONTROL.items() if LANGUAGE.get(k) == v}.get(old)
        if new is None:
            continue
        yield line, col + (1 if is_dict else 0), old, new
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in METRICS:
            yield node.lineno, node.col_offset + 1, node.value, METRICS[node.value]
    del lines


def apply(path: Path) -> int:
    lines = path.read_text().split("\n")
    per = defaultdict(set)
    for line, col, old, new in edits_of(path):
        per[line].add((col, old, new))
    n = 0
    for line, some in per.items():
        raw = lines[line - 1].encode()
        for col, old, new in sorted(some, reverse=True):
            if raw[col : col + len(old)] != old.encode():
                print("NOT THERE", path, line, col, old, raw[col : col + 20])
                continue
            raw = raw[:col] + new.encode() + raw[col + len(old) :]
            n += 1
        lines[line - 1] = raw.decode()
    path.write_text("\n".join(lines))
    return n


WORLD = re.compile(
    r"understudy (control|language)|\"(control|language)\"|'(control|language)'|"
    r"\b(control|language) (?:ppo|grpo|sft|dpo|reinforce|reward|actor)"
)
FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z][a-z-]*)(?![\w-])")


def flags(path: Path) -> int:
    text = path.read_text()
    out, n = [], 0
    language = False
    for line in text.split("\n"):
        words = WORLD.findall(line)
        if words:
            language = "language" in [w for some in words for w in some if w][-1:]
        elif path.suffix == ".py":
            language = "language" in path.name or (language and bool(line.strip()))

        def new(m, line=line, language=language):
            nonlocal n
            name = m[2].replace("-", "_")
            only_language = name in LANGUAGE and name not in CONTROL
            only_control = name in CONTROL and name not in LANGUAGE
            if name in ("rows", "steps", "scale", "form", "samples", "out", "center", "moving"):
                if name == "out" or (name in ("rows", "steps") and not (language or LANGUAGE_FLAGS.search(line))):
                    return m[0]
                to = LANGUAGE[name]
                if name in ("rows", "steps"):
                    print("FLAG?", path.name, line.strip()[:150])
            elif only_language:
                to = LANGUAGE[name]
            elif only_control or (CONTROL.get(name) == LANGUAGE.get(name) and name in CONTROL):
                to = CONTROL[name]
            else:
                return m[0]
            n += 1
            return f"--{m[1] or ''}{to.replace('_', '-')}"

        out.append(FLAG.sub(new, line))
    path.write_text("\n".join(out))
    return n


if __name__ == "__main__":
    count = Counter()
    for d in ("understudy", "tests", "bench", "examples"):
        for p in sorted((ROOT / d).rglob("*.py")):
            if "peers" in p.parts or "oracles" in p.parts or p.name == "mutants.py" or p.name == "peers.py":
                continue
            count["names"] += apply(p)
            count["flags"] += flags(p)
    for p in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "Makefile", ROOT / "CONTRIBUTING.md"]:
        count["docs"] += flags(p)
    print(count)
