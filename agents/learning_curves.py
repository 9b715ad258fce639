"""Learning curves: what many runs did, beside what is exactly true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.special import stdtrit

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_learning_curves(
    curves: Mapping[str, ArrayLike],
    exact: Mapping[str, float] | float | None = None,
    *,
    points: ArrayLike | None = None,
    smooth: int = 1,
    xlabel: str = "episode",
    ylabel: str = "",
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draw the mean of several runs with its 95 % confidence band, and exact values as dotted lines.

    Args:
        curves: for each label ``[runs, points]``, or ``[points]`` for one run, which has no band. The band is
            mean ± t · s / √runs, s being the standard deviation over runs and t Student's quantile.
        exact: the value to compare with, or one for each label, which gets that label's colour.
        points: ``[points]``, where the points stand on the x axis; 1, 2, … if not given.
        smooth: average each run over so many consecutive points first, and draw the average at the last of them.
        xlabel: below the x axis.
        ylabel: beside the y axis.
        title: above the picture.
        axes: matplotlib axes to draw into; a new figure if not given.

    Returns:
        The matplotlib figure, to be saved with ``figure.savefig("curves.png")``.

    Raises:
        ValueError: if a curve is neither a table nor a row, is shorter than ``smooth``, or does not fit ``points``; or
            if ``exact`` names a label that is no curve.
    """
    if axes is None:
        figure = Figure(figsize=(7, 4.4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
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
        x, mean = x[smooth - 1 :], runs.mean(axis=0)
        (lines[label],) = axes.plot(x, mean, label=label, linewidth=1.6)
        if len(runs) > 1:
            half = stdtrit(len(runs) - 1, 0.975) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
            axes.fill_between(x, mean - half, mean + half, color=lines[label].get_color(), alpha=0.18, linewidth=0)
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
