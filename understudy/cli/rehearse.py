"""`understudy rehearse`: base, SFT, reward model, PPO and evaluation on a made-up language whose true preference is known.

The recipes are those a user runs on a real model; only the data come from `language/rehearsal.py`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from understudy import load
from understudy.cli.flags import Parser
from understudy.language import RewardModel, ppo, rehearsal, reward_model, sft
from understudy.language.generate import Completion, generate
from understudy.language.judge import distinct_n
from understudy.language.model import Policy, Reference
from understudy.language.text import pad
from understudy.run.config import RequestError
from understudy.run.seeds import derive
from understudy.run.store import write_json

LIMIT = 24  # tokens a completion may have
BEST_OF = 64
TEMPERATURE = 0.05  # of the made-up people's noisy preferences, in units of the true score
TEST = 128  # openings of the final table
COMMON: dict[str, Any] = {"learning_rate_schedule": "cosine", "warmup": 0.05, "quiet": True}


def rehearse(argv: list[str]) -> int:
    """`understudy rehearse [--out DIR] [--seed N]`."""
    parser = Parser(
        prog="understudy rehearse", description="All of RLHF on a small made-up language: about two minutes."
    )
    parser.add_argument("--out", help="directory of the rehearsal; runs/rehearse-N by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    parser.add_argument("--quiet", action="store_true", help="no words between the stages")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise RequestError(f"seed is {args.seed}: must be 0 or more")
    out = Path(args.out) if args.out else _free(Path("runs"))
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"out is '{out}', which is not empty: choose another directory, or remove that one")
    found = pipeline(
        out, args.seed, say=(lambda text: None) if args.quiet else lambda text: print(text, file=sys.stderr)
    )
    if args.json:
        print(json.dumps({"run": str(out), "seed": args.seed, **found}))
        return 0
    show(found)
    print(f"\nEverything is under {out}. Next: understudy generate {out}/ppo --prompt 'the old'")
    return 0


def pipeline(out: Path, seed: int, *, say: Any) -> dict[str, Any]:
    """All stages; what came of them."""
    began = time.time()
    torch.set_num_threads(1)
    files = _write(out, seed)
    say("1 pretraining a base model on the made-up language")
    base = sft.Config(
        model=str(out / "fresh"),
        data=str(files["text"]),
        learning_rate=1e-2,
        minibatch_rows=64,
        seed=seed,
        out=str(out / "base"),
        **COMMON,
    )
    say(f"  loss {sft.train(base).metrics[-1]['evaluation_loss']:.3f} nats a token")
    say("2 supervised fine-tuning on demonstrations")
    tuned = sft.Config(
        model=str(out / "base"),
        data=str(files["demonstrations"]),
        epochs=2,
        learning_rate=2e-3,
        minibatch_rows=64,
        seed=seed,
        out=str(out / "sft"),
        **COMMON,
    )
    say(f"  loss {sft.train(tuned).metrics[-1]['evaluation_loss']:.3f} nats a token")
    policy = load(out / "sft")
    say("3 a reward model from noisy preferences between the policy's own sentences")
    pairs = _pairs(policy, rehearsal.prompts(4000, seed), seed)
    rows = rehearsal.preferences(pairs, temperature=TEMPERATURE, seed=seed)
    judge = reward_model.Config(
        model=str(out / "sft"),
        data=str(rehearsal.write_jsonl(rows, out / "preferences.jsonl")),
        epochs=2,
        learning_rate=3e-3,
        minibatch_rows=64,
        held_out=400,
        seed=seed,
        out=str(out / "reward_model"),
        **COMMON,
    )
    accuracy = reward_model.train(judge).metrics[-1]["evaluation_accuracy"]
    ceiling = statistics.fmean(_certainty(*pair) for pair in pairs)
    say(f"  accuracy {accuracy:.3f} on held-out pairs; the noise allows {ceiling:.3f}")
    say("4 PPO with a critic and a KL to the SFT policy")
    for line in ppo.iterate(rl(out, files["openings"], seed)):
        if line["iteration"] % 10 == 0:
            say(f"  iteration {line['iteration']}: score {line['score_mean']:.2f}, KL {line['kl_reference']:.1f} nats")
    say("5 evaluation: openings nobody was trained on, by the rule itself")
    found = examine(policy, load(out / "ppo"), load_judge(out), seed)
    found |= {"reward_model_accuracy": accuracy, "reward_model_ceiling": ceiling, "seconds": time.time() - began}
    write_json(out / "rehearsal.json", found)
    return found


def rl(out: Path, openings: Path, seed: int) -> ppo.Config:
    """The PPO of the rehearsal."""
    return ppo.Config(
        model=str(out / "sft"),
        data=str(openings),
        reward=(str(out / "reward_model"),),
        critic="separate",
        rows=128,
        slots=128,
        max_new=LIMIT,
        steps=40 * 128 * 9,
        epochs=2,
        minibatches=4,
        learning_rate=1e-3,
        learning_rate_schedule="linear",
        value_coef=0.5,
        kl_reference_coef=0.1,
        seed=seed,
        out=str(out / "ppo"),
        quiet=True,
    )


def examine(before: Policy, after: Policy, judge: Any, seed: int) -> dict[str, Any]:
    """Proxy and true score, KL, diversity of the policy before and after, and the former's best of 64."""
    openings = rehearsal.prompts(TEST, derive(seed, "test"))
    many = answers(before, [row["prompt"] for row in openings for _ in range(BEST_OF)], derive(seed, "best of") >> 1)
    truth = torch.tensor([rehearsal.true_score(text) for _, _, text in many]).view(TEST, BEST_OF)
    texts = {"sft": answers(before, [row["prompt"] for row in openings] * 4, 0)}
    texts["ppo"] = answers(after, [row["prompt"] for row in openings] * 4, 0)
    demonstrated = {f"{row['prompt']}{row['completion']}" for row in rehearsal.demonstrations(4000, seed)}
    found: dict[str, Any] = {"best_of_64": float(truth.amax(dim=1).mean())}
    for name, said in texts.items():
        sentences = [text for _, _, text in said]
        ids = [[*prompt, *completion.ids] for prompt, completion, _ in said]
        found[name] = {
            "true_score": statistics.fmean(map(rehearsal.true_score, sentences)),
            "proxy_score": float(judge.score(ids).mean()),
            "distinct_4": distinct_n([completion.ids for _, completion, _ in said], 4),
            "grammatical": statistics.fmean(float(rehearsal.is_grammatical(text.split())) for text in sentences),
            "copied": statistics.fmean(float(text in demonstrated) for text in sentences),
            "samples": sentences[:5],
        }
    found["kl"] = kl(after, before, texts["ppo"])
    gap = found["best_of_64"] - found["sft"]["true_score"]
    found["gap_closed"] = (found["ppo"]["true_score"] - found["sft"]["true_score"]) / gap
    return found


@torch.no_grad()
def kl(policy: Policy, reference: Policy, said: Sequence[tuple[list[int], Completion, str]]) -> float:
    """KL(policy, reference) of a completion in nats: exact at every token, averaged over completions."""
    text = pad([[*ids, *completion.ids] for ids, completion, _ in said], [len(ids) for ids, _, _ in said])
    return float(policy(text)[0].kl(Reference(reference)(text)).sum(dim=1).mean())


def answers(policy: Policy, prompts: Sequence[str], first: int) -> list[tuple[list[int], Completion, str]]:
    """The prompt's ids, the completion, and both as text."""
    tokenizer = policy.tokenizer
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    seeds = range(first, first + len(ids))
    said = generate(policy, ids, limit=LIMIT, stops=tokenizer.stops, seeds=seeds, slots=256)
    return [(p, c, tokenizer.decode([*p, *c.ids])) for p, c in zip(ids, said, strict=True)]


def show(found: dict[str, Any]) -> None:
    """Samples and the table."""
    console = Console()
    for name, title in (("sft", "Before (SFT)"), ("ppo", "After (PPO)")):
        console.print(f"[bold]{title}[/bold]")
        for sentence in found[name]["samples"]:
            console.print(f"  {sentence}", highlight=False)
    table = Table()
    for heading in ("", "true score", "proxy score", "KL to SFT", "distinct-4", "grammatical", "copied"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("sft", "ppo"):
        row, nats = found[name], found["kl"] if name == "ppo" else 0.0
        numbers = (row["true_score"], row["proxy_score"], nats, row["distinct_4"], row["grammatical"], row["copied"])
        table.add_row(name.upper(), *(f"{x:.3f}" for x in numbers))
    table.add_row("SFT, best of 64", f"{found['best_of_64']:.3f}", *[""] * 5)
    console.print(table)
    console.print(
        f"PPO closes {found['gap_closed']:.0%} of the gap between SFT and its best of 64. {found['seconds']:.0f} s."
    )


def load_judge(out: Path) -> Any:
    """The rehearsal's reward model."""
    return RewardModel.from_pretrained(out / "reward_model" / "reward_model")


def _write(out: Path, seed: int) -> dict[str, Path]:
    """The fresh model, and data files by name."""
    out.mkdir(parents=True, exist_ok=True)
    rehearsal.model(derive(seed, "weights")).save_pretrained(out / "fresh")
    rehearsal.tokenizer().save_pretrained(out / "fresh")
    text = [{"text": sentence} for sentence in rehearsal.sentences(20_000, seed)]
    rows = {
        "text": text,
        "demonstrations": rehearsal.demonstrations(4000, seed),
        "openings": rehearsal.prompts(2000, seed),
    }
    return {name: rehearsal.write_jsonl(some, out / f"{name}.jsonl") for name, some in rows.items()}


def _pairs(policy: Policy, openings: Sequence[dict[str, str]], seed: int) -> list[tuple[str, str, str]]:
    """Two completions of each opening by the policy."""
    prompts = [row["prompt"] for row in openings for _ in range(2)]
    tokenizer = policy.tokenizer
    said = [
        tokenizer.decode(completion.ids) for _, completion, _ in answers(policy, prompts, derive(seed, "pairs") >> 1)
    ]
    return [(row["prompt"], said[2 * i], said[2 * i + 1]) for i, row in enumerate(openings)]


def _certainty(prompt: str, first: str, second: str) -> float:
    """How often even the truth is right about a noisy preference."""
    p = rehearsal.preferred(f"{prompt} {first}", f"{prompt} {second}", temperature=TEMPERATURE)
    return max(p, 1 - p)


def _free(parent: Path) -> Path:
    number = 1
    while (parent / f"rehearse-{number}").exists():
        number += 1
    return parent / f"rehearse-{number}"
