"""A policy that prefers the action of the highest value, where a network computes the values."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from aligngym.core import objectives
from aligngym.core.distributions import Categorical
from aligngym.core.markov_policy import Actor, WeightsPolicy
from aligngym.core.networks import ObservationNetwork
from aligngym.core.randomness import seeded
from aligngym.core.spaces import single_spaces

#: The values of at most so many numbered states are computed in advance, whichever of them are seen.
SMALL_TABLE = 1000


class ActionValueNetwork(nn.Module):
    """Computes an output for every action, from one head or, dueling, from two: V(s) + A(s, a) − mean_b A(s, b).

    Z. Wang et al., *Dueling network architectures for deep reinforcement learning*, 2016, eq. 9; both streams are one
    linear layer behind shared features.

    Args:
        space: of the observations.
        shape: of the outputs for one observation, ``(A,)`` or ``(A, atoms)``.
        hidden: widths of the layers; none makes a table of numbered states, which starts at 0.
        activation: see :class:`ObservationNetwork`.
        dueling: whether there are two heads.
    """

    def __init__(
        self, space: spaces.Space, shape: tuple[int, ...], hidden: Sequence[int], activation: str, dueling: bool
    ) -> None:
        super().__init__()
        self.body = ObservationNetwork(space, hidden, activation)
        self.shape = shape
        table = self.body.num_states is not None and not hidden
        # A bias would be shared by all states.
        self.advantages = nn.Linear(self.body.num_features, math.prod(shape), bias=not table)
        self.values = nn.Linear(self.body.num_features, math.prod(shape[1:]), bias=not table) if dueling else None
        if table:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, observations: Tensor) -> Tensor:
        """Return ``[N, *shape]`` for ``[N, …]`` encoded observations."""
        features = self.body(observations)
        advantages = self.advantages(features).view(-1, *self.shape)
        if self.values is None:
            return advantages
        values = self.values(features).view(-1, 1, *self.shape[1:])
        return values + advantages - advantages.mean(dim=1, keepdim=True)


class QNetwork(WeightsPolicy):
    """The ε-greedy policy of a network's action values: π(a|s) = ε/|A(s)| + (1 − ε)·[a = argmax_b Q(s, b)].

    Only allowed actions count, where the environment says which are; of several best actions the first is taken. The
    reference is the target network of V. Mnih et al., *Human-level control through deep reinforcement learning*, 2015:
    a frozen copy that :meth:`update_target` brings up to date.

    Args:
        observation_space: see :class:`aligngym.core.NetworkPolicy`.
        action_space: ``Discrete``, counted from 0.
        hidden: widths of the layers; none makes Q linear, and a table if observations are numbers.
        activation: ``tanh``, ``relu``, ``elu`` or ``silu``.
        dueling: compute Q from V and A: see :class:`ActionValueNetwork`.
        huber: errors of Q beyond this count linearly instead of squared; ``None`` squares them all.
        epsilon: ε in [0, 1]; may be changed at any time.
        seed: of the first weights.

    Attributes:
        network: what is trained.
        target: its frozen copy.

    Raises:
        TypeError: for spaces that it cannot read or act in.
        ValueError: for a number out of its range or an unknown activation.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        dueling: bool = False,
        huber: float | None = 1.0,
        epsilon: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(observation_space, action_space)
        if not self.is_discrete:
            raise TypeError(f"the best of the actions must be found by looking at all of them, not in {action_space}")
        if huber is not None and not huber > 0:
            raise ValueError(f"huber is the error from which the loss is linear, positive or None, not {huber}")
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon is a probability, not {epsilon}")
        self.huber, self.epsilon = huber, epsilon
        with seeded(seed):
            self.network = ActionValueNetwork(observation_space, self.output_shape, hidden, activation, dueling)
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    @classmethod
    def for_env(cls, env: gymnasium.Env | gymnasium.vector.VectorEnv, **options: Any) -> Self:
        """Make a network that fits an environment; the options are those of the class."""
        return cls(*single_spaces(env), **options)

    # What the network's outputs mean, and how they are drawn towards a target.

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the network's outputs for one observation."""
        return (self.num_actions,)

    def means(self, outputs: Tensor) -> Tensor:
        """Return ``[N, A]``, Q(s, a), for ``[N, *output_shape]`` outputs of the network."""
        return outputs

    def bootstrap(self, returns: Tensor, discounts: Tensor, following: Tensor) -> Tensor:
        """Return the target R + γ' Q(s', a') of each row.

        Args:
            returns: ``[N]``, R, what was earned on the way to s'.
            discounts: ``[N]``, γ', 0 where the task ended.
            following: ``[N, …]``, the network's output for a' in s'.
        """
        return returns + discounts * following

    def regression(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Return ``[N]`` losses that draw the outputs of actions, ``[N, …]``, towards their targets, ``[N, …]``."""
        if self.huber is None:
            return objectives.value_regression(predicted, targets)
        return objectives.huber_regression(predicted, targets, self.huber)

    def surprise(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Return ``[N]``, how far outputs are from their targets: the TD error's magnitude."""
        return (targets - predicted).abs()

    @torch.no_grad()
    def update_target(self, rate: float = 1.0) -> None:
        """Move the target network towards the trained one, w⁻ ← w⁻ + rate·(w − w⁻); 1 copies it."""
        for old, new in zip(self.target.parameters(), self.network.parameters(), strict=True):
            old.lerp_(new, rate)

    # A policy.

    def outputs(self, observations: Tensor) -> Tensor:
        """Return ``[N, A]``, Q(s, a), for ``[N, …]`` encoded observations."""
        return self.means(self.network(observations))

    def reference_outputs(self, observations: Tensor) -> Tensor:
        """Return the same of the target network."""
        return self.means(self.target(observations))

    def from_outputs(self, outputs: Tensor, allowed: Tensor | None = None) -> Categorical:
        best = greedy_actions(outputs, allowed)[..., None]
        count = self.num_actions if allowed is None else allowed.sum(dim=-1, keepdim=True)
        probabilities = torch.zeros_like(outputs) + self.epsilon / count
        probabilities.scatter_add_(-1, best, torch.full_like(best, 1 - self.epsilon, dtype=outputs.dtype))
        # Finite, as in Categorical.
        return Categorical(probabilities.log().clamp(min=torch.finfo(outputs.dtype).min), allowed)

    def actor(self, seed: int) -> Actor:
        generator, states = np.random.default_rng(seed), self.observation_space

        @torch.no_grad()
        def values_of(observations: Any) -> NDArray[np.float32]:
            return self.outputs(torch.as_tensor(observations, device=self.device)).cpu().numpy()

        table = None
        if isinstance(states, spaces.Discrete) and states.n <= SMALL_TABLE:
            table = values_of(np.arange(states.n))

        def act(observations: NDArray[Any], allowed: NDArray[np.bool_] | None) -> NDArray[Any]:
            scores = values_of(observations) if table is None else table[observations]
            explores = generator.random(len(scores)) < self.epsilon
            # The best of random scores is any action.
            scores = np.where(explores[:, None], generator.random(scores.shape), scores)
            if allowed is not None:
                scores[~allowed] = -np.inf
            return scores.argmax(axis=1)

        return act

    def trainable_state(self) -> dict[str, Tensor]:
        """The parameters of both networks."""
        return {name: parameter.data for name, parameter in self.named_parameters()}


class CategoricalQNetwork(QNetwork):
    """Learns the distribution of the return, Z(s, a) = Σ_i p_i(s, a) δ(z_i); its mean is Q(s, a) = Σ_i p_i z_i.

    The atoms z_i lie evenly between ``v_min`` and ``v_max``; returns outside are taken for the nearest end. C51 of
    M. Bellemare, W. Dabney and R. Munos, *A distributional perspective on reinforcement learning*, 2017, algorithm 1.

    Args:
        observation_space: see :class:`QNetwork`.
        action_space: see :class:`QNetwork`.
        atoms: how many, at least 2.
        v_min: z of the first atom: no return should be below.
        v_max: z of the last atom: no return should be above.
        options: of :class:`QNetwork`; there is no Huber loss.

    Raises:
        ValueError: for fewer than two atoms, or ends that are not finite and in order.
    """

    support: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        v_min: float,
        v_max: float,
        atoms: int = 51,
        **options: Any,
    ) -> None:
        if atoms < 2:
            raise ValueError(f"a distribution of returns needs at least 2 atoms, not {atoms}")
        if not (math.isfinite(v_min) and math.isfinite(v_max) and v_min < v_max):
            raise ValueError(f"returns lie between v_min and v_max, and {v_min} is not below {v_max}")
        if "huber" in options:
            raise ValueError("huber would be ignored: a distribution is drawn towards its target by cross-entropy")
        self.atoms = atoms
        super().__init__(observation_space, action_space, **options)
        self.register_buffer("support", torch.linspace(v_min, v_max, atoms), persistent=False)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_actions, self.atoms)

    def means(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(dim=-1) @ self.support

    def bootstrap(self, returns: Tensor, discounts: Tensor, following: Tensor) -> Tensor:
        """Return ``[N, atoms]`` probabilities, the distribution of R + γ' Z(s', a'), projected onto the atoms."""
        moved = returns[:, None] + discounts[:, None] * self.support
        return projection(following.softmax(dim=-1), moved, self.support)

    def regression(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return objectives.cross_entropy(predicted, targets)

    def surprise(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Return ``[N]``, KL(target‖prediction) in nats, as in Rainbow (M. Hessel et al., 2018)."""
        return objectives.cross_entropy(predicted, targets) + torch.xlogy(targets, targets).sum(dim=-1)


def greedy_actions(values: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return ``[…]``, argmax_a Q(s, a) over the allowed actions, for ``[…, A]`` values and booleans."""
    return (values if allowed is None else values.masked_fill(~allowed, -torch.inf)).argmax(dim=-1)


def projection(probabilities: Tensor, points: Tensor, support: Tensor) -> Tensor:
    """Return the distribution on ``support`` that gives each point's probability to its two nearest atoms.

    The nearer atom gets more, in proportion, so that the mean stays what it was where all points lie within the
    support; points outside are moved to its ends. It is the projection of least Cramér distance. M. Bellemare et al.,
    2017, eq. 7.

    Args:
        probabilities: ``[N, M]``.
        points: ``[N, M]``.
        support: ``[K]``, evenly spaced.
    """
    last = len(support) - 1
    places = (points - support[0]) * (last / (support[-1] - support[0]))
    places = places.clamp(0, last)
    # At the last atom, all of it goes to the upper one.
    lower = places.floor().clamp(max=last - 1)
    upper_share = places - lower
    index = lower.long()
    projected = torch.zeros(len(points), last + 1, dtype=probabilities.dtype, device=points.device)
    projected.scatter_add_(1, index, probabilities * (1 - upper_share))
    return projected.scatter_add_(1, index + 1, probabilities * upper_share)
