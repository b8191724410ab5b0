"""One thread, since the matrices are tiny, and no hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
