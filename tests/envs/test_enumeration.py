import itertools

import numpy as np
import pytest
import torch

from aligngym.core.trajectories import PADDING
from aligngym.envs import GridWorld, TokenMDP, bradley_terry_preferences, enumerate_trajectories


def play(mdp, actions):
    """Follow actions in a deterministic model, one step at a time: (states, rewards) until it ends."""
    state, states, rewards = int(mdp.initial.argmax()), [], []
    for action in actions:
        if mdp.terminal[state]:
            break
        states.append(state)
        rewards.append(mdp.rewards[state, action])
        state = int(mdp.transitions[state * mdp.num_actions + action].toarray().argmax())
    return states, rewards


def test_all_trajectories_of_a_grid_are_there_once():
    mdp = GridWorld("S.\nFG", step_reward=-0.25).mdp
    horizon = 4
    trajectories = enumerate_trajectories(mdp, horizon)
    expected = {}
    for actions in itertools.product(range(4), repeat=horizon):
        states, rewards = play(mdp, actions)
        expected[actions[: len(states)]] = (states, rewards)
    assert len(trajectories) == len(expected)
    for row in range(len(trajectories)):
        length = int(trajectories.lengths[row])
        states, rewards = expected.pop(tuple(trajectories.actions[row, :length].tolist()))
        assert trajectories.observations[row].tolist() == (
            [t * 4 + state for t, state in enumerate(states)] + [PADDING] * (horizon - length)
        )
        assert trajectories.rewards[row].tolist() == rewards + [0.0] * (horizon - length)
        assert trajectories.mask[row].tolist() == [True] * length + [False] * (horizon - length)
        assert trajectories.terminated[row].tolist() == [t == length - 1 for t in range(horizon)]
        assert (trajectories.actions[row, length:] == PADDING).all()
    assert not expected
    assert not trajectories.truncated.any()


def test_what_cannot_be_listed_is_refused():
    for arguments, horizon, message in [
        ({"map": "S.\n.G", "slip": 0.1}, 3, "state 0, action 1 leads to 3 states"),
        ({"map": "S.\nSG"}, 3, "there are 2"),
        ({"map": "S..\n...\n..G"}, 20, "more than 100000 trajectories"),
        ({"map": "S.G"}, 0, "at least 1, not 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            enumerate_trajectories(GridWorld(**arguments).mdp, horizon)


def test_token_sequences_are_a_tree():
    tokens = TokenMDP(lambda sequence: float(sequence[0] * 9 + sequence[1] * 3 + sequence[2]), 3, 3)
    trajectories = tokens.all_trajectories()
    assert trajectories.actions.tolist() == [list(s) for s in itertools.product(range(3), repeat=3)]
    assert trajectories.returns.tolist() == list(range(27))
    for row, sequence in enumerate(trajectories.actions.tolist()):
        states, rewards = play(tokens.mdp, sequence)
        assert trajectories.observations[row].tolist() == states == [tokens.prefix(sequence[:k]) for k in range(3)]
        assert trajectories.rewards[row].tolist() == rewards
    tokens.mdp.check_model()
    assert tokens.mdp.terminal.sum() == 27
    assert tokens.mdp.num_states == 1 + 3 + 9 + 27
    assert len({tokens.prefix(s) for n in range(4) for s in itertools.product(range(3), repeat=n)}) == 40


def test_a_list_of_rewards_is_a_function_of_the_sequence():
    listed, called = TokenMDP([1.0, 2, 3, 4], 2, 2), TokenMDP(lambda s: 1 + 2 * s[0] + s[1], 2, 2)
    np.testing.assert_array_equal(listed.mdp.rewards, called.mdp.rewards)


def test_bad_token_problems_are_refused():
    for arguments, message in [
        ((np.zeros(4), 0, 2), "both must be at least 1"),
        ((lambda s: 0.0, 10, 5), r"10\^5 sequences"),
        ((np.zeros(5), 2, 2), "rewards for 4 sequences"),
        (([0, 1, np.inf, 0], 2, 2), r"sequence \(1, 0\) is not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenMDP(*arguments)
    with pytest.raises(ValueError, match="no prefix"):
        TokenMDP(np.zeros(4), 2, 2).prefix([0, 2])


def test_bradley_terry_weights_are_the_probabilities_of_a_simulated_annotator():
    trajectories = TokenMDP([0.0, 1.0, -0.5, 2.0], 2, 2).all_trajectories()
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    preferences = bradley_terry_preferences(trajectories, scale=1.5, probabilities=p)
    assert len(preferences) == 12
    # Draw pairs, throw equal ones away, and let the annotator choose.
    generator = np.random.default_rng(0)
    draws = generator.choice(4, size=(400_000, 2), p=p.double() / p.double().sum())
    first, second = draws[draws[:, 0] != draws[:, 1]].T
    returns = np.array([0.0, 1.0, -0.5, 2.0])
    prefers_first = generator.random(len(first)) < 1 / (1 + np.exp(-1.5 * (returns[first] - returns[second])))
    wins = np.zeros((4, 4))
    np.add.at(wins, (np.where(prefers_first, first, second), np.where(prefers_first, second, first)), 1)
    expected = np.zeros((4, 4))
    chosen, rejected = (
        preferences.chosen.actions @ torch.tensor([2, 1]),
        preferences.rejected.actions @ torch.tensor([2, 1]),
    )
    expected[chosen, rejected] = preferences.weights
    # Hoeffding for 12 frequencies, wrong with probability 1e-6.
    bound = np.sqrt(np.log(2 * 12 / 1e-6) / (2 * len(first)))
    assert np.abs(wins / len(first) - expected).max() < bound
    assert bound < 0.01


def test_uniform_preferences_sum_to_one_and_follow_the_sigmoid():
    trajectories = TokenMDP([0.0, 1.0, -0.5, 2.0], 2, 2).all_trajectories()
    preferences = bradley_terry_preferences(trajectories)
    assert preferences.weights.sum().item() == pytest.approx(1, abs=1e-6)
    difference = preferences.chosen.returns - preferences.rejected.returns
    torch.testing.assert_close(preferences.weights * 6, torch.sigmoid(difference))
    with pytest.raises(ValueError, match="more than the limit of 5"):
        bradley_terry_preferences(trajectories, limit=5)
    with pytest.raises(ValueError, match="there is 1"):
        bradley_terry_preferences(trajectories[:1])
    with pytest.raises(ValueError, match="4 numbers"):
        bradley_terry_preferences(trajectories, probabilities=torch.tensor([1.0, 0, 0, 0]))
