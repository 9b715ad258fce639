"""Control with linear function approximation, Q(s, a) = w_aᵀ x(s), also where observations are continuous.

Every step moves the weights of the action taken,

    w_a ← w_a + α (r + γ · next_value − Q(s, a)) x(s),

and the algorithms differ in ``next_value`` only, as in :mod:`aligngym.agents.temporal_difference`: on a
:class:`~aligngym.agents.features.OneHot` they are the tabular ones. R. Sutton and A. Barto, *Reinforcement Learning*,
2nd ed., chapter 10; S. Zhao, *Mathematical Foundations of Reinforcement Learning*, section 8.3.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.endless_tasks import refuse_endless_task
from aligngym.agents.evaluation import evaluate_episodes
from aligngym.agents.features import Features
from aligngym.agents.linear_prediction import check_shape, divergence
from aligngym.agents.tabular_agent import uniform_over_best
from aligngym.agents.temporal_difference import ExpectedSarsa, QLearning, Sarsa, epsilon_greedy
from aligngym.core.agent import Agent
from aligngym.core.callbacks import Metrics
from aligngym.core.compilation import interpreted
from aligngym.core.schedules import Schedule, as_schedule

Floats = NDArray[np.float64]


class LinearControl(Agent):
    """One-step TD control with linear action values and an ε-greedy behaviour. An iteration is one episode.

    A subclass overrides :meth:`next_value`. All randomness of an episode, the environment's included, comes from the
    seed and the episode's number, so a saved agent continues exactly.

    Attributes:
        weights: ``[A, d]``, w_a, 0 at first, which is optimistic where rewards are negative.
        steps: how many steps have been learned from.
        discount: γ.

    Args:
        env: an environment with actions counted from 0, and with episodes that end.
        features: x, of its observations.
        discount: γ in [0, 1].
        step_size: α; a schedule is evaluated at the number of steps learned from. It has to be small compared with
            1 / ‖x‖², which for tile coding is one over the number of tilings.
        epsilon: probability of an action drawn uniformly, in [0, 1]; a schedule is evaluated at the episode.
        seed: of everything random.
        max_episode_steps: cuts episodes, which is a truncation; needed where a task does not end by itself.

    Raises:
        TypeError: if actions are not discrete and counted from 0.
        ValueError: for a discount or an ε outside [0, 1], or no step at all; and, if the exact model is known, for a
            task that never ends without a limit, or with γ = 1.
        FloatingPointError: while learning, if the weights are no longer finite.
    """

    unit = "episode"
    headline = ("return", "length")

    def __init__(
        self,
        env: gymnasium.Env,
        features: Features,
        discount: float,
        step_size: float | Schedule,
        epsilon: float | Schedule = 0.1,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
    ) -> None:
        actions = env.action_space
        if not isinstance(actions, gymnasium.spaces.Discrete) or actions.start != 0:
            raise TypeError(f"linear control needs discrete actions counted from 0, not {actions}")
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount is between 0 and 1, not {discount}")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is at least 1, not {max_episode_steps}")
        self.env, self.features, self.discount, self.seed = env, features, discount, seed
        self.step_size, self.epsilon = as_schedule(step_size), as_schedule(epsilon)
        if self.epsilon(0) > 1:
            raise ValueError(f"epsilon is a probability, and it starts at {self.epsilon(0)}")
        self.max_episode_steps = max_episode_steps
        refuse_endless_task(env, discount, max_episode_steps or math.inf)
        self.weights, self.steps = np.zeros((int(actions.n), features.size)), 0

    @staticmethod
    @abstractmethod
    def next_value(values: Floats, next_action: int, epsilon: float) -> float:
        """Return what the state after a step is worth to this algorithm.

        Args:
            values: ``[A]``, Q(s', ·).
            next_action: the action that the behaviour takes in s' if the episode goes on.
            epsilon: of the behaviour.
        """

    def iterate(self) -> Metrics:
        """Play one episode and learn from each step."""
        generator = np.random.default_rng([self.seed, self.iteration])
        epsilon = self.epsilon(self.iteration)
        observation, _ = self.env.reset(seed=int(generator.integers(2**31)))
        row = self.features(observation)
        action = epsilon_greedy(self.weights @ row, epsilon, generator)
        total, length, over = 0.0, 0, False
        while not over:
            observation, reward, terminated, truncated, _ = self.env.step(action)
            next_row = self.features(observation)
            next_values = self.weights @ next_row
            next_action = epsilon_greedy(next_values, epsilon, generator)
            following = 0.0 if terminated else self.next_value(next_values, next_action, epsilon)
            self.update(row, action, float(reward) + self.discount * following)
            row, action = next_row, next_action
            total, length = total + float(reward), length + 1
            over = terminated or truncated or length == self.max_episode_steps
        return {"return": total, "length": float(length), "epsilon": epsilon}

    def update(self, row: Floats, action: int, target: float) -> None:
        """Move Q(s, a) towards the target, along ``[d]`` features x(s)."""
        with np.errstate(over="ignore", invalid="ignore"):
            error = target - float(self.weights[action] @ row)
            self.weights[action] += self.step_size(self.steps) * error * row
            value = float(self.weights[action] @ row)
        self.steps += 1
        if not math.isfinite(value):
            raise FloatingPointError(divergence(self))

    def action_values(self, observations: ArrayLike) -> Floats:
        """Return ``[..., A]``, Q(s, a) of each observation."""
        return self.features(observations) @ self.weights.T

    @property
    def policy(self) -> Floats:
        """``[S, A]``, uniform over the actions of the highest value, where observations are numbered states.

        Raises:
            TypeError: where they are not, and no table can hold the policy; :meth:`act` gives its actions.
        """
        space = self.env.observation_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise TypeError(f"observations of {space} have no table of a policy: ask act(observations)")
        return uniform_over_best(self.action_values(np.arange(space.n)))

    def act(
        self, observations: ArrayLike, *, greedy: bool = True, generator: np.random.Generator | None = None
    ) -> NDArray[np.int64]:
        """Return an action of the highest value for each observation.

        Args:
            observations: one, or any number along the first axes.
            greedy: the first of equally good actions; otherwise one of them at random.
            generator: draws; needed if not greedy.

        Raises:
            ValueError: without a generator to draw with.
        """
        values = self.action_values(observations)
        if greedy:
            return values.argmax(axis=-1)
        if generator is None:
            raise ValueError("drawing among the best needs a generator: act(…, generator=np.random.default_rng(0))")
        best = values == values.max(axis=-1, keepdims=True)
        return (best * (1 - generator.random(best.shape))).argmax(axis=-1)

    def evaluate(
        self,
        env: gymnasium.Env,
        episodes: int = 100,
        seed: int = 0,
        *,
        discount: float | None = None,
        max_steps: int = 10_000,
    ) -> Metrics:
        """Play greedy episodes, see :func:`evaluate_episodes`; discounted as the agent was told to, if not given."""
        discount = self.discount if discount is None else discount
        return evaluate_episodes(lambda seen: int(self.act(seen)), env, episodes, seed, discount, max_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the number of steps."""
        return {"weights": self.weights.copy(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if they are weights of other features or actions.
        """
        check_shape(state["weights"], self.weights)
        self.weights, self.steps = state["weights"].copy(), state["steps"]


class SemiGradientSarsa(LinearControl):
    """Semi-gradient Sarsa: the next state is worth Q(s', a') of the action taken there.

    Sutton and Barto, section 10.1.
    """

    next_value = staticmethod(interpreted(Sarsa.next_value))


class SemiGradientExpectedSarsa(LinearControl):
    """Semi-gradient Expected Sarsa: the next state is worth Σ_a π(a | s') Q(s', a), π being ε-greedy."""

    next_value = staticmethod(interpreted(ExpectedSarsa.next_value))


class SemiGradientQLearning(LinearControl):
    """Q-learning with linear values: the next state is worth max_a Q(s', a), whatever the behaviour does there.

    Off-policy, with function approximation and bootstrapping, it may diverge; it usually does not as long as ε is
    small. Zhao, section 8.3.2.
    """

    next_value = staticmethod(interpreted(QLearning.next_value))
