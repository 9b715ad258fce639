import json
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from matplotlib.figure import Figure

from aligngym.agents import ValueIteration
from aligngym.envs import GridMap, GridWorld, TabularMDP

TABLES = Path(__file__).parents[3] / "shared" / "data" / "textbook_tables.json"

#: Rewards and discount of the value tables in S. Zhao, Mathematical Foundations of Reinforcement Learning.
ZHAO = {
    "fig3_4a": {"forbidden_reward": -1.0, "discount": 0.9},
    "fig3_4b": {"forbidden_reward": -1.0, "discount": 0.5},
    "fig3_4c": {"forbidden_reward": -1.0, "discount": 0.0},
    "fig3_4d": {"forbidden_reward": -10.0, "discount": 0.9},
}


def solve_zhao(forbidden_reward, discount):
    grid = GridWorld(stay=True, forbidden_reward=forbidden_reward, terminal_target=False)
    agent = ValueIteration(grid, discount, tolerance=1e-10).learn(progress=False)
    return agent.values.reshape(5, 5), agent.policy.reshape(5, 5, 5)


def test_the_published_optimal_values_of_figure_3_4_d():
    # S. Zhao, Mathematical Foundations of Reinforcement Learning, figure 3.4 (d): r_forbidden = −10, γ = 0.9.
    published = [
        [3.5, 3.9, 4.3, 4.8, 5.3],
        [3.1, 3.5, 4.8, 5.3, 5.9],
        [2.8, 2.5, 10.0, 5.9, 6.6],
        [2.5, 10.0, 10.0, 10.0, 7.3],
        [2.3, 9.0, 10.0, 9.0, 8.1],
    ]
    values, _ = solve_zhao(**ZHAO["fig3_4d"])
    np.testing.assert_allclose(values, published, atol=0.05 + 1e-9)


@pytest.mark.skipif(not TABLES.exists(), reason=f"the published tables are not at {TABLES}")
@pytest.mark.parametrize("name", ZHAO)
def test_every_published_table_of_figure_3_4(name):
    table = json.loads(TABLES.read_text())["zhao"]["tables"][name]
    values, policy = solve_zhao(**ZHAO[name])
    np.testing.assert_allclose(values, table["published"], atol=0.05 + 1e-9)
    np.testing.assert_allclose(values, table["exact"], atol=1e-9)
    # The book prints one optimal action a cell; it must be among ours.
    for row, letters in enumerate(table["printed_policy"].split()):
        for column, letter in enumerate(letters):
            assert policy[row, column, "URDLO".index(letter)] > 0, (row, column, letter)


def test_rewards_are_those_of_the_cell_landed_in():
    rewards = {"step_reward": -0.1, "boundary_reward": -2.0, "forbidden_reward": -3.0, "target_reward": 7.0}
    grid = GridWorld("SF\n#G", stay=True, terminal_target=False, **rewards)
    #                                    up    right  down  left  stay
    np.testing.assert_allclose(grid.mdp.rewards, [
        [-2.0, -3.0, -2.0, -2.0, -0.1],
        [-2.0, -2.0, 7.0, -0.1, -3.0],
        [-3.0, -2.0, -2.0, -2.0, 7.0],
    ])  # fmt: skip
    successors = grid.mdp.transitions.toarray().argmax(axis=1).reshape(3, 5)
    np.testing.assert_array_equal(successors, [[0, 1, 0, 0, 0], [1, 1, 2, 0, 1], [1, 2, 2, 2, 2]])


def test_a_slip_goes_to_either_side():
    grid = GridWorld("...\n.S.\n..G", slip=0.2, stay=True)
    up = grid.mdp.transitions.toarray().reshape(9, 5, 9)[4, 0]
    np.testing.assert_allclose(up[[1, 3, 5]], [0.8, 0.1, 0.1])
    stay = grid.mdp.transitions.toarray().reshape(9, 5, 9)[4, 4]
    assert stay[4] == 1


def test_russell_and_norvigs_4_by_3_world():
    # S. Russell and P. Norvig, Artificial Intelligence, 3rd ed., figure 17.3: γ = 1, ends of +1 and −1, and a reward of
    # −0.04 for every other state, paid on leaving it: so a step into an end pays 0.96 or −1.04.
    grid = GridWorld("...G\n.#.G\nS...", slip=0.2, step_reward=-0.04, boundary_reward=-0.04)
    rows, next_states, probabilities, rewards = grid.mdp.outcomes
    rewards = np.where((next_states == 6) & (rewards == 1), -1.04, np.where(rewards == 1, 0.96, rewards))
    outcomes = type(grid.mdp.outcomes)(rows, next_states, probabilities, rewards)
    mdp = TabularMDP(outcomes, grid.mdp.initial, grid.mdp.terminal, 4)
    values = ValueIteration(mdp, discount=1.0).learn(2000, progress=False).values
    published = [0.812, 0.868, 0.918, 0, 0.762, 0.660, 0, 0.705, 0.655, 0.611, 0.388]
    np.testing.assert_allclose(values, published, atol=6e-4)


def test_states_are_numbered_without_walls():
    grid_map = GridMap("S#.\n.#G")
    np.testing.assert_array_equal(grid_map.cells, [[0, 0], [0, 2], [1, 0], [1, 2]])
    np.testing.assert_array_equal(grid_map.numbers, [[0, -1, 1], [2, -1, 3]])
    np.testing.assert_array_equal(GridWorld("S.S\n.G.").mdp.initial, [0.5, 0, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(GridWorld("..F\n#G.").mdp.initial, np.array([1, 1, 0, 0, 1]) / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "map is empty"),
        ("\n  \n", "map is empty"),
        ("S.\n...G", r"row 2: 4 cells, and the first row has 2"),
        ("S.\n.x\n.G", r"row 2, column 2: unknown 'x'"),
        ("\n\nS.\n. G", r"row 4, column 2: unknown ' '"),
        ("S..", "no target"),
        ("#G", "nowhere to start"),
    ],
)
def test_a_bad_map_is_refused_with_its_place(text, message):
    with pytest.raises(ValueError, match=message):
        GridWorld(text)


def test_bad_arguments_are_refused():
    for arguments, message in [
        ({"slip": 1.5}, "1.5 is not between 0 and 1"),
        ({"step_reward": np.nan}, "not finite"),
        ({"render_mode": "picture"}, "not 'picture'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GridWorld(**arguments)
    env = GridWorld()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action 4 is not one of 0 … 3"):
        env.step(4)


@pytest.mark.parametrize("arguments", [{}, {"stay": True, "slip": 0.3}, {"terminal_target": False}])
def test_gymnasiums_checker_has_nothing_to_say(arguments):
    env = gymnasium.make("aligngym/GridWorld-v0", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


@pytest.mark.parametrize("arguments", [{"slip": 0.3}, {"stay": True}, {"slip": 0.1, "terminal_target": False}])
def test_the_simulator_does_what_the_model_says(arguments):
    env = gymnasium.make("aligngym/GridWorld-v0", map="S.#S\n.F..\n...G", **arguments)
    TabularMDP.from_env(env).check_model(env, samples=10_000)


def test_a_seed_repeats_an_episode_and_time_limits_truncate():
    env = gymnasium.make("aligngym/GridWorld-v0", slip=0.5, max_episode_steps=7, terminal_target=False)

    def play(seed):
        steps = [env.reset(seed=seed)[0]]
        truncated = False
        while not truncated:
            observation, _, terminated, truncated, _ = env.step(len(steps) % 4)
            assert not terminated
            steps.append(observation)
        return steps

    assert play(1) == play(1) != play(2)
    assert len(play(1)) == 8


def test_text_is_aligned_and_shows_ties():
    grid = GridWorld("S.#\n..G", stay=True)
    values = [-10.126, 0.5, -0.001, 3, 0]
    policy = [[0, 0.5, 0.5, 0, 0], [0, 0, 1, 0, 0], [0.2] * 5, [0, 1, 0, 0, 0], [0.2] * 5]
    assert grid.text(values, policy) == "\n".join(
        [
            "-10.13    0.50  ######",
            "  0.00    3.00    0.00",
            "",
            "   →↓      ↓  #####",
            "↑→↓←o      →      G",
        ]
    )
    assert grid.text() == "S.#\n..G"
    with pytest.raises(ValueError, match=r"shape \(6,\) does not fit a grid of 5 cells"):
        grid.text(np.zeros(6))


def test_ansi_shows_the_agent():
    env = GridWorld("S.#\n..G", render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == "@.#\n..G"
    env.step(2)
    assert env.render() == "S.#\n@.G"


def test_a_window_that_cannot_be_opened_becomes_text(capsys, monkeypatch):
    monkeypatch.setattr("matplotlib.get_backend", lambda: "agg")
    env = GridWorld("S.G", render_mode="human")
    env.reset(seed=0)
    env.step(1)
    env.close()
    assert capsys.readouterr().out == "@.G\n\nS@G\n\n"


def test_colours_are_ordered_as_values_are():
    grid = GridWorld("S....#G")
    values = np.array([0.0, 3.0, 1.0, 2.0, 4.0, 100.0])
    picture = grid.draw(values)
    assert isinstance(picture, Figure)
    env = GridWorld("S....#G", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.dtype == np.uint8
    assert frame.ndim == 3
    assert frame.shape[2] == 3
    picture.canvas.draw()
    pixels = np.asarray(picture.canvas.buffer_rgba())[..., :3].astype(float)
    # A quarter up from the bottom edge and near the left edge of every cell there is neither a number nor a frame.
    height, width = pixels.shape[:2]
    columns = ((np.arange(7) + 0.12) / 7 * width).astype(int)
    luminance = pixels[int(0.75 * height), columns] @ [0.2126, 0.7152, 0.0722]
    np.testing.assert_array_equal(np.argsort(luminance[:5]), np.argsort(values[:5]))
    assert luminance[5] < luminance[:5].min()


def test_arrows_are_drawn_for_every_action_of_a_tie():
    grid = GridWorld("S..\n..G")
    policy = np.tile([0, 0.5, 0.5, 0], (6, 1))
    patches = [type(patch).__name__ for patch in grid.draw(np.zeros(6), policy).axes[0].patches]
    # Five cells that are not terminal, two arrows each.
    assert patches.count("FancyArrow") == 10
