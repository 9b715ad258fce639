"""Prediction with linear function approximation, V(s) = wᵀ x(s), by semi-gradient TD.

Every step moves all weights along the features of its state, w ← w + α δ x(s) with the TD error
δ = r + γ wᵀ x(s') − wᵀ x(s). On-policy this converges to the fixed point of
:class:`~aligngym.agents.projected_bellman.ProjectedBellman`; off-policy it may diverge, which
:mod:`aligngym.agents.gradient_td` cures. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., chapters 9, 11, 12.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.features import Features
from aligngym.agents.prediction import Episode, Prediction
from aligngym.core.compilation import compiled
from aligngym.core.schedules import Schedule, as_schedule

Floats = NDArray[np.float64]


class LinearPrediction(Prediction):
    """What linear predictors share: features of every state, importance ratios, and V(s) = wᵀ x(s).

    Attributes:
        feature_table: ``[S, d]``, x(s).

    Args:
        env: an environment with discrete observations and actions counted from 0.
        policy: ``[S, A]``, π(a | s), whose value is learned.
        features: x.
        discount: γ in [0, 1].
        behaviour: ``[S, A]``, b(a | s), the policy that acts; π itself if not given. Off-policy, a step counts with the
            ratio ρ = π(a | s) / b(a | s).
        seed: of everything random.
        max_episode_steps: cuts episodes; needed where a task does not end by itself.

    Raises:
        TypeError: if the spaces are not of that kind.
        ValueError: see :class:`Prediction`, and for features that are not finite.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        features: Features,
        discount: float,
        *,
        behaviour: ArrayLike | None = None,
        seed: int = 0,
        max_episode_steps: int | None = None,
    ) -> None:
        super().__init__(env, policy, discount, seed=seed, max_episode_steps=max_episode_steps, behaviour=behaviour)
        self.features = features
        self.feature_table = np.ascontiguousarray(features(np.arange(len(self._policy))), dtype=np.float64)
        if self.feature_table.shape != (len(self._policy), features.size):
            raise ValueError(
                f"features of {len(self._policy)} states have shape {self.feature_table.shape}, and a feature map of "
                f"size {features.size} gives a row of {features.size} numbers for each"
            )
        bad = np.flatnonzero(~np.isfinite(self.feature_table).all(axis=1))
        if len(bad):
            raise ValueError(f"the features of state {bad[0]} are not finite: {self.feature_table[bad[0]]}")

    @property
    @abstractmethod
    def weights(self) -> Floats:
        """``[d]``, w."""

    @property
    def values(self) -> Floats:
        """``[S]``, wᵀ x(s), and 0 in states that the model knows to be terminal."""
        values = self.feature_table @ self.weights
        if self.model is not None:
            values[self.model.terminal[: len(values)]] = 0.0
        return values

    def ratios(self, episode: Episode) -> Floats:
        """Return ``[T]``, ρ_t = π(a_t | s_t) / b(a_t | s_t)."""
        taken = episode.states[:-1], episode.actions
        return self._policy[taken] / self.behaviour[taken]


class LinearTD(LinearPrediction):
    """Linear predictors that change their weights at every step. A subclass overrides :meth:`sweep`.

    Attributes:
        weights: ``[d]``, w, 0 at first.
        steps: how many steps have been learned from.
        stable_off_policy: whether a small enough step size keeps the weights finite under any behaviour.

    Args:
        env: see :class:`LinearPrediction`, as all others.
        policy: ``[S, A]``.
        features: x.
        discount: γ.
        step_size: α; a schedule is evaluated at the number of steps learned from. It has to be small compared with
            1 / ‖x‖², which for tile coding is one over the number of tilings.
        behaviour: ``[S, A]``.
        seed: of everything random.
        max_episode_steps: cuts episodes.

    Raises:
        FloatingPointError: while learning, if the weights are no longer finite.
    """

    weights: Floats = np.empty(0)
    stable_off_policy: bool = False

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        features: Features,
        discount: float,
        step_size: float | Schedule,
        **options: Any,
    ) -> None:
        super().__init__(env, policy, features, discount, **options)
        self.step_size = as_schedule(step_size)
        self.weights, self.steps = np.zeros(features.size), 0

    @abstractmethod
    def sweep(self, rows: Floats, rewards: Floats, discounts: Floats, ratios: Floats, step_sizes: Floats) -> None:
        """Change the weights by what one episode teaches.

        Args:
            rows: ``[T + 1, d]``, x(s_t).
            rewards: ``[T]``, what the step from s_t paid.
            discounts: ``[T]``, what s_{t+1} counts: γ, and 0 after a termination.
            ratios: ``[T]``, ρ_t.
            step_sizes: ``[T]``, α_t.
        """

    def update(self, episode: Episode) -> None:
        """Learn from one episode, whoever played it."""
        rows, discounts = self.feature_table[episode.states], episode.discounts(self.discount)
        step_sizes = self._next_step_sizes(self.step_size, len(episode.rewards))
        self.sweep(rows, episode.rewards, discounts, self.ratios(episode), step_sizes)
        self.steps += len(episode.rewards)
        if not np.isfinite(self.weights).all():
            off_policy = self.behaviour is not self._policy and not self.stable_off_policy
            raise FloatingPointError(divergence(self, off_policy))

    def _next_step_sizes(self, schedule: Schedule, length: int) -> Floats:
        return np.array([schedule(step) for step in range(self.steps, self.steps + length)])

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the number of steps."""
        return {"weights": self.weights.copy(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if they are weights of another number of features.
        """
        check_shape(state["weights"], self.weights)
        self.weights, self.steps = state["weights"].copy(), state["steps"]


class SemiGradientTD(LinearTD):
    """Semi-gradient TD(λ): z ← ρ (γλ z + x(s)), w ← w + α δ z. Sutton and Barto, sections 9.3, 12.2 and 12.9.

    λ = 0 is semi-gradient TD(0), which on a :class:`~aligngym.agents.features.OneHot` is tabular TD(0).

    Args:
        env: see :class:`LinearTD`, as all others.
        policy: ``[S, A]``.
        features: x.
        discount: γ.
        step_size: α.
        trace_decay: λ in [0, 1].
        options: ``behaviour``, ``seed`` and ``max_episode_steps`` of :class:`LinearPrediction`.

    Raises:
        ValueError: for a λ outside [0, 1].
    """

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        features: Features,
        discount: float,
        step_size: float | Schedule,
        *,
        trace_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(env, policy, features, discount, step_size, **options)
        self.trace_decay = checked_trace_decay(trace_decay)

    def sweep(self, rows: Floats, rewards: Floats, discounts: Floats, ratios: Floats, step_sizes: Floats) -> None:
        """See :meth:`LinearTD.sweep`."""
        decay = self.discount * self.trace_decay
        sweep_semi_gradient(self.weights, rows, rewards, discounts, ratios, step_sizes, decay)


class TrueOnlineTD(SemiGradientTD):
    """True online TD(λ): after every step, the weights are those of the λ-returns of all that has been seen so far.

    H. van Seijen and others, *True online temporal-difference learning*, 2016; Sutton and Barto, section 12.5.
    Arguments as :class:`SemiGradientTD`, without a behaviour.

    Raises:
        ValueError: for a behaviour: this algorithm is on-policy.
    """

    def __init__(self, *args: Any, trace_decay: float = 0.9, **options: Any) -> None:
        if options.get("behaviour") is not None:
            raise ValueError("true online TD(λ) learns on-policy only: leave behaviour out, or take TDC")
        super().__init__(*args, trace_decay=trace_decay, **options)

    def sweep(self, rows: Floats, rewards: Floats, discounts: Floats, ratios: Floats, step_sizes: Floats) -> None:
        """See :meth:`LinearTD.sweep`."""
        sweep_true_online(self.weights, rows, rewards, discounts, step_sizes, self.discount * self.trace_decay)


@compiled
def dot(left: Floats, right: Floats) -> float:
    """Return Σ_i left_i right_i, added from left to right, which is the same compiled or not."""
    total = 0.0
    for i in range(len(left)):
        total += left[i] * right[i]
    return total


@compiled
def sweep_semi_gradient(
    weights: Floats,
    rows: Floats,
    rewards: Floats,
    discounts: Floats,
    ratios: Floats,
    step_sizes: Floats,
    decay: float,
) -> None:
    """Do semi-gradient TD(λ)'s updates of one episode; arguments as in :meth:`LinearTD.sweep`, and γλ."""
    trace = np.zeros(len(weights))
    for t in range(len(rewards)):
        error = rewards[t] + discounts[t] * dot(rows[t + 1], weights) - dot(rows[t], weights)
        trace = ratios[t] * (decay * trace + rows[t])
        weights += step_sizes[t] * error * trace


@compiled
def sweep_true_online(
    weights: Floats, rows: Floats, rewards: Floats, discounts: Floats, step_sizes: Floats, decay: float
) -> None:
    """Do true online TD(λ)'s updates of one episode; arguments as in :meth:`LinearTD.sweep`, and γλ."""
    trace, former = np.zeros(len(weights)), dot(rows[0], weights)
    for t in range(len(rewards)):
        value, following = dot(rows[t], weights), dot(rows[t + 1], weights)
        error = rewards[t] + discounts[t] * following - value
        # The dutch trace: a visit counts less, the more of the trace is in it already.
        trace = decay * trace + (1 - step_sizes[t] * decay * dot(trace, rows[t])) * rows[t]
        weights += step_sizes[t] * ((error + value - former) * trace - (value - former) * rows[t])
        former = following


def divergence(agent: Any, off_policy: bool = False) -> str:
    """Return what to say when the weights of an agent are no longer finite, and what to do."""
    remedy = f"take a step_size smaller than {agent.step_size}, or features of a smaller norm"
    if off_policy:
        remedy += "; off-policy, semi-gradient methods can diverge with every step size: TDC and GTD2 do not"
    return f"{type(agent).__name__}, episode {agent.iteration}: the weights are no longer finite. It diverges: {remedy}"


def check_shape(saved: Floats, present: Floats) -> None:
    """Raise a ``ValueError`` unless saved weights have the shape of the present ones."""
    if saved.shape != present.shape:
        raise ValueError(f"saved weights have shape {saved.shape}, and these {present.shape}: other features made them")


def checked_trace_decay(trace_decay: float) -> float:
    """Return λ, or raise a ``ValueError`` if it is outside [0, 1]."""
    if not 0 <= trace_decay <= 1:
        raise ValueError(f"trace_decay is the λ of TD(λ), between 0 and 1, not {trace_decay}")
    return trace_decay
