"""Over-optimisation on the made-up language, whose true score is known: `make over-optimisation`.

A policy is taught as in the rehearsal; reward models (proxies) learn from noisy preferences between its own sentences, one
from each number of pairs. Best-of-n and PPO then follow each proxy away from the policy, and the true score is measured on
the way. Results are saved as they come under bench/results/over_optimisation/; what is found there is not run again. All
of them together write docs/over-optimisation.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from understudy import load
from understudy.cli import rehearse
from understudy.language import RewardModel, ppo, reward_model, toy_language
from understudy.language.data.records import make_preferences
from understudy.run.seeds import derive_seed
from understudy.study.overoptimise import Curve, Form, fit, kl_of_best_of_n, mean_of_best_of_n, peak_interval
from understudy.study.statistics import bootstrap_interval

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "over_optimisation"
RUNS = ROOT / "runs" / "over-optimisation"
PAGE = ROOT / "docs" / "over-optimisation.md"
PICTURE = ROOT / "docs" / "over-optimisation.png"
SEEDS = (1, 2, 3, 4, 5)

SIZES = (100, 400, 4000)  # pairs a proxy learns from
TESTED = 1000  # pairs that no proxy learns from
PROXY_STEPS = 400  # optimizer steps, whatever the number of pairs
PROXY = {"learning_rate": 3e-3, "batch_size": 20, "held_out": 0, "log_every": 50}
OPENINGS, SAMPLES = 64, 1024  # of best-of-n: openings nobody was trained on, completions of each
BEST_OF = tuple(2**i for i in range(11))
ITERATIONS = 60  # of PPO, about
PPO = {
    "learning_rate": 2e-4,
    "learning_rate_schedule": "constant",
    "critic_learning_rate": 1e-3,
    "critic_warmup": 6,
    "kl_reference_coef": 0.0,
    "held_out": 128,
    "evaluate_every": 2,
    "evaluate_rows": 256,
    "log_samples": 0,
}
FORMS: dict[str, Form] = {"best_of": "best_of", "ppo": "rl"}
NAMES = {"best_of": "best of n", "ppo": "PPO"}
COLOURS = {100: "#c0392b", 400: "#d68910", 4000: "#1f5fa8"}
READ = (
    "PPO on the smallest proxy is over-optimisation as it is described: the true score rises a little, falls, and ends "
    "below where it began, in every seed, while the proxy rises throughout. More pairs put that off and make more of "
    "the way there; they do not prevent it, for no KL is charged. Best of n stays in what the policy says anyway: it "
    "turns late, and falls by little, within the KL that so many samples reach.",
    "",
    "At the same KL best of n gains more than PPO. Its form fits better too at 400 and 4000 pairs. PPO's form puts the "
    "peak before the best measured points: most points lie on the long way down, which it makes nearly straight; and "
    "seeds differ, one policy's hump coming at ten times another's KL (400 pairs). The best measured point is the "
    "largest of some thirty noisy ones (about 0.016 standard error each), so it flatters a little.",
)
TRIED = (
    ("PPO", "pairs", "what came of it"),
    ("---", "---", "---"),
    (
        "learning rate 1e-3, falling to 0, KL coefficient 0.01 paid",
        "100",
        "KL 15.7 after 6 iterations, true score 0.30 to 0.12; then back to KL 8 and 0.32: the proxy saturates, and the "
        "KL is all that is left to pay for",
    ),
    ("learning rate 2e-4, constant, no KL", "100", "true score 0.32 at KL 1, 0.15 at KL 21; proxy to 1.4"),
    (
        "the same",
        "4000",
        "true score falls from the start, KL 159, proxy to 4.3: the critic begins as the reward model, which was never "
        "asked about half a sentence, and learns too slowly to tell a good word from a bad one",
    ),
    ("the same, the critic's learning rate 1e-3, six iterations of warm-up", "100, 400, 4000", "chosen, as below"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--pairs", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--ways", nargs="*", choices=list(FORMS), default=list(FORMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for size in args.pairs:
            for way in args.ways:
                once(f"{way}-{size}-{seed}", lambda way=way, size=size, seed=seed: measure(way, size, seed))
    found = {size: [saved(size, seed) for seed in SEEDS if saved(size, seed)] for size in SIZES}
    if all(len(seeds) == len(SEEDS) for seeds in found.values()):
        draw(found)
        PAGE.write_text(page(found), encoding="utf-8")
        print(PAGE.read_text(encoding="utf-8"))


def once(name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Make a result and save it, where there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        began = time.process_time()
        found = make() | {"cpu_seconds": round(time.process_time() - began), "versions": versions()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(path.name, json.dumps({key: found[key] for key in ("proxy", "true", "score", "kl")}), flush=True)


def saved(size: int, seed: int) -> dict[str, Any]:
    """Both ways of a proxy; nothing where one of them has not been run."""
    paths = {way: RESULTS / f"{way}-{size}-{seed}.json" for way in FORMS}
    if not all(path.exists() for path in paths.values()):
        return {}
    return {way: json.loads(path.read_text(encoding="utf-8")) for way, path in paths.items()}


def measure(way: str, size: int, seed: int) -> dict[str, Any]:
    """Where one way of following a proxy comes to, and how good the proxy is."""
    out = policy_of(seed)
    proxy = proxy_of(out, seed, size)
    found = best_of(out, proxy, seed) if way == "best_of" else by_ppo(out, seed, size)
    return {"seed": seed, "pairs": size, "proxy": examine(out, proxy, size), **found}


def policy_of(seed: int) -> Path:
    """The directory of the policy that everything starts from, and the preferences between its sentences."""
    out = RUNS / str(seed)
    if not (out / "tested.jsonl").exists():
        shutil.rmtree(out, ignore_errors=True)
        policy = rehearse.train_sft_policy(out, seed, rehearse.FULL_SIZES, report=lambda text: None)
        pairs = rehearse.sample_pairs(policy, max(SIZES) + TESTED, seed)
        rows = toy_language.preferences(pairs, temperature=rehearse.TEMPERATURE, seed=seed)
        for size in SIZES:
            toy_language.write_jsonl(rows[:size], out / f"pairs-{size}.jsonl")
        toy_language.write_jsonl(rows[-TESTED:], out / "tested.jsonl")
    return out


def proxy_of(out: Path, seed: int, size: int) -> RewardModel:
    """A reward model from the first `size` pairs."""
    path = out / f"proxy-{size}"
    if not (path / "reward_model").exists():
        shutil.rmtree(path, ignore_errors=True)
        data, epochs = str(out / f"pairs-{size}.jsonl"), math.ceil(PROXY_STEPS * PROXY["batch_size"] / size)
        given: dict[str, Any] = {**rehearse.COMMON_FIELDS, **PROXY, "seed": seed, "num_epochs": epochs}
        reward_model.train(reward_model.Config(model=str(out / "sft"), data=data, output_dir=str(path), **given))
    return RewardModel.from_pretrained(path / "reward_model")


def examine(out: Path, proxy: RewardModel, size: int) -> dict[str, float]:
    """Accuracy on the pairs it learned from and on those that no proxy did, with its 95 % interval."""
    found = {}
    for name, file in (("learned", f"pairs-{size}"), ("tested", "tested")):
        rows = [json.loads(line) for line in (out / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
        said = reward_model.evaluate_reward_model(proxy, make_preferences(rows, proxy.tokenizer, max_length=64))
        found |= {f"{name}{end}": said[f"accuracy{end}"] for end in ("", "_low", "_high")}
    return found


def best_of(out: Path, proxy: RewardModel, seed: int) -> dict[str, list[float]]:
    """Mean true and proxy score of the best of n by the proxy; and the true score of the best by truth."""
    said = sampled(out, seed)
    true = np.array([toy_language.true_score(text) for _, text in said]).reshape(OPENINGS, SAMPLES)
    by = proxy.score([ids for ids, _ in said]).double().numpy().reshape(OPENINGS, SAMPLES)
    return {
        "n": list(BEST_OF),
        "kl": [kl_of_best_of_n(n) for n in BEST_OF],
        "true": [mean_of_best_of_n(by, true, n) for n in BEST_OF],
        "score": [mean_of_best_of_n(by, by, n) for n in BEST_OF],
        "best": [mean_of_best_of_n(true, true, n) for n in BEST_OF],
    }


def sampled(out: Path, seed: int) -> list[tuple[list[int], str]]:
    """Completions of openings nobody was trained on, ids and text; the same for every proxy."""
    path = out / "sampled.json"
    if not path.exists():
        openings = [row["prompt"] for row in toy_language.prompts(OPENINGS, derive_seed(seed, "test"))]
        many = [x for x in openings for _ in range(SAMPLES)]
        said = rehearse.sample_completions(load(out / "sft"), many, derive_seed(seed, "best of") >> 1)
        path.write_text(json.dumps([[[*ids, *completion.ids], text] for ids, completion, text in said]))
    return json.loads(path.read_text())


def by_ppo(out: Path, seed: int, size: int) -> dict[str, list[float]]:
    """True score, proxy score and KL of PPO's policy on held-out openings, every few iterations, from KL 0 on."""
    path = out / f"ppo-{size}"
    shutil.rmtree(path, ignore_errors=True)
    cfg = rehearse.ppo_config(out, seed, replace(rehearse.FULL_SIZES, iterations=ITERATIONS))
    judges: dict[str, Any] = {"reward": (str(out / f"proxy-{size}"),), "gold": (toy_language.true_scores,)}
    metrics = ppo.train(replace(cfg, **judges, **PPO, output_dir=str(path))).metrics
    lines = [m for m in metrics if "evaluation_kl" in m and m["iteration"] > PPO["critic_warmup"]]
    first = lines[0]
    return {
        "iteration": [PPO["critic_warmup"]] + [m["iteration"] for m in lines],
        "kl": [0.0] + [m["evaluation_kl"] for m in lines],
        "true": [first["evaluation_reference_gold"]] + [m["evaluation_gold"] for m in lines],
        "score": [first["evaluation_reference_score"]] + [m["evaluation_score"] for m in lines],
        "distinct_4": [first["evaluation_reference_distinct_4"]] + [m["evaluation_distinct_4"] for m in lines],
    }


def versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return found | {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}


def curve(found: dict[str, Any], name: str = "true") -> Curve:
    """KL, and what was gained of a score since KL 0."""
    return found["kl"], [x - found[name][0] for x in found[name]]


def draw(found: dict[int, list[dict[str, Any]]]) -> None:
    """True and proxy score over sqrt(KL), every seed a thin line, the fit a thick one."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    for column, way in enumerate(FORMS):
        for size, seeds in found.items():
            for row, name in enumerate(("true", "score")):
                for seed in seeds:
                    kl, gain = curve(seed[way], name)
                    axes[row, column].plot(np.sqrt(kl), gain, color=COLOURS[size], linewidth=0.8, alpha=0.6)
            fitted = fit([curve(seed[way]) for seed in seeds], FORMS[way])
            d = np.linspace(0, max(math.sqrt(max(seed[way]["kl"])) for seed in seeds), 200)
            line = [fitted(x * x) for x in d]
            label = f"{size} pairs, fit (R² {fitted.r2:.2f})"
            axes[0, column].plot(d, line, color=COLOURS[size], linewidth=2.4, linestyle="--", label=label)
        axes[0, column].set_title(NAMES[way])
        axes[0, column].axhline(0, color="#888888", linewidth=0.8)
        axes[0, column].legend(frameon=False, loc="best", fontsize=8)
        axes[1, column].set_xlabel("sqrt(KL to the policy before), KL in nats a completion")
        for row in (0, 1):
            axes[row, column].spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("true score, gained")
    axes[1, 0].set_ylabel("proxy score, gained")
    figure.savefig(PICTURE, dpi=110)


def page(found: dict[int, list[dict[str, Any]]]) -> str:
    """docs/over-optimisation.md."""
    used = ", ".join(f"{name} {x}" for name, x in found[SIZES[0]][0]["ppo"]["versions"].items())
    seconds = sum(seed[way]["cpu_seconds"] for seeds in found.values() for seed in seeds for way in FORMS)
    lines = [
        "# Over-optimisation on the made-up language",
        "",
        "`make over-optimisation` (`python bench/over_optimisation.py`) writes this page and its picture, about "
        f"{seconds / 60:.0f} minutes of one processor; parts: `--seeds 1 --pairs 100 --ways ppo`. Versions: {used}.",
        "",
        "A reward model is a proxy for what people like, and a policy that follows it far enough finds where it is "
        "wrong: the proxy's score goes on rising while the true one falls (Gao et al. 2023). Here the true score is "
        "known, the rule of `understudy/language/toy_language.py` (0 to below 1, length included), so both can be drawn.",
        "",
        "![True and proxy score over the square root of KL](over-optimisation.png)",
        "",
        f"- **Policy**: as in `understudy rehearse` after SFT; {len(SEEDS)} seeds, {', '.join(map(str, SEEDS))}, each "
        "with its own policy, pairs and proxies.",
        f"- **Proxies**: reward models begun from the policy, on {', '.join(map(str, SIZES))} noisy preferences "
        f"between its own sentences: {PROXY_STEPS} steps of {PROXY['batch_size']} pairs, learning rate "
        f"{PROXY['learning_rate']:g}, for each of them. Accuracy is on {TESTED} pairs that none of them saw. Scores "
        "are in deviations of the proxy's own over the texts it learned from.",
        f"- **Best of n**: n = 1 to {BEST_OF[-1]} of {SAMPLES} completions of each of {OPENINGS} openings, over all "
        "ways to draw n of them (Nakano et al. 2021); KL = log n - (n - 1)/n, which is a bound where completions "
        "repeat.",
        f"- **PPO**: {settings(PPO)}; about {ITERATIONS} iterations, the rest as in the rehearsal. Measured by "
        f"`evaluate_every`: {PPO['evaluate_rows']} completions of {PPO['held_out']} held-out openings, the same seeds "
        "every time, KL exact and summed over a completion.",
        "- **Fits** over the points of all seeds: gain in true score = d (alpha - beta d) for best of n, d (alpha - "
        "beta log d) for PPO, d = sqrt(KL). R² is one less squared error over squared deviation from the mean. The "
        "peak is the fit's; its interval is a bootstrap over seeds, 95 %, 2000 draws "
        "(`understudy.study.overoptimise`); so is that of the mean over seeds of the KL at each one's best measured "
        "point. KL is in nats a completion. A peak beyond the KL that was measured says that the true score had not "
        "turned yet.",
        "",
        "## What was found",
        "",
        *verdict(found),
        "",
        *READ,
        "",
        "| | pairs | accuracy, learned from | accuracy, others | alpha | beta | R² | peak of the fit, KL | best "
        "measured, KL | KL measured to |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(way, size, seeds) for way in FORMS for size, seeds in found.items()),
        "",
        "## Seed by seed",
        "",
        "True score before, at its best measured point, and at the end; the proxy's at the same three points.",
        "",
        "| | pairs | seed | true: before, best, end | proxy: before, then, end | KL at the best | KL at the end |",
        "|---|---|---|---|---|---|---|",
        *(line(way, size, seed) for way in FORMS for size, seeds in found.items() for seed in seeds),
        "",
        "## What was tried",
        "",
        "All on seed 100, which is not in the tables; the seeds that are were not looked at before.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in TRIED),
    ]
    return "\n".join(lines) + "\n"


def turns(found: dict[str, Any]) -> tuple[int, bool]:
    """Where the true score is best, and whether it then falls below where it began while the proxy rises."""
    best = int(np.argmax(found["true"]))
    return best, found["true"][-1] < found["true"][best] and found["score"][-1] > found["score"][best]


def verdict(found: dict[int, list[dict[str, Any]]]) -> list[str]:
    """For each way and proxy: in how many seeds the true score falls while the proxy rises, in numbers."""
    said = []
    for way in FORMS:
        for size, seeds in found.items():
            falls = sum(turns(seed[way])[1] for seed in seeds)
            below = sum(seed[way]["true"][-1] < seed[way]["true"][0] for seed in seeds)
            means = [
                np.mean([pick(seed[way]) for seed in seeds])
                for pick in (
                    lambda f: f["true"][0],
                    lambda f: max(f["true"]),
                    lambda f: f["true"][-1],
                    lambda f: f["score"][turns(f)[0]],
                    lambda f: f["score"][-1],
                )
            ]
            said.append(
                f"- **{NAMES[way]}, {size} pairs**: the true score goes from {means[0]:.3f} to {means[1]:.3f} at its "
                f"best and {means[2]:.3f} at the end, while the proxy goes from {means[3]:.2f} at that point to "
                f"{means[4]:.2f}. It falls from its best while the proxy rises in {falls} of {len(seeds)} seeds, below "
                f"where it began in {below}."
            )
    return said


def row(way: str, size: int, seeds: list[dict[str, Any]]) -> str:
    curves = [curve(seed[way]) for seed in seeds]
    fitted = fit(curves, FORMS[way])
    low, high = peak_interval(curves, FORMS[way])
    learned, tested = (np.mean([seed[way]["proxy"][name] for seed in seeds]) for name in ("learned", "tested"))
    measured = [seed[way]["kl"][turns(seed[way])[0]] for seed in seeds]
    first, last = bootstrap_interval(measured, np.mean)
    most = min(max(seed[way]["kl"]) for seed in seeds), max(max(seed[way]["kl"]) for seed in seeds)
    cells = [
        NAMES[way],
        f"{size}",
        f"{learned:.3f}",
        f"{tested:.3f}",
        f"{fitted.alpha:.3f}",
        f"{fitted.beta:.3f}",
        f"{fitted.r2:.3f}",
        f"{fitted.peak:.1f} ({low:.1f} to {high:.1f})",
        f"{np.mean(measured):.1f} ({first:.1f} to {last:.1f})",
        f"{most[0]:.1f}" if most[0] == most[1] else f"{most[0]:.1f} to {most[1]:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def line(way: str, size: int, seed: dict[str, Any]) -> str:
    found = seed[way]
    best, _ = turns(found)
    true, score = ([found[name][i] for i in (0, best, -1)] for name in ("true", "score"))
    cells = [
        NAMES[way],
        f"{size}",
        f"{found['seed']}",
        ", ".join(f"{x:.3f}" for x in true),
        ", ".join(f"{x:.2f}" for x in score),
        f"{found['kl'][best]:.1f}",
        f"{found['kl'][-1]:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def settings(given: dict[str, Any]) -> str:
    return ", ".join(f"{name} {x}" for name, x in given.items())


if __name__ == "__main__":
    main()
