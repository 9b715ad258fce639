"""The exact optimum of a reward with a penalty for leaving a reference policy."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, softmax

from aligngym.agents.dynamic_programming import ValueIteration
from aligngym.agents.error_bounds import rounding
from aligngym.core.callbacks import Metrics
from aligngym.envs.tabular_mdp import TabularMDP


class SoftValueIteration(ValueIteration):
    """Maximise E[Σ_t γ^t (r_t − β KL(π(· | s_t) ‖ π_ref(· | s_t)))].

    The soft Bellman operator takes V to

        V(s) = β ln Σ_a π_ref(a | s) exp(Q(s, a) / β),  Q(s, a) = r(s, a) + γ Σ_s' p(s' | s, a) V(s'),

    and the optimal policy is π*(a | s) = π_ref(a | s) exp((Q(s, a) − V(s)) / β). This is what RLHF, DPO and
    KL-penalised policy gradients aim at: in a deterministic problem with γ = 1, π*(τ) ∝ π_ref(τ) exp(R(τ)/β).
    With β → 0 it becomes value iteration, with β → ∞ the evaluation of π_ref. E. Todorov, *Linearly-solvable Markov
    decision problems*, 2006; S. Levine, *Reinforcement learning and control as probabilistic inference*, 2018.

    Args:
        mdp: a model, or an environment that has one.
        discount: γ in [0, 1].
        beta: β > 0, in units of reward per nat.
        reference: π_ref, ``[S, A]``; with a horizon also ``[S · (horizon + 1), A]``, one that changes with time. The
            uniform policy by default. Where it is 0, so is π*.
        horizon: solve the problem that ends after so many steps, exactly, by backward induction: iteration k computes
            the values with k steps to go, and values and policy are those of ``mdp.unrolled(horizon)``, whose state
            t · S + s is s at time t. Without it, sweeps are repeated until the error is within the tolerance.
        tolerance: the certified error ‖V − V*‖∞ to stop at.

    Raises:
        ValueError: if β is not positive and finite, or the reference is no policy of this model.
    """

    def __init__(
        self,
        mdp: TabularMDP | gymnasium.Env,
        discount: float,
        beta: float,
        reference: ArrayLike | None = None,
        horizon: int | None = None,
        tolerance: float = 1e-6,
    ) -> None:
        if not 0 < beta < np.inf:
            raise ValueError(f"beta is positive and finite, not {beta}; ValueIteration solves the case of beta = 0")
        base = mdp if isinstance(mdp, TabularMDP) else TabularMDP.from_env(mdp)
        super().__init__(base if horizon is None else base.unrolled(horizon), discount, tolerance)
        self.beta, self.horizon = beta, horizon
        self.steps_to_go = 0
        self._base = base
        self.reference = self._checked_reference(reference)
        with np.errstate(divide="ignore"):
            self._log_reference = np.log(self.reference)

    def iterate(self) -> Metrics:
        """Sweep once over all states or, with a horizon, over the states of one more step to go."""
        if self.horizon is None:
            values = self._soft_maximum(self.action_values, self._log_reference)
            values[self.mdp.terminal] = 0.0
            self._replace_values(values, self._allowance(values))
        else:
            self._step_back(self.horizon)
        return self._metrics()

    def _refuse_unbounded_values(self) -> None:
        """Refuse nothing: the penalty can make finite what would be earned for ever."""

    def _step_back(self, horizon: int) -> None:
        """Compute the values of time t = horizon − steps_to_go − 1 from those of time t + 1."""
        if self.steps_to_go == horizon:
            return
        size, time = self._base.num_states, horizon - self.steps_to_go - 1
        now, following = slice(time * size, (time + 1) * size), slice((time + 1) * size, (time + 2) * size)
        action_values = self._base.action_values(self.values[following], self.discount)
        values = self._soft_maximum(action_values, self._log_reference[now])
        self.values[now] = np.where(self._base.terminal, 0.0, values)
        self.steps_to_go += 1
        if self.steps_to_go == horizon:
            self.residual, self._exhausted = self._allowance(self.values), True

    def _soft_maximum(self, action_values: NDArray[np.float64], log_reference: NDArray[np.float64]) -> Any:
        return self.beta * logsumexp(action_values / self.beta + log_reference, axis=1)

    def _allowance(self, values: NDArray[np.float64]) -> float:
        """Return a bound of the rounding error of one sweep: that of Q, and of a logarithm of A exponentials."""
        logarithms = self.beta * np.finfo(np.float64).eps * (self.mdp.num_actions + 50)
        return 2 * rounding(self.mdp, values, self.discount) + logarithms

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, π*(a | s) ∝ π_ref(a | s) exp(Q(s, a) / β)."""
        return softmax(self.action_values / self.beta + self._log_reference, axis=1)

    def evaluate(self, *args: Any, greedy: bool = False, **kwargs: Any) -> Metrics:
        """Play episodes, drawing from π*, which is random for a reason; with a horizon in a ``FiniteHorizon``.

        The return is that of the reward, without the penalty.
        """
        return super().evaluate(*args, greedy=greedy, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the values and how many steps back they reach."""
        return {**super().state_dict(), "steps_to_go": self.steps_to_go}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.steps_to_go = state["steps_to_go"]

    def _checked_reference(self, reference: ArrayLike | None) -> NDArray[np.float64]:
        shape = self.mdp.rewards.shape
        if reference is None:
            return np.full(shape, 1 / shape[1])
        table = np.asarray(reference, dtype=np.float64)
        if self.horizon is not None and table.shape == self._base.rewards.shape:
            table = np.tile(table, (self.horizon + 1, 1))
        if table.shape != shape:
            raise ValueError(f"the reference has shape {table.shape}, and the model {shape}")
        if (table < 0).any() or not np.allclose(table.sum(axis=1), 1, rtol=0, atol=1e-6):
            worst = int(np.abs(table.sum(axis=1) - 1).argmax())
            raise ValueError(f"reference, state {worst}: {table[worst]} is no distribution over actions")
        return table / table.sum(axis=1, keepdims=True)
