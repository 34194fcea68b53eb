"""Control beside its peers on the same work: `make bench-control CLEANRL=DIR PUREJAXRL=DIR`.

    python bench/control.py [--rows NAME ...] [--repeats N] [--steps N] [--device cuda] [--profile NAME ...]
        [--cleanrl DIR] [--purejaxrl DIR]

Each measurement is a process of its own, timed from outside: a side says on standard output when an iteration is over, and
the moment at which that is read counts. Ours (A) and the peers (B, C) alternate A B C C B A, so that a machine that warms
up or gets busy meets all. Results are saved as they come under bench/results/performance/control-ROW.json; all that are
there make the control part of docs/performance.md. A row that is measured again replaces what was there. `--rows` without
a name only writes that page. `--results DIR` keeps a trial apart: its page is DIR/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from control_page import OURS, rate, solved, write_page

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS, PAGE = HERE / "results" / "performance", ROOT / "docs" / "performance.md"
SB3, SBX, CLEANRL, PUREJAXRL = "Stable-Baselines3", "SBX", "CleanRL", "PureJaxRL"
BARE, PRODUCTS, ONEDNN = "bare environment", "products by torch.mm", "products by oneDNN"
PYTHONS = {
    OURS: ".venv",
    SB3: ".venv-peers-sb3",
    SBX: ".venv-peers-sb3",
    CLEANRL: ".venv-peers-cleanrl",
    PUREJAXRL: ".venv-peers-purejaxrl",
    BARE: ".venv",
    PRODUCTS: ".venv",
    ONEDNN: ".venv",
}
PACKAGES = {
    OURS: ("understudy-rl", "torch", "gymnasium", "numpy", "mujoco"),
    SB3: ("stable_baselines3", "torch", "gymnasium", "numpy", "mujoco"),
    SBX: ("sbx-rl", "jax", "gymnasium", "numpy", "mujoco"),
    CLEANRL: ("torch", "gymnasium", "numpy", "mujoco"),
    PUREJAXRL: ("jax", "gymnax", "flax", "numpy"),
    BARE: ("gymnasium", "mujoco"),
    PRODUCTS: ("torch",),
    ONEDNN: ("torch",),
}
CURVE = 100  # marks of a run that are kept


@dataclass(frozen=True)
class Row:
    """One piece of work, and who does it.

    Attributes:
        sides: who -> the settings that `command` takes, ours first.
        cores: what a process may use: one core and thread, or all there are.
        warmup: iterations before the steady speed counts.
        asked: peer -> at least (None: nothing), aim, as a ratio.
        until: the mean of the last 100 episodes at which a run ends; seconds until then are compared.
        envs: for rows of the growth curve, how many environments.
    """

    title: str
    note: str
    steps: int
    sides: dict[str, dict[str, Any]]
    asked: dict[str, tuple[float | None, float]]
    cores: str = "one"
    warmup: int = 2
    repeats: int = 5
    until: float | None = None
    envs: int | None = None
    learning: bool = field(default=False, kw_only=True)


def ours_a(**fields: Any) -> dict[str, Any]:
    """Recipe A: CleanRL's settings for discrete actions without value clipping, which SB3 has in another form."""
    return {
        "env": "CartPole-v1",
        "preset": "cleanrl",
        "value_clip": 0.0,
        "num_envs": 4,
        "num_steps_per_env": 128,
    } | fields


def ours_b(**fields: Any) -> dict[str, Any]:
    """Recipe B: CleanRL's settings for continuous actions without value clipping."""
    return {
        "env": "HalfCheetah-v5",
        "preset": "cleanrl",
        "value_clip": 0.0,
        "num_envs": 1,
        "num_steps_per_env": 2048,
    } | fields


def native(envs: int) -> dict[str, dict[str, Any]]:
    """Both sides of CartPole as a vector env of its own, value clipping on, for PureJaxRL cannot turn it off."""
    # tiny tensors are fastest with one thread
    threads = {} if envs >= 64 else {"num_threads": 1}
    ours = ours_a(num_envs=envs, vectorization="native", value_clip=0.2, compile="on") | threads
    return {OURS: ours, PUREJAXRL: {"NUM_ENVS": envs}}


SB3_A = {
    "n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "gamma": 0.99, "gae_lambda": 0.95,
    "clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.25, "max_grad_norm": 0.5,
}  # fmt: skip
SB3_B = SB3_A | {"n_steps": 2048, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-4, "ent_coef": 0.0}
SB3_ZOO = {  # rl-zoo3, hyperparams/ppo.yml, CartPole-v1
    "n_steps": 32, "batch_size": 256, "n_epochs": 20, "learning_rate": 1e-3, "gamma": 0.98, "gae_lambda": 0.8,
    "clip_range": 0.2, "ent_coef": 0.0,
}  # fmt: skip
CARTPOLE = {"env": "CartPole-v1", "n_envs": 4, "normalize": False, "linear": ["learning_rate"], "ppo": SB3_A}
CHEETAH = {"env": "HalfCheetah-v5", "n_envs": 1, "normalize": True, "linear": ["learning_rate"], "ppo": SB3_B}
PUREJAXRL_A = {
    "LR": 2.5e-4, "NUM_STEPS": 128, "UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 4, "GAMMA": 0.99, "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh",
    "ENV_NAME": "CartPole-v1", "ANNEAL_LR": True,
}  # fmt: skip
CARTPOLE_FLAGS = (
    "--env-id CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 "
    "--ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5 --gamma 0.99 --gae-lambda 0.95 --clip-coef 0.2 --no-clip-vloss"
)
CHEETAH_FLAGS = (
    "--env-id HalfCheetah-v4 --num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4 "
    "--ent-coef 0.0 --vf-coef 0.5 --max-grad-norm 0.5 --gamma 0.99 --gae-lambda 0.95 --clip-coef 0.2 --no-clip-vloss"
)
NATIVE_NOTE = (
    "`--vectorization native`: Gymnasium's `CartPoleVectorEnv`; PureJaxRL steps gymnax's CartPole inside its compiled loop. "
    "4 epochs of 4 minibatches, recipe A with value clipping. PureJaxRL's steady speed is its whole run after compilation, "
    "ours leaves out warm-up, and is compiled, however short the run (`--compile on`)."
)
GROWTH = {1: 320, 4: 200, 16: 120, 64: 60, 256: 24, 1024: 12, 4096: 8}  # environments -> iterations

ROWS = {
    "cartpole": Row(
        "CartPole-v1, 4 environments x 128, recipe A",
        "Gymnasium's Python CartPole; ours in a subclass of `SyncVectorEnv` that does less around them "
        "(`control/fast/vector_env.py`). 4 epochs of 4 minibatches, lr 2.5e-4 to 0, entropy 0.01. "
        "SBX clips the gradients of actor and critic apart, and does not initialise them orthogonally.",
        976 * 512,
        {
            OURS: ours_a(compile="on"),
            SB3: CARTPOLE | {"package": "stable_baselines3"},
            CLEANRL: {"script": "ppo.py", "flags": CARTPOLE_FLAGS, "batch": 512},
            SBX: CARTPOLE | {"package": "sbx"},
        },
        {SB3: (5, 10), CLEANRL: (5, 10)},
        learning=True,
    ),
    "halfcheetah": Row(
        "HalfCheetah-v5, 1 environment x 2048, recipe B",
        "10 epochs of 32 minibatches of 64, lr 3e-4 to 0, observations and rewards scaled and clipped at 10. CleanRL runs "
        "HalfCheetah-v4, the one its Gymnasium has. SBX as above.",
        100 * 2048,
        {
            OURS: ours_b(compile="on"),
            SB3: CHEETAH | {"package": "stable_baselines3"},
            CLEANRL: {"script": "ppo_continuous_action.py", "flags": CHEETAH_FLAGS, "batch": 2048},
            SBX: CHEETAH | {"package": "sbx"},
        },
        {SB3: (5, 8), CLEANRL: (5, 8)},
        learning=True,
    ),
    "native-4": Row(
        "CartPole-v1, native vector env, 4 x 128", NATIVE_NOTE, 976 * 512, native(4), {PUREJAXRL: (None, 0.5)}, "all"
    ),
    "native-64": Row(
        "CartPole-v1, native vector env, 64 x 128", NATIVE_NOTE, 122 * 8192, native(64), {PUREJAXRL: (1.2, 2)}, "all"
    ),
    "native-2048": Row(
        "CartPole-v1, native vector env, 2048 x 128",
        f"{NATIVE_NOTE} The last two lines: steps a second if only products of 64-wide float32 layers took time, by either "
        "of torch's libraries.",
        16 * 262_144,
        native(2048) | {PRODUCTS: {"epochs": 4}, ONEDNN: {"epochs": 4}},
        {PUREJAXRL: (1.2, 2), PRODUCTS: (0.3, 0.5), ONEDNN: (0.3, 0.5)},
        "all",
    ),
    "solve": Row(
        "CartPole-v1 from process start to a mean of 475 over 100 episodes",
        "Everyone's own settings: ours the tuned preset, SB3 those of rl-zoo3, CleanRL its defaults. A run that has not got "
        "there within its steps (100,000; 100,000; 499,712) counts as never.",
        100_352,
        {
            OURS: {"env": "CartPole-v1", "preset": "tuned", "stop_at_return": 475.0},
            SB3: CARTPOLE
            | {"n_envs": 8, "ppo": SB3_ZOO, "linear": ["learning_rate", "clip_range"], "package": "stable_baselines3"},
            CLEANRL: {"script": "ppo.py", "flags": "--env-id CartPole-v1", "batch": 512, "steps": 976 * 512},
        },
        {SB3: (3, 6), CLEANRL: (3, 6)},
        repeats=10,
        until=475.0,
    ),
    "halfcheetah-b8": Row(
        "HalfCheetah-v5 while learning, 8 environments x 256, recipe B8",
        "Recipe B with 8 environments; beside it, one environment stepped on one core with actions drawn beforehand.",
        100 * 2048,
        {OURS: ours_b(num_envs=8, num_steps_per_env=256), BARE: {"env": "HalfCheetah-v5", "num_threads": 1}},
        {BARE: (0.25, 0.5)},
        "all",
    ),
} | {
    f"growth-{envs}": Row(
        "CartPole-v1, native vector env, n x 128",
        NATIVE_NOTE,
        iterations * 128 * envs,
        native(envs),
        {},
        "all",
        repeats=3,
        envs=envs,
    )
    for envs, iterations in GROWTH.items()
}


class Missing(Exception):
    """What a side needs and is not there."""


@dataclass(frozen=True)
class Setting:
    """What the caller chose for all rows."""

    device: str
    cleanrl: Path | None
    purejaxrl: Path | None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", nargs="*", default=list(ROWS), metavar="NAME", help=f"of {', '.join(ROWS)}; or growth"
    )
    parser.add_argument("--repeats", type=int, help="instead of the row's own (5; 10 for solve, 3 for growth)")
    parser.add_argument("--steps", type=int, help="instead of the row's own")
    parser.add_argument(
        "--device", default="cpu", help="torch device of ours and SB3; JAX takes its own choice, cpu aside"
    )
    parser.add_argument("--cleanrl", type=Path, metavar="DIR", help="a checkout of CleanRL")
    parser.add_argument("--purejaxrl", type=Path, metavar="DIR", help="a checkout of PureJaxRL")
    parser.add_argument("--profile", nargs="+", choices=ROWS, default=[], metavar="NAME", help="where our time goes")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where results are kept")
    args = parser.parse_args()
    names = [row for name in args.rows for row in (sorted_growth() if name == "growth" else [name])]
    if unknown := set(names) - set(ROWS):
        parser.error(f"--rows has {', '.join(sorted(unknown))}: must be of {', '.join(ROWS)}, growth")
    args.results.mkdir(parents=True, exist_ok=True)
    page = PAGE if args.results == RESULTS else args.results / "performance.md"
    setting = Setting(args.device, *(path and path.resolve() for path in (args.cleanrl, args.purejaxrl)))
    for name in args.profile:
        profile(name, ROWS[name], args.steps, setting, args.results)
    for name in [] if args.profile else names:
        measure(name, ROWS[name], args.repeats or ROWS[name].repeats, args.steps, setting, args.results)
        write_page(args.results, page)
    write_page(args.results, page)
    print(f"{page} is written")


def profile(name: str, row: Row, steps: int | None, setting: Setting, folder: Path) -> None:
    """Run our side alone and save what an iteration's parts cost."""
    cores = sorted(os.sched_getaffinity(0))
    allowed = cores[-1:] if row.cores == "one" else cores
    said: list[str] = []
    with tempfile.TemporaryDirectory() as out:
        job = {"steps": steps or row.steps, "seed": 1, "device": setting.device, "threads": len(allowed)}
        job |= {"out": f"{out}/run", "profile": True}
        call = command(OURS, row.sides[OURS], job, setting)
        timed(call, lambda line: said.append(line) or json_reader(line), folder=Path(out), cores=allowed,
              device=setting.device, reached=None)  # fmt: skip
    found = {"title": row.title, "threads": len(allowed), "seconds": json.loads(said[-1])}
    (folder / f"profile-control-{name}.json").write_text(json.dumps(found) + "\n")
    print(name, {part: f"{seconds / found['seconds']['whole']:.0%}" for part, seconds in found["seconds"].items()})


def sorted_growth() -> list[str]:
    return [name for name, row in ROWS.items() if row.envs]


def measure(name: str, row: Row, repeats: int, steps: int | None, setting: Setting, folder: Path) -> None:
    """Run a row's sides by turns and save after each run."""
    cores = sorted(os.sched_getaffinity(0))
    allowed = cores[-1:] if row.cores == "one" else cores
    suffix = "" if setting.device == "cpu" else f"-{setting.device.replace(':', '')}"
    path = folder / f"control-{name}{suffix}.json"
    found: dict[str, Any] = {
        "place": list(ROWS).index(name), "title": row.title, "note": row.note, "warmup": row.warmup, "until": row.until,
        "envs": row.envs, "learning": row.learning, "asked": row.asked, "threads": len(allowed), "device": setting.device,
        "processor": processor(), "cores": len(cores), "command": said(name, repeats, steps, setting), "sides": row.sides,
        "versions": {}, "skipped": {}, "runs": [],
    }  # fmt: skip
    for repeat in range(repeats):
        for side in list(row.sides) if repeat % 2 == 0 else reversed(row.sides):
            if side in found["skipped"]:
                continue
            try:
                found["versions"].setdefault(side, versions(side, setting))
                asked = steps or row.sides[side].get("steps", row.steps)
                run = {"peer": side, "repeat": repeat, "seed": repeat + 1}
                run |= once(side, row, asked, repeat + 1, setting, allowed)
                found["runs"].append(run)
                print(
                    f"{name}, repeat {repeat}, {side}: {run['steps_per_second']:,.0f} steps/s, {run['seconds']:.1f} s"
                )
                path.write_text(json.dumps(found, indent=None) + "\n")
            except Missing as why:
                found["skipped"][side] = str(why)
                print(f"{name}: {side} is left out: {why}")
            sys.stdout.flush()


def once(side: str, row: Row, steps: int, seed: int, setting: Setting, cores: list[int]) -> dict[str, Any]:
    """One process of one side: its marks, speed, time and memory."""
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "steps": steps,
            "seed": seed,
            "device": setting.device,
            "threads": len(cores),
            "out": f"{folder}/run",
        }
        settings = row.sides[side]
        cores = cores[: settings.get("num_threads", len(cores))] if side == BARE else cores
        reached = partial(solved, threshold=row.until) if row.until is not None else None
        run = timed(
            command(side, settings, job, setting),
            reader(side, settings),
            folder=Path(folder),
            cores=cores,
            device=setting.device,
            reached=reached,
        )
    marks = run["marks"]
    warmup = 1 if side in (PUREJAXRL, BARE, PRODUCTS, ONEDNN) else row.warmup
    run["steps"] = marks[-1][0]
    run["steps_per_second"] = rate(marks, min(warmup, len(marks) - 1))
    run["solved_seconds"] = reached(marks) if reached else None
    run["marks"] = (
        [marks[round(i * (len(marks) - 1) / CURVE)] for i in range(CURVE + 1)] if len(marks) > CURVE else marks
    )
    return run


def timed(
    command: list[str],
    read: Callable[[str], list[Any] | None],
    *,
    folder: Path,
    cores: list[int],
    device: str,
    reached: Callable[[list[list[Any]]], float | None] | None,
) -> dict[str, Any]:
    """Run a command and time what it says.

    Args:
        read: a line of its output -> steps, episodes in the window (at most 100), their mean return; None for other lines.
        reached: seconds at which the marks got where they should; then the process is ended.

    Returns:
        `marks`: [steps, seconds since the process was started, window, mean] an iteration; `seconds` until it had ended;
        `peak_mib`; `load` just before.
    """
    threads = str(len(cores))
    own = {
        name: x for name, x in os.environ.items() if not name.startswith("OPENBLAS_")
    }  # NumPy chooses its own kernels
    told = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    told |= {"JAX_PLATFORMS": "cpu"} if device == "cpu" else {}
    marks: list[list[Any]] = []
    load, since = os.getloadavg()[0], time.monotonic()
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder, env=own | told,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic() - since
            if (mark := read(line)) is None:
                continue
            marks.append([mark[0], now, *mark[1:]])
            if reached is not None and reached(marks[-1:]) is not None:
                process.terminate()
                break
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - since
        process.returncode = os.waitstatus_to_exitcode(status)
        ended_by_us = reached is not None and marks and reached(marks[-1:]) is not None
        if (process.returncode != 0 and not ended_by_us) or len(marks) < 2:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["nothing was said"])[-1]
            raise Missing(f"it ended with {process.returncode} after {len(marks)} iterations: {last[:200]}")
    return {"marks": marks, "seconds": seconds, "peak_mib": usage.ru_maxrss / 1024, "load": load}


def command(side: str, settings: dict[str, Any], job: dict[str, Any], setting: Setting) -> list[str]:
    """What runs a side, in the interpreter that has it."""
    python = str(interpreter(side))
    if side == OURS:
        # compiled steps are the CPU's
        own = settings if job["device"].startswith("cpu") else {k: v for k, v in settings.items() if k != "compile"}
        return [python, str(HERE / "control_ours.py"), json.dumps(job | {"fields": own})]
    if side in (SB3, SBX):
        return [python, str(HERE / "peers" / "sb3.py"), json.dumps(settings | job)]
    if side == CLEANRL:
        script = checkout(setting.cleanrl, "--cleanrl") / "cleanrl" / settings["script"]
        common = ["--seed", str(job["seed"]), "--total-timesteps", str(job["steps"])]
        return [
            python,
            str(script),
            *settings["flags"].split(),
            *common,
            "--no-cuda" if job["device"] == "cpu" else "--cuda",
        ]
    if side == PUREJAXRL:
        given = {"checkout": str(checkout(setting.purejaxrl, "--purejaxrl")), "config": PUREJAXRL_A | settings}
        return [python, str(HERE / "peers" / "purejaxrl.py"), json.dumps(job | given)]
    kind = {BARE: "bare_env", PRODUCTS: "products", ONEDNN: "products_by_onednn"}[side]
    return [python, str(HERE / "control_limits.py"), kind, json.dumps(job | settings)]


def reader(side: str, settings: dict[str, Any]) -> Callable[[str], list[Any] | None]:
    """What reads a side's lines: JSON, or what CleanRL's scripts print as they are."""
    return cleanrl_reader(settings["batch"]) if side == CLEANRL else json_reader


def json_reader(line: str) -> list[Any] | None:
    said = json.loads(line) if line.startswith("{") else {}
    return [said["steps"], said.get("window"), said.get("mean")] if "steps" in said else None


def cleanrl_reader(batch: int) -> Callable[[str], list[Any] | None]:
    """Episodes' returns as they end; "SPS:" closes an iteration of `batch` steps."""
    window: deque[float] = deque(maxlen=100)
    steps = 0

    def read(line: str) -> list[Any] | None:
        nonlocal steps
        if ended := re.match(r"global_step=\d+, episodic_return=\[?\s*(\S+?)\]?$", line):
            window.append(float(ended[1]))
        if not line.startswith("SPS:"):
            return None
        steps += batch
        return [steps, len(window), sum(window) / len(window) if window else None]

    return read


def interpreter(side: str) -> Path:
    python = ROOT / PYTHONS[side] / "bin" / "python"
    if not python.exists():
        raise Missing(f"{PYTHONS[side]} is missing: `make bench-control` makes it")
    return python


def checkout(folder: Path | None, flag: str) -> Path:
    if folder is None or not folder.exists():
        raise Missing(f"{flag} names no checkout")
    return folder


def versions(side: str, setting: Setting) -> str:
    """The versions of what a side runs on, and the commit of a checkout."""
    asked = (
        f"from importlib.metadata import version; print(', '.join(n + ' ' + version(n) for n in {PACKAGES[side]!r}))"
    )
    told = subprocess.run([interpreter(side), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    folder = {CLEANRL: (setting.cleanrl, "--cleanrl"), PUREJAXRL: (setting.purejaxrl, "--purejaxrl")}.get(side)
    if folder is None:
        return told
    where = ["git", "-C", str(checkout(*folder)), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(where, capture_output=True, text=True).stdout.strip()
    return f"commit {commit or 'unknown'}, {told}"


def said(name: str, repeats: int, steps: int | None, setting: Setting) -> str:
    """The command that measures a row again; checkouts stand as DIR."""
    flags = [f"--rows {name}", f"--repeats {repeats}", *([f"--steps {steps}"] if steps else [])]
    flags += [f"--device {setting.device}"] if setting.device != "cpu" else []
    flags += [f"--{peer} DIR" for peer in ("cleanrl", "purejaxrl") if getattr(setting, peer)]
    return " ".join(["python bench/control.py", *flags])


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
