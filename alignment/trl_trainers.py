"""trl's trainers as agents: they train as :class:`~aligngym.core.agent.Agent` says, and trl says what the loss is.

The batches, the learning rate and dropout of a step are functions of the seed and the step, and the optimiser is the
agent's. So a run is saved to safetensors and resumed to the same bits; transformers' own checkpoints hold pickles.
Nothing is reported to anybody, and what trainers seed or change besides the trained weights is put back.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aligngym.core.agent import Agent
from aligngym.core.callbacks import Callback, Checkpoints, Metrics, Progress
from aligngym.core.gradient_agent import EpochOrder
from aligngym.core.randomness import derived_seed, seeded
from aligngym.core.schedules import Schedule, as_schedule
from aligngym.core.tracking import Tracking


class TrainerAgent(Agent):
    """An agent whose steps are done by one of trl's trainers, on one device.

    Args:
        model: what is trained, where it requires gradients.
        dataset: rows of tokens, in the columns that the trainer knows.
        learning_rate: a number, or a schedule over steps.
        batch_size: rows of an optimiser step.
        micro_batch_size: rows computed at once; it must divide ``batch_size``.
        max_grad_norm: gradients longer than this are shortened to it.
        seed: of the order of the rows, and of dropout.

    Attributes:
        names: what the trainer calls the metrics of a step, and what we do.

    Raises:
        ValueError: if nothing can be trained, sizes do not fit, or there are several processes.
    """

    unit = "step"
    headline: tuple[str, ...] = ("loss",)
    names: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        learning_rate: float | Schedule = 2e-4,
        batch_size: int = 8,
        micro_batch_size: int | None = None,
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        size = micro_batch_size or batch_size
        if batch_size < 1 or size < 1 or batch_size % size:
            raise ValueError(f"a batch of {batch_size} rows cannot be computed {size} at a time in equal pieces")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"{type(self).__name__} trains on one device: start it without a launcher")
        self.pieces = min(batch_size // size, len(dataset))
        self.model, self.dataset, self.max_grad_norm, self.seed = model, dataset, max_grad_norm, seed
        self.schedule = as_schedule(learning_rate)
        self.order = EpochOrder(len(dataset), batch_size, seed)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.optimizer = torch.optim.AdamW(parameters, lr=self.schedule(0), weight_decay=0.0, fused=True)

    @abstractmethod
    def trainer(self, arguments: dict[str, Any], **options: Any) -> Trainer:
        """Return trl's trainer, made with ``arguments`` of its configuration and further options."""

    def learn(
        self,
        iterations: int | None = None,
        *,
        epochs: float | None = None,
        output: str | Path | None = None,
        checkpoint_every: int = 0,
        trackers: Sequence[str] = ("tensorboard",),
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Self:
        """Go over the rows ``epochs`` times, or do ``iterations`` steps; see :meth:`Agent.learn`.

        Raises:
            ValueError: unless exactly one of the two is given.
            FloatingPointError: if the loss or its gradient is not finite.
        """
        if (iterations is None) == (epochs is None):
            raise ValueError("say how long to learn: either iterations or epochs")
        steps = round(cast(float, epochs) * self.order.steps_per_epoch) if iterations is None else iterations
        if steps < 0 or (checkpoint_every and output is None):
            raise ValueError(f"steps={steps} is at least 0, and checkpoint_every needs output, a folder")
        around: list[Callback] = [Progress()] if progress else []
        around += [Tracking(output, trackers)] if output is not None else []
        around += [Checkpoints(output, checkpoint_every)] if output is not None and checkpoint_every else []
        self._stopped = False
        started: list[Callback] = []
        try:
            for callback in [*around, *callbacks]:
                callback.on_start(self, steps)
                started.append(callback)
            if steps:
                self._train(steps, started)
        finally:
            for callback in started:
                callback.on_end(self)
        return self

    def _train(self, steps: int, callbacks: list[Callback]) -> None:
        with tempfile.TemporaryDirectory() as folder, _undisturbed_generators(), warnings.catch_warnings():
            # Of options that trl sets, not the user.
            warnings.filterwarnings("ignore", category=FutureWarning)
            trainer = self.trainer(
                self._arguments(steps, folder),
                train_dataset=self.dataset,
                callbacks=[_Steps(self, callbacks)],
                optimizers=(self.optimizer, None),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.get_train_dataloader = lambda: self._batches(steps, trainer.data_collator)  # type: ignore[method-assign]
            trainer.train()

    def _arguments(self, steps: int, folder: str) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": self.order.batch_size // self.pieces,
            "gradient_accumulation_steps": self.pieces,
            "max_grad_norm": self.max_grad_norm,
            "lr_scheduler_type": "constant",
            "seed": self.seed,
            "max_length": None,  # rows are cut before, with a warning
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            # The frozen weights have the dtype that was chosen; autocast would choose again.
            "bf16": False,
            "fp16": False,
            "gradient_checkpointing": False,
        }

    def _batches(self, steps: int, collate: Any) -> DataLoader[Any]:
        """Return the pieces of the next ``steps`` batches, ``self.pieces`` for each."""
        rows: list[list[int]] = []
        for step in range(self.iteration, self.iteration + steps):
            batch = self.order(step)
            # The pieces of the shorter batch that ends an epoch are made equal with rows that the epoch began with.
            first = self.order(step - step % self.order.steps_per_epoch)
            batch = torch.cat([batch, first[: -len(batch) % self.pieces]])
            rows += [piece.tolist() for piece in batch.chunk(self.pieces)]
        return DataLoader(cast(Any, self.dataset), batch_sampler=rows, collate_fn=collate)

    def iterate(self) -> Metrics:
        """Do one step, with a trainer of its own; :meth:`learn` makes one for all."""
        records: list[Metrics] = []

        class Record(Callback):
            def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
                agent.iteration -= 1  # whoever called this counts
                records.append(metrics)

        self._train(1, [Record()])
        return records[0]

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters and the optimiser's state."""
        return {"model": self._trained(), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another model.
        """
        own = self._trained()
        if own.keys() != state["model"].keys():
            raise ValueError("the saved parameters are not those of this model: was it made with other arguments?")
        for name, parameter in own.items():
            parameter.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self.model.named_parameters() if parameter.requires_grad}


class _Steps(TrainerCallback):
    """Sets the learning rate and the seed of every step, and tells our callbacks what the trainer logs."""

    def __init__(self, agent: TrainerAgent, callbacks: list[Callback]) -> None:
        self.agent, self.callbacks = agent, callbacks
        self.piece = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.piece = 0
        self._seed()
        for group in self.agent.optimizer.param_groups:
            group["lr"] = self.agent.schedule(self.agent.iteration)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.piece += 1
        self._seed()

    def _seed(self) -> None:
        torch.manual_seed(derived_seed(self.agent.seed, self.agent.iteration, 0, self.piece))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, agent = kwargs.get("logs", {}), self.agent
        if "loss" not in logs:  # the summary after the last step
            return
        names = {"loss": "loss", **agent.names, "grad_norm": "gradient_norm"}
        metrics = {ours: float(logs[theirs]) for theirs, ours in names.items() if theirs in logs}
        metrics["learning_rate"] = agent.schedule(agent.iteration)
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(metrics[name]):
                raise FloatingPointError(f"step {agent.iteration}: the {name} is {metrics[name]}")
        agent.iteration += 1
        for callback in self.callbacks:
            callback.on_iteration(agent, metrics)
        control.should_training_stop |= agent.stopped


@contextlib.contextmanager
def _undisturbed_generators() -> Iterator[None]:
    """Put all global generators back after a block: trainers seed them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with seeded(0):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
