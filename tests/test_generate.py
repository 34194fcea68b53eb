"""Generation with our own cache: it says what the model would say, whoever the neighbours are."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.models import FAMILIES, LEAN, WINDOW, V, tiny, tiny_lean
from understudy.language.fast.llama import build_fast_llama
from understudy.language.model.policy import Policy
from understudy.language.model.token_distribution import apply_top_k_top_p
from understudy.language.rollout.generate import Completion, build_trajectory, generate, measure_cache_error

PROMPTS = [[1, 5, 9, 3, 17, 4, 8, 12, 6], [1, 7], [3, 3, 20, 11, 6], [1, 7], [1]]
SEEDS = [11, 12, 13, 14, 15]
STOPS = frozenset([2, 6])
EVERY = pytest.mark.parametrize(("family", "tied"), [(f, t) for f in FAMILIES for t in (False, True)])


@EVERY
def test_the_samplers_log_probs_are_those_of_an_uncached_pass(family, tied):
    assert (
        measure_cache_error(Policy(tiny(family, tied=tied)), PROMPTS, num_tokens=12) < 2e-5
    )  # float32, another order of sums


@EVERY
def test_greedy_tokens_are_hugging_faces(family, tied):
    policy = Policy(tiny(family, tied=tied))

    said = generate(policy, PROMPTS, limit=10, stops=frozenset(), seeds=SEEDS, sample=False)

    for prompt, completion in zip(PROMPTS, said, strict=True):
        theirs = policy.model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert completion.ids == theirs[0, len(prompt) :].tolist()


def test_a_row_says_the_same_whoever_its_neighbours_are():
    policy = Policy(tiny("llama"))
    together = generate(policy, PROMPTS, limit=12, stops=STOPS, seeds=SEEDS)

    for slots in (1, 2, 3):
        queued = generate(policy, PROMPTS, limit=12, stops=STOPS, seeds=SEEDS, max_num_seqs=slots)
        assert [c.ids for c in queued] == [c.ids for c in together]
    alone = [generate(policy, [p], limit=12, stops=STOPS, seeds=[s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert [c.ids for c in alone] == [c.ids for c in together]
    assert len({len(c.ids) for c in together}) > 1  # rows did end at different times


def test_many_rows_through_few_slots_keep_their_log_probs():
    policy = Policy(tiny("gemma3"))
    prompts = [PROMPTS[i % 5] for i in range(23)]

    said = generate(policy, prompts, limit=9, stops=STOPS, seeds=range(23), max_num_seqs=5)

    record = build_trajectory(prompts, said)
    assert_close(policy(record.obs)[0].log_prob(record.action), record.behavior_logprob, atol=2e-5, rtol=0)


@pytest.mark.parametrize("slots", [60, 12])
def test_rows_that_move_up_to_where_others_ended_keep_what_they_read(slots):
    policy = Policy(tiny_lean("qwen2"))
    prompts = [PROMPTS[i % 5] for i in range(60)]

    said = generate(
        policy, prompts, limit=12, stops=STOPS | {0}, seeds=range(60), max_num_seqs=slots
    )  # 0: what idle slots say

    record = build_trajectory(prompts, said)
    assert len({len(c.ids) for c in said}) > 6  # so slots are left one after another
    assert all(c.stopped or len(c.ids) == 12 for c in said)
    assert_close(policy(record.obs)[0].log_prob(record.action), record.behavior_logprob, atol=2e-5, rtol=0)


def test_a_row_ends_at_a_stop_id_and_at_the_limit():
    said = generate(Policy(tiny("llama")), [[1, 7]] * 40, limit=8, stops=STOPS, seeds=range(40))

    for completion in said:
        assert completion.stopped == (completion.ids[-1] in STOPS)
        assert not STOPS & set(completion.ids[:-1])
        assert completion.stopped or len(completion.ids) == 8
    assert 0 < sum(c.stopped for c in said) < 40


@pytest.mark.parametrize("family", LEAN)
@pytest.mark.parametrize("slots", [2, 5])
def test_a_lean_trunk_says_what_its_modules_say(family, slots):
    policy = Policy(tiny_lean(family))
    assert build_fast_llama(policy.model.base_model) is not None
    ours = generate(policy, PROMPTS, limit=24, stops=frozenset([2]), seeds=SEEDS, max_num_seqs=slots)

    seen = []
    policy.model.base_model.layers[0].register_forward_hook(lambda *_: seen.append(1))  # who watches gets to see
    theirs = generate(policy, PROMPTS, limit=24, stops=frozenset([2]), seeds=SEEDS, max_num_seqs=slots)

    assert len(seen) > WINDOW  # once for the prompts, once a token
    assert [c.ids for c in ours] == [c.ids for c in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(torch.tensor(mine.logprob), torch.tensor(its.logprob), atol=2e-5, rtol=0)


def test_sampled_tokens_have_the_models_distribution():
    policy = Policy(tiny("qwen2"), temperature=1.3)
    N = 4000
    said = generate(policy, [[1, 7]] * N, limit=2, stops=frozenset(), seeds=range(N), max_num_seqs=N)
    pairs = torch.tensor([c.ids for c in said])
    with torch.no_grad():
        first = (policy.model(torch.tensor([[1, 7]])).logits[0, -1] / 1.3).softmax(-1)
        prompts = torch.tensor([[1, 7, token] for token in range(V)])
        second = first @ (policy.model(prompts).logits[:, -1] / 1.3).softmax(-1)

    for column, expected in ((0, first), (1, second)):
        counts = torch.bincount(pairs[:, column], minlength=V).double()
        keep = expected * N > 5  # where the chi-square approximation holds; the rest in one cell
        seen = torch.cat([counts[keep], counts[~keep].sum()[None]])
        due = torch.cat([expected[keep], expected[~keep].sum()[None]]).double() * N
        chi_square = float(((seen - due).square() / due.clamp(min=1e-9)).sum())
        assert chi_square < 2 * V  # mean about 21, standard deviation about 6.5: four deviations above


def test_equal_prompts_are_read_once():
    policy = Policy(tiny("llama"))
    policy.uses_own_kv_cache = True
    rows = []
    hook = policy.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(policy, [[1, 7, 4]] * 6 + [[1, 8, 4]] * 6, limit=1, stops=frozenset(), seeds=range(12))
    hook.remove()

    assert rows == [(2, 3)]


def test_without_a_known_cache_hugging_face_generates():
    policy = Policy(tiny("llama"), temperature=0.9)
    policy.uses_own_kv_cache = False

    assert (
        measure_cache_error(policy, [*PROMPTS, [1, 0, 4, 0]], num_tokens=6) < 2e-5
    )  # 0 is the pad id, and a token like any other
    said = generate(policy, PROMPTS, limit=6, stops=STOPS, seeds=SEEDS)
    assert said == generate(policy, PROMPTS, limit=6, stops=STOPS, seeds=SEEDS)
    assert all(c.stopped == (c.ids[-1] in STOPS) for c in said)


def kept(logp: list[float], top_k: int, top_p: float) -> dict[int, float]:
    """The slow reference: tokens from the likeliest on until there are k of them or they reach p of what k would hold."""
    ranked = sorted(range(len(logp)), key=lambda token: -logp[token])[: top_k or len(logp)]
    total, found = sum(math.exp(logp[token]) for token in ranked), {}
    for token in ranked:
        if sum(found.values()) >= top_p * total:
            break
        found[token] = math.exp(logp[token])
    return {token: p / sum(found.values()) for token, p in found.items()}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.4), (8, 0.7), (1, 1.0)])
def test_truncated_samples_are_likely_and_know_the_mass_that_was_kept(top_k, top_p, cached):
    policy = Policy(tiny("llama"), temperature=1.3)
    policy.uses_own_kv_cache = cached

    said = generate(policy, PROMPTS, limit=8, stops=STOPS, seeds=SEEDS, top_k=top_k, top_p=top_p)

    for prompt, completion in zip(PROMPTS, said, strict=True):
        logits = policy.model(torch.tensor([[*prompt, *completion.ids]])).logits[0, len(prompt) - 1 : -1].double()
        for row, token, logprob in zip((logits / 1.3).log_softmax(-1), completion.ids, completion.logprob, strict=True):
            likely = kept(row.tolist(), top_k, top_p)
            assert logprob == pytest.approx(math.log(likely[token]), abs=2e-5)


def test_truncation_keeps_all_by_default_and_breaks_ties_by_number():
    p = torch.tensor([[0.1, 0.4, 0.1, 0.4]])

    assert apply_top_k_top_p(p) is p
    assert_close(apply_top_k_top_p(p, top_k=1), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert_close(apply_top_k_top_p(p, top_k=3), torch.tensor([[1 / 9, 4 / 9, 0.0, 4 / 9]]))
    assert_close(apply_top_k_top_p(p, top_p=0.5), torch.tensor([[0.0, 0.5, 0.0, 0.5]]))  # 0.4 falls short of it


def test_completions_carry_the_version_that_said_them():
    policy = Policy(tiny("llama"))
    policy.version = 7

    assert [c.version for c in generate(policy, [[1]], limit=1, stops=frozenset(), seeds=[0])] == [7]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="no prompt may be empty"):
        generate(Policy(tiny("llama")), [[]], limit=1, stops=frozenset(), seeds=[0])


def test_a_record_is_prompt_then_choices_then_the_last_token():
    # q1 q2 | a1 a2 eos, and q1 | a1 cut by the limit
    record = build_trajectory(
        [[5, 6], [7]], [Completion([8, 9, 2], [-0.1, -0.2, -0.3], True, 0), Completion([8], [-0.4], False, 0)]
    )

    assert record.obs.ids.tolist() == [[5, 6, 8, 9, 2], [7, 8, 0, 0, 0]]
    assert record.action.tolist() == [[6, 8, 9, 2, 0], [8, 0, 0, 0, 0]]
    assert record.mask.long().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert_close(record.behavior_logprob, torch.tensor([[0, -0.1, -0.2, -0.3, 0], [-0.4, 0, 0, 0, 0]]))
    assert record.terminated.nonzero().tolist() == [[0, 3]]
    assert record.truncated.nonzero().tolist() == [[1, 0]]


def test_a_task_without_an_end_terminates_at_its_limit():
    record = build_trajectory([[7]], [Completion([8], [-0.4], False, 0)], has_fixed_length=True)

    assert record.terminated.nonzero().tolist() == [[0, 0]]
    assert not record.truncated.any()


def test_weights_that_are_no_numbers_end_sampling_in_a_sentence():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    policy = Policy(model)
    policy.uses_own_kv_cache = True

    with pytest.raises(FloatingPointError, match="probabilities are no numbers"):
        generate(policy, [[1]], limit=2, stops=frozenset(), seeds=[0])


@pytest.mark.parametrize(("cached", "top_k", "top_p"), [(True, 0, 1.0), (True, 20, 0.9), (False, 20, 0.9)])
def test_tokens_whose_logits_are_minus_infinity_are_never_said(cached, top_k, top_p):
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.arange(15, V), -math.inf))
    policy = Policy(model)
    policy.verify_separable_head(PROMPTS)
    assert policy.is_head_separable and not policy.warnings
    policy.uses_own_kv_cache = cached

    said = generate(
        policy, PROMPTS, limit=12, stops=frozenset(), seeds=SEEDS, top_k=top_k, top_p=top_p, sample=bool(top_k)
    )
    assert all(token < 15 for c in said for token in c.ids)
    assert all(map(math.isfinite, [x for c in said for x in c.logprob]))
