"""Every test runs on one thread and without a network: the same numbers everywhere, and no surprise downloads."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="understudy-state-")  # the key that tests sign with is no user's

import torch

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)
