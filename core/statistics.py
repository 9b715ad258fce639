"""How sure one can be of what was measured: a share of successes, or scores over runs and tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    E. Wilson, *Probable inference, the law of succession, and statistical inference*, 1927. Unlike the normal
    interval it is right near 0 and 1 and for few trials.

    Raises:
        ValueError: if there are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion")
    z = float(stats.norm.ppf((1 + confidence) / 2))
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return centre - half, centre + half


class Estimate(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


def interquartile_mean(scores: ArrayLike, axis: int | None = None) -> Any:
    """Return the mean of the middle half of the scores, the lowest and the highest quarter left out.

    As robust to outliers as the median nearly is, and less noisy. R. Agarwal et al., *Deep reinforcement learning at
    the edge of the statistical precipice*, 2021, section 4.3. Of n scores ⌊n/4⌋ are left out at either end.

    Args:
        scores: any shape, commonly ``[runs, tasks]``, each task normalised to the same scale.
        axis: which axis to reduce; ``None`` pools all scores.

    Returns:
        A number, or an array of the remaining axes.
    """
    return stats.trim_mean(scores, 0.25, axis=axis)


def bootstrap_interval(
    scores: ArrayLike,
    statistic: Callable[..., Any] = interquartile_mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Return the percentile interval of a statistic by a stratified bootstrap: runs are redrawn within each task.

    R. Agarwal et al., 2021, section 4.1; B. Efron, *Bootstrap methods: another look at the jackknife*, 1979. With few
    runs it is too narrow, however many tasks there are: redrawn runs vary by √((runs − 1)/runs) of what new runs would,
    so that a claimed 95 % are about 89 % with three runs, and 94 % with ten.

    Args:
        scores: ``[runs]`` of one task, ``[runs, tasks]``, or ``[runs, tasks, points]``, for which every point gets an
            interval of its own (the runs are redrawn as wholes).
        statistic: of all runs and tasks pooled; takes ``axis`` as numpy's reductions do, such as ``np.mean``.
        confidence: the probability with which the interval should hold the truth, in (0, 1).
        resamples: how many times to redraw.
        seed: of the draws.

    Returns:
        The lower and the upper end, numbers or ``[points]``.

    Raises:
        ValueError: if there are fewer than two runs, a score is not finite, or ``confidence`` or ``resamples`` is out
            of range.
    """
    tasks = _by_task(scores, "scores")

    def pooled(*redrawn: NDArray[np.float64], axis: int) -> Any:
        return statistic(np.concatenate(redrawn, axis=axis), axis=axis)

    return _percentile_interval(tasks, pooled, confidence, resamples, seed)


def probability_of_improvement(
    x: ArrayLike, y: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return how probable it is that a run of X scores higher than a run of Y, on a task drawn at random.

    The mean over tasks of P(X > Y) + ½ P(X = Y), which is Mann and Whitney's U over the number of pairs, with a
    stratified bootstrap interval: R. Agarwal et al., 2021, section 4.3. It says how often, not by how much.

    Args:
        x: ``[runs]`` or ``[runs, tasks]``.
        y: the same tasks; the number of runs may differ.
        confidence: see :func:`bootstrap_interval`, as for the others.
        resamples: how many times to redraw.
        seed: of the draws.

    Raises:
        ValueError: if the tasks differ, and as :func:`bootstrap_interval` does.
    """
    ours, theirs = _by_task(x, "x"), _by_task(y, "y")
    if len(ours) != len(theirs):
        raise ValueError(f"x has {len(ours)} tasks and y has {len(theirs)}: give both the same, in the same order")

    def mean_over_tasks(*redrawn: NDArray[np.float64], axis: int) -> Any:
        # scipy moves the runs to the last axis before it calls this.
        pairs = zip(redrawn[: len(ours)], redrawn[len(ours) :], strict=True)
        wins = [np.sign(a[..., :, None] - b[..., None, :]).mean(axis=(-2, -1)) for a, b in pairs]
        return (1 + np.mean(wins, axis=0)) / 2

    low, high = _percentile_interval((*ours, *theirs), mean_over_tasks, confidence, resamples, seed)
    return Estimate(float(mean_over_tasks(*ours, *theirs, axis=-1)), float(low), float(high))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> NDArray[np.float64]:
    """Return ``[thresholds]``, the share of all runs and tasks that scored above each threshold.

    R. Agarwal et al., 2021, section 4.2. For scores in [0, 1] the area under it is their mean, its height is ½ at their
    median, and a curve that is nowhere below another belongs to the better distribution. Its band is
    ``bootstrap_interval(scores[..., None] > thresholds, np.mean)`` with ``[runs, tasks]`` scores.

    Args:
        scores: any shape.
        thresholds: ``[thresholds]``.
    """
    scores = np.asarray(scores, dtype=np.float64).reshape(-1, 1)
    return np.asarray((scores > np.asarray(thresholds)).mean(axis=0))


def steps_to_threshold(curve: ArrayLike, points: ArrayLike, threshold: float) -> Any:
    """Return after how many steps a learning curve is first at ``threshold`` or above: its sample efficiency.

    Nothing is interpolated: the answer is one of ``points``. A noisy curve gets there by luck; smooth it first.

    Args:
        curve: ``[points]``, or ``[runs, points]``.
        points: ``[points]``, the steps done at each point of the curve, rising.
        threshold: the score to reach.

    Returns:
        A number, or ``[runs]``; infinite for a run that never gets there.

    Raises:
        ValueError: if the shapes do not fit, or the points do not rise.
    """
    curve, points = np.asarray(curve, dtype=np.float64), np.asarray(points, dtype=np.float64)
    if points.ndim != 1 or curve.shape[-1:] != points.shape or not len(points) or curve.ndim > 2:
        raise ValueError(
            f"a curve of shape {curve.shape} with {points.shape} points: [points] or [runs, points] needed"
        )
    if not (np.diff(points) > 0).all():
        raise ValueError("points are the steps done so far, so every one must be larger than the one before")
    reached = curve >= threshold
    steps = np.where(reached.any(axis=-1), points[reached.argmax(axis=-1)], np.inf)
    return float(steps) if curve.ndim == 1 else steps


def _by_task(scores: ArrayLike, name: str) -> tuple[NDArray[np.float64], ...]:
    """Return the runs of each task, ``[runs]`` or ``[points, runs]``, checked."""
    table = np.asarray(scores, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim not in (2, 3) or len(table) < 2 or not table.size:
        raise ValueError(f"{name} of shape {np.shape(scores)}: [runs] or [runs, tasks] with two or more runs needed")
    if not np.isfinite(table).all():
        place = tuple(int(index) for index in np.argwhere(~np.isfinite(table))[0])
        raise ValueError(f"{name}{list(place)} is {table[place]} (run, task): a run that failed needs a score, too")
    return tuple(np.moveaxis(table, (1, 0), (0, -1)))


def _percentile_interval(
    samples: tuple[NDArray[np.float64], ...],
    statistic: Callable[..., Any],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[Any, Any]:
    """Redraw each sample along its last axis, independently of the others."""
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence in (0, 1) and resamples ≥ 1 are needed, not {confidence} and {resamples}")
    result = stats.bootstrap(
        samples,
        statistic,
        axis=-1,
        vectorized=True,
        n_resamples=resamples,
        batch=100,  # bounds the memory
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return result.confidence_interval
