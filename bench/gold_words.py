"""The gold of bench/stories.py: a logistic regression over words, learned on one half of SST-2; it shares no weights.

A review's features are its different words and pairs of neighbouring words. `--gold bench/gold_words.py:positive` runs it
in a process of its own, which fits it anew: half a second, the same weights every time.
"""

from __future__ import annotations

import csv
import math
import random
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

DATA = Path(__file__).parents[2] / "shared" / "data" / "sst2"
PENALTY = 1.0  # half of it times the squared weights is added to the reviews' summed loss
WORD = r"[a-z]+(?:'[a-z]+)?"
Review = tuple[int, str]  # label, text


def positive(completions: list[str]) -> list[float]:
    """How likely each completion, read without its prompt, is positive: from 0 to 1."""
    return [1 / (1 + math.exp(-logit(text))) for text in completions]


def logit(text: str) -> float:
    """Log-odds of positive; words and pairs that the reviews lack say nothing."""
    bias, weights = fitted()
    return bias + sum(weights.get(feature, 0.0) for feature in sorted(features(text)))


def halves() -> tuple[list[Review], list[Review]]:
    """SST-2's training reviews in two: for the reward model, for gold."""
    reviews = load("train")
    random.Random(0).shuffle(reviews)
    return reviews[: len(reviews) // 2], reviews[len(reviews) // 2 :]


def load(name: str) -> list[Review]:
    with open(DATA / f"{name}.csv", encoding="utf-8", newline="") as file:
        return [(int(row["label"]), row["sentence"]) for row in csv.DictReader(file)]


def features(text: str) -> set[str]:
    found = re.findall(WORD, text.lower())
    return {*found, *(f"{one} {other}" for one, other in pairwise(found))}


def words(text: str) -> set[str]:
    return set(re.findall(WORD, text.lower()))


@cache
def fitted() -> tuple[float, dict[str, float]]:
    """Bias and weights that minimise the penalised loss."""
    torch.set_num_threads(1)
    _, reviews = halves()
    found = [sorted(features(text)) for _, text in reviews]
    place = {feature: i for i, feature in enumerate(sorted(set().union(*found)))}
    index = torch.tensor([place[feature] for features_of_one in found for feature in features_of_one])
    row = torch.tensor([i for i, features_of_one in enumerate(found) for _ in features_of_one])
    label = torch.tensor([float(label) for label, _ in reviews])
    weight, bias = torch.zeros(len(place), requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = bias + torch.zeros(len(found)).index_add(0, row, weight[index])
        found_loss = binary_cross_entropy_with_logits(logits, label, reduction="sum") + PENALTY / 2 * weight @ weight
        found_loss.backward()
        return found_loss

    optimizer.step(loss)
    return bias.item(), dict(zip(place, weight.tolist(), strict=True))
