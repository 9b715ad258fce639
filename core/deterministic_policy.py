"""A policy that names one action for every state, and a critic of pairs of states and actions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gymnasium import spaces
from torch import Tensor, nn

from aligngym.core.network_policy import NetworkPolicy
from aligngym.core.networks import ObservationNetwork
from aligngym.core.randomness import seeded


class DeterministicPolicy(NetworkPolicy):
    """μ(s), kept in the box of actions by tanh, with critics Q(s, a).

    Greedily it takes μ(s); to explore, it draws from N(μ(s), diag(noise · half the box's width)²), so for whoever asks
    for log-probabilities it is a Gaussian policy whose deviation is not trained.

    Args:
        observation_space: see :class:`NetworkPolicy`.
        action_space: a one-dimensional ``Box``.
        hidden: widths of the layers, of the actor and of each critic; none makes μ linear before it is squashed.
        activation: see :class:`NetworkPolicy`.
        critics: how many; or modules that take ``[N, …]`` observations and ``[N, D]`` actions and return ``[N]``.
        squash: whether μ(s) = centre + half width · tanh(f(s)). Otherwise μ = f, and only the environment clips.
        noise: the standard deviation of exploration, as a share of half the box's width; of 1 where a side is open.
        seed: of the first weights.

    Raises:
        TypeError: for other actions than real numbers, or observations that cannot be read.
        ValueError: for noise that is not positive, no critic, a box to squash into that is open, or widths or an
            activation that :class:`NetworkPolicy` refuses.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        critics: int | Sequence[nn.Module] = 1,
        squash: bool = True,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not isinstance(action_space, spaces.Box):
            raise TypeError(
                f"a deterministic policy gives real numbers, a Box, and these actions are {action_space}: for discrete "
                "ones take a NetworkPolicy with PPO, or DQN"
            )
        if not 0 < noise < float("inf"):
            raise ValueError(f"noise is positive, not {noise}: without it the critic never sees another action")
        if not critics or (isinstance(critics, int) and critics < 0):
            raise ValueError(f"at least one critic is needed, not {critics}")
        if squash and not action_space.is_bounded():
            raise ValueError(f"{action_space} has an open side, so nothing can be squashed into it: say squash=False")
        super().__init__(observation_space, action_space, hidden=hidden, activation=activation, critic=None, seed=seed)
        for name, bound in (("low", action_space.low), ("high", action_space.high)):
            self.register_buffer(name, torch.as_tensor(bound).float())
        self.squash = squash
        self.log_std.requires_grad_(False).copy_((noise * self.half_width).log())
        if isinstance(critics, int):
            with seeded(seed, critics):
                shape = (observation_space, self.num_actions, hidden, activation)
                critics = [ActionValueNetwork(*shape) for _ in range(critics)]
        self.critics = nn.ModuleList(critics)

    @property
    def half_width(self) -> Tensor:
        """``[D]``, half the width of the box of actions, and 1 where a side is open."""
        return torch.where(torch.isfinite(width := self.high - self.low), width / 2, 1.0)

    def outputs(self, observations: Tensor) -> Tensor:
        return self._bounded(super().outputs(observations))

    def reference_outputs(self, observations: Tensor) -> Tensor:
        return self._bounded(super().reference_outputs(observations))

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return ``[C, N]``, every critic's Q(s, a) of ``[N, …]`` encoded observations and ``[N, D]`` actions."""
        return torch.stack([critic(observations, actions) for critic in self.critics])

    def clipped(self, actions: Tensor) -> Tensor:
        """Return ``[…, D]``, what an environment makes of actions that leave the box."""
        return actions.clamp(self.low, self.high)

    def _bounded(self, outputs: Tensor) -> Tensor:
        return (self.low + self.high) / 2 + self.half_width * outputs.tanh() if self.squash else outputs


class ActionValueNetwork(nn.Module):
    """Q(s, a): a multi-layer perceptron that reads what is observed and done side by side.

    Args:
        observation_space: read as by :class:`ObservationNetwork`.
        num_actions: D, real numbers in an action.
        hidden: widths of the layers.
        activation: after each.
    """

    def __init__(
        self, observation_space: spaces.Space, num_actions: int, hidden: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        self.reader = ObservationNetwork(observation_space, (), activation)
        both = spaces.Box(-float("inf"), float("inf"), (self.reader.num_features + num_actions,))
        self.body = ObservationNetwork(both, hidden, activation)
        self.head = nn.Linear(self.body.num_features, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return ``[N]`` values of ``[N, …]`` encoded observations and ``[N, D]`` actions."""
        return self.head(self.body(torch.cat([self.reader(observations), actions], dim=1)))[:, 0]
