"""How much a newcomer reads to follow one PPO update on CartPole: every function of ours that one iteration enters."""

import ast
import re
import sys
from pathlib import Path

import torch
from gymnasium.vector import SyncVectorEnv

import understudy
from understudy.control import networks, ppo, rollout
from understudy.control.envs import make as environment

PACKAGE = Path(understudy.__file__).parent
LINES, FILES = 680, 20


def entered_in_one_iteration(tmp_path, monkeypatch) -> set[tuple[Path, int]]:
    """(file, first line) of each function of ours entered between the second iteration's start and its end.

    Plain: what runs faster says the same, and is read apart (`tests/test_numpy_actor.py`, `test_linear.py`,
    `test_compiled_update.py`, `test_vector_env.py`).
    """
    config = ppo.Config(
        env="CartPole-v1", num_envs=4, num_steps_per_env=32, num_epochs=2, quiet=True, output_dir=str(tmp_path / "run")
    )
    monkeypatch.setattr(rollout, "make_numpy_actor", lambda policy, walker: None)
    monkeypatch.setattr(environment, "FastSyncVectorEnv", SyncVectorEnv)
    monkeypatch.setattr(environment, "use_fast_action_space", lambda env: None)
    monkeypatch.setattr(networks, "Linear", torch.nn.Linear)
    monkeypatch.setitem(networks.ACTIVATIONS, "tanh", torch.nn.Tanh)
    iterations = ppo.iterate(config)
    next(iterations)
    found: set[tuple[Path, int]] = set()

    def watch(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            found.add((path, frame.f_code.co_firstlineno))

    sys.setprofile(watch)
    try:
        next(iterations)
    finally:
        sys.setprofile(None)
        iterations.close()
    return found


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that are code: not blank, not a comment, not a docstring."""
    source = path.read_text()
    lines = {n for n, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def read_in(entered: dict[Path, set[int]]) -> dict[Path, set[int]]:
    """The code lines, by file, of the functions that begin at the given lines and of the classes these name.

    A class is its first line and its fields. What it names in turn counts too.
    """
    trees = {path: ast.parse(path.read_text()) for path in entered}
    text = {path: path.read_text().splitlines() for path in entered}
    code = {path: code_lines(path) for path in entered}
    lines: dict[Path, set[int]] = {path: set() for path in entered}
    for path, firsts in entered.items():
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.FunctionDef | ast.Lambda) and _first(node) in firsts:
                lines[path] |= set(range(_first(node), (node.end_lineno or 0) + 1))
    while True:
        before = sum(map(len, lines.values()))
        names = {w for path in lines for n in lines[path] & code[path] for w in re.findall(r"\w+", text[path][n - 1])}
        for path, tree in trees.items():
            for node in ast.walk(tree):
                own = isinstance(node, ast.ClassDef) and {
                    _first(f) for f in node.body if isinstance(f, ast.FunctionDef)
                }
                if isinstance(node, ast.ClassDef) and (node.name in names or own & entered[path]):
                    lines[path].add(node.lineno)
                    for part in node.body:
                        if isinstance(part, ast.Assign | ast.AnnAssign):
                            lines[path] |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
        if sum(map(len, lines.values())) == before:
            return {path: found & code[path] for path, found in lines.items()}


def _first(node: ast.FunctionDef | ast.Lambda) -> int:
    """Where a function begins for the interpreter: at its first decorator."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def test_one_ppo_update_reads_in_under_680_lines(tmp_path, monkeypatch, capsys):
    by_file: dict[Path, set[int]] = {}
    for path, first in entered_in_one_iteration(tmp_path, monkeypatch):
        by_file.setdefault(path, set()).add(first)
    counted = {path.relative_to(PACKAGE): len(lines) for path, lines in read_in(by_file).items()}

    with capsys.disabled():
        print(f"\none PPO update on CartPole: {sum(counted.values())} lines in {len(counted)} files")
        for path, count in sorted(counted.items(), key=lambda item: -item[1]):
            print(f"  {count:4d}  {path}")
    assert sum(counted.values()) < LINES
    assert len(counted) <= FILES


def test_the_counter_counts_code_and_nothing_else():
    lines = code_lines(Path(__file__))

    assert 1 not in lines  # a docstring
    assert 3 in lines  # an import
