"""Runs on rows in memory: the same as on a file, kept with the run, and gone on with only where they are the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rehearsed import furnish, ppo_config, sft_config
from understudy import resume
from understudy.cli import main
from understudy.language import ppo, sft
from understudy.language.data.files import Table
from understudy.run import lineage
from understudy.run.config import RequestError

FEW = {"batch_size": 8, "num_epochs": 1, "checkpoint_every": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def rows(home):
    return [json.loads(line) for line in (home / "demonstrations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(home, rows, tmp_path_factory):
    """A run on rows in memory."""
    return sft.train(sft_config(home, tmp_path_factory.mktemp("runs") / "run", data=rows, **FEW)).path


@pytest.fixture
def stopped(trained, tmp_path):
    """The same run as it was after its second iteration."""
    run = shutil.copytree(trained, tmp_path / "run")
    for number in ("000003", "000004"):
        shutil.rmtree(run / "checkpoints" / number)
    return run


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_rows_in_memory_teach_what_the_same_file_teaches(trained, home, tmp_path):
    assert losses(sft.train(sft_config(home, tmp_path / "file", **FEW)).path) == losses(trained)


def test_values_that_json_does_not_know_are_plain_from_the_start(tmp_path):
    table = Table.of(
        [{"prompt": "a", "answer": np.int64(3), "at": (np.float32(0.5), torch.arange(2)), "path": Path("x")}]
    )

    assert table.rows == [{"prompt": "a", "answer": 3, "at": [0.5, [0, 1]], "path": "x"}]
    table.write(tmp_path / "data.jsonl")
    assert Table.restore(table, tmp_path / "data.jsonl").rows == table.rows


def test_every_field_of_data_takes_rows(home, tmp_path):
    prompts, texts = [{"prompt": "the dog"}] * 9, [{"text": "the dog smiled ."}] * 9

    run = ppo.train(ppo_config(home, tmp_path / "run", total_tokens=1, data=prompts, pretraining=texts))

    assert [len((run.path / f"{name}.jsonl").read_text().splitlines()) for name in ("data", "pretraining")] == [9, 9]


@pytest.mark.parametrize("again", [False, True], ids=["as the run kept them", "given again"])
def test_a_run_goes_on_with_its_rows(stopped, trained, rows, again):
    if again:
        (stopped / "data.jsonl").unlink()

    resume(stopped, **({"data": rows} if again else {}))

    assert losses(stopped) == losses(trained)


@pytest.mark.parametrize("other", [lambda rows: rows[1:], lambda rows: "other.jsonl"], ids=["rows", "a file"])
def test_a_run_does_not_go_on_with_other_rows(stopped, rows, other):
    with pytest.raises(
        RequestError, match=r"data is .*, and the run began with '40 rows in memory, digest .*': give those"
    ):
        resume(stopped, data=other(rows))


def test_a_run_whose_rows_are_gone_names_what_to_give(stopped):
    (stopped / "data.jsonl").unlink()

    with pytest.raises(RequestError, match=r"data is '40 rows in memory, .* give the rows again, as in resume"):
        resume(stopped)


def test_rows_that_were_changed_in_the_runs_directory_are_refused(stopped):
    (stopped / "data.jsonl").write_text('{"prompt": "the", "completion": "dog"}\n')

    with pytest.raises(RequestError, match="give the rows that the run began with"):
        resume(stopped)


def test_the_rows_are_part_of_the_lineage(trained, stopped):
    checks = {check.what: check.state for check in lineage.verify(lineage.read_chain(trained))}
    assert checks["data data.jsonl"] == "same"

    (stopped / "data.jsonl").write_text("{}\n")
    checks = {check.what: check.state for check in lineage.verify(lineage.read_chain(stopped))}
    assert checks["data data.jsonl"] == "differs"


def test_a_run_on_rows_in_memory_is_evaluated_from_the_command_line(trained, capsys):
    assert main(["evaluate", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 8
