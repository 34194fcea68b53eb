"""Step 2, score: a reward model. A causal trunk and one linear output, read at a row's last token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from understudy.batch import Text
from understudy.language.files import load_reported
from understudy.language.judge import Sampled
from understudy.language.model import (
    Critic,
    digest,
    recompute_activations,
    width_of,
)
from understudy.language.reading import check_causal, keep_from_training_mode, read, silence_dropout, trunk_of
from understudy.language.text import Tokenizer, last_token
from understudy.run.config import RequestError

Form = Literal["completion", "text"]


class RewardModel(nn.Module):
    """Scores whole rows: `model(text) -> [B, 1]`, raw; `score` gives (raw - mean) / scale.

    Attributes:
        mean, scale: of raw scores on the texts it was normalised on; stored in config.json.
        form: what it was trained on: prompts with their "completion", stop id and all, or plain "text" without one.
        remarks: what was found out about the data it learns from, to be said once.
    """

    memory = True  # rows are read whole
    fast = True  # the head is read apart from the trunk

    def __init__(self, model: Any, tokenizer: Tokenizer, *, packing: bool = False) -> None:
        super().__init__()
        self.model, self.tokenizer, self.packing = model, tokenizer, packing
        about = _about(model)
        self.mean, self.scale = float(about.get("mean", 0.0)), float(about.get("scale", 1.0))
        self.form: Form = about.get("form", "completion")
        self.remarks: list[str] = []
        silence_dropout(self)
        self.train()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        stop: tuple[str, ...] = (),
        template: str | None = None,
        add_bos: bool = False,
        packing: bool = False,
        checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """A reward model as saved; or one on the trunk of a causal LM, its score head drawn with std 1/sqrt(H + 1).

        Its padding token is one that no text contains: where the tokenizer has none, or pads with a stop id, a token is
        added. Hugging Face's classes find the last token by it.

        Raises:
            RequestError: no model there, or one with more than one output.
        """
        options = {"num_labels": 1, "ignore_mismatched_sizes": True, "trust_remote_code": trust_remote_code}
        model, loading = load_reported(AutoModelForSequenceClassification, source, dtype=torch.float32, **options)
        if loading["mismatched_keys"]:
            raise RequestError(f"model is '{source}', which gives a text several scores: name one that gives one")
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise RequestError(
                f"model is '{source}', a {type(model).__name__}, which does not score a causal trunk's last token by one "
                "linear layer: give a causal language model"
            )
        tokenizer = _tokenizer(source, stop or _about(model).get("stops", ()), template, add_bos, trust_remote_code)
        if any(name.startswith("score") for name in loading["missing_keys"]):
            nn.init.normal_(model.score.weight, std=(width_of(model) + 1) ** -0.5)  # Stiennon et al. 2020
            _pad_apart(tokenizer, model)
        if checkpointing:
            recompute_activations(model)
        made = cls(model, tokenizer, packing=packing)
        check_causal(made)
        return made

    def save(self, path: Path) -> None:
        """A directory that `AutoModelForSequenceClassification.from_pretrained` loads; its logits are the raw scores."""
        path.mkdir(parents=True, exist_ok=True)
        stops = sorted(map(str, self.tokenizer.stops))
        self.model.config.understudy = {"mean": self.mean, "scale": self.scale, "form": self.form, "stops": stops}
        self.model.save_pretrained(path)
        self.tokenizer.save(path)

    def forward(self, text: Text) -> Tensor:
        """Raw scores where `text.mask` is True, one a row: [B, 1]."""
        hidden = read(trunk_of(self.model), text, packing=self.packing)[text.mask]
        return self.model.score(hidden).float()

    def train(self, mode: bool = True) -> RewardModel:
        super().train(mode)
        keep_from_training_mode(self.model)
        return self

    def numbers(self, text: Text) -> Tensor:
        """Raw scores at the masked-in columns, [n]: what checks compare."""
        return self(text)[:, 0]

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]], *, micro: int = 64) -> Tensor:
        """Normalised scores of token rows, [N]. Rows of like length are read together."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = torch.zeros(len(rows))
        device = next(self.parameters()).device
        for at in range(0, len(rows), micro):
            some = order[at : at + micro]
            text = last_token([rows[i] for i in some])
            found[some] = self(Text(text.ids.to(device), text.mask.to(device)))[:, 0].cpu()
        return (found - self.mean) / self.scale

    def part(self, tokenizer: Tokenizer) -> Callable[[Sampled], Tensor]:
        """A judge's part for completions of `tokenizer`: each row is read with the reward model's own."""
        own, theirs = self.tokenizer.hf.get_vocab(), tokenizer.hf.get_vocab()
        same = theirs.items() <= own.items()

        def judge(sampled: Sampled) -> Tensor:
            given = (sampled.prompts, sampled.completions, sampled.completion_ids, sampled.truncated)
            columns = [{name: cells[i] for name, cells in sampled.columns.items()} for i in range(len(sampled))]
            zipped = zip(*given, columns, strict=True)
            return self.score([self._row(*row, tokenizer if same else None) for row in zipped])

        return judge

    def critic(self, *, weight: float = 1.0) -> Critic:
        """A critic that begins by expecting this model's score, times `weight`, at every token."""
        made = Critic(width_of(self.model), copy.deepcopy(trunk_of(self.model)))
        with torch.no_grad():
            made.head.weight.copy_(self.model.score.weight * (weight / self.scale))
            bias = 0.0 if self.model.score.bias is None else self.model.score.bias
            made.head.bias.copy_(torch.as_tensor((bias - self.mean) * (weight / self.scale)))
        return made.requires_grad_(True)

    @property
    def digest(self) -> str:
        return digest(self.model)

    def _row(
        self,
        prompt: Any,
        completion: Any,
        ids: list[int],
        truncated: bool,
        columns: dict[str, Any],
        policys: Tokenizer | None,
    ) -> list[int]:
        """What a completion is to this model; `policys` is the policy's tokenizer where both speak the same tokens.

        What ended by a stop string is read from its text, which has none, and ends as the texts that it learned from.
        """
        tokenizer = self.tokenizer if isinstance(prompt, str) else self.tokenizer.for_row(columns)
        ended = policys is not None and bool(ids) and ids[-1] in policys.stops
        if policys is not None and (ended or truncated or not policys.stop_strings):
            said = ids[:-1] if self.form == "text" and not truncated and ended else ids
            return [*tokenizer.encode_prompt(prompt), *said]
        if self.form == "text" and isinstance(prompt, str):
            return tokenizer.encode_prompt(prompt + completion)
        said = tokenizer.encode_completion(completion, prompt)
        if truncated and said and said[-1] in tokenizer.stops:
            said = said[:-1]
        return [*tokenizer.encode_prompt(prompt), *said]


def _about(model: Any) -> dict[str, Any]:
    """What `save` wrote beside the weights."""
    return getattr(model.config, "understudy", None) or {}


def _tokenizer(source: str | Path, stop: Sequence[str], template: str | None, add_bos: bool, trust: bool) -> Tokenizer:
    """The tokenizer with these stop ids, or the model's own; with none where it names none, for plain text needs none."""
    options: dict[str, Any] = {"template": template, "add_bos": add_bos, "trust_remote_code": trust}
    try:
        found = Tokenizer.load(source, stop=tuple(stop), **options)
    except RequestError:
        if stop:
            raise
        return Tokenizer.load(source, fixed_length=True, **options)
    if stop and found.stop_strings:
        raise RequestError(
            f"stop is {found.stop_strings[0]!r}, which is several tokens: a reward model reads texts to a stop id; give one"
        )
    return found


def _pad_apart(tokenizer: Tokenizer, model: Any) -> None:
    hf: Any = tokenizer.hf
    if hf.pad_token_id is None or hf.pad_token_id in {hf.eos_token_id, hf.bos_token_id, *tokenizer.stops}:
        hf.add_special_tokens({"pad_token": "<|pad|>"})
    if hf.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(hf), mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = hf.pad_token_id


def load_reward_model(source: str, *, trust_remote_code: bool = False) -> RewardModel:
    """A reward model's directory.

    Raises:
        RequestError: what is there is not one.
    """
    model = RewardModel.from_pretrained(source, trust_remote_code=trust_remote_code)
    if getattr(model.model.config, "architectures", None) and not any(
        "SequenceClassification" in name for name in model.model.config.architectures
    ):
        raise RequestError("it is a language model: train a reward model on it first")
    return model
