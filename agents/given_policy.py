"""What agents that learn the value of a given policy share, whatever they learn it from."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.episodes import exact_values, model_or_none
from aligngym.agents.tabular_agent import TabularAgent
from aligngym.core.callbacks import Metrics
from aligngym.envs.tabular_mdp import TabularMDP


class GivenPolicy(TabularAgent):
    """An agent that learns V_π of a policy π that it was given, and the exact answer beside it."""

    env: gymnasium.Env
    _policy: NDArray[np.float64]

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, π(a | s), the given policy."""
        return self._policy

    @property
    @abstractmethod
    def values(self) -> NDArray[np.float64]:
        """``[S]``, the estimate of V_π."""

    @cached_property
    def model(self) -> TabularMDP | None:
        """The environment's exact model, if it has one; nothing is learned from it, it only judges."""
        return model_or_none(self.env)

    @cached_property
    def exact_values(self) -> NDArray[np.float64] | None:
        """``[S]``, V_π by one linear solve of the exact model; ``None`` if the environment shows none."""
        return exact_values(self.env, self._policy, self.discount)

    def rms_error(self, weights: ArrayLike | None = None) -> float | None:
        """Return √(Σ_s μ(s) (V(s) − V_π(s))²); ``None`` if the environment shows no exact model.

        Args:
            weights: ``[S]``, proportional to μ(s); uniform over the states that are not terminal if not given.
        """
        if self.exact_values is None or self.model is None:
            return None
        weights = ~self.model.terminal[: len(self._policy)] if weights is None else np.asarray(weights)
        return float(np.sqrt(np.average((self.values - self.exact_values) ** 2, weights=weights)))

    def evaluate(self, *args: Any, greedy: bool = False, **kwargs: Any) -> Metrics:
        """Play episodes, drawing from the given policy; see :meth:`TabularAgent.evaluate`."""
        return super().evaluate(*args, greedy=greedy, **kwargs)
