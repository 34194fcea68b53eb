"""Run each peer's own update on stored inputs, initial weights and minibatch order, and write down what came out.

    python tests/oracles/record.py [--cleanrl CHECKOUT] [--check]

Rewrites `inputs.json`, `sb3.json`, `rsl_rl.json` and, given a checkout of CleanRL, `cleanrl.json` beside this file; without
one `cleanrl.json` stays as it is. Nothing of the peers is copied: their functions run as they are, and what happens is seen
where they clip the gradient and step the optimizer. Needs `requirements.txt`, not Understudy.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
ROWS, STEPS, OBS, WIDTH = 4, 8, 3, 8
OUTPUTS = {"discrete": 3, "gaussian": 2, "gaussian_elu": 2}  # by case; those not named otherwise have tanh nets
TANH = ("discrete", "gaussian")
EPOCHS, MINIBATCHES = 2, 4
SEED = 2026
PLAIN = bool | int | float | str | tuple | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cleanrl", type=Path, help="checkout of CleanRL to run")
    parser.add_argument("--check", action="store_true", help="compare with the files there are, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs()
    recorded = {"inputs": inputs, "sb3": record_sb3(inputs), "rsl_rl": record_rsl_rl(inputs)}
    if args.cleanrl is None:
        print("cleanrl.json stays as it is: give --cleanrl CHECKOUT to record it anew")
    else:
        recorded["cleanrl"] = record_cleanrl(inputs, args.cleanrl)
    stale = []
    for name, data in recorded.items():
        path = HERE / f"{name}.json"
        if args.check:
            stale += [path.name] * (not path.exists() or not same(json.loads(path.read_text()), plain(data)))
        else:
            path.write_text(dump(plain(data)) + "\n")
    if stale:
        sys.exit(f"{', '.join(stale)} would come out otherwise: run this without --check, and look at what changed")


# ---- what goes in


def make_inputs() -> dict[str, Any]:
    """Rows that end inside and at their last column; an old policy that is near to, and far from, the one that learns."""
    generator = torch.Generator().manual_seed(SEED)
    order = [torch.randperm(ROWS * STEPS, generator=generator).tolist() for _ in range(EPOCHS)]
    return {
        "versions": versions("numpy", "torch"),
        "layout": "rows first; a position in `order` is row * steps + step",
        "shuffle_seed": SEED,
        "order": order,
        "epochs": EPOCHS,
        "minibatches": MINIBATCHES,
        "cases": {case: make_case(case, order[0], np.random.default_rng(SEED)) for case in OUTPUTS},
    }


def make_case(case: str, order: list[int], random: np.random.Generator) -> dict[str, Any]:
    outputs = OUTPUTS[case]
    weights = {}
    for name, last in (("actor", outputs), ("critic", 1)):
        for i, (a, b) in enumerate([(OBS, WIDTH), (WIDTH, WIDTH), (WIDTH, last)]):
            weights[f"{name}.{i}.weight"] = random.normal(size=(b, a)) / np.sqrt(a)
            weights[f"{name}.{i}.bias"] = 0.1 * random.normal(size=b)
    activation = elu if case == "gaussian_elu" else np.tanh
    obs = random.normal(size=(ROWS, STEPS + 1, OBS))
    terminated = np.zeros((ROWS, STEPS), dtype=bool)
    terminated[0, 3] = terminated[1, 0] = terminated[1, 5] = terminated[2, STEPS - 1] = True
    # by minibatch of the first epoch, so that an adaptive learning rate falls, rises and stays
    distance = np.empty(ROWS * STEPS)
    distance[order] = np.repeat([0.3, 0.03, 0.09, 0.3], ROWS * STEPS // MINIBATCHES)
    away = distance.reshape(ROWS, STEPS, 1) * random.normal(size=(ROWS, STEPS, outputs))
    about = forward(weights, "actor", obs[:, :-1], activation) + away
    value = forward(weights, "critic", obs[:, :-1], activation)[..., 0] + 0.25 * random.normal(size=(ROWS, STEPS))
    if case == "discrete":
        old = {"logp": about - np.log(np.exp(about).sum(axis=-1, keepdims=True))}
        action = (old["logp"] + random.gumbel(size=about.shape)).argmax(axis=-1)
        logprob = np.take_along_axis(old["logp"], action[..., None], axis=-1)[..., 0]
        spread = {}
    else:
        start = np.array([-0.3, 0.2])
        old = {"mean": about, "log_std": start + 0.0 * about}
        noise = random.normal(size=about.shape)
        action = about + np.exp(start) * noise
        logprob = (-0.5 * noise**2 - start - 0.5 * np.log(2 * np.pi)).sum(axis=-1)
        spread = {"log_std": start}
    return {
        "obs": obs[:, :-1],
        "last_obs": obs[:, -1],
        "action": action,
        "behavior_logprob": logprob,
        "old_distribution": old,
        "reward": random.normal(size=(ROWS, STEPS)),
        "terminated": terminated,
        "value": value,
        "weights": weights | spread,
    }


def forward(weights: dict[str, np.ndarray], name: str, x: np.ndarray, activation: Callable) -> np.ndarray:
    for i in range(3):
        x = x @ weights[f"{name}.{i}.weight"].T + weights[f"{name}.{i}.bias"]
        x = activation(x) if i < 2 else x
    return x


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def tensors(inputs: dict[str, Any], case: str) -> SimpleNamespace:
    """A case in float32, as the peers get it: what was written is what is run."""
    data = json.loads(dump(plain(inputs["cases"][case])))
    named = {name: to_tensor(x) for name, x in data.items()}
    return SimpleNamespace(**named)


def to_tensor(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: to_tensor(leaf) for name, leaf in x.items()}
    x = torch.tensor(x)
    return x.float() if x.dtype == torch.float64 else x


# ---- watching a peer's update


class Watch:
    """What a peer's update does, seen where it clips the gradient and where its optimizer steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[str, Callable[[dict], Any]], weights: Callable):
        self.names, self.weights = names, weights
        self.minibatches: list[dict[str, Any]] = []
        self.snapshots: list[dict[str, Tensor]] = []
        self.norms: list[float] = []
        optimizer.register_step_post_hook(self.stepped)

    def stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.minibatches.append(self.seen | {"grad_norm": self.norms, "learning_rate": optimizer.param_groups[0]["lr"]})
        self.norms = []
        self.snapshots.append({name: x.detach().clone() for name, x in self.weights().items()})

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        clip = nn.utils.clip_grad_norm_

        def clip_grad_norm_(parameters: Any, *args: Any, **options: Any) -> Tensor:
            around = sys._getframe(1).f_locals
            self.seen = {name: float32(read(around)) for name, read in self.names.items()}
            norm = clip(parameters, *args, **options)
            self.norms.append(float32(norm))
            return norm

        with patch.object(nn.utils, "clip_grad_norm_", clip_grad_norm_):
            yield

    def found(self) -> dict[str, Any]:
        return {"minibatches": self.minibatches, "first": self.snapshots[0], "final": self.snapshots[-1]}


@contextlib.contextmanager
def ordered(place: Any, name: str, orders: list[list[int]], *, in_place: bool = False) -> Iterator[None]:
    """For as long as this is open, `place.name` shuffles as the stored orders say."""
    left = iter(orders)

    def shuffle(x: Any, *_: Any, **__: Any) -> Any:
        order = next(left)
        if in_place:
            x[:] = order
        return torch.tensor(order) if place is torch else np.array(order)

    with patch.object(place, name, shuffle):
        yield


def by_time(order: list[int]) -> list[int]:
    """Positions of a record laid out row by row, as positions of one laid out step by step."""
    return [(i % STEPS) * ROWS + i // STEPS for i in order]


def initial(layers: dict[str, nn.Linear]) -> dict[str, Any]:
    """Fresh weights in a few numbers: what orthogonal ones share exactly, and random ones nearly."""
    found = {}
    for name, layer in layers.items():
        singular = torch.linalg.svdvals(layer.weight.detach().double())
        found[name] = {
            "shape": list(layer.weight.shape),
            "singular": [float32(singular.min()), float32(singular.max())],
            "weight_std": float32(layer.weight.std()),
            "weight_max": float32(layer.weight.abs().max()),
            "bias_max": float32(layer.bias.abs().max()),
        }
    return found


def linears(**stacks: Any) -> dict[str, nn.Linear]:
    """Their linear layers by role and place: actor.0, actor.1, ..."""
    return {
        f"{role}.{i}": layer
        for role, modules in stacks.items()
        for i, layer in enumerate(m for module in modules for m in module.modules() if isinstance(m, nn.Linear))
    }


def put(layers: dict[str, nn.Linear], weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(weights[f"{name}.weight"])
            layer.bias.copy_(weights[f"{name}.bias"])


def read_weights(layers: dict[str, nn.Linear], **more: Tensor) -> dict[str, Tensor]:
    return {f"{n}.{kind}": getattr(layer, kind) for n, layer in layers.items() for kind in ("weight", "bias")} | more


def about_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    kept = {name: optimizer.defaults[name] for name in ("lr", "eps", "betas", "alpha") if name in optimizer.defaults}
    return {"name": type(optimizer).__name__, **kept}


def defaults(function: Callable) -> dict[str, Any]:
    """The default arguments that are plain data."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, PLAIN)}


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name).partition("+")[0] for name in packages}


# ---- Stable-Baselines3


class Spaces(gymnasium.Env):
    """The two spaces; never stepped."""

    observation_space = gymnasium.spaces.Box(-10, 10, (OBS,))

    def __init__(self, case: str) -> None:
        outputs = OUTPUTS[case]
        box = gymnasium.spaces.Box(-10, 10, (outputs,))
        self.action_space = gymnasium.spaces.Discrete(outputs) if case == "discrete" else box


def record_sb3(inputs: dict[str, Any]) -> dict[str, Any]:
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.policies import ActorCriticPolicy

    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = {kind: PPO("MlpPolicy", Spaces(kind), device="cpu") for kind in TANH}
        a2c = A2C("MlpPolicy", Spaces("discrete"), device="cpu")
    small = {"policy_kwargs": {"net_arch": [WIDTH, WIDTH]}, "n_steps": STEPS, "device": "cpu"}
    return {
        "versions": versions("stable_baselines3", "torch", "numpy", "gymnasium"),
        "defaults": {
            "PPO": defaults(PPO.__init__),
            "A2C": defaults(A2C.__init__),
            "policy": defaults(ActorCriticPolicy.__init__),
            "activation": built["discrete"].policy.activation_fn.__name__,
            "num_envs": built["discrete"].n_envs,
            "ppo_optimizer": about_optimizer(built["discrete"].policy.optimizer),
            "a2c_optimizer": about_optimizer(a2c.policy.optimizer),
        },
        "initial": {kind: initial(sb3_layers(model.policy)) for kind, model in built.items()},
        "ppo": {
            kind: run_sb3(PPO, inputs, kind, batch_size=ROWS * STEPS // MINIBATCHES, n_epochs=EPOCHS, **small)
            for kind in TANH
        },
        "truncation": {"discrete": truncate_sb3(inputs, "discrete", **small)},
        "a2c": {kind: run_sb3(A2C, inputs, kind, **small) for kind in TANH},
    }


def sb3_layers(policy: Any) -> dict[str, nn.Linear]:
    extractor = policy.mlp_extractor
    return linears(actor=[extractor.policy_net, policy.action_net], critic=[extractor.value_net, policy.value_net])


def run_sb3(kind: Any, inputs: dict[str, Any], case: str, **options: Any) -> dict[str, Any]:
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import DummyVecEnv

    given = tensors(inputs, case)
    model = kind("MlpPolicy", DummyVecEnv([lambda: Spaces(case)] * ROWS), **options)
    model.set_logger(configure(None, []))
    policy, buffer = model.policy, model.rollout_buffer
    layers = sb3_layers(policy)
    put(layers, given.weights)
    spread = {}
    if case == "gaussian":
        policy.log_std.data.copy_(given.weights["log_std"])
        spread = {"log_std": policy.log_std}
    start = np.ones(ROWS)
    for t in range(STEPS):
        action = given.action[:, t].numpy().reshape(ROWS, -1)
        buffer.add(
            given.obs[:, t].numpy(),
            action,
            given.reward[:, t].numpy(),
            start,
            given.value[:, t],
            given.behavior_logprob[:, t],
        )
        start = given.terminated[:, t].numpy()
    with torch.no_grad():
        last_value = policy.predict_values(given.last_obs)
    buffer.compute_returns_and_advantage(last_value, start)
    by_row = {"advantage": buffer.advantages.T.copy(), "target": buffer.returns.T.copy()}
    names = {
        "policy_loss": lambda a: a["policy_loss"],
        "value_loss": lambda a: a["value_loss"],
        "entropy": lambda a: -a["entropy_loss"],
        "loss": lambda a: a["loss"],
    }
    watch = Watch(policy.optimizer, names, lambda: read_weights(layers, **spread))
    with watch.watching(), ordered(np.random, "permutation", inputs["order"]):
        model.train()
    return {"last_value": last_value[:, 0], **by_row, **watch.found()}


class Replay(Spaces):
    """A row of the stored steps, its ends time limits; the observation that came last is that of the next step, negated."""

    def __init__(self, case: str, given: SimpleNamespace, row: int) -> None:
        super().__init__(case)
        self.obs = torch.cat([given.obs[row], given.last_obs[row, None]]).numpy()
        self.rewards, self.ends, self.at = given.reward[row].tolist(), given.terminated[row].tolist(), 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
        super().reset(**options)
        return self.obs[self.at], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, end, self.at = self.rewards[self.at], self.ends[self.at], self.at + 1
        return (-1 if end else 1) * self.obs[self.at], reward, False, end, {}


def truncate_sb3(inputs: dict[str, Any], case: str, **options: Any) -> dict[str, Any]:
    """What it makes of the stored steps where every end is a time limit: values and advantages of its own rollout."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    given = tensors(inputs, case)
    rows = [lambda row=row: Replay(case, given, row) for row in range(ROWS)]
    model = PPO("MlpPolicy", DummyVecEnv(rows), batch_size=ROWS * STEPS, **options)
    put(sb3_layers(model.policy), given.weights)
    _, callback = model._setup_learn(ROWS * STEPS)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, STEPS)
    return {"value": model.rollout_buffer.values.T.copy(), "advantage": model.rollout_buffer.advantages.T.copy()}


# ---- rsl_rl


def record_rsl_rl(inputs: dict[str, Any]) -> dict[str, Any]:
    from rsl_rl.algorithms import PPO
    from rsl_rl.models import MLPModel
    from rsl_rl.modules.distribution import GaussianDistribution

    torch.manual_seed(0)
    _, _, storage, actor, critic = make_rsl_rl(inputs)
    built = PPO(actor, critic, storage)
    return {
        "versions": versions("rsl-rl-lib", "tensordict", "torch", "numpy"),
        "defaults": {
            "PPO": defaults(PPO.__init__),
            "model": defaults(MLPModel.__init__),
            "distribution": defaults(GaussianDistribution.__init__),
            "optimizer": about_optimizer(built.optimizer),
        },
        "initial": {"gaussian_elu": initial(linears(actor=[actor.mlp], critic=[critic.mlp]))},
        "ppo": {"gaussian_elu": run_rsl_rl(inputs)},
    }


def make_rsl_rl(inputs: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    from rsl_rl.models import MLPModel
    from rsl_rl.storage import RolloutStorage
    from tensordict import TensorDict

    given = tensors(inputs, "gaussian_elu")
    look = lambda obs: TensorDict({"policy": obs}, batch_size=[ROWS])  # noqa: E731 - what the library calls obs
    obs, groups = look(given.last_obs), {"actor": ["policy"], "critic": ["policy"]}
    gaussian = {"class_name": "GaussianDistribution"}
    actor = MLPModel(obs, groups, "actor", OUTPUTS["gaussian_elu"], distribution_cfg=gaussian, **options)
    critic = MLPModel(obs, groups, "critic", 1, **options)
    return given, look, RolloutStorage("rl", ROWS, STEPS, obs, [OUTPUTS["gaussian_elu"]]), actor, critic


def run_rsl_rl(inputs: dict[str, Any]) -> dict[str, Any]:
    from rsl_rl.algorithms import PPO

    given, look, storage, actor, critic = make_rsl_rl(inputs, hidden_dims=(WIDTH, WIDTH))
    layers = linears(actor=[actor.mlp], critic=[critic.mlp])
    put(layers, given.weights)
    actor.distribution.std_param.data.copy_(given.weights["log_std"].exp())
    model = PPO(actor, critic, storage, num_learning_epochs=EPOCHS, num_mini_batches=MINIBATCHES)
    for t in range(STEPS):
        step = storage.Transition()
        step.observations, step.actions = look(given.obs[:, t]), given.action[:, t]
        step.rewards, step.dones = given.reward[:, t], given.terminated[:, t]
        step.values, step.actions_log_prob = given.value[:, t, None], given.behavior_logprob[:, t]
        step.distribution_params = given.old_distribution["mean"][:, t], given.old_distribution["log_std"][:, t].exp()
        storage.add_transition(step)
    with torch.no_grad():
        last_value = critic(look(given.last_obs))
    model.compute_returns(look(given.last_obs))
    by_row = {"advantage": storage.advantages[..., 0].T.clone(), "target": storage.returns[..., 0].T.clone()}
    names = {
        "policy_loss": lambda a: a["surrogate_loss"],
        "value_loss": lambda a: a["value_loss"],
        "entropy": lambda a: a["entropy"].mean(),
        "loss": lambda a: a["loss"],
        "kl_old": lambda a: a["kl_mean"],
    }
    watch = Watch(model.optimizer, names, lambda: read_weights(layers, std=actor.distribution.std_param))
    with watch.watching(), ordered(torch, "randperm", [by_time(inputs["order"][0])]):
        model.update()
    return {"last_value": last_value[:, 0], **by_row, **watch.found()}


# ---- CleanRL


def record_cleanrl(inputs: dict[str, Any], checkout: Path) -> dict[str, Any]:
    files = {"discrete": "cleanrl/ppo.py", "gaussian": "cleanrl/ppo_continuous_action.py"}
    scripts = {case: Script(checkout / path) for case, path in files.items()}
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "versions": versions("torch", "numpy", "gymnasium")
        | {"cleanrl commit": commit.stdout.strip() or "unknown"}
        | {f"sha256 of {path}": hashlib.sha256((checkout / path).read_bytes()).hexdigest() for path in files.values()},
        "defaults": {case: script.defaults() for case, script in scripts.items()},
        "initial": {case: initial(cleanrl_layers(script.agent(case))) for case, script in scripts.items()},
        "learning_rates": {case: script.learning_rates(iterations=4) for case, script in scripts.items()},
        "ppo": {case: run_cleanrl(script, inputs, case) for case, script in scripts.items()},
    }


class Script:
    """A CleanRL file: its classes by import, and the statements of its training loop, run in a namespace of ours."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location(f"cleanrl_{path.stem}", path)
        assert spec is not None and spec.loader is not None, path
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.module
        spec.loader.exec_module(self.module)
        written = ast.parse(path.read_text()).body
        script = next(node for node in written if isinstance(node, ast.If))
        self.make_env = next(node for node in written if isinstance(node, ast.FunctionDef) and node.name == "make_env")
        (loop,) = (node for node in script.body if isinstance(node, ast.For))
        self.make_optimizer = next(node for node in script.body if _assigns(node, "optimizer"))
        self.anneal, _sampling, *self.learn = loop.body
        assert isinstance(self.anneal, ast.If) and isinstance(_sampling, ast.For), "the loop is laid out otherwise"
        epochs = next(i for i, node in enumerate(self.learn) if isinstance(node, ast.For))
        self.learn = self.learn[: epochs + 1]

    def agent(self, case: str) -> Any:
        torch.manual_seed(0)
        space = Spaces(case)
        return self.module.Agent(
            SimpleNamespace(single_observation_space=space.observation_space, single_action_space=space.action_space)
        )

    def run(self, namespace: dict[str, Any], *statements: ast.stmt) -> None:
        exec(compile(ast.Module([*statements], []), self.module.__name__, "exec"), namespace)

    def defaults(self) -> dict[str, Any]:
        args = self.module.Args()
        case = "gaussian" if "continuous" in self.module.__name__ else "discrete"
        space = vars(self.module) | {"args": args, "agent": self.agent(case)}
        self.run(space, self.make_optimizer)
        activations = {type(m).__name__ for m in space["agent"].modules() if not isinstance(m, nn.Linear)}
        wrapped = [node.attr for node in ast.walk(self.make_env) if isinstance(node, ast.Attribute) and _wraps(node)]
        found = {name: x for name, x in dataclasses.asdict(args).items() if isinstance(x, PLAIN)}
        found["optimizer"] = about_optimizer(space["optimizer"])
        found["activation"] = (activations - {"Agent", "Sequential"}).pop()
        found["wrappers"] = sorted(name for name in wrapped if name != "RecordVideo")
        if case == "gaussian":
            found["actor_logstd"] = float32(space["agent"].actor_logstd[0, 0])
        return found

    def learning_rates(self, iterations: int) -> list[float]:
        args = self.module.Args()
        args.num_iterations = iterations
        space = {"args": args, "optimizer": torch.optim.Adam([torch.zeros(1)])}
        found = []
        for iteration in range(1, iterations + 1):
            self.run(space | {"iteration": iteration}, self.anneal)
            found.append(space["optimizer"].param_groups[0]["lr"])
        return found


def _wraps(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) == "gym.wrappers"


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def cleanrl_layers(agent: Any) -> dict[str, nn.Linear]:
    return linears(actor=[agent.actor if hasattr(agent, "actor") else agent.actor_mean], critic=[agent.critic])


def run_cleanrl(script: Script, inputs: dict[str, Any], case: str) -> dict[str, Any]:
    given, agent, args = tensors(inputs, case), script.agent(case), script.module.Args()
    for stack in (agent.critic, agent.actor if case == "discrete" else agent.actor_mean):
        last = stack[-1].out_features
        stack[0], stack[2], stack[4] = nn.Linear(OBS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, last)
    layers = cleanrl_layers(agent)
    put(layers, given.weights)
    spread = {}
    if case == "gaussian":
        agent.actor_logstd.data.copy_(given.weights["log_std"][None])
        spread = {"log_std": agent.actor_logstd}
    args.num_envs, args.num_steps, args.update_epochs, args.num_iterations = ROWS, STEPS, EPOCHS, 1
    args.batch_size, args.minibatch_size = ROWS * STEPS, ROWS * STEPS // MINIBATCHES
    ended = given.terminated.T.float()
    space = Spaces(case)
    around = vars(script.module) | {
        "args": args,
        "agent": agent,
        "device": torch.device("cpu"),
        "envs": SimpleNamespace(
            single_observation_space=space.observation_space, single_action_space=space.action_space
        ),
        "iteration": 1,
        "obs": given.obs.transpose(0, 1),
        "actions": given.action.transpose(0, 1),
        "logprobs": given.behavior_logprob.T,
        "rewards": given.reward.T,
        "values": given.value.T,
        "dones": torch.cat([torch.zeros(1, ROWS), ended[:-1]]),
        "next_obs": given.last_obs,
        "next_done": ended[-1],
    }
    script.run(around, script.make_optimizer)
    names = {
        "policy_loss": lambda a: a["pg_loss"],
        "value_loss": lambda a: a["v_loss"],
        "entropy": lambda a: a["entropy_loss"],
        "loss": lambda a: a["loss"],
    }
    spread_now = lambda: {name: x[0] for name, x in spread.items()}  # noqa: E731 - read anew at every step
    watch = Watch(around["optimizer"], names, lambda: read_weights(layers, **spread_now()))
    orders = [by_time(order) for order in inputs["order"]]
    with watch.watching(), ordered(np.random, "shuffle", orders, in_place=True):
        script.run(around, script.anneal, *script.learn)
    return {
        "last_value": around["next_value"][0],
        "advantage": around["advantages"].T,
        "target": around["returns"].T,
        **watch.found(),
    }


# ---- writing it down


def float32(x: Any) -> float:
    """The shortest decimal that reads back as this float32."""
    return float(str(np.float32(x.item() if isinstance(x, Tensor) else x)))


def plain(data: Any) -> Any:
    """Tensors and arrays as lists; floats among them by the shortest decimal that reads back as the same float32."""
    if isinstance(data, dict):
        return {name: plain(x) for name, x in data.items()}
    if isinstance(data, Tensor):
        data = data.detach().numpy()
    if isinstance(data, np.ndarray) and data.dtype.kind == "f":
        return np.vectorize(float32, otypes=[float])(data).tolist()
    if isinstance(data, np.ndarray):
        return data.tolist()
    return [plain(x) for x in data] if isinstance(data, list | tuple) else data


def dump(data: Any, indent: str = "") -> str:
    """JSON, a line for every entry of a dict; lists of numbers stay on theirs."""
    inner = indent + "  "
    if isinstance(data, dict):
        lines = [f"{inner}{json.dumps(name)}: {dump(x, inner)}" for name, x in data.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(data, list) and any(isinstance(x, dict) for x in data):
        return "[\n" + ",\n".join(inner + json.dumps(x) for x in data) + f"\n{indent}]"
    return json.dumps(data)


def same(a: Any, b: Any) -> bool:
    """Equal but for float32 sums done in another order, as other processors do them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 + 1e-5 * abs(b)
    return a == b


if __name__ == "__main__":
    main()
