"""A critic of a language model finds the values that dynamic programming knows: whole, and cut in each of the four ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from tests.tiny_lm import BOS, LONGEST, STOP, lookup_critic, speaker, true_values
from understudy.batch import Batch, TokenBatch
from understudy.language import ppo, training
from understudy.language.data.records import Prompt
from understudy.language.model.policy import Policy, Reference
from understudy.language.rewards.reward_sum import ScoringInput
from understudy.language.rollout.generate import build_trajectory, generate
from understudy.language.rollout.sampler import Rollout
from understudy.objective import critic_only
from understudy.update import update

pytestmark = pytest.mark.learning

ITERATIONS, ROWS = 16, 1024
WORTH = {1: 1.2, 2: 0.6, 3: 0.9, 4: 0.3}


def score(said: Sequence[int]) -> float:
    """So much a word, and 1.5 more where the stop follows word 3."""
    return sum(WORTH.get(token, 0.0) for token in said) + 1.5 * (list(said[-2:]) == [3, STOP])


@dataclass(frozen=True)
class Task:
    """How completions begin and end."""

    limit: int = LONGEST + 1
    midway: bool = False
    """Prompts are up to three words of what is said, instead of none."""
    endless: bool = False
    """Completions have `limit` tokens and no other end."""


WHOLE, FIXED, CUT, MIDWAY = Task(), Task(limit=3, endless=True), Task(limit=2), Task(limit=2, midway=True)
# root mean square error over the steps of a fresh sample; V = 3, as it begins, is off by 0.9 to 4.5. Every prefix has a
# value of its own, learnt from its own visits alone: 5 of them in CUT, 31 in FIXED, 341 in the others, most of them rare
# (five times the samples bring the bootstrapped ones to about 0.1, and leave "midway terminal" at 0.8)
CLOSE = {WHOLE: 0.15, FIXED: 0.06, CUT: 0.06, MIDWAY: 0.25}
CASES = {
    "whole": (WHOLE, {}),
    "one step": (WHOLE, {"lam": 0.0}),
    "discounted": (WHOLE, {"gamma": 0.5}),
    "fixed length": (FIXED, {"truncation": "penalty", "truncation_penalty": -9.0}),
    "terminal": (CUT, {"truncation": "terminal"}),
    "terminal less": (CUT, {"truncation": "terminal", "missing_eos_penalty": 1.0}),
    "penalty": (CUT, {"truncation": "penalty", "truncation_penalty": -3.0}),
    "drop": (CUT, {"truncation": "drop"}),
    "bootstrap": (MIDWAY, {"truncation": "bootstrap"}),
    "midway terminal": (MIDWAY, {"truncation": "terminal"}),
    "KL": (WHOLE, {"kl_reference_coef": 1.0}),
    "KL bootstrap": (MIDWAY, {"truncation": "bootstrap", "kl_reference_coef": 1.0}),
    "KL drop": (CUT, {"truncation": "drop", "kl_reference_coef": 1.0}),
}


def config(**fields) -> ppo.Config:
    fixed = {"kl_reference_coef": 0.0, "normalize_advantage": "none", "learning_rate": 0.5, "micro_batch_size": ROWS}
    return ppo.Config(model="-", data="-", reward=("length",), **(fixed | fields))


def prompts(task: Task, number: int) -> list[list[int]]:
    if not task.midway:
        return [[BOS]] * ROWS
    first = number * ROWS
    said = generate(
        Policy(speaker()), [[BOS]] * ROWS, limit=3, stops=frozenset([STOP]), seeds=range(first, first + ROWS)
    )
    begun = [[BOS, *completion.ids[: i % 4]] for i, completion in enumerate(said)]
    return [prompt if STOP not in prompt else [BOS] for prompt in begun]


@cache
def spoken(task: Task, number: int) -> Rollout:
    """What the speaker says; its chances never change, so everyone may learn from it."""
    begun, first = prompts(task, number), 10**6 + number * ROWS
    stops = frozenset() if task.endless else frozenset([STOP])
    completions = generate(Policy(speaker()), begun, limit=task.limit, stops=stops, seeds=range(first, first + ROWS))
    record = build_trajectory(begun, completions, has_fixed_length=task.endless)
    shown = [Prompt(tuple(prompt), "", {}, row + 1) for row, prompt in enumerate(begun)]
    cut = [not (completion.stopped or task.endless) for completion in completions]
    judged = ScoringInput([""] * ROWS, [""] * ROWS, [completion.ids for completion in completions], cut, {})
    return Rollout(shown, completions, record, judged)


@cache
def reference() -> Reference:
    """The speaker with the other convictions."""
    model = speaker()
    with torch.no_grad():
        model.lm_head.weight[:, 1:] *= -0.5
    return Reference(Policy(model))


def weighed(policy: Policy, said: Rollout, cfg: ppo.Config) -> Batch:
    """Steps 2 to 4 as the recipe makes them."""
    scores = torch.tensor([score([*p.ids[1:], *c.ids]) for p, c in zip(said.prompts, said.completions, strict=True)])
    record, reward, referred = ppo.compute_rewards(said, scores, reference(), cfg.kl_reference_coef, cfg)
    old, value = ppo.estimate_values(policy, record, cfg)
    return ppo.compute_advantages(record, reward, value, old, referred, cfg)


def untrained() -> Policy:
    policy = Policy(speaker(), lookup_critic())
    policy.model.requires_grad_(False)
    return policy


@cache
def learnt(name: str) -> Policy:
    """A policy whose critic alone has learnt, as in the recipe's warm-up."""
    task, fields = CASES[name]
    policy, cfg = untrained(), config(**fields)
    groups = {"params": policy.actor_parameters()}, {"params": policy.critic_parameters()}
    optimizer = training.adamw(cfg, *groups)
    for i in range(ITERATIONS):
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * (1 - i / ITERATIONS)
        update(
            policy,
            optimizer,
            weighed(policy, spoken(task, i), cfg),
            partial(critic_only, value_clip=0.0),
            num_epochs=2,
            num_minibatches=4,
            max_grad_norm=1.0,
            generator=torch.Generator().manual_seed(i),
        )
    return policy


@cache
def truth(name: str) -> dict[tuple[int, ...], float]:
    """What dynamic programming says of a case: a row that is cut counts as its mode says."""
    task, fields = CASES[name]
    cfg = config(**fields)
    limit, cut = task.limit, None
    if cfg.truncation == "bootstrap":
        limit = LONGEST + 1  # V stands for what would follow: the values of the task that is never cut
    elif cfg.truncation == "terminal":

        def cut(paid: float) -> float:
            return paid - cfg.missing_eos_penalty

    elif cfg.truncation == "penalty":

        def cut(paid: float) -> float:
            return cfg.truncation_penalty

    of = {"limit": limit, "endless": task.endless, "cut": cut, "gamma": cfg.gamma, "coef": cfg.kl_reference_coef}
    return true_values(speaker(), reference().policy.model, score, **of)


@cache
def examined(case: str) -> tuple[TokenBatch, torch.Tensor]:
    """A fresh sample of what is said in a case, as far as it counts there; and the truth at its chosen steps, [N]."""
    task, fields = CASES[case]
    obs, values = weighed(untrained(), spoken(task, ITERATIONS), config(**fields)).obs, truth(case)
    prefixes = [tuple(obs.ids[row, : column + 1].tolist()) for row, column in obs.mask.nonzero().tolist()]
    return obs, torch.tensor([values[prefix] for prefix in prefixes])


@torch.no_grad()
def error(policy: Policy, case: str) -> float:
    """Root mean square of V minus the truth over the steps of a fresh sample."""
    obs, true = examined(case)
    _, value = policy(obs)
    return (value[obs.mask] - true).square().mean().sqrt().item()


def close(case: str) -> float:
    return CLOSE[CASES[case][0]]


FOUND = [case for case in CASES if case != "midway terminal"]  # there V also hangs on where its row began


@pytest.mark.parametrize("case", FOUND)
def test_the_critic_finds_the_values_of_dynamic_programming(case):
    policy = learnt(case)

    assert error(policy, case) < close(case)


@pytest.mark.parametrize("case", FOUND)
def test_the_critic_finds_what_to_expect_at_the_start(case):
    _, value = learnt(case)(torch.tensor([[BOS]]))

    assert value.item() == pytest.approx(truth(case)[(BOS,)], abs=close(case))


@pytest.mark.parametrize("case", FOUND)
def test_control_a_critic_that_did_not_learn_is_off(case):
    assert error(untrained(), case) > 3 * close(case)


MODES = ["terminal", "terminal less", "penalty", "drop"]
OTHERS = [(one, other) for one in MODES for other in MODES if one != other] + [
    ("terminal", "bootstrap"),
    ("midway terminal", "bootstrap"),
    ("discounted", "whole"),
    ("whole", "discounted"),
    ("whole", "KL"),
    ("KL", "whole"),
    ("bootstrap", "KL bootstrap"),
    ("drop", "KL drop"),
]


@pytest.mark.parametrize(("learnt_as", "case"), OTHERS)
def test_control_what_another_mode_taught_is_off(learnt_as, case):
    assert error(learnt(learnt_as), case) > 2 * close(case)


def test_the_tasks_do_have_both_ends():
    cut = [spoken(task, 0).trajectory.truncated.any(dim=1).float().mean() for task in (WHOLE, FIXED, CUT, MIDWAY)]

    assert cut[0] == cut[1] == 0
    assert 0.2 < cut[2] < 0.8 and 0.1 < cut[3] < 0.8


def test_the_actor_stands_still():
    before, after = speaker().state_dict(), learnt("whole").model.state_dict()

    assert all(torch.equal(before[name], after[name]) for name in before)
