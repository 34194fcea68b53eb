"""GRPO by TRL 1.16.0, for bench/language.py; run by the Python of an environment that has it.

Tuned for this machine: float32 without autocast, no gradient checkpointing, no dropout to draw, key-value cache, fused
AdamW, one forward pass of the whole batch, no reference model (beta 0), no workers, no saving, logging or progress bar.
`defaults` leaves what a user gets without saying so: bf16 autocast and gradient checkpointing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from language_work import Clock, Reward, job
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Watch(TrainerCallback):
    """Tells the clock when a step ends."""

    def __init__(self, clock: Clock, reward: Reward) -> None:
        self.clock, self.reward, self.before = clock, reward, 0

    def on_train_begin(self, args, state, control, **_):
        self.clock.start()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.end(self.reward.tokens - self.before)
        self.before = self.reward.tokens
        control.should_training_stop = self.clock.done


def main() -> None:
    given = job()
    clock, reward = Clock(given), Reward()
    torch.set_num_threads(1)
    cuda = given["device"] != "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        f"{given['models']}/policy", dtype=torch.bfloat16 if cuda else torch.float32
    )
    hf = AutoTokenizer.from_pretrained(f"{given['models']}/policy", padding_side="left")
    tuned = {"bf16": False, "fp16": False, "gradient_checkpointing": False, "disable_dropout": True}
    args = GRPOConfig(
        output_dir=given["out"],
        use_cpu=not cuda,
        per_device_train_batch_size=given["rows"],
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=given["group"],
        num_iterations=1,
        max_completion_length=given["length"],
        generation_kwargs={"use_cache": True},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        max_steps=given["warmup"] + given["iterations"],
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        seed=1,
        **({} if given.get("defaults") else tuned),
    )
    rows = [json.loads(line) for line in Path(given["data"]).read_text().splitlines()]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        processing_class=hf,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Watch(clock, reward)],
    )
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    clock.report(held, "torch", "transformers", "trl", peak=peak)


if __name__ == "__main__":
    main()
