"""What learning from a fixed dataset has in common, whether its rows are pairs or single trajectories."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from aligngym.core.gradient_agent import EpochOrder, GradientAgent
from aligngym.core.policy import Policy
from aligngym.core.trajectories import Rows, even_cuts

Batch = TypeVar("Batch", bound=Rows)
Kind = TypeVar("Kind", bound=Rows, covariant=True)

#: Rows that are taken out of a dataset together where there are no batches.
ROWS_AT_ONCE = 256


class Source(Protocol[Kind]):
    """Anything that gives the rows it is asked for, such as the rows themselves."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Kind: ...


class TokenOrder(EpochOrder):
    """Batches of as many rows as fit in a number of tokens, in a new order every epoch: a function of the step alone.

    Every epoch cuts its permutation into as few batches as can be, and these as even as can be. How many there are
    depends on the permutation, so epochs may differ by a batch or two.

    Args:
        lengths: tokens of every row of the dataset.
        tokens_per_batch: most tokens of a batch.
        seed: of the permutations.

    Raises:
        ValueError: if a row has more tokens than a batch.
    """

    def __init__(self, lengths: Sequence[int], tokens_per_batch: int, seed: int) -> None:
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is at least 1, not {tokens_per_batch}")
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > tokens_per_batch:
            raise ValueError(
                f"row {longest + 1} of {len(lengths)} has {lengths[longest]} tokens, more than "
                f"tokens_per_batch={tokens_per_batch}: allow so many, or shorten rows with a smaller max_length"
            )
        super().__init__(len(lengths), 1, seed)
        self.lengths, self.tokens_per_batch = lengths, tokens_per_batch
        # The batches of each epoch, as far as epochs were asked for.
        self._epochs: list[tuple[Tensor, ...]] = []
        self.batch_size = -(-self.size // self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches the first epoch has."""
        return len(self._batches(0))

    def steps(self, epochs: float, done: int = 0) -> int:
        epoch, batch = self._place(done)
        end = epoch + batch / len(self._batches(epoch)) + epochs
        whole = int(end)
        begun = round((end - whole) * len(self._batches(whole)))
        return sum(len(self._batches(number)) for number in range(whole)) + begun - done

    def _batches(self, epoch: int) -> tuple[Tensor, ...]:
        while len(self._epochs) <= epoch:
            rows = self.permutation(len(self._epochs))
            cuts = even_cuts([self.lengths[row] for row in rows.tolist()], self.tokens_per_batch)
            self._epochs.append(rows.tensor_split(cuts[1:-1]))
        return self._epochs[epoch]

    def _place(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and its number there."""
        for epoch in count():
            if step < len(self._batches(epoch)):
                break
            step -= len(self._batches(epoch))
        return epoch, step

    def __call__(self, step: int) -> Tensor:
        epoch, batch = self._place(step)
        return self._batches(epoch)[batch]


def batch_order(data: Source[Any], batch_size: int, tokens_per_batch: int | None, seed: int) -> EpochOrder:
    """Return which rows of a dataset make up each batch: so many rows, or as many as fit in so many tokens.

    Raises:
        ValueError: for a size that is not positive, or a row of more tokens than a batch.
    """
    if tokens_per_batch is None:
        return EpochOrder(len(data), batch_size, seed)
    parts = torch.arange(len(data)).split(ROWS_AT_ONCE)
    lengths = torch.cat([data[rows].sizes()[:2].sum(dim=0) for rows in parts]).tolist()
    return TokenOrder(lengths, tokens_per_batch, seed)


class DatasetAgent(GradientAgent[Batch]):
    """Goes over a dataset in a new order every epoch, and asks the reference about each row once.

    Args:
        policy: what is trained; it names its own reference.
        data: rows to learn from.
        batch_size: rows per optimiser step, on all devices together.
        tokens_per_batch: take as many rows as have this many tokens at most instead, so that every step costs about the
            same: prompts, each once, and completions. The loss stays a mean over the rows of a step. (On a grid, steps:
            states and actions.)
        seed: of the order of the rows, too.
        **options: further arguments of :class:`GradientAgent`.

    Attributes:
        noun: what the rows are called in errors.
        sides: how many trajectories a row has.

    Raises:
        ValueError: if there are no rows, the batch does not divide by the devices, or a row has more tokens than it.
    """

    noun: ClassVar[str] = "rows"
    sides: ClassVar[int] = 1

    def __init__(
        self,
        policy: Policy,
        data: Source[Any],
        *,
        batch_size: int,
        tokens_per_batch: int | None = None,
        seed: int,
        **options: Any,
    ) -> None:
        if len(data) == 0:
            raise ValueError(f"there are no {self.noun} to learn from")
        super().__init__(policy, seed=seed, **options)
        if tokens_per_batch is None and batch_size % self.accelerator.num_processes:
            raise ValueError(f"batch_size={batch_size} does not divide by {self.accelerator.num_processes} devices")
        self.data = data
        self.order = batch_order(data, batch_size, tokens_per_batch, seed)
        # log π_ref of all trajectories of every row, [sides, N], computed when a row is first seen.
        self.reference = torch.full((self.sides, len(data)), torch.nan, device=self.accelerator.device)
        self._seen = torch.zeros(len(data), dtype=torch.bool)

    def learn(self, iterations: int | None = None, *, epochs: float | None = None, **options: Any) -> Self:
        """Go over the dataset ``epochs`` times, or do ``iterations`` steps; see :meth:`Agent.learn`.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if (iterations is None) == (epochs is None):
            raise ValueError("say how long to learn: either iterations or epochs")
        if epochs is not None:
            iterations = self.order.steps(epochs, self.iteration)
        super().learn(iterations, **options)
        return self

    def next_rows(self) -> Tensor:
        """Return the numbers of this process's rows of the current step."""
        return self.order.share(self.iteration, self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def rows_at_once(self) -> int:
        """How many rows to take out of a dataset together: many if they are cut into pieces, and else a batch."""
        return self.order.batch_size if self.steps_at_once is None else ROWS_AT_ONCE

    def all_pieces(self, data: Source[Rows]) -> Iterator[Any]:
        """Yield all rows of a dataset, in the pieces that they are computed in, on the agent's device."""
        for rows in torch.arange(len(data)).split(self.rows_at_once):
            for piece in self.pieces(data[rows]):
                yield piece.to(self.accelerator.device)

    @abstractmethod
    def reference_log_probs(self, data: Any) -> Tensor:
        """Return ``[sides, B]``, log π_ref of the trajectories of some rows."""

    def cached_reference(self, batch: Any, data: Rows) -> Tensor:
        """Return :meth:`reference_log_probs` of a batch's data, computed only when its ``rows`` are first seen."""
        numbers = batch.host.rows
        if not self._seen[numbers].all():
            self.reference[:, batch.rows] = self.reference_log_probs(data).float()
            self._seen[numbers] = True
        return self.reference[:, batch.rows]

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Let the policy act."""
        return self.policy.act(observations, greedy=greedy)[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, the cached reference included."""
        return {**super().state_dict(), "reference": self.reference.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: if it belongs to another number of rows or another policy.
        """
        if state["reference"].shape != self.reference.shape:
            saved, own = state["reference"].shape[1], len(self.data)
            raise ValueError(f"the saved run had {saved} {self.noun}, and this one has {own}: did the data change?")
        super().load_state_dict(state)
        self.reference = state["reference"].to(self.reference.device)
        self._seen = ~state["reference"].isnan().any(dim=0)
