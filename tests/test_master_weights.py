"""AdamW in half precision: small steps add up in float32 copies, which the optimizer saves; float32 is as it was."""

import copy
import shutil

import pytest
import torch
from torch import nn

from tests.rehearsed import furnish, sft_config
from understudy.language import sft
from understudy.language.model.optimizer import AdamW
from understudy.run.checkpoint import load_tensors
from understudy.run.resume import resume


def stepped(kind, dtype, count, *, state=None, begin=1.0, lr=1e-4):
    """A parameter and its optimizer after so many steps whose gradients have a sign of their own each."""
    parameter = nn.Parameter(torch.full((3,), begin, dtype=dtype))
    made = kind([parameter], lr=lr, eps=1e-8, weight_decay=0.0, fused=True)
    if state is not None:
        made.load_state_dict(state)
    for _ in range(count):
        parameter.grad = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
        made.step()
    return parameter, made


def test_small_steps_of_a_half_precision_parameter_add_up():
    # a constant gradient moves by the learning rate: 100 steps of 1e-4 are 0.01. Below 1, bfloat16 has steps of 1/256, and
    # above it of 1/128: 0.99 becomes 253/256, 1.01 becomes 129/128. A single step is lost in both
    parameter, _ = stepped(AdamW, torch.bfloat16, 100)
    lost, _ = stepped(torch.optim.AdamW, torch.bfloat16, 100)

    assert parameter.tolist() == [253 / 256, 129 / 128, 253 / 256]
    assert lost.tolist() == [1.0, 1.0, 1.0]


def test_the_float32_copy_takes_the_steps_of_a_float32_parameter():
    half, optimizer = stepped(AdamW, torch.bfloat16, 7, lr=1e-3)
    whole, _ = stepped(AdamW, torch.float32, 7, lr=1e-3)

    master = optimizer.state[half]["master"]
    assert torch.equal(master, whole.data) and master.dtype == torch.float32
    assert torch.equal(half.data, whole.data.bfloat16())
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_a_float32_parameter_takes_torchs_own_steps():
    ours, optimizer = stepped(AdamW, torch.float32, 5)
    theirs, other = stepped(torch.optim.AdamW, torch.float32, 5)

    assert torch.equal(ours, theirs)
    assert optimizer.state[ours].keys() == other.state[theirs].keys()


def test_a_loaded_state_is_not_rounded_and_goes_on_to_the_bit():
    _, whole = stepped(AdamW, torch.bfloat16, 5)
    half, first = stepped(AdamW, torch.bfloat16, 3)
    state = copy.deepcopy(first.state_dict())

    parameter, again = stepped(AdamW, torch.bfloat16, 0, state=state)
    parameter.data.copy_(half.data)
    for _ in range(2):
        parameter.grad = torch.tensor([1.0, -1.0, 0.5], dtype=torch.bfloat16)
        again.step()

    one, other = again.state[parameter], next(iter(whole.state.values()))
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) and x.dtype == torch.float32 for name, x in one.items())


def test_a_parameter_that_somebody_else_sets_is_stepped_from_where_it_was_set():
    parameter, optimizer = stepped(AdamW, torch.bfloat16, 3)
    parameter.data.fill_(8.0)
    parameter.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer.step()

    assert optimizer.state[parameter]["master"].tolist() == pytest.approx([8.0] * 3, abs=2e-4)


def test_a_run_in_half_precision_goes_on_to_the_bit(tmp_path):
    home = furnish(tmp_path / "home")
    fields = {"dtype": "bfloat16", "learning_rate": 1e-6, "checkpoint_every": 1, "keep_checkpoints": 9}
    whole = sft.train(sft_config(home, tmp_path / "whole", **fields))
    shutil.copytree(whole.path, tmp_path / "again")
    first = sorted((tmp_path / "again" / "checkpoints").iterdir())[0]

    resume(tmp_path / "again", checkpoint=first.name)

    last = max(path.name for path in (whole.path / "checkpoints").iterdir())
    for file in ("policy/model.safetensors", f"checkpoints/{last}/optimizer.safetensors"):
        one, other = (load_tensors(tmp_path / name / file) for name in ("whole", "again"))
        assert all(torch.equal(x, other[name]) for name, x in one.items()), file
    before = load_tensors(home / "model.safetensors")
    masters = [x for name, x in one.items() if name.endswith("master")]
    assert len(masters) == len(before)
    assert all(x.dtype == torch.float32 for x in masters)
