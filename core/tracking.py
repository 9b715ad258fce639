"""Where the metrics of a run go: a file of lines, and accelerate's trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from aligngym.core.callbacks import Callback, Metrics
from aligngym.core.storage import replacing

if TYPE_CHECKING:
    from aligngym.core.agent import Agent


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


def forget_lines_after(path: Path, step: int) -> None:
    """Drop the lines of later steps from a file of JSON lines, if there is one.

    A killed run wrote them after its last checkpoint, and will write them again when it is resumed.
    """
    if not path.exists():
        return
    # What follows the last newline was cut short by the kill, and is not JSON. (A text may hold other line ends.)
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


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
        forget_lines_after(metrics_file.path, agent.iteration)
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
