"""Planning in a model that is known exactly: value iteration and policy iteration.

R. Bellman, *Dynamic Programming*, 1957; R. Howard, *Dynamic Programming and Markov Processes*, 1960.
"""

from __future__ import annotations

import math
import warnings
from functools import cached_property
from typing import Any, Self

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.error_bounds import error_bound, longest_episode, rounding
from aligngym.agents.sweeps import rows_of, sweep
from aligngym.agents.tabular_agent import TabularAgent, uniform_over_best
from aligngym.agents.unbounded_values import refuse_unbounded_values
from aligngym.core.callbacks import Metrics
from aligngym.envs.tabular_mdp import TabularMDP


class DynamicProgramming(TabularAgent):
    """What planners share: values, how wrong they can be, and the policy that follows from them.

    Attributes:
        mdp: the model.
        values: ``[S]``, V, the current estimate of V*.
        residual: at least ‖TV − V‖∞, T being the Bellman optimality operator; infinite before the first iteration.

    Args:
        mdp: a model, or an environment that has one.
        discount: γ in [0, 1].
        tolerance: the certified error ‖V − V*‖∞ to stop at.

    Raises:
        TypeError: if an environment has no exact model.
        ValueError: for a discount outside [0, 1] or a tolerance that is not positive.
    """

    headline = ("error_bound", "residual")

    def __init__(self, mdp: TabularMDP | gymnasium.Env, discount: float, tolerance: float) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount is between 0 and 1, not {discount}")
        if not tolerance > 0:
            raise ValueError(f"the tolerance is a positive error of the values, not {tolerance}")
        self.mdp = mdp if isinstance(mdp, TabularMDP) else TabularMDP.from_env(mdp)
        self.discount, self.tolerance = discount, tolerance
        self.values = np.zeros(self.mdp.num_states)
        self.residual = math.inf
        self._exhausted = False

    @property
    def action_values(self) -> NDArray[np.float64]:
        """``[S, A]``, Q(s, a) = r(s, a) + γ Σ_s' p(s' | s, a) V(s')."""
        return self.mdp.action_values(self.values, self.discount)

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, uniform over the actions within twice the tolerance of the best.

        Once converged, these are all optimal actions, and others that are worse by less than four tolerances, if any.
        """
        return uniform_over_best(self.action_values, 2 * self.tolerance)

    @property
    def error_bound(self) -> float:
        """A certified bound of ‖V − V*‖∞, rounding included; infinite where none is known.

        With γ < 1 there is always one. With γ = 1 there is one if every episode must end within some number of steps,
        or if every step has a cost: see :mod:`aligngym.agents.error_bounds`.
        """
        return error_bound(self.mdp, self.values, self.residual, self.discount, self._longest_episode)

    @property
    def converged(self) -> bool:
        """Whether the error bound is within the tolerance.

        Where no bound is known, which happens with γ = 1 only: whether another iteration would change nothing but
        roundings. A residual within the tolerance would say little there, for many small steps can go a long way.
        """
        bound = self.error_bound
        return bound <= self.tolerance if math.isfinite(bound) else self._exhausted

    @property
    def finished(self) -> bool:
        """Whether the agent has converged, or cannot come closer in double precision."""
        return self._exhausted or self.converged

    def learn(self, iterations: int | None = None, **kwargs: Any) -> Self:
        """Iterate, see :meth:`Agent.learn`, and warn if the values have not converged in the end.

        With γ = 1, values that gains and costs drive up in turn may go unnoticed: limit ``iterations`` there.
        """
        super().learn(iterations, **kwargs)
        if not self.converged:
            cause = (
                "double precision allows no more" if self._exhausted else f"it stopped at iteration {self.iteration}"
            )
            warnings.warn(
                f"{type(self).__name__} has not converged to {self.tolerance}: its error is at most "
                f"{self.error_bound:.3g}, its residual {self.residual:.3g}; {cause}",
                stacklevel=2,
            )
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the values and how wrong they can be."""
        return {"values": self.values.copy(), "residual": self.residual, "exhausted": self._exhausted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over values that :meth:`state_dict` returned.

        Raises:
            ValueError: if they are values of another number of states.
        """
        if state["values"].shape != self.values.shape:
            raise ValueError(f"saved values of {len(state['values'])} states, and this model has {len(self.values)}")
        self.values = state["values"].copy()
        self.residual, self._exhausted = state["residual"], state["exhausted"]

    @cached_property
    def _longest_episode(self) -> float:
        return longest_episode(self.mdp)

    def _refuse_unbounded_values(self) -> None:
        """Raise if γ = 1 and the values of Bellman's optimality equation are seen to be infinite."""
        if self.discount == 1:
            refuse_unbounded_values(self.mdp)

    def _judge(self, change: float, allowance: float | None = None) -> None:
        """Conclude from the change of the last sweep how good its values are: see :mod:`.error_bounds`."""
        if allowance is None:
            # A sweep in place has read values from before it too.
            allowance = rounding(self.mdp, self.values, self.discount, change)
        self.residual = float(self.discount * change + allowance)
        self._exhausted = bool(change <= allowance)

    def _metrics(self) -> Metrics:
        return {"error_bound": self.error_bound, "residual": self.residual}


class ValueIteration(DynamicProgramming):
    """Repeat V ← TV: V(s) ← max_a r(s, a) + γ Σ_s' p(s' | s, a) V(s'), from V = 0. An iteration is one sweep.

    The error shrinks by γ with every sweep, so about ln(error / tolerance) / (1 − γ) sweeps are needed.
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 4.4.

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

    def iterate(self) -> Metrics:
        """Sweep once over all states."""
        updated = np.empty_like(self.values)
        change = sweep(self.values, updated, rows_of(self.mdp), self.discount)
        self.values = updated
        self._judge(change)
        return self._metrics()

    def _replace_values(self, values: NDArray[np.float64], allowance: float) -> None:
        """Take over V' = TV, T being a subclass's own operator."""
        change = float(np.abs(values - self.values).max())
        self.values = values
        self._judge(change, allowance)


class PolicyIteration(DynamicProgramming):
    """Evaluate the policy exactly, improve it greedily, until no improvement is left. An iteration is both.

    An action is replaced only if another one is better by more than (1 − γ) · tolerance (the tolerance itself if
    γ = 1), and by more than rounding. So ties cannot make it run in circles: every replacement raises the value of the
    policy, and there are finitely many policies. It starts from the uniform policy, which with γ = 1 ends every
    episode that can be ended. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 4.3.

    Args:
        mdp: a model, or an environment that has one.
        discount: γ in [0, 1].
        tolerance: the certified error ‖V − V*‖∞ to stop at.

    Attributes:
        actions: ``[S]``, the deterministic policy that the next iteration evaluates; −1 stands for the uniform one.
    """

    def __init__(self, mdp: TabularMDP | gymnasium.Env, discount: float, tolerance: float = 1e-9) -> None:
        super().__init__(mdp, discount, tolerance)
        self._refuse_unbounded_values()
        self.actions = np.full(self.mdp.num_states, -1)

    def iterate(self) -> Metrics:
        """Evaluate the policy, then improve it where that is worth it."""
        states = np.arange(self.mdp.num_states)
        uniform = self.actions < 0
        policy = np.zeros(self.mdp.rewards.shape)
        policy[states, self.actions] = 1.0
        policy[uniform] = 1 / self.mdp.num_actions
        self.values = self.mdp.evaluate(policy, self.discount)
        action_values = self.action_values
        allowance = rounding(self.mdp, self.values, self.discount)
        self.residual = float(np.abs(action_values.max(axis=1) - self.values).max()) + allowance
        gain = action_values.max(axis=1) - action_values[states, self.actions]
        improved = uniform | (gain > self._worthwhile(allowance))
        self.actions = np.where(improved, action_values.argmax(axis=1), self.actions)
        self._exhausted = not improved.any()
        return {**self._metrics(), "changed_states": float(improved.sum())}

    def _worthwhile(self, allowance: float) -> float:
        """Return the gain from which on an action is replaced; less could be an error of the exact evaluation."""
        if self.discount == 1:
            return self.tolerance
        return max((1 - self.discount) * self.tolerance, 4 * allowance / (1 - self.discount))

    def state_dict(self) -> dict[str, Any]:
        """Return the values and the policy."""
        return {**super().state_dict(), "actions": self.actions.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.actions = state["actions"].copy()
