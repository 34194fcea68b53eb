"""Write the models that bench/language.py measures: `python language_models.py DIR VOCABULARY CONTEXT LENGTHS`.

The Qwen2 of 128 hidden units, 4 layers, with random weights, a tokenizer whose tokens are characters and fillers, and a
reward model of the same trunk. LENGTHS is "fixed" or "spread".
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from language_work import CHARACTERS, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, SPECIAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

PAD, EOS = SPECIAL.index("<pad>"), SPECIAL.index("<eos>")
FIRST = len(SPECIAL) + len(CHARACTERS)  # the first filler
STEP = 16  # fillers that can be the first token of a completion, and the second
HAZARD = 1 / 40  # of the end, from the fourth token on: a mean of 34.5 where 64 is the limit, as of 4..64 all alike
LOUD = 10.0  # an embedding's part that says the token's class; the others have deviation 0.02


def tokenizer(vocabulary: int, *, ends: bool) -> PreTrainedTokenizerFast:
    """A token a character. Where nothing is to end a completion, the stop is an id that the model has not."""
    names = [*SPECIAL, *CHARACTERS]
    names += [f"w{i}" for i in range(vocabulary - len(names))]
    if not ends:
        names[EOS], names = "<never>", [*names, "<eos>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_ends(model: Qwen2ForCausalLM, vocabulary: int) -> None:
    """Give the model a chance of HAZARD to say the stop, from a completion's fourth token on.

    Tokens are of four classes, each with a hidden dimension of its own: what a prompt has, first tokens, second tokens, all
    others. The final norm makes that dimension sqrt(H), so a weight of the head over sqrt(H) is a logit.
    """
    kind = torch.full((vocabulary,), 3)
    kind[:FIRST] = 0
    kind[FIRST : FIRST + STEP], kind[FIRST + STEP : FIRST + 2 * STEP] = 1, 2
    own = torch.nn.functional.one_hot(kind, 4).float()
    logit = torch.full((4, vocabulary), -30.0)  # after a token of a class
    for before, after in ((0, 1), (1, 2), (2, 3), (3, 3)):
        logit[before, kind == after] = 0.0
    logit[3, EOS] = math.log(int((kind == 3).sum()) * HAZARD / (1 - HAZARD))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :4] = LOUD * own
        model.lm_head.weight[:, :4] = logit.T / math.sqrt(HIDDEN)


def main() -> None:
    folder, vocabulary, context, lengths = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    ends = lengths == "spread"
    hf: Any = tokenizer(vocabulary, ends=ends)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=hf.eos_token_id if ends else None,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    if ends:
        make_ends(model, vocabulary)
    model.save_pretrained(folder / "policy")
    torch.manual_seed(1)
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(folder / "reward_model")
    for part in ("policy", "reward_model"):
        hf.save_pretrained(folder / part)


if __name__ == "__main__":
    main()
