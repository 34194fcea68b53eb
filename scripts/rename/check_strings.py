"""`check_strings.py ROOT`: literals of understudy/ that differ from HEAD: no seed, event, metric or file may."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path


def literals(source: str) -> Counter[str]:
    tree = ast.parse(source)
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return Counter(
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    )


root = Path(sys.argv[1])
for path in sorted((root / "understudy").rglob("*.py")):
    name = path.relative_to(root)
    old = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=root, capture_output=True, text=True, check=True).stdout
    was, now = literals(old), literals(path.read_text())
    if was != now:
        print(name, "-", dict(was - now), "+", dict(now - was))
