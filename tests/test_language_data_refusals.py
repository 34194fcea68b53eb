"""What recipes of the language world refuse: one sentence that names the field, the value and the mend."""

import importlib.util
import json
from collections.abc import Callable

import pytest
from tokenizers import processors

from tests.models import tiny
from tests.rehearsed import furnish, letters, ppo_config, reward_config, sft_config
from tests.test_records import CHATML
from understudy.language import ppo, reward_model, sft, toy_language
from understudy.language.data.records import Tokenizer
from understudy.run.config import RequestError

RECIPES: dict[str, Callable] = {
    "sft": lambda *a, **f: sft.train(sft_config(*a, **f)),
    "reward-model": lambda *a, **f: reward_model.train(reward_config(*a, **f)),
    "ppo": lambda *a, **f: ppo.train(ppo_config(*a, **f)),
}
CHAT = [{"role": "user", "content": "the dog"}]
ANSWER = [{"role": "assistant", "content": "smiled ."}]
LONG = "the dog " * 40  # 80 words; the model's context holds 64
ROWS = {
    "sft": {"prompt": "the dog", "completion": " smiled ."},
    "reward-model": {"prompt": "the dog", "chosen": " smiled .", "rejected": " sneered ."},
    "ppo": {"prompt": "the dog"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture
def train(home, tmp_path):
    """Trains with some fields on some rows, where there are any."""

    def run(recipe: str, lines: list[dict] | None = None, **fields):
        if lines is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            fields["data"] = str(tmp_path / "rows.jsonl")
        return RECIPES[recipe](home, tmp_path / "run", **fields)

    return run


@pytest.fixture
def refused(train, tmp_path):
    """The sentence with which a request is refused; no run is left behind."""

    def refuse(recipe: str, lines: list[dict] | None = None, **fields) -> str:
        with pytest.raises(RequestError) as problem:
            train(recipe, lines, **fields)
        assert not (tmp_path / "run").exists()
        said = str(problem.value)
        assert "\n" not in said
        return said

    return refuse


EVERY = pytest.mark.parametrize("recipe", RECIPES)


@pytest.mark.parametrize(("recipe", "column"), [("sft", "prompt"), ("reward-model", "chosen"), ("ppo", "prompt")])
def test_a_missing_column_is_named_with_the_flag_that_maps_it(refused, recipe, column):
    said = refused(recipe, [{"question": "the dog", "answer": " smiled ."}])

    assert f"no column '{column}'" in said and "--columns" in said


@EVERY
def test_columns_of_other_names_are_mapped(train, recipe):
    renamed = {name: f"their_{name}" for name in ROWS[recipe]}
    rows = [{renamed[name]: cell for name, cell in ROWS[recipe].items()}] * 4

    run = train(recipe, rows, columns=tuple(f"{ours}={theirs}" for ours, theirs in renamed.items()))

    assert run.metrics[-1]["iteration"] > 0


@EVERY
def test_a_mapped_column_that_is_not_there_is_named(refused, recipe):
    name = next(iter(ROWS[recipe]))

    assert "nowhere" in refused(recipe, [ROWS[recipe]], columns=(f"{name}=nowhere",))


@EVERY
def test_a_pair_of_columns_is_written_with_an_equals_sign(refused, recipe):
    assert "ours=theirs" in refused(recipe, [ROWS[recipe]], columns=("prompt",))


@EVERY
@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_cell_is_named_with_its_row(refused, recipe, empty):
    name = list(ROWS[recipe])[-1]

    said = refused(recipe, [ROWS[recipe], ROWS[recipe] | {name: empty}])

    assert said.startswith("row 2:") and f"{name} is empty" in said


@EVERY
def test_a_row_longer_than_the_context_is_named_with_its_length(refused, recipe):
    name = list(ROWS[recipe])[-1]

    said = refused(recipe, [ROWS[recipe], ROWS[recipe], ROWS[recipe] | {name: LONG}])

    assert said.startswith("row 3:") and "tokens" in said and "shorten it or leave it out" in said


@EVERY
def test_a_row_longer_than_asked_for_is_refused(refused, recipe):
    assert "max_length is 2 (the model reads 64): raise --max-length" in refused(recipe, [ROWS[recipe]], max_length=2)


@EVERY
def test_a_run_goes_on_without_the_rows_that_are_too_long(train, recipe):
    name = list(ROWS[recipe])[-1]

    run = train(recipe, [ROWS[recipe]] * 4 + [ROWS[recipe] | {name: LONG}], too_long="skip")

    said = (run.path / "events.jsonl").read_text()
    assert "of the 5 rows of" in said and "1 left out as too long: 4 are read" in said


def test_prompts_that_a_judge_reads_are_not_cut(refused):
    assert "too_long is 'cut'" in refused("ppo", too_long="cut")


@EVERY
def test_chat_and_text_do_not_mix(refused, recipe):
    chat = {"prompt": CHAT, "completion": ANSWER, "chosen": ANSWER, "rejected": ANSWER}
    other = {name: chat[name] for name in ROWS[recipe]}

    said = refused(recipe, [ROWS[recipe], other], chat_template=CHATML)

    assert said.startswith("row 2:") and "keep to one in a file" in said


def test_chat_without_a_template_is_refused(refused):
    said = refused("ppo", [{"prompt": CHAT}])

    assert "no chat template" in said and "--chat-template" in said


@EVERY
@pytest.mark.parametrize("template", ["nowhere.jinja", "{% if %}"])
def test_an_unknown_template_is_refused(refused, recipe, template):
    said = refused(recipe, [ROWS[recipe]], chat_template=template)

    assert said.startswith("chat_template is ") and template[:8] in said


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_a_model_without_a_stop_id_is_refused(refused, recipe, tmp_path):
    model, tokenizer = toy_language.make_model(0), toy_language.make_tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "endless")

    said = refused(recipe, model=str(tmp_path / "endless"))

    assert "no stop id" in said and "--stop" in said


@EVERY
def test_an_unknown_stop_is_refused(refused, recipe):
    assert "stop is 'no such token'" in refused(recipe, stop=("no such token",))


@EVERY
def test_a_model_that_is_not_there_is_refused(refused, recipe, tmp_path):
    said = refused(recipe, model=str(tmp_path / "nowhere"))

    assert "nowhere" in said and "give a directory or hub id" in said


@EVERY
def test_damaged_weights_are_refused(refused, recipe, tmp_path):
    furnish(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged" * 9)

    assert "cannot be loaded" in refused(recipe, model=str(tmp_path / "damaged"))


@EVERY
def test_data_that_are_not_there_are_refused(refused, recipe, tmp_path):
    assert "there is no such file" in refused(recipe, data=str(tmp_path / "nowhere.jsonl"))


@EVERY
def test_a_device_that_is_not_there_is_refused(refused, recipe):
    assert refused(recipe, device="abacus").startswith("device is 'abacus'")


@EVERY
def test_a_sink_without_its_package_is_refused(recipe, home, tmp_path):
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is here")
    with pytest.raises(RequestError, match="log has 'trackio', for which the package trackio is missing"):
        RECIPES[recipe](home, tmp_path / "run", log=("trackio",))


@EVERY
@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("micro_batch_size", -1), ("dtype", "float8"), ("warmup", 1.5), ("seed", 0.5)],
)
def test_a_value_out_of_range_is_refused(refused, recipe, field, value):
    assert refused(recipe, **{field: value}).startswith(f"{field} is {value!r}: must be ")


@pytest.mark.parametrize("label", [1, 0.25])
def test_labels_that_are_all_the_same_are_refused(refused, label):
    rows = [{"text": f"{actor} smiled .", "label": label} for actor in ("the dog", "a cat", "the fox")]

    said = refused("reward-model", rows)

    assert said.startswith(f"label is {label} in each of the 3 rows") and "give good and bad texts" in said


def test_pairs_with_a_label_beside_them_are_pairs(train):
    run = train("reward-model", [ROWS["reward-model"] | {"label": 1}] * 4)

    about = json.loads((run.path / "reward_model" / "config.json").read_text())["understudy"]
    assert about["form"] == "completion"


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_bos_is_forced_where_it_was_asked_for(train, tmp_path, add_bos):
    furnish(tmp_path / "model")
    bare = toy_language.make_tokenizer()
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    bare.save_pretrained(tmp_path / "model")

    run = train("ppo", model=str(tmp_path / "model"), log_samples=1, add_bos=add_bos)

    line = json.loads((run.path / "samples" / "000001.jsonl").read_text().splitlines()[0])
    assert (line["prompt_ids"][0] == 1) is add_bos
    assert (Tokenizer.load(run.path / "policy").prefix_ids == [1]) is add_bos


def test_a_label_out_of_range_is_named_with_its_row(refused):
    rows = [{"text": "the dog smiled .", "label": 1}, {"text": "a cat sneered .", "label": 5}]

    said = refused("reward-model", rows)

    assert said.startswith("row 2:") and "from 0 (bad) to 1 (good)" in said


def test_pairs_that_say_nothing_are_refused(refused):
    assert "chosen equals rejected" in refused("reward-model", [ROWS["reward-model"] | {"rejected": " smiled ."}])


def test_an_unconditional_run_starts_every_row_from_bos(train):
    run = train("ppo", [{"other": "x"}], log_samples=1, unconditional=True)

    line = json.loads((run.path / "samples" / "000001.jsonl").read_text().splitlines()[0])
    assert line["prompt_ids"] == [1]


def test_no_bos_and_no_prompt_is_refused(refused, tmp_path):
    furnish(tmp_path / "model")
    tokenizer = toy_language.make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "model")

    said = refused("ppo", [{"other": "x"}], model=str(tmp_path / "model"), unconditional=True)
    assert "no BOS to start from" in said


@pytest.mark.parametrize("name", ["max_new_tokens", "fixed_length"])
def test_a_limit_that_leaves_no_room_for_a_prompt_is_refused_by_its_name(refused, name):
    assert refused("ppo", **{"max_new_tokens": 64, name: 64}).startswith(
        f"{name} is 64: the model's context leaves no room"
    )


def test_pretraining_text_that_cannot_be_read_is_named_as_such(refused, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"words": "the dog"}\n')

    for source in (tmp_path / "texts.jsonl", tmp_path / "nowhere.jsonl"):
        assert refused("ppo", pretraining=str(source)).startswith(f"pretraining is {str(source)!r}: ")


def test_a_reference_that_is_not_there_is_named(refused, tmp_path):
    said = refused("ppo", reference=str(tmp_path / "nowhere"))

    assert said.startswith("reference is ")


def test_a_reference_of_another_vocabulary_is_refused(refused, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "other")
    letters().save_pretrained(tmp_path / "other")

    said = refused("ppo", reference=str(tmp_path / "other"))

    assert said.startswith("reference is ") and "vocabulary" in said


@pytest.mark.parametrize("field", ["reward", "gold"])
@pytest.mark.parametrize("spec", ["nowhere", "nowhere.py:score", "lenght"])
def test_a_reward_that_is_not_there_is_refused(refused, field, spec):
    assert refused("ppo", **{field: spec}).startswith(f"{field} is {spec!r}: ")


@pytest.mark.parametrize("field", ["reward", "gold"])
def test_a_language_model_as_a_reward_is_refused(refused, field, home):
    said = refused("ppo", **{field: str(home)})

    assert said.startswith(f"{field} is ") and "train a reward model on it first" in said


def test_no_reward_at_all_is_refused(refused):
    assert refused("ppo", reward=()).startswith("reward is missing")


# a reward function that fails is no wrong request: its rows are missing, and the run goes on

FAULTS = {
    "raises": "raise ValueError('no')",
    "gives none": "return [None] * len(completions)",
    "gives nan": "return [float('nan')] * len(completions)",
    "gives infinity": "return [float('inf')] * len(completions)",
    "has the wrong length": "return [1.0] * 99",
    "gives text": "return ['good'] * len(completions)",
    "ends the process": "import os; os._exit(3)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_function_that_fails_is_counted_as_missing(train, tmp_path, fault):
    (tmp_path / "mine.py").write_text(f"def score(completions):\n    {FAULTS[fault]}\n")

    run = train(
        "ppo", reward=f"{tmp_path / 'mine.py'}:score", completions_per_iteration=2, total_tokens=1, evaluate_rows=1
    )

    assert run.metrics[0]["score_missing_fraction"] == 1.0
    assert run.metrics[0]["optimizer_steps"] == 0
