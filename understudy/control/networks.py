"""Actor-critics for observations of any supported space: MLP, CNN, recurrent; one distribution head per action space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import torch
from gymnasium import spaces
from torch import Tensor, nn

from understudy.control.config import Network
from understudy.control.spaces import MASK, PLAIN, channels_last, features, half_width, image_size, is_image
from understudy.distribution import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    SquashedGaussian,
    StateNoiseGaussian,
)
from understudy.products import Linear, Tanh

ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU, "elu": nn.ELU}


class ActorCritic(nn.Module):
    """`network(obs) -> distribution, value [B, T]`; with memory, `network(obs, state, start) -> ..., state [B, S]`.

    obs: a Tensor [B, T, ...] or a dict of them; `action_mask` among them limits the distribution and is not a feature.
    """

    def __init__(self, observation_space: gymnasium.Space, action_space: gymnasium.Space, network: Network) -> None:
        super().__init__()
        self.actor = Body(observation_space, network)
        self.critic = None if network.shared else Body(observation_space, network)
        self.head = head_for(action_space, self.actor.width, network)
        self.value = _linear(self.actor.width, 1, gain=1.0, orthogonal=network.orthogonal)
        self.state_size = 0 if network.memory == "none" else self.actor.state_size * (1 if network.shared else 2)

    def forward(self, obs: Any, state: Tensor | None = None, start: Tensor | None = None) -> Any:
        obs = obs if isinstance(obs, dict) else {PLAIN: obs}
        if state is not None:
            return self._remember(obs, state, start)
        actor = self.actor(obs)
        critic = actor if self.critic is None else self.critic(obs)
        return self.head(actor, obs.get(MASK)), self.value(critic)[..., 0]

    def critique(self, obs: Any) -> Tensor:
        """V(obs) alone, [B, T]; without memory."""
        return self.value((self.critic or self.actor)(obs if isinstance(obs, dict) else {PLAIN: obs}))[..., 0]

    def _remember(self, obs: dict[str, Tensor], state: Tensor, start: Tensor | None) -> Any:
        assert start is not None
        size = self.actor.state_size
        actor, after = self.actor.remember(obs, state[:, :size], start)
        critic = actor
        if self.critic is not None:
            critic, critic_after = self.critic.remember(obs, state[:, size:], start)
            after = torch.cat([after, critic_after], dim=1)
        return self.head(actor, obs.get(MASK)), self.value(critic)[..., 0], after


class Body(nn.Module):
    """Observation to features: images through a CNN, everything else flat; an MLP; a GRU or LSTM at the end."""

    def __init__(self, observation_space: gymnasium.Space, network: Network) -> None:
        super().__init__()
        found = features(observation_space)
        images = {name: space for name, space in found.items() if is_image(space)}
        nets = [Cnn(space.shape, orthogonal=network.orthogonal) for space in images.values() if space.shape]
        self.cnn, self.images = nn.ModuleList(nets), list(images)
        flat = {name: space for name, space in found.items() if name not in images}
        self.vectors = {name: _vector(space) for name, space in flat.items()}
        width = sum(net.width for net in nets) + sum(_flat_width(space) for space in flat.values())
        layers: list[nn.Module] = []
        for hidden in network.hidden:
            layers += [
                _linear(width, hidden, gain=math.sqrt(2), orthogonal=network.orthogonal),
                ACTIVATIONS[network.activation](),
            ]
            width = hidden
        self.mlp = nn.Sequential(*layers)
        self.memory = None if network.memory == "none" else Memory(width, network.memory_size, network.memory)
        self.width = width if self.memory is None else network.memory_size
        self.state_size = 0 if self.memory is None else self.memory.state_size

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts = [vector(obs[name]) for name, vector in self.vectors.items()]
        parts += [net(obs[name]) for name, net in zip(self.images, self.cnn, strict=True)]
        return self.mlp(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    def remember(self, obs: dict[str, Tensor], state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        assert self.memory is not None
        return self.memory(self.forward(obs), state, start)


class Cnn(nn.Module):
    """uint8 images [B, T, *shape] to features [B, T, width]; scaled to [0, 1] here (Mnih et al. 2015 from 36 pixels on).

    The shape says where the channels are: [H, W]; [H, W, C] where the last dimension is the smallest; [C, H, W] otherwise.
    A stack of colour images, [K, H, W, C], is K * C channels.
    """

    def __init__(self, shape: tuple[int, ...], *, orthogonal: bool) -> None:
        super().__init__()
        self.dims = len(shape)
        self.last = channels_last(shape)
        height, width = image_size(shape)
        channels = math.prod(shape) // (height * width)
        large = min(height, width) >= 36
        plan = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)] if large else [(16, 3, 1, 1), (32, 3, 2, 1)]
        layers: list[nn.Module] = []
        for out, kernel, stride, padding in plan:
            layer = nn.Conv2d(channels, out, kernel, stride, padding)
            if orthogonal:
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
            layers += [layer, nn.ReLU()]
            channels = out
        self.net = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            self.width = self.net(torch.zeros(1, self.net[0].in_channels, height, width)).shape[1]  # pyright: ignore

    def forward(self, image: Tensor) -> Tensor:
        lead, shape = image.shape[: -self.dims], image.shape[-self.dims :]
        image = image.reshape(-1, *shape).float() / 255
        if self.last:
            image = image.movedim(-1, -3)
        height, width = image.shape[-2:]
        return self.net(image.reshape(image.shape[0], -1, height, width)).reshape(*lead, self.width)


class Memory(nn.Module):
    """A GRU or LSTM over rows [B, T, F] whose state is zeroed where an episode starts.

    Rows are cut at their starts into sequences of their own, run side by side, and laid back: one pass, whatever the ends.
    """

    def __init__(self, width: int, size: int, kind: Literal["gru", "lstm"]) -> None:
        super().__init__()
        self.rnn = (nn.GRU if kind == "gru" else nn.LSTM)(width, size, batch_first=True)
        self.lstm = kind == "lstm"
        self.state_size = size * (2 if self.lstm else 1)

    def forward(self, x: Tensor, state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, F], state [B, S] before column 0, start [B, T] -> features [B, T, size], state after column T-1."""
        rows, steps = start.shape
        column = torch.arange(steps, device=x.device)
        begin = start.clone()
        begin[:, 0] = True
        sequence = begin.flatten().cumsum(0).reshape(rows, steps) - 1
        position = column - torch.where(begin, column, 0).cummax(dim=1).values
        lengths = torch.bincount(sequence.flatten())
        padded = x.new_zeros(len(lengths), int(lengths.max()), x.shape[2])
        padded[sequence, position] = x
        before = x.new_zeros(len(lengths), self.state_size)
        before[sequence[:, 0]] = torch.where(start[:, :1], 0.0, state)
        hidden = before[None] if not self.lstm else tuple(h.contiguous() for h in before[None].chunk(2, dim=2))
        packed = nn.utils.rnn.pack_padded_sequence(padded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, after = self.rnn(packed, hidden)
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        after = torch.cat(after, dim=2) if self.lstm else after
        return out[sequence, position], after[0][sequence[:, -1]]


class CategoricalHead(nn.Module):
    """Discrete, MultiDiscrete and MultiBinary: logits, and which of them are allowed."""

    def __init__(self, space: gymnasium.Space, width: int, network: Network) -> None:
        super().__init__()
        self.sizes: tuple[int, ...] = ()
        self.bits = 0
        if isinstance(space, spaces.MultiDiscrete):
            self.sizes = tuple(int(n) for n in space.nvec.reshape(-1))
        elif isinstance(space, spaces.MultiBinary):
            self.bits = math.prod(space.shape)
        outputs = sum(self.sizes) or self.bits or int(space.n)  # pyright: ignore
        self.logits = _linear(width, outputs, gain=0.01, orthogonal=network.orthogonal)

    def forward(self, features: Tensor, allowed: Tensor | None) -> Distribution:
        logits = self.logits(features)
        if self.bits:
            return self._of_bits(logits, allowed)
        return MultiCategorical.of(logits, self.sizes, allowed) if self.sizes else Categorical.of(logits, allowed)

    def _of_bits(self, logits: Tensor, allowed: Tensor | None) -> Distribution:
        if allowed is None:
            return Bernoulli(logits)
        # a bit is a choice of two, so that either can be forbidden
        logits = torch.stack([torch.zeros_like(logits), logits], dim=-1).flatten(-2)
        return MultiCategorical.of(logits, (2,) * self.bits, allowed)


class GaussianHead(nn.Module):
    """Box: a mean from the features, one learned spread per dimension (per feature and dimension with gSDE)."""

    half_width: Tensor

    def __init__(self, space: spaces.Box, width: int, network: Network) -> None:
        super().__init__()
        size = math.prod(space.shape)
        self.mean = _linear(width, size, gain=0.01, orthogonal=network.orthogonal)
        self.state_noise, self.squash = (network.exploration == "gsde"), network.squash == "tanh"
        if self.state_noise and self.squash:
            raise ValueError("squash is 'tanh' and exploration is 'gsde': choose squash 'clip', or exploration 'held'")
        start = torch.full((width, size) if self.state_noise else (size,), network.log_std)
        self.scalar_std = network.scalar_std
        self.spread = nn.Parameter(start.exp() if self.scalar_std else start)
        self.register_buffer("half_width", half_width(space), persistent=False)

    def forward(self, features: Tensor, allowed: Tensor | None) -> Distribution:
        mean = self.mean(features)
        if self.state_noise:  # features detached: exploration noise does not shape them, as in SB3's gSDE
            return StateNoiseGaussian.of_features(mean, features.detach(), self.log_std)
        log_std = self.log_std.expand_as(mean)
        return SquashedGaussian(mean, log_std, self.half_width) if self.squash else DiagonalGaussian(mean, log_std)

    @property
    def log_std(self) -> Tensor:
        """Log standard deviation, of what is learned: itself, or the standard deviation."""
        return self.spread.clamp(min=1e-6).log() if self.scalar_std else self.spread


def head_for(space: gymnasium.Space, width: int, network: Network) -> nn.Module:
    """The distribution head of an action space."""
    return (
        GaussianHead(space, width, network) if isinstance(space, spaces.Box) else CategoricalHead(space, width, network)
    )


def _linear(inputs: int, outputs: int, *, gain: float, orthogonal: bool) -> nn.Linear:
    layer = Linear(inputs, outputs)
    if orthogonal:
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


def _flat_width(space: gymnasium.Space) -> int:
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return math.prod(space.shape or ())


def _vector(space: gymnasium.Space) -> Callable[[Tensor], Tensor]:
    """Makes a leaf a vector per step, one-hot where discrete: [B, T, ...] -> [B, T, width]."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = [int(space.n)] if isinstance(space, spaces.Discrete) else [int(n) for n in space.nvec.reshape(-1)]
        return lambda x: torch.cat(
            [nn.functional.one_hot(i, n) for i, n in zip(_columns(x), sizes, strict=True)], -1
        ).float()
    return lambda x: x.flatten(2) if x.dim() > 2 else x[..., None]


def _columns(x: Tensor) -> tuple[Tensor, ...]:
    return x[..., None].flatten(2).unbind(dim=-1)
