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
from understudy.control.envs.spaces import OBS_KEY
from understudy.reduce import moments

CLIP = 10.0  # standard deviations; as in OpenAI's baselines (`common/vec_env/vec_normalize.py`) and since


class RunningMoments(nn.Module):
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
    def update(self, x: Tensor) -> None:
        """x: [N, ...]. Until the first batch, mean 0 and variance 1."""
        if not len(x):
            return
        mean, var = (moment.to(self.mean.device) for moment in moments(x))
        total = self.count + len(x)
        delta = mean - self.mean
        sum_of_squares = self.var * self.count + var * len(x) + delta.square() * self.count * len(x) / total
        self.mean.add_(delta * len(x) / total)
        self.var.copy_(sum_of_squares / total)
        self.count.copy_(total)


class ObsNormalizer(nn.Module):
    """Each float entry of an observation less its mean, over its standard deviation, within 10 of them.

    Images, discrete entries and the action mask pass as they are.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.names = list(shapes)
        self.running_moments = [RunningMoments(shape) for shape in shapes.values()]
        self.moments = nn.ModuleList(self.running_moments)

    def forward(self, obs: Tree, dtype: torch.dtype = torch.float32) -> Tree:
        """obs: a Tensor [B, T, ...], or a dict of them -> the same in `dtype`; float64 is scaled before it is cast."""
        scaled = dict(_as_dict(obs))
        for i, name in enumerate(self.names):
            x = scaled[name]
            mean, std = self.mean_and_std(i, x.dtype)
            scaled[name] = ((x - mean) / std).clamp(-CLIP, CLIP).to(dtype)
        return scaled if isinstance(obs, dict) else scaled[OBS_KEY]

    def mean_and_std(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The number that is subtracted from an entry and the one that divides the rest."""
        stats = self.running_moments[index]
        return stats.mean.to(dtype), (stats.var + 1e-8).sqrt().to(dtype)

    def update(self, trajectory: Trajectory) -> None:
        """Add the observations at the chosen steps."""
        for name, stats in zip(self.names, self.running_moments, strict=True):
            stats.update(_as_dict(trajectory.obs)[name][trajectory.mask])


class RewardNormalizer(nn.Module):
    """Rewards over the standard deviation of the running discounted return, never centred, within 10 of them.

    Every row has one running return; it decays by gamma a chosen step and is zeroed at its episode's end
    (Engstrom et al. 2020, sec. 3, "reward scaling", with the zeroing that their Algorithm 1 leaves out).
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.moments = RunningMoments(())
        self.running_returns = torch.zeros(0, dtype=torch.float64)
        self.is_already_updated = False  # this record has been gathered, before it was scaled

    @property
    def std(self) -> Tensor:
        """What rewards are divided by."""
        return (self.moments.var + 1e-8).sqrt().float()

    def prepare(self, trajectory: Trajectory, abandoned_rows: np.ndarray) -> None:
        """Before a record is scaled: the first one is gathered now, for until then nothing is known of the scale.

        Args:
            abandoned_rows: rows whose episode from the record before was cut without a step that ended it, bool [B].
        """
        if len(self.running_returns) == len(trajectory):
            self.running_returns = torch.where(torch.from_numpy(abandoned_rows), 0.0, self.running_returns)
        if self.moments.count == 0:
            self.update(trajectory)
            self.is_already_updated = True

    def forward(self, reward: Tensor) -> Tensor:
        """reward: [B, T] -> [B, T]."""
        return (reward / self.std).clamp(-CLIP, CLIP)

    def update(self, trajectory: Trajectory) -> None:
        """Add the chosen steps' running returns; rows go on from the record before, [B, T]. What `begin` did is done."""
        if self.is_already_updated:
            self.is_already_updated = False
            return
        if len(self.running_returns) != len(trajectory):
            self.running_returns = torch.zeros(len(trajectory), dtype=torch.float64)
        mask, reward, ended = (x.cpu().numpy().T for x in (trajectory.mask, trajectory.reward, trajectory.ended))
        decay, rewards, continues = (
            np.where(mask, self.gamma, 1.0),
            np.where(mask, reward, 0.0),
            np.where(ended, 0.0, 1.0),
        )
        returns, running = np.empty(mask.shape), self.running_returns.numpy()
        for t in range(len(mask)):
            returns[t] = running = running * decay[t] + rewards[t]
            running = running * continues[t]
        self.running_returns = torch.from_numpy(running)
        self.moments.update(torch.from_numpy(returns.T[mask.T]))


def _as_dict(obs: Tree) -> dict[str, Tensor]:
    return obs if isinstance(obs, dict) else {OBS_KEY: obs}
