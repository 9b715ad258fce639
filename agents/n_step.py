"""n-step control: targets that look n rewards ahead before they trust the table.

    G = r_1 + γ r_2 + … + γ^(n−1) r_n + γ^n · next_value

A step is learned from when the n − 1 steps after it are known too, or the episode is over. With n = 1 these are the
one-step methods, bit for bit. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., chapter 7.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
from numpy.typing import ArrayLike

from aligngym.agents.temporal_difference import ExpectedSarsa, Sarsa, Step, TDControl


class NStepControl(TDControl):
    """Learn from n steps at a time; what the last of them leads to is worth :meth:`next_value`.

    Args:
        env: see :class:`TDControl`.
        discount: γ.
        n: steps, at least 1.
        options: the other arguments of :class:`TDControl`.

    Raises:
        ValueError: for n < 1.
    """

    def __init__(self, env: gymnasium.Env, discount: float, n: int = 4, **options: Any) -> None:
        super().__init__(env, discount, **options)
        if n < 1:
            raise ValueError(f"n is a number of steps, at least 1, not {n}")
        self.n = n
        self._recent: deque[Step] = deque()

    def start_episode(self) -> None:
        """Forget the steps of the last episode."""
        self._recent.clear()

    def learn_from(self, step: Step) -> None:
        """Learn from the step n − 1 before this one; at the end of an episode, from all that are left."""
        self._recent.append(step)
        while len(self._recent) == self.n or (step.over and self._recent):
            first = self._recent[0]
            self.update(first.state, first.action, self.target())
            self._recent.popleft()

    def target(self) -> float:
        """Return G for the first of the recent steps, built from the last one backwards."""
        following = self.following(self._recent[-1])
        for index in range(len(self._recent) - 1, 0, -1):
            result = self._recent[index].reward + self.discount * following
            following = self.continued(self._recent[index - 1], result)
        return self._recent[0].reward + self.discount * following

    def continued(self, step: Step, result: float) -> float:
        """Return what the state after a step is worth, given the target ``result`` of the action taken there."""
        return result


class NStepSarsa(NStepControl, Sarsa):
    """n-step Sarsa: after n rewards, Q(s_n, a_n) of the action that the behaviour takes. Section 7.2."""


class NStepExpectedSarsa(NStepControl, ExpectedSarsa):
    """n-step Expected Sarsa: after n rewards, the mean of Q(s_n, ·) under the ε-greedy policy. Section 7.2.

    All but the last action are sampled, so they must come from the policy learned about: :class:`TreeBackup` is for
    other behaviours.

    Raises:
        ValueError: for a ``behaviour`` and n > 1.
    """

    def __init__(
        self, env: gymnasium.Env, discount: float, n: int = 4, *, behaviour: ArrayLike | None = None, **options: Any
    ) -> None:
        if behaviour is not None and n > 1:
            raise ValueError(f"n-step Expected Sarsa with n = {n} learns about its behaviour; take TreeBackup instead")
        super().__init__(env, discount, n, behaviour=behaviour, **options)


class TreeBackup(NStepControl, ExpectedSarsa):
    """n-step tree backup: at every state the action taken contributes what it led to, the others their Q. Section 7.5.

    What the state s' after a step is worth is Σ_a π(a | s') Q(s', a), with the target G in the place of Q(s', a') for
    the action a' taken there. π is the ε-greedy policy, whatever the behaviour; with ``epsilon=0`` and a ``behaviour``
    this learns Q* off-policy over n steps, without importance sampling.
    """

    def continued(self, step: Step, result: float) -> float:
        """Return Σ_a π(a | s') Q(s', a) + π(a' | s') (G − Q(s', a'))."""
        values = self.rows[step.next_state]
        best = max(values)
        greedy = (values[step.next_action] == best) / sum(value == best for value in values)
        probability = self._epsilon / len(values) + (1 - self._epsilon) * greedy
        return self.following(step) + probability * (result - values[step.next_action])
