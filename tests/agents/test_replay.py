"""Memories of transitions: closed forms of n-step returns, and frequencies against the probabilities promised."""

import numpy as np
import pytest
import torch
from scipy import stats

from aligngym.agents import replay
from aligngym.agents.replay import NStepTransitions, PrioritizedReplay, ReplayBuffer, SumTree, Transitions
from aligngym.core.compilation import interpreted
from aligngym.core.trajectories import Trajectories


def random_trajectories(rows, steps, seed, next_step_reset=False):
    """Steps whose observation counts them, with ends of both kinds anywhere."""
    generator = np.random.default_rng(seed)
    terminated = generator.random((rows, steps)) < 0.15
    truncated = (generator.random((rows, steps)) < 0.15) & ~terminated
    mask = np.ones((rows, steps), dtype=bool)
    if next_step_reset:
        # In the step after an end a copy does nothing but begin anew.
        for t in range(1, steps):
            mask[:, t] = ~((terminated | truncated)[:, t - 1] & mask[:, t - 1])
            terminated[:, t] &= mask[:, t]
            truncated[:, t] &= mask[:, t]
    numbers = np.arange(rows * steps).reshape(rows, steps)
    return Trajectories(
        observations=torch.from_numpy(numbers),
        actions=torch.from_numpy(generator.integers(4, size=(rows, steps))),
        mask=torch.from_numpy(mask),
        rewards=torch.from_numpy(generator.normal(size=(rows, steps)).astype(np.float32)) * torch.from_numpy(mask),
        terminated=torch.from_numpy(terminated),
        truncated=torch.from_numpy(truncated),
        next_observations=torch.from_numpy(numbers + 1000),
        next_action_mask=torch.from_numpy(generator.random((rows, steps, 4)) < 0.5),
    )


def slow_transitions(steps, discount, n):
    """One window at a time: (s, a, R, γ', s', allowed), keyed by s."""
    found = {}
    rows, length = steps.mask.shape
    for row in range(rows):
        for start in range(length - n + 1):
            if not steps.mask[row, start]:
                continue
            total = 0.0
            for k in range(n):
                last = start + k
                total += discount**k * float(steps.rewards[row, last])
                if steps.terminated[row, last] or steps.truncated[row, last]:
                    break
            found[int(steps.observations[row, start])] = (
                int(steps.actions[row, start]),
                total,
                0.0 if steps.terminated[row, last] else discount ** (k + 1),
                int(steps.next_observations[row, last]),
                steps.next_action_mask[row, last].tolist(),
            )
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("next_step_reset", [False, True])
@pytest.mark.parametrize("piece", [1, 4, 30])
def test_n_step_transitions_whatever_the_pieces(n, next_step_reset, piece):
    steps = random_trajectories(3, 30, seed=n, next_step_reset=next_step_reset)
    make = NStepTransitions(0.9, n)
    parts = []
    for start in range(0, 30, piece):
        columns = slice(start, start + piece)
        parts.append(
            make(
                Trajectories(
                    **{
                        name: value[:, columns]
                        for name, value in vars(steps).items()
                        if value is not None and name != "log_probs"
                    }
                )
            )
        )
    found = {}
    for part in parts:
        for row in range(len(part)):
            assert int(part.observations[row]) not in found
            found[int(part.observations[row])] = (
                int(part.actions[row]),
                float(part.returns[row]),
                float(part.discounts[row]),
                int(part.next_observations[row]),
                part.next_action_mask[row].tolist(),
            )
    expected = slow_transitions(steps, 0.9, n)
    assert found.keys() == expected.keys()
    for state, (action, total, discount, following, allowed) in expected.items():
        assert found[state][0] == action
        assert found[state][1] == pytest.approx(total, abs=1e-5)
        assert found[state][2] == pytest.approx(discount, abs=1e-6)
        assert found[state][3:] == (following, allowed)


def test_n_step_returns_in_closed_form():
    ones = torch.ones(1, 6)
    ends = torch.zeros(1, 6, dtype=torch.bool)
    terminated, truncated = ends.clone(), ends.clone()
    terminated[0, 2] = truncated[0, 4] = True
    numbers = torch.arange(6)[None]
    steps = Trajectories(
        numbers,
        numbers,
        ones.bool(),
        ones,
        terminated=terminated,
        truncated=truncated,
        next_observations=numbers + 1,
    )
    made = NStepTransitions(0.5, 3)(steps)
    assert made.observations.tolist() == [0, 1, 2, 3]
    assert made.returns.tolist() == [1.75, 1.5, 1.0, 1.5]
    assert made.discounts.tolist() == [0, 0, 0, 0.25]
    assert made.next_observations.tolist() == [3, 3, 3, 5]


def numbered(start, count):
    numbers = torch.arange(start, start + count)
    return Transitions(numbers, numbers % 3, numbers.float(), numbers.float() / 2, numbers + 1)


def test_the_oldest_make_room():
    memory = ReplayBuffer(10)
    for start, count in ((0, 4), (4, 5), (9, 3), (12, 25), (37, 1)):
        memory.add(numbered(start, count))
        drawn = memory.sample(500, np.random.default_rng(start))
        newest = start + count
        assert set(drawn.observations.tolist()) == set(range(max(0, newest - 10), newest))
        assert len(memory) == min(newest, 10)
        # What belongs together stays together.
        assert torch.equal(drawn.returns, drawn.observations.float())
        assert torch.equal(drawn.next_observations, drawn.observations + 1)
        assert torch.equal(drawn.actions, drawn.observations % 3)


def test_uniform_frequencies():
    memory = ReplayBuffer(20)
    memory.add(numbered(0, 20))
    counts = np.bincount(memory.sample(20_000, np.random.default_rng(0)).rows, minlength=20)
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_prioritised_frequencies_and_weights(alpha):
    memory = PrioritizedReplay(12, alpha=alpha, beta=1.0, smallest=0.01)
    memory.add(numbered(0, 9))
    surprises = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 0.3, 7.0, 0.2])
    memory.update(torch.arange(9), surprises)
    expected = (surprises.double().numpy() + 0.01) ** alpha
    expected /= expected.sum()
    generator = np.random.default_rng(1)
    counts = np.zeros(9)
    for _ in range(2000):
        # Batches of one have no strata, so draws are independent.
        counts[memory.sample(1, generator).rows] += 1
    assert stats.chisquare(counts, expected * counts.sum()).pvalue > 0.001
    batch = memory.sample(64, generator)
    by_hand = 1 / (9 * expected)
    np.testing.assert_allclose(batch.weights, (by_hand / by_hand.max())[batch.rows], rtol=1e-5)
    # Strata: how often each comes differs from its share by less than two.
    drawn = np.bincount(batch.rows, minlength=9)
    assert (np.abs(drawn - 64 * expected) < 2).all()


def test_importance_weights_make_the_expected_gradient_that_of_uniform_sampling():
    memory = PrioritizedReplay(8, alpha=0.7, beta=1.0)
    memory.add(numbered(0, 6))
    memory.update(torch.arange(6), torch.tensor([0.1, 3.0, 0.5, 1.0, 0.0, 9.0]))
    gradients = np.random.default_rng(0).normal(size=(6, 4))
    probabilities = memory.priorities / memory.tree.total
    weights = np.zeros(6)
    batch = memory.sample(4000, np.random.default_rng(0))
    weights[batch.rows] = batch.weights
    # The rarest never comes in 4000 draws; its weight is the largest one, by which all are divided.
    weights[4] = 1
    expectation = (probabilities * weights) @ gradients
    uniform = gradients.mean(axis=0)
    factor = expectation[0] / uniform[0]
    np.testing.assert_allclose(expectation, factor * uniform, rtol=1e-5)
    assert factor == pytest.approx(6 * probabilities.min(), rel=1e-5)


def test_beta_rises_to_one_and_zero_beta_weighs_nothing():
    memory = PrioritizedReplay(100, beta=0.4, beta_steps=50)
    assert memory.beta == 0.4
    memory.add(numbered(0, 25))
    assert memory.beta == pytest.approx(0.7)
    memory.add(numbered(0, 100))
    assert memory.beta == 1
    unweighted = PrioritizedReplay(10, beta=0.0)
    unweighted.add(numbered(0, 5))
    unweighted.update(torch.arange(5), torch.arange(5.0))
    assert (unweighted.sample(8, np.random.default_rng(0)).weights == 1).all()


def test_new_transitions_get_the_largest_priority():
    memory = PrioritizedReplay(6, alpha=1.0, smallest=1e-9)
    memory.add(numbered(0, 3))
    assert memory.priorities.tolist() == [1, 1, 1]
    memory.update(torch.tensor([0, 1, 2]), torch.tensor([0.5, 5.0, 0.25]))
    memory.add(numbered(3, 1))
    np.testing.assert_allclose(memory.priorities, [0.5, 5, 0.25, 5], rtol=1e-6)
    # The oldest, which has it, makes room and takes its priority with it.
    memory.add(numbered(4, 4))
    np.testing.assert_allclose(memory.priorities, [5, 5, 0.25, 5, 5, 5], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 1000])
def test_sum_tree_against_cumulative_sums(size):
    generator = np.random.default_rng(size)
    tree = SumTree(size)
    values = np.zeros(size)
    for _ in range(5):
        places = generator.integers(size, size=7)
        numbers = generator.integers(1, 9, size=7).astype(float)
        tree.set(places, numbers)
        values[places] = numbers
        np.testing.assert_array_equal(tree.leaves, values)
        assert tree.total == values.sum()
        points = np.concatenate([np.arange(values.sum()), generator.random(50) * values.sum()])
        np.testing.assert_array_equal(tree.find(points), np.searchsorted(values.cumsum(), points, side="right"))
        # Whatever rounding does to a point, it leads to something.
        assert values[tree.find(np.array([values.sum(), 2 * values.sum()]))].all()


def test_compiled_and_interpreted_trees_agree():
    generator = np.random.default_rng(0)
    trees = [SumTree(37), SumTree(37)]
    write, find = interpreted(replay._write), interpreted(replay._find)
    for _ in range(10):
        places, values = generator.integers(37, size=9), generator.random(9)
        trees[0].set(places, values)
        write(trees[1]._sums, places + 64, values)
        assert trees[0]._sums.tobytes() == trees[1]._sums.tobytes()
        points = generator.random(20) * trees[0].total
        np.testing.assert_array_equal(trees[0].find(points), find(trees[1]._sums, points) - 64)


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplay])
@pytest.mark.parametrize("added", [0, 7, 25])
def test_state_holds_what_is_filled_and_continues_alike(kind, added):
    memory, other = kind(10), kind(10)
    if added:
        memory.add(numbered(0, added))
    if added and kind is PrioritizedReplay:
        memory.update(torch.arange(len(memory)), torch.rand(len(memory)))
    state = memory.state_dict()
    assert all(len(value) == min(added, 10) for value in state["fields"].values())
    other.load_state_dict(state)
    for each in (memory, other):
        each.add(numbered(50, 4))
    first, second = (each.sample(30, np.random.default_rng(3)) for each in (memory, other))
    assert torch.equal(first.observations, second.observations)
    assert kind is ReplayBuffer or torch.equal(first.weights, second.weights)


def test_a_state_of_another_capacity_is_refused():
    memory = ReplayBuffer(10)
    memory.add(numbered(0, 12))
    with pytest.raises(ValueError, match="10 transitions were saved"):
        ReplayBuffer(11).load_state_dict(memory.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReplayBuffer(0), "capacity is .* not 0"),
        (lambda: NStepTransitions(0.9, 0), "n is a number of steps, at least 1, not 0"),
        (lambda: NStepTransitions(1.1, 1), "discount must be in"),
        (lambda: PrioritizedReplay(10, alpha=-1), "alpha is .* not -1"),
        (lambda: PrioritizedReplay(10, beta=1.5), "beta is .* not 1.5"),
        (lambda: PrioritizedReplay(10, beta_steps=-1), "beta_steps is .* not -1"),
        (lambda: PrioritizedReplay(10, smallest=0), "never seen again"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_trajectories_without_next_observations_are_refused():
    steps = random_trajectories(1, 3, seed=0)
    steps.next_observations = None
    with pytest.raises(ValueError, match="what the environment showed"):
        NStepTransitions(0.9, 1)(steps)
