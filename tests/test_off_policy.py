"""Steps that another policy chose: exact gradients by enumeration, and what the recipes make of it."""

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.bandit_lm import ONE, by_reinforce, say, settings, slow_down, total_variation
from tests.records import ACTIONS, Table, seeded
from tests.rehearsed import furnish
from understudy.batch import Batch, TokenBatch
from understudy.language import config, grpo, ppo, reinforce, training
from understudy.language.model.token_distribution import Head, TokenDistribution
from understudy.language.rlhf import RLHFModels, off_policy_weights
from understudy.language.rollout.generate import Completion, build_trajectory, generate
from understudy.language.rollout.sampler import Rollout
from understudy.objective import grpo as grpo_loss
from understudy.objective import policy_gradient, squared_error
from understudy.objective import ppo as ppo_loss
from understudy.reduce import importance_weight
from understudy.run.config import RequestError
from understudy.update import update

WIDE = {"low": 0.0, "high": float("inf")}
OBJECTIVES = {
    "policy_gradient": partial(policy_gradient, value_coef=0.0, entropy_coef=0.0, value_loss_fn=squared_error),
    "ppo": partial(ppo_loss, clip=0.2, value_coef=0.0, entropy_coef=0.0),
    "grpo": partial(grpo_loss, low=0.2, high=0.2, entropy_coef=0.0),
}


class Words:
    """Every completion of `length` words, one a row; pi and mu are tables over what was said so far."""

    def __init__(self, length: int) -> None:
        self.words = torch.tensor(list(product(range(ACTIONS), repeat=length)))
        before, number = torch.zeros(len(self.words), dtype=torch.long), torch.zeros_like(self.words)
        first, size = 0, 1
        for column in range(length):
            number[:, column] = first + before
            before, first, size = before * ACTIONS + self.words[:, column], first + size, size * ACTIONS
        self.prefix, self.mask = number, torch.ones_like(number).bool()
        self.pi, self.mu = Table(1, states=first), Table(2, states=first)
        self.reward = torch.rand(len(self.words), generator=seeded(3), dtype=torch.float64)

    def logprob(self, table: Table) -> torch.Tensor:
        return table(self.prefix)[0].log_prob(self.words).detach()

    def gradient(self, sampler: Table, objective=OBJECTIVES["policy_gradient"], **weighed) -> torch.Tensor:
        """The expected gradient of the loss when `sampler` speaks, summed over all it may say."""
        own, theirs = self.logprob(self.pi), self.logprob(sampler)
        weight = importance_weight(own, theirs, self.mask, **weighed) if weighed else torch.ones_like(own)
        zeros, ended = torch.zeros_like(own), torch.zeros_like(self.mask)
        batch = Batch(
            obs=self.prefix,
            action=self.words,
            behavior_logprob=own,
            mask=self.mask,
            reward=zeros,
            terminated=ended,
            truncated=ended,
            value=zeros,
            advantage=weight * self.reward[:, None],
            target=zeros,
            old_distribution=self.pi(self.prefix)[0],
        )
        loss, _ = objective(self.pi, batch)
        self.pi.zero_grad()
        (theirs.sum(dim=1, keepdim=True).exp() * loss).sum().backward()
        assert self.pi.logits.grad is not None
        return self.pi.logits.grad.clone()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("how", ["truncate", "mask"])
@pytest.mark.parametrize(("length", "ratio"), [(1, "step"), (1, "row"), (1, "row_mean"), (2, "row"), (3, "row")])
def test_without_a_bound_another_samplers_words_have_the_policys_own_gradient(length, ratio, how, objective):
    words = Words(length)

    found = words.gradient(words.mu, objective, mode=how, ratio=ratio, **WIDE)
    assert_close(found, words.gradient(words.pi, objective))


def test_control_unweighted_they_have_another_one():
    words = Words(2)

    assert (words.gradient(words.mu) - words.gradient(words.pi)).abs().max() > 0.05


@pytest.mark.parametrize("ratio", ["step", "row_mean"])
def test_ratios_of_steps_leave_to_the_sampler_what_came_before_and_comes_after(ratio):
    words = Words(2)

    off = (words.gradient(words.mu, mode="truncate", ratio=ratio, **WIDE) - words.gradient(words.pi)).norm()
    assert 0.01 < off < (words.gradient(words.mu) - words.gradient(words.pi)).norm()


def one_good_word(how: str, high: float) -> tuple[float, float, float]:
    """Word 0 alone is paid. How much its logit is raised on-policy and off, and its pi / mu."""
    words = Words(1)
    words.reward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    ratio = float((words.logprob(words.pi) - words.logprob(words.mu))[0].exp())
    found = words.gradient(words.mu, mode=how, ratio="step", low=0.0, high=high * ratio)
    return -float(words.gradient(words.pi)[0, 0]), -float(found[0, 0]), ratio


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 2.0])
def test_a_bound_below_a_good_words_ratio_raises_it_by_so_much_less(share):
    # E_mu[min(w, C) 1(word 0) grad] = mu(0) min(w, C) grad = min(1, C / w) of E_pi
    on_policy, found, _ = one_good_word("truncate", share)

    assert on_policy > 0
    assert found == pytest.approx(min(1.0, share) * on_policy)


@pytest.mark.parametrize(("share", "left"), [(0.9, 0.0), (1.1, 1.0)])
def test_a_band_that_a_good_words_ratio_is_outside_of_does_not_raise_it(share, left):
    on_policy, found, _ = one_good_word("mask", share)

    assert found == pytest.approx(left * on_policy, abs=1e-12)


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_a_bound_takes_from_the_weights_and_never_adds(how):
    words = Words(2)
    own, theirs = words.logprob(words.pi), words.logprob(words.mu)
    chance = theirs.sum(dim=1).exp()
    means = []
    for high in (0.5, 1.0, 2.0, 4.0, float("inf")):
        weight = importance_weight(own, theirs, words.mask, mode=how, ratio="row", low=0.0, high=high)
        means.append(float((chance * weight[:, 0]).sum()))

    assert means == sorted(means)
    assert means[0] < 0.9 and means[-1] == pytest.approx(1.0)  # E_mu[pi / mu] = 1


# what a recipe makes of a record: three tokens of two, which the sampler chose with probability 1/2 each


def rollouts(**fields) -> config.RolloutConfig:
    return config.RolloutConfig(**{"model": "m", "data": "d", "reward": "length", **fields})


SAID = [Completion([1, 0, 1], [math.log(0.5)] * 3, True, 0)]
RECORD = Rollout([], SAID, build_trajectory([[0]], SAID), None)  # pyright: ignore[reportArgumentType]


def quarter(text: TokenBatch) -> tuple[TokenDistribution, torch.Tensor]:
    """A policy to which token 1 has probability 1/4: pi / mu is 1/2 for it and 3/2 for token 0."""
    logits = torch.tensor([0.75, 0.25]).log().expand(*text.ids.shape, 2)
    return TokenDistribution(logits, text.mask, Head(nn.Identity())), torch.zeros(text.ids.shape)


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"off_policy": "none"}, (1, 1, 1)),
        ({"off_policy": "truncate"}, (0.5, 1.5, 0.5)),
        ({"off_policy": "truncate", "off_policy_high": 1.2}, (0.5, 1.2, 0.5)),
        ({"off_policy": "mask", "off_policy_high": 1.2}, (0.5, 0, 0.5)),
        ({"off_policy": "mask", "off_policy_low": 0.6}, (0, 1.5, 0)),
        ({"off_policy": "truncate", "off_policy_ratio": "row"}, (0.375,) * 3),  # 1/2 * 3/2 * 1/2
        ({"off_policy": "truncate", "off_policy_ratio": "row_mean"}, (0.375 ** (1 / 3),) * 3),
    ],
    ids=str,
)
def test_a_token_counts_as_the_config_says(fields, weights):
    _, weight, _ = off_policy_weights(quarter, RECORD, rollouts(**fields))

    assert_close(weight[RECORD.trajectory.mask], torch.tensor(weights, dtype=torch.float32))


def test_ratios_of_the_update_begin_at_one_whoever_sampled():
    said, _, _ = off_policy_weights(quarter, RECORD, rollouts(off_policy="truncate"))

    logprob = torch.tensor([[0.25, 0.75, 0.25, 1.0]]).log()
    assert_close(said.trajectory.behavior_logprob, logprob)
    assert said.completions == RECORD.completions
    assert not said.trajectory.behavior_logprob.requires_grad


def test_the_policys_own_samples_are_left_as_they_are():
    said, _, metrics = off_policy_weights(quarter, RECORD, rollouts())

    assert said is RECORD
    assert metrics == {}


def test_weights_are_measured():
    _, _, metrics = off_policy_weights(quarter, RECORD, rollouts(off_policy="truncate"))

    assert metrics["importance_weight_mean"] == pytest.approx(2.5 / 3)
    assert metrics["effective_sample_fraction"] == pytest.approx(2.5**2 / (3 * 2.75))  # 1/4 + 9/4 + 1/4
    # log 1/2 - log pi: log 2, log 2/3, log 2
    assert metrics["kl_sampler"] == pytest.approx(math.log(8 / 3) / 3)


def test_a_band_without_a_width_is_refused():
    with pytest.raises(RequestError, match=r"off_policy_low is 3\.0: must be at most off_policy_high, 2.0"):
        rollouts(off_policy_low=3.0)


def test_weights_that_minibatches_would_standardise_away_are_refused():
    with pytest.raises(
        RequestError, match="normalize_advantage is 'minibatch': it would undo the weights of off_policy"
    ):
        ppo.Config(model="m", data="d", reward="length", off_policy="mask", normalize_advantage="minibatch")


# whole recipes, whose engine says that it sampled with another probability than the policy's


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("off_policy"))


class Claims:
    """Our own generation, which claims to have sampled with `share` of the policy's probability."""

    def __init__(self, share: float) -> None:
        self.gap, self.versions = math.log(share), []

    def __call__(self, policy, prompts, **told):
        self.versions.append(policy.version)
        said = generate(policy, prompts, **told)
        return [replace(one, logprob=[x + self.gap for x in one.logprob]) for one in said]


def by_length(prompts, completions, completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


RECIPES = {
    "ppo": (ppo, {"num_epochs": 1, "num_minibatches": 1, "value_coef": 0.0}),
    "grpo": (grpo, {}),
    "reinforce": (reinforce, {}),
}
FEW = {
    "completions_per_iteration": 8,
    "max_new_tokens": 6,
    "total_tokens": 90,
    "quiet": True,
    "log_samples": 0,
    "evaluate_rows": 4,
    "kl_reference_coef": 0.0,
}
STOPS = tuple(map(str, range(2, 170)))


def first(recipe: str, home, out, share: float, **fields) -> dict:
    """The metrics of a first iteration with an engine that claims a share."""
    kind, own = RECIPES[recipe]
    given = {
        "model": str(home),
        "data": str(home / "prompts.jsonl"),
        "reward": by_length,
        "stop": STOPS,
        "output_dir": str(out),
    }
    return kind.train(kind.Config(**given, **FEW, **own, **fields), engine=Claims(share)).metrics[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_weighs_what_an_engine_sampled(recipe, home, tmp_path):
    own = first(recipe, home, tmp_path / "own", 1.0, off_policy="truncate")
    cut = first(recipe, home, tmp_path / "cut", 0.25, off_policy="truncate", off_policy_high=3.0)
    out = first(recipe, home, tmp_path / "out", 0.25, off_policy="mask", off_policy_high=3.0)

    # pi / mu is 4 everywhere: cut at 3, every advantage counts three times; outside the band none does
    assert own["importance_weight_mean"] == pytest.approx(1, abs=1e-5) and cut[
        "importance_weight_mean"
    ] == pytest.approx(3)
    assert own["grad_norm"] > 0
    assert cut["grad_norm"] == pytest.approx(3 * own["grad_norm"], rel=1e-4)
    assert out["grad_norm"] == 0 and out["effective_sample_fraction"] == 0
    assert cut["kl_sampler"] == pytest.approx(-math.log(4), abs=1e-5)


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"top_p": 0.6}])
def test_truncated_samples_count_the_mass_that_was_kept(fields, home, tmp_path):
    given = {"model": str(home), "data": str(home / "prompts.jsonl"), "reward": by_length, "stop": STOPS}
    cfg = reinforce.Config(**given, **FEW, off_policy="truncate", output_dir=str(tmp_path / "run"), **fields)

    told = reinforce.train(cfg).metrics[0]
    cast = RLHFModels(cfg)
    said = cast.sampler.collect(cast.policy, range(8), first_row=0)
    with torch.no_grad():
        logp = cast.policy(said.trajectory.obs)[0]._logp
    assert logp is not None
    p = logp.exp().sort(dim=-1, descending=True).values
    mass = p.cumsum(dim=-1)
    share = mass[:, 4] if "top_k" in fields else mass.where(mass >= 0.6, 2).amin(dim=-1)  # pi / mu of a kept token
    _, weight, _ = off_policy_weights(cast.policy, said, cfg)
    assert_close(weight[said.trajectory.mask], share, atol=1e-5, rtol=0)
    assert 0 < told["importance_weight_mean"] < 0.95  # the run itself samples so, too


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"top_p": 0.6}])
def test_truncated_samples_are_refused_where_they_would_not_be_weighed(fields, home):
    [(name, value)] = fields.items()
    with pytest.raises(RequestError, match=f"{name} is {value}, which samples from another policy .* set off_policy"):
        reinforce.train(reinforce.Config(model=str(home), data="x", reward=by_length, **fields))
    given = {"model": str(home), "data": str(home / "prompts.jsonl"), "reward": by_length, "stop": STOPS}
    cfg = reinforce.Config(**given, **FEW, off_policy="mask", **fields)
    with pytest.raises(RequestError, match="beside an engine of your own"):
        RLHFModels(cfg, Claims(1.0))


def test_truncated_samples_end_while_they_are_sampled(home):
    given = {"model": str(home), "data": str(home / "prompts.jsonl"), "reward": by_length}
    cast = RLHFModels(reinforce.Config(**given, **FEW, off_policy="truncate", top_k=5, stop=("the old",)))
    engine = cast.sampler.engine
    assert isinstance(engine, partial)

    assert engine.keywords["stop_condition"] == cast.tokenizer.ends_with_stop_string  # not cut afterwards alone


def test_an_engine_samples_for_learning_and_not_for_preflight_or_evaluation(home, tmp_path):
    engine = Claims(0.25)
    given = {"model": str(home), "data": str(home / "prompts.jsonl"), "reward": by_length, "stop": STOPS}
    cfg = reinforce.Config(**given, **FEW, output_dir=str(tmp_path / "run"), evaluate_every=1)

    run = reinforce.train(cfg, engine=engine)
    assert engine.versions == list(range(run.metrics[-1]["iteration"]))  # once an iteration, with the policy as it is


def test_a_cast_without_an_engine_samples_by_itself(home):
    cfg = reinforce.Config(model=str(home), data=str(home / "prompts.jsonl"), reward=by_length, **FEW)

    assert RLHFModels(cfg).sampler.engine is None


# learning from a sampler that never changes: the optimum is known


def astray(seed: int, **fields) -> float:
    """How far from the optimum REINFORCE ends whose every word the reference chose, in the worst of the last iterates."""
    lm, fixed, generator = ONE.lm(), ONE.lm(), seeded(seed)
    cfg = settings(reinforce.Config, ONE, **fields)
    optimizer = training.adamw(cfg, training.trainable_parameter_group(lm))
    distance = []
    for i in range(80):
        slow_down(optimizer, i / 80)
        said, weight, _ = off_policy_weights(lm, say(fixed, 2048, generator), cfg)  # pyright: ignore[reportArgumentType]
        batch, objective, told = by_reinforce(ONE)(lm, said, ONE.score(said.trajectory), lambda text: fixed(text)[0])
        batch = Batch.of(batch, advantage=weight * batch.advantage)
        update(lm, optimizer, batch, objective, max_grad_norm=1.0, generator=generator, **told)
        distance.append(total_variation(lm.completions(), ONE.tilted()))
    return max(distance[-10:])


@pytest.mark.learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weighed_words_of_the_reference_lead_to_the_optimum(seed):
    assert astray(seed, off_policy="truncate", off_policy_high=100.0) < 0.02


@pytest.mark.learning
def test_cut_weights_lead_there_too():
    # at the optimum every word is paid the same, its KL included: whatever the weights, nothing pulls away from it
    assert astray(0, off_policy="truncate", off_policy_high=1.2) < 0.02


@pytest.mark.learning
@pytest.mark.parametrize("fields", [{}, {"off_policy": "mask", "off_policy_high": 1.2}], ids=str)
def test_control_words_that_are_not_weighed_or_left_out_lead_elsewhere(fields):
    assert astray(0, **fields) > 0.04
