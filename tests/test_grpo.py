"""GRPO, REINFORCE and DPO on language models: what groups and baselines do, by hand; which rows learn, in tiny runs."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.rehearsed import furnish
from understudy.language import dpo, grpo, reinforce, toy_language
from understudy.language.data.records import Preference
from understudy.language.model.policy import Policy
from understudy.language.rlhf import RLHFModels, compute_rewards
from understudy.language.rollout.generate import Completion
from understudy.language.sft import load_policy
from understudy.language.training import hold_out
from understudy.objective import cispo, gspo

FEW = {
    "completions_per_iteration": 8,
    "max_new_tokens": 6,
    "total_tokens": 60,
    "preflight": False,
    "quiet": True,
    "log_samples": 0,
    "evaluate_rows": 4,
}
NAN = float("nan")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("grpo"))


def by_length(prompts, completions, completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def alike(prompts, **_):
    return [1.0] * len(prompts)


def config(kind, home, out=None, **fields):
    given = {"model": str(home), "data": str(home / "prompts.jsonl"), "reward": by_length, **FEW, **fields}
    return kind.Config(output_dir=str(out) if out else None, **given)


def weights(run) -> dict:
    return load_file(run.path / "policy" / "model.safetensors")


def test_an_answer_is_compared_with_its_own_group():
    # groups (1, 3) and (10, 10): -1 and 1 over a deviation of sqrt 2; nothing to tell apart in the second
    score, group = torch.tensor([1.0, 3, 10, 10]), torch.tensor([0, 0, 1, 1])
    there = torch.ones(4, dtype=torch.bool)

    plain = grpo.group_advantage(score, group, there, scale_by_std=False)
    scaled = grpo.group_advantage(score, group, there, scale_by_std=True)
    assert_close(plain, torch.tensor([-1.0, 1, 0, 0]))
    assert_close(scaled, torch.tensor([-1.0, 1, 0, 0]) / (2**0.5 + 1e-4))


def test_an_answer_without_a_score_is_nobodys_measure():
    # 5 is not there: 1 and 3 are compared with each other alone
    there = torch.tensor([True, True, False])
    found = grpo.group_advantage(torch.tensor([1.0, 3, 5]), torch.zeros(3).long(), there, scale_by_std=False)

    assert_close(found, torch.tensor([-1.0, 1, 0]))


def test_overlong_shaping_counts_from_the_limit(home):
    said = SimpleNamespace(completions=[Completion([1] * n, [0.0] * n, True, 0) for n in (2, 4, 5, 6)])

    # limit 6, margin 4: nothing up to 2, then a quarter a token
    assert_close(grpo.length_penalty(said, config(grpo, home, overlong=4)), torch.tensor([0, -0.5, -0.75, -1.0]))
    assert_close(grpo.length_penalty(said, config(grpo, home)), torch.zeros(4))


@pytest.mark.parametrize(("name", "function"), [("gspo", gspo), ("cispo", cispo)])
def test_the_objective_is_the_one_that_was_named(home, name, function):
    made = grpo.make_objective(config(grpo, home, objective=name, clip=0.1, clip_high=0.3, entropy_coef=0.5), 0.0)

    assert made.func is function
    assert (made.keywords["low"], made.keywords["high"], made.keywords["entropy_coef"]) == (0.1, 0.3, 0.5)


def test_one_bound_serves_for_both_where_no_other_is_given(home):
    assert grpo.make_objective(config(grpo, home, clip=0.1), 0.0).keywords["high"] == 0.1


def test_a_kl_in_the_loss_costs_what_its_coefficient_says(home):
    assert grpo.make_objective(config(grpo, home), 0.0).keywords["kl_penalty"] is None
    assert grpo.make_objective(config(grpo, home, kl_reference="exact"), 0.1).keywords["kl_penalty"] is not None
    assert grpo.make_objective(config(grpo, home, kl_reference="reward"), 0.1).keywords["kl_penalty"] is None


def test_a_reference_that_nothing_is_held_to_is_looked_at_by_a_quarter_of_the_rows(home):
    fields = {"completions_per_iteration": 8, "group_size": 4, "log_samples": 0}
    cast = RLHFModels(config(grpo, home, **fields))
    with torch.no_grad():
        for parameter in cast.reference.parameters():  # a KL to it is no longer 0
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    said = cast.sampler.collect(cast.policy, range(8), first_row=0)

    def looked(coef, **more):
        record, _, referred = compute_rewards(
            said, torch.zeros(8), cast.reference, coef, config(grpo, home, **fields | more)
        )
        gap = torch.where(referred.mask, record.behavior_logprob - referred.log_prob(record.action), 0.0)
        return referred.mask.any(dim=1).sum(), gap.sum(dim=1)

    (some, few), (every, all_rows) = looked(0.0), looked(0.1)
    assert (some, every) == (2, 8)
    assert_close(few[:2], all_rows[:2])
    assert all_rows.all() and not few[2:].any()
    assert looked(0.0, log_samples=5)[0] == 5
    assert looked(0.0, kl_reference_target=1.0)[0] == looked(0.0, constraint=("kl_reference<=1:warn",))[0] == 8


def test_groups_that_all_score_the_same_teach_nothing_and_are_counted(home, tmp_path):
    run = grpo.train(config(grpo, home, tmp_path / "run", reward=alike, group_size=4))

    assert all(line["groups_without_signal"] == 1.0 for line in run.metrics)
    before = Policy.from_pretrained(home).model.state_dict()
    assert all(torch.equal(before[name], x) for name, x in weights(run).items())


def test_groups_that_all_score_the_same_are_replaced(home):
    """Every second prompt's answers score the same; with `resample` the groups that are kept are of the others."""
    seen = {}

    def picky(prompts, completion_ids, **_):
        numbers = [seen.setdefault(prompt, len(seen)) for prompt in prompts]
        return [
            float(len(ids) + i) if n % 2 else 0.0
            for i, (n, ids) in enumerate(zip(numbers, completion_ids, strict=True))
        ]

    found = {}
    for resample in (0, 6):
        seen.clear()
        cfg = config(grpo, home, reward=picky, group_size=2, dynamic_sampling_rounds=resample)
        cast = RLHFModels(cfg)
        run = SimpleNamespace(rows=0, steps=0)

        def next_rows(num_data_rows, num_rows, *, num_repeats, run=run):
            run.rows += num_rows * num_repeats
            return [row // num_repeats % num_data_rows for row in range(run.rows - num_rows * num_repeats, run.rows)]

        run.next_rows = next_rows
        said, verdict, equal = grpo.sample_groups(run, cast, cfg)
        assert len(said.completions) == len(verdict.score) == 8
        found[resample] = (verdict.score.view(4, 2).std(dim=1) > 0).tolist(), equal
    assert not all(found[0][0]) and found[0][1] > 0
    assert all(found[6][0])


def test_what_weighs_the_same_changes_what_is_learned(home, tmp_path):
    """Answers of many lengths, since half of all tokens end one."""

    def first(completion_ids, **_):
        return [float(ids[0]) for ids in completion_ids]

    fields = {"group_size": 4, "learning_rate": 1e-3, "stop": tuple(map(str, range(20, 100))), "reward": first}
    runs = [
        weights(grpo.train(config(grpo, home, tmp_path / a, loss_aggregation=a, **fields)))
        for a in ("sequence_mean_token_mean", "token_mean", "token_sum_over_budget")
    ]

    name = "model.norm.weight"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(runs[one][name], runs[other][name])


def test_passes_and_minibatches_are_what_was_asked_for(home, tmp_path):
    run = grpo.train(config(grpo, home, tmp_path / "run", group_size=4, num_epochs=3, num_minibatches=2))

    assert all((line["epochs"], line["optimizer_steps"]) == (3, 6) for line in run.metrics)


def test_grpo_teaches_the_words_it_is_paid_for_and_noise_does_not(home, tmp_path):
    def words(completion_ids, **_):
        return [sum(i < 60 for i in ids) / len(ids) for ids in completion_ids]

    def noise(completion_ids, **_):
        return [float(torch.rand((), generator=torch.Generator().manual_seed(sum(ids)))) for ids in completion_ids]

    shares = {}
    for reward in (words, noise):
        cfg = config(
            grpo,
            home,
            tmp_path / reward.__name__,
            reward=reward,
            gold=words,
            fixed_length=6,
            group_size=8,
            completions_per_iteration=64,
            learning_rate=1e-2,
            num_epochs=2,
            num_minibatches=2,
            total_tokens=64 * 6 * 15,
        )
        shares[reward.__name__] = grpo.train(cfg).metrics[-1]["gold_mean"]
    assert shares["words"] > 0.8
    assert shares["noise"] < 0.6  # chance is 60 / 177 = 0.34, from which noise leads to no place of its own


TO_GO = torch.tensor([[3.0, 2], [1, 0], [5, 4], [7, 0]])
MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]).bool()
SCORE = torch.tensor([3.0, 1, 5, 7])


def baseline(home, name, **fields):
    cfg = config(reinforce, home, baseline=name, group_size=2, **fields)
    there = torch.ones(4, dtype=torch.bool)
    return reinforce.subtract_baseline(TO_GO, SCORE, there, MASK, 2.5, cfg)


def test_baselines_by_hand(home):
    assert_close(baseline(home, "none"), torch.tensor([[3.0, 2], [1, 0], [5, 4], [7, 0]]))
    assert_close(baseline(home, "moving"), torch.tensor([[0.5, -0.5], [-1.5, 0], [2.5, 1.5], [4.5, 0]]))
    # groups (3, 1) and (5, 7): each minus the other, at every chosen token
    assert_close(baseline(home, "leave_one_out"), torch.tensor([[2.0, 2], [-2, 0], [-2, -2], [2, 0]]))
    # the six tokens 3 2 1 5 4 7: mean 22 / 6, deviation sqrt(sum of squares 23.333 / 5) = 2.1602
    whitened = torch.where(MASK, (TO_GO - 22 / 6) / 2.160247, 0.0)
    assert_close(baseline(home, "standardize"), whitened)


def test_a_moving_baseline_follows_the_scores(home, tmp_path):
    fields = {
        "baseline": "moving",
        "baseline_decay": 0.5,
        "fixed_length": 4,
        "kl_reference_coef": 0.0,
        "total_tokens": 96,
    }
    counter = iter(range(100))

    def rising(prompts, **_):
        return [float(next(counter) // 8)] * len(prompts)

    run = reinforce.train(config(reinforce, home, tmp_path / "run", reward=rising, **fields))
    # scores 0, 1, 2 an iteration (8 calls' worth each); the baseline: its own mean at first, then half the way
    means = [line["score_mean"] for line in run.metrics]
    expected = [means[0], means[0], 0.5 * means[0] + 0.5 * means[1]]
    assert [line["baseline"] for line in run.metrics] == pytest.approx(expected)


def test_a_discount_makes_early_tokens_answer_for_less(home, tmp_path):
    fields = {"baseline": "none", "fixed_length": 4, "learning_rate": 1e-3, "kl_reference_coef": 0.0}
    runs = [reinforce.train(config(reinforce, home, tmp_path / str(g), gamma=g, **fields)) for g in (1.0, 0.1)]

    assert runs[1].metrics[0]["policy_loss"] < runs[0].metrics[0]["policy_loss"]


def test_an_entropy_bonus_is_taken_off_the_loss(home, tmp_path):
    fields = {"baseline": "standardize", "kl_reference_coef": 0.0, "total_tokens": 6}
    runs = [
        reinforce.train(config(reinforce, home, tmp_path / str(e), entropy_coef=e, **fields)).metrics[0]
        for e in (0.0, 0.5)
    ]

    assert runs[1]["loss"] == pytest.approx(runs[0]["loss"] - 0.5 * runs[0]["entropy"], abs=1e-4)


PAIR = Preference((1, 5, 6, 7, 2), (1, 5, 8, 2), 0.0, 1)


def test_what_both_sides_begin_with_is_left_out_of_the_sums():
    pairs = dpo.collate([PAIR])

    assert dpo.shared_prefix_length(PAIR) == 2
    assert pairs.chosen.mask.long().tolist() == [[0, 1, 1, 1, 0]]
    assert pairs.rejected.mask.long().tolist() == [[0, 1, 1, 0]]


def test_the_reference_is_summed_over_what_tells_the_sides_apart(home):
    policy = Policy.from_pretrained(home)
    found = dpo.compute_pair_logprobs(policy, [PAIR])

    logp = policy.model(torch.tensor([PAIR.chosen])).logits.log_softmax(-1)[0]
    assert_close(found[0, 0], sum(logp[t, PAIR.chosen[t + 1]] for t in (1, 2, 3)).detach())


def dpo_config(home, out, **fields):
    given = {
        "model": str(home),
        "data": str(home / "preferences.jsonl"),
        "output_dir": str(out),
        "quiet": True,
    } | fields
    return dpo.Config(batch_size=8, held_out=8, **given)


def test_at_first_nothing_is_preferred_and_then_the_chosen_side_gains(home, tmp_path):
    run = dpo.train(dpo_config(home, tmp_path / "run", learning_rate=1e-3, num_epochs=3))

    first, last = run.metrics[0], run.metrics[-1]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: policy and reference are one
    assert last["chosen_logratio"] > last["rejected_gain"]
    assert (run.path / "evaluation.json").exists()


def test_dpo_learns_from_every_pair_once_an_epoch(home, tmp_path):
    run = dpo.train(dpo_config(home, tmp_path / "run", num_epochs=2))

    # 40 pairs, of which 8 are kept: 32 an epoch, in minibatches of 8; with minibatches of 20 there are 12 left
    assert run.metrics[-1]["rows"] == 64
    other = dpo.train(dataclasses.replace(dpo_config(home, tmp_path / "other", num_epochs=2), batch_size=20))
    assert [line["rows"] for line in other.metrics] == [20, 32, 52, 64]
    assert other.metrics[-1]["steps"] == run.metrics[-1]["steps"]


def test_the_form_the_price_and_the_smoothing_reach_the_loss(home, tmp_path):
    made = dpo.make_objective(dpo_config(home, tmp_path, loss_type="ipo", beta=0.2, label_smoothing=0.1))

    assert isinstance(made, partial)
    assert made.keywords == {"beta": 0.2, "label_smoothing": 0.1, "loss_type": "ipo"}


def test_dpo_keeps_the_pairs_of_a_prompt_together(home, tmp_path):
    rows = [
        {"prompt": f"the {name}", "chosen": f" {verb} .", "rejected": " sneered ."}
        for name in toy_language.WORDS["someone"]
        for verb in ("smiled", "laughed", "sang")
    ]
    cfg = dpo_config(home, tmp_path, data=str(toy_language.write_jsonl(rows, tmp_path / "pairs.jsonl")))

    learned, kept = dpo.load_preferences(load_policy(cfg), cfg)

    assert (len(learned), len(kept)) == (39, 9)  # three prompts of three pairs: the first count over held_out, 8
    assert {pair.prompt for pair in learned}.isdisjoint(pair.prompt for pair in kept)


def test_a_prompt_of_more_than_a_quarter_of_the_rows_is_learned_from():
    rows = [["one"]] * 20 + [["two"]] * 20 + [["three"]] * 20 + [[f"prompt {i}"] for i in range(8)]

    assert hold_out(rows, 10) == (list(range(60)), list(range(60, 68)))  # 20 of 68 rows are more than 17


def test_dpo_examines_pairs_piece_by_piece_as_it_does_at_once(home, tmp_path, monkeypatch):
    cfg = dpo_config(home, tmp_path)
    policy = load_policy(cfg)
    data = [*dpo.load_preferences(policy, cfg)[0]]
    referred = dpo.compute_pair_logprobs(policy, data) + torch.randn(
        len(data), 2, generator=torch.Generator().manual_seed(0)
    )

    at_once = dpo.evaluate_preferences(policy, data, referred, dpo.make_objective(cfg))
    monkeypatch.setattr(dpo, "EVALUATION_BATCH_SIZE", 3)

    assert len(data) % 3
    assert dpo.evaluate_preferences(policy, data, referred, dpo.make_objective(cfg)) == pytest.approx(at_once, abs=1e-5)


def test_dpo_says_how_many_rows_were_too_long(home, tmp_path):
    run = dpo.train(dpo_config(home, tmp_path / "run", too_long="skip", max_length=14))

    assert "left out as too long" in (run.path / "events.jsonl").read_text()


def test_a_reference_of_its_own_is_where_dpo_measures_from(home, tmp_path):
    start = dpo.train(dpo_config(home, tmp_path / "start", learning_rate=1e-3))
    cfg = dpo_config(tmp_path / "start", tmp_path / "run", reference=str(home), data=str(home / "preferences.jsonl"))

    assert dpo.train(cfg).metrics[0]["loss"] != pytest.approx(0.6931472, abs=1e-4)
    assert start.metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_batch_without_scores_leaves_a_moving_baseline(home, tmp_path):
    calls = iter(range(100))

    def sometimes(prompts, **_):
        return [None if next(calls) in range(8, 16) else 2.0 for _ in prompts]

    fields = {"baseline": "moving", "baseline_decay": 0.5, "fixed_length": 4, "kl_reference_coef": 0.0}
    cfg = config(reinforce, home, tmp_path / "run", reward=sometimes, total_tokens=96, preflight=False, **fields)

    assert [line["baseline"] for line in reinforce.train(cfg).metrics] == [2.0, 2.0, 2.0]
