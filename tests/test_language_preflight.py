"""Before the first step: each check catches a fault that is planted for it, and a sound cast passes them all."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import tiny
from tests.rehearsed import furnish, ppo_config
from understudy.language import ppo, preflight, toy_language
from understudy.language.model.policy import Policy, Reference
from understudy.language.model.reward_model import RewardModel
from understudy.language.rlhf import RLHFModels
from understudy.language.rollout.kv_cache import LayerCache
from understudy.language.rollout.sampler import Sampler
from understudy.run.config import RequestError

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K"
REAL = pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the real model {STORIES.name}")
EOS = 2
CHATTY = "{{ bos_token }}{% for m in messages %} {{ m.content }} END{% endfor %}"


def score(completion_ids, **_):
    return [float(sum(ids) % 10) for ids in completion_ids]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(home, tmp_path):
    """What makes a config of the run under test."""
    return lambda **fields: ppo_config(
        home, **{"out": tmp_path / "run", "max_new_tokens": 24, "reward": score, "preflight": True, **fields}
    )


@pytest.fixture
def made(config):
    """What makes the cast of a run, everything about it sound."""
    torch.manual_seed(0)
    return lambda **fields: RLHFModels(config(**fields))


def refused(cast) -> str:
    """The sentence by which a cast is refused."""
    with pytest.raises(RequestError, match=r"^preflight: .+; .+, or start as it is with --no-preflight$") as problem:
        preflight.run_checks(cast)
    return str(problem.value)


# ---- a sound cast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"critic": "separate", "packing": True, "gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"temperature": 0.7},
        {"fixed_length": 9},
    ],
    ids=str,
)
def test_an_untrained_model_passes_but_for_being_cut(made, fields):
    found = preflight.run_checks(made(**fields))

    assert [finding.check for finding in found] == ([] if "fixed_length" in fields else ["cut share"])


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "gemma3"])
def test_every_family_passes(made, family, home, tmp_path):
    model = tiny(family)
    model.resize_token_embeddings(len(toy_language.make_tokenizer()))
    model.save_pretrained(tmp_path / family)
    toy_language.make_tokenizer().save_pretrained(tmp_path / family)

    assert {finding.check for finding in preflight.run_checks(made(model=str(tmp_path / family)))} <= {"cut share"}


@REAL
def test_real_stories_pass_with_the_stop_that_they_end_with_and_not_with_the_one_they_declare(made):
    assert "stop is ['</s>'], which the policy says with probability" in refused(made(model=str(STORIES)))
    found = preflight.run_checks(made(model=str(STORIES), stop=("1",)))
    assert [finding.check for finding in found] == ["cut share"]


@REAL
def test_completions_that_may_get_longer_than_is_looked_at_are_not_called_cut(made):
    assert preflight.run_checks(made(model=str(STORIES), stop=("1",), max_new_tokens=preflight.MAX_TOKENS + 1)) == []


def test_the_check_leaves_no_trace(made):
    cast = made(critic="separate", reward=[score, lambda completions, **_: [None] + [1.0] * (len(completions) - 1)])
    before = {name: x.clone() for name, x in cast.policy.state_dict().items()}
    state = torch.get_rng_state()

    preflight.run_checks(cast)

    assert all(torch.equal(x, before[name]) for name, x in cast.policy.state_dict().items())
    assert all(p.grad is None for p in cast.policy.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert cast.policy.training and cast.policy.version == 0 and cast.policy.warnings == []
    assert set(cast.reward_sum.failures.values()) == {0}


def test_a_run_learns_the_same_with_and_without(config, tmp_path):
    runs = [ppo.train(config(preflight=on, out=tmp_path / str(on))) for on in (True, False)]

    checked, unchecked = (Policy.load(run.path / "policy").state_dict() for run in runs)
    assert all(torch.equal(x, unchecked[name]) for name, x in checked.items())


def test_a_policy_without_a_critic_passes(made):
    cast = made()
    cast.policy.critic = None

    assert [finding.check for finding in preflight.run_checks(cast)] == ["cut share"]


# ---- what is done with a finding --------------------------------------------------------------------------------------


def test_what_is_no_failure_is_said_once_and_kept_among_the_events(config, capsys):
    run = ppo.train(config(quiet=False))

    [event] = [
        e for e in map(json.loads, (run.path / "events.jsonl").read_text().splitlines()) if e["kind"] == "preflight"
    ]
    assert event["check"] == "cut share" and "were cut by max_new_tokens 24; raise it" in event["text"]
    assert capsys.readouterr().err.count(event["text"]) == 1


def test_a_failure_starts_no_run_unless_preflight_is_off(config):
    constant = {"reward": lambda completions, **_: [1.0] * len(completions)}
    with pytest.raises(RequestError, match="preflight"):
        ppo.train(config(**constant))
    assert not Path(config().output_dir).exists()

    assert ppo.train(config(**constant, preflight=False)).path.exists()


# ---- ways to sample that do not suit a model --------------------------------------------------------------------------


def unknown(module, args, given):
    if any(isinstance(layer, LayerCache) for layer in given["past_key_values"].layers):
        raise TypeError("what is this cache?")


def misplaced(module, args, given):
    if any(isinstance(layer, LayerCache) for layer in given["past_key_values"].layers):
        return args, given | {"position_ids": given["position_ids"] * 2}
    return None


@pytest.mark.parametrize(
    ("fault", "named"),
    [(unknown, "fails on this model (TypeError: what is this cache?)"), (misplaced, "nats from a pass without it")],
)
def test_a_model_that_our_cache_does_not_suit_samples_through_hugging_face(made, fault, named):
    cast = made()

    def cached_only(module, args, given):
        return fault(module, args, given) if given.get("past_key_values") is not None else None

    cast.policy.model.base_model.register_forward_pre_hook(cached_only, with_kwargs=True)
    preflight.run_checks(cast)

    [remark] = cast.policy.warnings
    assert not cast.policy.uses_own_kv_cache and not cast.reference.policy.uses_own_kv_cache
    assert named in remark


# ---- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["policy", "critic", "reference"])
def test_dropout_is_caught(made, whose):
    cast = made(critic="separate")
    models = {
        "policy": cast.policy.model,
        "critic": cast.policy.critic.trunk,
        "reference": cast.reference.policy.model,
    }
    for part in models[whose].train().modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.3

    assert f"the {whose} reads the same prompt in two ways" in refused(cast)


def test_a_tokenizer_with_more_ids_than_the_model_is_caught(made):
    cast = made()
    size = cast.policy.model.config.vocab_size
    cast.tokenizer = replace(cast.tokenizer, stops=frozenset([EOS, size]))

    assert f"the stop has id {size}, the model has ids from 0 to {size - 1}" in refused(cast)


@pytest.mark.parametrize(("front", "count"), [((1, 1), 2), ((), 0)])
def test_two_bos_and_none_are_caught(made, front, count):
    cast = made()
    cast.sampler.prompts = [replace(prompt, ids=(*front, *prompt.ids[1:])) for prompt in cast.sampler.prompts]

    assert f"begins with {count} BOS instead of one" in refused(cast)


@pytest.mark.parametrize(("end", "caught"), [("<pad>", True), ("</s>", False)])
def test_a_turn_end_that_is_no_stop_is_caught(made, end, caught, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in toy_language.prompts(20, 0)]
    data = toy_language.write_jsonl(rows, tmp_path / "chat.jsonl")
    cast = made(data=str(data), chat_template=CHATTY.replace("END", end))

    if caught:
        assert "ends an answer with '<pad>', the stops are ['</s>']; give --stop '<pad>'" in refused(cast)
    else:
        preflight.run_checks(cast)


class AtAnotherTemperature(Policy):
    """Scores as if it had not been sampled at a temperature."""

    def forward(self, obs):
        distribution, value = super().forward(obs)
        return replace(distribution, head=replace(distribution.head, temperature=1.0)), value


def test_a_sampler_that_is_not_the_trainer_is_caught(made):
    cast = made(temperature=0.7, max_new_tokens=6)
    cast.policy.__class__ = AtAnotherTemperature

    assert "the log-probs of sampler and trainer are" in refused(cast)


class PadsById(Policy):
    """Takes every stop for padding."""

    def forward(self, obs):
        return super().forward(replace(obs, ids=torch.where(obs.ids == EOS, 0, obs.ids)))


class DropsPads(Sampler):
    """Takes every stop for padding, in what counts as chosen."""

    def sample(self, policy, prompt_indices, seeds):
        said = super().sample(policy, prompt_indices, seeds)
        record = replace(said.trajectory, mask=said.trajectory.mask & (said.trajectory.action != EOS))
        return replace(said, trajectory=record)


def test_a_stop_that_is_read_as_padding_is_caught(made):
    cast = made()
    cast.policy.__class__ = PadsById

    assert f"id {EOS} inside a row is read as if it were padding" in refused(cast)


def test_a_stop_that_is_not_learned_from_is_caught(made):
    cast = made(max_new_tokens=48)
    cast.sampler.__class__ = DropsPads

    assert "tokens of a completion" in refused(cast)


def test_a_reference_that_is_not_the_policy_is_caught(made):
    cast = made()
    with torch.no_grad():
        cast.reference.policy.model.base_model.layers[0].mlp.down_proj.weight.mul_(3)

    assert "KL(policy, reference) is" in refused(cast)


def test_another_reference_by_request_is_let_pass(made, tmp_path):
    toy_language.make_model(1).save_pretrained(tmp_path / "other")

    preflight.run_checks(made(reference=str(tmp_path / "other")))


class OtherWithGradient(Policy):
    """Reads otherwise where a gradient is wanted."""

    def forward(self, obs):
        distribution, value = super().forward(obs)
        return replace(distribution, hidden=distribution.hidden * (1.1 if torch.is_grad_enabled() else 1.0)), value


def test_a_first_ratio_other_than_1_is_caught(made):
    cast = made()
    cast.policy.__class__ = OtherWithGradient

    assert "the first ratio is e^" in refused(cast)


class ScalesByWidth(Policy):
    """Its gradient is larger where there is more padding."""

    def forward(self, obs):
        distribution, value = super().forward(obs)
        if distribution.hidden.requires_grad:
            distribution.hidden.register_hook(lambda gradient: gradient * obs.ids.shape[1])
        return distribution, value


class ScalesByRows(Policy):
    """Its gradient is larger where more rows are read at a time."""

    def forward(self, obs):
        distribution, value = super().forward(obs)
        if distribution.hidden.requires_grad:
            distribution.hidden.register_hook(lambda gradient: gradient * len(obs))
        return distribution, value


@pytest.mark.parametrize(
    ("fault", "named"),
    [(ScalesByWidth, "more padding"), (ScalesByRows, "another split into micro-batches")],
)
def test_a_gradient_that_padding_or_the_split_moves_is_caught(made, fault, named):
    cast = made()
    cast.policy.__class__ = fault

    assert f"{named} changes the gradient by" in refused(cast)


def test_a_stop_that_is_never_said_is_caught(made):
    cast = made()
    head = nn.Linear(64, cast.policy.model.config.vocab_size)
    with torch.no_grad():
        head.bias[EOS] = -40.0  # e^-40 = 4e-18
    cast.policy.model.set_output_embeddings(head)
    cast.reference = Reference(cast.policy)

    assert "stop is ['</s>'], which the policy says with probability" in refused(cast)


def test_of_several_stops_one_that_is_said_is_enough(made):
    cast = made()
    head = nn.Linear(64, cast.policy.model.config.vocab_size)
    with torch.no_grad():
        head.bias[EOS] = -40.0
    cast.policy.model.set_output_embeddings(head)
    cast.reference = Reference(cast.policy)
    cast.sampler.tokenizer = cast.tokenizer = replace(cast.tokenizer, stops=frozenset([EOS, 7]))

    preflight.run_checks(cast)


@pytest.fixture
def foreign(tmp_path):
    """The directory of a reward model that numbers the words of the language backwards."""
    hf = toy_language.make_tokenizer()
    words = sorted(hf.get_vocab(), key=lambda word: -hf.get_vocab()[word])
    backend = json.loads(hf.backend_tokenizer.to_str())
    backend["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    backend["added_tokens"] = [{**token, "id": words.index(token["content"])} for token in backend["added_tokens"]]
    backend["post_processor"] = None
    made = type(hf)(
        tokenizer_object=type(hf.backend_tokenizer).from_str(json.dumps(backend)),
        **{f"{name}_token": getattr(hf, f"{name}_token") for name in ("pad", "bos", "eos", "unk")},
    )
    sizes = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **{f"{name}_token_id": words.index(getattr(hf, f"{name}_token")) for name in ("pad", "bos", "eos")},
    )
    LlamaForCausalLM(sizes).save_pretrained(tmp_path / "trunk")
    made.save_pretrained(tmp_path / "trunk")
    RewardModel.from_pretrained(tmp_path / "trunk").save(tmp_path / "foreign")
    return tmp_path / "foreign"


def test_a_reward_model_of_another_vocabulary_is_fed_with_its_own(made, foreign):
    cast = made(reward=str(foreign))

    assert {finding.check for finding in preflight.run_checks(cast)} == {"cut share"}


def test_a_reward_model_that_is_fed_the_policys_ids_is_caught(made, foreign):
    cast = made(reward=str(foreign))
    [(name, (model, _))] = cast.reward_models.items()
    cast.reward_models[name] = model, lambda sampled: model.score(sampled.completion_ids)

    assert "is fed ids that read otherwise in its own tokenizer, in 15 of 16 rows" in refused(cast)


def test_a_reward_model_with_dropout_is_caught(made, foreign):
    cast = made(reward=str(foreign))
    [(model, _)] = cast.reward_models.values()
    model.model.base_model.layers[0].self_attn.attention_dropout = 0.3
    model.model.train()

    assert "the reward model" in refused(cast)


def test_a_reward_that_is_the_same_everywhere_is_caught(made):
    cast = made(reward=lambda completions, **_: [0.5] * len(completions))

    assert "is 0.5 for all of 64 completions, 64 of them different" in refused(cast)


def test_a_rare_reward_is_looked_for_in_more_completions(made):
    cast = made(reward=lambda completions, **_: [float(i == 50) for i in range(len(completions))])

    preflight.run_checks(cast)


def test_a_reward_that_is_always_missing_is_caught(made):
    def broken(completions, **_):
        raise KeyError("price")

    assert "gave none of 64 completions a score (broken" in refused(made(reward=broken))


def test_a_reward_that_is_mostly_missing_is_said(made):
    cast = made(reward=lambda completions, **_: [math.nan if i % 3 else float(i) for i in range(len(completions))])

    findings = {finding.check: finding for finding in preflight.run_checks(cast)}
    assert "gave 10 of 16 completions no score" in str(findings["reward spreads"])
