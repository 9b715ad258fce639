"""Whole episodes: playing them with a policy that stays the same, and their returns.

Monte Carlo methods learn between episodes and never within one, so an episode is played with one table of
probabilities. Where the environment does nothing but sample from its exact model, a compiled loop does the stepping; it
draws the same random numbers in the same order as the environment, and so plays the same episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.endless_tasks import time_limit
from aligngym.agents.markov_chain import markov_chain, stuck_state
from aligngym.core.compilation import compiled
from aligngym.envs import sampling
from aligngym.envs.tabular_env import model_of
from aligngym.envs.tabular_mdp import TabularMDP

Integers = NDArray[np.signedinteger[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Episodes:
    """What happened in B episodes of N steps in all, one after the other in flat arrays.

    Attributes:
        states: ``[N]``, S_t, the state before each step.
        actions: ``[N]``, A_t.
        rewards: ``[N]``, R_{t+1}, what A_t brought.
        offsets: ``[B + 1]``, where each episode begins in these arrays, and where the last ends.
        last_states: ``[B]``, S_T.
        terminated: ``[B]`` booleans, whether S_T is terminal; otherwise the episode was truncated, and the task would
            have gone on.
    """

    states: Integers
    actions: Integers
    rewards: Floats
    offsets: Integers
    last_states: Integers
    terminated: NDArray[np.bool_]

    def __len__(self) -> int:
        """B, the number of episodes."""
        return len(self.last_states)

    def returns(self, discount: float, last_values: ArrayLike = 0.0) -> Floats:
        """Return ``[N]``, G_t = R_{t+1} + γ G_{t+1}, with G_T = 0 after a termination.

        Args:
            discount: γ.
            last_values: ``[B]`` or one number, what S_T is worth after a truncation.
        """
        return _returns(self.rewards, self.offsets, discount, np.where(self.terminated, 0.0, last_values))

    def visits(self, entries: Integers, first_only: bool) -> Integers:
        """Return the steps that Monte Carlo methods learn from, in their order: each episode from its end.

        Args:
            entries: ``[N]``, the number of the entry visited at each step, such as its state.
            first_only: leave out steps whose entry has been visited before in the same episode.
        """
        return _visits(entries, self.offsets, first_only, int(entries.max()) + 1)


def play_episodes(
    env: gymnasium.Env,
    policy: Floats,
    generator: np.random.Generator,
    max_steps: int,
    count: int,
    starts: tuple[Integers, Integers] | None = None,
) -> Episodes:
    """Play episodes, all of them with the same policy.

    Args:
        env: an environment with discrete observations and actions counted from 0.
        policy: ``[S, A]``, π(a | s).
        generator: seeds the environment and draws the actions, one uniform number each.
        max_steps: truncates an episode, if nothing has ended it before.
        count: B, how many.
        starts: ``[B]`` first states and ``[B]`` first actions; left to environment and policy if not given. See
            :func:`require_any_start`.
    """
    first_states, first_actions = starts if starts is not None else (np.full(count, -1), np.full(count, -1))
    seed = int(generator.integers(2**31))
    observation, _ = env.reset(seed=seed, options=None if starts is None else {"state": int(first_states[0])})
    model = model_of(env)
    if model is None:
        return _play_step_by_step(env, policy, generator, max_steps, first_states, first_actions, int(observation))
    first_states = np.concatenate([[observation], first_states[1:]])
    return Episodes(
        *_play(
            policy,
            int(min(max_steps, time_limit(env))),
            first_states,
            first_actions,
            *model.starts,
            model.row_starts,
            model.outcomes.next_states,
            model.outcomes.rewards,
            model.cumulative,
            model.terminal,
            generator,
            env.unwrapped.np_random,
        )
    )


def _play_step_by_step(
    env: gymnasium.Env,
    policy: Floats,
    generator: np.random.Generator,
    max_steps: int,
    first_states: Integers,
    first_actions: Integers,
    state: int,
) -> Episodes:
    """Play with any environment, which has been reset to ``state``."""
    states, actions, rewards, offsets, last_states, ends = [], [], [], [0], [], []
    for episode, action in enumerate(first_actions.tolist()):
        if episode > 0:
            start = int(first_states[episode])
            observation, _ = env.reset(options=None if start < 0 else {"state": start})
            state = int(observation)
        terminated = truncated = False
        while not (terminated or truncated):
            action = draw(policy[state], generator.random()) if action < 0 else action
            states.append(state)
            actions.append(action)
            observation, reward, terminated, truncated, _ = env.step(action)
            state, action = int(observation), -1
            rewards.append(float(reward))
            truncated = truncated or len(rewards) - offsets[-1] >= max_steps
        offsets.append(len(rewards))
        last_states.append(state)
        ends.append(bool(terminated))
    return Episodes(*(np.array(column) for column in (states, actions, rewards, offsets, last_states, ends)))


@compiled
def draw(probabilities: Floats, uniform: float) -> int:
    """Return the first action whose cumulative probability exceeds a uniform number in [0, 1)."""
    cumulative, drawn = 0.0, 0
    for action in range(len(probabilities)):
        if probabilities[action] > 0:
            # Where rounding leaves the sum below the uniform number, this is the last possible action.
            cumulative, drawn = cumulative + probabilities[action], action
            if uniform < cumulative:
                break
    return drawn


@compiled
def _play(
    policy: Floats,
    max_steps: int,
    first_states: Integers,
    first_actions: Integers,
    start_states: Integers,
    start_cumulative: Floats,
    row_starts: Integers,
    next_states: Integers,
    outcome_rewards: Floats,
    cumulative: Floats,
    terminal: NDArray[np.bool_],
    generator: np.random.Generator,
    env_generator: np.random.Generator,
) -> tuple[Integers, Integers, Floats, Integers, Integers, NDArray[np.bool_]]:
    """Step through a model as :meth:`TabularEnv.reset` and ``step`` do."""
    count, size = len(first_states), 0
    states, actions, rewards = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.float64)
    offsets, last_states, terminated = (
        np.zeros(count + 1, np.int64),
        np.empty(count, np.int64),
        np.zeros(count, np.bool_),
    )
    for episode in range(count):
        state, action, length = first_states[episode], first_actions[episode], 0
        if state < 0:
            state = start_states[sampling.draw(start_cumulative, env_generator)]
        while length < max_steps and not terminated[episode]:
            if action < 0:
                action = draw(policy[state], generator.random())
            row = state * policy.shape[1] + action
            first, end = row_starts[row], row_starts[row + 1]
            outcome = first + sampling.draw(cumulative[first:end], env_generator)
            if size == len(states):
                states, actions = np.concatenate((states, states)), np.concatenate((actions, actions))
                rewards = np.concatenate((rewards, rewards))
            states[size], actions[size], rewards[size] = state, action, outcome_rewards[outcome]
            state, action, length, size = next_states[outcome], -1, length + 1, size + 1
            terminated[episode] = terminal[state]
        offsets[episode + 1], last_states[episode] = size, state
    return states[:size], actions[:size], rewards[:size], offsets, last_states, terminated


@compiled
def _returns(rewards: Floats, offsets: Integers, discount: float, last_values: Floats) -> Floats:
    returns = np.empty(len(rewards), np.float64)
    for episode in range(len(last_values)):
        following = last_values[episode]
        for step in range(offsets[episode + 1] - 1, offsets[episode] - 1, -1):
            following = rewards[step] + discount * following
            returns[step] = following
    return returns


@compiled
def _visits(entries: Integers, offsets: Integers, first_only: bool, num_entries: int) -> Integers:
    seen_in = np.full(num_entries, -1)
    first = np.zeros(len(entries), np.bool_)
    steps, size = np.empty(len(entries), np.int64), 0
    for episode in range(len(offsets) - 1):
        for step in range(offsets[episode], offsets[episode + 1]):
            first[step] = seen_in[entries[step]] != episode
            seen_in[entries[step]] = episode
        for step in range(offsets[episode + 1] - 1, offsets[episode] - 1, -1):
            if first[step] or not first_only:
                steps[size] = step
                size += 1
    return steps[:size]


def require_any_start(env: gymnasium.Env) -> TabularMDP:
    """Return the model of an environment that can start in any state, as :class:`TabularEnv` can.

    Raises:
        TypeError: if it shows no exact model, or starts elsewhere than ``options={"state": s}`` says.
    """
    model = model_or_none(env)
    # Two states, for an environment that always starts in the same one might start in one of them.
    states: list[int] = [] if model is None else np.flatnonzero(~model.terminal)[[0, -1]].tolist()
    if model is None or any(env.reset(options={"state": state})[0] != state for state in states):
        raise TypeError(
            f"{env} cannot start in any state; make a TabularEnv of its model, TabularEnv(TabularMDP.from_env(env)), "
            "or learn with MCEpsilonGreedy, which starts where the environment starts"
        )
    return model


def model_or_none(env: gymnasium.Env) -> TabularMDP | None:
    """Return an environment's exact model, if it shows one."""
    try:
        return TabularMDP.from_env(env)
    except TypeError:
        return None


def fitted(policy: Floats, model: TabularMDP) -> Floats:
    """Return a policy with a row for the terminal state that :meth:`TabularMDP.from_env` may have appended."""
    return np.pad(policy, ((0, model.num_states - len(policy)), (0, 0)), constant_values=1 / model.num_actions)


def exact_values(env: gymnasium.Env, policy: Floats, discount: float) -> Floats | None:
    """Return ``[S]``, the value of a policy ``[S, A]`` by one sparse solve; ``None`` without an exact model."""
    model = model_or_none(env)
    return None if model is None else model.evaluate(fitted(policy, model), discount)[: len(policy)]


def refuse_endless_policy(env: gymnasium.Env, policy: Floats, discount: float, name: str = "policy") -> None:
    """Refuse a discount of 1 where the exact model, if there is one, shows that episodes of a policy may never end.

    Raises:
        ValueError: naming a state that they reach and never end from.
    """
    model = model_or_none(env) if discount == 1 else None
    state = None if model is None else stuck_state(model, markov_chain(model, fitted(policy, model))[0])
    if state is not None:
        raise ValueError(
            f"with this {name} episodes reach state {state} and never end from there: a discount of 1 gives no finite "
            "value; take a smaller one"
        )
