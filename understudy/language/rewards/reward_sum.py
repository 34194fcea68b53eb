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

from understudy.language.data.files import RESERVED_COLUMN_NAMES
from understudy.language.rewards.final_answer import final_number
from understudy.language.rewards.worker import FunctionFault, InProcess, Worker
from understudy.run.config import RequestError, did_you_mean
from understudy.run.origin import listed

FAILURE_KINDS = ("raised", "timeout", "garbled", "wrong length", "none", "nan")
MAX_HANGING_ROWS = 8
"""How many rows of a batch may hang or garble their answers one by one before the rest of it is given up."""


@dataclass(frozen=True)
class ScoringInput:
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


class Scores(NamedTuple):
    """What a judge says about B rows."""

    score: Tensor
    """[B] float32; nan is missing."""
    terms: dict[str, Tensor]
    """Each part's own score by name, unweighted, [B] float32; nan is missing."""
    gold: Scores | None = None
    """What is measured of the same rows and never paid."""


def row_to_dict(scores: Scores, row: int, prefix: str = "") -> dict[str, Any]:
    """What is said about one row, as plain data: score and terms by name, unweighted; None is missing.

    Gold is there under the same names with "gold" before them, where it was measured.
    """
    terms = {name: _float_or_none(term_score[row]) for name, term_score in scores.terms.items()}
    fields = {prefix or "score": _float_or_none(scores.score[row]), f"{prefix}_terms" if prefix else "terms": terms}
    return fields | ({} if scores.gold is None else row_to_dict(scores.gold, row, "gold"))


RewardTerm = Callable[[ScoringInput], Tensor]  # -> [B] float32, nan where missing
Spec = str | Callable[..., Any] | tuple[str | Callable[..., Any], float]


class RewardSum:
    """A weighted sum of parts; a part of weight 0 is measured and nothing else.

    A part may have nothing to say of a row: a function says None, a cell to compare with is empty. Such a row is left to the
    other parts, or is missing. Where a part fails the row is missing in any case.
    """

    def __init__(
        self, terms: Sequence[tuple[str, float, RewardTerm]], *, missing: Literal["term", "row"] = "term"
    ) -> None:
        """parts: name, weight, part. The second of a name becomes name_2.  missing: what None leaves out."""
        self.missing = missing
        self.terms: dict[str, tuple[float, RewardTerm]] = {}
        for name, weight, term in terms:
            candidates = (name, *(f"{name}_{i}" for i in range(2, len(terms) + 1)))
            self.terms[next(candidate for candidate in candidates if candidate not in self.terms)] = (weight, term)
        self.failures: dict[str, int] = dict.fromkeys(FAILURE_KINDS, 0)
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
        load_model: Callable[[str], RewardTerm],
        timeout: float = 30.0,
        field: str = "reward",
        missing: Literal["term", "row"] = "term",
    ) -> RewardSum:
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
        terms = []
        with contextlib.ExitStack() as exit_stack:
            for spec in specs:
                with _name_field_in_errors(field, spec):
                    name, weight, term = _parse_term(spec, load_model, timeout)
                if isinstance(term, FunctionReward):
                    exit_stack.callback(term.asked.close)
                terms.append((name, weight, term))
            exit_stack.pop_all()
        reward_sum = cls(terms, missing=missing)
        reward_sum.field = field
        return reward_sum

    @torch.no_grad()
    def __call__(self, scoring_input: ScoringInput) -> Scores:
        """Score B rows, in their order, on the CPU."""
        total, term_scores, errors = torch.zeros(len(scoring_input)), {}, []
        has_score = torch.full((len(scoring_input),), not any(weight for weight, _ in self.terms.values()))
        for name, (weight, term) in self.terms.items():
            with _name_field_in_errors(self.field, name):
                score = term(scoring_input)
            if score.shape != total.shape:
                raise ValueError(
                    f"part {name!r} gave {tuple(score.shape)}: must be [{len(scoring_input)}], a score a row"
                )
            term_scores[name] = _nonfinite_to_nan(score.to("cpu", torch.float32))
            if weight:
                abstained = (
                    _abstained_rows(term, term_scores[name]) if self.missing == "term" else torch.zeros_like(has_score)
                )
                total, has_score = (
                    total + torch.where(abstained, 0.0, weight * term_scores[name]),
                    has_score | ~abstained,
                )
            errors += self._count_failures(name, term, term_scores[name])
        self.last_error = next(iter(errors), self.last_error)
        return Scores(_nonfinite_to_nan(total.where(has_score, math.nan)), term_scores)

    @property
    def functions(self) -> dict[str, FunctionReward]:
        """The parts that are functions of the user's."""
        return {name: part for name, (_, part) in self.terms.items() if isinstance(part, FunctionReward)}

    def close(self) -> None:
        """End the workers."""
        for function in self.functions.values():
            function.asked.close()

    def __enter__(self) -> RewardSum:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_failures(self, name: str, term: RewardTerm, score: Tensor) -> list[str]:
        """Count a part's missing rows; the messages of what went wrong, rows first."""
        faults = term.faults if isinstance(term, FunctionReward) else {}
        missing = score.isnan().nonzero()[:, 0].tolist()
        found = {row: faults.get(row, FunctionFault("nan", "the score is not a finite number")) for row in missing}
        kinds = Counter(fault.kind for fault in found.values())
        self.failures = {kind: count + kinds[kind] for kind, count in self.failures.items()}
        errors = [f"{name}, row {row}: {fault.message}" for row, fault in found.items() if fault.kind != "none"]
        batch = term.batch_fault if isinstance(term, FunctionReward) else None
        if batch:
            errors.append(f"{name}, asked again row by row: {batch.message}")
        happened = {(name, kind) for kind in kinds} | ({(name, f"batch {batch.kind}")} if batch else set())
        if not happened <= self.reported:
            self.reported |= happened
            self.reports.append(self._describe_missing(name, kinds, len(score), errors))
        return errors

    def _describe_missing(self, name: str, counts_by_kind: Counter[str], num_rows: int, errors: list[str]) -> str:
        """What went missing of a batch, in a sentence."""
        if not counts_by_kind:
            return f"{self.field} {errors[0]}; that is slower, and no score is lost"
        listed = ", ".join(f"{count} {kind}" for kind, count in counts_by_kind.items())
        first = f"; the first: {errors[0]}" if errors else ""
        return (
            f"{self.field} {name} gave {sum(counts_by_kind.values())} of {num_rows} completions no score "
            f"({listed}{first}): they are "
            "missing, which is not 0"
        )


class FunctionReward:
    """A part that asks a function of the user's: a batch at once, and where that fails row by row.

    A row asked by itself has the batch's time limit over the number of rows, or over `MAX_HANGING_ROWS` where that is fewer.
    """

    def __init__(self, asked: InProcess | Worker, spec: str) -> None:
        """asked: the function.  spec: what it was named by, without its weight."""
        self.asked, self.spec = asked, spec
        self.faults: dict[int, FunctionFault] = {}
        self.batch_fault: FunctionFault | None = None

    def __call__(self, scoring_input: ScoringInput) -> Tensor:
        columns, num_rows = self._function_columns(scoring_input), len(scoring_input)
        self.faults, self.batch_fault = {}, None
        try:
            scores = self._request_scores(columns, range(num_rows), 1.0)
        except FunctionFault as fault:
            self.batch_fault = fault
            scores = self._score_row_by_row(columns, num_rows) if num_rows > 1 else self._record_fault(0, fault)
        for row in (row for row, score in enumerate(scores) if score is None and row not in self.faults):
            self.faults[row] = FunctionFault("none", "None")
        return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32)

    def _function_columns(self, scoring_input: ScoringInput) -> dict[str, list[Any]]:
        """What the function is called with."""
        return select_columns(self.asked.parameters, all_columns(scoring_input))

    def _request_scores(
        self, columns: dict[str, list[Any]], rows: range, timeout_fraction: float
    ) -> list[float | None]:
        scores = self.asked.call(
            {name: column[rows.start : rows.stop] for name, column in columns.items()}, timeout_fraction
        )
        if len(scores) != len(rows):
            raise FunctionFault("wrong length", f"{len(scores)} scores for {len(rows)} rows")
        return scores

    def _score_row_by_row(self, columns: dict[str, list[Any]], num_rows: int) -> list[float | None]:
        scores, num_hung, kind = [], 0, ""
        for row in range(num_rows):
            try:
                if num_hung == MAX_HANGING_ROWS:
                    raise FunctionFault(
                        kind, f"not asked, for {MAX_HANGING_ROWS} rows before it hung or garbled their answers"
                    )
                scores += self._request_scores(columns, range(row, row + 1), 1 / min(num_rows, MAX_HANGING_ROWS))
            except FunctionFault as fault:
                if fault.kind in ("timeout", "garbled") and num_hung < MAX_HANGING_ROWS:
                    num_hung, kind = num_hung + 1, fault.kind
                scores += self._record_fault(row, fault)
        return scores

    def _record_fault(self, row: int, fault: FunctionFault) -> list[float | None]:
        self.faults[row] = fault
        return [None]


class ColumnMatchReward:
    """A part: 1 where a completion reads like its cell, else 0; missing where the cell is empty."""

    def __init__(self, column: str, parse: Callable[[str], Any], parse_cell: Callable[[str], Any]) -> None:
        self.column, self.parse, self.parse_cell = column or "answer", parse, parse_cell

    def __call__(self, scoring_input: ScoringInput) -> Tensor:
        if self.column not in scoring_input.columns:
            raise RequestError(
                f"the data have no column {self.column!r}, only {', '.join(scoring_input.columns) or 'prompts'}; "
                f"name one of them after a ':' or map one with --columns {self.column}=NAME"
            )
        cells = [None if cell is None else self.parse_cell(str(cell)) for cell in scoring_input.columns[self.column]]
        pairs = zip(_completion_texts(scoring_input), cells, strict=True)
        return torch.tensor(
            [math.nan if cell is None else float(self.parse(completion) == cell) for completion, cell in pairs]
        )


def all_columns(scoring_input: ScoringInput) -> dict[str, list[Any]]:
    """All that a function may ask about the rows, by name."""
    return {**scoring_input.columns, **{name: getattr(scoring_input, name) for name in RESERVED_COLUMN_NAMES}}


def select_columns(parameters: dict[str, Any], columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Every column, or those that a function has parameters for.  wanted: see `worker.wants`."""
    for name in parameters["needs"]:
        if name not in columns:
            raise RequestError(
                f"its parameter {name!r} is no column of the data: "
                f"have {', '.join(columns)}; map one to it with --columns {name}=NAME or give it a default"
            )
    accepted = parameters["takes"]
    return {name: column for name, column in columns.items() if accepted is None or name in accepted}


def length(target: str) -> RewardTerm:
    """`length`: tokens of the completion. `length:N`: -|tokens - N| / N, 0 at best."""
    if not target:
        return lambda scoring_input: torch.tensor([float(len(ids)) for ids in scoring_input.completion_ids])
    if not re.fullmatch("0*[1-9][0-9]*", target):
        raise RequestError(f"the target {target!r} must be a whole number of tokens above 0, as in length:40")
    target_length = int(target)
    return lambda scoring_input: torch.tensor(
        [-abs(len(ids) - target_length) / target_length for ids in scoring_input.completion_ids]
    )


def contains(text: str) -> RewardTerm:
    """`contains:TEXT`: 1 where the completion has the text in it, else 0."""
    if not text:
        raise RequestError("contains needs a text to look for, as in contains:please")
    return lambda scoring_input: torch.tensor(
        [float(text in completion) for completion in _completion_texts(scoring_input)]
    )


def regex(pattern: str) -> RewardTerm:
    """`regex:PATTERN`: 1 where `re.search` finds the pattern in the completion, else 0."""
    if not pattern:
        raise RequestError("regex needs a pattern to look for, as in regex:^Yes")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RequestError(f"the pattern does not compile ({error}); write it as Python's re reads it") from error
    return lambda scoring_input: torch.tensor(
        [float(bool(compiled.search(completion))) for completion in _completion_texts(scoring_input)]
    )


def exact(column: str) -> RewardTerm:
    """`exact[:COLUMN]`: 1 where the completion is the column's text (`answer`), space around it apart; else 0.

    Missing where the column's cell is empty.
    """
    return ColumnMatchReward(column, str.strip, lambda cell: cell.strip() or None)


def number(column: str) -> RewardTerm:
    """`number[:COLUMN]`: 1 where the completion's final number equals that of the column (`answer`), else 0.

    It is the first after `####` (GSM8K), the last in `\\boxed{}`, or the last of all; 3/2, 1.5 and \\frac{3}{2} are equal.
    Missing where the cell has no number.
    """
    return ColumnMatchReward(column, final_number, final_number)


def repetition(argument: str) -> RewardTerm:
    """`repetition`: the share of the completion's 4-grams of tokens that it has had before, from 0 up to 1."""
    if argument:
        raise RequestError(f"repetition takes nothing after its name, not {argument!r}")
    return lambda scoring_input: torch.tensor(
        [1 - distinct_n([ids], 4) if len(ids) >= 4 else 0.0 for ids in scoring_input.completion_ids]
    )


BUILTINS: dict[str, Callable[[str], RewardTerm]] = {
    "length": length,
    "contains": contains,
    "regex": regex,
    "exact": exact,
    "number": number,
    "repetition": repetition,
}
MAX_WEIGHT = 1e6  # a larger one takes scores out of float32's range
FREE_TEXT_PREFIXES = ("contains:", "regex:")  # a '*' in these need not be a weight


def distinct_n(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams, across rows (after Li et al. 2016); 0 where there are none."""
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def _parse_term(spec: Spec, load_model: Callable[[str], RewardTerm], timeout: float) -> tuple[str, float, RewardTerm]:
    """What a spec names: its readable name, its weight, the part."""
    if isinstance(spec, tuple):
        if len(spec) != 2 or not isinstance(spec[1], int | float) or not abs(spec[1]) <= MAX_WEIGHT:
            raise RequestError(
                f"a pair must be a SPEC or function and its weight, a finite number, at most {MAX_WEIGHT:g}"
            )
        name, weight, term = _parse_term(spec[0], load_model, timeout)
        return name, weight * spec[1], term
    if not isinstance(spec, str):
        if not callable(spec):
            raise RequestError("it must be DIR, file.py:function, a builtin, or a Python function")
        name = getattr(spec, "__name__", type(spec).__name__)
        return name.strip("<>"), 1.0, FunctionReward(InProcess(spec), f"function {name}")
    text, weight = _split_weight(spec)
    file, _, function = text.rpartition(":")
    name, _, argument = text.partition(":")
    if text and os.path.isfile(os.path.join(text, "config.json")):
        return os.path.basename(os.path.abspath(text)), weight, load_model(text)
    if name in BUILTINS and not os.path.isfile(file):
        return name, weight, BUILTINS[name](argument)
    if file.endswith(".py"):
        return function, weight, _function_from_file(file, function, timeout)
    if text.endswith(".py"):
        raise RequestError(f"it names no function; write {text}:FUNCTION{listed(text, ast.FunctionDef)}")
    if os.path.isdir(text):
        raise RequestError("the directory has no config.json; name one that a reward model was saved to")
    raise RequestError(
        f"there is no such directory, and no builtin {name!r}{did_you_mean(name, BUILTINS)}; "
        f"builtins are {', '.join(BUILTINS)}"
    )


def _split_weight(spec: str) -> tuple[str, float]:
    """A spec without its weight, and the weight: what follows the last '*', 1 where nothing does."""
    text, separator, weight_text = spec.rpartition("*")
    if not separator or os.path.exists(spec):
        return spec, 1.0
    with contextlib.suppress(ValueError):
        if abs(weight := float(weight_text)) <= MAX_WEIGHT:
            return text, weight
    if spec.startswith(FREE_TEXT_PREFIXES):
        return spec, 1.0
    raise RequestError(f"the weight {weight_text!r} must be a finite number, at most {MAX_WEIGHT:g}, as in {text}*0.5")


def _function_from_file(file: str, function: str, timeout: float) -> FunctionReward:
    if not os.path.isfile(file):
        raise RequestError(f"there is no file {file!r}; name one that exists")
    if not function:
        raise RequestError(f"it names no function; write {file}:FUNCTION{listed(file, ast.FunctionDef)}")
    try:
        worker = Worker(file, function, timeout=timeout)
    except FunctionFault as fault:
        raise RequestError(f"{function!r} cannot be imported ({fault.message}); mend the file") from fault
    return FunctionReward(worker, f"{file}:{function}")


@contextlib.contextmanager
def _name_field_in_errors(field: str, spec: object) -> Iterator[None]:
    """A refusal in here names the field and its value."""
    try:
        yield
    except RequestError as problem:
        raise RequestError(f"{field} is {spec!r}: {problem}") from problem


def _completion_texts(scoring_input: ScoringInput) -> list[str]:
    """Completions as text; a chat row's messages under each other."""
    return [
        row if isinstance(row, str) else "\n".join(message.get("content") or "" for message in row)
        for row in scoring_input.completions
    ]


def _abstained_rows(term: RewardTerm, score: Tensor) -> Tensor:
    """The rows of which a part has nothing to say, bool [B]; where it failed, it has not."""
    if isinstance(term, FunctionReward):
        return torch.tensor(
            [row in term.faults and term.faults[row].kind == "none" for row in range(len(score))], dtype=torch.bool
        )
    return score.isnan() if isinstance(term, ColumnMatchReward) else torch.zeros_like(score, dtype=torch.bool)


def _float_or_none(score: Tensor) -> float | None:
    return None if score.isnan() else float(score)


def _nonfinite_to_nan(score: Tensor) -> Tensor:
    return torch.where(score.isfinite(), score, math.nan)
