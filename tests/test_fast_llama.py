"""Llama-like trunks in few operations: the same function as Hugging Face's modules, forwards and backwards."""

import pytest
import torch
from torch.testing import assert_close

from tests.models import LEAN, V, tiny, tiny_lean
from understudy.batch import TokenBatch
from understudy.language.fast import llama as lean_module
from understudy.language.fast.llama import (
    _flat_index,
    _GatherAndRotate,
    _group_rows_by_length,
    _RMSNorm,
    build_fast_llama,
)
from understudy.language.model.forward import compute_hidden_states
from understudy.language.model.policy import Policy


def rows(T: int = 13) -> TokenBatch:
    """Rows of many lengths, pad ids among them; one is chosen in with a gap, one at its end alone."""
    mask = torch.zeros(5, T, dtype=torch.bool)
    mask[0, 2:9] = mask[1, 2:5] = mask[1, 7:10] = mask[2, : T - 1] = mask[3, 2:3] = mask[4, T - 1] = True
    return TokenBatch(torch.randint(V, mask.shape, generator=torch.Generator().manual_seed(3)), mask)


def read_and_pulled(trunk, text: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states at the chosen columns, and every parameter's gradient of a sum over them with random weights."""
    trunk.zero_grad()
    hidden = compute_hidden_states(trunk, text)[text.mask]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden * weight).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in trunk.named_parameters()}


@pytest.mark.parametrize("family", LEAN)
@pytest.mark.parametrize("short", [lean_module.MAX_STORED_ATTENTION_WEIGHTS, 0])
def test_rows_are_read_and_learned_from_as_by_the_modules(family, short, monkeypatch):
    monkeypatch.setattr(lean_module, "MAX_STORED_ATTENTION_WEIGHTS", short)  # 0: attention by torch's fused function
    trunk, seen = tiny_lean(family).base_model, []
    ours, our_pull = read_and_pulled(trunk, rows())
    trunk.layers[0].register_forward_hook(lambda *_: seen.append(1))  # who watches gets to see
    theirs, their_pull = read_and_pulled(trunk, rows())

    assert seen == [1]  # the second time alone
    assert_close(ours, theirs, atol=2e-5, rtol=1e-5)  # float32, another order of sums
    for name, pull in their_pull.items():
        near = 1e-4 + 1e-5 * float(pull.abs().max())  # the key's bias has a gradient of rounding alone
        assert_close(our_pull[name], pull, atol=near, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_what_answers_to_one_prompt_have_alike_is_read_once(monkeypatch):
    text, read_at_once = rows(), []
    ids = text.ids.clone()
    ids[1, :3], ids[3, :3] = ids[0, :3], ids[0, :3]  # of three rows, the columns up to the first choice
    text = TokenBatch(ids, text.mask)
    monkeypatch.setattr(lean_module, "round_up_rows", lambda n: read_at_once.append(n) or n)
    trunk = tiny_lean("qwen2").base_model
    ours, our_pull = read_and_pulled(trunk, text)
    trunk.layers[0].register_forward_hook(lambda *_: None)
    theirs, their_pull = read_and_pulled(trunk, text)

    # 10 + 11 + 13 + 4 + 13 columns are needed, less 3 of each of two rows
    assert read_at_once[0] == 51 - 6
    assert_close(ours, theirs, atol=2e-5, rtol=1e-5)  # float32, another order of sums
    for name, pull in their_pull.items():
        assert_close(our_pull[name], pull, atol=1e-4 + 1e-5 * float(pull.abs().max()), rtol=0)


def test_what_nobody_asks_about_is_zero():
    text = rows()
    hidden = compute_hidden_states(tiny_lean("llama").base_model, text)

    asked = torch.zeros_like(text.mask)
    asked[0, 2:10] = asked[1, 2:11] = asked[2] = asked[3, 2:4] = asked[4, -1] = (
        True  # one column beyond the last choice
    )
    assert (hidden.abs().sum(dim=-1) > 0).equal(asked)


def test_rows_of_which_nothing_is_asked_are_no_trouble():
    text = rows()
    nothing = TokenBatch(text.ids, torch.zeros_like(text.mask))

    assert not compute_hidden_states(tiny_lean("llama").base_model, nothing).any()


def test_what_is_not_known_to_be_simple_goes_through_its_modules():
    def changed(change):
        trunk = tiny("llama").base_model
        change(trunk)
        return build_fast_llama(trunk)

    class Adapted(torch.nn.Linear): ...

    assert all(build_fast_llama(tiny(family).base_model) is None for family in ("gpt2", "gemma2", "gemma3"))
    assert changed(lambda trunk: setattr(trunk.layers[1].mlp, "up_proj", Adapted(16, 24, bias=False))) is None
    assert changed(lambda trunk: setattr(trunk.layers[1].mlp, "up_proj", torch.nn.Linear(16, 24))) is None  # a bias
    assert changed(lambda trunk: setattr(trunk.layers[0], "forward", trunk.layers[1].forward)) is None
    assert changed(lambda trunk: setattr(trunk.rotary_emb, "rope_type", "dynamic")) is None
    assert changed(lambda trunk: setattr(trunk, "layers", trunk.layers[:1])) is None
    assert changed(lambda trunk: setattr(trunk, "embed_tokens", Adapted(16, V))) is None
    assert changed(lambda trunk: None) is not None


def test_half_precision_and_recomputed_activations_go_through_the_modules():
    trunk = tiny("llama").base_model

    assert build_fast_llama(trunk, for_whole_rows=True) is not None
    trunk.bfloat16()
    assert build_fast_llama(trunk) is not None  # token by token it is all the same
    assert build_fast_llama(trunk, for_whole_rows=True) is None
    trunk.float().gradient_checkpointing = True  # as Hugging Face marks it
    assert build_fast_llama(trunk, for_whole_rows=True) is None


def test_a_trunk_that_is_read_wrongly_is_found_out_before_a_run(monkeypatch):
    monkeypatch.setattr(lean_module, "_bmm_attention", lambda queries, keys, values, mask: queries)
    policy = Policy(tiny_lean("llama"))
    policy.verify_separable_head([[1, 5, 9]])

    assert not policy.is_head_separable and not policy.uses_own_kv_cache
    assert "nats from this model's own log-probs" in policy.warnings[0]


def test_the_gradients_by_hand_are_those_by_differences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    joint = torch.randn(3, 2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    turning = torch.randn(2, 5, 2, dtype=torch.complex128, generator=generator)
    rows = torch.tensor([0, 5]), torch.tensor([5, 4]), 2 * 3  # two groups, of one row of 5 columns and one of 4
    laid = _flat_index(torch.tensor([0, 0, 1]), torch.tensor([0, 4, 2]), *rows)
    again = _flat_index(torch.tensor([1]), torch.tensor([0]), *rows)  # the first token stands there too
    shapes = [(2, 5), (2, 4)]
    taken = (
        torch.zeros(54, dtype=torch.long).index_copy_(0, laid, torch.arange(18)).index_copy_(0, again, torch.arange(6))
    )
    there = torch.zeros(54, 1).index_fill_(0, torch.cat((laid, again)), 1.0).double()  # nothing is asked of padding

    def turned(joint):
        parts = _GatherAndRotate.apply(joint, taken, laid, again, shapes, turning)
        groups = (torch.cat([x.reshape(2, -1, parts[i].shape[2], 4) for x in parts[i : i + 3]], 1) for i in (0, 3))
        return torch.cat([group.reshape(-1, 4) for group in groups]) * there

    assert torch.autograd.gradcheck(lambda x: _RMSNorm.apply(x, 0.1), x)
    assert torch.autograd.gradcheck(turned, joint)


def test_a_token_is_turned_by_its_place_in_its_row():
    # one token of one head, one query, D = 2, at column 1 of 2, by 90 degrees: (3, 4) -> (-4, 3); the value stays
    joint = torch.tensor([[[[3.0, 4.0], [1.0, 0.0], [5.0, 6.0]]]])
    turning = torch.tensor([[[1], [1j]]] * 2)
    laid = _flat_index(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([2]), 3)

    query, key, value = _GatherAndRotate.apply(
        joint, torch.tensor([0, 0, 0, 1, 0, 2]), laid, laid[:0], [(1, 2)], turning
    )

    assert laid.tolist() == [1, 3, 5]
    assert query[0, :, 1].tolist() == [[-4.0, 3.0]]
    assert (key[0, 1].tolist(), value[0, 1].tolist()) == ([0.0, 1.0], [5.0, 6.0])


def test_rows_attend_with_those_that_are_at_least_three_quarters_as_long():
    # 8 * 3/4 = 6: the row of 6 is with it, that of 5 is not; the row that needs nothing is nowhere
    assert _group_rows_by_length([5, 8, 0, 6, 4]) == [([1, 3], 8), ([0, 4], 5)]
