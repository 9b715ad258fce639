import gymnasium
import numpy as np
import pytest
from scipy import stats

from aligngym.agents.dynamic_programming import PolicyIteration
from aligngym.agents.episodes import Episodes
from aligngym.agents.monte_carlo_control import MCBasic, MCEpsilonGreedy, MCExploringStarts, epsilon_soft
from aligngym.core.schedules import Power
from aligngym.envs import GridWorld, TabularEnv

SLIPPERY = {"map": "..F\n.#.\n..G", "slip": 0.2, "step_reward": -0.1}


def zhao_grid(**rewards):
    """S. Zhao, Mathematical Foundations of Reinforcement Learning, figure 3.4: a target that goes on paying."""
    return GridWorld(stay=True, terminal_target=False, **rewards)


def best_soft_policy(mdp, discount, epsilon):
    """Policy iteration over the policies that give every action at least ε / A; exact.

    Returns the values and action values of the best of them.
    """
    policy = np.full(mdp.rewards.shape, 1 / mdp.num_actions)
    while True:
        action_values = mdp.action_values(mdp.evaluate(policy, discount), discount)
        better = epsilon_soft(action_values.round(9), epsilon)
        if np.array_equal(better, policy):
            return mdp.evaluate(policy, discount), action_values
        policy = better


def below(errors, bound):
    """Whether a mean over seeds lies below the bound with 99 % confidence."""
    errors = np.array(errors)
    return errors.mean() + stats.t.ppf(0.99, len(errors) - 1) * errors.std(ddof=1) / len(errors) ** 0.5 < bound


def test_long_episodes_give_mc_basic_the_published_optimum():
    # Zhao, figure 5.4: with episodes of 100 steps, the values of figure 3.4 (d) (r_forbidden = −10, γ = 0.9).
    published = [
        [3.5, 3.9, 4.3, 4.8, 5.3],
        [3.1, 3.5, 4.8, 5.3, 5.9],
        [2.8, 2.5, 10.0, 5.9, 6.6],
        [2.5, 10.0, 10.0, 10.0, 7.3],
        [2.3, 9.0, 10.0, 9.0, 8.1],
    ]
    env = zhao_grid(forbidden_reward=-10.0)
    agent = MCBasic(env, 0.9, episode_length=100).learn(progress=False)
    assert agent.finished
    np.testing.assert_array_equal(agent.values.reshape(5, 5).round(1), published)
    exact = PolicyIteration(env, 0.9).learn(progress=False)
    np.testing.assert_allclose(agent.values, exact.values - 10 * 0.9**100, atol=1e-9)
    best = exact.action_values.max(axis=1, keepdims=True)
    assert (np.take_along_axis(exact.action_values, agent.actions[:, None], axis=1) > best - 1e-9).all()


def test_short_episodes_do_not_see_far_targets():
    # The same figure: 15 steps are what the bottom left needs for its first reward, with 14 it is worth 0; with one
    # step only the neighbours of the target know of it.
    env = zhao_grid(forbidden_reward=-10.0)
    exact = PolicyIteration(env, 0.9).learn(progress=False)
    values = {length: MCBasic(env, 0.9, length).learn(progress=False).values for length in (1, 14, 15, 30)}
    assert values[14][20] == 0
    assert values[15][20] == pytest.approx(0.9**14)
    assert np.flatnonzero(values[1]).tolist() == [12, 16, 17, 18, 22]
    assert set(values[1]) == {0.0, 1.0}
    # From then on, all that is missing is the reward after the end: Σ_{t ≥ T} γ^t = 10 γ^T.
    for length in (15, 30):
        np.testing.assert_allclose(values[length], exact.values - 10 * 0.9**length, atol=1e-9)


def test_mc_basic_evaluates_its_policy_without_bias():
    env = GridWorld(**SLIPPERY)
    agents = [MCBasic(env, 0.8, 6, episodes=150, seed=seed) for seed in range(8)]
    for agent in agents:
        agent.iterate()
    # Backward induction over six steps of the first policy: up everywhere.
    values = np.zeros(8)
    for _ in range(6):
        exact = env.mdp.action_values(values, 0.8)
        values = exact[:, 0]
    sample = np.array([agent.action_values for agent in agents])
    errors = sample.std(axis=0, ddof=1) / 8**0.5
    assert (np.abs(sample.mean(axis=0) - exact) <= stats.t.ppf(1 - 1e-5, 7) * errors + 1e-12).all()
    assert 0 < errors.max() < 0.1
    assert agents[0].action_values[env.mdp.terminal].tolist() == [[0.0] * 4]


def test_mc_basic_solves_a_slippery_grid():
    env = GridWorld(**SLIPPERY)
    exact = PolicyIteration(env, 0.8).learn(progress=False)
    losses = []
    for seed in range(4):
        agent = MCBasic(env, 0.8, 40, episodes=200, seed=seed).learn(8, progress=False)
        losses.append((exact.values - env.mdp.evaluate(agent.policy, 0.8)).max())
    assert below(losses, 0.02)


def test_exploring_starts_converge_to_the_exact_optimum():
    env = GridWorld(**SLIPPERY)
    exact = PolicyIteration(env, 0.8).learn(progress=False)
    early, late = [], []
    for seed in range(5):
        agent = MCExploringStarts(env, 0.8, seed=seed, max_episode_steps=100, episodes_per_iteration=20)
        for errors, iterations in [(early, 10), (late, 600)]:
            agent.learn(iterations, progress=False)
            errors.append(np.abs(agent.values - exact.values).max())
    # The optimal values span 1.3; 12,200 episodes.
    assert below(late, 0.1)
    assert np.mean(late) < np.mean(early) / 3
    assert agent.visits[~env.mdp.terminal].min() > 12_200 / 28 * 0.8


@pytest.mark.parametrize("first_visit", [True, False])
def test_an_epsilon_greedy_policy_converges_to_the_best_soft_policy_and_not_to_the_optimum(first_visit):
    env = GridWorld(**SLIPPERY)
    optimum = PolicyIteration(env, 0.8).learn(progress=False).values
    soft, _ = best_soft_policy(env.mdp, 0.8, 0.3)
    assert np.abs(soft - optimum).max() > 0.6
    errors, distances = [], []
    for seed in range(4):
        agent = MCEpsilonGreedy(
            env, 0.8, Power(exponent=0.8), 0.3, first_visit=first_visit, seed=seed, episodes_per_iteration=20
        ).learn(600, progress=False)
        errors.append(np.abs(agent.values - soft).max())
        distances.append(-np.abs(agent.values - optimum).max())
    assert below(errors, 0.15)
    assert below(distances, -0.5)
    assert agent.policy.min() == pytest.approx(0.3 / 4)


def test_epsilon_that_fades_leads_to_the_optimum():
    env = GridWorld(**SLIPPERY)
    exact = PolicyIteration(env, 0.8).learn(progress=False)
    losses = []
    for seed in range(4):
        agent = MCEpsilonGreedy(
            env, 0.8, Power(exponent=0.7), Power(exponent=0.5), seed=seed, episodes_per_iteration=20
        ).learn(400, progress=False)
        losses.append((exact.values - env.mdp.evaluate(epsilon_soft(agent.action_values, 0.0), 0.8)).max())
        assert agent.policy.min() == pytest.approx(401**-0.5 / 4)
    assert below(losses, 0.03)


def test_a_task_without_an_end_is_learned_from_truncated_episodes():
    env = zhao_grid(map=".....\n.FF..\n..F..\n.FGF.\n.F...")
    soft, _ = best_soft_policy(env.mdp, 0.9, 0.5)
    errors = []
    for seed in range(3):
        agent = MCEpsilonGreedy(
            env,
            0.9,
            Power(exponent=0.7),
            0.5,
            first_visit=False,
            seed=seed,
            max_episode_steps=100,
            episodes_per_iteration=20,
        ).learn(500, progress=False)
        errors.append(np.abs(agent.values - soft).max())
    # A million steps; the values span 4.6, and cutting without an estimate of the rest costs the target cell more.
    assert below(errors, 0.4)


def test_a_truncated_episode_counts_its_last_state_as_the_policy_acts_there():
    agent = MCEpsilonGreedy(GridWorld("...G"), 0.5, epsilon=0.4)
    agent.action_values[1] = [1.0, 6.0, 0.0, 1.0]
    agent.learn_from(
        Episodes(np.array([0]), np.array([1]), np.array([2.0]), np.array([0, 1]), np.array([1]), np.zeros(1, bool))
    )
    assert agent.action_values[0, 1] == pytest.approx(2 + 0.5 * (0.7 * 6 + 0.1 * 2))
    assert agent.visits.sum() == agent.visits[0, 1] == 1


def test_epsilon_soft_shares_among_the_best():
    np.testing.assert_allclose(
        epsilon_soft(np.array([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0]]), 0.2),
        [[0.05, 0.45, 0.45, 0.05], [0.85, 0.05, 0.05, 0.05]],
    )


MAKERS = {
    "basic": lambda seed: MCBasic(GridWorld(slip=0.2), 0.9, 20, episodes=2, seed=seed),
    "starts": lambda seed: MCExploringStarts(GridWorld(slip=0.2), 0.9, seed=seed, max_episode_steps=30),
    "greedy": lambda seed: MCEpsilonGreedy(GridWorld(slip=0.2), 0.9, epsilon=Power(0.9, 0.2), seed=seed),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_saved_learner_continues_bit_for_bit(kind, tmp_path):
    make = MAKERS[kind]
    through, halfway = make(7).learn(9, progress=False), make(7).learn(4, progress=False)
    halfway.save(tmp_path / "table.safetensors")
    resumed = make(7).load(tmp_path / "table.safetensors").learn(5, progress=False)
    np.testing.assert_array_equal(resumed.action_values, through.action_values)
    np.testing.assert_array_equal(resumed.policy, through.policy)
    assert resumed.iteration == 9
    assert (make(8).learn(9, progress=False).action_values != through.action_values).any()
    other = MCBasic(GridWorld("SG"), 0.9, 3) if kind == "basic" else type(through)(GridWorld("SG"), 0.9)
    with pytest.raises(ValueError, match=r"saved table of \(25, 4\), and this is \(2, 4\)"):
        other.load(tmp_path / "table.safetensors")


def test_starting_anywhere_needs_an_environment_that_can():
    frozen_lake = gymnasium.make("FrozenLake-v1")
    for make in (lambda env: MCBasic(env, 0.9, 10), lambda env: MCExploringStarts(env, 0.9)):
        with pytest.raises(TypeError, match=r"cannot start in any state; make a TabularEnv"):
            make(frozen_lake)
        make(gymnasium.wrappers.TimeLimit(TabularEnv(GridWorld().mdp), 10))
    with pytest.raises(TypeError, match="cannot start in any state"):
        MCExploringStarts(gymnasium.wrappers.TransformReward(gymnasium.make("CliffWalking-v1"), abs), 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MCEpsilonGreedy(GridWorld(), 0.9, epsilon=1.5), r"starts at 1\.5"),
        (lambda: MCExploringStarts(GridWorld(), -0.1), r"not -0\.1"),
        (lambda: MCExploringStarts(zhao_grid(), 1.0), "never ends .* discount of 1"),
        (lambda: MCBasic(GridWorld(), 1.5, 10), r"not 1\.5"),
        (lambda: MCBasic(GridWorld(), 0.9, 0), "at least one step"),
        (lambda: MCBasic(GridWorld(), 0.9, 1, episodes=0), "at least one step and one episode"),
        (lambda: MCEpsilonGreedy(GridWorld(), 0.9).learn(), "say how many iterations"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
