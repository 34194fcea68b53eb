"""One small task written once as an environment's record and once as text: the same parameters after an update.

From states 0 and 1, an action leads on to state 2 or 3, and there a second one ends the episode with a score. Text has the
state as the token read and the action as the token written; here both worlds look their states up in one table.
"""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.records import Table, seeded
from understudy.advantage import gae, reward_to_go
from understudy.batch import Batch, Trajectory
from understudy.objective import policy_gradient, ppo, ppo_penalty, squared_error
from understudy.reduce import per_step, standardize
from understudy.reward import reward_at_last_step
from understudy.sample import sample_action
from understudy.update import update
from understudy.value import estimate_values, next_value

PROMPT, END = 4, 4
EPISODES = 6


def play() -> list[tuple]:
    """Episodes of the task: the states, actions and log-probs of two choices, and the score."""
    table, generator, episodes = Table(seed=90), seeded(5), []
    for start in (0, 1) * (EPISODES // 2):
        state, steps = start, []
        for _ in range(2):
            choice = sample_action(table, torch.tensor([[state]]), generator=generator)
            steps.append((state, int(choice.action), float(choice.logprob)))
            state = 2 + int(choice.action) % 2
        episodes.append((steps, float(start + 2 * steps[0][1] - steps[1][1])))
    return episodes


def stack(rows: list[list[tuple]]) -> Trajectory:
    """Rows of (obs, action, logprob, mask, reward, terminated) as a record."""
    fields = zip(*[zip(*r, strict=True) for r in rows], strict=True)
    obs, action, logprob, mask, reward, terminated = (torch.tensor(list(f), dtype=torch.float64) for f in fields)
    never = torch.zeros_like(mask).bool()
    return Trajectory(obs.long(), action.long(), logprob, mask.bool(), reward, terminated.bool(), never)


def as_control(episodes: list[tuple]) -> Trajectory:
    """Two environments, three episodes each in a row; the last observation of each is a masked column."""
    rows: list[list[tuple]] = [[], []]
    for i, (((s0, a0, l0), (s1, a1, l1)), score) in enumerate(episodes):
        rows[i % 2] += [(s0, a0, l0, 1, 0.0, 0), (s1, a1, l1, 1, score, 1), (END, 0, -1.0, 0, 0.0, 0)]
    return stack(rows)


def as_text(episodes: list[tuple]) -> Trajectory:
    """A row an episode: prompts of two lengths are masked, and the score is paid at the last chosen token."""
    rows = []
    for i, (((s0, a0, l0), (s1, a1, l1)), _) in enumerate(episodes):
        prompt, padding = [(PROMPT, s0, -2.0, 0, 0.0, 0)] * (1 + i % 2), [(PROMPT, 0, -2.0, 0, 0.0, 0)] * (2 - i % 2)
        rows.append([*prompt, (s0, a0, l0, 1, 0.0, 0), (s1, a1, l1, 1, 0.0, 1), *padding])
    record = stack(rows)
    score = torch.tensor([score for _, score in episodes], dtype=torch.float64)
    return Trajectory(**(vars(record) | {"reward": reward_at_last_step(score, record.mask)}))


WORLDS = {"control": as_control, "text": as_text}
OBJECTIVES = {
    "policy_gradient": partial(policy_gradient, value_coef=0.5, entropy_coef=0.01, value_loss_fn=squared_error),
    "ppo": partial(ppo, clip=0.2, value_coef=0.5, entropy_coef=0.01, value_clip=0.2),
    "ppo_penalty": partial(ppo_penalty, kl_old_coef=0.5, value_coef=0.5, entropy_coef=0.01),
}


def ready(policy, record: Trajectory) -> Batch:
    """Steps 3 and 4 of every recipe."""
    old, value = estimate_values(policy, record)
    after, ends = next_value(value, record), (record.terminated, record.truncated, record.mask)
    advantage = gae(record.reward, value, after, *ends, gamma=0.9, lam=0.8)
    advantage = standardize(advantage, record.mask)
    return Batch.of(record, old_distribution=old, value=value, advantage=advantage, target=advantage + value)


def after_update(record: Trajectory, objective, *, memory: bool):
    table = Table(memory=memory)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    fixed = {
        "num_epochs": 3,
        "num_minibatches": 1,
        "max_grad_norm": 0.5,
        "loss_weights": per_step,
        "generator": seeded(),
    }
    metrics = update(table, optimizer, ready(table, record), objective, **fixed)
    return dict(table.state_dict()), metrics


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_both_worlds_learn_the_same(objective, memory):
    control, text = (after_update(write(play()), objective, memory=memory) for write in WORLDS.values())

    assert_close(control, text)


def test_the_update_is_not_idle():
    parameters, _ = after_update(as_text(play()), OBJECTIVES["ppo"], memory=True)

    assert not torch.allclose(parameters["logits"], Table().logits)


def steps(x: torch.Tensor, record: Trajectory) -> torch.Tensor:
    """A field at the chosen steps, [episode, 2], episodes in the order they were played."""
    pairs = x[record.mask].reshape(-1, 2)
    return pairs.reshape(2, -1, 2).transpose(0, 1).flatten(0, 1) if len(record) == 2 else pairs


@pytest.mark.parametrize("name", ["obs", "action", "behavior_logprob", "reward", "terminated"])
def test_both_worlds_have_the_same_steps(name):
    control, text = (steps(getattr(record, name), record) for record in (write(play()) for write in WORLDS.values()))

    assert_close(control, text)


@pytest.mark.parametrize("write", WORLDS.values(), ids=WORLDS)
def test_an_episodes_undiscounted_return_is_its_score(write):
    record = write(play())

    G = reward_to_go(record.reward, record.terminated, record.truncated, record.mask, gamma=1.0)

    score = torch.tensor([score for _, score in play()], dtype=torch.float64)
    assert_close(steps(G, record), score[:, None].expand(-1, 2))
