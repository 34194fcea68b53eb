"""One architecture of each kind is trained correctly or refused; `make compatibility` tries them all."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES

BENCH = Path(__file__).parents[1] / "bench"
TRAINED = {"llama": "dense", "mistral": "window", "mixtral": "mixture", "lfm2": "hybrid", "rwkv": "recurrent"}
REFUSED = {"roberta": "encoder", "t5": "encoder-decoder"}


@pytest.fixture(scope="module")
def language():
    """bench/compatibility_language.py."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("compatibility_language")
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def home(language, tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    language.furnish(path)
    return path


@pytest.mark.parametrize("name", TRAINED)
def test_an_architecture_of_each_kind_is_trained_correctly(language, home, name):
    found = language.examine(name, home)

    assert found["kind"] == TRAINED[name]
    assert found["outcome"] == "trained", found
    assert found["packing"] == ("accepted" if name in ("llama", "mistral", "mixtral") else "refused")


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_is_not_causal_is_refused(language, home, name):
    found = language.examine(name, home)

    assert found["kind"] == REFUSED[name]
    assert found["outcome"] == "refused" and found["sentence"].startswith(f"model is '{name}', ")


def test_a_gap_is_a_wrong_outcome(language):
    sound = {
        "log_prob_gap": 1e-6,
        "sampler_gap": 1e-6,
        "sft_loss_gap": 0.0,
        "sft_losses": [2.0, 1.9],
        "grpo_iterations": 1,
    }

    assert language._correct(sound)
    for fault in ({"packed_gap": 1e-3}, {"sampler_gap": 1e-3}, {"sft_losses": [2.0, 2.1]}, {"sft_loss_gap": 0.1}):
        assert not language._correct(sound | fault)


def test_the_page_counts_outcomes_and_gives_the_sentences(language):
    rows = [
        {"name": "one", "kind": "dense", "outcome": "trained", "packing": "accepted", "log_prob_gap": 2e-6},
        {"name": "two", "kind": "encoder", "outcome": "refused", "sentence": "it is not causal"},
    ]

    page = language.page(rows)

    assert "Of 2 architectures" in page and "1 are trained correctly and 1 are refused" in page
    assert "| `one` | dense |" in page and "- `two`: it is not causal" in page


def test_every_kind_is_tried():
    assert {about.kind for about in ARCHITECTURES.values()} == {*TRAINED.values(), *REFUSED.values()}
