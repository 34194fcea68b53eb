"""Step 2, score: a reward model. A causal trunk and one linear output, read at a row's last token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from understudy.batch import TokenBatch
from understudy.language.data.records import Tokenizer, pad_for_scoring
from understudy.language.model.forward import (
    check_causal,
    compute_hidden_states,
    disable_dropout,
    force_eval_mode,
    trunk_of,
)
from understudy.language.model.loading import load_model_with_report
from understudy.language.model.policy import (
    Critic,
    enable_gradient_checkpointing,
    hidden_size_of,
    module_digest,
)
from understudy.language.rewards.reward_sum import ScoringInput
from understudy.run.config import RequestError

InputFormat = Literal["completion", "text"]


class RewardModel(nn.Module):
    """Scores whole rows: `model(text) -> [B, 1]`, raw; `score` gives (raw - mean) / scale.

    Attributes:
        mean, scale: of raw scores on the texts it was normalised on; stored in config.json.
        input_format: what it was trained on: prompts with their "completion", stop id and all, or plain "text" without one.
        warnings: what was found out about the data it learns from, to be said once.
    """

    needs_whole_rows = True  # rows are read whole
    is_head_separable = True  # the head is read apart from the trunk

    def __init__(self, model: Any, tokenizer: Tokenizer, *, packing: bool = False) -> None:
        super().__init__()
        self.model, self.tokenizer, self.packing = model, tokenizer, packing
        settings = _saved_settings(model)
        self.mean, self.scale = float(settings.get("mean", 0.0)), float(settings.get("scale", 1.0))
        self.input_format: InputFormat = settings.get("form", "completion")
        self.warnings: list[str] = []
        disable_dropout(self)
        self.train()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        stop: tuple[str, ...] = (),
        chat_template: str | None = None,
        add_bos: bool = False,
        packing: bool = False,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """A reward model as saved; or one on the trunk of a causal LM, its score head drawn with std 1/sqrt(H + 1).

        Its padding token is one that no text contains: where the tokenizer has none, or pads with a stop id, a token is
        added. Hugging Face's classes find the last token by it.

        Raises:
            RequestError: no model there, or one with more than one output.
        """
        options = {"num_labels": 1, "ignore_mismatched_sizes": True, "trust_remote_code": trust_remote_code}
        model, report = load_model_with_report(
            AutoModelForSequenceClassification, source, dtype=torch.float32, **options
        )
        if report["mismatched_keys"]:
            raise RequestError(f"model is '{source}', which gives a text several scores: name one that gives one")
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise RequestError(
                f"model is '{source}', a {type(model).__name__}, which does not score a causal trunk's last token by one "
                "linear layer: give a causal language model"
            )
        tokenizer = _load_tokenizer(
            source, stop or _saved_settings(model).get("stops", ()), chat_template, add_bos, trust_remote_code
        )
        if any(name.startswith("score") for name in report["missing_keys"]):
            nn.init.normal_(model.score.weight, std=(hidden_size_of(model) + 1) ** -0.5)  # Stiennon et al. 2020
            _ensure_pad_token(tokenizer, model)
        if gradient_checkpointing:
            enable_gradient_checkpointing(model)
        reward_model = cls(model, tokenizer, packing=packing)
        check_causal(reward_model)
        return reward_model

    def save(self, path: Path) -> None:
        """A directory that `AutoModelForSequenceClassification.from_pretrained` loads; its logits are the raw scores."""
        path.mkdir(parents=True, exist_ok=True)
        stops = sorted(map(str, self.tokenizer.stops))
        self.model.config.understudy = {
            "mean": self.mean,
            "scale": self.scale,
            "form": self.input_format,
            "stops": stops,
        }
        self.model.save_pretrained(path)
        self.tokenizer.save(path)

    def forward(self, text: TokenBatch) -> Tensor:
        """Raw scores where `text.mask` is True, one a row: [B, 1]."""
        hidden = compute_hidden_states(trunk_of(self.model), text, packing=self.packing)[text.mask]
        return self.model.score(hidden).float()

    def train(self, mode: bool = True) -> RewardModel:
        super().train(mode)
        force_eval_mode(self.model)
        return self

    def compute_masked_outputs(self, text: TokenBatch) -> Tensor:
        """Raw scores at the masked-in columns, [n]: what checks compare."""
        return self(text)[:, 0]

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]], *, micro_batch_size: int = 64) -> Tensor:
        """Normalised scores of token rows, [N]. Rows of like length are read together."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.zeros(len(rows))
        device = next(self.parameters()).device
        for start in range(0, len(rows), micro_batch_size):
            indices = order[start : start + micro_batch_size]
            text = pad_for_scoring([rows[i] for i in indices])
            scores[indices] = self(TokenBatch(text.ids.to(device), text.mask.to(device)))[:, 0].cpu()
        return (scores - self.mean) / self.scale

    def make_reward_term(self, tokenizer: Tokenizer) -> Callable[[ScoringInput], Tensor]:
        """A judge's part for completions of `tokenizer`: each row is read with the reward model's own."""
        vocabulary, policy_vocabulary = self.tokenizer.hf.get_vocab(), tokenizer.hf.get_vocab()
        shares_tokens = policy_vocabulary.items() <= vocabulary.items()

        def score_rows(scoring_input: ScoringInput) -> Tensor:
            fields = (
                scoring_input.prompts,
                scoring_input.completions,
                scoring_input.completion_ids,
                scoring_input.truncated,
            )
            columns = [
                {name: cells[i] for name, cells in scoring_input.columns.items()} for i in range(len(scoring_input))
            ]
            rows = zip(*fields, columns, strict=True)
            return self.score([self._token_row(*row, tokenizer if shares_tokens else None) for row in rows])

        return score_rows

    def make_critic(self, *, weight: float = 1.0) -> Critic:
        """A critic that begins by expecting this model's score, times `weight`, at every token."""
        critic = Critic(hidden_size_of(self.model), copy.deepcopy(trunk_of(self.model)))
        with torch.no_grad():
            critic.head.weight.copy_(self.model.score.weight * (weight / self.scale))
            bias = 0.0 if self.model.score.bias is None else self.model.score.bias
            critic.head.bias.copy_(torch.as_tensor((bias - self.mean) * (weight / self.scale)))
        return critic.requires_grad_(True)

    @property
    def digest(self) -> str:
        return module_digest(self.model)

    def _token_row(
        self,
        prompt: Any,
        completion: Any,
        ids: list[int],
        truncated: bool,
        columns: dict[str, Any],
        policy_tokenizer: Tokenizer | None,
    ) -> list[int]:
        """What a completion is to this model; `policy_tokenizer` is the policy's tokenizer where both speak the same tokens.

        What ended by a stop string, or by a stop id that is none of this model's, is read from its text, which has neither,
        and ends as the texts that it learned from.
        """
        tokenizer = self.tokenizer if isinstance(prompt, str) else self.tokenizer.with_template_arguments(columns)
        if policy_tokenizer is not None:
            ended = bool(ids) and ids[-1] in policy_tokenizer.stops
            if ended and not truncated and self.input_format == "text":
                return [*tokenizer.encode_prompt(prompt), *ids[:-1]]
            if truncated or (ids[-1] in tokenizer.stops if ended else not policy_tokenizer.stop_strings):
                return [*tokenizer.encode_prompt(prompt), *ids]
        if self.input_format == "text" and isinstance(prompt, str):
            return tokenizer.encode_prompt(prompt + completion)
        completion_ids = tokenizer.encode_completion(completion, prompt)
        if truncated and completion_ids and completion_ids[-1] in tokenizer.stops:
            completion_ids = completion_ids[:-1]
        return [*tokenizer.encode_prompt(prompt), *completion_ids]


def _saved_settings(model: Any) -> dict[str, Any]:
    """What `save` wrote beside the weights."""
    return getattr(model.config, "understudy", None) or {}


def _load_tokenizer(
    source: str | Path, stop: Sequence[str], chat_template: str | None, add_bos: bool, trust_remote_code: bool
) -> Tokenizer:
    """The tokenizer with these stop ids, or the model's own; with none where it names none, for plain text needs none."""
    options: dict[str, Any] = {
        "chat_template": chat_template,
        "add_bos": add_bos,
        "trust_remote_code": trust_remote_code,
    }
    try:
        tokenizer = Tokenizer.load(source, stop=tuple(stop), **options)
    except RequestError:
        if stop:
            raise
        return Tokenizer.load(source, has_fixed_length=True, **options)
    if stop and tokenizer.stop_strings:
        raise RequestError(
            f"stop is {tokenizer.stop_strings[0]!r}, which is several tokens: a reward model reads texts to a "
            "stop id; give one"
        )
    return tokenizer


def _ensure_pad_token(tokenizer: Tokenizer, model: Any) -> None:
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
