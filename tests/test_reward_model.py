"""Reward models: what they minimise, what they say of themselves, and that Hugging Face's class scores the same."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.models import FAMILIES, tiny
from tests.rehearsed import furnish, letters, reward_config
from tests.test_records import CHAT, CHATML, made, tokens
from understudy.language import reward_model, toy_language
from understudy.language.data import records
from understudy.language.data.records import Preference, Tokenizer
from understudy.language.model.reward_model import RewardModel, load_reward_model
from understudy.language.rewards.reward_sum import ScoringInput
from understudy.run.config import RequestError

EVERY = pytest.mark.parametrize(("family", "tied"), [(f, t) for f in FAMILIES for t in (False, True)])
ROWS = [[1, 5, 6, 2], [1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 2], [1, 3, 2, 2], [1, 4]]  # three end in EOS
ONE_STEP = {"total_tokens": 1, "held_out": 0, "learning_rate_schedule": "constant"}
SMOOTH = {"learning_rate": 1e-3, "adam_eps": 1e-2}  # a large epsilon: rounding is not made larger by Adam's division


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture
def go(home, tmp_path):
    """Trains with some fields; each run in a directory of its own."""
    count = iter(range(99))

    def train(**fields):
        return reward_model.train(reward_config(home, tmp_path / f"run{next(count)}", **fields))

    return train


@pytest.fixture
def lettered(tmp_path):
    """Writes a tiny model of a family with a tokenizer of letters; the directory."""

    def write(family: str, *, tied=False, pad=None, name="model"):
        tiny(family, tied=tied).save_pretrained(tmp_path / name)
        letters(pad=pad).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def apart(one, other) -> float:
    """The largest distance between two reward models' parameters."""
    here, there = (
        AutoModelForSequenceClassification.from_pretrained(p / "reward_model").state_dict() for p in (one, other)
    )
    return max(float((x - there[name]).abs().max()) for name, x in here.items())


def by_hugging_face(path, rows=ROWS) -> torch.Tensor:
    """Logits of padded rows through Hugging Face's class and tokenizer, [N]."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    return AutoModelForSequenceClassification.from_pretrained(path)(**padded).logits[:, 0].detach()


def agrees(model: RewardModel, path) -> bool:
    model.mean, model.scale = 0.25, 2.0
    model.save(path)
    ours, back = model.score(ROWS) * 2.0 + 0.25, RewardModel.from_pretrained(path)
    assert float(ours.std()) > 0.01  # it does tell rows apart
    assert_close(by_hugging_face(path), ours, atol=1e-5, rtol=0)
    assert_close(back.score(ROWS), model.score(ROWS), atol=1e-5, rtol=0)
    assert (back.mean, back.scale) == (0.25, 2.0)
    return True


@EVERY
def test_hugging_faces_class_scores_padded_rows_as_we_do(family, tied, lettered, tmp_path):
    model = RewardModel.from_pretrained(lettered(family, tied=tied, pad="</s>"))  # pad was EOS

    assert agrees(model, tmp_path / "saved")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("pad", [None, "<pad>", "<s>"])
def test_whatever_was_the_padding_a_score_is_read_at_the_last_token(family, pad, lettered, tmp_path):
    model = RewardModel.from_pretrained(lettered(family, pad=pad))

    assert agrees(model, tmp_path / "saved")
    assert model.tokenizer.hf.pad_token_id not in {1, 2}


def test_a_trained_model_is_hugging_faces_to_load(go):
    path = go(learning_rate=1e-3).path / "reward_model"
    model = RewardModel.from_pretrained(path)
    rows = [[1, 10, 20, 30, 40, 2], [1, 10, 2], [1, 10, 50, 60, 2]]

    assert model.scale != 1.0
    assert_close(by_hugging_face(path, rows), model.score(rows) * model.scale + model.mean, atol=1e-5, rtol=0)


def test_the_stop_ids_it_was_trained_with_come_back(home, tmp_path):
    RewardModel.from_pretrained(home, stop=(".", "</s>")).save(tmp_path / "saved")

    full_stop = Tokenizer.load(home).hf.convert_tokens_to_ids(".")
    assert RewardModel.from_pretrained(tmp_path / "saved").tokenizer.stops == {2, full_stop}


def test_a_fresh_head_is_drawn_with_one_over_root_width(home):
    torch.manual_seed(0)
    drawn = torch.cat([RewardModel.from_pretrained(home).model.score.weight.detach()[0] for _ in range(8)])

    # 512 draws: within 4 standard errors (0.124 / sqrt(1024)) of 1 / sqrt(65) = 0.124
    assert abs(float(drawn.std()) - 65**-0.5) < 0.0155


def test_the_loss_of_pairs_is_bradley_terrys_with_their_margin(go, tmp_path):
    pairs = [
        {"prompt": "the dog", "chosen": " smiled .", "rejected": " sat .", "margin": 0.5},
        {"prompt": "a cat", "chosen": " sat near the river .", "rejected": " sneered .", "margin": 0.0},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    how = {"data": str(tmp_path / "pairs.jsonl"), "learning_rate": 1e-12, "normalize": "none", **ONE_STEP}

    run = go(**how)

    model = RewardModel.from_pretrained(run.path / "reward_model")  # it has not moved
    rows = [
        [*model.tokenizer.encode_prompt(p["prompt"]), *model.tokenizer.encode_completion(p[side], p["prompt"])]
        for p in pairs
        for side in ("chosen", "rejected")
    ]
    [good, bad, better, worse] = model.score(rows).tolist()
    surprise = [math.log1p(math.exp(-(good - bad - 0.5))), math.log1p(math.exp(-(better - worse)))]
    assert run.metrics[0]["loss"] == pytest.approx(sum(surprise) / 2, abs=1e-5)
    assert run.metrics[0]["accuracy"] == ((good > bad) + (better > worse)) / 2


def test_centering_holds_the_scores_of_pairs_around_zero(go, home):
    def off_centre(**fields) -> float:
        run = go(num_epochs=4, learning_rate=3e-3, held_out=0, normalize="none", **fields)
        model = RewardModel.from_pretrained(run.path / "reward_model")
        learned, _ = reward_model.load_training_rows(model, reward_config(home, run.path, held_out=0))
        chosen, rejected = (model.score([getattr(pair, side) for pair in learned]) for side in ("chosen", "rejected"))
        return float((chosen + rejected).square().mean())

    assert off_centre(center_coef=1.0) < 0.1 * off_centre()


def test_the_loss_of_labels_is_the_logistic_one(go, tmp_path):
    rows = [{"text": "the dog smiled .", "label": 1}, {"text": "a cat sneered .", "label": 0.25}]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    run = go(data=str(tmp_path / "labels.jsonl"), learning_rate=1e-12, normalize="none", **ONE_STEP)

    model = RewardModel.from_pretrained(run.path / "reward_model")
    one, two = model.score([model.tokenizer.encode_prompt(row["text"]) for row in rows]).tolist()
    surprise = [math.log1p(math.exp(-one)), 0.25 * math.log1p(math.exp(-two)) + 0.75 * math.log1p(math.exp(two))]
    assert run.metrics[0]["loss"] == pytest.approx(sum(surprise) / 2, abs=1e-5)
    assert model.input_format == "text"


@pytest.mark.parametrize(("normalize", "mean", "deviation"), [("none", None, None), ("mean", 0, None), ("both", 0, 1)])
def test_scores_of_what_was_learned_from_are_normalised_as_asked(go, home, normalize, mean, deviation):
    run = go(normalize=normalize, held_out=0, learning_rate=1e-3)

    model = RewardModel.from_pretrained(run.path / "reward_model")
    cfg = reward_config(home, run.path, held_out=0)
    learned, _ = reward_model.load_training_rows(model, cfg)
    score = model.score([ids for row in learned for ids in reward_model.token_sequences(row)])
    assert (model.mean == 0.0) == (mean is None)
    assert (model.scale == 1.0) == (deviation is None)
    if mean is not None:
        assert float(score.mean()) == pytest.approx(mean, abs=1e-4)
    if deviation is not None:
        assert float(score.std()) == pytest.approx(deviation, abs=1e-4)


ACTORS = [
    f"{one} {someone}" for one in ("the", "a", "my") for someone in ("dog", "cat", "girl", "king", "fox", "baker")
]


@pytest.mark.parametrize("form", ["pairs", "labels"])
def test_it_learns_what_was_liked_and_holds_it_on_what_it_did_not_see(go, tmp_path, form):
    pairs = [{"prompt": actor, "chosen": " smiled .", "rejected": " sneered ."} for actor in ACTORS]
    labels = [{"text": f"{a} {did} .", "label": did == "smiled"} for a in ACTORS for did in ("smiled", "sneered")]
    rows = pairs if form == "pairs" else labels
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    run = go(data=str(tmp_path / "rows.jsonl"), num_epochs=8, learning_rate=3e-3)

    assert run.metrics[-1]["evaluation_accuracy"] == 1.0
    assert run.metrics[-1]["loss"] < 0.2 < run.metrics[0]["loss"]


def test_so_many_pairs_make_a_step_and_every_one_comes_once_an_epoch(go):
    run = go(batch_size=10, num_epochs=2, held_out=0)

    assert run.metrics[0]["rows"] == 10
    assert run.metrics[-1]["rows"] == 80


def test_the_first_step_of_adam_is_one_learning_rate_long(go):
    still, moved = go(learning_rate=1e-12, **ONE_STEP), go(learning_rate=1e-3, **ONE_STEP)

    assert apart(still.path, moved.path) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    "fields", [{"micro_batch_size": 3}, {"packing": True}, {"gradient_checkpointing": True}], ids=str
)
def test_how_rows_are_read_does_not_change_what_is_learned(go, fields):
    together, otherwise = go(**SMOOTH), go(**SMOOTH, **fields)

    assert apart(together.path, otherwise.path) < 1e-5


def test_checkpointing_is_on_where_it_was_asked_for(home):
    assert RewardModel.from_pretrained(home, gradient_checkpointing=True).model.model.gradient_checkpointing
    assert not RewardModel.from_pretrained(home).model.model.gradient_checkpointing


def test_bfloat16_is_what_parameters_are_kept_in(go):
    path = go(dtype="bfloat16").path / "reward_model"

    assert AutoModelForSequenceClassification.from_pretrained(path).dtype == torch.bfloat16


def test_a_seed_decides_every_parameter(go):
    one, again, other = (go(seed=seed, learning_rate=1e-3).path for seed in (1, 1, 2))

    assert apart(one, again) == 0.0
    assert apart(one, other) > 1e-5


def test_training_goes_on_from_a_reward_models_run(go):
    first = go(learning_rate=1e-3)

    again = go(model=str(first.path), learning_rate=1e-12)

    assert apart(first.path, again.path) < 1e-8


def test_pairs_of_one_prompt_are_all_learned_from_or_all_kept(home, tmp_path):
    rows = [
        {"prompt": f"the {name}", "chosen": f" {verb} .", "rejected": " sneered ."}
        for name in toy_language.WORDS["someone"]
        for verb in ("smiled", "laughed", "sang", "danced", "sat")
    ]
    data = toy_language.write_jsonl(rows, tmp_path / "pairs.jsonl")
    model = RewardModel.from_pretrained(home)

    learned, kept = reward_model.load_training_rows(model, reward_config(home, tmp_path, data=str(data), held_out=16))

    assert (len(learned), len(kept)) == (60, 20)  # 16 prompts, 5 pairs each: four prompts, the first count over 16
    assert {pair.prompt for pair in learned}.isdisjoint(pair.prompt for pair in kept)


def test_a_run_says_how_many_rows_were_too_long(go, home, capsys):
    run = go(too_long="skip", max_length=14, quiet=False)

    lengths = [
        max(len(pair.chosen), len(pair.rejected))
        for pair in records.make_preferences(
            records.read_rows(home / "preferences.jsonl"), RewardModel.from_pretrained(home).tokenizer, max_length=64
        )
    ]
    fit = sum(length <= 14 for length in lengths)
    said = f"of the 40 rows of '{home / 'preferences.jsonl'}', {40 - fit} left out as too long: {fit} are read"
    assert 8 < fit < 40
    assert said in capsys.readouterr().err
    assert said in (run.path / "events.jsonl").read_text()


# what it says of itself


class Lengths(RewardModel):
    """Scores a row by its second token over 10: a scorer whose numbers are known."""

    def __init__(self, mean: float = 0.0, scale: float = 1.0) -> None:
        torch.nn.Module.__init__(self)
        self.mean, self.scale = mean, scale

    def score(self, rows, *, micro: int = 64) -> torch.Tensor:
        return (torch.tensor([row[1] / 10 for row in rows]) - self.mean) / self.scale


def pair(chosen: int, rejected: int, longer: int) -> Preference:
    """A pair with such scores times 10, the chosen one longer by so many tokens."""
    size = 10
    return Preference((1, chosen, *[0] * (size + longer)), (1, rejected, *[0] * size), 0.0, 1)


def test_accuracy_interval_and_length_baseline_by_hand():
    # right, right, right, wrong; longer in 1 of 4, so that "the shorter" is right in 3
    data = [pair(20, 0, 1), pair(20, 0, -1), pair(20, 0, -2), pair(0, 20, -1)]

    found = reward_model.evaluate_reward_model(Lengths(), data)

    assert found["accuracy"] == 0.75
    # Wilson's interval of 3 of 4: (0.75 + 0.4802) / 1.9604 = 0.6275, and 0.3269 to either side
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert found["length_baseline"] == 0.75
    # sureness sigmoid(2) = 0.8808 in one bin, of which 0.75 are right
    assert found["calibration_error"] == pytest.approx(0.1308, abs=1e-4)
    assert found["rows"] == 4


def test_an_accuracys_interval_counts_prompts_and_not_their_pairs():
    # three of four prompts right, each asked twice: known as well as from four pairs at the most
    def asked(prompt: str, chosen: int, rejected: int) -> Preference:
        return Preference((1, chosen), (1, rejected), 0.0, 1, prompt)

    data = [asked(str(i), *sides) for i, sides in enumerate([(20, 0), (20, 0), (20, 0), (0, 20)]) for _ in range(2)]
    found = reward_model.evaluate_reward_model(Lengths(), data)

    assert (found["rows"], found["prompts"]) == (8, 4)
    assert found["accuracy_low"] <= 0.3006 and found["accuracy_high"] >= 0.9544


def test_a_normalised_model_is_examined_by_its_raw_scores():
    data = [pair(20, 0, 1), pair(10, 5, -1), pair(20, 5, -2), pair(0, 20, -1)]
    plain, normalised = (
        reward_model.evaluate_reward_model(model, data) for model in (Lengths(), Lengths(mean=3.0, scale=4.0))
    )

    same = [name for name in plain if not name.startswith("score_")]
    assert {name: plain[name] for name in same} == pytest.approx({name: normalised[name] for name in same}, abs=1e-5)
    assert (normalised["score_mean"], normalised["score_scale"]) == (3.0, 4.0)


def test_calibration_error_weighs_bins_by_their_size():
    # 0.95 and 0.96 are in one bin, of which half is right: |0.955 - 0.5|; 0.62 is alone and right: |0.62 - 1|
    found = reward_model.calibration_error(torch.tensor([0.95, 0.96, 0.62]), torch.tensor([1.0, 0.0, 1.0]))

    assert found == pytest.approx(2 / 3 * 0.455 + 1 / 3 * 0.38, abs=1e-5)


def test_correlation_is_pearsons_and_zero_without_variation():
    x = torch.tensor([1.0, 2.0, 3.0])

    assert reward_model.correlation(x, 2 * x + 1) == pytest.approx(1.0)
    # (-1, 0, 1) with (-1, 2, -1): 0; with (1, -2, 1) likewise
    assert reward_model.correlation(x, torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(0.0, abs=1e-12)
    assert reward_model.correlation(x, torch.ones(3)) == 0.0


def test_what_it_says_of_itself_is_written_down(go):
    run = go()

    found = json.loads((run.path / "evaluation.json").read_text())
    assert found["rows"] == 8
    assert found["accuracy"] == run.metrics[-1]["evaluation_accuracy"]


# as a judge


def sampled(prompts, completions, ids, truncated) -> ScoringInput:
    return ScoringInput(prompts, completions, ids, truncated, {})


def test_a_completion_of_the_policys_tokens_is_read_as_it_was_sampled(home):
    model, tokenizer = RewardModel.from_pretrained(home), Tokenizer.load(home)
    prompt = tokenizer.encode_prompt("the dog")

    score = model.make_reward_term(tokenizer)(sampled(["the dog"] * 2, ["x", "y"], [[9, 8, 2], [9, 8]], [False, True]))

    assert_close(score, model.score([[*prompt, 9, 8, 2], [*prompt, 9, 8]]))


@pytest.mark.parametrize(("cut", "end"), [(False, [2]), (True, [])])
def test_a_completion_that_another_stop_ended_is_read_with_its_own(home, cut, end):
    model, policys = RewardModel.from_pretrained(home), Tokenizer.load(home, stop=(".",))
    ids = policys.encode_completion(" smiled .", "the dog")  # its last token is "."
    ids, text = (ids[:-1], " smiled") if cut else (ids, policys.decode(ids))

    score = model.make_reward_term(policys)(sampled(["the dog"], [text], [ids], [cut]))

    assert_close(score, model.score([[*model.tokenizer.encode_prompt("the dog smiled"), *end]]))


def test_a_model_that_learned_no_end_is_shown_none(home):
    model, policys = RewardModel.from_pretrained(home), Tokenizer.load(home)
    model.tokenizer = Tokenizer.load(home, has_fixed_length=True)
    ids = policys.encode_completion(" smiled .", "the dog")

    score = model.make_reward_term(policys)(sampled(["the dog"], [" smiled ."], [ids], [False]))

    assert ids[-1] == 2
    assert_close(score, model.score([model.tokenizer.encode_prompt("the dog smiled .")]))


def test_a_model_of_texts_is_shown_no_stop_id(home):
    model, tokenizer = RewardModel.from_pretrained(home), Tokenizer.load(home)
    model.input_format = "text"
    prompt = tokenizer.encode_prompt("the dog")

    score = model.make_reward_term(tokenizer)(sampled(["the dog"], ["x"], [[9, 8, 2]], [False]))

    assert_close(score, model.score([[*prompt, 9, 8]]))


@pytest.mark.parametrize(
    ("form", "cut", "end"), [("completion", False, [2]), ("completion", True, []), ("text", False, [])]
)
def test_a_completion_in_other_tokens_is_read_with_the_models_own(home, form, cut, end):
    model, theirs = RewardModel.from_pretrained(home), Tokenizer(letters(), frozenset([2]))
    model.input_format = form

    score = model.make_reward_term(theirs)(sampled(["the dog"], [" smiled ."], [[3, 4, 2]], [cut]))

    assert_close(score, model.score([[*model.tokenizer.encode_prompt("the dog smiled ."), *end]]))


def test_a_language_model_is_no_reward_model(home):
    with pytest.raises(RequestError, match=r"it is a language model: train a reward model on it first"):
        load_reward_model(str(home))


def test_a_classifier_of_several_classes_is_no_reward_model(home, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(home, num_labels=3).save_pretrained(tmp_path / "three")
    letters().save_pretrained(tmp_path / "three")

    with pytest.raises(RequestError, match=r"gives a text several scores: name one that gives one"):
        load_reward_model(str(tmp_path / "three"))


def test_labels_on_one_side_are_noted_because_their_accuracy_says_nothing():
    assert reward_model.check_labels([0.6, 0.9]) == [
        "all labels lie between 0.6 and 0.9, on one side of 0.5: the accuracy says nothing"
    ]
    assert reward_model.check_labels([0.0, 0.5]) != [] and reward_model.check_labels([0.2, 0.6]) == []


def test_a_judge_reads_a_row_with_what_it_has_for_the_template(home):
    model = RewardModel.from_pretrained(home)
    model.tokenizer = made(2, 4, chat_template=CHATML + "{% if not enable_thinking %}/think {% endif %}")
    said = tokens("yo<|im_end|>")

    given = ScoringInput([CHAT[:1]] * 2, [CHAT[1:]] * 2, [said] * 2, [False] * 2, {"enable_thinking": [True, False]})

    asked = tokens("<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert_close(
        model.make_reward_term(model.tokenizer)(given), model.score([asked + said, asked + tokens("/think ") + said])
    )


def test_pairs_of_equal_length_are_no_case_for_length():
    def pair(chosen: int, rejected: int) -> Preference:
        return Preference((1,) * chosen, (1,) * rejected, margin=0.0, row=1)

    assert records.longer_is_chosen([pair(3, 3), pair(4, 4)]) == 0.5
    assert records.longer_is_chosen([pair(4, 3), pair(5, 3), pair(4, 4), pair(2, 3)]) == 2.5 / 4
