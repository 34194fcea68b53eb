"""A language model that is a table, tasks on it whose optimum is known, and gradients by enumeration.

`python -m tests.bandit_lm` prints the tables of docs/estimators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.records import seeded
from understudy.advantage import gae, group_relative, leave_one_out
from understudy.batch import Batch, TokenBatch, Trajectory
from understudy.distribution import Categorical
from understudy.language import config, dpo, grpo, ppo, reinforce, training
from understudy.language.data.records import Preference
from understudy.language.model.token_distribution import Head, SampledTokens, TokenDistribution
from understudy.language.rewards.reward_sum import ScoringInput
from understudy.language.rollout.sampler import Rollout
from understudy.objective import critic_only, policy_gradient, scale_penalty, squared_error
from understudy.reduce import per_row
from understudy.reward import episode_score, reward_at_last_step
from understudy.update import update
from understudy.value import next_value

WORDS = 8
SEEDS = 0, 1, 2
LAST = 10  # iterates that are looked at
ITERATIONS, RATE = 80, 0.1
ROWS = {1: 1024, 2: 2048}  # by the length of completions
PAIRS, PAIR_STEPS, PAIR_ROWS = 50_000, 150, 2048


class TableLM(nn.Module):
    """Looks up what it says next: a state for every prefix of a prompt of one token. logits: [states, WORDS]."""

    needs_whole_rows = True
    device = "cpu"

    def __init__(self, logits: Tensor, *, length: int) -> None:
        super().__init__()
        self.logits, self.length = nn.Parameter(logits.clone()), length
        self.values = nn.Parameter(torch.zeros(len(logits)))
        self.head = Head(nn.Identity())

    def forward(self, text: TokenBatch) -> tuple[TokenDistribution, Tensor]:
        state = self.states(text.ids)
        return TokenDistribution(self.logits[state], text.mask, self.head), self.values[state]

    def states(self, ids: Tensor) -> Tensor:
        """The number of the prefix that ends in each column, [B, T]; 0 where nothing is chosen any more."""
        found, before, size = torch.zeros_like(ids), 0, 1
        place = torch.zeros_like(ids[:, 0])
        for column in range(self.length):
            found[:, column] = before + place
            before, size = before + size, size * WORDS
            place = place * WORDS + ids[:, column + 1]
        return found

    def completions(self) -> Tensor:
        """The probability of every completion, [WORDS ** length], float64."""
        return whole(self.logits.detach().double().log_softmax(-1), self.length).exp()


@dataclass(frozen=True)
class Task:
    """One prompt; every completion has as many tokens, and a reward of its own."""

    reference: Tensor
    """Logits, [states, WORDS]."""
    reward: Tensor
    """[WORDS ** length]."""
    coef: float
    """The price of a nat of KL to the reference."""
    length: int = 1

    def lm(self) -> TableLM:
        return TableLM(self.reference, length=self.length)

    def tilted(self, share: float = 1.0) -> Tensor:
        """pi_ref * exp(share * r / coef), normalised: the optimum, where share is 1. [WORDS ** length]."""
        reference = whole(self.reference.double().log_softmax(-1), self.length)
        return (reference + share * self.reward.double() / self.coef).softmax(-1)

    def score(self, record: Trajectory) -> Tensor:
        number = torch.zeros_like(record.action[:, 0])
        for column in range(self.length):
            number = number * WORDS + record.action[:, column]
        return self.reward[number]


# far from uniform, and the best word is rare
ONE = Task(
    reference=torch.tensor([[0.30, 0.20, 0.15, 0.12, 0.09, 0.07, 0.05, 0.02]]).log(),
    reward=torch.tensor([0.0, 1.2, 0.4, 3.6, 2.0, 4.0, 2.8, 0.8]),
    coef=2.0,
)


SMALL = Task(ONE.reference, ONE.reward / 4, ONE.coef / 4)  # the same task in another unit, and the same optimum


def two_tokens() -> Task:
    """64 completions, whose rewards and reference are drawn once."""
    draw = seeded(7)
    reference = torch.randn(1 + WORDS, WORDS, generator=draw)
    return Task(reference, 2 * torch.randn(WORDS**2, generator=draw), coef=1.5, length=2)


def whole(logp: Tensor, length: int) -> Tensor:
    """Log-probs of every completion, [WORDS ** length], of those of every state, [states, WORDS]."""
    found, before, size = logp.new_zeros(1), 0, 1
    for _ in range(length):
        found = (found[:, None] + logp[before : before + size]).flatten()
        before, size = before + size, size * WORDS
    return found


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


@torch.no_grad()
def say(lm: TableLM, rows: int, generator: torch.Generator) -> Rollout:
    """That many completions, laid out as `language.generate.lay_out` does."""
    shape = rows, lm.length + 1
    ids, logprob = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    mask, terminated = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for column in range(lm.length):
        here = torch.zeros_like(mask)
        here[:, column] = True
        distribution, _ = lm(TokenBatch(ids, here))
        token = distribution.sample(generator)
        logprob = logprob + distribution.log_prob(token)
        ids[:, column + 1] = token[:, column]
    mask[:, : lm.length] = True
    terminated[:, lm.length - 1] = True
    text = TokenBatch(ids, mask)
    record = Trajectory(text, text.action, logprob, mask, torch.zeros(shape), terminated, torch.zeros_like(mask))
    return Rollout([], [], record, ScoringInput([], [], [], [], {}))


class Frozen(nn.Module):
    """The reference: the table as it starts."""

    def __init__(self, lm: TableLM) -> None:
        super().__init__()
        self.lm = lm.requires_grad_(False)

    def forward(self, text: TokenBatch) -> TokenDistribution:
        return self.lm(text)[0]


def learn(task: Task, make: Callable[..., Any], seed: int) -> list[Tensor]:
    """The last iterates of a recipe, as probabilities of completions. The learning rate falls to 0 in a line.

    `make(lm, said, score, reference)` is steps 2 to 4 of a recipe: its batch, its objective and what else `update` is told.
    """
    lm, reference, generator = task.lm(), Frozen(task.lm()), seeded(seed)
    optimizer = training.adamw(settings(config.RolloutConfig, task), training.trainable_parameter_group(lm))
    last = []
    for i in range(ITERATIONS):
        slow_down(optimizer, i / ITERATIONS)
        said = say(lm, ROWS[task.length], generator)
        batch, objective, told = make(lm, said, task.score(said.trajectory), reference)
        update(lm, optimizer, batch, objective, max_grad_norm=1.0, generator=generator, **told)
        last = [*last, lm.completions()][-LAST:]
    return last


def slow_down(optimizer: torch.optim.Optimizer, done: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATE * (1 - done)


def settings(kind: Any, task: Task, **fields: Any) -> Any:
    """A recipe's config; `micro` is any number that one pass is enough for."""
    return kind(model="-", data="-", reward=("length",), kl_reference_coef=task.coef, micro_batch_size=10**6, **fields)


def by_ppo(task: Task, charge: Any = None, **fields: Any) -> Callable[..., Any]:
    """Steps 2 to 4 of `language.ppo`; a `charge` of the test's own takes the place of the config's."""
    cfg = settings(ppo.Config, task, **fields)

    def make(lm, said, score, reference):
        record, reward, referred = ppo.compute_rewards(said, score, reference, task.coef, cfg)
        old, value = ppo.estimate_values(lm, record, cfg)
        batch = ppo.compute_advantages(record, reward, value, old, referred, cfg)
        objective: Any = ppo.make_objective(cfg, cfg.kl_old_coef, task.coef)
        if charge is not None:
            objective = partial(objective, kl_penalty=charge)
        return batch, objective, {"num_epochs": 2, "num_minibatches": 1}

    return make


def by_grpo(task: Task, **fields: Any) -> Callable[..., Any]:
    """Steps 2 to 4 of `language.grpo`."""

    def make(lm, said, score, reference):
        cfg = settings(grpo.Config, task, completions_per_iteration=len(score), **fields)
        record, reward, referred = grpo.compute_rewards(said, score, reference, task.coef, cfg)
        members = torch.arange(len(score)) // cfg.group_size
        advantage = grpo.group_advantage(
            episode_score(reward, record.mask), members, record.mask.any(dim=1), scale_by_std=cfg.scale_by_std
        )
        batch = learnable(record, reward, advantage[:, None] * record.mask, referred, cfg)
        return (
            batch,
            grpo.make_objective(cfg, task.coef),
            {"num_epochs": 2, "num_minibatches": 1, "loss_weights": per_row},
        )

    return make


def by_reinforce(task: Task, **fields: Any) -> Callable[..., Any]:
    """Steps 2 to 4 of `language.reinforce`."""

    def make(lm, said, score, reference):
        cfg = settings(reinforce.Config, task, completions_per_iteration=len(score), **fields)
        record, reward, referred = reinforce.compute_rewards(said, score, reference, task.coef, cfg)
        paid, there = episode_score(reward, record.mask), record.mask.any(dim=1)
        to_go = reinforce.reward_to_go(reward, record.terminated, record.truncated, record.mask, gamma=cfg.gamma)
        advantage = reinforce.subtract_baseline(to_go, paid, there, record.mask, float(paid.mean()), cfg)
        objective = partial(
            policy_gradient,
            value_coef=0.0,
            entropy_coef=0.0,
            value_loss_fn=squared_error,
            kl_penalty=reinforce.reference_kl_penalty(task.coef, cfg),
        )
        batch = learnable(record, reward, advantage, referred, cfg)
        return batch, objective, {"num_epochs": 1, "num_minibatches": 1}

    return make


def learnable(record: Trajectory, reward: Tensor, advantage: Tensor, referred: TokenDistribution, cfg: Any) -> Batch:
    zeros = torch.zeros_like(reward)
    reference = referred if cfg.kl_reference == "exact" else referred.log_prob(record.action)
    old = SampledTokens(record.action, record.behavior_logprob)
    return Batch.of(record, value=zeros, advantage=advantage, target=zeros, old_distribution=old, reference=reference)


def drawn_pairs(task: Task, count: int, seed: int) -> list[Preference]:
    """Pairs of words, any two alike likely, of which the first was preferred with chance sigmoid(difference of rewards)."""
    draw = seeded(seed)
    one = torch.randint(WORDS, (count,), generator=draw)
    other = (one + torch.randint(1, WORDS, (count,), generator=draw)) % WORDS
    won = torch.rand(count, generator=draw) < (task.reward[one] - task.reward[other]).sigmoid()
    chosen, rejected = torch.where(won, one, other).tolist(), torch.where(won, other, one).tolist()
    return [Preference((0, a), (0, b), 0.0, row) for row, (a, b) in enumerate(zip(chosen, rejected, strict=True))]


def exact_pairs(task: Task, each: int) -> list[Preference]:
    """Every two words `each` times, each preferred as often as is its chance, to the nearest one."""
    found = []
    for one in range(WORDS):
        for other in range(one):
            wins = round(each * float((task.reward[one] - task.reward[other]).sigmoid()))
            found += [(one, other)] * wins + [(other, one)] * (each - wins)
    return [Preference((0, a), (0, b), 0.0, row) for row, (a, b) in enumerate(found)]


def learn_pairs(task: Task, pairs: list[Preference], seed: int) -> list[Tensor]:
    """The last iterates of DPO on pairs, minibatch by minibatch; the learning rate falls to 0 in a line."""
    lm, generator = task.lm(), seeded(seed)
    cfg = dpo.Config(model="-", data="-", beta=task.coef)
    optimizer = training.adamw(cfg, {"params": [lm.logits]})
    data = dpo.collate(pairs, dpo.compute_pair_logprobs(lm, pairs, micro_batch_size=len(pairs)))  # pyright: ignore[reportArgumentType]
    last = []
    for i in range(PAIR_STEPS):
        slow_down(optimizer, i / PAIR_STEPS)
        some = torch.randint(len(pairs), (PAIR_ROWS,), generator=generator)
        told = {"num_epochs": 1, "num_minibatches": 1, "max_grad_norm": 1.0, "generator": generator}
        update(lm, optimizer, data[some], dpo.make_objective(cfg), **told)
        last = [*last, lm.completions()][-LAST:]
    return last


def bare_k3(distribution, logprob: Tensor, batch: Batch) -> Tensor:
    """k3 as it is often charged: without the ratio, through which the sampler's part of the gradient flows."""
    gap = torch.where(batch.mask, logprob - batch.reference, 0.0)
    return (-gap).exp() - 1 + gap


def worst(last: list[Tensor], goal: Tensor) -> float:
    """The largest total variation between an iterate and a goal."""
    return max(total_variation(p, goal) for p in last)


# recipe -> steps 2 to 4 on a task. These end at pi_ref * exp(r / coef) ...
PAID = {
    "ppo, paid (k1)": by_ppo,
    "grpo, scaled, paid (k1)": partial(by_grpo, kl_reference="reward"),
    "grpo, unscaled, paid (k1)": partial(by_grpo, kl_reference="reward", scale_by_std=False),
    "rloo, paid (k1)": by_reinforce,
}
CHARGED = {
    "ppo, k2 in the loss": partial(by_ppo, normalize_advantage="none", kl_reference="k2"),
    "ppo, k3 in the loss": partial(by_ppo, normalize_advantage="none", kl_reference="k3"),
    "ppo, exact in the loss": partial(by_ppo, normalize_advantage="none", kl_reference="exact"),
    "grpo, unscaled, group 64, k3 in the loss": partial(by_grpo, scale_by_std=False, group_size=64),
    "rloo, exact in the loss": partial(by_reinforce, kl_reference="exact"),
}
# ... and these, the negative controls, elsewhere
ASTRAY = {
    "ppo, bare k3 in the loss": lambda task: by_ppo(
        task, normalize_advantage="none", kl_reference="k3", charge=scale_penalty(bare_k3, task.coef)
    ),
    "grpo, scaled, k3 in the loss": by_grpo,
    "ppo, standardised, exact in the loss": partial(by_ppo, kl_reference="exact"),
    "grpo, unscaled, group 8, exact in the loss": partial(by_grpo, scale_by_std=False, kl_reference="exact"),
}


def forward_optimum(task: Task) -> Tensor:
    """Where E r - coef * KL(pi_ref, pi) is largest: coef * pi_ref / (x - r), x such that it sums to 1. One token."""
    reference, reward = task.tilted(0.0), task.reward.double()
    low, high = float(reward.max()), float(reward.max()) + task.coef  # at the upper end the sum is at most 1
    for _ in range(100):
        x = (low + high) / 2
        low, high = (x, high) if (task.coef * reference / (x - reward)).sum() > 1 else (low, x)
    return task.coef * reference / (high - reward)


def scaled_optimum(task: Task) -> Tensor:
    """Where dividing r by its own deviation comes to rest: pi_ref * exp(r / (coef * deviation of r under pi)). One token."""
    share, reward = 1.0, task.reward.double()
    for _ in range(1000):
        p = task.tilted(share)
        deviation = ((p * reward.square()).sum() - (p * reward).sum().square()).sqrt()
        share = 0.9 * share + 0.1 / float(deviation)
    return task.tilted(share)


def shortsighted(task: Task) -> Tensor:
    """Where the KL in the loss comes to rest on two tokens: the first does not answer for the second's KL.

    Second: pi_ref * exp(r / coef), as it should be. First: pi_ref * exp(Q / coef), Q the mean reward after it; the optimum
    has Q - coef * KL of the second there.
    """
    reference, reward = task.reference.double().log_softmax(-1), task.reward.double().view(WORDS, WORDS)
    second = (reference[1:] + reward / task.coef).log_softmax(-1)
    first = (reference[0] + (second.exp() * reward).sum(-1) / task.coef).log_softmax(-1)
    return whole(torch.cat([first[None], second]), 2).exp()


class Exam:
    """Every answer of two tokens to each of 8 prompts: a prompt is the word after column 0, which nobody chose."""

    def __init__(self) -> None:
        draw = seeded(11)
        states = 1 + WORDS + WORDS**2
        self.logits = torch.randn(states, WORDS, generator=draw, dtype=torch.float64)
        easy = 3 * torch.randn(WORDS, 1, 1, generator=draw, dtype=torch.float64)
        self.score = (easy + torch.randn(WORDS, WORDS, WORDS, generator=draw, dtype=torch.float64)).flatten()
        self.lm = TableLM(self.logits.float(), length=3)
        digits = torch.cartesian_prod(*[torch.arange(WORDS)] * 3)
        ids = torch.nn.functional.pad(digits, (1, 0))
        shape = ids.shape
        mask = torch.tensor([False, True, True, False]).expand(shape)
        terminated = torch.tensor([False, False, True, False]).expand(shape)
        text = TokenBatch(ids, mask)
        self.states = self.lm.states(ids)
        logp = self.logits.log_softmax(-1)
        logprob = torch.where(mask, logp[self.states].gather(-1, text.action[..., None])[..., 0], 0.0)
        reward = reward_at_last_step(self.score, mask)
        self.record = Trajectory(text, text.action, logprob, mask, reward, terminated, torch.zeros_like(mask))
        self.prompt = digits[:, 0]
        self.chance = logprob.sum(dim=1).exp()  # given the prompt

    def values(self) -> Tensor:
        """V of every state, [states]: what a perfect critic says."""
        found = torch.zeros(len(self.logits), dtype=torch.float64)
        for column in (1, 2):
            before = (
                torch.where(self.record.mask[:, :column], self.record.behavior_logprob[:, :column], 0.0)
                .sum(dim=1)
                .exp()
            )
            share = self.chance / before
            found.index_add_(0, self.states[:, column], share * self.score)
        return found

    def advantage(self, values: Tensor, *, lam: float = 1.0) -> Tensor:
        """[rows, T] of every answer, with these values of the states."""
        value, record = values[self.states], self.record
        ends = record.terminated, record.truncated, record.mask
        return gae(record.reward, value, next_value(value, record), *ends, gamma=1.0, lam=lam)

    def gradients(self, advantage: Tensor) -> Tensor:
        """Every answer's gradient of `policy_gradient`, [rows, states * WORDS]: each row has a table of its own."""
        tables = self.logits.expand(len(self.prompt), -1, -1).clone().requires_grad_()
        rows = torch.arange(len(self.prompt))[:, None]
        zeros = torch.zeros_like(advantage)

        def copies(text: TokenBatch) -> tuple[Categorical, Tensor]:
            return Categorical.of(tables[rows, self.lm.states(text.ids)]), zeros

        old = Categorical.of(self.logits[self.states])
        batch = Batch.of(self.record, value=zeros, advantage=advantage, target=zeros, old_distribution=old)
        loss, _ = policy_gradient(copies, batch, value_coef=0.0, entropy_coef=0.0, value_loss_fn=squared_error)
        loss.sum().backward()
        assert tables.grad is not None
        return tables.grad.flatten(1)

    def mean(self, gradients: Tensor) -> Tensor:
        """The expected gradient given each prompt, [prompts, states * WORDS]."""
        return (self.chance[:, None] * gradients).view(WORDS, WORDS**2, -1).sum(dim=1)

    def variance(self, gradients: Tensor) -> float:
        """The variance of an answer's gradient given its prompt, summed over the table, mean over prompts."""
        squares = (self.chance * gradients.square().sum(dim=1)).sum() / WORDS
        return float(squares - self.mean(gradients).square().sum() / WORDS)

    def best_baseline(self) -> Tensor:
        """The state baseline of least variance, E |g|^2 G / E |g|^2, g = grad log pi (Greensmith et al. 2004). [states]."""
        above, below = torch.zeros(2, len(self.logits), dtype=torch.float64)
        logp = self.logits.log_softmax(-1)
        for column in (1, 2):
            state, action = self.states[:, column], self.record.action[:, column]
            square = 1 - 2 * logp[state, action].exp() + logp[state].exp().square().sum(-1)
            above.index_add_(0, state, self.chance * square * self.score)
            below.index_add_(0, state, self.chance * square)
        return torch.where(below > 0, above / below.clamp(min=1e-300), 0.0)

    def pairs(self, judge: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, float]:
        """Groups of two answers to a prompt, all enumerated: expected gradient, and its variance times two.

        judge: (score, group) -> advantage, all [N].
        """
        answers = torch.arange(WORDS**2)
        pair = torch.cartesian_prod(answers, answers).repeat(WORDS, 1)
        prompt = torch.arange(WORDS).repeat_interleave(WORDS**4)
        member = pair + WORDS**2 * prompt[:, None]
        chance = self.chance[member].prod(dim=1)
        group = torch.arange(len(member)).repeat_interleave(2)
        advantage = judge(self.score[member].flatten(), group).view(-1, 2)
        grad_log = self.gradients(self.record.mask.double())
        share = torch.zeros(WORDS**3, dtype=torch.float64)
        share.index_add_(0, member.flatten(), (chance[:, None] * advantage / 2).flatten())
        mean = (share[:, None] * grad_log).view(WORDS, WORDS**2, -1).sum(dim=1)
        inner = grad_log @ grad_log.T
        crossed = inner[member[:, :, None], member[:, None, :]]
        squares = (chance * torch.einsum("ni,nij,nj->n", advantage, crossed, advantage) / 4).sum() / WORDS
        return mean, 2 * float(squares - mean.square().sum() / WORDS)

    def learnt_values(self, answers: int) -> Tensor:
        """V of every state as a critic has it that learnt from so many answers of the policy, 512 at a time."""
        lm, draw = TableLM(self.logits.float(), length=3), seeded(5)
        with torch.no_grad():
            lm.logits[0] = 0.0  # every prompt alike likely
        optimizer = training.adamw(config.Config(model="-", data="-"), {"params": [lm.values]})
        updates = answers // 512
        for i in range(updates):
            slow_down(optimizer, i / updates)
            record = say(lm, 512, draw).trajectory
            mask = record.mask.clone()
            mask[:, 0] = False
            number = (record.action[:, :3] * torch.tensor([WORDS**2, WORDS, 1])).sum(dim=1)
            target = torch.where(mask, self.score[number, None].float(), 0.0)
            zeros = torch.zeros_like(target)
            fields = {"value": zeros, "advantage": zeros, "target": target, "old_distribution": None}
            batch = Batch.of(record, mask=mask, obs=TokenBatch(record.obs.ids, mask), **fields)
            told = {"num_epochs": 2, "num_minibatches": 1, "max_grad_norm": None, "generator": draw}
            update(lm, optimizer, batch, critic_only, **told)
        return lm.values.detach().double()


def baselines(exam: Exam) -> dict[str, Tensor]:
    """Baselines that hang on the state alone, [states]: nothing, one mean for all, V of the prompt, V of every prefix."""
    true = exam.values()
    mean = (exam.chance * exam.score).sum() / WORDS
    prompts = true[1 : 1 + WORDS]
    by_prompt = torch.cat([true[:1], prompts, prompts.repeat_interleave(WORDS)])
    return {"none": torch.zeros_like(true), "mean": mean.expand_as(true), "prompt": by_prompt, "critic": true}


def print_tables() -> None:
    """What docs/estimators.md holds."""
    for task, cases in ((ONE, PAID | CHARGED | ASTRAY), (two_tokens(), PAID | CHARGED)):
        optimum = task.tilted()
        print(f"\n{task.length} token(s): reference to optimum {total_variation(task.tilted(0.0), optimum):.3f}")
        for name, make in cases.items():
            far = [worst(learn(task, make(task), seed), optimum) for seed in SEEDS]
            print(f"| {name} | {min(far):.4f} to {max(far):.4f} |", flush=True)
        if task.length == 1:
            far = [worst(learn_pairs(task, drawn_pairs(task, PAIRS, seed), seed), optimum) for seed in SEEDS]
            print(f"| dpo, {PAIRS} pairs drawn | {min(far):.4f} to {max(far):.4f} |")
            far = [worst(learn(SMALL, by_grpo(SMALL), seed), optimum) for seed in SEEDS]
            print(f"| grpo, scaled, k3 in the loss, unit of reward / 4 | {min(far):.4f} to {max(far):.4f} |")
            print(f"| bare k3: computed | {total_variation(forward_optimum(task), optimum):.4f} |")
            print(f"| scaled: computed | {total_variation(scaled_optimum(task), optimum):.4f} |")
            print(f"| group of 8: computed | {total_variation(task.tilted(7 / 8), optimum):.4f} |")
        else:
            print(f"| short-sighted: computed | {total_variation(shortsighted(task), optimum):.4f} |")
    exam = Exam()
    rows = baselines(exam) | {"best": exam.best_baseline()}
    rows |= {f"critic, {n} answers": exam.learnt_values(n) for n in (5_120, 51_200)}
    for name, values in rows.items():
        print(f"| {name} | {exam.variance(exam.gradients(exam.advantage(values))):.3f} |")
    for lam in (0.95, 0.0):
        print(f"| critic, lam {lam} | {exam.variance(exam.gradients(exam.advantage(exam.values(), lam=lam))):.3f} |")
    for name, judge in {
        "leave one out": leave_one_out,
        "group mean": partial(group_relative, scale_by_std=False),
    }.items():
        print(f"| {name} of 2 | {exam.pairs(judge)[1]:.3f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print_tables()
