"""Any causal LM as a policy: its log-probs are the model's own, whatever stands beside it; save and load."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tests.models import FAMILIES, H, V, tiny
from understudy.batch import TokenBatch
from understudy.language import toy_language
from understudy.language.data.records import Tokenizer
from understudy.language.model.policy import Critic, Policy, Reference, module_digest
from understudy.run.config import RequestError

ROWS = [[1, 5, 9, 3, 17, 4, 8, 2], [1, 7], [3, 3, 20, 11, 6], [1, 12, 13]]
EVERY = pytest.mark.parametrize(("family", "tied"), [(f, t) for f in FAMILIES for t in (False, True)])


def padded(rows=ROWS, fill=0, extra=0):
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    mask = torch.tensor([[t < len(row) - 1 for t in range(width)] for row in rows])
    return TokenBatch(ids, mask)


def unpadded_truth(model, row, temperature=1.0):
    """log_softmax of the model's own logits for a row alone: log-probs of each next token."""
    logp = (model(torch.tensor([row])).logits[0].float() / temperature).log_softmax(dim=-1)
    return logp[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]


@EVERY
@pytest.mark.parametrize("packing", [False, True], ids=["apart", "packed"])
def test_log_probs_are_the_models_own_on_rows_without_padding(family, tied, packing, tmp_path):
    tiny(family, tied=tied).save_pretrained(tmp_path)
    policy = Policy.from_pretrained(tmp_path, packing=packing)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    text = padded()

    distribution, _ = policy(text)
    logprob = distribution.log_prob(text.action)

    assert policy.is_head_separable
    for row, ids in enumerate(ROWS):
        # float32, another order of sums
        assert_close(logprob[row, : len(ids) - 1], unpadded_truth(truth, ids), atol=2e-5, rtol=1e-5)


@EVERY
def test_padding_reaches_nothing(family, tied):
    policy = Policy(tiny(family, tied=tied), Critic(H, None, init="normal"))

    (few, value), (many, other) = policy(padded()), policy(padded(fill=9, extra=5))

    T = padded().ids.shape[1]
    assert_close(many.log_prob(padded(fill=9, extra=5).action)[:, :T], few.log_prob(padded().action))
    assert_close(other[:, :T], value)


@EVERY
def test_gradients_of_packed_rows_are_those_of_rows_apart(family, tied):
    gradients = []
    for packing in (False, True):
        policy = Policy(tiny(family, tied=tied), packing=packing).double()
        text = padded()
        policy(text)[0].log_prob(text.action).double().pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])

    for apart, packed in zip(*gradients, strict=True):
        assert_close(packed, apart, atol=1e-4, rtol=1e-4)  # logits are taken in float32


def test_temperature_is_part_of_the_log_prob():
    model = tiny("llama")
    text = padded([ROWS[0]])

    logprob = Policy(model, temperature=0.7)(text)[0].log_prob(text.action)

    assert_close(logprob[0, :-1], unpadded_truth(model, ROWS[0], temperature=0.7), atol=1e-5, rtol=1e-5)


def test_ids_alone_ask_about_every_column():
    policy = Policy(tiny("llama"))
    ids = torch.tensor([ROWS[0]])

    distribution, value = policy(ids)

    assert_close(distribution.entropy(), torch.distributions.Categorical(logits=policy.model(ids).logits).entropy())
    assert_close(value, torch.zeros(1, 8))


@pytest.mark.parametrize(("critic", "init"), [("shared", "zero"), ("shared", "normal"), ("separate", "normal")])
def test_a_policy_comes_back_as_it_was_saved(critic, init, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    policy = Policy.from_pretrained(tmp_path / "model", critic=critic, critic_init=init, temperature=0.8)
    policy.save(tmp_path / "policy")
    text = padded()

    back = Policy.load(tmp_path / "policy")

    (ours, value), (theirs, other) = policy(text), back(text)
    assert torch.equal(ours.log_prob(text.action), theirs.log_prob(text.action))
    assert torch.equal(value, other)
    assert back.temperature == 0.8


def test_a_saved_policy_is_an_ordinary_model_with_its_temperature_and_stops(tmp_path):
    policy = Policy(tiny("qwen2", tied=True), Critic(H, None), temperature=0.8)
    policy.tokenizer = Tokenizer(toy_language.make_tokenizer(), frozenset([2, 5]))
    policy.save(tmp_path)
    ids = torch.tensor([ROWS[0]])

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert_close(plain(ids).logits, policy.model(ids).logits, atol=1e-5, rtol=0)
    assert plain.generation_config.temperature == 0.8
    assert plain.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize("packing", [False, True], ids=["apart", "packed"])
def test_v_after_the_last_choice_is_there_for_a_cut_row_to_bootstrap_from(packing):
    policy = Policy(tiny("llama"), Critic(H, None, init="normal"), packing=packing)
    text = padded()
    _, everywhere = policy(text.ids)

    _, value = policy(text)
    for row, ids in enumerate(ROWS):
        assert_close(value[row, len(ids) - 1], everywhere[row, len(ids) - 1], atol=1e-5, rtol=1e-5)
        assert float(value[row, len(ids) - 1].detach().abs()) > 1e-3


def test_a_separate_critic_begins_as_a_copy_and_moves_alone(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    policy = Policy.from_pretrained(tmp_path, critic="separate", critic_init="normal")

    policy(padded())[1].sum().backward()

    assert all(p.grad is None for p in policy.model.parameters())
    assert sum(float(p.grad.abs().sum()) for p in policy.critic.parameters() if p.grad is not None) > 0


def test_a_shared_critics_error_reaches_the_trunk():
    policy = Policy(tiny("llama"), Critic(H, None, init="normal"))

    policy(padded())[1].sum().backward()

    assert policy.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_value_head_begins_at_zero_or_with_one_over_root_width():
    torch.manual_seed(0)

    assert torch.equal(Critic(400, None).head.weight, torch.zeros(1, 400))
    # std of 400 draws within 4 standard errors (0.05 / sqrt(800)) of 1 / sqrt(401) = 0.04994
    assert abs(float(Critic(400, None, init="normal").head.weight.detach().std()) - 0.04994) < 0.0071


def test_a_reference_stays_where_it_was_and_says_which_it_is():
    policy = Policy(tiny("llama"))
    reference = Reference(policy)
    before = reference(padded()).log_prob(padded().action)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)

    assert torch.equal(reference(padded()).log_prob(padded().action), before)
    assert reference.digest == module_digest(reference.policy.model) != module_digest(policy.model)


def test_dropout_is_off_in_every_mode():
    model = tiny("gpt2")
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    policy = Policy(model).train()

    assert torch.equal(policy(padded())[0].hidden, policy(padded())[0].hidden)


def test_a_model_whose_logits_are_not_its_heads_runs_through_its_own_and_says_so(monkeypatch):
    model = tiny("llama")
    plain = type(model).forward

    def doubled(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(type(model), "forward", doubled)
    policy = Policy(model, Critic(H, None))
    policy.verify_separable_head([ROWS[0]])
    text = padded([ROWS[0]])

    assert not policy.is_head_separable and not policy.uses_own_kv_cache
    assert_close(policy(text)[0].log_prob(text.action)[0, :-1], unpadded_truth(model, ROWS[0]))
    assert len(policy.warnings) == 1 and "its own logits" in policy.warnings[0]


def test_a_directory_without_a_model_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(RequestError, match=r"model is .*give a directory or hub id"):
        Policy.from_pretrained(tmp_path)


def test_a_model_whose_weights_are_not_finite_is_refused(tmp_path):
    model = tiny("gpt2", tied=False)
    with torch.no_grad():
        model.lm_head.weight[2, 3] = float("nan")
    model.save_pretrained(tmp_path)

    with pytest.raises(RequestError, match=r"model is .*whose weight 'lm_head.weight' is not finite"):
        Policy.from_pretrained(tmp_path)


def test_a_critic_whose_weights_are_not_finite_is_refused(tmp_path):
    model = tiny("gpt2", tied=False)
    policy = Policy(model, critic=Critic(H, None))
    with torch.no_grad():
        policy.critic.head.weight.fill_(float("nan"))
    policy.save(tmp_path)

    with pytest.raises(RequestError, match=r"critic.*whose weight 'head.weight' is not finite"):
        Policy.load(tmp_path)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        policy = Policy.from_pretrained(tmp_path, gradient_checkpointing=checkpointing).train()
        text = padded()
        policy(text)[0].log_prob(text.action).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
        assert policy.model.model.gradient_checkpointing == checkpointing

    for kept, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, kept, atol=1e-4, rtol=1e-4)  # through the modules: another order of sums


@pytest.mark.parametrize("critic", ["none", "shared", "separate", "top"])
def test_v_alone_is_v_beside_the_distribution(tmp_path, critic):
    tiny("llama").save_pretrained(tmp_path)
    policy = Policy.from_pretrained(tmp_path, critic=critic, critic_init="normal")
    text = padded()

    assert torch.equal(policy.value(text), policy(text)[1])


def test_vocabulary_size_is_what_the_head_gives():
    assert Policy(tiny("llama")).head(torch.zeros(1, H)).shape == (1, V)
