"""Double Q-learning: two tables, so that the one that chooses an action is not the one that values it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from aligngym.agents.temporal_difference import QLearning, Step, epsilon_greedy


class DoubleQLearning(QLearning):
    """Double Q-learning: Q_1(s, a) moves towards r + γ Q_2(s', argmax_a' Q_1(s', a')), or 1 and 2 swap their roles.

    A coin decides which table learns from a step. max_a Q(s', a) of noisy values is too large in the mean; a value from
    a table that did not choose the action is not. The behaviour is ε-greedy in their mean, and ``visits`` counts
    updates of either. H. van Hasselt, *Double Q-learning*, 2010; R. Sutton and A. Barto, *Reinforcement Learning*,
    2nd ed., section 6.7.

    Attributes:
        action_values: ``[S, A]``, (Q_1 + Q_2) / 2.
        tables: ``[2, S, A]``, Q_1 and Q_2.

    Args:
        env: see :class:`TDControl`.
        discount: γ.
        options: the other arguments of :class:`TDControl`.
    """

    def __init__(self, env: gymnasium.Env, discount: float, **options: Any) -> None:
        super().__init__(env, discount, **options)
        self.tables = np.zeros((2, *self.action_values.shape))

    def learn_from(self, step: Step) -> None:
        """Move one entry of one table."""
        state, action = step.state, step.action
        learning, other = self.tables if self.generator.random() < 0.5 else self.tables[::-1]
        following = 0.0
        if not step.terminated:
            best = epsilon_greedy(learning[step.next_state].tolist(), 0.0, self.generator)
            following = other[step.next_state, best]
        target = step.reward + self.discount * following
        learning[state, action] += self.step_size(self._counts[state][action]) * (target - learning[state, action])
        self._counts[state][action] += 1
        self.rows[state][action] = (learning[state, action] + other[state, action]) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return both tables and the visit counts."""
        return {**super().state_dict(), "tables": self.tables.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.tables = state["tables"].copy()
