"""Run TRL's own trainers on fixed prompts, answers, scores and tiny models, and write down what came out.

    python tests/oracles/record_trl.py [--check]

Under TRL 1.16 it rewrites `trl_grpo.json` (GRPOTrainer, RLOOTrainer), under TRL 1.12 `trl_ppo.json` (PPOTrainer, which 1.16
no longer has). Nothing of TRL is copied: `train()` runs as it is. GRPO and RLOO are given stored answers in place of
generated ones; PPO samples its own, and its variables are read where it calls `backward`. Needs `requirements-trl.txt`, not
Understudy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import numpy as np
import torch
from record import SEED, about_optimizer, dump, float32, ordered, plain, same, versions
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PAD, EOS, VOCABULARY = 0, 1, 20
PPO_PAD = VOCABULARY  # never sampled; PPOTrainer puts another token in its place before a model reads it
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
KEPT = (
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
)  # of the weights after the update

# Three prompts, three answers each, of unequal lengths; the last group's scores are equal.
PROMPTS = [[5, 9], [3, 12, 7, 4], [8, 2, 6]]
ANSWERS = [
    [4, 7, 1],
    [11, 3, 5, 18, 2],
    [1],
    [9, 9, 13, 1],
    [6, 10],
    [17, 4, 4, 8, 1],
    [2, 1],
    [15, 6, 3, 1],
    [12, 19, 7],
]
SCORES = [1.0, 0.25, -0.5, 0.0, 2.0, 0.75, 0.5, 0.5, 0.5]
FAR_ADVANTAGES = [0.5, -1.0, 1.5, -0.25, 1.0, -0.75, 0.0, 2.0, -2.0]
GROUP, LIMIT = 3, 6
STEP = {"learning_rate": 0.01, "adam_epsilon": 1e-4, "max_grad_norm": 0.5}

GRPO: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "clip_higher": {"loss_type": "grpo", "epsilon_high": 0.28},
    "temperature": {"loss_type": "grpo", "temperature": 0.7},
    "kl": {"loss_type": "grpo", "beta": 0.3},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo_accumulated": {"loss_type": "dapo", "epsilon_high": 0.28, "gradient_accumulation_steps": 3},
    "dapo_entropy": {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.05},
    "bnpo": {"loss_type": "bnpo"},
    "bnpo_accumulated": {"loss_type": "bnpo", "gradient_accumulation_steps": 3},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
    "gspo_kl": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.05,
        "epsilon_high": 0.1,
        "beta": 0.3,
    },
    "grpo_entropy": {"loss_type": "grpo", "entropy_coef": 0.05},
    "scale_batch": {"loss_type": "grpo", "scale_rewards": "batch"},
    "missing": {"loss_type": "grpo"},
}
RLOO: dict[str, dict[str, Any]] = {
    "rloo": {"beta": 0.0},
    "kl": {"beta": 0.3},
    "normalized": {"beta": 0.0, "normalize_advantages": True},
    "missing": {"beta": 0.0},
}

PPO_COMMON = {"kl_coef": 0.2, "temperature": 0.7, "num_ppo_epochs": 2, "cliprange": 0.1, "cliprange_value": 0.05}
ACCUMULATED = {"lam": 0.9, "stop_token": "eos", "gradient_accumulation_steps": 2, "num_ppo_epochs": 1}
PPO: dict[str, dict[str, Any]] = {
    "whole": {"lam": 0.95},
    "stopped": {"lam": 0.9, "gamma": 0.97, "stop_token": "eos", "missing_eos_penalty": 0.7},
    "lambda_1": {"lam": 1.0, "stop_token": "eos"},
    "accumulated": ACCUMULATED,
    "last_batch": ACCUMULATED,  # the data's last
}
PPO_PROMPTS = [[5, 9], [3, 12, 7, 4], [8, 2, 6], [4], [10, 11], [13, 5, 2], [7, 7, 16, 3], [18, 14]]
PPO_LIMIT, PPO_MINIBATCHES = 5, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file there is, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    version = importlib.metadata.version("trl")
    name, record = ("trl_ppo", record_ppo) if version.startswith("1.12.") else ("trl_grpo", record_critic_free)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        found = {
            "versions": versions("trl", "transformers", "torch", "accelerate"),
            "model": MODEL,
            **record(Path(place)),
        }
    path = HERE / f"{name}.json"
    if not args.check:
        path.write_text(dump(plain(found)) + "\n")
    elif not path.exists() or not same(json.loads(path.read_text()), plain(found)):
        sys.exit(f"{path.name} would come out otherwise: run this without --check, and look at what changed")


# ---- tiny models


def tiny(kind: Any, seed: int, **config: Any) -> Any:
    torch.manual_seed(seed)
    return kind(LlamaConfig(**MODEL, **config))


def tokenizer(pad: int) -> PreTrainedTokenizerFast:
    """Token 7 is the word w07."""
    made = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(VOCABULARY + 1)}, unk_token="w02"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=f"w{pad:02}", eos_token="w01", padding_side="left")


def weights(model: nn.Module, of: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All weights, or those of a few layers."""
    return {name: x.detach().clone() for name, x in model.state_dict().items() if not of or name in of}


# ---- GRPO and RLOO


def record_critic_free(place: Path) -> dict[str, Any]:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    policy, reference = tiny(LlamaForCausalLM, 0), tiny(LlamaForCausalLM, 0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in reference.parameters():
            x += 0.1 * torch.randn(x.shape, generator=noise)
    policy.save_pretrained(place / "policy")
    reference.save_pretrained(place / "reference")
    # old log-probs at a distance from the policy's, so that ratios fall on every side of the clips
    distance = 0.4 * torch.randn(len(ANSWERS), max(map(len, ANSWERS)), generator=noise)
    tool = torch.ones(distance.shape, dtype=torch.long)
    tool[1, 1:3] = tool[5, 0] = 0
    return {
        "prompts": PROMPTS,
        "answers": ANSWERS,
        "scores": SCORES,
        "missing": [None if i == 4 else x for i, x in enumerate(SCORES)],
        "group": GROUP,
        "limit": LIMIT,
        "step": STEP,
        "far_advantages": FAR_ADVANTAGES,
        "distance": distance,
        "tool_mask": tool,
        "weights": weights(policy),
        "reference": weights(reference),
        "grpo": {n: record_case(GRPOTrainer, GRPOConfig, place, n, case, distance, tool) for n, case in GRPO.items()},
        "rloo": {n: record_case(RLOOTrainer, RLOOConfig, place, n, case, distance, tool) for n, case in RLOO.items()},
    }


def record_case(
    kind: Any, config: Any, place: Path, name: str, case: dict[str, Any], distance: Tensor, tool: Tensor
) -> dict[str, Any]:
    """One loss far from the old policy, then `train()` for two optimizer steps on the same answers."""
    accumulate = case.get("gradient_accumulation_steps", 1)
    scores = [None if i == 4 else x for i, x in enumerate(SCORES)] if name == "missing" else SCORES
    args = config(
        out=str(place / "out"),
        per_device_train_batch_size=len(ANSWERS) // accumulate,
        num_generations=GROUP,
        num_iterations=2,
        max_completion_length=LIMIT,
        max_steps=2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        shuffle_dataset=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **STEP,
        **case,
    )
    policy = LlamaForCausalLM.from_pretrained(place / "policy")
    policy.config._name_or_path = str(place / "reference")  # where the trainer reloads what it calls the reference
    texts = [" ".join(f"w{token:02}" for token in prompt) for prompt in PROMPTS]
    trainer = kind(
        model=policy,
        reward_funcs=lambda completions, **columns: list(scores),
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer(PAD),
    )
    asked: list[list[list[int]]] = []

    def answer(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        asked.append(prompt_ids)
        answers = [list(ids) for ids in ANSWERS]
        return answers if trainer._name == "RLOO" else (answers, None)  # None: no sampler's log-probs

    trainer._generate_single_turn = answer
    inputs: list[dict[str, Tensor]] = []
    compute = trainer._compute_loss

    def watched(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        loss = compute(model, given)
        inputs.append({**given, "loss": loss.detach()})
        return loss

    away = far(trainer, distance, tool)
    trainer._compute_loss = watched
    steps: list[dict[str, Any]] = []
    with stepping(trainer, policy, steps):
        trainer.train()
    expected = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    if asked != [expected] or len(inputs) != 2 * accumulate:
        sys.exit(f"{name}: the trainer asked for {asked} and made {len(inputs)} losses")
    calls = inputs[:accumulate]
    rows = [
        row_of(ids, mask)
        for call in calls
        for ids, mask in zip(call["completion_ids"], call["completion_mask"], strict=True)
    ]
    return {
        "settings": case,
        "optimizer": about_optimizer(trainer.optimizer),
        "rows": rows,
        "advantages": torch.cat([call["advantages"] for call in calls])[torch.tensor(rows).argsort()],
        "far": away,
        "losses": [float32(x["loss"]) for x in inputs],
        "grad_norms": [step["grad_norm"] for step in steps],
        "first": steps[0]["weights"],
        "final": steps[-1]["weights"],
    }


def row_of(ids: Tensor, mask: Tensor) -> int:
    return ANSWERS.index(ids[mask.bool()].tolist())


def far(trainer: Any, distance: Tensor, tool: Tensor) -> dict[str, Any]:
    """TRL's loss and gradient where the old log-probs are the policy's minus `distance`; and again with tool tokens."""
    width = max(map(len, ANSWERS))
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    left = max(map(len, PROMPTS))
    prompt_ids = torch.tensor([[PAD] * (left - len(p)) + p for p in prompts])
    completion_ids = torch.tensor([a + [PAD] * (width - len(a)) for a in ANSWERS])
    completion_mask = torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in ANSWERS])
    ids, seen = (
        torch.cat([prompt_ids, completion_ids], 1),
        torch.cat([prompt_ids != PAD, completion_mask > 0], 1).long(),
    )
    trainer.current_gradient_accumulation_steps = 1

    def logps(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(model, ids, seen, width)[0]

    old = logps(trainer.model) - distance
    found = {}
    for name, mask in {"plain": None, "tools": tool}.items():
        if name == "tools" and trainer._name == "RLOO":
            continue  # it knows no tools
        given: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "prompt_mask": (prompt_ids != PAD).long(),
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.tensor(FAR_ADVANTAGES),
            "old_per_token_logps": old,
            "old_logps": (old * completion_mask).sum(1),
            "num_items_in_batch": completion_mask.sum() if mask is None else (completion_mask * mask).sum(),
        }
        if mask is not None:
            given["tool_mask"] = mask
        if trainer.beta:
            given["ref_per_token_logps"] = logps(trainer.ref_model)
        trainer.model.train()
        trainer.model.zero_grad()
        # the last of the window's micro-batches would be divided by their number: here one batch is the window
        steps, trainer.args.steps_per_generation = trainer.args.steps_per_generation, 1
        loss = trainer._compute_loss(trainer.model, given)
        trainer.args.steps_per_generation = steps
        loss.backward()
        gradients = {n: x.grad for n, x in trainer.model.named_parameters()}
        found[name] = {
            "loss": float32(loss),
            "grad_norm": float32(torch.stack([g.norm() for g in gradients.values()]).norm()),
            "gradient": gradients["model.norm.weight"].clone(),
        }
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    return found


@contextmanager
def stepping(trainer: Any, policy: nn.Module, steps: list[dict[str, Any]]) -> Iterator[None]:
    """For as long as this is open, every optimizer step leaves the gradient's norm and the weights after it."""
    clip, norms = nn.utils.clip_grad_norm_, []

    def clip_grad_norm_(*args: Any, **options: Any) -> Tensor:
        norms.append(float32(clip(*args, **options)))
        return torch.tensor(norms[-1])

    def stepped(*_: Any) -> None:
        steps.append({"grad_norm": norms.pop(), "weights": weights(policy, KEPT)})

    create = trainer.create_optimizer

    def created(*args: Any, **options: Any) -> Any:
        optimizer = create(*args, **options)
        optimizer.register_step_post_hook(stepped)
        return optimizer

    trainer.create_optimizer = created
    with patch.object(nn.utils, "clip_grad_norm_", clip_grad_norm_):
        yield


# ---- PPO


def record_ppo(place: Path) -> dict[str, Any]:
    from trl.experimental.ppo import ppo_trainer as module

    policy, reference = tiny(LlamaForCausalLM, 0), tiny(LlamaForCausalLM, 0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in reference.parameters():
            x += 0.1 * torch.randn(x.shape, generator=noise)
    scorer = {"num_labels": 1}
    value, reward = tiny(LlamaForSequenceClassification, 2, **scorer), tiny(LlamaForSequenceClassification, 3, **scorer)
    for name, model in {"policy": policy, "reference": reference, "value": value, "reward": reward}.items():
        model.save_pretrained(place / name)
    x = torch.randn(4, 6, generator=noise)
    mask = torch.rand(4, 6, generator=noise) < 0.7
    return {
        "step": STEP,
        "shuffle_seed": SEED,
        "padding": PPO_PAD,
        "weights": weights(policy),
        "reference": weights(reference),
        "value": weights(value),
        "whiten": {
            "x": x,
            "mask": mask,
            "centred": module.masked_whiten(x, mask),
            "kept": module.masked_whiten(x, mask, shift_mean=False),
        },
        "ppo": {name: sampled(place, name, case) for name, case in PPO.items()},
    }


def sampled(place: Path, name: str, case: dict[str, Any]) -> dict[str, Any]:
    """`train()` for one iteration, from the first seed that stops some answers at different places and not others."""
    for seed in range(100):
        found = run_ppo(place, case, seed, passes=2 if name == "accumulated" else 1)
        lengths = {min(x, PPO_LIMIT - 1) for x in found["sequence_lengths"]}
        stopped = sum(any(row) for row in found["padding_mask"])
        if case.get("stop_token") is None or (stopped >= 3 and len(lengths) >= 3):
            return found
    sys.exit("no seed in 100 gives answers that stop at different places")


def run_ppo(place: Path, case: dict[str, Any], seed: int, passes: int) -> dict[str, Any]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    accumulate = case.get("gradient_accumulation_steps", 1)
    rows = len(PPO_PROMPTS)
    args = PPOConfig(
        output_dir=str(place / "out"),
        seed=seed,
        per_device_train_batch_size=rows // accumulate,
        num_mini_batches=PPO_MINIBATCHES if accumulate == 1 else 1,
        total_episodes=rows,
        response_length=PPO_LIMIT,
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch",
        **STEP,
        **(PPO_COMMON | case),
    )
    policy, reference = (LlamaForCausalLM.from_pretrained(place / name) for name in ("policy", "reference"))
    value, reward = (LlamaForSequenceClassification.from_pretrained(place / name) for name in ("value", "reward"))
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer(PPO_PAD),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": PPO_PROMPTS * passes}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": PPO_PROMPTS}),
    )
    return watch_ppo(trainer, policy, value, args)


def watch_ppo(trainer: Any, policy: nn.Module, value: nn.Module, args: Any) -> dict[str, Any]:
    """What one `train()` made of its variables, seen at every `backward` and after every optimizer step."""
    record: dict[str, Any] = {}
    losses: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    backward = trainer.accelerator.backward

    def seen(loss: Tensor, **options: Any) -> None:
        around = sys._getframe(1).f_locals
        if not record:
            record.update({name: around[name].clone() for name in PPO_NAMES})
        losses.append(
            {
                "rows": around["micro_batch_inds"].tolist(),
                "loss": float32(loss),
                "policy_loss": float32(around["pg_loss"]),
                "value_loss": float32(around["vf_loss"]),
            }
        )
        backward(loss, **options)

    def stepped(*_: Any) -> None:
        gradients = [x.grad.norm() for x in trainer.model.parameters() if x.grad is not None]
        norm = float32(torch.stack(gradients).norm())
        steps.append(
            {"grad_norm": norm, "policy": weights(policy, KEPT), "value": weights(value, (*KEPT, "score.weight"))}
        )

    trainer.accelerator.backward = seen
    trainer.optimizer.optimizer.register_step_post_hook(stepped)
    with ordered(np.random, "permutation", orders()):
        trainer.train()
    return {
        "settings": {name: getattr(args, name) for name in PPO_SETTINGS},
        "optimizer": about_optimizer(trainer.optimizer.optimizer),
        **{name: plain(x) for name, x in record.items()},
        "losses": losses,
        "grad_norms": [step["grad_norm"] for step in steps],
        "final": {name: steps[-1][name] for name in ("policy", "value")},
    }


def orders() -> list[list[int]]:
    """The order of the rows in every epoch, as torch draws it from a seed: TRL's own is drawn by numpy."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randperm(len(PPO_PROMPTS), generator=generator).tolist() for _ in range(PPO_COMMON["num_ppo_epochs"])]


PPO_NAMES = [
    *[
        "queries",
        "responses",
        "sequence_lengths",
        "padding_mask",
        "padding_mask_p1",
        "scores",
        "logprobs",
        "ref_logprobs",
    ],
    *["rewards", "values", "returns", "advantages"],
]
PPO_SETTINGS = [
    *[
        "kl_coef",
        "kl_estimator",
        "cliprange",
        "cliprange_value",
        "vf_coef",
        "gamma",
        "lam",
        "temperature",
        "stop_token",
    ],
    *["missing_eos_penalty", "num_ppo_epochs", "num_mini_batches", "gradient_accumulation_steps"],
]


if __name__ == "__main__":
    main()
