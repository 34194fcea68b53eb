"""Actor-critics for observations of any supported space: MLP, CNN, recurrent; one distribution head per action space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import torch
from gymnasium import spaces
from torch import Tensor, nn

from understudy.control.config import NetworkConfig
from understudy.control.envs.spaces import (
    MASK_KEY,
    OBS_KEY,
    channels_last,
    feature_spaces,
    half_width,
    image_size,
    is_image,
)
from understudy.distribution import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    SquashedGaussian,
    StateNoiseGaussian,
)
from understudy.fast.linear import Linear, Tanh

ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU, "elu": nn.ELU}


class ActorCriticNetwork(nn.Module):
    """`network(obs) -> distribution, value [B, T]`; with memory, `network(obs, state, start) -> ..., state [B, S]`.

    obs: a Tensor [B, T, ...] or a dict of them; `action_mask` among them limits the distribution and is not a feature.
    """

    def __init__(self, observation_space: gymnasium.Space, action_space: gymnasium.Space, cfg: NetworkConfig) -> None:
        super().__init__()
        self.actor = FeatureExtractor(observation_space, cfg)
        self.critic = None if cfg.shared else FeatureExtractor(observation_space, cfg)
        self.head = make_head(action_space, self.actor.width, cfg)
        self.value = _make_linear(self.actor.width, 1, gain=1.0, orthogonal=cfg.orthogonal)
        self.state_size = 0 if cfg.rnn_type == "none" else self.actor.state_size * (1 if cfg.shared else 2)

    def forward(self, obs: Any, state: Tensor | None = None, start: Tensor | None = None) -> Any:
        obs = obs if isinstance(obs, dict) else {OBS_KEY: obs}
        if state is not None:
            return self._forward_recurrent(obs, state, start)
        actor = self.actor(obs)
        critic = actor if self.critic is None else self.critic(obs)
        return self.head(actor, obs.get(MASK_KEY)), self.value(critic)[..., 0]

    def forward_value(self, obs: Any) -> Tensor:
        """V(obs) alone, [B, T]; without memory."""
        return self.value((self.critic or self.actor)(obs if isinstance(obs, dict) else {OBS_KEY: obs}))[..., 0]

    def _forward_recurrent(self, obs: dict[str, Tensor], state: Tensor, start: Tensor | None) -> Any:
        assert start is not None
        size = self.actor.state_size
        actor, final_state = self.actor.forward_recurrent(obs, state[:, :size], start)
        critic = actor
        if self.critic is not None:
            critic, critic_final_state = self.critic.forward_recurrent(obs, state[:, size:], start)
            final_state = torch.cat([final_state, critic_final_state], dim=1)
        return self.head(actor, obs.get(MASK_KEY)), self.value(critic)[..., 0], final_state


class FeatureExtractor(nn.Module):
    """Observation to features: images through a CNN, everything else flat; an MLP; a GRU or LSTM at the end."""

    def __init__(self, observation_space: gymnasium.Space, cfg: NetworkConfig) -> None:
        super().__init__()
        entry_spaces = feature_spaces(observation_space)
        images = {name: space for name, space in entry_spaces.items() if is_image(space)}
        nets = [Cnn(space.shape, orthogonal=cfg.orthogonal) for space in images.values() if space.shape]
        self.cnn, self.image_names = nn.ModuleList(nets), list(images)
        flat = {name: space for name, space in entry_spaces.items() if name not in images}
        self.vector_encoders = {name: _make_vector_encoder(space) for name, space in flat.items()}
        width = sum(net.width for net in nets) + sum(_flat_width(space) for space in flat.values())
        layers: list[nn.Module] = []
        for hidden in cfg.hidden:
            layers += [
                _make_linear(width, hidden, gain=math.sqrt(2), orthogonal=cfg.orthogonal),
                ACTIVATIONS[cfg.activation](),
            ]
            width = hidden
        self.mlp = nn.Sequential(*layers)
        self.memory = None if cfg.rnn_type == "none" else RecurrentLayer(width, cfg.rnn_hidden_size, cfg.rnn_type)
        self.width = width if self.memory is None else cfg.rnn_hidden_size
        self.state_size = 0 if self.memory is None else self.memory.state_size

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts = [encode(obs[name]) for name, encode in self.vector_encoders.items()]
        parts += [net(obs[name]) for name, net in zip(self.image_names, self.cnn, strict=True)]
        return self.mlp(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    def forward_recurrent(self, obs: dict[str, Tensor], state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        assert self.memory is not None
        return self.memory(self.forward(obs), state, start)


class Cnn(nn.Module):
    """uint8 images [B, T, *shape] to features [B, T, width]; scaled to [0, 1] here (Mnih et al. 2015 from 36 pixels on).

    The shape says where the channels are: [H, W]; [H, W, C] where the last dimension is the smallest; [C, H, W] otherwise.
    A stack of colour images, [K, H, W, C], is K * C channels.
    """

    def __init__(self, shape: tuple[int, ...], *, orthogonal: bool) -> None:
        super().__init__()
        self.num_dims = len(shape)
        self.is_channels_last = channels_last(shape)
        height, width = image_size(shape)
        channels = math.prod(shape) // (height * width)
        is_large = min(height, width) >= 36
        conv_specs = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)] if is_large else [(16, 3, 1, 1), (32, 3, 2, 1)]
        layers: list[nn.Module] = []
        for out_channels, kernel, stride, padding in conv_specs:
            layer = nn.Conv2d(channels, out_channels, kernel, stride, padding)
            if orthogonal:
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
            layers += [layer, nn.ReLU()]
            channels = out_channels
        self.net = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            self.width = self.net(torch.zeros(1, self.net[0].in_channels, height, width)).shape[1]  # pyright: ignore

    def forward(self, image: Tensor) -> Tensor:
        batch_shape, shape = image.shape[: -self.num_dims], image.shape[-self.num_dims :]
        image = image.reshape(-1, *shape).float() / 255
        if self.is_channels_last:
            image = image.movedim(-1, -3)
        height, width = image.shape[-2:]
        return self.net(image.reshape(image.shape[0], -1, height, width)).reshape(*batch_shape, self.width)


class RecurrentLayer(nn.Module):
    """A GRU or LSTM over rows [B, T, F] whose state is zeroed where an episode starts.

    Rows are cut at their starts into sequences of their own, run side by side, and laid back: one pass, whatever the ends.
    """

    def __init__(self, width: int, hidden_size: int, rnn_type: Literal["gru", "lstm"]) -> None:
        super().__init__()
        self.rnn = (nn.GRU if rnn_type == "gru" else nn.LSTM)(width, hidden_size, batch_first=True)
        self.is_lstm = rnn_type == "lstm"
        self.state_size = hidden_size * (2 if self.is_lstm else 1)

    def forward(self, x: Tensor, state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, F], state [B, S] before column 0, start [B, T] -> features [B, T, size], state after column T-1."""
        num_rows, num_steps = start.shape
        column = torch.arange(num_steps, device=x.device)
        is_start = start.clone()
        is_start[:, 0] = True
        sequence = is_start.flatten().cumsum(0).reshape(num_rows, num_steps) - 1
        position = column - torch.where(is_start, column, 0).cummax(dim=1).values
        lengths = torch.bincount(sequence.flatten())
        padded = x.new_zeros(len(lengths), int(lengths.max()), x.shape[2])
        padded[sequence, position] = x
        initial_state = x.new_zeros(len(lengths), self.state_size)
        initial_state[sequence[:, 0]] = torch.where(start[:, :1], 0.0, state)
        hidden = (
            initial_state[None]
            if not self.is_lstm
            else tuple(h.contiguous() for h in initial_state[None].chunk(2, dim=2))
        )
        packed = nn.utils.rnn.pack_padded_sequence(padded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, final_state = self.rnn(packed, hidden)
        output, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        final_state = torch.cat(final_state, dim=2) if self.is_lstm else final_state
        return output[sequence, position], final_state[0][sequence[:, -1]]


class CategoricalHead(nn.Module):
    """Discrete, MultiDiscrete and MultiBinary: logits, and which of them are allowed."""

    def __init__(self, space: gymnasium.Space, width: int, cfg: NetworkConfig) -> None:
        super().__init__()
        self.sizes: tuple[int, ...] = ()
        self.num_bits = 0
        if isinstance(space, spaces.MultiDiscrete):
            self.sizes = tuple(int(n) for n in space.nvec.reshape(-1))
        elif isinstance(space, spaces.MultiBinary):
            self.num_bits = math.prod(space.shape)
        num_outputs = sum(self.sizes) or self.num_bits or int(space.n)  # pyright: ignore
        self.logits = _make_linear(width, num_outputs, gain=0.01, orthogonal=cfg.orthogonal)

    def forward(self, features: Tensor, allowed: Tensor | None) -> Distribution:
        logits = self.logits(features)
        if self.num_bits:
            return self._multi_binary(logits, allowed)
        return MultiCategorical.of(logits, self.sizes, allowed) if self.sizes else Categorical.of(logits, allowed)

    def _multi_binary(self, logits: Tensor, allowed: Tensor | None) -> Distribution:
        if allowed is None:
            return Bernoulli(logits)
        # a bit is a choice of two, so that either can be forbidden
        logits = torch.stack([torch.zeros_like(logits), logits], dim=-1).flatten(-2)
        return MultiCategorical.of(logits, (2,) * self.num_bits, allowed)


class GaussianHead(nn.Module):
    """Box: a mean from the features, one learned spread per dimension (per feature and dimension with gSDE)."""

    half_width: Tensor

    def __init__(self, space: spaces.Box, width: int, cfg: NetworkConfig) -> None:
        super().__init__()
        size = math.prod(space.shape)
        self.mean = _make_linear(width, size, gain=0.01, orthogonal=cfg.orthogonal)
        self.uses_gsde, self.is_squashed = (cfg.exploration == "gsde"), cfg.squash == "tanh"
        if self.uses_gsde and self.is_squashed:
            raise ValueError("squash is 'tanh' and exploration is 'gsde': choose squash 'clip', or exploration 'held'")
        initial_spread = torch.full((width, size) if self.uses_gsde else (size,), cfg.log_std)
        self.scalar_std = cfg.scalar_std
        self.spread = nn.Parameter(initial_spread.exp() if self.scalar_std else initial_spread)
        self.register_buffer("half_width", half_width(space), persistent=False)

    def forward(self, features: Tensor, allowed: Tensor | None) -> Distribution:
        mean = self.mean(features)
        if self.uses_gsde:  # features detached: exploration noise does not shape them, as in SB3's gSDE
            return StateNoiseGaussian.from_features(mean, features.detach(), self.log_std)
        log_std = self.log_std.expand_as(mean)
        return SquashedGaussian(mean, log_std, self.half_width) if self.is_squashed else DiagonalGaussian(mean, log_std)

    @property
    def log_std(self) -> Tensor:
        """Log standard deviation, of what is learned: itself, or the standard deviation."""
        return self.spread.clamp(min=1e-6).log() if self.scalar_std else self.spread


def make_head(space: gymnasium.Space, width: int, cfg: NetworkConfig) -> nn.Module:
    """The distribution head of an action space."""
    return GaussianHead(space, width, cfg) if isinstance(space, spaces.Box) else CategoricalHead(space, width, cfg)


def _make_linear(num_inputs: int, num_outputs: int, *, gain: float, orthogonal: bool) -> nn.Linear:
    layer = Linear(num_inputs, num_outputs)
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


def _make_vector_encoder(space: gymnasium.Space) -> Callable[[Tensor], Tensor]:
    """Makes a leaf a vector per step, one-hot where discrete: [B, T, ...] -> [B, T, width]."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = [int(space.n)] if isinstance(space, spaces.Discrete) else [int(n) for n in space.nvec.reshape(-1)]
        return lambda x: torch.cat(
            [nn.functional.one_hot(i, n) for i, n in zip(_split_dims(x), sizes, strict=True)], -1
        ).float()
    return lambda x: x.flatten(2) if x.dim() > 2 else x[..., None]


def _split_dims(x: Tensor) -> tuple[Tensor, ...]:
    return x[..., None].flatten(2).unbind(dim=-1)
