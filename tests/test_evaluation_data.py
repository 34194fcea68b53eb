"""A file of its own to evaluate on, in every language recipe."""

import json

import pytest

from tests.rehearsed import furnish, ppo_config, reward_config, sft_config
from understudy.cli import main
from understudy.language import dpo, ppo, reward_model, sft
from understudy.language.model.reward_model import RewardModel
from understudy.language.rlhf import RLHFModels
from understudy.language.sft import load_policy
from understudy.run.config import RequestError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def dpo_config(home, out, **fields):
    return dpo.Config(model=str(home), output_dir=str(out), quiet=True, **fields)


def of_policy(split):
    def parts(cfg):
        policy = load_policy(cfg)
        return *split(policy, cfg), policy.warnings

    return parts


def of_reward_model(cfg):
    model = RewardModel.from_pretrained(cfg.model)
    return *reward_model.load_training_rows(model, cfg), model.warnings


def of_cast(cfg):
    cast = RLHFModels(cfg)
    return cast.sampler.prompts, cast.evaluation_sampler.prompts, cast.policy.warnings


RECIPES = {
    "sft": (sft_config, "demonstrations", of_policy(sft.load_examples), {"held_out": 64}),
    "dpo": (dpo_config, "preferences", of_policy(dpo.load_preferences), {}),
    "reward model": (reward_config, "preferences", of_reward_model, {"held_out": 64}),
    "ppo": (ppo_config, "prompts", of_cast, {}),
}


def divided(home, tmp_path, recipe, learned: slice, own: slice):
    """What a recipe learns from and evaluates on, given rows of its data in two files."""
    config, name, parts, fields = RECIPES[recipe]
    lines = list(dict.fromkeys((home / f"{name}.jsonl").read_text().splitlines()))
    for file, some in (("train", learned), ("own", own)):
        (tmp_path / f"{file}.jsonl").write_text("".join(line + "\n" for line in lines[some]))
    files = {"data": str(tmp_path / "train.jsonl"), "evaluation_data": str(tmp_path / "own.jsonl")}
    return parts(config(home, tmp_path / "run", **fields, **files))


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_their_own_are_evaluated_on_and_all_others_learned_from(home, tmp_path, recipe):
    learned, kept, _ = divided(home, tmp_path, recipe, slice(0, 12), slice(12, 15))

    assert (len(learned), len(kept)) == (12, 3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_in_both_files_are_counted_and_said(home, tmp_path, recipe):
    *_, remarks = divided(home, tmp_path, recipe, slice(0, 12), slice(10, 12))

    assert any(remark.startswith("2 of the 2 rows of evaluation_data") for remark in remarks)


def test_a_run_is_evaluated_on_its_own_file(home, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text('{"prompt": "the dog"}\n{"prompt": "a cat"}\n')
    cfg = ppo_config(home, tmp_path / "run", evaluation_data=str(tmp_path / "own.jsonl"), fixed_length=4)
    run = ppo.train(cfg)

    found = json.loads((run.path / "evaluation.json").read_text())
    assert {sample["prompt"] for sample in found["samples"]} == {"the dog", "a cat"} and found["held_out"]
    assert "own.jsonl" in (run.path / "lineage.json").read_text()

    (tmp_path / "third.jsonl").write_text('{"prompt": "my dog"}\n')
    assert main(["evaluate", str(run.path), "--rows", "2", "--evaluation-data", str(tmp_path / "third.jsonl")]) == 0
    assert "2 rows of 1 different prompts" in capsys.readouterr().out


def test_rows_in_memory_are_evaluated_on_and_kept_by_the_run(home, tmp_path, capsys):
    rows = [{"prompt": "the dog"}, {"prompt": "a cat"}]
    run = ppo.train(ppo_config(home, tmp_path / "run", evaluation_data=rows, fixed_length=4))

    assert (run.path / "evaluation_data.jsonl").is_file()
    assert main(["evaluate", str(run.path), "--rows", "2"]) == 0
    assert "2 rows of 2 different prompts" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_refused_by_the_fields_name(home, tmp_path):
    with pytest.raises(RequestError, match=r"^evaluation_data is 'nowhere.jsonl': .*no such file"):
        RLHFModels(ppo_config(home, tmp_path / "run", evaluation_data="nowhere.jsonl"))


def test_flags_of_sampling_are_refused_for_a_run_that_samples_nothing(home, tmp_path, capsys):
    run = sft.train(sft_config(home, tmp_path / "run"))

    for flag in (["--rows", "3"], ["--gold", "length"]):
        assert main(["evaluate", str(run.path), *flag]) == 2
        assert "has no effect on a run of sft" in capsys.readouterr().err
