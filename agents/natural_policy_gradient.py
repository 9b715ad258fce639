"""The natural policy gradient: the steepest way up, where distance is how much the policy's behaviour changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aligngym.agents.actor_critic import A2C
from aligngym.core.callbacks import Metrics
from aligngym.core.conjugate_gradient import conjugate_gradient
from aligngym.core.distributions import ActionDistribution
from aligngym.core.markov_policy import MarkovPolicy
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.schedules import Schedule, as_schedule
from aligngym.core.spaces import encode
from aligngym.core.trajectories import Experience


class NaturalPolicyGradient(A2C):
    """θ ← θ + α F⁻¹∇J: what an ordinary step changes depends on how the policy is written down, and this does not.

    F is the Fisher information E[∇ log π ∇ log πᵀ], the Hessian of the mean KL(π_old‖π) over the batch's states at
    π_old, and x = (F + damping)⁻¹∇J comes from conjugate gradients, which need products F v alone. S. Kakade, *A
    natural policy gradient*, 2001. By default the step goes to the edge of the trust region ½ αx·(F + damping)αx ≤ δ
    (J. Schulman et al., *Trust region policy optimization*, 2015, appendix C), α = √(2δ / x·(F + damping)x).

    Only the actor moves so; the critic's parameters, which must be others, take steps of the optimiser.

    Args:
        policy: what is trained: any that acts step by step, with a critic that shares nothing with the actor.
        sampler: of long segments: the step is only as good as the estimate of ∇J.
        max_kl: δ > 0 in nats, how far a step goes, unless ``step_size`` says that.
        step_size: α of Kakade's plain step, a number or a schedule over iterations; ``None`` uses the trust region.
        damping: added to F's diagonal. It must be positive where F is singular, as for a softmax over a table, and
            small beside F's eigenvalues, which are at most 1 / states there, or little is left of F.
        solver_iterations: the most products F v for one step.
        critic_steps: gradient steps of the critic on each batch.
        learning_rate: of the critic, as are ``max_grad_norm`` and ``micro_batch_size``.
        options: of :class:`A2C`. With ``normalise="trajectories"`` everything above is about whole trajectories.

    Raises:
        TypeError: if the policy has no critic, or does not act step by step.
        ValueError: for a number out of its range, an actor and critic that share parameters, or several devices.
    """

    headline = ("return", "entropy", "kl")
    policy: MarkovPolicy

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        max_kl: float = 0.01,
        step_size: float | Schedule | None = None,
        damping: float = 1e-3,
        solver_iterations: int = 10,
        critic_steps: int = 10,
        learning_rate: float | Schedule = 1e-2,
        **options: Any,
    ) -> None:
        if not (max_kl > 0 and math.isfinite(max_kl)):
            raise ValueError(f"max_kl is δ, positive and finite, not {max_kl}")
        if not (damping >= 0 and math.isfinite(damping)):
            raise ValueError(f"damping is not negative, and this one is {damping}")
        for name, number in (("solver_iterations", solver_iterations), ("critic_steps", critic_steps)):
            if number < 1:
                raise ValueError(f"{name} is at least 1, not {number}")
        # The critic learns by steps of its own, whose loss has no other part to be weighed against.
        super().__init__(policy, sampler, learning_rate=learning_rate, value_coefficient=0.0, **options)
        if self.accelerator.num_processes > 1:
            raise ValueError(f"{type(self).__name__} works on one device: its step is not shared between processes")
        self.actor = actor_parameters(policy)
        self.max_kl, self.damping = max_kl, damping
        self.step_size = None if step_size is None else as_schedule(step_size)
        self.solver_iterations, self.critic_steps = solver_iterations, critic_steps

    def step(self, batch: Experience) -> Metrics:
        """Take a natural step with the actor, and ordinary ones with the critic.

        Raises:
            FloatingPointError: if a gradient or a product with F is not finite; the policy is then as it was.
        """
        moved = self.step_actor(batch)
        for _ in range(self.critic_steps):
            fitted = super().step(batch)
        return {**fitted, **moved}

    def losses(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B, T]`` weighted losses of the critic alone."""
        return self.value_losses(self.model(batch).values, batch) * batch.weights, {}

    def actor_losses(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B, T]`` weighted losses of the actor: the objective's, the entropy's and the KL penalty's."""
        return super().losses(batch)

    def step_actor(self, batch: Experience) -> Metrics:
        """Move the actor along (F + damping)⁻¹∇J."""
        losses, metrics = self.actor_losses(batch)
        means = {name: float(values.sum()) / self.weight(batch) for name, values in metrics.items()}
        loss = losses.sum() / self.weight(batch)
        gradient = -self._flat(torch.autograd.grad(loss, self.actor))
        fisher = self.fisher_product(batch)

        def product(vector: Tensor) -> Tensor:
            return fisher(vector) + self.damping * vector

        direction = conjugate_gradient(product, gradient, self.solver_iterations)
        length = self._length(direction, product)
        moved = self.move(batch, length * direction)
        return {"loss": loss.item(), "gradient_norm": float(gradient.norm()), "step_size": length, **means, **moved}

    def fisher_product(self, batch: Experience) -> Callable[[Tensor], Tensor]:
        """Return v ↦ F v, ``[n]`` for ``[n]``, where n counts the actor's parameters.

        F v = ∇(∇KL(π_old‖π)·v) at π = π_old, the gradient of a gradient (B. Pearlmutter, *Fast exact multiplication by
        the Hessian*, 1994), so that F itself is never written down.
        """
        distribution = self.policy.distribution(batch)
        divergence = self._mean_divergence(distribution.detach(), distribution, batch)
        gradient = self._flat(torch.autograd.grad(divergence, self.actor, create_graph=True))

        def product(vector: Tensor) -> Tensor:
            return self._flat(torch.autograd.grad(gradient @ vector, self.actor, retain_graph=True))

        return product

    @torch.no_grad()
    def move(self, batch: Experience, step: Tensor) -> Metrics:
        """Add ``[n]`` to the actor's parameters, and return how far the policy has moved, in nats."""
        old = self.policy.distribution(batch)
        self._set(self._flat(self.actor) + step)
        return {"kl": float(self._mean_divergence(old, self.policy.distribution(batch), batch))}

    def _length(self, direction: Tensor, product: Callable[[Tensor], Tensor]) -> float:
        if self.step_size is not None:
            return self.step_size(self.iteration)
        curvature = float(direction @ product(direction))
        # Where all advantages are 0, there is nowhere to go.
        return math.sqrt(2 * self.max_kl / curvature) if curvature > 0 else 0.0

    def _mean_divergence(self, old: ActionDistribution, new: ActionDistribution, batch: Experience) -> Tensor:
        """Return the mean of KL(old‖new) over the batch, weighted as its losses are."""
        return (old.divergence(new) * batch.weights).sum() / self.weight(batch)

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])

    def _set(self, numbers: Tensor) -> None:
        sizes = [parameter.numel() for parameter in self.actor]
        for parameter, part in zip(self.actor, numbers.split(sizes), strict=True):
            parameter.copy_(part.view_as(parameter))


def actor_parameters(policy: Policy) -> list[nn.Parameter]:
    """Return the trainable parameters that π(a|s) depends on; those of the critic must be others.

    Raises:
        TypeError: if the policy's distribution over actions is not known, as for a language model.
        ValueError: if one parameter serves actor and critic.
    """
    if not isinstance(policy, MarkovPolicy):
        raise TypeError(f"a natural step needs a policy whose distributions are known, not {type(policy).__name__}")
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    space = policy.observation_space
    anything = torch.as_tensor(encode(space, space.sample()), device=policy.device)[None]
    outputs, values = policy.outputs_and_values(anything)
    assert values is not None
    distribution = policy.from_outputs(outputs)
    log_probs = distribution.log_prob(distribution.mode().detach())
    acts, judges = (
        [part is not None for part in torch.autograd.grad(said.sum(), trainable, retain_graph=True, allow_unused=True)]
        for said in (log_probs, values)
    )
    if any(acting and judging for acting, judging in zip(acts, judges, strict=True)):
        raise ValueError(
            "actor and critic share parameters, and a natural step of the actor would disturb the critic: make the "
            "policy with critic='separate'"
        )
    return [parameter for parameter, acting in zip(trainable, acts, strict=True) if acting]
