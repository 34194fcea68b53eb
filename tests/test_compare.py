"""Runs compared over seeds: one measure of all, no copies, nothing that a run's files say steers a terminal."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest

from understudy.cli import main
from understudy.run.config import RequestError
from understudy.run.metrics import read_metrics_reversed
from understudy.study.compare import format_table, group_runs


@pytest.fixture
def made(tmp_path):
    """Writes a run of which only the files exist that are compared."""
    count = iter(range(99))

    def run(recipe="control ppo", *, seed=0, evaluation=None, returns=(), steps=None, **config) -> Path:
        path = tmp_path / f"run{next(count)}"
        path.mkdir()
        (path / "config.json").write_text(
            json.dumps({"schema": 2, "recipe": recipe, "config": {"seed": seed, **config}})
        )
        if evaluation is not None:
            (path / "evaluation.json").write_text(json.dumps(evaluation))
        lines: list[dict] = [{"iteration": i, "episode_return_mean": x} for i, x in enumerate(returns, 1)]
        lines += [] if steps is None else [{"iteration": len(lines) + 1, "steps": steps}]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return run


def test_evaluations_are_compared_where_every_run_has_one(made):
    runs = [made(seed=i, evaluation={"returns": [i, i + 2]}, returns=[99.0]) for i in (1, 2)]

    [group] = group_runs(runs)
    assert (group["measure"], group["scores"], group["evaluated"]) == ("evaluation return", [2.0, 3.0], 2)


def test_evaluations_and_training_returns_are_never_mixed(made):
    runs = [made(seed=1, evaluation={"returns": [500.0]}, returns=[10.0, 20.0, None]), made(seed=2, returns=[30.0])]

    [group] = group_runs(runs)
    assert (group["measure"], group["scores"]) == ("training return", [20.0, 30.0])
    assert "1 of 2 runs were evaluated" in format_table([group])


def test_an_evaluation_of_a_policy_that_has_learned_since_does_not_count(made):
    old, new = ({"returns": [5.0], "after_steps": steps} for steps in (100, 200))
    runs = [
        made(seed=1, evaluation=old, returns=[1.0], steps=200),
        made(seed=2, evaluation=new, returns=[2.0], steps=200),
    ]

    [group] = group_runs(runs)
    assert (group["measure"], group["scores"], group["evaluated"]) == ("training return", [1.0, 2.0], 1)


def test_evaluations_on_other_environments_are_not_mixed(made):
    other = {"returns": [5.0], "env": "a", "env_options": {"wind": 2}}
    here = {"returns": [7.0], "env": "a", "env_options": {}}
    fields = {"env": "a", "env_options": {}, "returns": [1.0]}

    [group] = group_runs([made(seed=1, evaluation=here, **fields), made(seed=2, evaluation=other, **fields)])
    assert (group["measure"], group["scores"]) == ("training return", [1.0, 1.0])
    [group] = group_runs([made(seed=i, evaluation=other, **fields) for i in (3, 4)])
    assert (group["measure"], group["scores"]) == ("evaluation return", [5.0, 5.0])


@pytest.mark.parametrize(
    ("evaluation", "measure"),
    [
        ({"gold": 0.5, "score": 0.7}, "gold"),
        ({"gold": None, "score": 0.7}, "score"),
        ({"accuracy": 0.6, "loss": 0.1}, "accuracy"),
    ],
)
def test_language_runs_are_compared_by_their_evaluations(made, evaluation, measure):
    runs = [made("language ppo", seed=i, evaluation=evaluation, reward=["length"]) for i in (1, 2)]

    [group] = group_runs(runs)
    assert (group["measure"], group["scores"]) == (measure, [evaluation[measure]] * 2)
    assert f"{measure}, IQM {evaluation[measure]:.3f} [no interval]" in format_table([group])


def test_scores_of_different_rewards_are_no_common_measure(made):
    runs = [made("language ppo", evaluation={"score": 0.5}, reward=[reward]) for reward in ("length:4", "length:9")]

    with pytest.raises(RequestError, match=r"no measure in common .*score of length:4.*score of length:9.*--gold SPEC"):
        group_runs(runs)


def test_gold_is_common_where_rewards_differ(made):
    def run(reward, gold):
        specs = {"reward": [reward], "gold": ["exact"]}
        return made("language ppo", evaluation={"score": 9.0, "gold": gold, "specs": specs}, reward=[reward])

    first, second = group_runs([run("length:4", 0.5), run("length:9", 0.75)])
    assert (first["measure"], first["scores"], second["scores"]) == ("gold", [0.5], [0.75])
    assert second["improvement"] == 1.0


@pytest.mark.parametrize("recipe", ["control ppo", "language sft", "language grpo"])
def test_a_run_without_anything_to_compare_is_refused(made, recipe):
    with pytest.raises(RequestError, match=r"has nothing to compare, neither .* leave it out"):
        group_runs([made(recipe)])


def test_runs_of_both_worlds_are_not_compared(made):
    with pytest.raises(RequestError, match="no measure in common"):
        group_runs([made(returns=[1.0]), made("language ppo", evaluation={"score": 1.0})])


def test_copies_of_a_run_are_refused(made):
    one = made(seed=3, returns=[1.0])

    for other in (one, made(seed=3, returns=[1.0])):
        with pytest.raises(RequestError, match=r"settings and the seed of .* leave one of them out"):
            group_runs([one, other])


def test_equal_scores_have_no_interval_and_different_ones_do(made):
    runs = [made(seed=i, returns=[x]) for i, x in enumerate((500.0, 500.0, 500.0, 400.0))]

    assert group_runs(runs[:1])[0]["interval"] is group_runs(runs[:3])[0]["interval"] is None
    low, high = group_runs(runs)[0]["interval"]
    assert low < high


@pytest.mark.parametrize(
    "evaluation", [[1], {"returns": "abc"}, {"returns": [True]}, {"returns": [1e308, 10**400]}, {}]
)
def test_an_evaluation_that_is_none_is_no_crash(made, evaluation):
    run = made(evaluation=evaluation)

    with pytest.raises(RequestError, match=r"evaluation.json is no object|nothing to compare"):
        group_runs([run])


def test_what_runs_say_does_not_steer_the_terminal(made, capsys):
    env = "Cart\x1b[2J\x1b]0;gone\x07\nPole\u202e"
    run, other = made(env=env, returns=[1.0]), made(env=env + "\x9b1A", returns=[1.0])

    assert main(["compare", str(run), str(other)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out and not {"\x1b", "\x07", "\x9b", "\u202e"} & set(out)
    assert out.count("\n") == 3  # a line a group, whatever their names hold, and that env differs


def test_a_million_lines_are_compared_in_a_moment_and_little_memory(made):
    run = made()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "episode_return_mean": 7.0}\n' * 1_000_000)
        file.write('{"iteration": 2, "episode_return_mean": 8.0}\n{"iteration": 3, "episode_return_mean": null}\n')

    tracemalloc.start()
    began = time.process_time()
    [group] = group_runs([run])
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert group["scores"] == [8.0]
    assert seconds < 1 and peak < 2**23


@pytest.mark.parametrize("block", [1, 7, 64, 2**16])
def test_lines_from_the_end_are_those_from_the_beginning(made, monkeypatch, block):
    run = made(returns=[1.0, 2.0, 3.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('damaged\n{"iteration": 9}\n{"iteration": 10, "half')
    monkeypatch.setattr("understudy.run.metrics.BLOCK_BYTES", block)

    assert [line["iteration"] for line in read_metrics_reversed(run)] == [9, 3, 2, 1]


def test_a_model_directory_is_refused_as_no_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')

    assert main(["compare", str(tmp_path)]) == 2
    assert "it has no schema, so it is none of this version: give the directory of a run" in capsys.readouterr().err


def test_groups_in_other_environments_are_said_to_be_measured_on_others(made):
    runs = [
        made(seed=1, returns=[1.0], env="E", env_options={}),
        made(seed=1, returns=[1.0], env="E", env_options={"g": 5}),
    ]

    assert format_table(group_runs(runs)).splitlines()[-1].startswith("The groups differ in env_options: ")
    other = made(seed=1, returns=[1.0], env="E", env_options={}, lam=0.5)
    assert "The groups differ" not in format_table(group_runs([runs[0], other]))
