"""Prediction with λ-returns: all n-step targets at once, looking forward, or backward with eligibility traces.

Everything else is as in :mod:`aligngym.agents.td_prediction`. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd
ed., chapter 12.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike

from aligngym.agents.td_prediction import Floats, States, TDPrediction
from aligngym.core.compilation import compiled
from aligngym.core.schedules import Power, Schedule


class _WithTraceDecay(TDPrediction):
    """A prediction with a λ."""

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        discount: float,
        step_size: float | Schedule = Power(exponent=0.8),  # noqa: B008 (frozen)
        *,
        trace_decay: float = 0.9,
        **options: Any,
    ) -> None:
        if not 0 <= trace_decay <= 1:
            raise ValueError(f"trace_decay is the λ of TD(λ), between 0 and 1, not {trace_decay}")
        super().__init__(env, policy, discount, step_size, **options)
        self.trace_decay = trace_decay


class OfflineLambdaReturn(_WithTraceDecay):
    """The forward view of TD(λ): the target is the λ-return of the episode, (1 − λ) Σ_n λ^(n−1) G_{t:t+n}.

    The targets are those of the values before the episode; the updates follow when it is over. λ = 1 is every-visit
    constant-α Monte Carlo. Sutton and Barto, section 12.1.

    Args:
        env: see :class:`TDPrediction`, as all others.
        policy: ``[S, A]``.
        discount: γ.
        step_size: α.
        trace_decay: λ in [0, 1].
        seed: of everything random.
        max_episode_steps: cuts episodes.

    Raises:
        ValueError: for a λ outside [0, 1].
    """

    def sweep(self, values: Floats, states: States, rewards: Floats, discounts: Floats, step_sizes: Floats) -> None:
        """See :meth:`TDPrediction.sweep`."""
        targets = lambda_returns(values[states], rewards, discounts, self.trace_decay)
        sweep_targets(values, states, targets, step_sizes)


@compiled
def lambda_returns(values: Floats, rewards: Floats, discounts: Floats, trace_decay: float) -> Floats:
    """Return ``[T]``, G_t = r_t + γ_t ((1 − λ) V(s_{t+1}) + λ G_{t+1}), with G_T = V(s_T), for ``[T + 1]`` values."""
    returns = np.empty(len(rewards))
    following = values[-1]
    for t in range(len(rewards) - 1, -1, -1):
        following = rewards[t] + discounts[t] * ((1 - trace_decay) * values[t + 1] + trace_decay * following)
        returns[t] = following
    return returns


@compiled
def sweep_targets(values: Floats, states: States, targets: Floats, step_sizes: Floats) -> None:
    """Move V(s_t) towards ``[T]`` given targets, one after the other."""
    for t in range(len(targets)):
        values[states[t]] += step_sizes[t] * (targets[t] - values[states[t]])


class TDLambda(_WithTraceDecay):
    """The backward view: every state is moved by each TD error δ_t as far as its eligibility trace z(s) says.

    z decays by γλ a step and grows by α where the state is visited (or is set to α: replacing traces). So α is that of
    the visit, also under a schedule, and one episode adds Σ_t δ_t z_t(s), which with ``online=False`` and accumulating
    traces is exactly Σ_t α (G_t^λ − V(s_t)), the forward view. Online, V changes as the episode goes on; λ = 0 is TD(0)
    then. Sutton and Barto, sections 12.2 and 12.3.

    Args:
        env: see :class:`TDPrediction`, as all others.
        policy: ``[S, A]``.
        discount: γ.
        step_size: α.
        trace_decay: λ in [0, 1].
        traces: ``"accumulating"`` or ``"replacing"``.
        online: whether V changes during the episode, or by the sum of all changes at its end.
        seed: of everything random.
        max_episode_steps: cuts episodes.

    Raises:
        ValueError: for a λ outside [0, 1] or unknown traces.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        discount: float,
        step_size: float | Schedule = Power(exponent=0.8),  # noqa: B008 (frozen)
        *,
        traces: str = "accumulating",
        online: bool = True,
        **options: Any,
    ) -> None:
        if traces not in ("accumulating", "replacing"):
            raise ValueError(f"traces is 'accumulating' or 'replacing', not {traces!r}")
        super().__init__(env, policy, discount, step_size, **options)
        self.traces, self.online = traces, online

    def sweep(self, values: Floats, states: States, rewards: Floats, discounts: Floats, step_sizes: Floats) -> None:
        """See :meth:`TDPrediction.sweep`."""
        before = values if self.online else values.copy()
        decay, replacing = self.discount * self.trace_decay, self.traces == "replacing"
        sweep_traces(values, before, states, rewards, discounts, step_sizes, decay, replacing)


@compiled
def sweep_traces(
    values: Floats,
    before: Floats,
    states: States,
    rewards: Floats,
    discounts: Floats,
    step_sizes: Floats,
    decay: float,
    replacing: bool,
) -> None:
    """Do TD(λ)'s updates of one episode.

    Args:
        values: ``[S]``, V, changed in place.
        before: ``[S]``, the values that TD errors are made of; ``values`` itself if they are to be online.
        states: ``[T + 1]``, and the others as in :meth:`TDPrediction.sweep`.
        rewards: ``[T]``.
        discounts: ``[T]``.
        step_sizes: ``[T]``.
        decay: γλ.
        replacing: whether a visit sets the trace to α instead of adding α.
    """
    trace = np.zeros(len(values))
    for t in range(len(rewards)):
        error = rewards[t] + discounts[t] * before[states[t + 1]] - before[states[t]]
        trace *= decay
        if replacing:
            trace[states[t]] = step_sizes[t]
        else:
            trace[states[t]] += step_sizes[t]
        values += error * trace
