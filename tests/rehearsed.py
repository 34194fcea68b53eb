"""A folder with everything a language recipe asks for: the rehearsal's model, untrained, and a file of data of each kind."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from understudy.language import ppo, reward_model, sft, toy_language

PPO = {
    "completions_per_iteration": 8,
    "max_new_tokens": 6,
    "total_tokens": 60,
    "num_epochs": 2,
    "num_minibatches": 2,
    "reward": "length:4",
    "preflight": False,
    "quiet": True,
    "log_samples": 0,
    "evaluate_rows": 4,
}
LEARN = {"batch_size": 8, "quiet": True, "held_out": 8}


def furnish(path: Path) -> Path:
    """Write model, tokenizer and data; the same every time."""
    toy_language.make_model(0).save_pretrained(path)
    toy_language.make_tokenizer().save_pretrained(path)
    said = toy_language.sentences(64, 0)
    halves = [sentence.split(" ", 3) for sentence in said]
    pairs = [(" ".join(words[:3]), words[3], "sat .") for words in halves]
    labelled = [{"text": s, "label": float(toy_language.true_score(s) > 0.3)} for s in said]
    files = {
        "prompts": toy_language.prompts(40, 0),
        "demonstrations": toy_language.demonstrations(40, 0),
        "preferences": toy_language.preferences(pairs[:40], temperature=0.2, seed=0),
        "labelled": labelled[:40],
        "texts": [{"text": sentence} for sentence in said],
    }
    for name, rows in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ppo_config(home: Path, out: Path, **fields: Any) -> ppo.Config:
    return ppo.Config(
        **{"model": str(home), "data": str(home / "prompts.jsonl"), "output_dir": str(out), **PPO, **fields}
    )


def sft_config(home: Path, out: Path, **fields: Any) -> sft.Config:
    data = str(home / "demonstrations.jsonl")
    return sft.Config(**{"model": str(home), "data": data, "output_dir": str(out), **LEARN, **fields})


def reward_config(home: Path, out: Path, **fields: Any) -> reward_model.Config:
    data = str(home / "preferences.jsonl")
    return reward_model.Config(**{"model": str(home), "data": data, "output_dir": str(out), **LEARN, **fields})


def letters(*, pad: str | None = None, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny models: <pad>, <s>, </s>, and a to t."""
    names = ("<pad>", "<s>", "</s>", *"abcdefghijklmnopqrst")
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", **({"pad_token": pad} if pad else {})}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = template
    return made
