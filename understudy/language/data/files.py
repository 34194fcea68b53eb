"""Rows of data, before step 1: read from files or published sets, and what their cells must hold."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from understudy.language.data import bounded
from understudy.run.config import RequestError, did_you_mean, format_value, is_deep

RESERVED_COLUMN_NAMES = ("prompts", "completions", "completion_ids", "truncated")
"""Arguments of reward functions and replies that are no columns of the data."""
Row = dict[str, Any]
"""A row by column. Cells keep the type the file gives them; a CSV's are all strings."""


class Table(str):
    """Rows in memory where a config has the name of a file: as text, how many they are and the beginning of their digest.

    Attributes:
        rows: each a dict of plain data.  digest: the SHA-256 of their JSON.
    """

    rows: list[Row]
    digest: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        return self

    @classmethod
    def of(cls, source: Any) -> Table:
        """A list of mappings, or anything like it that has a length, such as a `datasets.Dataset`.

        Values become what JSON has for them, so that a resumed run reads the same rows: NumPy's and torch's numbers and
        arrays as their `tolist()`, tuples as lists, anything else that JSON does not know as text.

        Raises:
            RequestError: it is something else.
        """
        if isinstance(source, Mapping):
            splits = ", ".join(map(str, source))
            raise RequestError(f"data is a {type(source).__name__} of {splits}: give one of them, as in data[...]")
        if not (isinstance(source, Iterable) and isinstance(source, Sized)):
            raise RequestError(
                f"data is a {type(source).__name__}: must be a file's name, or a list of rows, each a dict"
            )
        rows: list[Row] = []
        for number, row in enumerate(source, 1):
            if not isinstance(row, Mapping):
                raise RequestError(
                    f"row {number} of data is {format_value(row)[:40]}: must be a dict with named columns"
                )
            try:
                rows.append(json.loads(cls._to_jsonl([dict(row)])))
            except (ValueError, TypeError, RecursionError) as error:
                raise RequestError(
                    f"row {number} of data cannot be written as JSON: {_describe_json_error(error)}"
                ) from None
        digest = hashlib.sha256(cls._to_jsonl(rows).encode(errors="surrogatepass")).hexdigest()
        table = cls(f"{len(rows)} rows in memory, digest {digest[:12]}")
        table.rows, table.digest = rows, digest
        return table

    @classmethod
    def restore(cls, description: str, file: Path) -> Table:
        """The rows that a run wrote down at its start.

        Raises:
            RequestError: they are not the ones it began with.
        """
        if (table := cls.of(_read_jsonl(file))) != description:
            raise RequestError(
                f"data is {description!r}, and '{file}' holds {table}: give the rows that the run began with"
            )
        return table

    def write(self, file: Path) -> None:
        """Write the rows as JSONL, from which `restored` makes the same again."""
        file.write_text(self._to_jsonl(self.rows), encoding="utf-8", errors="surrogatepass")

    @staticmethod
    def _to_jsonl(rows: list[Row]) -> str:
        return "".join(json.dumps(row, default=plain_value) + "\n" for row in rows)


def plain_value(value: Any) -> Any:
    """What JSON is told of a value that it does not know: its `tolist()`, else its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_rows(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    split: str = "train",
) -> list[Row]:
    """The rows of JSONL, JSON, CSV, Parquet or `.jsonl.gz`/`.csv.gz`, in their order; blank lines are no rows.

    Files of which a few bytes become more than any text does are refused, as are rows longer than any text.

    Args:
        source: a `Table`; such a file; a directory with one of that split (`train.*`) or its shards
            (`train-00000-of-00002.*`), a single file, or what `datasets` has saved to disk; or else the name of a set that
            the `datasets` package knows.
        columns: our name -> the file's, as in {"prompt": "question"}. What stood under our name before is dropped.
        config, split: which part of a directory or set is read.
    """
    path = Path(source)
    if (isinstance(source, Table) or path.is_file()) and (config is not None or split != "train"):
        name, value = ("data_config", config) if config is not None else ("data_split", split)
        raise RequestError(f"{name} is {value!r}, but data is {str(source)!r}, which has no such parts: leave it out")
    if isinstance(source, Table):
        rows = source.rows
    elif path.is_file():
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_directory(path, config, split)
    elif path.name.endswith(tuple(READERS)) or path.is_absolute() or str(source).startswith("."):
        raise RequestError(f"data is {str(source)!r}: there is no such file")
    else:
        rows = _load_published(str(source), config, split)
    if not rows:
        raise RequestError(f"data is {str(source)!r}: it has no rows; name a file with at least one")
    for number, row in enumerate(rows, 1):
        if (length := _num_characters(row)) > LONGEST:
            raise RequestError(f"row {number} of {str(source)!r} has {length:,} {TOO_LONG_MESSAGE}")
        if is_deep(row):
            raise RequestError(f"row {number} of {str(source)!r} is nested too deeply: leave it out")
    return _rename_columns(rows, columns or {})


def convert_rows(
    rows: Sequence[Row],
    convert: Callable[[Row, int], Any],
    *,
    text_columns: tuple[str, ...],
    other_columns: tuple[str, ...] = (),
) -> list[Any]:
    """`convert` of every row and its number, once its cells are there; all of `text_columns` chat, or all of them text."""
    _check_columns(rows, (*text_columns, *other_columns))
    records, is_chat = [], bool(text_columns) and isinstance(rows[0].get(text_columns[0]), list)
    for number, row in enumerate(rows, 1):
        with errors_at_row(number):
            for name in text_columns:
                _check_text(name, row.get(name), is_chat)
            for name in other_columns:
                if row.get(name) in (None, ""):
                    raise RequestError(f"{name} is empty: fill it or leave the row out")
            records.append(convert(row, number))
    return records


def parse_finite(name: str, cell: Any) -> float:
    """A finite number; true is 1 and false 0, also as words."""
    with suppress(TypeError, ValueError, OverflowError):
        boolean = {"true": 1.0, "false": 0.0}.get(str(cell).strip().lower())
        if math.isfinite(number := float(cell) if boolean is None else boolean):
            return number
    raise RequestError(f"{name} is {format_value(cell)}: must be a finite number")


def column_names(rows: Iterable[Row]) -> list[str]:
    """Every column that some row has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _num_characters(row: Row) -> int:
    """Characters of the cells of a row."""
    length, cells = 0, list(row.values())
    while cells:
        cell = cells.pop()
        length += len(cell) if isinstance(cell, str) else 0
        cells += cell.values() if isinstance(cell, dict) else cell if isinstance(cell, list) else ()
    return length


def _check_columns(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Refuse data that lack one of our columns, with the columns that are most likely meant."""
    available = column_names(rows)
    missing = [name for name in names if name not in available]
    if not missing:
        return
    unassigned, mapping = [column for column in available if column not in names], []
    text_columns = [column for column in unassigned if isinstance(rows[0].get(column), str | list)]
    for name in missing:
        common_names = [
            column for word in COMMON_COLUMN_NAMES.get(name, ()) for column in unassigned if column.lower() == word
        ]
        others = (
            [] if name in ("chosen", "rejected") else [*text_columns, *unassigned]
        )  # a wrong guess would learn backwards
        guess = next((column for column in (*common_names, *others) if column not in mapping), "COLUMN")
        mapping += [guess]
    pairs = " ".join(f"{our_name}={data_name}" for our_name, data_name in zip(missing, mapping, strict=True))
    missing_names = " and ".join(map(repr, missing))
    known = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in available)
    fix = f"map yours with --columns {pairs}" + (NO_PROMPT_HINT if "prompt" in missing else "")
    if any(len(name) > 40 or re.fullmatch(r"[-+.\d]+", name) for name in available):
        fix = f"put a header above them, whose cells name the columns, if this is the first row of a CSV, or {fix}"
    raise RequestError(f"the data have no column {missing_names} but {known}: {fix}")


def check_prompt_not_dropped(rows: Sequence[Row], names: Sequence[str], completion: str | None = None) -> None:
    """Refuse data whose whole texts lack the prompt that another column seems to hold.

    Args:
        names: the columns of whole texts.  completion: our name for the first of them where it follows a prompt.
    """
    available = column_names(rows)
    if not {*names} <= {*available}:
        return  # which is refused for what is missing
    for column in (
        name for name in ("prompt", *COMMON_COLUMN_NAMES["prompt"]) if name in available and name not in names
    ):
        cell = rows[0].get(column)
        if (
            isinstance(cell, str)
            and cell.strip()
            and not any(cell.strip() in _cell_text(rows[0].get(n)) for n in names)
        ):
            mapping = [] if column == "prompt" else [f"prompt={column}"]
            mapping += [] if completion is None else [f"{completion}={names[0]}"]
            raise RequestError(
                f"{names[0]} would be read as a whole text, without what the column {column!r} holds: map them with "
                f"--columns {' '.join(mapping)}, or remove {column!r}"
            )


def _cell_text(cell: Any) -> str:
    """The words of text or of a chat."""
    return "\n".join(str(m.get("content")) for m in cell) if isinstance(cell, list) else str(cell)


def _check_text(name: str, cell: Any, is_chat: bool) -> None:
    is_input = name in ("prompt", "text")  # an answer may be a space
    is_blank = isinstance(cell, str) and not (cell.strip() if is_input else cell)
    if cell is None or is_blank or cell == []:
        raise RequestError(f"{name} is empty: fill it or leave the row out")
    if not isinstance(cell, str | list):
        raise RequestError(f"{name} is {format_value(cell)}: must be text, or a list of messages")
    if isinstance(cell, list) and not all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in cell):
        raise RequestError(f"{name} is {str(cell)[:60]}: each message must be an object with a role and a content")
    if isinstance(cell, list) and not any(str(m["content"] or "").strip() or m.get("tool_calls") for m in cell):
        raise RequestError(f"{name} is empty: none of its messages has any text; fill it or leave the row out")
    try:
        "".join([cell] if isinstance(cell, str) else [str(m["content"]) for m in cell]).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} has half of a surrogate pair, which is no text: fix its encoding") from None
    if isinstance(cell, list) is not is_chat:
        kind, expected_kind = ("text", "chat") if is_chat else ("chat", "text")
        raise RequestError(f"{name} is {kind} where the data began with {expected_kind}: keep to one in a file")


@contextmanager
def errors_at_row(number: int) -> Iterator[None]:
    """Put the number of the row before what is refused within."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"row {number}: {error}") from None


def _read_directory(folder: Path, config: str | None, split: str) -> list[Row]:
    if config is not None:
        if not (folder / config).is_dir():
            raise RequestError(f"data_config is {config!r}: '{folder}' has no such directory")
        folder = folder / config
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved_dataset(folder, split)
    return [row for path in _split_files(folder, split) for row in _read_file(path)]


def _read_saved_dataset(folder: Path, split: str) -> list[Row]:
    """What `save_to_disk` of `datasets` has written."""
    datasets = _import_optional("datasets", f"reading {str(folder)!r}, which `datasets` has saved,")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with _refuse_decompression_bomb(folder, size):
        return list(_select_split(datasets.load_from_disk(str(folder)), folder, split))


def _select_split(found: Any, folder: Path, split: str) -> Any:
    if isinstance(found, Mapping):
        if split not in found:
            raise RequestError(f"data_split is {split!r}: {str(folder)!r} has {', '.join(found)}")
        found = found[split]
    elif split != "train":
        raise RequestError(f"data_split is {split!r}, but {str(folder)!r} has no splits: leave it out")
    return found


def _split_files(folder: Path, split: str) -> list[Path]:
    """A directory's only file of a split, or its shards in order; also in a folder `data`, or one named as the split."""
    directories = [folder, folder / "data", folder / split]
    files = sorted(path for place in directories if place.is_dir() for path in place.iterdir())
    files = [path for path in files if path.name.endswith(tuple(READERS))]
    named = [path for path in files if path.parent == folder / split or _split_of(path) == split]
    chosen = named or ([] if split != "train" else files)
    shards = [match for path in chosen if (match := SHARD_NAME.fullmatch(path.name.split(".")[0]))]
    if len(chosen) > 1 and len(shards) == len(chosen):
        counts = {int(shard[3]) for shard in shards}
        if counts != {len(chosen)}:
            raise RequestError(
                f"data is {str(folder)!r}, which has {len(chosen)} of the {max(counts)} shards of {split!r}: add the others"
            )
        return chosen
    if len(chosen) == 1:
        return chosen
    match = f"has {', '.join(path.name for path in chosen)}" if chosen else f"has no {', '.join(READERS)}"
    match += "" if chosen or split == "train" else f" of the split {split!r}"
    raise RequestError(f"data is {str(folder)!r}, which {match}: name one file, or call it {split}.*")


def _split_of(path: Path) -> str:
    """The split that a file's name says it is of: `train` of train.jsonl and of train-00000-of-00002.parquet."""
    stem = path.name.split(".")[0]
    shard = SHARD_NAME.fullmatch(stem)
    return stem if shard is None else shard[1]


def _read_file(path: Path) -> list[Row]:
    reader = next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise RequestError(f"data is {str(path)!r}: the name must end in {', '.join(READERS)}")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise RequestError(f"data is {str(path)!r}: not UTF-8 at byte {error.start}; convert it") from None
    except (OSError, EOFError, zlib.error) as error:  # no permission, or a .gz that is none, cut short or damaged
        raise RequestError(f"data is {str(path)!r}: it cannot be read ({error})") from None


class _BoundedGzipFile(gzip.GzipFile):
    """A packed file that is refused where it is a bomb: a few bytes that unpack to more than any text does."""

    def read1(self, size: int = -1) -> bytes:
        text = super().read1(size)
        if self.tell() > _max_unpacked_bytes(os.path.getsize(self.name)):
            raise _decompression_bomb_error(self.name)
        return text


def _max_unpacked_bytes(size: int) -> int:
    """Bytes that a file of this size may unpack to."""
    return max(MIN_BOMB_BYTES, MAX_EXPANSION_RATIO * size)


def _decompression_bomb_error(path: Any) -> RequestError:
    return RequestError(
        f"data is {str(path)!r}, which unpacks to more than {MAX_EXPANSION_RATIO} times its size: give it as "
        "plain JSONL or CSV if "
        "that is what it should hold"
    )


@contextmanager
def _refuse_decompression_bomb(path: Path, size: int) -> Iterator[None]:
    """Refuse what takes more memory than a file of this size may, on Linux: how long its values are is in no footer."""
    try:
        with bounded.bounded_memory(max(bounded.MAX_BYTES, _max_unpacked_bytes(size))):
            yield
    except MemoryError:
        raise _decompression_bomb_error(path) from None


def _open_text(path: Path) -> IO[str]:
    """The file's text, unpacked; a byte-order mark, which spreadsheets write, is no part of it."""
    open_binary: Any = _BoundedGzipFile if path.suffix == ".gz" else open
    return io.TextIOWrapper(open_binary(path, "rb"), encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path) -> list[Row]:
    lines: list[str] = []
    with _open_text(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise RequestError(
                    f"row {len(lines) + 1} of {str(path)!r} has more than {LONGEST_LINE:,} {TOO_LONG_MESSAGE}"
                )
            lines += [line] if line.strip() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line, object_pairs_hook=_dict_of_unique_names))
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"row {number} of {str(path)!r} is not JSON ({_describe_json_error(error)}): {line[:40]!r}"
            ) from None
    return _check_objects(rows, path)


def _read_json(path: Path) -> list[Row]:
    with _open_text(path) as file:
        try:
            rows = json.load(file, object_pairs_hook=_dict_of_unique_names)
        except json.JSONDecodeError as error:
            raise RequestError(f"data is {str(path)!r}: not JSON in line {error.lineno} ({error.msg})") from None
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise RequestError(f"data is {str(path)!r}: not JSON ({_describe_json_error(error)})") from None
    if not isinstance(rows, list):
        raise RequestError(f"data is {str(path)!r}: it must be a list of objects, or JSONL with one on each line")
    return _check_objects(rows, path)


def _check_objects(rows: list[Any], path: Path) -> list[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RequestError(
                f"row {number} of {str(path)!r} is {format_value(row)[:40]}: must be an object with named columns"
            )
    return rows


def _dict_of_unique_names(pairs: list[tuple[str, Any]]) -> Row:
    """An object of JSON whose names are all different: of two with one name, all but the last would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{name[:40]!r} is in it twice")
    return made


def _describe_json_error(error: Exception) -> str:
    """What is wrong with something that JSON cannot read or write."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "int_max_str_digits" in str(error):
        return "a number has thousands of digits"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _check_names(names: Sequence[str], path: Path) -> None:
    """Refuse columns of which several have one name: all but the last would be lost."""
    for name, count in Counter(names).items():
        if count > 1:
            raise RequestError(
                f"data is {str(path)!r}, which has {count} columns {name[:40]!r}: give each a name of its own"
            )


def _check_no_nul(cells: list[str], path: Path) -> list[str]:
    if any("\0" in cell for cell in cells):
        raise RequestError(f"data is {str(path)!r}, which has NUL bytes: convert it to UTF-8, or repair it")
    return cells


def _read_csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    before = csv.field_size_limit(LONGEST)
    with _open_text(path) as file:
        try:
            nonblank_rows = (_check_no_nul(cells, path) for cells in csv.reader(file) if cells)
            header = next(nonblank_rows, [])
            _check_names(header, path)
            for cells in nonblank_rows:
                if len(cells) != len(header):
                    problem = f"row {len(rows) + 1} of {str(path)!r} has {len(cells)} cells"
                    raise RequestError(f"{problem}, the header {len(header)}: quote cells that hold a comma")
                rows.append(dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise RequestError(f"row {len(rows) + 1} of {str(path)!r} is not CSV: {error}") from None
        finally:
            csv.field_size_limit(before)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    parquet = _import_optional("pyarrow.parquet", f"reading {path.name!r}")
    size = path.stat().st_size
    try:
        about = parquet.read_metadata(path)
        groups = map(about.row_group, range(about.num_row_groups))
        chunks = [group.column(i) for group in groups for i in range(about.num_columns)]
        if sum(chunk.total_uncompressed_size + 8 * chunk.num_values for chunk in chunks) > _max_unpacked_bytes(size):
            raise _decompression_bomb_error(path)
        with _refuse_decompression_bomb(path, size):
            table = parquet.read_table(path)
            _check_names(table.column_names, path)
            return table.to_pylist()
    except RequestError:
        raise
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise RequestError(f"data is {str(path)!r}: not Parquet ({str(error).splitlines()[0]})") from None


def _load_published(name: str, config: str | None, split: str) -> list[Row]:
    if IN_MEMORY_DESCRIPTION.fullmatch(name):
        raise RequestError(
            f"data is {name!r}, of a process that is gone: give the rows again, as in resume(RUN, data=rows)"
        )
    datasets = _import_optional("datasets", f"data is {name!r}, which is no file here: reading a published set")
    try:
        return list(datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError) as error:  # no such set, no network, no split of that name
        raise RequestError(
            f"data is {name!r}: no file here, and `datasets` says {str(error).splitlines()[0]}"
        ) from None


def _import_optional(module: str, purpose: str) -> ModuleType:
    """A package that the plain installation does without."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise RequestError(f"{purpose} needs the package {package}: pip install {package}") from None


OURS = ("prompt", "completion", "messages", "chosen", "rejected")
"""Columns of which a name that differs by a letter is taken for a mistake; others may be a reward function's."""


def _rename_columns(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    available = column_names(rows)
    for our_name, data_name in columns.items():
        if data_name not in available:
            known_columns = f"the columns are {', '.join(available)}"
            raise RequestError(
                f"columns says {our_name}={data_name}: {known_columns}{did_you_mean(data_name, available)}"
            )
        absent = [name for name in OURS if name not in {*available, *columns}]
        if our_name not in OURS and (close := difflib.get_close_matches(our_name, absent, n=1, cutoff=0.8)):
            raise RequestError(
                f"columns says {our_name}={data_name}, and {our_name!r} is none of our names: write --columns "
                f"{close[0]}={data_name}"
            )
    replaced = {*columns, *columns.values()}
    return [
        {name: cell for name, cell in row.items() if name not in replaced}
        | {our_name: row[data_name] for our_name, data_name in columns.items() if data_name in row}
        for row in rows
    ]


MIN_BOMB_BYTES, MAX_EXPANSION_RATIO = 64 * 2**20, 100
"""A packed file may unpack to this many bytes, or to this many times its size; ordinary text packs to a tenth or more."""
LONGEST, LONGEST_LINE = 16 * 2**20, 64 * 2**20
"""Characters that the cells of a row may have together, and a line of JSONL; the longest novels have ten million."""
TOO_LONG_MESSAGE = "characters, more than a text has: split it, or leave it out"
SHARD_NAME = re.compile(r"(.+)-(\d+)-of-(\d+)")
IN_MEMORY_DESCRIPTION = re.compile(r"\d+ rows in memory, digest [0-9a-f]+")
COMMON_COLUMN_NAMES = {
    "prompt": ("prompts", "question", "instruction", "problem", "query", "input", "user", "context", "messages"),
    "completion": ("completions", "answer", "response", "output", "solution", "target", "assistant"),
    "text": ("texts", "content", "sentence", "document", "review"),
    "chosen": (
        "preferred",
        "winner",
        "better",
        "accepted",
        "good",
        "win",
        "positive",
        "best",
        "chosen_response",
        "response_chosen",
    ),
    "rejected": (
        "dispreferred",
        "loser",
        "worse",
        "refused",
        "bad",
        "lose",
        "negative",
        "worst",
        "rejected_response",
        "response_rejected",
    ),
    "label": ("labels", "score", "rating", "class"),
}
"""Names under which published data have a column of ours, the likeliest first."""
NO_PROMPT_HINT = "; data without prompts are the column 'text' in sft, and --unconditional where a policy samples"
"""What else may be done where there is no column `prompt`."""

READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}
