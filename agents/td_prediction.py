"""Temporal-difference prediction: learning V_π, the value of a given policy, from its episodes.

Every step moves one entry of a table towards a target,

    V(s_t) ← V(s_t) + α (target − V(s_t)),

and the algorithms differ in the target, which is all that stands in the middle of each sweep below. ``discounts[t]`` is
what the state after step t counts: γ, but 0 after a termination; after a truncation the task would have gone on. The
sweeps are written out because compiled they run some hundred times as fast; Python runs them to the same result.
R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., chapters 6 and 7.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.prediction import Episode, Prediction
from aligngym.core.compilation import compiled
from aligngym.core.schedules import Power, Schedule, as_schedule

Floats = NDArray[np.float64]
States = NDArray[np.int64]


class TDPrediction(Prediction):
    """Learn a table of values from whole episodes. An iteration is one episode.

    A subclass overrides :meth:`sweep`. The table, the visit counts and the iteration are the whole state: a saved agent
    continues exactly.

    Attributes:
        values: ``[S]``, V, 0 at first.
        visits: ``[S]``, how many updates each entry has had.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        policy: ``[S, A]``, π(a | s).
        discount: γ in [0, 1].
        step_size: α. A schedule is evaluated at the number of updates that *this* state has had before, as Robbins and
            Monro's conditions need it; a number is constant. The default (k + 1)^(−0.8) meets the conditions.
        seed: of everything random.
        max_episode_steps: cuts episodes; needed where a task does not end by itself.

    Raises:
        TypeError: if the spaces are not of that kind.
        ValueError: see :class:`Prediction`.
    """

    values: Floats = np.empty(0)

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        discount: float,
        step_size: float | Schedule = Power(exponent=0.8),  # noqa: B008 (frozen)
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
    ) -> None:
        super().__init__(env, policy, discount, seed=seed, max_episode_steps=max_episode_steps)
        self.step_size = as_schedule(step_size)
        self.values = np.zeros(len(self._policy))
        self.visits = np.zeros(len(self._policy), dtype=np.int64)
        self._step_sizes_by_visit = np.zeros(0)

    @abstractmethod
    def sweep(self, values: Floats, states: States, rewards: Floats, discounts: Floats, step_sizes: Floats) -> None:
        """Change ``values`` by what one episode teaches.

        Args:
            values: ``[S]``, V, changed in place.
            states: ``[T + 1]``, s_0 … s_T.
            rewards: ``[T]``, what the step from s_t paid.
            discounts: ``[T]``, what s_{t+1} counts: γ, and 0 after a termination.
            step_sizes: ``[T]``, α of the update of s_t.
        """

    def update(self, episode: Episode) -> None:
        """Learn from one episode, whoever played it."""
        step_sizes = self._next_step_sizes(episode.states[:-1])
        self.sweep(self.values, episode.states, episode.rewards, episode.discounts(self.discount), step_sizes)

    def _next_step_sizes(self, states: States) -> Floats:
        """Return α for each update of an episode, and count the updates."""
        # The k-th appearance of a state in the episode is its update number visits + k.
        order = states.argsort(kind="stable")
        appearance = np.empty_like(states)
        appearance[order] = np.arange(len(states)) - np.searchsorted(states[order], states[order])
        counts = self.visits[states] + appearance
        known = len(self._step_sizes_by_visit)
        if counts.max() >= known:
            more = [self.step_size(count) for count in range(known, 2 * int(counts.max()) + 1)]
            self._step_sizes_by_visit = np.append(self._step_sizes_by_visit, more)
        self.visits += np.bincount(states, minlength=len(self.visits))
        return self._step_sizes_by_visit[counts]

    def state_dict(self) -> dict[str, Any]:
        """Return the table and the visit counts."""
        return {"values": self.values.copy(), "visits": self.visits.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if they are values of another number of states.
        """
        if state["values"].shape != self.values.shape:
            raise ValueError(f"saved values of {len(state['values'])} states, and this table has {len(self.values)}")
        self.values, self.visits = state["values"].copy(), state["visits"].copy()


class TD0(TDPrediction):
    """TD(0): the target is one reward and what follows, r_t + γ V(s_{t+1}).

    R. Sutton, *Learning to predict by the methods of temporal differences*, 1988; Sutton and Barto, section 6.1.
    """

    def sweep(self, values: Floats, states: States, rewards: Floats, discounts: Floats, step_sizes: Floats) -> None:
        """See :meth:`TDPrediction.sweep`."""
        sweep_td0(values, states, rewards, discounts, step_sizes)


@compiled
def sweep_td0(values: Floats, states: States, rewards: Floats, discounts: Floats, step_sizes: Floats) -> None:
    """Do TD(0)'s updates of one episode; arguments as in :meth:`TDPrediction.sweep`."""
    for t in range(len(rewards)):
        target = rewards[t] + discounts[t] * values[states[t + 1]]
        values[states[t]] += step_sizes[t] * (target - values[states[t]])


class NStepTD(TDPrediction):
    """n-step TD: the target is n rewards and what follows, r_t + γ r_{t+1} + … + γ^n V(s_{t+n}).

    An episode that ends earlier is summed up to its end. n = 1 is TD(0); n beyond the length of all episodes is
    constant-α Monte Carlo. Sutton and Barto, section 7.1.

    Args:
        env: see :class:`TDPrediction`, as all others.
        policy: ``[S, A]``.
        discount: γ.
        step_size: α.
        steps: n, at least 1.
        seed: of everything random.
        max_episode_steps: cuts episodes.

    Raises:
        ValueError: for fewer than one step.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        discount: float,
        step_size: float | Schedule = Power(exponent=0.8),  # noqa: B008 (frozen)
        *,
        steps: int = 4,
        **options: Any,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is the n of n-step TD, at least 1, not {steps}")
        super().__init__(env, policy, discount, step_size, **options)
        self.steps = steps

    def sweep(self, values: Floats, states: States, rewards: Floats, discounts: Floats, step_sizes: Floats) -> None:
        """See :meth:`TDPrediction.sweep`."""
        sweep_n_step(values, states, rewards, discounts, step_sizes, self.steps)


@compiled
def sweep_n_step(
    values: Floats, states: States, rewards: Floats, discounts: Floats, step_sizes: Floats, steps: int
) -> None:
    """Do n-step TD's updates of one episode; arguments as in :meth:`TDPrediction.sweep`, and n."""
    for t in range(len(rewards)):
        end = min(t + steps, len(rewards))
        target, weight = 0.0, 1.0
        for k in range(t, end):
            target += weight * rewards[k]
            weight *= discounts[k]
        target += weight * values[states[end]]
        values[states[t]] += step_sizes[t] * (target - values[states[t]])
