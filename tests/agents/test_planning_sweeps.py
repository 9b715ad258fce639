"""The compiled loops against plain Python and NumPy."""

import numpy as np
import pytest

from aligngym.agents import prioritized_sweeping, sweep_order, sweeps
from aligngym.core.compilation import interpreted
from aligngym.envs import GridWorld, Outcomes, TabularMDP
from aligngym.envs import outcomes as outcomes_module


def model(seed=0, states=15, actions=3):
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.3), size=(states, actions))
    transitions[transitions < 0.1] = 0
    transitions /= transitions.sum(axis=2, keepdims=True)
    return TabularMDP.from_arrays(
        transitions, generator.normal(size=(states, actions)), terminal=np.arange(states) == 4
    )


@pytest.fixture
def plain(monkeypatch):
    """Run loops within loops as plain Python too."""
    for module in (sweeps, sweep_order, prioritized_sweeping, outcomes_module):
        for name, value in list(vars(module).items()):
            if callable(value) and hasattr(value, "py_func"):
                monkeypatch.setattr(module, name, interpreted(value))


def run_all(seed=1):
    mdp = model(seed)
    rows = sweeps.rows_of(mdp)
    values, results = np.random.default_rng(seed).normal(size=15), []
    for in_place in (False, True):
        before = values.copy()
        after = before if in_place else np.empty(15)
        results += [sweeps.sweep(before, after, rows, 0.9), after.copy()]
        actions, before = np.zeros(15, dtype=np.int64), values.copy()
        after = before if in_place else np.empty(15)
        results += [sweeps.improve(before, after, rows, 0.9, actions), after.copy(), actions]
        chain, before = sweeps.empty_chain(rows), values.copy()
        sweeps.follow(actions, rows, 0.9, chain, in_place)
        size = chain.starts[-1]
        results += [chain.starts, chain.next_states[:size].copy(), chain.weights[:size].copy(), chain.rewards]
        after = before if in_place else np.empty(15)
        results += [sweeps.follow_sweep(before, after, chain), after.copy()]
    before = sweep_order.predecessors(rows, with_probabilities=True)
    results += [*before, *sweep_order.nearest_first(before, np.array([2, 7]))]
    order = sweep_order.order_by_distance(mdp)
    results += [order.states, order.positions, *order.rows]
    errors = np.abs(values)
    results += [prioritized_sweeping.backup_by_priority(values, errors, rows, before, 0.9, 1e-3, 40), values, errors]
    return results


def test_the_loops_are_the_same_compiled_and_as_plain_python(request):
    compiled = [run_all(seed) for seed in range(3)]
    request.getfixturevalue("plain")
    assert not hasattr(sweeps.sweep, "py_func")
    for seed in range(3):
        for one, other in zip(compiled[seed], run_all(seed), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_sweep_is_bellmans_operator():
    mdp = model(3)
    values, updated = np.random.default_rng(0).normal(size=15), np.empty(15)
    change = sweeps.sweep(values, updated, sweeps.rows_of(mdp), 0.9)
    np.testing.assert_allclose(updated, mdp.action_values(values, 0.9).max(axis=1), atol=1e-14)
    assert change == np.abs(updated - values).max()


def test_the_first_of_the_best_actions_is_taken():
    mdp = TabularMDP.from_arrays(np.full((2, 4, 2), 0.5), [[0.0, 1.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0]])
    actions = np.zeros(2, dtype=np.int64)
    sweeps.improve(np.ones(2), np.empty(2), sweeps.rows_of(mdp), 0.9, actions)
    assert actions.tolist() == [1, 0]


def test_a_chain_with_solved_loops_has_the_policys_value():
    mdp = model(4)
    rows, actions = sweeps.rows_of(mdp), np.random.default_rng(1).integers(3, size=15)
    truth = mdp.evaluate(np.eye(3)[actions], 0.9)
    for solve_loops in (False, True):
        chain = sweeps.empty_chain(rows)
        sweeps.follow(actions, rows, 0.9, chain, solve_loops)
        assert sweeps.follow_sweep(truth, np.empty(15), chain) < 1e-13
    # A state that is certain to stay, and pays 1, is solved at once.
    loop = sweeps.rows_of(TabularMDP.from_arrays(np.ones((1, 1, 1)), [[1.0]]))
    chain, values = sweeps.empty_chain(loop), np.zeros(1)
    sweeps.follow(np.zeros(1, dtype=np.int64), loop, 0.9, chain, True)
    sweeps.follow_sweep(values, values, chain)
    assert values[0] == pytest.approx(10, rel=1e-14)


def test_predecessors_are_the_transposed_model():
    mdp = model(5)
    found = sweep_order.predecessors(sweeps.rows_of(mdp), with_probabilities=True)
    dense = np.zeros((15, 15))
    for state in range(15):
        for index in range(found.starts[state], found.starts[state + 1]):
            dense[found.states[index], state] += found.probabilities[index]
    np.testing.assert_allclose(dense, mdp.transitions.toarray().reshape(15, 3, 15).sum(axis=1), atol=1e-14)


def test_the_order_is_by_the_length_of_the_shortest_way():
    grid = GridWorld("S.#.\n..#.\n...G\n###.\n.#..", slip=0.1)
    order = sweep_order.order_by_distance(grid.mdp)
    # Steps to G by the text, row by row; the last row's first cell is enclosed.
    steps = np.array([5, 4, 2, 4, 3, 1, 3, 2, 1, 0, 1, 99, 3, 2])
    assert (np.diff(steps[order.states]) >= 0).all()
    np.testing.assert_array_equal(order.states[order.positions], np.arange(14))
    dense = grid.mdp.transitions.toarray().reshape(14, 4, 14)[order.states][:, :, order.states]
    ordered = np.zeros((56, 14))
    for row in range(56):
        for index in range(order.rows.starts[row], order.rows.starts[row + 1]):
            ordered[row, order.rows.next_states[index]] += order.rows.probabilities[index]
    np.testing.assert_array_equal(ordered.reshape(14, 4, 14), dense)
    np.testing.assert_array_equal(order.rows.rewards, grid.mdp.rewards[order.states])


def test_without_an_end_the_order_begins_where_most_is_paid():
    grid = GridWorld("S....G", stay=True, terminal_target=False)
    # Staying in the target and entering it pay the same.
    assert sweep_order.order_by_distance(grid.mdp).states.tolist() == [4, 5, 3, 2, 1, 0]


def random_outcomes(seed):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(9), size=(5, 2))
    probabilities[..., generator.integers(9)] = 0
    probabilities /= probabilities.sum(axis=2, keepdims=True)
    outcomes = Outcomes(
        np.repeat(np.arange(10), 9),
        generator.integers(5, size=90),
        probabilities.ravel(),
        generator.integers(-1, 2, size=90) * 0.3,
    )
    return outcomes.select(generator.permutation(90)) if seed % 2 else outcomes


@pytest.mark.parametrize("seed", range(6))
def test_merged_outcomes_are_those_of_a_dictionary(seed, request):
    outcomes = random_outcomes(seed)
    terminal = np.arange(5) == seed % 5
    together = {}
    for row, following, probability, reward in zip(*outcomes, strict=True):
        if not terminal[row // 2] and probability > 0:
            together[row, following, reward] = together.get((row, following, reward), 0.0) + probability
    for row in (2 * (seed % 5), 2 * (seed % 5) + 1):
        together[row, row // 2, 0.0] = 1.0
    if seed > 3:
        request.getfixturevalue("plain")
    mdp = TabularMDP(outcomes, np.full(5, 0.2), terminal, 2)
    merged = mdp.outcomes
    np.testing.assert_array_equal(
        np.column_stack([merged.rows, merged.next_states, merged.rewards]), np.array(sorted(together))
    )
    np.testing.assert_allclose(merged.probabilities, [together[key] for key in sorted(together)], rtol=1e-14)
    expected = np.bincount(merged.rows, merged.probabilities * merged.rewards, 10).reshape(5, 2)
    np.testing.assert_allclose(mdp.rewards, expected, atol=1e-15)
    np.testing.assert_array_equal(mdp.row_starts, np.searchsorted(merged.rows, np.arange(11)))
    dense = np.zeros((10, 5))
    np.add.at(dense, (merged.rows, merged.next_states), merged.probabilities)
    np.testing.assert_allclose(mdp.transitions.toarray(), dense, atol=1e-15)


def test_rows_that_miss_one_by_little_are_normalised():
    outcomes = Outcomes(np.zeros(3, dtype=int), np.arange(3), np.array([0.1, 0.2, 0.7]) * (1 + 5e-10), np.zeros(3))
    mdp = TabularMDP(outcomes, np.eye(3)[0], np.arange(3) > 0, 1)
    assert abs(mdp.outcomes.probabilities[:3].sum() - 1) < 1e-15


def test_a_long_unsorted_row_is_sorted():
    generator = np.random.default_rng(0)
    order = generator.permutation(500)
    outcomes = Outcomes(np.zeros(500, dtype=int), order, np.full(500, 1 / 500), generator.normal(size=500))
    terminal = np.arange(500) > 0
    mdp = TabularMDP(outcomes, np.eye(500)[0], terminal, 1)
    np.testing.assert_array_equal(mdp.outcomes.next_states[:500], np.arange(500))
    np.testing.assert_array_equal(mdp.outcomes.rewards[:500], outcomes.rewards[np.argsort(order)])


def test_a_model_without_equal_transitions_is_stored_once():
    mdp = GridWorld(slip=0.2, forbidden_reward=0, boundary_reward=0, target_reward=0).mdp
    assert np.shares_memory(mdp.transitions.data, mdp.outcomes.probabilities)
    assert np.shares_memory(mdp.transitions.indices, mdp.outcomes.next_states)
    assert mdp.outcomes.next_states.dtype == np.int32
    # Two rewards for one next state are two outcomes and one transition.
    columns = np.zeros(2, dtype=int), np.ones(2, dtype=int), np.array([0.25, 0.75]), np.array([1.0, 5.0])
    mdp = TabularMDP(Outcomes(*columns), [1.0, 0.0], [False, True], 1)
    assert (len(mdp.outcomes.rows), mdp.transitions.nnz) == (3, 2)
    assert (mdp.transitions[0, 1], mdp.rewards[0, 0]) == (1.0, 4.0)
    np.testing.assert_array_equal(mdp.outcomes.probabilities, [0.25, 0.75, 1.0])
