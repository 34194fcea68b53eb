"""Networks of one's own whose layers act differently in training mode: one policy samples, learns, acts and is judged."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.testing import assert_close

from tests.foreign_envs import notices
from understudy import load
from understudy.control import actor_critic, ppo, reinforce
from understudy.control.evaluate import evaluate
from understudy.control.policy import Policy
from understudy.distribution import Categorical
from understudy.run.config import RequestError

SEEN = np.linspace(-1, 1, 30, dtype=np.float32).reshape(10, 3)


class Own(nn.Module):
    """A network with a layer that drops, or that normalises by its batch."""

    def __init__(self, layer: nn.Module, memory: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.layer, self.head = nn.Linear(3, 8), layer, nn.Linear(8, 3)

    def forward(self, obs):
        features = self.body(obs)
        out = self.head(self.layer(features.flatten(0, 1)).unflatten(0, features.shape[:2]))
        return Categorical.of(out[..., :2]), out[..., 2]


LAYERS = {"Dropout": lambda: nn.Dropout(0.5), "BatchNorm1d": lambda: nn.BatchNorm1d(8)}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


def config(path, kind=ppo, **fields):
    sizes = {"steps": 40, "num_envs": 2, "log_every": 1000, "quiet": True, "output_dir": str(path)}
    if kind is ppo:
        sizes |= {"num_steps_per_env": 10, "num_epochs": 1, "num_minibatches": 1, "clip": 1e-6, "log_every": 2}
    return kind.Config(env="tests.foreign_envs:TenSteps", **(sizes | fields))


def policy(name: str) -> Policy:
    return Policy(Own(LAYERS[name]()), spaces.Box(-1, 1, (3,)), spaces.Discrete(2))


@EVERY_LAYER
def test_the_update_sees_the_policy_that_acted(tmp_path, name):
    run = ppo.train(config(tmp_path, learning_rate=1e-12), policy=Own(LAYERS[name]()))

    assert run.metrics[0]["clip_fraction"] == 0 and run.metrics[0]["ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("recipe", [ppo, actor_critic, reinforce])
def test_every_recipe_trains_in_evaluation_mode(tmp_path, recipe):
    own = Own(nn.BatchNorm1d(8))
    recipe.train(config(tmp_path, recipe), policy=own)

    assert int(own.layer.num_batches_tracked) == 0 and not own.training  # pyright: ignore


@EVERY_LAYER
def test_act_is_the_same_every_time_and_changes_nothing(name):
    own = policy(name)
    before = {key: x.clone() for key, x in own.state_dict().items()}
    own.network.train()  # a network of one's own may be put into training mode behind the policy's back
    own.act(SEEN)

    first = own(torch.from_numpy(SEEN)[:, None])[1]
    own.act(SEEN)

    assert_close(own(torch.from_numpy(SEEN)[:, None])[1], first, rtol=0, atol=0)
    assert_close(own.state_dict(), before, rtol=0, atol=0)


@EVERY_LAYER
def test_a_loaded_policy_is_in_evaluation_mode(tmp_path, name):
    own = policy(name)
    own.save(tmp_path)

    loaded = Policy.load(tmp_path, network=Own(LAYERS[name]()).train())

    assert not loaded.network.training and not loaded.network.layer.training
    assert_close(loaded(torch.from_numpy(SEEN)[:, None])[1], own(torch.from_numpy(SEEN)[:, None])[1], rtol=0, atol=0)


@EVERY_LAYER
def test_evaluation_is_the_same_every_time(tmp_path, name):
    own = policy(name).train()

    assert evaluate(own, config(tmp_path), num_episodes=4) == evaluate(own, config(tmp_path), num_episodes=4)


@EVERY_LAYER
def test_a_run_says_which_layers_stay_in_evaluation_mode(tmp_path, name):
    run = ppo.train(config(tmp_path), policy=Own(LAYERS[name]()))

    (text,) = notices(run)
    assert text.startswith(f"the network has {name}: it stays in evaluation mode")


def test_a_recurrent_layer_stays_in_the_mode_in_which_it_can_learn():
    layers = nn.ModuleList([nn.GRU(2, 2), nn.LSTM(2, 2, num_layers=2, dropout=0.5), nn.Dropout()])
    own = Policy(layers, spaces.Box(-1, 1, (3,)), spaces.Discrete(2))

    assert [layer.training for layer in layers] == [True, False, False]
    assert own.layers_held_in_eval_mode == ["Dropout", "LSTM"]


def test_our_own_networks_have_no_such_layer(tmp_path):
    ppo.train(config(tmp_path))

    assert load(tmp_path).layers_held_in_eval_mode == []


class Says(nn.Module):
    """A network that answers whatever `says` makes of logits [B, T, 3], V [B, T] and the observation."""

    def __init__(self, says) -> None:
        super().__init__()
        self.body, self.says = nn.Linear(3, 4), says

    def forward(self, obs):
        out = self.body(obs["obs"] if isinstance(obs, dict) else obs)
        return self.says(out[..., :3], out[..., 3], obs)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (lambda logits, v, _: (Categorical(logits), v), r"probabilities do not sum to 1: make it with Categorical\.of"),
        (lambda logits, v, _: (torch.distributions.Categorical(logits=logits), v), "without noise, action_from_noise"),
        (
            lambda logits, v, _: (Categorical.of(logits), v[..., None]),
            r"value of shape \[1, 1, 1\] .* \[B, T\], \[1, 1\]",
        ),
        (lambda logits, v, _: Categorical.of(logits), "returns Categorical: must return distribution, value"),
        (lambda logits, v, _: logits @ v, r"raises RuntimeError when it is called with observations \[1, 1, 3\]"),
    ],
)
def test_an_answer_that_no_recipe_can_use_is_refused(says, words):
    own = Policy(Says(says), spaces.Box(-1, 1, (3,)), spaces.Discrete(3))

    with pytest.raises(RequestError, match=words):
        own.act(np.zeros(3, dtype=np.float32))


def test_a_network_that_ignores_the_mask_is_refused_and_one_that_obeys_acts():
    def masked(logits, v, obs):
        return Categorical.of(logits, obs["action_mask"]), v

    seen, spaces_of = np.zeros(3, dtype=np.float32), (spaces.Box(-1, 1, (3,)), spaces.Discrete(3))
    own = Policy(Says(lambda logits, v, _: (Categorical.of(logits), v)), *spaces_of)

    own.act(seen, action_mask=[1, 1, 1])  # nothing is forbidden yet
    with pytest.raises(RequestError, match=r"to an action that the mask forbids: .* obs\['action_mask'\]"):
        own.act(seen, action_mask=[0, 1, 0])
    assert Policy(Says(masked), *spaces_of).act(seen, action_mask=[0, 1, 0]) == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_first_call_that_runs_out_of_memory_is_not_the_networks_fault(error):
    def raises(*_):
        raise error

    with pytest.raises(type(error)) as found:
        Policy(Says(raises), spaces.Box(-1, 1, (3,)), spaces.Discrete(3)).act(np.zeros(3, dtype=np.float32))
    assert found.value is error


def test_a_class_in_the_place_of_a_network_is_refused(tmp_path):
    cfg = ppo.Config(env="CartPole-v1", steps=8, num_envs=1, num_steps_per_env=8, output_dir=str(tmp_path / "run"))

    with pytest.raises(RequestError, match=r"^policy is .*Linear.*, which is no torch.nn.Module: .* Linear\(\)$"):
        ppo.train(cfg, policy=torch.nn.Linear)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()
