"""Randomness that is a function of named numbers, so that nothing has to be remembered to repeat it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def derived_seed(*numbers: int) -> int:
    """Return a 32-bit seed from several numbers, such as a run's seed and an iteration."""
    # Their count is part of the seed, because a SeedSequence does not see zeros at the end.
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed torch's global generators for a block, for dropout and for libraries that draw from them; restore after."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived_seed(*numbers))
        yield


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let a module draw no random numbers for a block, such as those of dropout."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
