"""Dyna: learn from every step as Q-learning does, remember what it led to, and learn from the memory meanwhile.

One real step is followed by ``planning_steps`` imagined ones, taken from a model that has been learned from the real
ones. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., sections 8.2 to 8.4.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from itertools import accumulate
from typing import Any, Self

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.temporal_difference import QLearning, Step

Pair = tuple[int, int]
#: A reward, a next state, and whether the task ended there.
Outcome = tuple[float, int, bool]


class LearnedModel:
    """What every state-action pair has led to so far, and how often.

    Attributes:
        pairs: (s, a) in the order in which they became known.
        outcomes: for each pair, how often each outcome has been seen.
        predecessors: for each state, the pairs that have led to it, in the order of their discovery.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.outcomes: dict[Pair, dict[Outcome, int]] = {}
        self.predecessors: dict[int, dict[Pair, None]] = defaultdict(dict)

    def know(self, pair: Pair) -> None:
        """Let planning consider a pair, even if it has never been tried."""
        if pair not in self.outcomes:
            self.pairs.append(pair)
            self.outcomes[pair] = {}

    def add(self, pair: Pair, outcome: Outcome, count: int = 1) -> None:
        """Remember that a pair had an outcome."""
        self.know(pair)
        counts = self.outcomes[pair]
        counts[outcome] = counts.get(outcome, 0) + count
        self.predecessors[outcome[1]][pair] = None

    def sample(self, pair: Pair, generator: np.random.Generator) -> Outcome:
        """Draw an outcome, each as often as it has been seen; no number is drawn where there has been one only.

        A pair that has never been tried leads back to its state, and pays nothing.
        """
        counts = self.outcomes[pair]
        if len(counts) < 2:
            return next(iter(counts), (0.0, pair[0], False))
        places = accumulate(counts.values())
        rank = int(generator.random() * sum(counts.values()))
        return next(outcome for outcome, place in zip(counts, places, strict=True) if rank < place)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the pairs, and one row per outcome; orders are kept, because they decide what is drawn later."""
        seen = [(*pair, *outcome, count) for pair, counts in self.outcomes.items() for outcome, count in counts.items()]
        leading = [(state, *pair) for state, pairs in self.predecessors.items() for pair in pairs]
        return {
            "pairs": np.array(self.pairs, np.int64).reshape(-1, 2),
            "outcomes": np.array(seen, np.float64).reshape(-1, 6),
            "predecessors": np.array(leading, np.int64).reshape(-1, 3),
        }

    @classmethod
    def from_state(cls, state: dict[str, NDArray[Any]]) -> Self:
        """Return the model that :meth:`state_dict` described."""
        model = cls()
        for pair in state["pairs"].tolist():
            model.know(tuple(pair))
        for next_state, *pair in state["predecessors"].tolist():
            model.predecessors[next_state][tuple(pair)] = None
        for s, a, reward, next_state, terminated, count in state["outcomes"].tolist():
            model.add((int(s), int(a)), (reward, int(next_state), bool(terminated)), int(count))
        return model


class DynaQ(QLearning):
    """Dyna-Q: after every real step, learn from ``planning_steps`` remembered ones, of pairs drawn uniformly.

    Where a pair has led to several outcomes, one is drawn as often as it has been seen. With no planning steps this is
    Q-learning, bit for bit. Planning counts as visits, to which the step size belongs; where the task may change, take
    a constant one. Sutton and Barto, section 8.2.

    Attributes:
        experience: the learned model.

    Args:
        env: see :class:`TDControl`.
        discount: γ.
        planning_steps: n, at least 0.
        options: the other arguments of :class:`TDControl`.

    Raises:
        ValueError: for a negative number of planning steps.
    """

    def __init__(self, env: gymnasium.Env, discount: float, planning_steps: int = 10, **options: Any) -> None:
        super().__init__(env, discount, **options)
        if planning_steps < 0:
            raise ValueError(f"planning_steps is at least 0, not {planning_steps}")
        self.planning_steps, self.experience = planning_steps, LearnedModel()

    def learn_from(self, step: Step) -> None:
        """Learn from a real step, remember it, and plan."""
        super().learn_from(step)
        self.remember(step)
        pairs, generator = self.experience.pairs, self.generator
        for _ in range(self.planning_steps):
            pair = pairs[int(generator.random() * len(pairs))]
            self.update(*pair, self.imagined_target(pair, self.experience.sample(pair, generator)))

    def remember(self, step: Step) -> None:
        """Add a step to the model."""
        self.experience.add((step.state, step.action), (step.reward, step.next_state, bool(step.terminated)))

    def imagined_target(self, pair: Pair, outcome: Outcome) -> float:
        """Return r + γ max_a' Q(s', a') for an outcome that a pair may have."""
        reward, next_state, terminated = outcome
        return reward + self.discount * (0.0 if terminated else self._next_value(self.rows[next_state], 0, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """Return the table, the visit counts and the learned model."""
        return {**super().state_dict(), "experience": self.experience.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.experience = LearnedModel.from_state(state["experience"])


class DynaQPlus(DynaQ):
    """Dyna-Q+: planning pays a bonus κ √τ for pairs that have not been tried in τ real steps.

    So what may have changed is tried again. Actions never tried in a state that has been visited are planned with too;
    until they are tried, they are imagined to lead back to that state and to pay nothing. Sutton and Barto,
    section 8.3.

    Attributes:
        last_tried: ``[S, A]``, the real step at which each pair was last tried; 0 if never.
        clock: real steps so far.

    Args:
        env: see :class:`TDControl`.
        discount: γ.
        planning_steps: n, at least 0.
        bonus: κ ≥ 0, in units of reward.
        options: the other arguments of :class:`TDControl`.

    Raises:
        ValueError: for a negative κ.
    """

    def __init__(
        self, env: gymnasium.Env, discount: float, planning_steps: int = 10, bonus: float = 1e-3, **options: Any
    ) -> None:
        super().__init__(env, discount, planning_steps, **options)
        if not bonus >= 0:
            raise ValueError(f"bonus is κ, at least 0, not {bonus}")
        self.bonus, self.clock = bonus, 0
        self.last_tried = np.zeros_like(self.visits)

    def remember(self, step: Step) -> None:
        """Add a step to the model, and at the first visit of its state all its actions."""
        self.clock += 1
        self.last_tried[step.state, step.action] = self.clock
        for action in range(self.visits.shape[1]):
            self.experience.know((step.state, action))
        super().remember(step)

    def imagined_target(self, pair: Pair, outcome: Outcome) -> float:
        """Return the target of :class:`DynaQ` with the bonus added to the reward."""
        elapsed = self.clock - int(self.last_tried[pair])
        return super().imagined_target(pair, outcome) + self.bonus * math.sqrt(elapsed)

    def state_dict(self) -> dict[str, Any]:
        """Return what :class:`DynaQ` does, and when every pair was last tried."""
        return {**super().state_dict(), "last_tried": self.last_tried.copy(), "clock": self.clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.last_tried, self.clock = state["last_tried"].copy(), state["clock"]


class PrioritizedDyna(DynaQ):
    """Prioritised sweeping with a learned model: plan first where the table would change most.

    A pair waits in a queue with priority |target − Q(s, a)|, the target being the mean of r + γ max_a' Q(s', a') over
    the outcomes seen. After every real step up to ``planning_steps`` pairs are updated, the most urgent first, and each
    update puts the pairs that lead to the changed state into the queue. A. Moore and C. Atkeson, *Prioritized
    sweeping*, 1993; Sutton and Barto, section 8.4.

    Attributes:
        queue: the priority of every waiting pair.

    Args:
        env: see :class:`TDControl`.
        discount: γ.
        planning_steps: n, at least 1: the real step is learned from by planning too.
        threshold: θ ≥ 0, pairs with a priority up to it do not wait.
        options: the other arguments of :class:`TDControl`.

    Raises:
        ValueError: for no planning steps, or a negative θ.
    """

    def __init__(
        self, env: gymnasium.Env, discount: float, planning_steps: int = 10, threshold: float = 1e-4, **options: Any
    ) -> None:
        super().__init__(env, discount, planning_steps, **options)
        if planning_steps < 1 or not threshold >= 0:
            raise ValueError(f"needs planning_steps ≥ 1 and threshold ≥ 0, not {planning_steps} and {threshold}")
        self.threshold = threshold
        self.queue: dict[Pair, float] = {}
        self._heap: list[tuple[float, Pair]] = []

    def learn_from(self, step: Step) -> None:
        """Remember a real step, and plan."""
        self.remember(step)
        self.consider((step.state, step.action))
        for _ in range(self.planning_steps):
            pair = self.most_urgent()
            if pair is None:
                return
            self.update(*pair, self.expected_target(pair))
            for predecessor in self.experience.predecessors[pair[0]]:
                self.consider(predecessor)

    def expected_target(self, pair: Pair) -> float:
        """Return the mean of r + γ max_a' Q(s', a') over what a pair has led to."""
        counts = self.experience.outcomes[pair]
        total = sum(count * self.imagined_target(pair, outcome) for outcome, count in counts.items())
        return total / sum(counts.values())

    def consider(self, pair: Pair) -> None:
        """Let a pair wait for an update, if that would change more than the threshold."""
        priority = abs(self.expected_target(pair) - self.rows[pair[0]][pair[1]])
        if priority > max(self.threshold, self.queue.get(pair, 0.0)):
            self.queue[pair] = priority
            heapq.heappush(self._heap, (-priority, pair))

    def most_urgent(self) -> Pair | None:
        """Take the pair of the highest priority out of the queue; ``None`` if nothing waits."""
        while self._heap:
            priority, pair = heapq.heappop(self._heap)
            # A pair whose priority has risen is in the heap more than once; only the last entry counts.
            if self.queue.get(pair) == -priority:
                del self.queue[pair]
                return pair
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what :class:`DynaQ` does, and the queue."""
        waiting = np.array([(*pair, priority) for pair, priority in self.queue.items()], np.float64)
        return {**super().state_dict(), "queue": waiting.reshape(-1, 3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.queue = {(int(s), int(a)): priority for s, a, priority in state["queue"].tolist()}
        self._heap = [(-priority, pair) for pair, priority in self.queue.items()]
        heapq.heapify(self._heap)
