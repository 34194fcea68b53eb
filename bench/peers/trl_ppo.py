"""PPO with a critic by TRL 1.12.0, the last release that has it, for bench/language.py.

Its critic is always a model of its own. Tuned: float32 without autocast, no gradient checkpointing, fused AdamW, one pass
of the whole batch for the rollout's log-probs and values, no sample tables, no saving, no printing, no progress bar. A
completion has no stop, so that all have the same length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from language_work import Clock, job
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Watch(TrainerCallback):
    """Tells the clock when an iteration ends."""

    def __init__(self, clock: Clock, tokens: int) -> None:
        self.clock, self.tokens = clock, tokens

    def on_train_begin(self, args, state, control, **_):
        self.clock.start()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.end(self.tokens)


def main() -> None:
    given = job()
    clock = Clock(given)
    torch.set_num_threads(1)
    cuda = given["device"] != "cpu"
    dtype = {"dtype": torch.bfloat16 if cuda else torch.float32}
    policy, reference = (AutoModelForCausalLM.from_pretrained(f"{given['models']}/policy", **dtype) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(f"{given['models']}/reward_model", **dtype) for _ in range(2)
    )
    hf = AutoTokenizer.from_pretrained(f"{given['models']}/policy", padding_side="left")
    args = PPOConfig(
        output_dir=given["out"],
        use_cpu=not cuda,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=given["rows"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=given["epochs"],
        total_episodes=given["rows"] * (given["warmup"] + given["iterations"]),
        response_length=given["length"],
        temperature=1.0,
        kl_coef=0.05,
        kl_estimator="k1",
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        gamma=1.0,
        lam=0.95,
        whiten_rewards=False,
        learning_rate=3e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        local_rollout_forward_batch_size=given["rows"],
        num_sample_generations=0,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        seed=1,
    )
    rows = [json.loads(line) for line in Path(given["data"]).read_text().splitlines()]
    data = Dataset.from_list([{"input_ids": hf(row["prompt"])["input_ids"]} for row in rows])
    trainer = PPOTrainer(
        args=args,
        processing_class=hf,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        data_collator=DataCollatorWithPadding(hf),
        callbacks=[Watch(clock, given["rows"] * given["length"])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    held = sum(p.numel() * p.element_size() for m in (policy, reference, value, reward) for p in m.parameters())
    clock.report(held, "torch", "transformers", "trl", peak=peak)


if __name__ == "__main__":
    main()
