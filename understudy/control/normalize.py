"""Running scale of observations and rewards, a part of the saved policy.

Statistics are gathered from chosen steps only, each once, and take effect after the update: within an iteration they are
frozen, so a record means one thing from the first minibatch to the last. Those of rewards begin with the first record,
before it is scaled. Records hold raw observations and rewards.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from understudy.batch import Trajectory, Tree
from understudy.control.spaces import PLAIN
from understudy.reduce import moments

CLIP = 10.0  # standard deviations; as in OpenAI's baselines (`common/vec_env/vec_normalize.py`) and since


class Moments(nn.Module):
    """Running mean and variance of a stream of [...]-shaped values, merged batch by batch (Chan et al. 1979), float64."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x: [N, ...]. Until the first batch, mean 0 and variance 1."""
        if not len(x):
            return
        mean, var = (moment.to(self.mean.device) for moment in moments(x))
        total = self.count + len(x)
        shift = mean - self.mean
        spread = self.var * self.count + var * len(x) + shift.square() * self.count * len(x) / total
        self.mean.add_(shift * len(x) / total)
        self.var.copy_(spread / total)
        self.count.copy_(total)


class ObsScale(nn.Module):
    """Each float entry of an observation less its mean, over its standard deviation, within 10 of them.

    Images, discrete entries and the action mask pass as they are.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.names = list(shapes)
        self.seen = [Moments(shape) for shape in shapes.values()]
        self.moments = nn.ModuleList(self.seen)

    def forward(self, obs: Tree, dtype: torch.dtype = torch.float32) -> Tree:
        """obs: a Tensor [B, T, ...], or a dict of them -> the same in `dtype`; float64 is scaled before it is cast."""
        scaled = dict(_named(obs))
        for i, name in enumerate(self.names):
            x = scaled[name]
            shift, width = self.shift_and_width(i, x.dtype)
            scaled[name] = ((x - shift) / width).clamp(-CLIP, CLIP).to(dtype)
        return scaled if isinstance(obs, dict) else scaled[PLAIN]

    def shift_and_width(self, entry: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The number that is subtracted from an entry and the one that divides the rest."""
        seen = self.seen[entry]
        return seen.mean.to(dtype), (seen.var + 1e-8).sqrt().to(dtype)

    def gather(self, record: Trajectory) -> None:
        """Add the observations at the chosen steps."""
        for name, seen in zip(self.names, self.seen, strict=True):
            seen.add(_named(record.obs)[name][record.mask])


class RewardScale(nn.Module):
    """Rewards over the standard deviation of the running discounted return, never centred, within 10 of them.

    Every row has one running return; it decays by gamma a chosen step and is zeroed at its episode's end
    (Engstrom et al. 2020, sec. 3, "reward scaling", with the zeroing that their Algorithm 1 leaves out).
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.moments = Moments(())
        self.running = torch.zeros(0, dtype=torch.float64)
        self.is_ahead = False  # this record has been gathered, before it was scaled

    @property
    def width(self) -> Tensor:
        """What rewards are divided by."""
        return (self.moments.var + 1e-8).sqrt().float()

    def begin(self, record: Trajectory, abandoned: np.ndarray) -> None:
        """Before a record is scaled: the first one is gathered now, for until then nothing is known of the scale.

        Args:
            abandoned: rows whose episode from the record before was cut without a step that ended it, bool [B].
        """
        if len(self.running) == len(record):
            self.running = torch.where(torch.from_numpy(abandoned), 0.0, self.running)
        if self.moments.count == 0:
            self.gather(record)
            self.is_ahead = True

    def forward(self, reward: Tensor) -> Tensor:
        """reward: [B, T] -> [B, T]."""
        return (reward / self.width).clamp(-CLIP, CLIP)

    def gather(self, record: Trajectory) -> None:
        """Add the chosen steps' running returns; rows go on from the record before, [B, T]. What `begin` did is done."""
        if self.is_ahead:
            self.is_ahead = False
            return
        if len(self.running) != len(record):
            self.running = torch.zeros(len(record), dtype=torch.float64)
        mask, reward, ended = (x.cpu().numpy().T for x in (record.mask, record.reward, record.ended))
        decay, paid, goes_on = np.where(mask, self.gamma, 1.0), np.where(mask, reward, 0.0), np.where(ended, 0.0, 1.0)
        returns, running = np.empty(mask.shape), self.running.numpy()
        for t in range(len(mask)):
            returns[t] = running = running * decay[t] + paid[t]
            running = running * goes_on[t]
        self.running = torch.from_numpy(running)
        self.moments.add(torch.from_numpy(returns.T[mask.T]))


def _named(obs: Tree) -> dict[str, Tensor]:
    return obs if isinstance(obs, dict) else {PLAIN: obs}
