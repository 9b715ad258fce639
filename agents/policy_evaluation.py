"""How good is a given policy? By sweeps; :meth:`TabularMDP.evaluate` solves the equations at once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.dynamic_programming import ValueIteration
from aligngym.agents.error_bounds import expected_steps, rounding
from aligngym.agents.markov_chain import checked_policy, markov_chain
from aligngym.agents.sweep_order import SweepOrder, nearest_first, order_by_distance, predecessors
from aligngym.agents.sweeps import rows_of, sweep
from aligngym.core.callbacks import Metrics
from aligngym.envs.tabular_mdp import TabularMDP


class PolicyEvaluation(ValueIteration):
    """Repeat V(s) ← Σ_a π(a | s) (r(s, a) + γ Σ_s' p(s' | s, a) V(s')), from V = 0. An iteration is one sweep.

    A policy makes a decision process one with a single action, and the evaluation of a policy is value iteration there:
    nothing is left to be chosen, so its V* is the policy's V_π. Convergence and the certified error are the same too.
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 4.1.

    Args:
        mdp: a model, or an environment that has one.
        policy: ``[S, A]``, π(a | s).
        discount: γ in [0, 1].
        tolerance: the certified error ‖V − V_π‖∞ to stop at.
        in_place: whether a sweep uses the values that it has just computed, the states nearest to the end first;
            otherwise those of the sweep before it, which is what printed tables of V after k sweeps show.

    Attributes:
        model: the decision process.
        mdp: the policy's process, with a single action.

    Raises:
        TypeError: if an environment has no exact model.
        ValueError: for a policy that does not fit, a bad discount or tolerance, or a policy that never ends the episode
            and keeps earning or paying with γ = 1.
    """

    def __init__(
        self,
        mdp: TabularMDP | gymnasium.Env,
        policy: ArrayLike,
        discount: float,
        tolerance: float = 1e-6,
        in_place: bool = False,
    ) -> None:
        self.model = mdp if isinstance(mdp, TabularMDP) else TabularMDP.from_env(mdp)
        self._policy = checked_policy(policy, (self.model.num_states, self.model.num_actions))
        chain, rewards = markov_chain(self.model, self._policy)
        process = TabularMDP.from_arrays(chain, rewards[:, None], self.model.initial, self.model.terminal)
        if discount == 1:
            _refuse_endless_rewards(process)
        super().__init__(process, discount, tolerance)
        self.in_place = in_place

    def iterate(self) -> Metrics:
        """Sweep once over all states."""
        if not self.in_place:
            return super().iterate()
        values = self.values[self._order.states]
        change = sweep(values, values, self._order.rows, self.discount)
        self.values = values[self._order.positions]
        self._judge(change)
        return self._metrics()

    def _judge(self, change: float, allowance: float | None = None) -> None:
        # The process itself is known up to rounding only: its numbers are sums over actions.
        if allowance is None:
            allowance = (1 + self.model.num_actions) * rounding(self.mdp, self.values, self.discount, change)
        super()._judge(change, allowance)

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, the policy that is evaluated."""
        return self._policy

    def evaluate(self, *args: Any, greedy: bool = False, **kwargs: Any) -> Metrics:
        """Play episodes, drawing from the policy; see :meth:`TabularAgent.evaluate`."""
        return super().evaluate(*args, greedy=greedy, **kwargs)

    @property
    def action_values(self) -> NDArray[np.float64]:
        """``[S, A]``, Q(s, a) = r(s, a) + γ Σ_s' p(s' | s, a) V(s')."""
        return self.model.action_values(self.values, self.discount)

    @cached_property
    def _order(self) -> SweepOrder:
        return order_by_distance(self.mdp)

    @cached_property
    def _longest_episode(self) -> float:
        return expected_steps(self.mdp, self.discount)


def _refuse_endless_rewards(process: TabularMDP) -> None:
    """Raise if a state that no terminal state can be reached from pays something."""
    order, reached = nearest_first(predecessors(rows_of(process)), np.flatnonzero(process.terminal))
    stuck = np.sort(order[reached:])
    paying = stuck[process.rewards[stuck, 0] != 0]
    if len(paying):
        raise ValueError(
            f"from state {paying[0]} this policy never reaches a terminal state and keeps earning "
            f"{process.rewards[paying[0], 0]} a step: its value is not finite with a discount of 1; take a smaller one"
        )
