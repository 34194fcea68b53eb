"""The language recipes give TRL's numbers, recorded from its own trainers (oracles/record_trl.py), or differ as said."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from understudy.advantage import gae, group_relative
from understudy.batch import Batch, TokenBatch, Trajectory
from understudy.language import grpo, ppo, reinforce, training
from understudy.language.model.policy import Critic, Policy, Reference
from understudy.language.model.token_distribution import SampledTokens
from understudy.language.rlhf import compute_rewards, reference_kl_penalty
from understudy.objective import clipped_surrogate, clipped_value_loss, kl_k3, policy_gradient, squared_error
from understudy.objective import gspo as gspo_objective
from understudy.reduce import masked_mean, per_budget, per_row, per_step, standardize, whiten
from understudy.reward import episode_score
from understudy.update import update

TRL, TRL_PPO = (
    json.loads((Path(__file__).parent / "oracles" / f"trl_{name}.json").read_text()) for name in ("grpo", "ppo")
)
ANSWERS = TRL["answers"]
PROMPTS = [prompt for prompt in TRL["prompts"] for _ in range(TRL["group"])]
WHOLE = {"model": "tiny", "data": "rows", "reward": lambda prompts, completions: [0.0] * len(prompts)}
SIZES = {"completions_per_iteration": len(ANSWERS), "group_size": TRL["group"], "max_new_tokens": TRL["limit"]}
SETTINGS = {
    "grpo": {},
    "clip_higher": {"clip_high": 0.28},
    "temperature": {"temperature": 0.7},
    "kl": {"kl_reference_coef": 0.3},
    "dr_grpo": {"scale_by_std": False, "loss_aggregation": "token_sum_over_budget"},
    "dapo": {"loss_aggregation": "token_mean", "clip_high": 0.28},
    "dapo_accumulated": {"loss_aggregation": "token_mean", "clip_high": 0.28, "micro_batch_size": 3},
    "dapo_entropy": {"loss_aggregation": "token_mean", "clip_high": 0.28, "entropy_coef": 0.05},
    "bnpo": {"loss_aggregation": "token_mean"},
    "cispo": {
        "objective": "cispo",
        "loss_aggregation": "token_mean",
        "clip": 1.0,
        "clip_high": 0.1,
    },  # TRL clips at 1.1, not below
    "gspo": {"objective": "gspo", "clip": 0.05, "clip_high": 0.1},
}
EVERY_GRPO = pytest.mark.parametrize("name", SETTINGS)
EVERY_PPO = pytest.mark.parametrize("name", TRL_PPO["ppo"])

# Float32 sums in another order; then two steps of Adam, which divides a gradient by its own size.
LOSS = {"rtol": 1e-5, "atol": 1e-6}
NORM = {"rtol": 1e-5, "atol": 0.0}
WEIGHTS = {"rtol": 0.0, "atol": 2e-6}


def lm(weights: dict) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**TRL["model"]))
    model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    return model


def text_of(prompts: list[list[int]], answers: list[list[int]]) -> TokenBatch:
    rows = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    column = torch.arange(ids.shape[1])
    first, last = (torch.tensor([n - 1 for n in map(len, x)])[:, None] for x in (prompts, rows))
    return TokenBatch(ids, (column >= first) & (column < last))


def record_of(policy: Policy, prompts: list[list[int]], answers: list[list[int]], stopped: Tensor) -> Trajectory:
    """What the policy said, with its own log-probs. stopped: bool [B], the others were cut."""
    text = text_of(prompts, answers)
    with torch.no_grad():
        logprob = policy(text)[0].log_prob(text.action)
    column = torch.arange(text.ids.shape[1])
    last = text.mask & (column == torch.where(text.mask, column, -1).amax(dim=1, keepdim=True))
    return Trajectory(
        obs=text,
        action=text.action,
        behavior_logprob=logprob,
        mask=text.mask,
        reward=torch.zeros_like(logprob),
        terminated=last & stopped[:, None],
        truncated=last & ~stopped[:, None],
    )


def laid(x: Tensor, mask: Tensor) -> Tensor:
    """From a column for each token of the answer, [B, L], to ours, [B, T]."""
    said = torch.arange(x.shape[1]) < mask.sum(dim=1, keepdim=True)
    return torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, x[said])


def by_answer(x: Tensor, mask: Tensor) -> Tensor:
    """From our columns to one for each token of the answer, 0 after its end."""
    length = mask.sum(dim=1, keepdim=True)
    said = torch.arange(int(length.max())) < length
    return torch.zeros(said.shape, dtype=x.dtype).masked_scatter(said, x[mask])


def few(model: nn.Module, recorded: dict) -> dict[str, Tensor]:
    """The weights of the layers that were recorded."""
    return {name: x.detach().clone() for name, x in model.state_dict().items() if name in recorded}


def tensors(recorded: dict) -> dict[str, Tensor]:
    return {name: torch.tensor(x) for name, x in recorded.items()}


# ---- GRPO


def settings(name: str, **fields) -> grpo.Config:
    return grpo.Config(**WHOLE, **SIZES, **step(TRL), **(SETTINGS.get(name, {}) | fields))


def step(recorded: dict) -> dict:
    given = recorded["step"]
    return {name: given[theirs] for name, theirs in (("learning_rate", "learning_rate"), ("adam_eps", "adam_epsilon"))}


def weigh(cfg: grpo.Config):
    return {
        "sequence_mean_token_mean": per_row,
        "token_mean": per_step,
        "token_sum_over_budget": partial(per_budget, budget=cfg.limit),
    }[cfg.loss_aggregation]


def scores(name: str = "grpo") -> Tensor:
    given = TRL["missing" if name == "missing" else "scores"]
    return torch.tensor([float("nan") if x is None else x for x in given])


def critic_free(cfg, score: Tensor) -> tuple[Policy, Batch, Tensor]:
    """Policy, record with rewards and reference, and rewards, as the recipes come to them; advantages are still 0."""
    policy = Policy(lm(TRL["weights"]), temperature=cfg.temperature)
    record = record_of(policy, PROMPTS, ANSWERS, torch.tensor([answer[-1] == 1 for answer in ANSWERS]))
    reference = Reference(Policy(lm(TRL["reference"]), temperature=cfg.temperature))
    record, reward, referred = compute_rewards(
        SimpleNamespace(trajectory=record), score, reference, cfg.kl_reference_coef, cfg
    )
    nothing = torch.zeros_like(reward)
    found = {"value": nothing, "advantage": nothing, "target": nothing}
    old = SampledTokens(record.action, record.behavior_logprob)
    return policy, Batch.of(record, **found, old_distribution=old, reference=referred.log_prob(record.action)), reward


def compared(batch: Batch, reward: Tensor, cfg: grpo.Config) -> Tensor:
    """The recipe's advantages, [B]."""
    members = torch.arange(cfg.completions_per_iteration) // cfg.group_size
    return grpo.group_advantage(
        episode_score(reward, batch.mask), members, batch.mask.any(dim=1), scale_by_std=cfg.scale_by_std
    )


def improve(cfg: grpo.Config, score: Tensor, objective=None, steps: int = 2) -> tuple[Policy, list[dict], list[dict]]:
    """The policy; metrics and weights after each optimizer step on the same answers."""
    policy, batch, reward = critic_free(cfg, score)
    batch = Batch.of(batch, advantage=compared(batch, reward, cfg)[:, None] * batch.mask)
    optimizer = training.adamw(cfg, {"params": policy.actor_parameters()})
    seen, kept = [], []
    for _ in range(steps):
        metrics = update(
            policy,
            optimizer,
            batch,
            objective or grpo.make_objective(cfg, cfg.kl_reference_coef),
            num_epochs=1,
            num_minibatches=1,
            max_grad_norm=TRL["step"]["max_grad_norm"],
            micro_batch_size=cfg.micro_batch_size or None,
            loss_weights=weigh(cfg),
            generator=torch.Generator().manual_seed(0),
        )
        seen.append(metrics)
        kept.append(few(policy.model, TRL["grpo"]["grpo"]["final"]))
    return policy, seen, kept


def theirs(name: str) -> list[float]:
    """TRL's loss at each optimizer step: the sum over its micro-batches, which it has divided already."""
    losses = TRL["grpo"][name]["losses"]
    count = len(losses) // 2
    return [sum(losses[:count]), sum(losses[count:])]


def far(cfg: grpo.Config, which: str, objective=None) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient norm and the last norm's gradient, where the old log-probs are far from the policy's."""
    policy, batch, _ = critic_free(cfg, scores())
    distance = laid(torch.tensor(TRL["distance"]), batch.mask)
    advantage = torch.tensor(TRL["far_advantages"])[:, None] * batch.mask
    mask = batch.mask
    if which == "tools":
        mask = mask & laid(torch.tensor(TRL["tool_mask"]), mask).bool()
    obs = TokenBatch(batch.obs.ids, mask)
    batch = Batch.of(
        batch, obs=obs, mask=mask, advantage=advantage * mask, behavior_logprob=batch.behavior_logprob - distance
    )
    loss, _ = (objective or grpo.make_objective(cfg, cfg.kl_reference_coef))(policy, batch)
    total = (loss * weigh(cfg)(mask)).sum()
    total.backward()
    gradients = [x.grad for x in policy.model.parameters() if x.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return float(total.detach()), norm, policy.model.model.norm.weight.grad


@EVERY_GRPO
def test_the_advantages_of_a_group_are_trls(name):
    _, batch, reward = critic_free(settings(name), scores())

    assert_close(compared(batch, reward, settings(name)), torch.tensor(TRL["grpo"][name]["advantages"]), **LOSS)


@EVERY_GRPO
def test_the_loss_of_both_steps_is_trls(name):
    _, seen, _ = improve(settings(name), scores())

    assert_close(torch.tensor([m["loss"] for m in seen]), torch.tensor(theirs(name)), **LOSS)


@EVERY_GRPO
def test_the_gradient_of_both_steps_has_trls_norm(name):
    _, seen, _ = improve(settings(name), scores())

    assert_close(torch.tensor([m["grad_norm"] for m in seen]), torch.tensor(TRL["grpo"][name]["grad_norms"]), **NORM)


@EVERY_GRPO
@pytest.mark.parametrize(("which", "place"), [("first", 0), ("final", 1)])
def test_the_weights_after_one_step_and_two_are_trls(name, which, place):
    _, _, kept = improve(settings(name), scores())

    assert_close(kept[place], tensors(TRL["grpo"][name][which]), **WEIGHTS)


@EVERY_GRPO
@pytest.mark.parametrize("which", ["plain", "tools"])
def test_far_from_the_old_policy_the_loss_and_its_gradient_are_trls(name, which):
    recorded = TRL["grpo"][name]["far"][which]
    loss, norm, gradient = far(settings(name), which)

    assert_close(loss, recorded["loss"], **LOSS)
    assert_close(norm, torch.tensor(recorded["grad_norm"]), **NORM)
    assert_close(gradient, torch.tensor(recorded["gradient"]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("grpo", {"loss_aggregation": "token_mean"}),
        ("grpo", {"clip": 0.3}),
        ("clip_higher", {"clip_high": 0.0}),
        ("temperature", {"temperature": 1.0}),
        ("kl", {"kl_reference": "k2"}),
        ("dr_grpo", {"loss_aggregation": "sequence_mean_token_mean"}),
        ("dapo", {"loss_aggregation": "sequence_mean_token_mean"}),
        ("dapo_entropy", {"entropy_coef": 0.0}),
        ("cispo", {"clip": 0.2}),
        ("gspo", {"objective": "grpo"}),
    ],
)
def test_without_this_setting_the_loss_or_its_gradient_would_not_be_trls(name, other):
    recorded = TRL["grpo"][name]["far"]["plain"]
    loss, norm, _ = far(settings(name, **other), "plain")

    assert abs(norm / recorded["grad_norm"] - 1) > 1e-3 or abs(loss - recorded["loss"]) > 1e-3


# ---- where GRPO differs


def test_trl_averages_the_entropy_bonus_over_tokens_and_ours_weighs_it_like_the_loss():
    cfg = settings("grpo")
    policy, batch, _ = critic_free(cfg, scores())
    entropy = policy(batch.obs)[0].entropy().detach()
    recorded = TRL["grpo"]["grpo_entropy"]

    bonus = 0.05 * float(masked_mean(entropy, batch.mask))
    assert_close(recorded["losses"][0], TRL["grpo"]["grpo"]["losses"][0] - bonus, **LOSS)
    _, seen, _ = improve(settings("grpo", entropy_coef=0.05), scores(), steps=1)
    by_row = 0.05 * float((entropy * per_row(batch.mask)).sum())
    assert_close(seen[0]["loss"], TRL["grpo"]["grpo"]["losses"][0] - by_row, **LOSS)
    assert abs(by_row - bonus) > 1e-4


def test_trl_weighs_the_kl_of_a_sequence_ratio_by_that_ratio_and_ours_by_the_tokens_own():
    cfg = settings("gspo", kl_reference_coef=0.3)
    recorded = TRL["grpo"]["gspo_kl"]["far"]["plain"]

    def by_row(distribution, logprob: Tensor, batch: Batch) -> Tensor:
        gap = logprob - batch.behavior_logprob
        ratio = (gap.sum(dim=1, keepdim=True) / batch.mask.sum(dim=1, keepdim=True)).exp()
        own = torch.where(batch.mask, gap, 0.0).exp()
        return 0.3 * kl_k3(distribution, logprob, batch) / own * ratio

    objective = partial(gspo_objective, low=0.05, high=0.1, entropy_coef=0.0, kl_penalty=by_row)
    loss, norm, _ = far(cfg, "plain", objective)
    assert_close(loss, recorded["loss"], **LOSS)
    assert_close(norm, torch.tensor(recorded["grad_norm"]), **NORM)
    loss, _, _ = far(cfg, "plain", partial(objective, kl_penalty=reference_kl_penalty(0.3, cfg)))
    assert abs(loss - recorded["loss"]) > 1e-3


def test_trl_averages_micro_batches_of_bnpo_and_ours_knows_no_micro_batch():
    recorded = TRL["grpo"]["bnpo_accumulated"]
    policy, batch, _ = critic_free(settings("bnpo"), scores())
    advantage = torch.tensor(recorded["advantages"])[:, None] * batch.mask
    loss, _ = grpo.make_objective(settings("bnpo"), 0.0)(policy, Batch.of(batch, advantage=advantage))

    parts = [masked_mean(loss[rows], batch.mask[rows]) for rows in torch.tensor(recorded["rows"]).split(3)]
    assert_close(torch.stack(parts).detach() / 3, torch.tensor(recorded["losses"][:3]), **LOSS)
    _, seen, _ = improve(settings("bnpo", micro_batch_size=3), scores(), steps=1)
    assert_close(seen[0]["loss"], theirs("bnpo")[0], **LOSS)
    assert abs(theirs("bnpo_accumulated")[0] - theirs("bnpo")[0]) > 1e-3


def test_a_row_without_a_score_stays_in_trls_mean_over_rows_and_is_left_out_of_ours():
    cfg, recorded = settings("grpo"), TRL["grpo"]["missing"]
    _, batch, reward = critic_free(cfg, scores("missing"))

    assert_close(compared(batch, reward, cfg), torch.tensor(recorded["advantages"]), **LOSS)
    _, seen, _ = improve(cfg, scores("missing"), steps=1)
    assert_close(seen[0]["grad_norm"] * 8 / 9, recorded["grad_norms"][0], **NORM)  # 8 rows of 9 have a score


def test_the_deviation_of_the_batch_is_an_option_of_trls_alone():
    score, group = scores(), torch.arange(9) // 3

    scaled = group_relative(score, group, scale_by_std=False) / (score.std() + 1e-4)
    assert_close(scaled, torch.tensor(TRL["grpo"]["scale_batch"]["advantages"]), **LOSS)


# ---- RLOO


def leave_one_out(name: str) -> tuple[reinforce.Config, Policy, Batch]:
    coef = TRL["rloo"][name]["settings"]["beta"]
    cfg = reinforce.Config(**WHOLE, **SIZES, **step(TRL), kl_reference_coef=coef)
    policy, batch, reward = critic_free(cfg, scores(name))
    there = batch.mask.any(dim=1)
    advantage = reinforce.subtract_baseline(reward, episode_score(reward, batch.mask), there, batch.mask, 0.0, cfg)
    return cfg, policy, Batch.of(batch, advantage=advantage)


def one_step(name: str, weigh_by) -> tuple[Policy, dict]:
    cfg, policy, batch = leave_one_out(name)
    metrics = update(
        policy,
        training.adamw(cfg, {"params": policy.actor_parameters()}),
        batch,
        partial(policy_gradient, value_coef=0.0, entropy_coef=0.0, value_loss_fn=squared_error),
        num_epochs=1,
        num_minibatches=1,
        max_grad_norm=TRL["step"]["max_grad_norm"],
        loss_weights=weigh_by,
        generator=torch.Generator().manual_seed(0),
    )
    return policy, metrics


@pytest.mark.parametrize("name", ["rloo", "kl", "missing"])
def test_leave_one_out_advantages_are_trls(name):
    _, _, batch = leave_one_out(name)

    assert_close(
        batch.advantage.sum(dim=1) / batch.mask.sum(dim=1).clamp(min=1),
        torch.tensor(TRL["rloo"][name]["advantages"]),
        **LOSS,
    )


def test_trls_normalised_leave_one_out_is_a_standardisation_over_the_rows():
    _, _, batch = leave_one_out("rloo")
    advantage = (batch.advantage.sum(dim=1) / batch.mask.sum(dim=1))[:, None]

    ours = standardize(advantage, torch.ones_like(advantage, dtype=torch.bool), eps=1e-4)[:, 0]
    assert_close(ours, torch.tensor(TRL["rloo"]["normalized"]["advantages"]), **LOSS)


@pytest.mark.parametrize("name", ["rloo", "kl"])
def test_trls_gradient_of_rloo_is_that_of_whole_answers(name):
    _, metrics = one_step(name, partial(per_budget, budget=1))

    assert_close(metrics["grad_norm"], TRL["rloo"][name]["grad_norms"][0], **NORM)


@pytest.mark.parametrize("name", ["rloo", "kl"])
def test_our_gradient_of_rloo_is_trls_over_the_mean_length(name):
    _, metrics = one_step(name, per_step)

    length = sum(map(len, ANSWERS)) / len(ANSWERS)
    assert_close(metrics["grad_norm"] * length, TRL["rloo"][name]["grad_norms"][0], **NORM)


@pytest.mark.parametrize("name", ["rloo", "kl"])
def test_the_weights_after_a_clipped_step_of_rloo_are_trls(name):
    # both gradients are longer than the bound, and clipped they are the same
    policy, metrics = one_step(name, per_step)

    assert metrics["grad_norm"] > TRL["step"]["max_grad_norm"]
    recorded = TRL["rloo"][name]["first"]
    assert_close(few(policy.model, recorded), tensors(recorded), **WEIGHTS)


# ---- PPO


def ppo_settings(name: str, **fields) -> ppo.Config:
    theirs = TRL_PPO["ppo"][name]["settings"]
    given = {
        "kl_reference_coef": theirs["kl_coef"],
        "missing_eos_penalty": theirs["missing_eos_penalty"] or 0.0,
        "clip": theirs["cliprange"],
        "value_clip": theirs["cliprange_value"],
        "value_coef": theirs["vf_coef"],
        "gamma": theirs["gamma"],
        "lam": theirs["lam"],
        "num_epochs": theirs["num_ppo_epochs"],
        "num_minibatches": theirs["num_mini_batches"],
        "temperature": theirs["temperature"],
        "critic": "separate",
    }
    return ppo.Config(**WHOLE, **step(TRL_PPO), **(given | fields))


def recorded(name: str) -> SimpleNamespace:
    """TRL's variables, a column for each token of the answer; `chosen` up to the stop, `counted` one column more."""
    found = {k: torch.tensor(x) for k, x in TRL_PPO["ppo"][name].items() if isinstance(x, list) and k != "losses"}
    return SimpleNamespace(**found, chosen=~found["padding_mask"], counted=~found["padding_mask_p1"])


def asked_and_said(name: str) -> tuple[list[list[int]], list[list[int]]]:
    data = TRL_PPO["ppo"][name]
    prompts = [[token for token in row if token != TRL_PPO["padding"]] for row in data["queries"]]
    pairs = zip(data["responses"], data["sequence_lengths"], strict=True)
    return prompts, [row[: last + 1] for row, last in pairs]


def speaker(cfg: ppo.Config) -> Policy:
    """TRL's policy, and its value model as a critic of its own: the same, but for a bias that it does not have."""
    value = {name: torch.tensor(x) for name, x in TRL_PPO["value"].items()}
    trunk = lm(TRL_PPO["weights"]).model
    trunk.load_state_dict({name.removeprefix("model."): x for name, x in value.items() if name != "score.weight"})
    critic = Critic(TRL["model"]["hidden_size"], trunk)
    with torch.no_grad():
        critic.head.weight.copy_(value["score.weight"])
    critic.head.bias.requires_grad_(False)
    return Policy(lm(TRL_PPO["weights"]), critic, temperature=cfg.temperature)


def weighed(cfg: ppo.Config, name: str) -> tuple[Policy, Batch, Tensor]:
    """Policy, record with advantages, and rewards: the recipe's steps 2 to 4 on what TRL's policy said."""
    policy = speaker(cfg)
    prompts, answers = asked_and_said(name)
    stops = TRL_PPO["ppo"][name]["settings"]["stop_token"] is not None
    record = record_of(policy, prompts, answers, torch.tensor([stops and answer[-1] == 1 for answer in answers]))
    reference = Reference(Policy(lm(TRL_PPO["reference"]), temperature=cfg.temperature))
    # the recorded scores have had the penalty for a missing stop taken off already
    cut = (record.truncated.any(dim=1)) & stops
    score = recorded(name).scores + cfg.missing_eos_penalty * cut
    record, reward, referred = compute_rewards(
        SimpleNamespace(trajectory=record), score, reference, cfg.kl_reference_coef, cfg
    )
    old, value = ppo.estimate_values(policy, record, cfg)
    return policy, ppo.compute_advantages(record, reward, value, old, referred, cfg), reward


def adamw(cfg: ppo.Config, policy: Policy) -> torch.optim.Optimizer:
    critic = [x for x in policy.critic_parameters() if x.requires_grad]
    return training.adamw(cfg, {"params": policy.actor_parameters()}, {"params": critic})


def improve_ppo(cfg: ppo.Config, name: str) -> tuple[Policy, list[dict], dict]:
    """The policy, every minibatch's metrics and the update's own."""
    policy, batch, _ = weighed(cfg, name)
    seen: list[dict] = []
    metrics = update(
        policy,
        adamw(cfg, policy),
        batch,
        ppo.make_objective(cfg, cfg.kl_old_coef, cfg.kl_reference_coef),
        num_epochs=cfg.num_epochs,
        num_minibatches=cfg.num_minibatches,
        max_grad_norm=None,
        on_minibatch=lambda metrics: bool(seen.append(metrics)),
        generator=torch.Generator().manual_seed(TRL_PPO["shuffle_seed"]),
    )
    return policy, seen, metrics


def assert_weights(policy: Policy, final: dict) -> None:
    """The policy's and its critic's are those recorded."""
    assert policy.critic is not None
    trunk = {f"model.{name}": x for name, x in policy.critic.trunk.state_dict().items()}
    value = trunk | {"score.weight": policy.critic.head.weight.detach()}
    assert_close(few(policy.model, final["policy"]), tensors(final["policy"]), **WEIGHTS)
    assert_close({name: value[name] for name in final["value"]}, tensors(final["value"]), **WEIGHTS)


def after_the_stop(name: str) -> Tensor:
    """bool [B, L]: the column after the stop, where there is one; TRL pays the score there."""
    trl = recorded(name)
    return trl.counted & ~trl.chosen


@EVERY_PPO
def test_log_probs_of_policy_and_reference_are_trls(name):
    _, batch, _ = weighed(ppo_settings(name), name)
    trl = recorded(name)

    assert_close(by_answer(batch.behavior_logprob, batch.mask), torch.where(trl.chosen, trl.logprobs, 0.0), **LOSS)
    assert_close(by_answer(batch.reference, batch.mask), torch.where(trl.chosen, trl.ref_logprobs, 0.0), **LOSS)


@EVERY_PPO
def test_values_are_trls(name):
    _, batch, _ = weighed(ppo_settings(name), name)
    trl = recorded(name)

    assert_close(by_answer(batch.value, batch.mask), torch.where(trl.chosen, trl.values, 0.0), **LOSS)


@EVERY_PPO
def test_rewards_are_trls_paid_at_the_stop_and_not_after_it(name):
    _, batch, reward = weighed(ppo_settings(name), name)
    trl, after = recorded(name), after_the_stop(name)

    moved = torch.zeros_like(trl.rewards)
    moved[:, :-1] = torch.where(after, trl.rewards, 0.0)[:, 1:]
    assert_close(by_answer(reward, batch.mask), torch.where(trl.chosen, trl.rewards + moved, 0.0), **LOSS)
    assert after.any() == (name != "whole")


@EVERY_PPO
def test_gae_with_a_column_after_the_stop_is_trls(name):
    cfg, trl = ppo_settings(name), recorded(name)
    column = torch.arange(trl.counted.shape[1])
    last = trl.counted & (column == torch.where(trl.counted, column, -1).amax(dim=1, keepdim=True))
    following = nn.functional.pad(trl.values[:, 1:], (0, 1))

    advantage = gae(trl.rewards, trl.values, following, last, last & False, trl.counted, gamma=cfg.gamma, lam=cfg.lam)
    assert_close(advantage + trl.values, torch.where(trl.counted, trl.returns, 0.0), **LOSS)
    assert_close(standardize(advantage, trl.chosen), trl.advantages, **LOSS)


@EVERY_PPO
def test_advantages_differ_from_trls_by_what_its_column_after_the_stop_discounts(name):
    # TRL, stop at T: A_T = r_T + g V' - V_T + g l (s - V'); ours: A_T = r_T + s - V_T. V': V after the stop, s: the score
    cfg, trl, after = ppo_settings(name, normalize_advantage="none"), recorded(name), after_the_stop(name)
    _, batch, _ = weighed(cfg, name)
    g, decay = cfg.gamma, cfg.gamma * cfg.lam

    score, value = trl.rewards[after], trl.values[after]
    at_stop = torch.zeros(len(after)).masked_scatter(after.any(dim=1), score - g * value - decay * (score - value))
    distance = trl.sequence_lengths[:, None] - torch.arange(after.shape[1])
    gap = torch.where(trl.chosen, at_stop[:, None] * decay ** distance.clamp(min=0), 0.0)
    theirs = torch.where(trl.chosen, trl.returns - trl.values, 0.0)
    assert_close(by_answer(batch.advantage, batch.mask), theirs + gap, **LOSS)
    assert (gap.abs().max() > 0.01) == (name not in ("whole", "lambda_1"))


@pytest.mark.parametrize("name", ["whole", "lambda_1"])
def test_standardised_advantages_and_targets_are_trls(name):
    _, batch, _ = weighed(ppo_settings(name), name)
    trl = recorded(name)

    assert_close(by_answer(batch.advantage, batch.mask), trl.advantages, **LOSS)
    sums = LOSS | {"atol": 2e-6}  # a target sums up what is said of all tokens behind it
    assert_close(by_answer(batch.target, batch.mask), torch.where(trl.chosen, trl.returns, 0.0), **sums)


def test_whitening_is_trls():
    given = TRL_PPO["whiten"]
    x, mask = torch.tensor(given["x"]), torch.tensor(given["mask"])

    assert_close(standardize(x, mask), torch.where(mask, torch.tensor(given["centred"]), 0.0), **LOSS)
    assert_close(whiten(x, mask), torch.where(mask, torch.tensor(given["kept"]), 0.0), **LOSS)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("policy_loss", "policy_loss"), ("value_loss", "value_loss"), ("loss", "loss")]
)
def test_every_minibatch_of_whole_answers_has_trls_losses(ours, theirs):
    _, seen, _ = improve_ppo(ppo_settings("whole"), "whole")

    expected = torch.tensor([m[theirs] for m in TRL_PPO["ppo"]["whole"]["losses"]])
    assert_close(torch.tensor([m[ours] for m in seen]), expected, **LOSS)


def test_the_gradient_on_whole_answers_has_trls_norm():
    _, _, metrics = improve_ppo(ppo_settings("whole"), "whole")

    norms = TRL_PPO["ppo"]["whole"]["grad_norms"][2:]  # of the last of two epochs
    assert_close(metrics["grad_norm"], sum(norms) / 2, **NORM)


def test_the_weights_after_the_update_on_whole_answers_are_trls():
    policy, _, _ = improve_ppo(ppo_settings("whole"), "whole")

    assert_weights(policy, TRL_PPO["ppo"]["whole"]["final"])


@pytest.mark.parametrize(
    "other", [{"clip": 0.2}, {"value_clip": 0.0}, {"value_coef": 0.2}, {"normalize_advantage": "none"}, {"lam": 1.0}]
)
def test_without_this_setting_the_weights_would_not_be_trls(other):
    policy, _, _ = improve_ppo(ppo_settings("whole", **other), "whole")

    with pytest.raises(AssertionError):
        assert_weights(policy, TRL_PPO["ppo"]["whole"]["final"])


@pytest.mark.parametrize("name", ["stopped", "lambda_1", "accumulated"])
def test_with_trls_three_differences_our_losses_make_trls_update(name):
    # its score after the stop, a value loss that counts that column, and the mean of micro-batches' means
    cfg, trl = ppo_settings(name), recorded(name)
    policy = speaker(cfg)
    optimizer = adamw(cfg, policy)
    text = text_of(*asked_and_said(name))
    chosen, counted = text.mask, text.mask.clone()
    counted[:, 1:] |= text.mask[:, :-1] & after_the_stop(name).any(dim=1, keepdim=True)
    old, advantage = laid(trl.logprobs, chosen), laid(trl.advantages, chosen)
    values = SimpleNamespace(value=laid(trl.values, counted), target=laid(trl.returns, counted))
    accumulate = TRL_PPO["ppo"][name]["settings"]["gradient_accumulation_steps"]

    for place, part in enumerate(TRL_PPO["ppo"][name]["losses"], start=1):
        rows = torch.tensor(part["rows"])
        distribution, value = policy(text[rows])
        logprob = torch.where(chosen[rows], distribution.log_prob(text.action[rows]), old[rows])
        surrogate = clipped_surrogate(logprob, old[rows], advantage[rows], low=cfg.clip, high=cfg.clip)
        before = SimpleNamespace(value=values.value[rows], target=values.target[rows])
        error = clipped_value_loss(value, before, clip=cfg.value_clip)
        loss = masked_mean(surrogate, chosen[rows]) + cfg.value_coef * masked_mean(error, counted[rows])
        (loss / accumulate).backward()
        assert_close(float(loss.detach()), part["loss"], **LOSS)
        if place % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_weights(policy, TRL_PPO["ppo"][name]["final"])


def test_on_the_last_batch_of_its_data_trl_steps_after_every_micro_batch():
    steps = {name: len(TRL_PPO["ppo"][name]["grad_norms"]) for name in ("accumulated", "last_batch")}

    assert steps == {"accumulated": 1, "last_batch": 2}


@pytest.mark.parametrize("name", ["stopped", "lambda_1"])
def test_trls_value_loss_counts_the_column_after_the_stop_too(name):
    # the first minibatch: the policy is still the one that sampled, so ratio 1 and the values are the old ones
    trl, first = recorded(name), TRL_PPO["ppo"][name]["losses"][0]
    rows = torch.tensor(first["rows"])
    error = clipped_value_loss(trl.values, SimpleNamespace(value=trl.values, target=trl.returns), clip=0.05)
    surrogate = clipped_surrogate(trl.logprobs, trl.logprobs, trl.advantages, low=0.1, high=0.1)

    assert_close(masked_mean(surrogate[rows], trl.chosen[rows]), torch.tensor(first["policy_loss"]), **LOSS)
    assert_close(masked_mean(error[rows], trl.counted[rows]), torch.tensor(first["value_loss"]), **LOSS)
    assert abs(masked_mean(error[rows], trl.chosen[rows]) - first["value_loss"]) > 1e-2


def test_trl_averages_the_means_of_micro_batches_and_ours_all_tokens():
    trl, parts = recorded("accumulated"), TRL_PPO["ppo"]["accumulated"]["losses"]
    tokens = torch.tensor([float(trl.chosen[torch.tensor(part["rows"])].sum()) for part in parts])
    theirs = torch.tensor([part["policy_loss"] for part in parts])

    surrogate = clipped_surrogate(trl.logprobs, trl.logprobs, trl.advantages, low=0.1, high=0.1)
    whole = masked_mean(surrogate, trl.chosen)
    assert_close((theirs * tokens).sum() / tokens.sum(), whole, **LOSS)
    assert abs(theirs.mean() - whole) > 1e-3
