"""Small records and policies for the tests: by hand (`row`, `flags`, `record`) and at random, in both worlds' layouts."""

import torch
from torch import Tensor, nn

from understudy.batch import Batch, Trajectory
from understudy.distribution import Categorical, DiagonalGaussian
from understudy.value import estimate_values, next_value

STATES, ACTIONS = 5, 3


def row(*numbers: float) -> Tensor:
    """[1, T] float."""
    return torch.tensor([numbers], dtype=torch.float32)


def flags(*bits: int) -> Tensor:
    """[1, T] bool."""
    return torch.tensor([bits]).bool()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def record(mask: Tensor, **fields: Tensor) -> Trajectory:
    """A record with this mask; fields not given are zero."""
    zeros = torch.zeros(mask.shape)
    default = {"obs": zeros.long(), "action": zeros.long(), "behavior_logprob": zeros, "reward": zeros}
    default |= {"terminated": zeros.bool(), "truncated": zeros.bool()}
    return Trajectory(**(default | {"mask": mask} | fields))


class Table(nn.Module):
    """A policy that looks everything up: obs [B, T] is a state's number."""

    def __init__(self, seed: int = 0, *, memory: bool = False, states: int = STATES, actions: int = ACTIONS):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(states, actions, generator=seeded(seed), dtype=torch.float64))
        self.values = nn.Parameter(torch.randn(states, generator=seeded(seed + 1), dtype=torch.float64))
        self.needs_whole_rows = memory

    def forward(self, obs):
        return Categorical.of(self.logits[obs]), self.values[obs]


class Adder(nn.Module):
    """A recurrent policy whose state is the sum of what it saw in the episode; the value is that sum."""

    needs_whole_rows = True

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(ACTIONS, dtype=torch.float64))

    def forward(self, obs, state, start):
        sums = []
        for t in range(obs.shape[1]):
            state = torch.where(start[:, t, None], 0.0, state) + obs[:, t, None]
            sums.append(state[:, 0])
        value = torch.stack(sums, dim=1)
        return Categorical.of(value[..., None] * self.logits), value, state


class Blind(nn.Module):
    """A policy that looks at nothing: what it says of every step are its parameters themselves."""

    needs_whole_rows = False

    def __init__(self, rows: int, steps: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(rows, steps, 1))
        self.value = nn.Parameter(torch.zeros(rows, steps))

    def forward(self, obs):
        return DiagonalGaussian(self.mean, self.mean), self.value


def random_record(seed: int, *, rows: int = 6, episodes: int = 3) -> Trajectory:
    """Rows of short episodes, float64: prompts, paid tool text between choices, ends of both kinds, cut rows, padding."""
    g = seeded(seed)

    def upto(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    columns = [[c for _ in range(1 + upto(episodes)) for c in _random_episode(upto)] for _ in range(rows)]
    for cut in columns[::3]:  # a row that stops in the middle of an episode: no end, a last observation
        last = max(t for t, (chosen, *_) in enumerate(cut) if chosen)
        cut[last] = (1, 0, 0)
    longest = max(map(len, columns)) + 1
    padded = torch.tensor([c + [(0, 0, 0)] * (longest - len(c)) for c in columns]).bool()
    mask, terminated, truncated = padded.unbind(-1)
    shape = mask.shape
    inside = torch.tensor([[t < len(c) - 1 for t in range(longest)] for c in columns])
    reward = torch.where(inside, torch.randn(shape, generator=g, dtype=torch.float64), 0.0)
    return Trajectory(
        obs=torch.randint(STATES, shape, generator=g),
        action=torch.randint(ACTIONS, shape, generator=g),
        behavior_logprob=-torch.rand(shape, generator=g, dtype=torch.float64) - 0.5,
        mask=mask,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
    )


def _random_episode(upto) -> list[tuple[int, int, int]]:
    """(mask, terminated, truncated) by column: prompt, choices with tool text between, an end, the last observation."""
    columns = [(0, 0, 0)] * upto(3)
    for _ in range(upto(4)):
        columns += [(1, 0, 0)] + [(0, 0, 0)] * upto(3)
    end = upto(2)
    return [*columns, (1, end, 1 - end), (0, 0, 0)]


def random_batch(seed: int, policy: Table, **sizes: int) -> Batch:
    """A random record, ready to learn from: sampled by another policy than `policy`, so that ratios differ from 1."""
    taken = random_record(seed, **sizes)
    old, value = estimate_values(Table(seed=90), taken)
    logprob = torch.where(taken.mask, old.log_prob(taken.action), taken.behavior_logprob)
    after = next_value(value, taken)
    fields = {
        "value": value,
        "advantage": taken.reward - value + after,
        "target": taken.reward + after,
        "old_distribution": old,
    }
    fields["reference"] = estimate_values(Table(seed=80), taken)[0].log_prob(taken.action)
    return Batch.of(taken, behavior_logprob=logprob, **fields)
