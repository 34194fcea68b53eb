"""Every test runs on one thread and without a network: the same numbers everywhere, and no surprise downloads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
