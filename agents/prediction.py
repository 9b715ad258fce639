"""What agents that predict the value of a given policy share: episodes to learn from, and the exact answer.

The policy does not change, so nothing that is learned during an episode can change the episode. It is played first and
learned from afterwards, step by step in the same order: the values come out as if both had been done at once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.endless_tasks import time_limit
from aligngym.agents.episodes import fitted, play_episodes
from aligngym.agents.given_policy import GivenPolicy
from aligngym.agents.markov_chain import checked_policy, markov_chain, stuck_state
from aligngym.core.callbacks import Metrics
from aligngym.core.spaces import table_shape

#: More steps than any episode has.
NO_LIMIT = 2**62


@dataclass(frozen=True)
class Episode:
    """One episode of T steps.

    Attributes:
        states: ``[T + 1]``, s_0 … s_T.
        actions: ``[T]``.
        rewards: ``[T]``, r_t, what the step from s_t paid.
        terminated: whether s_T is the end of the task, worth 0, and not just of the recording.
    """

    states: NDArray[np.int64]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float64]
    terminated: bool

    def discounts(self, discount: float) -> NDArray[np.float64]:
        """Return ``[T]``, what s_{t+1} counts in a target: γ, and 0 after a termination."""
        discounts = np.full(len(self.rewards), discount)
        if self.terminated:
            discounts[-1] = 0.0
        return discounts


class Prediction(GivenPolicy):
    """An agent that learns V_π of a fixed policy π. An iteration is one episode.

    A subclass says what it learns from an episode, in :meth:`update`, and what its ``values`` are.

    All randomness of an episode, the environment's included, comes from the seed and the episode's number.

    Attributes:
        behaviour: ``[S, A]``, the policy that acts; π itself unless a subclass learns off-policy.
        max_episode_steps: after how many steps an episode is cut.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        policy: ``[S, A]``, π(a | s).
        discount: γ in [0, 1].
        seed: of everything random.
        max_episode_steps: cuts episodes, which is a truncation; needed where a task does not end by itself.
        behaviour: ``[S, A]``, acts instead of π.

    Raises:
        TypeError: if the spaces are not of that kind.
        ValueError: for a policy that does not fit, a discount outside [0, 1] or no step at all; for a behaviour that
            never does what π does; and, if the exact model is known, for episodes that may never end without a limit,
            or with γ = 1.
    """

    unit = "episode"
    headline = ("return", "length")

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        discount: float,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
        behaviour: ArrayLike | None = None,
    ) -> None:
        shape = table_shape(env)
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount is between 0 and 1, not {discount}")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is at least 1, not {max_episode_steps}")
        self.env, self.discount, self.seed = env, discount, seed
        self.max_episode_steps = max_episode_steps
        self._policy = checked_policy(policy, shape)
        self.behaviour = self._policy if behaviour is None else checked_policy(behaviour, shape, "behaviour")
        uncovered = np.argwhere((self._policy > 0) & (self.behaviour == 0))
        if len(uncovered):
            state, action = uncovered[0]
            raise ValueError(
                f"state {state}: the policy takes action {action} and the behaviour never does, so nothing is learned "
                "of it; give it a positive probability"
            )
        self._refuse_endless_episodes()

    @abstractmethod
    def update(self, episode: Episode) -> None:
        """Learn from one episode, whoever played it."""

    def iterate(self) -> Metrics:
        """Play one episode and learn from it."""
        generator = np.random.default_rng([self.seed, self.iteration])
        episode = self.play(generator)
        self.update(episode)
        return {"return": float(episode.rewards.sum()), "length": float(len(episode.rewards))}

    def play(self, generator: np.random.Generator) -> Episode:
        """Play one episode with the behaviour; both it and the environment draw what follows from ``generator``."""
        played = play_episodes(self.env, self.behaviour, generator, self.max_episode_steps or NO_LIMIT, count=1)
        states = np.append(played.states, played.last_states)
        return Episode(states, played.actions, played.rewards, bool(played.terminated[0]))

    def _refuse_endless_episodes(self) -> None:
        limited = self.max_episode_steps is not None or time_limit(self.env) < math.inf
        if self.model is None or (self.discount < 1 and limited):
            return
        state = stuck_state(self.model, markov_chain(self.model, fitted(self.behaviour, self.model))[0])
        if state is None:
            return
        if self.discount == 1:
            raise ValueError(
                f"episodes reach state {state} and never end from there: a discount of 1 gives no finite value; take "
                "a smaller one"
            )
        raise ValueError(f"episodes reach state {state} and never end from there: cut them, with max_episode_steps")
