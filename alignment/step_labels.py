"""Solutions with a label for every step: read, checked row by row, and cut into tokens before any training starts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from aligngym.alignment.data import Row, pad_tokens, read_rows, usable_rows
from aligngym.alignment.token_rows import held_back_rows
from aligngym.core.trajectories import PADDING, Rows

if TYPE_CHECKING:
    from aligngym.alignment.process_reward_model import ProcessRewardModel


@dataclass
class StepBatch(Rows):
    """B solutions of at most S steps.

    Attributes:
        tokens: ``[B, T]``, prompt and steps, filled up with :data:`PADDING` on the right.
        ends: ``[B, S]``, where in its row each step's last token is; :data:`PADDING` where there is no step.
        labels: ``[B, S]``, 1 for a right step and 0 for a wrong one.
    """

    tokens: Tensor
    ends: Tensor
    labels: Tensor

    @property
    def mask(self) -> Tensor:
        """``[B, S]``, where there is a step."""
        return self.ends != PADDING


@dataclass(frozen=True)
class StepLabels:
    """Solutions as tokens with a label for every step; ``labels[rows]`` is a padded batch of them.

    Attributes:
        tokens: N sequences, prompt and steps.
        ends: N sequences, where in them each step's last token is.
        labels: N sequences of as many booleans, true for a right step.
        prompts: N prompts, to tell which rows are of the same problem.
    """

    tokens: list[Tensor]
    ends: list[Tensor]
    labels: list[Tensor]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> StepBatch:
        """Return some rows."""
        numbers = rows.tolist()
        tokens, ends, labels = (
            pad_tokens([field[row] for row in numbers]) for field in (self.tokens, self.ends, self.labels)
        )
        return StepBatch(tokens, ends, labels.clamp(min=0).float())

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return sum(map(len, self.ends))

    def subset(self, rows: Iterable[int]) -> StepLabels:
        """Return some rows."""
        rows = list(rows)
        fields = (self.tokens, self.ends, self.labels, self.prompts)
        return StepLabels(*(cast(Any, [field[row] for row in rows]) for field in fields))

    def hold_back(self, size: int, seed: int) -> tuple[StepLabels, StepLabels]:
        """Split off about ``size`` rows for evaluation, so that no prompt is on both sides.

        Raises:
            ValueError: if nothing would be left to train on.
        """
        kept, held_back = held_back_rows(self.prompts, size, seed)
        return self.subset(kept), self.subset(held_back)


def load_step_labels(
    source: str | Path | Sequence[Row],
    model: ProcessRewardModel,
    *,
    max_length: int | None = 1024,
    drop_invalid: bool = False,
) -> StepLabels:
    """Read solutions with a label for every step, in trl's stepwise format.

    Rows have ``prompt``, text or messages; ``completions``, a list of steps as text; and ``labels``, as many booleans,
    true for a right step.

    Args:
        source: a file or Hub id as in :func:`~aligngym.alignment.data.read_rows`, or the rows themselves.
        model: whose tokenizer and separator to use.
        max_length: most tokens of a row; steps that end beyond are cut off, with a warning that says how many.
        drop_invalid: leave out rows that cannot be used, instead of stopping at them.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, has no rows or not the columns, or if rows cannot be used and are not to be
            dropped.
    """
    given = not isinstance(source, (str, Path))
    place = "rows" if given else str(source)
    rows = list(cast(Sequence[Row], source)) if given else read_rows(cast(str, source))
    if not rows:
        raise ValueError(f"{place}: no rows")
    for number, row in enumerate(rows, start=1):
        for column in ("prompt", "completions", "labels"):
            if column not in row:
                raise ValueError(f"{place}, row {number}: no column {column!r} (it has {', '.join(map(repr, row))})")
    rows = usable_rows(place, rows, _complaint, drop_invalid)
    sequences = [model.tokens(row["prompt"], row["completions"]) for row in rows]
    kept = [len(ends) if max_length is None else int((ends < max_length).sum()) for _, ends in sequences]
    total = sum(len(ends) for _, ends in sequences)
    if sum(kept) < total:
        lost = f"{place}: --max-length {max_length} cuts off {1 - sum(kept) / total:.1%} of all steps"
        empty = [number for number, steps in enumerate(kept, start=1) if not steps]
        if empty and (not drop_invalid or len(empty) == len(rows)):
            raise ValueError(
                f"{lost}, and of {len(empty)} rows all (row {empty[0]}): raise it, or leave such rows out with "
                "--drop-invalid"
            )
        warnings.warn(f"{lost}{f', and leaves {len(empty)} rows out' if empty else ''}", stacklevel=2)
    found = [
        (tokens[: int(ends[steps - 1]) + 1], ends[:steps], torch.tensor(row["labels"][:steps]).long(), row["prompt"])
        for (tokens, ends), steps, row in zip(sequences, kept, rows, strict=True)
        if steps
    ]
    tokens, ends, labels, prompts = zip(*found, strict=True)
    return StepLabels(list(tokens), list(ends), list(labels), [json.dumps(prompt) for prompt in prompts])


def _complaint(row: Row) -> str | None:
    """Return why a row cannot be used, ``None`` if it can."""
    prompt, steps, labels = row["prompt"], row["completions"], row["labels"]
    if not isinstance(prompt, (str, list)) or not prompt:
        return "prompt is empty" if not prompt else f"prompt is {type(prompt).__name__}, neither text nor messages"
    if not isinstance(steps, list) or not steps:
        return "completions is not a list of steps"
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str) or not step.strip():
            return f"step {number} is {'empty' if isinstance(step, str) else f'{step!r}, not text'}"
    if not isinstance(labels, list) or len(labels) != len(steps):
        return f"{len(steps)} steps and labels {labels!r}: one label a step is needed"
    wrong = [label for label in labels if not isinstance(label, bool) and label not in (0, 1)]
    return f"the label {wrong[0]!r} is neither true nor false" if wrong else None


def is_stepwise(columns: Collection[str]) -> bool:
    """Return whether rows with these columns are labelled step by step."""
    return {"completions", "labels"} <= set(columns)
