"""Training a classifier on the metric it is judged by, although accuracy and F1 have no gradient.

A classifier is a policy: what it observes is an example, what it does is to name a class. A vector of labels for all N
examples is then a trajectory of N actions, and the metric of that vector is its return, whether or not it is a sum over
examples. The score function gives an unbiased gradient of the expected metric E_{ŷ ~ π}[metric(ŷ, y)], with the other
vectors of a batch as baseline: leave-one-out REINFORCE, as for a language model whose answer is judged as a whole.

Beside it stands the usual way, a smooth *surrogate* of the metric; and for linear classifiers of points in a plane the
truth, by trying every way in which a line can divide them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligngym.agents.reinforce import REINFORCE
from aligngym.core.callbacks import Metrics
from aligngym.core.gradient_agent import GradientAgent
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.schedules import Schedule
from aligngym.core.trajectories import Experience, Trajectories

#: Judges ``[k, N]`` predicted labels against the ``[N]`` true ones: ``[k]``, larger is better.
Metric = Callable[[Tensor, Tensor], Tensor]

#: A smooth loss, a number, from the ``[N]`` log-probabilities of the true labels, and those labels.
Surrogate = Callable[[Tensor, Tensor], Tensor]


def accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return the share of labels that are right: ``[k]`` for ``[k, N]`` predictions."""
    return (predicted == labels).double().mean(dim=-1)


def f1(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return F1 = 2 TP / (2 TP + FP + FN) of class 1: ``[k]`` for ``[k, N]`` predictions.

    The harmonic mean of precision and recall: C. van Rijsbergen, *Information Retrieval*, 2nd ed., 1979, chapter 7. It
    is 1 where there is nothing to find and nothing was claimed.
    """
    claimed, true = predicted == 1, labels == 1
    hits, total = (claimed & true).sum(dim=-1).double(), claimed.sum(dim=-1) + true.sum()
    return torch.where(total > 0, 2 * hits / total.clamp(min=1), 1.0)


def cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return −1/N Σ log π(y_i|x_i), the usual surrogate of accuracy: convex for a linear classifier."""
    return -log_probs.mean()


def soft_f1(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return 1 − F1 with counts replaced by their expectations, TP by Σ_{y_i = 1} π(1|x_i), and so on.

    The F1 of the expected counts is not the expected F1, though close to it for many examples.
    """
    right, true = log_probs.exp(), labels == 1
    hits, claimed = right[true].sum(), torch.where(true, right, 1 - right).sum()
    return 1 - 2 * hits / (claimed + true.sum())


class LabelSampler(Sampler):
    """Sample k vectors of labels for the same N examples; the return of a vector is its metric.

    Args:
        features: ``[N, …]``, the examples.
        labels: ``[N]`` integers from 0, the true classes.
        metric: judges a vector.
        samples: k, at least 2, because each vector is compared with the others.

    Raises:
        ValueError: if shapes do not fit, there are no examples, features are not finite, or k is below 2.
    """

    def __init__(self, features: Any, labels: Any, metric: Metric, samples: int = 16) -> None:
        if samples < 2:
            raise ValueError(f"samples={samples}: each label vector is compared with the others, so take 2 or more")
        self.features, self.labels = _checked_examples(features, labels)
        self.metric, self.samples = metric, samples
        self.metrics = {}

    def sample(self, policy: Policy, seed: int) -> Trajectories:
        generator = torch.Generator().manual_seed(seed)
        observations = self.features.expand(self.samples, *self.features.shape)
        actions, log_probs = policy.act(observations, generator=generator)
        scores = self.metric(actions, self.labels)
        self.metrics = {"return": float(scores.mean())}
        trajectories = _label_vectors(observations, actions)
        # The metric is known when the last label is, and there the episode ends.
        trajectories.rewards = torch.zeros_like(log_probs)
        trajectories.rewards[:, -1] = scores.to(log_probs.dtype)
        trajectories.log_probs = log_probs
        trajectories.truncated = torch.zeros_like(trajectories.mask)
        trajectories.terminated = torch.zeros_like(trajectories.mask)
        trajectories.terminated[:, -1] = True
        trajectories.group = torch.zeros(self.samples, dtype=torch.int64)
        return trajectories


class _Classifying(GradientAgent[Experience]):
    """What both ways have in common: acting on examples, and being judged."""

    features: Tensor
    labels: Tensor

    def act(self, observations: Any, *, greedy: bool = True) -> Tensor:
        """Return the most probable class of each example, or a random one from π."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.iteration))
        return self.policy.act(observations, greedy=greedy, generator=generator)[0]

    def evaluate(self, features: Any = None, labels: Any = None) -> Metrics:
        """Return ``accuracy`` and ``f1`` of the most probable labels, on the training examples if none are given."""
        if (features is None) != (labels is None):
            raise ValueError("give both features and labels to be judged on, or neither")
        if features is None:
            features, labels = self.features, self.labels
        features, labels = _checked_examples(features, labels)
        predicted = self.act(features)
        return {"accuracy": float(accuracy(predicted, labels)), "f1": float(f1(predicted, labels))}


class MetricTraining(_Classifying, REINFORCE):  # type: ignore[misc]
    """Maximise the expected metric of sampled labels: :class:`REINFORCE` with the other label vectors as baseline.

    The gradient is unbiased, but J is not concave: where it stops depends on the start, and on luck.

    Args:
        policy: the classifier, which sees ``[k, N, …]`` examples; a linear one is
            ``NetworkPolicy(Box(…), Discrete(classes), hidden=(), critic=None)``.
        features: ``[N, …]``, the examples.
        labels: ``[N]`` integers from 0, the true classes.
        metric: what to maximise, such as :func:`accuracy` or :func:`f1`.
        samples: k, label vectors in each step.
        learning_rate: see :class:`GradientAgent`.
        max_grad_norm: likewise.
        **options: further arguments of :class:`REINFORCE`.

    Raises:
        ValueError: as :class:`LabelSampler` does.
    """

    headline = ("return",)

    def __init__(
        self,
        policy: Policy,
        features: Any,
        labels: Any,
        metric: Metric = f1,
        *,
        samples: int = 32,
        learning_rate: float | Schedule = 0.03,
        max_grad_norm: float | None = 1.0,
        **options: Any,
    ) -> None:
        sampler = LabelSampler(features, labels, metric, samples)
        self.features, self.labels = sampler.features, sampler.labels
        super().__init__(
            policy,
            sampler,
            baseline="leave_one_out",
            discount=1.0,
            learning_rate=learning_rate,
            max_grad_norm=max_grad_norm,
            **options,
        )


class SurrogateTraining(_Classifying):
    """Minimise a smooth loss instead of the metric, on all examples at once.

    Args:
        policy: the classifier; see :class:`MetricTraining`, as for the examples.
        features: ``[N, …]``.
        labels: ``[N]``.
        surrogate: the loss, such as :func:`cross_entropy` or :func:`soft_f1`.
        learning_rate: see :class:`GradientAgent`, as for the remaining arguments.
        **options: further arguments of :class:`GradientAgent`.
    """

    def __init__(
        self,
        policy: Policy,
        features: Any,
        labels: Any,
        surrogate: Surrogate = cross_entropy,
        *,
        learning_rate: float | Schedule = 0.03,
        **options: Any,
    ) -> None:
        self.features, self.labels = _checked_examples(features, labels)
        super().__init__(policy, learning_rate=learning_rate, **options)
        self.surrogate = surrogate

    def next_batch(self) -> Experience:
        return Experience.of(_label_vectors(self.features[None], self.labels[None]))

    def losses(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[1]``, the surrogate."""
        return self.surrogate(self.model(batch).log_probs[0], batch.actions[0])[None], {}


def linear_dichotomies(points: Any) -> Tensor:
    """Return every way in which a line divides N points of a plane, each once: ``[N² − N + 2, N]`` labels 0 and 1.

    Any line can be moved, without passing a point, until it goes through two; so the lines through two points give all,
    with either label for those two. T. Cover, *Geometrical and statistical properties of systems of linear
    inequalities*, 1965, counts them. Memory grows with N³: 40 MB for 100 points.

    Args:
        points: ``[N, 2]``, no three on one line.

    Raises:
        ValueError: for fewer than two points, points of another dimension, or three on one line.
    """
    plane = torch.as_tensor(points, dtype=torch.float64)
    if plane.dim() != 2 or plane.shape[1] != 2 or len(plane) < 2:
        raise ValueError(f"points of shape {tuple(plane.shape)}: [N, 2] with two or more points is needed")
    first, second = torch.triu_indices(len(plane), len(plane), 1)
    x, y = (plane[second] - plane[first]).T
    normal = torch.stack([-y, x], dim=1)
    distance = normal @ plane.T - (normal * plane[first]).sum(dim=1, keepdim=True)
    pair = torch.arange(len(first))
    others = torch.ones_like(distance, dtype=torch.bool)
    others[pair, first] = others[pair, second] = False
    if (distance[others].abs() <= 1e-12 * (1 + plane.abs().max() ** 2)).any() or not normal.any(dim=1).all():
        raise ValueError("three of the points are on one line, or two are equal: move them a little at random")
    found = []
    for one, other in ((False, False), (False, True), (True, False), (True, True)):
        side = distance > 0
        side[pair, first], side[pair, second] = one, other
        found += [side, ~side]
    return torch.cat(found).unique(dim=0).long()


def outlying_clusters(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points for which no linear classifier is right, and the one of least cross-entropy is far from the best.

    35 points of class 0 around (−1, 0) and 50 of class 1 around (1, 0), which a line almost divides, and 15 of class 0
    far behind class 1, around (6, 1). The best line gives these up. Cross-entropy cannot: the loss of a point grows
    with its distance on the wrong side.

    Returns:
        ``[100, 2]`` features in single precision, and ``[100]`` labels.
    """
    generator = np.random.default_rng(seed)
    clusters = [((-1.0, 0.0), (0.5, 1.0), 35), ((1.0, 0.0), (0.5, 1.0), 50), ((6.0, 1.0), (0.5, 0.5), 15)]
    features = np.concatenate([generator.normal(centre, std, (size, 2)) for centre, std, size in clusters])
    return torch.from_numpy(features).float(), torch.tensor([0] * 35 + [1] * 50 + [0] * 15)


def _label_vectors(observations: Tensor, actions: Tensor) -> Trajectories:
    return Trajectories(observations, actions, torch.ones(actions.shape, dtype=torch.bool, device=actions.device))


def _checked_examples(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(features, Tensor):
        features = torch.as_tensor(features, dtype=torch.get_default_dtype())
    labels = torch.as_tensor(labels)
    if labels.dim() != 1 or not len(labels) or features.dim() < 2 or len(features) != len(labels):
        raise ValueError(
            f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)}: "
            "[N, …] examples and their [N] labels are needed, at least one"
        )
    if labels.is_floating_point() or (labels < 0).any():
        raise ValueError("labels are the numbers of classes, integers from 0")
    if not features.isfinite().all():
        row = int((~features.isfinite()).flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(f"features of example {row} are not finite: {features[row].tolist()}")
    return features, labels.long()
