"""Sequential tabular Q-learning: steps per second of four ways to do the same thing.

    python benchmarks/q_learning.py [--seconds 1] [--rounds 3]

Every way plays one step at a time and learns from it before the next. Ours run through the ordinary ``agent.learn``;
``episodes_per_iteration`` is 100 or 1 (an iteration seeds its random numbers anew, which costs as much as ten steps).
The hand-written loop is the usual one over a Gymnasium environment with a NumPy table and ``argmax``, without fair
ties; the one with lists has Python's own numbers in the table and looks up moves instead of stepping an environment.
The ways take turns, round by round, because other programs may use the machine; the best round of each counts.
"""

from __future__ import annotations

import argparse
import time

import gymnasium
import numpy as np

import aligngym.envs  # noqa: F401 (registers the grid)
from aligngym.agents import QLearning

DISCOUNT, STEP_SIZE, EPSILON = 0.9, 0.1, 0.1
TASKS = {
    "FrozenLake-v1": lambda: gymnasium.make("FrozenLake-v1"),
    "GridWorld 5×5": lambda: gymnasium.make("aligngym/GridWorld-v0"),
    "GridWorld 5×5, slip": lambda: gymnasium.make("aligngym/GridWorld-v0", slip=0.2),
}


def ours(make, seconds, compiled, episodes=100):
    """Return steps per second of ``agent.learn``, its first iteration not counted."""
    agent = QLearning(make(), DISCOUNT, STEP_SIZE, EPSILON, episodes_per_iteration=episodes, compiled=compiled)
    agent.learn(1, progress=False)
    if compiled and not agent.compiled:
        return float("nan")
    before, start = agent.visits.sum(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        agent.learn(10 if compiled else 1, progress=False)
    return (agent.visits.sum() - before) / (time.perf_counter() - start)


def gymnasium_and_numpy(make, seconds):
    """Return steps per second of the loop that everybody writes."""
    env, generator = make(), np.random.default_rng(0)
    values = np.zeros((env.observation_space.n, env.action_space.n))
    env.reset(seed=0)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        state, _ = env.reset()
        over = False
        while not over:
            if generator.random() < EPSILON:
                action = int(generator.integers(env.action_space.n))
            else:
                action = int(np.argmax(values[state]))
            next_state, reward, terminated, truncated, _ = env.step(action)
            target = reward + DISCOUNT * np.max(values[next_state]) * (not terminated)
            values[state, action] += STEP_SIZE * (target - values[state, action])
            state, over, steps = next_state, terminated or truncated, steps + 1
    return steps / (time.perf_counter() - start)


def lists(make, seconds):
    """Return steps per second with lists for the table, and for the moves of a deterministic environment."""
    from random import Random

    mdp = make().get_wrapper_attr("mdp") if make().has_wrapper_attr("mdp") else None
    if mdp is None or mdp.transitions.nnz > mdp.rewards.size:
        return float("nan")
    moves = mdp.transitions.indices.reshape(mdp.rewards.shape).tolist()
    rewards, terminal, generator = mdp.rewards.tolist(), mdp.terminal.tolist(), Random(0)
    values, draw, first = [[0.0] * 4 for _ in moves], generator.random, int(mdp.initial.argmax())
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        state = first
        for _ in range(1000):
            row = values[state]
            action = int(draw() * 4) if draw() < EPSILON else row.index(max(row))
            next_state = moves[state][action]
            following = 0.0 if terminal[next_state] else max(values[next_state])
            row[action] += STEP_SIZE * (rewards[state][action] + DISCOUNT * following - row[action])
            state, steps = next_state, steps + 1
            if terminal[state]:
                break
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way, in each round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    options = parser.parse_args()
    ways = {
        "agent.learn, compiled": lambda make: ours(make, options.seconds, compiled=True),
        "agent.learn, stepping the environment": lambda make: ours(make, options.seconds, compiled=False),
        "the same, 1 episode an iteration": lambda make: ours(make, options.seconds, compiled=False, episodes=1),
        "hand-written, Gymnasium and NumPy": lambda make: gymnasium_and_numpy(make, options.seconds),
        "hand-written, lists, no environment": lambda make: lists(make, options.seconds),
    }
    for task, make in TASKS.items():
        rates = np.array([[way(make) for way in ways.values()] for _ in range(options.rounds)]).max(axis=0)
        print(f"\n{task:40} steps/s    ratio")
        for name, rate in zip(ways, rates, strict=True):
            shown = "        –        –" if np.isnan(rate) else f"{rate:10,.0f} {rate / rates[3]:8.2f}"
            print(f"  {name:38}{shown}")


if __name__ == "__main__":
    main()
