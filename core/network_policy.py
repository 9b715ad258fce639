"""A policy that is a small network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import gymnasium
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from aligngym.core.markov_policy import WeightsPolicy
from aligngym.core.networks import ObservationNetwork, initialise_orthogonally
from aligngym.core.randomness import seeded
from aligngym.core.spaces import single_spaces


class NetworkPolicy(WeightsPolicy):
    """A multi-layer perceptron, behind convolutions for images, that gives logits of actions or a Gaussian's means.

    Its reference is the network as it was made.

    Args:
        observation_space: numbers are read one-hot, images by convolutions, everything else as a vector: see
            :func:`aligngym.core.spaces.encode`.
        action_space: ``Discrete``, or a one-dimensional ``Box`` (Gaussian policy with a trained deviation).
        hidden: widths of the layers; none makes a linear policy.
        activation: ``tanh``, ``relu``, ``elu`` or ``silu``.
        critic: ``"separate"`` (a network of its own), ``"shared"`` (a second head on the same features) or ``None``.
        orthogonal: whether weights start orthogonal, with gain √2, 0.01 for actions and 1 for values; torch's default
            otherwise.
        log_std: of a Gaussian policy to start with.
        seed: of the first weights.

    Raises:
        TypeError: for spaces that it cannot read or act in.
        ValueError: for an unknown critic or activation, or a width that is not positive.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        critic: str | None = "separate",
        orthogonal: bool = True,
        log_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(observation_space, action_space, log_std)
        if critic not in ("separate", "shared", None):
            raise ValueError(f"critic is 'separate', 'shared' or None, not {critic!r}")
        with seeded(seed):
            self.actor_body = ObservationNetwork(observation_space, hidden, activation)
            self.action_head = nn.Linear(self.actor_body.num_features, self.num_actions)
            self.critic_body, self.value_head = None, None
            if critic == "separate":
                self.critic_body = ObservationNetwork(observation_space, hidden, activation)
            if critic is not None:
                self.value_head = nn.Linear(self.actor_body.num_features, 1)
        if orthogonal:
            generator = torch.Generator().manual_seed(seed)
            for network, gain in (
                (self.actor_body, 2**0.5),
                (self.critic_body, 2**0.5),
                (self.action_head, 0.01),
                (self.value_head, 1.0),
            ):
                if network is not None:
                    initialise_orthogonally(network, gain, generator)
        self.reference = nn.ModuleList(copy.deepcopy([self.actor_body, self.action_head])).requires_grad_(False)

    @classmethod
    def for_env(cls, env: gymnasium.Env | gymnasium.vector.VectorEnv, **options: Any) -> Self:
        """Make a network that fits an environment; the options are those of the class."""
        return cls(*single_spaces(env), **options)

    @property
    def has_critic(self) -> bool:
        return self.value_head is not None

    def outputs(self, observations: Tensor) -> Tensor:
        return self._over_states(self._actor, observations)

    def reference_outputs(self, observations: Tensor) -> Tensor:
        body, head = self.reference
        return self._over_states(lambda rows: head(body(rows)), observations)

    def state_values(self, observations: Tensor) -> Tensor:
        if self.value_head is None:
            return super().state_values(observations)
        head, body = self.value_head, self.critic_body or self.actor_body
        return self._over_states(lambda rows: head(body(rows)), observations)[:, 0]

    def outputs_and_values(self, observations: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.value_head is None or self.critic_body is not None:
            return super().outputs_and_values(observations)
        heads = [self.action_head, self.value_head]

        def both(rows: Tensor) -> Tensor:
            features = self.actor_body(rows)
            return torch.cat([head(features) for head in heads], dim=1)

        outputs = self._over_states(both, observations)
        return outputs[:, :-1], outputs[:, -1]

    def _actor(self, observations: Tensor) -> Tensor:
        return self.action_head(self.actor_body(observations))

    def _over_states(self, network: Any, observations: Tensor) -> Tensor:
        """Return what a network says of observations; where there are fewer states than rows, each state once."""
        states = self.actor_body.num_states
        if states is None or states > len(observations):
            return network(observations)
        table = network(torch.arange(states, device=observations.device))
        return F.embedding(observations, table)
