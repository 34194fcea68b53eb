"""Published data as they are: no prompt on both sides, every row accounted for; true answers score 1, wrong ones 0."""

from decimal import Decimal
from pathlib import Path

import pytest

from understudy.language import dpo, reward_model
from understudy.language.data.records import Tokenizer, make_preferences, read_rows
from understudy.language.model.reward_model import RewardModel
from understudy.language.rewards.reward_sum import RewardSum, ScoringInput
from understudy.language.sft import load_policy

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data in ../shared/data")
MODEL, PAIRS, PROBLEMS = (str(DATA / name) for name in ("stories260K", "hh-harmless", "gsm8k"))
CHOICES = {"model": MODEL, "data": PAIRS, "too_long": "cut", "held_out": 456}


@pytest.fixture(scope="module")
def rows():
    return read_rows(PAIRS)


@pytest.fixture(scope="module")
def whole(rows):
    return make_preferences(rows, Tokenizer.load(MODEL), max_length=10_000)


@pytest.fixture(scope="module")
def cut(rows):
    return make_preferences(rows, Tokenizer.load(MODEL), max_length=512, too_long="cut")


@pytest.fixture(scope="module")
def sides():
    """What each recipe learns from and what it keeps."""
    fields = {"model": MODEL, "data": PAIRS, "too_long": "cut", "held_out": 456}
    cfg = dpo.Config(**fields)
    by_policy = dpo.load_preferences(load_policy(cfg), cfg)
    return by_policy, reward_model.load_training_rows(RewardModel.from_pretrained(MODEL), reward_model.Config(**fields))


def test_no_prompt_of_the_human_preferences_is_learned_from_and_kept(sides, rows):
    for side in sides:
        asked = [{rows[pair.row - 1]["chosen"].rpartition("\n\nAssistant:")[0] for pair in part} for part in side]
        assert asked[0].isdisjoint(asked[1])


def test_a_fifth_of_the_human_preferences_is_kept_and_the_same_by_both_recipes(sides):
    (learned, kept), (_, same) = sides

    assert len(kept) / (len(kept) + len(learned)) == pytest.approx(0.2, abs=0.005)
    assert [pair.row for pair in kept] == [pair.row for pair in same]


def test_every_human_preference_is_whole_or_counted(whole, cut):
    fit = sum(max(len(pair.chosen), len(pair.rejected)) <= 512 for pair in whole)

    assert (len(whole), whole.num_equal, whole.num_skipped) == (2312, 0, 0)
    assert fit + cut.num_cut + cut.num_skipped == len(cut) + cut.num_skipped == 2312
    assert max(max(len(pair.chosen), len(pair.rejected)) for pair in cut) == 512


def test_a_cut_preference_ends_as_the_whole_one_does(whole, cut):
    uncut = {pair.row: pair for pair in whole}

    for pair in cut:
        for side in ("chosen", "rejected"):
            short, long = getattr(pair, side), getattr(uncut[pair.row], side)
            assert (short[0], short[1:]) == (long[0], long[len(long) - len(short) + 1 :])


def scores(completions, answers):
    sampled = ScoringInput(
        [""] * len(answers), completions, [[] for _ in answers], [False] * len(answers), {"answer": answers}
    )
    with RewardSum.of(["number"], load_model=lambda source: NotImplemented) as judge:
        return judge(sampled).score


@pytest.fixture(scope="module", params=["train", "test"])
def answers(request):
    return [row["answer"] for row in read_rows(f"{PROBLEMS}/{request.param}.jsonl")]


def off_by_one(answer: str) -> str:
    """The worked answer with another result behind its '####'."""
    work, _, result = answer.rpartition("#### ")
    return f"{work}#### {Decimal(result.replace(',', '')) + 1:,}"


def test_every_true_answer_scores_one(answers):
    assert scores(answers, answers).unique().tolist() == [1.0]


def test_the_true_number_in_other_words_scores_one(answers):
    results = [answer.rpartition("#### ")[2] for answer in answers]

    assert scores([f"So it is ${result}." for result in results], answers).unique().tolist() == [1.0]


@pytest.mark.parametrize("wrong", [off_by_one, lambda answer: "I do not know.", lambda answer: ""])
def test_every_wrong_answer_scores_zero(answers, wrong):
    assert scores([wrong(answer) for answer in answers], answers).unique().tolist() == [0.0]


def test_the_answer_to_another_question_scores_zero(answers):
    others = answers[1:] + answers[:1]
    results = [answer.rpartition("#### ")[2].replace(",", "") for answer in answers]
    same = [Decimal(a) == Decimal(b) for a, b in zip(results, results[1:] + results[:1], strict=True)]

    assert scores(others, answers).tolist() == [float(equal) for equal in same]
