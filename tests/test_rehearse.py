"""`understudy rehearse` end to end, on sizes that take seconds; what it refuses; what it prints."""

import contextlib
import io
import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from understudy.cli import main
from understudy.cli.rehearse import Sizes, pipeline, print_results, rehearse

SMALL = Sizes(
    num_texts=2000,
    num_demonstrations=200,
    num_pairs=100,
    num_prompts=50,
    completions_per_iteration=16,
    num_iterations=2,
    num_evaluation_prompts=4,
    best_of=4,
)
PARTS = {"true_score", "proxy_score", "distinct_4", "grammatical", "copied", "samples"}
FOUND = {
    "best_of",
    "kl",
    "sft",
    "ppo",
    "gap_closed",
    "reward_model_accuracy",
    "reward_model_ceiling",
    "updates_undone",
    "seconds",
}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A small rehearsal with --json: its directory, what it printed, what it said meanwhile."""
    out, printed, said = tmp_path_factory.mktemp("rehearsal") / "out", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        assert rehearse(["--json", "--seed", "3", "--out", str(out)], SMALL) == 0
    return out, printed.getvalue(), said.getvalue()


@pytest.fixture
def found(rehearsed):
    """What a small rehearsal came to."""
    return json.loads((rehearsed[0] / "rehearsal.json").read_text())


def test_every_stage_leaves_what_the_next_one_and_the_user_need(rehearsed):
    out, _, _ = rehearsed

    for stage in ("base", "sft", "ppo"):
        assert (out / stage / "config.json").exists()
        AutoModelForCausalLM.from_pretrained(out / stage / "policy")
    AutoModelForSequenceClassification.from_pretrained(out / "reward_model" / "reward_model")
    for name in ("texts", "demonstrations", "openings", "preferences"):
        assert (out / f"{name}.jsonl").stat().st_size


def test_json_is_one_line_with_what_was_found_and_where_it_is(rehearsed, found):
    out, printed, _ = rehearsed
    (line,) = printed.splitlines()

    assert json.loads(line) == {"run": str(out), "seed": 3, **found}
    assert found.keys() == FOUND
    assert found["sft"].keys() == found["ppo"].keys() == PARTS


def test_each_stage_is_announced_on_stderr(rehearsed):
    lines = rehearsed[2].splitlines()

    assert [line[0] for line in lines if line[:1].isdigit()] == ["1", "2", "3", "4", "5"]


def test_the_gap_closed_is_the_share_of_the_way_to_the_best_of_many(found):
    before, after, best = found["sft"]["true_score"], found["ppo"]["true_score"], found["best_of"]

    assert before < best
    assert found["gap_closed"] == pytest.approx((after - before) / (best - before))


def test_a_seed_gives_the_same_rehearsal_to_the_bit(found, tmp_path):
    again = pipeline(tmp_path / "again", 3, SMALL, report=lambda text: None)

    assert {**again, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_the_table_fits_a_terminal_of_60_columns(found, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    print_results(found)
    drawn = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]

    names = "", "true score", "proxy score", "distinct 4", "grammatical", "copied", "KL to SFT, nats"
    assert [line.strip("│┃").split("│" if line[0] == "│" else "┃")[0].strip() for line in drawn] == list(names)
    assert max(map(len, drawn)) <= 60


def test_samples_are_printed_whole_however_narrow_the_terminal(found, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    print_results(found)
    lines = capsys.readouterr().out.splitlines()

    assert all(f"  {sample}" in lines for name in ("sft", "ppo") for sample in found[name]["samples"])


def test_a_directory_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")

    assert main(["rehearse", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"understudy: out is '{tmp_path}', which is there and not empty: choose another directory, or remove that one\n"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("keep")

    assert main(["rehearse", "--out", str(tmp_path / "file")]) == 2
    assert "choose another directory" in capsys.readouterr().err


def test_a_negative_seed_is_refused(tmp_path, capsys):
    assert main(["rehearse", "--seed", "-1", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "understudy: seed is -1: must be 0 or more, and below 2^63\n"
    assert not (tmp_path / "out").exists()


def test_a_seed_may_be_written_as_a_float(tmp_path, capsys):
    assert main(["rehearse", "--seed=-1e3", "--out", str(tmp_path / "out")]) == 2
    assert "seed is -1000" in capsys.readouterr().err
