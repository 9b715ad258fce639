"""Markov decision processes with finitely many states and actions, written down completely."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, eye_array, issparse
from scipy.sparse.linalg import spsolve

from aligngym.envs.gymnasium_model import read_model
from aligngym.envs.model_check import check_against_simulator
from aligngym.envs.outcomes import Outcomes, merge

#: How far the probabilities of a row may be from summing to one before they count as wrong.
ROW_SUM_TOLERANCE = 1e-9


class TabularMDP:
    """A finite Markov decision process p(s', r | s, a) with states 0 … S−1 and actions 0 … A−1.

    Terminal states absorb with zero reward: whatever the outcomes say about them is replaced. The discount belongs to
    the agents, not to the model.

    Attributes:
        outcomes: every possible outcome, sorted by row, next state and reward, each of them once.
        row_starts: ``[S·A + 1]``, where the outcomes of each row begin, and where the last ends.
        transitions: sparse ``[S·A, S]``, p(s' | s, a) in row s · A + a.
        rewards: ``[S, A]``, the expected reward r(s, a).
        initial: ``[S]``, the distribution of the first state.
        terminal: ``[S]`` booleans.

    Args:
        outcomes: in any order; equal ones are added up.
        initial: ``[S]`` probabilities.
        terminal: ``[S]`` booleans.
        num_actions: A.

    Raises:
        ValueError: if probabilities are negative or do not sum to one, a reward is not finite, or a state is unknown;
            the message names the worst state and action.
    """

    def __init__(self, outcomes: Outcomes, initial: ArrayLike, terminal: ArrayLike, num_actions: int) -> None:
        self.initial = np.array(initial, dtype=np.float64)
        self.terminal = np.array(terminal, dtype=bool)
        self.num_states, self.num_actions = len(self.initial), num_actions
        if self.terminal.shape != (self.num_states,):
            raise ValueError(
                f"terminal has shape {self.terminal.shape}, and initial speaks of {self.num_states} states"
            )
        if (self.initial < 0).any() or not abs(self.initial.sum() - 1) <= ROW_SUM_TOLERANCE:
            raise ValueError(f"initial is a distribution over states, but sums to {self.initial.sum():.6g}")
        ends = np.repeat(self.terminal, num_actions)
        self._check_outcomes(outcomes, ends)
        by_row = merge(outcomes, ends.reshape(self.num_states, num_actions))
        self.outcomes = Outcomes(by_row.rows, by_row.next_states, by_row.probabilities, by_row.rewards)
        self.row_starts = by_row.starts
        self.rewards = by_row.expected.reshape(self.num_states, num_actions)
        # No copy is made: only where outcomes differ in nothing but their reward are there fewer transitions.
        shape = (self.num_states * num_actions, self.num_states)
        self.transitions = csr_array((by_row.probabilities, by_row.next_states, by_row.starts), shape=shape)
        if not self.transitions.has_canonical_format:
            self.transitions = self.transitions.copy()
            self.transitions.sum_duplicates()

    @classmethod
    def from_arrays(
        cls,
        transitions: Any,
        rewards: ArrayLike,
        initial: ArrayLike | None = None,
        terminal: ArrayLike | None = None,
    ) -> Self:
        """Make a model from its tables.

        Args:
            transitions: ``[S, A, S]`` or sparse ``[S·A, S]``, p(s' | s, a).
            rewards: ``[S, A]``, r(s, a), or ``[S, A, S]``, r(s, a, s').
            initial: ``[S]``; uniform over the states that are not terminal if not given.
            terminal: ``[S]`` booleans; none if not given.

        Raises:
            ValueError: if shapes do not fit or the tables are no model.
        """
        rewards = np.asarray(rewards, dtype=np.float64)
        num_states, num_actions = rewards.shape[:2]
        if not issparse(transitions):
            transitions = np.asarray(transitions, dtype=np.float64).reshape(num_states * num_actions, -1)
        matrix = csr_array(transitions).tocoo()
        if matrix.shape != (num_states * num_actions, num_states):
            raise ValueError(f"rewards speak of {num_states} states and {num_actions} actions, transitions of others")
        rows, next_states = matrix.row.astype(np.int64), matrix.col.astype(np.int64)
        index = (rows // num_actions, rows % num_actions) + ((next_states,) if rewards.ndim == 3 else ())
        ends = np.zeros(num_states, dtype=bool) if terminal is None else np.array(terminal, dtype=bool)
        if initial is None:
            initial = ~ends / max(1, int((~ends).sum()))
        return cls(Outcomes(rows, next_states, matrix.data, rewards[index]), initial, ends, num_actions)

    @classmethod
    def from_env(cls, env: gymnasium.Env) -> TabularMDP:
        """Return the model of an environment: its ``mdp`` attribute, or else Gymnasium's ``P``.

        ``P[s][a]`` is a list of (probability, next state, reward, terminated), as the toy-text environments have it.
        Their last states are not always absorbing in ``P``. A state becomes terminal here if all its entries from other
        states are flagged as terminated and no episode starts in it. A flagged entry to any other state, whose value
        must not be lost, leads to one extra terminal state instead, appended at the end (so S may be one more than
        the environment's number of observations).

        The initial distribution is ``initial_state_distrib``; where there is none, uniform over states that are not
        terminal.

        Raises:
            TypeError: if the environment has neither ``mdp`` nor ``P``.
        """
        if env.has_wrapper_attr("mdp"):
            return env.get_wrapper_attr("mdp")
        if not env.has_wrapper_attr("P"):
            raise TypeError(f"{env} shows no exact model: it has neither an attribute mdp nor Gymnasium's P")
        arrays, initial, terminal, num_actions = read_model(
            env.get_wrapper_attr("P"), getattr(env.unwrapped, "initial_state_distrib", None)
        )
        return cls(Outcomes(*arrays), initial, terminal, num_actions)

    def action_values(self, values: NDArray[np.float64], discount: float) -> NDArray[np.float64]:
        """Return ``[S, A]``, Q(s, a) = r(s, a) + γ Σ_s' p(s' | s, a) V(s'), for ``[S]`` values V."""
        return self.rewards + discount * (self.transitions @ values).reshape(self.rewards.shape)

    def evaluate(self, policy: ArrayLike, discount: float) -> NDArray[np.float64]:
        """Return ``[S]``, the value of a policy, V = (I − γ P_π)^(−1) r_π, by one sparse solve.

        With γ = 1 the policy must end every episode; states from which it never does are worth 0 if it earns nothing
        there.

        Args:
            policy: ``[S, A]``, π(a | s).
            discount: γ in [0, 1].

        Raises:
            ValueError: if the policy is not a distribution in every state, or its value is not finite.
        """
        policy = np.asarray(policy, dtype=np.float64)
        if policy.shape != self.rewards.shape:
            raise ValueError(f"the policy has shape {policy.shape}, the model {self.rewards.shape}")
        if (policy < 0).any() or not np.allclose(policy.sum(axis=1), 1, rtol=0, atol=ROW_SUM_TOLERANCE):
            raise ValueError("every row of a policy is a distribution over actions")
        starts = np.arange(0, policy.size + 1, self.num_actions)
        choice = csr_array((policy.ravel(), np.arange(policy.size), starts), shape=(self.num_states, policy.size))
        transitions, rewards = csr_array(choice @ self.transitions), (policy * self.rewards).sum(axis=1)
        unknown = ~self.terminal
        if discount == 1:
            unknown = self._transient_states(transitions, rewards)
        inner = csr_array(transitions[unknown][:, unknown])
        values = np.zeros(self.num_states)
        if unknown.any():
            values[unknown] = spsolve((eye_array(inner.shape[0]) - discount * inner).tocsc(), rewards[unknown])
        return values

    def unrolled(self, horizon: int) -> TabularMDP:
        """Return the problem that ends after ``horizon`` steps, with the time in the state.

        State s at time t is number t · S + s, so there are S · (horizon + 1) states; those at t = ``horizon`` are
        terminal. Episodes start at t = 0.

        Raises:
            ValueError: if the horizon is less than 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon is a number of steps, at least 1, not {horizon}")
        times = np.arange(horizon)[:, None]
        rows, next_states, probabilities, rewards = self.outcomes
        outcomes = Outcomes(
            (rows + times * self.num_states * self.num_actions).ravel(),
            (next_states + (times + 1) * self.num_states).ravel(),
            np.tile(probabilities, horizon),
            np.tile(rewards, horizon),
        )
        terminal = np.tile(self.terminal, horizon + 1)
        terminal[horizon * self.num_states :] = True
        initial = np.concatenate([self.initial, np.zeros(horizon * self.num_states)])
        return TabularMDP(outcomes, initial, terminal, self.num_actions)

    def sample(self, state: int, action: int, generator: np.random.Generator) -> tuple[int, float]:
        """Draw (s', r) from p(s', r | s, a), with one uniform number where there is more than one outcome."""
        row = state * self.num_actions + action
        index, end = self.row_starts[row], self.row_starts[row + 1]
        if end - index > 1:
            index += self.cumulative[index : end - 1].searchsorted(generator.random(), "right")
        return int(self.outcomes.next_states[index]), float(self.outcomes.rewards[index])

    def sample_start(self, generator: np.random.Generator) -> int:
        """Draw a first state, with one uniform number where there is more than one."""
        starts, cumulative = self.starts
        return int(starts[cumulative[:-1].searchsorted(generator.random(), "right") if len(starts) > 1 else 0])

    @cached_property
    def longest_row(self) -> int:
        """The most next states that an action can have."""
        return int(np.diff(self.transitions.indptr).max())

    @cached_property
    def largest_reward(self) -> float:
        """The largest magnitude of r(s, a)."""
        return float(max(self.rewards.max(), -self.rewards.min()))

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """``[N]``, for each outcome the probability of it and of those before it in its row."""
        cumulative, lengths = self.outcomes.probabilities.copy(), np.diff(self.row_starts)
        for place in range(1, lengths.max()):
            index = self.row_starts[:-1][lengths > place] + place
            cumulative[index] += cumulative[index - 1]
        return cumulative

    def thresholds(self) -> NDArray[np.float64]:
        """Return ``[K − 1, S·A]``, the cumulative probabilities of each row's outcomes but its last.

        A row has at most K outcomes; where it has fewer, infinity stands for those it has not. Outcome k of a row
        follows where k of them are at most a uniform number.
        """
        first, further = self.row_starts[:-1], np.diff(self.row_starts) - 1
        thresholds = np.full((further.max(), len(further)), np.inf)
        for place, row in enumerate(thresholds):
            longer = further > place
            row[longer] = self.cumulative[first[longer] + place]
        return thresholds

    @cached_property
    def starts(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The states in which episodes can start, and their cumulative probabilities."""
        starts = np.flatnonzero(self.initial)
        return starts, self.initial[starts].cumsum()

    def check_model(self, env: gymnasium.Env | None = None, samples: int = 20_000, seed: int = 0) -> None:
        """Check that this is a model and, given an environment, that it is the model of that environment.

        Rows must sum to one, terminal states must absorb with zero reward, and rewards must be finite. An environment
        is compared by a random walk, see :func:`aligngym.envs.model_check.check_against_simulator`.

        Raises:
            ValueError: naming the worst state and action.
        """
        self._check_outcomes(self.outcomes)
        sums = self.transitions.sum(axis=1)
        self._refuse(np.abs(sums - 1), ROW_SUM_TOLERANCE, "p(s' | s, a) does not sum to one but misses it by {}")
        self._refuse(~np.isfinite(self.rewards.ravel()), 0, "the expected reward is not finite")
        ends = np.repeat(self.terminal, self.num_actions)
        own = self.transitions[np.arange(len(ends)), np.arange(len(ends)) // self.num_actions]
        self._refuse(
            ends * np.abs(1 - np.asarray(own)), ROW_SUM_TOLERANCE, "a terminal state is left with probability {}"
        )
        self._refuse(ends * np.abs(self.rewards.ravel()), 0, "a terminal state pays {}")
        if env is not None:
            check_against_simulator(self, env, samples, seed)

    def _refuse(self, badness: NDArray[Any], limit: float, message: str) -> None:
        """Raise for the row s · A + a with the largest badness, if that exceeds the limit."""
        # A badness that is not a number is as bad as can be.
        badness = np.nan_to_num(np.asarray(badness, dtype=np.float64), nan=np.inf)
        worst = int(badness.argmax())
        if badness[worst] > limit:
            state, action = divmod(worst, self.num_actions)
            raise ValueError(f"state {state}, action {action}: {message.format(f'{badness[worst]:.6g}')}")

    def _check_outcomes(self, outcomes: Outcomes, ends: NDArray[np.bool_] | None = None) -> None:
        """Refuse outcomes that make no model, except in the rows of terminal states, which are replaced anyway."""
        rows, next_states, probabilities, rewards = outcomes
        size = self.num_states * self.num_actions
        if ends is None:
            ends = np.zeros(size, dtype=bool)
        beyond = (next_states < 0) | (next_states >= self.num_states)
        if ((rows < 0) | (rows >= size)).any() or not ends[rows[beyond]].all():
            raise ValueError(
                f"an outcome speaks of states beyond {self.num_states} or actions beyond {self.num_actions}"
            )
        bad = np.bincount(rows[~np.isfinite(rewards)], minlength=size)
        self._refuse(np.where(ends, 0, bad), 0, "{} outcomes have a reward that is not finite")
        negative = np.bincount(rows[~(probabilities >= 0)], minlength=size)
        self._refuse(np.where(ends, 0, negative), 0, "{} outcomes have a probability that is not ≥ 0")
        misses = np.abs(np.bincount(rows, probabilities, minlength=size) - 1)
        misses[ends] = 0
        self._refuse(misses, ROW_SUM_TOLERANCE, "the probabilities do not sum to one but miss it by {}")

    def _transient_states(self, transitions: csr_array, rewards: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which states may reach a terminal one, and refuse rewards that are earned for ever elsewhere."""
        ends = self.terminal
        while not np.array_equal(ends, wider := ends | (transitions @ ends.astype(np.float64) > 0)):
            ends = wider
        stuck = np.flatnonzero(~ends & (rewards != 0))
        if len(stuck):
            raise ValueError(
                f"from state {stuck[0]} this policy never reaches a terminal state and keeps earning "
                f"{rewards[stuck[0]]} a step: its value is not finite with a discount of 1; take a smaller one"
            )
        return ends & ~self.terminal
