"""What happens around an agent's iterations: progress, tracking, checkpoints, and whatever a user adds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tqdm.auto import tqdm

from aligngym.core.storage import replacing

if TYPE_CHECKING:
    from aligngym.core.agent import Agent

Metrics = dict[str, float]


class Callback:
    """Override the moments you need; each is called on the main process of a distributed run only.

    A callback ends the run by calling ``agent.stop()``.
    """

    def on_start(self, agent: Agent, iterations: int | None) -> None:
        """Before the first of ``iterations`` iterations (``None``: until the agent is finished)."""

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        """After each iteration; ``agent.iteration`` has counted it, ``metrics`` is what it reported."""

    def on_end(self, agent: Agent) -> None:
        """After the last iteration, also when the run ends in an error."""


class History(Callback):
    """Keeps the metrics of every iteration: ``history["return"]`` is their list, from the first one on."""

    def __init__(self) -> None:
        self.records: list[Metrics] = []

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        self.records.append(metrics)

    def __getitem__(self, name: str) -> list[float]:
        """Return one metric of every iteration.

        Raises:
            KeyError: if an iteration did not report it.
        """
        return [record[name] for record in self.records]


class Progress(Callback):
    """A progress bar with the metrics an agent names in ``headline``."""

    def on_start(self, agent: Agent, iterations: int | None) -> None:
        total = None if iterations is None else agent.iteration + iterations
        self.bar = tqdm(total=total, initial=agent.iteration, desc=type(agent).__name__, unit=agent.unit, leave=True)

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        shown = {name.rsplit("/")[-1]: f"{metrics[name]:.4g}" for name in agent.headline if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def on_end(self, agent: Agent) -> None:
        self.bar.close()


class MetricsFile(GeneralTracker):
    """Appends every iteration's metrics to ``metrics.jsonl``, one JSON object a line, flushed at once."""

    name = "metrics"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(logging_dir) / "metrics.jsonl"

    @property
    def tracker(self) -> Path:
        """Where the records go."""
        return self.path

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        # JSON has no infinity and no NaN.
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop lines of later steps, which a killed run wrote after its last checkpoint and will write again."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line cut short by the kill has no newline, and is not JSON.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a name that accelerate does not know."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"unknown tracker {name!r}: choose from {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")


class Tracking(Callback):
    """Sends metrics to ``metrics.jsonl`` and to accelerate's trackers (TensorBoard, wandb, mlflow, …).

    Args:
        folder: where the files go; TensorBoard events under ``folder/tensorboard``.
        trackers: names that accelerate knows.
        every: iterations between two records.

    Raises:
        ValueError: for a tracker that accelerate does not know.
    """

    def __init__(self, folder: str | Path, trackers: Sequence[str] = ("tensorboard",), every: int = 1) -> None:
        check_trackers(trackers)
        self.folder, self.names, self.every = Path(folder), trackers, every

    def on_start(self, agent: Agent, iterations: int | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics_file = MetricsFile("metrics", self.folder)
        metrics_file.forget_after(agent.iteration)
        self.trackers: list[GeneralTracker] = [metrics_file]
        for name in self.names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                self.trackers.append(kind("tensorboard", self.folder, purge_step=agent.iteration + 1))
            else:
                directory = (self.folder,) if kind.requires_logging_directory else ()
                self.trackers.append(kind(self.folder.name, *directory))
        for tracker in self.trackers:
            tracker.start()
        self.started = time.perf_counter()

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        if agent.iteration % self.every:
            return
        for tracker in self.trackers:
            tracker.log({**metrics, "seconds": time.perf_counter() - self.started}, step=agent.iteration)

    def on_end(self, agent: Agent) -> None:
        for tracker in self.trackers:
            tracker.finish()


class Checkpoints(Callback):
    """Saves everything needed to continue exactly, every so many iterations and at the end of a run without error.

    One file is kept, ``folder/checkpoint.safetensors``, replaced only when its successor is complete.
    """

    name = "checkpoint.safetensors"

    def __init__(self, folder: str | Path, every: int) -> None:
        self.path, self.every = Path(folder) / self.name, every

    def on_start(self, agent: Agent, iterations: int | None) -> None:
        self.last = None if iterations is None else agent.iteration + iterations

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        if self.every and agent.iteration % self.every == 0:
            agent.save(self.path)

    def on_end(self, agent: Agent) -> None:
        # An error may have come in the middle of an iteration, whose half must not be saved.
        complete = agent.iteration == self.last or agent.stopped or agent.finished
        if complete and self.every and agent.iteration % self.every:
            agent.save(self.path)
