"""A policy that is a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import gymnasium
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from aligngym.core.markov_policy import MarkovPolicy
from aligngym.core.spaces import table_shape
from aligngym.core.storage import load_tree, save_tree


class TabularPolicy(MarkovPolicy):
    """A softmax over a table: π(a|s) ∝ exp(logits[s, a]).

    Every policy with full support can be written so, which makes it the policy whose optimum can be reached exactly.
    Observations are state numbers, ``[B, T]``.

    Args:
        num_states: S, rows of the table.
        num_actions: A, columns of the table.
        reference: ``[S, A]`` probabilities, all positive, to start from and to be regularised towards; the uniform
            policy by default.
        critic: whether to learn a table of values V(s) as well.

    Raises:
        ValueError: if the reference has another shape, a zero, or rows that do not sum to one.
    """

    reference_logits: Tensor

    def __init__(self, num_states: int, num_actions: int, reference: Any = None, *, critic: bool = False) -> None:
        super().__init__(spaces.Discrete(num_states), spaces.Discrete(num_actions))
        if reference is None:
            reference = torch.full((num_states, num_actions), 1 / num_actions, dtype=torch.float64)
        probabilities = torch.as_tensor(reference, dtype=torch.float64)
        if probabilities.shape != (num_states, num_actions):
            raise ValueError(f"the reference has shape {tuple(probabilities.shape)}, not {(num_states, num_actions)}")
        if not (probabilities > 0).all() or not torch.allclose(probabilities.sum(1), torch.ones(()).double()):
            raise ValueError("every row of the reference must be positive and sum to one")
        logits = probabilities.log().float()
        self.logits = nn.Parameter(logits.clone())
        self.values = nn.Parameter(torch.zeros(num_states, 1)) if critic else None
        self.register_buffer("reference_logits", logits)

    @classmethod
    def for_env(cls, env: gymnasium.Env, reference: Any = None, *, critic: bool = False) -> Self:
        """Make a table that fits an environment with discrete observations and actions, both counted from 0.

        Raises:
            TypeError: if the environment's spaces are not of that kind.
        """
        return cls(*table_shape(env), reference, critic=critic)

    @property
    def probabilities(self) -> Tensor:
        """``[S, A]``, π(a|s), detached."""
        return self.logits.detach().softmax(dim=1)

    @property
    def has_critic(self) -> bool:
        return self.values is not None

    def outputs(self, observations: Tensor) -> Tensor:
        return F.embedding(observations, self.logits)

    def reference_outputs(self, observations: Tensor) -> Tensor:
        return F.embedding(observations, self.reference_logits)

    def state_values(self, observations: Tensor) -> Tensor:
        if self.values is None:
            return super().state_values(observations)
        return F.embedding(observations, self.values)[:, 0]

    def save(self, path: str | Path) -> None:
        values = {} if self.values is None else {"values": self.values}
        save_tree(path, {"logits": self.logits, "reference_logits": self.reference_logits, **values})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else.
        """
        tree = load_tree(path)
        if tree.keys() - {"values"} != {"logits", "reference_logits"}:
            raise ValueError(f"{path} holds no table, but {', '.join(map(str, tree))}")
        policy = cls(*tree["logits"].shape, critic="values" in tree)
        policy.logits.data = tree["logits"]
        policy.reference_logits = tree["reference_logits"]
        if policy.values is not None:
            policy.values.data = tree["values"]
        return policy
