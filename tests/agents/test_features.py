import gymnasium
import numpy as np
import pytest

from aligngym.agents.features import (
    Aggregation,
    Coordinates,
    FeatureTable,
    Fourier,
    OneHot,
    Polynomial,
    TileCoding,
)
from aligngym.envs.grid_map import GridMap

UNIT = Coordinates([0, 0], [1, 1])


def test_one_hot_and_tables_look_up_rows():
    np.testing.assert_array_equal(OneHot(4)([[3, 0]]), [[[0, 0, 0, 1], [1, 0, 0, 0]]])
    np.testing.assert_array_equal(OneHot(4)(2), [0, 0, 1, 0])
    table = [[1.0, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(FeatureTable(table)([1, 0, 1]), [[4, 5, 6], [1, 2, 3], [4, 5, 6]])
    assert FeatureTable(table).size == 3


def test_aggregation_names_groups():
    features = Aggregation([-1, 0, 0, 2, 1, -1])
    expected = [[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(features(np.arange(6)), expected)
    # R. Sutton and A. Barto, 2nd ed., example 9.1: 1000 states in 10 groups.
    blocks = Aggregation.blocks(1000, 100)
    assert blocks.size == 10
    np.testing.assert_array_equal(blocks(np.arange(1000)).sum(axis=0), np.full(10, 100))
    assert blocks(99).argmax() == 0
    assert blocks(100).argmax() == 1


def test_polynomials_of_zhao_and_of_sutton_and_barto():
    # Zhao, section 8.2.4: 1, 3, 6 and 10 features of x and y, of total degree 0, 1, 2, 3; S&B 9.5.1: (n + 1)^k.
    assert [Polynomial(UNIT, order).size for order in range(4)] == [1, 3, 6, 10]
    assert [Polynomial(UNIT, order, mixed=True).size for order in range(4)] == [1, 4, 9, 16]
    # At (0.75, 0.25), x = 0.5 and y = −0.5 after centring.
    np.testing.assert_allclose(Polynomial(UNIT, 1)([0.75, 0.25]), [1, -0.5, 0.5])
    np.testing.assert_allclose(sorted(Polynomial(UNIT, 2)([0.75, 0.25])), sorted([1, 0.5, -0.5, 0.25, 0.25, -0.25]))
    # The features of a lower order come first.
    point = [[0.3, 0.9]]
    np.testing.assert_array_equal(Polynomial(UNIT, 3)(point)[:, :6], Polynomial(UNIT, 2)(point))


@pytest.mark.parametrize("mixed", [True, False])
def test_polynomials_span_every_polynomial_of_their_degree(mixed):
    points = np.random.default_rng(0).random((50, 2))
    x, y = points.T
    target = 3 - x + 2 * x * y + (4 * x**2 * y**2 if mixed else y**2)
    features = Polynomial(UNIT, 2, mixed=mixed)(points)
    solution = np.linalg.lstsq(features, target, rcond=None)[0]
    np.testing.assert_allclose(features @ solution, target, atol=1e-12)
    beyond = np.linalg.lstsq(features, x**3, rcond=None)[0]
    assert np.abs(features @ beyond - x**3).max() > 0.01


def test_fourier_features_are_orthogonal_cosines():
    features = Fourier(UNIT, 2)
    assert features.size == 9
    # R. Sutton and A. Barto, 2nd ed., eq. 9.18: cos(π s · c).
    values = {tuple(c): v for c, v in zip(features.frequencies, features([0.25, 0.5]), strict=True)}
    assert values[0, 0] == 1
    assert values[1, 0] == pytest.approx(np.cos(np.pi / 4))
    assert values[2, 1] == pytest.approx(np.cos(np.pi))
    # Of one coordinate they are orthogonal; midpoints of 20 cells integrate cosines up to order 4 exactly.
    rows = Fourier(Coordinates(0, 1), 4)((np.arange(20)[:, None] + 0.5) / 20)
    np.testing.assert_allclose(rows.T @ rows / 20, np.diag([1, 0.5, 0.5, 0.5, 0.5]), atol=1e-12)


def test_tiles_by_hand():
    # One coordinate, 2 tiles, 2 tilings, the second moved by half a tile: borders at 0.5, and at 0.25 and 0.75.
    features = TileCoding(Coordinates(0, 1), tiles=2, tilings=2)
    assert features.size == 6
    places = np.array([0.0, 0.2, 0.3, 0.6, 0.8, 1.0])[:, None]
    np.testing.assert_array_equal(features.indices(places), [[0, 3], [0, 3], [0, 4], [1, 4], [1, 5], [1, 5]])
    np.testing.assert_array_equal(features([0.3]), [1, 0, 0, 0, 1, 0])
    # R. Sutton and A. Barto, 2nd ed., section 9.5.4: asymmetric offsets are multiples of 1, 3, 5 …
    np.testing.assert_allclose(TileCoding(UNIT, 8, 4).offsets, [[0, 0], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25]])


def test_tile_coding_generalises_by_the_share_of_common_tiles():
    features = TileCoding(UNIT, tiles=4, tilings=8)
    points = np.random.default_rng(0).random((300, 2))
    rows = features(points)
    np.testing.assert_array_equal(rows.sum(axis=1), 8)
    np.testing.assert_array_equal(features.indices(points).max(axis=0) < 25 * np.arange(1, 9), True)
    np.testing.assert_array_equal(np.take_along_axis(rows, features.indices(points), axis=1), 1)
    common = rows @ rows.T
    distance = np.abs(points[:, None] - points[None])
    # Along one coordinate, a distance of d tiles is crossed by a border in d of 8 tilings; two borders add up at most.
    tiles = 4 * distance
    assert (common >= 8 - 8 * tiles.sum(axis=-1) - 2).all()
    assert (common[(tiles >= 1).any(axis=-1)] == 0).all()
    np.testing.assert_array_equal(features(points[:4].reshape(2, 2, 2)), rows[:4].reshape(2, 2, -1))


def test_coordinates_of_spaces_grids_and_tables():
    space = gymnasium.make("MountainCar-v0").observation_space
    np.testing.assert_allclose(
        Coordinates.of_space(space)([[-1.2, 0.07], [-0.3, 0.0]]), [[0, 1], [0.5, 0.5]], atol=1e-6
    )
    # What is beyond the bounds is moved to them.
    np.testing.assert_allclose(UNIT([[-3.0, 7.0]]), [[0, 1]])
    grid = Coordinates.of_grid(GridMap("S.#\n..G"))
    np.testing.assert_allclose(grid(np.arange(5)), [[0, 0], [0, 0.5], [1, 0], [1, 0.5], [1, 1]])
    np.testing.assert_allclose(Coordinates.of_table(np.arange(5))([1, 4]), [[0.25], [1]])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"coordinate 1 runs from -inf to inf: .* give low and high"):
        Coordinates.of_space(gymnasium.spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, np.inf]), dtype=float))
    limited = Coordinates.of_space(gymnasium.make("CartPole-v1").observation_space, [-5, -4, -1, -4], [5, 4, 1, 4])
    assert limited.dimensions == 4
    with pytest.raises(ValueError, match="coordinate 0 runs from 1 to 1"):
        Coordinates.of_table([[1, 2], [1, 3]])
    with pytest.raises(TypeError, match="a Box with one axis"):
        Coordinates.of_space(gymnasium.spaces.Discrete(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) do not end in 2 coordinates"):
        UNIT([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"state numbers 0 … 3, not \[0, 4\]"):
        OneHot(4)([0, 4])
    with pytest.raises(ValueError, match=r"state numbers 0 … 3, not 1\.5"):
        OneHot(4)(1.5)
    with pytest.raises(ValueError, match="without a gap"):
        Aggregation([0, 2, 2])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        FeatureTable([1.0, 2, 3])
    with pytest.raises(ValueError, match="at least 0, not -1"):
        Fourier(UNIT, -1)
    with pytest.raises(ValueError, match="one tiling, not 8 and 0"):
        TileCoding(UNIT, 8, 0)
