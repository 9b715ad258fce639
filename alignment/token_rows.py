"""Datasets of tokens: pairs of completions of a prompt, and single completions with a label."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from aligngym.core.randomness import derived_seed
from aligngym.core.trajectories import PADDING, Preferences, Rows, Trajectories


def pad_tokens(sequences: list[Tensor], side: str = "right") -> Tensor:
    """Return ``[B, T]`` with the sequences in its rows, filled up with :data:`PADDING` on one side."""
    return pad_sequence(sequences, batch_first=True, padding_value=PADDING, padding_side=side)


def held_back_rows(prompts: Sequence[Hashable], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the rows to keep and about ``size`` rows to hold back, all rows of a prompt on the same side.

    Raises:
        ValueError: if nothing would be kept.
    """
    members: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(row)
    groups = list(members.values())
    held_back: list[int] = []
    for group in torch.randperm(len(groups), generator=torch.Generator().manual_seed(derived_seed(seed))).tolist():
        if len(held_back) >= size:
            break
        held_back += groups[group]
    kept = sorted(set(range(len(prompts))) - set(held_back))
    if not kept:
        raise ValueError(f"holding back {size} of {len(prompts)} rows leaves none to train on: give --eval a file")
    return kept, sorted(held_back)


@dataclass
class Labelled(Rows):
    """B trajectories of which each is desirable or undesirable.

    Attributes:
        trajectories: B trajectories.
        desirable: ``[B]`` booleans.
        weights: ``[B]``, how much each counts: 1 for an observed label, a probability when all labels of all
            trajectories are enumerated. ``None`` counts every row once.
    """

    trajectories: Trajectories
    desirable: Tensor
    weights: Tensor | None = None

    @property
    def row_weights(self) -> Tensor:
        """``[B]``, the weights, ones if none were given."""
        return torch.ones_like(self.desirable, dtype=torch.float32) if self.weights is None else self.weights

    @property
    def signs(self) -> Tensor:
        """``[B]``, 1 for desirable rows and −1 for the others."""
        return 2.0 * self.desirable - 1


@dataclass(frozen=True)
class TokenRows:
    """N rows, in whose fields each is a tensor of tokens or a label.

    Attributes:
        prompts: N prompts, one-dimensional tensors of token ids.
    """

    prompts: list[Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens in all, every prompt once."""
        values = [value for field in fields(self) for value in getattr(self, field.name)]
        return sum(len(value) for value in values if isinstance(value, Tensor))

    def trajectories(self, field: str, rows: Tensor) -> Trajectories:
        """Return the completions in a field as trajectories, of the row numbers ``rows``."""
        numbers = rows.tolist()
        actions = pad_tokens([getattr(self, field)[row] for row in numbers])
        return Trajectories(pad_tokens([self.prompts[row] for row in numbers], "left"), actions, actions != PADDING)

    def subset(self, rows: Iterable[int]) -> Self:
        """Return some of the rows."""
        rows = list(rows)
        return type(self)(*([getattr(self, field.name)[row] for row in rows] for field in fields(self)))

    def hold_back(self, size: int, seed: int) -> tuple[Self, Self]:
        """Split off about ``size`` rows for evaluation, so that no prompt is on both sides.

        Raises:
            ValueError: if nothing would be left to train on.
        """
        kept, held_back = held_back_rows([tuple(prompt.tolist()) for prompt in self.prompts], size, seed)
        return self.subset(kept), self.subset(held_back)


@dataclass(frozen=True)
class TokenPreferences(TokenRows):
    """Pairs of completions as tokens; ``preferences[rows]`` is a padded batch of them, for :class:`DPO`.

    Attributes:
        prompts: N prompts, one-dimensional tensors of token ids.
        chosen: N completions, the end-of-sequence token included.
        rejected: N completions, likewise.
    """

    chosen: list[Tensor]
    rejected: list[Tensor]

    def __getitem__(self, rows: Tensor) -> Preferences:
        """Return the pairs of the row numbers ``rows``."""
        return Preferences(self.trajectories("chosen", rows), self.trajectories("rejected", rows))


@dataclass(frozen=True)
class TokenLabelled(TokenRows):
    """Completions as tokens, each desirable or not; ``labelled[rows]`` is a padded batch of them, for :class:`KTO`.

    Attributes:
        prompts: N prompts, one-dimensional tensors of token ids.
        completion: N completions, the end-of-sequence token included.
        label: N booleans, true for desirable ones.
    """

    completion: list[Tensor]
    label: list[bool]

    def __getitem__(self, rows: Tensor) -> Labelled:
        """Return the rows numbered ``rows``."""
        return Labelled(self.trajectories("completion", rows), torch.tensor([self.label[row] for row in rows.tolist()]))
