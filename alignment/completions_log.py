"""What a language model writes while it learns, to be read: in the terminal, in TensorBoard, and in a file."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from aligngym.alignment.prompt_sampler import Completions, PromptSampler
from aligngym.core.agent import Agent
from aligngym.core.callbacks import Callback, Metrics
from aligngym.core.tracking import forget_lines_after


class CompletionsLog(Callback):
    """Shows some completions of a sampler's last sample, with what each reward function gave for them.

    Args:
        sampler: whose completions they are.
        every: iterations between two looks.
        count: how many are shown, those of the highest and of the lowest rewards first.
        folder: the run's folder, for ``completions.jsonl`` and TensorBoard's text tab; ``None``: the terminal only.
        terminal: whether to print them.
        width: of the printed lines.

    Raises:
        ValueError: for a number below 1.
    """

    def __init__(
        self,
        sampler: PromptSampler,
        *,
        every: int = 10,
        count: int = 2,
        folder: str | Path | None = None,
        terminal: bool = True,
        width: int = 100,
    ) -> None:
        if every < 1 or count < 1:
            raise ValueError(f"every={every} and count={count} are at least 1")
        self.sampler, self.every, self.count = sampler, every, count
        self.folder, self.terminal, self.width = None if folder is None else Path(folder), terminal, width
        self._writer: SummaryWriter | None = None

    def on_start(self, agent: Agent, iterations: int | None) -> None:
        if self.folder is not None:
            forget_lines_after(self._file, agent.iteration)
            self._writer = SummaryWriter(self.folder / "completions", purge_step=agent.iteration + 1)

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        written = self.sampler.last
        if written is None or (agent.iteration - 1) % self.every:
            return
        shown = self._choose(written)
        if self.terminal:
            tqdm.write(self._as_text(written, shown, agent.iteration))
        if self._writer is not None:
            self._writer.add_text("completions", _as_markdown(written, shown), agent.iteration)
            self._append(written, agent.iteration)

    def on_end(self, agent: Agent) -> None:
        if self._writer is not None:
            self._writer.close()

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        return self.folder / "completions.jsonl"

    def _choose(self, written: Completions) -> list[int]:
        """Return the best, the worst, the second best, and so on."""
        order = written.rewards.argsort(descending=True).tolist()
        alternating = [row for pair in zip(order, reversed(order), strict=True) for row in pair]
        return list(dict.fromkeys(alternating))[: self.count]

    def _as_text(self, written: Completions, shown: list[int], iteration: int) -> str:
        blocks = [f"── iteration {iteration}: {len(shown)} of {len(written.texts)} completions ".ljust(self.width, "─")]
        for row in shown:
            blocks.append(f"▸ {textwrap.shorten(written.prompts[row], self.width - 2, placeholder=' …')}")
            blocks.append(f"  reward {_judgement(written, row)}")
            paragraphs = written.texts[row].strip().splitlines() or ["(nothing)"]
            blocks += [
                textwrap.fill(line, self.width, initial_indent="  │ ", subsequent_indent="  │ ") or "  │"
                for line in paragraphs
            ]
        return "\n".join(blocks)

    def _append(self, written: Completions, iteration: int) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            for row, (prompt, text) in enumerate(zip(written.prompts, written.texts, strict=True)):
                record = {
                    "step": iteration,
                    "prompt": prompt,
                    "completion": text,
                    "reward": float(written.rewards[row]),
                    **_components(written, row),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _components(written: Completions, row: int) -> dict[str, float]:
    """Return what each reward function gave, where it applies."""
    found = {name: float(values[row]) for name, values in written.components.items()}
    return {name: value for name, value in found.items() if value == value}


def _judgement(written: Completions, row: int) -> str:
    parts = _components(written, row)
    inner = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return f"{float(written.rewards[row]):.3g}" + (f"  ({inner})" if len(parts) > 1 else "")


def _as_markdown(written: Completions, shown: list[int]) -> str:
    def cell(text: str) -> str:
        return text.strip().replace("|", "\\|").replace("\n", "<br>")

    rows = [f"| {cell(written.prompts[r])} | {cell(written.texts[r])} | {_judgement(written, r)} |" for r in shown]
    return "\n".join(["| prompt | completion | reward |", "|---|---|---|", *rows])
