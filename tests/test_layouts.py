"""Layouts of published data: JSON in cells, parts of text, tool calls, repeated prompts, columns of ShareGPT and Alpaca."""

import json

import pytest

from tests.test_records import CHAT, CHATML, EOS, TURN_END, made, tokens
from understudy.language.data import records
from understudy.run.config import RequestError

PLUS = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}", "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
)
CALLS = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c.name }}{% endfor %}")
USER, BAD = CHAT[:1], [{"role": "assistant", "content": "no"}]
SIDES = {"chosen": "yo", "rejected": "no"}
ASKED = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def chatty(template=CHATML):
    return made(EOS, TURN_END, chat_template=template)


def learned(row: dict, tokenizer=None, **fields) -> tuple[str, str]:
    """What an example reads, and what it learns, as text."""
    tokenizer = tokenizer or chatty()
    (example,) = records.make_examples([row], tokenizer, max_length=999, **fields)
    read, answer = list(example.ids[: example.start]), list(example.ids[example.start :])
    return tokenizer.hf.decode(read), tokenizer.hf.decode(answer)


# messages


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps(CHAT),
        [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, CHAT[1]],
        [{"role": "user", "content": ["hi"]}, CHAT[1]],
        [{**m, "name": None, "tool_calls": None} for m in CHAT],
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
    ],
    ids=["JSON", "parts", "parts of text alone", "keys of None", "ShareGPT"],
)
@pytest.mark.parametrize("template", [CHATML, PLUS])
def test_messages_of_other_forms_are_read_as_messages(cell, template):
    assert learned({"messages": cell}, chatty(template)) == (ASKED, "yo<|im_end|>")


@pytest.mark.parametrize("recipe", ["prompts", "examples", "pairs", "labels"])
def test_every_recipe_reads_messages_that_are_json(recipe):
    user, answer, bad = (json.dumps(cell) for cell in (USER, CHAT[1:], BAD))
    tokenizer, whole = chatty(), tokens(ASKED + "yo<|im_end|>")
    if recipe == "prompts":
        assert list(records.make_prompts([{"prompt": user}], tokenizer, max_length=99)[0].ids) == tokens(ASKED)
    if recipe == "examples":
        (one,) = records.make_examples([{"prompt": user, "completion": answer}], tokenizer, max_length=99)
        assert list(one.ids) == whole
    if recipe == "pairs":
        rows = [{"prompt": user, "chosen": answer, "rejected": bad}]
        assert list(records.make_preferences(rows, tokenizer, max_length=99)[0].chosen) == whole
    if recipe == "labels":
        rows = [{"text": json.dumps(CHAT), "label": 1}]
        assert list(records.make_labelled_examples(rows, tokenizer, max_length=99)[0].ids) == whole


def test_text_that_begins_with_a_bracket_stays_text():
    cells = ["[1, 2]", "[oops", '{"a": 1}', "[]", "[" * 100_000, "[" + "1" * 5000 + "]", json.dumps(USER[0])]
    cells += ['[{"from": "Oslo", "to": "Rome"}]', '[{"role": "admin", "name": "x"}]', '[{"role": 1, "content": "x"}]']
    cells += [json.dumps([*USER, "hi"]), '[{"from": "Oslo", "value": 7}]', '[{"role": "user", "content": null}]']
    for cell in cells:
        assert records.make_prompts([{"prompt": cell}], made(), max_length=200_000)[0].text == cell


@pytest.mark.parametrize("template", [CALLS, CALLS.replace("{{ m.content }}", "{{ '' + m['content'] }}")])
@pytest.mark.parametrize("empty", [{"content": None}, {}, {"content": ""}], ids=str)
def test_an_answer_may_be_tool_calls_without_content(template, empty):
    call = {"role": "assistant", "tool_calls": [{"name": "add"}], **empty}

    assert learned({"messages": [*USER, call]}, chatty(template)) == (ASKED, "!add<|im_end|>")


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "a part of 'image_url' in message 2"),
        ({"role": "user", "content": [7]}, "a part of 'int' in message 2: only text can be read"),
        ({"role": "user", "content": None}, "message 2 has no text"),
        ({"role": "user", "content": 7}, "message 2 has no text"),
    ],
)
def test_content_that_is_no_text_is_refused_with_its_row(message, fault):
    rows = [{"messages": CHAT}, {"messages": [USER[0], message, CHAT[1]]}]

    with pytest.raises(RequestError, match=f"row 2: messages .*{fault}"):
        records.make_examples(rows, chatty(), max_length=999)


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
@pytest.mark.parametrize("cell", ["[" * 100_000, "[" + "1" * 5000 + "]", "[" * 80 + "]" * 80])
def test_json_in_cells_that_cannot_be_read_is_refused_with_its_row(name, cell):
    with pytest.raises(RequestError, match=f"row 1: {name} is .*or its JSON"):
        records.make_prompts([{"prompt": USER, name: cell}], chatty(), max_length=99)


def test_messages_that_are_plain_text_are_refused():
    with pytest.raises(RequestError, match="row 1: messages is 'hi there': must be a list of messages, or its JSON"):
        records.make_examples([{"messages": "hi there"}], chatty(), max_length=999)


def test_what_a_template_raises_becomes_a_sentence():
    with pytest.raises(RequestError, match="row 1: the chat template refuses messages of roles user"):
        records.make_prompts([{"prompt": USER}], chatty("{{ messages[0].content + 1 }}"), max_length=99)


# prompts beside what follows them


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_both_sides_repeat_is_read_once(chat):
    if chat:
        row = {"prompt": USER, "chosen": CHAT, "rejected": [*USER, *BAD]}
    else:
        row = {"prompt": "hi ", "chosen": "hi yo", "rejected": "hi no"}
    found = records.make_preferences([row], chatty(), max_length=99)

    assert list(found[0].chosen) == tokens(ASKED + "yo<|im_end|>" if chat else "<s>hi yo</s>")
    assert found.notes == ("chosen and rejected begin with their prompt in every row: it is read once",)


def test_a_prompt_that_a_completion_repeats_is_read_once():
    assert learned({"prompt": "hi ", "completion": "hi yo"}) == ("<s>hi ", "yo</s>")


def test_a_few_texts_that_begin_with_their_prompt_stay_as_they_are():
    rows = [{"prompt": "a", "completion": c} for c in ("a b", "yo", "no")]

    assert [len(example.ids) for example in records.make_examples(rows, made(), max_length=99)] == [6, 5, 5]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_that_only_some_rows_repeat_are_refused(chat):
    wrap = (lambda words: [{"role": "assistant", "content": words}]) if chat else lambda words: words
    prompt = USER if chat else "hi "
    rows = [{"prompt": prompt, **{side: prompt + wrap(words) for side, words in SIDES.items()}} for _ in range(3)]
    rows[1] = {"prompt": prompt, **{side: wrap(words) for side, words in SIDES.items()}}

    with pytest.raises(RequestError, match="row 2: chosen and rejected does not begin with its prompt, as 2 of the 3"):
        records.make_preferences(rows, chatty(), max_length=99)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": CHAT, "rejected": [*USER, *BAD]},
        {"prompt": "hi", "chosen": CHAT[1:], "rejected": BAD},
        {"prompt": USER, "chosen": "yo", "rejected": "no"},
        {"prompt": USER, "chosen": CHAT[1], "rejected": BAD[0]},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "yo"},
            "rejected": BAD[0],
        },
    ],
    ids=["text and whole chats", "text and answers", "chat and text", "one message a cell", "ShareGPT"],
)
def test_a_prompt_of_another_kind_than_its_answers_is_recognised(row):
    (pair,) = records.make_preferences([row], chatty(), max_length=99)

    assert list(pair.chosen) == tokens(ASKED + "yo<|im_end|>")
    assert list(pair.rejected) == tokens(ASKED + "no<|im_end|>")


def test_a_prompt_of_text_that_its_chats_do_not_hold_is_refused():
    with pytest.raises(RequestError, match="row 1: the prompt is text that chosen and rejected do not hold"):
        records.make_preferences([{"prompt": "so", "chosen": CHAT, "rejected": [*USER, *BAD]}], chatty(), max_length=99)


# columns


def test_conversations_of_sharegpt_are_messages():
    row = {"id": "7", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}

    assert learned(row) == (ASKED, "yo<|im_end|>")
    notes = records.make_examples([row], chatty(), max_length=99).make_warnings("f")
    assert notes == ["of 'f', the column 'conversations' (ShareGPT) is read as 'messages'"]


@pytest.mark.parametrize(("more", "asked"), [({"input": "so"}, "hi\nso"), ({"input": ""}, "hi"), ({}, "hi")], ids=str)
def test_alpacas_columns_are_a_prompt_and_its_completion(more, asked):
    row = {"instruction": "hi", "output": "yo", **more}

    assert learned(row) == (ASKED.replace("hi", asked), "yo<|im_end|>")
    assert learned(row, made()) == (f"<s>{asked}\n", "yo</s>")
    assert records.make_prompts([row], made(), max_length=99)[0].text == f"{asked}\n"
    assert (
        "(Alpaca) are read as the prompt" in records.make_examples([row], made(), max_length=99).make_warnings("f")[0]
    )


def test_completions_with_labels_are_labelled_texts():
    rows = [{"prompt": "hi ", "completion": "yo", "label": True}, {"prompt": "hi ", "completion": "no", "label": False}]
    found = records.make_labelled_examples(rows, made(), max_length=99)

    assert [(list(one.ids), one.label) for one in found] == [(tokens("<s>hi yo"), 1.0), (tokens("<s>hi no"), 0.0)]
    assert found.notes == ("'prompt' and 'completion' (KTO) are read as one text",)


@pytest.mark.parametrize(
    ("column", "who"),
    [("truncated", "--reward and --reply"), ("completions", "--reward and --reply"), ("stop", "--reply")],
)
def test_a_column_with_the_name_of_what_a_reward_function_is_given_is_said(column, who):
    found = records.make_prompts([{"prompt": "a", "n": 1}, {"prompt": "b", column: 1}], made(), max_length=99)

    assert found.notes == (
        f"the column '{column}' does not reach functions of {who}, whose argument '{column}' is the run's own: give it "
        f"another name with --columns NAME={column}",
    )


def test_completions_with_labels_are_no_pairs_and_the_sentence_says_so():
    with pytest.raises(RequestError, match=r"single completions with a label .*: give pairs, or .* reward-model"):
        records.make_preferences([{"prompt": "hi", "completion": "yo", "label": True}], made(), max_length=99)
