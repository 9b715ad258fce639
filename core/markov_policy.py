"""Policies that see one observation at a time, whatever computes them: a table or a network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from aligngym.core.advantages import cuts
from aligngym.core.distributions import ActionDistribution, Categorical, DiagonalGaussian
from aligngym.core.policy import Evaluation, Policy
from aligngym.core.spaces import encode, encoded_shape
from aligngym.core.storage import load_tree, save_tree
from aligngym.core.trajectories import Trajectories

#: Chooses actions for a batch of encoded observations, among the allowed ones if that is said.
Actor = Callable[[NDArray[Any], NDArray[np.bool_] | None], NDArray[Any]]

#: A policy over fewer states than this is written down as a table before it acts.
LARGEST_TABLE = 100_000


class MarkovPolicy(Policy):
    """A policy whose action depends on the current observation alone.

    A subclass computes, for a batch of observations, the logits of discrete actions or the means of continuous ones,
    and the critic's values if it has one.

    Args:
        observation_space: of one copy of the environment.
        action_space: ``Discrete``, or a ``Box`` of D real numbers, for which the policy is Gaussian.
        log_std: the logarithm of a Gaussian policy's standard deviation to start from; a trained parameter of its
            own, the same in every state.

    Raises:
        TypeError: for another action space, or observations that cannot be encoded.
    """

    markov = True
    deterministic = True

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, log_std: float = 0.0) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_shape = encoded_shape(observation_space)
        if isinstance(action_space, spaces.Discrete) and action_space.start == 0:
            self.num_actions = int(action_space.n)
        elif isinstance(action_space, spaces.Box) and len(action_space.shape) == 1:
            self.num_actions = int(action_space.shape[0])
            self.log_std = nn.Parameter(torch.full((self.num_actions,), float(log_std)))
        else:
            raise TypeError(
                f"a policy acts in Discrete(n), counted from 0, or in a one-dimensional Box, not in {action_space}: "
                "wrap the environment so that its actions are of that kind"
            )

    @abstractmethod
    def outputs(self, observations: Tensor) -> Tensor:
        """Return ``[N, A]`` logits, or ``[N, D]`` means, for ``[N, …]`` encoded observations."""

    @abstractmethod
    def reference_outputs(self, observations: Tensor) -> Tensor:
        """Return the same under the reference."""

    def state_values(self, observations: Tensor) -> Tensor:
        """Return ``[N]``, the critic's V(s) for ``[N, …]`` encoded observations."""
        raise TypeError(f"this {type(self).__name__} has no critic: make it with one")

    def outputs_and_values(self, observations: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return :meth:`outputs` and, with a critic, :meth:`state_values`; override where they share work."""
        return self.outputs(observations), self.state_values(observations) if self.has_critic else None

    @property
    def is_discrete(self) -> bool:
        """Whether actions are discrete."""
        return isinstance(self.action_space, spaces.Discrete)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def encode(self, observations: Any) -> Tensor:
        """Return observations of the environment as the tensor that trajectories hold; a tensor is taken as one."""
        if not isinstance(observations, Tensor):
            observations = torch.from_numpy(encode(self.observation_space, observations))
        return observations.to(self.device)

    def from_outputs(self, outputs: Tensor, allowed: Tensor | None = None) -> ActionDistribution:
        """Return the distribution over actions that ``outputs`` stand for."""
        return Categorical(outputs, allowed) if self.is_discrete else DiagonalGaussian(outputs, self.log_std)

    def distribution(self, trajectories: Trajectories) -> ActionDistribution:
        """Return the distributions over actions at all ``[B, T]`` steps; those at padding are arbitrary."""
        outputs = self.outputs(_rows(trajectories))
        return self._distribution(outputs, trajectories)

    def forward(self, trajectories: Trajectories, *, entropy: bool = False) -> Evaluation:
        mask = trajectories.mask
        outputs, values = self.outputs_and_values(_rows(trajectories))
        distribution = self._distribution(outputs, trajectories)
        return Evaluation(
            self._log_probs(distribution, trajectories),
            torch.where(mask, distribution.entropy(), 0.0) if entropy else None,
            None if values is None else torch.where(mask, values.view(mask.shape), 0.0),
        )

    @torch.no_grad()
    def reference_log_probs(self, trajectories: Trajectories) -> Tensor:
        distribution = self._distribution(self.reference_outputs(_rows(trajectories)), trajectories)
        return self._log_probs(distribution, trajectories)

    def _distribution(self, outputs: Tensor, trajectories: Trajectories) -> ActionDistribution:
        return self.from_outputs(outputs.view(*trajectories.mask.shape, -1), trajectories.action_mask)

    @staticmethod
    def _log_probs(distribution: ActionDistribution, trajectories: Trajectories) -> Tensor:
        mask, actions = trajectories.mask, trajectories.actions
        # Padding must not index the table.
        known = actions.where(mask.view(*mask.shape, *[1] * (actions.dim() - 2)), 0)
        return torch.where(mask, distribution.log_prob(known), 0.0)

    @torch.no_grad()
    def next_values(self, trajectories: Trajectories, values: Tensor) -> Tensor:
        following = super().next_values(trajectories, values)
        shown = trajectories.next_observations
        if shown is None or trajectories.truncated is None or trajectories.terminated is None:
            return following
        # Elsewhere the state after an action is the state before the next.
        cut = cuts(trajectories.terminated, trajectories.truncated) & trajectories.mask
        following[cut] = self.state_values(shown[cut])
        return following

    @torch.no_grad()
    def act(
        self,
        observations: Any,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        action_mask: Any = None,
    ) -> tuple[Tensor, Tensor]:
        encoded = self.encode(observations)
        batch = encoded.shape[: encoded.dim() - len(self.observation_shape)]
        allowed = None if action_mask is None else torch.as_tensor(action_mask, device=self.device).bool()
        outputs = self.outputs(encoded.reshape(-1, *self.observation_shape))
        distribution = self.from_outputs(outputs.view(*batch, -1), allowed)
        actions = distribution.mode() if greedy else distribution.sample(generator)
        return actions, distribution.log_prob(actions)

    def actor(self, seed: int) -> Actor:
        """Return a function that acts for batches of observations while the policy does not change.

        A policy over numbered states is written down as a table first, in which an action is drawn many times faster
        than by computing the policy anew.
        """
        states = self.observation_space
        if self.is_discrete and isinstance(states, spaces.Discrete) and states.n <= LARGEST_TABLE:
            return self._table_actor(np.random.default_rng(seed))
        generator = torch.Generator(self.device).manual_seed(seed)

        def act(observations: NDArray[Any], allowed: NDArray[np.bool_] | None) -> NDArray[Any]:
            known = torch.from_numpy(observations)
            return self.act(known, generator=generator, action_mask=allowed)[0].cpu().numpy()

        return act

    def _table_actor(self, generator: np.random.Generator) -> Actor:
        table = self.probability_table().cpu().numpy()
        cumulative = table.cumsum(axis=1)[:, :-1]

        def act(states: NDArray[Any], allowed: NDArray[np.bool_] | None) -> NDArray[Any]:
            if allowed is None:
                below, uniforms = cumulative[states], generator.random(len(states))
            else:
                below = (table[states] * allowed).cumsum(axis=1)
                below, uniforms = below[:, :-1], generator.random(len(states)) * below[:, -1]
            return (below <= uniforms[:, None]).sum(axis=1)

        return act

    def probability_table(self) -> Tensor:
        """Return ``[S, A]`` in float64, π(a|s) for every one of S numbered states; see :meth:`state_distribution`."""
        return self.state_distribution().probabilities

    @torch.no_grad()
    def state_distribution(self, allowed: Tensor | None = None) -> Categorical:
        """Return the distributions over actions in all of S numbered states, in float64.

        Args:
            allowed: ``[S, A]`` booleans, the actions allowed in each state; ``None``: all.

        Raises:
            TypeError: unless observations and actions are discrete.
        """
        if not (self.is_discrete and isinstance(self.observation_space, spaces.Discrete)):
            raise TypeError(f"a table of probabilities needs numbered states, not {self.observation_space}")
        states = torch.arange(int(self.observation_space.n), device=self.device)
        distribution = self.from_outputs(self.outputs(states).double(), allowed)
        assert isinstance(distribution, Categorical)
        return distribution


def acting_step_by_step(policy: Policy) -> MarkovPolicy:
    """Return the policy, if it is one that can act in an environment.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(policy, MarkovPolicy):
        raise TypeError(f"an environment needs a policy that acts step by step, not {type(policy).__name__}")
    return policy


class WeightsPolicy(MarkovPolicy):
    """A policy made of networks, whose file holds their weights; the file is read into a policy made alike."""

    def save(self, path: str | Path) -> None:
        save_tree(path, {"network": type(self).__name__, "weights": self.state_dict()})

    def load(self, path: str | Path) -> Self:
        """Take over the weights, and the reference's, that a policy made with the same arguments has saved.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else, or another network.
        """
        tree = load_tree(path)
        if tree.get("network") != type(self).__name__:
            raise ValueError(f"{path} holds no network of this kind, {type(self).__name__}")
        own = {name: value.shape for name, value in self.state_dict().items()}
        if own != {name: value.shape for name, value in tree["weights"].items()}:
            raise ValueError(f"{path} holds another network: make this one with the arguments of the saved one")
        self.load_state_dict(tree["weights"])
        return self


def _rows(trajectories: Trajectories) -> Tensor:
    """Return ``[B·T, …]`` observations; padding among numbered states becomes state 0, which must not be looked at."""
    observations, mask = trajectories.observations, trajectories.mask
    if observations.dim() == mask.dim():
        observations = observations.where(mask, 0)
    return observations.flatten(0, 1)
