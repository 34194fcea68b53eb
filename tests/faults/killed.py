"""Runs that are killed with SIGKILL at a chosen moment, in processes of their own, and gone on with.

A moment is a name and a number: ("fsync", 3) is just before the third sync of the run. Every job is a fork of a process
that has already imported everything, so that hundreds of them take minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import understudy
from tests.rehearsed import ppo_config, reward_config, sft_config
from understudy.control import actor_critic, reinforce
from understudy.control import ppo as control_ppo
from understudy.control import training as control_stage
from understudy.control.fast import optimizer
from understudy.language import dpo, grpo, reward_model, sft
from understudy.language import ppo as language_ppo
from understudy.language import reinforce as language_reinforce
from understudy.language import training as language_stage
from understudy.run.metrics import CLOCK_METRICS

Moment = tuple[str, int]
LATE = 6
"""An iteration that every run here comes to, checkpoints behind it."""
OPTIMIZERS = (torch.optim.AdamW, optimizer.Adam, optimizer.RMSprop)
"""A subclass first: torch gives it a `step` of its own once one was made, so that its base's does not reach it."""
QUICK: dict[str, Any] = {"quiet": True, "checkpoint_every": 2, "hidden": (16,)}
CONTROL: dict[str, tuple[Any, dict[str, Any]]] = {
    "reinforce": (reinforce, {"env": "CartPole-v1", "num_envs": 4, "steps": 700, "baseline": "value"}),
    "actor-critic": (
        actor_critic,
        {"env": "CartPole-v1", "num_envs": 4, "num_steps_per_env": 8, "steps": 320, "optimizer": "rmsprop"},
    ),
    "ppo": (
        control_ppo,
        {
            "env": "CartPole-v1",
            "num_envs": 4,
            "num_steps_per_env": 16,
            "num_epochs": 2,
            "steps": 640,
            "normalize_obs": True,
        }
        | {"normalize_reward": True, "learning_rate_schedule": "linear", "evaluate_every": 3, "evaluate_episodes": 2},
    ),
    "ppo-compiled": (
        control_ppo,
        {
            "env": "CartPole-v1",
            "num_envs": 4,
            "num_steps_per_env": 16,
            "num_epochs": 2,
            "steps": 640,
            "normalize_obs": True,
        }
        | {"compile": "on", "clip_schedule": "linear", "normalize_reward": True},
    ),
    "ppo-kl-penalty": (
        control_ppo,
        {
            "env": "CartPole-v1",
            "num_envs": 4,
            "num_steps_per_env": 16,
            "num_epochs": 2,
            "steps": 640,
            "objective": "penalty",
        }
        | {"adaptive_kl_target": 0.001, "log_every": 3},
    ),
    "ppo-recurrent": (
        control_ppo,
        {"env": "CartPole-v1", "num_envs": 4, "num_steps_per_env": 16, "num_epochs": 2, "steps": 640, "rnn_type": "gru"}
        | {"rnn_hidden_size": 8},
    ),
    "ppo-long-episodes": (  # older than two rollouts, held noise; an end at a rollout's last column: 200 is 25 times 8
        control_ppo,
        {
            "env": "Pendulum-v1",
            "num_envs": 2,
            "num_steps_per_env": 8,
            "num_epochs": 1,
            "steps": 480,
            "exploration": "held",
        }
        | {"checkpoint_every": 5},
    ),
    "ppo-native": (
        control_ppo,
        {
            "env": "CartPole-v1",
            "num_envs": 4,
            "num_steps_per_env": 16,
            "num_epochs": 2,
            "steps": 640,
            "vectorization": "native",
        },
    ),
    "ppo-async": (
        control_ppo,
        {
            "env": "CartPole-v1",
            "num_envs": 2,
            "num_steps_per_env": 16,
            "num_epochs": 2,
            "steps": 320,
            "vectorization": "async",
        },
    ),
    "ppo-supervised": (
        control_ppo,
        {
            "env": "CartPole-v1",
            "num_envs": 2,
            "num_steps_per_env": 16,
            "num_epochs": 2,
            "steps": 320,
            "vectorization": "fault_tolerant",
        },
    ),
    "ppo-mujoco": (
        control_ppo,
        {"env": "HalfCheetah-v5", "num_envs": 2, "num_steps_per_env": 16, "num_epochs": 1, "steps": 320},
    ),
    "ppo-remembering-env": (  # its drift goes on from episode to episode: it is made anew at every checkpoint
        control_ppo,
        {
            "env": "tests.faults.own_envs:Remembers",
            "num_envs": 4,
            "num_steps_per_env": 16,
            "num_epochs": 2,
            "steps": 640,
        },
    ),
    "ppo-env-with-state": (
        control_ppo,
        {
            "env": "tests.faults.own_envs:SaysItself",
            "num_envs": 2,
            "num_steps_per_env": 16,
            "num_epochs": 1,
            "steps": 320,
        },
    ),
}
LANGUAGE: dict[str, Callable[[Path, Path], tuple[Any, Any]]] = {
    "sft": lambda home, out: (sft, sft_config(home, out, checkpoint_every=2, num_epochs=3)),
    "reward-model": lambda home, out: (reward_model, reward_config(home, out, checkpoint_every=2, num_epochs=3)),
    "language-ppo": lambda home, out: (
        language_ppo,
        ppo_config(
            home, out, checkpoint_every=2, total_tokens=300, kl_reference_target=1.0, log_samples=1, evaluate_every=3
        ),
    ),
    "grpo": lambda home, out: (grpo, _rollouts(grpo, home, out, group_size=4, dynamic_sampling_rounds=1)),
    "language-reinforce": lambda home, out: (
        language_reinforce,
        _rollouts(language_reinforce, home, out, baseline="moving", log_every=3),
    ),
    "dpo": lambda home, out: (
        dpo,
        dpo.Config(
            model=str(home),
            data=str(home / "preferences.jsonl"),
            output_dir=str(out),
            batch_size=8,
            quiet=True,
            held_out=8,
            checkpoint_every=2,
            num_epochs=3,
        ),
    ),
}
NAMES = (*CONTROL, *LANGUAGE)


def _rollouts(recipe: Any, home: Path, out: Path, **fields: Any) -> Any:
    given = {
        "model": str(home),
        "data": str(home / "prompts.jsonl"),
        "reward": "length:4",
        "completions_per_iteration": 8,
        "max_new_tokens": 6,
    }
    given |= {
        "total_tokens": 300,
        "preflight": False,
        "quiet": True,
        "log_samples": 1,
        "evaluate_rows": 4,
        "checkpoint_every": 2,
    }
    return recipe.Config(output_dir=str(out), **given, **fields)


def configured(name: str, home: Path, out: Path) -> tuple[Any, Any]:
    """A recipe's module and the config of a short run."""
    if name in LANGUAGE:
        return LANGUAGE[name](home, out)
    recipe, fields = CONTROL[name]
    return recipe, recipe.Config(seed=1, output_dir=str(out), **QUICK | fields)


def in_fork(job: Callable[[], None]) -> int:
    """Run a job in a fork of this process; its exit status, -9 where it was killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trained(name: str, home: Path, out: Path, moment: Moment | None = None) -> int:
    """Train to the end, or to the moment at which the process kills itself."""

    def job() -> None:
        recipe, config = configured(name, home, out)
        watch_for(moment)
        recipe.train(config)

    return in_fork(job)


def resumed(out: Path, moment: Moment | None = None, **about: Any) -> int:
    """Go on with a run, to its end or to a moment."""

    def job() -> None:
        watch_for(moment)
        understudy.resume(out, **about)

    return in_fork(job)


def watch_for(moment: Moment | None) -> None:
    """Kill this process at that moment: before or after a sync, before or after a rename, within an optimizer step, at
    the end of an iteration, while a checkpoint is read back."""
    if moment is None:
        return
    name, number = moment
    counted = 0

    def die_at(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, attribute: str, *, before: bool) -> None:
        own = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += 1
            if before:
                die_at(counted)
            found = own(*args, **kwargs)
            if not before:
                die_at(counted)
            return found

        setattr(owner, attribute, call)

    if name in ("fsync", "rename"):
        around(os, name, before=True)
    elif name in ("fsynced", "renamed"):
        around(os, name[:5] if name == "fsynced" else "rename", before=False)
    elif name == "step":
        for kind in OPTIMIZERS:
            around(kind, "step", before=True)
    elif name == "iteration":
        for kind in (control_stage.TrainingRun, language_stage.TrainingRun):
            around(kind, "finish_iteration", before=True)
    elif name in ("restore", "restored"):
        for kind in (control_stage.TrainingRun, language_stage.TrainingRun):
            around(kind, "restore", before=name == "restore")
    else:
        raise ValueError(f"there is no moment {name!r}")


def digests(out: Path) -> dict[str, str]:
    """What a run came to: every byte of its policy, its optimizer and its metrics, but for what a clock says."""
    found = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        weights = file.suffix == ".safetensors" and not name.startswith("checkpoints/quarantine")
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            text = json.dumps([{key: x for key, x in line.items() if key not in CLOCK_METRICS} for line in lines])
            found[name] = hashlib.sha256(text.encode()).hexdigest()
        elif weights or name.startswith("samples/"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def moments(name: str, seed: int, syncs: int, renames: int, steps: int, iterations: int) -> list[Moment]:
    """Twenty moments of a run that has so many syncs, renames, optimizer steps and iterations."""
    draw = random.Random(f"{name} {seed}")
    chosen: list[Moment] = [("step", 1), ("iteration", 1), ("restore", 1), ("restored", 1)]
    chosen += [("fsync", n) for n in draw.sample(range(1, syncs + 1), 3)]
    chosen += [("fsynced", n) for n in draw.sample(range(1, syncs + 1), 3)]
    chosen += [("rename", n) for n in draw.sample(range(1, renames + 1), 2)]
    chosen += [("renamed", n) for n in draw.sample(range(1, renames + 1), 2)]
    within = [("step", n) for n in range(2, steps + 1)] or [
        ("iteration", n) for n in range(2, iterations + 1)
    ]  # compiled
    chosen += draw.sample(within, 3)
    chosen += [("iteration", n) for n in draw.sample(range(2, iterations + 1), 3)]
    if name == "ppo-long-episodes":  # resumed 80 steps into an episode; resumed where one has just ended
        chosen[-2:] = [("iteration", 13), ("iteration", 27)]
    return chosen


def counts(name: str, home: Path, out: Path) -> dict[str, int]:
    """How often each thing that a moment counts happens in a whole run; the run stays in `out`."""
    file = out.with_suffix(".counts")
    found = dict.fromkeys(("syncs", "renames", "steps", "iterations"), 0)

    def count(owner: Any, attribute: str, what: str) -> None:
        own = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[what] += 1
            return own(*args, **kwargs)

        setattr(owner, attribute, call)

    def job() -> None:
        recipe, config = configured(name, home, out)
        count(os, "fsync", "syncs")
        count(os, "rename", "renames")
        for kind in OPTIMIZERS:
            count(kind, "step", "steps")
        for kind in (control_stage.TrainingRun, language_stage.TrainingRun):
            count(kind, "finish_iteration", "iterations")
        recipe.train(config)
        file.write_text(json.dumps(found))

    assert in_fork(job) == 0
    return json.loads(file.read_text())


def survives(name: str, moment: Moment, home: Path, out: Path, whole: dict[str, str]) -> str:
    """Kill a run at a moment, go on with it, compare; what differs, or nothing."""
    if moment[0] in ("restore", "restored"):  # killed late in a run, and again while it is resumed
        if trained(name, home, out, ("iteration", LATE)) != -signal.SIGKILL:
            return "the run was not killed"
        if resumed(out, moment) != -signal.SIGKILL:
            return "the resumption was not killed"
    elif trained(name, home, out, moment) != -signal.SIGKILL:
        return "the run was not killed"
    if not (out / "config.json").exists():  # it had not begun: it is begun again
        return "" if trained(name, home, out) == 0 and digests(out) == whole else "begun again, it differs"
    status = resumed(out)
    if status:
        return f"resume ended with {status}"
    said = (out / "events.jsonl").read_text()
    if '"resume_differs"' in said or '"not_compared"' in said:
        return "it is said to differ from what it was, or is not compared"
    now = digests(out)
    return ", ".join(sorted(file for file in whole.keys() | now.keys() if whole.get(file) != now.get(file)))
