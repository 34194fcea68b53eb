"""A token MDP small enough to be solved: a tiny GPT-2 says words and stops; dynamic programming says what to expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from understudy.language.model.policy import Critic

STOP, BOS = 0, 1
VOCABULARY, WORDS = 5, (1, 2, 3, 4)
LONGEST = 4  # words; then the speaker stops
PLACES = VOCABULARY ** (LONGEST + 2)  # one for every row of BOS, words and the stop

Row = tuple[int, ...]


def speaker(seed: int = 3) -> GPT2LMHeadModel:
    """Says a word or stops, by chances that hang on all that was said; after LONGEST words it stops, by its position.

    The first hidden dimension is kept for that: only the positions from there on write to it, and only the stop reads it.
    """
    torch.manual_seed(seed)
    sizes = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "activation_function": "relu",
        "initializer_range": 0.25,
    }
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=BOS, eos_token_id=STOP, tie_word_embeddings=False, **sizes)
    model = GPT2LMHeadModel(config).eval()
    trunk = model.transformer
    writers = [part.weight for block in trunk.h for part in (block.attn.c_proj, block.mlp.c_proj)]
    with torch.no_grad():
        for weight in (trunk.wte.weight, trunk.wpe.weight, model.lm_head.weight, *writers):
            weight[:, 0] = 0
        trunk.wpe.weight[LONGEST:, 0] = 1000.0
        model.lm_head.weight[STOP, 0] = 8.0
    return model


class Book(nn.Module):
    """A trunk that looks up all that was read so far: one number for every row of tokens, so nothing is in its way.

    It says 3 of what it never learnt, so that a bootstrap from there shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pages = nn.Embedding(PLACES, 1)
        nn.init.constant_(self.pages.weight, 3.0)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        place, places = torch.zeros_like(input_ids[:, 0]), []
        for column in input_ids.unbind(dim=1):
            place = (place * VOCABULARY + column) % PLACES
            places.append(place)
        return SimpleNamespace(last_hidden_state=self.pages(torch.stack(places, dim=1)))


def lookup_critic() -> Critic:
    """V is what the book says."""
    critic = Critic(1, Book())
    nn.init.ones_(critic.head.weight)
    critic.head.requires_grad_(False)
    return critic


def true_values(
    model: nn.Module,
    reference: nn.Module,
    score: Callable[[Sequence[int]], float],
    *,
    limit: int,
    endless: bool = False,
    cut: Callable[[float], float] | None = None,
    gamma: float = 1.0,
    coef: float = 0.0,
) -> dict[Row, float]:
    """V of everything that can have been said after BOS before a choice, from the last choice back to the first.

    V(s) = sum_a pi(a|s) (-coef log(pi/pi_ref)(a|s) + pay + gamma V(sa)): the score is paid with a stop. A row that `limit`
    cuts counts with `cut(score)`; without `cut` it does not count: the expectation is over the rows that end in time.

    Args:
        endless: there is no stop; the limit's own choice is paid the score.
    """

    @torch.no_grad()
    def log_probs(lm: nn.Module, rows: list[Row]) -> list[list[float]]:
        return lm(torch.tensor(rows)).logits[:, -1].double().log_softmax(dim=-1).tolist()

    levels: list[list[Row]] = [[(BOS,)]]
    for _ in range(limit - 1):
        levels.append([(*row, token) for row in levels[-1] for token in range(VOCABULARY) if endless or token != STOP])
    paid: dict[Row, float] = {}  # expected sum over the rows that count
    counted: dict[Row, float] = {}  # how likely a row counts
    for level in reversed(levels):
        chances = zip(level, log_probs(model, level), log_probs(reference, level), strict=True)
        for row, logp, reference_logp in chances:
            paid[row] = counted[row] = 0.0
            for token in range(VOCABULARY):
                after = (*row, token)
                fee = coef * (logp[token] - reference_logp[token])
                at_end = (endless and level is levels[-1]) or (not endless and token == STOP)
                if at_end:
                    share, pay = 1.0, score(after[1:])
                elif level is levels[-1]:
                    share, pay = (0.0, 0.0) if cut is None else (1.0, cut(score(after[1:])))
                else:
                    share, pay = counted[after], gamma * paid[after]
                probability = torch.tensor(logp[token]).exp().item()
                counted[row] += probability * share
                paid[row] += probability * (pay - share * fee)
    return {row: paid[row] / counted[row] for row in paid if counted[row] > 0}
