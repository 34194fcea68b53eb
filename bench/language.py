"""Language models beside their peers on the same work: `make bench-language`.

    python bench/language.py [--rows NAME ...] [--repeats N] [--device cuda] [--profile NAME ...]

Each measurement is a process of its own with one thread; ours (A) and the peer's (B) alternate A B B A, so that a machine
that warms up or gets busy meets both. An iteration's time is what lies between the ends of two; the median of a process
leaves out its first ones (`warmup`). What is compared is tokens a second, so lengths that differ by chance do not count.
Results are saved as they come under bench/results/performance/language-ROW.json; all that are there make the language part
of docs/performance.md. `--rows` without a name only writes that page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pstats
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from language_work import ppo_flops, sums

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance-language.png"
MODELS = ROOT / "runs" / "bench-language"
STORIES = ROOT.parent / "shared" / "data" / "stories260K"
BEGIN, END = "<!-- language -->", "<!-- /language -->"
OURS = (ROOT / ".venv/bin/python", HERE / "language_ours.py")
PEERS = {  # name -> its interpreter and script
    "TRL 1.16": (ROOT / ".venv-oracles-trl-1.16.0/bin/python", HERE / "peers" / "trl_grpo.py"),
    "TRL 1.12": (ROOT / ".venv-oracles-trl-1.12.0/bin/python", HERE / "peers" / "trl_ppo.py"),
    "Hugging Face generate": (ROOT / ".venv/bin/python", HERE / "peers" / "hf_generate.py"),
    "the processor": OURS,
}
LIMIT = 3600  # seconds a process may take


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    """In words."""
    peer: str
    job: dict[str, Any]
    """What both do."""
    warmup: int
    """Iterations at the start that do not count."""
    iterations: int
    """Those that do."""
    at_least: float = 0.0
    """Ratio of tokens a second that is asked for; 0 for none."""
    aim: float = 0.0
    peer_job: dict[str, Any] = field(default_factory=dict)
    """Where the peer's differs."""
    growth: str = ""
    """The curve it is a point of: "length" or "vocabulary"."""


def grpo(vocabulary: int, *, length: int = 32, rows: int = 64, spread: bool = False) -> dict[str, Any]:
    return {
        "kind": "grpo",
        "vocabulary": vocabulary,
        "rows": rows,
        "group": 8,
        "length": length,
        "spread": spread,
        "context": max(128, length + 16),
    }


def ppo(vocabulary: int, critic: str) -> dict[str, Any]:
    shape = {"vocabulary": vocabulary, "rows": 64, "length": 32, "spread": False, "context": 128}
    return {"kind": "ppo", "critic": critic, "epochs": 4, **shape}


def stories(rows: int) -> dict[str, Any]:
    source = random.Random(0)  # all prompts alike in length, so that the peer pads nothing, and no two the same
    prompts = [[1, *(source.randrange(3, 512) for _ in range(7))] for _ in range(rows)]
    return {"kind": "generate", "models": str(STORIES), "rows": rows, "length": 64, "prompts": prompts}


TRL, OLD, HF, PROCESSOR = PEERS
FIXED, SPREAD = "GRPO iteration, vocabulary {}, 32 tokens each", "GRPO iteration, vocabulary {}, 4 to 64 tokens by EOS"
ROWS = {
    "grpo-512": Row(FIXED.format("512"), TRL, grpo(512), 3, 15, 2.0, 3.0),
    "grpo-8k": Row(FIXED.format("8k"), TRL, grpo(8192), 2, 8, 2.5, 5.0),
    "grpo-32k": Row(FIXED.format("32k"), TRL, grpo(32768), 1, 4, 2.5, 5.0),
    "grpo-512-spread": Row(SPREAD.format("512"), TRL, grpo(512, length=64, spread=True), 3, 12, 3.0, 6.0),
    "grpo-8k-spread": Row(SPREAD.format("8k"), TRL, grpo(8192, length=64, spread=True), 2, 6, 3.0, 6.0),
    "grpo-32k-spread": Row(SPREAD.format("32k"), TRL, grpo(32768, length=64, spread=True), 1, 3, 3.0, 6.0),
    "grpo-512-defaults": Row(
        "the same at 512, TRL with its defaults", TRL, grpo(512), 3, 10, peer_job={"defaults": True}
    ),
    "ppo-separate": Row("PPO, 4 epochs, vocabulary 512, separate critic", OLD, ppo(512, "separate"), 2, 6, 1.8, 2.4),
    "ppo-shared": Row("PPO, 4 epochs, vocabulary 512, shared trunk", OLD, ppo(512, "shared"), 2, 6, 3.0, 4.5),
    "ppo-32k": Row("PPO, 4 epochs, vocabulary 32k, shared trunk", OLD, ppo(32768, "shared"), 1, 2),
    "generate-8": Row("generation, stories260K, 64 tokens, batch 8", HF, stories(8), 3, 20, 2.0, 4.0),
    "generate-64": Row("generation, stories260K, 64 tokens, batch 64", HF, stories(64), 2, 10, 1.6, 2.5),
    "share-separate": Row(
        "share of the matmul rate, PPO, separate critic",
        PROCESSOR,
        ppo(512, "separate"),
        2,
        6,
        0.5,
        0.7,
        {"kind": "matmul", "iterations": 30},
    ),
    "share-shared": Row(
        "share of the matmul rate, PPO, shared trunk",
        PROCESSOR,
        ppo(512, "shared"),
        2,
        6,
        0.5,
        0.7,
        {"kind": "matmul", "iterations": 30},
    ),
}
ROWS |= {
    f"length-{n}": Row(f"8 rows of {n}", TRL, grpo(512, length=n, rows=8), 1, 2, growth="length")
    for n in (64, 128, 256, 512, 1024, 2048, 4096)
}
ROWS |= {
    f"vocabulary-{n}": Row(f"vocabulary {n}", TRL, grpo(n), 1, 2, growth="vocabulary")
    for n in (512, 2048, 8192, 32768, 131072)
}
GROWTH_REPEATS = 2  # A B B A; the curves say how cost grows, not by how much one is ahead
MEMORY = {"grpo-32k": "GRPO, vocabulary 32k", "ppo-32k": "PPO, vocabulary 32k, shared trunk"}
STEPS = {  # of an iteration: function of ours whose time, with all that it calls, is the step's
    "sampling": (("collect.py", "collect"),),
    "scoring": (("cast.py", "score_completions"), ("cast.py", "compute_rewards")),
    "values": (("ppo.py", "estimate_values"),),
    "advantage": (("ppo.py", "compute_advantages"), ("grpo.py", "group_advantage")),
    "update": (("update.py", "update"),),
    "logging": (("cast.py", "log_rollout"),),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side; the growth rows have 2")
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--profile", nargs="+", choices=ROWS, default=[], metavar="NAME", help="where our time goes")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in args.profile:
        found = profiled(ROWS[name], args.device)
        write(RESULTS / f"language-profile-{name}{suffix(args.device)}.json", found)
        print(profile_table({name: found}))
    for name in [] if args.profile else args.rows:
        row = ROWS[name]
        repeats = min(args.repeats, GROWTH_REPEATS) if row.growth else args.repeats
        try:
            measure(name, row, repeats, args.device)
        except (
            RuntimeError,
            subprocess.TimeoutExpired,
        ) as error:  # what was measured until then is saved; on to the next
            print(f"{name}: {error}", file=sys.stderr)
    write_page(RESULTS)


def suffix(device: str) -> str:
    return "" if device == "cpu" else f"-{device}"


def measure(name: str, row: Row, repeats: int, device: str) -> None:
    """Both sides of a row, by turns; saved after every process."""
    found: dict[str, Any] = {
        "row": name,
        "device": device,
        "processor": processor(),
        "python": platform.python_version(),
    }
    found |= {"warmup": row.warmup, "iterations": row.iterations, "date": time.strftime("%Y-%m-%d")}
    found |= {"ours": [], "peer": [], "skipped": missing(row)}
    if not found["skipped"]:
        for turn in range(repeats):
            for side in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
                python, script = OURS if side == "ours" else PEERS[row.peer]
                found[side].append(run(python, script, job_of(row, side, device)))
                write(RESULTS / f"language-{name}{suffix(device)}.json", found)
                print(f"{name} {side} {turn + 1}/{repeats}: {rate(found[side][-1]):,.0f} tokens/s", flush=True)
    write(RESULTS / f"language-{name}{suffix(device)}.json", found)


def missing(row: Row) -> str:
    """Why a row cannot be measured; empty where it can."""
    python, _ = PEERS[row.peer]
    if not python.exists():
        return f"{row.peer} is not here: `make oracles-trl` makes its environment"
    if row.job["kind"] == "generate" and not STORIES.is_dir():
        return "stories260K is not here"
    return ""


def job_of(row: Row, side: str, device: str) -> dict[str, Any]:
    """What a side's worker is told."""
    job = {"warmup": row.warmup, "iterations": row.iterations, "device": device, **row.job}
    job |= row.peer_job if side == "peer" else {}
    if "models" not in job:
        job |= {"models": str(models(row.job)), "data": str(prompts())}
    return job


def run(python: Path, script: Path, job: dict[str, Any]) -> dict[str, Any]:
    """One process; what its last line says."""
    with tempfile.TemporaryDirectory() as folder:
        job = {**job, "out": f"{folder}/run", "spawned": time.time()}
        done = subprocess.run(
            [str(python), str(script), json.dumps(job)],
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=LIMIT,
            env=os.environ | QUIET,
        )
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def models(job: dict[str, Any]) -> Path:
    """The directory of a job's models; made where it is not there yet."""
    lengths = "spread" if job["spread"] else "fixed"
    folder = MODELS / f"{job['vocabulary']}-{job['context']}-{lengths}"
    if not (folder / "reward_model" / "tokenizer.json").is_file():
        made = [folder.with_suffix(".tmp"), job["vocabulary"], job["context"], lengths]
        shutil.rmtree(made[0], ignore_errors=True)
        command = [str(OURS[0]), str(HERE / "language_models.py"), *map(str, made)]
        subprocess.run(command, check=True, env=os.environ | QUIET)
        shutil.rmtree(folder, ignore_errors=True)
        made[0].rename(folder)
    return folder


def prompts() -> Path:
    MODELS.mkdir(parents=True, exist_ok=True)
    path = MODELS / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums()))
    return path


def profiled(row: Row, device: str) -> dict[str, Any]:
    """Seconds of each step of our iterations, and of the functions that take most of their own, by cProfile.

    The profiler slows Python down, not torch: shares lean towards what calls much.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(row, "ours", device) | {"profile": f"{folder}/profile"}
        found = run(*OURS, job)
        stats: Any = pstats.Stats(job["profile"])
    counted = found["seconds"][row.warmup :]
    steps = {name: sum(cumulative(stats.stats, *one) for one in ones) for name, ones in STEPS.items()}
    told = [(own, calls, f"{Path(file).name}:{name}") for (file, _, name), (_, calls, own, *_) in stats.stats.items()]
    top = [{"seconds": s, "calls": calls, "function": name} for s, calls, name in sorted(told, reverse=True)[:25]]
    return {"seconds": sum(counted), "iterations": len(counted), "steps": steps, "functions": top}


def cumulative(stats: dict[Any, Any], file: str, function: str) -> float:
    """Seconds in a function of the package and all that it calls."""
    return sum(
        told[3]
        for (where, _, name), told in stats.items()
        if where.endswith(f"/{file}") and name == function and "understudy" in where
    )


def rate(told: dict[str, Any]) -> float:
    """Tokens a second of one process: the median over its iterations after the warm-up."""
    pairs = list(zip(told["tokens"], told["seconds"], strict=True))[told["warmup"] :]
    return statistics.median(tokens / seconds for tokens, seconds in pairs)


def seconds(told: dict[str, Any]) -> float:
    """Of an iteration: the median over those after the warm-up."""
    return statistics.median(told["seconds"][told["warmup"] :])


def product_rate(told: dict[str, Any]) -> float:
    """Floating-point operations a second that products reach alone, by `torch.mm`."""
    return statistics.median(told["flops_per_second"][told["warmup"] :])


def onednn_rate(told: dict[str, Any]) -> float:
    """The same by oneDNN."""
    return statistics.median(told["flops_per_second_onednn"][told["warmup"] :])


def end_to_end(told: dict[str, Any]) -> float:
    """Seconds from the process's start to the end of its last iteration."""
    return told["end_to_end"]


def memory(told: dict[str, Any]) -> float:
    """MiB beyond what was there after imports and what the models' parameters hold."""
    return (told["peak_bytes"] - told["imports_bytes"] - told["model_bytes"]) / 2**20


def ratio(found: dict[str, Any], of: Callable[[dict[str, Any]], float]) -> float:
    """Median over pairs of a figure of ours over the peer's beside it."""
    return statistics.median(of(a) / of(b) for a, b in zip(found["ours"], found["peer"], strict=False))


def median(told: list[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(of, told))


def flops_share(told: dict[str, Any], alone: float, row: Row) -> float:
    """Of a language PPO iteration: its arithmetic a second over the rate that products reach alone."""
    job, chosen = row.job, statistics.mean(told["tokens"])
    mean_prompt = statistics.mean(len(one["prompt"]) for one in sums())  # a token a character
    lengths = [round(mean_prompt) + job["length"]] * job["rows"]
    flops = ppo_flops(lengths, round(chosen), vocabulary=job["vocabulary"], epochs=job["epochs"], critic=job["critic"])
    return flops / seconds(told) / alone


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def stored(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """Every row that was measured, in the order of the table; without those where only one side came to an end."""
    paths = {name: folder / f"language-{name}{suffix(device)}.json" for name in ROWS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    return {name: one for name, one in found.items() if one["skipped"] or (one["ours"] and one["peer"])}


def write_page(folder: Path, page: Path = PAGE, picture: Path = PICTURE) -> None:
    """Put all that is stored between the marks of docs/performance.md, and draw the curves."""
    text = page.read_text(encoding="utf-8") if page.exists() else "# Performance\n\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    page.write_text(f"{head}{BEGIN}\n{part(folder, picture)}{END}{tail}", encoding="utf-8")


def part(folder: Path, picture: Path) -> str:
    """The language part of the page."""
    lines = ["## Language", ""]
    for device in ("cpu", "cuda"):
        found = stored(folder, device)
        if found:
            lines += [
                *heading(found, device),
                "",
                *speed_table(found),
                "",
                *memory_table(found),
                "",
                *share_table(found),
            ]
            drawn = picture.with_stem(picture.stem + suffix(device))
            if draw(found, drawn):
                lines += ["", *growth_table(found), "", f"![cost against length and vocabulary]({drawn.name})"]
    profiles = {path.stem.removeprefix("language-profile-"): path for path in folder.glob("language-profile-*.json")}
    if profiles:
        lines += ["", profile_table({name: json.loads(path.read_text()) for name, path in sorted(profiles.items())})]
    return "\n".join([*lines, "", HOW]) + "\n"


HOW = """\
**How it is measured.** The model is a Qwen2 of 128 hidden units, 4 layers, 4 heads (2 for keys and values) and 352
inner units with random weights; 4,096 prompts like `12+7=`, a token a character; 64 rows an iteration, groups of 8;
AdamW, one optimizer step an iteration for GRPO, four for PPO; temperature 1. Both sides load the same directories.
Fixed lengths: the stop is an id that the model does not have, so no side pays for forbidding it. Spread lengths: the
model says the stop with probability 1/40 from the fourth token on; ours reads with `packing`. The reward is the share
of even digits (GRPO), a reward model of the same size (PPO). Ours runs `iterate(Config)` with preflight on, and without
checkpoints, evaluation or kept samples. TRL tuned: float32, no autocast, no gradient checkpointing, fused AdamW, the
whole batch in one pass, no reference model for GRPO (beta 0), no logging, saving or progress bar; the scripts are in
bench/peers. TRL's PPO has no shared trunk: both rows are measured against its separate critic, and it clips no
gradient. `generate` runs under `inference_mode`, keeps no scores, and all its prompts are as long; ours gives log-probs
too. Memory: the highest resident size of the process, less what was resident after imports and what the files of its
models hold; optimizer and gradients count. The share of the matmul rate: `ppo_flops` in bench/language_work.py counts
what the method's definition asks for and nothing twice; the rate is that of products alone at this model's widths over
all tokens of an iteration, by each of the two libraries that torch brings along.
"""


def heading(found: dict[str, dict[str, Any]], device: str) -> list[str]:
    """What was measured where, by which versions."""
    some = next((one for one in found.values() if one["ours"]), None)
    if some is None:
        return []
    told = [each for one in found.values() for each in (*one["ours"], *one["peer"])]
    versions = {name: version for each in told for name, version in each["versions"].items() if name != "trl"}
    trl = sorted({each["versions"]["trl"] for each in told if "trl" in each["versions"]})
    said = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    kind = "float32" if device == "cpu" else "bfloat16"
    command = "make bench-language" if device == "cpu" else f"python bench/language.py --device {device}"
    return [
        f"`{command}`, {some['date']}; {some['processor']}, {device}, {kind}, 1 thread a process, load up to "
        f"{max(each['load'] for each in told):.1f}; Python {some['python']}, {said}, trl {' and '.join(trl)}. Medians over "
        "the processes of a side; a ratio is the median over neighbouring pairs, ours over the peer's: above 1 is faster. "
        "Asked: at least / aim.",
    ]


def speed_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| work | against | ours, tokens/s | peer, tokens/s | ours, s | peer, s | **ratio** | asked | end to end, s | "
        "ratio of it | pairs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        row = ROWS[name]
        if row.growth or row.peer == PROCESSOR:
            continue
        if one["skipped"]:
            lines.append(f"| {row.work} | {row.peer} | {one['skipped']} | | | | | {asked(row)} | | | |")
            continue
        lines.append("| " + " | ".join(speed_cells(row, one)) + " |")
    return lines


def speed_cells(row: Row, one: dict[str, Any]) -> list[str]:
    ours, peer = one["ours"], one["peer"]
    return [
        row.work,
        row.peer,
        f"{median(ours, rate):,.0f}",
        f"{median(peer, rate):,.0f}",
        f"{median(ours, seconds):.3f}",
        f"{median(peer, seconds):.3f}",
        f"**{ratio(one, rate):.2f}**",
        asked(row),
        f"{median(ours, end_to_end):.1f} / {median(peer, end_to_end):.1f}",
        f"{1 / ratio(one, end_to_end):.2f}",
        f"{min(len(ours), len(peer))}",
    ]


def asked(row: Row) -> str:
    return f"{row.at_least:g} / {row.aim:g}" if row.at_least else "-"


def memory_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| peak memory over the models' own | against | ours, MiB | peer, MiB | **ratio** | asked |",
        "|---|---|---|---|---|---|",
    ]
    for name, work in MEMORY.items():
        one = found.get(name)
        if one and not one["skipped"]:
            cells = [
                work,
                ROWS[name].peer,
                f"{median(one['ours'], memory):,.0f}",
                f"{median(one['peer'], memory):,.0f}",
            ]
            lines.append("| " + " | ".join([*cells, f"**{ratio(one, memory):.2f}**", "0.5 / 0.25"]) + " |")
    return lines


def share_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| a whole iteration | products alone by torch.mm, GFLOP/s | **share** | by oneDNN, GFLOP/s | **share** | asked |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        row = ROWS[name]
        if row.peer == PROCESSOR and not one["skipped"]:
            cells = []
            for of in (product_rate, onednn_rate):
                if of is onednn_rate and not one["peer"][0]["flops_per_second_onednn"]:  # a GPU's
                    cells += ["-", "-"]
                    continue
                pairs = zip(one["ours"], one["peer"], strict=False)
                share = statistics.median(flops_share(a, of(b), row) for a, b in pairs)
                cells += [f"{median(one['peer'], of) / 1e9:.1f}", f"**{share:.0%}**"]
            lines.append(f"| {row.work} | {' | '.join(cells)} | {row.at_least:.0%} / {row.aim:.0%} |")
    return lines


def growth_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| GRPO iteration | ours, tokens/s | TRL, tokens/s | ours, MiB | TRL, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if ROWS[name].growth and not one["skipped"]:
            sides = [one["ours"], one["peer"]]
            cells = [f"{median(side, rate):,.0f}" for side in sides]
            cells += [f"{median(side, memory):,.0f}" for side in sides]
            lines.append(f"| {ROWS[name].work} | {' | '.join(cells)} |")
    return lines


def profile_table(found: dict[str, dict[str, Any]]) -> str:
    """Shares of our iterations' time by step."""
    lines = [
        f"| share of our iteration | s | {' | '.join(STEPS)} | the rest |",
        "|---|---|" + "---|" * (len(STEPS) + 1),
    ]
    for name, one in found.items():
        shares = [one["steps"][step] / one["seconds"] for step in STEPS]
        cells = [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]
        lines.append(f"| {name} | {one['seconds'] / one['iterations']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> bool:
    """Tokens a second and memory against length and vocabulary as a PNG; False where there are no two points to join."""
    curves = {kind: [name for name in found if ROWS[name].growth == kind and found[name]["ours"]] for kind in GROWN}
    curves = {kind: names for kind, names in curves.items() if len(names) > 1}
    if not curves:
        return False
    from matplotlib.figure import Figure  # takes half a second, and only here

    figure = Figure(figsize=(4.5 * len(curves), 6.5), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, kind in enumerate(curves):
        for side, name, color in (("ours", "Understudy", "#1f5fa8"), ("peer", TRL, "#c8722c")):
            xs = [ROWS[one].job[kind] for one in curves[kind]]
            speeds = [median(found[one][side], rate) for one in curves[kind]]
            held = [median(found[one][side], memory) for one in curves[kind]]
            axes[0, column].plot(xs, speeds, color=color, marker="o", markersize=3.5, linewidth=1.8, label=name)
            axes[1, column].plot(xs, held, color=color, marker="o", markersize=3.5, linewidth=1.8, label=name)
        axes[0, column].set(xlabel=GROWN[kind], ylabel="tokens/s", xscale="log", yscale="log")
        axes[1, column].set(xlabel=GROWN[kind], ylabel="MiB over the models' own", xscale="log", yscale="log")
        for each in axes[:, column]:
            each.spines[["top", "right"]].set_visible(False)
            each.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return True


GROWN = {"length": "tokens a completion (8 rows)", "vocabulary": "vocabulary (64 rows of 32 tokens)"}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
