"""Stop strings: texts of several tokens that end a completion, wherever their tokens are cut."""

import random

import pytest
import torch

from tests.models import tiny
from tests.rehearsed import furnish, letters, ppo_config
from tests.test_multi_turn import Script, spoken
from tests.test_records import AB, BOS, EOS, made, tokens
from understudy import load, resume
from understudy.cli import main
from understudy.language import ppo, toy_language
from understudy.language.data.records import Prompt, Tokenizer
from understudy.language.model.policy import Policy
from understudy.language.reward_model import RewardModel
from understudy.language.rollout.generate import generate
from understudy.language.rollout.multi_turn import ReplyFunction
from understudy.language.rollout.sampler import Sampler
from understudy.run.config import RequestError

LETTERS = Tokenizer(letters(), frozenset([2]))
A, B, C, D = 3, 4, 5, 6  # ids of letters
PROMPTS = [[1, 5, 9, 3], [1, 7], [3, 3, 20, 11, 6], [1, 7]] * 3


# what the tokenizer says of ids


@pytest.mark.parametrize(
    ("before", "ids", "shown", "found"),
    [
        ("", [*tokens("hi"), *tokens("xy")], "hi", "xy"),
        ("", [*tokens("hix"), AB], "hi", "xa"),  # the last token goes on behind the stop string
        ("", [*tokens("xzy")], "xzy", ""),
        ("x", [*tokens("y")], "y", ""),  # its beginning is the prompt's
        ("", [*tokens("xya")], "xya", ""),  # completed before: it would have ended there
        ("", [*tokens("xy"), EOS], "xy", ""),  # the stop id ended it
    ],
)
def test_a_stop_string_is_completed_by_the_last_token_only(before, ids, shown, found):
    tokenizer = made().with_stop(["xy", "xa"])

    assert tokenizer.decode_continuation(tokens(before), ids) == shown
    assert tokenizer.find_stop_string(tokens(before), ids)[0] == found
    assert tokenizer.ends_with_stop_string(tokens(before), ids) == bool(found)


def test_the_first_of_two_stop_strings_in_one_token_cuts():
    assert made().with_stop(["1ab", "01a"]).decode_continuation([], [*tokens("x01"), AB]) == "x"


@pytest.mark.parametrize("blank_in_front", [False, True])
def test_the_end_of_a_row_shows_what_the_whole_row_shows(blank_in_front):
    tokenizer, draw = made(blank_in_front=blank_in_front).with_stop(["ab a", "  "]), random.Random(0)
    some = [
        *tokens("ab" if blank_in_front else "ab "),
        AB,
        BOS,
        *([127] if blank_in_front else []),
    ]  # BOS is not written
    seen = 0

    for _ in range(400):
        ids = draw.choices(some, k=40)
        for t in range(1, 41):
            whole = bool(tokenizer.find_stop_string(tokens("b"), ids[:t])[0])
            assert tokenizer.ends_with_stop_string(tokens("b"), ids[:t]) == whole
            seen += whole
            if whole:
                break
    assert seen > 100


def test_stop_strings_stand_beside_the_stop_ids_of_the_model():
    tokenizer = made().with_stop(["xy"])
    assert (tokenizer.stops, tokenizer.stop_strings) == ({EOS}, ("xy",))

    tokenizer = tokenizer.with_stop(["!", "hi there"])
    assert (tokenizer.stops, tokenizer.stop_strings) == (set(tokens("!")), ("hi there",))


# sampling


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("slots", [3, 64])
def test_a_row_is_what_it_is_without_stop_strings_up_to_the_first(cached, slots):
    policy, seeds = Policy(tiny("llama")), range(len(PROMPTS))
    policy.uses_own_kv_cache = cached
    how = {"limit": 12, "stops": frozenset([2]), "seeds": seeds, "max_num_seqs": slots}
    free = generate(policy, PROMPTS, **how)
    pairs = [LETTERS.decode(c.ids[3:5]) for c in free if len(c.ids) > 6 and min(c.ids[3:5]) >= A][:4]
    tokenizer = LETTERS.with_stop(pairs)

    said = generate(policy, PROMPTS, stop_condition=tokenizer.ends_with_stop_string, **how)

    for ours, whole in zip(said, free, strict=True):
        text = LETTERS.decode(ours.ids)
        assert ours.ids == whole.ids[: len(ours.ids)]
        torch.testing.assert_close(ours.logprob, whole.logprob[: len(ours.ids)], atol=2e-5, rtol=0)
        assert not any(pair in LETTERS.decode(ours.ids[:-1]) for pair in pairs)
        assert ours.stopped == (any(pair in text for pair in pairs) or ours.ids[-1] == 2)
        assert ours.stopped or len(ours.ids) == 12
    assert sum(len(ours.ids) < len(whole.ids) for ours, whole in zip(said, free, strict=True)) >= len(pairs) > 1


def test_an_engine_that_does_not_know_stop_strings_is_cut_there():
    said = spoken(Script(([A, B, C, D, A], False)), None, tokenizer=LETTERS.with_stop(["b c"]))

    [completion] = said.completions
    assert (completion.ids, completion.stopped) == ([A, B, C], True)
    assert completion.logprob == pytest.approx([-0.1 * i for i in (A, B, C)])
    assert said.scoring_input.completions == [" a "]
    assert bool(said.trajectory.terminated[0, 3]) and not said.trajectory.truncated.any()


# turns


def test_a_turn_that_ends_by_a_stop_string_is_answered():
    asked = []

    def answer(prompts, completions, stop):
        asked.append((completions, stop))
        return ["b c"]

    script = Script(([A, B, C], True), ([D, D, B, C], True))
    said = spoken(script, answer, tokenizer=LETTERS.with_stop(["b c"]), max_turns=2)

    assert asked == [([" a "], ["b c"])]
    assert said.completions[0].ids == [A, B, C, B, C, D, D, B, C]
    assert said.scoring_input.completions == [" a b c b c d d "]  # only the end of the last turn is left out


def test_a_stop_string_does_not_begin_in_what_others_say():
    said = spoken(
        Script(([A, 2], True), ([C], False)), lambda prompts: ["b"], tokenizer=LETTERS.with_stop(["b c"]), max_turns=2
    )

    assert said.completions[0].ids == [A, 2, B, C] and not said.completions[0].stopped
    assert said.scoring_input.completions == [" a b c"]


def test_the_template_closes_a_turn_that_a_stop_string_ended():
    tokenizer = made(4, chat_template=CHATML_LIKE).with_stop(["</x>"])
    chat, answer = [{"role": "user", "content": "hi"}], [{"role": "tool", "content": "7"}]
    prompt = Prompt(tuple(tokenizer.encode_prompt(chat)), chat, {}, 1)

    def first(ids):
        script = Script((ids, True), (tokens("ok<|im_end|>"), True))
        sampler = Sampler(
            [prompt], tokenizer, limit=80, has_fixed_length=False, seed=0, max_num_seqs=1, max_turns=2, engine=script,
            reply_function=ReplyFunction(lambda prompts: [answer[0]], timeout=5.0),
        )  # fmt: skip
        return sampler.collect(Policy(tiny("llama")), [0], first_row=0).completions[0]

    behind = tokens("\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\nok<|im_end|>")
    closed, text = first(tokens("yo<|im_end|>")), first(tokens("yo</x>"))
    assert closed.ids == [*tokens("yo<|im_end|>"), *behind]
    assert text.ids == [*tokens("yo</x><|im_end|>"), *behind]
    assert text.messages is not None and text.messages[0] == {"role": "assistant", "content": "yo"}


CHATML_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def pairs_of(texts) -> list[str]:
    """The third and fourth word of each."""
    return [" ".join(text.split()[2:4]) for text in texts if len(text.split()) > 4]


def cut(text: str, strings) -> str:
    """By hand: what stands before the first of them."""
    return min((text.partition(string)[0] for string in strings), key=len)


@pytest.fixture(scope="module")
def strings(home, tmp_path_factory):
    """What the untrained model says in a run's first iteration, and to the prompt "the"."""
    seen = []

    def score(completions):
        seen.extend(completions)
        return [float(len(completion)) for completion in completions]

    ppo.train(ppo_config(home, tmp_path_factory.mktemp("free") / "run", total_tokens=40, reward=score))
    policy = Policy.from_pretrained(home)
    policy.tokenizer = Tokenizer.load(home)
    [said] = policy.generate(["the"], num_completions=8, max_new_tokens=6)
    return tuple(dict.fromkeys([*pairs_of(seen[:8])[:4], *pairs_of(said)[:4]]))


@pytest.fixture(scope="module")
def run(home, strings, tmp_path_factory):
    seen = []

    def score(completions, completion_ids, truncated):
        seen.extend(zip(completions, completion_ids, truncated, strict=True))
        return [float(len(completion)) for completion in completions]

    fields = {"stop": strings, "total_tokens": 40, "learning_rate": 1e-12, "reward": score}
    return ppo.train(ppo_config(home, tmp_path_factory.mktemp("runs") / "run", **fields)), seen


def test_rewards_are_given_the_text_before_the_stop_string(run, strings, home):
    _, seen = run
    tokenizer, ended = Tokenizer.load(home), 0

    for text, ids, truncated in seen:
        whole = tokenizer.decode(ids)
        assert text.strip() == cut(whole, strings).strip()
        if cut(whole, strings) != whole:
            assert not truncated and whole.endswith(strings)
            ended += 1
    assert ended >= 3


def test_a_saved_policy_ends_at_the_stop_strings_of_its_run(run, strings):
    finished, _ = run
    policy = load(finished.path)

    assert policy.model.generation_config.stop_strings == list(strings)
    texts = policy.generate(["the"], num_completions=8, max_new_tokens=6)[0]
    policy.tokenizer = Tokenizer(policy.tokenizer.hf, policy.tokenizer.stops)
    whole = policy.generate(["the"], num_completions=8, max_new_tokens=6)[0]
    assert texts == [cut(one, strings) for one in whole] != whole
    assert texts == policy.generate(["the"], num_completions=8, max_new_tokens=6, stop=strings)[0]


def test_generate_on_the_command_line_ends_at_a_text(home, strings, capsys):
    def said(*stop) -> list[str]:
        main(["generate", str(home), "--prompt", "the", "--count", "8", "--max-new-tokens", "6", *stop])
        return capsys.readouterr().out.splitlines()

    assert said("--stop", *strings) == [cut(text, strings) for text in said()] != said()


def test_a_run_with_stop_strings_goes_on_to_the_bit(home, strings, tmp_path):
    fields = {"stop": strings, "learning_rate": 1e-3, "learning_rate_schedule": "constant", "reward": "length:4"}
    whole = ppo.train(ppo_config(home, tmp_path / "whole", total_tokens=120, **fields))
    short = ppo.train(ppo_config(home, tmp_path / "short", total_tokens=40, **fields))

    resumed = resume(short.path, steps=120)

    weights = [(run.path / "policy" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]
    assert whole.metrics[0]["stopped"] >= 3 / 8


def test_a_reward_model_is_given_one_stop_id_and_no_text(home):
    with pytest.raises(RequestError, match="stop is 'dog sang', which is several tokens"):
        RewardModel.from_pretrained(home, stop=("dog sang",))


def test_a_reward_model_reads_what_ended_by_a_stop_string_to_a_stop_id(home):
    model, sampled = RewardModel.from_pretrained(home), []
    model.score = lambda rows, **_: sampled.extend(rows) or torch.zeros(len(rows))
    tokenizer = Tokenizer.load(home).with_stop(["dog sang"])
    prompt, said = tokenizer.encode_prompt("the"), tokenizer.encode_text("horse dog sang")

    words = Sampler(
        [Prompt(tuple(prompt), "the", {}, 1)], tokenizer, limit=9, has_fixed_length=False, seed=0, max_num_seqs=1
    )
    words.engine = Script((said, False))
    model.make_reward_term(tokenizer)(words.collect(Policy(toy_language.make_model(0)), [0], first_row=0).scoring_input)

    assert sampled == [[*prompt, *tokenizer.encode_text("horse"), tokenizer.stop_token_id]]
