"""Golden runs: 20 iterations of every recipe on CartPole, and one update on stored inputs. `python tests/golden/record.py`.

Rewrites the JSON files beside this one; only for a change that should move numbers. A run is equal to the bit only where
its fingerprint is: another processor adds up in another order, and what is sampled soon differs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy
import torch
from gymnasium import spaces

from understudy.advantage import gae
from understudy.batch import Batch, Trajectory
from understudy.control import actor_critic, ppo, reinforce
from understudy.control.config import NetworkConfig
from understudy.control.policy import Policy
from understudy.objective import huber_error, policy_gradient
from understudy.objective import ppo as ppo_loss
from understudy.objective import ppo_penalty as penalty_loss
from understudy.run.metrics import CLOCK_METRICS
from understudy.update import update
from understudy.value import estimate_values, next_value

HERE = Path(__file__).parent
ITERATIONS = 20
TINY = {
    "env": "CartPole-v1",
    "num_envs": 4,
    "hidden": (16,),
    "preset": "none",
    "steps": 100_000,
    "quiet": True,
    "seed": 1,
}
PPO = {"num_steps_per_env": 32, "num_epochs": 3, "num_minibatches": 4, "learning_rate": 3e-3}
RUNS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "ppo": (ppo, PPO | {"entropy_coef": 0.01, "learning_rate_schedule": "linear", "normalize_obs": True}),
    "ppo_penalty": (
        ppo,
        PPO
        | {"objective": "penalty", "adaptive_kl_target": 0.01, "recompute_advantages": True, "normalize_reward": True},
    ),
    "ppo_gru": (ppo, PPO | {"rnn_type": "gru", "rnn_hidden_size": 8, "value_clip": 0.2, "target_kl": 0.02}),
    "reinforce": (reinforce, {"baseline": "standardize"}),
    "reinforce_value": (reinforce, {"baseline": "value", "episodes": 2}),
    "reinforce_group": (reinforce, {"baseline": "group", "group_size": 2}),
    "actor_critic": (actor_critic, {"num_steps_per_env": 5, "shared": True, "entropy_coef": 0.01}),
    "actor_critic_one_step": (actor_critic, {"num_steps_per_env": 1, "num_envs": 1, "lam": 0.0}),
}


def fingerprint() -> dict[str, Any]:
    """What a run's last bit depends on, besides its config."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "gymnasium": gymnasium.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": model,
        "threads": 1,
        "products": products(),
    }


def products() -> str:
    """A digest of NumPy's products at the widths of these runs: its BLAS chooses its own kernels, or is told by its user."""
    draw, found = numpy.random.default_rng(0), hashlib.blake2b(digest_size=8)
    for rows, wide, narrow in itertools.product((1, 2, 4, 8, 16), (4, 64), (2, 64)):
        left, right = draw.standard_normal((rows, wide)), draw.standard_normal((wide, narrow))
        found.update(numpy.dot(left.astype(numpy.float32), right.astype(numpy.float32)).tobytes())
    return found.hexdigest()


def run(name: str, iterations: int = ITERATIONS) -> dict[str, list[float | None]]:
    """Each metric of a run, iteration by iteration; null for one that is not there, or is not a number."""
    recipe, fields = RUNS[name]
    with tempfile.TemporaryDirectory() as out:
        going = recipe.iterate(recipe.Config(**(TINY | fields), output_dir=out))
        lines = list(islice(going, iterations))
        going.close()
    names = dict.fromkeys(metric for line in lines for metric in line if metric not in CLOCK_METRICS)
    return {metric: [_plain(line.get(metric)) for line in lines] for metric in names}


def _plain(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


# one update on stored inputs

OBSERVATIONS, ACTIONS = spaces.Box(-2.0, 2.0, (3,)), spaces.Discrete(3)
SMALL = NetworkConfig(hidden=(8,))
UPDATES = {
    "ppo": (ppo, {}),
    "ppo_penalty": (ppo, {"objective": "penalty"}),
    "reinforce_value": (reinforce, {"baseline": "value"}),
    "reinforce_group": (reinforce, {"baseline": "group", "group_size": 2}),
    "actor_critic": (actor_critic, {}),
}


def inputs() -> dict[str, Any]:
    """A record of 4 rows that holds all a record can, and the weights of a policy that did not make it."""
    g = torch.Generator().manual_seed(0)
    rows, steps = 4, 9
    terminated, truncated = torch.zeros(2, rows, steps, dtype=torch.bool)
    terminated[0, 3] = truncated[1, 3] = terminated[2, 7] = truncated[2, 1] = True
    mask = torch.ones(rows, steps, dtype=torch.bool)
    mask[:, 1:] &= ~(terminated | truncated)[:, :-1]  # the last observation of an episode
    mask[:, -1] = mask[3, 6:] = False  # of a row; padding
    action = torch.randint(3, (rows, steps), generator=g)
    record = {
        "obs": torch.randn(rows, steps, 3, generator=g),
        "action": action,
        "logprob": math.log(1 / 3) + 0.1 * torch.randn(rows, steps, generator=g),
        "mask": mask,
        "reward": torch.randn(rows, steps, generator=g) * mask,
        "terminated": terminated,
        "truncated": truncated,
    }
    policy = Policy.build(OBSERVATIONS, ACTIONS, SMALL, seed=0)
    return {
        "record": {field: x.tolist() for field, x in record.items()},
        "weights": {weight: x.tolist() for weight, x in policy.state_dict().items()},
    }


def one_update(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Metrics and weights after one update of a recipe on given inputs: its advantage, objective and optimizer."""
    recipe, fields = UPDATES[name]
    cfg = recipe.Config(env="none", num_envs=4, learning_rate=1e-3, **fields)
    policy = Policy.build(OBSERVATIONS, ACTIONS, SMALL, seed=1)
    policy.load_state_dict({weight: torch.tensor(x) for weight, x in given["weights"].items()})
    traj = Trajectory(
        **{{"logprob": "behavior_logprob"}.get(field, field): torch.tensor(x) for field, x in given["record"].items()}
    )
    old, value = estimate_values(policy, traj)
    if recipe is actor_critic:
        ends = traj.terminated, traj.truncated, traj.mask
        advantage = gae(traj.reward, value, next_value(value, traj), *ends, gamma=cfg.gamma, lam=cfg.lam)
        batch = Batch.of(traj, value=value, advantage=advantage, target=advantage + value, old_distribution=old)
    else:
        batch = recipe.compute_advantages(traj, traj.reward, value, old, cfg)
    coefs = {"value_coef": 0.5, "entropy_coef": 0.01}
    if recipe is ppo:
        loss = partial(ppo_loss, clip=0.1) if cfg.objective == "clip" else partial(penalty_loss, kl_old_coef=1.0)
    else:
        loss = partial(policy_gradient, value_loss_fn=huber_error)
    metrics = update(
        policy,
        torch.optim.Adam(policy.parameters(), lr=cfg.learning_rate, eps=cfg.adam_eps),
        batch,
        partial(loss, **coefs),
        num_epochs=2 if recipe is ppo else 1,
        num_minibatches=2 if recipe is ppo else 1,
        max_grad_norm=cfg.max_grad_norm,
        transform_minibatch=ppo.standardize_advantages if recipe is ppo else None,
        generator=torch.Generator().manual_seed(0),
    )
    return {"metrics": metrics, "weights": {weight: x.tolist() for weight, x in policy.state_dict().items()}}


def main() -> None:
    torch.set_num_threads(1)
    for name in RUNS:
        _write(name, {"fingerprint": fingerprint(), "metrics": run(name)})
    given = inputs()
    _write("update", {"inputs": given, "outputs": {name: one_update(name, given) for name in UPDATES}})


def _write(name: str, data: dict[str, Any]) -> None:
    """One line for each leaf, so that a difference can be read."""
    path = HERE / f"{name}.json"
    path.write_text(_text(data) + "\n")
    print(path.relative_to(HERE.parents[1]))


def _text(data: Any, indent: str = "") -> str:
    if not isinstance(data, dict):
        return json.dumps(data)
    inner = indent + " "
    return "{\n" + ",\n".join(f"{inner}{json.dumps(k)}: {_text(v, inner)}" for k, v in data.items()) + f"\n{indent}}}"


if __name__ == "__main__":
    main()
