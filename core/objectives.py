"""Every loss of the project, once: pure functions of log-probabilities.

Each returns one loss per action or per pair and leaves the sum to the training loop, which divides by the size of the
whole batch, so that micro-batches and several devices give the same gradient as one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def score_function(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Return −A·log π(a|s), whose gradient is the policy gradient.

    E[∇ log π · A] is ∇J for any advantage that does not depend on the action beyond its expectation:
    R. Williams, 1992; R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 13.3.

    Args:
        log_probs: log π(a|s), any shape.
        advantages: A, same shape; no gradient flows into it.
    """
    return -log_probs * advantages.detach()


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float = 0.2, clip_high: float | None = None
) -> Tensor:
    """Return −min(ρA, clip(ρ, 1−ε, 1+ε')A) with ρ = π(a|s)/π_old(a|s).

    J. Schulman et al., *Proximal policy optimization algorithms*, 2017, eq. 7; another ``clip_high`` ε' is DAPO's
    asymmetric clip (Q. Yu et al., 2025).

    Args:
        log_probs: log π(a|s), any shape.
        old_log_probs: log-probabilities under the policy that acted, same shape.
        advantages: A, same shape.
        clip: ε in (0, 1).
        clip_high: ε', ``clip`` by default.
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_weight(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, max_ratio: float) -> Tensor:
    """Return −min(ρ, ρ̄)·A·log π(a|s) with ρ = π(a|s)/π_old(a|s), into which no gradient flows: CISPO's loss.

    Unlike :func:`clipped_surrogate` it goes on teaching actions whose odds have moved far, with a bounded weight.
    MiniMax, *MiniMax-M1*, 2025, eq. 4 and 5, without a lower bound as there.

    Args:
        log_probs: log π(a|s), any shape.
        old_log_probs: log-probabilities under the policy that acted, same shape.
        advantages: A, same shape.
        max_ratio: ρ̄, 1 + ε_high in the paper.
    """
    return score_function(log_probs, truncated_ratio(log_probs, old_log_probs, max_ratio) * advantages)


def value_regression(
    values: Tensor, returns: Tensor, old_values: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """Return ½(V − G)², or PPO's pessimistic version that ignores moves of V beyond ``clip`` from ``old_values``.

    Raises:
        ValueError: if ``clip`` is given without ``old_values``.
    """
    loss = (values - returns.detach()) ** 2
    if clip is not None:
        if old_values is None:
            raise ValueError("a clipped value loss needs old_values, the values it must stay close to")
        near = old_values.detach() + (values - old_values.detach()).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns.detach()) ** 2)
    return loss / 2


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, kind: str = "k3") -> Tensor:
    """Return a sample estimate of KL(π‖π_ref) at actions drawn from π, with r = π_ref(a|s)/π(a|s).

    ========  ===================  ==========================  =====================================
    ``kind``  value                as a reward (no gradient)   as a loss (its gradient)
    ========  ===================  ==========================  =====================================
    k1        −log r               unbiased, may be negative   0 in expectation: never a loss
    k2        ½(log r)²            biased, not negative        ∇KL(π‖π_ref) in expectation
    k3        r − 1 − log r        unbiased, not negative      ∇KL(π_ref‖π) in expectation
    ========  ===================  ==========================  =====================================

    J. Schulman, *Approximating KL divergence*, 2020, for the values; the gradients follow from E_π[∇ log π] = 0. Where
    actions were drawn from another policy, :func:`kl_loss` keeps them.

    Raises:
        ValueError: for another ``kind``.
    """
    log_ratio = reference_log_probs.detach() - log_probs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kind is 'k1', 'k2' or 'k3', not {kind!r}")


def kl_loss(log_probs: Tensor, old_log_probs: Tensor, reference_log_probs: Tensor, kind: str) -> Tensor:
    """Return ρ·:func:`kl_estimate`, a loss for actions drawn from π_old, with ρ = π(a|s)/π_old(a|s).

    No gradient flows into ρ, which makes expectations under π of those under π_old. So the gradient is, after any
    number of steps on the same actions, what the estimate's is on fresh ones: ∇KL(π‖π_ref) for k2, ∇KL(π_ref‖π) for
    k3, in the states that π_old visits. (With a gradient through ρ as well, as in DeepSeek-AI, *DeepSeek-V3.2*, 2025,
    that of k3 becomes −ρ log r ∇ log π, which is k2's here.) What an action does to the divergence in later states is
    in neither; only the penalty as a reward counts it.

    Raises:
        ValueError: for a ``kind`` other than k2 and k3; k1 has no gradient to speak of.
    """
    if kind not in ("k2", "k3"):
        raise ValueError(f"kind is 'k2' or 'k3', not {kind!r}: the gradient of others is no divergence's")
    ratio = (log_probs.detach() - old_log_probs.detach()).exp()
    return ratio * kl_estimate(log_probs, reference_log_probs, kind)


def truncated_ratio(log_probs: Tensor, sampler_log_probs: Tensor, cap: float) -> Tensor:
    """Return min(π(a|s)/μ(a|s), ρ̄) without gradients, a weight for actions that μ drew.

    L. Espeholt et al., *IMPALA*, 2018, section 4.1. The cut trades variance for bias: what is weighted is an
    expectation under a policy between μ and π.

    Args:
        log_probs: log π(a|s), any shape.
        sampler_log_probs: log μ(a|s), same shape.
        cap: ρ̄.
    """
    return (log_probs - sampler_log_probs).detach().exp().clamp(max=cap)


def bradley_terry(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return −(1−ε) log σ(margin) − ε log σ(−margin), the cross-entropy of P(chosen ≻ rejected) = σ(margin).

    R. Bradley and M. Terry, 1952. It is the loss of a reward model (margin of scores) and of DPO (margin of implicit
    rewards); ε > 0 is the share of labels believed to be flipped (*conservative* DPO, E. Mitchell, 2023).
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_bradley_terry(margin: Tensor, label_smoothing: float) -> Tensor:
    """Return the loss whose expectation under labels flipped with probability ε is the loss on clean labels.

    −[(1−ε) log σ(m) − ε log σ(−m)] / (1−2ε): S. Chowdhury et al., *Provably robust DPO*, 2024, eq. 12.
    """
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


#: A preference loss takes the pair's log-ratio difference h and returns one loss per pair.
PreferenceLoss = Callable[..., Tensor]


def sigmoid_preference(h: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, −log σ(βh): R. Rafailov et al., 2023, eq. 7; with label smoothing, conservative DPO."""
    return bradley_terry(beta * h, label_smoothing)


def robust_preference(h: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, unbiased under labels flipped with probability ``label_smoothing``."""
    return robust_bradley_terry(beta * h, label_smoothing)


def ipo_preference(h: Tensor, *, beta: float) -> Tensor:
    """IPO, (h − 1/(2β))²: M. Azar et al., *A general theoretical paradigm…*, 2023, eq. 17 with τ = β."""
    return (h - 1 / (2 * beta)) ** 2


def hinge_preference(h: Tensor, *, beta: float) -> Tensor:
    """SLiC's hinge on the implicit reward, max(0, 1 − βh): Y. Zhao et al., 2023; T. Liu et al. (RSO), 2023."""
    return F.relu(1 - beta * h)


def simpo_preference(h: Tensor, *, beta: float, target_margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """SimPO, −log σ(βh − γ), where h is the difference of *mean* log-probabilities and there is no reference.

    Y. Meng et al., 2024, eq. 6; ``target_margin`` is γ.
    """
    return bradley_terry(beta * h - target_margin, label_smoothing)


def odds_ratio_preference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """ORPO's odds ratio, −β log σ(log odds(y⁺) − log odds(y⁻)) with odds = p/(1−p), without reference.

    The sides are *mean* log-probabilities log p over tokens. ORPO adds it to −log p of the chosen side, which is
    :func:`nll_preference`: J. Hong et al., *ORPO*, 2024, eq. 4, 6 and 7; β is the paper's λ.
    """

    def log_odds(log_p: Tensor) -> Tensor:
        # At p = 1 the odds are infinite, and the gradient would be no number.
        log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
        return log_p - (-log_p.expm1()).log()

    return beta * bradley_terry(log_odds(chosen) - log_odds(rejected))


def nll_preference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return −log p(y⁺), of *mean* log-probabilities over tokens: supervised learning of the chosen side alone.

    Added to another loss it keeps log π(y⁺) from falling: H. Xu et al., *Contrastive preference optimization*, 2024;
    R. Pang et al., *Iterative reasoning preference optimization*, 2024, eq. 1; W. Wang et al. (MPO), 2024.
    """
    return -chosen


def apo_zero_preference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-zero, σ(−βr⁺) + σ(βr⁻) of log-ratios r: the chosen side rises and the rejected one falls.

    For chosen answers that are better than what the policy writes: K. D'Oosterlinck et al., 2024, eq. 7.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_preference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-down, σ(βr⁺) + σ(−β(r⁺ − r⁻)) of log-ratios r: both sides fall, the rejected one more.

    For chosen answers that are worse than what the policy writes: K. D'Oosterlinck et al., 2024, eq. 8.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def bco_preference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """BCO on pairs, −log σ(βr⁺) − log σ(−βr⁻) of log-ratios r: a classifier of good and bad answers.

    S. Jung et al., *Binary classifier optimization*, 2024, without its running shift δ, as in trl.
    """
    return bradley_terry(beta * chosen) + bradley_terry(-beta * rejected)


def nca_preference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """NCA on pairs, −log σ(βr⁺) − ½ log σ(−βr⁺) − ½ log σ(−βr⁻) of log-ratios r.

    Unlike DPO's, its gradient holds log π(y⁺) up: H. Chen et al., *Noise contrastive alignment*, 2024.
    """
    noise = bradley_terry(-beta * chosen) + bradley_terry(-beta * rejected)
    return bradley_terry(beta * chosen) + noise / 2


def kto(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, λ_D σ(−β(r − z₀)) of a desirable answer and λ_U σ(β(r − z₀)) of an undesirable one.

    K. Ethayarajh et al., *KTO: model alignment as prospect theoretic optimization*, 2024, eq. 8: λ_y − v, where v is
    the value of a gain or a loss relative to z₀.

    Args:
        log_ratios: r = log π(y|x)/π_ref(y|x), ``[B]``.
        desirable: booleans, ``[B]``.
        kl: the reference point z₀, an estimate of KL(π‖π_ref) that is taken as 0 where it is negative; no gradient
            flows into it.
        beta: how fast values saturate, and so how averse to risk.
        desirable_weight: λ_D.
        undesirable_weight: λ_U; larger than λ_D is aversion to losses.
    """
    gain = beta * (log_ratios - kl.detach().clamp(min=0))
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


def huber_regression(values: Tensor, returns: Tensor, threshold: float = 1.0) -> Tensor:
    """Return ½δ² for errors δ = V − G up to ``threshold`` κ, and κ(|δ| − κ/2) beyond, where its gradient stays ±κ.

    P. Huber, *Robust estimation of a location parameter*, 1964. With κ = 1 it is the error clipping of V. Mnih et al.,
    *Human-level control through deep reinforcement learning*, 2015.
    """
    return F.huber_loss(values, returns.detach(), reduction="none", delta=threshold)


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return ``[…]``, −Σ_i m_i log p_i, for a predicted p = softmax(``logits``) and a target m, both ``[…, K]``.

    Without m's entropy, which does not depend on p, it is KL(m‖p). M. Bellemare et al., *A distributional perspective
    on reinforcement learning*, 2017, algorithm 1.
    """
    return -(probabilities.detach() * logits.log_softmax(dim=-1)).sum(dim=-1)
