"""Set before the libraries that read them are imported: tests need no network, and two threads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def global_seed():
    """Tests draw from explicit generators; what libraries draw globally is at least the same in every order."""
    torch.manual_seed(0)
