"""Files become rows: every format, their order, and a sentence for each way a file can be wrong."""

import gzip
import hashlib
import importlib.util
import json
import math
import sys
from collections import UserList
from datetime import date

import pytest

from understudy.language.data import files as data
from understudy.language.data.files import Table, bounded, read_rows
from understudy.run.config import RequestError

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "two, three", "n": 2}]
CSV = 'prompt,n\none,1\n"two, three",2\n'
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def dataset(rows):
    """Rows as a `datasets.Dataset`; with a fingerprint of its own, since dill cannot always make one."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows))
    return datasets.Dataset(table, fingerprint=str(len(rows)))


@pytest.fixture
def file(tmp_path):
    """A function that writes a file and returns its path; names that end in .gz are packed."""

    def write(name: str, content: str) -> str:
        raw = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", JSONL), ("a.jsonl.gz", JSONL), ("a.json", json.dumps(ROWS, indent=1))]
)
def test_json_rows_keep_their_order_and_types(file, name, content):
    assert read_rows(file(name, content)) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_cells_are_strings(file, name):
    assert read_rows(file(name, CSV)) == [{"prompt": "one", "n": "1"}, {"prompt": "two, three", "n": "2"}]


def test_parquet_rows_keep_their_order_and_types(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")

    assert read_rows(str(tmp_path / "a.parquet")) == ROWS


def test_a_file_that_is_no_parquet_is_refused(file):
    pytest.importorskip("pyarrow")

    with pytest.raises(RequestError, match="not Parquet"):
        read_rows(file("a.parquet", "no"))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_names_the_package_it_needs(file):
    with pytest.raises(RequestError, match=r"reading 'a.parquet' needs the package pyarrow: pip install pyarrow"):
        read_rows(file("a.parquet", ""))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_published_name_says_which_package_it_needs():
    with pytest.raises(RequestError, match="which is no file here: reading a published set needs the package datasets"):
        read_rows("openai/gsm8k")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(file):
    assert read_rows(file("a.jsonl", "\ufeff" + JSONL.replace("\n", "\n\n"))) == ROWS
    assert [row["prompt"] for row in read_rows(file("a.csv", "\ufeff" + CSV + "\n"))] == ["one", "two, three"]


# directories


def test_of_a_directory_the_file_called_train_is_read(file, tmp_path):
    file("train.jsonl", JSONL)
    file("test.jsonl", '{"prompt": "held out"}')

    assert read_rows(str(tmp_path)) == ROWS


def test_of_a_directory_a_single_data_file_is_read(file, tmp_path):
    file("test.jsonl.gz", JSONL)
    file("README.md", "about")

    assert read_rows(str(tmp_path)) == ROWS


@pytest.mark.parametrize(
    ("names", "found"),
    [(["a.jsonl", "b.csv"], "has a.jsonl, b.csv"), (["train.csv", "train.jsonl"], "has train.csv"), ([], r"has no \.")],
)
def test_a_directory_that_does_not_say_which_file_is_refused(file, tmp_path, names, found):
    for name in names:
        file(name, JSONL)

    with pytest.raises(RequestError, match=rf"which {found}.*: name one file, or call it train"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize("place", ["", "data/", "train/"])
def test_the_shards_of_a_split_are_read_in_order(file, tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    for number in (1, 0):
        file(f"{place}train-0000{number}-of-00002.jsonl", json.dumps(ROWS[number]))
    file("test-00000-of-00001.jsonl", "{}")

    assert read_rows(str(tmp_path)) == ROWS


def test_a_shard_that_is_missing_is_noticed(file, tmp_path):
    for number in (0, 2):
        file(f"train-0000{number}-of-00003.jsonl", JSONL)

    with pytest.raises(RequestError, match="which has 2 of the 3 shards of 'train': add the others"):
        read_rows(str(tmp_path))


def test_another_split_and_configuration_of_a_directory_are_read_where_named(file, tmp_path):
    (tmp_path / "main").mkdir()
    file("main/train.jsonl", "{}")
    file("main/test.csv", CSV)

    assert len(read_rows(str(tmp_path), config="main", split="test")) == 2
    with pytest.raises(RequestError, match=r"data_config is 'socratic': .* has no such directory"):
        read_rows(str(tmp_path), config="socratic")
    with pytest.raises(RequestError, match="of the split 'dev': name one file, or call it dev"):
        read_rows(str(tmp_path), config="main", split="dev")


@pytest.mark.parametrize("part", [{"config": "main"}, {"split": "test"}])
def test_a_part_of_what_has_none_is_refused(file, part):
    (name, value), path = next(iter(part.items())), file("a.jsonl", JSONL)

    for source in (path, Table.of(ROWS)):
        with pytest.raises(
            RequestError, match=f"data_{name} is '{value}', but data is .* has no such parts: leave it out"
        ):
            read_rows(source, **part)


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_datasets_has_saved_to_disk_is_read(tmp_path, split):
    made, second = dataset(ROWS), dataset(ROWS[1:])
    made.save_to_disk(tmp_path / "one")
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": made, "test": second}).save_to_disk(tmp_path / "several")

    assert read_rows(str(tmp_path / "several"), split=split) == (ROWS if split == "train" else ROWS[1:])
    assert read_rows(str(tmp_path / "one")) == ROWS
    with pytest.raises(RequestError, match=r"data_split is 'dev': .* has train, test"):
        read_rows(str(tmp_path / "several"), split="dev")
    with pytest.raises(RequestError, match=r"data_split is 'dev', but .* has no splits"):
        read_rows(str(tmp_path / "one"), split="dev")


# rows in memory


def test_rows_in_memory_are_read_as_they_are_and_named_by_their_digest():
    table = Table.of(UserList(ROWS))

    assert read_rows(table, columns={"text": "prompt"}) == [{"n": 1, "text": "one"}, {"n": 2, "text": "two, three"}]
    assert str(table) == f"2 rows in memory, digest {hashlib.sha256(JSONL.encode()).hexdigest()[:12]}"
    assert str(Table.of(ROWS[::-1])) != str(table)


def test_a_dataset_of_datasets_is_rows_in_memory():
    assert read_rows(Table.of(dataset(ROWS))) == ROWS


def test_rows_that_were_written_down_come_back(tmp_path):
    table = Table.of(
        [{"prompt": "caf\u00e9 \ud800", "n": 1.5, "day": date(2026, 1, 2), "messages": [{"role": "user"}]}]
    )
    table.write(tmp_path / "data.jsonl")

    again = Table.restore(str(table), tmp_path / "data.jsonl")
    assert (again, again.digest) == (table, table.digest)
    assert again.rows[0]["prompt"] == table.rows[0]["prompt"]
    assert hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest() == table.digest


def test_other_rows_than_were_written_down_are_refused(tmp_path):
    Table.of(ROWS).write(tmp_path / "data.jsonl")

    with pytest.raises(RequestError, match="give the rows that the run began with"):
        Table.restore(str(Table.of(ROWS[:1])), tmp_path / "data.jsonl")


DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"train": ROWS, "test": ROWS}, r"data is a dict of train, test: give one of them, as in data\[...\]"),
        ([{"prompt": "hi"}, "hi"], "row 2 of data is 'hi': must be a dict with named columns"),
        ([{"n": 1}, {"n": 10**5000}], "row 2 of data cannot be written as JSON: a number has thousands of digits"),
        ([{(1, 2): 3}], "row 1 of data cannot be written as JSON: keys must be"),
        ([{"n": DEEP}], "row 1 of data cannot be written as JSON: nested too deeply"),
        (7, "data is a int: must be a file's name, or a list of rows, each a dict"),
        ((row for row in ROWS), "data is a generator: must be a file's name, or a list of rows"),
    ],
)
def test_what_is_no_rows_is_refused(given, fault):
    with pytest.raises(RequestError, match=fault):
        Table.of(given)


def test_rows_of_a_process_that_is_gone_are_asked_for():
    with pytest.raises(RequestError, match="of a process that is gone: give the rows again, as in resume"):
        read_rows("2 rows in memory, digest 0123456789ab")


# columns


def test_columns_give_our_names_to_the_files(file):
    path = file("a.jsonl", '{"question": "q", "answer": "a", "prompt": "old", "n": 1}')

    assert read_rows(path, columns={"prompt": "question", "completion": "answer"}) == [
        {"prompt": "q", "completion": "a", "n": 1}
    ]


def test_columns_can_swap_names_or_leave_them(file):
    path = file("a.jsonl", '{"chosen": "bad", "rejected": "good", "n": 1}')

    assert read_rows(path, columns={"chosen": "rejected", "rejected": "chosen", "n": "n"}) == [
        {"chosen": "good", "rejected": "bad", "n": 1}
    ]


def test_a_row_without_the_files_column_keeps_nothing_under_our_name(file):
    path = file("a.jsonl", '{"question": "q"}\n{"prompt": "old"}')

    assert read_rows(path, columns={"prompt": "question"}) == [{"prompt": "q"}, {}]


def test_a_column_the_file_lacks_is_refused_with_the_nearest_name(file):
    with pytest.raises(
        RequestError, match=r"columns says prompt=qestion: the columns are question, n; did you mean 'question'\?"
    ):
        read_rows(file("a.jsonl", '{"question": "q", "n": 1}'), columns={"prompt": "qestion"})


# wrong files


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", JSONL + "{oops\n", r"row 3 of '.*a.jsonl' is not JSON \(.*\): '{oops"),
        ("a.jsonl", "[1]\n", "row 1 of .* must be an object with named columns"),
        ("a.json", "[1", "not JSON in line 1"),
        ("a.json", '{"rows": []}', "must be a list of objects, or JSONL"),
        ("a.json", "[{}, 2]", "row 2 of .* is 2: must be an object"),
        ("a.csv", CSV + "one,1,more\n", "row 3 of .* has 3 cells, the header 2: quote cells that hold a comma"),
        ("a.csv", "prompt,n,prompt\na,1,b\n", "has 2 columns 'prompt': give each a name of its own"),
        ("a.csv", "prompt\na\0b\n", "has NUL bytes: convert it to UTF-8, or repair it"),
        ("a.csv", "prompt\na\n".encode("utf-16-le").decode(), "has NUL bytes"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', r"row 1 of .* is not JSON \('prompt' is in it twice\)"),
        (
            "a.jsonl",
            '{"n": ' + "1" * 5000 + "}",
            r"row 1 of .* is not JSON \(a number has thousands of digits\): '{\"n",
        ),
        ("a.json", '[{"n": ' + "1" * 5000 + "}]", r"data is .*: not JSON \(a number has thousands of digits\)"),
        ("a.jsonl", '{"n": ' + "[" * 80 + "]" * 80 + "}", "row 1 of .* is nested too deeply: leave it out"),
        ("a.json", "[" * 900 + "]" * 900, "row 1 of .* is of type list: must be an object"),
        ("a.txt", "hi", r"the name must end in \.jsonl, "),
    ],
)
def test_a_file_of_the_wrong_form_is_refused(file, name, content, fault):
    with pytest.raises(RequestError, match=fault):
        read_rows(file(name, content))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "prompt,n\n")])
def test_a_file_without_rows_is_refused(file, name, content):
    with pytest.raises(RequestError, match="it has no rows"):
        read_rows(file(name, content))


def test_a_file_that_is_not_there_is_refused():
    for name in ("nowhere.jsonl", "./nowhere", "/nowhere"):
        with pytest.raises(RequestError, match=f"data is '{name}': there is no such file"):
            read_rows(name)


def test_a_damaged_archive_is_refused(tmp_path):
    whole = gzip.compress(JSONL.encode())  # ten bytes of header, then the data
    for broken in (b"no archive", whole[:-12], whole[:10] + b"\xff" * 20):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(RequestError, match="it cannot be read"):
            read_rows(str(tmp_path / "a.jsonl.gz"))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\ncafé\n".encode("latin-1"))

    with pytest.raises(RequestError, match="not UTF-8"):
        read_rows(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(("name", "line"), [("a.jsonl.gz", '{"prompt": "%s"}\n'), ("a.csv.gz", "prompt\n%s\n")])
def test_a_packed_file_that_unpacks_to_far_more_is_refused(file, name, line):
    path = file(name, line % ("a" * (65 * 2**20)))  # packs to a thousandth

    with pytest.raises(RequestError, match=r"data is .*, which unpacks to more than 100 times its size"):
        read_rows(path)


# a few bytes of Parquet that become: one value, many rows, one value in many rows, the same in one row
PARQUET_BOMBS = {
    "of one long value": (lambda pa: {"prompt": ["a" * 2**20]}, {"compression": "zstd", "use_dictionary": False}),
    "of many rows": (lambda pa: {"prompt": repeated(pa, "a", 200_000)}, {}),
    "of a long value in many rows": (lambda pa: {"prompt": repeated(pa, "ab" * 40_000, 4000)}, {}),
    "of a row with many long values": (
        lambda pa: {
            "prompt": pa.ListArray.from_arrays(pa.array([0, 4000], pa.int32()), repeated(pa, "ab" * 40_000, 4000))
        },
        {"store_schema": False},
    ),
}


def repeated(pa, text, count):
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))


@pytest.mark.skipif(sys.platform != "linux", reason="how long values are is bounded on Linux alone")
@pytest.mark.parametrize("kind", PARQUET_BOMBS)
def test_a_parquet_bomb_is_refused(kind, tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns, how = PARQUET_BOMBS[kind]
    parquet.write_table(pa.table(columns(pa)), tmp_path / "a.parquet", **how)
    monkeypatch.setattr("understudy.language.data.files.MIN_BOMB_BYTES", 2**18)
    monkeypatch.setattr(bounded, "MAX_BYTES", 2**27)

    with pytest.raises(RequestError, match=r"^data is '[^']*a.parquet', which unpacks to more than 100 times its size"):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.skipif(sys.platform != "linux", reason="how long values are is bounded on Linux alone")
def test_a_bomb_that_datasets_has_saved_is_refused(tmp_path, monkeypatch):
    dataset([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"prompt": repeated(pa, "ab" * 40_000, 4000)})
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    with pa.OSFile(str(arrow), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    monkeypatch.setattr("understudy.language.data.files.MIN_BOMB_BYTES", 2**18)
    monkeypatch.setattr(bounded, "MAX_BYTES", 2**27)

    with pytest.raises(RequestError, match=r"^data is '.*saved', which unpacks to more than 100 times its size"):
        read_rows(str(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_of_more_text_than_a_text_has_is_refused_with_its_number(file, name, monkeypatch):
    monkeypatch.setattr("understudy.language.data.files.LONGEST", 100)
    rows = [{"prompt": "a" * 100}, {"prompt": "a" * 60, "other": "b" * 41}]
    content = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "a.json": json.dumps([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows] + [rows[1]]),
        "a.csv": f"prompt,other\n{'a' * 100},\n{'a' * 60},{'b' * 41}\n",
    }[name]

    number = 1 if name == "a.json" else 2  # "user" counts too
    with pytest.raises(
        RequestError, match=rf"row {number} of .* has 10[14] characters, more than a text has: split it"
    ):
        read_rows(file(name, content))


def test_a_line_that_does_not_end_is_refused_before_all_of_it_is_read(file, monkeypatch):
    monkeypatch.setattr("understudy.language.data.files.LONGEST_LINE", 2**16)
    path = file("a.jsonl", JSONL + "\n" + " " * 2**22)
    read_on = []
    monkeypatch.setattr(json, "loads", lambda text: read_on.append(text))

    with pytest.raises(RequestError, match=r"row 3 of .*a.jsonl' has more than 65,536 characters"):
        read_rows(path)
    assert read_on == []


def test_a_csv_cell_may_be_as_long_as_any_text(file, monkeypatch):
    long = "x" * 200_000
    assert read_rows(file("a.csv", f"prompt\n{long}\n")) == [{"prompt": long}]

    monkeypatch.setattr(data, "LONGEST", 1000)
    with pytest.raises(RequestError, match=r"row 1 of .* is not CSV: field larger than field limit"):
        read_rows(file("a.csv", f"prompt\n{long}\n"))


def test_a_csv_without_its_header_is_told_that_it_needs_one(file):
    rows = read_rows(file("a.csv", f"{'What is one and one? ' * 3},2\nWhat is it?,4\n"))

    with pytest.raises(RequestError, match=r"but (What is one and one\?? ?){2}\.\.\., 2: put a header above"):
        data.convert_rows(rows, lambda row, number: row, text_columns=("prompt",))


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")

    with pytest.raises(RequestError, match="has 2 columns 'prompt'"):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("cell", ["1e999", 10**400, "9" * 5000, math.nan], ids=["inf", "10^400", "digits", "nan"])
def test_a_number_that_no_float_holds_is_refused(cell):
    with pytest.raises(RequestError, match=r"margin is .*: must be a finite number"):
        data.parse_finite("margin", cell)


@pytest.mark.parametrize(("name", "row"), [("a.jsonl", "row 1"), ("a.json", "data is")])
def test_json_that_is_nested_too_deeply_is_refused(file, name, row):
    content = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"

    with pytest.raises(RequestError, match=rf"{row} .*nested too deeply"):
        read_rows(file(name, content if name == "a.jsonl" else f"[{content}]"))


def test_a_misspelt_name_of_ours_in_columns_is_refused_with_the_right_one(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "a", "solution": "b"}\n')

    with pytest.raises(RequestError, match=r"'promt' is none of our names: write --columns prompt=question"):
        read_rows(str(tmp_path / "data.jsonl"), columns={"promt": "question"})
    assert read_rows(str(tmp_path / "data.jsonl"), columns={"answers": "solution"})[0]["answers"] == "b"  # a reward's
