"""Deep Q-learning against what dynamic programming says, with every option and together."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from aligngym.agents import PolicyIteration
from aligngym.agents.dqn import DQN
from aligngym.agents.environment_sampler import EnvironmentSampler
from aligngym.agents.replay import PrioritizedReplay, ReplayBuffer, Transitions
from aligngym.core import NetworkPolicy
from aligngym.core.q_network import CategoricalQNetwork, QNetwork
from aligngym.core.schedules import Decay
from aligngym.envs import GridWorld, TabularEnv, TabularMDP, VectorTabularEnv

DISCOUNT = 0.9
GRID = GridWorld("S..#\n.#..\n...G")
LAKE = TabularMDP.from_env(gymnasium.make("FrozenLake-v1"))
SIZES = {"batch_size": 4, "learning_starts": 4, "replay": 100}


def agent(env, kind=QNetwork, network=None, sampler=None, optimizer=None, **options):
    """An agent with few steps of few copies."""
    sampler = sampler or EnvironmentSampler(env, num_envs=2, steps=2)
    policy = kind.for_env(sampler.env, **(network or {}))
    if optimizer is not None:
        options["optimizer"] = optimizer(policy.network.parameters(), lr=1.0)
    return DQN(policy, sampler, **SIZES | options)


def q_table(learner):
    with torch.no_grad():
        return learner.policy.outputs(torch.arange(int(learner.policy.observation_space.n))).double().numpy()


def exact(mdp, discount=DISCOUNT):
    """V* and Q*."""
    values = PolicyIteration(mdp, discount).learn(progress=False).values
    return values, mdp.action_values(values, discount)


def every_outcome(mdp, discount=DISCOUNT):
    """All there is to experience, each outcome weighted by its probability: one batch is one sweep."""
    outcomes = mdp.outcomes
    states, actions = np.divmod(outcomes.rows, mdp.num_actions)
    known = ~mdp.terminal[states]
    going_on = discount * ~mdp.terminal[outcomes.next_states]
    columns = (states, actions, outcomes.rewards, going_on, outcomes.next_states)
    types = (torch.long, torch.long, torch.float32, torch.float32, torch.long)
    tensors = [torch.as_tensor(column[known], dtype=kind) for column, kind in zip(columns, types, strict=True)]
    return Transitions(*tensors, weights=torch.as_tensor(outcomes.probabilities[known], dtype=torch.float32))


@pytest.mark.parametrize("double", [False, True])
def test_full_sweeps_of_a_table_are_value_iteration(double):
    env, sweep = TabularEnv(LAKE), every_outcome(LAKE)
    # The gradient of the mean of N squared errors, times N, goes all the way to the mean target.
    learner = agent(
        env,
        network={"hidden": (), "huber": None},
        optimizer=torch.optim.SGD,
        learning_rate=float(len(sweep)),
        target_every=1,
        max_grad_norm=None,
        double=double,
    )
    values = np.zeros(LAKE.num_states)
    for _ in range(20):
        learner.learn_from(sweep)
        expected = LAKE.action_values(values, DISCOUNT)
        values = expected.max(axis=1)
        np.testing.assert_allclose(q_table(learner)[~LAKE.terminal], expected[~LAKE.terminal], atol=1e-5)
    for _ in range(80):
        learner.learn_from(sweep)
    np.testing.assert_allclose(q_table(learner)[~LAKE.terminal], exact(LAKE)[1][~LAKE.terminal], atol=1e-5)


def test_full_sweeps_of_a_dueling_table_reach_the_optimal_values():
    learner = agent(
        TabularEnv(LAKE),
        network={"hidden": (), "huber": None, "dueling": True},
        optimizer=torch.optim.SGD,
        learning_rate=0.25 * len(every_outcome(LAKE)),
        target_every=1,
        max_grad_norm=None,
    )
    sweep = every_outcome(LAKE)
    for _ in range(400):
        learner.learn_from(sweep)
    np.testing.assert_allclose(q_table(learner)[~LAKE.terminal], exact(LAKE)[1][~LAKE.terminal], atol=1e-4)


def test_the_mean_of_a_learned_distribution_is_the_optimal_value():
    # The projection keeps the mean, so it must not matter that few returns lie on atoms.
    learner = agent(
        TabularEnv(LAKE),
        CategoricalQNetwork,
        {"hidden": (), "v_min": 0.0, "v_max": 1.0, "atoms": 11},
        learning_rate=Decay(0.5, 300),
        target_every=5,
        max_grad_norm=None,
    )
    sweep = every_outcome(LAKE)
    for learner.iteration in range(300):
        learner.learn_from(sweep)
    np.testing.assert_allclose(q_table(learner)[~LAKE.terminal], exact(LAKE)[1][~LAKE.terminal], atol=0.005)


def learn_grid(seed, kind, network, options):
    """Learn from 9,600 steps of the grid, and return how far from optimal the greedy policy is."""
    if "replay" in options:
        options = options | {"replay": PrioritizedReplay(10_000, **options["replay"])}
    learner = agent(
        GRID,
        kind,
        {"seed": seed, **network},
        EnvironmentSampler(GRID, num_envs=32, steps=4),
        **{"replay": 10_000, "batch_size": 256, "learning_starts": 256, "discount": DISCOUNT, "target_every": 5}
        | {"gradient_steps": 2, "epsilon_steps": 5000, "final_epsilon": 0.3, "seed": seed}
        | options,
    )
    learner.learn(75, progress=False)
    assert learner.environment_steps == 9600
    learner.policy.epsilon = 0
    mdp = GRID.mdp
    reached = mdp.evaluate(learner.policy.probability_table().numpy(), DISCOUNT)
    return float(mdp.initial @ (exact(mdp)[0] - reached))


TABLE, NETWORK = {"hidden": ()}, {"hidden": (64,)}
ATOMS = {"v_min": -10.0, "v_max": 2.0, "atoms": 31}
# Of a batch of 256, a pair of a state and an action has about 7 rows: a step size of a third.
FOR_TABLES = {"learning_rate": 12.0, "optimizer": torch.optim.SGD, "max_grad_norm": None}
FOR_NETWORKS = {"learning_rate": Decay(1e-2, 75)}
COMBINATIONS = {
    "double": (QNetwork, TABLE, FOR_TABLES | {"double": True}),
    "dueling": (QNetwork, TABLE | {"dueling": True}, FOR_TABLES | {"learning_rate": 4.0}),
    "n-step": (QNetwork, TABLE, FOR_TABLES | {"n": 2}),
    "prioritised": (QNetwork, TABLE, FOR_TABLES | {"replay": {"beta_steps": 5000}}),
    "distribution": (CategoricalQNetwork, TABLE | ATOMS, {"learning_rate": Decay(0.1, 75)}),
    "network": (QNetwork, NETWORK, FOR_NETWORKS),
    "slow target": (QNetwork, TABLE, FOR_TABLES | {"target_every": 1, "target_rate": 0.1}),
    "all": (
        CategoricalQNetwork,
        NETWORK | ATOMS | {"dueling": True},
        FOR_NETWORKS | {"double": True, "n": 2, "replay": {"beta_steps": 5000}},
    ),
}


@pytest.mark.parametrize("seed", range(5))
def test_the_plain_learner_finds_the_optimum(seed):
    assert learn_grid(seed, QNetwork, TABLE, FOR_TABLES) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_option_finds_the_optimum(name):
    assert learn_grid(1, *COMBINATIONS[name]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("n", [1, 3])
def test_a_time_limit_is_no_end(mode, n):
    """One state, every action pays 1 for ever: Q = 1 / (1 − γ) = 10. Episodes of 4 steps would be worth 3.4 at most."""
    mdp = TabularMDP.from_arrays(np.ones((1, 2, 1)), np.ones((1, 2)))
    copies = VectorTabularEnv(TabularEnv(mdp), 4, max_episode_steps=4, autoreset_mode=mode)
    learner = agent(
        None,
        network={"hidden": (), "huber": None},
        sampler=EnvironmentSampler(copies, steps=5),
        optimizer=torch.optim.SGD,
        learning_rate=1.0,
        target_every=1,
        gradient_steps=3,
        batch_size=16,
        learning_starts=16,
        max_grad_norm=None,
        discount=DISCOUNT,
        n=n,
    )
    learner.learn(60, progress=False)
    np.testing.assert_allclose(q_table(learner), 10, atol=0.01)


def random_batch(rows, states, actions, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(below):
        return torch.randint(below, (rows,), generator=generator)

    allowed = torch.rand(rows, actions, generator=generator) < 0.6
    allowed[~allowed.any(dim=1)] = True
    discounts = 0.9 ** numbers(3) * (torch.rand(rows, generator=generator) < 0.7)
    rewards = torch.randn(rows, generator=generator)
    return Transitions(numbers(states), numbers(actions), rewards, discounts, numbers(states), allowed)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_targets_by_hand(double, masked):
    learner = agent(GRID, double=double)
    target_policy = QNetwork.for_env(GRID, seed=5)
    learner.policy.target.load_state_dict(target_policy.network.state_dict())
    old, new, batch = (
        q_table(agent(GRID, network={"seed": 5})),
        q_table(learner),
        random_batch(200, GRID.mdp.num_states, 4),
    )
    if not masked:
        batch.next_action_mask = None
    expected = []
    for row in range(200):
        state = int(batch.next_observations[row])
        judge = new[state] if double else old[state]
        choices = [a for a in range(4) if not masked or batch.next_action_mask[row, a]]
        best = max(choices, key=lambda a: judge[a])
        expected.append(float(batch.returns[row]) + float(batch.discounts[row]) * old[state, best])
    np.testing.assert_allclose(learner.targets(batch), expected, atol=1e-5)


def test_a_distributions_target_has_the_mean_of_the_scalar_one():
    learner = agent(GRID, CategoricalQNetwork, {"v_min": -30.0, "v_max": 30.0, "atoms": 21})
    batch, values = random_batch(100, GRID.mdp.num_states, 4), q_table(learner)
    # Nothing may fall off the ends.
    batch.discounts *= 0.5
    best = np.where(batch.next_action_mask, values[batch.next_observations], -np.inf).max(axis=1)
    expected = batch.returns.numpy() + batch.discounts.numpy() * best
    np.testing.assert_allclose(learner.targets(batch) @ learner.policy.support, expected, atol=1e-4)


def test_double_learning_overestimates_less():
    """From state A one comes to B, whose ten actions pay N(0, 1) and end: all is worth 0.

    A table with step size α scatters around the truth with variance α / (2 − α), and the largest of ten such estimates
    is 1.5388 standard deviations too high. An old table's estimate of what a new one prefers is so only as far as the
    two are correlated, (1 − α)^k after k steps, of which the mean over a target's life is taken. R. Sutton and
    A. Barto, *Reinforcement Learning*, 2nd ed., section 6.7.
    """
    pairs, actions, step_size, period = 16, 10, 0.1, 50
    generator = np.random.default_rng(0)
    numbers = np.arange(pairs * actions)
    first, second, action = numbers // actions, pairs + numbers // actions, numbers % actions
    rows = 2 * len(numbers)
    bias = {}
    for double in (False, True):
        mdp = TabularMDP.from_arrays(
            np.full((2 * pairs, actions, 2 * pairs), 0.5 / pairs), np.zeros((2 * pairs, actions))
        )
        learner = agent(
            TabularEnv(mdp),
            network={"hidden": (), "huber": None},
            optimizer=torch.optim.SGD,
            learning_rate=step_size * rows,
            target_every=period,
            max_grad_norm=None,
            double=double,
        )
        seen = []
        for step in range(300):
            rewards = np.concatenate([np.zeros(len(numbers)), generator.normal(size=len(numbers))])
            batch = Transitions(
                torch.from_numpy(np.concatenate([first, second])),
                torch.from_numpy(np.concatenate([action, action])),
                torch.from_numpy(rewards).float(),
                torch.from_numpy(np.repeat([1.0, 0.0], len(numbers))).float(),
                torch.from_numpy(np.concatenate([second, second])),
            )
            learner.learn_from(batch)
            if step >= 100:
                seen.append(q_table(learner)[:pairs].mean())
        bias[double] = np.mean(seen)
    plain = 1.5388 * np.sqrt(step_size / (2 - step_size))
    correlation = (1 - (1 - step_size) ** period) / (period * step_size)
    # Four targets of 16 pairs: the standard error of the mean of maxima is about 0.017.
    assert bias[False] == pytest.approx(plain, abs=0.06)
    assert bias[True] == pytest.approx(correlation * plain, abs=0.06)


def full_agent(seed=0):
    return agent(
        gymnasium.make("FrozenLake-v1"),
        CategoricalQNetwork,
        {"v_min": 0.0, "v_max": 1.0, "dueling": True, "hidden": (8,), "seed": seed},
        EnvironmentSampler("FrozenLake-v1", num_envs=3, steps=5),
        replay=PrioritizedReplay(60, beta_steps=200),
        n=3,
        double=True,
        batch_size=16,
        learning_starts=30,
        gradient_steps=2,
        target_every=3,
        epsilon_steps=150,
        learning_rate=Decay(1e-2, 20),
        seed=seed,
    )


def flat(node, path=()):
    """Every leaf of a nested state by its path."""
    if isinstance(node, dict):
        return {key: value for name, child in node.items() for key, value in flat(child, (*path, name)).items()}
    if isinstance(node, (list, tuple)):
        return flat(dict(enumerate(node)), path)
    return {path: node}


def assert_same_state(first, second):
    first, second = flat(first.state_dict()), flat(second.state_dict())
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal if isinstance(value, torch.Tensor) else np.array_equal
        assert same(value, second[path]), path


def test_saved_and_continued_bit_for_bit(tmp_path):
    whole = full_agent().learn(7, progress=False)
    whole.save(tmp_path / "agent.safetensors")
    resumed = full_agent(seed=0).load(tmp_path / "agent.safetensors")
    assert resumed.policy.epsilon == resumed.epsilon < 1
    assert_same_state(whole, resumed)
    for learner in (whole, resumed):
        learner.learn(5, progress=False)
    assert_same_state(whole, resumed)
    assert_same_state(whole, full_agent().learn(12, progress=False))
    assert not torch.equal(
        *(q.policy.outputs(torch.arange(16)) for q in (whole, full_agent(1).learn(12, progress=False)))
    )


def test_pieces_of_a_batch_make_the_same_step():
    batch, tables = random_batch(30, GRID.mdp.num_states, 4), []
    for size in (None, 7):
        learner = agent(GRID, micro_batch_size=size, learning_rate=0.1)
        learner.learn_from(batch)
        tables.append(q_table(learner))
    np.testing.assert_allclose(*tables, atol=1e-5)


def test_when_it_learns_explores_and_copies():
    learner = agent(GRID, learning_starts=10, initial_epsilon=0.9, final_epsilon=0.1, epsilon_steps=16, target_every=2)
    epsilons, networks = [], []
    for _ in range(7):
        metrics = {}
        learner.learn(1, progress=False, callbacks=[_Catch(metrics)])
        epsilons.append(metrics["epsilon"])
        assert ("loss" in metrics) == (learner.environment_steps >= 10)
        networks.append(copy.deepcopy(learner.policy.network.state_dict()))
    # Four steps an iteration: 16 are over after four.
    assert epsilons == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1, 0.1])
    # Gradient steps begin in iteration 3 and are five; the target is the network after the fourth.
    assert learner.gradient_steps_done == 5
    for name, value in learner.policy.target.state_dict().items():
        assert torch.equal(value, networks[-2][name])
        assert not torch.equal(value, networks[-1][name])


class _Catch:
    def __init__(self, metrics):
        self.metrics = metrics

    def on_start(self, *_):
        pass

    def on_iteration(self, _, metrics):
        self.metrics.update(metrics)

    def on_end(self, *_):
        pass


def test_acting_and_evaluating_are_greedy():
    learner = agent(GRID, network={"seed": 3})
    best = q_table(learner).argmax(axis=1)
    assert learner.act(np.arange(GRID.mdp.num_states)).tolist() == best.tolist()
    # What the greedy policy earns is known from the model; the policy acts randomly otherwise.
    env = gymnasium.wrappers.TimeLimit(GRID, 20)
    learner.policy.epsilon = 1.0
    expected = GRID.mdp.unrolled(20)
    policy = np.tile(np.eye(4)[best], (21, 1))
    expected = float(expected.initial @ expected.evaluate(policy, DISCOUNT))
    assert learner.evaluate(env, episodes=2, discount=DISCOUNT)["return"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is at least 1, not 0"),
        ({"gradient_steps": 0}, "gradient_steps is at least 1, not 0"),
        ({"target_every": 0}, "target_every is at least 1, not 0"),
        ({"batch_size": 101, "learning_starts": 101}, "batch_size=101 ≤ learning_starts=101 ≤ capacity=100"),
        ({"batch_size": 8, "learning_starts": 7}, "batch_size=8 ≤ learning_starts=7"),
        ({"replay": ReplayBuffer(3)}, "capacity=3"),
        ({"target_rate": 0.0}, "target_rate is in"),
        ({"target_rate": 1.5}, "target_rate is in"),
        ({"final_epsilon": 1.0, "initial_epsilon": 0.5}, "epsilon falls from 0.5 to 1.0"),
        ({"initial_epsilon": 1.5}, "epsilon falls from 1.5"),
        ({"epsilon_steps": -1}, "in -1 steps"),
        ({"n": 0}, "n is a number of steps, at least 1, not 0"),
        ({"discount": 1.5}, "discount must be in"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        agent(GRID, **options)


def test_other_policies_are_refused():
    sampler = EnvironmentSampler(GRID, num_envs=2, steps=2)
    with pytest.raises(TypeError, match="needs a QNetwork"):
        DQN(NetworkPolicy.for_env(sampler.env), sampler)
