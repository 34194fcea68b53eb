"""Sixty environments unlike each other, each trained for a second or two: `python bench/compatibility.py control`.

An environment passes where the trained policy's mean return beats random play by the stated margin, and the margin says
something: the same network before training, sampled, stays below it. Everything else has to be refused in a sentence.
Random play draws uniformly from the allowed actions. Means are over fresh episodes of most likely actions.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from understudy.control import actor_critic, ppo, reinforce
from understudy.control.envs import make as environment
from understudy.control.envs.masks import find_action_mask, sample_allowed_action
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.run.config import RequestError
from understudy.run.seeds import derive_seed

sys.path.append(str(Path(__file__).parents[1]))  # the environments are those of the tests
from tests.foreign_envs import DOES, SEES, Guess

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "compatibility_control.json", HERE.parent / "docs" / "compatibility-control.md"
FOREIGN = "tests.foreign_envs:"
SHORT = {
    "num_envs": 8,
    "num_steps_per_env": 16,
    "num_epochs": 4,
    "num_minibatches": 2,
    "hidden": (16,),
    "learning_rate": 0.01,
}
LONGER = {
    "num_envs": 8,
    "num_steps_per_env": 64,
    "num_epochs": 6,
    "num_minibatches": 4,
    "hidden": (32, 32),
    "learning_rate": 2e-3,
}


@dataclass(frozen=True)
class Case:
    """An environment, what it is an example of, and how it is trained.

    `margin`: by how much the trained policy's mean return has to beat random play's; None where it has to be refused.
    `own`: makes a user's own environment object for training, instead of the name.
    """

    kind: str
    env: str
    margin: float | None
    steps: int = 2000
    options: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    recipe: Any = ppo
    own: Any = None
    episodes: int = 40
    note: str = ""

    @property
    def name(self) -> str:
        options = [f"{key} {value}" for key, value in self.options.items()]
        words = ", ".join([*options, self.note] if self.note else options)
        return self.env.removeprefix(FOREIGN) + (f" ({words})" if words else "")

    def config(self, out: str) -> Any:
        sizes = SHORT if self.recipe is ppo else {"num_envs": 8, "hidden": (16,), "learning_rate": 0.02}
        common = {"env": self.env, "env_options": self.options, "quiet": True, "log_every": 10**6, "steps": self.steps}
        return self.recipe.Config(**(sizes | common | {"output_dir": f"{out}/run", "seed": 1} | self.fields))


def seen(see: str, **fields: Any) -> Case:
    """One of three things, shown in this way."""
    return Case("observation", FOREIGN + "Guess", 2.5, options={"see": see}, fields=fields)


def done(do: str, margin: float, **fields: Any) -> Case:
    """One of three things, named in this way."""
    return Case("action", FOREIGN + "Guess", margin, options={"do": do}, steps=3000, fields=fields)


def guess(kind: str, margin: float | None, note: str = "", **more: Any) -> Case:
    return Case(kind, FOREIGN + "Guess", margin, note=note, **more)


def refused(**options: Any) -> Case:
    return Case("refused", FOREIGN + "Guess", None, options=options)


def classic(env: str, margin: float, steps: int, note: str = "", *, options: Any = None, episodes=20, **fields) -> Case:
    """An environment of Gymnasium's own."""
    return Case("Gymnasium", env, margin, steps, options or {}, LONGER | fields, episodes=episodes, note=note)


def rows(kind: type, mode: AutoresetMode) -> VectorEnv:
    return kind([Guess] * 8, autoreset_mode=mode)


UNSEEN = ("Text", "Sequence", "number as key", "one path twice", "nothing")
NORMALIZED = {"float64 far from 0", "int64 far from 0"}
CASES = [
    *(seen(see, **({"normalize_obs": True} if see in NORMALIZED else {})) for see in SEES if see not in UNSEEN),
    *(done(do, 1.5) for do in DOES if do not in ("Discrete", "Box of whole numbers", "Dict")),
    *(guess("mask", 1.5, options={"mask": mask}) for mask in ("info", "method", "Dict")),
    guess("mask", 1.5, options={"mask": "info", "do": "MultiDiscrete"}),
    guess("mask", 1.5, options={"mask": "Dict", "do": "MultiDiscrete"}),
    guess(
        "memory", 2.5, "GRU", options={"recall": True}, steps=6000, fields={"rnn_type": "gru", "rnn_hidden_size": 16}
    ),
    guess(
        "memory", 2.5, "LSTM", options={"recall": True}, steps=6000, fields={"rnn_type": "lstm", "rnn_hidden_size": 16}
    ),
    guess("recipe", 2.5, "reinforce", recipe=reinforce, steps=8000),
    guess("recipe", 2.5, "actor-critic", recipe=actor_critic, steps=6000),
    guess("copies", 2.5, "async", fields={"vectorization": "async", "num_envs": 2, "num_steps_per_env": 64}),
    guess(
        "copies",
        2.5,
        "fault_tolerant",
        fields={"vectorization": "fault_tolerant", "num_envs": 2, "num_steps_per_env": 64},
    ),
    Case("copies", FOREIGN + "GuessRows", 2.5, fields={"vectorization": "native"}),
    guess("copies", 2.5, "own SyncVectorEnv, SAME_STEP", own=lambda: rows(SyncVectorEnv, AutoresetMode.SAME_STEP)),
    guess("copies", 2.5, "own AsyncVectorEnv, NEXT_STEP", own=lambda: rows(AsyncVectorEnv, AutoresetMode.NEXT_STEP)),
    guess("copies", 2.5, "own object", own=Guess, fields={"num_envs": 1, "num_steps_per_env": 128}),
    Case("info", FOREIGN + "InfoOfChangingShape", 3.0, steps=1000),
    Case("info", FOREIGN + "InfoSometimesNone", 3.0, steps=1000),
    Case("info", FOREIGN + "CostIntOrFloat", 6.0, steps=1500),
    Case("precision", FOREIGN + "UnixClock", 5.0, steps=3000, fields={"normalize_obs": True}),
    Case("board", FOREIGN + "Board", 0.3, steps=6000, episodes=200, fields={"num_steps_per_env": 32}),
    Case("keys", FOREIGN + "KeyNamedObs", 3.0, steps=1000),
    Case("state", FOREIGN + "Curriculum", 3.0, steps=1000),
    Case(
        "endless",
        FOREIGN + "NeverEnds",
        3.0,
        steps=4000,
        fields={"wrappers": ("TimeLimit max_episode_steps=30",), "log_std": -1.0},
        note="in a TimeLimit",
    ),
    classic("CartPole-v1", 60, 8000),
    classic("Pendulum-v1", 150, 24_000, gamma=0.9, normalize_reward=True, normalize_obs=True),
    classic("Acrobot-v1", 100, 16_000, normalize_obs=True, normalize_reward=True),
    classic("FrozenLake-v1", 0.3, 12_000, options={"is_slippery": False}, entropy_coef=0.02),
    classic("Blackjack-v1", 0.1, 8000, episodes=1000),
    classic("LunarLander-v3", 60, 16_000, normalize_obs=True, normalize_reward=True),
    classic("InvertedPendulum-v5", 20, 8000, normalize_obs=True),
    classic("HalfCheetah-v5", 150, 24_000, normalize_obs=True, normalize_reward=True, episodes=8),
    *(refused(see=see) for see in UNSEEN),
    refused(do="Box of whole numbers"),
    refused(do="Dict"),
    *(refused(fault=fault) for fault in ("nan reward", "array reward", "raises")),
]


def play_randomly(case: Case) -> list[float]:
    """Returns of episodes of uniformly drawn allowed actions."""
    made, rng = _single(case), np.random.default_rng(0)
    made.action_space.seed(0)
    returns = []
    for episode in range(case.episodes):
        obs, info = made.reset(seed=episode)
        total, over = 0.0, False
        while not over:
            allowed = find_action_mask(made.action_space, obs, info)
            action = (
                made.action_space.sample()
                if allowed is None
                else sample_allowed_action(made.action_space, allowed, rng)
            )
            obs, reward, terminated, truncated, info = made.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    made.close()
    return returns


def play(policy: Policy, case: Case, cfg: Any, *, sample: bool) -> list[float]:
    """Returns of episodes of a policy's most likely actions, or of sampled ones."""
    copies = min(10, case.episodes)
    if case.env == FOREIGN + "GuessRows":
        envs = environment.make(FOREIGN + "Guess", num_envs=copies)
    else:
        envs = environment.make(case.env, num_envs=copies, options=case.options, wrappers=cfg.wrappers)
    draws = torch.Generator().manual_seed(0)
    walker = RolloutCollector(
        envs,
        seed_of=lambda row, n: derive_seed(7, row, n),
        generator=draws,
        sample=sample,
        keep_float64=policy.keeps_float64,
    )
    with torch.no_grad():
        returns = [
            episode.episode_return for episode in walker.play_episodes(policy, -(-case.episodes // copies)) or ()
        ]
    envs.close()
    return returns


def run(case: Case) -> dict[str, Any]:
    """Train and judge a case: its means and whether it is as it should be."""
    began = time.process_time()
    found: dict[str, Any] = {"kind": case.kind, "name": case.name, "steps": case.steps, "margin": case.margin}
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
        cfg = case.config(out)
        try:
            done = case.recipe.train(cfg, env=None if case.own is None else case.own())
        except RequestError as error:
            return found | {"refused": str(error), "as_expected": case.margin is None}
        policy = Policy.load(done.path / "policy")
    fresh = Policy.build(
        policy.observation_space, policy.action_space, cfg, seed=99, scale_obs=cfg.normalize_obs, scale_reward=None
    )
    means = {
        "random": float(np.mean(play_randomly(case))),
        "untrained": float(np.mean(play(fresh, case, cfg, sample=True))),
        "trained": float(np.mean(play(policy, case, cfg, sample=False))),
    }
    bar = means["random"] + (case.margin or 0.0)
    return (
        found
        | means
        | {
            "as_expected": case.margin is not None and means["untrained"] < bar < means["trained"],
            "seconds": time.process_time() - began,
        }
    )


def _single(case: Case) -> gymnasium.Env:
    name = FOREIGN + "Guess" if case.env == FOREIGN + "GuessRows" else case.env
    return environment.make_factory(name, case.options, case.fields.get("wrappers", ()))()


def page(results: list[dict[str, Any]]) -> str:
    """The table."""
    trained = [found for found in results if "trained" in found]
    passed, said = sum(found["as_expected"] for found in trained), [found for found in results if "refused" in found]
    lines = [
        "# Environments unlike each other",
        "",
        f"{len(results)} environments, from `make compatibility`. {len(trained)} are trained for a few thousand steps with "
        f"one seed; {passed} of these beat random play by the stated margin, and the same network before training (the "
        f"negative control, sampled) stays below it. {len(said)} are refused in the sentence shown. Means are over fresh "
        "episodes of most likely actions; random play draws from the allowed actions. `Guess` shows one of three things at "
        "each step and pays for naming it; the words in brackets say how it is shown, named or run. The environments "
        "are in `tests/foreign_envs.py`, the settings in `bench/compatibility_control.py`.",
        "",
        "| kind | environment | steps | random | untrained | trained | margin | passed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in trained:
        means = " | ".join(f"{found[name]:.2f}" for name in ("random", "untrained", "trained"))
        passes = "yes" if found["as_expected"] else "no"
        lines.append(
            f"| {found['kind']} | {found['name']} | {found['steps']:,} | {means} | {found['margin']:g} | {passes} |"
        )
    lines += ["", "| refused | in the sentence |", "|---|---|"]
    lines += [f"| {found['name']} | {found['refused'].replace('|', '/')} |" for found in said]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run every case, write the results and the page; 1 where a case is not as it should be."""
    torch.set_num_threads(1)
    results = []
    for case in CASES:
        results.append(run(case))
        print(json.dumps(results[-1]), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    return 0 if all(found["as_expected"] for found in results) else 1
