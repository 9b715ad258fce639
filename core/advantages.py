"""Advantages and returns: pure functions of rewards, values and ends, all ``[B, T]``.

An episode may end inside a row in two ways. *Terminated*: nothing follows, and the value of what follows is 0.
*Truncated*: only the recording stopped, and what follows is worth ``next_values``. Both cut the recursion; only
termination removes the bootstrap. Every estimator below gets this from :func:`gae` or :func:`discounted_returns`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_sums(terms: Tensor, decay: Tensor) -> Tensor:
    """Return x_t = terms_t + decay_t · x_{t+1} along the second axis, with x_{T} = 0; both ``[B, T]``."""
    sums = torch.zeros_like(terms)
    following = torch.zeros_like(terms[:, 0])
    for t in reversed(range(terms.shape[1])):
        following = terms[:, t] + decay[:, t] * following
        sums[:, t] = following
    return sums


def cuts(terminated: Tensor, truncated: Tensor) -> Tensor:
    """Return ``[B, T]`` booleans, where something would follow that is not in the row: truncations and open ends."""
    cut = truncated.clone()
    cut[:, -1] = True
    return cut & ~terminated


def discounted_returns(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discount: float,
    next_values: Tensor | None = None,
) -> Tensor:
    """Return the Monte Carlo returns G_t = r_t + γ G_{t+1}, bootstrapped where a row or episode was cut short.

    Args:
        rewards: ``[B, T]``.
        terminated: ``[B, T]`` booleans.
        truncated: ``[B, T]`` booleans.
        discount: γ in [0, 1].
        next_values: ``[B, T]``, V of the state after each step, used only at truncation and at a row's open end;
            without it what follows a cut is taken as 0.
    """
    cut = cuts(terminated, truncated)
    bootstrap = torch.zeros_like(rewards) if next_values is None else discount * cut * next_values
    return discounted_sums(rewards + bootstrap, discount * (~(terminated | truncated)).to(rewards.dtype))


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discount: float,
    trace: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Return generalised advantage estimates A_t = δ_t + γλ A_{t+1}, with δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    J. Schulman et al., *High-dimensional continuous control using GAE*, 2016, eq. 16. λ = 0 is the one-step TD error,
    λ = 1 the Monte Carlo return minus the value; A + V is the λ-return.

    Args:
        rewards: ``[B, T]``.
        values: ``[B, T]``, V(s_t).
        next_values: ``[B, T]``, V(s_{t+1}); ignored where ``terminated``.
        terminated: ``[B, T]`` booleans.
        truncated: ``[B, T]`` booleans.
        discount: γ in [0, 1].
        trace: λ in [0, 1].
        mask: ``[B, T]`` booleans; steps where it is false are stepped over, and their advantage is 0.
    """
    deltas, decay = _td_errors(rewards, values, next_values, terminated, truncated, discount, trace)
    if mask is not None:
        deltas, decay = deltas * mask, decay.where(mask, 1.0)
    advantages = discounted_sums(deltas, decay)
    return advantages if mask is None else advantages * mask


def v_trace(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    ratios: Tensor,
    discount: float,
    trace: float,
    mask: Tensor,
) -> Tensor:
    """Return A_t = δ_t + γλ ρ_{t+1} A_{t+1}, with δ_t = r_t + γ V(s_{t+1}) − V(s_t): V-trace's advantages.

    V + ρA are its targets for the critic. L. Espeholt et al., *IMPALA*, 2018, eq. 1 with ρ̄ = c̄ and remark 2, and for
    the actor r + γ v_{t+1} − V at λ = 1. Where all ρ are 1 it is :func:`gae`.

    Args:
        rewards: ``[B, T]``.
        values: ``[B, T]``, V(s_t).
        next_values: ``[B, T]``, V(s_{t+1}); ignored where ``terminated``.
        terminated: ``[B, T]`` booleans.
        truncated: ``[B, T]`` booleans.
        ratios: ``[B, T]``, ρ_t, cut or not.
        discount: γ in [0, 1].
        trace: λ in [0, 1].
        mask: ``[B, T]`` booleans; steps where it is false are stepped over, and their advantage is 0.
    """
    deltas, decay = _td_errors(rewards, values, next_values, terminated, truncated, discount, trace)
    # ρA, what the critic's targets differ from its values by, has a recursion without a look at the next ratio.
    corrections = discounted_sums(ratios * deltas * mask, (ratios * decay).where(mask, 1.0))
    following = torch.cat([corrections[:, 1:], torch.zeros_like(corrections[:, :1])], dim=1)
    return (deltas + decay * following) * mask


def n_step_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, discount: float, n: int
) -> Tensor:
    """Return r_t + γ r_{t+1} + … + γ^n V(s_{t+n}), over fewer steps where the episode or the row ends before.

    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., eq. 7.1.

    Raises:
        ValueError: if ``n`` is less than 1.
    """
    if n < 1:
        raise ValueError(f"n is a number of steps, at least 1, not {n}")
    bootstrapped = rewards + discount * next_values * ~terminated
    goes_on = ~(terminated | truncated)
    returns = bootstrapped
    for _ in range(n - 1):
        # The last column has no following step in this row, so it keeps its one-step bootstrap.
        longer = rewards[:, :-1] + discount * returns[:, 1:]
        returns = torch.cat([torch.where(goes_on[:, :-1], longer, bootstrapped[:, :-1]), bootstrapped[:, -1:]], dim=1)
    return returns


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """Return each return minus the mean of the *others* in its group, an unbiased baseline.

    W. Kool et al., *Buy 4 REINFORCE samples, get a baseline for free!*, 2019; RLOO: A. Ahmadian et al., 2024.

    Args:
        returns: ``[B]``.
        group: ``[B]`` integers.

    Raises:
        ValueError: if a group has a single member.
    """
    mean, count = _group_means(returns, group)
    if (count < 2).any():
        raise ValueError("leaving one out needs at least two members in every group")
    return (returns - mean) * count / (count - 1)


def group_normalised(returns: Tensor, group: Tensor, scale: bool = True, epsilon: float = 1e-4) -> Tensor:
    """Return (G − mean of the group) / (standard deviation of the group + ε), GRPO's advantage.

    Z. Shao et al., *DeepSeekMath*, 2024, section 4.1.2; with ``scale=False``, Dr. GRPO's (Z. Liu et al., 2025), which
    leaves the standard deviation out and keeps the objective's optimum.

    Args:
        returns: ``[B]``.
        group: ``[B]`` integers.
        scale: whether to divide by the group's (unbiased) standard deviation.
        epsilon: keeps groups of equal returns finite; their advantages are 0.
    """
    mean, count = _group_means(returns, group)
    centred = returns - mean
    if not scale:
        return centred
    mean_square, _ = _group_means(centred**2, group)
    deviation = (mean_square * count / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation + epsilon)


def best_of_groups(returns: Tensor, group: Tensor) -> Tensor:
    """Return ``[groups]``, in order of the groups, the row of the largest return of each; the first of several.

    Args:
        returns: ``[B]``.
        group: ``[B]`` integers.
    """
    members = [(group == number).nonzero()[:, 0] for number in group.unique()]
    return torch.stack([rows[returns[rows].argmax()] for rows in members])


def _td_errors(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discount: float,
    trace: float,
) -> tuple[Tensor, Tensor]:
    """Return ``[B, T]`` δ_t, and what each step takes over from the next: γλ, or 0 where an episode ends."""
    deltas = rewards + discount * next_values * ~terminated - values
    return deltas, discount * trace * (~(terminated | truncated)).to(rewards.dtype)


def _group_means(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every row, the mean over its group and the group's size, both ``[B]``."""
    _, index, count = group.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(count), dtype=values.dtype, device=values.device)
    # Counted from the smallest of the group, so that the mean of equal values is exactly theirs.
    smallest = zeros.scatter_reduce(0, index, values, "amin", include_self=False)[index]
    sums = zeros.index_add(0, index, values - smallest)
    size = count[index].to(values.dtype)
    return smallest + sums[index] / size, size
