"""`load(RUN).generate`: prompts as text or chat in, texts out."""

import pytest

from understudy import load
from understudy.language import Policy, toy_language
from understudy.language.data.records import Tokenizer
from understudy.run.config import RequestError

CONTEXT = 64  # of the model below


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    toy_language.make_model(0).save_pretrained(folder)
    toy_language.make_tokenizer().save_pretrained(folder)
    made = Policy.from_pretrained(folder)
    made.tokenizer = Tokenizer.load(folder)
    made.save(folder / "policy")
    return load(folder / "policy")


def test_each_prompt_has_as_many_texts_as_asked_for(policy):
    texts = policy.generate(["the old", "some"], max_new_tokens=5, num_completions=3)

    assert [len(own) for own in texts] == [3, 3]
    assert all(isinstance(text, str) for own in texts for text in own)
    assert len({text for own in texts for text in own}) == 6  # each has a seed of its own


def test_equal_seeds_give_equal_texts_and_a_single_prompt_is_a_list_of_one(policy):
    texts = policy.generate(["the old"], max_new_tokens=5, seed=3)

    assert policy.generate("the old", max_new_tokens=5, seed=3) == texts
    assert policy.generate(["the old"], max_new_tokens=5, seed=4) != texts


def test_greedy_texts_are_equal_and_the_temperature_is_put_back(policy):
    [texts] = policy.generate(["the old"], max_new_tokens=5, num_completions=3, greedy=True, temperature=2.0)

    assert len(set(texts)) == 1
    assert policy.temperature == 1.0


def test_a_low_temperature_comes_to_the_likeliest_token(policy):
    assert policy.generate("the", temperature=1e-4, max_new_tokens=4) == policy.generate(
        "the", greedy=True, max_new_tokens=4
    )


def test_a_completion_ends_where_the_context_does(policy):
    long = "the " * 59  # and BOS: 60 tokens
    [[short], [whole]] = policy.generate([long, "the"], max_new_tokens=9)

    assert len(short.split()) <= CONTEXT - 60
    assert len(whole.split()) <= 9
    with pytest.raises(RequestError, match=f"prompt has 65 tokens, the model's context holds {CONTEXT}"):
        policy.generate("the " * 64)


def test_nothing_is_asked_for_nothing(policy):
    assert policy.generate([]) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_completions": 0}, "num_completions is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0: .*greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": 10**30}, r"seed is 10+: must be a whole number between -2\^63 and 2\^63"),
    ],
)
def test_numbers_out_of_range_are_refused(policy, given, words):
    with pytest.raises(RequestError, match=words):
        policy.generate("the", **given)


def test_a_policy_without_a_tokenizer_is_refused():
    with pytest.raises(RequestError, match="no tokenizer"):
        Policy(toy_language.make_model(0)).generate("the")
