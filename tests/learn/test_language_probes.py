"""PPO on a tiny language model: what a reward asks for is learnt, and what noise asks for is not."""

import json
import random
import statistics

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy.language import Policy, ppo
from understudy.language.rollout.generate import generate

pytestmark = pytest.mark.learning

WORDS = ["</s>", "<s>", *"abcdefghij"]
WANTED, LENGTH = 5, 8
CHANCE = 1 / len(WORDS)
BONUS = {"a": 0.5, "b": -0.5}
START = {word: [WORDS.index(word)] for word in BONUS}  # as the tokenizer reads them, which adds no BOS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random Llama of a layer, and a word-level tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **special)
    ).save_pretrained(path)
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)
    (path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "bonus": b}) + "\n" for p, b in BONUS.items()))
    return str(path)


def share_of(ids: list[int]) -> float:
    return ids.count(WANTED) / len(ids)


def share(prompts, completions, completion_ids, bonus):
    """How much of a completion is the wanted word; and what its prompt pays anyhow."""
    return [share_of(ids) + extra for ids, extra in zip(completion_ids, bonus, strict=True)]


def noise(prompts, completions, completion_ids):
    """As large, and as fixed for each completion, but about nothing."""
    return [random.Random(str(ids)).random() for ids in completion_ids]


def learn(model: str, out, reward, **fields):
    fixed = {
        "fixed_length": LENGTH,
        "total_tokens": 20_000,
        "completions_per_iteration": 64,
        "learning_rate": 0.005,
        "seed": 1,
        "quiet": True,
    }
    fixed |= {"kl_reference_coef": 0.0, "log_samples": 0, "evaluate_rows": 8, "output_dir": str(out)}
    return ppo.train(ppo.Config(model=model, data=f"{model}/prompts.jsonl", reward=reward, **(fixed | fields)))


@pytest.fixture(scope="module")
def taught(model, tmp_path_factory):
    """A run that was paid for the wanted word."""
    return learn(model, tmp_path_factory.mktemp("run") / "share", share)


def said_share(policy: Policy) -> float:
    """The wanted word's share of what a policy says."""
    prompts = [START[word] for word in BONUS] * 200
    said = generate(policy, prompts, limit=LENGTH, stops=frozenset(), seeds=range(len(prompts)))
    return statistics.fmean(share_of(completion.ids) for completion in said)


def test_before_it_learns_every_word_is_said_as_often(model):
    assert said_share(Policy.from_pretrained(model)) == pytest.approx(CHANCE, abs=0.02)


def test_the_word_that_is_paid_for_is_said(taught):
    assert said_share(Policy.load(taught.path / "policy")) > 0.8


def test_control_noise_does_not_teach_it(model, tmp_path):
    run = learn(model, tmp_path / "noise", noise)

    assert said_share(Policy.load(run.path / "policy")) < 0.25  # a drift without a direction; what is paid for gets 0.8


def test_the_value_of_each_prompt_is_the_mean_score_after_it(taught):
    policy = Policy.load(taught.path / "policy")
    said = said_share(policy)

    for word, bonus in BONUS.items():
        _, value = policy(torch.tensor([START[word]]))
        assert value[0, -1].item() == pytest.approx(said + bonus, abs=0.15)


def test_the_critic_explains_what_is_paid(taught):
    assert statistics.fmean(line["explained_variance"] for line in taught.metrics[-4:]) > 0.5


def test_control_a_critic_that_does_not_learn_explains_nothing(model, tmp_path):
    run = learn(model, tmp_path / "blind", share, total_tokens=4_000, value_coef=0.0)

    assert all(abs(line["explained_variance"]) < 0.1 for line in run.metrics)
