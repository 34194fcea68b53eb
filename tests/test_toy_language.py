"""The made-up language: its grammar and recogniser agree, its truth is what it says, its data can be had again."""

import json
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.language import toy_language
from understudy.language.toy_language import is_grammatical, true_score

CLEAN = "the cat watched this dog near our house ."  # 9 words, neither kind nor unkind
GOOD = "the gentle cat helped this dog near our house ."  # 10 words, kind: gentle, helped
BAD = "the cruel cat helped this dog near our house ."  # 10 words, kind: helped; unkind: cruel
BEST = "the gentle cat warmly helped this loyal dog near our lovely house ."  # 13 words, kind: 5


def classes(words):
    return tuple(toy_language.WORD_CLASS[word] for word in words)


def test_every_generated_sentence_is_grammatical():
    assert all(is_grammatical(sentence.split()) for sentence in toy_language.sentences(2000, seed=0))


def test_sentences_have_7_to_18_words():
    assert {len(sentence.split()) for sentence in toy_language.sentences(2000, seed=0)} == set(range(7, 19))


def test_sentences_hardly_ever_repeat():
    assert len(set(toy_language.sentences(5000, seed=0))) == 5000


def test_every_word_belongs_to_one_class_and_is_kind_or_unkind_or_plain():
    words = [
        w
        for part in (toy_language.KIND, toy_language.NEUTRAL, toy_language.UNKIND)
        for w in " ".join(part.values()).split()
    ]

    assert len(words) == len(set(words)) == len(toy_language.WORD_CLASS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        " ".join(reversed(CLEAN.split())),
        CLEAN.removesuffix(" ."),
        f"{CLEAN} {CLEAN}",
        CLEAN.replace("cat", "cats"),  # one thing, several things: "the cats" is not said
        CLEAN.replace("cat", "unicorn"),
        CLEAN.replace("cat", "cat cat"),
        CLEAN.replace("near our house ", ""),  # an event has a place
    ],
)
def test_what_the_grammar_cannot_say_is_refused(text):
    assert is_grammatical(CLEAN.split())
    assert not is_grammatical(text.split())


def test_a_scrambled_sentence_is_refused():
    for sentence in toy_language.sentences(200, seed=0):
        first, second, *rest = sentence.split()
        assert not is_grammatical([second, first, *rest])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (CLEAN, 0.0),  # nothing kind: 1 - 0.7^0 = 0
        (GOOD, 0.51),  # 1 - 0.7^2
        (BAD, 0.21),  # (1 - 0.7) * 0.7
        (BEST, 0.83193),  # 1 - 0.7^5
        (GOOD.removesuffix(" ."), 0.153),  # no full stop: 0.51 * 0.3
        ("the kind cat sang near our house .", 0.51),  # 8 words: still whole
        ("the cat sang near our house .", 0.255),  # 7 words are 1 too few: 0.3 * 0.85
        ("the kind cat sang and the cruel dog slowly helped this gentle bird .", 0.4521405),  # 14: 0.7599 * 0.7 * 0.85
        ("the cruel cat mocked this cruel dog near our happy house .", 0.1029),  # each unkind word counts: 0.3 * 0.7^3
    ],
)
def test_true_score_is_what_its_formula_gives_by_hand(text, score):
    assert true_score(text) == pytest.approx(score)


def test_piling_up_one_kind_word_pays_nothing():
    once, thrice = (
        "the kind cat watched my dog near our house .",
        "the kind cat watched my kind dog near our kind house .",
    )

    assert true_score(thrice) == pytest.approx(true_score(once))


def test_length_alone_pays_nothing():
    spoken = toy_language.sentences(4000, seed=0)
    both = torch.tensor([[true_score(text), len(text.split())] for text in spoken]).T

    assert abs(torch.corrcoef(both)[0, 1]) < 0.15  # 0.06 measured; its own error is 1/sqrt(4000) = 0.016


def test_the_best_of_64_leaves_room_above_itself():
    scores = torch.tensor([true_score(text) for text in toy_language.sentences(64 * 64, seed=0)]).view(64, 64)

    assert scores.mean() < 0.3 < 0.55 < scores.amax(dim=1).mean() < 0.75 < true_score(BEST)


def test_truth_scores_prompt_and_completion_together():
    scores = toy_language.true_scores(
        ["the gentle cat", "the cat"], ["helped this dog near our house .", "sang"], other=[0, 1]
    )

    assert scores == pytest.approx([0.51, 0.3 * 0.25 * 0.3])  # "the cat sang": 3 words are 5 too few, and no sentence


MAKERS = [toy_language.sentences, toy_language.prompts, toy_language.demonstrations]


@pytest.mark.parametrize("make", MAKERS)
def test_a_seed_gives_the_same_data_and_another_seed_others(make):
    assert make(50, seed=3) == make(50, seed=3) != make(50, seed=4)


@pytest.mark.parametrize("make", MAKERS)
def test_more_rows_go_on_where_fewer_stop(make):
    assert make(50, seed=3)[:20] == make(20, seed=3)


def test_no_demonstration_stands_in_the_text_of_the_same_seed():
    shown = {row["prompt"] + row["completion"] for row in toy_language.demonstrations(500, seed=0)}

    assert shown.isdisjoint(toy_language.sentences(2000, seed=0))


def test_prompts_open_a_sentence_with_2_to_4_words():
    openings = {classes(s.split()[:size]) for s in toy_language.sentences(2000, seed=0) for size in (2, 3, 4)}
    words = [row["prompt"].split() for row in toy_language.prompts(200, seed=1)]

    assert {len(each) for each in words} == {2, 3, 4}
    assert openings.issuperset(map(classes, words))


def test_a_demonstration_is_a_sentence_cut_after_2_to_4_words():
    rows = toy_language.demonstrations(200, seed=1)

    assert all(is_grammatical((row["prompt"] + row["completion"]).split()) for row in rows)
    assert {len(row["prompt"].split()) for row in rows} == {2, 3, 4}


def test_demonstrations_are_better_than_the_language_and_leave_a_gap():
    shown = mean(true_score(row["prompt"] + row["completion"]) for row in toy_language.demonstrations(1000, seed=1))

    assert mean(map(true_score, toy_language.sentences(1000, seed=1))) + 0.1 < shown < 0.5


def test_the_better_sentence_is_preferred_with_its_bradley_terry_probability():
    # scores 0.51 and 0.21; (0.51 - 0.21) / 0.1 = 3; sigmoid(3) = 1 / (1 + e^-3) = 0.952574
    assert toy_language.preference_probability(GOOD, BAD, temperature=0.1) == pytest.approx(0.952574, abs=1e-6)
    assert toy_language.preference_probability(BAD, GOOD, temperature=0.1) == pytest.approx(0.047426, abs=1e-6)
    assert toy_language.preference_probability(GOOD, GOOD, temperature=0.1) == 0.5


def test_labels_come_out_as_often_as_their_probability_says():
    # (0.51 - 0.21) / 0.3 = 1; sigmoid(1) = 0.731; its standard error over 10000 draws is 0.0044, four of which are 0.018
    pair = ("the", GOOD.removeprefix("the "), BAD.removeprefix("the "))
    rows = toy_language.preferences([pair] * 10_000, temperature=0.3, seed=0)

    assert mean(row["chosen"] == f" {pair[1]}" for row in rows) == pytest.approx(0.731, abs=0.018)
    assert all({row["chosen"], row["rejected"]} == {f" {pair[1]}", f" {pair[2]}"} for row in rows)


def test_a_seed_gives_the_same_labels():
    pairs = [("the", GOOD, BAD)] * 50

    def label(seed):
        return toy_language.preferences(pairs, temperature=1.0, seed=seed)

    assert label(1) == label(1) != label(2)


def test_prompt_and_chosen_stand_one_blank_apart_wherever_the_completion_comes_from():
    for blank in ("", " "):
        (row,) = toy_language.preferences([("the cat", f"{blank}sang", f"{blank}slept")], temperature=1e-9, seed=0)
        assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == ("the cat sang", "the cat slept")


def test_rows_are_written_one_json_object_a_line(tmp_path):
    rows = toy_language.demonstrations(5, seed=0)
    lines = toy_language.write_jsonl(rows, tmp_path / "rows.jsonl").read_text().splitlines()

    assert [json.loads(line) for line in lines] == rows


def test_the_tokenizer_gives_every_sentence_back_without_an_unknown_word():
    tokenizer = toy_language.make_tokenizer()
    for sentence in toy_language.sentences(500, seed=0):
        ids = tokenizer(sentence).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == 1 + len(sentence.split())
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


def test_the_tokenizer_puts_bos_first_and_nothing_last():
    tokenizer = toy_language.make_tokenizer()

    assert tokenizer.convert_ids_to_tokens(tokenizer("the unicorn").input_ids) == ["<s>", "the", "<unk>"]


def test_prompt_and_completion_tokens_join_to_those_of_the_sentence():
    tokenizer = toy_language.make_tokenizer()
    for row in toy_language.demonstrations(50, seed=0):
        opening = tokenizer(row["prompt"]).input_ids
        rest = tokenizer(row["completion"], add_special_tokens=False).input_ids
        assert opening + rest == tokenizer(row["prompt"] + row["completion"]).input_ids


def test_model_and_tokenizer_agree_on_their_tokens_also_when_saved(tmp_path):
    toy_language.make_model(seed=0).save_pretrained(tmp_path)
    toy_language.make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id

    assert ids == (0, 1, 2)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.do_sample
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids
    assert tokenizer(CLEAN).input_ids == toy_language.make_tokenizer()(CLEAN).input_ids
    assert tokenizer.decode(tokenizer(CLEAN).input_ids, skip_special_tokens=True) == CLEAN


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (toy_language.make_model(seed).model.embed_tokens.weight for seed in (1, 1, 2))

    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
