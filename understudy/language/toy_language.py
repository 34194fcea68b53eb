"""A made-up language whose true preference is known: its grammar, its truth, its data, and a tiny model to learn it."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GRAMMAR = {  # rule -> its ways, each as likely as the others; no rule contains itself, so every sentence is finite
    "sentence": ("event stop", "moment link moment stop"),
    "event": ("actor acts place", "actor manner acts place"),
    "moment": ("actor acts", "actor manner acts"),
    "acts": ("did", "affected actor"),
    "actor": ("one someone", "one quality someone", "several people", "several quality people"),
    "place": ("near one spot", "near one quality spot"),
}
KIND = {
    "quality": "gentle kind warm happy friendly cheerful brave bright lovely sweet noble patient loyal merry generous calm",
    "manner": "gently kindly warmly happily cheerfully sweetly tenderly bravely",
    "affected": "helped hugged thanked praised fed comforted greeted welcomed",
    "did": "smiled laughed sang danced",
}
UNKIND = {
    "quality": "cruel mean rude bitter nasty greedy grim jealous selfish gloomy spiteful lazy foul harsh wicked sullen",
    "manner": "cruelly rudely coldly bitterly spitefully harshly meanly grimly",
    "affected": "pushed hurt mocked robbed scared tricked teased kicked",
    "did": "grumbled shouted sneered growled",
}
NEUTRAL = {
    "quality": "small big old young tall short round quiet brown grey red green blue tiny thin plump",
    "manner": "quietly slowly quickly often soon suddenly silently twice",
    "affected": "saw watched followed found met passed noticed heard",
    "did": "walked sat waited slept",
    "one": "the a every this that my our",
    "several": "two three some many these",
    "someone": "cat dog bird girl boy farmer teacher baker horse fox rabbit child sailor king queen nurse",
    "people": "cats dogs birds girls boys farmers teachers bakers horses foxes rabbits children",
    "spot": "house garden river forest bridge hill barn market road tree field lake school window",
    "near": "near beside behind by toward past",
    "link": "and while because but",
    "stop": ".",
}
WORDS = {name: [w for part in (KIND, NEUTRAL, UNKIND) for w in part.get(name, "").split()] for name in NEUTRAL}
WORD_CLASS = {word: name for name, words in WORDS.items() for word in words}  # every word belongs to one class
KIND_WORDS = frozenset(" ".join(KIND.values()).split())
UNKIND_WORDS = frozenset(" ".join(UNKIND.values()).split())
SPECIAL = PAD, BOS, EOS, UNKNOWN = ("<pad>", "<s>", "</s>", "<unk>")

TextRow = dict[str, str]


def is_grammatical(words: Sequence[str]) -> bool:
    """Whether these words are exactly one sentence of the language, its full stop included."""
    return SENTENCE.fullmatch("".join(f"{WORD_CLASS.get(word, '?')} " for word in words)) is not None


def true_score(text: str) -> float:
    """How good a sentence is, prompt and completion together: what a reward model has to find out. At least 0, below 1.

    `(1 - 0.7^kind) * 0.7^unkind * length`, and 0.3 of that where the text is not one grammatical sentence. `kind` counts
    different kind words, so that none pays twice; `unkind` counts all unkind words; `length` is 1 from 8 to 13 words (the
    full stop is one), and 0.15 less for every word outside.
    """
    words = text.split()
    kind, unkind = len(KIND_WORDS.intersection(words)), sum(word in UNKIND_WORDS for word in words)
    length = max(0.0, 1 - 0.15 * max(8 - len(words), len(words) - 13, 0))
    return (1 - 0.7**kind) * 0.7**unkind * length * (1 if is_grammatical(words) else 0.3)


def true_scores(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """`true_score` as a reward function of the language world."""
    return [true_score(f"{prompt} {completion}") for prompt, completion in zip(prompts, completions, strict=True)]


def preference_probability(first: str, second: str, *, temperature: float) -> float:
    """Probability that the first of two sentences is liked better: sigmoid of the true difference over temperature."""
    return 0.5 + 0.5 * math.tanh((true_score(first) - true_score(second)) / (2 * temperature))  # sigmoid, any argument


def sentences(num_sentences: int, seed: int) -> list[str]:
    """Text of the language to pretrain on."""
    return list(islice(_sample_sentences(f"sentences {seed}"), num_sentences))


def prompts(num_prompts: int, seed: int) -> list[TextRow]:
    """Openings of sentences, 2 to 4 words: rows with `prompt`."""
    rng = random.Random(f"openings {seed}")
    return [
        {"prompt": _split_sentence(sentence, rng)["prompt"]}
        for sentence in islice(_sample_sentences(f"prompts {seed}"), num_prompts)
    ]


def demonstrations(num_demonstrations: int, seed: int) -> list[TextRow]:
    """What to imitate: the truly best of four sentences, as rows with `prompt` and `completion`."""
    rng, sampled_sentences = random.Random(f"cuts {seed}"), _sample_sentences(f"demonstrations {seed}")
    return [_split_sentence(max(islice(sampled_sentences, 4), key=true_score), rng) for _ in range(num_demonstrations)]


def preferences(pairs: Iterable[tuple[str, str, str]], *, temperature: float, seed: int) -> list[TextRow]:
    """A noisy judgement of each (prompt, completion, completion): rows with `prompt`, `chosen` and `rejected`.

    The first is chosen with probability `preferred` (Bradley & Terry 1952). Completions get one blank in front, wherever
    they come from, so that `prompt + chosen` is the sentence.
    """
    rng, rows = random.Random(f"preferences {seed}"), []
    for prompt, *pair in pairs:
        first, second = (f" {completion.strip()}" for completion in pair)
        is_first_chosen = rng.random() < preference_probability(
            prompt + first, prompt + second, temperature=temperature
        )
        chosen, rejected = (first, second) if is_first_chosen else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_jsonl(rows: Iterable[TextRow], path: Path) -> Path:
    """One JSON object a line; the folder must exist."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the language is a token; `<s>` comes first, as in Llama."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORD_CLASS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=64,
        clean_up_tokenization_spaces=False,  # "house ." stays as it is
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 93568 weights for `tokenizer`, not trained yet. The same seed gives the same weights."""
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # places in SPECIAL
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORD_CLASS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = LlamaForCausalLM(config)
    llama.generation_config = GenerationConfig(do_sample=True, **special)
    return llama


def _sample_sentences(seed: str) -> Iterator[str]:
    """Sentence after sentence, without end."""
    rng = random.Random(seed)
    return (" ".join(_expand("sentence", rng)) for _ in count())


def _expand(symbol: str, rng: random.Random) -> list[str]:
    """The words of one way to say a rule, or one word of a class."""
    if symbol in WORDS:
        return [rng.choice(WORDS[symbol])]
    return [word for part in rng.choice(GRAMMAR[symbol]).split() for word in _expand(part, rng)]


def _class_pattern(symbol: str) -> str:
    """A regular expression for the classes that a rule can become, each with a blank after it."""
    if symbol in WORDS:
        return f"{symbol} "
    return f"(?:{'|'.join(''.join(map(_class_pattern, production.split())) for production in GRAMMAR[symbol])})"


def _split_sentence(sentence: str, rng: random.Random) -> TextRow:
    """A sentence after its first 2 to 4 words; the blank between them opens the completion."""
    words = sentence.split()
    prompt_length = rng.randint(2, 4)
    return {"prompt": " ".join(words[:prompt_length]), "completion": " " + " ".join(words[prompt_length:])}


SENTENCE = re.compile(_class_pattern("sentence"))
