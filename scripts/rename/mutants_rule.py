"""After the engine's pass: the source text that tests/mutants.py holds follows the renames.

`mutants_rule.py ROOT`: the files as of HEAD are the old ones, the working tree's (formatted or not) the new ones.
"""

import ast
import difflib
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

root = Path(sys.argv[1])


def old_of(f):
    return subprocess.run(["git", "show", f"HEAD:{f}"], cwd=root, capture_output=True, text=True, check=True).stdout


SKIP = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}


def toks(text):
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    out = []
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type in SKIP:
            continue
        out.append((starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1], t.string))
    return out


def kind(word):
    return "ID" if word.isidentifier() else "FSTR" if fstr(word) else word


class File:
    def __init__(self, f):
        self.old = old_of(f"understudy/{f}")
        self.new = (root / "understudy" / f).read_text()
        o, n = toks(self.old), toks(self.new)
        # the formatter moves commas and parentheses: align with difflib on kind
        if len(o) != len(n) or any(not same(a[2], b[2]) for a, b in zip(o, n, strict=True)):
            sm = difflib.SequenceMatcher(None, [kind(t[2]) for t in o], [kind(t[2]) for t in n], autojunk=False)
            pairs = {}
            for tag, i1, i2, j1, _ in sm.get_opcodes():
                if tag == "equal":
                    for k in range(i2 - i1):
                        pairs[i1 + k] = n[j1 + k][2]
            self.o = [(a, b, s, pairs.get(i, s)) for i, (a, b, s) in enumerate(o)]
        else:
            self.o = [(a, b, s, m[2]) for (a, b, s), m in zip(o, n, strict=True)]
        self.everywhere = defaultdict(Counter)
        for _, _, s, m in self.o:
            self.everywhere[s][m] += 1

    def mapped(self, lo, hi):
        text = self.old
        out = []
        at = lo
        local = {}
        for a, b, s, m in self.o:
            if b <= lo or a >= hi:
                continue
            if a < lo or b > hi:
                if s != m:  # a snippet that begins or ends inside a word
                    part = text[max(a, lo) : min(b, hi)]
                    out.append(text[at : max(a, lo)])
                    out.append(part)
                    at = min(b, hi)
                continue
            out.append(text[at:a])
            out.append(m)
            at = b
            local[s] = m
        out.append(text[at:hi])
        return "".join(out), local


def fstr(a):
    return a[:2] in ('f"', "f'") or a[:3] in ('rf"', 'fr"')


def same(a, b):
    return a == b or (a.isidentifier() and b.isidentifier()) or (fstr(a) and fstr(b))


WORD = re.compile(r"[A-Za-z_]\w*")


def follow(new, local, near, file):
    def one(m):
        w = m.group()
        for table in (local, near):
            if w in table:
                return table[w]
        c = file.everywhere.get(w)
        return c.most_common(1)[0][0] if c else w

    return WORD.sub(one, new)


def near_of(file, lo, hi):
    """Names of the lines around, nearest last."""
    found = {}
    a = max(0, lo - 1500)
    b = min(len(file.old), hi + 1500)
    some = [t for t in file.o if t[0] >= a and t[1] <= b]
    for t in sorted(some, key=lambda t: -abs(t[0] - lo)):
        found[t[2]] = t[3]
    return found


def loose(text, snippet):
    """Where a snippet stands but for white space, or None."""
    parts = [re.escape(p) for p in re.findall(r"\w+|[^\w\s]", snippet)]
    return [m.span() for m in re.finditer(r"\s*".join(parts), text)]


files = {}


def file_of(f):
    if f not in files:
        files[f] = File(f)
    return files[f]


src = (root / "tests/mutants.py").read_text()
tree = ast.parse(src)
starts = [0]
for line in src.encode().splitlines(keepends=True):
    starts.append(starts[-1] + len(line))
b = src.encode()
edits = []
stale = []


def span(n):
    return starts[n.lineno - 1] + n.col_offset, starts[n.end_lineno - 1] + n.end_col_offset


def handle(fnode, onode, nnode):
    f = ast.literal_eval(fnode)
    old = ast.literal_eval(onode)
    new = ast.literal_eval(nnode)
    if not (root / "understudy" / f).is_file():
        stale.append((f, old, "no file"))
        return
    F = file_of(f)
    at = [m.start() for m in re.finditer(re.escape(old), F.old)]
    where = [(a, a + len(old)) for a in at] or loose(F.old, old)
    if not where:
        stale.append((f, old, "not in the old file"))
        return
    lo, hi = where[0]
    text, local = F.mapped(lo, hi)
    if len(at) == 0:
        text = " ".join(text.split())
    if text not in F.new and at:
        spans = loose(F.new, text)
        if len(spans) == 1:
            text = F.new[slice(*spans[0])]
        else:
            stale.append((f, old, f"mapped to {text!r}, which is not there"))
    new2 = follow(new, local, near_of(F, lo, hi), F)
    for node, was, now in ((onode, old, text), (nnode, new, new2)):
        if was != now:
            edits.append(
                (*span(node), repr(now) if "\n" in now or '"' in now else '"' + now.replace("\\", "\\\\") + '"')
            )


for n in ast.walk(tree):
    if (
        isinstance(n, ast.Call)
        and isinstance(n.func, ast.Name)
        and n.func.id == "Mutant"
        and len(n.args) >= 4
        and isinstance(n.args[0], ast.Constant)
    ):
        try:
            handle(*n.args[:3])
        except ValueError:
            stale.append((ast.unparse(n)[:80], "", "not literal"))
    if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "EQUIVALENT":
        for k in n.value.keys:
            if isinstance(k, ast.Tuple):
                try:
                    handle(*k.elts)
                except ValueError:
                    stale.append((ast.unparse(k)[:80], "", "not literal"))
for lo, hi, text in sorted(edits, reverse=True):
    b = b[:lo] + text.encode() + b[hi:]
# what the formatter broke, what stands in f-strings, and what is no longer said once
AFTER = {
    '"+ value_coef * value_loss", "+ value_loss"': '"policy_loss + value_coef * value_loss", "policy_loss + value_loss"',
    '"if packing and (difference :=", "if not packing and (difference :="': (
        r'"packing\n            and (difference :=", "not packing\n            and (difference :="'
    ),
    """'recent_skips = self.training_run.recipe_state["skipped"] = [*self.training_run.recipe_state.get("skipped", ()), iteration]'""": (  # noqa: E501
        """'recent_skips = self.training_run.recipe_state["skipped"] = [\\n            *self.training_run.recipe_state.get("skipped", ()),\\n'"""  # noqa: E501
    ),
    """'recent_skips = self.skipped = [*getattr(self, "skipped", ()), iteration]'""": (
        """'recent_skips = self.skipped = [\\n            *getattr(self, "skipped", ()),\\n'"""
    ),
    '"{mend}; {whole(run)}"': '"{fix}; {describe_last_checkpoint(run)}"',
}
text = b.decode()
for was, now in AFTER.items():
    text = text.replace(was, now)
(root / "tests/mutants.py").write_text(text)
print(len(edits), "strings changed;", len(stale), "stale")
for s in stale:
    print(s)
