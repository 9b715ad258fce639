"""Monte Carlo methods: learning from the returns of whole episodes, without a model. Here: the values of a policy.

Every visit of an entry (a state, or a state and an action) at time t moves its estimate towards the return that
followed, G_t = R_{t+1} + γ R_{t+2} + …:

    Q(S_t, A_t) ← Q(S_t, A_t) + α (G_t − Q(S_t, A_t)),

with α = 1/n at the n-th visit the sample mean. Nothing is bootstrapped, except where an episode is truncated: there the
task would have gone on, and the last state counts with its present estimate.
R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., sections 5.1–5.4; S. Zhao, *Mathematical Foundations of
Reinforcement Learning*, chapter 5.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.endless_tasks import refuse_endless_task
from aligngym.agents.episodes import Episodes, play_episodes, refuse_endless_policy
from aligngym.agents.given_policy import GivenPolicy
from aligngym.agents.markov_chain import checked_policy
from aligngym.agents.tabular_agent import TabularAgent
from aligngym.core.callbacks import Metrics
from aligngym.core.compilation import compiled
from aligngym.core.schedules import Power, Schedule, as_schedule
from aligngym.core.spaces import table_shape


class MonteCarlo(TabularAgent):
    """What Monte Carlo methods share: play episodes, then learn from them. An iteration is both.

    All randomness of an iteration, the environment's included, comes from the seed and the iteration's number. So the
    table, its weights and the iteration are the whole state: a saved agent continues exactly.

    Attributes:
        table: what is learned, values ``[S]`` or action values ``[S, A]``, 0 at first.
        weights: how much every entry has learned from, in the shape of ``table``: the number of returns, or the sum
            of their importance ratios.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        discount: γ in [0, 1].
        first_visit: learn only from the first visit of an entry in an episode (unbiased), or from every visit (biased,
            and still consistent).
        seed: of everything random.
        max_episode_steps: truncates longer episodes, besides limits of the environment's own.
        episodes_per_iteration: how many to play before learning from them.

    Raises:
        TypeError: if the spaces are not of that kind.
        ValueError: for a discount outside [0, 1], a discount of 1 where no episode can end, or no steps at all.
    """

    headline = ("return", "length")
    table: NDArray[np.float64]
    weights: NDArray[Any]

    def __init__(
        self,
        env: gymnasium.Env,
        discount: float,
        first_visit: bool,
        seed: int,
        max_episode_steps: int,
        episodes_per_iteration: int,
    ) -> None:
        self.shape = table_shape(env)
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount is between 0 and 1, not {discount}")
        if max_episode_steps < 1 or episodes_per_iteration < 1:
            raise ValueError(
                f"at least one step and one episode are needed, not max_episode_steps={max_episode_steps} and "
                f"episodes_per_iteration={episodes_per_iteration}"
            )
        refuse_endless_task(env, discount, max_episode_steps)
        self.env, self.discount, self.seed = env, discount, seed
        self.first_visit, self.max_episode_steps = first_visit, max_episode_steps
        self.episodes_per_iteration = episodes_per_iteration

    @abstractmethod
    def learn_from(self, episodes: Episodes) -> None:
        """Update the table."""

    @property
    def behaviour(self) -> NDArray[np.float64]:
        """``[S, A]``, the policy that plays."""
        return self.policy

    def iterate(self) -> Metrics:
        """Play episodes and learn from them; metrics are means."""
        generator = np.random.default_rng([self.seed, self.iteration])
        starts, count = self.starts(generator), self.episodes_per_iteration
        episodes = play_episodes(self.env, self.behaviour, generator, self.max_episode_steps, count, starts)
        self.learn_from(episodes)
        return {
            "return": float(episodes.rewards.sum()) / count,
            "length": len(episodes.rewards) / count,
            "truncated": float(1 - episodes.terminated.mean()),
        }

    def starts(self, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return first states and actions of an iteration, or ``None`` to leave them to environment and behaviour."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the table and its weights."""
        return {"table": self.table.copy(), "weights": self.weights.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if the table has another shape.
        """
        if state["table"].shape != self.table.shape:
            raise ValueError(f"a saved table of {state['table'].shape}, and this is {self.table.shape}")
        self.table, self.weights = state["table"].copy(), state["weights"].copy()


class OnPolicyMonteCarlo(MonteCarlo):
    """Monte Carlo methods that learn about the policy that plays, with a step size for every return.

    Attributes:
        visits: how many returns each entry has learned from, in the shape of the table.

    Args:
        env: as :class:`MonteCarlo` says, like the following.
        discount: γ in [0, 1].
        step_size: α. A schedule is evaluated at the number of returns that *this* entry has learned from before; the
            default 1/(k + 1) makes the estimate the mean of all returns. A constant forgets those of older policies.
        first_visit: see :class:`MonteCarlo`.
        seed: of everything random.
        max_episode_steps: truncates longer episodes.
        episodes_per_iteration: see :class:`MonteCarlo`.
        per_action: learn Q rather than V.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        discount: float,
        step_size: float | Schedule,
        first_visit: bool,
        seed: int,
        max_episode_steps: int,
        episodes_per_iteration: int,
        *,
        per_action: bool,
    ) -> None:
        super().__init__(env, discount, first_visit, seed, max_episode_steps, episodes_per_iteration)
        self.step_size = as_schedule(step_size)
        self._step_sizes = np.empty(0)
        self.table = np.zeros(self.shape if per_action else self.shape[0])
        self.weights = np.zeros(self.table.shape, dtype=np.int64)

    @property
    def visits(self) -> NDArray[np.int64]:
        """How many returns each entry has learned from."""
        return self.weights

    def learn_from(self, episodes: Episodes) -> None:
        """Move every entry that was visited towards the return that followed."""
        if self.table.ndim == 2:
            entries = episodes.states * self.shape[1] + episodes.actions
            last_values = (self.policy * self.table).sum(axis=1)[episodes.last_states]
        else:
            entries, last_values = episodes.states, self.table[episodes.last_states]
        steps = episodes.visits(entries, self.first_visit)
        # The most returns that any entry can have learned from afterwards.
        most = int(self.visits.max()) + len(steps)
        if most > len(self._step_sizes):
            self._step_sizes = self.step_size.table(2 * most)
        targets = episodes.returns(self.discount, last_values)
        _move(self.table.ravel(), self.visits.ravel(), entries[steps], targets[steps], self._step_sizes)


@compiled
def _move(
    table: NDArray[np.float64],
    visits: NDArray[np.int64],
    entries: NDArray[np.int64],
    targets: NDArray[np.float64],
    step_sizes: NDArray[np.float64],
) -> None:
    """Move entries towards targets in their order, in place."""
    for entry, target in zip(entries, targets):  # noqa: B905 (numba knows no strict)
        table[entry] += step_sizes[visits[entry]] * (target - table[entry])
        visits[entry] += 1


class MCPrediction(GivenPolicy, OnPolicyMonteCarlo):
    """Learn the value of a given policy, V_π, from its episodes.

    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 5.1. With first visits and α = 1/n every estimate
    is the mean of independent returns: unbiased, with a standard error of √(Var(G) / n).

    Attributes:
        values: ``[S]``, V, 0 at first.

    Args:
        env: with episodes that end under this policy; with a discount below 1, truncation by ``max_episode_steps``
            makes a continuing task usable.
        policy: ``[S, A]``, π(a | s).
        discount: γ in [0, 1].
        step_size: α; see :class:`OnPolicyMonteCarlo`.
        first_visit: see :class:`MonteCarlo`.
        seed: of everything random.
        max_episode_steps: truncates longer episodes.
        episodes_per_iteration: see :class:`MonteCarlo`; the average does not depend on it.

    Raises:
        ValueError: for a policy of another shape, or that is none; for a discount of 1 with a policy that never ends.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        policy: ArrayLike,
        discount: float,
        step_size: float | Schedule = Power(),  # noqa: B008 (frozen)
        first_visit: bool = True,
        seed: int = 0,
        max_episode_steps: int = 10_000,
        episodes_per_iteration: int = 1,
    ) -> None:
        super().__init__(
            env, discount, step_size, first_visit, seed, max_episode_steps, episodes_per_iteration, per_action=False
        )
        self._policy = checked_policy(policy, self.shape)
        refuse_endless_policy(env, self._policy, discount)

    @property
    def values(self) -> NDArray[np.float64]:
        """``[S]``, V, the estimate of V_π."""
        return self.table
