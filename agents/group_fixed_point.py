"""Where group-relative methods come to rest, exactly, for a softmax over a few outcomes.

The expectation over all groups of G is a sum over how often each of V outcomes is in the group, of which there are
(V + G − 1 choose G). The conditions are derived in :class:`~aligngym.agents.GRPO`.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, log_softmax, softmax

from aligngym.core.advantages import group_normalised

#: The most groups to list.
LARGEST_LIST = 1_000_000


class GroupAdvantages:
    """A_π(y), the mean of the advantage of outcome y in a group of G whose other members π draws.

    Args:
        rewards: ``[V]``, the return of every outcome.
        group_size: G, at least 2.
        scale: whether advantages are divided by the standard deviation of the group, as in
            :func:`aligngym.core.advantages.group_normalised`, which computes them.

    Raises:
        ValueError: for fewer than two outcomes or members, or too many groups to list.
    """

    def __init__(self, rewards: ArrayLike, group_size: int, scale: bool = True) -> None:
        self.rewards = np.asarray(rewards, dtype=np.float64)
        if self.rewards.ndim != 1 or len(self.rewards) < 2 or group_size < 2:
            raise ValueError(
                f"groups of {group_size} among rewards of shape {self.rewards.shape}: 2 of each are needed"
            )
        count = math.comb(len(self.rewards) + group_size - 1, group_size)
        if count > LARGEST_LIST:
            raise ValueError(f"there are {count} different groups, more than {LARGEST_LIST}: make group_size smaller")
        self.group_size = group_size
        groups = np.array(list(combinations_with_replacement(range(len(self.rewards)), group_size)))
        member = groups[:, :, None] == np.arange(len(self.rewards))
        self._counts = member.sum(axis=1)
        self._log_orders = gammaln(group_size + 1) - gammaln(self._counts + 1).sum(axis=1)
        number = torch.arange(len(groups)).repeat_interleave(group_size)
        advantages = group_normalised(torch.from_numpy(self.rewards[groups]).flatten(), number, scale)
        self._totals = (advantages.view(groups.shape).numpy()[:, :, None] * member).sum(axis=1)

    def __call__(self, policy: ArrayLike) -> NDArray[np.float64]:
        """Return ``[V]`` for a policy, ``[V]`` positive probabilities."""
        probabilities = np.asarray(policy, dtype=np.float64)
        weights = np.exp(self._log_orders + self._counts @ np.log(probabilities))
        # The G members are alike, so π(y) A_π(y) is a G-th of what all of them that are y have on average.
        return weights @ self._totals / (self.group_size * probabilities)


def group_fixed_point(
    rewards: ArrayLike,
    reference: ArrayLike,
    beta: float,
    group_size: int,
    kl: str = "k3",
    scale: bool = True,
    tolerance: float = 1e-10,
    max_iterations: int = 1_000_000,
) -> NDArray[np.float64]:
    """Return ``[V]``, the policy at which GRPO's expected step over V outcomes is 0, reached from the reference.

    It follows the natural gradient, log π ← log π + α (A_π − β g) with g = 1 − π_ref/π for k3 and log π/π_ref for k2,
    so that what it finds is a fixed point that attracts.

    Args:
        rewards: ``[V]``.
        reference: ``[V]``, π_ref, positive.
        beta: β > 0.
        group_size: G ≥ 2.
        kl: ``"k3"`` or ``"k2"`` as a loss, or ``"reward"``, whose fixed point is π_ref exp(R/β), normalised.
        scale: whether advantages are divided by the standard deviation of the group.
        tolerance: the largest ‖A_π − β g − its mean‖∞ to stop at.
        max_iterations: the most steps.

    Raises:
        ValueError: for an unknown ``kl``, a β that is not positive, or a reference that is no distribution over V.
        ArithmeticError: if the tolerance is not reached.
    """
    base = np.asarray(reference, dtype=np.float64)
    if kl not in ("reward", "k2", "k3"):
        raise ValueError(f"kl is 'reward', 'k2' or 'k3', not {kl!r}")
    if not 0 < beta < np.inf:
        raise ValueError(f"beta is positive and finite, not {beta}")
    advantages = GroupAdvantages(rewards, group_size, scale)
    if base.shape != advantages.rewards.shape or not (base > 0).all() or not np.isclose(base.sum(), 1):
        raise ValueError(
            f"the reference is a positive distribution over {len(advantages.rewards)} outcomes, not {base}"
        )
    log_reference = np.log(base / base.sum())
    if kl == "reward":
        return softmax(log_reference + advantages.rewards / beta)
    log_policy, step = log_reference, 0.2 / (beta + 1)
    for _ in range(max_iterations):
        policy, log_ratio = np.exp(log_policy), log_policy - log_reference
        direction = advantages(policy) - beta * (log_ratio if kl == "k2" else -np.expm1(-log_ratio))
        direction -= policy @ direction
        if np.abs(direction).max() <= tolerance:
            return policy
        log_policy = log_softmax(log_policy + step * direction)
    raise ArithmeticError(f"no fixed point within {tolerance} after {max_iterations} steps: raise beta or tolerance")
