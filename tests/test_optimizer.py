"""control/fast/optimizer.py: torch's own steps, to the bit, without torch's compiler."""

import subprocess
import sys

import pytest
import torch

from understudy.control.config import Config
from understudy.control.fast import optimizer

KINDS = [(torch.optim.Adam, optimizer.Adam, {"fused": True}), (torch.optim.Adam, optimizer.Adam, {})]
KINDS += [(torch.optim.RMSprop, optimizer.RMSprop, {"alpha": 0.99})]


def after(kind, **settings):
    """The parameters and the optimizer's state after five steps, one of them without a gradient for the second."""
    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    made = kind(parameters, lr=0.1, eps=1e-5, **settings)
    for step in range(5):
        made.zero_grad(set_to_none=True)
        loss = (parameters[0] ** 2).sum() * (step + 1)
        (loss if step == 2 else loss + parameters[1].exp().sum()).backward()
        made.step()
        if step == 3:
            made.load_state_dict(made.state_dict())
    return [*parameters, *(x for entry in made.state_dict()["state"].values() for x in entry.values())]


@pytest.mark.parametrize(("theirs", "ours", "settings"), KINDS, ids=["Adam, fused", "Adam", "RMSprop"])
def test_steps_are_torchs_own(theirs, ours, settings):
    for mine, other in zip(after(ours, **settings), after(theirs, **settings), strict=True):
        assert torch.equal(mine, other)


def test_no_gradient_is_kept_of_a_step():
    parameter = torch.nn.Parameter(torch.ones(3))
    made = optimizer.Adam([parameter], lr=0.1)
    parameter.sum().backward()
    made.step()
    assert parameter.is_leaf and parameter.grad_fn is None


def test_control_steps_with_the_fused_form():
    cfg = Config(env="CartPole-v1", learning_rate=0.02, adam_eps=1e-4)

    (group,) = optimizer.adam(torch.nn.Linear(2, 1), cfg).param_groups

    assert (group["fused"], group["lr"], group["eps"]) == (True, 0.02, 1e-4)


def test_a_run_starts_without_torchs_compiler(tmp_path):
    run = f"""
import sys
from understudy.control import actor_critic, ppo
fields = dict(env="CartPole-v1", num_envs=2, num_steps_per_env=8, steps=32, quiet=True)
ppo.train(ppo.Config(**fields, output_dir=r"{tmp_path}/ppo"))
actor_critic.train(actor_critic.Config(**fields, optimizer="rmsprop", output_dir=r"{tmp_path}/a2c"))
sys.exit(int("torch._dynamo" in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", run], timeout=120).returncode == 0
