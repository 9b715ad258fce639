import gymnasium
import numpy as np
import pytest
from matplotlib.patches import FancyArrow

from aligngym.agents import PolicyIteration
from aligngym.envs import GridWorld, TabularMDP
from aligngym.envs.changing_maze import BlockingMaze, ChangingMaze, ShortcutMaze
from aligngym.envs.textbook_grids import CliffWalking, CornerGrid, DynaMaze, TwoSpecialStates, ZhaoGrid
from aligngym.envs.windy_grid import WindyGrid

UP, RIGHT, DOWN, LEFT, STAY = range(5)


def solve(mdp, discount):
    return PolicyIteration(mdp, discount, tolerance=1e-8).learn(progress=False)


def steps_to_go(env, discount=0.95):
    """The length of the shortest path where the goal pays 1: V(start) = γ^(n − 1)."""
    return 1 + np.log(solve(env.mdp, discount).values @ env.mdp.initial) / np.log(discount)


# Bounces in a forbidden cell


def test_a_bounce_in_a_forbidden_cell_pays_by_the_convention_named():
    rewards = {"step_reward": -0.1, "boundary_reward": -2.0, "forbidden_reward": -3.0, "target_reward": 7.0}
    # Cells: S 0, F 1; wall, G 2. Only the bounces up, right of F differ: −2 alone, or −2 − 3.
    for bounce, paid in (("boundary", -2.0), ("boundary+forbidden", -5.0)):
        grid = GridWorld("SF\n#G", stay=True, terminal_target=False, bounce=bounce, **rewards)
        np.testing.assert_allclose(
            grid.mdp.rewards,
            [[-2, -3, -2, -2, -0.1], [paid, paid, 7, -0.1, -3], [-3, -2, -2, -2, 7]],
        )
    # Whole numbers beside fractions.
    assert (
        GridWorld("SFG", boundary_reward=-1, forbidden_reward=-0.5, bounce="boundary+forbidden").mdp.rewards[1, UP]
        == -1.5
    )
    default = GridWorld("SF\n#G", stay=True, terminal_target=False, **rewards)
    assert default.mdp.rewards[1, UP] == -2.0


def test_a_wall_bounces_like_the_boundary_under_both_conventions():
    for bounce, paid in (("boundary", -1.0), ("boundary+forbidden", -11.0)):
        grid = GridWorld("SF#G", forbidden_reward=-10.0, bounce=bounce)
        assert grid.mdp.rewards[1, RIGHT] == paid
        assert grid.mdp.rewards[0, LEFT] == -1.0


def test_the_value_of_the_random_policy_depends_on_the_convention():
    # One forbidden cell and one free one: bounces are 3 of 4 moves in either. V = r_π / (1 − γ) by symmetry of moves:
    # in F, with the average of (3 b_F + 0) / 4; in S, (3 (−1) − 3) / 4. P is uniform: 3/4 stay, 1/4 change.
    for bounce, paid in (("boundary", -1.0), ("boundary+forbidden", -4.0)):
        grid = GridWorld("SFG", forbidden_reward=-3.0, bounce=bounce, terminal_target=False, target_reward=0.0)
        values = grid.mdp.evaluate(np.full((3, 4), 0.25), discount=0.5)
        matrix = np.array([[0.75, 0.25, 0], [0.25, 0.5, 0.25], [0, 0.25, 0.75]])
        rewards = [(3 * -1 - 3) / 4, 2 * paid / 4, (3 * -1 - 3) / 4]
        np.testing.assert_allclose(values, np.linalg.solve(np.eye(3) - 0.5 * matrix, rewards))


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match=r"bounce is one of boundary, boundary\+forbidden, not 'both'"):
        GridWorld(bounce="both")


# Zhao's grid

#: S. Zhao, Mathematical Foundations of Reinforcement Learning, figures 3.4 (a) to (d): forbidden reward, discount,
#: optimal values as printed, and one optimal action for each cell as printed.
FIGURE_3_4 = {
    "a": (
        -1.0,
        0.9,
        [
            [5.8, 5.6, 6.2, 6.5, 5.8],
            [6.5, 7.2, 8.0, 7.2, 6.5],
            [7.2, 8.0, 10.0, 8.0, 7.2],
            [8.0, 10.0, 10.0, 10.0, 8.0],
            [7.2, 9.0, 10.0, 9.0, 8.1],
        ],
        "DRDDD DDDDD RRDDD RROLL URULL",
    ),
    "b": (
        -1.0,
        0.5,
        [
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.1],
            [0.0, 0.0, 2.0, 0.1, 0.1],
            [0.0, 2.0, 2.0, 2.0, 0.2],
            [0.0, 1.0, 2.0, 1.0, 0.5],
        ],
        "RRRRD UURRD ULDRD UROLD URULL",
    ),
    "c": (
        -1.0,
        0.0,
        [
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.0, 0.0],
            [0.0, 1.0, 1.0, 1.0, 0.0],
            [0.0, 0.0, 1.0, 0.0, 0.0],
        ],
        "DOLDD UDUOU OODOU DROLU URULL",
    ),
    "d": (
        -10.0,
        0.9,
        [
            [3.5, 3.9, 4.3, 4.8, 5.3],
            [3.1, 3.5, 4.8, 5.3, 5.9],
            [2.8, 2.5, 10.0, 5.9, 6.6],
            [2.5, 10.0, 10.0, 10.0, 7.3],
            [2.3, 9.0, 10.0, 9.0, 8.1],
        ],
        "RRRRD UURRD ULDRD UROLD URULL",
    ),
}


@pytest.mark.parametrize("part", FIGURE_3_4)
def test_zhaos_figure_3_4(part):
    forbidden_reward, discount, published, printed = FIGURE_3_4[part]
    agent = solve(ZhaoGrid(forbidden_reward=forbidden_reward), discount)
    np.testing.assert_allclose(agent.values.reshape(5, 5), published, atol=0.05 + 1e-9)
    chosen = ["URDLO".index(letter) for letter in printed.replace(" ", "")]
    assert (agent.policy[np.arange(25), chosen] > 0).all()


def test_zhaos_figure_2_7():
    # Figure 2.7 (a), section 2.7.3: a good policy with r_forbidden = −1, that of figure 3.4 (d), and its values.
    _, discount, published, printed = FIGURE_3_4["d"]
    policy = np.eye(5)[["URDLO".index(letter) for letter in printed.replace(" ", "")]]
    values = ZhaoGrid(forbidden_reward=-1.0).mdp.evaluate(policy, discount)
    np.testing.assert_allclose(values.reshape(5, 5), published, atol=0.05 + 1e-9)
    # From the start it takes ten steps before the target pays 1 / (1 − γ) for good.
    np.testing.assert_allclose(values[[0, 17]], [10 * 0.9**10, 10], atol=1e-9)


# Sutton and Barto's grids


def test_example_4_1():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figure 4.1, k = ∞.
    values = CornerGrid().mdp.evaluate(np.full((16, 4), 0.25), discount=1.0)
    published = [[0, -14, -20, -22], [-14, -18, -20, -20], [-20, -20, -18, -14], [-22, -20, -14, 0]]
    np.testing.assert_allclose(values.reshape(4, 4), published, atol=1e-9)


def test_examples_3_5_and_3_8():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figures 3.2 and 3.5, γ = 0.9.
    env = TwoSpecialStates()
    random = [
        [3.3, 8.8, 4.4, 5.3, 1.5],
        [1.5, 3.0, 2.3, 1.9, 0.5],
        [0.1, 0.7, 0.7, 0.4, -0.4],
        [-1.0, -0.4, -0.4, -0.6, -1.2],
        [-1.9, -1.3, -1.2, -1.4, -2.0],
    ]
    values = env.mdp.evaluate(np.full((25, 4), 0.25), 0.9)
    np.testing.assert_allclose(values.reshape(5, 5), random, atol=0.05 + 1e-9)
    optimal = [
        [22.0, 24.4, 22.0, 19.4, 17.5],
        [19.8, 22.0, 19.8, 17.8, 16.0],
        [17.8, 19.8, 17.8, 16.0, 14.4],
        [16.0, 17.8, 16.0, 14.4, 13.0],
        [14.4, 16.0, 14.4, 13.0, 11.7],
    ]
    agent = solve(env, 0.9)
    np.testing.assert_allclose(agent.values.reshape(5, 5), optimal, atol=0.05 + 1e-9)
    # V(A) = 10 + γ⁴ V(A) around the loop of five steps.
    np.testing.assert_allclose(agent.values[1], 10 / (1 - 0.9**5), atol=1e-8)
    actions = ["R", "URDL", "L", "URDL", "L", "UR", "U", "UL", "L", "L", *["UR", "U", "UL", "UL", "UL"] * 3]
    printed = [[letter in cell for letter in "URDL"] for cell in actions]
    np.testing.assert_array_equal(agent.policy > 0, printed)


def test_the_cliff_is_gymnasiums():
    for slip, arguments in ((0.0, {}), (2 / 3, {"is_slippery": True})):
        ours = CliffWalking(slip=slip).mdp
        theirs = TabularMDP.from_env(gymnasium.make("CliffWalking-v1", **arguments))
        np.testing.assert_allclose(ours.transitions.toarray(), theirs.transitions.toarray(), atol=1e-12)
        np.testing.assert_allclose(ours.rewards, theirs.rewards, atol=1e-12)
        np.testing.assert_array_equal(ours.terminal, theirs.terminal)
        np.testing.assert_array_equal(ours.initial, theirs.initial)


def test_the_best_and_the_safe_path_along_the_cliff():
    # Example 6.6: the optimal path takes 13 steps, the safe one along the top 17.
    env = CliffWalking()
    assert solve(env, 1.0).values[36] == pytest.approx(-13)
    policy = np.zeros((48, 4))
    policy[:, RIGHT] = 1
    policy[[12, 24, 36]] = np.eye(4)[UP]
    policy[[11, 23, 35]] = np.eye(4)[DOWN]
    assert env.mdp.evaluate(policy, 1.0)[36] == pytest.approx(-17)
    env.reset(seed=0)
    assert env.step(RIGHT) == (36, -100.0, False, False, {})


WIND = [0, 0, 0, 1, 1, 1, 2, 2, 1, 0]
KINGS = [(-1, 0), (0, 1), (1, 0), (0, -1), (-1, 1), (1, 1), (1, -1), (-1, -1), (0, 0)]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    ("arguments", "moves"),
    [
        ({}, KINGS[:4]),
        ({"stay": True}, [*KINGS[:4], (0, 0)]),
        ({"kings_moves": True}, KINGS[:8]),
        ({"kings_moves": True, "stay": True}, KINGS),
    ],
)
def test_the_wind_is_that_of_the_column_departed_from(arguments, moves, stochastic):
    """Every probability, by the text of example 6.5 and exercises 6.9 and 6.10."""
    env = WindyGrid(stochastic=stochastic, **arguments)
    expected = np.zeros((70, len(moves), 70))
    for row, column, (action, (down, right)) in (
        (row, column, move) for row in range(7) for column in range(10) for move in enumerate(moves)
    ):
        gusts = (-1, 0, 1) if stochastic and WIND[column] else (0,)
        for gust in gusts:
            next_row = min(6, max(0, row + down - WIND[column] - gust))
            next_column = min(9, max(0, column + right))
            expected[row * 10 + column, action, next_row * 10 + next_column] += 1 / len(gusts)
    expected[37] = np.eye(70)[37]
    np.testing.assert_allclose(env.mdp.transitions.toarray().reshape(expected.shape), expected, atol=1e-12)
    np.testing.assert_array_equal(np.delete(env.mdp.rewards, 37, axis=0), -1)
    assert env.mdp.initial[30] == 1
    assert env.action_space.n == env.num_actions == len(moves)


@pytest.mark.parametrize(
    ("arguments", "steps"), [({}, 15), ({"kings_moves": True}, 7), ({"kings_moves": True, "stay": True}, 7)]
)
def test_the_shortest_paths_through_the_wind(arguments, steps):
    # Example 6.5: 15 steps; exercise 6.9: 7 with king's moves, and no better with a ninth action.
    assert solve(WindyGrid(**arguments), 1.0).values[30] == pytest.approx(-steps)


def test_a_bad_wind_is_refused():
    with pytest.raises(ValueError, match=r"one integer for each of the 10 columns, not \[1, 2\]"):
        WindyGrid(wind=[1, 2])
    with pytest.raises(ValueError, match="one integer for each"):
        WindyGrid(wind=[0.5] * 10)


def test_every_move_has_its_arrow():
    grid = WindyGrid(kings_moves=True, stay=True)
    # The first nine cells take one action each, in the order of the actions.
    policy = np.eye(9)[np.arange(70) % 9]
    assert grid.text(policy=policy).splitlines()[0].split()[:9] == list("↑→↓←↗↘↙↖o")
    assert WindyGrid(stay=True).text(policy=np.eye(5)[np.full(70, 4)]).split()[0] == "o"
    # Drawn arrows point where the agent goes (matplotlib's y grows downwards here), and are equally long.
    figure = grid.draw(policy=policy)
    arrows = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrow)][:8]
    ends = np.array([(arrow._dy, arrow._dx) for arrow in arrows])
    np.testing.assert_allclose(np.hypot(*ends.T), 0.26)
    np.testing.assert_array_equal(np.sign(ends), grid.moves[:8])


# Mazes


def test_the_dyna_maze_takes_14_steps():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figure 8.2.
    env = DynaMaze()
    assert steps_to_go(env) == pytest.approx(14)
    assert env.mdp.num_states == 6 * 9 - 7
    np.testing.assert_array_equal(env.map.cells[env.mdp.initial > 0], [[2, 0]])
    np.testing.assert_array_equal(env.map.cells[env.mdp.terminal], [[0, 8]])
    assert set(env.mdp.outcomes.rewards) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("kind", "switch", "before", "after"), [(BlockingMaze, 1000, 10, 16), (ShortcutMaze, 3000, 16, 10)]
)
def test_the_published_mazes_change_their_shortest_path(kind, switch, before, after):
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figures 8.4 and 8.5.
    env = kind()
    assert steps_to_go(env) == pytest.approx(before)
    env.reset(seed=0, options={"steps": switch - 1})
    assert steps_to_go(env) == pytest.approx(before)
    env.step(UP)
    assert steps_to_go(env) == pytest.approx(after)
    assert env.observation_space.n == env.mdp.num_states


def test_the_wall_moves_or_opens_as_drawn():
    walls = {kind: [grid.numbers[3] < 0 for grid in kind().maps] for kind in (BlockingMaze, ShortcutMaze)}
    np.testing.assert_array_equal(walls[BlockingMaze], [[True] * 8 + [False], [False] + [True] * 8])
    np.testing.assert_array_equal(walls[ShortcutMaze], [[False] + [True] * 8, [False] + [True] * 7 + [False]])
    # Only the fourth row has walls; the two cells that are open at some time are states in either maze.
    assert BlockingMaze().mdp.num_states == 54 - 7
    assert ShortcutMaze().mdp.num_states == 54 - 7


def test_the_map_switches_by_steps_over_all_episodes():
    env = ChangingMaze(["S.G", "S#G", "SG."], [3, 5])
    observations = []
    for _ in range(3):
        env.reset(seed=1)
        observations.append([env.step(RIGHT)[:3] for _ in range(2)])
    # Two steps of the first map; one of the first and one blocked, into the wall from the cell the agent stands in;
    # then the second map for one more step, and the third, whose goal is the middle.
    assert observations[0] == [(1, 0.0, False), (2, 1.0, True)]
    assert observations[1] == [(1, 0.0, False), (2, 1.0, True)]
    assert observations[2] == [(0, 0.0, False), (1, 1.0, True)]
    assert env.steps == 6
    env.reset(options={"steps": 0})
    assert env.text() == "S.G"


def test_a_cell_that_became_a_wall_can_be_left_but_not_entered():
    env = ChangingMaze(["S..\n..G", "S#.\n..G"], [2], boundary_reward=-5.0)
    env.reset(seed=0, options={"steps": 1})
    assert env.step(RIGHT)[:2] == (1, 0.0)
    assert env.text() == "S#.\n..G"
    # [S, A]: up, right, down, left from the wall; and from the start to the right, into it.
    successors = env.mdp.transitions.toarray().argmax(axis=1).reshape(6, 4)
    np.testing.assert_array_equal(successors[1], [1, 2, 4, 0])
    assert successors[0, RIGHT] == 0
    assert env.mdp.rewards[0, RIGHT] == -5.0
    assert env.step(DOWN)[:2] == (4, 0.0)
    # Values have one number for every state, whatever is a wall at present.
    assert env.text(np.arange(6.0), decimals=0) == "0  #  2\n3  4  5"


@pytest.mark.parametrize("phase", [0, 1])
def test_a_changing_maze_does_what_its_present_model_says(phase):
    env = ChangingMaze(["S.#\n..G", "S#.\n..G"], [10**6])
    env.reset(seed=0, options={"steps": 10**6 * phase})
    model = env.mdp
    model.check_model(env, samples=3000)
    assert env.mdp is model


def test_bad_changes_are_refused():
    with pytest.raises(ValueError, match="2 maps need one switch less, not 0"):
        ChangingMaze(["SG", "GS"], [])
    with pytest.raises(ValueError, match=r"increasing numbers of steps from 1, not \[5, 5\]"):
        ChangingMaze(["SG"] * 3, [5, 5])
    with pytest.raises(ValueError, match=r"increasing numbers of steps from 1, not \[0\]"):
        ChangingMaze(["SG"] * 2, [0])
    with pytest.raises(ValueError, match=r"map 2 has shape \(1, 3\), and map 1 \(1, 2\)"):
        ChangingMaze(["SG", "S.G"], [5])
    with pytest.raises(ValueError, match="map 2: no target"):
        ChangingMaze(["SG", "S."], [5])
    with pytest.raises(ValueError, match="-1 is negative"):
        BlockingMaze().reset(options={"steps": -1})
    with pytest.raises(ValueError, match="increasing numbers"):
        ShortcutMaze(-3)
