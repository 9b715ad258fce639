import numpy as np
import pytest
from scipy import stats

from aligngym.agents.learning_curves import draw_comparison, draw_learning_curves
from aligngym.core.statistics import bootstrap_interval, interquartile_mean


def test_means_bands_and_exact_lines_are_what_they_say():
    runs = np.random.default_rng(0).normal(size=(6, 12)).cumsum(axis=1)
    figure = draw_learning_curves({"a": runs, "b": runs[0]}, {"a": 1.5, "b": -2.0}, points=np.arange(12) * 10, smooth=3)
    (axes,) = figure.axes
    a, b, exact_a, exact_b = axes.lines
    smoothed = np.array([[run[k - 2 : k + 1].mean() for k in range(2, 12)] for run in runs])
    np.testing.assert_allclose(a.get_xdata(), np.arange(2, 12) * 10)
    np.testing.assert_allclose(a.get_ydata(), smoothed.mean(axis=0))
    np.testing.assert_allclose(b.get_ydata(), smoothed[0])
    assert exact_a.get_ydata()[0] == 1.5
    assert exact_b.get_ydata()[0] == -2.0
    assert [exact_a.get_color(), exact_b.get_color()] == [a.get_color(), b.get_color()]
    # One band: a single run has none. Its edges are scipy's own interval of a mean.
    (band,) = axes.collections
    low, high = stats.t.interval(0.95, 5, smoothed.mean(axis=0), stats.sem(smoothed, axis=0))
    edges = band.get_paths()[0].vertices
    for x, below, above in zip(np.arange(2, 12) * 10, low, high, strict=True):
        found = edges[edges[:, 0] == x][:, 1]
        np.testing.assert_allclose([found.min(), found.max()], [below, above])


def test_one_exact_value_for_all_is_in_the_legend():
    axes = draw_learning_curves({"a": [1.0, 2.0]}, 3.0).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "exact"]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2])


@pytest.mark.parametrize(
    ("curve", "options"),
    [([1.0, 2.0], {"points": [1]}), ([1.0, 2.0], {"smooth": 3}), (np.zeros((2, 2, 2)), {}), ([1.0], {"smooth": 0})],
)
def test_curves_that_do_not_fit_are_named(curve, options):
    with pytest.raises(ValueError, match="curve 'mine'"):
        draw_learning_curves({"mine": curve}, **options)


def test_exact_values_of_no_curve_are_refused():
    with pytest.raises(ValueError, match=r"\['b'\], which are no curves"):
        draw_learning_curves({"a": [1.0]}, {"a": 1.0, "b": 2.0})


def test_the_interquartile_mean_has_a_bootstrap_band():
    """Each point is the middle half's mean, and each edge the bootstrap interval of that point alone."""
    runs = np.random.default_rng(1).normal(size=(8, 5))
    runs[0] -= 100
    (axes,) = draw_learning_curves({"a": runs, "b": runs[0]}, statistic="iqm").axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.sort(runs, axis=0)[2:6].mean(axis=0))
    np.testing.assert_allclose(axes.lines[1].get_ydata(), runs[0])
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    for point in range(5):
        found = edges[edges[:, 0] == point + 1][:, 1]
        np.testing.assert_allclose([found.min(), found.max()], bootstrap_interval(runs[:, point]))


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="one of mean, iqm, not 'median'"):
        draw_learning_curves({"a": [1.0]}, statistic="median")


def test_a_comparison_shows_middles_intervals_and_scores():
    generator = np.random.default_rng(0)
    scores = {"first": generator.normal(size=(6, 3)), "second": generator.normal(size=(9, 3)) + 2}
    (axes,) = draw_comparison(scores, 4.0, confidence=0.9, seed=3).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert axes.yaxis_inverted()
    first_middle, first_dots, second_middle, second_dots = axes.collections
    middles, dots = (first_middle, second_middle), (first_dots, second_dots)
    for row, values in enumerate(scores.values()):
        bar = axes.patches[row]
        low, high = bootstrap_interval(values, confidence=0.9, seed=3)
        np.testing.assert_allclose([bar.get_x(), bar.get_x() + bar.get_width()], [low, high])
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(row)
        np.testing.assert_allclose(middles[row].get_paths()[0].vertices[:, 0], interquartile_mean(values))
        np.testing.assert_allclose(dots[row].get_offsets()[:, 0], values.ravel())
    assert axes.lines[0].get_xdata()[0] == 4.0
    assert "90%" in axes.get_xlabel()


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one algorithm"):
        draw_comparison({})
    with pytest.raises(ValueError, match="two or more runs"):
        draw_comparison({"once": [1.0]})
