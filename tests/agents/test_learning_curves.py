import numpy as np
import pytest
from scipy import stats

from aligngym.agents.learning_curves import draw_learning_curves


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
