"""What may be left after by_hand.py: attributes, keywords and names in setattr that nothing in ROOT defines any more."""

import ast
import pathlib
import sys

root = pathlib.Path(sys.argv[1])
members = {}
params = {}
mods = {}
for p in sorted((root / "scripts/rename").glob("*.tsv")):
    if p.name == "fields.tsv":
        continue
    for line in p.read_text().splitlines():
        w = line.split()
        if len(w) < 3 or line.startswith("#"):
            continue
        f, scope, new = w[:3]
        if ":" in scope:
            params.setdefault(scope.split(":")[1], set()).add(new)
        elif "." in scope:
            members.setdefault(scope.split(".")[-1], set()).add(new)
        else:
            mods.setdefault(scope, set()).add(new)
defined = set()
kws = set()
for d in ("understudy", "tests", "bench", "examples"):
    for p in (root / d).rglob("*.py"):
        if p.name == "mutants.py":
            continue
        for n in ast.walk(ast.parse(p.read_text())):
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
                defined.add(n.name)
                if isinstance(n, ast.FunctionDef):
                    for a in n.args.args + n.args.kwonlyargs + n.args.posonlyargs:
                        kws.add(a.arg)
            if isinstance(n, ast.ClassDef):
                for s in n.body:
                    if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name):
                        defined.add(s.target.id)
                        kws.add(s.target.id)
                    if isinstance(s, ast.Assign):
                        for t in s.targets:
                            for q in ast.walk(t):
                                if isinstance(q, ast.Name):
                                    defined.add(q.id)
            if isinstance(n, ast.Module):
                for s in n.body:
                    for t in (
                        s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AnnAssign) else []
                    ):
                        for q in ast.walk(t):
                            if isinstance(q, ast.Name):
                                defined.add(q.id)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store):
                defined.add(n.attr)
old = (members.keys() | mods.keys()) - defined
oldkw = (params.keys() | members.keys()) - kws
out = []
for d in ("understudy", "tests", "bench", "examples"):
    for p in sorted((root / d).rglob("*.py")):
        if p.name == "mutants.py":
            continue
        src = p.read_text()
        lines = src.splitlines()
        for n in ast.walk(ast.parse(src)):
            if isinstance(n, ast.Attribute) and n.attr in old:
                out.append(
                    (
                        p.relative_to(root),
                        n.end_lineno,
                        "ATTR",
                        n.attr,
                        (members.get(n.attr) or mods.get(n.attr)),
                        lines[n.end_lineno - 1].strip()[:110],
                    )
                )
            elif isinstance(n, ast.Call):
                for k in n.keywords:
                    if k.arg in oldkw:
                        out.append(
                            (
                                p.relative_to(root),
                                k.value.lineno,
                                "KW",
                                k.arg,
                                (params.get(k.arg) or members.get(k.arg)),
                                lines[k.value.lineno - 1].strip()[:110],
                            )
                        )
                f = n.func
                nm = f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")
                if nm in ("setattr", "getattr", "hasattr", "delattr", "patch", "Clock"):
                    for a in n.args:
                        if (
                            isinstance(a, ast.Constant)
                            and isinstance(a.value, str)
                            and a.value.split(".")[-1] in (old | oldkw)
                        ):
                            out.append(
                                (p.relative_to(root), a.lineno, "STR", a.value, "", lines[a.lineno - 1].strip()[:110])
                            )
for o in out:
    print(*o)
