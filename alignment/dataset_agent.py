"""What learning from a fixed dataset has in common, whether its rows are pairs or single trajectories."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from aligngym.core.gradient_agent import EpochOrder, GradientAgent
from aligngym.core.policy import Policy
from aligngym.core.trajectories import Rows

Batch = TypeVar("Batch", bound=Rows)
Kind = TypeVar("Kind", bound=Rows, covariant=True)


class Source(Protocol[Kind]):
    """Anything that gives the rows it is asked for, such as the rows themselves."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Kind: ...


class DatasetAgent(GradientAgent[Batch]):
    """Goes over a dataset in a new order every epoch, and asks the reference about each row once.

    Args:
        policy: what is trained; it names its own reference.
        data: rows to learn from.
        batch_size: rows per optimiser step, on all devices together.
        seed: of the order of the rows, too.
        **options: further arguments of :class:`GradientAgent`.

    Attributes:
        noun: what the rows are called in errors.
        sides: how many trajectories a row has.

    Raises:
        ValueError: if there are no rows, or the batch does not divide by the devices.
    """

    noun: ClassVar[str] = "rows"
    sides: ClassVar[int] = 1

    def __init__(self, policy: Policy, data: Source[Any], *, batch_size: int, seed: int, **options: Any) -> None:
        if len(data) == 0:
            raise ValueError(f"there are no {self.noun} to learn from")
        super().__init__(policy, seed=seed, **options)
        if batch_size % self.accelerator.num_processes:
            raise ValueError(f"batch_size={batch_size} does not divide by {self.accelerator.num_processes} devices")
        self.data = data
        self.order = EpochOrder(len(data), batch_size, seed)
        # log π_ref of all trajectories of every row, [sides, N], computed when a row is first seen.
        self.reference = torch.full((self.sides, len(data)), torch.nan)

    def learn(self, iterations: int | None = None, *, epochs: float | None = None, **options: Any) -> Self:
        """Go over the dataset ``epochs`` times, or do ``iterations`` steps; see :meth:`Agent.learn`.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if (iterations is None) == (epochs is None):
            raise ValueError("say how long to learn: either iterations or epochs")
        if epochs is not None:
            iterations = round(epochs * self.order.steps_per_epoch)
        super().learn(iterations, **options)
        return self

    def next_rows(self) -> Tensor:
        """Return the numbers of this process's rows of the current step."""
        return self.order.share(self.iteration, self.accelerator.process_index, self.accelerator.num_processes)

    @abstractmethod
    def reference_log_probs(self, data: Any) -> Tensor:
        """Return ``[sides, B]``, log π_ref of the trajectories of some rows."""

    def cached_reference(self, data: Rows, rows: Tensor) -> Tensor:
        """Return :meth:`reference_log_probs` of the rows numbered ``rows``, computed only when they are first seen."""
        where = rows.cpu()
        known = self.reference[:, where]
        if not known.isnan().any():
            return known.to(rows.device)
        reference = self.reference_log_probs(data)
        self.reference[:, where] = reference.float().cpu()
        return reference

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Let the policy act."""
        return self.policy.act(observations, greedy=greedy)[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, the cached reference included."""
        return {**super().state_dict(), "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: if it belongs to another number of rows or another policy.
        """
        if state["reference"].shape != self.reference.shape:
            saved, own = state["reference"].shape[1], len(self.data)
            raise ValueError(f"the saved run had {saved} {self.noun}, and this one has {own}: did the data change?")
        super().load_state_dict(state)
        self.reference = state["reference"]
