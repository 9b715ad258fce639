"""Drawing from cumulative probabilities, in compiled loops and in Python to the same result."""

from __future__ import annotations

from typing import Any

import numpy as np

from aligngym.core.compilation import compiled


@compiled
def draw(cumulative: Any, generator: np.random.Generator) -> int:
    """Return an index drawn with the given cumulative probabilities; no number is drawn where there is one index only.

    It is the first index whose cumulative probability exceeds a uniform number, found by bisection: what
    :meth:`aligngym.envs.tabular_mdp.TabularMDP.sample` does.
    """
    low, high = 0, len(cumulative) - 1
    threshold = generator.random() if high > 0 else 0.0
    while low < high:
        middle = (low + high) // 2
        if cumulative[middle] <= threshold:
            low = middle + 1
        else:
            high = middle
    return low
