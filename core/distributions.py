"""Distributions over actions: what a policy's outputs mean.

Unlike torch's, they draw from an explicit generator, and check nothing: their numbers come from our own networks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor


class ActionDistribution(ABC):
    """A distribution over actions for each of ``[…]`` observations."""

    @abstractmethod
    def log_prob(self, actions: Tensor) -> Tensor:
        """Return ``[…]``, the log-probability (or log-density) of an action for each observation."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Return ``[…]``, the (differential) entropy in nats."""

    @abstractmethod
    def divergence(self, other: Self) -> Tensor:
        """Return ``[…]``, KL(self‖other) in nats."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw an action for each observation."""

    @abstractmethod
    def mode(self) -> Tensor:
        """Return the most probable action for each observation."""

    @abstractmethod
    def detach(self) -> Self:
        """Return the same distribution without gradients."""


class Categorical(ActionDistribution):
    """π(a) ∝ exp(logits[a]) over A discrete actions.

    Args:
        logits: ``[…, A]``.
        allowed: ``[…, A]`` booleans; actions where it is false have probability 0.
    """

    def __init__(self, logits: Tensor, allowed: Tensor | None = None) -> None:
        if allowed is not None:
            # Finite, because 0 · (−∞) in an entropy would be NaN.
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        self.log_probs = logits.log_softmax(dim=-1)

    @property
    def probabilities(self) -> Tensor:
        """``[…, A]``."""
        return self.log_probs.exp()

    def log_prob(self, actions: Tensor) -> Tensor:
        return self.log_probs.gather(-1, actions[..., None])[..., 0]

    def entropy(self) -> Tensor:
        return -(self.probabilities * self.log_probs).sum(dim=-1)

    def divergence(self, other: Self) -> Tensor:
        return (self.probabilities * (self.log_probs - other.log_probs)).sum(dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        rows = self.probabilities.reshape(-1, self.log_probs.shape[-1])
        return torch.multinomial(rows, 1, generator=generator).reshape(self.log_probs.shape[:-1])

    def mode(self) -> Tensor:
        return self.log_probs.argmax(dim=-1)

    def detach(self) -> Self:
        return type(self)(self.log_probs.detach())


class DiagonalGaussian(ActionDistribution):
    """N(mean, diag(exp(log_std)²)) over D real numbers.

    Args:
        mean: ``[…, D]``.
        log_std: broadcast to the mean's shape.
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = mean, log_std.expand_as(mean)

    def log_prob(self, actions: Tensor) -> Tensor:
        standardised = (actions - self.mean) / self.log_std.exp()
        return -(standardised**2 / 2 + self.log_std + math.log(2 * math.pi) / 2).sum(dim=-1)

    def entropy(self) -> Tensor:
        return (self.log_std + (1 + math.log(2 * math.pi)) / 2).sum(dim=-1)

    def divergence(self, other: Self) -> Tensor:
        variances = (2 * (self.log_std - other.log_std)).exp()
        distance = ((self.mean - other.mean) / other.log_std.exp()) ** 2
        return ((variances + distance - 1) / 2 + other.log_std - self.log_std).sum(dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def detach(self) -> Self:
        return type(self)(self.mean.detach(), self.log_std.detach())
