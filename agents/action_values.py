"""Agents that keep a table of action values, and how far it is from the optimal one."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.episodes import model_or_none
from aligngym.agents.error_bounds import error_bound, longest_episode, rounding
from aligngym.agents.tabular_agent import TabularAgent, uniform_over_best
from aligngym.core.spaces import table_shape
from aligngym.envs.tabular_mdp import TabularMDP


class ActionValueAgent(TabularAgent):
    """An agent that learns Q* in a table and acts by its best entries.

    Attributes:
        action_values: ``[S, A]``, Q, 0 at first.
        visits: ``[S, A]``, how often each entry has been updated.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        discount: γ in [0, 1].
        tolerance: the certified error at which :attr:`converged` says so.

    Raises:
        TypeError: if the spaces are not of that kind.
        ValueError: for a discount outside [0, 1].
    """

    def __init__(self, env: gymnasium.Env, discount: float, tolerance: float) -> None:
        shape = table_shape(env)
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount is between 0 and 1, not {discount}")
        self.env, self.discount, self.tolerance = env, discount, tolerance
        self.action_values = np.zeros(shape)
        self.visits = np.zeros(shape, dtype=np.int64)

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, uniform over the actions of the highest value: the greedy policy, without ε."""
        return uniform_over_best(self.action_values)

    @property
    def values(self) -> NDArray[np.float64]:
        """``[S]``, max_a Q(s, a)."""
        return self.action_values.max(axis=1)

    @cached_property
    def model(self) -> TabularMDP | None:
        """The environment's exact model, if it has one; nothing is learned from it, it only judges."""
        return model_or_none(self.env)

    @cached_property
    def _longest_episode(self) -> float:
        return math.inf if self.model is None else longest_episode(self.model)

    @property
    def error_bound(self) -> float | None:
        """A certified bound of ‖max_a Q(·, a) − V*‖∞ over all states; ``None`` if the environment shows no exact model.

        It follows from the residual ‖TV − V‖∞ of V(s) = max_a Q(s, a), T being the exact Bellman optimality operator
        (see :mod:`aligngym.agents.error_bounds`): at most residual / (1 − γ), and infinite where γ = 1 allows no proof.
        It costs a sweep over the model each time it is read. States that are never visited count too.
        """
        if self.model is None:
            return None
        values = np.zeros(self.model.num_states)
        values[: len(self.action_values)] = self.values
        values[self.model.terminal] = 0.0
        better = self.model.action_values(values, self.discount).max(axis=1)
        residual = float(np.abs(better - values).max()) + rounding(self.model, values, self.discount)
        return error_bound(self.model, values, residual, self.discount, self._longest_episode)

    @property
    def converged(self) -> bool | None:
        """Whether the error bound is within the tolerance; ``None`` if nobody can know, for want of a model."""
        bound = self.error_bound
        return None if bound is None else bound <= self.tolerance

    def state_dict(self) -> dict[str, Any]:
        """Return the table and the visit counts."""
        return {"action_values": self.action_values.copy(), "visits": self.visits.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if the table has another shape.
        """
        if state["action_values"].shape != self.action_values.shape:
            raise ValueError(f"a saved table of {state['action_values'].shape}, and this is {self.action_values.shape}")
        self.action_values, self.visits = state["action_values"].copy(), state["visits"].copy()
