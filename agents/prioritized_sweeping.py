"""Planning where it matters: states in the order of how wrong they are."""

from __future__ import annotations

import heapq
import math
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.dynamic_programming import DynamicProgramming
from aligngym.agents.error_bounds import expected_steps, lowest_values
from aligngym.agents.sweep_order import Predecessors, predecessors
from aligngym.agents.sweeps import Rows, Values, rows_of, sweep
from aligngym.core.callbacks import Metrics
from aligngym.core.compilation import compiled
from aligngym.envs.tabular_mdp import TabularMDP


class PrioritizedSweeping(DynamicProgramming):
    """Back up the state whose value is most wrong, tell those that lead to it, and repeat.

    A queue holds states by the magnitude of their Bellman error |(TV)(s) − V(s)|, the largest first. When V(s) changes
    by Δ, the error of a predecessor changes by at most γ p(s | predecessor, a) |Δ|, which is its priority if it is more
    than it was. An iteration is up to S of these backups, as many as a sweep has, and then a look at all errors, which
    sets the priorities right and proves how good the values are. With γ < 1, V begins at a lower bound of V*.

    Where few values change, as after a change of the model or far from a single goal, few states are looked at. Where
    all change, plain sweeps are faster: they need no queue. A. Moore and C. Atkeson, *Prioritized sweeping*, 1993;
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 8.4.

    Args:
        mdp: a model, or an environment that has one.
        discount: γ in [0, 1].
        tolerance: the certified error ‖V − V*‖∞ to stop at.

    Attributes:
        backups: how many there have been.

    Raises:
        TypeError: if an environment has no exact model.
        ValueError: for a bad discount or tolerance, or a discount of 1 where values are infinite.
    """

    def __init__(self, mdp: TabularMDP | gymnasium.Env, discount: float, tolerance: float = 1e-6) -> None:
        super().__init__(mdp, discount, tolerance)
        self._refuse_unbounded_values()
        self.values = lowest_values(self.mdp, discount)
        self.backups = 0

    def iterate(self) -> Metrics:
        """Do up to S backups, the most urgent first, and look at all errors."""
        rows, better = rows_of(self.mdp), np.empty_like(self.values)
        largest = sweep(self.values, better, rows, self.discount)
        # Errors a tenth of the largest may wait: smaller ones would be computed many times.
        threshold = max(largest / 10, self._negligible)
        errors = np.abs(better - self.values)
        self.backups += backup_by_priority(
            self.values, errors, rows, self._predecessors, self.discount, threshold, self.mdp.num_states
        )
        # One more sweep says how wrong the values are that the backups have left, and is not wasted.
        change = sweep(self.values, better, rows, self.discount)
        self.values = better
        self._judge(change)
        return {**self._metrics(), "backups": float(self.backups)}

    @property
    def _negligible(self) -> float:
        """The Bellman error that the tolerance allows everywhere."""
        return self.tolerance * (1 - self.discount) / 2 if self.discount < 1 else 0.0

    @cached_property
    def _predecessors(self) -> Predecessors:
        return predecessors(rows_of(self.mdp), with_probabilities=True)

    @cached_property
    def _longest_episode(self) -> float:
        return expected_steps(self.mdp, self.discount)

    def state_dict(self) -> dict[str, Any]:
        """Return the values and the number of backups."""
        return {**super().state_dict(), "backups": self.backups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.backups = state["backups"]


@compiled
def backup_by_priority(
    values: Values,
    priorities: NDArray[np.float64],
    rows: Rows,
    predecessors: Predecessors,
    discount: float,
    threshold: float,
    limit: int,
) -> int:
    """Back up states in place, the highest priority first, and return how many.

    Args:
        values: ``[S]``, V.
        priorities: ``[S]``, Bellman errors; changed.
        rows: the model.
        predecessors: from where states can be entered, with probabilities.
        discount: γ.
        threshold: a priority to ignore, with all below it.
        limit: backups at most.
    """
    queue = [(-math.inf, np.int64(0))]
    queue.pop()
    for state in range(len(values)):
        if priorities[state] > threshold:
            heapq.heappush(queue, (-priorities[state], np.int64(state)))
    done = 0
    while len(queue) > 0 and done < limit:
        negative, urgent = heapq.heappop(queue)
        # A state that was queued again with a higher priority leaves its older entry behind.
        if -negative != priorities[urgent]:
            continue
        priorities[urgent] = 0.0
        best = _best(values, rows, discount, int(urgent))
        change = abs(best - values[urgent])
        values[urgent] = best
        done += 1
        for index in range(predecessors.starts[urgent], predecessors.starts[urgent + 1]):
            before = predecessors.states[index]
            priority = discount * predecessors.probabilities[index] * change
            if priority > threshold and priority > priorities[before]:
                priorities[before] = priority
                heapq.heappush(queue, (-priority, np.int64(before)))
    return done


@compiled
def _best(values: Values, rows: Rows, discount: float, state: int) -> float:
    """Return max_a r(s, a) + γ Σ_s' p(s' | s, a) V(s') for one state."""
    num_actions = rows.rewards.shape[1]
    best = -np.inf
    for action in range(num_actions):
        row = state * num_actions + action
        following = 0.0
        for index in range(rows.starts[row], rows.starts[row + 1]):
            following += rows.probabilities[index] * values[rows.next_states[index]]
        best = max(best, rows.rewards[state, action] + discount * following)
    return best
