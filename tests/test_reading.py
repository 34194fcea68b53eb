"""Before a model is trained: it is causal and without noise, its rows do not see each other, its sampler is its trainer."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.architectures import make
from tests.models import tiny
from tests.rehearsed import furnish, ppo_config, reward_config, sft_config
from understudy.language import dpo, ppo, reward_model, sft, toy_language
from understudy.language.model.forward import check_forward_consistency, distance
from understudy.language.model.policy import Policy, enable_gradient_checkpointing, module_digest
from understudy.language.model.reward_model import RewardModel
from understudy.language.rollout.generate import build_trajectory, find_sampling_problem, generate, measure_cache_error
from understudy.run.config import RequestError

ROWS = [[1, 5, 9, 3, 17, 4, 8, 12, 6, 11, 7, 5, 13], [1, 7, 4, 4, 9], [3, 11, 20, 6, 8]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a file of data of each kind."""
    return furnish(tmp_path_factory.mktemp("data"))


@pytest.fixture
def saved(tmp_path):
    """Writes a model of an architecture, with the tokenizer of the data, and names its folder."""

    def save(name, **fields) -> Path:
        path = tmp_path / name
        make(name, **fields).save_pretrained(path)
        toy_language.make_tokenizer().save_pretrained(path)
        return path

    return save


# ---- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "falcon", "bloom", "lfm2", "mamba"])
def test_packing_is_refused_where_rows_see_each_other(saved, name):
    policy = Policy.from_pretrained(saved(name), packing=True)

    with pytest.raises(
        RequestError, match=r"packing is True, but a .* lets packed rows see each other: .*; leave packing"
    ):
        check_forward_consistency(policy, ROWS)
    policy.packing = False
    check_forward_consistency(policy, ROWS)


def test_packing_is_refused_for_a_model_that_runs_through_its_own_logits(saved):
    policy = Policy.from_pretrained(saved("modernbert-decoder"), packing=True)

    assert not policy.is_head_separable
    with pytest.raises(
        RequestError, match="packing is True, but a ModernBertDecoderForCausalLM is read through its own"
    ):
        check_forward_consistency(policy, ROWS)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "reward-model", "ppo"])
def test_every_recipe_refuses_packing_where_rows_see_each_other(saved, data, tmp_path, recipe):
    model, out = str(saved("opt")), tmp_path / "run"
    pairs = {"data": str(data / "preferences.jsonl"), "output_dir": str(out), "quiet": True, "packing": True}
    start = {
        "sft": lambda: sft.train(sft_config(data, out, model=model, packing=True)),
        "dpo": lambda: dpo.train(dpo.Config(model=model, **pairs)),
        "reward-model": lambda: reward_model.train(reward_config(data, out, model=model, packing=True)),
        "ppo": lambda: ppo.train(ppo_config(data, out, model=model, packing=True)),
    }

    with pytest.raises(RequestError, match=r"packing is True, but a OPTFor"):
        start[recipe]()
    assert not out.exists()


@pytest.mark.parametrize(("name", "packing"), [("opt", False), ("lfm2", False), ("gpt2", True), ("llama", True)])
def test_dpo_begins_at_the_logarithm_of_two(saved, data, tmp_path, name, packing):
    files = {"model": str(saved(name)), "data": str(data / "preferences.jsonl"), "output_dir": str(tmp_path / "run")}
    run = dpo.train(dpo.Config(**files, learning_rate=1e-12, packing=packing, quiet=True, total_tokens=200))

    # nothing has moved: -log sigmoid(0) = log 2, in every row
    assert [line["loss"] for line in run.metrics] == pytest.approx([0.693147] * len(run.metrics), abs=1e-5)


# ---- causality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "xlnet"])
def test_an_encoder_is_refused(saved, name):
    with pytest.raises(RequestError, match="which is not causal: a later token moves what it says of earlier ones by"):
        Policy.from_pretrained(saved(name))


def test_a_decoder_that_is_told_to_look_ahead_is_refused(saved):
    path = saved("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"is_causal": False}))

    with pytest.raises(RequestError, match="a LlamaForCausalLM, which is not causal"):
        Policy.from_pretrained(path)


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("kind", [Policy, RewardModel])
def test_an_encoder_decoder_is_refused(saved, name, kind):
    with pytest.raises(RequestError, match=rf"an encoder-decoder \({name}\), and only decoders are trained here"):
        kind.from_pretrained(saved(name))


def test_a_reward_model_that_reads_both_ways_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=177, num_labels=1, initializer_range=0.3, pad_token_id=0, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    toy_language.make_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(RequestError, match=r"model is .*BertForSequenceClassification"):
        RewardModel.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    tiny("llama").model.save_pretrained(tmp_path)

    with pytest.raises(RequestError, match=r"holds no weights for lm_head.weight of a LlamaForCausalLM: give a causal"):
        Policy.from_pretrained(tmp_path)


# ---- noise ------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A layer behind which dropout is applied by a function, at a rate with a name of its own."""

    def __init__(self, layer: nn.Module, **rates) -> None:
        super().__init__()
        self.layer = layer
        self.always = rates.pop("always", False)
        vars(self).update(rates)

    def forward(self, x):
        [rate] = [value for value in vars(self).values() if isinstance(value, float)]
        return nn.functional.dropout(self.layer(x), rate, training=self.training or self.always)


def noisy(**rates) -> Policy:
    model = tiny("gpt2")
    model.transformer.h[1].mlp = Noisy(model.transformer.h[1].mlp, **rates)
    return Policy(model)


@pytest.mark.parametrize("rate", ["residual_dropout", "ff_drop", "p"])
def test_dropout_outside_of_a_layer_of_its_own_stays_off(rate):
    policy, truth = noisy(**{rate: 0.5}).train(), Policy(tiny("gpt2"))
    ids = torch.tensor([ROWS[0]])

    check_forward_consistency(policy, ROWS)

    assert_close(policy(ids)[0].entropy(), truth(ids)[0].entropy())


@pytest.mark.parametrize("rates", [{"dropout_rate": 0.5}, {"router_jitter": 0.5}])
def test_rates_are_silenced_where_activations_are_recomputed(rates):
    policy = noisy(**rates)
    enable_gradient_checkpointing(policy.model)
    policy.train()
    ids = torch.tensor([ROWS[0]])

    check_forward_consistency(policy, ROWS)

    assert policy.model.training
    assert_close(policy(ids)[0].entropy(), Policy(tiny("gpt2"))(ids)[0].entropy())


def test_noise_that_cannot_be_silenced_is_refused_by_name():
    with pytest.raises(
        RequestError, match=r"whose transformer.h.1.mlp \(Noisy\) gives other numbers each time it reads"
    ):
        check_forward_consistency(noisy(rate=0.5, always=True), ROWS)


def test_checking_moves_no_generator_and_no_mode():
    policy, before = Policy(tiny("gpt2")).eval(), torch.get_rng_state()

    check_forward_consistency(policy, ROWS)

    assert torch.equal(torch.get_rng_state(), before)
    assert not policy.training and not policy.packing


@pytest.mark.parametrize("name", ["gpt2", "opt", "phimoe", "mixtral"])
def test_a_models_own_dropout_changes_nothing_that_is_learned(saved, name):
    path = saved(name)
    config = json.loads((path / "config.json").read_text())
    rates = {name: 0.5 for name, x in config.items() if isinstance(x, float) and ("drop" in name or "pdrop" in name)}
    (path / "config.json").write_text(json.dumps(config | rates | {"layerdrop": 0.5, "router_jitter_noise": 0.3}))
    policy, truth = Policy.from_pretrained(path).train(), AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([ROWS[0]])

    logprob = policy(ids)[0].log_prob(ids.roll(-1, dims=1))

    expected = truth(ids).logits.log_softmax(dim=-1)[0].gather(1, ids.roll(-1, dims=1)[0, :, None])[:, 0]
    assert_close(logprob[0], expected, atol=2e-5, rtol=1e-5)


# ---- sampling ---------------------------------------------------------------------------------------------------------

SETTINGS = [
    {"min_p": 0.3},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.5},
    {"suppress_tokens": [5, 6, 7, 8, 9]},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.05},
    {"top_k": 3, "top_p": 0.5, "temperature": 0.2},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[5], [6]]},
    {"begin_suppress_tokens": list(range(15))},
    {"forced_eos_token_id": 3},
    {"min_new_tokens": 4, "exponential_decay_length_penalty": (1, 2.0)},
    {"num_beams": 2},
    {"max_length": 3},
    {"guidance_scale": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_sampling_settings_of_a_checkpoint_change_nothing(settings):
    plain, policy = (Policy(tiny("llama"), temperature=0.9) for _ in range(2))
    plain.model.generation_config = GenerationConfig()
    policy.model.generation_config = given = GenerationConfig(**settings)
    plain.uses_own_kv_cache = policy.uses_own_kv_cache = False

    said, expected = (
        generate(one, ROWS, limit=6, stops=frozenset([2]), seeds=range(3), sample=sample)
        for one in (policy, plain)
        for sample in (True,)
    )

    assert said == expected
    assert measure_cache_error(policy, ROWS) < 2e-5  # float32, another order of sums
    assert policy.model.generation_config is given


def test_a_setting_that_reaches_the_sampler_is_noticed(monkeypatch):
    policy = Policy(tiny("llama"))
    policy.uses_own_kv_cache = False
    monkeypatch.setattr(
        type(policy.model),
        "_get_logits_processor",
        lambda *_, **__: transformers.LogitsProcessorList([transformers.MinPLogitsWarper(0.1)]),
    )

    assert measure_cache_error(policy, ROWS) > 1e-3


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_a_saved_policy_has_no_sampling_settings_but_its_own(settings, tmp_path):
    policy = Policy(tiny("llama"), temperature=0.8)
    policy.model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, **settings)
    policy.save(tmp_path)

    written = json.loads((tmp_path / "generation_config.json").read_text())
    written.pop("transformers_version")
    assert written == {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": 2,
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 1.0,
    }


def test_a_model_that_no_sampling_suits_is_refused(saved):
    policy = Policy.from_pretrained(saved("xlstm"))

    with pytest.raises(
        RequestError, match=r"xLSTMForCausalLM, which cannot be sampled from .*: give another, or train it"
    ):
        generate(policy, ROWS, limit=2, stops=frozenset(), seeds=range(3))


@pytest.mark.parametrize("name", ["mpt", "gpt_neo", "bloom", "llama4_text", "lfm2"])
def test_a_model_that_counts_columns_of_our_cache_is_not_sampled_by_it(saved, name):
    policy = Policy.from_pretrained(saved(name))

    said = generate(
        policy, ROWS * 2, limit=5, stops=frozenset([2]), seeds=range(6), max_num_seqs=1
    )  # so the ring comes round

    assert policy.uses_own_kv_cache is False and "the key-value cache " in policy.warnings[-1]
    record = build_trajectory(ROWS * 2, said)
    assert_close(policy(record.obs)[0].log_prob(record.action), record.behavior_logprob, atol=2e-5, rtol=0)


def test_the_cache_is_tried_once_before_the_first_sample(saved):
    policy = Policy.from_pretrained(saved("gpt2"))
    assert policy.uses_own_kv_cache is None

    generate(policy, ROWS, limit=2, stops=frozenset(), seeds=range(3))

    assert policy.uses_own_kv_cache is True and policy.warnings == []


# ---- attention and trunk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptj", "gpt_neo"])
def test_a_model_without_fused_attention_computes_it_plainly_and_says_so(saved, name):
    policy = Policy.from_pretrained(saved(name))

    assert [remark for remark in policy.warnings if "no fused attention (SDPA)" in remark]
    assert policy.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["mamba", "llama", "gemma2"])
def test_nothing_is_said_of_attention_that_is_fused_or_not_there(saved, name):
    assert not [remark for remark in Policy.from_pretrained(saved(name)).warnings if "attention" in remark]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_trunk_under_another_name_is_found(saved, critic):
    policy = Policy.from_pretrained(saved("llama4_text"), critic=critic)

    assert policy.is_head_separable and type(policy.trunk).__name__ == "Llama4TextModel"
    assert policy(torch.tensor([ROWS[0]]))[1].shape == (1, len(ROWS[0]))


def test_a_critic_is_as_wide_as_what_the_head_reads(saved):
    policy = Policy.from_pretrained(saved("opt", word_embed_proj_dim=8), critic="shared", critic_init="normal")

    assert policy(torch.tensor([ROWS[0]]))[1].shape == (1, len(ROWS[0]))


@pytest.mark.parametrize("name", ["opt", "falcon", "bloom", "gptj", "mixtral", "qwen3_next"])
def test_a_reward_model_of_any_architecture_scores_as_transformers_does(saved, name):
    model = RewardModel.from_pretrained(saved(name))

    score = model.score(ROWS)

    own = torch.stack([model.model(torch.tensor([row]), use_cache=False).logits[0, 0] for row in ROWS])
    assert_close(score, own, atol=2e-5, rtol=1e-5)


def test_an_architecture_without_a_class_for_scores_is_refused(saved):
    with pytest.raises(
        RequestError, match="does not load by AutoModelForSequenceClassification: give a model of another"
    ):
        RewardModel.from_pretrained(saved("mamba"))


def test_a_parameter_without_dimensions_has_a_digest(saved):
    assert len(module_digest(Policy.from_pretrained(saved("apertus")).model)) == 64


def test_log_probs_that_are_minus_infinity_alike_are_no_distance_apart():
    ruled_out = torch.tensor([-math.inf, -1.0])

    assert distance(ruled_out, ruled_out + 0) == 0
    assert distance(ruled_out, torch.tensor([-math.inf, -3.0])) == 2
    assert distance(ruled_out, torch.tensor([-2.0, -1.0])) == math.inf


CHECKS = {
    "verify_separable_head": lambda policy: policy.verify_separable_head(ROWS),
    "reading": lambda policy: check_forward_consistency(policy, ROWS),
    "sampling": lambda policy: find_sampling_problem(policy, ROWS),
}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out"), RuntimeError("can't allocate memory")], ids=["GPU", "CPU"]
)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_memory_that_runs_out_in_a_check_is_not_the_models_fault(error, check):
    policy = Policy(tiny("llama"))

    def runs_out(*_):
        raise error

    policy.model.base_model.register_forward_pre_hook(runs_out)
    with pytest.raises(type(error)) as found:
        check(policy)
    assert found.value is error
