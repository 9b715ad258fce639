"""Monte Carlo control: evaluate a policy by the returns of its episodes, improve it, repeat.

The three algorithms differ in how they come to try every state and action: MC Basic plays from each of them in turn,
exploring starts begin anywhere at random, and an ε-greedy policy goes there by itself, now and then.
R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., sections 5.3 and 5.4; S. Zhao, *Mathematical Foundations of
Reinforcement Learning*, chapter 5.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aligngym.agents.episodes import play_episodes, require_any_start
from aligngym.agents.monte_carlo import OnPolicyMonteCarlo
from aligngym.agents.tabular_agent import TabularAgent, uniform_over_best
from aligngym.core.callbacks import Metrics
from aligngym.core.schedules import Power, Schedule, as_schedule


def epsilon_soft(action_values: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """Return ``[S, A]``, the ε-greedy policy: 1 − ε shared by the best actions of a state, plus ε / A for every action.

    Args:
        action_values: ``[S, A]``.
        epsilon: ε in [0, 1].
    """
    return (1 - epsilon) * uniform_over_best(action_values) + epsilon / action_values.shape[1]


class MCControl(OnPolicyMonteCarlo):
    """On-policy Monte Carlo control: evaluate by returns, improve, repeat.

    Attributes:
        action_values: ``[S, A]``, Q, 0 at first.
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
    ) -> None:
        super().__init__(
            env, discount, step_size, first_visit, seed, max_episode_steps, episodes_per_iteration, per_action=True
        )

    @property
    def action_values(self) -> NDArray[np.float64]:
        """``[S, A]``, Q."""
        return self.table

    @property
    def values(self) -> NDArray[np.float64]:
        """``[S]``, Σ_a π(a | s) Q(s, a), π being :attr:`policy`."""
        return (self.policy * self.table).sum(axis=1)


class MCExploringStarts(MCControl):
    """Monte Carlo control with exploring starts: every episode begins with a state and an action drawn uniformly.

    So every pair is tried for ever, although the policy is greedy. R. Sutton and A. Barto, *Reinforcement Learning*,
    2nd ed., section 5.3; S. Zhao, *Mathematical Foundations of Reinforcement Learning*, algorithm 5.2.

    A greedy policy may walk in circles; the limit of steps ends that, so keep it near the length of a sensible episode.
    With α = 1/n, returns of the first, poor policies weigh as much as later ones; a schedule such as
    ``Power(exponent=0.7)``, or a constant, forgets them.

    Args:
        env: one that can start in any state, as every :class:`aligngym.envs.TabularEnv` can.
        discount: γ in [0, 1].
        step_size: α; see :class:`OnPolicyMonteCarlo`.
        first_visit: see :class:`MonteCarlo`.
        seed: of everything random.
        max_episode_steps: truncates longer episodes.
        episodes_per_iteration: how many to play before the policy is improved.

    Raises:
        TypeError: if the environment cannot start in any state.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        discount: float,
        step_size: float | Schedule = Power(),  # noqa: B008 (frozen)
        first_visit: bool = True,
        seed: int = 0,
        max_episode_steps: int = 1000,
        episodes_per_iteration: int = 1,
    ) -> None:
        super().__init__(env, discount, step_size, first_visit, seed, max_episode_steps, episodes_per_iteration)
        self._starts = np.flatnonzero(~require_any_start(env).terminal)

    def starts(self, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw states that are not terminal, and any actions."""
        count = self.episodes_per_iteration
        return generator.choice(self._starts, count), generator.integers(self.shape[1], size=count)

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, uniform over the actions of the highest value."""
        return uniform_over_best(self.table)


class MCEpsilonGreedy(MCControl):
    """Monte Carlo control with an ε-greedy policy, which starts where the environment starts.

    It converges to the best of all policies that give every action at least ε / A, not to the best of all: with a
    constant ε its values are those of the best ε-soft policy, below V*, and even its greedy action may be another. Only
    ε → 0 leads to the optimum. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 5.4; S. Zhao,
    *Mathematical Foundations of Reinforcement Learning*, section 5.4.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        discount: γ in [0, 1].
        step_size: α; see :class:`OnPolicyMonteCarlo`.
        epsilon: ε in [0, 1]; a schedule is evaluated at the iteration.
        first_visit: see :class:`MonteCarlo`.
        seed: of everything random.
        max_episode_steps: truncates longer episodes. One episode of very many steps is the way of a continuing task.
        episodes_per_iteration: how many to play before the policy is improved.

    Raises:
        ValueError: for an ε outside [0, 1].
    """

    def __init__(
        self,
        env: gymnasium.Env,
        discount: float,
        step_size: float | Schedule = Power(),  # noqa: B008 (frozen)
        epsilon: float | Schedule = 0.1,
        first_visit: bool = True,
        seed: int = 0,
        max_episode_steps: int = 10_000,
        episodes_per_iteration: int = 1,
    ) -> None:
        super().__init__(env, discount, step_size, first_visit, seed, max_episode_steps, episodes_per_iteration)
        self.epsilon = as_schedule(epsilon)
        if self.epsilon(0) > 1:
            raise ValueError(f"epsilon is a probability, and it starts at {self.epsilon(0)}")

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, the ε-greedy policy that plays next, and that Q speaks about."""
        return epsilon_soft(self.table, self.epsilon(self.iteration))


class MCBasic(TabularAgent):
    """Policy iteration whose evaluation is by sampling: the simplest Monte Carlo control. An iteration is both.

    For every state and action, Q(s, a) becomes the mean return of episodes that start with them and follow the policy;
    the policy becomes the greedy one. Episodes are cut after ``episode_length`` steps and nothing is added for the
    rest, so values are those of a task with that many steps to go: a target further away is not seen. S. Zhao,
    *Mathematical Foundations of Reinforcement Learning*, section 5.2 (algorithm 5.1) and figure 5.4.

    Attributes:
        action_values: ``[S, A]``, Q, 0 at first.
        actions: ``[S]``, the greedy policy, the first best action of every state.

    Args:
        env: one that can start in any state, as every :class:`aligngym.envs.TabularEnv` can.
        discount: γ in [0, 1]; 1 is possible because episodes are cut.
        episode_length: steps of an episode, at most.
        episodes: played for every state and action in each iteration; one is enough if nothing is random.
        seed: of everything random.

    Raises:
        TypeError: if the environment cannot start in any state.
        ValueError: for a discount outside [0, 1], or fewer than one step or episode.
    """

    headline = ("changed_states",)

    def __init__(
        self, env: gymnasium.Env, discount: float, episode_length: int, episodes: int = 1, seed: int = 0
    ) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount is between 0 and 1, not {discount}")
        if episode_length < 1 or episodes < 1:
            raise ValueError(f"at least one step and one episode are needed, not {episode_length} and {episodes}")
        model = require_any_start(env)
        self.env, self.discount, self.seed = env, discount, seed
        self.episode_length, self.episodes = episode_length, episodes
        self._entries = np.flatnonzero(np.repeat(~model.terminal, model.num_actions))
        self.action_values = np.zeros(model.rewards.shape)
        self.actions = np.zeros(model.num_states, dtype=np.int64)
        self._stable = False

    def iterate(self) -> Metrics:
        """Evaluate the policy by episodes from everywhere, then improve it."""
        generator = np.random.default_rng([self.seed, self.iteration])
        entries, count = self._entries, len(self._entries) * self.episodes
        starts = np.divmod(np.repeat(entries, self.episodes), self.action_values.shape[1])
        episodes = play_episodes(self.env, self.policy, generator, self.episode_length, count, starts)
        returns = episodes.returns(self.discount)[episodes.offsets[:-1]]
        self.action_values.ravel()[entries] = returns.reshape(-1, self.episodes).mean(axis=1)
        actions = self.action_values.argmax(axis=1)
        changed = int((actions != self.actions).sum())
        self.actions, self._stable = actions, changed == 0
        return {"changed_states": float(changed)}

    @property
    def finished(self) -> bool:
        """Whether the last improvement changed nothing; where sampling is noisy, that can be long in coming."""
        return self._stable

    @property
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, deterministic: the first best action of every state."""
        return np.eye(self.action_values.shape[1])[self.actions]

    @property
    def values(self) -> NDArray[np.float64]:
        """``[S]``, max_a Q(s, a)."""
        return self.action_values.max(axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Return the action values, the policy, and whether it was stable."""
        return {"action_values": self.action_values.copy(), "actions": self.actions.copy(), "stable": self._stable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if the table has another shape.
        """
        if state["action_values"].shape != self.action_values.shape:
            raise ValueError(f"a saved table of {state['action_values'].shape}, and this is {self.action_values.shape}")
        self.action_values, self.actions = state["action_values"].copy(), state["actions"].copy()
        self._stable = state["stable"]
