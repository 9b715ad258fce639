"""Between value iteration and policy iteration."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.error_bounds import rounding
from aligngym.agents.gauss_seidel import GaussSeidelValueIteration
from aligngym.agents.sweeps import Chain, Rows, empty_chain, follow, follow_sweep, improve, rows_of
from aligngym.core.callbacks import Metrics
from aligngym.envs.tabular_mdp import TabularMDP


class ModifiedPolicyIteration(GaussSeidelValueIteration):
    """Evaluate the policy by a few sweeps, improve it by one, and repeat. An iteration is all of these.

    A sweep of evaluation, V(s) ← r(s, π(s)) + γ Σ_s' p(s' | s, π(s)) V(s'), costs a fraction 1/A of one of improvement,
    which is a sweep of value iteration that also yields the next policy. So ``sweeps=0`` is value iteration and
    ``sweeps=math.inf`` policy iteration; what lies between is faster than either. Policies that tie cannot make it run
    in circles, because values are what it goes by. Also called truncated policy iteration. M. Puterman and M. Shin,
    *Modified policy iteration algorithms*, 1978; S. Zhao, *Mathematical Foundations of Reinforcement Learning*,
    section 4.3.

    In place it is the fastest planner here: sweeps in the order of :class:`GaussSeidelValueIteration`, and the chance
    to stay in a state is solved for instead of waited for.

    With γ < 1 it begins at a lower bound of V*, from which V rises to V*. With γ = 1 there may be no such bound and a
    policy that is good for now may never end its episodes; so if a reward is negative, policies are not evaluated then,
    and it is value iteration.

    Args:
        mdp: a model, or an environment that has one.
        discount: γ in [0, 1].
        tolerance: the certified error ‖V − V*‖∞ to stop at.
        sweeps: of evaluation in an iteration, at least 0; infinitely many go on until rounding is all that changes.
        in_place: whether a sweep uses the values that it has just computed, as Gauss and Seidel do; otherwise those of
            the sweep before it, as the textbook's formula has it.

    Raises:
        TypeError: if an environment has no exact model.
        ValueError: for a bad discount, tolerance or number of sweeps, or a discount of 1 where values are infinite.
    """

    unit = "iteration"

    def __init__(
        self,
        mdp: TabularMDP | gymnasium.Env,
        discount: float,
        tolerance: float = 1e-6,
        sweeps: float = 10,
        in_place: bool = True,
    ) -> None:
        super().__init__(mdp, discount, tolerance)
        if not (sweeps >= 0 and (sweeps == math.inf or sweeps == int(sweeps))):
            raise ValueError(f"sweeps is a whole number of evaluation sweeps, at least 0, or math.inf, not {sweeps}")
        self.sweeps, self.in_place = sweeps, in_place
        #: As states are numbered while planning: by position in the order if in place, as in the model otherwise.
        self._actions = np.full(self.mdp.num_states, -1)

    def iterate(self) -> Metrics:
        """Evaluate the policy, if there is one yet, and improve it."""
        if self.in_place:
            return super().iterate()
        values = self.values.copy()
        rows = rows_of(self.mdp)
        if self._evaluates:
            values = self._evaluate(values, np.empty_like(values), rows)
        self.values = np.empty_like(values)
        self._judge(improve(values, self.values, rows, self.discount, self._actions))
        return self._metrics()

    def _sweep(self, values: NDArray[np.float64]) -> float:
        rows = self._order.rows
        if self._evaluates:
            self._evaluate(values, values, rows)
        return improve(values, values, rows, self.discount, self._actions)

    @property
    def actions(self) -> NDArray[np.int64]:
        """``[S]``, the policy that the next iteration evaluates; −1 before the first."""
        return self._actions[self._order.positions] if self.in_place else self._actions

    @property
    def _evaluates(self) -> bool:
        return self.sweeps > 0 and self._actions[0] >= 0 and (self.discount < 1 or self.mdp.rewards.min() >= 0)

    def _evaluate(self, values: NDArray[np.float64], updated: NDArray[np.float64], rows: Rows) -> NDArray[np.float64]:
        """Sweep ``sweeps`` times, or until only rounding is left, and return the array with the result."""
        follow(self._actions, rows, self.discount, self._chain, self.in_place)
        allowance = rounding(self.mdp, values, self.discount)
        done, change = 0, math.inf
        while done < self.sweeps and change > allowance:
            change = follow_sweep(values, updated, self._chain)
            values, updated, done = updated, values, done + 1
        return values

    @cached_property
    def _chain(self) -> Chain:
        return empty_chain(rows_of(self.mdp))

    def state_dict(self) -> dict[str, Any]:
        """Return the values and the policy."""
        return {**super().state_dict(), "actions": self._actions.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._actions = state["actions"].copy()
