"""Actor–critic that learns from what another policy does, with importance weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aligngym.agents.actor_critic import A2C
from aligngym.core import objectives
from aligngym.core.advantages import v_trace
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience, Trajectories


class BehaviourSampler(Sampler):
    """Experience of another policy than the one that learns, with that policy's log-probabilities.

    Args:
        sampler: where the other policy acts.
        behaviour: β(a|s); it must give every action a chance that the learning policy may want to take, and is neither
            changed nor saved.
    """

    def __init__(self, sampler: Sampler, behaviour: Policy) -> None:
        self.sampler, self.behaviour = sampler, behaviour

    @torch.no_grad()
    def sample(self, policy: Policy, seed: int) -> Trajectories:
        """Let the behaviour act, whatever ``policy`` would do.

        Raises:
            ValueError: if the two policies see or do different things.
        """
        for name in ("observation_space", "action_space"):
            ours, theirs = getattr(policy, name, None), getattr(self.behaviour, name, None)
            if ours != theirs:
                raise ValueError(f"the {name} of the behaviour is {theirs}, and that of the policy {ours}")
        trajectories = self.sampler.sample(self.behaviour, seed)
        trajectories.log_probs = self.behaviour(trajectories).log_probs
        return trajectories

    @property
    def env(self) -> Any:
        """What the behaviour acts in."""
        return self.sampler.env  # type: ignore[attr-defined]

    @property
    def metrics(self) -> Metrics:  # type: ignore[override]
        """What the last sample showed, which is about the behaviour and named so."""
        return {f"behaviour_{name}": value for name, value in self.sampler.metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


class OffPolicyActorCritic(A2C):
    """An actor and a critic that learn about π from the actions of a behaviour β, weighted by ρ = π(a|s)/β(a|s).

    The actor follows E_β[ρ ∇ log π(a|s) A(s, a)] = Σ_s d_β(s) Σ_a ∇π(a|s) A(s, a), where d_β says how often the
    behaviour visits a state: the gradient of Σ_s d_β(s) v_π(s) but for the change of v_π further on. In a table its
    optimum is that of the return. T. Degris, M. White and R. Sutton, *Off-policy actor-critic*, 2012, eq. 5 and
    algorithm 1; S. Zhao, *Mathematical Foundations of Reinforcement Learning*, section 10.3.

    The critic learns V-trace's targets (:func:`aligngym.core.advantages.v_trace`). With ``trace=0`` they are one-step
    TD weighted by ρ, as in the book; with β = π all is :class:`A2C`.

    Args:
        policy: what is trained; it needs a critic.
        sampler: a :class:`BehaviourSampler`, or any whose trajectories carry log β(a|s); where they carry none, β = π.
        trace: λ in [0, 1].
        max_ratio: weights above this are cut to it, ρ̄ = c̄ of L. Espeholt et al., *IMPALA*, 2018: less variance, but
            the critic then evaluates a policy between β and π. ``None`` cuts nothing.
        options: of :class:`PolicyGradient`.

    Raises:
        TypeError: if the policy has no critic.
        ValueError: for a trace out of [0, 1], a ``max_ratio`` that is not positive, or a penalty ``beta``, which would
            need actions of the policy itself, or an ``importance_cap`` beside ``max_ratio``.
    """

    headline = ("behaviour_return", "entropy", "ratio")

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        trace: float = 0.0,
        max_ratio: float | None = None,
        **options: Any,
    ) -> None:
        if max_ratio is not None and not max_ratio > 0:
            raise ValueError(f"max_ratio is positive or None, not {max_ratio}")
        if options.get("beta"):
            raise ValueError(f"beta={options['beta']}: a KL penalty is estimated from actions of the policy itself")
        if options.get("importance_cap") is not None:
            raise ValueError(
                f"importance_cap={options['importance_cap']}: here max_ratio bounds the weights of actions"
            )
        super().__init__(policy, sampler, trace=trace, **options)
        self.max_ratio = math.inf if max_ratio is None else max_ratio

    def ratios(self, log_probs: Tensor, batch: Experience) -> Tensor:
        """Return ``[B, T]``, min(ρ, ρ̄), without gradients."""
        return (log_probs.detach() - batch.log_probs).exp().clamp(max=self.max_ratio)

    def advantages(self, batch: Experience) -> Tensor:
        return v_trace(
            batch.rewards,
            batch.values,
            batch.next_values,
            batch.terminated,
            batch.truncated,
            self.ratios(self.policy(batch).log_probs, batch),
            self.discount,
            self.trace,
            batch.mask,
        )

    def targets(self, batch: Experience, advantages: Tensor) -> Tensor:
        return batch.values + self.ratios(self.policy(batch).log_probs, batch) * advantages

    def objective(self, log_probs: Tensor, batch: Experience) -> Tensor:
        return objectives.score_function(log_probs, self.ratios(log_probs, batch) * batch.advantages)

    def diagnose(self, log_probs: Tensor, batch: Experience) -> dict[str, Tensor]:
        """Return the weights ρ, whose mean is 1 where the behaviour covers the policy and nothing is cut."""
        return {"ratio": self.ratios(log_probs, batch)}
