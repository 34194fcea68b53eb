"""Files of the package and their tests go where the floor plan has them; what names them follows. `moves.py ROOT`; once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])
MOVES = {  # within understudy/, without .py
    "score": "reward",
    "constrain": "constraints",
    "products": "fast/linear",
    "compiled": "fast/compiled_update",
    "resuming": "run/resume",
    "run/picture": "run/plots",
    "run/sinks": "run/trackers",
    "control/environment": "control/envs/make",
    "control/spaces": "control/envs/spaces",
    "control/masks": "control/envs/masks",
    "control/sources": "control/envs/sources",
    "control/infos": "control/envs/infos",
    "control/parallel": "control/envs/parallel",
    "control/wrappers": "control/envs/wrappers",
    "control/preflight": "control/envs/checks",
    "control/vector_preflight": "control/envs/vector_checks",
    "control/costs": "control/envs/costs",
    "control/supervise": "control/envs/fault_tolerant",
    "control/standing": "control/envs/state",
    "control/quick": "control/fast/numpy_actor",
    "control/rows": "control/fast/vector_env",
    "control/optimizer": "control/fast/optimizer",
    "control/collect": "control/rollout",
    "control/layout": "control/record_layout",
    "control/stage": "control/training",
    "language/data": "language/data/files",
    "language/layouts": "language/data/layouts",
    "language/bounded": "language/data/bounded",
    "language/tokenizer": "language/data/tokenizer",
    "language/text": "language/data/records",
    "language/fitting": "language/data/fitting",
    "language/model": "language/model/policy",
    "language/files": "language/model/loading",
    "language/scorer": "language/model/reward_model",
    "language/tokens": "language/model/token_distribution",
    "language/reading": "language/model/forward",
    "language/lora": "language/model/lora",
    "language/top": "language/model/top_layers",
    "language/optimizer": "language/model/optimizer",
    "language/generate": "language/rollout/generate",
    "language/cache": "language/rollout/kv_cache",
    "language/collect": "language/rollout/sampler",
    "language/turns": "language/rollout/multi_turn",
    "language/completions": "language/rollout/completions",
    "language/judge": "language/rewards/reward_sum",
    "language/worker": "language/rewards/worker",
    "language/final_answer": "language/rewards/final_answer",
    "language/function_state": "language/rewards/function_state",
    "language/lean": "language/fast/llama",
    "language/cast": "language/rlhf",
    "language/stage": "language/training",
    "language/ancestry": "language/provenance",
    "language/rehearsal": "language/toy_language",
}
TESTS = {  # within tests/, without .py
    "test_score": "test_reward",
    "test_constrain": "test_constraints",
    "test_products": "test_linear",
    "test_compiled": "test_compiled_update",
    "test_quick": "test_numpy_actor",
    "test_rows": "test_vector_env",
    "test_collect": "test_rollout",
    "test_text": "test_records",
    "test_data": "test_data_files",
    "test_model": "test_language_policy",
    "test_tokens": "test_token_distribution",
    "test_turns": "test_multi_turn",
    "test_judge": "test_reward_sum",
    "test_lean": "test_fast_llama",
    "test_rehearsal": "test_toy_language",
    "faults/test_supervise": "faults/test_fault_tolerant",
    "faults/test_supervised_records": "faults/test_fault_tolerant_records",
}
OUTER = "understudy tests bench examples"


def git(*words: str) -> None:
    subprocess.run(["git", *words], cwd=ROOT, check=True)


def dotted(path: str) -> str:
    return "understudy." + path.replace("/", ".")


def module_imports(text: str, path: Path) -> str:
    """`from understudy.control import collect` and its uses in the file."""
    tree = ast.parse(text)
    lines = text.split("\n")
    stores = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    stores |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    stores |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    renames: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("understudy"):
            continue
        base = node.module.removeprefix("understudy").lstrip(".").replace(".", "/")
        keep, moved = [], []
        for alias in node.names:
            old = f"{base}/{alias.name}".lstrip("/")
            (moved if old in MOVES else keep).append((alias, MOVES.get(old, "")))
        if not moved:
            continue
        indent = " " * node.col_offset
        out = []
        if keep:
            names = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a, _ in keep)
            out.append(f"{indent}from {node.module} import {names}")
        for alias, new in moved:
            folder, _, name = new.rpartition("/")
            package = "understudy" + ("." + folder.replace("/", ".") if folder else "")
            bound = alias.asname or alias.name
            if alias.asname is None and name != alias.name:
                if name in stores or name in {"make", "state", "forward", "files", "policy"}:
                    out.append(f"{indent}from {package} import {name} as {bound}")
                    continue
                renames[alias.name] = name
                bound = name
            out.append(f"{indent}from {package} import {name}" + (f" as {bound}" if bound != name else ""))
        for i in range(node.lineno - 1, node.end_lineno or 0):
            lines[i] = "\0"
        lines[node.lineno - 1] = "\n".join(out)
    text = "\n".join(line for line in lines if line != "\0")
    if renames:
        tree = ast.parse(text)
        lines = text.split("\n")
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in renames]
        for n in sorted(uses, key=lambda n: (n.lineno, n.col_offset), reverse=True):
            raw = lines[n.lineno - 1].encode()
            lines[n.lineno - 1] = (
                raw[: n.col_offset] + renames[n.id].encode() + raw[n.col_offset + len(n.id.encode()) :]
            ).decode()
        text = "\n".join(lines)
    return text


def main() -> None:
    for folder in sorted({new.rpartition("/")[0] for new in MOVES.values()} - {""}):
        (ROOT / "understudy" / folder).mkdir(exist_ok=True)
    moved = []
    for old, new in MOVES.items():  # two steps: data.py makes way for data/
        git("mv", f"understudy/{old}.py", f"understudy/{new.replace('/', '__')}.py.moving")
        moved.append(new)
    for new in moved:
        (ROOT / "understudy" / new).parent.mkdir(parents=True, exist_ok=True)
        git("mv", f"understudy/{new.replace('/', '__')}.py.moving", f"understudy/{new}.py")
    for folder in (
        "fast",
        "control/envs",
        "control/fast",
        *(f"language/{x}" for x in ("data", "model", "rollout", "rewards", "fast")),
    ):
        init = ROOT / "understudy" / folder / "__init__.py"
        init.write_text("")
        git("add", str(init))
    for old, new in TESTS.items():
        git("mv", f"tests/{old}.py", f"tests/{new}.py")
    dots = {dotted(old): dotted(new) for old, new in MOVES.items()}
    dot = re.compile("(?<![\\w.])(" + "|".join(map(re.escape, sorted(dots, key=len, reverse=True))) + ")(?![\\w])")
    slash = re.compile(
        r"(?<![\w/.-])((?:understudy/)?)("
        + "|".join(map(re.escape, sorted(MOVES, key=len, reverse=True)))
        + r")(\.py)(?![\w])(?!:\w)"
    )
    test = re.compile(
        r"(?<![\w])(" + "|".join(sorted((t.rpartition("/")[2] for t in TESTS), key=len, reverse=True)) + r")(?![\w])"
    )
    test_of = {old.rpartition("/")[2]: new.rpartition("/")[2] for old, new in TESTS.items()}
    files = [p for d in OUTER.split() for p in (ROOT / d).rglob("*.py")]
    for path in files:
        text = path.read_text()
        new = module_imports(text, path)
        new = dot.sub(lambda m: dots[m[1]], new)
        if "rename" not in path.parts:
            new = slash.sub(lambda m: m[1] + MOVES[m[2]] + m[3], new)
            new = test.sub(lambda m: test_of[m[1]], new)
        if new != text:
            path.write_text(new)
    prose = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    for path in prose:
        text = path.read_text()
        new = slash.sub(lambda m: m[1] + MOVES[m[2]] + m[3], dot.sub(lambda m: dots[m[1]], text))
        new = test.sub(lambda m: test_of[m[1]], new)
        if new != text:
            path.write_text(new)


main()
