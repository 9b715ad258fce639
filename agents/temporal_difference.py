"""Temporal-difference control: learning action values from single steps, without a model.

Every step moves one entry of a table towards a target,

    Q(s, a) ← Q(s, a) + α (r + γ · next_value − Q(s, a)),

and the algorithms differ in ``next_value`` only. After a termination it is 0; a truncation changes nothing, because
the task would have gone on. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., chapter 6.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from copy import deepcopy
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray

from aligngym.agents import compiled_control
from aligngym.agents.action_values import ActionValueAgent
from aligngym.agents.compiled_control import CompiledEpisodes, Row, is_compiled
from aligngym.agents.endless_tasks import refuse_endless_task, time_limit
from aligngym.core.callbacks import Metrics
from aligngym.core.compilation import compiled, interpreted
from aligngym.core.schedules import Power, Schedule, as_schedule
from aligngym.envs import sampling
from aligngym.envs.tabular_env import model_of

#: The same functions that the compiled loop is made of, run by Python, which is faster for a single call.
draw, epsilon_greedy = interpreted(sampling.draw), interpreted(compiled_control.epsilon_greedy)


class Step(NamedTuple):
    """One step of an episode.

    Attributes:
        state: s.
        action: a.
        reward: r.
        next_state: s'.
        next_action: the action that the behaviour takes in s' if the episode goes on.
        terminated: whether the task ended, so that nothing more is to be earned.
        over: whether the episode ended, terminated or truncated.
    """

    state: int
    action: int
    reward: float
    next_state: int
    next_action: int
    terminated: bool
    over: bool


class Rows(dict[int, Any]):
    """The rows of a table, as memory views: Python reads and writes their numbers much faster than those of arrays."""

    def __init__(self, table: NDArray[Any]) -> None:
        super().__init__()
        self.table = table

    def __missing__(self, state: int) -> Any:
        row = self[state] = memoryview(self.table[state])
        return row

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        return Rows(deepcopy(self.table, memo))


class TDControl(ActionValueAgent):
    """One-step TD control. An iteration is one episode, or ``episodes_per_iteration`` of them.

    A subclass defines :meth:`next_value`. If that is decorated with :func:`aligngym.core.compilation.compiled` and the
    environment does nothing but sample from its exact model (a :class:`TabularEnv`, alone or under a time limit), the
    whole iteration runs as compiled code, to the same result bit for bit. Otherwise Python steps the environment,
    whatever it is. A subclass with another way of learning from a step overrides :meth:`learn_from`.

    All randomness of an iteration, the environment's included, comes from the seed and the iteration's number. So the
    table, the visit counts and the iteration are the whole state: a saved agent continues exactly.

    Attributes:
        action_values: ``[S, A]``, Q, 0 at first.
        visits: ``[S, A]``, how often each entry has been updated.
        rows: the rows of Q, see :class:`Rows`.
        generator: of the present iteration.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        discount: γ in [0, 1].
        step_size: α. A schedule is evaluated at the number of updates that *this* (s, a) has had before, as Robbins and
            Monro's conditions need it; a number is constant. The default (k + 1)^(−0.8) meets the conditions.
        epsilon: probability of an action drawn uniformly, in [0, 1]; a schedule is evaluated at the iteration.
        seed: of everything random.
        tolerance: the certified error at which :attr:`converged` says so.
        behaviour: ``[S, A]``, a fixed π(a | s) to draw actions from, for learning off-policy; ε-greedy if not given.
            ``epsilon`` is then that of the policy learned about, if the algorithm's :meth:`next_value` has one.
        episodes_per_iteration: episodes in an iteration, whose metrics are means over them. Several save time where
            episodes are short.
        max_episode_steps: truncates episodes of environments without a time limit of their own; a task that never ends
            needs one.
        compiled: false to let Python step every environment.

    Raises:
        TypeError: if the spaces are not of that kind, or ``next_value`` is no static method.
        ValueError: for a discount or an ε outside [0, 1], a behaviour that is no policy, fewer than one episode or
            step, or a task that is known not to end without a time limit or with a discount of 1.
    """

    headline = ("return", "length")
    #: What the compiled loop does in its own way; a subclass that overrides one of these is played by Python.
    _played_by_python = ("start_episode", "learn_from", "following", "update", "explore")

    def __init__(
        self,
        env: gymnasium.Env,
        discount: float,
        step_size: float | Schedule = Power(exponent=0.8),  # noqa: B008 (frozen)
        epsilon: float | Schedule = 0.1,
        seed: int = 0,
        tolerance: float = 1e-2,
        *,
        behaviour: ArrayLike | None = None,
        episodes_per_iteration: int = 1,
        max_episode_steps: int | None = None,
        compiled: bool = True,
    ) -> None:
        if not isinstance(inspect.getattr_static(type(self), "next_value"), staticmethod):
            raise TypeError("next_value(values, next_action, epsilon) needs no self: decorate it with @staticmethod")
        if episodes_per_iteration < 1 or (max_episode_steps is not None and max_episode_steps < 1):
            raise ValueError(
                f"an iteration is at least one episode of at least one step, not {episodes_per_iteration} "
                f"of {max_episode_steps}"
            )
        refuse_endless_task(env, discount, max_episode_steps or math.inf)
        super().__init__(env, discount, tolerance)
        self.seed = seed
        self.step_size, self.epsilon = as_schedule(step_size), as_schedule(epsilon)
        if self.epsilon(0) > 1:
            raise ValueError(f"epsilon is a probability, and it starts at {self.epsilon(0)}")
        self.episodes_per_iteration, self.max_episode_steps = episodes_per_iteration, max_episode_steps
        self.unit = "episode" if episodes_per_iteration == 1 else f"{episodes_per_iteration} episodes"
        self.behaviour = None if behaviour is None else _checked_behaviour(behaviour, self.visits.shape)
        self._cumulative = [] if self.behaviour is None else self.behaviour.cumsum(axis=1).tolist()
        self._next_value = interpreted(self.next_value)
        self._compiled = self._compiled_episodes() if compiled else None
        self.rows, self._counts = Rows(self.action_values), Rows(self.visits)
        self._start_iteration(np.random.default_rng([seed, 0]), self.epsilon(0))

    @property
    def compiled(self) -> bool:
        """Whether iterations run as compiled code."""
        return self._compiled is not None

    @staticmethod
    @abstractmethod
    def next_value(values: Row, next_action: int, epsilon: float) -> float:
        """Return what the state after a step is worth to this algorithm.

        Args:
            values: the row Q(s', ·), an array or a memory view: index it, or take ``max``, ``len`` or a loop.
            next_action: the action that the behaviour takes in s' if the episode goes on.
            epsilon: of the ε-greedy policy.
        """

    def iterate(self) -> Metrics:
        """Play the episodes of one iteration and learn from each step."""
        generator = np.random.default_rng([self.seed, self.iteration])
        env_seed, epsilon = int(generator.random() * 2**31), self.epsilon(self.iteration)
        self._start_iteration(generator, epsilon)
        episodes = self.episodes_per_iteration
        if self._compiled is None:
            total, steps = self._play(env_seed)
        else:
            env_generator, _ = seeding.np_random(env_seed)
            tables = self.action_values, self.visits
            total, steps = self._compiled.play(*tables, epsilon, episodes, generator, env_generator)
        return {"return": total / episodes, "length": steps / episodes, "epsilon": epsilon}

    def _play(self, env_seed: int) -> tuple[float, int]:
        """Play the episodes by stepping the environment; return the sum of rewards and the number of steps."""
        generator, epsilon, limit = self.generator, self._epsilon, self.max_episode_steps or math.inf
        step_env, explore, learn_from = self.env.step, self.explore, self.learn_from
        total, steps = 0.0, 0
        for episode in range(self.episodes_per_iteration):
            observation, _ = self.env.reset(seed=None if episode else env_seed)
            self.start_episode()
            state, length, over = int(observation), 0, False
            action = explore(state, epsilon, generator)
            while not over:
                observation, reward, terminated, truncated, _ = step_env(action)
                next_state, reward, length = int(observation), float(reward), length + 1
                next_action = explore(next_state, epsilon, generator)
                over = terminated or truncated or length >= limit
                learn_from(Step(state, action, reward, next_state, next_action, terminated, over))
                state, action = next_state, next_action
                total += reward
            steps += length
        return total, steps

    def start_episode(self) -> None:
        """Forget what belongs to the last episode; there is nothing of the kind in a one-step method."""

    def learn_from(self, step: Step) -> None:
        """Move Q(s, a) towards r + γ · next_value."""
        self.update(step.state, step.action, step.reward + self.discount * self.following(step))

    def following(self, step: Step) -> float:
        """Return what the state after a step is worth: 0 after a termination, and :meth:`next_value` otherwise."""
        if step.terminated:
            return 0.0
        return self._next_value(self.rows[step.next_state], step.next_action, self._epsilon)

    def update(self, state: int, action: int, target: float) -> None:
        """Move Q(s, a) towards the target, as far as the step size of this visit says."""
        values, counts = self.rows[state], self._counts[state]
        values[action] += self.step_size(counts[action]) * (target - values[action])
        counts[action] += 1

    def explore(self, state: int, epsilon: float, generator: np.random.Generator) -> int:
        """Return an action of the behaviour; that of an ε-greedy one breaks ties at random."""
        if self.behaviour is not None:
            return draw(self._cumulative[state], generator)
        return epsilon_greedy(self.rows[state], epsilon, generator)

    def _start_iteration(self, generator: np.random.Generator, epsilon: float) -> None:
        self.generator, self._epsilon = generator, epsilon
        if self.rows.table is not self.action_values or self._counts.table is not self.visits:
            self.rows, self._counts = Rows(self.action_values), Rows(self.visits)

    def _compiled_episodes(self) -> CompiledEpisodes | None:
        """Return what plays episodes in compiled code, or ``None`` where that could make a difference."""
        kind, mdp = type(self), model_of(self.env)
        own = all(getattr(kind, name) is getattr(TDControl, name) for name in self._played_by_python)
        if mdp is None or not own or not is_compiled(kind.next_value):
            return None
        limit = min(self.max_episode_steps or math.inf, time_limit(self.env))
        cumulative = np.array(self._cumulative).reshape(-1, mdp.num_actions)
        return CompiledEpisodes(mdp, kind.next_value, self.step_size, cumulative, self.discount, limit)


class Sarsa(TDControl):
    """Sarsa: the next state is worth Q(s', a') for the action a' that the behaviour takes there.

    It learns the values of its own behaviour: of the best ε-greedy policy with a constant ε, and Q* if ε goes to 0
    slowly enough that every (s, a) is visited for ever (S. Singh et al., *Convergence results for single-step
    on-policy reinforcement-learning algorithms*, 2000). With a fixed behaviour it learns that policy's values.
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 6.4.
    """

    @staticmethod
    @compiled
    def next_value(values: Row, next_action: int, epsilon: float) -> float:
        """Return Q(s', a')."""
        return values[next_action]


class ExpectedSarsa(TDControl):
    """Expected Sarsa: the next state is worth the mean of Q(s', ·) under the ε-greedy policy.

    That is what Sarsa samples, without the noise of the sampling; and the behaviour may be another policy.
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 6.6.
    """

    @staticmethod
    @compiled
    def next_value(values: Row, next_action: int, epsilon: float) -> float:
        """Return (1 − ε) max_a Q(s', a) + ε Σ_a Q(s', a) / A."""
        total = 0.0
        for value in values:
            total += value
        return (1 - epsilon) * max(values) + epsilon * total / len(values)


class QLearning(TDControl):
    """Q-learning: the next state is worth max_a Q(s', a), whatever the behaviour does there.

    It converges to Q* if every (s, a) is visited for ever and the step sizes meet Robbins and Monro's conditions.
    C. Watkins and P. Dayan, *Q-learning*, 1992; R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 6.5.
    """

    @staticmethod
    @compiled
    def next_value(values: Row, next_action: int, epsilon: float) -> float:
        """Return max_a Q(s', a)."""
        return max(values)


def _checked_behaviour(behaviour: ArrayLike, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return a policy as an array, or raise ValueError."""
    table = np.asarray(behaviour, dtype=np.float64)
    if table.shape != shape:
        raise ValueError(f"the behaviour has shape {table.shape}, and the environment's states and actions {shape}")
    wrong = (table < 0).any(axis=1) | ~np.isclose(table.sum(axis=1), 1, rtol=0, atol=1e-6)
    if wrong.any():
        state = int(wrong.argmax())
        raise ValueError(f"behaviour, state {state}: {table[state]} is no distribution over actions")
    return table / table.sum(axis=1, keepdims=True)
