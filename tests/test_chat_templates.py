"""What chat templates are given and what becomes of it: tools, thinking, beginnings of answers, and which turns teach."""

import json
import resource
import signal

import pytest
import torch

from tests.test_records import CHAT, CHATML, EOS, THINKING, TURN_END, built, made, tokens
from understudy.language.data import bounded, records
from understudy.language.data.records import Prompt, Tokenizer
from understudy.language.rollout.generate import Completion
from understudy.language.rollout.multi_turn import run_dialogue
from understudy.language.rollout.sampler import Sampler
from understudy.language.sft import collate_examples
from understudy.run.config import RequestError

TOOLING = (
    "{% for t in tools or [] %}#{{ t.name }}{% endfor %}{% if mood is defined %}~{{ mood }}{% endif %}"
    + CHATML.removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and not enable_thinking %}/think {% endif %}{% endif %}"
)
USER = CHAT[:1]
HAS = {"tools": [{"name": "add"}], "enable_thinking": False, "chat_template_kwargs": {"mood": "up"}}
AS_JSON = {name: json.dumps(cell) for name, cell in HAS.items()}
START = "#add~up<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n/think "
ASKED = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
BEGUN = [*USER, {"role": "assistant", "content": "y"}]
LONG = [*CHAT, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]


def chatty(template=CHATML, **options) -> Tokenizer:
    return made(EOS, TURN_END, chat_template=template, **options)


# arguments of the template


@pytest.mark.parametrize("columns", [HAS, AS_JSON], ids=["objects", "JSON"])
@pytest.mark.parametrize("recipe", ["prompts", "examples", "pairs", "labels"])
def test_every_recipe_gives_the_template_what_a_row_has_for_it(recipe, columns):
    tokenizer, answer = chatty(TOOLING), tokens("yo<|im_end|>")
    if recipe == "prompts":
        ids = records.make_prompts([{"prompt": USER, **columns}], tokenizer, max_length=99)[0].ids
        answer = []
    elif recipe == "examples":
        ids = records.make_examples([{"messages": CHAT, **columns}], tokenizer, max_length=99)[0].ids
    elif recipe == "pairs":
        row = {"prompt": USER, "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "no"}], **columns}
        ids = records.make_preferences([row], tokenizer, max_length=99)[0].chosen
    else:
        ids = records.make_labelled_examples([{"text": CHAT, "label": 1, **columns}], tokenizer, max_length=99)[0].ids

    assert list(ids) == [*tokens(START), *answer]


def test_the_next_row_is_without_the_arguments_of_the_one_before():
    rows = [{"prompt": USER, "enable_thinking": False}, {"prompt": USER, "enable_thinking": None}]
    first, second = records.make_prompts(rows, chatty(TOOLING), max_length=99)

    assert list(first.ids) == tokens(ASKED + "/think ") and list(second.ids) == tokens(ASKED)


def test_a_reply_is_written_by_the_template_with_the_rows_arguments():
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ mood }}")
    (prompt,) = records.make_prompts(
        [{"prompt": USER, "chat_template_kwargs": {"mood": "!"}}], chatty(template), max_length=99
    )

    def speak(prompts, **_):
        return [Completion([*tokens("yo"), TURN_END], [0.0] * 3, True, 0) for _ in prompts]

    (row,) = run_dialogue(
        speak,
        lambda sampled, stops: [{"role": "user", "content": "so"}],
        lambda prompts, completions: [],
        chatty(template),
        [prompt],
        [0],
        limit=99,
        max_turns=2,
    )

    assert row.ids == tokens("yo<|im_end|>\n<|im_start|>user\nso!<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>")


def test_arguments_that_the_template_does_not_use_are_noted():
    found = records.make_prompts([{"prompt": USER, **HAS}], chatty(TOOLING.replace("tools", "nothing")), max_length=99)

    assert found.notes == ("tools of the rows changes nothing: the chat template does not use it",)


def test_columns_of_these_names_beside_plain_text_are_columns():
    assert records.make_prompts([{"prompt": "hi", "tools": "a hammer"}], made(), max_length=9)[0].columns == {
        "tools": "a hammer"
    }


@pytest.mark.parametrize(
    ("column", "cell", "fault"),
    [
        ("tools", "a hammer", "tools is 'a hammer': must be a list, or its JSON"),
        ("chat_template_kwargs", [1], r"chat_template_kwargs is \[1\]: must be an object, or its JSON"),
        ("chat_template_kwargs", {"tokenize": False}, "has 'tokenize', which is set by the library: leave it out"),
        ("enable_thinking", "perhaps", "enable_thinking is 'perhaps': must be true or false"),
    ],
)
def test_arguments_of_another_form_are_refused_with_their_row(column, cell, fault):
    with pytest.raises(RequestError, match=f"row 1: {fault}|row 1: {column} {fault}"):
        records.make_prompts([{"prompt": USER, column: cell}], chatty(), max_length=99)


# the beginning of an answer


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_a_prompt_that_ends_with_the_assistant_is_not_closed(template):
    asked = ASKED if template is CHATML else ASKED.replace("<s>", "<s>1: ")

    assert chatty(template).encode_prompt(BEGUN) == tokens(asked + "y")


def test_white_space_that_the_template_writes_before_an_answer_comes_before_its_beginning():
    turn = "{{ '[' + m.content + ']' if m.role == 'user' else ' ' + m.content + ' </s>' }}"
    llama = "{% for m in messages %}" + turn + "{% endfor %}"

    assert made(chat_template=llama).encode_prompt(BEGUN) == tokens("[hi] y")


def test_what_follows_a_beginning_is_the_rest_of_the_turn():
    rest = [{"role": "assistant", "content": "o"}]

    assert chatty().encode_completion(rest, BEGUN) == tokens("o<|im_end|>")
    # "ab" is one token, but a model that was given "a" can only go on with "b"
    begun = [*USER, {"role": "assistant", "content": "a"}]
    assert chatty().encode_completion([{"role": "assistant", "content": "b"}], begun) == tokens("b<|im_end|>")


def test_a_reply_to_a_turn_that_was_begun_comes_behind_its_end():
    after = chatty().encode_turn(BEGUN, [{"role": "user", "content": "so"}])

    assert after == tokens("\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("recipe", ["examples", "pairs"])
def test_an_answer_that_was_begun_is_learned_as_it_is_sampled(recipe):
    row = {"prompt": BEGUN, "completion": [{"role": "assistant", "content": "o"}]}
    row |= {"chosen": row["completion"], "rejected": [{"role": "assistant", "content": "es"}]}
    if recipe == "examples":
        (one,) = records.make_examples([row], chatty(), max_length=99)
        assert (list(one.ids), one.start) == (tokens(ASKED + "yo<|im_end|>"), len(tokens(ASKED)) + 1)
    else:
        (pair,) = records.make_preferences([row], chatty(), max_length=99)
        assert list(pair.rejected) == tokens(ASKED + "yes<|im_end|>")


def test_prompts_that_the_policy_continues_are_counted():
    found = records.make_prompts([{"prompt": BEGUN}, {"prompt": USER}], chatty(), max_length=99)

    assert found.notes == ("1 prompts end with words of the assistant, which the policy continues",)


def test_a_prompt_that_ends_with_tool_calls_is_refused():
    calls = [*USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]

    with pytest.raises(RequestError, match="row 1: the prompt ends with tool calls of the assistant"):
        records.make_prompts([{"prompt": calls}], chatty(), max_length=99)


# which turns are learned


def taught(rows: list[dict], tokenizer: Tokenizer, train_on: str) -> list[str]:
    """What each row teaches, as text, in pieces."""
    found = records.make_examples(rows, tokenizer, max_length=999, train_on=train_on)
    batch = collate_examples(found)
    assert [int(row.sum()) for row in batch.mask] == [example.num_target_tokens for example in found]
    return [tokenizer.hf.decode(ids[1:][mask[:-1]]) for ids, mask in zip(batch.ids, batch.mask, strict=True)]


@pytest.mark.parametrize(
    ("train_on", "row", "expected"),
    [
        ("last", {"messages": LONG}, "no<|im_end|>"),
        ("all", {"messages": LONG}, "yo<|im_end|>no<|im_end|>"),
        ("all", {"text": LONG}, "yo<|im_end|>no<|im_end|>"),
        ("all", {"prompt": LONG[:3], "completion": LONG[3:]}, "no<|im_end|>"),
        ("all", {"prompt": LONG[:1], "completion": LONG[1:]}, "yo<|im_end|>no<|im_end|>"),
        ("last", {"prompt": LONG[:1], "completion": LONG[1:]}, "no<|im_end|>"),
        ("all", {"messages": CHAT}, "yo<|im_end|>"),
    ],
)
def test_the_turns_that_were_asked_for_are_learned(train_on, row, expected):
    assert taught([row], chatty(), train_on) == [expected]


def test_all_turns_are_laid_out_as_the_template_writes_the_chat():
    (one,) = records.make_examples([{"messages": LONG}], chatty(), max_length=999, train_on="all")
    whole = built(chat_template=CHATML).apply_chat_template(LONG, return_dict=False)

    assert list(one.ids) == whole[:-1]  # less the newline behind the last turn


def test_a_turn_that_the_template_would_now_write_otherwise_is_learned_as_it_is_sampled():
    chat = [USER[0], {"role": "assistant", "content": "hm /think yo"}, *LONG[2:]]

    assert taught([{"messages": chat}], chatty(THINKING), "all") == ["hm /think yo<|im_end|>no<|im_end|>"]


def test_a_chat_loses_its_beginning_and_keeps_the_turns_that_are_learned():
    (whole,) = records.make_examples([{"messages": LONG}], chatty(), max_length=999, train_on="all")
    (cut,) = records.make_examples(
        [{"messages": LONG}], chatty(), max_length=len(whole.ids) - 4, too_long="cut", train_on="all"
    )

    assert cut.num_target_tokens == whole.num_target_tokens and cut.ids[1:] == whole.ids[5:]
    (begin, end), (was, _) = cut.ignored_spans[0], whole.ignored_spans[0]
    assert (begin, cut.ids[begin:end]) == (was - 4, whole.ids[was : was + end - begin])


def test_all_turns_of_plain_text_are_refused():
    with pytest.raises(RequestError, match="row 1: train_on is 'all', but the data are text"):
        records.make_examples([{"prompt": "hi", "completion": "yo"}], made(), max_length=9, train_on="all")


# special tokens of completions


@pytest.mark.parametrize(
    ("keep", "expected"), [(False, "hm yo"), (True, "<|im_start|>hm<unk> yo")], ids=["dropped", "kept"]
)
def test_completions_keep_special_tokens_where_asked(keep, expected):
    tokenizer = Tokenizer(built(chat_template=CHATML), frozenset((EOS, TURN_END)), keep_special_tokens=keep)
    ids = [*tokens("<|im_start|>hm<unk> yo<|im_end|>")]
    prompt = Prompt(tuple(tokenizer.encode_prompt("hi ")), "hi ", {}, 1)
    sampler = Sampler([prompt], tokenizer, limit=99, has_fixed_length=False, seed=0, max_num_seqs=1)

    sampled = sampler.build_rollout(
        [prompt], [Completion(ids, [0.0] * len(ids), True, 0)], torch.device("cpu")
    ).scoring_input

    assert sampled.completions == [expected]
    assert sampled.completion_ids == [ids]


# templates that never end, or grow without bound

NESTED = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
GROWING = "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
ENDLESS = {
    "loops": (NESTED, "more than 0.2 seconds"),
    "doubling": (GROWING, "more than 0.0625 GiB"),
    "a large product": ("{{ 'a' * 10000000000 }}", "more than 0.0625 GiB"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "long output": ("{{ 'a' * 1001 }}", "more than 1,000 characters"),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_chat_template_is_bounded_in_time_memory_and_output(case, monkeypatch):
    template, words = ENDLESS[case]
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.2 if case == "loops" else 20.0)  # a busy machine doubles slowly
    monkeypatch.setattr(bounded, "MAX_BYTES", 2**26)
    monkeypatch.setattr("understudy.language.data.tokenizer.MAX_RENDERED_CHARACTERS", 1000)

    with pytest.raises(RequestError, match=rf"^the chat template .*{words}"):
        chatty(template).encode_prompt(USER)


def test_a_template_that_is_given_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.2)
    built(chat_template=CHATML).save_pretrained(tmp_path)

    with pytest.raises(RequestError, match=r"^chat_template is .* never ends"):
        Tokenizer.load(tmp_path, chat_template=NESTED)


def test_a_bound_leaves_the_limits_and_the_timer_as_they_were():
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    chatty().encode_prompt(USER)

    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
