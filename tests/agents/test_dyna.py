import math

import gymnasium
import numpy as np
import pytest
from scipy import stats

from aligngym.agents import PolicyIteration
from aligngym.agents.dyna import DynaQ, DynaQPlus, LearnedModel, PrioritizedDyna
from aligngym.agents.temporal_difference import QLearning, Step
from aligngym.core.schedules import Power
from aligngym.envs import GridWorld, Outcomes, TabularMDP

# R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figure 8.2: 14 steps from S to G.
MAZE = ".......#G\n..#....#.\nS.#....#.\n..#......\n.....#...\n........."
# Figure 8.5: a way of 16 steps around the wall, and from step 3,000 on a shortcut of 10 at its right end.
LONG_WAY = "........G\n.........\n.........\n.########\n.........\n...S....."
SHORTCUT = "........G\n.........\n.........\n.#######.\n.........\n...S....."


def maze(text=MAZE, **options):
    return GridWorld(text, boundary_reward=0.0, **options)


def lengths(agent, episodes):
    """The length of every episode."""
    return [agent.iterate()["length"] for agent.iteration in range(episodes)]


class ChangingMaze(gymnasium.Env):
    """One map before a number of steps, over all episodes, and another one after it; cells are numbered row by row."""

    observation_space = gymnasium.spaces.Discrete(54)
    action_space = gymnasium.spaces.Discrete(4)

    def __init__(self, before, after, change):
        self.maps, self.change, self.time, self.arrivals = (before.split(), after.split()), change, 0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = (5, 3)
        return 48, {}

    def step(self, action):
        rows = self.maps[self.time >= self.change]
        self.time += 1
        row, column = np.add(self.place, [(-1, 0), (0, 1), (1, 0), (0, -1)][action])
        if 0 <= row < 6 and 0 <= column < 9 and rows[row][column] != "#":
            self.place = int(row), int(column)
        arrived = rows[self.place[0]][self.place[1]] == "G"
        if arrived:
            self.arrivals.append(self.time)
        return self.place[0] * 9 + self.place[1], float(arrived), arrived, False, {}


def test_sutton_and_barto_figure_8_2_planning_solves_the_maze_in_three_episodes():
    exact = PolicyIteration(maze(), 0.95).learn(progress=False)
    assert exact.mdp.initial @ exact.values == pytest.approx(0.95**13)
    means = {}
    for planning_steps, episodes in ((0, 16), (5, 8), (50, 5)):
        runs = [
            lengths(DynaQ(maze(), 0.95, planning_steps, step_size=0.1, epsilon=0.1, seed=seed), episodes)
            for seed in range(6)
        ]
        means[planning_steps] = np.mean(runs, axis=0)
    # The figure: 50 planning steps need about 3 episodes, 5 need about 5, and without planning it takes 25.
    # The best with ε = 0.1 is 14 steps and about two detours.
    assert means[50][3:].max() < 25
    assert means[5][1] > 80
    assert means[5][5:].mean() < 30
    assert means[0][8:].min() > 40


def test_without_planning_it_is_q_learning_bit_for_bit():
    make = {"env": GridWorld(MAZE, slip=0.2), "discount": 0.95, "seed": 2, "epsilon": 0.3}
    dyna = DynaQ(**make, planning_steps=0).learn(5, progress=False)
    np.testing.assert_array_equal(dyna.action_values, QLearning(**make).learn(5, progress=False).action_values)
    assert not dyna.compiled


@pytest.mark.parametrize("kind", [DynaQ, PrioritizedDyna])
def test_a_deterministic_problem_is_learned_exactly(kind):
    env = GridWorld("S.F.\n.#..\n...G", step_reward=-0.1)
    exact = PolicyIteration(env, 0.9).learn(progress=False)
    agent = kind(env, 0.9, 50, step_size=1.0, epsilon=1.0, seed=1).learn(60, progress=False)
    tried = agent.visits > 0
    assert tried.sum() == 40
    # A priority up to 1e-4 does not wait, so an entry may be off by that, and by what follows from it.
    np.testing.assert_allclose(agent.action_values[tried], exact.action_values[tried], atol=1e-3)


def test_prioritized_sweeping_solves_the_model_it_has_seen():
    env = GridWorld("S.F\n.#.\n..G", slip=0.3, step_reward=-0.1)
    agent = PrioritizedDyna(env, 0.8, 300, threshold=1e-8, step_size=1.0, epsilon=1.0, seed=3).learn(20, progress=False)
    counts = [(*key, *seen, n) for key, outcomes in agent.experience.outcomes.items() for seen, n in outcomes.items()]
    s, a, rewards, next_states, ends, seen = np.array(counts).T
    rows, next_states = (s * 4 + a).astype(int), next_states.astype(int)
    tried = np.bincount(rows, seen, minlength=32)
    loops = np.flatnonzero(tried == 0)
    # Pairs never tried, those of the target, lead nowhere.
    outcomes = Outcomes(
        np.append(rows, loops),
        np.append(next_states, loops // 4),
        np.append(seen / tried[rows], np.ones(len(loops))),
        np.append(rewards, np.zeros(len(loops))),
    )
    empirical = TabularMDP(outcomes, env.mdp.initial, env.mdp.terminal, 4)
    exact = PolicyIteration(empirical, 0.8).learn(progress=False)
    assert (next_states[ends == 1] == 7).all()
    assert tried.sum() > 200
    np.testing.assert_allclose(agent.action_values, exact.action_values, atol=1e-6)


def test_dyna_converges_where_outcomes_are_random():
    env = GridWorld("..F\n.#.\n..G", slip=0.2, step_reward=-0.1)
    exact = PolicyIteration(env, 0.8).learn(progress=False)
    errors = []
    for seed in range(4):
        agent = DynaQ(env, 0.8, 5, step_size=Power(exponent=0.7), epsilon=1.0, seed=seed, episodes_per_iteration=150)
        agent.learn(1, progress=False)
        errors.append(np.abs(agent.action_values - exact.action_values)[:7].max())
    # 150 episodes, about 3,000 real steps; values span 3.
    assert np.mean(errors) + stats.t.ppf(0.99, 3) * stats.sem(errors) < 0.5


def test_prioritized_sweeping_needs_a_fraction_of_the_updates():
    # Section 8.4: prioritised sweeping needs five to ten times fewer updates than Dyna-Q to find the shortest way.
    updates = {}
    for kind in (DynaQ, PrioritizedDyna):
        updates[kind] = []
        for seed in range(4):
            env = maze(LONG_WAY.replace("#G", "G"))
            agent = kind(env, 0.95, 5, step_size=0.5, epsilon=0.1, seed=seed)
            while agent.evaluate(env, episodes=1, max_steps=16)["truncated"] and agent.iteration < 100:
                agent.learn(1, progress=False)
            assert agent.iteration < 100
            updates[kind].append(agent.visits.sum())
    assert np.mean(updates[DynaQ]) > 4 * np.mean(updates[PrioritizedDyna])


def test_the_most_urgent_pair_is_updated_first():
    agent = PrioritizedDyna(GridWorld("S..G"), 0.5, planning_steps=1, threshold=0.1, step_size=1.0)
    # Two pairs wait, and the one whose reward is larger comes first; the third changes too little to wait.
    for state, reward in ((0, 2.0), (1, 3.0), (2, 0.05)):
        agent.remember(Step(state, 0, reward, state, 0, True, True))
        agent.consider((state, 0))
    assert agent.queue == {(0, 0): 2.0, (1, 0): 3.0}
    # A priority rises when the model changes: the mean of 2 and 10 is 6.
    agent.remember(Step(0, 0, 10.0, 0, 0, True, True))
    agent.consider((0, 0))
    assert [agent.most_urgent() for _ in range(3)] == [(0, 0), (1, 0), None]
    assert agent.queue == {}


def test_sutton_and_barto_figure_8_5_the_bonus_finds_the_shortcut():
    steps = {DynaQ: [], DynaQPlus: []}
    for seed in range(4):
        for kind, options in ((DynaQ, {}), (DynaQPlus, {"bonus": 1e-3})):
            env = ChangingMaze(LONG_WAY, SHORTCUT, change=1500)
            agent = kind(env, 0.95, 20, step_size=1.0, epsilon=0.1, seed=seed, **options)
            while env.time < 3500:
                agent.learn(1, progress=False)
            steps[kind].append(np.diff(env.arrivals)[-30:].mean())
    # 16 steps around the wall, and 10 through the gap; exploring costs a few more.
    assert max(steps[DynaQPlus]) < 16
    differences = np.subtract(steps[DynaQPlus], steps[DynaQ])
    assert differences.mean() + stats.t.ppf(0.99, 3) * stats.sem(differences) < 0


def test_the_bonus_by_hand():
    agent = DynaQPlus(GridWorld("S..G"), 0.5, planning_steps=0, bonus=0.1, step_size=1.0)
    for action in (1, 3, 3, 1):
        agent.learn_from(Step(0, action, 1.0, 1, 0, False, False))
    agent.rows[1][2] = 4.0
    # Action 3 was last tried one step ago, action 1 just now, and the others never: they lead back and pay nothing.
    assert agent.imagined_target((0, 3), (1.0, 1, False)) == pytest.approx(1.0 + 0.5 * 4.0 + 0.1 * 1)
    assert agent.imagined_target((0, 1), (1.0, 1, False)) == pytest.approx(1.0 + 0.5 * 4.0)
    assert agent.imagined_target((0, 0), (0.0, 0, False)) == pytest.approx(
        0.5 * max(agent.rows[0]) + 0.1 * math.sqrt(4)
    )
    assert agent.imagined_target((0, 1), (1.0, 1, True)) == 1.0
    assert agent.experience.pairs == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert agent.experience.sample((0, 0), np.random.default_rng(0)) == (0.0, 0, False)


def test_the_learned_model_draws_what_it_has_seen_as_often():
    model = LearnedModel()
    seen = {(1.0, 2, False): 5, (0.0, 1, True): 3, (1.0, 1, False): 2}
    for outcome, count in seen.items():
        for _ in range(count):
            model.add((0, 1), outcome)
    generator = np.random.default_rng(0)
    drawn = [model.sample((0, 1), generator) for _ in range(20_000)]
    # Hoeffding for three frequencies, wrong with probability 1e-6.
    bound = math.sqrt(math.log(6 / 1e-6) / 40_000)
    for outcome, count in seen.items():
        assert abs(drawn.count(outcome) / 20_000 - count / 10) < bound
    model.know((3, 0))
    again = LearnedModel.from_state(model.state_dict())
    assert again.pairs == model.pairs == [(0, 1), (3, 0)]
    assert [*again.outcomes.items()] == [*model.outcomes.items()]
    assert again.predecessors == model.predecessors == {2: {(0, 1): None}, 1: {(0, 1): None}}


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 0, not -1"):
        DynaQ(maze(), 0.9, -1)
    with pytest.raises(ValueError, match=r"at least 0, not -0\.5"):
        DynaQPlus(maze(), 0.9, bonus=-0.5)
    with pytest.raises(ValueError, match=r"not 0 and 0\.1"):
        PrioritizedDyna(maze(), 0.9, 0, threshold=0.1)
    with pytest.raises(ValueError, match="not 5 and -1"):
        PrioritizedDyna(maze(), 0.9, 5, threshold=-1)
