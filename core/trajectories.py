"""Experience, batch first, in one dataclass for grids and language models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

#: Fills positions of ``observations`` and ``actions`` that hold nothing. It is no state, action or token, so padding
#: can never be mistaken for a real end-of-sequence token.
PADDING = -1


class Rows:
    """A dataclass whose tensors share their first axis, and which can be sliced, split, joined and moved as one.

    Fields are tensors, other ``Rows``, or ``None``.
    """

    def __len__(self) -> int:
        return next(len(value) for value in self._values() if value is not None)

    def _values(self) -> Iterator[Tensor | Rows | None]:
        return (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Return the rows that an index tensor, a boolean mask or a slice selects."""
        return type(self)(*(None if value is None else value[rows] for value in self._values()))

    def split(self, size: int) -> Iterator[Self]:
        """Yield consecutive pieces of at most ``size`` rows."""
        return (self[slice(start, start + size)] for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Self:
        """Return the same rows on ``device``."""
        return type(self)(*(None if value is None else value.to(device) for value in self._values()))

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Join parts along the rows; ``[B, T]`` tensors of different lengths T are filled up on the right.

        Observations and actions are filled with :data:`PADDING`, everything else with zero (``False``).
        """
        joined: list[Tensor | Rows | None] = []
        for field in fields(cls):  # type: ignore[arg-type]
            values = [getattr(part, field.name) for part in parts]
            if values[0] is None:
                joined.append(None)
            elif isinstance(values[0], Rows):
                joined.append(type(values[0]).concatenate(values))
            else:
                fill = PADDING if field.name in ("observations", "actions") else 0
                joined.append(torch.cat(_same_length(values, fill)))
        return cls(*joined)


def _same_length(tensors: list[Tensor], fill: int) -> list[Tensor]:
    if tensors[0].dim() < 2:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    padded = []
    for tensor in tensors:
        missing = tensor.new_full((tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:]), fill)
        padded.append(torch.cat([tensor, missing], dim=1) if missing.shape[1] else tensor)
    return padded


@dataclass
class Trajectories(Rows):
    """B rows of at most T steps: a segment of every copy of a vector environment, or a batch of completions.

    Attributes:
        observations: what the policy saw. On an environment ``[B, T, …]``, the observation before each action. For a
            language model ``[B, P]``, the prompt's tokens, filled up with :data:`PADDING` on either side.
        actions: ``[B, T]`` (discrete), the action taken at each step or the token that follows; :data:`PADDING` where
            there is none.
        mask: ``[B, T]`` booleans, true where the policy itself acted: false on padding, and on tokens that somebody
            else wrote in a conversation.
        rewards: ``[B, T]``, the reward that followed each action.
        log_probs: ``[B, T]``, log-probability of each action under the policy that acted, 0 where ``mask`` is false.
        terminated: ``[B, T]`` booleans, true where the task ended with this step: nothing follows, value 0.
        truncated: ``[B, T]`` booleans, true where only the recording ended: the value of what follows is estimated.
        values: ``[B, T]``, the critic's estimate of the state before each action.
        next_values: ``[B, T]``, its estimate of the state after each action, also where an episode was truncated.
        group: ``[B]`` integers, the same for rows that share a start state or a prompt.
    """

    observations: Tensor
    actions: Tensor
    mask: Tensor
    rewards: Tensor | None = None
    log_probs: Tensor | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None
    values: Tensor | None = None
    next_values: Tensor | None = None
    group: Tensor | None = None

    @property
    def returns(self) -> Tensor:
        """``[B]``, the undiscounted sum of each row's rewards."""
        if self.rewards is None:
            raise ValueError("these trajectories carry no rewards, so they have no returns")
        return (self.rewards * self.mask).sum(dim=1)

    @property
    def lengths(self) -> Tensor:
        """``[B]``, how many actions of each row the policy chose."""
        return self.mask.sum(dim=1)


@dataclass
class Preferences(Rows):
    """B pairs of trajectories from the same start, of which ``chosen`` was preferred to ``rejected``.

    Attributes:
        chosen: B trajectories.
        rejected: B trajectories.
        weights: ``[B]``, how much each pair counts: 1 for an observed comparison, a probability when all outcomes of a
            comparison are enumerated. ``None`` counts every pair once.
    """

    chosen: Trajectories
    rejected: Trajectories
    weights: Tensor | None = None

    @property
    def pair_weights(self) -> Tensor:
        """``[B]``, the weights, ones if none were given."""
        return self.chosen.mask.new_ones(len(self), dtype=torch.float32) if self.weights is None else self.weights

    def both(self) -> Trajectories:
        """Return the 2B rows of one batch, chosen first, grouped by pair so that a shared prompt is computed once."""
        rows = Trajectories.concatenate([self.chosen, self.rejected])
        rows.group = torch.arange(len(self), device=rows.mask.device).repeat(2)
        return rows
