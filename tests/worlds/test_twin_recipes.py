"""One small task, played in an environment and told as text: the steps of both PPO recipes leave equal parameters.

What is seen is the token before, what is done is the next one; STOP ends an episode, or else the limit does. Control walks
the environment. Text is given the same episodes as prompts, of several lengths, and what was said after them.
"""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.testing import assert_close

from tests.probes import vector
from tests.records import Table, seeded
from understudy.batch import Trajectory
from understudy.control import ppo as control_ppo
from understudy.control.rollout import RolloutCollector
from understudy.language import ppo as language_ppo
from understudy.language.data.records import Prompt
from understudy.language.model.token_distribution import Head, TokenDistribution
from understudy.language.rewards.reward_sum import ScoringInput
from understudy.language.rollout.generate import Completion, build_trajectory
from understudy.language.rollout.sampler import Rollout
from understudy.objective import ppo, ppo_penalty
from understudy.update import update
from understudy.value import estimate_values

TOKENS, STOP, PROMPT, LIMIT = 5, 0, 4, 4
ROWS, EPISODES, ITERATIONS = 2, 6, 3
PENALTY = -1.5
PLAYED = ("terminal", "penalty", "bootstrap")  # nobody drops an environment's episodes


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def score(said: list[int]) -> float:
    """Of a start and all that followed; a number that float32 holds exactly."""
    return sum(0.25 * token * (-1) ** i for i, token in enumerate(said)) + (said[-1] == STOP)


class Saying(gymnasium.Env):
    """Pays the score with the stop; what the limit does is said by `how`."""

    observation_space = spaces.Discrete(TOKENS)
    action_space = spaces.Discrete(TOKENS)

    def __init__(self, how: str):
        self.how = how

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.said = [int(self.np_random.integers(1, TOKENS))]
        return np.int64(self.said[-1]), {}

    def step(self, action):
        self.said.append(int(action))
        stopped, cut = action == STOP, len(self.said) > LIMIT and action != STOP
        paid = score(self.said) if stopped else 0.0
        if cut:
            paid = {"terminal": score(self.said), "penalty": PENALTY, "bootstrap": 0.0}[self.how]
        return np.int64(action), paid, stopped or (cut and self.how != "bootstrap"), cut and self.how == "bootstrap", {}


class Player(Table):
    """The table as an agent in an environment."""

    def initial_state(self, rows):
        return None

    def to_env_action(self, action):
        return action


class Exact(Head):
    """A head that is not rounded to float32."""

    def __call__(self, hidden):
        return self.project(hidden)


class Reader(Table):
    """The table as a language model: the last token says all."""

    def forward(self, obs):
        return TokenDistribution(self.logits[obs.ids], obs.mask, Exact(torch.nn.Identity())), self.values[obs.ids]


def table(kind, *, seed=90, memory=True):
    return kind(seed, memory=memory, states=TOKENS, actions=TOKENS)


def told(record: Trajectory, how: str) -> Rollout:
    """A record's episodes as text: a row each, in prompts of one to three tokens."""
    prompts, completions, state = [], [], None
    for row in range(len(record)):
        for t in record.mask[row].nonzero()[:, 0].tolist():
            if state is None:
                state, ids, logprob = int(record.obs[row, t]), [], []
            ids.append(int(record.action[row, t]))
            logprob.append(float(record.behavior_logprob[row, t]))
            if record.ended[row, t]:
                prompts.append([*[PROMPT] * (len(prompts) % 3), state])
                completions.append(Completion(ids, logprob, ids[-1] == STOP, 0))
                state = None
    shown = [Prompt(tuple(ids), "", {}, i + 1) for i, ids in enumerate(prompts)]
    count, cut = len(prompts), [not completion.stopped for completion in completions]
    judged = ScoringInput([""] * count, [""] * count, [completion.ids for completion in completions], cut, {})
    return Rollout(shown, completions, build_trajectory(prompts, completions), judged)


def config(kind, **fields):
    common = {
        "gamma": 0.9,
        "lam": 0.8,
        "num_epochs": 3,
        "num_minibatches": 1,
        "normalize_advantage": "batch",
        "max_grad_norm": 0.5,
    }
    losses = {"clip": 0.2, "value_coef": 0.5, "value_clip": 0.2, "entropy_coef": 0.01, "kl_old_coef": 0.5}
    return kind(**(common | losses | fields))


class Control:
    """Steps 2 to 5 of control's PPO."""

    def __init__(self, objective: str, *, memory: bool, coef: float):
        self.policy, self.reference, self.coef = table(Player, memory=memory), table(Player, seed=70), coef
        self.cfg = config(control_ppo.Config, env="-", objective=objective)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=0.05)

    def learn(self, record: Trajectory):
        cfg = self.cfg
        referred = estimate_values(self.reference, record)[0].log_prob(record.action)
        paid = record.reward - self.coef * torch.where(record.mask, record.behavior_logprob - referred, 0.0)
        old, value = estimate_values(self.policy, record)
        batch = control_ppo.compute_advantages(record, paid, value, old, cfg)
        chosen = {"clip": partial(ppo, clip=cfg.clip), "penalty": partial(ppo_penalty, kl_old_coef=cfg.kl_old_coef)}
        objective = partial(
            chosen[cfg.objective],
            value_coef=cfg.value_coef,
            entropy_coef=cfg.entropy_coef,
            value_clip=cfg.value_clip,
        )
        improve(self, batch, objective)


class Language:
    """Steps 2 to 5 of language's PPO."""

    def __init__(self, objective: str, how: str, *, coef: float):
        self.policy, self.reference, self.coef = table(Reader), table(Reader, seed=70), coef
        fields = {"model": "-", "data": "-", "reward": ("length",), "truncation": how, "truncation_penalty": PENALTY}
        self.cfg = config(language_ppo.Config, objective=objective, **fields)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=0.05)

    def learn(self, said: Rollout):
        scores = torch.tensor([score([p.ids[-1], *c.ids]) for p, c in zip(said.prompts, said.completions, strict=True)])
        record, reward, referred = language_ppo.compute_rewards(
            said, scores, lambda text: self.reference(text)[0], self.coef, self.cfg
        )
        old, value = language_ppo.estimate_values(self.policy, record, self.cfg)
        batch = language_ppo.compute_advantages(record, reward, value, old, referred, self.cfg)
        improve(self, batch, language_ppo.make_objective(self.cfg, self.cfg.kl_old_coef, self.coef))


def improve(side, batch, objective):
    fixed = {
        "num_epochs": side.cfg.num_epochs,
        "num_minibatches": side.cfg.num_minibatches,
        "max_grad_norm": side.cfg.max_grad_norm,
    }
    update(side.policy, side.optimizer, batch, objective, generator=seeded(), **fixed)


def learn(objective: str, how: str, *, memory: bool = True, coef: float = 0.0, said_as: str | None = None):
    """Both tables after some iterations, and the records of the last; control's policy plays."""
    control, text = Control(objective, memory=memory, coef=coef), Language(objective, said_as or how, coef=coef)
    envs = vector([lambda: Saying(how)] * ROWS)
    walker = RolloutCollector(envs, seed_of=lambda row, n: 10 * n + row, generator=seeded(1))
    for _ in range(ITERATIONS):
        record = walker.collect_episodes(control.policy, EPISODES)
        said = told(record, how)
        control.learn(record)
        text.learn(said)
    return control.policy, text.policy, record, said


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("how", PLAYED)
@pytest.mark.parametrize("objective", ["clip", "penalty"])
def test_both_recipes_leave_the_same_parameters(objective, how, memory):
    control, text, _, _ = learn(objective, how, memory=memory)

    assert_close(dict(text.state_dict()), dict(control.state_dict()), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("how", PLAYED)
def test_kl_to_the_reference_is_pay_like_any_other(how):
    control, text, _, _ = learn("clip", how, coef=0.3)

    assert_close(dict(text.state_dict()), dict(control.state_dict()), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("how", "said_as"), [(a, b) for a in PLAYED for b in (*PLAYED, "drop") if a != b])
def test_control_a_limit_that_means_something_else_teaches_something_else(how, said_as):
    control, text, _, _ = learn("clip", how, said_as=said_as)

    assert (text.logits - control.logits).abs().max() > 1e-3


def test_the_update_is_not_idle_and_the_episodes_end_in_both_ways():
    control, _, record, said = learn("clip", "bootstrap")

    assert (control.logits - table(Player).logits).abs().max() > 0.1
    assert (control.values - table(Player).values).abs().max() > 0.1
    assert 0 < record.truncated.sum() < len(said.completions) == ROWS * EPISODES
    assert len({len(completion.ids) for completion in said.completions}) > 1
