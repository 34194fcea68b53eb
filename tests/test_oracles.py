"""Under a peer's preset, one iteration gives that peer's numbers: the recorded ones of its own code (oracles/record.py)."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from understudy.advantage import gae
from understudy.batch import Batch, Trajectory
from understudy.control import actor_critic, ppo, presets, training
from understudy.control.policy import Policy
from understudy.distribution import Categorical, DiagonalGaussian
from understudy.objective import policy_gradient, squared_error
from understudy.update import update
from understudy.value import estimate_values, next_value

INPUTS, CLEANRL, SB3, RSL_RL = (
    json.loads((Path(__file__).parent / "oracles" / f"{name}.json").read_text())
    for name in ("inputs", "cleanrl", "sb3", "rsl_rl")
)
RECORDED = {"cleanrl": CLEANRL, "sb3": SB3, "rsl_rl": RSL_RL}
ROWS, STEPS, WIDTH = 4, 8, 8
PPO = [
    ("cleanrl", "discrete"),
    ("cleanrl", "gaussian"),
    ("sb3", "discrete"),
    ("sb3", "gaussian"),
    ("rsl_rl", "gaussian_elu"),
]
EVERY_PPO = pytest.mark.parametrize(("peer", "case"), PPO)
BOTH_A2C = pytest.mark.parametrize("case", ["discrete", "gaussian"])
HALF_SQUARES = {"cleanrl": 1, "sb3": 2, "rsl_rl": 2}  # a peer's value loss in units of half the squared error

# Float32 sums in another order; then 8 steps of Adam, which divides a gradient by its own size, so that an error of 1e-7
# in a gradient of 1e-4 moves a weight by 1e-3 of the learning rate.
WEIGHTS = {"rtol": 0.0, "atol": 1e-6}


def preset(peer: str, case: str, kind=ppo.Config, **fields):
    return presets.preset(kind, "CartPole-v1" if case == "discrete" else "Pendulum-v1", peer, **fields)


def settings(peer: str, case: str, kind=ppo.Config, **fields):
    """The preset, on small nets and the record's sizes."""
    small = {"hidden": (WIDTH, WIDTH), "num_envs": ROWS, "num_steps_per_env": STEPS}
    if kind is ppo.Config:
        small |= {"num_epochs": INPUTS["epochs"], "num_minibatches": INPUTS["minibatches"]}
    return preset(peer, case, kind, **(small | fields))


def given(case: str) -> SimpleNamespace:
    return SimpleNamespace(**{name: tensors(x) for name, x in INPUTS["cases"][case].items()})


def tensors(x):
    return {name: tensors(leaf) for name, leaf in x.items()} if isinstance(x, dict) else torch.tensor(x)


def fresh(cfg, case: str, seed: int = 0) -> Policy:
    """A policy of the config's shape, for the case's spaces."""
    width = len(INPUTS["cases"][case]["weights"]["actor.2.bias"])
    box = gymnasium.spaces.Box(-10, 10, (width,))
    action_space = gymnasium.spaces.Discrete(width) if case == "discrete" else box
    return Policy.build(gymnasium.spaces.Box(-10, 10, (3,)), action_space, cfg, seed=seed)


def layers(policy: Policy) -> dict[str, nn.Linear]:
    """Linear layers by role and place, as the oracles name them."""
    net = policy.network
    roles = {"actor": (net.actor, net.head), "critic": (net.critic, net.value)}
    return {
        f"{role}.{i}": layer
        for role, parts in roles.items()
        for i, layer in enumerate(m for part in parts for m in part.modules() if isinstance(m, nn.Linear))
    }


def weights(policy: Policy) -> dict[str, Tensor]:
    found = {
        f"{name}.{kind}": getattr(layer, kind) for name, layer in layers(policy).items() for kind in ("weight", "bias")
    }
    if hasattr(policy.network.head, "spread"):
        found["std" if policy.network.head.scalar_std else "log_std"] = policy.network.head.spread
    return {name: x.detach().clone() for name, x in found.items()}


def initial(cfg, case: str) -> Policy:
    """The policy with the stored initial weights."""
    policy, start = fresh(cfg, case), given(case).weights
    with torch.no_grad():
        for name, layer in layers(policy).items():
            layer.weight.copy_(start[f"{name}.weight"])
            layer.bias.copy_(start[f"{name}.bias"])
        if "log_std" in start:
            policy.network.head.spread.copy_(start["log_std"].exp() if cfg.scalar_std else start["log_std"])
    return policy


def spread(x: Tensor, ended: Tensor, after: Tensor | None = None) -> Tensor:
    """Steps [ROWS, STEPS, ...] in our layout: a column after every end, one after every row, padding on the right.

    What stands in the added columns is `after` [ROWS, STEPS, ...], the observation that came last; zeros without it.
    """
    rows = []
    for row in range(ROWS):
        columns = []
        for t in range(STEPS):
            last = bool(ended[row, t]) or t == STEPS - 1
            columns += [x[row, t]] + [torch.zeros_like(x[row, t]) if after is None else after[row, t]] * last
        rows.append(torch.stack(columns))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def record_of(case: str, *, limits: bool = False) -> Trajectory:
    """The stored steps in our layout; their ends deaths, or time limits."""
    stored = given(case)
    ended = stored.terminated
    following = torch.cat([stored.obs[:, 1:], stored.last_obs[:, None]], dim=1)
    after = torch.where(ended[..., None], -following, following)  # what came last at an end: read only at a time limit
    mask, ends = spread(torch.ones_like(ended), ended), spread(ended, ended)
    never = torch.zeros_like(mask)
    return Trajectory(
        obs=spread(stored.obs, ended, after),
        action=spread(stored.action, ended),
        behavior_logprob=spread(stored.logprob, ended),
        mask=mask,
        reward=spread(stored.reward, ended),
        terminated=never if limits else ends,
        truncated=ends if limits else never,
    )


def values_of(policy: Policy, record: Trajectory, case: str) -> tuple[Tensor, object]:
    """The stored values at the steps, the policy's own elsewhere; and the distribution that sampled."""
    stored = given(case)
    _, own = estimate_values(policy, record)
    old = {name: spread(x, stored.terminated) for name, x in stored.old.items()}
    value = torch.where(record.mask, spread(stored.value, stored.terminated), own)
    return value, Categorical(**old) if case == "discrete" else DiagonalGaussian(**old)


def by_step(x: Tensor, mask: Tensor) -> Tensor:
    """The chosen steps alone, as the peers store them: [ROWS, STEPS]."""
    return x[mask].reshape(ROWS, STEPS)


def weighed(policy: Policy, cfg, case: str) -> Batch:
    record = record_of(case)
    return ppo.compute_advantages(record, record.reward, *values_of(policy, record, case), cfg)


def improve_on(batch: Batch, policy: Policy, optimizer, cfg, steer, generator: torch.Generator) -> dict[str, float]:
    """The update of the recipe `ppo`; that it is the recipe's is the last test's claim."""
    coefs = {"value_coef": cfg.value_coef, "entropy_coef": cfg.entropy_coef}
    return update(
        policy,
        optimizer,
        batch,
        partial(ppo.ppo, clip=cfg.clip, value_clip=cfg.value_clip, **coefs),
        num_epochs=cfg.num_epochs,
        num_minibatches=cfg.num_minibatches,
        max_grad_norm=cfg.max_grad_norm,
        transform_minibatch=ppo.standardize_advantages if cfg.normalize_advantage == "minibatch" else None,
        on_minibatch=steer,
        reshuffle=cfg.reshuffle,
        generator=generator,
    )


def improve(cfg, case: str, *, optimizer_steps: int | None = None) -> tuple[Policy, list[dict], dict]:
    """Policy, every minibatch's metrics and the update's own, after so many optimizer steps of the recipe's update."""
    policy = initial(cfg, case)
    optimizer = ppo.make_optimizer(policy, cfg)
    seen: list[dict] = []

    def steer(metrics: dict[str, float]) -> bool:
        if len(seen) == optimizer_steps:
            return True
        stop = ppo.on_minibatch(optimizer, cfg, metrics)
        seen.append(metrics | {"learning_rate": optimizer.param_groups[0]["lr"]})
        return stop

    generator = torch.Generator().manual_seed(INPUTS["shuffle_seed"])
    return policy, seen, improve_on(weighed(policy, cfg, case), policy, optimizer, cfg, steer, generator)


def losses(peer: str, minibatches: list[dict]) -> dict[str, Tensor]:
    """A peer's losses by minibatch, in our words and units."""
    scale = {"value_loss": HALF_SQUARES[peer]}
    names = {"policy_loss": "policy_loss", "value_loss": "value_loss", "entropy": "entropy", "loss": "loss"}
    return {ours: torch.tensor([m[theirs] for m in minibatches]) / scale.get(ours, 1) for theirs, ours in names.items()}


def joint(norms: list[float]) -> float:
    """The norm of all gradients, of the norms of parts of them."""
    return sum(norm**2 for norm in norms) ** 0.5


def test_the_stored_order_is_the_one_its_seed_draws():
    generator = torch.Generator().manual_seed(INPUTS["shuffle_seed"])

    assert [torch.randperm(ROWS * STEPS, generator=generator).tolist() for _ in range(2)] == INPUTS["order"]


@EVERY_PPO
def test_the_value_after_the_last_step_is_the_peers(peer, case):
    policy = initial(settings(peer, case), case)
    _, value = policy(given(case).last_obs[:, None])

    assert_close(value[:, 0].detach(), tensors(RECORDED[peer]["ppo"][case]["last_value"]))


@EVERY_PPO
@pytest.mark.parametrize("name", ["advantage", "target"])
def test_advantages_and_targets_are_the_peers(peer, case, name):
    cfg = settings(peer, case)
    batch = weighed(initial(cfg, case), cfg, case)

    assert_close(by_step(getattr(batch, name), batch.mask), tensors(RECORDED[peer]["ppo"][case][name]))


@EVERY_PPO
def test_every_minibatch_has_the_peers_losses(peer, case):
    _, seen, _ = improve(settings(peer, case), case)
    expected = losses(peer, RECORDED[peer]["ppo"][case]["minibatches"])

    for name, values in expected.items():
        assert_close(torch.tensor([m[name] for m in seen]), values, msg=lambda why, name=name: f"{name}: {why}")


@EVERY_PPO
def test_every_minibatch_steps_by_the_peers_learning_rate(peer, case):
    _, seen, _ = improve(settings(peer, case), case)

    expected = [m["learning_rate"] for m in RECORDED[peer]["ppo"][case]["minibatches"]]
    assert [m["learning_rate"] for m in seen] == pytest.approx(expected, rel=1e-12)


@EVERY_PPO
def test_the_first_gradient_has_the_peers_norm_before_clipping(peer, case):
    _, _, metrics = improve(settings(peer, case), case, optimizer_steps=1)

    assert_close(
        metrics["grad_norm"], joint(RECORDED[peer]["ppo"][case]["minibatches"][0]["grad_norm"]), rtol=2e-6, atol=0
    )


@EVERY_PPO
def test_gradients_of_the_last_epoch_have_the_peers_norms_before_clipping(peer, case):
    _, _, metrics = improve(settings(peer, case), case)

    norms = [joint(m["grad_norm"]) for m in RECORDED[peer]["ppo"][case]["minibatches"][INPUTS["minibatches"] :]]
    assert_close(metrics["grad_norm"], sum(norms) / len(norms), rtol=1e-5, atol=0)


@EVERY_PPO
def test_the_weights_after_one_minibatch_are_the_peers(peer, case):
    policy, _, _ = improve(settings(peer, case), case, optimizer_steps=1)

    assert_close(weights(policy), tensors(RECORDED[peer]["ppo"][case]["first"]), **WEIGHTS)


@EVERY_PPO
def test_the_weights_after_the_update_are_the_peers(peer, case):
    policy, _, _ = improve(settings(peer, case), case)

    assert_close(weights(policy), tensors(RECORDED[peer]["ppo"][case]["final"]), **WEIGHTS)


def test_the_exact_kl_is_rsl_rls():
    _, seen, _ = improve(settings("rsl_rl", "gaussian_elu"), "gaussian_elu")

    expected = [m["kl_old"] for m in RSL_RL["ppo"]["gaussian_elu"]["minibatches"]]
    assert_close(torch.tensor([m["kl_old"] for m in seen]), torch.tensor(expected))


SWITCHES = {
    "gamma": 0.98,
    "lam": 0.9,
    "clip": 0.1,
    "value_clip": {"cleanrl": 0.0, "sb3": 0.2, "rsl_rl": 0.0},
    "value_coef": 0.7,
    "entropy_coef": 0.02,
    "normalize_advantage": {"cleanrl": "batch", "sb3": "none", "rsl_rl": "minibatch"},
    "reshuffle": {"cleanrl": False, "sb3": False, "rsl_rl": True},
    "max_grad_norm": {"cleanrl": 0.7, "sb3": 0.7, "rsl_rl": 3.0},  # Adam does not see a factor common to all gradients
    "clip_grad_apart": {"cleanrl": True, "sb3": True, "rsl_rl": False},
    "learning_rate": 4e-4,
    "desired_kl": {"cleanrl": 0.01, "sb3": 0.01, "rsl_rl": 0.0},
    "adam_eps": {"cleanrl": 1e-3, "sb3": 1e-3, "rsl_rl": 1e-3},
    "activation": {"cleanrl": "elu", "sb3": "elu", "rsl_rl": "tanh"},
}


@EVERY_PPO
@pytest.mark.parametrize("switch", SWITCHES)
def test_without_this_setting_the_weights_would_not_be_the_peers(peer, case, switch):
    other = SWITCHES[switch][peer] if isinstance(SWITCHES[switch], dict) else SWITCHES[switch]
    policy, _, _ = improve(settings(peer, case, **{switch: other}), case)

    expected = tensors(RECORDED[peer]["ppo"][case]["final"])
    assert max(float((x - expected[name]).abs().max()) for name, x in weights(policy).items()) > 5 * WEIGHTS["atol"]


def test_learning_the_logarithm_would_not_give_rsl_rls_deviation():
    policy, _, _ = improve(settings("rsl_rl", "gaussian_elu", scalar_std=False), "gaussian_elu")

    theirs = tensors(RSL_RL["ppo"]["gaussian_elu"]["final"])["std"]
    assert float((weights(policy)["log_std"].exp() - theirs).abs().min()) > 5 * WEIGHTS["atol"]


def test_a_scalar_deviation_is_kept_above_rsl_rls_least():
    policy = initial(settings("rsl_rl", "gaussian_elu"), "gaussian_elu")
    with torch.no_grad():
        policy.network.head.spread.fill_(-1.0)
    distribution, _ = policy(given("gaussian_elu").last_obs[:, None])

    least, _ = RSL_RL["defaults"]["distribution"]["std_range"]
    assert_close(distribution.log_std.exp(), torch.full((ROWS, 1, 2), least))


@pytest.mark.parametrize(
    ("rate", "kl", "after"),
    [
        (1.2e-5, 0.03, 1e-5),  # 1.2e-5 / 1.5 would be below the least
        (9e-3, 0.001, 1e-2),  # 9e-3 * 1.5 would be above the most
        (1e-3, 0.0199, 1e-3),  # within a factor of 2 of 0.01: as it is
        (1e-3, 0.0051, 1e-3),
        (5e-2, 0.01, 5e-2),  # even where it is above the most
        (1e-3, 0.0, 1e-3),  # a KL of 0 says nothing yet
    ],
)
def test_the_rate_that_follows_the_kl_keeps_to_rsl_rls_bounds(rate, kl, after):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    ppo.on_minibatch(optimizer, settings("rsl_rl", "gaussian_elu"), {"kl_old": kl})

    assert optimizer.param_groups[0]["lr"] == after


def improve_a2c(case: str, **fields) -> tuple[Batch, Policy, list[dict], dict]:
    """The record, the policy, its one minibatch's metrics and the update's, after the n-step recipe's update."""
    cfg = settings("sb3", case, actor_critic.Config, **fields)
    policy, record = initial(cfg, case), record_of(case)
    value, old = values_of(policy, record, case)
    ends = record.terminated, record.truncated, record.mask
    advantage = gae(record.reward, value, next_value(value, record), *ends, gamma=cfg.gamma, lam=cfg.lam)
    batch = Batch.of(record, value=value, advantage=advantage, target=advantage + value, old_distribution=old)
    coefs = {"value_coef": cfg.value_coef, "entropy_coef": cfg.entropy_coef}
    seen: list[dict] = []
    metrics = update(
        policy,
        actor_critic.make_optimizer(policy, cfg),
        batch,
        partial(policy_gradient, value_loss_fn=squared_error, **coefs),
        num_epochs=1,
        num_minibatches=1,
        max_grad_norm=cfg.max_grad_norm,
        on_minibatch=lambda metrics: bool(seen.append(metrics)),
        generator=torch.Generator().manual_seed(0),
    )
    return batch, policy, seen, metrics


@BOTH_A2C
@pytest.mark.parametrize("name", ["advantage", "target"])
def test_n_step_advantages_and_targets_are_sb3s(case, name):
    batch, *_ = improve_a2c(case)

    assert_close(by_step(getattr(batch, name), batch.mask), tensors(SB3["a2c"][case][name]))


@BOTH_A2C
def test_the_losses_of_a2c_are_sb3s(case):
    _, _, seen, _ = improve_a2c(case)

    for name, values in losses("sb3", SB3["a2c"][case]["minibatches"]).items():
        assert_close(torch.tensor([m[name] for m in seen]), values, msg=lambda why, name=name: f"{name}: {why}")


@BOTH_A2C
def test_the_gradient_of_a2c_has_sb3s_norm_before_clipping(case):
    _, _, _, metrics = improve_a2c(case)

    assert_close(metrics["grad_norm"], joint(SB3["a2c"][case]["minibatches"][0]["grad_norm"]), rtol=2e-6, atol=0)


@BOTH_A2C
def test_the_weights_after_a_step_of_a2c_are_sb3s(case):
    _, policy, _, _ = improve_a2c(case)

    assert_close(weights(policy), tensors(SB3["a2c"][case]["final"]), **WEIGHTS)


@BOTH_A2C
def test_under_adam_the_weights_would_not_be_sb3s(case):
    _, policy, _, _ = improve_a2c(case, optimizer="adam")

    expected = tensors(SB3["a2c"][case]["final"])
    assert max(float((x - expected[name]).abs().max()) for name, x in weights(policy).items()) > 1e-3


def test_a_time_limit_is_bootstrapped_from_the_true_last_observation_as_sb3_does():
    # SB3 adds gamma * V(last observation) to the reward and calls the step an end; ours keeps reward and end apart
    cfg, record = settings("sb3", "discrete"), record_of("discrete", limits=True)
    _, value = estimate_values(initial(cfg, "discrete"), record)
    batch = ppo.compute_advantages(record, record.reward, value, None, cfg)

    theirs = tensors(SB3["truncation"]["discrete"]["advantage"])
    assert_close(by_step(batch.advantage, batch.mask), theirs)
    assert not theirs.isclose(tensors(SB3["ppo"]["discrete"]["advantage"])).any()


# ---- the presets themselves


def hidden(peer: str, case: str) -> tuple[int, ...]:
    """The widths of its fresh actor's hidden layers."""
    shapes = [layer["shape"][0] for name, layer in RECORDED[peer]["initial"][case].items() if name.startswith("actor")]
    return tuple(shapes[:-1])


def defaults_of_cleanrl(case: str) -> dict:
    d = CLEANRL["defaults"][case]
    size = d["num_envs"] * d["num_steps"]
    return {
        "num_envs": d["num_envs"],
        "num_steps_per_env": d["num_steps"],
        "steps": d["total_timesteps"] // size * size,  # it leaves out what does not fill an iteration
        "num_epochs": d["update_epochs"],
        "num_minibatches": d["num_minibatches"],
        "gamma": d["gamma"],
        "lam": d["gae_lambda"],
        "clip": d["clip_coef"],
        "value_clip": d["clip_coef"] if d["clip_vloss"] else 0.0,
        "normalize_advantage": "minibatch" if d["norm_adv"] else "none",
        "value_coef": d["vf_coef"],
        "entropy_coef": d["ent_coef"],
        "max_grad_norm": d["max_grad_norm"],
        "target_kl": d["target_kl"] or 0.0,
        "learning_rate": d["optimizer"]["lr"],
        "learning_rate_schedule": "linear" if d["anneal_lr"] else "constant",
        "adam_eps": d["optimizer"]["eps"],
        "activation": d["activation"].lower(),
        "hidden": hidden("cleanrl", case),
        "log_std": d.get("actor_logstd", 0.0),
        "normalize_obs": "NormalizeObservation" in d["wrappers"],
        "normalize_reward": "NormalizeReward" in d["wrappers"],
    }


def defaults_of_sb3(case: str, algorithm: str = "PPO") -> dict:
    d = SB3["defaults"]
    a, optimizer = d[algorithm], d[f"{algorithm.lower()}_optimizer"]
    stated = {
        "num_envs": d["num_envs"],
        "num_steps_per_env": a["n_steps"],
        "gamma": a["gamma"],
        "lam": a["gae_lambda"],
        "value_coef": a["vf_coef"] * HALF_SQUARES["sb3"],
        "entropy_coef": a["ent_coef"],
        "max_grad_norm": a["max_grad_norm"],
        "learning_rate": optimizer["lr"],
        "learning_rate_schedule": "constant",
        "adam_eps": optimizer["eps"],
        "activation": d["activation"].lower(),
        "hidden": hidden("sb3", case),
        "orthogonal": d["policy"]["ortho_init"],
        "log_std": d["policy"]["log_std_init"],
        "exploration": "gsde" if a["use_sde"] else "independent",
    }
    if algorithm == "A2C":
        return stated | {
            "optimizer": optimizer["name"].lower(),
            "normalize_advantage": "batch" if a["normalize_advantage"] else "none",
        }
    return stated | {
        "num_epochs": a["n_epochs"],
        "num_minibatches": a["n_steps"] * d["num_envs"] // a["batch_size"],
        "clip": a["clip_range"],
        "value_clip": a["clip_range_vf"] or 0.0,
        "normalize_advantage": "minibatch" if a["normalize_advantage"] else "none",
        "target_kl": a["target_kl"] or 0.0,
    }


def defaults_of_rsl_rl(case: str) -> dict:
    a, model, gaussian = (RSL_RL["defaults"][name] for name in ("PPO", "model", "distribution"))
    return {
        "num_epochs": a["num_learning_epochs"],
        "num_minibatches": a["num_mini_batches"],
        "gamma": a["gamma"],
        "lam": a["lam"],
        "clip": a["clip_param"],
        "value_clip": a["clip_param"] if a["use_clipped_value_loss"] else 0.0,
        "normalize_advantage": "minibatch" if a["normalize_advantage_per_mini_batch"] else "batch",
        "value_coef": a["value_loss_coef"] * HALF_SQUARES["rsl_rl"],
        "entropy_coef": a["entropy_coef"],
        "max_grad_norm": a["max_grad_norm"],
        "learning_rate": a["learning_rate"],
        "desired_kl": a["desired_kl"] if a["schedule"] == "adaptive" else 0.0,
        "adam_eps": RSL_RL["defaults"]["optimizer"]["eps"],
        "activation": model["activation"],
        "hidden": hidden("rsl_rl", case),
        "normalize_obs": model["obs_normalization"],
        "log_std": float(torch.tensor(gaussian["init_std"]).log()),
        "scalar_std": gaussian["std_type"] == "scalar",
    }


@EVERY_PPO
def test_the_preset_states_the_peers_defaults(peer, case):
    cfg = preset(peer, case)
    stated = {"cleanrl": defaults_of_cleanrl, "sb3": defaults_of_sb3, "rsl_rl": defaults_of_rsl_rl}[peer](case)

    assert {name: getattr(cfg, name) for name in stated} == stated


@BOTH_A2C
def test_the_preset_of_a2c_states_sb3s_defaults(case):
    cfg = preset("sb3", case, actor_critic.Config)
    stated = defaults_of_sb3(case, "A2C")

    assert {name: getattr(cfg, name) for name in stated} == stated


def test_rsl_rls_preset_for_discrete_actions_is_the_other_without_the_noise():
    box, discrete = (presets.settings(ppo.Config, env, "rsl_rl") for env in ("Pendulum-v1", "CartPole-v1"))

    assert discrete == {name: x for name, x in box.items() if name in discrete}
    assert box.keys() - discrete.keys() == {"squash", "log_std", "scalar_std", "exploration"}


@EVERY_PPO
def test_fresh_layers_have_the_peers_shapes(peer, case):
    recorded = RECORDED[peer]["initial"][case]

    assert {n: list(x.weight.shape) for n, x in layers(fresh(preset(peer, case), case)).items()} == {
        n: x["shape"] for n, x in recorded.items()
    }


@pytest.mark.parametrize(("peer", "case"), PPO[:-1])
def test_fresh_weights_are_orthogonal_with_the_peers_gains(peer, case):
    made = layers(fresh(preset(peer, case), case))

    for name, recorded in RECORDED[peer]["initial"][case].items():
        singular = torch.linalg.svdvals(made[name].weight.detach().double()).aminmax()
        theirs = torch.tensor(recorded["singular"]).double().aminmax()
        assert_close(singular, theirs, rtol=1e-6, atol=0)  # orthogonal in float32


@pytest.mark.parametrize(("peer", "case"), PPO[:-1])
def test_fresh_biases_are_zero_as_the_peers(peer, case):
    made = layers(fresh(preset(peer, case), case))

    for name, recorded in RECORDED[peer]["initial"][case].items():
        assert not made[name].bias.any() and recorded["bias_max"] == 0


@pytest.mark.parametrize(
    ("peer", "start"), [("cleanrl", {"log_std": 0.0}), ("sb3", {"log_std": 0.0}), ("rsl_rl", {"std": 1.0})]
)
def test_fresh_noise_is_the_peers(peer, start):
    made = weights(fresh(preset(peer, "gaussian"), "gaussian"))

    assert {name: x.unique().item() for name, x in made.items() if name.endswith("std")} == start


def test_fresh_weights_are_torchs_own_as_rsl_rls():
    made = layers(fresh(preset("rsl_rl", "gaussian_elu"), "gaussian_elu"))

    for name, recorded in RSL_RL["initial"]["gaussian_elu"].items():
        layer = made[name]
        bound = layer.in_features**-0.5  # of a uniform draw, weights and biases both (torch.nn.Linear)
        for weight_max, weight_std in (
            (layer.weight.abs().max().item(), layer.weight.std().item()),
            (recorded["weight_max"], recorded["weight_std"]),
        ):
            assert 0.97 * bound < weight_max <= bound  # of 256 draws or more
            assert weight_std == pytest.approx(bound / 3**0.5, rel=0.1)  # four standard errors of the fewest draws
        assert 0 < layer.bias.abs().max().item() <= bound


@pytest.mark.parametrize("case", ["discrete", "gaussian"])
def test_the_learning_rate_falls_as_cleanrls(case, tmp_path):
    cfg = preset(
        "cleanrl",
        case,
        steps=4 * 8,
        num_steps_per_env=8,
        num_envs=1,
        num_minibatches=1,
        num_epochs=1,
        output_dir=str(tmp_path),
        quiet=True,
    )

    rates = [line["learning_rate"] for line in ppo.train(cfg).metrics]
    assert rates == pytest.approx(CLEANRL["learning_rates"][case], rel=1e-12)


@pytest.mark.parametrize("peer", RECORDED)
def test_the_recipe_makes_the_update_that_is_compared_here(peer, tmp_path):
    cfg = preset(
        peer, "gaussian", steps=16, num_steps_per_env=8, num_envs=2, num_minibatches=2, num_epochs=2, quiet=True
    )
    trained = Policy.load(ppo.train(dataclasses.replace(cfg, output_dir=str(tmp_path / "recipe"))).path / "policy")
    again = dataclasses.replace(cfg, output_dir=str(tmp_path / "again"))
    with training.open_run("ppo", again, None, None, optimizer=ppo.make_optimizer) as run:
        traj = run.collector.collect(run.policy, cfg.num_steps_per_env)
        old, value = estimate_values(run.policy, traj)
        batch = ppo.compute_advantages(traj, run.compute_rewards(traj), value, old, cfg)
        # the first iteration's linear schedule is at its start
        improve_on(
            batch, run.policy, run.optimizer, cfg, partial(ppo.on_minibatch, run.optimizer, cfg), run.shuffle_generator
        )

        assert_close(weights(trained), weights(run.policy), rtol=0, atol=0)
