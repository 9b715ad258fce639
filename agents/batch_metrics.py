"""What a batch of experience says about how learning goes: of its critic, its groups, its reference and its sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from aligngym.core.callbacks import Metrics
from aligngym.core.objectives import kl_estimate
from aligngym.core.trajectories import Experience


def explained_variance(batch: Experience) -> float:
    """Return 1 − Var[target − V] / Var[target] over a batch's actions, the share that its critic explains."""
    targets, values = batch.targets[batch.mask], batch.values[batch.mask]
    variance = targets.var(correction=0)
    return float(1 - (targets - values).var(correction=0) / variance) if variance > 0 else 0.0


def silent_groups(batch: Experience) -> float:
    """Return the share of groups from which nothing is learned, because all of their advantages are 0."""
    heard = batch.group[(batch.advantages != 0).any(dim=1)]
    return 1 - len(heard.unique()) / len(batch.group.unique())


def kl_to_reference(batch: Experience) -> dict[str, Tensor]:
    """Return ``[B]`` two estimates of KL(π_old‖π_ref) for each row: the sums of k1 and of k3 over its actions.

    Both are unbiased for whole trajectories; k3 is never negative. See :func:`aligngym.core.objectives.kl_estimate`.
    """
    own, reference = batch.log_probs, batch.reference_log_probs
    return {
        "kl_to_reference": kl_estimate(own, reference, "k1").sum(dim=1),
        "kl_to_reference_k3": kl_estimate(own, reference, "k3").sum(dim=1),
    }


def sampler_mismatch(batch: Experience) -> Metrics:
    """Return how far what drew the actions is from π_old: KL(sampler‖π_old) per action, and the largest ratio."""
    own, sampler = batch.log_probs[batch.mask], batch.sampler_log_probs[batch.mask]
    # Actions were drawn by the sampler, so the roles are those of a KL from it.
    divergence = kl_estimate(sampler, own).mean()
    return {"sampler_kl": float(divergence), "sampler_max_ratio": float(torch.exp((own - sampler).max()))}
