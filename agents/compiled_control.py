"""The loop of one-step temporal-difference control, compiled, for environments that sample from their own model.

Everything here is also plain Python, and draws the same random numbers in the same order as the environment and the
agent do themselves, so that both ways end in the same table, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligngym.core.compilation import compiled, function_pointer, interpreted
from aligngym.core.schedules import Schedule
from aligngym.envs.sampling import draw
from aligngym.envs.tabular_mdp import TabularMDP

#: More steps than any episode has.
LONGEST = 2**62

#: The values Q(s, ·) of one state, as anything that has a length, an order and a largest element.
Row = Sequence[float] | NDArray[np.float64]

#: See :meth:`aligngym.agents.temporal_difference.TDControl.next_value`.
NextValue = Callable[[Any, int, float], float]


class Sampler(NamedTuple):
    """What it takes to draw from a :class:`TabularMDP`; its attributes, without the object around them."""

    row_starts: NDArray[np.int64]
    cumulative: NDArray[np.float64]
    next_states: NDArray[np.int64]
    rewards: NDArray[np.float64]
    terminal: NDArray[np.bool_]
    starts: NDArray[np.int64]
    cumulative_starts: NDArray[np.float64]


class Learner(NamedTuple):
    """What the loop works on, and with.

    Attributes:
        action_values: ``[S, A]``, Q, changed in place.
        visits: ``[S, A]``, how often each entry has been updated, changed in place.
        step_sizes: ``[K]``, α_k for the first K updates of an entry.
        behaviour: ``[S, A]``, cumulative probabilities of a fixed behaviour, or ``[0, A]`` for an ε-greedy one.
        discount: γ.
        epsilon: ε.
        limit: steps after which an episode is truncated.
    """

    action_values: NDArray[np.float64]
    visits: NDArray[np.int64]
    step_sizes: NDArray[np.float64]
    behaviour: NDArray[np.float64]
    discount: float
    epsilon: float
    limit: int


class Progress(NamedTuple):
    """How far the loop is: what one call returns and the next one continues from.

    Attributes:
        episodes: how many are still to be finished.
        state: s.
        action: the action chosen there, or −1 before an episode.
        length: steps of this episode so far.
        steps: steps of all episodes so far.
        total: their rewards, added up.
    """

    episodes: int
    state: int = 0
    action: int = -1
    length: int = 0
    steps: int = 0
    total: float = 0.0


def sampler(mdp: TabularMDP) -> Sampler:
    """Return what it takes to draw from a model."""
    arrays = (mdp.row_starts, mdp.cumulative, mdp.outcomes.next_states, mdp.outcomes.rewards, mdp.terminal, *mdp.starts)
    return Sampler(*(np.ascontiguousarray(array) for array in arrays))


@compiled
def epsilon_greedy(values: Any, epsilon: float, generator: np.random.Generator) -> int:
    """Return any action with probability ε, and otherwise one of the highest value, ties broken at random.

    Raises:
        FloatingPointError: if the values are not numbers any more.
    """
    if generator.random() < epsilon:
        return int(generator.random() * len(values))
    best, ties, chosen = max(values), 0, 0
    for action, value in enumerate(values):
        if value == best:
            ties, chosen = ties + 1, action
    if ties == 0:
        raise FloatingPointError("the learned values are not numbers any more: the step size is too large")
    if ties > 1:
        others = int(generator.random() * ties)
        for action, value in enumerate(values):
            if value == best:
                if others == 0:
                    return action
                others -= 1
    return chosen


@compiled
def choose(learner: Learner, state: int, generator: np.random.Generator) -> int:
    """Return an action of the behaviour."""
    if len(learner.behaviour) > 0:
        return draw(learner.behaviour[state], generator)
    return epsilon_greedy(learner.action_values[state], learner.epsilon, generator)


@compiled
def play(
    next_value: NextValue,
    sampler: Sampler,
    learner: Learner,
    progress: Progress,
    generator: np.random.Generator,
    env_generator: np.random.Generator,
) -> Progress:
    """Play episodes and learn from each step, until they are done or an update needs a step size beyond the table's.

    Args:
        next_value: what the state after a step is worth, see :meth:`TDControl.next_value`.
        sampler: the model.
        learner: the table and all that changes it.
        progress: where to start, or to continue.
        generator: of the behaviour.
        env_generator: of the environment.
    """
    episodes, state, action, length, steps, total = progress
    values, visits, num_actions = learner.action_values, learner.visits, learner.action_values.shape[1]
    while episodes > 0:
        if action < 0:
            state = sampler.starts[draw(sampler.cumulative_starts, env_generator)]
            action = choose(learner, state, generator)
        if visits[state, action] >= len(learner.step_sizes):
            break
        row = state * num_actions + action
        first, end = sampler.row_starts[row], sampler.row_starts[row + 1]
        outcome = first + draw(sampler.cumulative[first:end], env_generator)
        next_state, reward = sampler.next_states[outcome], sampler.rewards[outcome]
        next_action = choose(learner, next_state, generator)
        terminated = sampler.terminal[next_state]
        following = 0.0 if terminated else next_value(values[next_state], next_action, learner.epsilon)
        step_size = learner.step_sizes[visits[state, action]]
        values[state, action] += step_size * (reward + learner.discount * following - values[state, action])
        visits[state, action] += 1
        total += reward
        steps += 1
        length += 1
        state, action = next_state, next_action
        if terminated or length >= learner.limit:
            episodes, action, length = episodes - 1, -1, 0
    return Progress(episodes, state, action, length, steps, total)


class CompiledEpisodes:
    """Plays episodes in compiled code.

    Args:
        mdp: the model that the environment samples from.
        next_value: what the state after a step is worth; one for which :func:`is_compiled` is true.
        step_size: α_k for the k-th update of an entry.
        behaviour: ``[S, A]``, cumulative probabilities of a fixed behaviour, or ``[0, A]`` for an ε-greedy one.
        discount: γ.
        limit: steps after which an episode is truncated; may be infinite.
    """

    def __init__(
        self,
        mdp: TabularMDP,
        next_value: NextValue,
        step_size: Schedule,
        behaviour: NDArray[np.float64],
        discount: float,
        limit: float,
    ) -> None:
        self.sampler, self.step_size = sampler(mdp), step_size
        self.next_value = function_pointer(next_value, "float64(float64[::1], int64, float64)")
        self.behaviour, self.discount, self.limit = behaviour, float(discount), int(min(limit, LONGEST))
        self.step_sizes = np.zeros(0)

    def play(
        self,
        action_values: NDArray[np.float64],
        visits: NDArray[np.int64],
        epsilon: float,
        episodes: int,
        generator: np.random.Generator,
        env_generator: np.random.Generator,
    ) -> tuple[float, int]:
        """Play episodes, change the tables, and return the sum of rewards and the number of steps."""
        progress = Progress(episodes)
        while progress.episodes:
            learner = Learner(
                action_values, visits, self.step_sizes, self.behaviour, self.discount, float(epsilon), self.limit
            )
            progress = play(self.next_value, self.sampler, learner, progress, generator, env_generator)
            if progress.episodes:
                self._add_step_sizes()
        return progress.total, progress.steps

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledEpisodes:
        # Nothing here is changed by learning but how many step sizes are known, which can be shared.
        return self

    def _add_step_sizes(self) -> None:
        """Double the table of step sizes: a schedule is any Python function, which compiled code cannot call."""
        size = len(self.step_sizes)
        more = [self.step_size(step) for step in range(size, max(1024, 2 * size))]
        self.step_sizes = np.concatenate([self.step_sizes, np.array(more, dtype=np.float64)])


def is_compiled(function: Any) -> bool:
    """Return whether a function went through :func:`aligngym.core.compilation.compiled`, and there is numba."""
    return interpreted(function) is not function
