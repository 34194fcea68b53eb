"""Text as tokens: one BOS, one stop, the seam between prompt and completion, and rows of data as records."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from understudy.language.data import records
from understudy.language.data.records import (
    Example,
    LabelledExample,
    Preference,
    Tokenizer,
    pad_for_scoring,
    pad_sequences,
)
from understudy.run.config import RequestError

DATA = Path(__file__).parents[2] / "shared" / "data"
REAL = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA.name}")

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 4
BOS, EOS, TURN, TURN_END = 1, 2, 3, 4
CHARS = {chr(c): c for c in range(32, 127)} | {"\n": 10, "▁": 127}  # a printable character's id is its code point
AB = 128  # the one merge: "a" and "b" beside each other are one token
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"  # answers change the prompt
# as published templates do: thoughts are dropped from turns before the last question, and the first turn is numbered
THINKING = (
    "{{ bos_token }}{{ messages | length }}: {% set last = namespace(at=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.index0 < last.at %}{{ m.content.split('/think ')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def tokens(string: str) -> list[int]:
    """By hand: a character is its code point, a special token its id."""
    ids = []
    while string:
        special = next((s for s in SPECIAL if string.startswith(s)), None)
        ids.append(SPECIAL.index(special) if special else CHARS[string[0]])
        string = string[len(special or "x") :]
    return ids


def built(*, bos=True, eos=True, adds_bos=True, blank_in_front=False, chat_template=None) -> PreTrainedTokenizerFast:
    vocab = {s: i for i, s in enumerate(SPECIAL)} | CHARS | {"ab": AB}
    backend = Backend(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    if blank_in_front:  # as Llama 2 has it
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    if bos and adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    more = ["<|im_start|>", "<|im_end|>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", extra_special_tokens=more, **{k: v for k, v in names.items() if v}
    )
    made.chat_template = chat_template
    return made


def made(*stops: int, **options) -> Tokenizer:
    return Tokenizer(built(**options), frozenset(stops or (EOS,)))


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tokenizer, and a generation_config.json where stop ids are given; it returns the path."""

    def save(eos_token_id=None, **options) -> Path:
        built(**options).save_pretrained(tmp_path)
        if eos_token_id is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
        return tmp_path

    return save


# a prompt


@pytest.mark.parametrize("prompt", ["hi", "<s>hi", "<s><s>hi"])
def test_a_prompt_begins_with_exactly_one_bos(prompt):
    assert made().encode_prompt(prompt) == [BOS, *tokens("hi")]


def test_a_prompt_is_what_the_tokenizer_itself_makes_of_a_text():
    for adds_bos in (False, True):
        assert made(adds_bos=adds_bos).encode_prompt("hi") == built(adds_bos=adds_bos)("hi").input_ids

    example, pair = [{"text": "yo"}], [{"prompt": "hi ", "chosen": "yo", "rejected": "no"}]
    assert records.make_examples(example, made(adds_bos=False), max_length=9) == [Example((*tokens("yo"), EOS), 1, 1)]
    assert records.make_preferences(pair, made(adds_bos=False), max_length=9)[0].chosen == (*tokens("hi yo"), EOS)


@pytest.mark.parametrize("blank_in_front", [False, True])
def test_a_bos_can_be_forced_and_is_saved_with_the_tokenizer(saved, tmp_path, blank_in_front):
    forced = Tokenizer.load(saved(adds_bos=False, blank_in_front=blank_in_front), add_bos=True)
    forced.save(tmp_path / "policy")

    for tokenizer in (forced, Tokenizer.load(tmp_path / "policy")):
        assert tokenizer.encode_prompt("hi")[0] == BOS
        assert tokenizer.encode_prompt("hi")[1:] == Tokenizer.load(
            saved(adds_bos=False, blank_in_front=blank_in_front)
        ).encode_prompt("hi")


def test_a_bos_that_the_tokenizer_adds_itself_is_not_doubled(saved):
    assert Tokenizer.load(saved(), add_bos=True).encode_prompt("hi") == [BOS, *tokens("hi")]


def test_a_bos_that_does_not_exist_cannot_be_forced(saved):
    with pytest.raises(RequestError, match="add_bos is True, but the tokenizer has no BOS: leave out --add-bos"):
        Tokenizer.load(saved(bos=False), add_bos=True)


def test_a_tokenizer_without_bos_puts_nothing_in_front():
    assert made(bos=False).encode_prompt("hi") == tokens("hi")


def test_an_empty_prompt_is_bos_alone():
    assert made(adds_bos=True).encode_prompt("") == [BOS]


def test_an_empty_prompt_without_a_bos_is_refused():
    with pytest.raises(RequestError, match="the prompt is empty and the tokenizer has no BOS"):
        made(bos=False).encode_prompt("")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_chat_prompt_is_what_the_template_says_with_one_bos(adds_bos):
    tokenizer = made(adds_bos=adds_bos, chat_template=CHATML)

    assert tokenizer.encode_prompt(CHAT[:1]) == tokens("<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_second_bos_of_the_template_is_dropped():
    assert made(chat_template="{{ bos_token }}" + CHATML).encode_prompt(CHAT[:1])[:2] == [BOS, TURN]


def test_a_template_without_bos_gets_none():
    assert made(chat_template=CHATML.removeprefix("{{ bos_token }}")).encode_prompt(CHAT[:1])[0] == TURN


def test_chat_without_a_template_is_refused():
    with pytest.raises(RequestError, match="no chat template: give one with --chat-template"):
        made().encode_prompt(CHAT[:1])


# a completion


def test_a_completion_ends_with_a_stop_id():
    assert made().encode_completion("yo", "hi ") == [*tokens("yo"), EOS]


def test_a_completion_that_ends_with_a_stop_gets_no_second_one():
    assert made(EOS, TURN_END).encode_completion("yo<|im_end|>", "hi ") == [*tokens("yo"), TURN_END]


def test_the_lowest_stop_is_put_behind_where_eos_is_none():
    assert made(TURN_END, TURN).encode_completion("yo") == [*tokens("yo"), TURN]


def test_without_stops_a_completion_is_its_own_ids():
    assert Tokenizer(built(), frozenset()).encode_completion("yo", "hi ") == tokens("yo")


def test_a_completion_starts_from_the_prompts_own_ids_where_a_token_would_lie_across_the_seam():
    # "ab" is one token, but a model that was given "a" can only go on with "b"
    assert made().encode_completion("b", "a") == [*tokens("b"), EOS]
    assert made().encode_completion("cab", "a") == [*tokens("c"), AB, EOS]


@pytest.mark.parametrize(("prompt", "completion"), [("hi", "yo"), ("hi ", "yo"), ("hi", " yo"), ("a", "b"), ("", "yo")])
def test_prompt_and_completion_read_as_they_were_written(prompt, completion):
    tokenizer = made(blank_in_front=True)
    ids = tokenizer.encode_prompt(prompt) + tokenizer.encode_completion(completion, prompt)

    assert tokenizer.decode(ids) == prompt + completion


def test_a_chat_completion_ends_with_the_turn_and_drops_the_white_space_after_it():
    assert made(EOS, TURN_END, chat_template=CHATML).encode_completion(CHAT[1:], CHAT[:1]) == [*tokens("yo"), TURN_END]


def test_a_turn_end_that_is_no_stop_is_followed_by_one():
    assert made(EOS, chat_template=CHATML).encode_completion(CHAT[1:], CHAT[:1]) == tokens("yo<|im_end|>\n</s>")


@pytest.mark.parametrize("template", [FORGETFUL, THINKING])
def test_after_a_prompt_that_the_template_now_writes_otherwise_comes_the_answer_alone(template):
    tokenizer = made(EOS, TURN_END, chat_template=template)

    completion = tokenizer.encode_completion(CHAT[1:], CHAT[:1])
    assert completion == [*tokens("yo"), EOS if template is FORGETFUL else TURN_END]


def test_a_template_that_writes_the_prompt_by_what_the_answer_says_is_refused():
    template = "{% for m in messages %}{{ messages[-1].content | length }}{{ m.content }}{% endfor %}"

    with pytest.raises(RequestError, match="the chat template writes the prompt otherwise for every answer"):
        made(chat_template=template).encode_completion([{"role": "assistant", "content": "hello"}], CHAT[:1])


# the turn of another between two of the assistant's


TOOL = [{"role": "tool", "content": "7"}]
NEXT = "\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"  # after the stop that ended the turn


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_the_next_turn_is_what_the_template_writes_behind_the_stop(template):
    assert made(EOS, TURN_END, chat_template=template).encode_turn(CHAT[:1], TOOL) == tokens(NEXT)


def test_a_turn_end_that_no_stop_stands_for_is_written():
    assert made(EOS, chat_template=CHATML).encode_turn(CHAT[:1], TOOL) == tokens("<|im_end|>" + NEXT)


def test_a_stop_of_the_next_turn_is_written():
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}{{ '</s>' if m.role == 'tool' }}{% endfor %}"

    assert made(EOS, chat_template=template).encode_turn(CHAT[:1], TOOL) == tokens("t 7</s>")


def test_several_messages_may_stand_between_two_turns():
    twice = made(EOS, TURN_END, chat_template=CHATML).encode_turn(CHAT[:1], [*TOOL, {"role": "user", "content": "so?"}])

    assert twice == tokens(NEXT.removesuffix("assistant\n") + "user\nso?<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_written_turn_by_turn_loses_nothing_to_a_template_that_now_drops_thoughts():
    tokenizer, asked = made(EOS, TURN_END, chat_template=THINKING), CHAT[:1]
    thought = tokens("hm /think yo<|im_end|>")

    ids = [*tokenizer.encode_prompt(asked), *thought, *tokenizer.encode_turn(asked, CHAT[:1])]
    written = "<s>1: <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhm /think yo<|im_end|>\n"
    assert ids == tokens(written + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    again = tokenizer.encode_prompt([*asked, {"role": "assistant", "content": "hm /think yo"}, *CHAT[:1]])
    assert again[:4] == tokens("<s>3: ") and len(again) < len(ids)  # control: a new render drops the thought


def test_a_template_that_hides_an_assistants_turn_is_refused():
    with pytest.raises(RequestError, match="does not write each of the assistant's turns once"):
        made(chat_template=FORGETFUL).encode_turn(CHAT[:1], TOOL)


@pytest.mark.parametrize(("completion", "prompt"), [("yo", CHAT[:1]), (CHAT[1:], "hi")])
def test_a_completion_of_the_other_kind_than_its_prompt_is_refused(completion, prompt):
    with pytest.raises(RequestError, match="give both as text or both as chat"):
        made(chat_template=CHATML).encode_completion(completion, prompt)


@pytest.mark.parametrize(
    ("written", "end"), [("<|im_end|>\n", [TURN_END]), (" ### ", tokens("###")), ("\n", []), ("", [])]
)
def test_the_turn_end_is_what_the_template_writes_after_an_answer(written, end):
    template = "{% for m in messages %}{{ m.content }}" + written.replace("\n", "{{ '\\n' }}") + "{% endfor %}"

    assert made(chat_template=template).encode_turn_end() == end


# stops


def test_stops_come_from_the_generation_config(saved):
    assert Tokenizer.load(saved(eos_token_id=[TURN_END, EOS])).stops == {TURN_END, EOS}
    assert Tokenizer.load(saved(eos_token_id=TURN_END)).stops == {TURN_END}


def test_without_a_generation_config_the_tokenizers_eos_is_the_stop(saved):
    assert Tokenizer.load(saved()).stops == {EOS}


@pytest.mark.parametrize(
    ("entry", "token"), [("<s>", BOS), ("</s>", EOS), ("\n", 10), ("!", CHARS["!"]), ("ab", AB), ("4", TURN_END)]
)
@pytest.mark.parametrize("blank_in_front", [False, True])
def test_a_stop_is_named_by_its_text_or_its_number(saved, entry, token, blank_in_front):
    path = saved(eos_token_id=EOS, blank_in_front=blank_in_front)

    assert Tokenizer.load(path, stop=(entry,)).stops == {token}


@pytest.mark.parametrize("entry", ["", "é", "<s>hi"])
def test_a_stop_that_the_tokenizer_never_writes_is_refused(saved, entry):
    with pytest.raises(RequestError, match=f"stop is '{entry}': must be one token"):
        Tokenizer.load(saved(), stop=(entry,))


def test_a_stop_id_outside_the_vocabulary_is_refused(saved):
    path = saved()

    with pytest.raises(RequestError, match="stop is 129: the vocabulary has ids from 0 to 128"):
        Tokenizer.load(path, stop=("129",))


def test_no_stop_at_all_is_refused_unless_the_length_is_fixed(saved):
    path = saved(eos=False)

    with pytest.raises(RequestError, match="no stop id; give one with --stop, or --fixed-length N"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, has_fixed_length=True).stops == frozenset()


def test_a_fixed_length_has_no_stops_whatever_the_model_says(saved):
    assert Tokenizer.load(saved(eos_token_id=EOS), has_fixed_length=True).stops == frozenset()


# load and save


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no tokenizer there; name a directory or hub id"):
        Tokenizer.load(tmp_path)


def test_a_template_is_given_as_text_or_as_a_file(saved, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    expected = made(chat_template=CHATML).encode_prompt(CHAT)

    for template in (CHATML, str(tmp_path / "chat.jinja")):
        assert Tokenizer.load(saved(chat_template=FORGETFUL), chat_template=template).encode_prompt(CHAT) == expected


def test_an_unknown_template_is_refused(saved):
    with pytest.raises(RequestError, match=r"template is 'chat.jinja': unknown template, neither a file nor Jinja"):
        Tokenizer.load(saved(), chat_template="chat.jinja")


def test_a_template_with_broken_grammar_is_refused(saved):
    with pytest.raises(RequestError, match="not Jinja in line 1"):
        Tokenizer.load(saved(), chat_template="{% for %}")


def test_a_saved_tokenizer_loads_as_it_was_with_its_template(saved, tmp_path):
    tokenizer = Tokenizer.load(saved(), chat_template=CHATML)
    tokenizer.save(tmp_path / "policy")

    assert Tokenizer.load(tmp_path / "policy").encode_prompt(CHAT) == tokenizer.encode_prompt(CHAT)


# back to text


def test_decoding_leaves_out_special_tokens_and_the_stop_at_the_end():
    newline = CHARS["\n"]

    assert made(newline).decode(tokens("<s>hi\n<|im_end|>yo\n")) == "hi\nyo"


def test_a_token_keeps_its_blank_for_displays():
    llama = made(blank_in_front=True)

    assert llama.decode_tokens([BOS, CHARS["▁"], AB, CHARS["\n"]]) == ["<s>", " ", "ab", "\n"]


# prompts


def test_a_prompt_keeps_the_other_columns_and_its_row():
    rows = [{"prompt": "hi", "answer": 4}, {"prompt": "yo", "answer": 5}]
    second = records.make_prompts(rows, made(), max_length=9)[1]

    assert second == records.Prompt((BOS, *tokens("yo")), "yo", {"answer": 5}, 2)


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"n": 1, "question": "hi"}, "prompt=question"),
        ({"id": "a7", "Problem": "hi", "answer": "4"}, "prompt=Problem"),
        ({"n": 1, "words": "hi"}, "prompt=words"),
        ({"messages": CHAT}, "prompt=messages"),
    ],
)
def test_prompts_without_their_column_are_refused_with_the_likeliest(row, mapping):
    sentence = f"the data have no column 'prompt' but {', '.join(row)}: map yours with --columns {mapping};"

    with pytest.raises(RequestError, match=f"^{sentence}.* --unconditional"):
        records.make_prompts([row], made(chat_template=CHATML), max_length=99)


def test_unconditional_prompts_are_bos_alone_and_keep_their_columns():
    assert records.make_prompts([{"n": 1}], made(), max_length=9, unconditional=True) == [
        records.Prompt((BOS,), "", {"n": 1}, 1)
    ]


def test_unconditional_prompts_need_a_bos():
    with pytest.raises(RequestError, match="row 1: the prompt is empty and the tokenizer has no BOS"):
        records.make_prompts([{"n": 1}], made(bos=False), max_length=9, unconditional=True)


def test_unconditional_with_a_prompt_column_is_refused():
    with pytest.raises(RequestError, match="unconditional is True, but the data have a column 'prompt'"):
        records.make_prompts([{"prompt": "hi"}], made(), max_length=9, unconditional=True)


@pytest.mark.parametrize("cell", [" \t\n", [{"role": "user", "content": " "}]], ids=["text", "chat"])
def test_a_prompt_of_white_space_is_empty(cell):
    with pytest.raises(RequestError, match="row 1: prompt is empty"):
        records.make_prompts([{"prompt": cell}], made(chat_template=CHATML), max_length=99)


@pytest.mark.parametrize("cell", ["", None, []])
def test_an_empty_cell_is_refused_with_its_row(cell):
    with pytest.raises(RequestError, match="row 2: prompt is empty: fill it or leave the row out"):
        records.make_prompts([{"prompt": "hi"}, {"prompt": cell}], made(), max_length=9)


def test_a_cell_that_one_row_lacks_is_refused_with_its_row():
    with pytest.raises(RequestError, match="row 2: prompt is empty"):
        records.make_prompts([{"prompt": "hi"}, {"n": 1}], made(), max_length=9)


def test_a_cell_that_is_no_text_is_refused_with_its_row():
    with pytest.raises(RequestError, match="row 1: prompt is 7: must be text, or a list of messages"):
        records.make_prompts([{"prompt": 7}], made(), max_length=9)


def test_a_message_without_content_is_refused_with_its_row():
    with pytest.raises(
        RequestError, match=r"row 1: prompt is .*each message must be an object with a role and a content"
    ):
        records.make_prompts([{"prompt": [{"role": "user"}]}], made(chat_template=CHATML), max_length=9)


def test_a_row_longer_than_the_context_is_refused_with_both_numbers():
    rows = [{"prompt": "hi"}, {"prompt": "hello"}]

    with pytest.raises(RequestError, match="row 2: prompt has 6 tokens, and max_length is 5"):  # BOS and five
        records.make_prompts(rows, made(), max_length=5)
    assert len(records.make_prompts(rows, made(), max_length=6)) == 2


@pytest.mark.parametrize(
    ("context", "max_length", "completion", "tokens", "reason"),
    [
        (32768, 512, 0, 512, r"max_length is 512 \(the model reads 32768\): raise --max-length"),
        (None, 512, 0, 512, "max_length is 512: raise --max-length"),
        (64, 512, 0, 64, "the model's context is 64: give a model that reads more"),
        (64, 512, 24, 40, "the model's context of 64 leaves 40 beside max_new_tokens 24: lower --max-new-tokens"),
        (64, 30, 24, 30, r"max_length is 30 \(the model reads 64\)"),
    ],
)
def test_the_field_that_limits_a_row_is_named(context, max_length, completion, tokens, reason):
    config = SimpleNamespace(max_position_embeddings=context)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    limit = records.Limit.of(model, max_length, num_completion_tokens=completion)

    assert limit.max_tokens == tokens
    with pytest.raises(
        RequestError, match=f"row 1: prompt has 1001 tokens, and {reason}.*, or shorten it or leave it out"
    ):
        records.make_prompts([{"prompt": "a" * 1000}], made(), max_length=limit._replace(max_tokens=tokens % 1000))


@pytest.mark.parametrize("cells", [["hi", "hi", CHAT], [CHAT, CHAT, "hi"]])
def test_chat_and_text_in_one_file_are_refused_at_the_first_row_that_differs(cells):
    with pytest.raises(RequestError, match=r"row 3: prompt is .* where the data began with .*: keep to one in a file"):
        records.make_prompts([{"prompt": cell} for cell in cells], made(chat_template=CHATML), max_length=999)


def test_a_template_that_refuses_a_row_is_reported_with_its_row():
    strict = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(
        RequestError, match="row 1: the chat template refuses messages of roles user: roles must alternate"
    ):
        records.make_prompts([{"prompt": CHAT[:1]}], made(chat_template=strict), max_length=99)


# examples


def test_of_prompt_and_completion_the_completion_is_learned():
    rows = [{"prompt": "hi ", "completion": "yo"}]

    assert records.make_examples(rows, made(), max_length=9) == [Example((BOS, *tokens("hi yo"), EOS), 4, 1)]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": "hi", "completion": "yo"}, "no column 'prompt' but .*--columns prompt=question"),
        ({"prompt": "hi", "answer": "yo"}, "no column 'completion' but .*--columns completion=answer"),
        ({"prompt": "hi", "text": "yo"}, "the column 'prompt' holds: map them with --columns completion=text"),
        ({"query": "hi", "text": "yo"}, "'query' holds: map them with --columns prompt=query completion=text"),
    ],
)
def test_a_completion_is_not_learned_without_its_prompt(row, fault):
    with pytest.raises(RequestError, match=fault):
        records.make_examples([row], made(), max_length=9)


def test_a_whole_text_that_holds_its_prompt_may_have_it_as_a_column_too():
    rows = [{"prompt": "hi", "text": "hi yo"}]

    assert records.make_examples(rows, made(), max_length=9) == [Example((BOS, *tokens("hi yo"), EOS), 1, 1)]


def test_pairs_are_not_learned_without_their_prompt():
    with pytest.raises(RequestError, match="'question' holds: map them with --columns prompt=question"):
        records.make_preferences([{"question": "hi", "chosen": "yo", "rejected": "no"}], made(), max_length=9)


def test_of_a_text_all_but_its_first_token_is_learned():
    assert records.make_examples([{"text": "yo"}], made(), max_length=9) == [Example((BOS, *tokens("yo"), EOS), 1, 1)]


@pytest.mark.parametrize("column", ["messages", "text"])
def test_of_a_chat_the_last_turn_is_learned(column):
    rows = [{column: [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}, *CHAT]}]
    (example,) = records.make_examples(rows, made(TURN_END, chat_template=CHATML), max_length=999)

    assert example.ids[example.start :] == (*tokens("yo"), TURN_END)
    assert example.ids[: example.start].count(TURN_END) == 3


@pytest.mark.parametrize("messages", [CHAT[:1], CHAT[1:], [*CHAT, *CHAT[:1]]])
def test_a_chat_must_end_with_an_answer(messages):
    with pytest.raises(
        RequestError, match=r"row 1: the messages are of roles .*the last of two or more must be the assis"
    ):
        records.make_examples([{"messages": messages}], made(chat_template=CHATML), max_length=999)


def test_a_published_transcript_is_plain_text():
    transcript = "\n\nHuman: hi\n\nAssistant: yo"
    (example,) = records.make_examples([{"text": transcript}], made(), max_length=99)

    assert example == Example((BOS, *tokens(transcript), EOS), 1, 1)


def test_a_missing_column_is_refused_with_those_there_and_the_mend():
    have = "the data have no column 'prompt' and 'completion' but question, answer"
    sentence = f"{have}: map yours with --columns prompt=question completion=answer"

    with pytest.raises(RequestError, match=sentence):
        records.make_examples([{"question": "hi", "answer": "yo"}], made(), max_length=9)


def test_an_example_longer_than_the_context_is_refused_and_not_cut():
    with pytest.raises(RequestError, match="row 1: completion has 7 tokens, and max_length is 6"):  # BOS, 5, EOS
        records.make_examples([{"prompt": "hi ", "completion": "yo"}], made(), max_length=6)


# preferences


def test_chosen_and_rejected_follow_the_prompt():
    rows = [{"prompt": "hi ", "chosen": "yo", "rejected": "no", "margin": "0.5"}]
    pair = Preference((BOS, *tokens("hi yo"), EOS), (BOS, *tokens("hi no"), EOS), 0.5, 1, "hi ")

    assert records.make_preferences(rows, made(), max_length=9) == [pair]


def test_without_a_prompt_chosen_and_rejected_are_whole_texts():
    rows = [{"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no", "margin": None}]
    (pair,) = records.make_preferences(rows, made(), max_length=99)

    assert (pair.chosen, pair.rejected) == tuple((BOS, *tokens(rows[0][c]), EOS) for c in ("chosen", "rejected"))
    assert pair.margin == 0


@pytest.mark.parametrize("split", [False, True])
def test_chosen_and_rejected_chats_are_the_same_with_their_prompt_apart(split):
    bad = {"role": "assistant", "content": "no"}
    whole = {"chosen": CHAT, "rejected": [CHAT[0], bad]}
    apart = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [bad]}
    (pair,) = records.make_preferences(
        [apart if split else whole], made(TURN_END, chat_template=CHATML), max_length=999
    )
    start = tokens("<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

    assert pair.chosen == (*start, *tokens("yo"), TURN_END)
    assert pair.rejected == (*start, *tokens("no"), TURN_END)


def test_a_pair_of_equals_is_left_out_and_the_others_keep_their_row():
    rows = [{"chosen": "yo", "rejected": "yo"}, {"chosen": "yo", "rejected": "no"}]

    assert [pair.row for pair in records.make_preferences(rows, made(), max_length=9)] == [2]


def test_nothing_but_pairs_of_equals_is_refused():
    with pytest.raises(RequestError, match="chosen equals rejected in each of 1 rows"):
        records.make_preferences([{"chosen": "yo", "rejected": "yo"}], made(), max_length=9)


@pytest.mark.parametrize("margin", ["much", float("nan"), [1]])
def test_a_margin_that_is_no_number_is_refused_with_its_row(margin):
    with pytest.raises(RequestError, match=r"row 1: margin is .*: must be a finite number"):
        records.make_preferences([{"chosen": "yo", "rejected": "no", "margin": margin}], made(), max_length=9)


def test_the_prompt_of_two_transcripts_is_what_stands_before_the_first_answer_that_differs():
    start = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: so?"
    rows = [
        {"chosen": f"{start}\n\nAssistant: no", "rejected": f"{start}\n\nAssistant: not"},
        {"chosen": f"{start}\n\nAssistant: no", "rejected": "\n\nHuman: hi\n\nAssistant: you"},  # one goes on
        {"chosen": "yo", "rejected": "no"},
    ]

    found = [pair.prompt for pair in records.make_preferences(rows, made(), max_length=99)]
    assert found == [start, "\n\nHuman: hi", ""]


def test_the_prompt_of_two_chats_is_the_turns_before_the_last():
    bad = [CHAT[0], {"role": "assistant", "content": "no"}]
    (pair,) = records.make_preferences(
        [{"chosen": CHAT, "rejected": bad}], made(TURN_END, chat_template=CHATML), max_length=999
    )

    assert json.loads(pair.prompt) == CHAT[:1]


def test_a_chat_that_goes_on_where_the_other_ends_is_asked_what_that_one_answers():
    longer = [*CHAT, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]
    (pair,) = records.make_preferences(
        [{"chosen": CHAT, "rejected": longer}], made(TURN_END, chat_template=CHATML), max_length=999
    )

    assert json.loads(pair.prompt) == CHAT[:1]


# rows that are too long

LONG_PAIRS = [
    {"prompt": "hello ", "chosen": "yo", "rejected": "not"},  # 1 + 6 + 3 + 1 = 11 tokens at most
    {"prompt": "hi ", "chosen": "yo", "rejected": "no"},
    {"prompt": "", "chosen": "yo", "rejected": "something"},
]


def test_pairs_that_are_too_long_are_left_out_and_counted():
    rows = [*LONG_PAIRS[:2], {"prompt": "hi ", "chosen": "yo", "rejected": "yo"}]
    found = records.make_preferences(rows, made(), max_length=7, too_long="skip")

    assert ([pair.row for pair in found], found.num_skipped, found.num_cut, found.num_equal) == ([2], 1, 0, 1)
    assert found.make_warnings("f") == ["of the 3 rows of 'f', 1 left out as too long, 1 left out as equal: 1 are read"]


def test_both_sides_of_a_pair_lose_as_much_of_their_prompt_and_keep_bos():
    found = records.make_preferences(LONG_PAIRS[:2], made(), max_length=8, too_long="cut")

    # 11 - 8 = 3 tokens go: "hel"
    assert found[0].chosen == (BOS, *tokens("lo yo"), EOS)
    assert found[0].rejected == (BOS, *tokens("lo not"), EOS)
    assert found[0].prompt == "hello "
    assert (len(found), found.num_cut, found.num_skipped) == (2, 1, 0)


def test_a_pair_is_left_out_where_an_answer_alone_is_too_long():
    rows = [{"prompt": "hi ", "chosen": "a", "rejected": "bcdefg"}]  # 1 + 3 + 6 + 1 = 11 tokens; 3 can go

    assert len(records.make_preferences([*rows, LONG_PAIRS[1]], made(), max_length=8, too_long="cut")) == 2
    found = records.make_preferences([*rows, LONG_PAIRS[1]], made(), max_length=7, too_long="cut")
    assert ([pair.row for pair in found], found.num_skipped) == ([2], 1)


def test_an_example_loses_what_comes_before_its_completion():
    found = records.make_examples([{"prompt": "hello ", "completion": "yo"}], made(), max_length=6, too_long="cut")

    assert found == [Example((BOS, *tokens("o yo"), EOS), 3, 1)]
    assert (found.num_cut, found.num_skipped) == (1, 0)


def test_an_example_is_left_out_where_its_completion_alone_fills_the_context():
    rows = [{"prompt": "hi ", "completion": "hello"}]  # 1 + 3 + 5 + 1 tokens; of the first four one must stay

    assert len(records.make_examples(rows, made(), max_length=7, too_long="cut")) == 1
    with pytest.raises(RequestError, match="leaves no row"):
        records.make_examples(rows, made(), max_length=6, too_long="cut")


def test_without_a_bos_the_beginning_that_is_lost_is_the_first_token():
    rows = [{"prompt": "hello ", "completion": "yo"}]

    assert records.make_examples(rows, made(bos=False), max_length=5, too_long="cut")[0].ids == (*tokens("o yo"), EOS)


def test_a_text_that_is_learned_from_whole_is_left_out_and_not_cut():
    found = records.make_examples([{"text": "hello"}, {"text": "yo"}], made(), max_length=4, too_long="cut")

    assert [example.row for example in found] == [2]


def test_a_prompt_that_is_too_long_is_left_out():
    found = records.make_prompts([{"prompt": "hello"}, {"prompt": "hi"}], made(), max_length=4, too_long="skip")

    assert ([prompt.row for prompt in found], found.num_skipped) == ([2], 1)


def test_a_labelled_text_loses_its_beginning():
    (one,) = records.make_labelled_examples([{"text": "hello", "label": 1}], made(), max_length=4, too_long="cut")

    assert one.ids == (BOS, *tokens("llo"))


def test_rows_that_are_all_too_long_are_refused():
    with pytest.raises(RequestError, match="too_long is 'skip' and leaves no row, since max_length is 3"):
        records.make_prompts([{"prompt": "hello"}], made(), max_length=3, too_long="skip")


def test_nothing_is_said_of_data_that_are_read_whole():
    assert records.make_prompts([{"prompt": "hello"}], made(), max_length=9).make_warnings("f") == []


# labels


@pytest.mark.parametrize(
    ("cell", "label"), [(0, 0), ("1", 1), (0.25, 0.25), (True, 1), (False, 0), ("true", 1), ("False", 0)]
)
def test_a_label_is_a_number_from_0_to_1_or_a_truth_value(cell, label):
    rows = [{"text": "yo", "label": cell}]

    assert records.make_labelled_examples(rows, made(), max_length=9) == [
        LabelledExample((BOS, *tokens("yo")), label, 1)
    ]


@pytest.mark.parametrize(("cell", "fault"), [(2, "from 0"), (-0.1, "from 0"), ("good", "a finite number"), ("", "")])
def test_any_other_label_is_refused_with_its_row(cell, fault):
    with pytest.raises(RequestError, match=f"row 2: label is .*{fault}"):
        records.make_labelled_examples(
            [{"text": "yo", "label": 1}, {"text": "yo", "label": cell}], made(), max_length=9
        )


# tensors


def test_a_row_is_learned_from_where_the_next_token_is_there_and_not_before_its_start():
    batch = pad_sequences([[5, 6, 7, 8], [9, 10]], [2, 1], fill=3)

    assert_close(batch.ids, torch.tensor([[5, 6, 7, 8], [9, 10, 3, 3]]))
    # tokens 7 and 8 are chosen at columns 1 and 2; token 10 at column 0
    assert_close(batch.mask, torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool())


def test_without_starts_every_token_but_the_first_is_learned():
    assert_close(pad_sequences([[5, 6, 7], [9]]).mask, torch.tensor([[1, 1, 0], [0, 0, 0]]).bool())


def test_a_text_is_scored_at_its_last_token():
    batch = pad_for_scoring([[5, 6, 7], [9]], fill=3)

    assert_close(batch.ids, torch.tensor([[5, 6, 7], [9, 3, 3]]))
    assert_close(batch.mask, torch.tensor([[0, 0, 1], [1, 0, 0]]).bool())


# published data


@pytest.fixture(scope="module")
def stories():
    return Tokenizer.load(DATA / "stories260K", stop=("<s>",))


@REAL
def test_stories_begin_with_bos_and_end_with_it(stories):
    ids = stories.encode_prompt("Once upon a") + stories.encode_completion(" time", "Once upon a")

    assert ids == [1, 403, 407, 261, 378, 1]
    assert stories.decode(ids) == "Once upon a time"


@REAL
def test_worked_answers_follow_their_questions_to_the_letter(stories):
    rows = records.read_rows(str(DATA / "gsm8k"), columns={"prompt": "question", "completion": "answer"})[:200]

    for example, row in zip(records.make_examples(rows, stories, max_length=2048), rows, strict=True):
        assert stories.decode(example.ids) == row["prompt"] + row["completion"]
        assert stories.decode(example.ids[: example.start]) == row["prompt"]


@REAL
def test_human_preferences_share_the_tokens_of_their_shared_transcript(stories):
    rows = records.read_rows(str(DATA / "hh-harmless"))[:100]

    for pair in records.make_preferences(rows, stories, max_length=4096):
        row = rows[pair.row - 1]
        before = row["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:"
        if row["rejected"].startswith(before):
            shared = len(stories.encode_prompt(before))
            assert pair.chosen[:shared] == pair.rejected[:shared]


@REAL
def test_labelled_sentences_are_read_from_their_csv(stories):
    rows = records.read_rows(str(DATA / "sst2"), columns={"text": "sentence"})

    assert len(rows) == 6920
    assert {one.label for one in records.make_labelled_examples(rows[:100], stories, max_length=512)} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (("question", "accepted", "refused"), "chosen=accepted rejected=refused"),
        (("context", "rejected_response", "chosen_response"), "chosen=chosen_response rejected=rejected_response"),
        (("question", "first", "second"), "chosen=COLUMN rejected=COLUMN"),
        (("label", "text"), "chosen=COLUMN rejected=COLUMN"),
    ],
)
def test_sides_of_a_pair_are_guessed_by_their_names_alone(columns, mapping):
    rows = [{name: f"{name} {i}" for name in columns} for i in range(2)]

    with pytest.raises(RequestError, match=f"map yours with --columns {mapping}$"):
        records.make_preferences(rows, made(), max_length=99)
