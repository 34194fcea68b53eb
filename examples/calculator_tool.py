"""A policy learns to use a tool: it is asked for a sum, may call a calculator, and is paid for the right number.

The tool is a function that speaks after a turn of the policy's which ended with '?'. What it says is read and never learned
from: the policy learns to ask, and to leave it at that. Without the tool there is nothing to learn but guessing. Run it with
`python examples/calculator_tool.py`.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy import language

WORDS = ["<pad>", "<s>", *"0123456789+=?."]


def make_model(path: Path) -> None:
    """A model that knows nothing yet, and a tokenizer of single characters."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": WORDS.index(".")}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=64)).save_pretrained(path)


def calculator(prompts: list[str], stop: list[str]) -> list[str | None]:
    """'3+4=' and a '?' get '7'; whoever ends with '.' has done."""
    sums = [str(sum(map(int, prompt.removesuffix("=").split("+")))) for prompt in prompts]
    return [answer if asked == "?" else None for answer, asked in zip(sums, stop, strict=True)]


def learn(name: str, tool) -> float:
    """The share of sums that are right on held-out prompts, after learning with a tool; some of them are shown."""
    config = language.grpo.Config(
        model="model",
        data="sums.jsonl",
        reward="number:answer",
        reply=tool,
        stop=("?", "."),
        max_new_tokens=8,
        completions_per_iteration=128,
        group_size=16,
        total_tokens=24_000,
        learning_rate=1e-2,
        missing_eos_penalty=0.5,
        seed=1,
        preflight=False,  # without the tool hardly any first guess is right: preflight would say so
        output_dir=name,
    )
    run = language.grpo.train(config)
    samples = json.loads((run.path / "evaluation.json").read_text())["samples"]
    print(name, *(said["prompt"] + said["completion"] for said in samples[:4]), sep="   ")
    return run.metrics[-1]["evaluation_score"]


make_model(Path("model"))
rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(20) for b in range(20)]
Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
with_tool, without = learn("with", calculator), learn("without", None)
print(f"right with the tool {with_tool:.2f}, without {without:.2f}")
raise SystemExit(with_tool < 0.95 or without > 0.3)
