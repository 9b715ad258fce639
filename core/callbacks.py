"""What happens around an agent's iterations: progress, checkpoints, and whatever a user adds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

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
