"""Compiling a model: whether a run is long enough to earn it back, and what is compiled besides the layers."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from aligngym.core.callbacks import Callback, Metrics

if TYPE_CHECKING:
    from aligngym.alignment.language_policy import LanguagePolicy
    from aligngym.core.agent import Agent

Function = TypeVar("Function", bound=Callable[..., Any])

#: Seconds that compiling a model's layers takes, and the share of a step that it saves.
COST, SAVED = 20.0, 0.25

#: Iterations whose time says how long the others will take.
TIMED = 5


class Compilation(Callback):
    """Has a policy's layers compiled if what is left of a run on a GPU is long enough for it.

    Args:
        policy: what to compile.
    """

    def __init__(self, policy: LanguagePolicy) -> None:
        self._policy = policy

    def on_start(self, agent: Agent, iterations: int | None) -> None:
        self._left = math.inf if iterations is None else iterations
        self._times: deque[float] = deque(maxlen=TIMED)
        self._last = time.perf_counter()

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        now = time.perf_counter()
        self._times.append(now - self._last)
        self._last, self._left = now, self._left - 1
        if self._policy.compiled or self._policy.device.type != "cuda" or len(self._times) < TIMED:
            return
        if self._left * statistics.median(self._times) * SAVED > COST:
            self._policy.compile_layers()


def constant_numbers(active: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a model's own numbers, such as the ε of a norm, are constants to torch's compiler.

    As it is set, it takes them for numbers that change, finds out that they do not, and begins anew, which doubles what
    it takes. Without ``active`` nothing happens.
    """
    return torch._dynamo.config.patch(specialize_float=True) if active else contextlib.nullcontext()


@functools.cache
def compiled(function: Function) -> Function:
    """Return a function compiled for all lengths, once for all who ask."""
    return cast(Function, torch.compile(function, dynamic=True))
