"""PPO on language models: every field of its config does what it says, by hand where a number can be had by hand."""

import contextlib
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rehearsed import furnish, ppo_config, reward_config, sft_config
from understudy import load, resume
from understudy.batch import Batch, TokenBatch
from understudy.control.policy import policy_path
from understudy.language import ppo, reward_model, sft, toy_language, training
from understudy.language.data.records import pad_for_scoring
from understudy.language.model.policy import Policy, module_digest
from understudy.language.model.reward_model import RewardModel
from understudy.language.model.token_distribution import Head, SampledTokens, TokenDistribution
from understudy.language.rlhf import open_rlhf_run
from understudy.language.rollout.generate import Completion, build_trajectory
from understudy.language.rollout.sampler import Rollout
from understudy.run.config import RequestError
from understudy.run.store import Run

HEAD = Head(nn.Identity())
STOPS = tuple(map(str, range(2, 170)))  # most tokens end a completion, so that an untrained model ends most of them
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def judge(home, tmp_path_factory):
    """A trained reward model's run."""
    return reward_model.train(reward_config(home, tmp_path_factory.mktemp("judge") / "run", learning_rate=1e-3)).path


@pytest.fixture
def go(home, tmp_path):
    """Trains with some fields; each run in a directory of its own."""
    count = iter(range(99))

    def train(**fields) -> Run:
        return ppo.train(ppo_config(home, tmp_path / f"run{next(count)}", **fields))

    return train


@pytest.fixture
def cast(home, tmp_path):
    """The cast of a run that does not begin."""
    with contextlib.ExitStack() as open_ones:
        count = iter(range(99))

        def opened(**fields):
            cfg = ppo_config(home, tmp_path / f"cast{next(count)}", **fields)
            return open_ones.enter_context(open_rlhf_run("ppo", cfg))[1]

        yield opened


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def apart(one: Path, other: Path) -> float:
    """The largest distance between two models' parameters."""
    there = parameters(other)
    return max(float((x - there[name]).abs().max()) for name, x in parameters(one).items())


def kept(run: Run, iteration: int = 1) -> list[dict]:
    """The completions of an iteration, token by token."""
    return [json.loads(line) for line in (run.path / "samples" / f"{iteration:06d}.jsonl").read_text().splitlines()]


def config(**fields) -> ppo.Config:
    return ppo.Config(**{"model": "m", "data": "d", "reward": "length", **fields})


# step 2, pay: two rows of three tokens from a vocabulary of two, each sampled with probability 1/2; the second is cut


def said(*stopped: bool) -> Rollout:
    done = [Completion([1, 0, 1], [math.log(0.5)] * 3, stop, 0) for stop in stopped]
    return Rollout([], done, build_trajectory([[0]] * len(done), done), None)


def says(*probabilities: float):
    """A policy or reference: token 1 has such a probability at each column."""

    def distribution(text: TokenBatch) -> TokenDistribution:
        one = torch.tensor(probabilities).expand(text.ids.shape)
        return TokenDistribution(torch.stack([1 - one, one], dim=-1).log(), text.mask, HEAD)

    return distribution


QUARTER = says(0.25)
# log pi - log pi_ref: log(1/2 / 1/4) = 0.6931 for token 1, log(1/2 / 3/4) = -0.4055 for token 0


def test_the_kl_to_the_reference_is_paid_token_by_token_with_its_coefficient():
    _, reward, _ = ppo.compute_rewards(said(True), torch.tensor([5.0]), QUARTER, 0.1, config())

    # -0.1 * (0.6931, -0.4055, 0.6931), and the score at the last
    assert_close(reward, torch.tensor([[-0.06931, 0.04055, 5 - 0.06931, 0.0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["k2", "k3", "exact"])
def test_a_kl_in_the_loss_is_not_paid_as_well(how):
    _, reward, _ = ppo.compute_rewards(said(True), torch.tensor([5.0]), QUARTER, 0.1, config(kl_reference=how))

    assert_close(reward, torch.tensor([[0.0, 0.0, 5.0, 0.0]]))


@pytest.mark.parametrize(
    ("fields", "paid", "terminated", "truncated", "kept_steps"),
    [
        ({"truncation": "terminal"}, 5.0, True, False, 3),
        ({"truncation": "terminal", "missing_eos_penalty": 2.0}, 3.0, True, False, 3),
        ({"truncation": "penalty", "truncation_penalty": -7.0}, -7.0, True, False, 3),
        ({"truncation": "bootstrap"}, 0.0, False, True, 3),
        ({"truncation": "drop"}, 0.0, False, True, 0),
    ],
)
def test_a_cut_completion_is_paid_as_the_config_says(fields, paid, terminated, truncated, kept_steps):
    cfg = config(kl_reference="exact", **fields)

    record, reward, _ = ppo.compute_rewards(said(True, False), torch.tensor([5.0, 5.0]), QUARTER, 0.1, cfg)

    assert_close(reward[0], torch.tensor([0.0, 0.0, 5.0, 0.0]))  # the stopped one is paid its score in any case
    assert_close(reward[1], torch.tensor([0.0, 0.0, paid, 0.0]))
    assert (bool(record.terminated[1].any()), bool(record.truncated[1].any())) == (terminated, truncated)
    assert int(record.mask[1].sum()) == kept_steps == int(record.obs.mask[1].sum())


def test_a_row_without_a_score_is_left_out():
    record, reward, _ = ppo.compute_rewards(said(True, True), torch.tensor([math.nan, 5.0]), QUARTER, 0.1, config())

    assert record.mask.sum(dim=1).tolist() == [0, 3]
    assert_close(reward[0], torch.zeros(4))


def test_whitened_rewards_have_deviation_one_and_keep_their_mean():
    _, reward, _ = ppo.compute_rewards(
        said(True), torch.tensor([3.0]), QUARTER, 0.1, config(whiten_rewards=True, kl_reference="k2")
    )

    # 0, 0, 3: mean 1, deviation sqrt((1 + 1 + 4) / 2) = 1.7321; (0 - 1) / 1.7321 + 1 = 0.4226, (3 - 1) / 1.7321 + 1 = 2.1547
    assert_close(reward, torch.tensor([[0.4226, 0.4226, 2.1547, 0.0]]), atol=1e-4, rtol=0)


# step 4, weigh_up: two choices paid 0 and 1, V = 0.5 and 0.25


def weighed(**fields) -> Batch:
    done = [Completion([1, 1], [math.log(0.5)] * 2, True, 0)]
    record = build_trajectory([[0]], done)
    cfg = config(**{"normalize_advantage": "none", "kl_reference": "k2", **fields})
    old = SampledTokens(record.action, record.behavior_logprob)
    reward, value = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    return ppo.compute_advantages(record, reward, value, old, QUARTER(record.obs), cfg)


def test_advantages_are_gaes_with_the_configs_gamma_and_lambda():
    # delta_1 = 1 - 0.25 = 0.75; delta_0 = 0 + 0.5 * 0.25 - 0.5 = -0.375; A_0 = -0.375 + 0.5 * 0.5 * 0.75 = -0.1875
    assert_close(weighed(gamma=0.5, lam=0.5).advantage, torch.tensor([[-0.1875, 0.75, 0.0]]))
    # gamma 1: delta_0 = 0.25 - 0.5 = -0.25; lambda 1: A_0 = -0.25 + 0.75 = 0.5
    assert_close(weighed(gamma=1.0, lam=1.0).advantage, torch.tensor([[0.5, 0.75, 0.0]]))


def test_the_critics_targets_have_a_lambda_of_their_own():
    # lambda 1: -0.375 + 0.5 * 0.75 = 0, and 0 + V_0 = 0.5; the advantage keeps lambda 0.5
    batch = weighed(gamma=0.5, lam=0.5, lam_value=1.0)

    assert_close(batch.target[:, :2], torch.tensor([[0.5, 1.0]]))
    assert_close(batch.advantage, torch.tensor([[-0.1875, 0.75, 0.0]]))


def test_without_one_of_its_own_the_targets_have_the_advantages_lambda():
    assert_close(weighed(gamma=0.5, lam=0.5).target[:, :2], torch.tensor([[-0.1875 + 0.5, 1.0]]))


def test_advantages_are_standardised_over_the_record_where_asked():
    # -0.1875 and 0.75 are half their distance, 0.46875, from their mean; their deviation is sqrt(2) * 0.46875
    batch = weighed(gamma=0.5, lam=0.5, normalize_advantage="batch")

    assert_close(batch.advantage, torch.tensor([[-0.7071, 0.7071, 0.0]]), atol=1e-4, rtol=0)


def test_over_minibatches_advantages_are_left_for_the_update_to_standardise(go):
    assert_close(weighed(gamma=0.5, lam=0.5, normalize_advantage="minibatch").advantage[0, 1], torch.tensor(0.75))

    how = {"num_minibatches": 4, "log_samples": 0, "learning_rate": 1e-3}
    whole, minibatch, none = (
        go(normalize_advantage=name, **how).path / "policy" for name in ("batch", "minibatch", "none")
    )

    assert min(apart(whole, minibatch), apart(whole, none), apart(minibatch, none)) > 1e-4


# step 5, surrogate: one choice of token 1, whose probability went from 1/2 to 0.9 under advantage 1


def loss(cfg: ppo.Config, *, kl_old_coef=0.0, reference_coef=0.0, value=0.0, mix: TokenBatch | None = None) -> float:
    record = build_trajectory([[0]], [Completion([1], [math.log(0.5)], True, 0)])
    exact = QUARTER(record.obs)
    batch = Batch.of(
        record,
        value=torch.tensor([[0.0, 0.0]]),
        advantage=torch.tensor([[1.0, 0.0]]),
        target=torch.tensor([[2.0, 0.0]]),
        old_distribution=says(0.5)(record.obs)
        if cfg.objective == "penalty"
        else SampledTokens(record.action, record.behavior_logprob),
        reference=exact if cfg.kl_reference == "exact" else exact.log_prob(record.action),
        pretraining_text=mix,
    )
    new = says(0.9)
    objective = ppo.make_objective(cfg, kl_old_coef, reference_coef)
    per_step, _ = objective(lambda text: (new(text), torch.full(text.ids.shape, value)), batch)
    return float(per_step[0, 0])


@pytest.mark.parametrize(
    ("fields", "more", "expected"),
    [
        ({"clip": 0.2}, {}, -1.2),  # the ratio 1.8 clipped at 1.2
        ({"clip": 0.5}, {}, -1.5),
        ({"clip": 1.0}, {}, -1.8),
        # V = 1, target 2, old V = 0: (1 - 2)^2 / 2 = 0.5, halved by its coefficient
        ({"value_coef": 0.5, "value_clip": 0.0}, {"value": 1.0}, -1.2 + 0.25),
        # V kept within 0.2 of 0: (0.2 - 2)^2 / 2 = 1.62
        ({"value_coef": 0.5, "value_clip": 0.2}, {"value": 1.0}, -1.2 + 0.81),
        # H(0.9, 0.1) = 0.3251
        ({"entropy_coef": 2.0}, {}, -1.2 - 0.6502),
        # KL((0.5, 0.5), (0.9, 0.1)) = (log(0.5/0.9) + log(0.5/0.1)) / 2 = 0.5108
        ({"objective": "penalty"}, {"kl_old_coef": 0.0}, -1.8),
        ({"objective": "penalty"}, {"kl_old_coef": 2.0}, -1.8 + 1.0217),
        # log(0.9 / 0.25) = 1.2809: k2 = 1.2809^2 / 2 = 0.8204
        ({"kl_reference": "reward"}, {"reference_coef": 0.1}, -1.2),
        ({"kl_reference": "k2"}, {"reference_coef": 0.1}, -1.2 + 0.08204),
        # k3 = 1.8 * (0.25 / 0.9 - 1 + 1.2809) = 1.0057
        ({"kl_reference": "k3"}, {"reference_coef": 0.1}, -1.2 + 0.10057),
        # 0.9 * 1.2809 + 0.1 * log(0.1 / 0.75) = 0.9513
        ({"kl_reference": "exact"}, {"reference_coef": 0.1}, -1.2 + 0.09513),
        ({"objective": "penalty", "kl_reference": "exact"}, {"reference_coef": 0.1}, -1.8 + 0.09513),
        # -log 0.9 = 0.10536 a token of text
        ({"pretraining": "text", "pretraining_coef": 2.0}, {"mix": "text"}, -1.2 + 0.2107),
    ],
)
def test_the_loss_of_one_choice_by_hand(fields, more, expected):
    if "mix" in more:
        more = {"mix": TokenBatch(torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]]))}
    cfg = config(**{"value_coef": 0.0, **fields})

    assert loss(cfg, **more) == pytest.approx(expected, abs=1e-4)


# the optimizer


def one_step(gradient: float, **fields) -> float:
    """Where AdamW takes a weight of 1 in a step."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = training.adamw(config(**fields), {"params": [weight]})
    weight.grad = torch.tensor([gradient])
    optimizer.step()
    return float(weight.detach())


def test_adamw_decays_weights_by_rate_times_decay():
    assert one_step(0.0, learning_rate=0.5, weight_decay=0.1) == pytest.approx(1 - 0.5 * 0.1)
    assert one_step(0.0, learning_rate=0.5) == 1.0


def test_adamws_epsilon_stands_beside_the_gradients_size():
    # the first step is rate * g / (|g| + eps): 0.5 * 3 / (3 + 1)
    assert one_step(3.0, learning_rate=0.5, adam_eps=1.0) == pytest.approx(1 - 0.375)
    assert one_step(3.0, learning_rate=0.5) == pytest.approx(0.5)


# runs


def test_a_seed_decides_every_parameter(go):
    one, again, other = (go(seed=seed, learning_rate=1e-3).path / "policy" for seed in (1, 1, 2))

    assert apart(one, again) == 0.0
    assert apart(one, other) > 1e-5


def test_a_run_has_the_rows_tokens_and_optimizer_steps_it_was_asked_for(go):
    run = go(completions_per_iteration=5, max_new_tokens=3, total_tokens=20, num_epochs=3, num_minibatches=2)

    assert [line["rows"] for line in run.metrics] == [5, 10]  # 15 tokens, then 30: at or after 20 it ends
    assert run.metrics[-1]["steps"] >= 20 > run.metrics[-2]["steps"]
    assert all(line["length_mean"] <= 3 for line in run.metrics)
    assert [line["optimizer_steps"] for line in run.metrics] == [6, 6]
    assert [line["epochs"] for line in run.metrics] == [3, 3]


def test_completions_end_at_the_stop_ids_that_were_named(go):
    run = go(stop=STOPS, log_samples=8)

    stops = {int(stop) for stop in STOPS}
    for line in kept(run):
        assert line["stopped"] == (line["completion_ids"][-1] in stops)
        assert not stops.intersection(line["completion_ids"][:-1])
    assert 0 < run.metrics[0]["stopped"] <= 1
    plain = AutoModelForCausalLM.from_pretrained(run.path / "policy")
    assert plain.generation_config.eos_token_id == sorted(stops)


def test_completions_of_a_fixed_length_have_it_and_no_other_end(go):
    run = go(stop=STOPS, fixed_length=5, log_samples=8)

    assert {len(line["completion_ids"]) for line in kept(run)} == {5}


def test_a_fixed_length_needs_no_stop_id(home, tmp_path):
    tokenizer = toy_language.make_tokenizer()
    tokenizer.eos_token = None
    model = toy_language.make_model(0)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "endless")

    with pytest.raises(RequestError, match=r"no stop id; give one with --stop, or --fixed-length"):
        ppo.train(ppo_config(home, tmp_path / "run", model=str(tmp_path / "endless")))
    run = ppo.train(ppo_config(home, tmp_path / "run", model=str(tmp_path / "endless"), fixed_length=4))

    assert run.metrics[0]["length_mean"] == 4


def test_sampled_log_probs_are_the_models_own_at_the_temperature(go, home):
    run = go(temperature=0.6, log_samples=2)

    model = AutoModelForCausalLM.from_pretrained(home)
    for line in kept(run):
        prompt, completion = line["prompt_ids"], line["completion_ids"]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].detach()
        logp = (logits / 0.6).log_softmax(dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert_close(torch.tensor(line["logprob"]), logp, atol=1e-5, rtol=0)
    assert AutoModelForCausalLM.from_pretrained(run.path / "policy").generation_config.temperature == 0.6


def test_what_is_said_does_not_depend_on_the_slots(go):
    few, many = (kept(go(max_num_seqs=slots, log_samples=8, total_tokens=1)) for slots in (3, 64))

    assert [line["completion_ids"] for line in few] == [line["completion_ids"] for line in many]


SMOOTH = {"learning_rate": 1e-3, "adam_eps": 1e-2}  # a large epsilon: rounding is not made larger by Adam's division


@pytest.mark.parametrize(
    "fields", [{"micro_batch_size": 3}, {"packing": True}, {"gradient_checkpointing": True}], ids=str
)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_how_rows_are_read_does_not_change_what_is_learned(go, home, fields, critic):
    together = go(critic=critic, **SMOOTH).path / "policy"
    otherwise = go(critic=critic, **SMOOTH, **fields).path / "policy"

    assert apart(together, home) > 1e-4
    assert apart(together, otherwise) < 1e-5


def test_bfloat16_is_what_parameters_are_kept_in(go):
    run = go(dtype="bfloat16", learning_rate=1e-3)

    assert {x.dtype for x in parameters(run.path / "policy").values()} == {torch.bfloat16}
    assert math.isfinite(run.metrics[-1]["loss"])


def test_in_bfloat16_a_reference_from_a_directory_is_the_policy_as_it_starts(go, home):
    run = go(dtype="bfloat16", reference=str(home), log_samples=2)

    assert abs(run.metrics[0]["kl_reference"]) < 0.02 * 6  # sampled with a cache and scored without: rounding alone


def test_the_reference_is_the_directory_that_was_named(go, home, tmp_path):
    toy_language.make_model(7).save_pretrained(tmp_path / "other")
    toy_language.make_tokenizer().save_pretrained(tmp_path / "other")
    ids = torch.tensor([[1, 5, 9, 7]])
    model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (home, tmp_path / "other"))

    run, own = go(reference=str(tmp_path / "other"), log_samples=1), go()

    assert json.loads((run.path / "lineage.json").read_text())["reference"] == module_digest(other)
    assert json.loads((own.path / "lineage.json").read_text())["reference"] == module_digest(model)
    line = kept(run)[0]
    ids, first = torch.tensor([line["prompt_ids"] + line["completion_ids"]]), len(line["prompt_ids"])
    logp = other(ids).logits[0, first - 1 : -1].log_softmax(dim=-1).gather(1, ids[0, first:, None])[:, 0].detach()
    assert_close(torch.tensor(line["kl_reference"]), torch.tensor(line["logprob"]) - logp, atol=1e-4, rtol=0)


# the critic


def test_a_fresh_critic_says_zero_or_something_small_at_random(go):
    zero, normal = (kept(go(critic_init=init, log_samples=2))[0]["value"] for init in ("zero", "normal"))

    assert set(zero) == {0.0}
    assert 0 < max(map(abs, normal)) < 10


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critic_is_saved_with_a_trunk_of_its_own_or_none(go, critic):
    path = go(critic=critic).path / "policy"

    assert json.loads((path / "understudy.json").read_text())["critic"] == critic
    assert (path / "critic" / "model.safetensors").exists() == (critic == "separate")
    assert Policy.load(path).critic is not None


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_while_the_critic_warms_up_the_actor_stands_still_to_the_bit(go, home, critic):
    path = go(critic=critic, critic_warmup=99, learning_rate=1e-3).path / "policy"

    assert apart(path, home) == 0.0
    moved = Policy.load(path).critic
    assert float(moved.head.weight.detach().abs().max()) > 1e-4
    if critic == "separate":
        there = parameters(home)
        assert any(not torch.equal(x, there[f"model.{name}"]) for name, x in moved.trunk.named_parameters())


def test_after_the_warm_up_the_actor_learns(go, home):
    assert apart(go(critic_warmup=1, learning_rate=1e-3).path / "policy", home) > 1e-5


def test_the_critics_learning_rate_is_its_own(go, home):
    path = go(learning_rate=1e-12, critic_learning_rate=1e-2).path / "policy"

    assert apart(path, home) < 1e-9
    assert float(Policy.load(path).critic.head.weight.detach().abs().max()) > 1e-3


def test_the_critics_gradient_has_a_bound_of_its_own(go, home):
    # a gradient of 1e-9 moves nothing where Adam's epsilon is 1e-2
    path = go(critic_max_grad_norm=1e-9, **SMOOTH).path / "policy"

    assert apart(path, home) > 1e-4
    assert float(Policy.load(path).critic.head.weight.detach().abs().max()) < 1e-6


def test_a_bound_on_the_gradient_holds_it(go, home):
    run = go(max_grad_norm=1e-9, **SMOOTH)

    assert apart(run.path / "policy", home) < 1e-6
    assert run.metrics[0]["grad_norm"] > 1e-3  # as it was before


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_a_separate_critic_begins_by_expecting_the_reward_models_score(cast, judge, weight):
    opened = cast(critic="separate", reward=f"{judge}*{weight}")
    model = RewardModel.from_pretrained(judge / "reward_model")
    rows = [[1, 10, 20, 30, 2], [1, 10, 40, 2]]
    text = pad_for_scoring(rows)

    _, value = opened.policy(text)

    assert model.scale != 1.0 and model.mean != 0.0
    assert_close(value[text.mask].detach(), weight * model.score(rows), atol=1e-5, rtol=1e-5)


def test_a_reward_models_digest_is_written_down_and_it_does_not_move(go, judge):
    run = go(critic="separate", reward=str(judge), learning_rate=1e-3)

    model = RewardModel.from_pretrained(judge / "reward_model")
    assert json.loads((run.path / "lineage.json").read_text())[f"reward {judge}"] == model.digest


# rewards


@pytest.mark.parametrize("keep", [False, True])
def test_a_reward_function_reads_special_tokens_where_asked(go, tmp_path, keep):
    model, seen = furnish(tmp_path / "model"), []
    tokenizer = AutoTokenizer.from_pretrained(model)
    special = sorted(set(tokenizer.get_vocab()) - {"</s>"})[:100]
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.save_pretrained(model)

    def score(completions, completion_ids):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    go(model=str(model), reward=score, keep_special_tokens=keep)

    said = {(word in words.split()) for words, ids in seen for word in special if word in tokenizer.decode(ids).split()}
    assert said == {keep}
    assert not any("</s>" in words for words, _ in seen)


def test_a_python_function_is_a_reward_and_config_json_names_it(go):
    def shortness(prompts, completions):
        return [-float(len(completion)) for completion in completions]

    run = go(reward=shortness, gold=[shortness], log_samples=2)

    config = json.loads((run.path / "config.json").read_text())["config"]
    assert config["reward"] == ["function shortness"] == config["gold"]
    for line in kept(run):
        assert line["score"] == -len(line["completion"])
    assert run.metrics[0]["gold_mean"] == run.metrics[0]["score_mean"]


def test_a_reward_function_may_hold_what_cannot_be_copied(go):
    class Judge:
        def __init__(self):
            self.file = open(__file__)  # noqa: SIM115 - closed below

        def __call__(self, prompts, completions):
            return [1.0] * len(completions)

    judge = Judge()

    assert go(reward=judge).metrics[0]["score_mean"] == 1.0
    judge.file.close()


def test_rewards_of_every_kind_add_up_by_their_weights_and_are_logged_apart(go, judge, tmp_path):
    (tmp_path / "mine.py").write_text("def words(completions):\n    return [len(c.split()) for c in completions]\n")
    mine = f"{tmp_path / 'mine.py'}:words"

    line = go(reward=(f"{judge}*2", f"{mine}*0.5", "length"), gold=mine).metrics[0]

    parts = [line[f"score_{name}"] for name in (judge.name, "words", "length")]
    assert line["score_mean"] == pytest.approx(2 * parts[0] + 0.5 * parts[1] + parts[2], rel=1e-4)
    assert line["gold_mean"] == pytest.approx(parts[1])


def test_gold_is_measured_and_never_trained_on(go):
    def gold(prompts, completions):
        return [100.0 * len(completion) for completion in completions]

    one, other = go(learning_rate=1e-3), go(learning_rate=1e-3, gold=gold)

    assert apart(one.path / "policy", other.path / "policy") == 0.0
    assert {"gold_mean", "evaluation_gold", "evaluation_reference_gold"} <= set(other.metrics[-1])


def test_a_reward_function_that_takes_too_long_is_missing(go, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(completions):\n    time.sleep(60)\n    return [0.0] * len(completions)\n"
    )
    started = time.monotonic()

    run = go(
        reward=f"{tmp_path / 'slow.py'}:slow",
        reward_timeout=0.1,
        completions_per_iteration=1,
        total_tokens=1,
        evaluate_rows=1,
    )

    assert run.metrics[0]["score_missing_fraction"] == 1.0
    assert time.monotonic() - started < 30


def test_a_missing_score_is_counted_and_its_row_teaches_nothing(go):
    def moody(special):
        """A score of 1 for the first four rows; none, or something else, for the other four."""
        return lambda completions: [float(i % 2) for i in range(4)] + [special] * (len(completions) - 4)

    how = {"total_tokens": 1, "learning_rate": 1e-3}
    missing, zero = go(reward=moody(None), **how), go(reward=moody(0.0), **how)

    assert missing.metrics[0]["score_missing_fraction"] == 0.5
    assert missing.metrics[0]["score_mean"] == 0.5  # of those that are there
    assert zero.metrics[0]["score_missing_fraction"] == 0.0
    assert apart(missing.path / "policy", zero.path / "policy") > 1e-5  # missing is not zero


def test_scores_that_go_missing_are_told_once_and_noted(go, capsys):
    def score(completions):
        return [None if i == 0 else float(i % 2) for i in range(len(completions))]

    run = go(reward=score, quiet=False)

    events = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    texts = [event["text"] for event in events if event["kind"] == "scores_missing"]
    assert texts == ["reward score gave 1 of 8 completions no score (1 none): they are missing, which is not 0"]
    assert capsys.readouterr().err.count(f"understudy: {texts[0]}\n") == 1
    assert [line["score_missing_fraction"] for line in run.metrics] == [0.125, 0.125]


def test_what_resume_needs_of_a_function_is_printed_on_resume(go, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def score(completions):\n    return [float(len(c)) for c in completions]\n")
    spec = f"{tmp_path / 'mine.py'}:score"
    run = go(reward=spec, quiet=False)
    assert "resume is exact only" not in capsys.readouterr().err

    resume(run.path, reward=(spec,))
    assert "resume is exact only if" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["clip", "penalty"])
def test_where_every_score_is_missing_nothing_moves_and_nothing_breaks(go, home, objective):
    run = go(
        reward=lambda completions: [None] * len(completions),
        objective=objective,
        adaptive_kl_target=0.01 if objective == "penalty" else 0.0,
        kl_reference_target=4.0,
        kl_reference_horizon=8,
        learning_rate=1e-3,
    )

    assert apart(run.path / "policy", home) == 0.0
    assert [line["score_missing_fraction"] for line in run.metrics] == [1.0, 1.0]
    assert [line["optimizer_steps"] for line in run.metrics] == [0, 0]
    assert {line["kl_reference_coef"] for line in run.metrics} == {0.05}  # nothing was measured, nothing is steered
    assert {line.get("kl_coef", 1.0) for line in run.metrics} == {1.0}


# coefficients that adapt


def test_the_penaltys_coefficient_follows_its_target(go):
    low, high, fixed = (
        go(objective="penalty", kl_old_coef=0.5, adaptive_kl_target=target, learning_rate=1e-4).metrics
        for target in (1e-9, 9.0, 0)
    )

    assert [line["kl_old_coef"] for line in low] == [0.5, 1.0]
    assert [line["kl_old_coef"] for line in high] == [0.5, 0.25]
    assert [line["kl_old_coef"] for line in fixed] == [0.5, 0.5]


def test_coefficients_stand_still_while_the_critic_warms_up(go):
    how = {"adaptive_kl_target": 0.1, "kl_reference_target": 4.0, "kl_reference_horizon": 8, "critic_warmup": 99}
    lines = go(objective="penalty", **how).metrics

    assert {(line["kl_old_coef"], line["kl_reference_coef"]) for line in lines} == {(1.0, 0.05)}


def test_the_reference_coefficient_follows_its_target_within_its_horizon(go):
    # at KL 0 and a target of 4 nats the error is clipped at -0.2: 0.5 * (1 - 0.2 * 8 rows / horizon 16) = 0.45
    run = go(kl_reference_coef=0.5, kl_reference_target=4.0, kl_reference_horizon=16)

    assert [line["kl_reference_coef"] for line in run.metrics] == pytest.approx([0.5, 0.45])


# pretraining text


def test_pretraining_text_comes_in_turn_beside_the_rows(cast, home):
    opened = cast(pretraining=str(home / "texts.jsonl"))
    sentences = [json.loads(line)["text"] for line in (home / "texts.jsonl").read_text().splitlines()]

    opened.run.iteration = 20  # 21 iterations of 3 rows come before

    mix = opened.next_pretraining_text(3)

    for row, sentence in zip(mix.ids, (sentences[63], *sentences[:2]), strict=True):
        assert opened.tokenizer.decode(row.tolist()).startswith(sentence)


def test_pretraining_texts_that_are_too_long_are_left_out_and_counted(cast, home):
    opened = cast(pretraining=str(home / "texts.jsonl"), too_long="skip", max_length=12)

    assert max(len(example.ids) for example in opened.pretraining_examples) <= 12
    assert (
        f"{64 - len(opened.pretraining_examples)} left out as too long: {len(opened.pretraining_examples)} are read"
        in opened.policy.warnings[-1]
    )


def test_pretraining_text_pulls_the_policy_towards_it(go, home, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "my dog smiled near the river ."}\n')
    ids = torch.tensor([toy_language.make_tokenizer().encode("my dog smiled near the river .")])

    def surprise(path) -> float:
        return float(AutoModelForCausalLM.from_pretrained(path)(ids, labels=ids).loss.detach())

    how = {"learning_rate": 1e-2, "kl_reference_coef": 0.0}
    mixed = go(pretraining=str(tmp_path / "one.jsonl"), pretraining_coef=10.0, **how)

    assert surprise(mixed.path / "policy") < surprise(home) - 2
    assert surprise(go(**how).path / "policy") > surprise(home) - 1
    assert mixed.metrics[1]["pretraining_loss"] < mixed.metrics[0]["pretraining_loss"]


# data


def test_held_out_prompts_are_not_trained_on(cast):
    opened = cast(held_out=9)
    learned, examined = ({p.ids for p in s.prompts} for s in (opened.sampler, opened.evaluation_sampler))

    assert len(opened.evaluation_sampler) == 9
    assert not learned & examined
    assert len(opened.sampler) + len(opened.evaluation_sampler) == 40


def test_every_prompt_comes_once_before_one_comes_twice(go):
    run = go(
        completions_per_iteration=8, total_tokens=8 * 6 * 9, log_samples=8, held_out=8
    )  # 32 prompts to learn from, 8 an iteration

    prompts = [json.dumps(line["prompt_ids"]) for i in range(1, 5) for line in kept(run, i)]
    rows = [line["row"] for i in range(1, 5) for line in kept(run, i)]
    assert rows == list(range(32))
    known = [json.dumps(p) for p in prompts]
    assert len(set(known)) >= 30  # two openings of the made-up language may be the same


def test_chat_is_laid_out_by_the_template_which_is_saved_with_the_policy(go, tmp_path):
    chat = [{"prompt": [{"role": "user", "content": f"{word} dog"}]} for word in ("the", "a", "my")]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    template = "{{ bos_token }}{% for m in messages %} {{ m.content }} .{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)

    run = go(
        data=str(tmp_path / "chat.jsonl"),
        chat_template=str(tmp_path / "mine.jinja"),
        log_samples=8,
        completions_per_iteration=3,
    )

    tokenizer = AutoTokenizer.from_pretrained(run.path / "policy")
    assert tokenizer.chat_template == template
    said = {" ".join(tokenizer.convert_ids_to_tokens(line["prompt_ids"])) for line in kept(run)}
    assert said == {"<s> the dog .", "<s> a dog .", "<s> my dog ."}
    assert kept(run)[0]["completion"][0]["role"] == "assistant"


# before the first step


def test_a_run_that_would_learn_nothing_is_refused_unless_told_not_to_look(go):
    def always(completions):
        return [1.0] * len(completions)

    with pytest.raises(RequestError, match="preflight"):
        go(reward=always, preflight=True)
    assert go(reward=always, preflight=False).metrics[0]["score_mean"] == 1.0


# what is written, and when


def test_evaluations_come_every_so_many_iterations_and_at_the_end(go):
    run = go(total_tokens=48 * 5, evaluate_every=2, evaluate_rows=5, gold="length")

    assert [i for i, line in enumerate(run.metrics, 1) if "evaluation_score" in line] == [2, 4, 5]
    found = json.loads((run.path / "evaluation.json").read_text())
    assert found["rows"] == 5 == len(found["samples"])
    assert found["held_out"] is True
    assert len(list((run.path / "samples").glob("evaluation-*.json"))) == 3


def test_without_kept_samples_evaluations_still_keep_theirs(go):
    path = go(log_samples=0).path / "samples"

    assert [file.name for file in path.iterdir()] == ["evaluation-000002.json"]


def test_so_many_completions_an_iteration_are_kept(go):
    run = go(log_samples=3)

    assert [len(kept(run, i)) for i in (1, 2)] == [3, 3]
    line = kept(run)[0]
    for name in ("logprob", "value", "advantage", "reward", "kl_reference", "entropy", "tokens"):
        assert len(line[name]) == len(line["completion_ids"]), name


def test_checkpoints_come_every_so_many_iterations_and_at_the_end(go):
    run = go(total_tokens=48 * 4 + 1, checkpoint_every=2)

    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    last = f"{len(run.metrics):06d}"
    assert names == sorted({"000002", "000004", last})


def test_lines_of_metrics_come_every_so_many_iterations_and_are_means(go):
    each, every = go(total_tokens=48 * 3 + 1), go(total_tokens=48 * 3 + 1, log_every=2)

    assert [line["iteration"] for line in every.metrics] == [2, 4]
    mean = (each.metrics[0]["score_mean"] + each.metrics[1]["score_mean"]) / 2
    assert every.metrics[0]["score_mean"] == pytest.approx(mean)


def test_a_run_is_written_where_it_was_asked_for(home, tmp_path, capsys):
    run = ppo.train(ppo_config(home, tmp_path / "here", quiet=True))

    assert run.path == tmp_path / "here"
    assert (tmp_path / "here" / "metrics.jsonl").exists()
    assert capsys.readouterr().out + capsys.readouterr().err == ""


def test_a_run_that_is_not_quiet_says_how_it_goes(home, tmp_path, capsys):
    ppo.train(ppo_config(home, tmp_path / "run", quiet=False))

    said = capsys.readouterr()
    assert "ppo" in said.out + said.err


def test_a_run_takes_the_threads_it_was_given(go):
    before = torch.get_num_threads()
    try:
        go(num_threads=2, completions_per_iteration=1, max_new_tokens=1, total_tokens=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_metrics_go_to_tensorboard_where_it_is_there(go):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")

    assert list(go(log=("tensorboard",)).path.rglob("events.out.tfevents*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_run_works_on_the_device_it_was_given(go, judge, critic):
    run = go(device="cuda", critic=critic, reward=str(judge), log_samples=2)

    assert math.isfinite(run.metrics[-1]["loss"])


def test_an_interrupted_run_keeps_its_policy(home, tmp_path):
    iterations = ppo.iterate(ppo_config(home, tmp_path / "run", total_tokens=10_000))
    next(iterations)
    iterations.close()

    assert Policy.load(tmp_path / "run" / "policy").critic is not None


# the Kullback-Leibler controller


@pytest.fixture(scope="module")
def speaker(home, tmp_path_factory):
    """The rehearsal's model, briefly trained on its language."""
    data = toy_language.write_jsonl(({"text": s} for s in toy_language.sentences(1500, 1)), home / "many.jsonl")
    out = tmp_path_factory.mktemp("speaker") / "run"
    return sft.train(sft_config(home, out, data=str(data), learning_rate=5e-3, batch_size=32)).path


def kindness(completions):
    """How many different kind words: a reward that pulls away from the language."""
    return [float(len(toy_language.KIND_WORDS.intersection(said.split()))) for said in completions]


@pytest.fixture
def kl_at_the_end(speaker, home, tmp_path):
    """Mean KL of a run's last 20 iterations, in nats a completion."""

    def train(coef: float, *, target: float, iterations: int) -> float:
        run = ppo.train(
            ppo_config(
                home,
                tmp_path / f"{coef}",
                model=str(speaker),
                reward=kindness,
                completions_per_iteration=48,
                max_new_tokens=8,
                fixed_length=8,
                total_tokens=48 * 8 * iterations,
                num_minibatches=1,
                learning_rate=5e-4,
                learning_rate_schedule="constant",
                critic_learning_rate=5e-3,
                kl_reference_coef=coef,
                kl_reference_target=target,
                **({"kl_reference_horizon": 120} if target else {}),
            )
        )
        return sum(line["kl_reference"] for line in run.metrics[-20:]) / 20

    return train


@pytest.mark.learning
def test_the_kl_is_held_at_its_target_wherever_its_coefficient_began(kl_at_the_end):
    for coef in (0.15, 1.5):
        assert kl_at_the_end(coef, target=4.0, iterations=100) == pytest.approx(4.0, rel=0.25)


@pytest.mark.learning
def test_without_a_target_the_coefficient_decides_how_far_the_policy_goes(kl_at_the_end):
    assert kl_at_the_end(0.15, target=0.0, iterations=50) > 2 * kl_at_the_end(1.5, target=0.0, iterations=50)


# runs of another kind


def test_a_run_of_another_kind_is_refused_by_its_recipe(go, judge, tmp_path):
    (tmp_path / "agent" / "policy").mkdir(parents=True)
    (tmp_path / "agent" / "config.json").write_text('{"recipe": "control ppo", "config": {}}')
    (tmp_path / "agent" / "policy" / "policy.json").write_text("{}")

    with pytest.raises(
        RequestError, match=r"agent', a run of `control ppo`, which acts in an environment: give a lang"
    ):
        go(model=str(tmp_path / "agent"))
    with pytest.raises(RequestError, match=r"agent/policy', a policy of a control run, which acts in an environment"):
        go(model=str(tmp_path / "agent" / "policy"))
    for refused in (lambda: go(model=str(judge)), lambda: load(judge)):
        with pytest.raises(
            RequestError, match="a run of `language reward-model`, which holds a reward model and no policy"
        ):
            refused()
    run = go(total_tokens=1)
    with pytest.raises(
        RequestError, match=r"^reward is .* a run of `language ppo`, which holds a policy: give a reward"
    ):
        go(reward=str(run.path))
    with pytest.raises(
        RequestError, match=r"^init_from is .* a run of `language ppo`: its policy writes text, and acts nowhere"
    ):
        policy_path(run.path, "init_from")


def test_a_run_without_its_policy_is_refused_with_the_way_to_finish_it(go, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"recipe": "language ppo", "config": {}}')

    for refused in (lambda: go(model=str(tmp_path / "half")), lambda: load(tmp_path / "half")):
        with pytest.raises(RequestError, match=r"has not saved its policy: finish it with `understudy resume .*half`"):
            refused()


def test_a_model_that_is_nowhere_is_refused_in_a_whole_sentence(go):
    with pytest.raises(
        RequestError, match=r"model is './none': there is no such directory here, .* in Hugging Face layout$"
    ):
        go(model="./none")
