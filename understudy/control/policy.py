"""The policy of the control world: a network with its spaces and its scales, complete in itself once saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from understudy.control import own_network
from understudy.control.config import NetworkConfig
from understudy.control.envs.masks import validate_mask
from understudy.control.envs.spaces import (
    MASK_KEY,
    add_batch_dim,
    all_forbidden,
    check_action_space,
    checked_batch,
    feature_spaces,
    is_image,
    read_obs,
    resolve_squash,
    space_from_json,
    space_to_json,
    to_env_action,
)
from understudy.control.networks import ActorCriticNetwork
from understudy.control.normalize import ObsNormalizer, RewardNormalizer
from understudy.run.checkpoint import CorruptFileError, find_nonfinite, load_tensors, read_shapes
from understudy.run.config import RequestError, check_fields
from understudy.run.store import SCHEMA, holds_no_policy, read_versioned_json, recipe_of
from understudy.sample import sample_action

WEIGHTS = "policy.safetensors"
MAX_LAYERS, MAX_WIDTH = 64, 2**20  # of a network that a file describes


class Policy(nn.Module):
    """`policy(obs) -> distribution, value`; with memory, `policy(obs, state, start) -> distribution, value, state`.

    It is always in evaluation mode, in the update too: with dropout, or with batch normalisation by the statistics of a
    minibatch, the update would see another policy than the one that acted.

    Args:
        network: an `ActorCritic`, or any module with the same call; one with memory has `state_size` > 0.
        squash: how a Box action gets to its bounds: "auto", "clip", "scale" or "tanh".
        scale_obs: keep a running scale of float observations.
        scale_reward: the gamma of a running scale of rewards; None for rewards as they are.

    Attributes:
        has_action_mask: it was trained with masks that are no part of its observations; `act` then asks for one.
        proved: answers of a user's own network were looked at, and are what a recipe needs.
    """

    def __init__(
        self,
        network: nn.Module,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        squash: str = "auto",
        scale_obs: bool = False,
        scale_reward: float | None = None,
    ) -> None:
        super().__init__()
        check_action_space(action_space)
        self.network, self.squash = network, resolve_squash(action_space, squash)
        self.network_config: dict[str, Any] | None = None
        self.has_action_mask = self.proved = False
        self.state_size: int = getattr(network, "state_size", 0)
        self.needs_whole_rows = self.state_size > 0
        self.observation_space, self.action_space = observation_space, action_space
        self.obs_scale = ObsNormalizer(normalized_shapes(observation_space)) if scale_obs else None
        self.reward_scale = None if scale_reward is None else RewardNormalizer(scale_reward)
        self.eval()

    @classmethod
    def build(
        cls,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        network_config: NetworkConfig,
        *,
        seed: int,
        **normalizer_options: Any,
    ) -> Policy:
        """A policy with fresh weights that depend on nothing but `seed`."""
        check_action_space(action_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ActorCriticNetwork(observation_space, action_space, network_config)
        policy = cls(network, observation_space, action_space, squash=network_config.squash, **normalizer_options)
        policy.network_config = {
            field.name: getattr(network_config, field.name) for field in dataclasses.fields(NetworkConfig)
        }
        policy.network_config["squash"] = policy.squash
        return policy

    def train(self, mode: bool = True) -> Policy:
        """Stay in evaluation mode; recurrent layers without dropout stay in training mode, which cuDNN's backward needs."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, nn.RNNBase) and not module.dropout:
                module.train()
        return self

    @property
    def layers_held_in_eval_mode(self) -> list[str]:
        """The kinds of layers in the network that would act differently in training mode."""
        layer_types = (_DropoutNd, _NormBase, nn.RNNBase)
        layers = [layer for layer in self.network.modules() if isinstance(layer, layer_types)]
        return sorted({type(layer).__name__ for layer in layers if not isinstance(layer, nn.RNNBase) or layer.dropout})

    def initial_state(self, num_rows: int) -> Tensor | None:
        """The state before an episode, [rows, S]; None without memory."""
        return torch.zeros(num_rows, self.state_size, device=self.device) if self.needs_whole_rows else None

    @property
    def keeps_float64(self) -> bool:
        """Whether observations that float32 cannot hold are to be read as float64: they are scaled before they are cast."""
        return self.obs_scale is not None

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the network reads."""
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, obs: Any, state: Tensor | None = None, start: Tensor | None = None) -> Any:
        obs = obs if self.obs_scale is None else self.obs_scale(obs, self.dtype)
        given = (obs, state, start) if self.needs_whole_rows else (obs,)
        return self.network(*given) if self.proved or self.network_config is not None else self._examined(*given)

    def _examined(self, *given: Any) -> Any:
        """The answer of a user's own network, looked at until it is known to be what a recipe needs."""
        found, self.proved = own_network.call_and_check(self.network, given, self.action_space)
        return found

    def value(self, obs: Any) -> Tensor:
        """V(obs) alone, [B, T]; of a network of ours without memory."""
        network: Any = self.network
        return network.forward_value(obs if self.obs_scale is None else self.obs_scale(obs, self.dtype))

    def normalize_reward(self, reward: Tensor) -> Tensor:
        """Rewards as the critic learns them: scaled where the policy has a scale. [B, T]."""
        return reward if self.reward_scale is None else self.reward_scale(reward)

    def update_normalizers(self, trajectory: Any) -> None:
        """Add a record's chosen steps to the running scales; to be called once a record, after its update."""
        for normalizer in filter(None, (self.obs_scale, self.reward_scale)):
            normalizer.update(trajectory)

    def to_env_action(self, action: np.ndarray) -> np.ndarray:
        """What the environment receives for actions [B, ...] as the distribution sampled them."""
        return to_env_action(self.action_space, action, self.squash)

    def act(
        self,
        obs: Any,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        state: Tensor | None = None,
        start: Any = None,
        action_mask: Any = None,
    ) -> Any:
        """The action for an observation: numpy in, numpy out, batched or not, valid in the action space.

        Args:
            obs: as the environment gives it, unnormalised; with or without a batch dimension.
            sample: draw from the distribution; otherwise its mode.
            state: with memory, what the last call returned; None at the start.
            start: with memory, True where an episode begins, per row.
            action_mask: as `info["action_mask"]` or `action_masks()` gives it, one a row for a batch; True allows all.

        Returns:
            The action; a policy with memory returns (action, state).

        Raises:
            ValueError: the policy was trained with action masks and none is given; the mask, or the observation, does not
                fit.
        """
        if action_mask is None and self.has_action_mask:
            raise ValueError(
                "action_mask is missing, and this policy was trained with action masks: give "
                'info["action_mask"] or what action_masks() returns, or True to allow every action'
            )
        self.eval()  # whatever mode the user's own network was put in meanwhile
        has_batch_dim = checked_batch(self.observation_space, obs)
        obs = obs if has_batch_dim else add_batch_dim(self.observation_space, obs)
        mask = None if action_mask is None or action_mask is True else action_mask
        if mask is not None:
            mask = np.stack([validate_mask(self.action_space, row) for row in (mask if has_batch_dim else [mask])])
        tree = read_obs(self.observation_space, obs, mask, keep_float64=self.keeps_float64)
        num_rows = len(next(iter(tree.values())) if isinstance(tree, dict) else tree)
        obs_column = (
            {k: v[:, None].to(self.device) for k, v in tree.items()}
            if isinstance(tree, dict)
            else tree[:, None].to(self.device)
        )
        if (
            isinstance(obs_column, dict)
            and MASK_KEY in obs_column
            and all_forbidden(self.action_space, obs_column[MASK_KEY]).any()
        ):
            raise ValueError("action_mask allows no action: allow at least one, in every dimension")
        is_start = torch.zeros(num_rows, 1, dtype=torch.bool, device=self.device)
        if start is not None:
            is_start |= torch.as_tensor(start, dtype=torch.bool, device=self.device).reshape(-1, 1)
        state = self.initial_state(num_rows) if state is None else state
        choice = sample_action(self, obs_column, state, is_start, generator=generator, sample=sample)
        action = self.to_env_action(choice.action.cpu().numpy())
        action = action if has_batch_dim else action[0]
        return (action, choice.state) if self.needs_whole_rows else action

    def save(self, path: Path) -> None:
        """Write `policy.json` and `policy.safetensors` into a directory."""
        path.mkdir(parents=True, exist_ok=True)
        metadata = {
            "schema": SCHEMA,
            "world": "control",
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "squash": self.squash,
            "scale_obs": self.obs_scale is not None,
            "scale_reward": None if self.reward_scale is None else self.reward_scale.gamma,
            "has_action_mask": self.has_action_mask,
            "network": self.network_config,
        }
        # clones: a network of one's own may share a weight between layers, which safetensors refuses
        weights = {name: x.detach().cpu().contiguous().clone() for name, x in self.state_dict().items()}
        save_file(weights, path / WEIGHTS)
        (path / "policy.json").write_text(json.dumps(metadata, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path, network: nn.Module | None = None) -> Policy:
        """Read what `save` wrote. A policy around a network of one's own needs that `network` again.

        Raises:
            RequestError: that network is missing, the weights do not fit or are not finite, or what is there is no policy.
        """
        metadata = read_versioned_json(path / "policy.json", f"policy is '{path}', which holds no readable policy.json")
        if metadata.get("network") is None and network is None:
            raise RequestError(
                f"policy is missing: '{path}' holds weights of a network of your own, which is needed again: "
                f"understudy.load({str(path)!r}, policy=my_network), or --policy my_net.py:MyNet in evaluate, "
                "show and resume; a new run begins from it in Python, train(cfg, policy=understudy.load(...))"
            )
        network = network.network if isinstance(network, Policy) else network
        if network is not None:
            require_module(network)
        weights = path / WEIGHTS
        weights_owner = "its policy.json" if network is None else "the network given"
        try:
            normalizer_options = {"scale_obs": bool(metadata["scale_obs"]), "scale_reward": metadata["scale_reward"]}
            policy_spaces = space_from_json(metadata["observation_space"]), space_from_json(metadata["action_space"])
            if network is None:
                network_config = _parse_network_config(metadata["network"])
                with torch.device("meta"):  # no file is believed about sizes that its own weights do not have
                    check_shapes(
                        read_shapes(weights), cls.build(*policy_spaces, network_config, seed=0, **normalizer_options)
                    )
                policy = cls.build(*policy_spaces, network_config, seed=0, **normalizer_options)
            else:
                policy = cls(network, *policy_spaces, squash=metadata["squash"], **normalizer_options)
                check_shapes(read_shapes(weights), policy)
        except CorruptFileError as error:
            raise RequestError(f"policy is '{path}', and {error}: give the directory of a run") from error
        except WeightMismatchError as error:
            raise RequestError(f"{weights} does not fit {weights_owner}: {error}; use its own") from error
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise RequestError(
                f"policy is '{path}', whose policy.json describes none ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:120]}): give the directory of a run"
            ) from error
        load_weights(policy, load_tensors(weights))
        if (name := find_nonfinite(policy)) is not None:
            raise RequestError(
                f"policy is '{path}', whose weight {name!r} is not finite, so that it cannot act: give another policy, such "
                "as that of a checkpoint"
            )
        policy.has_action_mask = metadata.get("has_action_mask") is True
        return policy


def normalized_shapes(observation_space: gymnasium.Space) -> dict[str, tuple[int, ...]]:
    """The shapes of the entries that `scale_obs` scales: every Box that is no image."""
    boxes = {name: leaf for name, leaf in feature_spaces(observation_space).items() if isinstance(leaf, spaces.Box)}
    return {name: tuple(leaf.shape) for name, leaf in boxes.items() if not is_image(leaf)}


class WeightMismatchError(ValueError):
    """Weights of other names or shapes than the policy's."""


def _parse_network_config(data: dict[str, Any]) -> NetworkConfig:
    """The network that a file describes, its values checked; how many layers it has, too."""
    if len(data["hidden"]) > MAX_LAYERS:
        raise ValueError(f"hidden has {len(data['hidden']):,} layers: at most {MAX_LAYERS} are read")
    fields: dict[str, Any] = data | {"hidden": tuple(data["hidden"])}
    network_config = NetworkConfig(**fields)
    check_fields(network_config)
    if max((*network_config.hidden, network_config.rnn_hidden_size)) > MAX_WIDTH:
        raise ValueError(
            f"hidden is {network_config.hidden}, rnn_hidden_size {network_config.rnn_hidden_size}: at most "
            f"{MAX_WIDTH} is read"
        )
    return network_config


def check_shapes(shapes: dict[str, tuple[int, ...]], policy: Policy) -> None:
    """Refuse weights of these names and shapes where the policy's are others.

    Raises:
        Unfit: they are.
    """
    policy_shapes = {name: tuple(x.shape) for name, x in policy.state_dict().items()}
    mismatched = sorted(
        name for name in shapes.keys() | policy_shapes.keys() if shapes.get(name) != policy_shapes.get(name)
    )
    if mismatched:
        raise WeightMismatchError(f"{', '.join(mismatched[:8])} differ")


def load_weights(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Put weights into a policy.

    Raises:
        Unfit: names or shapes differ.
    """
    check_shapes({name: tuple(x.shape) for name, x in weights.items()}, policy)
    policy.load_state_dict(weights)


def require_module(policy: Any) -> None:
    """Refuse what is no network.

    Raises:
        RequestError: it is a class, a function or anything else than a torch.nn.Module.
    """
    if not isinstance(policy, nn.Module):
        name = getattr(policy, "__name__", "MyNet")
        raise RequestError(f"policy is {policy!r}, which is no torch.nn.Module: give a network, such as {name}()")


def policy_path(path: Path, field: str) -> Path:
    """The policy's directory, given it or its run's.

    Raises:
        RequestError: neither holds a policy.
    """
    for candidate in (path, path / "policy"):
        if candidate != path and candidate.is_symlink():
            raise RequestError(f"{field} is '{path}', whose policy is a link: name the directory it leads to")
        if (candidate / "policy.json").is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    if (path / "policy" / "understudy.json").is_file():
        raise RequestError(
            f"{field} is '{path}', a run of `{recipe_of(path)}`: its policy writes text, and acts nowhere"
        )
    raise RequestError(f"{field} is '{path}', {holds_no_policy(path)}")
