"""Value iteration in place, in the order that makes it fast."""

from __future__ import annotations

from functools import cached_property

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.dynamic_programming import DynamicProgramming
from aligngym.agents.error_bounds import expected_steps, lowest_values
from aligngym.agents.sweep_order import SweepOrder, order_by_distance
from aligngym.agents.sweeps import sweep
from aligngym.core.callbacks import Metrics
from aligngym.envs.tabular_mdp import TabularMDP


class GaussSeidelValueIteration(DynamicProgramming):
    """Repeat V(s) ← max_a r(s, a) + γ Σ_s' p(s' | s, a) V(s') in place, each state with the newest values of others.

    An iteration is one sweep, from the states nearest to the end outwards: values spread from there, so a sweep takes
    them as far as chance does not throw an episode back. Every sweep goes the same way; half of the sweeps of
    alternating ones would go against the stream. With γ < 1, V begins at a lower bound of V*, and rises. A state whose
    neighbours are still too low is then not misled by them, as it would be by optimistic zeros.

    The error shrinks by γ or more with every sweep. M. Puterman, *Markov Decision Processes*, 1994, section 6.3.3;
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 4.5.

    Args:
        mdp: a model, or an environment that has one.
        discount: γ in [0, 1].
        tolerance: the certified error ‖V − V*‖∞ to stop at.

    Raises:
        TypeError: if an environment has no exact model.
        ValueError: for a bad discount or tolerance, or a discount of 1 where values are infinite.
    """

    unit = "sweep"

    def __init__(self, mdp: TabularMDP | gymnasium.Env, discount: float, tolerance: float = 1e-6) -> None:
        super().__init__(mdp, discount, tolerance)
        self._refuse_unbounded_values()
        self.values = lowest_values(self.mdp, discount)

    def iterate(self) -> Metrics:
        """Sweep once over all states."""
        values = self.values[self._order.states]
        change = self._sweep(values)
        self.values = values[self._order.positions]
        self._judge(change)
        return self._metrics()

    def _sweep(self, values: NDArray[np.float64]) -> float:
        """Improve values, numbered by their position in the order, and return the change of the last sweep."""
        return sweep(values, values, self._order.rows, self.discount)

    @cached_property
    def _order(self) -> SweepOrder:
        return order_by_distance(self.mdp)

    @cached_property
    def _longest_episode(self) -> float:
        return expected_steps(self.mdp, self.discount)
