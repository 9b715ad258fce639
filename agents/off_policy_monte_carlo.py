"""Off-policy Monte Carlo: learning about one policy from the episodes of another.

A return G_t of the behaviour b counts for the target π by its importance ratio,

    ρ_{t:T−1} = Π_{k=t}^{T−1} π(A_k | S_k) / b(A_k | S_k),

how much more probable the rest of the episode was under π. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed.,
sections 5.5–5.7.
"""

from __future__ import annotations

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.episodes import Episodes, refuse_endless_policy
from aligngym.agents.given_policy import GivenPolicy
from aligngym.agents.markov_chain import checked_policy
from aligngym.agents.monte_carlo import MonteCarlo
from aligngym.agents.monte_carlo_control import epsilon_soft
from aligngym.core.compilation import compiled
from aligngym.core.schedules import Schedule, as_schedule


class OffPolicyMCPrediction(GivenPolicy, MonteCarlo):
    """Learn the value of a target policy, V_π, from the episodes of a behaviour.

    Over the visits of a state, with returns G and ratios ρ,

    - weighted importance sampling takes Σ ρ G / Σ ρ: biased (towards V_b, less with every visit), and never beyond the
      returns that were seen;
    - ordinary importance sampling takes Σ ρ G / n: unbiased with first visits, and of a variance that may be infinite.

    Attributes:
        values: ``[S]``, V, 0 at first.

    Args:
        env: with episodes that end under the behaviour.
        policy: ``[S, A]``, the target π(a | s).
        behaviour: ``[S, A]``, b(a | s), positive wherever π is.
        discount: γ in [0, 1].
        weighted: weighted importance sampling, otherwise ordinary.
        first_visit: see :class:`MonteCarlo`.
        seed: of everything random.
        max_episode_steps: truncates longer episodes.
        episodes_per_iteration: see :class:`MonteCarlo`; the average does not depend on it.

    Raises:
        ValueError: for tables of another shape, or that are no policies; if the behaviour never does what the target
            may do; for a discount of 1 where behaviour or target never end.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        behaviour: ArrayLike,
        discount: float,
        weighted: bool = True,
        first_visit: bool = True,
        seed: int = 0,
        max_episode_steps: int = 10_000,
        episodes_per_iteration: int = 1,
    ) -> None:
        super().__init__(env, discount, first_visit, seed, max_episode_steps, episodes_per_iteration)
        self.weighted = weighted
        self._policy = checked_policy(policy, self.shape)
        self._behaviour = checked_policy(behaviour, self.shape, "behaviour")
        uncovered = np.argwhere((self._policy > 0) & (self._behaviour == 0))
        if len(uncovered):
            state, action = uncovered[0]
            raise ValueError(
                f"state {state}, action {action}: the behaviour never takes it, and the target does with probability "
                f"{self._policy[state, action]:.6g}; nothing can be learned about it, so make the behaviour soft"
            )
        refuse_endless_policy(env, self._behaviour, discount, "behaviour")
        refuse_endless_policy(env, self._policy, discount)
        self.table, self.weights = np.zeros(self.shape[0]), np.zeros(self.shape[0])

    def learn_from(self, episodes: Episodes) -> None:
        """Average in the returns that followed the states visited, by their importance ratios."""
        taken = episodes.states, episodes.actions
        ratios = importance_ratios(self._policy[taken] / self._behaviour[taken], episodes.offsets)
        returns = episodes.returns(self.discount, self.table[episodes.last_states])
        steps = episodes.visits(episodes.states, self.first_visit)
        _average(self.table, self.weights, episodes.states[steps], returns[steps], ratios[steps], self.weighted)

    @property
    def behaviour(self) -> NDArray[np.float64]:
        """``[S, A]``, b, the policy that plays."""
        return self._behaviour

    @property
    def values(self) -> NDArray[np.float64]:
        """``[S]``, V, the estimate of V_π."""
        return self.table


class OffPolicyMCControl(MonteCarlo):
    """Learn the optimal policy from the episodes of a behaviour that explores.

    The target is greedy with respect to Q, and Q is averaged by weighted importance sampling, from the last step of an
    episode back to the last one at which the behaviour did something else: before it, every ratio is 0. So learning
    comes from the tails of episodes, slowly in long ones. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed.,
    section 5.7.

    Attributes:
        action_values: ``[S, A]``, Q, 0 at first.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        discount: γ in [0, 1].
        behaviour: ``[S, A]``, b(a | s), positive everywhere; the ε-greedy policy of the present Q if not given.
        epsilon: ε in (0, 1] of that; a schedule is evaluated at the iteration, and 1 is the uniform policy.
        seed: of everything random.
        max_episode_steps: truncates longer episodes; the last state counts with max_a Q(s, a) then.
        episodes_per_iteration: how many to play with the same behaviour.

    Raises:
        ValueError: for a behaviour that is no policy or not soft, or an ε outside (0, 1].
    """

    def __init__(
        self,
        env: gymnasium.Env,
        discount: float,
        behaviour: ArrayLike | None = None,
        epsilon: float | Schedule = 0.3,
        seed: int = 0,
        max_episode_steps: int = 10_000,
        episodes_per_iteration: int = 1,
    ) -> None:
        super().__init__(env, discount, False, seed, max_episode_steps, episodes_per_iteration)
        self.epsilon = as_schedule(epsilon)
        if not 0 < self.epsilon(0) <= 1:
            raise ValueError(f"epsilon is a probability above 0, and it starts at {self.epsilon(0)}")
        self._behaviour = None if behaviour is None else checked_policy(behaviour, self.shape, "behaviour")
        if self._behaviour is not None and not self._behaviour.all():
            state, action = np.argwhere(self._behaviour == 0)[0]
            raise ValueError(
                f"state {state}, action {action}: the behaviour never takes it, and it may be the best; give every "
                "action some probability"
            )
        self.table, self.weights = np.zeros(self.shape), np.zeros(self.shape)

    def learn_from(self, episodes: Episodes) -> None:
        """Learn from the end of every episode, as far back as the behaviour acted greedily."""
        returns = episodes.returns(self.discount, self.table[episodes.last_states].max(axis=1))
        taken = episodes.states, episodes.actions
        _learn_from_tails(self.table, self.weights, *taken, returns, self.behaviour[taken], episodes.offsets)

    @property
    def action_values(self) -> NDArray[np.float64]:
        """``[S, A]``, Q."""
        return self.table

    @property
    def values(self) -> NDArray[np.float64]:
        """``[S]``, max_a Q(s, a)."""
        return self.table.max(axis=1)

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, deterministic: the first action of the highest value."""
        return np.eye(self.shape[1])[self.table.argmax(axis=1)]

    @property
    def behaviour(self) -> NDArray[np.float64]:
        """``[S, A]``, b, the policy that plays."""
        return epsilon_soft(self.table, self.epsilon(self.iteration)) if self._behaviour is None else self._behaviour


@compiled
def importance_ratios(step_ratios: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``[N]``, ρ_{t:T−1}, the product of the ratios of each step and those after it in its episode.

    Args:
        step_ratios: ``[N]``, π(A_t | S_t) / b(A_t | S_t).
        offsets: ``[B + 1]``, where each of B episodes begins, and where the last ends.
    """
    ratios = np.empty(len(step_ratios), np.float64)
    for episode in range(len(offsets) - 1):
        product = 1.0
        for step in range(offsets[episode + 1] - 1, offsets[episode] - 1, -1):
            product *= step_ratios[step]
            ratios[step] = product
    return ratios


@compiled
def _average(
    table: NDArray[np.float64],
    weights: NDArray[np.float64],
    states: NDArray[np.int64],
    returns: NDArray[np.float64],
    ratios: NDArray[np.float64],
    weighted: bool,
) -> None:
    """Average returns into the values of their states, in place."""
    for state, following, ratio in zip(states, returns, ratios):  # noqa: B905 (numba knows no strict)
        if not weighted:
            weights[state] += 1.0
            table[state] += (ratio * following - table[state]) / weights[state]
        elif ratio > 0:
            weights[state] += ratio
            table[state] += ratio / weights[state] * (following - table[state])


@compiled
def _learn_from_tails(
    table: NDArray[np.float64],
    weights: NDArray[np.float64],
    states: NDArray[np.int64],
    actions: NDArray[np.int64],
    returns: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    offsets: NDArray[np.int64],
) -> None:
    """Off-policy MC control over episodes whose actions had these probabilities under the behaviour, in place."""
    for episode in range(len(offsets) - 1):
        ratio = 1.0
        for step in range(offsets[episode + 1] - 1, offsets[episode] - 1, -1):
            state, action = states[step], actions[step]
            weights[state, action] += ratio
            table[state, action] += ratio / weights[state, action] * (returns[step] - table[state, action])
            if action != table[state].argmax():
                break
            ratio /= probabilities[step]
