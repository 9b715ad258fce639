"""Does a model say what its simulator does?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

if TYPE_CHECKING:
    from aligngym.envs.tabular_mdp import TabularMDP

#: The probability that a right model is refused, over all comparisons of one check.
FALSE_ALARM = 1e-6


def check_against_simulator(mdp: TabularMDP, env: gymnasium.Env, samples: int = 20_000, seed: int = 0) -> None:
    """Walk at random through an environment and compare every step with a model.

    A first state, a next state, a reward or an ending that the model calls impossible is an error at once. The
    frequency of every outcome (s', r) after n visits of (s, a), and of every first state, must be within

        √( ln(2 · comparisons · samples / δ) / 2n ),  δ = 10⁻⁶,

    of its probability: Hoeffding's inequality, with a union bound over the comparisons and over the random n. A right
    model is refused with probability at most δ.

    Args:
        mdp: the model.
        env: with discrete observations and actions that mean the same as the model's.
        samples: steps of the walk.
        seed: of the walk and of the environment; the check is repeatable.

    Raises:
        ValueError: naming the state and the action with the worst disagreement.
    """
    counts = np.zeros(len(mdp.outcomes.rows))
    starts = np.zeros(mdp.num_states)
    generator = np.random.default_rng(seed)
    outcome_index = _index(mdp)
    state: int | None = None
    for _ in range(samples):
        if state is None:
            observation, _ = env.reset(seed=int(generator.integers(2**31)))
            state = int(observation)
            starts[state] += 1
            if not mdp.initial[state] > 0:
                raise ValueError(f"state {state}: an episode started there, which the model calls impossible")
        action = int(generator.integers(mdp.num_actions))
        observation, reward, terminated, truncated, _ = env.step(action)
        counts[_find(mdp, outcome_index, state, action, (int(observation), float(reward), terminated))] += 1
        state = None if terminated or truncated else int(observation)
    comparisons = len(counts) + mdp.num_states
    log_term = np.log(2 * comparisons * samples / FALSE_ALARM) / 2
    visits = np.bincount(mdp.outcomes.rows, counts, minlength=mdp.rewards.size)[mdp.outcomes.rows]
    excess = _excess(counts, visits, mdp.outcomes.probabilities, log_term)
    worst = int(excess.argmax())
    if excess[worst] > 0:
        at, action = divmod(int(mdp.outcomes.rows[worst]), mdp.num_actions)
        raise ValueError(
            f"state {at}, action {action}: the model gives next state {mdp.outcomes.next_states[worst]} with reward "
            f"{mdp.outcomes.rewards[worst]} probability {mdp.outcomes.probabilities[worst]:.6g}, and the simulator "
            f"went there in {counts[worst]:.0f} of {visits[worst]:.0f} visits"
        )
    excess = _excess(starts, np.full_like(starts, starts.sum()), mdp.initial, log_term)
    if excess.max() > 0:
        worst = int(excess.argmax())
        raise ValueError(
            f"state {worst}: the model starts there with probability {mdp.initial[worst]:.6g}, and the simulator did "
            f"in {starts[worst]:.0f} of {starts.sum():.0f} episodes"
        )


def _excess(counts: Any, visits: Any, probabilities: Any, log_term: float) -> Any:
    """Return by how much |frequency − probability| exceeds its bound."""
    # The bound of a single visit is above one, so rows without visits may pass for rows with one.
    visits = np.maximum(visits, 1)
    return np.abs(counts / visits - probabilities) - np.sqrt(log_term / visits)


def _index(mdp: TabularMDP) -> dict[tuple[int, int], list[tuple[float, int]]]:
    """Return, for every row and next state, the rewards that the model knows and where it has them."""
    index: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for position, (row, next_state, _, reward) in enumerate(zip(*mdp.outcomes, strict=True)):
        index.setdefault((int(row), int(next_state)), []).append((float(reward), position))
    return index


def _find(
    mdp: TabularMDP,
    index: dict[tuple[int, int], list[tuple[float, int]]],
    state: int,
    action: int,
    outcome: tuple[int, float, bool],
) -> int:
    """Return the position of an observed outcome in the model's list, or raise because it is not there."""
    next_state, reward, terminated = outcome
    # An ending in a state that is not terminal is an entry to the model's extra terminal state, its last one.
    expected = next_state if bool(mdp.terminal[next_state]) == terminated else mdp.num_states - 1
    if bool(mdp.terminal[expected]) == terminated:
        for known, position in index.get((state * mdp.num_actions + action, expected), []):
            if np.isclose(known, reward, rtol=1e-9, atol=1e-12):
                return position
    ending = "and ended there" if terminated else "and went on"
    raise ValueError(
        f"state {state}, action {action}: the simulator went to state {next_state} with reward {reward} {ending}, "
        "which the model calls impossible"
    )
