"""Step 2, score: a judge gives each row, a completion, a score [B]; nan is missing, which is never zero."""

from __future__ import annotations

import ast
import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from understudy.language.data import FUNCTIONS_OWN
from understudy.language.final_answer import final_number
from understudy.language.worker import Fault, InProcess, Worker
from understudy.run.config import RequestError, nearest
from understudy.run.origin import listed

KINDS = ("raised", "timeout", "garbled", "wrong length", "none", "nan")
HANGS = 8
"""How many rows of a batch may hang or garble their answers one by one before the rest of it is given up."""


@dataclass(frozen=True)
class Sampled:
    """What is to be judged: B rows, every list in the same order."""

    prompts: list[str] | list[list[dict]]
    """As the data had them: text or chat messages."""
    completions: list[str] | list[list[dict]]
    """Decoded text; chat rows are `[{"role": "assistant", "content": ...}]`."""
    completion_ids: list[list[int]]
    truncated: list[bool]
    """Cut by the length limit, without an end of its own."""
    columns: dict[str, list[Any]]
    """Every other column of the data."""

    def __len__(self) -> int:
        return len(self.completions)


class Verdict(NamedTuple):
    """What a judge says about B rows."""

    score: Tensor
    """[B] float32; nan is missing."""
    parts: dict[str, Tensor]
    """Each part's own score by name, unweighted, [B] float32; nan is missing."""
    gold: Verdict | None = None
    """What is measured of the same rows and never paid."""


def row_of(verdict: Verdict, row: int, prefix: str = "") -> dict[str, Any]:
    """What is said about one row, as plain data: score and terms by name, unweighted; None is missing.

    Gold is there under the same names with "gold" before them, where it was measured.
    """
    terms = {name: _plain(part[row]) for name, part in verdict.parts.items()}
    found = {prefix or "score": _plain(verdict.score[row]), f"{prefix}_terms" if prefix else "terms": terms}
    return found | ({} if verdict.gold is None else row_of(verdict.gold, row, "gold"))


Part = Callable[[Sampled], Tensor]  # -> [B] float32, nan where missing
Spec = str | Callable[..., Any] | tuple[str | Callable[..., Any], float]


class Judge:
    """A weighted sum of parts; a part of weight 0 is measured and nothing else.

    A part may have nothing to say of a row: a function says None, a cell to compare with is empty. Such a row is left to the
    other parts, or is missing. Where a part fails the row is missing in any case.
    """

    def __init__(self, parts: Sequence[tuple[str, float, Part]], *, missing: Literal["term", "row"] = "term") -> None:
        """parts: name, weight, part. The second of a name becomes name_2.  missing: what None leaves out."""
        self.missing = missing
        self.parts: dict[str, tuple[float, Part]] = {}
        for name, weight, part in parts:
            names = (name, *(f"{name}_{i}" for i in range(2, len(parts) + 1)))
            self.parts[next(free for free in names if free not in self.parts)] = (weight, part)
        self.failures: dict[str, int] = dict.fromkeys(KINDS, 0)
        """How many rows went missing so far, by kind; a row missing in two parts counts twice."""
        self.field = "reward"
        """What a refusal calls this judge."""
        self.last_error = ""
        """The first message of the latest batch in which something went wrong."""
        self.reported: set[tuple[str, str]] = set()
        """Each part with the kinds of failure that `reports` has described."""
        self.reports: list[str] = []
        """A sentence for each part whose rows went missing in a new way; whoever prints them clears the list."""

    @classmethod
    def of(
        cls,
        specs: Sequence[Spec],
        *,
        load_model: Callable[[str], Part],
        timeout: float = 30.0,
        field: str = "reward",
        missing: Literal["term", "row"] = "term",
    ) -> Judge:
        """The judge that specs describe; `RequestError` names `field` where one of them is wrong.

        Args:
            specs: `DIR`, `file.py:function` or `builtin[:args]`, each optionally `*WEIGHT`; or a Python function
                `score(prompts, completions, **columns) -> list[float | None]`, run in process and called by keyword;
                or either of them with a weight, as a pair.
            load_model: makes a part of a reward model's directory.
            timeout: seconds a file's function may take for a batch.
            missing: what None leaves out, the term or the row.
        """
        if not specs:
            raise RequestError(f"{field} is empty: name at least one DIR, file.py:function or builtin")
        parts = []
        with contextlib.ExitStack() as started:
            for given in specs:
                with _naming(field, given):
                    name, weight, part = _part(given, load_model, timeout)
                if isinstance(part, Function):
                    started.callback(part.asked.close)
                parts.append((name, weight, part))
            started.pop_all()
        judge = cls(parts, missing=missing)
        judge.field = field
        return judge

    @torch.no_grad()
    def __call__(self, sampled: Sampled) -> Verdict:
        """Score B rows, in their order, on the CPU."""
        total, found, errors = torch.zeros(len(sampled)), {}, []
        scored = torch.full((len(sampled),), not any(weight for weight, _ in self.parts.values()))
        for name, (weight, part) in self.parts.items():
            with _naming(self.field, name):
                score = part(sampled)
            if score.shape != total.shape:
                raise ValueError(f"part {name!r} gave {tuple(score.shape)}: must be [{len(sampled)}], a score a row")
            found[name] = _finite(score.to("cpu", torch.float32))
            if weight:
                silent = _silent(part, found[name]) if self.missing == "term" else torch.zeros_like(scored)
                total, scored = total + torch.where(silent, 0.0, weight * found[name]), scored | ~silent
            errors += self._count(name, part, found[name])
        self.last_error = next(iter(errors), self.last_error)
        return Verdict(_finite(total.where(scored, math.nan)), found)

    @property
    def functions(self) -> dict[str, Function]:
        """The parts that are functions of the user's."""
        return {name: part for name, (_, part) in self.parts.items() if isinstance(part, Function)}

    def close(self) -> None:
        """End the workers."""
        for function in self.functions.values():
            function.asked.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, name: str, part: Part, score: Tensor) -> list[str]:
        """Count a part's missing rows; the messages of what went wrong, rows first."""
        faults = part.faults if isinstance(part, Function) else {}
        missing = score.isnan().nonzero()[:, 0].tolist()
        found = {row: faults.get(row, Fault("nan", "the score is not a finite number")) for row in missing}
        kinds = Counter(fault.kind for fault in found.values())
        self.failures = {kind: count + kinds[kind] for kind, count in self.failures.items()}
        errors = [f"{name}, row {row}: {fault.message}" for row, fault in found.items() if fault.kind != "none"]
        batch = part.batch_fault if isinstance(part, Function) else None
        if batch:
            errors.append(f"{name}, asked again row by row: {batch.message}")
        happened = {(name, kind) for kind in kinds} | ({(name, f"batch {batch.kind}")} if batch else set())
        if not happened <= self.reported:
            self.reported |= happened
            self.reports.append(self._report(name, kinds, len(score), errors))
        return errors

    def _report(self, name: str, kinds: Counter[str], rows: int, errors: list[str]) -> str:
        """What went missing of a batch, in a sentence."""
        if not kinds:
            return f"{self.field} {errors[0]}; that is slower, and no score is lost"
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        first = f"; the first: {errors[0]}" if errors else ""
        return (
            f"{self.field} {name} gave {sum(kinds.values())} of {rows} completions no score ({listed}{first}): they are "
            "missing, which is not 0"
        )


class Function:
    """A part that asks a function of the user's: a batch at once, and where that fails row by row.

    A row asked by itself has the batch's time limit over the number of rows, or over `HANGS` where that is fewer.
    """

    def __init__(self, asked: InProcess | Worker, spec: str) -> None:
        """asked: the function.  spec: what it was named by, without its weight."""
        self.asked, self.spec = asked, spec
        self.faults: dict[int, Fault] = {}
        self.batch_fault: Fault | None = None

    def __call__(self, sampled: Sampled) -> Tensor:
        given, rows = self._given(sampled), len(sampled)
        self.faults, self.batch_fault = {}, None
        try:
            scores = self._scores(given, range(rows), 1.0)
        except Fault as fault:
            self.batch_fault = fault
            scores = self._row_by_row(given, rows) if rows > 1 else self._missing(0, fault)
        for row in (row for row, score in enumerate(scores) if score is None and row not in self.faults):
            self.faults[row] = Fault("none", "None")
        return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32)

    def _given(self, sampled: Sampled) -> dict[str, list[Any]]:
        """What the function is called with."""
        return taken(self.asked.wants, columns_of(sampled))

    def _scores(self, given: dict[str, list[Any]], rows: range, share: float) -> list[float | None]:
        scores = self.asked.ask({name: column[rows.start : rows.stop] for name, column in given.items()}, share)
        if len(scores) != len(rows):
            raise Fault("wrong length", f"{len(scores)} scores for {len(rows)} rows")
        return scores

    def _row_by_row(self, given: dict[str, list[Any]], rows: int) -> list[float | None]:
        scores, hung, kind = [], 0, ""
        for row in range(rows):
            try:
                if hung == HANGS:
                    raise Fault(kind, f"not asked, for {HANGS} rows before it hung or garbled their answers")
                scores += self._scores(given, range(row, row + 1), 1 / min(rows, HANGS))
            except Fault as fault:
                if fault.kind in ("timeout", "garbled") and hung < HANGS:
                    hung, kind = hung + 1, fault.kind
                scores += self._missing(row, fault)
        return scores

    def _missing(self, row: int, fault: Fault) -> list[float | None]:
        self.faults[row] = fault
        return [None]


class Against:
    """A part: 1 where a completion reads like its cell, else 0; missing where the cell is empty."""

    def __init__(self, column: str, read: Callable[[str], Any], read_cell: Callable[[str], Any]) -> None:
        self.column, self.read, self.read_cell = column or "answer", read, read_cell

    def __call__(self, sampled: Sampled) -> Tensor:
        if self.column not in sampled.columns:
            raise RequestError(
                f"the data have no column {self.column!r}, only {', '.join(sampled.columns) or 'prompts'}; "
                f"name one of them after a ':' or map one with --columns {self.column}=NAME"
            )
        cells = [None if cell is None else self.read_cell(str(cell)) for cell in sampled.columns[self.column]]
        pairs = zip(_said(sampled), cells, strict=True)
        return torch.tensor([math.nan if cell is None else float(self.read(said) == cell) for said, cell in pairs])


def columns_of(sampled: Sampled) -> dict[str, list[Any]]:
    """All that a function may ask about the rows, by name."""
    return {**sampled.columns, **{name: getattr(sampled, name) for name in FUNCTIONS_OWN}}


def taken(wanted: dict[str, Any], columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Every column, or those that a function has parameters for.  wanted: see `worker.wants`."""
    for name in wanted["needs"]:
        if name not in columns:
            raise RequestError(
                f"its parameter {name!r} is no column of the data: "
                f"have {', '.join(columns)}; map one to it with --columns {name}=NAME or give it a default"
            )
    takes = wanted["takes"]
    return {name: column for name, column in columns.items() if takes is None or name in takes}


def length(target: str) -> Part:
    """`length`: tokens of the completion. `length:N`: -|tokens - N| / N, 0 at best."""
    if not target:
        return lambda sampled: torch.tensor([float(len(ids)) for ids in sampled.completion_ids])
    if not re.fullmatch("0*[1-9][0-9]*", target):
        raise RequestError(f"the target {target!r} must be a whole number of tokens above 0, as in length:40")
    goal = int(target)
    return lambda sampled: torch.tensor([-abs(len(ids) - goal) / goal for ids in sampled.completion_ids])


def contains(text: str) -> Part:
    """`contains:TEXT`: 1 where the completion has the text in it, else 0."""
    if not text:
        raise RequestError("contains needs a text to look for, as in contains:please")
    return lambda sampled: torch.tensor([float(text in said) for said in _said(sampled)])


def regex(pattern: str) -> Part:
    """`regex:PATTERN`: 1 where `re.search` finds the pattern in the completion, else 0."""
    if not pattern:
        raise RequestError("regex needs a pattern to look for, as in regex:^Yes")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RequestError(f"the pattern does not compile ({error}); write it as Python's re reads it") from error
    return lambda sampled: torch.tensor([float(bool(compiled.search(said))) for said in _said(sampled)])


def exact(column: str) -> Part:
    """`exact[:COLUMN]`: 1 where the completion is the column's text (`answer`), space around it apart; else 0.

    Missing where the column's cell is empty.
    """
    return Against(column, str.strip, lambda cell: cell.strip() or None)


def number(column: str) -> Part:
    """`number[:COLUMN]`: 1 where the completion's final number equals that of the column (`answer`), else 0.

    It is the first after `####` (GSM8K), the last in `\\boxed{}`, or the last of all; 3/2, 1.5 and \\frac{3}{2} are equal.
    Missing where the cell has no number.
    """
    return Against(column, final_number, final_number)


def repetition(nothing: str) -> Part:
    """`repetition`: the share of the completion's 4-grams of tokens that it has had before, from 0 up to 1."""
    if nothing:
        raise RequestError(f"repetition takes nothing after its name, not {nothing!r}")
    return lambda sampled: torch.tensor(
        [1 - distinct_n([ids], 4) if len(ids) >= 4 else 0.0 for ids in sampled.completion_ids]
    )


BUILTINS: dict[str, Callable[[str], Part]] = {
    "length": length,
    "contains": contains,
    "regex": regex,
    "exact": exact,
    "number": number,
    "repetition": repetition,
}
LARGEST_WEIGHT = 1e6  # a larger one takes scores out of float32's range
FREE_TEXT = ("contains:", "regex:")  # a '*' in these need not be a weight


def distinct_n(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams, across rows (after Li et al. 2016); 0 where there are none."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _part(spec: Spec, load_model: Callable[[str], Part], timeout: float) -> tuple[str, float, Part]:
    """What a spec names: its readable name, its weight, the part."""
    if isinstance(spec, tuple):
        if len(spec) != 2 or not isinstance(spec[1], int | float) or not abs(spec[1]) <= LARGEST_WEIGHT:
            raise RequestError(
                f"a pair must be a SPEC or function and its weight, a finite number, at most {LARGEST_WEIGHT:g}"
            )
        name, weight, part = _part(spec[0], load_model, timeout)
        return name, weight * spec[1], part
    if not isinstance(spec, str):
        if not callable(spec):
            raise RequestError("it must be DIR, file.py:function, a builtin, or a Python function")
        name = getattr(spec, "__name__", type(spec).__name__)
        return name.strip("<>"), 1.0, Function(InProcess(spec), f"function {name}")
    text, weight = _weighted(spec)
    file, _, function = text.rpartition(":")
    name, _, argument = text.partition(":")
    if text and os.path.isfile(os.path.join(text, "config.json")):
        return os.path.basename(os.path.abspath(text)), weight, load_model(text)
    if name in BUILTINS and not os.path.isfile(file):
        return name, weight, BUILTINS[name](argument)
    if file.endswith(".py"):
        return function, weight, _of_file(file, function, timeout)
    if text.endswith(".py"):
        raise RequestError(f"it names no function; write {text}:FUNCTION{listed(text, ast.FunctionDef)}")
    if os.path.isdir(text):
        raise RequestError("the directory has no config.json; name one that a reward model was saved to")
    raise RequestError(
        f"there is no such directory, and no builtin {name!r}{nearest(name, BUILTINS)}; "
        f"builtins are {', '.join(BUILTINS)}"
    )


def _weighted(spec: str) -> tuple[str, float]:
    """A spec without its weight, and the weight: what follows the last '*', 1 where nothing does."""
    text, star, tail = spec.rpartition("*")
    if not star or os.path.exists(spec):
        return spec, 1.0
    with contextlib.suppress(ValueError):
        if abs(weight := float(tail)) <= LARGEST_WEIGHT:
            return text, weight
    if spec.startswith(FREE_TEXT):
        return spec, 1.0
    raise RequestError(f"the weight {tail!r} must be a finite number, at most {LARGEST_WEIGHT:g}, as in {text}*0.5")


def _of_file(file: str, function: str, timeout: float) -> Function:
    if not os.path.isfile(file):
        raise RequestError(f"there is no file {file!r}; name one that exists")
    if not function:
        raise RequestError(f"it names no function; write {file}:FUNCTION{listed(file, ast.FunctionDef)}")
    try:
        worker = Worker(file, function, timeout=timeout)
    except Fault as fault:
        raise RequestError(f"{function!r} cannot be imported ({fault.message}); mend the file") from fault
    return Function(worker, f"{file}:{function}")


@contextlib.contextmanager
def _naming(field: str, spec: object) -> Iterator[None]:
    """A refusal in here names the field and its value."""
    try:
        yield
    except RequestError as problem:
        raise RequestError(f"{field} is {spec!r}: {problem}") from problem


def _said(sampled: Sampled) -> list[str]:
    """Completions as text; a chat row's messages under each other."""
    return [
        row if isinstance(row, str) else "\n".join(message.get("content") or "" for message in row)
        for row in sampled.completions
    ]


def _silent(part: Part, score: Tensor) -> Tensor:
    """The rows of which a part has nothing to say, bool [B]; where it failed, it has not."""
    if isinstance(part, Function):
        return torch.tensor(
            [row in part.faults and part.faults[row].kind == "none" for row in range(len(score))], dtype=torch.bool
        )
    return score.isnan() if isinstance(part, Against) else torch.zeros_like(score, dtype=torch.bool)


def _plain(score: Tensor) -> float | None:
    return None if score.isnan() else float(score)


def _finite(score: Tensor) -> Tensor:
    return torch.where(score.isfinite(), score, math.nan)
