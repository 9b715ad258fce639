"""Gradient TD: linear prediction that is stable off-policy, where semi-gradient TD may diverge.

Both agents descend the projected Bellman error PBE(w) = E[δx]ᵀ E[xxᵀ]⁻¹ E[δx]. Its gradient is a product of
expectations that one sample cannot estimate, so one factor, E[xxᵀ]⁻¹ E[δx], is learned in auxiliary weights u by least
mean squares, u ← u + β ρ (δ − uᵀx) x. R. Sutton and others, *Fast gradient-descent methods for temporal-difference
learning with linear function approximation*, 2009; R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section
11.7.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike

from aligngym.agents.features import Features
from aligngym.agents.linear_prediction import Floats, LinearTD, dot
from aligngym.core.compilation import compiled
from aligngym.core.schedules import Schedule, as_schedule


class GradientTD(LinearTD):
    """What GTD2 and TDC share: auxiliary weights with a step size of their own.

    Attributes:
        auxiliary_weights: ``[d]``, u, 0 at first.

    Args:
        env: see :class:`~aligngym.agents.linear_prediction.LinearTD`, as all others.
        policy: ``[S, A]``.
        features: x.
        discount: γ.
        step_size: α.
        auxiliary_step_size: β, a number or a schedule like α. The proofs want α / β → 0, or β / α large enough.
        options: ``behaviour``, ``seed`` and ``max_episode_steps`` of
            :class:`~aligngym.agents.linear_prediction.LinearPrediction`.
    """

    stable_off_policy = True

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        features: Features,
        discount: float,
        step_size: float | Schedule,
        auxiliary_step_size: float | Schedule,
        **options: Any,
    ) -> None:
        super().__init__(env, policy, features, discount, step_size, **options)
        self.auxiliary_step_size = as_schedule(auxiliary_step_size)
        self.auxiliary_weights = np.zeros(features.size)

    def state_dict(self) -> dict[str, Any]:
        """Return both kinds of weights and the number of steps."""
        return {**super().state_dict(), "auxiliary_weights": self.auxiliary_weights.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.auxiliary_weights = state["auxiliary_weights"].copy()


class GTD2(GradientTD):
    """GTD2: w ← w + α ρ (x(s) − γ x(s')) (uᵀ x(s)); in the mean α Aᵀ u. Arguments as :class:`GradientTD`."""

    def sweep(self, rows: Floats, rewards: Floats, discounts: Floats, ratios: Floats, step_sizes: Floats) -> None:
        """See :meth:`LinearTD.sweep`."""
        auxiliary = self._next_step_sizes(self.auxiliary_step_size, len(rewards))
        sweep_gtd2(self.weights, self.auxiliary_weights, rows, rewards, discounts, ratios, step_sizes, auxiliary)


class TDC(GradientTD):
    """TD with gradient correction, TD(0)'s update and one that makes up for its being only half a gradient.

    w ← w + α ρ (δ x(s) − γ x(s') (uᵀ x(s))). Usually faster than GTD2. Arguments as :class:`GradientTD`.
    """

    def sweep(self, rows: Floats, rewards: Floats, discounts: Floats, ratios: Floats, step_sizes: Floats) -> None:
        """See :meth:`LinearTD.sweep`."""
        auxiliary = self._next_step_sizes(self.auxiliary_step_size, len(rewards))
        sweep_tdc(self.weights, self.auxiliary_weights, rows, rewards, discounts, ratios, step_sizes, auxiliary)


@compiled
def sweep_gtd2(
    weights: Floats,
    auxiliary: Floats,
    rows: Floats,
    rewards: Floats,
    discounts: Floats,
    ratios: Floats,
    step_sizes: Floats,
    auxiliary_step_sizes: Floats,
) -> None:
    """Do GTD2's updates of one episode; arguments as in :meth:`LinearTD.sweep`, and u with its β."""
    for t in range(len(rewards)):
        error = rewards[t] + discounts[t] * dot(rows[t + 1], weights) - dot(rows[t], weights)
        correction = dot(rows[t], auxiliary)
        weights += step_sizes[t] * ratios[t] * correction * (rows[t] - discounts[t] * rows[t + 1])
        auxiliary += auxiliary_step_sizes[t] * ratios[t] * (error - correction) * rows[t]


@compiled
def sweep_tdc(
    weights: Floats,
    auxiliary: Floats,
    rows: Floats,
    rewards: Floats,
    discounts: Floats,
    ratios: Floats,
    step_sizes: Floats,
    auxiliary_step_sizes: Floats,
) -> None:
    """Do TDC's updates of one episode; arguments as in :meth:`LinearTD.sweep`, and u with its β."""
    for t in range(len(rewards)):
        error = rewards[t] + discounts[t] * dot(rows[t + 1], weights) - dot(rows[t], weights)
        correction = dot(rows[t], auxiliary)
        weights += step_sizes[t] * ratios[t] * (error * rows[t] - discounts[t] * correction * rows[t + 1])
        auxiliary += auxiliary_step_sizes[t] * ratios[t] * (error - correction) * rows[t]
