"""A judge: weighted sums, missing rows, functions that misbehave, refusals, built-ins."""

import asyncio
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.rehearsed import furnish, ppo_config
from understudy.language.rewards import worker
from understudy.language.rewards.reward_sum import MAX_HANGING_ROWS, FunctionReward, RewardSum, ScoringInput, distinct_n
from understudy.language.rlhf import RLHFModels
from understudy.run.config import RequestError

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
NAN = math.nan


def sampled(*completions, ids=None, **columns):
    rows = len(completions)
    return ScoringInput(
        prompts=[f"prompt {i}" for i in range(rows)],
        completions=list(completions),
        completion_ids=ids or [[0] * len(text) for text in completions],
        truncated=[False] * rows,
        columns=columns,
    )


def scores(*values):
    return torch.tensor(values, dtype=torch.float32)


def said(*values):
    """A part that always says the same."""
    return lambda rows: scores(*values)


def judge(*specs, **options):
    return RewardSum.of(specs, load_model=options.pop("load_model", refuse_model), **options)


def refuse_model(path):
    raise AssertionError(f"{path} was taken for a reward model")


def same(found, *values):
    assert_close(found, scores(*values), equal_nan=True)


@pytest.fixture
def write(tmp_path):
    """Write a reward file and name the function `score` in it."""

    def write(body, name="reward.py"):
        (tmp_path / name).write_text(body)
        return f"{tmp_path / name}:score"

    return write


def gone(pid, within=5.0):
    """Whether a process is over, or a zombie that nobody collects, within some seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def every_row(line):
    """A file whose function loops over completions, `line` being the loop's body."""
    loop = f"    out = []\n    for c in completions:\n        {line}\n    return out\n"
    return "import os, sys, time\ndef score(completions):\n" + loop


LENGTHS = "out.append(len(c))"


# --- sums ---


def test_a_score_is_the_weighted_sum_of_its_parts():
    # 2*1 + (-0.5)*4 = 0; 2*3 + (-0.5)*2 = 5
    verdict = RewardSum([("a", 2.0, said(1, 3)), ("b", -0.5, said(4, 2))])(sampled("x", "y"))

    same(verdict.score, 0, 5)
    assert verdict.score.dtype == torch.float32


def test_parts_are_reported_unweighted_by_name():
    verdict = RewardSum([("a", 2.0, said(1, 3)), ("b", -0.5, said(4, NAN))])(sampled("x", "y"))

    assert list(verdict.terms) == ["a", "b"]
    same(verdict.terms["a"], 1, 3)
    same(verdict.terms["b"], 4, NAN)


def test_a_row_with_a_missing_part_is_missing_and_never_zero():
    verdict = RewardSum([("a", 1.0, said(1, 3)), ("b", 0.5, said(NAN, 2))])(sampled("x", "y"))

    same(verdict.score, NAN, 4)


def odd(completions):
    return [None if len(text) % 2 == 0 else 1.0 for text in completions]


def even(completions):
    return [2.0 if text and len(text) % 2 == 0 else None for text in completions]


def fails(completions):
    return [1.0 / len(text) for text in completions]


ROWS = ("a", "ab", "abc", "")


def test_none_leaves_the_row_to_the_other_terms():
    # "" has an answer from neither
    verdict = judge((odd, 3.0), even)(sampled(*ROWS))

    same(verdict.score, 3, 2, 3, NAN)
    same(verdict.terms["odd"], 1, NAN, 1, NAN)


def test_none_leaves_out_the_row_where_that_is_asked_for():
    same(judge(odd, "length", missing="row")(sampled(*ROWS)).score, 2, NAN, 4, NAN)


def test_a_run_leaves_out_what_it_was_asked_to(tmp_path):
    home = furnish(tmp_path)

    def never(completions):
        return [None] * len(completions)

    given = {"reward": (("length", 0.5), never), "fixed_length": 6}
    for missing, score in (("term", 3.0), ("row", NAN)):
        cast = RLHFModels(ppo_config(home, tmp_path / "run", missing_score=missing, **given))
        same(cast.reward_sum(sampled("x", ids=[[0] * 6])).score, score)


def test_a_failure_leaves_out_the_row_in_any_case():
    one = judge(fails, "length")

    same(one(sampled("ab", "")).score, 2.5, NAN)
    assert one.failures["raised"] == 1


def test_an_empty_cell_leaves_the_row_to_the_other_terms():
    rows = sampled("5", "x", answer=["5", None])

    same(judge("number", "length")(rows).score, 2, 1)
    same(judge("exact", "length", missing="row")(rows).score, 2, NAN)


def test_a_term_that_is_only_measured_scores_no_row():
    same(judge(("length", 0.0), odd)(sampled("a", "ab")).score, 1, NAN)


def test_a_part_that_is_only_measured_may_be_missing():
    verdict = RewardSum([("a", 1.0, said(1, 3)), ("b", 0.0, said(NAN, 2))])(sampled("x", "y"))

    same(verdict.score, 1, 3)


def test_an_infinite_score_is_missing():
    one = RewardSum([("a", 1.0, said(math.inf, -math.inf, 2))])
    verdict = one(sampled("x", "y", "z"))

    same(verdict.terms["a"], NAN, NAN, 2)
    assert one.failures["nan"] == 2


def test_a_sum_too_large_for_its_type_is_missing():
    same(RewardSum([("a", 10.0, said(3e38, 1))])(sampled("x", "y")).score, NAN, 10)


def test_the_second_of_a_name_gets_a_suffix():
    one = RewardSum([("a", 1.0, said(1)), ("a", 1.0, said(2)), ("a", 1.0, said(3))])

    assert list(one(sampled("x")).terms) == ["a", "a_2", "a_3"]


def test_a_suffix_does_not_take_a_name_that_is_there():
    one = RewardSum([("a_2", 1.0, said(1)), ("a", 1.0, said(2)), ("a", 1.0, said(3))])

    assert list(one(sampled("x")).terms) == ["a_2", "a", "a_3"]


def test_a_part_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"part 'a' gave \(1,\): must be \[2\]"):
        RewardSum([("a", 1.0, said(1))])(sampled("x", "y"))


def test_what_a_function_does_to_its_lists_reaches_nobody_else():
    def greedy(prompts, completions, completion_ids, **columns):
        scores = [float(len(ids)) for ids in completion_ids]
        for column in (prompts, completions, *completion_ids, *columns.values()):
            column.clear()
        return scores

    rows = sampled("xy", "z", answers=[["a"], ["b"]])
    before = copy.deepcopy(rows)
    reward_sum = judge(greedy, "length")

    first, again = reward_sum(rows).score, reward_sum(rows).score
    assert torch.equal(first, again) and rows == before


def test_no_rows_get_no_scores():
    assert judge("length", lambda completions: [])(sampled()).score.shape == (0,)


# --- specs ---


@pytest.mark.parametrize("spec, weighted", [("length", 3), ("length*0.5", 1.5), ("length*-2", -6), ("length*1e1", 30)])
def test_a_weight_stands_behind_a_star(spec, weighted):
    same(judge(spec)(sampled("abc")).score, weighted)


def test_a_pair_of_spec_and_weight_is_a_part():
    same(judge(("length*2", 0.5), (lambda completions: [4.0], -1))(sampled("abc")).score, 3 - 4)


@pytest.mark.parametrize("spec", ["regex:ab*", "regex:a*b+", "contains:a * b", "regex:a*b*1"])
def test_a_star_in_a_text_is_no_weight(spec):
    same(judge(spec)(sampled("a * b, abbb")).score, 1)


def test_a_directory_with_a_config_is_a_reward_model(tmp_path):
    path = tmp_path / "rm*2"  # the whole spec is there, so the star is part of the name
    path.mkdir()
    (path / "config.json").write_text("{}")
    asked = []
    verdict = judge(str(path), f"{path}*3", load_model=lambda path: asked.append(path) or said(7))(sampled("x"))

    assert asked == [str(path)] * 2
    same(verdict.score, 7 + 3 * 7)
    assert list(verdict.terms) == ["rm*2", "rm*2_2"]


def test_a_file_is_split_from_its_function_at_the_last_colon(write):
    with judge(write(every_row(LENGTHS), "odd:name.py")) as one:
        same(one(sampled("abc")).score, 3)


def test_a_built_in_may_mention_a_file():
    same(judge("contains:reward.py:score")(sampled("in reward.py:score", "no")).score, 1, 0)


BAD_SPECS = {
    "length*x": "the weight 'x' must be a finite number, at most 1e+06, as in length*0.5",
    "length*1e39": "the weight '1e39' must be a finite number, at most 1e+06",
    "length*inf": "the weight 'inf' must be a finite number",
    "lenght": "no builtin 'lenght'; did you mean 'length'",
    "": "no such directory, and no builtin ''",
    "no/such/dir": "there is no such directory",
    "nowhere.py:score": "there is no file 'nowhere.py'; name one that exists",
    "nowhere.py": "it names no function; write nowhere.py:FUNCTION",
    "nowhere*.py:score": "the weight '.py:score' must be a finite number",
    "length:many": "the target 'many' must be a whole number of tokens above 0",
    "length:0": "the target '0' must be a whole number of tokens above 0",
    "contains": "contains needs a text",
    "regex": "regex needs a pattern",
    "regex:(": "the pattern does not compile",
    "repetition:4": "repetition takes nothing after its name",
    ("length", math.nan): "and its weight, a finite number, at most 1e+06",
    ("length", "2"): "and its weight, a finite number, at most 1e+06",
    5: "it must be DIR, file.py:function, a builtin, or a Python function",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_wrong_spec_is_refused_in_a_sentence_that_names_field_value_and_mend(spec):
    with pytest.raises(RequestError) as refusal:
        judge(spec, field="gold")
    message = str(refusal.value)

    assert message.startswith(f"gold is {spec!r}: ") and BAD_SPECS[spec] in message
    assert "\n" not in message


def test_a_file_without_a_function_is_refused_with_its_functions(write):
    file = write("class Score:\n    pass\ndef polite(completions):\n    pass\ndef _own():\n    pass\n").rpartition(":")[
        0
    ]

    with pytest.raises(RequestError, match=r"write .*reward.py:FUNCTION; it has polite$"):
        judge(file)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"the directory has no config\.json"):
        judge(str(tmp_path))


def test_no_spec_at_all_is_refused():
    with pytest.raises(RequestError, match="reward is empty: name at least one"):
        judge()


BAD_FILES = {
    "def score(:\n": r"SyntaxError: .*\(reward.py, line 1\)",
    "\nimport no_such_module\n": r"ModuleNotFoundError: .*'no_such_module' \(reward.py, line 2\)",
    "def scor(completions): ...\ndef other(): ...\n": "it has no function 'score', only scor, other",
    "score = 5\n": "it has no function 'score', only none at all",
    "raise SystemExit(3)\n": "SystemExit: 3",
    "import os\nos._exit(7)\n": "its process ended with exit code 7",
}


@pytest.mark.parametrize("body", BAD_FILES)
def test_a_file_that_cannot_be_imported_is_refused_before_the_first_batch(write, body):
    with pytest.raises(RequestError, match=rf"reward is .*: 'score' cannot be imported \(.*{BAD_FILES[body]}"):
        judge(write(body))


def test_an_import_that_never_ends_is_refused(write, monkeypatch):
    monkeypatch.setattr(worker, "IMPORT_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(RequestError, match=r"no answer within 0\.5 s"):
        judge(write("import time\ntime.sleep(60)\n"))


def test_a_refused_spec_ends_the_workers_before_it(write, tmp_path):
    spec = write(f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n" + every_row(LENGTHS))
    with pytest.raises(RequestError):
        judge(spec, "lenght")

    assert gone(int((tmp_path / "pid").read_text()))


# --- what a function is given ---

IN_BOTH = pytest.mark.parametrize("place", ["in process", "in a worker"])


def make(place, body, write):
    """A judge by the function `score` of `body`, here or in a worker."""
    if place == "in a worker":
        return judge(write(body), timeout=5.0)
    names = {}
    exec(compile(body, "reward.py", "exec"), names)
    return judge(names["score"])


@IN_BOTH
def test_a_function_is_given_prompts_completions_ids_truncation_and_columns(place, write):
    body = (
        "def score(prompts, completions, **columns):\n"
        "    rest = columns['completion_ids'], columns['truncated'], columns['label']\n"
        "    return [len(p) + 10 * len(c) + 100 * len(i) + 1000 * t + 10000 * k\n"
        "            for p, c, i, t, k in zip(prompts, completions, *rest)]\n"
    )
    rows = ScoringInput(["p", "pp"], ["ccc", "c"], [[1, 2], [3]], [True, False], {"label": [0, 4]})
    with make(place, body, write) as one:
        same(one(rows).score, 1 + 30 + 200 + 1000, 2 + 10 + 100 + 40000)


@IN_BOTH
def test_a_function_is_given_only_what_it_has_parameters_for(place, write):
    with make(place, "def score(label, completions, scale=2):\n    return [scale * k for k in label]\n", write) as one:
        same(one(sampled("a", "b", label=[3, 4], other=[0, 0])).score, 6, 8)


@IN_BOTH
def test_a_parameter_that_is_no_column_is_refused(place, write):
    with (
        make(place, "def score(completions, label):\n    return label\n", write) as one,
        pytest.raises(
            RequestError, match=r"reward is 'score': its parameter 'label' is no column.*--columns label=NAME"
        ),
    ):
        one(sampled("a", answer=["b"]))


@IN_BOTH
def test_chat_rows_arrive_as_messages(place, write):
    chat = ScoringInput(
        [[{"role": "user", "content": "hi"}]], [[{"role": "assistant", "content": "yo!"}]], [[1]], [False], {}
    )
    body = (
        "def score(prompts, completions):\n"
        "    return [10 * len(p[0]['content']) + len(c[0]['content']) for p, c in zip(prompts, completions)]\n"
    )
    with make(place, body, write) as one:
        same(one(chat).score, 23)


def test_a_cell_that_is_not_plain_data_reaches_a_worker_as_a_list_or_text(write):
    body = "def score(a, b):\n    return [x == [1, 2] and y == '1.5' for x, y in zip(a, b)]\n"
    with judge(write(body)) as one:
        same(one(sampled("x", "y", a=[np.array([1, 2]), torch.tensor([1])], b=[Decimal("1.5"), "1.5"])).score, 1, 0)


def test_a_callable_object_is_named_after_its_class():
    class Kind:
        def __call__(self, completions):
            return [1.0]

    assert list(judge(Kind(), lambda completions: [1.0])(sampled("x")).terms) == ["Kind", "lambda"]


def test_a_file_may_import_its_neighbour(write, tmp_path):
    (tmp_path / "judge.py").write_text("FACTOR = 3\n")  # and not the module of ours of this name
    with judge(
        write("from judge import FACTOR\ndef score(completions):\n    return [FACTOR for _ in completions]\n")
    ) as one:
        same(one(sampled("x")).score, 3)


# --- functions that misbehave ---


@IN_BOTH
def test_booleans_whole_numbers_and_numpy_scalars_are_scores(place, write):
    body = "import numpy as np\ndef score(completions):\n    return [True, 2, np.float32(0.5), np.int64(7)]\n"
    with make(place, body, write) as one:
        same(one(sampled("a", "b", "c", "d")).score, 1, 2, 0.5, 7)


@IN_BOTH
def test_none_nan_and_infinity_are_missing_for_their_row_alone(place, write):
    body = "def score(completions):\n    return [None, float('nan'), float('inf'), 4]\n"
    with make(place, body, write) as one:
        same(one(sampled("a", "b", "c", "d")).score, NAN, NAN, NAN, 4)
        assert {kind: rows for kind, rows in one.failures.items() if rows} == {"none": 1, "nan": 2}


@IN_BOTH
def test_a_row_that_raises_is_missing_and_the_others_are_scored(place, write):
    with make(place, every_row("out.append(6 / len(c))"), write) as one:
        same(one(sampled("ab", "", "abc", "")).score, 3, NAN, 2, NAN)
        assert one.failures["raised"] == 2
        assert one.last_error == "score, row 1: ZeroDivisionError: division by zero (reward.py, line 5)"


@IN_BOTH
def test_a_text_is_no_score(place, write):
    with make(place, every_row("out.append(1.0 if c else '1.0')"), write) as one:
        same(one(sampled("a", "")).score, 1, NAN)
        assert "a score is the text '1.0': must be a number or None" in one.last_error


NO_SCORES = {  # what a function gives for its rows, and what is said of it
    "'55'": "the scores are a str",
    "b'55'": "the scores are a bytes",
    "{5: 1, 6: 2}": "the scores are a dict",
    "{5, 6}": "the scores are a set",
    "None": "TypeError: 'NoneType' object is not iterable",
    "5.0": "TypeError: 'float' object is not iterable",
    "[[5.0], [5.0]]": "not 'list'",
    "[[torch.tensor(5.0)], [torch.tensor(5.0)]]": "not 'list'",
    "torch.ones(2, 3)": "ValueError: ",
    "torch.ones(2, device='meta')": "meta",  # a device that this process cannot read, as a GPU that is lost
    "[1j, 1j]": "not 'complex'",
    "[10**400] * 2": "OverflowError: ",
}


@pytest.mark.parametrize("given", NO_SCORES)
def test_what_is_no_list_of_numbers_is_no_score(given):
    one = judge(eval(f"lambda completions: {given}", {"torch": torch}))

    same(one(sampled("a", "b")).score, NAN, NAN)
    assert one.failures["raised"] == 2 and NO_SCORES[given] in one.last_error


def test_a_file_that_gives_no_list_of_numbers_gives_no_score(write):
    with judge(write("def score(completions):\n    return {i: 5.0 for i in range(len(completions))}\n")) as one:
        same(one(sampled("a", "b")).score, NAN, NAN)
        assert "the scores are a dict: must be a list with a number or None a row" in one.last_error


TENSORS = ["torch.tensor([1.0, 2.0])", "[torch.tensor(1), torch.tensor([2.0])]", "torch.tensor([[1.0], [2.0]])"]
TENSORS += ["torch.tensor([1.0, 2.0], requires_grad=True)", "torch.tensor([1, 2], dtype=torch.bfloat16)"]


@pytest.mark.parametrize("given", TENSORS)
def test_tensors_of_a_number_a_row_are_scores(given):
    same(judge(eval(f"lambda completions: {given}", {"torch": torch}))(sampled("a", "b")).score, 1, 2)


@IN_BOTH
def test_a_wrong_number_of_scores_is_asked_again_row_by_row(place, write):
    with make(place, every_row("out += [len(c)] if c else []"), write) as one:
        same(one(sampled("ab", "", "abc")).score, 2, NAN, 3)
        assert one.failures["wrong length"] == 1
        assert one.last_error == "score, row 1: 0 scores for 1 rows"


def test_too_many_scores_are_no_scores():
    one = judge(lambda completions: [1.0, 2.0])

    same(one(sampled("a")).score, NAN)
    assert one.failures["wrong length"] == 1


@IN_BOTH
def test_a_batch_that_fails_whole_but_not_by_rows_loses_no_row_and_says_so(place, write):
    with make(place, "def score(completions):\n    return [5.0]\n", write) as one:
        same(one(sampled("a", "b")).score, 5, 5)
        assert sum(one.failures.values()) == 0
        assert one.last_error == "score, asked again row by row: 1 scores for 2 rows"


def test_rows_that_go_missing_in_a_new_way_are_reported_once():
    def score(completions):
        return [None if text == "none" else float(text) for text in completions]

    one = judge(score)
    line = score.__code__.co_firstlineno + 1
    one(sampled("1", "x", "y"))
    assert one.reports == [
        f"reward score gave 2 of 3 completions no score (2 raised; the first: score, row 1: ValueError: could not convert "
        f"string to float: 'x' (test_reward_sum.py, line {line})): they are missing, which is not 0"
    ]
    one(sampled("x", "2"))
    assert len(one.reports) == 1
    one(sampled("2", "none"))
    assert one.reports[1:] == [
        "reward score gave 1 of 2 completions no score (1 none): they are missing, which is not 0"
    ]


def test_a_batch_that_is_asked_again_row_by_row_is_reported():
    one = judge(lambda completions: [5.0])
    one(sampled("a", "b"))
    one(sampled("a", "b"))

    assert one.reports == [
        "reward lambda, asked again row by row: 1 scores for 2 rows; that is slower, and no score is lost"
    ]


def test_an_error_inside_a_library_is_placed_in_the_users_file(write):
    with make("a worker", "import json\ndef score(completions):\n    return [json.loads('{')]\n", write) as one:
        one(sampled("a"))
        assert one.last_error.endswith("(reward.py, line 3)")


def test_failures_add_up_over_batches():
    with judge(lambda completions: [None] * len(completions)) as one:
        one(sampled("a", "b"))
        one(sampled("c"))

    assert one.failures["none"] == 3


def test_a_fault_is_not_counted_again_in_the_next_batch():
    one = judge(lambda completions: [float(text) for text in completions])
    one(sampled("1", "x"))
    one(sampled("1", "nan"))

    assert one.failures["raised"] == 1 and one.failures["nan"] == 1


def test_none_is_an_answer_and_no_error():
    one = judge(lambda completions: [None])
    one(sampled("a"))

    assert one.last_error == ""


def test_a_function_that_spoils_its_lists_spoils_only_its_own():
    rows = sampled("a", "b")

    def score(completions):
        completions.pop()
        raise ValueError

    judge(score)(rows)
    assert rows.completions == ["a", "b"]


def test_an_interrupt_is_not_taken_for_a_bad_row():
    def score(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(score)(sampled("a"))


def test_a_function_of_this_process_that_exits_ends_it():
    with pytest.raises(SystemExit, match="4"):
        judge(lambda completions: sys.exit(4))(sampled("a"))


def test_a_row_that_hangs_is_ended_and_the_others_are_scored(write):
    with judge(write(every_row("time.sleep(60 * (c == 'hang')); " + LENGTHS)), timeout=0.8) as one:
        same(one(sampled("ab", "hang", "abc")).score, 2, NAN, 3)
        assert one.failures["timeout"] == 1
        assert one.last_error == "score, row 1: no answer within 0.267 s"
        same(one(sampled("abcd")).score, 4)


def test_a_row_that_hangs_without_letting_go_of_the_interpreter_is_ended(write):
    # (a+)+$ backtracks 2^40 times, in C
    body = "import re\ndef score(completions):\n    return [bool(re.match('(a+)+$', c)) for c in completions]\n"
    with judge(write(body), timeout=0.5) as one:
        same(one(sampled("a" * 40 + "b", "aa")).score, NAN, 1)


def test_rows_are_given_up_after_so_many_that_hang(write):
    asked = []

    class Late(worker.InProcess):
        def call(self, columns, timeout_fraction=1.0):
            asked.append(len(columns["completions"]))
            raise worker.FunctionFault("timeout", "late")

    one = RewardSum([("a", 1.0, FunctionReward(Late(lambda **columns: []), "a"))])
    verdict = one(sampled(*"abcdefghijkl"))

    assert asked == [12] + [1] * MAX_HANGING_ROWS
    assert verdict.score.isnan().all() and one.failures["timeout"] == 12


def test_a_batch_of_one_that_hangs_is_not_asked_twice(write, tmp_path):
    log = tmp_path / "log"
    with judge(write(every_row(f"open({str(log)!r}, 'a').write('x'); time.sleep(60)")), timeout=0.3) as one:
        same(one(sampled("a")).score, NAN)

    assert log.read_text() == "x"


def test_what_a_late_function_started_ends_with_it(write, tmp_path):
    log = tmp_path / "pid"
    line = (
        f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(log)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    with judge(write(every_row(line)), timeout=0.6) as one:
        same(one(sampled("a")).score, NAN)

    assert gone(int(log.read_text()))


CHILDREN = {  # what a child that a function forks does
    "answers too": "",
    "ends": "os._exit(0)",
    "ends as programs do": "sys.exit(0)",
    "stays": "time.sleep(60)",
}


@needs_proc
@pytest.mark.parametrize("what", CHILDREN)
def test_a_function_that_forks_is_answered_for_by_its_parent_alone(write, tmp_path, what):
    body = (
        "import os, sys, time\ndef score(completions):\n    parent, child = os.getpid(), os.fork()\n"
        f"    if not child:\n        {CHILDREN[what] or 'return [-1.0] * len(completions)'}\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child))\n"
        "    return [len(c) for c in completions]\n"
    )
    with judge(write(body), timeout=5.0) as one:
        same(one(sampled("a", "abc")).score, 1, 3)
        same(one(sampled("ab", "")).score, 2, 0)

    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("end, why", [("os._exit(9)", "exit code 9"), ("os.kill(os.getpid(), 9)", "exit code -9")])
def test_a_row_that_ends_the_process_is_missing_and_the_others_are_scored(write, end, why):
    with judge(write(every_row(f"c or {end}; {LENGTHS}"))) as one:
        same(one(sampled("ab", "", "abc")).score, 2, NAN, 3)
        assert one.failures["raised"] == 1 and why in one.last_error


def test_a_row_that_raises_system_exit_is_missing(write):
    with judge(write(every_row(f"c or sys.exit(2); {LENGTHS}"))) as one:
        same(one(sampled("ab", "")).score, 2, NAN)
        assert "row 1: SystemExit: 2 (reward.py, line 5)" in one.last_error


def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next(write):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with judge(write(every_row("time.sleep(len(c) / 10); " + LENGTHS))) as one:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                one(sampled("four"))
            same(one(sampled("a")).score, 1)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_worker_that_died_between_batches_is_started_again(write):
    with judge(write("import os\ndef score(completions):\n    return [os.getpid() % 1000]\n")) as one:
        first = one(sampled("a")).score
        part = one.terms["score"][1]
        os.kill(part.asked._process.pid, signal.SIGKILL)
        time.sleep(0.1)
        second = one(sampled("a")).score

    assert not second.isnan() and first != second


GARBAGE = {  # what a function writes to every descriptor it finds, as Python, and what is said of it
    "no message": ("b'nonsense' * 8", "it begins with b'nonsense'"),
    "a huge length": ("HEAD.pack(MARK, 0, 2**62)", "bytes, more than"),
    "no JSON": ("HEAD.pack(MARK, 2, 4) + b'{]{]'", "it holds b'{]{]'"),
    "nested JSON": ("HEAD.pack(MARK, 2, 10**5) + b'[' * 10**5", "it holds b'[[[["),
    "another request's answer": ("frame(99, {'answer': [1.0]})", "it answers request 99"),
    "no object": ("frame(number, [1])", "no object"),
    "text for scores": ("frame(number, {'answer': ['1']})", "it has no scores"),
    "a whole number of 5,000 digits": ("HEAD.pack(MARK, 2, 5000) + b'9' * 5000", "it holds b'999"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_row_whose_answer_is_garbled_is_missing_and_the_others_are_scored(write, what):
    payload, why = GARBAGE[what]
    body = (
        "import json, os, struct\nHEAD, MARK = struct.Struct('<4sQQ'), b'\\x93und'\nasked = 0\n"
        "def frame(number, message):\n"
        "    text = json.dumps(message).encode()\n    return HEAD.pack(MARK, number, len(text)) + text\n"
        "def score(completions):\n    global asked\n    asked += 1\n    number = asked\n"
        "    for fd in range(3, 32) if 'bad' in completions else ():\n        try:\n"
        f"            os.write(fd, {payload})\n        except OSError:\n            pass\n"
        "    return [len(c) for c in completions]\n"
    )
    with judge(write(body)) as one:
        same(one(sampled("ab", "bad")).score, 2, NAN)
        assert one.failures["garbled"] == 1
        assert "wrote what is no answer" in one.last_error and why in one.last_error


def test_rows_are_given_up_after_so_many_garbled_answers():
    asked = []

    class Garbles(worker.InProcess):
        def call(self, columns, timeout_fraction=1.0):
            asked.append(len(columns["completions"]))
            raise worker.FunctionFault("garbled", "nonsense")

    one = RewardSum([("a", 1.0, FunctionReward(Garbles(lambda **columns: []), "a"))])
    one(sampled(*"abcdefghijkl"))

    assert asked == [12] + [1] * MAX_HANGING_ROWS
    assert one.failures["garbled"] == 12


def test_what_a_function_says_of_its_failure_is_bounded(write):
    with judge(write("def score(completions):\n    raise ValueError('x' * 10**6)\n")) as one:
        one(sampled("a"))

    assert 1000 < len(one.last_error) < 3000


ASYNC = "import asyncio\nasync def score(completions):\n    await asyncio.sleep(0)\n"


@IN_BOTH
def test_an_async_function_is_waited_for(place, write):
    with make(place, ASYNC + "    return [len(c) for c in completions]\n", write) as one:
        same(one(sampled("a", "abc")).score, 1, 3)


@IN_BOTH
def test_an_async_function_keeps_its_event_loop_from_batch_to_batch(place, write):
    body = ASYNC + "    global loop\n    same = loop in (None, asyncio.get_running_loop())\n"
    with make(place, body + "    loop = asyncio.get_running_loop()\n    return [same]\nloop = None\n", write) as one:
        same(one(sampled("a")).score, 1)
        same(one(sampled("a")).score, 1)


@IN_BOTH
def test_an_async_function_that_raises_is_missing(place, write):
    with make(place, ASYNC + "    return [1 / len(c) for c in completions]\n", write) as one:
        same(one(sampled("ab", "")).score, 0.5, NAN)
        assert one.failures["raised"] == 1


def test_an_async_function_works_where_a_loop_is_running():
    async def lengths(completions):
        return [len(c) for c in completions]

    async def notebook():
        return judge(lengths)(sampled("ab")).score

    same(asyncio.run(notebook()), 2)


def test_an_async_function_that_never_ends_is_late(write):
    with judge(write(ASYNC + "    await asyncio.sleep(60)\n"), timeout=0.5) as one:
        same(one(sampled("a")).score, NAN)
        assert one.failures["timeout"] == 1


def test_what_a_function_prints_does_not_reach_the_protocol(write, capfd):
    line = "print('hello'); os.write(1, b'raw'); sys.stdout.flush(); os.system('echo shell'); sys.stdin.read(); "
    with judge(write(every_row(line + LENGTHS))) as one:
        same(one(sampled("ab", "abc")).score, 2, 3)
    out, err = capfd.readouterr()

    assert out == ""
    assert "hello" in err and "raw" in err and "shell" in err


def test_a_large_batch_passes_through_the_pipe(write):
    with judge(write(every_row(LENGTHS))) as one:
        same(one(sampled(*["é" * 100_000] * 20)).score, *[100_000] * 20)


# --- the worker's end ---


@needs_proc
def test_closing_a_judge_ends_its_worker(write):
    one = judge(write("import os\ndef score(completions):\n    return [os.getppid()]\n"))
    pid = one.terms["score"][1].asked._process.pid
    one.close()
    one.close()

    assert gone(pid)


@needs_proc
@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_ends_when_its_parent_is_killed(write, tmp_path, busy):
    spec = write("import time\ndef score(completions):\n    time.sleep(60)\n")
    file, _, function = spec.rpartition(":")
    code = (
        "import json, sys, threading, time; sys.path.insert(0, sys.argv[1]); import worker\n"
        "w = worker.Worker(sys.argv[2], sys.argv[3], timeout=60)\n"
        "print(json.dumps(w._process.pid), flush=True)\n"
        + ("w.call({'completions': ['a']})\n" if busy else "time.sleep(60)\n")
    )
    command = [sys.executable, "-c", code, str(Path(worker.__file__).parent), file, function]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid = json.loads(parent.stdout.readline())
        time.sleep(0.2)
        assert not gone(pid, within=0.05)
        parent.kill()

    assert gone(pid)


# --- built-ins ---


def test_length_is_the_number_of_tokens():
    same(judge("length")(sampled("abc", "")).score, 3, 0)


def test_length_with_a_target_is_the_relative_distance_from_it():
    # -|3 - 4| / 4, -|4 - 4| / 4, -|0 - 4| / 4, -|10 - 4| / 4
    same(judge("length:4")(sampled("abc", "abcd", "", "abcdefghij")).score, -0.25, 0, -1, -1.5)


def test_contains_and_regex_are_one_or_zero():
    rows = sampled("Yes please", "no")
    verdict = judge("contains:please", r"regex:^[a-z]+$")(rows)

    same(verdict.terms["contains"], 1, 0)
    same(verdict.terms["regex"], 0, 1)


def test_chat_completions_are_judged_by_their_content():
    chat = ScoringInput([[]], [[{"role": "assistant", "content": "yes please"}]], [[1]], [False], {})

    same(judge("contains:yes please")(chat).score, 1)


def test_exact_compares_with_a_column_and_an_empty_cell_is_missing():
    rows = sampled(" yes\n", "no", "", "x", answer=["yes", "yes ", None, " "], label=["", "no", "", "x"])

    same(judge("exact")(rows).score, 1, 0, NAN, NAN)
    same(judge("exact:label")(rows).score, NAN, 1, NAN, 1)


NUMBERS = [
    ("so it is 1,234.50.", "1234.5", 1),
    ("3 and then 7", "7", 1),
    ("3 and then 7", "3", 0),
    ("-3", "3", 0),
    ("is -3", "-3", 1),
    ("is \u22123", "-3", 1),
    ("10-3", "3", 1),
    ("-$5", "-5", 1),
    ("$5", 5.0, 1),
    (".5", "0.50", 1),
    ("1,2,3", "3", 1),
    ("no number", "3", 0),
    ("42", "6 * 7 = <<6*7=42>>42\n#### 42", 1),
    ("42", "41 #### 42 (of 50)", 1),
    ("#### 42\nLet me check problem 7.", "#### 42", 1),
    ("#### 42 is the answer to problem 7", "42", 1),
    ("7 #### 42", "7", 0),
    ("3/2", "1/2", 0),
    ("3/2", "3/2", 1),
    ("3 / 2", "1.5", 1),
    ("-1.5", "-3/2", 1),
    ("12/4 = 3", "3", 1),
    ("6/4", "3/2", 1),
    ("1/0", "0", 0),
    ("2.5e3", "2,500", 1),
    ("+5", "5", 1),
    ("10 - 3", "3", 1),
    ("so \\boxed{42}, not 7", "42", 1),
    ("\\boxed{7} no, \\boxed{42} as 7 is wrong", "42", 1),
    ("\\boxed{x = \\frac{3}{2}} for 9 apples", "3/2", 1),
    ("\\boxed{-\\dfrac12}", "-0.5", 1),
    ("\\boxed{1{,}234}", "1,234", 1),
    ("1\\,234", "1234", 1),
    ("\\boxed{}", "7", 0),
    ("####", "7", 0),
    ("9" * 6000, "9" * 6000, 1),
    ("70000", "#### 70,000", 1),
    ("3", "none", NAN),
    ("3", None, NAN),
]


@pytest.mark.parametrize("completion, cell, score", NUMBERS)
def test_number_compares_final_numbers(completion, cell, score):
    same(judge("number")(sampled(completion, answer=[cell])).score, score)


@pytest.mark.skipif(not GSM8K.exists(), reason="shared/data/gsm8k is not here")
def test_number_reads_every_answer_of_gsm8k():
    rows = [json.loads(line) for line in next(iter(sorted(GSM8K.glob("*test*")))).read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    finals = [f"The answer is {answer.split('####')[1].strip()}." for answer in answers]

    assert len(rows) == 1319
    same(judge("number")(sampled(*finals, answer=answers)).score, *[1] * 1319)


@pytest.mark.parametrize("spec", ["exact", "number", "exact:label"])
def test_a_built_in_without_its_column_is_refused(spec):
    with pytest.raises(
        RequestError, match=r"the data have no column '(answer|label)', only text; name one .*--columns"
    ):
        judge(spec)(sampled("a", text=["b"]))


def test_a_refusal_while_scoring_names_the_field_too():
    with pytest.raises(RequestError, match="gold is 'exact': the data have no column"):
        judge("exact", field="gold")(sampled("a"))


def test_repetition_is_the_share_of_4_grams_seen_before():
    # 1 1 1 1 1 1: three 4-grams, one different; 1..5: two different; 1 2 3: none
    rows = sampled("a", "b", "c", "d", ids=[[1] * 6, [1, 2, 3, 4, 5], [1, 2, 3], []])

    same(judge("repetition")(rows).score, 2 / 3, 0, 0, 0)


def test_distinct_n_counts_n_grams_across_rows():
    # 2-grams: 12 23 | 12 24 | none: 3 different of 4
    assert distinct_n([[1, 2, 3], [1, 2, 4], [5]], 2) == 3 / 4
    assert distinct_n([[1], []], 2) == 0
