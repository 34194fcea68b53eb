"""RUN/best: the policy of the best evaluation, whole, the same after a run was taken up again."""

import json

import pytest
from safetensors.torch import load_file

import understudy
from tests.rehearsed import furnish, ppo_config
from understudy.cli import main
from understudy.language import ppo
from understudy.run.config import RequestError

EVERY = {
    "evaluate_every": 1,
    "learning_rate": 1e-2,
    "learning_rate_schedule": "constant",
    "fixed_length": 6,
    "completions_per_iteration": 8,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def mean_id(completion_ids, **_):
    return [sum(ids) / len(ids) for ids in completion_ids]


def last_id(completion_ids, **_):
    return [float(ids[-1]) for ids in completion_ids]


def config(home, out, iterations, **fields):
    given = {
        "best_by": "score",
        "reward": (("length", 1e-3), last_id),
        "total_tokens": 48 * iterations,
        **EVERY,
        **fields,
    }
    return ppo_config(home, out, **given)


def weights(folder):
    return {name: x.tolist() for name, x in load_file(folder / "model.safetensors").items()}


def first_highest(run, name):
    scores = [line[f"evaluation_{name}"] for line in run.metrics]
    return scores.index(max(scores)) + 1


def test_best_holds_the_policy_of_the_best_evaluation(home, tmp_path):
    run = ppo.train(config(home, tmp_path / "run", 4))

    best = first_highest(run, "score")
    assert json.loads((run.path / "best" / "best.json").read_text())["iteration"] == best
    assert run.metrics[-1]["evaluation_best"] == max(line["evaluation_score"] for line in run.metrics)
    shorter = ppo.train(config(home, tmp_path / "shorter", best, best_by="none"))
    assert weights(run.path / "best") == weights(shorter.path / "policy")
    assert not (shorter.path / "best").exists()


def test_the_best_by_gold_is_not_that_by_score(home, tmp_path):
    def worse(completion_ids, **_):
        return [-x for x in last_id(completion_ids)]

    run = ppo.train(config(home, tmp_path / "run", 3, gold=worse, best_by="gold"))

    best = json.loads((run.path / "best" / "best.json").read_text())
    assert best["iteration"] == first_highest(run, "gold")
    assert best["gold"] == run.metrics[-1]["evaluation_best"]


def test_a_run_that_is_taken_up_again_has_the_same_best(home, tmp_path):
    whole = ppo.train(config(home, tmp_path / "whole", 4, checkpoint_every=1))
    iterations = ppo.iterate(config(home, tmp_path / "cut", 4, checkpoint_every=1))
    for _ in range(2):
        next(iterations)
    iterations.close()
    cut = understudy.resume(tmp_path / "cut", reward=(("length", 1e-3), last_id))

    for name in ("best/model.safetensors", "best/best.json", "policy/model.safetensors"):
        assert (whole.path / name).read_bytes() == (cut.path / name).read_bytes()


def test_best_is_loaded_evaluated_and_generated_from(home, tmp_path, capsys):
    run = ppo.train(config(home, tmp_path / "run", 2, reward="length:3", data=str(home / "prompts.jsonl")))
    best = str(run.path / "best")

    assert understudy.load(best).tokenizer is not None
    assert main(["generate", best, "--prompt", "the dog", "--max-new-tokens", "3"]) == 0
    assert main(["evaluate", best, "--rows", "4"]) == 0
    assert "4 rows of" in capsys.readouterr().out
    assert json.loads((run.path / "evaluation-best.json").read_text())["rows"] == 4


def test_the_best_by_a_gold_that_is_not_measured_is_refused(home, tmp_path):
    with pytest.raises(RequestError, match=r"^best_by is 'gold': nothing is measured as gold"):
        config(home, tmp_path, 2, best_by="gold")
