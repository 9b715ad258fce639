"""Linear prediction in expectation: what linear TD converges to, computed from the model.

With x(s) in the rows of Φ, D = diag(μ) and the chain P, r of the policy,

    A = Φᵀ D (I − γP) Φ,    b = Φᵀ D r,    C = Φᵀ D Φ,

semi-gradient TD moves the weights by α (b − A w) in the mean, so where it stops is w* = A⁻¹ b, and there the projected
Bellman equation holds: Φ w = Π T Φ w. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., sections 9.4 and
11.4; J. Tsitsiklis and B. Van Roy, *An analysis of temporal-difference learning with function approximation*, 1997.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import diags_array

from aligngym.agents.markov_chain import markov_chain, state_distribution
from aligngym.envs.tabular_mdp import TabularMDP

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ProjectedBellman:
    """The projected Bellman equation A w = b of a policy and a feature map.

    Attributes:
        features: ``[S, d]``, Φ, 0 in terminal states.
        distribution: ``[S]``, μ.
        matrix: ``[d, d]``, A.
        vector: ``[d]``, b.
        covariance: ``[d, d]``, C.
        exact_values: ``[S]``, V_π.
    """

    features: Floats
    distribution: Floats
    matrix: Floats
    vector: Floats
    covariance: Floats
    exact_values: Floats

    @classmethod
    def of_model(
        cls,
        mdp: TabularMDP,
        features: ArrayLike,
        policy: ArrayLike,
        discount: float,
        distribution: ArrayLike | None = None,
    ) -> Self:
        """Compute the equation.

        Args:
            mdp: the model.
            features: ``[S, d]``, x(s); what it says of terminal states is ignored.
            policy: ``[S, A]``, π(a | s).
            discount: γ in [0, 1].
            distribution: ``[S]``, proportional to μ; that of :func:`state_distribution` for π if not given. Another
                one is off-policy, or an episode that is cut.

        Raises:
            ValueError: if shapes do not fit, or there is no such distribution.
        """
        table = np.array(features, dtype=np.float64)
        if table.ndim != 2 or len(table) != mdp.num_states:
            raise ValueError(f"features have shape {table.shape}, and the model {mdp.num_states} states")
        table[mdp.terminal] = 0.0
        weights = state_distribution(mdp, policy) if distribution is None else np.array(distribution, dtype=np.float64)
        if weights.shape != mdp.terminal.shape or (weights < 0).any() or not weights[~mdp.terminal].sum() > 0:
            raise ValueError(f"distribution is a probability of each of {mdp.num_states} states")
        weights[mdp.terminal] = 0.0
        weights /= weights.sum()
        chain, rewards = markov_chain(mdp, policy)
        weighted = diags_array(weights) @ table
        return cls(
            features=table,
            distribution=weights,
            matrix=weighted.T @ (table - discount * (chain @ table)),
            vector=weighted.T @ rewards,
            covariance=weighted.T @ table,
            exact_values=mdp.evaluate(policy, discount),
        )

    @cached_property
    def fixed_point(self) -> Floats:
        """``[d]``, w* = A⁻¹ b; the shortest solution if there are several."""
        return np.asarray(np.linalg.lstsq(self.matrix, self.vector, rcond=None)[0], dtype=np.float64)

    @cached_property
    def best_weights(self) -> Floats:
        """``[d]``, the weights of the smallest value error: Φ w = Π V_π."""
        root = np.sqrt(self.distribution)
        solution = np.linalg.lstsq(root[:, None] * self.features, root * self.exact_values, rcond=None)[0]
        return np.asarray(solution, dtype=np.float64)

    def value_error(self, weights: ArrayLike) -> float:
        """Return VE(w) = Σ_s μ(s) (V_π(s) − wᵀ x(s))²."""
        return float(self.distribution @ (self.exact_values - self.features @ np.asarray(weights)) ** 2)

    def projected_bellman_error(self, weights: ArrayLike) -> float:
        """Return PBE(w) = ‖Π (T Φw − Φw)‖²_μ = (b − A w)ᵀ C⁻¹ (b − A w)."""
        change = self.vector - self.matrix @ np.asarray(weights)
        return float(change @ np.linalg.lstsq(self.covariance, change, rcond=None)[0])
