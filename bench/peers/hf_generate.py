"""Hugging Face's `generate`, for bench/language.py: sampling without warpers, a key-value cache, no stop, no scores kept.

`static` asks for the pre-allocated cache in place of the growing one, which is the default.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from language_work import Clock, job
from transformers import AutoModelForCausalLM


def main() -> None:
    given = job()
    clock = Clock(given)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    dtype = torch.float32 if given["device"] == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(given["models"], dtype=dtype).to(given["device"]).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(given["prompts"], device=given["device"])
    cache = {"cache_implementation": "static"} if given.get("static") else {}
    clock.start()
    with torch.inference_mode():
        while not clock.done:
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=given["length"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                pad_token_id=0,
                **cache,
            )
            clock.end(found[:, ids.shape[1] :].numel())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    clock.report(held, "torch", "transformers")


if __name__ == "__main__":
    main()
