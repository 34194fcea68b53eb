"""Shortest paths on a random graph of 21 nodes: `python bench/random_walks.py`, twenty seeds of SFT, then PPO and GRPO.

A prompt is a start node, a completion the nodes from there to the goal. Its score is the shortest path's length over its
own; a path that uses an edge which is not there, or does not arrive, scores 0. The optimum, found by search, is 1. SFT
imitates random walks; PPO and GRPO start from it. The final policy is sampled, 64 times from every start node.
Results are saved as they come under bench/results/random_walks/; a seed found there is not run again. Seeds 1 to 5 and 201
to 220 there are of earlier settings, which the page still shows.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "random_walks"
NODES = [chr(ord("a") + i) for i in range(21)]
GOAL = "a"
LONGEST = 10  # nodes a walk may have after its start
WALKS = 1000
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SEEDS, SECOND_SEEDS, FIRST_SEEDS = list(range(301, 321)), range(201, 221), range(1, 6)
TRIED = """\
All on seeds 100 to 107. Learning rate 2e-3 with 4 passes collapsed on seed 100 (0.25, 0.35). With 60,000 tokens, rate 5e-4
and GAE's lambda 0.95, seeds 1 to 5 were run and recorded first; PPO missed on seed 1 (the last table). With
120,000 tokens: rate 5e-4 gave PPO 0.947 0.998 0.998 on seeds 100 to 102; an entropy bonus of 0.01 did not help seed 100
(0.948); rate 3e-4 gave 0.946 to 0.998 on seeds 100 to 106, its worst on seed 104, where one start node's answer stayed
wrong. Lambda 1, which leaves the critic's early errors out of the advantage, gave 0.986 to 0.997 on seeds 100 to 107 (0.995
on seed 104); a KL coefficient of 0.01 instead also mended seed 104 (0.997). GRPO at rate 3e-4: 0.990 to 0.995 on seeds 100
to 107. Then seeds 11 to 15 were run, once (5 of 5 reached the mark). Seeds 201 to 220 were run once, with lambda 1 and no
KL, after the KL trust region and other fixes had changed the recipes: PPO missed on two of them, 206 and 209 (the second
table). On seeds 100, 104, 204, 206, 209 and 211 PPO was run again: a KL coefficient of 0.01 gave 0.977 to 0.996, one of 0.02
gave 0.936 on seed 209 and an entropy bonus of 0.005 gave 0.938 there. So the coefficient is 0.01 now, in PPO and in GRPO,
and seeds 301 to 320, above, were run with it, once."""


def graph(seed: int) -> dict[str, list[str]]:
    """Directed edges, each there with probability 0.1, one at least from every node; every node can reach the goal."""
    draw = random.Random(f"graph {seed}")
    while True:
        edges = {a: [b for b in NODES if b != a and draw.random() < 0.1] for a in NODES}
        edges = {a: to or [draw.choice([b for b in NODES if b != a])] for a, to in edges.items()}
        if len(shortest(edges)) == len(NODES):
            return edges


def shortest(edges: dict[str, list[str]]) -> dict[str, int]:
    """Steps from each node to the goal, for those that can reach it: breadth-first search backwards."""
    found, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        here = queue.popleft()
        for node, to in edges.items():
            if here in to and node not in found:
                found[node] = found[here] + 1
                queue.append(node)
    return found


def optimality(start: str, path: list[str], edges: dict[str, list[str]], best: dict[str, int]) -> float:
    """Shortest length over this path's, from 0 to 1.

    >>> edges = {"c": ["b", "a"], "b": ["a"], "a": ["b"]}
    >>> [optimality("c", path, edges, {"c": 1, "b": 1, "a": 0}) for path in (["a"], ["b", "a"], ["b"], ["c", "a"])]
    [1.0, 0.5, 0.0, 0.0]
    """
    steps = list(zip([start, *path], path, strict=False))
    valid = bool(path) and path[-1] == GOAL and GOAL not in path[:-1] and all(b in edges[a] for a, b in steps)
    return best[start] / len(path) if valid else 0.0


def walks(edges: dict[str, list[str]], seed: int) -> list[dict[str, str]]:
    """Random walks that arrive, as rows of prompt and completion."""
    draw, rows = random.Random(f"walks {seed}"), []
    while len(rows) < WALKS:
        path = [draw.choice(NODES[1:])]
        while path[-1] != GOAL and len(path) <= LONGEST:
            path.append(draw.choice(edges[path[-1]]))
        if path[-1] == GOAL:
            rows.append({"prompt": path[0], "completion": " " + " ".join(path[1:])})
    return rows


def write_model(folder: Path, seed: int) -> None:
    """A fresh two-layer Llama that knows the nodes' names."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIAL + NODES)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(vocabulary), max_position_embeddings=32, tie_word_embeddings=True, **sizes, **ids
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(run: Path, edges: dict[str, list[str]], best: dict[str, int]) -> float:
    """Mean optimality over all start nodes, 64 samples each."""
    from understudy import load
    from understudy.language.rollout.generate import generate

    policy = load(run)
    starts = [node for node in NODES[1:] for _ in range(64)]
    ids = [policy.tokenizer.encode_prompt(start) for start in starts]
    said = generate(
        policy, ids, limit=LONGEST + 1, stops=policy.tokenizer.stops, seeds=range(len(ids)), max_num_seqs=256
    )
    paths = [policy.tokenizer.decode(completion.ids).split() for completion in said]
    return statistics.fmean(optimality(s, path, edges, best) for s, path in zip(starts, paths, strict=True))


def run(seed: int, **changes: object) -> dict[str, float]:
    """SFT, PPO and GRPO on one graph."""
    from understudy.language import grpo, ppo, sft

    edges = graph(seed)
    best = shortest(edges)

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [optimality(p, c.split(), edges, best) for p, c in zip(prompts, completions, strict=True)]

    found: dict[str, float] = {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_model(out / "fresh", seed)
        (out / "walks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in walks(edges, seed)))
        starts = [{"prompt": node} for node in NODES[1:] for _ in range(10)]
        (out / "starts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
        tuning = {"learning_rate": 2e-3, "num_epochs": 10, "batch_size": 64, "learning_rate_schedule": "cosine"}
        sft.train(
            sft.Config(
                model=str(out / "fresh"),
                data=str(out / "walks.jsonl"),
                seed=seed,
                output_dir=str(out / "sft"),
                quiet=True,
                held_out=0,
                **tuning,
            )
        )
        found["sft"] = measure(out / "sft", edges, best)
        shared = {
            "model": str(out / "sft"),
            "data": str(out / "starts.jsonl"),
            "reward": reward,
            "seed": seed,
            "quiet": True,
            "completions_per_iteration": 160,
            "max_num_seqs": 160,
            "max_new_tokens": LONGEST + 1,
            "total_tokens": 120_000,
            "learning_rate": 3e-4,
            "num_epochs": 2,
            "num_minibatches": 4,
            "kl_reference_coef": 0.01,
            "held_out": 0,
            "log_samples": 0,
        }
        for name, recipe, own in (
            ("ppo", ppo, {"critic": "shared", "value_coef": 0.5, "lam": 1.0}),
            ("grpo", grpo, {"group_size": 8, "loss_aggregation": "token_mean"}),
        ):
            began = time.process_time()
            done = recipe.train(recipe.Config(output_dir=str(out / name), **{**shared, **own, **changes}))
            found[name], found[f"{name}_seconds"] = measure(out / name, edges, best), time.process_time() - began
            found[f"{name}_undone"] = sum(line.get("updates_skipped", 0) for line in done.metrics)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        path = RESULTS / f"{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(run(seed)) + "\n")
        rows.append(json.loads(path.read_text()))
        print(rows[-1], flush=True)
    if args.seeds == SEEDS:
        earlier = [
            [json.loads((RESULTS / f"{seed}.json").read_text()) for seed in seeds]
            for seeds in (SECOND_SEEDS, FIRST_SEEDS)
        ]
        text = page(rows, *earlier)
        print(text)
        (Path(__file__).parents[1] / "docs" / "random-walks.md").write_text(text)


def page(rows: list[dict[str, float]], *earlier: list[dict[str, float]]) -> str:
    """docs/random-walks.md."""
    import torch

    lines = [
        "# Shortest paths on a random graph",
        "",
        "`python bench/random_walks.py`: 21 nodes, one of them the goal; mean optimality (shortest length over own length, "
        "0 for a path that is none) over all 20 start nodes, 64 samples each, of the final policy. PPO and GRPO with the "
        "same 120,000 tokens and settings but for what only one of them has. Every seed is another graph. Seconds are of "
        f"the processor. Python {platform.python_version()}, torch {torch.__version__}, 1 thread.",
        "",
        *table(rows),
        "",
        f"Wanted: SFT 0.8 or less, PPO and GRPO 0.95 or more. Here: {sum(map(reached, rows))} of {len(rows)} seeds. The "
        f"KL trust region undid {sum(int(r['ppo_undone'] + r['grpo_undone']) for r in rows)} updates in "
        f"{sum(bool(r['ppo_undone'] + r['grpo_undone']) for r in rows)} seeds.",
        "",
        "## What was tried",
        "",
        TRIED,
        *(line for some in earlier for line in ("", *table(some))),
    ]
    return "\n".join(lines) + "\n"


def reached(row: dict[str, float]) -> bool:
    return row["sft"] <= 0.8 and min(row["ppo"], row["grpo"]) >= 0.95


def table(rows: list[dict[str, float]]) -> list[str]:
    lines = ["| seed | SFT | PPO | GRPO | PPO s | GRPO s |", "|---|---|---|---|---|---|"]
    for r in rows:
        scores = [f"{r[name]:.3f}" for name in ("sft", "ppo", "grpo")]
        seconds = [f"{r[name]:.0f}" for name in ("ppo_seconds", "grpo_seconds")]
        lines.append(f"| {r['seed']} | {' | '.join(scores + seconds)} |")
    return lines


if __name__ == "__main__":
    main()
