"""Devices that a run asks for: those of this machine are taken, others refused before anything is made."""

import pytest
import torch

from understudy.run.config import RequestError
from understudy.run.device import check_device


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_device_that_is_here_is_taken(name):
    check_device(name)


@pytest.mark.parametrize("name", ["", "banana", "meta", "cpu:x", "cuda:99", "mps", "cuda:-1"])
def test_a_device_that_is_not_here_is_refused_with_its_name(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")

    with pytest.raises(RequestError, match=f"^device is '{name}', which is not here .*: try cpu$"):
        check_device(name)
