"""Policy gradients without sampling: what every estimate of one should be on average.

All is for a softmax over a table, π(a | s) ∝ exp θ(s, a), and the expected discounted return J = Σ_s μ(s) v_π(s), with
episodes that start from μ. For another policy with logits θ(w) the chain rule does the rest: ∂J/∂w = (∂θ/∂w)ᵀ ∂J/∂θ, in
torch ``logits.backward(policy_gradient(…))``. The gradient of an objective with a penalty is the one in the model that
:func:`penalised` returns.

A policy is ``[S, A]`` probabilities, or a :class:`~aligngym.core.TabularPolicy`, of whose logits the softmax is taken
in float64 (float32 probabilities do not sum to one closely enough).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import block_diag
from scipy.sparse import csr_array, eye_array
from scipy.sparse.linalg import spsolve
from scipy.special import softmax

from aligngym.agents.markov_chain import checked_policy, markov_chain, stuck_state
from aligngym.envs.tabular_mdp import TabularMDP

if TYPE_CHECKING:
    from aligngym.core import TabularPolicy

Table: TypeAlias = NDArray[np.float64]

#: The most entries of a policy of which the Fisher matrix is written down: half a gigabyte.
LARGEST_FISHER = 8192


def expected_return(mdp: TabularMDP, policy: ArrayLike | TabularPolicy, discount: float) -> float:
    """Return J = E[Σ_t γ^t r_t] = Σ_s μ(s) v_π(s), over the distribution of the first state.

    Raises:
        ValueError: if the policy or the discount does not fit, or the value is not finite.
    """
    _check_discount(discount)
    return float(mdp.initial @ mdp.evaluate(_probabilities(mdp, policy), discount))


def advantages(mdp: TabularMDP, policy: ArrayLike | TabularPolicy, discount: float) -> Table:
    """Return ``[S, A]``, A(s, a) = q_π(s, a) − v_π(s); 0 in terminal states.

    Raises:
        ValueError: if the policy or the discount does not fit, or the value is not finite.
    """
    _check_discount(discount)
    values = mdp.evaluate(_probabilities(mdp, policy), discount)
    return mdp.action_values(values, discount) - values[:, None]


def discounted_visitation(mdp: TabularMDP, policy: ArrayLike | TabularPolicy, discount: float) -> Table:
    """Return ``[S]``, d(s) = Σ_t γ^t P(s_t = s), how often decisions are made in s, later ones counting less.

    It solves d = μ + γ P_πᵀ d over the states that are visited and not terminal, and is 0 in all others: nothing is
    decided after the end. It is not normalised: without terminal states Σ d = 1 / (1 − γ), and with γ = 1 it is the
    mean length of an episode. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 13.2 (η there).

    Raises:
        ValueError: if the policy or the discount does not fit, or if γ = 1 and episodes may never end.
    """
    _check_discount(discount)
    chain, _ = markov_chain(mdp, _probabilities(mdp, policy))
    if discount == 1:
        state = stuck_state(mdp, chain)
        if state is not None:
            raise ValueError(
                f"episodes reach state {state} and never end there, so visits have no finite sum with a discount of 1; "
                "take a smaller one"
            )
    visited = mdp.initial > 0
    while not np.array_equal(visited, wider := visited | (visited.astype(np.float64) @ chain > 0)):
        visited = wider
    visited &= ~mdp.terminal
    inner = csr_array(chain[visited][:, visited])
    visitation = np.zeros(mdp.num_states)
    if visited.any():
        equations = eye_array(inner.shape[0]) - discount * inner.T
        visitation[visited] = spsolve(equations.tocsc(), mdp.initial[visited])
    return visitation


def policy_gradient(mdp: TabularMDP, policy: ArrayLike | TabularPolicy, discount: float) -> Table:
    """Return ``[S, A]``, ∂J/∂θ(s, a) = d(s) π(a | s) A(s, a), d being :func:`discounted_visitation`.

    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., eq. 13.5 (there for γ = 1); A. Agarwal et al., *On the
    theory of policy gradient methods*, 2021, section 5.

    Agents that weight all steps of an episode equally, as most do, leave γ^t out of d. What they follow instead is
    ``discounted_visitation(mdp, policy, 1)[:, None] * policy * advantages(mdp, policy, discount)``, which is the
    gradient of nothing: C. Nota and P. Thomas, *Is the policy gradient a gradient?*, 2020.

    Raises:
        ValueError: if the policy or the discount does not fit, the value is not finite, or if γ = 1 and episodes may
            never end.
    """
    probabilities = _probabilities(mdp, policy)
    visitation = discounted_visitation(mdp, probabilities, discount)
    return visitation[:, None] * probabilities * advantages(mdp, probabilities, discount)


def fisher_information(mdp: TabularMDP, policy: ArrayLike | TabularPolicy, discount: float) -> Table:
    """Return ``[S·A, S·A]``, F = Σ_s d(s) Σ_a π(a | s) ∇ ln π(a | s) ∇ ln π(a | s)ᵀ, dense.

    Row and column s · A + a stand for θ(s, a). States share nothing, so there is a block for each, d (diag π − π πᵀ).
    As d, it is not normalised. S. Kakade, *A natural policy gradient*, 2001, section 2.

    Raises:
        ValueError: as :func:`discounted_visitation`, or for a policy of more than 8,192 numbers.
    """
    probabilities = _probabilities(mdp, policy)
    if probabilities.size > LARGEST_FISHER:
        raise ValueError(
            f"the Fisher matrix has {probabilities.size}² entries, and is meant for at most {LARGEST_FISHER}²; "
            "natural_gradient does without it"
        )
    visitation = discounted_visitation(mdp, probabilities, discount)
    return block_diag(
        *(d * (np.diag(row) - np.outer(row, row)) for d, row in zip(visitation, probabilities, strict=True))
    )


def natural_gradient(mdp: TabularMDP, policy: ArrayLike | TabularPolicy, discount: float) -> Table:
    """Return ``[S, A]``, F⁺ ∂J/∂θ, with the pseudo-inverse of :func:`fisher_information`.

    It is A(s, a) up to a constant in each state, which a softmax does not see; the one here makes it the smallest
    vector of its kind, Σ_a = 0 over the actions that have a probability, and 0 for all others and in states that are
    never visited. Along it every step is one of soft policy iteration, π ∝ π exp(α A). S. Kakade, *A natural policy
    gradient*, 2001, theorem 1; A. Agarwal et al., *On the theory of policy gradient methods*, 2021, section 5.3.

    With a visitation that is normalised, the gradient is smaller by a factor Σ d, as F is, and this stays what it is.

    Raises:
        ValueError: as :func:`policy_gradient`.
    """
    probabilities = _probabilities(mdp, policy)
    seen = (discounted_visitation(mdp, probabilities, discount)[:, None] > 0) & (probabilities > 0)
    table = np.where(seen, advantages(mdp, probabilities, discount), 0.0)
    return np.where(seen, table - table.sum(axis=1, keepdims=True) / seen.sum(axis=1, keepdims=True).clip(min=1), 0.0)


def penalised(
    mdp: TabularMDP, policy: ArrayLike | TabularPolicy, beta: float, reference: ArrayLike | None = None
) -> TabularMDP:
    """Return the model with rewards r(s, a) − β ln(π(a | s) / π_ref(a | s)), as this very policy earns them.

    In it, all the functions above are about J = E[Σ_t γ^t (r_t − β KL(π(· | s_t) ‖ π_ref(· | s_t)))], of which
    :class:`~aligngym.agents.SoftValueIteration` computes the optimum; gradients too, because of what a change of π
    does to the logarithm itself, the mean is 0: Σ_a π ∇ ln π = 0.

    Args:
        mdp: the model.
        policy: π; where it is 0, the reward is left as it is.
        beta: β ≥ 0, in units of reward per nat.
        reference: ``[S, A]``, π_ref; without one the penalty becomes a bonus, β times the entropy of π. That is not the
            same as a uniform reference, which costs β ln A more in every step and so favours short episodes.

    Raises:
        ValueError: if a policy does not fit, β is negative or not finite, or the reference is 0 where π is not.
    """
    if not 0 <= beta < np.inf:
        raise ValueError(f"beta is finite and at least 0, not {beta}")
    probabilities = _probabilities(mdp, policy)
    below = np.ones_like(probabilities)
    if reference is not None:
        below = checked_policy(reference, probabilities.shape, "reference")
    absent = (probabilities > 0) & (below == 0) & ~mdp.terminal[:, None]
    if absent.any() and beta > 0:
        state, action = np.argwhere(absent)[0]
        raise ValueError(
            f"state {state}, action {action}: the reference is 0 where the policy is not; so KL is infinite"
        )
    acting = (probabilities > 0) & (below > 0)
    ratio = np.divide(probabilities, below, where=acting, out=np.ones_like(probabilities))
    return TabularMDP.from_arrays(mdp.transitions, mdp.rewards - beta * np.log(ratio), mdp.initial, mdp.terminal)


def _probabilities(mdp: TabularMDP, policy: ArrayLike | TabularPolicy) -> Table:
    """Return π(a | s) as ``[S, A]`` floats that sum to one."""
    logits = getattr(policy, "logits", None)
    if logits is not None:
        policy = softmax(logits.detach().cpu().double().numpy(), axis=1)
    return checked_policy(policy, (mdp.num_states, mdp.num_actions))  # type: ignore[arg-type]


def _check_discount(discount: float) -> None:
    if not 0 <= discount <= 1:
        raise ValueError(f"the discount is between 0 and 1, not {discount}")
