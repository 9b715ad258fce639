"""Demonstrations: read, checked row by row, and cut into tokens before any training starts."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_convert_to_chatml
from trl.data_utils import common_prefix_length

from aligngym.alignment.data import Row, pad_tokens, read_rows, usable_rows
from aligngym.alignment.token_rows import held_back_rows
from aligngym.core.trajectories import Trajectories

#: What trl gives the tokens that it does not learn.
IGNORED = -100


@dataclass(frozen=True)
class Demonstrations:
    """Token sequences, and which of their tokens are learned; ``demonstrations[rows]`` is a padded batch of them.

    Attributes:
        tokens: N sequences, one-dimensional tensors of token ids, the end-of-sequence token included.
        learned: N booleans of the same lengths, true for tokens whose probability is to rise; never for the first.
    """

    tokens: list[Tensor]
    learned: list[Tensor]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> Trajectories:
        """Return some rows as trajectories: what stands before the first learned token is their observation."""
        numbers = rows.tolist()
        starts = [self._start(row) for row in numbers]
        parts = list(zip(numbers, starts, strict=True))
        actions = pad_tokens([self.tokens[row][start:] for row, start in parts])
        mask = pad_tokens([self.learned[row][start:].long() for row, start in parts]) == 1
        return Trajectories(pad_tokens([self.tokens[row][:start] for row, start in parts], "left"), actions, mask)

    def _start(self, row: int) -> int:
        return int(self.learned[row].int().argmax())

    @property
    def prompts(self) -> list[Tensor]:
        """What stands before the first learned token of each row."""
        return [self.tokens[row][: self._start(row)] for row in range(len(self))]

    @property
    def num_learned(self) -> int:
        """Learned tokens in all."""
        return int(sum(learned.sum() for learned in self.learned))

    def subset(self, rows: Iterable[int]) -> Demonstrations:
        """Return some rows."""
        rows = list(rows)
        return Demonstrations([self.tokens[row] for row in rows], [self.learned[row] for row in rows])

    def hold_back(self, size: int, seed: int) -> tuple[Demonstrations, Demonstrations]:
        """Split off about ``size`` rows for evaluation, so that no prompt is on both sides.

        Raises:
            ValueError: if nothing would be left to train on.
        """
        kept, held_back = held_back_rows([tuple(prompt.tolist()) for prompt in self.prompts], size, seed)
        return self.subset(kept), self.subset(held_back)

    def as_dataset(self) -> Dataset:
        """Return the columns ``input_ids`` and ``labels`` that trl trains on."""
        labels = [tokens.where(learned, IGNORED) for tokens, learned in zip(self.tokens, self.learned, strict=True)]
        columns = {"input_ids": self.tokens, "labels": labels}
        return Dataset.from_dict({name: [row.tolist() for row in rows] for name, rows in columns.items()})


def load_demonstrations(
    source: str | Path | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    drop_invalid: bool = False,
    end_tokens: Collection[int] = (),
) -> Demonstrations:
    """Read demonstrations and cut them into tokens, as trl does.

    ======================  =============================================  =====================================
    columns                 each                                           learned
    ======================  =============================================  =====================================
    prompt and completion   text, or messages                              the completion, its end included
    messages                a conversation                                 every turn of the assistant, likewise
    text                    text                                           all but the first token
    ======================  =============================================  =====================================

    Args:
        source: a file or Hub id as in :func:`~aligngym.alignment.data.read_rows`, or the rows themselves.
        tokenizer: of the model, with a chat template if rows are messages.
        max_length: most tokens of a row; what is longer loses its end, with a warning that says how much. ``None``
            keeps everything.
        drop_invalid: leave out rows that cannot be used, instead of stopping at them.
        end_tokens: tokens that end a completion, besides the tokenizer's own.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, has no rows or not the columns, if rows cannot be used and are not to be
            dropped, or if no learned token is one that the model could stop at.
    """
    given = not isinstance(source, (str, Path))
    place = "rows" if given else str(source)
    rows = list(cast(Sequence[Row], source)) if given else read_rows(cast(str, source))
    if not rows:
        raise ValueError(f"{place}: no rows")
    rows = [maybe_convert_to_chatml(row) for row in rows]
    columns = next((c for c in (("prompt", "completion"), ("messages",), ("text",)) if set(c) <= set(rows[0])), None)
    if columns is None:
        raise ValueError(
            f"{place}, row 1: columns prompt and completion, or messages, or text are needed "
            f"(it has {', '.join(map(repr, rows[0]))})"
        )
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise ValueError(f"{place}, row {number}: no column {column!r} (it has {', '.join(map(repr, row))})")
    rows = usable_rows(place, rows, lambda row: _complaint(row, columns), drop_invalid)
    if any(isinstance(row[columns[0]], list) for row in rows) and not tokenizer.chat_template:
        raise ValueError(
            f"{place}: rows are conversations, and the tokenizer has no chat template to write them with: "
            "use the model's instruct version, or plain strings"
        )
    sequences = []
    for number, row in enumerate(rows, start=1):
        try:
            sequences.append(_tokenize(row, columns, tokenizer))
        except ValueError as error:
            raise ValueError(f"{place}, row {number}: {error}") from error
    found = Demonstrations(*map(list, zip(*sequences, strict=True)))
    if max_length is not None:
        found = _truncated(place, found, max_length, drop_invalid)
    ends = {*end_tokens, tokenizer.eos_token_id} - {None}
    if not any(ends & set(tokens[learned].tolist()) for tokens, learned in sequences):
        raise ValueError(
            f"{place}: no learned token is an end of sequence (id {sorted(ends)}), so the model would never learn to "
            "stop: the chat template does not write it"
        )
    return found


def _complaint(row: Row, columns: tuple[str, ...]) -> str | None:
    """Return why a row cannot be used, ``None`` if it can."""
    for column in columns:
        value = row[column]
        kinds = {"messages": (list,), "text": (str,)}.get(column, (str, list))
        if not isinstance(value, kinds):
            return f"{column} is {type(value).__name__}, not {'messages' if kinds == (list,) else 'text'}"
        if not value or (isinstance(value, str) and not value.strip()):
            return f"{column} is empty"
        if isinstance(value, list):
            if not all(isinstance(message, dict) and "role" in message for message in value):
                return f"{column} is a list of something else than messages"
            if column == "completion" and not any(message.get("content") for message in value):
                return "completion is empty"
            if column == "messages" and not any(message["role"] == "assistant" for message in value):
                return "no message is the assistant's"
    return "text and messages are mixed" if len({type(row[column]) for column in columns}) > 1 else None


def _tokenize(row: Row, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return a row's tokens, and which of them are learned."""

    def written(messages: list[Row], **options: Any) -> list[int]:
        options = {**row.get("chat_template_kwargs", {}), **options, "tokenize": True, "return_dict": True}
        return list(cast(Any, tokenizer.apply_chat_template(messages, **options))["input_ids"])

    end = str(tokenizer.eos_token or "")
    spans: list[tuple[int, int]] = []
    if columns == ("text",):
        tokens = list(tokenizer(row["text"].removesuffix(end) + end)["input_ids"])
        spans = [(1, len(tokens))]
    elif columns == ("messages",):
        tokens = written(messages := row["messages"])
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = written(messages[:number], add_generation_prompt=True)
                through = written(messages[: number + 1])
                if before != tokens[: len(before)] or through != tokens[: len(through)]:
                    raise ValueError(
                        f"the chat template writes message {number + 1} otherwise once more follows, so it cannot be "
                        "told which tokens are the assistant's: split the conversation into prompt and completion"
                    )
                spans.append((len(before), len(through)))
    else:
        if is_conversational(row):
            prompt = written(row["prompt"], add_generation_prompt=True)
            tokens = written(row["prompt"] + row["completion"])
        else:
            prompt = list(tokenizer(row["prompt"])["input_ids"])
            tokens = list(tokenizer(row["prompt"] + row["completion"].removesuffix(end) + end)["input_ids"])
        spans = [(max(1, common_prefix_length(prompt, tokens)), len(tokens))]
    learned = torch.zeros(len(tokens), dtype=torch.bool)
    for start, stop in spans:
        learned[start:stop] = True
    return torch.tensor(tokens), learned


def _truncated(place: str, found: Demonstrations, max_length: int, drop: bool) -> Demonstrations:
    """Cut rows to ``max_length`` tokens, and say what that costs."""
    cut = Demonstrations([row[:max_length] for row in found.tokens], [row[:max_length] for row in found.learned])
    longer = [number for number, row in enumerate(found.tokens, start=1) if len(row) > max_length]
    if not longer:
        return found
    lost = f"{1 - cut.num_learned / found.num_learned:.1%} of all learned tokens"
    empty = [number for number, learned in enumerate(cut.learned, start=1) if not learned.any()]
    if empty:
        summary = (
            f"{place}: {len(empty)} of {len(found)} prompts fill --max-length {max_length} alone (row {empty[0]} has "
            f"{len(found.prompts[empty[0] - 1])} tokens), and {lost} would be lost"
        )
        if not drop or len(empty) == len(found):
            raise ValueError(f"{summary}: raise --max-length, or leave such rows out with --drop-invalid")
        warnings.warn(f"{summary}; these rows are left out", stacklevel=3)
        return cut.subset(row for row in range(len(cut)) if row + 1 not in set(empty))
    warnings.warn(
        f"{place}: --max-length {max_length} cuts off the end of {len(longer)} of {len(found)} rows, {lost}",
        stacklevel=3,
    )
    return cut
