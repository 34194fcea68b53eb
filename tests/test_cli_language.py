"""The command line of the language world: what it refuses and how, what it prints, what it leaves behind."""

import io
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.test_cli import refused
from understudy import language, load
from understudy.cli import main
from understudy.language import toy_language
from understudy.run.config import RequestError

CHAT = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
ROWS = {
    "prompts": toy_language.prompts(24, 0),
    "demonstrations": toy_language.demonstrations(24, 0),
    "pairs": toy_language.preferences(
        [(row["prompt"], "small cat .", "old dog .") for row in toy_language.prompts(24, 0)], temperature=1.0, seed=0
    ),
    "few": [{"prompt": "the", "completion": "cat"}] * 3,
    "questions": [{"question": "the old"}, {"question": "some"}],
    "hole": [{"prompt": "the"}, {"prompt": ""}],
    "mixed": [{"prompt": "the"}, {"prompt": CHAT[:1]}],
    "long": [{"prompt": "the " * 80}],
    "chat": [{"prompt": CHAT[:1]}],
}
FAST = [
    "--quiet",
    "--completions-per-iteration",
    "4",
    "--max-new-tokens",
    "4",
    "--total-tokens",
    "20",
    "--num-epochs",
    "1",
    "--num-minibatches",
    "1",
]
FAST += ["--no-preflight", "--evaluate-rows", "4"]


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """A directory with a tiny model, data files and reward functions."""
    folder = tmp_path_factory.mktemp("language")
    toy_language.make_model(0).save_pretrained(folder / "model")
    toy_language.make_tokenizer().save_pretrained(folder / "model")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.jsonl").write_text('{"prompt": "the"}\n{"prompt": \n')
    (folder / "empty.jsonl").write_text("")
    (folder / "mine.py").write_text(
        "def ones(prompts, completions, **_): return [float(len(c)) for c in completions]\n"
        "def short(prompts, completions, **_): return [1.0]\n"
        "def fails(prompts, completions, **_): raise RuntimeError('no')\n"
    )
    return folder


@pytest.fixture
def here(stand, tmp_path, monkeypatch):
    """An empty working directory beside the stand's files."""
    monkeypatch.chdir(tmp_path)
    for path in stand.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def ppo(*flags: str, data: str = "prompts.jsonl", reward: tuple[str, ...] = ("length",)) -> list[str]:
    return ["language", "ppo", "--model", "model", "--data", data, "--reward", *reward, *FAST, *flags]


WRONG_REQUESTS = {
    "unknown recipe": (["language", "pop"], ["recipe is 'pop'", "ppo"]),
    "no model": (["language", "sft", "--data", "demonstrations.jsonl"], ["model is missing", "--model DIR"]),
    "no data": (["language", "sft", "--model", "model"], ["data is missing", "--data"]),
    "no reward": (
        ["language", "ppo", "--model", "model", "--data", "prompts.jsonl"],
        ["reward is missing", "--reward"],
    ),
    "unknown flag": (ppo("--gama", "1"), ["--gama", "did you mean '--gamma'"]),
    "out of range": (ppo("--lam", "2"), ["lam is 2.0", "between 0 and 1"]),
    "no such choice": (ppo("--truncation", "cut"), ["truncation", "bootstrap"]),
    "no model there": (
        ["language", "sft", "--model", "nowhere", "--data", "demonstrations.jsonl"],
        ["model is 'nowhere'", "directory or hub id"],
    ),
    "no file": (ppo(data="nothing.jsonl"), ["nothing.jsonl"]),
    "empty file": (ppo(data="empty.jsonl"), ["empty.jsonl"]),
    "a line that is no JSON": (ppo(data="broken.jsonl"), ["row 2", "broken.jsonl"]),
    "missing column": (
        ["language", "sft", "--model", "model", "--data", "questions.jsonl"],
        ["question", "--columns"],
    ),
    "columns of the wrong form": (ppo("--columns", "prompt"), ["columns is 'prompt'", "prompt=question"]),
    "columns the data lack": (ppo("--columns", "prompt=questoin", data="questions.jsonl"), ["did you mean 'question'"]),
    "empty cell": (ppo(data="hole.jsonl"), ["row 2", "prompt"]),
    "longer than the context": (ppo(data="long.jsonl"), ["row 1", "81"]),
    "mixed chat and text": (ppo(data="mixed.jsonl"), ["row 2", "chat"]),
    "chat without a template": (ppo(data="chat.jsonl"), ["chat template", "--chat-template"]),
    "unknown template": (ppo("--chat-template", "none.jinja", data="chat.jsonl"), ["template is 'none.jinja'"]),
    "unknown stop": (ppo("--stop", "<never>"), ["stop", "<never>"]),
    "unknown builtin": (ppo(reward=("lenght",)), ["lenght", "did you mean 'length'"]),
    "no such function": (ppo(reward=("mine.py:two",)), ["mine.py", "two"]),
    "no such file": (ppo(reward=("yours.py:ones",)), ["yours.py"]),
    "a weight that is none": (ppo(reward=("length*much",)), ["length*much"]),
    "a language model as reward": (ppo(reward=("model",)), ["reward", "model"]),
    "limit as long as the context": (ppo("--max-new-tokens", "64"), ["max_new_tokens is 64", "context"]),
    "generate without a prompt": (["generate", "model"], ["prompt is missing", "--chat"]),
    "a device that holds nothing": (ppo("--device", "meta"), ["device is 'meta'", "try cpu"]),
    "decay beyond the weights": (ppo("--weight-decay", "1e30"), ["weight_decay is 1e+30", "learning_rate"]),
    "sampling beyond float32": (ppo("--temperature", "1e-300"), ["temperature is 1e-300", "between 1e-06"]),
    "a weight beyond float32": (ppo(reward=("length*1e39",)), ["1e39", "1e+06"]),
    "no tracker": (ppo("--log", "trackio"), ["trackio", "trackio]'"]),
    "generate nothing": (["generate", "model", "--prompt", "the", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
    "generate to an unknown stop": (["generate", "model", "--prompt", "the", "--stop", "nope"], ["stop", "nope"]),
    "a step of any size": (ppo("--learning-rate", "1e30"), ["learning_rate is 1e+30", "up to 1000"]),
    "a critic's step of any size": (ppo("--critic-learning-rate", "1e30"), ["critic_learning_rate is 1e+30"]),
    "an adapter of any scale": (ppo("--lora-rank", "1", "--lora-alpha", "1e30"), ["lora_alpha is 1e+30"]),
    "rows beyond memory": (
        ppo("--completions-per-iteration", "1e12"),
        ["completions_per_iteration is 1000000000000", "1e+06"],
    ),
    "generate beyond memory": (["generate", "model", "--prompt", "the", "--count", "1e12"], ["count 1000000000000"]),
    "generate nothing at all": (["generate", "model", "--prompt", "the", "--count", "0"], ["num_completions is 0"]),
    "rehearse beyond seeds": (["rehearse", "--seed", "1e30"], ["seed is 1000000000000000019884624838656", "2^63"]),
    "freeze": (["generate", "model", "--prompt", "the", "--temperature", "0"], ["temperature is 0", "greedy"]),
}


@pytest.mark.parametrize("case", WRONG_REQUESTS)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(here, capsys, case):
    argv, words = WRONG_REQUESTS[case]

    refused(capsys, argv, 2, *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize("recipe", ["sft", "reward-model", "ppo"])
def test_help_lists_every_field(here, capsys, recipe):
    with pytest.raises(SystemExit):
        main(["language", recipe, "--help"])

    said = capsys.readouterr().out
    module = {"sft": language.sft, "reward-model": language.reward_model, "ppo": language.ppo}[recipe]
    for field in module.Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in said


def done(capsys, argv) -> dict:
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_pipeline_from_sft_to_evaluation(here, capsys):
    fast = ["--quiet", "--held-out", "4", "--json"]
    sft = done(capsys, ["language", "sft", "--model", "model", "--data", "demonstrations.jsonl", "--out", "sft", *fast])
    rm = ["language", "reward-model", "--model", "sft", "--data", "pairs.jsonl", "--out", "rm", *fast]
    assert sft["run"] == "sft" and done(capsys, rm)["run"] == "rm"

    run = done(capsys, [*ppo("--out", "rl", "--json", "--held-out", "4", reward=("rm", "length*0.1"))])
    assert run.keys() >= {"run", "steps", "seconds", "train_seconds", "startup_seconds", "score_mean"}
    assert run["steps"] >= 20

    found = done(capsys, ["evaluate", "rl", "--rows", "4", "--json"])
    assert found["rows"] == 4
    assert {"score", "score_low", "kl", "win_rate", "stopped", "distinct_4", "length"} <= found.keys()
    again = done(capsys, ["evaluate", "rl", "--rows", "4", "--json"])
    assert again == found
    assert done(capsys, ["evaluate", "sft", "--json"])["loss"] > 0
    assert 0 <= done(capsys, ["evaluate", "rm", "--json"])["accuracy"] <= 1
    assert isinstance(load("rl"), language.Policy)
    assert AutoModelForCausalLM.from_pretrained("rl/policy").generation_config.eos_token_id == 2


@pytest.mark.parametrize("rows", [-3, 0, 10**30])
def test_rows_to_evaluate_on_are_checked_before_anything_is_loaded(tmp_path, capsys, rows):
    fields = {"model": "gone", "data": "gone.jsonl", "reward": ["length"]}
    about = {"schema": 2, "recipe": "language grpo", "config": fields}
    (tmp_path / "config.json").write_text(json.dumps(about))

    refused(capsys, ["evaluate", tmp_path, "--rows", rows], 2, f"rows is {rows}: must be between 1 and 1,000,000")


def test_evaluation_without_held_out_rows_is_refused(here, capsys):
    argv = ["language", "sft", "--model", "model", "--data", "few.jsonl", "--out", "sft", "--quiet"]
    assert main(argv) == 0
    capsys.readouterr()

    refused(capsys, ["evaluate", "sft"], 2, "held_out is 64", "8 different rows")


@pytest.mark.parametrize("recipe", ["grpo", "reinforce"])
def test_a_recipe_without_a_critic_runs_and_is_evaluated(here, capsys, recipe):
    few = [
        "--quiet",
        "--completions-per-iteration",
        "4",
        "--group-size",
        "2",
        "--max-new-tokens",
        "4",
        "--total-tokens",
        "20",
        "--no-preflight",
        "--held-out",
        "4",
    ]
    argv = [
        "language",
        recipe,
        "--model",
        "model",
        "--data",
        "prompts.jsonl",
        "--reward",
        "length",
        "--out",
        "rl",
        *few,
    ]

    assert done(capsys, [*argv, "--evaluate-rows", "4", "--json"])["steps"] >= 20
    assert done(capsys, ["evaluate", "rl", "--rows", "4", "--json"])["rows"] == 4


def test_dpo_runs_and_is_evaluated(here, capsys):
    argv = [
        "language",
        "dpo",
        "--model",
        "model",
        "--data",
        "pairs.jsonl",
        "--out",
        "dpo",
        "--held-out",
        "4",
        "--quiet",
    ]

    assert done(capsys, [*argv, "--json"])["run"] == "dpo"
    assert 0 <= done(capsys, ["evaluate", "dpo", "--json"])["accuracy"] <= 1


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
        ("grpo", ["--completions-per-iteration", "6", "--group-size", "4"], ["group_size is 4", "multiple"]),
        ("grpo", ["--truncation", "bootstrap"], ["truncation is 'bootstrap'", "no critic"]),
        (
            "grpo",
            ["--objective", "gspo", "--loss-aggregation", "token_mean"],
            ["loss_aggregation is 'token_mean'", "GSPO"],
        ),
        ("reinforce", ["--completions-per-iteration", "6", "--group-size", "4"], ["group_size is 4", "multiple"]),
    ],
)
def test_what_cannot_go_together_is_refused(here, capsys, recipe, flags, words):
    argv = ["language", recipe, "--model", "model", "--data", "prompts.jsonl", "--reward", "length", *flags]

    refused(capsys, argv, 2, *words)


def test_a_reference_that_is_not_the_runs_is_refused(here, capsys):
    assert main(ppo("--out", "rl", "--held-out", "4")) == 0
    capsys.readouterr()
    Path("model").unlink()
    toy_language.make_model(1).save_pretrained("model")
    toy_language.make_tokenizer().save_pretrained("model")

    refused(capsys, ["evaluate", "rl", "--rows", "4"], 2, "reference is 'model'", "put back")


def test_code_that_only_the_run_names_is_not_run_by_evaluate(here, capsys):
    assert main(ppo("--out", "rl", "--held-out", "4", reward=("mine.py:ones",))) == 0
    assert main(["evaluate", "rl", "--rows", "4"]) == 0  # the user's own run, the code as it was
    Path("mine.py").write_text(Path("mine.py").read_text() + "\n")
    capsys.readouterr()

    refused(capsys, ["evaluate", "rl", "--rows", "4"], 2, "mine.py:ones", "--reward")
    assert main(["evaluate", "rl", "--rows", "4", "--reward", "mine.py:ones"]) == 0


@pytest.mark.parametrize("function", ["short", "fails"])
def test_a_reward_function_that_goes_wrong_is_counted_not_scored(here, capsys, function):
    assert main(ppo("--out", "rl", reward=(f"mine.py:{function}",))) == 0

    lines = [json.loads(line) for line in Path("rl/metrics.jsonl").read_text().splitlines()]
    assert all(line["score_missing_fraction"] == 1.0 for line in lines) == (function == "fails")
    assert all(line["score_mean"] is None for line in lines) == (function == "fails")


def test_a_reply_that_fails_ends_a_run_that_has_begun_with_1(here, capsys):
    flags = [
        "--reply",
        "mine.py:fails",
        "--max-turns",
        "2",
        "--max-new-tokens",
        "30",
        "--completions-per-iteration",
        "16",
        "--out",
        "rl",
    ]
    refused(capsys, ppo(*flags), 1, "mine.py:fails", "mine.py, line 3")
    assert [json.loads(line)["kind"] for line in Path("rl/events.jsonl").read_text().splitlines()][-1] == "failed"


def test_a_config_file_gives_defaults_that_flags_override(here, capsys):
    given = "reward: [length]\ncompletions-per-iteration: 4\nclip: 0.3\nmax-new-tokens: 4\n"
    Path("c.yaml").write_text("model: model\ndata: prompts.jsonl\n" + given)
    flags = ["--total-tokens", "8", "--quiet", "--no-preflight", "--clip", "0.1", "--out", "rl", "--evaluate-rows", "4"]
    assert main(["language", "ppo", "--config", "c.yaml", *flags]) == 0

    config = json.loads(Path("rl/config.json").read_text())["config"]
    assert (config["clip"], config["completions_per_iteration"], config["reward"]) == (0.1, 4, ["length"])


def test_generate_goes_on_from_a_prompt_and_repeats_itself_with_a_seed(here, capsys):
    argv = ["generate", "model", "--prompt", "the old", "--max-new-tokens", "5", "--count", "3", "--json"]

    first = done(capsys, argv)
    assert len(first["completions"]) == 3
    assert done(capsys, argv) == first
    assert done(capsys, [*argv, "--seed", "9"]) != first
    greedy = done(capsys, [*argv, "--greedy"])["completions"]
    assert len(set(greedy)) == 1


def test_chat_takes_turns_until_the_input_ends(here, capsys, monkeypatch):
    folder = Path("chatty")
    tokenizer = toy_language.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    toy_language.make_model(0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the old\nsome\n"))

    assert main(["generate", str(folder), "--chat", "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.strip("\n").split("\n")) == 2


def test_a_function_of_the_users_is_said_to_be_outside_exact_resume(here, capsys):
    assert main(ppo("--out", "rl", reward=("mine.py:ones", "length"))) == 0
    assert main(ppo("--out", "other")) == 0

    [said] = [line for line in Path("rl/events.jsonl").read_text().splitlines() if "resume is exact only" in line]
    assert "mine.py:ones remembers nothing" in said and "length" not in said
    assert not Path("other/events.jsonl").exists() or "exact" not in Path("other/events.jsonl").read_text()


@pytest.mark.parametrize("verb", ["evaluate", "resume"])
def test_a_run_of_a_device_that_is_not_here_goes_on_on_another(here, capsys, verb):
    assert main(ppo("--out", "rl", "--held-out", "4")) == 0
    about = json.loads(Path("rl/config.json").read_text())
    about["config"]["device"] = "cuda:99"
    Path("rl/config.json").write_text(json.dumps(about))
    capsys.readouterr()

    refused(capsys, [verb, "rl"], 2, "device is 'cuda:99'", "try cpu")
    assert main([verb, "rl", "--device", "cpu"]) == 0
    assert ("exact only on the same device" in capsys.readouterr().err) == (verb == "resume")


def test_a_python_config_is_refused_like_a_flag():
    with pytest.raises(RequestError, match="reward is missing"):
        language.ppo.Config(model="model", data="prompts.jsonl", reward=())
