"""Which losses there are of a preferred and a rejected trajectory, what each compares, and mixes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from aligngym.core import objectives


@dataclass(frozen=True)
class PairScores:
    """What a policy says of B pairs, each ``[2, B]`` with the chosen side first.

    ``chosen, rejected = scores`` are what the loss compares.

    Attributes:
        log_probs: log π(y), summed over tokens or steps.
        lengths: how many there are.
        reference_log_probs: log π_ref(y); ``None`` if no loss asks for it.
        compares: which of the properties below the loss compares, or ``"log_probs"``.
    """

    log_probs: Tensor
    lengths: Tensor
    reference_log_probs: Tensor | None = None
    compares: str = "log_ratios"

    @property
    def log_ratios(self) -> Tensor:
        """Return log π(y)/π_ref(y)."""
        if self.reference_log_probs is None:
            raise ValueError("the loss was said to have no reference, and asks for log-ratios to it")
        return self.log_probs - self.reference_log_probs

    @property
    def mean_log_probs(self) -> Tensor:
        """Return log π(y) / |y|."""
        return self.log_probs / self.lengths

    @property
    def compared(self) -> Tensor:
        """Return what the loss compares."""
        found: Tensor = getattr(self, self.compares)
        return found

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.compared)


@dataclass(frozen=True)
class LossKind:
    """A preference loss: a function of the two sides.

    Attributes:
        function: takes the chosen and the rejected scores, β and the options.
        compares: what these scores are, a property of :class:`PairScores`.
        options: which options it takes.
        nll: how much of the chosen side's mean negative log-likelihood belongs to it.
    """

    function: Callable[..., Tensor]
    compares: str = "log_ratios"
    options: tuple[str, ...] = ()
    nll: float = 0.0

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.compares == "log_ratios"

    def __call__(self, scores: PairScores, *, beta: float, **options: float) -> Tensor:
        """Return ``[B]`` losses."""
        chosen, rejected = getattr(scores, self.compares)
        options = {name: value for name, value in options.items() if name in self.options}
        losses = self.function(chosen, rejected, beta=beta, **options)
        return losses + self.nll * objectives.nll_preference(*scores.mean_log_probs, beta=beta) if self.nll else losses


def of_margin(function: objectives.PreferenceLoss) -> Callable[..., Tensor]:
    """Return a loss of the two sides from a loss of their difference."""

    def of_sides(chosen: Tensor, rejected: Tensor, **options: float) -> Tensor:
        return function(chosen - rejected, **options)

    return of_sides


_SIGMOID = of_margin(objectives.sigmoid_preference)

LOSSES: Mapping[str, LossKind] = {
    "sigmoid": LossKind(_SIGMOID, options=("label_smoothing",)),
    "robust": LossKind(of_margin(objectives.robust_preference), options=("label_smoothing",)),
    "ipo": LossKind(of_margin(objectives.ipo_preference)),
    "hinge": LossKind(of_margin(objectives.hinge_preference)),
    "simpo": LossKind(of_margin(objectives.simpo_preference), "mean_log_probs", ("label_smoothing", "target_margin")),
    "cpo": LossKind(_SIGMOID, "log_probs", ("label_smoothing",), nll=1.0),
    "orpo": LossKind(objectives.odds_ratio_preference, "mean_log_probs", nll=1.0),
    "apo_zero": LossKind(objectives.apo_zero_preference),
    "apo_down": LossKind(objectives.apo_down_preference),
    "bco_pair": LossKind(objectives.bco_preference),
    "nca_pair": LossKind(objectives.nca_preference),
    "nll": LossKind(objectives.nll_preference, "mean_log_probs"),
}


def loss_weights(loss: str | Mapping[str, float]) -> dict[str, float]:
    """Return the losses of a mix by their names: ``"ipo"``, ``"sigmoid:0.8,nll:0.2"``, or a mapping.

    Raises:
        ValueError: for an unknown or repeated name, or a weight that is no positive number.
    """
    if isinstance(loss, str):
        parts = [part.strip().partition(":") for part in loss.split(",")]
        given = [(name, weight if colon else "1") for name, colon, weight in parts]
    else:
        given = [(name, str(weight)) for name, weight in loss.items()]
    weights: dict[str, float] = {}
    for name, text in given:
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}: choose from {', '.join(LOSSES)}")
        if name in weights:
            raise ValueError(f"the loss {name!r} is in the mix {loss!r} twice")
        try:
            weights[name] = float(text)
        except ValueError as error:
            raise ValueError(f"the weight of the loss {name!r} is {text!r}, and should be a number") from error
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"the weight of the loss {name!r} must be positive, not {text}")
    if not weights:
        raise ValueError(f"a mix needs at least one loss: choose from {', '.join(LOSSES)}")
    return weights
