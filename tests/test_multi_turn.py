"""Turns: the policy and others speak in turn; the record by hand, what is learned from, and who is asked when."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.models import FAMILIES, tiny
from tests.records import row
from tests.rehearsed import furnish, letters, ppo_config
from tests.test_records import CHAT, EOS, THINKING, TURN_END, made, tokens
from understudy.advantage import gae
from understudy.batch import Batch, map_tensors
from understudy.cli.language import evaluate_run, train
from understudy.language import config, grpo, ppo, preflight, reinforce
from understudy.language.data.records import Prompt, Tokenizer
from understudy.language.model.policy import Policy
from understudy.language.model.token_distribution import Head, SampledTokens, TokenDistribution
from understudy.language.rlhf import RLHFModels
from understudy.language.rollout.generate import Completion, build_trajectory, generate
from understudy.language.rollout.multi_turn import ReplyFunction
from understudy.language.rollout.sampler import Sampler
from understudy.objective import grpo as grpo_loss
from understudy.objective import ppo as ppo_loss
from understudy.run.config import RequestError
from understudy.value import next_value

STOP, OTHER_STOP = 2, 6
A, D = 3, 6  # ids of the letters "a" and "d"; d is a stop as well
TOKENIZER = Tokenizer(letters(), frozenset([STOP, OTHER_STOP]))
PROMPTS = [
    Prompt(tuple(ids), "a", {"n": n}, n + 1) for n, ids in enumerate([[1, 5, 9, 3], [1, 7], [3, 11, 8], [1]] * 5)
]


def sampler(reply=None, *, prompts=PROMPTS, tokenizer=TOKENIZER, limit=12, max_turns=8, **fields) -> Sampler:
    given = None if reply is None else ReplyFunction(reply, timeout=5.0)
    own = {"limit": limit, "has_fixed_length": False, "seed": 0, "max_num_seqs": 8}
    return Sampler(prompts, tokenizer, **own, reply_function=given, max_turns=max_turns, **fields)


class Script:
    """An engine that says what is written, and notes what it was asked to continue."""

    def __init__(self, *lines: tuple[list[int], bool]) -> None:
        self.lines, self.asked = list(lines), []

    def __call__(self, policy, prompts, *, limit, stops, seeds, starts) -> list[Completion]:
        self.asked.append(([list(p) for p in prompts], list(starts)))
        said = [self.lines.pop(0) for _ in prompts]
        return [Completion(ids, [-0.1 * i for i in ids], stopped, 3) for ids, stopped in said]


def spoken(script, reply, **fields):
    """One row whose turns are a script's."""
    prompts = fields.pop("prompts", [Prompt((1, 3), "a", {}, 1)])
    return sampler(reply, prompts=prompts, engine=script, **fields).collect(Policy(tiny("llama")), [0], first_row=0)


def every(answer):
    """Others who always say the same."""
    return lambda prompts: [answer for _ in prompts]


def in_turn(*answers):
    """Others who say one thing after the other to a single row."""
    rest = list(answers)
    return lambda prompts: [rest.pop(0)]


# the record


@pytest.fixture
def two_turns():
    return spoken(Script(([4, STOP], True), ([5, STOP], True)), in_turn([7, 8], None))


def test_what_others_say_stands_in_the_record_masked(two_turns):
    # prompt 1 3 | said 4 stop | others 7 8 | said 5 stop; columns of choices are those before each chosen token
    record = two_turns.trajectory

    assert record.obs.ids.tolist() == [[1, 3, 4, STOP, 7, 8, 5, STOP]]
    assert record.mask.long().tolist() == [[0, 1, 1, 0, 0, 1, 1, 0]]
    assert_close(record.behavior_logprob, row(0, -0.4, -0.2, 0, 0, -0.5, -0.2, 0))
    assert record.terminated.nonzero().tolist() == [[0, 6]]  # the stop of the last turn alone is an end
    assert not record.truncated.any()


def test_a_completion_knows_its_own_tokens(two_turns):
    [completion] = two_turns.completions

    assert completion.ids == [4, STOP, 7, 8, 5, STOP]
    assert completion.policy_ids == [4, STOP, 5, STOP]
    assert completion.messages is None  # that is for chat
    assert Completion([4, STOP], [0.0, 0.0], True, 0).policy_ids == [4, STOP]


def test_values_and_traces_pass_over_what_others_say(two_turns):
    record, value = two_turns.trajectory, row(99, 1, 2, 99, 99, 5, 6, 99)
    following = next_value(value, record)
    # after the first turn's stop comes the choice after the others' words: V = 5
    assert_close(following[:, [1, 2, 5]], row(2, 5, 6))

    ends = record.terminated, record.truncated, record.mask
    reward = row(0, 0, 0, 3, 0, 0, 10, 0)  # 3 while others speak: paid to the choice before
    advantage = gae(reward, value, following, *ends, gamma=1.0, lam=0.5)
    # delta: 10 - 6 = 4; 6 - 5 = 1; 3 + 5 - 2 = 6; 2 - 1 = 1. A: 4; 1 + 2 = 3; 6 + 1.5 = 7.5; 1 + 3.75 = 4.75
    assert_close(advantage, row(0, 4.75, 7.5, 0, 0, 3, 4, 0))


class Given(torch.nn.Module):
    """A policy that says of each column what it was given: logits [1, T, V]."""

    needs_whole_rows = True

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.value = torch.nn.Parameter(logits), torch.nn.Parameter(torch.zeros(logits.shape[:2]))

    def forward(self, text):
        return TokenDistribution(self.logits, text.mask, Head(torch.nn.Identity())), self.value


@pytest.mark.parametrize(
    "objective", [partial(ppo_loss, clip=0.2, value_coef=1.0), partial(grpo_loss, low=0.2, high=0.2)]
)
def test_no_gradient_reaches_what_others_said_and_nothing_hangs_on_it(two_turns, objective):
    record = two_turns.trajectory
    one, mask = row(*[1.0] * 8), record.mask

    def gradient(junk: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the loss, where what stands in the others' columns is junk."""
        policy = Given(torch.randn(1, 8, 23, generator=torch.Generator().manual_seed(0)))
        policy.logits.data[~mask] += junk * torch.arange(23)
        filled = {
            name: torch.where(mask, x, junk)
            for name, x in {"behavior_logprob": record.behavior_logprob, "advantage": one}.items()
        }
        old = SampledTokens(record.action, filled["behavior_logprob"])
        batch = Batch.of(record, **filled, value=junk * one, target=one, old_distribution=old)
        (objective(policy, batch, entropy_coef=0.1)[0] * mask).sum().backward()
        assert policy.logits.grad is not None
        return policy.logits.grad, torch.zeros(1, 8) if policy.value.grad is None else policy.value.grad

    calm, wild = gradient(0.0), gradient(7.0)
    assert all(not x[~mask].any() for x in (*calm, *wild))
    assert_close(calm[0], wild[0])
    assert all(calm[0][0, column].any() for column in mask[0].nonzero()[:, 0])


# who is asked, and when


def test_each_turn_goes_on_from_the_ids_there_are():
    script = Script(([4, STOP], True), ([5, STOP], True))
    spoken(script, in_turn([7, 8], None))

    assert script.asked == [([[1, 3]], [0]), ([[1, 3, 4, STOP, 7, 8]], [4])]


def test_text_is_put_behind_as_it_is():
    [completion] = spoken(Script(([4, STOP], True), ([5, STOP], True)), in_turn("a d", None)).completions

    assert completion.ids == [4, STOP, A, D, 5, STOP]


def test_a_turn_that_the_limit_cuts_is_not_replied_to():
    said = spoken(Script(([4, 5], False)), every("a"))

    assert said.completions == [Completion([4, 5], [-0.4, -0.5], False, 3)]
    assert said.trajectory.truncated.nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize(("limit", "ids", "stopped"), [(5, [4, STOP, 7, 8, STOP], True), (4, [4, STOP], False)])
def test_a_reply_that_leaves_no_room_for_another_token_cuts_the_row(limit, ids, stopped):
    said = spoken(Script(([4, STOP], True), ([STOP], True)), in_turn([7, 8], None), limit=limit)

    [completion] = said.completions
    assert (completion.ids, completion.stopped) == (ids, stopped)
    assert said.scoring_input.truncated == [not stopped]
    assert bool(said.trajectory.truncated.any()) == (not stopped)


def test_after_the_last_turn_nobody_is_asked():
    [completion] = spoken(Script(([4, STOP], True), ([5, STOP], True)), in_turn([7]), max_turns=2).completions

    assert completion.ids == [4, STOP, 7, 5, STOP]
    assert completion.stopped


def test_rows_end_at_different_turns():
    def reply(n):
        return [None if number == 0 else [7] for number in n]

    script = Script(([4, STOP], True), ([5, STOP], True), ([8, 9], False))
    prompts = [Prompt((1,), "a", {"n": 0}, 1), Prompt((3,), "a", {"n": 1}, 2)]
    said = sampler(reply, prompts=prompts, engine=script).collect(Policy(tiny("llama")), [0, 1], first_row=0)

    assert [c.ids for c in said.completions] == [[4, STOP], [5, STOP, 7, 8, 9]]
    assert script.asked[1] == ([[3, 5, STOP, 7]], [3])


def test_others_are_shown_what_judges_are_shown_and_which_stop_it_was():
    shown = []

    def reply(prompts, completions, completion_ids, truncated, stop, n):
        shown.append([prompts, completions, completion_ids, truncated, stop, n])
        return ["a"] if len(shown) == 1 else [None]

    spoken(Script(([4, D], True), ([5, STOP], True)), reply, prompts=[Prompt((1, 3), "q", {"n": 9}, 1)])
    assert shown == [
        [["q"], [" b"], [[4, D]], [False], ["d"], [9]],  # as ever, a completion is shown without the stop it ends with
        [["q"], [" b d a c"], [[4, D, A, 5, STOP]], [False], ["</s>"], [9]],
    ]


# what does not change anything


@pytest.mark.parametrize("family", FAMILIES)
def test_others_who_say_nothing_change_nothing(family):
    policy = Policy(tiny(family))
    turns = sampler(every([]), max_turns=99).sample(policy, range(20), range(20))
    whole = generate(policy, [p.ids for p in PROMPTS], limit=12, stops=frozenset(), seeds=range(20))

    assert [c.ids for c in turns.completions] == [c.ids for c in whole]
    assert all(c.mask is None for c in turns.completions)
    gap = max(
        abs(a - b)
        for c, w in zip(turns.completions, whole, strict=True)
        for a, b in zip(c.logprob, w.logprob, strict=True)
    )
    assert gap < 2e-5  # read again instead of kept: another order of sums
    assert sum(token in TOKENIZER.stops for c in whole for token in c.ids) > 10  # there were turns


def test_others_who_end_every_row_leave_one_turn():
    policy = Policy(tiny("llama"))

    one, ended = (sampler(reply).sample(policy, range(20), range(20)) for reply in (None, every(None)))
    assert one.completions == ended.completions
    assert torch.equal(one.trajectory.obs.ids, ended.trajectory.obs.ids)


@pytest.mark.parametrize("cached", [True, False])
def test_the_log_probs_of_a_conversation_are_those_of_one_pass_over_its_ids(cached):
    policy = Policy(tiny("gemma3"))
    policy.uses_own_kv_cache = cached

    record = sampler(every([9, 10, 11]), limit=24).sample(policy, range(20), range(20)).trajectory
    assert (record.mask[:, 2:] & ~record.mask[:, 1:-1] & record.mask.cumsum(1)[:, 1:-1].bool()).any()  # words of others
    own = policy(record.obs)[0].log_prob(record.action)
    assert_close(own[record.mask], record.behavior_logprob[record.mask], atol=2e-5, rtol=0)


def test_a_completion_that_is_taken_up_again_goes_on_as_it_would_have():
    policy, prompts = Policy(tiny("qwen2")), [list(p.ids) for p in PROMPTS[:6]]
    told = {"limit": 10, "stops": frozenset(), "seeds": range(6)}

    whole = [c.ids for c in generate(policy, prompts, **told)]
    starts = [0, 1, 3, 5, 8, 9]
    begun = [[*p, *w[:n]] for p, w, n in zip(prompts, whole, starts, strict=True)]
    rest = generate(policy, begun, starts=starts, max_num_seqs=4, **told)
    assert [c.ids for c in rest] == [w[n:] for w, n in zip(whole, starts, strict=True)]


def test_without_our_cache_a_completion_does_not_repeat_its_noise():
    policy = Policy(tiny("llama"))
    policy.uses_own_kv_cache = False
    told = {"limit": 12, "stops": frozenset(), "seeds": [5]}

    first, later = (generate(policy, [[1, 7]], starts=[start], **told)[0] for start in (0, 4))
    assert (len(first.ids), len(later.ids)) == (12, 8)
    assert first.ids[:8] != later.ids


def test_a_start_at_the_limit_is_refused():
    with pytest.raises(ValueError, match="holds 3 tokens of 3 already"):
        generate(Policy(tiny("llama")), [[1, 2, 3, 4]], limit=3, stops=frozenset(), seeds=[0], starts=[3])


# chat


def chatted(reply, *lines: str, template=THINKING):
    tokenizer = made(EOS, TURN_END, chat_template=template)
    script = Script(*((tokens(line), True) for line in lines))
    prompt = Prompt(tuple(tokenizer.encode_prompt(CHAT[:1])), CHAT[:1], {}, 1)
    own = {"prompts": [prompt], "tokenizer": tokenizer, "limit": 200}
    return prompt, spoken(script, reply, **own)


def test_messages_are_written_by_the_template_and_earlier_thoughts_stay():
    _, said = chatted(in_turn({"role": "tool", "content": "7"}, None), "hm /think 3+4<|im_end|>", "so 7<|im_end|>")

    between = "\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
    assert said.completions[0].ids == tokens("hm /think 3+4<|im_end|>" + between + "so 7<|im_end|>")


def test_a_template_that_numbers_turns_counts_each_once():
    one = "{{ loop.index }}{{ (messages[1:] or messages)[0].role[0] }} {{ m.content }}<|im_end|>"
    template = "{% for m in messages %}" + one + "{% endfor %}"
    tool = {"role": "tool", "content": "7"}
    _, said = chatted(in_turn(tool, tool, None), "x<|im_end|>", "y<|im_end|>", "z<|im_end|>", template=template)

    assert said.completions[0].ids == tokens("x<|im_end|>3a 7<|im_end|>y<|im_end|>5a 7<|im_end|>z<|im_end|>")


def test_judges_are_shown_the_turns_of_a_chat_as_messages():
    _, said = chatted(in_turn([{"role": "user", "content": "and?"}], None), "hm<|im_end|>", "7<|im_end|>")

    roles = [("assistant", "hm"), ("user", "and?"), ("assistant", "7")]
    assert said.scoring_input.completions == [[{"role": role, "content": content} for role, content in roles]]


@pytest.mark.parametrize("answer", ["(7)", tokens("(7)")])
def test_bare_text_or_ids_in_a_chat_are_a_tools(answer):
    _, said = chatted(in_turn(answer, None), "hm<|im_end|>", "7<|im_end|>")

    assert said.completions[0].ids == tokens("hm<|im_end|>(7)7<|im_end|>")
    assert said.scoring_input.completions[0][1] == {"role": "tool", "content": "(7)"}


def test_a_chat_of_one_turn_is_one_answer():
    _, said = chatted(every(None), "hm<|im_end|>")

    assert said.scoring_input.completions == [[{"role": "assistant", "content": "hm"}]]


# refusals


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (lambda prompts: [], "it gave 0 replies to 1 rows; give one each"),
        (every(7.5), "it gave 7.5; give text, ids, messages or None"),
        (every([{"content": "7"}]), "give text, ids, messages or None"),
        (every({"role": "tool", "content": "7"}), "a message to a prompt of text; give text or ids"),
        (lambda question: [None], "its parameter 'question' is no column of the data"),
        (lambda prompts: 1 / 0, r"ZeroDivisionError: division by zero .*; let it answer with the error instead"),
    ],
)
def test_a_reply_that_cannot_be_used_is_refused(reply, problem):
    with pytest.raises(RequestError, match=f"^reply is .*: .*{problem}"):
        spoken(Script(([4, STOP], True)), reply)


@pytest.mark.parametrize("spec", ["tool.py:f", "f", "length:4"])
def test_a_reply_that_is_no_function_of_a_file_is_refused(spec):
    with pytest.raises(RequestError, match=r"must be file\.py:function of a file that exists, or a Python function"):
        ReplyFunction(spec, timeout=1.0)


def test_turns_need_stops():
    with pytest.raises(RequestError, match="fixed_length is 4: without a stop no turn ends"):
        config.RolloutConfig(model="m", data="d", reward="length", reply=every(None), fixed_length=4)


@pytest.fixture
def tool(tmp_path):
    """A file with functions that reply."""
    path = tmp_path / "tool.py"
    path.write_text(
        "import time\n"
        "def double(completion_ids, stop):\n    return [ids + [7] if len(ids) < 4 else None for ids in completion_ids]\n"
        "def slow(prompts):\n    time.sleep(9)\n"
        "def broken(prompts):\n    return 1 / 0\n"
    )
    return path


def test_a_files_function_replies_from_a_process_of_its_own(tool):
    reply = ReplyFunction(f"{tool}:double", timeout=5.0)
    engine = Script(([4, STOP], True), ([5, STOP], True))
    own = {"limit": 12, "has_fixed_length": False, "seed": 0, "max_num_seqs": 8, "max_turns": 8}
    one = Sampler([Prompt((1, 3), "a", {}, 1)], TOKENIZER, reply_function=reply, engine=engine, **own)

    [completion] = one.collect(Policy(tiny("llama")), [0], first_row=0).completions
    assert completion.ids == [4, STOP, 4, STOP, 7, 5, STOP]
    reply.close()


@pytest.mark.parametrize(("function", "problem"), [("slow", "no answer within 0.5 s"), ("broken", "ZeroDivisionError")])
def test_a_files_function_that_fails_ends_the_run_in_a_sentence(tool, function, problem):
    reply = ReplyFunction(f"{tool}:{function}", timeout=0.5)

    with pytest.raises(RequestError, match=f"{function}'?: .*{problem}.*; let it answer with the error instead"):
        reply(spoken(Script(([4, 5], False)), every("a")).scoring_input, ["."])
    reply.close()


def test_a_function_that_is_not_in_the_file_is_refused(tool):
    with pytest.raises(RequestError, match=r"tool.py:gone'?: it cannot be imported .*'double', |no function 'gone'"):
        ReplyFunction(f"{tool}:gone", timeout=1.0)


# engines


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([], "gave 0 completions to 1 prompts"),
        ([Completion([], [], True, 0)], "has 0 tokens"),
        ([Completion([4, 5], [-0.1], True, 0)], r"has 2 tokens and log-probs \[-0.1\]"),
        ([Completion([4], [float("nan")], True, 0)], "a finite log-prob for each"),
    ],
)
def test_an_engine_that_says_something_else_is_refused(found, problem):
    with pytest.raises(ValueError, match=problem):
        spoken(lambda policy, prompts, **told: found, None)


# in a recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("turns"))


def interrupt(completion_ids):
    """Others who say two words after the first turn, and then no more."""
    return ["the cat" if len(ids) < 8 else None for ids in completion_ids]


STOPS = tuple(map(str, range(2, 170)))


@pytest.mark.parametrize("recipe", [ppo, grpo, reinforce])
def test_a_recipe_learns_from_conversations(recipe, home, tmp_path):
    fields = {
        "max_new_tokens": 24,
        "total_tokens": 100,
        "stop": STOPS,
        "log_samples": 8,
        "reply": interrupt,
        "preflight": True,
    }
    given = vars(ppo_config(home, tmp_path / "run", **fields))
    names = set(recipe.Config.__dataclass_fields__) & set(grpo.Config.__dataclass_fields__) & set(given)
    run = recipe.train(
        recipe.Config(**{name: given[name] for name in names if name not in ("kl_reference", "objective")})
    )

    lines = [json.loads(line) for line in (Path(run.path) / "samples" / "000001.jsonl").read_text().splitlines()]
    talks = [line for line in lines if not all(line["chosen"])]
    assert talks
    for line in talks:
        columns = ("chosen", "logprob", "value", "advantage", "reward", "kl_reference", "entropy", "tokens")
        assert {len(line[name]) for name in columns} == {len(line["completion_ids"])}
        told = [token for token, own in zip(line["tokens"], line["chosen"], strict=True) if not own]
        assert "".join(told).split()[:2] == ["the", "cat"]
        assert all(own or x == 0 for own, x in zip(line["chosen"], line["logprob"], strict=True))
    assert run.metrics[0]["steps"] == sum(sum(line["chosen"]) for line in lines)  # chosen tokens alone are counted
    assert run.metrics[0]["length_mean"] == pytest.approx(run.metrics[0]["steps"] / 8)
    assert json.loads((run.path / "config.json").read_text())["config"]["reply"] == "function interrupt"


def test_conversations_pass_preflight(home, tmp_path):
    cfg = ppo_config(home, tmp_path / "run", max_new_tokens=24, stop=STOPS, reply=interrupt, preflight=True)

    assert not [finding for finding in preflight.run_checks(RLHFModels(cfg)) if finding.is_fatal]


def test_turns_are_the_policys_at_most(home, tmp_path):
    def chatter(prompts):
        return ["cat"] * len(prompts)

    for turns in (1, 2, 3):
        cast = RLHFModels(
            ppo_config(home, tmp_path / "run", max_new_tokens=40, stop=STOPS, reply=chatter, max_turns=turns)
        )
        said = cast.sampler.collect(cast.policy, range(8), first_row=0)
        runs = [sum(map(len, "".join("x" if own else " " for own in c.mask or []).split())) for c in said.completions]
        counts = [len("".join("x" if own else " " for own in c.mask or [True]).split()) for c in said.completions]
        assert max(counts) == turns and len(runs) == 8


def test_padding_after_conversations_moves_nothing():
    record = sampler(every([9, 10]), limit=20).sample(Policy(tiny("llama")), range(20), range(20)).trajectory
    value = torch.randn(record.mask.shape, generator=torch.Generator().manual_seed(0))
    wide = map_tensors(lambda x: torch.nn.functional.pad(x, (0, 3)), record)

    narrow = next_value(value, record)
    assert_close(next_value(torch.nn.functional.pad(value, (0, 3)), wide)[:, : value.shape[1]], narrow)


def test_a_record_is_laid_out_from_completions_that_others_spoke_in():
    both = [Completion([4, 7, 5], [-0.1, 0.0, -0.2], True, 0, [True, False, True]), Completion([8], [-0.3], False, 0)]

    record = build_trajectory([[3], [3, 3]], both)
    assert record.mask.long().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]


def test_an_evaluation_names_the_reply_itself_and_has_its_turns(home, tmp_path, tool):
    path = tmp_path / "run"
    fields = {"max_new_tokens": 24, "total_tokens": 60, "stop": STOPS, "max_turns": 99, "reply": f"{tool}:silent"}
    tool.write_text(tool.read_text() + "def silent(prompts):\n    return [[] for _ in prompts]\n")
    ppo.train(ppo_config(home, path, **fields))
    tool.write_text(tool.read_text() + "# not what the run began with\n")

    with pytest.raises(RequestError, match=r"names code as its reply .*: name it yourself with --reply"):
        evaluate_run([str(path)])
    evaluate_run([str(path), "--rows", "8", "--reply", f"{tool}:silent"])
    assert json.loads((path / "evaluation.json").read_text())["length"] == pytest.approx(24)  # only the limit ends it


def test_the_command_line_takes_a_reply(home, tmp_path, tool):
    argv = [
        "ppo",
        "--model",
        str(home),
        "--data",
        str(home / "prompts.jsonl"),
        "--reward",
        "length:4",
        "--completions-per-iteration",
        "8",
    ]
    argv += [
        "--max-new-tokens",
        "12",
        "--total-tokens",
        "20",
        "--quiet",
        "--no-preflight",
        "--out",
        str(tmp_path / "run"),
    ]

    assert train([*argv, "--reply", f"{tool}:double", "--max-turns", "2", "--off-policy", "truncate"]) == 0
    assert "importance_weight_mean" in (tmp_path / "run" / "metrics.jsonl").read_text()
