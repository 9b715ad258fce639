"""Learning curves and comparisons: what many runs did, beside what is exactly true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_learning_curves(
    curves: Mapping[str, ArrayLike],
    exact: Mapping[str, float] | float | None = None,
    *,
    points: ArrayLike | None = None,
    smooth: int = 1,
    statistic: str = "mean",
    xlabel: str = "episode",
    ylabel: str = "",
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draw the middle of several runs with its 95 % confidence band, and exact values as dotted lines.

    Args:
        curves: for each label ``[runs, points]``, or ``[points]`` for one run, which has no band.
        exact: the value to compare with, or one for each label, which gets that label's colour.
        points: ``[points]``, where the points stand on the x axis; 1, 2, … if not given.
        smooth: average each run over so many consecutive points first, and draw the average at the last of them.
        statistic: ``"mean"``, with the band mean ± t · s / √runs, s being the standard deviation over runs and t
            Student's quantile; or ``"iqm"``, the interquartile mean with a bootstrap band, which single runs that
            failed move less.
        xlabel: below the x axis.
        ylabel: beside the y axis.
        title: above the picture.
        axes: matplotlib axes to draw into; a new figure if not given.

    Returns:
        The matplotlib figure, to be saved with ``figure.savefig("curves.png")``.

    Raises:
        ValueError: if a curve is neither a table nor a row, is shorter than ``smooth``, or does not fit ``points``; if
            ``exact`` names a label that is no curve; or for an unknown statistic.
    """
    if statistic not in _MIDDLES:
        raise ValueError(f"statistic is one of {', '.join(_MIDDLES)}, not {statistic!r}")
    axes = axes or _new_axes(height=4.4)
    lines = {}
    for label, curve in curves.items():
        runs = np.atleast_2d(np.asarray(curve, dtype=np.float64))
        x = np.arange(1, runs.shape[1] + 1) if points is None else np.asarray(points)
        if runs.ndim != 2 or not 1 <= smooth <= runs.shape[1] or x.shape != runs.shape[1:]:
            raise ValueError(
                f"curve {label!r} has shape {np.shape(curve)}: [runs, points], with one of {x.shape} points for each "
                f"and at least {smooth}, is needed"
            )
        runs = np.lib.stride_tricks.sliding_window_view(runs, smooth, axis=1).mean(axis=2)
        x = x[smooth - 1 :]
        middle, *band = _MIDDLES[statistic](runs) if len(runs) > 1 else (runs[0],)
        (lines[label],) = axes.plot(x, middle, label=label, linewidth=1.6)
        if band:
            axes.fill_between(x, *band, color=lines[label].get_color(), alpha=0.18, linewidth=0)
    if isinstance(exact, Mapping):
        if exact.keys() - lines.keys():
            raise ValueError(f"exact values of {sorted(exact.keys() - lines.keys())}, which are no curves")
        for label, value in exact.items():
            axes.axhline(value, color=lines[label].get_color(), linestyle=":", linewidth=1.4)
    elif exact is not None:
        axes.axhline(exact, color="black", linestyle=":", linewidth=1.4, label="exact")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="dotted: exact" if isinstance(exact, Mapping) else None)
    return axes.get_figure(root=True)  # type: ignore[return-value]


def draw_comparison(
    scores: Mapping[str, ArrayLike],
    exact: float | None = None,
    *,
    confidence: float = 0.95,
    xlabel: str = "interquartile mean",
    title: str = "",
    seed: int = 0,
    axes: Axes | None = None,
) -> Figure:
    """Draw each algorithm's interquartile mean and its stratified bootstrap interval, one bar per algorithm.

    R. Agarwal et al., *Deep reinforcement learning at the edge of the statistical precipice*, 2021, section 4.3. The
    dots are single scores.

    Args:
        scores: for each algorithm ``[runs]``, or ``[runs, tasks]`` with tasks on the same scale; the first is drawn at
            the top.
        exact: the best score there can be, as a dotted line.
        confidence: of the intervals, in (0, 1).
        xlabel: below the x axis.
        title: above the picture.
        seed: of the bootstrap.
        axes: matplotlib axes to draw into; a new figure if not given.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: if there is nothing to compare, or as :func:`~aligngym.core.statistics.bootstrap_interval` does.
    """
    from aligngym.core.statistics import bootstrap_interval, interquartile_mean

    if not scores:
        raise ValueError("there is nothing to compare: give the scores of at least one algorithm")
    axes = axes or _new_axes(height=1.5 + 0.5 * len(scores))
    for row, values in enumerate(scores.values()):
        low, high = bootstrap_interval(values, confidence=confidence, seed=seed)
        colour = f"C{row % 10}"
        axes.barh(row, high - low, left=low, height=0.62, color=colour, alpha=0.35, linewidth=0)
        axes.vlines(interquartile_mean(values), row - 0.31, row + 0.31, color=colour, linewidth=2.4)
        single = np.ravel(values)
        axes.scatter(single, np.full(len(single), row), s=9, color=colour, linewidth=0, zorder=3)
    if exact is not None:
        axes.axvline(exact, color="black", linestyle=":", linewidth=1.4, label="exact")
        axes.legend(frameon=False)
    axes.set(xlabel=f"{xlabel}, {confidence:.0%} interval", title=title, yticks=range(len(scores)))
    axes.set_yticklabels(list(scores))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes.get_figure(root=True)  # type: ignore[return-value]


def _new_axes(height: float) -> Axes:
    figure = Figure(figsize=(7, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _mean(runs: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    mean = runs.mean(axis=0)
    half = stdtrit(len(runs) - 1, 0.975) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    return mean, mean - half, mean + half


def _interquartile_mean(runs: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    # scipy.stats takes a second to import, which those who draw means need not wait for.
    from aligngym.core.statistics import bootstrap_interval, interquartile_mean

    return interquartile_mean(runs, axis=0), *bootstrap_interval(runs[:, None])


#: For each statistic, the middle of ``[runs, points]`` and the two edges of its band, all ``[points]``.
_MIDDLES = {"mean": _mean, "iqm": _interquartile_mean}
