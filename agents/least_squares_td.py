"""Least-squares temporal differences: the fixed point of linear TD, solved for instead of approached."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike

from aligngym.agents.features import Features
from aligngym.agents.linear_prediction import Floats, LinearPrediction, check_shape, checked_trace_decay
from aligngym.agents.prediction import Episode
from aligngym.core.compilation import compiled


class LSTD(LinearPrediction):
    """Least-squares TD(λ): w = (A + εI)⁻¹ b, A = Σ z (x(s) − γ x(s'))ᵀ, b = Σ z r over all steps so far.

    No step size, but d³ operations whenever the weights are read. λ = 0 is the fixed point of the model that the steps
    seen suggest (certainty equivalence, what batch TD(0) converges to), λ = 1 the least-squares fit to the returns
    (what batch Monte Carlo converges to). S. Bradtke and A. Barto, *Linear least-squares algorithms for temporal
    difference learning*, 1996; J. Boyan, *Technical update: least-squares temporal difference learning*, 2002; Sutton
    and Barto, sections 6.3 and 9.8.

    Attributes:
        matrix: ``[d, d]``, A.
        vector: ``[d]``, b.

    Args:
        env: see :class:`LinearPrediction`, as all others.
        policy: ``[S, A]``.
        features: x.
        discount: γ.
        trace_decay: λ in [0, 1], z ← ρ (γλ z + x(s)).
        ridge: ε ≥ 0. With 0, the shortest solution is taken while A is singular.
        options: ``behaviour``, ``seed`` and ``max_episode_steps`` of :class:`LinearPrediction`.

    Raises:
        ValueError: for a λ outside [0, 1] or a negative ridge.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        features: Features,
        discount: float,
        *,
        trace_decay: float = 0.0,
        ridge: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(env, policy, features, discount, **options)
        if not ridge >= 0:
            raise ValueError(f"ridge is at least 0, not {ridge}")
        self.trace_decay, self.ridge = checked_trace_decay(trace_decay), ridge
        self.matrix, self.vector = np.zeros((features.size, features.size)), np.zeros(features.size)

    @property
    def weights(self) -> Floats:
        """``[d]``, the solution of (A + εI) w = b."""
        matrix = self.matrix + self.ridge * np.eye(len(self.vector))
        return np.asarray(np.linalg.lstsq(matrix, self.vector, rcond=None)[0], dtype=np.float64)

    def update(self, episode: Episode) -> None:
        """Learn from one episode, whoever played it."""
        rows, discounts = self.feature_table[episode.states], episode.discounts(self.discount)
        traces = eligibility_traces(rows[:-1], self.ratios(episode), self.discount * self.trace_decay)
        self.matrix += traces.T @ (rows[:-1] - discounts[:, None] * rows[1:])
        self.vector += traces.T @ episode.rewards

    def state_dict(self) -> dict[str, Any]:
        """Return A and b."""
        return {"matrix": self.matrix.copy(), "vector": self.vector.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if they belong to another number of features.
        """
        check_shape(state["vector"], self.vector)
        self.matrix, self.vector = state["matrix"].copy(), state["vector"].copy()


@compiled
def eligibility_traces(rows: Floats, ratios: Floats, decay: float) -> Floats:
    """Return ``[T, d]``, z_t = ρ_t (γλ z_{t−1} + x_t), for ``[T, d]`` features."""
    traces = rows.copy()
    traces[0] *= ratios[0]
    for t in range(1, len(rows)):
        traces[t] = ratios[t] * (decay * traces[t - 1] + rows[t])
    return traces
