"""The training loop: a batch becomes a loss, the loss a step. There is no second one."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Generic, Self, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor

from aligngym.core.agent import Agent
from aligngym.core.callbacks import Callback, Metrics
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed, seeded
from aligngym.core.schedules import Schedule, as_schedule
from aligngym.core.trajectories import Rows

Batch = TypeVar("Batch", bound=Rows)
AnyRows = TypeVar("AnyRows", bound=Rows)

#: How accelerate spreads the parameters of one model over processes.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class GradientAgent(Agent, Generic[Batch]):
    """An agent that improves a policy by gradient steps.

    A subclass says where a batch comes from (:meth:`next_batch`) and what its losses are (:meth:`losses`). A batch is
    what one optimiser step sees, on all devices together; it may be computed in pieces (:meth:`pieces`) to save memory.
    The sum of all pieces' losses is divided by the weight of the whole batch, so that neither pieces nor devices change
    the step.

    Args:
        policy: what is trained.
        learning_rate: a number, or a :class:`Schedule` over iterations.
        optimizer: a torch optimiser over the policy's parameters; AdamW without weight decay by default.
        micro_batch_size: rows computed at once on one device; ``None``: as many as the policy is best given.
        max_grad_norm: gradients longer than this are shortened to it; ``None`` leaves them.
        seed: of everything random in training.
        accelerator: for several devices or mixed precision; a plain one by default.

    Raises:
        ValueError: if nothing in the policy can be trained, a size is not positive, or the accelerator would
            accumulate gradients a second time.
    """

    unit = "step"
    headline: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float | Schedule,
        optimizer: torch.optim.Optimizer | None = None,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError("no parameter of the policy requires a gradient, so there is nothing to train")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is a number of rows, at least 1, not {micro_batch_size}")
        self.policy = policy
        self.schedule = as_schedule(learning_rate)
        self.micro_batch_size = micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.accelerator = accelerator or Accelerator()
        if self.accelerator.gradient_accumulation_steps != 1:
            raise ValueError("micro_batch_size accumulates gradients; leave the accelerator's accumulation steps at 1")
        if optimizer is None:
            optimizer = torch.optim.AdamW(trainable, lr=self.schedule(0), weight_decay=0.0, fused=True)
        # The wrapped model synchronises gradients between devices; on one device it is the policy itself.
        self.model = self.accelerator.prepare(policy)
        # accelerate's wrapper scales gradients and keeps devices in step; where there is neither, it only takes time.
        alone = self.accelerator.distributed_type == DistributedType.NO and self.accelerator.scaler is None
        self.optimizer = optimizer if alone else self.accelerator.prepare(optimizer)
        # Where parameters are spread over devices, accelerate knows them as those of a model.
        self._clipped = trainable if alone else list(policy.parameters())
        #: An iteration, and how many gradient steps have been taken in it.
        self._taken = (0, 0)

    def learn(self, iterations: int | None = None, *, callbacks: Sequence[Callback] = (), **options: Any) -> Self:
        """Do ``iterations`` more iterations; see :meth:`Agent.learn`."""
        return super().learn(iterations, callbacks=[*self.policy.callbacks, *callbacks], **options)

    @abstractmethod
    def next_batch(self) -> Batch:
        """Return this process's share of the batch for iteration ``self.iteration``."""

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one loss per row or per action, and metrics likewise, each already multiplied by its weight."""

    def weight(self, batch: Batch) -> float:
        """What the sum of a batch's losses is divided by: its number of rows, unless rows have weights."""
        return float(len(batch))

    def iterate(self) -> Metrics:
        """Take one optimiser step on the next batch."""
        return self.step(self.next_batch())

    def step(self, batch: Batch) -> Metrics:
        """Take one optimiser step on ``batch``, piece by piece, and return the weighted means of the metrics.

        Raises:
            FloatingPointError: if the loss or its gradient is not finite; the policy is then as it was.
        """
        if not self.model.training:
            self.model.train()
        try:
            metrics = self.backward(batch)
            norm = self.accelerator.clip_grad_norm_(self._clipped, self.max_grad_norm or float("inf"))
            metrics |= {"gradient_norm": float(norm), "learning_rate": self.schedule(self.iteration)}
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(metrics[name]):
                    raise FloatingPointError(
                        f"iteration {self.iteration}: the {name} is {metrics[name]}; nothing changed"
                    )
            for group in self.optimizer.param_groups:
                group["lr"] = metrics["learning_rate"]
            self.optimizer.step()
            self._taken = (self.iteration, self._steps_taken + 1)
        finally:
            # Also after an error: what it left behind would become part of the next step.
            self.optimizer.zero_grad()
        return metrics

    def pieces(self, rows: AnyRows) -> list[AnyRows]:
        """Return rows in the pieces that they are computed in one after the other, at least one; on any device.

        Pieces have ``micro_batch_size`` rows; or, if that is ``None``, about equal numbers of steps, as many as the
        policy's ``steps_at_once`` says.
        """
        if self.micro_batch_size is not None:
            return list(rows.split(self.micro_batch_size))
        at_once = self.steps_at_once
        return [rows] if at_once is None else rows.host.pieces(at_once)

    @property
    def steps_at_once(self) -> int | None:
        """How many steps a piece has at most, if pieces are cut by steps."""
        # Where parameters are spread over processes, these must call the model equally often, and they may have
        # different numbers of steps. Where each has all parameters they meet in the last piece alone.
        cut_by_rows = self.micro_batch_size is not None or self.accelerator.distributed_type in _SHARDED
        return None if cut_by_rows else self.policy.steps_at_once

    def backward(self, batch: Batch) -> Metrics:
        """Accumulate the gradient of the mean loss of ``batch``, and return the mean of every metric."""
        accelerator = self.accelerator
        weight = accelerator.reduce(torch.tensor(self.weight(batch), device=accelerator.device), "sum")
        sums: dict[str, Tensor] = {}
        pieces = self.pieces(batch)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            numbers = (self.seed, self.iteration, self._steps_taken, accelerator.process_index, number)
            with (
                nullcontext() if self.policy.deterministic else seeded(*numbers),
                nullcontext() if last else accelerator.no_sync(self.model),
            ):
                losses, metrics = self.losses(piece.to(accelerator.device))
                # Devices average their gradients, and their losses are parts of one sum.
                accelerator.backward(losses.sum() * accelerator.num_processes / weight)
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] = sums.get(name, 0) + values.detach().sum() / weight
        totals = accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum")
        return dict(zip(sums, totals.tolist(), strict=True))

    @property
    def _steps_taken(self) -> int:
        """Gradient steps of this iteration so far, so that each has a dropout of its own."""
        iteration, steps = self._taken
        return steps if iteration == self.iteration else 0

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.accelerator.is_main_process

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters and the optimiser's state; all randomness follows from the seed and the iteration."""
        return {"policy": self.policy.trainable_state(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.policy.load_trainable_state(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._taken = (0, 0)


class EpochOrder:
    """Which rows of a dataset make up each batch: a new permutation every epoch, a function of the step alone.

    Because nothing is remembered between steps, training resumes at any step with the same batches.

    Args:
        size: rows of the dataset.
        batch_size: rows of a batch; the last batch of an epoch is smaller if they do not divide.
        seed: of the permutations.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"an order needs at least one row and batches of at least one, not {size}, {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed

    @property
    def steps_per_epoch(self) -> int:
        """How many batches cover the dataset once."""
        return -(-self.size // self.batch_size)

    def steps(self, epochs: float, done: int = 0) -> int:
        """Return how many steps cover the dataset ``epochs`` times, after ``done`` steps."""
        return round(epochs * self.steps_per_epoch)

    def permutation(self, epoch: int) -> Tensor:
        """Return all row numbers in the order of an epoch."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        return torch.randperm(self.size, generator=generator)

    def share(self, step: int, process: int, processes: int) -> Tensor:
        """Return the rows of batch ``step`` for one of several processes.

        Every process gets as many rows; what does not divide waits for the next epoch's order. A batch of fewer rows
        than processes has some of them twice, because every process takes part in every step.
        """
        rows = self(step)
        if len(rows) < processes:
            rows = rows.repeat(processes)[:processes]
        return rows[: len(rows) // processes * processes][process::processes]

    def __call__(self, step: int) -> Tensor:
        """Return the row numbers of batch ``step``, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.permutation(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
