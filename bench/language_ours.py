"""Our side of bench/language.py: one job in a process of its own, through the Python API alone.

Jobs: grpo, ppo, generate; matmul, which measures the processor and none of us.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401 - 80 MiB of code that a run loads with its model, TRL before
from language_work import HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, Clock, Reward, job

from understudy.language import grpo, ppo
from understudy.language.model.policy import Policy
from understudy.language.rollout.generate import generate

FOREVER = 10**9


def main() -> None:
    given = job()
    {"grpo": train, "ppo": train, "generate": sample, "matmul": multiply}[given["kind"]](given)


def train(given: dict[str, Any]) -> None:
    """Iterations of a recipe. Checkpoints, evaluation and kept samples are off, as a peer's are."""
    clock = Clock(given)
    reward = Reward()
    recipe = {"grpo": grpo, "ppo": ppo}[given["kind"]]
    cuda = given["device"] != "cpu"
    cfg = recipe.Config(
        model=f"{given['models']}/policy",
        data=given["data"],
        reward=reward if given["kind"] == "grpo" else f"{given['models']}/reward_model",
        output_dir=given["out"],
        total_tokens=FOREVER,
        checkpoint_every=FOREVER,
        log_samples=0,
        held_out=0,
        quiet=True,
        seed=1,
        num_threads=1,
        completions_per_iteration=given["rows"],
        device=given["device"],
        dtype="bfloat16" if cuda else "float32",
        learning_rate_schedule="constant",
        **({"max_new_tokens": given["length"]} if given["spread"] else {"fixed_length": given["length"]}),
        **settings(given),
    )
    iterations = recipe.iterate(cfg)
    clock.start()
    before = 0
    for line in iterations:
        if cuda:
            torch.cuda.synchronize()
        clock.end(line["steps"] - before)
        before = line["steps"]
        if clock.done:
            break
    peak = torch.cuda.max_memory_allocated() if cuda else None
    clock.report(models_bytes(given), "torch", "transformers", "understudy-rl", peak=peak)


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's fields, as the peer's script has them."""
    if given["kind"] == "grpo":
        return {
            "group_size": given["group"],
            "loss_aggregation": "token_mean",
            "learning_rate": 1e-4,
            "packing": given["spread"],
        }
    return {
        "critic": given["critic"],
        "num_epochs": given["epochs"],
        "num_minibatches": 1,
        "learning_rate": 3e-6,
        "kl_reference": "reward",
        "kl_reference_coef": 0.05,
        "lam": 0.95,
        "value_coef": 0.1,
        "value_clip": 0.2,
    }


def models_bytes(given: dict[str, Any]) -> int:
    """Of the models a run holds, as files: policy and reference; for PPO a reward model, and a critic of its trunk."""
    policy, reward = (file_bytes(f"{given['models']}/{name}") for name in ("policy", "reward_model"))
    if given["kind"] == "grpo":
        return 2 * policy
    return 2 * policy + (2 if given["critic"] == "separate" else 1) * reward


def file_bytes(folder: str) -> int:
    return Path(folder, "model.safetensors").stat().st_size


def sample(given: dict[str, Any]) -> None:
    """Calls of `generate`; the log-probs of what was said come with it."""
    clock = Clock(given)
    torch.set_num_threads(1)
    dtype = torch.float32 if given["device"] == "cpu" else torch.bfloat16
    policy = Policy.from_pretrained(given["models"], dtype=dtype).to(given["device"])
    clock.start()
    while not clock.done:
        seeds = range(len(clock.tokens) * given["rows"], (len(clock.tokens) + 1) * given["rows"])
        found = generate(
            policy, given["prompts"], limit=given["length"], stops=frozenset(), seeds=seeds, max_num_seqs=given["rows"]
        )
        clock.end(sum(len(one.ids) for one in found))
    clock.report(file_bytes(given["models"]), "torch", "transformers", "understudy-rl")


def multiply(given: dict[str, Any]) -> None:
    """The rate of products at the widths of this model, all tokens of an iteration at once, by torch's two libraries."""
    clock = Clock(given)
    torch.set_num_threads(1)
    dtype = torch.float32 if given["device"] == "cpu" else torch.bfloat16
    narrow = HIDDEN * KV_HEADS // HEADS
    layer = [
        (HIDDEN, HIDDEN),
        (HIDDEN, narrow),
        (HIDDEN, narrow),
        (HIDDEN, HIDDEN),
        *[(HIDDEN, INNER)] * 2,
        (INNER, HIDDEN),
    ]
    shapes = [*layer * LAYERS, (HIDDEN, given["vocabulary"])]
    rows = given["rows"] * (given["length"] + 7)
    work = []
    for a, b in shapes:
        left, right = torch.randn(rows, a, dtype=dtype), torch.randn(a, b, dtype=dtype)
        work.append([x.to(given["device"]) for x in (left, right, torch.empty(rows, b, dtype=dtype))])
    flops = sum(2.0 * rows * a * b for a, b in shapes)
    rates, by_onednn = [], []
    clock.start()
    while not clock.done:
        since = time.perf_counter()
        for left, right, out in work:
            torch.mm(left, right, out=out)
        if given["device"] != "cpu":
            torch.cuda.synchronize()
        rates.append(flops / (time.perf_counter() - since))
        clock.end(rows)
        if given["device"] == "cpu":
            since = time.perf_counter()
            for left, right, _ in work:
                torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
            by_onednn.append(flops / (time.perf_counter() - since))
    clock.report(0, "torch", flops_per_second=rates, flops_per_second_onednn=by_onednn)


if __name__ == "__main__":
    main()
