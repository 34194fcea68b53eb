"""What learns and what is copied: critics, references and LoRA, each alone and every combination of them."""

import itertools
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaModel, OPTConfig, OPTForCausalLM

from tests.architectures import make
from tests.models import FAMILIES, tiny
from tests.rehearsed import PPO, furnish, ppo_config, sft_config
from tests.test_language_policy import ROWS, padded
from understudy.batch import TokenBatch
from understudy.cli.language import evaluate_run, generate
from understudy.language import dpo, grpo, ppo, preflight, reinforce, sft, toy_language
from understudy.language.model.policy import Policy
from understudy.language.model.reward_model import RewardModel
from understudy.language.rlhf import RLHFModels
from understudy.language.rollout.generate import measure_cache_error
from understudy.objective import sft_loss
from understudy.run.config import RequestError
from understudy.run.installation import install_hint
from understudy.run.resume import resume
from understudy.update import update

pytest.importorskip("peft", reason="the adapters of these tests are peft's")
EVERY = pytest.mark.parametrize(("family", "tied"), [(f, t) for f in FAMILIES for t in (False, True)])
SHARED = {"critic": "shared", "critic_init": "normal"}
TOP = {"critic": "top", "critic_init": "normal"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("model"))


def of(family, path, *, tied=False, **options) -> Policy:
    """A policy of a family, loaded from `path`."""
    tiny(family, tied=tied).save_pretrained(path)
    torch.manual_seed(7)
    return Policy.from_pretrained(path, **options)


def stir(policy) -> Policy:
    """Give a fresh adapter something to say."""
    torch.manual_seed(8)
    for parameter in policy.actor_parameters():
        nn.init.normal_(parameter, std=0.2)
    return policy


def logprob(policy, text=None):
    text = padded() if text is None else text
    return policy(text)[0].log_prob(text.action)


def learn(policy, optimizer, text, updates):
    """Imitate some text, and make the critic say what it does not."""

    def objective(policy, text):
        return sft_loss(policy, text)[0] + (policy(text)[1] - 3).pow(2), {}

    update(
        policy,
        optimizer,
        text,
        objective,
        num_epochs=updates,
        num_minibatches=1,
        max_grad_norm=None,
        generator=torch.Generator().manual_seed(0),
    )


def score(completion_ids, **_):
    return [float(sum(ids) % 10) for ids in completion_ids]


def addresses(parameters) -> set[int]:
    return {parameter.data_ptr() for parameter in parameters}


def moved(run, home) -> dict[str, torch.Tensor]:
    """What a run changed in each of the model's tensors."""
    begun, ended = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (home, run.path / "policy"))
    assert begun.keys() == ended.keys()
    return {name: ended[name] - x for name, x in begun.items()}


# ---- a critic with top layers of its own ------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("packing", [False, True], ids=["apart", "packed"])
def test_top_layers_of_its_own_begin_by_seeing_what_the_trunk_sees(family, tied, packing, tmp_path):
    shared = of(family, tmp_path, tied=tied, **SHARED)
    for layers in (1, 2):
        own = of(family, tmp_path, tied=tied, packing=packing, critic_layers=layers, **TOP)

        assert_close(own(padded())[1], shared(padded())[1], atol=1e-5, rtol=1e-5)
        assert_close(logprob(own), logprob(shared), atol=1e-5, rtol=1e-5)


def test_an_error_of_the_critic_moves_its_top_layers_and_nothing_of_the_policy(tmp_path):
    policy = of("llama", tmp_path, **TOP)

    policy(padded())[1].sum().backward()

    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.critic_parameters())
    # a layer of Llama has 9 tensors; the norm, and the head's weight and bias
    assert len(policy.critic_parameters()) == 9 + 1 + 2


def test_top_layers_hear_what_the_policys_lower_layers_learn(tmp_path):
    policy = of("llama", tmp_path, **TOP)
    before = policy(padded())[1]

    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight.mul_(2)  # beside the critic's own
        beside = policy(padded())[1]
        policy.model.model.layers[0].mlp.up_proj.weight.mul_(2)  # below them

    assert torch.equal(beside, before)
    assert not torch.allclose(policy(padded())[1], before, atol=1e-2)


@pytest.mark.parametrize("fields", [{"gradient_checkpointing": True}, {"packing": True}], ids=str)
def test_how_top_layers_read_changes_no_gradient(fields, tmp_path):
    gradients = []
    for given in ({}, fields):
        policy = of("llama", tmp_path, **TOP, **given)
        (logprob(policy).sum() + policy(padded())[1].sum()).backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])

    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, atol=1e-3, rtol=1e-4)  # gradients here are as long as 100


def test_top_layers_read_where_a_model_runs_through_its_own_logits(tmp_path):
    policy = of("llama", tmp_path, **TOP)
    value = policy(padded())[1]

    policy.is_head_separable = False

    row = padded(ROWS[:1])
    assert_close(policy(row)[1][0, :8], value[0, :8], atol=1e-5, rtol=1e-5)


def test_top_layers_come_back_as_they_were_saved(tmp_path):
    policy = of("llama", tmp_path / "model", critic_layers=2, **TOP)
    with torch.no_grad():
        policy.critic.trunk.norm.weight.mul_(1.5)
    policy.save(tmp_path / "policy")

    back = Policy.load(tmp_path / "policy")

    assert torch.equal(back(padded())[1], policy(padded())[1])
    assert len(back.critic.trunk.layers) == 2


def test_more_top_layers_than_there_are_is_refused(home, tmp_path):
    with pytest.raises(RequestError, match=r"^critic_layers is 3: the model has 2 layers; lower it$"):
        of("llama", tmp_path, critic_layers=3, **TOP)
    with pytest.raises(RequestError, match=r"^train_layers is 3: the model has 2 layers; lower it$"):
        sft.train(sft_config(home, tmp_path / "run", train_layers=3))


def test_a_model_whose_layers_are_not_found_is_refused(tmp_path):
    sizes = {"vocab_size": 23, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, max_position_embeddings=16)).save_pretrained(tmp_path)

    with pytest.raises(RequestError, match=r"^critic_layers is 1: which the layers of an? OPTForCausalLM are"):
        Policy.from_pretrained(tmp_path, critic="top")
    with pytest.raises(RequestError, match=r"^train_layers is 1: which the layers of an? OPTForCausalLM are"):
        Policy.from_pretrained(tmp_path).train_top_layers(1)


def test_a_model_whose_layers_do_something_else_apart_is_refused(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    plain = LlamaModel.forward

    def doubled(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.last_hidden_state = 2 * out.last_hidden_state
        return out

    monkeypatch.setattr(LlamaModel, "forward", doubled)

    with pytest.raises(RequestError, match=r"^critic is 'top': .* LlamaForCausalLM read apart are 0.5 from themselves"):
        Policy.from_pretrained(tmp_path, critic="top")


# ---- LoRA -------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_fresh_adapter_changes_nothing_and_is_all_that_learns(family, tied, tmp_path):
    policy = of(family, tmp_path, tied=tied)
    before = logprob(policy)

    policy.add_lora_adapter(rank=2, alpha=4)

    assert_close(logprob(policy), before, atol=2e-5, rtol=0)  # through its modules now: another order of sums
    names = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert names and all(".lora_" in name for name in names) and len(policy.actor_parameters()) == len(names)
    # every linear layer of a layer has an A and a B: 7 of them, in GPT-2 4
    assert len(names) == 2 * 2 * (4 if family == "gpt2" else 7)


@EVERY
def test_an_adapter_is_sampled_from_as_it_is_trained(family, tied, tmp_path):
    policy = of(family, tmp_path, tied=tied)
    policy.add_lora_adapter(rank=2, alpha=4)

    assert measure_cache_error(stir(policy), ROWS, num_tokens=8) < 1e-5


@EVERY
def test_merged_and_beside_its_base_an_adapter_says_the_same(family, tied, tmp_path):
    from peft import PeftModel

    policy = of(family, tmp_path / "model", tied=tied)
    plain = logprob(policy)
    policy.add_lora_adapter(rank=2, alpha=4)
    stir(policy).save(tmp_path / "policy")
    truth = logprob(policy)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # peft asks by a name that is going away
        beside = Policy(PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter").base_model.model)

    assert not torch.allclose(truth, plain, atol=0.1)
    assert_close(
        logprob(Policy(AutoModelForCausalLM.from_pretrained(tmp_path / "policy"))), truth, atol=2e-5, rtol=1e-5
    )
    assert_close(logprob(beside), truth, atol=2e-5, rtol=1e-5)


def test_saving_moves_no_weight(tmp_path):
    policy = of("llama", tmp_path / "model")
    policy.add_lora_adapter(rank=2, alpha=4)
    before = {name: x.clone() for name, x in stir(policy).model.state_dict().items()}

    policy.save(tmp_path / "policy")

    assert all(torch.equal(x, before[name]) for name, x in policy.model.state_dict().items())


def test_what_a_lora_run_changes_has_the_rank_that_was_asked_for(home, tmp_path):
    fields = {"lora_rank": 3, "learning_rate": 1e-2, "critic_warmup": 1, "fixed_length": 6, "total_tokens": 192}
    changed = moved(ppo.train(ppo_config(home, tmp_path / "run", **fields)), home)

    for name, x in changed.items():
        if x.abs().max() > 0:
            assert torch.linalg.matrix_rank(x, rtol=1e-3) == 3, name  # of the largest singular value; float32 rounds
    assert {name.split(".")[-2] for name, x in changed.items() if x.abs().max() > 0} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_an_adapter_counts_alpha_over_rank(tmp_path):
    policies = []
    for alpha in (4, 8):
        policies.append(of("llama", tmp_path))
        policies[-1].add_lora_adapter(rank=4, alpha=alpha, targets=("down_proj",), seed=3)
    weights = [stir(policy).adapter.merged_state_dict()["model.layers.0.mlp.down_proj.weight"] for policy in policies]
    base = tiny("llama").model.layers[0].mlp.down_proj.weight

    layer = policies[0].model.model.layers[0].mlp.down_proj
    assert_close(weights[0] - base, layer.lora_B["default"].weight @ layer.lora_A["default"].weight)  # 4 / 4
    assert_close(weights[1] - base, 2 * (weights[0] - base))  # 8 / 4


def test_an_adapter_goes_where_it_was_told_to(home, tmp_path):
    run = sft.train(
        sft_config(home, tmp_path / "run", lora_rank=2, lora_target_modules=("q_proj", "v_proj"), learning_rate=1e-2)
    )

    changed = {name.split(".")[-2] for name, x in moved(run, home).items() if x.abs().max() > 0}
    assert changed == {"q_proj", "v_proj"}


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(home, tmp_path):
    with pytest.raises(RequestError, match=r"^lora_target_modules is 'c_attn': .* are down_proj, .*, v_proj"):
        sft.train(sft_config(home, tmp_path / "run", lora_rank=2, lora_target_modules=("c_attn",)))


def test_an_adapter_learns_what_it_is_shown(home, tmp_path):
    run = sft.train(sft_config(home, tmp_path / "run", lora_rank=4, learning_rate=1e-2, num_epochs=4, evaluate_every=1))

    first, last = run.metrics[0]["evaluation_loss"], run.metrics[-1]["evaluation_loss"]
    # nats a token, of log(177) = 5.18; the head stands still at its start, so that no logit gets far from 0
    assert last < first - 0.15


def test_a_seed_decides_an_adapter_and_nothing_else_draws_from_it(home, tmp_path):
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(len(found))
        run = sft.train(sft_config(home, tmp_path / name, lora_rank=2, seed=seed))
        found.append(load_file(run.path / "adapter" / "adapter_model.safetensors"))

    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    assert not all(torch.equal(x, found[2][name]) for name, x in found[0].items())


@pytest.mark.parametrize("recipe", ["sft", "dpo", "reinforce", "grpo", "ppo"])
def test_a_lora_run_leaves_a_merged_policy_and_its_adapter_beside_it(recipe, home, tmp_path):
    fields = {"lora_rank": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run"), "model": str(home)}
    if recipe == "sft":
        run = sft.train(sft_config(home, tmp_path / "run", **{"lora_rank": 2, "learning_rate": 1e-2}))
    elif recipe == "dpo":
        data = str(home / "preferences.jsonl")
        run = dpo.train(dpo.Config(**fields, data=data, batch_size=8, quiet=True, held_out=8))
    else:
        kind = {"reinforce": reinforce, "grpo": grpo, "ppo": ppo}[recipe]
        given = {name: x for name, x in PPO.items() if name in kind.Config.__dataclass_fields__}
        run = kind.train(kind.Config(**fields, **given | {"reward": score}, data=str(home / "prompts.jsonl")))

    merged, adapter = Policy.load(run.path / "policy"), Policy.from_pretrained(run.path / "adapter")
    text = TokenBatch(padded().ids, padded().mask)
    assert_close(logprob(merged, text), logprob(adapter, text), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logprob(merged, text), logprob(Policy.from_pretrained(home), text), atol=1e-3)
    assert not (run.path / "policy" / "adapter").exists()
    assert adapter.warnings == [
        f"model '{run.path / 'adapter'}' is an adapter on '{home}': it is merged into its weights"
    ]


def test_a_checkpoint_holds_the_adapter_to_the_bit_and_an_optimizer_over_nothing_else(home, tmp_path):
    iterations = ppo.iterate(ppo_config(home, tmp_path / "run", lora_rank=2, learning_rate=1e-2, checkpoint_every=1))
    for _ in iterations:
        pass
    [last] = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]

    kept, final = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (last, tmp_path / "run"))
    moments = load_file(last / "optimizer.safetensors")
    assert len(kept) == 2 * 2 * 7 and all(torch.equal(x, final[name]) for name, x in kept.items())
    # A and B of 7 layers in each of 2, weight and bias of the value head; Adam keeps 2 moments and a count of each
    assert len(moments) == 3 * (28 + 2)


def test_an_adapter_stays_in_float32_beside_a_bfloat16_model(tmp_path):
    policy = of("llama", tmp_path, dtype=torch.bfloat16)
    policy.add_lora_adapter(rank=2, alpha=4)

    assert {parameter.dtype for parameter in policy.actor_parameters()} == {torch.float32}
    assert policy(padded())[0].hidden.dtype == torch.bfloat16


def test_without_peft_lora_is_refused_with_what_to_install(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(RequestError, match=r"^lora is '2', .* peft is missing: " + re.escape(install_hint("lora"))):
        sft.train(sft_config(home, tmp_path / "run", lora_rank=2))


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({"base_model_name_or_path": None}, "an adapter that names no base model: write its path into"),
        ({"task_type": "SEQ_CLS"}, "an adapter of a classifier: name the merged model instead"),
        ({"r": 5}, "an adapter that does not go on its base"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_merged_is_refused(about, named, tmp_path):
    policy = of("llama", tmp_path / "model")
    policy.add_lora_adapter(rank=2, alpha=4)
    policy.save(tmp_path / "policy")
    file = tmp_path / "policy" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | about))

    with pytest.raises(RequestError, match=named):
        Policy.from_pretrained(tmp_path / "policy" / "adapter")


def test_a_policy_that_arrives_with_an_adapter_is_merged_and_then_its_own_reference(home, tmp_path):
    first = sft.train(sft_config(home, tmp_path / "sft", lora_rank=2, learning_rate=1e-2))
    source = first.path / "adapter"

    cast = RLHFModels(ppo_config(home, tmp_path / "run", model=str(source), lora_rank=2))

    text = TokenBatch(padded().ids, padded().mask)
    merged = logprob(Policy.load(first.path / "policy"), text)
    assert_close(cast.reference(text).log_prob(text.action), merged, atol=2e-5, rtol=1e-5)
    own = RLHFModels(ppo_config(home, tmp_path / "run")).tokenizer
    assert cast.tokenizer.stops == own.stops and cast.tokenizer.hf.get_vocab() == own.hf.get_vocab()


def test_a_reward_model_begins_from_an_adapter_and_its_base(home, tmp_path):
    first = sft.train(sft_config(home, tmp_path / "sft", lora_rank=2, learning_rate=1e-2))
    adapter, merged = (RewardModel.from_pretrained(first.path / name) for name in ("adapter", "policy"))

    ids = padded(ROWS[:1]).ids
    hidden = [model.model.base_model(ids).last_hidden_state for model in (adapter, merged)]
    assert_close(*hidden, atol=1e-4, rtol=1e-4)  # float32, merged in another order


def test_an_adapters_directory_can_be_talked_to(home, tmp_path, capsys):
    run = sft.train(sft_config(home, tmp_path / "sft", lora_rank=2))

    said = [
        generate([str(run.path / name), "--prompt", "the", "--greedy", "--max-new-tokens", "5"])
        for name in ("adapter", "policy")
    ]

    one, other = capsys.readouterr().out.splitlines()
    assert said == [0, 0] and one == other


# ---- what the reference copies ----------------------------------------------------------------------------------------

KEPT = {
    "copy": {"reference_mode": "copy"},
    "copy beside an adapter": {"reference_mode": "copy", "lora_rank": 4},
    "copy beside frozen layers": {"reference_mode": "copy", "train_layers": 1},
    "directory": {"reference": True},
    "adapter off": {"reference_mode": "adapter_off", "lora_rank": 4},
    "frozen top": {"reference_mode": "frozen_top", "train_layers": 1},
}


@pytest.mark.parametrize("critic", ["shared", "separate", "top"])
@pytest.mark.parametrize("mode", KEPT)
def test_the_reference_says_the_same_to_the_bit_after_twenty_updates(mode, critic, home, tmp_path):
    fields = KEPT[mode] | ({"reference": str(home)} if "reference" in KEPT[mode] else {})
    cast = RLHFModels(ppo_config(home, tmp_path / "run", critic=critic, learning_rate=1e-2, **fields))
    text = TokenBatch(padded().ids, padded().mask)
    began, before = logprob(cast.policy, text), cast.reference(text).log_prob(text.action)
    critics, value = [p.detach().clone() for p in cast.policy.critic_parameters()], cast.policy(text)[1]

    learn(cast.policy, cast.optimizer, text, 20)

    # not to the bit: a trunk with something put into it or hung on it is read by its modules
    assert_close(before, began)
    assert torch.equal(cast.reference(text).log_prob(text.action), before)
    assert not torch.allclose(logprob(cast.policy, text), before, atol=0.1)
    assert not torch.allclose(cast.policy(text)[1], value, atol=0.1)
    assert not all(map(torch.equal, critics, cast.policy.critic_parameters()))


def test_a_reference_shares_what_never_learns_and_copies_the_rest(home, tmp_path):
    shared = {}
    for mode, fields in {**KEPT, "lora_rank": {"lora_rank": 4}, "layers": {"train_layers": 1}, "all": {}}.items():
        if mode != "directory":
            cast = RLHFModels(ppo_config(home, tmp_path / "run", **fields))
            own, theirs = (addresses(p.parameters()) for p in (cast.policy.model, cast.reference))
            shared[mode] = len(own & theirs), len(theirs)

    # 2 layers of 9 tensors, a norm, and embeddings tied to the head: 20; above the lower layer there are 9 + 1
    assert shared == {
        **{"copy": (0, 20), "copy beside an adapter": (0, 20), "copy beside frozen layers": (0, 20), "all": (0, 20)},
        **{"adapter off": (20, 20), "lora_rank": (20, 20), "frozen top": (10, 20), "layers": (10, 20)},
    }


# Numbers of the model: embeddings 177 * 64 = 11328, tied to the head; a layer 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64 = 41088;
# a norm 64.
TRUNK, LAYER, NORM, VALUE = 11328 + 2 * 41088 + 64, 41088, 64, 64 + 1
ADAPTERS = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))  # 2 layers, rank 4, in + out of each linear layer


@pytest.mark.parametrize(
    ("fields", "held", "learned"),
    [
        ({"critic": "shared"}, 2 * TRUNK + VALUE, TRUNK + VALUE),
        ({"critic": "separate"}, 3 * TRUNK + VALUE, 2 * TRUNK + VALUE),
        ({"critic": "top"}, 2 * TRUNK + LAYER + NORM + VALUE, TRUNK + LAYER + NORM + VALUE),
        ({"lora_rank": 4}, TRUNK + ADAPTERS + VALUE, ADAPTERS + VALUE),
        ({"lora_rank": 4, "critic": "separate"}, 2 * TRUNK + ADAPTERS + VALUE, TRUNK + ADAPTERS + VALUE),
        ({"lora_rank": 4, "critic": "top"}, TRUNK + ADAPTERS + LAYER + NORM + VALUE, ADAPTERS + LAYER + NORM + VALUE),
        ({"train_layers": 1}, TRUNK + LAYER + NORM + VALUE, LAYER + NORM + VALUE),
        ({"train_layers": 1, "critic": "top"}, TRUNK + 2 * (LAYER + NORM) + VALUE, 2 * (LAYER + NORM) + VALUE),
    ],
    ids=str,
)
def test_so_many_numbers_are_held_and_learned(fields, held, learned, home, tmp_path):
    cast = RLHFModels(ppo_config(home, tmp_path / "run", **fields))

    everything = {id(p): p.numel() for part in (cast.policy, cast.reference) for p in part.parameters()}
    assert sum(everything.values()) == held
    assert sum(p.numel() for group in cast.optimizer.param_groups for p in group["params"]) == learned


def test_of_a_policy_that_trains_its_top_layers_the_rest_stands_still(home, tmp_path):
    run = ppo.train(
        ppo_config(home, tmp_path / "run", train_layers=1, critic_warmup=1, learning_rate=1e-2, total_tokens=192)
    )

    changed = {name for name, x in moved(run, home).items() if x.abs().max() > 0}
    assert changed and all(name.startswith(("model.layers.1.", "model.norm.")) for name in changed)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"reference_mode": "adapter_off"}, "with lora_rank 0: there is no adapter to switch off"),
        ({"reference_mode": "frozen_top"}, "with train_layers 0: every layer learns"),
        ({"reference_mode": "frozen_top", "lora_rank": 2}, "with train_layers 0: the adapter changes every layer"),
        ({"reference_mode": "copy", "reference": "DIR"}, "beside reference 'DIR', which is a model of its own"),
        ({"lora_rank": 2, "train_layers": 1}, "an adapter learns in place of the layers"),
    ],
    ids=str,
)
def test_modes_that_contradict_each_other_are_refused_in_a_sentence(fields, why, home, tmp_path):
    with pytest.raises(RequestError, match=why):
        ppo_config(home, tmp_path / "run", **fields)


@pytest.mark.parametrize("fields", [{"lora_rank": 4}, {"train_layers": 1}, {"critic": "top"}], ids=str)
def test_a_run_of_any_mode_is_evaluated_against_what_it_started_from(fields, home, tmp_path, capsys):
    run = ppo.train(ppo_config(home, tmp_path / "run", learning_rate=1e-2, **fields))

    assert evaluate_run([str(run.path), "--rows", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kl"] > 0


@pytest.mark.parametrize(
    "fields", [{"lora_rank": 3, "critic": "top"}, {"train_layers": 1, "critic": "separate"}, {"critic": "top"}], ids=str
)
def test_a_run_of_any_mode_that_is_taken_up_again_ends_as_if_it_never_stopped(fields, home, tmp_path):
    settings = {"learning_rate": 1e-2, "checkpoint_every": 1, "keep_checkpoints": 9, "total_tokens": 192}
    run = ppo.train(ppo_config(home, tmp_path / "whole", **settings, **fields))
    first, *others = sorted((run.path / "checkpoints").iterdir())
    shutil.copytree(run.path, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "policy")
    shutil.rmtree(tmp_path / "again" / "adapter", ignore_errors=True)

    resume(tmp_path / "again", checkpoint=first.name)

    files = [
        file.relative_to(run.path)
        for name in ("policy", "adapter")
        for file in run.path.glob(f"{name}/**/*.safetensors")
    ]
    assert others and files
    for file in files:
        whole, again = (load_file(tmp_path / name / file) for name in ("whole", "again"))
        assert all(torch.equal(x, again[name]) for name, x in whole.items()), file


@pytest.mark.parametrize("family", [*FAMILIES, "llama in half precision"])
def test_preflight_passes_however_rows_are_read(family, home, tmp_path):
    model = tiny(family.split()[0])
    model.resize_token_embeddings(len(toy_language.make_tokenizer()))
    model.save_pretrained(tmp_path)
    toy_language.make_tokenizer().save_pretrained(tmp_path)
    reading = {
        "packing": True,
        "gradient_checkpointing": True,
        "micro_batch_size": 3,
        "temperature": 0.7,
        "reward": score,
    }
    reading |= {"dtype": "bfloat16"} if "half" in family else {}

    for fields in ({"lora_rank": 4, "critic": "top"}, {"train_layers": 1, "critic": "top", "critic_layers": 2}):
        cast = RLHFModels(ppo_config(home, tmp_path / "run", model=str(tmp_path), **reading, **fields))
        assert {finding.check for finding in preflight.run_checks(cast)} <= {"cut share"}


# ---- every combination ------------------------------------------------------------------------------------------------

CRITICS = {
    "none, grpo": (grpo, {"group_size": 4}),
    "none, reinforce": (reinforce, {"group_size": 4}),
    "shared": (ppo, {"critic": "shared"}),
    "separate": (ppo, {"critic": "separate"}),
    "top": (ppo, {"critic": "top"}),
}
REFERENCES = ("copy", "directory", "adapter_off", "frozen_top")
LORA = (0, 4)
REFUSED = {
    ("adapter_off", 0): "there is no adapter to switch off",
    ("frozen_top", 4): "an adapter learns in place of the layers",
}


@pytest.mark.parametrize(("critic", "reference", "lora"), [*itertools.product(CRITICS, REFERENCES, LORA)])
def test_each_combination_passes_preflight_and_runs_or_is_refused(critic, reference, lora, home, tmp_path):
    recipe, fields = CRITICS[critic]
    given = {name: x for name, x in PPO.items() if name in recipe.Config.__dataclass_fields__} | fields
    given |= {"reward": score, "preflight": True, "lora_rank": lora}
    given |= {"fixed_length": 6, "total_tokens": 3 * 8 * 6}  # 3 iterations of 8 rows
    given |= {"reference": str(home)} if reference == "directory" else {"reference_mode": reference}
    given |= {"train_layers": 1} if reference == "frozen_top" else {}
    settings = {"model": str(home), "data": str(home / "prompts.jsonl"), "output_dir": str(tmp_path / "run"), **given}

    if (reference, lora) in REFUSED:
        with pytest.raises(RequestError, match=REFUSED[reference, lora]):
            recipe.Config(**settings)
        return
    run = recipe.train(recipe.Config(**settings))

    assert [line["iteration"] for line in run.metrics] == [1, 2, 3]
    assert run.metrics[0]["kl_reference"] == pytest.approx(0, abs=1e-4)
    assert Policy.load(run.path / "policy")


# ---- adapters on other architectures ----------------------------------------------------------------------------------


def adapted(name, tmp_path, **options) -> Policy:
    """A policy with an adapter that says something."""
    make(name).save_pretrained(tmp_path / "model")
    policy = Policy.from_pretrained(tmp_path / "model")
    policy.add_lora_adapter(rank=2, alpha=8.0, **options)
    with torch.no_grad():
        for parameter in policy.actor_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return policy


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "jamba", "mamba"])
def test_every_part_of_an_adapter_learns_is_merged_and_read_by_peft(name, tmp_path):
    from peft import PeftModel

    policy, ids = adapted(name, tmp_path), torch.tensor([[5, 9, 2, 7, 11, 4]])
    logprob = policy(ids)[0].log_prob(ids.roll(-1, dims=1))
    logprob.sum().backward()

    policy.save(tmp_path / "out")

    assert all(parameter.grad.any() for parameter in policy.actor_parameters())
    merged = Policy.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # peft asks by a name that is going away
        beside = Policy(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").base_model.model)
    plain = Policy.from_pretrained(tmp_path / "model")(ids)[0].log_prob(ids.roll(-1, dims=1))
    assert (plain - logprob).abs().max() > 0.01
    for other in (merged, beside):
        assert_close(other(ids)[0].log_prob(ids.roll(-1, dims=1)), logprob, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "share", "others"),
    # of each layer of Mixtral: 16 x (16 + 8 + 8 + 16) of attention, 4 x (48 x 16 + 16 x 24) of experts, 4 x 16 of its gate
    [
        ("mixtral", (768 + 4608) / (768 + 4608 + 64), ["gate"]),
        ("llama", 1.0, []),
        ("jamba", None, ["A_log", "conv1d", "dt_proj", "router"]),
    ],
)
def test_the_share_of_weights_that_an_adapter_reaches_is_said(name, share, others, tmp_path):
    policy = adapted(name, tmp_path)

    assert policy.adapter.unadapted_names == others
    assert share is None or policy.adapter.adapted_fraction == pytest.approx(share)
    said = [remark for remark in policy.warnings if remark.startswith("lora_rank adapts ")]
    assert len(said) == bool(others) and all(name in said[0] for name in others)


def test_experts_alone_can_be_adapted(tmp_path):
    policy = adapted("mixtral", tmp_path, targets=("gate_up_proj", "down_proj"))

    names = [name for name, _ in policy.model.named_parameters() if ".lora_" in name]
    assert len(names) == 2 * 2 * 2 and all("experts" in name for name in names)  # A and B of two weights of two layers


def test_a_target_whose_layer_is_never_called_is_refused(tmp_path):
    with pytest.raises(RequestError, match="lora_target_modules is 'dt_proj': the model's linear layers are"):
        adapted("jamba", tmp_path, targets=("dt_proj",))
