import copy
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy import stats

from aligngym.agents import GRPO, EpisodeSampler, PolicyIteration, ValueIteration, evaluate_episodes
from aligngym.core import TabularPolicy
from aligngym.envs import GridWorld, enumerate_trajectories
from aligngym.envs.text_grid_world import NumberedText, TextGridWorld, text_player

MAP = "S.F\n#.G"
SLIPPERY = {"slip": 0.2, "step_reward": -0.1, "boundary_reward": -0.3}


def best_moves(env):
    return PolicyIteration(env, 1.0).learn(progress=False).policy


def play(env, answers, seed=0, **options):
    steps = [env.reset(seed=seed, **options)]
    return steps + [env.step(answer) for answer in answers]


class TestText:
    def test_gymnasiums_checker_finds_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*does not have a spec|.*not having a spec")
            check_env(TextGridWorld(MAP))
            check_env(TextGridWorld("S\tG".replace("\t", ".") + "\n...", separator="", rules=""))

    def test_what_an_episode_shows(self):
        (first, _), (second, *_), (third, *_) = play(TextGridWorld(MAP), ["right", "Down."])
        assert first == ("Walk @ to G, # is a wall, F is forbidden. Answer up, right, down or left.\n@ . F\n# . G")
        assert second == "S @ F\n# . G"
        assert third == "S . F\n# @ G"

    @pytest.mark.parametrize("stay", [True, False])
    @pytest.mark.parametrize("rules", [None, "", "Go!\nNow."])
    def test_texts_and_states_are_each_others_inverse(self, stay, rules):
        env = TextGridWorld("..#\nF.G\nG..", stay=stay, rules=rules)
        for state in range(env.mdp.num_states):
            first, info = env.reset(options={"state": state})
            assert env.state_of(first) == env.state_of(env.text_of(state)) == info["state"] == env.state == state
            assert env.observation_space.contains(first)
            assert env.observation_space.contains(env.text_of(state))
        with pytest.raises(ValueError, match="no map of this world"):
            env.state_of("@ . .")

    @pytest.mark.parametrize(
        ("answer", "move"),
        [
            *[
                ("left", 3),
                ("Left.", 3),
                ("move left", 3),
                ("LEFT\n", 3),
                ("up", 0),
                ("I go\tdown!", 2),
                ('"right"', 1),
            ],
            *[("", None), ("left or right", None), ("left, left", None), ("leftmost", None), ("3", None), ("←", None)],
            *[("stay", None), ("lé ft", None)],
        ],
    )
    def test_one_move_is_read_and_nothing_else(self, answer, move):
        assert TextGridWorld(MAP).move_of(answer) == move

    def test_words_of_ones_own(self):
        env = TextGridWorld(MAP, words=("Nord", "Ost", "Süd", "West"))
        assert [env.move_of(text) for text in ("nord", "nach OST", "SÜD!", "west", "up")] == [0, 1, 2, 3, None]
        assert env.reset()[0].startswith("Walk @ to G, # is a wall, F is forbidden. Answer Nord, Ost, Süd or West.\n")
        assert TextGridWorld(MAP, stay=True).move_of("Stay!") == 4


class TestWorld:
    def test_it_is_the_grid_with_the_same_seed(self):
        env, grid = TextGridWorld("..F\n..#\n..G", max_steps=10_000, **SLIPPERY), GridWorld("..F\n..#\n..G", **SLIPPERY)
        rng = np.random.default_rng(0)
        for seed in range(20):
            text, _ = env.reset(seed=seed)
            state, _ = grid.reset(seed=seed)
            over = False
            while not over:
                assert env.state_of(text) == state
                move = int(rng.integers(4))
                text, *result, _ = env.step(env.words[move])
                state, *expected, _ = grid.step(move)
                assert result == expected
                over = expected[1]

    def test_an_invalid_answer_takes_a_step_and_moves_nothing(self):
        env = TextGridWorld(MAP, max_steps=3, boundary_reward=-0.25)
        env.reset()
        before = env.text_of(env.state)
        text, reward, terminated, truncated, info = env.step("nowhere")
        assert (text, reward, terminated, truncated) == (before, -0.25, False, False)
        assert info == {"state": 0, "invalid": True, "is_success": False}
        assert env.step("right")[4] == {"state": 1, "invalid": False, "is_success": False}
        assert env.step("?")[2:4] == (False, True)
        assert TextGridWorld(MAP, step_reward=-2, boundary_reward=-1).step("?")[1] == -2
        assert TextGridWorld(MAP, invalid_reward=-3).step("?")[1] == -3

    def test_ends(self):
        env = TextGridWorld(MAP, max_steps=3)
        for _ in range(2):
            *_, last = play(env, ["right", "down", "right"])
            assert last[1:] == (1.0, True, False, {"state": 4, "invalid": False, "is_success": True})
        *_, before, last = play(env, ["left", "right", "down"])
        assert before[2:4] == (False, False)
        assert last[2:4] == (False, True)
        assert TextGridWorld(MAP).max_steps == 5

    def test_rendering(self):
        env = TextGridWorld(MAP, render_mode="ansi")
        env.reset()
        assert env.render() == "@ . F\n# . G"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"words": ("a", "b")}, r"2 names .* for 4 actions"),
            ({"words": ("a", "b", "c", "A")}, "more than case"),
            ({"words": ("go up", "b", "c", "d")}, "'go up'"),
            ({"max_steps": 0}, "at least 1, or None, not 0"),
            ({"render_mode": "human"}, "'human'"),
            ({"invalid_reward": 0.5}, "lower invalid_reward"),
            ({"invalid_reward": float("nan")}, "invalid_reward"),
            ({"slip": 2}, "slip"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            TextGridWorld(MAP, **options)

    def test_silence_must_not_pay(self):
        # Between forbidden cells standing still would be the best of all moves, and it is no move of the grid.
        with pytest.raises(ValueError, match=r"state 0 with 1 steps to go"):
            TextGridWorld("SF.\nF.G", max_steps=2, boundary_reward=-2, invalid_reward=0)
        assert TextGridWorld("SF.\nF.G", max_steps=2, boundary_reward=-2).optimal_return == -1


class TestExactness:
    def test_the_optimum_is_that_of_all_paths(self):
        env = TextGridWorld(MAP, max_steps=5, step_reward=-0.1, boundary_reward=-0.3)
        paths = enumerate_trajectories(env.mdp, 5)
        assert env.optimal_return == pytest.approx(float(paths.returns.max()), abs=1e-6)
        assert env.optimal_return == pytest.approx(0.8)

    def test_the_optimum_is_that_of_dynamic_programming(self):
        env = TextGridWorld("..F\n..#\n..G", max_steps=6, **SLIPPERY)
        model = env.mdp.unrolled(6)
        values = ValueIteration(model, 1.0).learn(progress=False).values
        assert env.optimal_return == pytest.approx(float(model.initial @ values), abs=1e-6)

    def test_a_policys_return_is_that_of_the_unrolled_model(self):
        env = TextGridWorld("..F\n..#\n..G", max_steps=6, **SLIPPERY)
        policy = np.random.default_rng(0).dirichlet(np.ones(4), env.mdp.num_states)
        model = env.mdp.unrolled(6)
        expected = float(model.initial @ model.evaluate(np.tile(policy, (7, 1)), 1.0))
        assert env.exact_return(policy) == pytest.approx(expected, abs=1e-12)
        for bad in (policy[1:], policy * 2, policy - 1):
            with pytest.raises(ValueError, match="rows that sum to one"):
                env.exact_return(bad)

    def test_an_optimal_player_of_texts_gets_the_optimum(self):
        env = TextGridWorld("S.F\n..#\n..G", max_steps=8, step_reward=-0.1)
        player = text_player(best_moves(env).argmax(axis=1).__getitem__, env)
        result = evaluate_episodes(player, env, episodes=3)
        assert result["return"] == pytest.approx(env.optimal_return, abs=1e-12)
        assert result["truncated"] == 0

    def test_a_random_player_gets_its_policys_exact_return(self):
        env = TextGridWorld("..F\n..#\n..G", max_steps=6, **SLIPPERY)
        policy = np.random.default_rng(1).dirichlet(np.ones(4), env.mdp.num_states)
        rng = np.random.default_rng(2)
        player = text_player(lambda state: rng.choice(4, p=policy[state]), env)
        result = evaluate_episodes(player, env, episodes=2000)
        bound = stats.norm.ppf(0.9995) * result["return_standard_error"]
        assert abs(result["return"] - env.exact_return(policy)) < bound


class TestStates:
    """Agents on numbered states act and learn in words."""

    def test_samples_are_those_of_the_grid(self):
        options = {"map": "..F\n..#\n..G", **SLIPPERY}
        text, grid = NumberedText(TextGridWorld(max_steps=7, **options)), GridWorld(**options)
        policy = TabularPolicy.for_env(text)
        rows = EpisodeSampler(text, episodes=12, group_size=3).sample(policy, seed=3)
        expected = EpisodeSampler(grid, episodes=12, group_size=3, max_steps=7).sample(policy, seed=3)
        for name in ("observations", "actions", "rewards", "mask", "terminated", "truncated", "group"):
            assert getattr(rows, name).equal(getattr(expected, name)), name

    def test_a_table_trained_on_the_grid_gets_its_grid_value_in_words(self):
        grid = GridWorld("S.F\n..#\n..G", step_reward=-0.1)
        agent = GRPO(
            TabularPolicy.for_env(grid), EpisodeSampler(grid, episodes=32, group_size=8, max_steps=8), learning_rate=0.3
        ).learn(20, progress=False)
        env = TextGridWorld("S.F\n..#\n..G", max_steps=8, step_reward=-0.1)
        greedy = np.eye(4)[agent.policy.probability_table().numpy().argmax(axis=1)]
        played = evaluate_episodes(text_player(agent.act, env), env, episodes=2)["return"]
        assert played == pytest.approx(env.exact_return(greedy), abs=1e-12)
        assert agent.evaluate(NumberedText(env), episodes=2)["return"] == played

    def test_a_table_is_trained_on_the_texts(self):
        env = TextGridWorld("..F\n..#\n..G", step_reward=-0.1)
        states = NumberedText(env)
        agent = GRPO(
            TabularPolicy.for_env(states), EpisodeSampler(states, episodes=64, group_size=8), learning_rate=0.3
        )
        agent.learn(40, progress=False)
        chance = env.exact_return(np.full((8, 4), 0.25))
        learnt = env.exact_return(agent.policy.probability_table())
        assert (learnt - chance) / (env.optimal_return - chance) > 0.95
        assert agent.evaluate(episodes=20)["truncated"] == 0

    def test_other_worlds_have_no_numbers(self):
        for make in (NumberedText, lambda env: text_player(int, env)):
            with pytest.raises(TypeError, match="has no state_of"):
                make(gymnasium.make("aligngym/GridWorld-v0"))

    def test_copies_do_not_share_their_walker(self):
        env = TextGridWorld(MAP)
        other = copy.deepcopy(env)
        play(env, ["right"])
        assert (env.state, other.state) == (1, 0)
