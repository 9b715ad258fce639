"""The vectorised grid world beside Gymnasium's SyncVectorEnv of the single one, step by step."""

import copy
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from aligngym.envs import GridWorld, TabularMDP
from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.uniform_streams import BLOCK, UniformStreams
from aligngym.envs.vector_grid_world import VectorGridWorld
from aligngym.envs.vector_tabular_env import VectorTabularEnv

MODES = list(AutoresetMode)
WORLDS = {
    "deterministic": {},
    "slip": {"slip": 0.2, "stay": True},
    "several starts": {"map": "S.#S\n.F..\nS..G"},
    "slip and starts everywhere": {"map": "...\n.F.\n.G.", "slip": 0.5, "forbidden_reward": -10.0},
    "continuing": {"slip": 0.1, "terminal_target": False, "step_reward": -0.1},
    "walled in": {"map": "S#G\n###", "slip": 0.3},
}


def pair(num_envs, limit, mode, **world):
    """Return our copies and Gymnasium's of the same world."""

    def single():
        return TimeLimit(GridWorld(**world), limit)

    ours = VectorGridWorld(num_envs, max_episode_steps=limit, autoreset_mode=mode, **world)
    return ours, SyncVectorEnv([single] * num_envs, autoreset_mode=mode)


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype
        assert [type(entry) for entry in ours.tolist()] == [type(entry) for entry in theirs.tolist()]
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


def assert_same_results(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)


def walk(ours, theirs, steps, seed=0):
    """Take the same random actions on both sides and compare all that comes back; return how many episodes ended."""
    generator, ended = np.random.default_rng(seed), np.zeros(2, dtype=int)
    for _ in range(steps):
        actions = generator.integers(ours.single_action_space.n, size=ours.num_envs)
        result = ours.step(actions)
        assert_same_results(result, theirs.step(actions))
        ended += [result[2].sum(), result[3].sum()]
        over = result[2] | result[3]
        if ours.autoreset_mode is AutoresetMode.DISABLED and over.any():
            masks = [{"reset_mask": over.copy()} for _ in range(2)]
            assert_same_results(ours.reset(options=masks[0]), theirs.reset(options=masks[1]))
    return ended


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_step_is_that_of_gymnasiums_vector_of_single_environments(world, mode):
    ours, theirs = pair(7, 9, mode, **WORLDS[world])
    assert_same_results(ours.reset(seed=3), theirs.reset(seed=3))
    terminations, truncations = walk(ours, theirs, 150)
    assert truncations > 0
    assert terminations > 0 or world in ("continuing", "walled in")
    # Without a seed the generators go on; a new seed starts them anew in the middle of their numbers.
    assert_same_results(ours.reset(), theirs.reset())
    walk(ours, theirs, 20, seed=1)
    assert_same_results(ours.reset(seed=8), theirs.reset(seed=8))
    walk(ours, theirs, 20, seed=2)


def test_numbers_drawn_ahead_are_those_drawn_one_at_a_time():
    # Copies use different amounts of numbers (not all rows and resets are random), and several blocks of them.
    ours, theirs = pair(2, 12, AutoresetMode.SAME_STEP, map="S.#S\n.F..\n...G", slip=0.3)
    assert_same_results(ours.reset(seed=0), theirs.reset(seed=0))
    walk(ours, theirs, 3 * BLOCK)
    used = ours._uniforms._used
    assert used.min() > 2 * BLOCK
    assert len(set(used.tolist())) > 1


def test_streams_are_those_of_their_generators():
    streams, choices = UniformStreams(3), np.random.default_rng(0)
    streams.seed(np.arange(3), [5, 6, 7])
    generators = [np.random.default_rng(seed) for seed in (5, 6, 7)]
    for round in range(2 * BLOCK):
        # The last copy uses a number rarely, so its blocks begin at other times.
        needed = choices.random(3) < [0.9, 0.7, 0.1]
        expected = [generator.random() if need else None for generator, need in zip(generators, needed, strict=True)]
        got = streams.take_where(needed)
        assert [number if need else None for number, need in zip(got.tolist(), needed, strict=True)] == expected
        copies = np.flatnonzero(choices.random(3) < 0.5)
        assert streams.take(copies).tolist() == [generators[copy].random() for copy in copies]
        if round == BLOCK + 3:
            streams.seed(np.array([1]), [11])
            generators[1] = np.random.default_rng(11)


@pytest.mark.parametrize("seeds", [[4, 4, 9], [None, 2, 2], (1, 2, 3)])
def test_a_list_of_seeds_seeds_each_copy(seeds):
    ours, theirs = pair(3, 5, AutoresetMode.NEXT_STEP, map="S.S\nSG.", slip=0.4)
    for side in (ours, theirs):
        side.reset(seed=20)
    assert_same_results(ours.reset(seed=seeds), theirs.reset(seed=list(seeds)))
    walk(ours, theirs, 30)
    assert ours.np_random_seed == theirs.np_random_seed == tuple(s if s is not None else 20 for s in seeds)
    assert [type(generator) for generator in ours.np_random] == [np.random.Generator] * 3


@pytest.mark.parametrize("mode", MODES)
def test_masked_resets_with_seeds_and_states(mode):
    ours, theirs = pair(4, 6, mode, map="S.S\n.#.\nF.G", slip=0.3)
    assert_same_results(ours.reset(seed=1), theirs.reset(seed=1))
    generator = np.random.default_rng(0)
    for round in range(60):
        # Some rounds leave episodes that are over as they are, and cut off running ones.
        mask = generator.random(4) < 0.5
        if mask.any():
            chosen = {"state": 5} if round % 3 == 1 else {}
            seed = 100 + round if round % 4 == 0 else None
            assert_same_results(
                ours.reset(seed=seed, options={"reset_mask": mask, **chosen}),
                theirs.reset(seed=seed, options={"reset_mask": mask.copy(), **chosen}),
            )
        actions = generator.integers(4, size=4)
        if len(ours._over) and mode is AutoresetMode.DISABLED:
            with pytest.raises(ResetNeeded, match="episodes of copies"):
                ours.step(actions)
            with pytest.raises(AssertionError):
                theirs.step(actions)
            everything = np.ones(4, dtype=bool)
            ours.reset(options={"reset_mask": everything})
            theirs.reset(options={"reset_mask": everything})
        assert_same_results(ours.step(actions), theirs.step(actions))


def test_a_walk_may_begin_anywhere_even_in_a_target():
    ours, theirs = pair(2, 5, AutoresetMode.NEXT_STEP, map="S.G")
    assert_same_results(ours.reset(options={"state": 2}), theirs.reset(options={"state": 2}))
    walk(ours, theirs, 10)
    observations, _ = ours.reset(options={"state": [1, 2]})
    assert observations.tolist() == [1, 2]


def test_other_tabular_environments_are_vectorised_too():
    # Rows with up to four outcomes of unequal probability, a start that is terminal, and several of them.
    generator = np.random.default_rng(0)
    rows = np.repeat(np.arange(10), 4)
    probabilities = generator.dirichlet(np.ones(4), size=10) * (generator.random((10, 4)) < 0.8)
    probabilities[:, 0] += 1 - probabilities.sum(axis=1)
    outcomes = Outcomes(rows, generator.integers(5, size=40), probabilities.ravel(), generator.normal(size=40))
    mdp = TabularMDP(outcomes, [0.3, 0.3, 0.3, 0.0, 0.1], [False] * 4 + [True], 2)
    for mode in MODES:
        ours = VectorTabularEnv(TabularEnv(mdp), 6, max_episode_steps=8, autoreset_mode=mode.value)
        theirs = SyncVectorEnv([lambda: TimeLimit(TabularEnv(mdp), 8)] * 6, autoreset_mode=mode)
        assert_same_results(ours.reset(seed=2), theirs.reset(seed=2))
        assert walk(ours, theirs, 100).min() > 0


def test_deterministic_grids_with_one_start_draw_nothing():
    env = VectorGridWorld(5, max_episode_steps=4)
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.ones(5, dtype=int))
    assert env._uniforms._generators == [None] * 5


def test_returned_arrays_belong_to_the_caller():
    env, untouched = (VectorGridWorld(6, slip=0.2, max_episode_steps=5, autoreset_mode="SameStep") for _ in range(2))
    generator = np.random.default_rng(0)
    kept, copies = [], []
    for side in (env, untouched):
        side.reset(seed=0)[0][:] = 0
    for _ in range(30):
        actions = generator.integers(4, size=6)
        result, expected = env.step(actions), untouched.step(actions)
        assert_same_results(result, expected)
        kept.append(expected)
        copies.append(copy.deepcopy(expected))
        # Nothing that is written into the arrays of one step changes the next.
        for array in (*result[:4], *result[4].values(), actions):
            if isinstance(array, np.ndarray):
                array[:] = 1
    for before, after in zip(copies, kept, strict=True):
        assert_same_results(after, before)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int32, np.uint64, list])
def test_actions_of_any_integer_type_are_taken(kind):
    env = VectorGridWorld(3, map="...\n.S.\n..G")
    env.reset()
    actions = [0, 1, 2]
    observations, *_ = env.step(actions if kind is list else np.array(actions, dtype=kind))
    assert observations.tolist() == [1, 5, 7]


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 4, 0], "copy 1: action 4 is not one of 0 … 3"),
        ([0, 1, -1], "copy 2: action -1 is not one of 0 … 3"),
        (np.array([255, 0, 0], dtype=np.uint8), "copy 0: action 255 is not one of 0 … 3"),
        ([0, 1], r"3 integers, not an array of shape \(2,\)"),
        ([0.0, 1.0, 2.0], "3 integers, not an array .* type float64"),
        ([True, False, True], "type bool"),
        ([[0], [1], [2]], r"shape \(3, 1\)"),
        (1, r"shape \(\)"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(actions, message):
    env = VectorGridWorld(3, slip=0.3, max_episode_steps=4)
    before, _ = env.reset(seed=0)
    for _ in range(10):
        with pytest.raises(ValueError, match=message):
            env.step(actions)
    np.testing.assert_array_equal(env.states, before)
    _, _, _, truncated, _ = env.step([1, 1, 1])
    assert not truncated.any()


def test_bad_arguments_are_refused():
    for arguments, message in [
        ({"num_envs": 0}, "at least 1, not 0"),
        ({"max_episode_steps": 0}, "at least 1, or None for no limit, not 0"),
        ({"autoreset_mode": "Later"}, "one of NextStep, SameStep, Disabled, not 'Later'"),
        ({"slip": 1.5}, "1.5 is not between 0 and 1"),
        ({"map": "S.\nx."}, "unknown 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            VectorGridWorld(**arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'slippery'"):
        VectorGridWorld(slippery=True)
    for env in (GridWorld(render_mode="human"), TimeLimit(GridWorld(), 5), gymnasium.make("FrozenLake-v1")):
        with pytest.raises(TypeError, match="not a bare TabularEnv"):
            VectorTabularEnv(env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2]}, "2 seeds for 3 copies"),
        ({"seed": -1}, "copy 0: a seed is an integer from 0, or None, not -1"),
        ({"seed": [0, 1.5, 2]}, "copy 1: a seed is an integer from 0, or None, not 1.5"),
        ({"options": {"state": 99}}, "state 99 is not within 0 … 24"),
        ({"options": {"state": [0, 1]}}, "one state or 3 of them"),
        ({"options": {"state": 0.5}}, "one state or 3 of them"),
        ({"options": {"reset_mask": [True, False, True]}}, "array of 3 booleans"),
        ({"options": {"reset_mask": np.ones(2, dtype=bool)}}, "array of 3 booleans"),
        ({"options": {"reset_mask": np.ones(3)}}, "array of 3 booleans"),
        ({"options": {"reset_mask": np.zeros(3, dtype=bool)}}, "marks no copy"),
    ],
)
def test_bad_resets_are_refused(arguments, message):
    env = VectorGridWorld(3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(**arguments)


def test_the_first_reset_is_for_all():
    env = VectorGridWorld(2)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step([0, 0])
    with pytest.raises(ResetNeeded, match="first reset is for all"):
        env.reset(options={"reset_mask": np.array([True, False])})


def test_a_copy_of_it_goes_on_alike():
    env = VectorGridWorld(4, map="...\n..G", slip=0.4, max_episode_steps=6)
    env.reset(seed=0)
    other = copy.deepcopy(env)
    for step in range(20):
        assert_same_results(env.step([step % 4] * 4), other.step([step % 4] * 4))


@pytest.fixture
def entry_point():
    """Register the world as it is registered, with a vector entry point, under a name of its own."""
    spec = gymnasium.spec("aligngym/GridWorld-v0")
    name = "aligngym/TestedVectorGridWorld-v0"
    gymnasium.register(
        name,
        entry_point=spec.entry_point,
        max_episode_steps=7,
        vector_entry_point="aligngym.envs.vector_grid_world:VectorGridWorld",
    )
    yield name
    del gymnasium.registry[name]


@pytest.mark.parametrize("mode", MODES)
def test_make_vec_makes_it_and_the_time_limit_arrives(entry_point, mode):
    world = {"slip": 0.3, "terminal_target": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = gymnasium.make_vec(
            entry_point, num_envs=3, vectorization_mode="vector_entry_point", autoreset_mode=mode, **world
        )
        theirs = gymnasium.make_vec(
            entry_point, num_envs=3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **world
        )
    assert isinstance(ours, VectorGridWorld)
    assert isinstance(theirs, SyncVectorEnv)
    assert ours.metadata == theirs.metadata
    assert ours.metadata["autoreset_mode"] is mode
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space", "num_envs"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert_same_results(ours.reset(seed=0), theirs.reset(seed=0))
    assert walk(ours, theirs, 40)[1] > 0
    longer = gymnasium.make_vec(entry_point, num_envs=2, max_episode_steps=-1, terminal_target=False)
    assert isinstance(longer, VectorGridWorld)
    longer.reset()
    assert not any(longer.step([0, 0])[3].any() for _ in range(50))
    ours.close()


def test_it_works_in_gymnasiums_wrappers():
    ours, theirs = (RecordEpisodeStatistics(env) for env in pair(5, 6, AutoresetMode.NEXT_STEP, slip=0.2))
    ours.reset(seed=0)
    theirs.reset(seed=0)
    generator, episodes = np.random.default_rng(0), 0
    for _ in range(60):
        actions = generator.integers(4, size=5)
        infos, expected = ours.step(actions)[4], theirs.step(actions)[4]
        assert infos.keys() == expected.keys()
        if "episode" in infos:
            episodes += 1
            for key in ("r", "l"):
                np.testing.assert_array_equal(infos["episode"][key], expected["episode"][key])
    assert episodes > 5


def test_every_copy_is_drawn_as_a_single_one_is():
    ours, theirs = pair(4, 9, AutoresetMode.NEXT_STEP, map="S.S\n..G", render_mode="ansi")
    assert_same_results(ours.reset(seed=0), theirs.reset(seed=0))
    walk(ours, theirs, 5)
    assert ours.render() == theirs.render()
    pixels = VectorGridWorld(2, map="S.G", render_mode="rgb_array")
    single = GridWorld("S.G", render_mode="rgb_array")
    single.reset()
    pixels.reset()
    frames = pixels.render()
    assert len(frames) == 2
    np.testing.assert_array_equal(frames[1], single.render())
