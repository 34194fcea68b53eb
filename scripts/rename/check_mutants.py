"""From the root, after mutants_rule.py: which of the mutants that are written by hand are stale, or no longer Python."""

import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, "tests")
import mutants as M

root = pathlib.Path("understudy")
bad = 0
d = pathlib.Path(tempfile.mkdtemp())
names = {}
for i, m in enumerate(M.HAND):
    p = root / m.file
    if not p.exists():
        print("NOFILE", m.file)
        continue
    s = p.read_text()
    n = s.count(m.old)
    if n != 1 and m.at is None:
        print("COUNT", n, m.file, repr(m.old)[:100])
        bad += 1
        continue
    t = M.apply(m, s)
    try:
        compile(t, m.file, "exec")
    except SyntaxError:
        print("SYNTAX", m.file, repr(m.old)[:80], "->", repr(m.new)[:80])
        bad += 1
        continue
    f = d / f"m{i}.py"
    f.write_text(t)
    names[f.name] = m
r = subprocess.run(
    [".venv/bin/ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise", str(d)],
    capture_output=True,
    text=True,
).stdout
for line in r.splitlines():
    k = line.split("/")[-1].split(":")[0]
    if k in names:
        print("UNDEF", names[k].file, line.split("F821")[-1], "|", names[k].old[:60], "->", names[k].new[:60])
print(len(M.HAND), bad)
