"""Temporal-difference control: learning action values from single steps, without a model.

Every step moves one entry of a table towards a target,

    Q(s, a) ← Q(s, a) + α (r + γ · next_value − Q(s, a)),

and the algorithms differ in ``next_value`` only. After a termination it is 0; a truncation changes nothing, because
the task would have gone on. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., chapter 6.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.error_bounds import error_bound, longest_episode, rounding
from aligngym.agents.tabular_agent import TabularAgent, uniform_over_best
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import table_shape
from aligngym.core.schedules import Power, Schedule, as_schedule
from aligngym.envs.tabular_mdp import TabularMDP


class TDControl(TabularAgent):
    """One-step TD control with an ε-greedy behaviour. An iteration is one episode.

    A subclass overrides :meth:`next_value`; one that keeps more than one table also overrides :meth:`update`.

    All randomness of an episode, the environment's included, comes from the seed and the episode's number. So the
    table, the visit counts and the iteration are the whole state: a saved agent continues exactly.

    Attributes:
        action_values: ``[S, A]``, Q, 0 at first.
        visits: ``[S, A]``, how often each entry has been updated.

    Args:
        env: an environment with discrete observations and actions counted from 0, and with episodes that end.
        discount: γ in [0, 1].
        step_size: α. A schedule is evaluated at the number of updates that *this* (s, a) has had before, as Robbins and
            Monro's conditions need it; a number is constant. The default (k + 1)^(−0.8) meets the conditions.
        epsilon: probability of an action drawn uniformly, in [0, 1]; a schedule is evaluated at the episode.
        seed: of everything random.
        tolerance: the certified error at which :attr:`converged` says so.

    Raises:
        TypeError: if the spaces are not of that kind.
        ValueError: for a discount or an ε outside [0, 1].
    """

    unit = "episode"
    headline = ("return", "length")

    def __init__(
        self,
        env: gymnasium.Env,
        discount: float,
        step_size: float | Schedule = Power(exponent=0.8),  # noqa: B008 (frozen)
        epsilon: float | Schedule = 0.1,
        seed: int = 0,
        tolerance: float = 1e-2,
    ) -> None:
        shape = table_shape(env)
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount is between 0 and 1, not {discount}")
        self.env, self.discount, self.seed, self.tolerance = env, discount, seed, tolerance
        self.step_size, self.epsilon = as_schedule(step_size), as_schedule(epsilon)
        if self.epsilon(0) > 1:
            raise ValueError(f"epsilon is a probability, and it starts at {self.epsilon(0)}")
        self.action_values = np.zeros(shape)
        self.visits = np.zeros(shape, dtype=np.int64)

    @abstractmethod
    def next_value(self, next_state: int, next_action: int, epsilon: float) -> float:
        """Return what the state after a step is worth to this algorithm.

        Args:
            next_state: s'.
            next_action: the action that the behaviour takes in s' if the episode goes on.
            epsilon: of the behaviour.
        """

    def iterate(self) -> Metrics:
        """Play one episode and learn from each step."""
        generator = np.random.default_rng([self.seed, self.iteration])
        epsilon = self.epsilon(self.iteration)
        observation, _ = self.env.reset(seed=int(generator.integers(2**31)))
        state = int(observation)
        action = self.explore(state, epsilon, generator)
        total, length, over = 0.0, 0, False
        while not over:
            observation, reward, terminated, truncated, _ = self.env.step(action)
            next_state = int(observation)
            next_action = self.explore(next_state, epsilon, generator)
            following = 0.0 if terminated else self.next_value(next_state, next_action, epsilon)
            self.update(state, action, float(reward) + self.discount * following)
            state, action = next_state, next_action
            total, length, over = total + float(reward), length + 1, terminated or truncated
        return {"return": total, "length": float(length), "epsilon": epsilon}

    def update(self, state: int, action: int, target: float) -> None:
        """Move Q(s, a) towards the target."""
        step_size = self.step_size(int(self.visits[state, action]))
        self.action_values[state, action] += step_size * (target - self.action_values[state, action])
        self.visits[state, action] += 1

    def explore(self, state: int, epsilon: float, generator: np.random.Generator) -> int:
        """Return an ε-greedy action, ties broken at random."""
        values = self.action_values[state]
        if generator.random() < epsilon:
            return int(generator.integers(len(values)))
        best = np.flatnonzero(values == values.max())
        return int(best[0] if len(best) == 1 else best[generator.integers(len(best))])

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, uniform over the actions of the highest value: the greedy policy, without ε."""
        return uniform_over_best(self.action_values)

    @property
    def values(self) -> NDArray[np.float64]:
        """``[S]``, max_a Q(s, a)."""
        return self.action_values.max(axis=1)

    @cached_property
    def model(self) -> TabularMDP | None:
        """The environment's exact model, if it has one; nothing is learned from it, it only judges."""
        try:
            return TabularMDP.from_env(self.env)
        except TypeError:
            return None

    @cached_property
    def _longest_episode(self) -> float:
        return math.inf if self.model is None else longest_episode(self.model)

    @property
    def error_bound(self) -> float | None:
        """A certified bound of ‖max_a Q(·, a) − V*‖∞ over all states; ``None`` if the environment shows no exact model.

        It follows from the residual ‖TV − V‖∞ of V(s) = max_a Q(s, a), T being the exact Bellman optimality operator
        (see :mod:`aligngym.agents.error_bounds`): at most residual / (1 − γ), and infinite where γ = 1 allows no proof.
        It costs a sweep over the model each time it is read. States that are never visited count too.
        """
        if self.model is None:
            return None
        values = np.zeros(self.model.num_states)
        values[: len(self.action_values)] = self.values
        values[self.model.terminal] = 0.0
        better = self.model.action_values(values, self.discount).max(axis=1)
        residual = float(np.abs(better - values).max()) + rounding(self.model, values, self.discount)
        return error_bound(self.model, values, residual, self.discount, self._longest_episode)

    @property
    def converged(self) -> bool | None:
        """Whether the error bound is within the tolerance; ``None`` if nobody can know, for want of a model."""
        bound = self.error_bound
        return None if bound is None else bound <= self.tolerance

    def state_dict(self) -> dict[str, Any]:
        """Return the table and the visit counts."""
        return {"action_values": self.action_values.copy(), "visits": self.visits.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if the table has another shape.
        """
        if state["action_values"].shape != self.action_values.shape:
            raise ValueError(f"a saved table of {state['action_values'].shape}, and this is {self.action_values.shape}")
        self.action_values, self.visits = state["action_values"].copy(), state["visits"].copy()


class QLearning(TDControl):
    """Q-learning: the next state is worth max_a Q(s', a), whatever the behaviour does there.

    It converges to Q* if every (s, a) is visited for ever and the step sizes meet Robbins and Monro's conditions.
    C. Watkins and P. Dayan, *Q-learning*, 1992; R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 6.5.
    """

    def next_value(self, next_state: int, next_action: int, epsilon: float) -> float:
        """Return max_a Q(s', a)."""
        return float(self.action_values[next_state].max())
