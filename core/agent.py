"""What every agent has in common: planners, tabular learners and gradient learners alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from aligngym.core.callbacks import Callback, Checkpoints, Metrics, Progress
from aligngym.core.storage import load_tree, save_tree


class Agent(ABC):
    """Something that learns by repeating one iteration.

    A subclass says what an iteration is (a sweep of value iteration, an episode of Q-learning, an optimiser step of
    DPO), how it acts, how it is judged, and what its state is. Running, progress, tracking, callbacks, saving and
    resuming are here.

    Attributes:
        iteration: iterations done so far, over all calls of :meth:`learn`.
        unit: the name of an iteration in the progress bar.
        headline: metrics shown beside the progress bar.
    """

    iteration: int = 0
    unit: str = "iteration"
    headline: tuple[str, ...] = ()
    _stopped: bool = False

    @abstractmethod
    def iterate(self) -> Metrics:
        """Do one iteration and return its metrics."""

    @abstractmethod
    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Choose an action for each observation."""

    @abstractmethod
    def evaluate(self, *args: Any, **kwargs: Any) -> Metrics:
        """Measure how good the agent is; on what is the subclass's to say."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that learning has changed: tensors, arrays and JSON values, nested."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` returned."""

    @property
    def finished(self) -> bool:
        """Whether further iterations are pointless (a planner that has converged)."""
        return False

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` has been called during this run."""
        return self._stopped

    def stop(self) -> None:
        """End :meth:`learn` after the current iteration; meant for callbacks."""
        self._stopped = True

    def learn(
        self,
        iterations: int | None = None,
        *,
        output: str | Path | None = None,
        checkpoint_every: int = 0,
        trackers: Sequence[str] = ("tensorboard",),
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Self:
        """Do ``iterations`` more iterations, fewer if the agent is finished before.

        Args:
            iterations: how many; ``None`` runs until :attr:`finished`.
            output: a folder for ``metrics.jsonl``, tracker files and checkpoints; nothing is written without it.
            checkpoint_every: iterations between two checkpoints in ``output``; 0 writes none.
            trackers: accelerate's trackers to feed, by name.
            callbacks: called after the built-in ones, in order.
            progress: whether to show a progress bar.

        Returns:
            The agent itself.

        Raises:
            ValueError: for a negative number of iterations, none for an agent that is never finished, or checkpoints
                without a folder.
        """
        if iterations is None and type(self).finished is Agent.finished:
            raise ValueError(f"{type(self).__name__} cannot tell when it is finished: say how many iterations to do")
        if iterations is not None and iterations < 0:
            raise ValueError(f"iterations is how many more to do, at least 0, not {iterations}")
        if checkpoint_every and output is None:
            raise ValueError("checkpoint_every needs output, the folder that checkpoints go to")
        around: list[Callback] = []
        if self.is_main_process:
            around += [Progress()] if progress else []
            around += _tracking(output, trackers) if output is not None else []
        # Every process of a distributed run takes part in a checkpoint; one of them writes it.
        around += [Checkpoints(output, checkpoint_every)] if output is not None and checkpoint_every else []
        around += callbacks if self.is_main_process else []
        self._stopped = False
        done = 0
        started: list[Callback] = []
        try:
            for callback in around:
                callback.on_start(self, iterations)
                started.append(callback)
            while not (self.finished or self._stopped or done == iterations):
                metrics = self.iterate()
                self.iteration += 1
                done += 1
                for callback in around:
                    callback.on_iteration(self, metrics)
        finally:
            for callback in started:
                callback.on_end(self)
        return self

    @property
    def is_main_process(self) -> bool:
        """Whether this process reports and writes; false on the other ranks of a distributed run."""
        return True

    def save(self, path: str | Path) -> None:
        """Write the agent's whole state to one safetensors file; :meth:`load` continues from it exactly."""
        tree = {"agent": type(self).__name__, "iteration": self.iteration, "state": self.state_dict()}
        if self.is_main_process:
            save_tree(path, tree)

    def load(self, path: str | Path) -> Self:
        """Take over the state in ``path``; the agent must have been made with the same arguments.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if another kind of agent wrote it.
        """
        tree = load_tree(path)
        if tree.get("agent") != type(self).__name__:
            writer = tree.get("agent", "something that is no agent")
            raise ValueError(f"{path} was saved by {writer}, and this is {type(self).__name__}")
        self.load_state_dict(tree["state"])
        self.iteration = tree["iteration"]
        return self


def _tracking(output: str | Path, trackers: Sequence[str]) -> list[Callback]:
    # accelerate takes seconds to import, and agents that write nothing do without.
    from aligngym.core.tracking import Tracking

    return [Tracking(output, trackers)]
