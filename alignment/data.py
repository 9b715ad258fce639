"""Preference data: read, checked row by row, and cut into tokens before any training starts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas
import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt, is_conversational, maybe_convert_to_chatml
from trl.data_utils import common_prefix_length

from aligngym.core.randomness import derived_seed
from aligngym.core.trajectories import PADDING, Preferences, Trajectories

Row = dict[str, Any]

#: Rows quoted in an error.
SHOWN = 3


@dataclass(frozen=True)
class TokenPreferences:
    """Pairs of completions as tokens; ``preferences[rows]`` is a padded batch of them, for :class:`DPO`.

    Attributes:
        prompts: N prompts, one-dimensional tensors of token ids.
        chosen: N completions, the end-of-sequence token included.
        rejected: N completions, likewise.
    """

    prompts: list[Tensor]
    chosen: list[Tensor]
    rejected: list[Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> Preferences:
        """Return the pairs of the row numbers ``rows``."""
        numbers = rows.tolist()
        prompts = pad_tokens([self.prompts[row] for row in numbers], side="left")

        def completions(tokens: list[Tensor]) -> Trajectories:
            actions = pad_tokens([tokens[row] for row in numbers])
            return Trajectories(prompts, actions, actions != PADDING)

        return Preferences(completions(self.chosen), completions(self.rejected))

    @property
    def num_tokens(self) -> int:
        """Tokens in all: every prompt once, and both of its completions."""
        return sum(map(len, [*self.prompts, *self.chosen, *self.rejected]))

    def subset(self, rows: Iterable[int]) -> TokenPreferences:
        """Return the pairs of some rows."""
        rows = list(rows)
        return TokenPreferences(*([field[row] for row in rows] for field in (self.prompts, self.chosen, self.rejected)))

    def hold_back(self, size: int, seed: int) -> tuple[TokenPreferences, TokenPreferences]:
        """Split off about ``size`` pairs for evaluation, so that no prompt is on both sides.

        Raises:
            ValueError: if nothing would be left to train on.
        """
        prompts: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            prompts.setdefault(tuple(prompt.tolist()), []).append(row)
        members = list(prompts.values())
        held_back: list[int] = []
        for group in torch.randperm(len(members), generator=torch.Generator().manual_seed(derived_seed(seed))).tolist():
            if len(held_back) >= size:
                break
            held_back += members[group]
        kept = sorted(set(range(len(self))) - set(held_back))
        if not kept:
            raise ValueError(f"holding back {size} of {len(self)} pairs leaves none to train on: give --eval a file")
        return self.subset(kept), self.subset(sorted(held_back))


def pad_tokens(sequences: list[Tensor], side: str = "right") -> Tensor:
    """Return ``[B, T]`` with the sequences in its rows, filled up with :data:`PADDING` on one side."""
    return pad_sequence(sequences, batch_first=True, padding_value=PADDING, padding_side=side)


def load_preferences(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    drop_invalid: bool = False,
    end_tokens: Collection[int] = (),
) -> TokenPreferences:
    """Read preference pairs and cut them into tokens, as trl does.

    Rows have ``chosen`` and ``rejected``, and ``prompt`` unless both begin with it; each a string or a list of
    messages. Plain completions get the end-of-sequence token; messages get what the chat template gives them.

    Args:
        source: a ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, or a Hub id (its ``train`` split; another with
            ``owner/name:split``).
        tokenizer: of the model, with a chat template if rows are messages.
        max_length: most tokens of prompt and completion together; the end of a longer completion is cut off, with a
            warning that says how much. ``None`` keeps everything.
        drop_invalid: leave out rows that cannot be used, instead of stopping at them.
        end_tokens: tokens that end a completion, besides the tokenizer's own.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, has no rows or not the columns, if rows cannot be used and are not to be
            dropped, or if no completion ends with a token that the model could stop at.
    """
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source}: no rows")
    _check_columns(source, rows)
    rows = [maybe_convert_to_chatml(row) for row in rows]
    if "prompt" not in rows[0]:
        rows = [extract_prompt(row) for row in rows]
    rows = _usable(source, rows, _complaint, drop_invalid)
    if any(map(is_conversational, rows)) and not tokenizer.chat_template:
        raise ValueError(
            f"{source}: rows are conversations, and the tokenizer has no chat template to write them with: "
            "use the model's instruct version, or plain strings"
        )
    tokens = [_tokenize(row, tokenizer) for row in rows]
    if max_length is not None:
        tokens = _truncated(source, tokens, max_length, drop_invalid)
    ends = {*end_tokens, tokenizer.eos_token_id}
    if not any(ends & set(completion.tolist()) for _, *completions in tokens for completion in completions):
        raise ValueError(
            f"{source}: no completion contains an end-of-sequence token (id {sorted(filter(None, ends))}), so the "
            "model would never learn to stop: the chat template does not write it, or max_length cuts it off"
        )
    return TokenPreferences(*map(list, zip(*tokens, strict=True)))


def read_rows(source: str | Path) -> list[Row]:
    """Return the rows of a file or of a dataset on the Hub, as dictionaries.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if it cannot be read; with the line, where that is known.
    """
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".json"):
        return _read_json(path)
    options: dict[str, Any] = {"split": "train"}
    if path.suffix in (".csv", ".parquet"):
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        kind, options["data_files"] = path.suffix[1:], str(path)
    elif path.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        missing = "" if path.exists() else "no such file, and "
        raise FileNotFoundError(f"{source}: {missing}not a .json, .jsonl, .csv or .parquet file")
    else:
        kind, _, split = str(source).partition(":")
        options["split"] = split or "train"
    try:
        if kind == "csv":
            # As text: answers such as 42, NA or None are no numbers and no gaps.
            return pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        return list(load_dataset(kind, **options))
    except Exception as error:  # datasets raises many kinds, from Arrow's to the Hub's
        raise ValueError(f"{source}: cannot be read: {' '.join(str(error).split())[:300]}") from error


def _read_json(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    rows: list[Any] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            place = number if path.suffix == ".jsonl" else error.lineno
            raise ValueError(f"{path}, line {place}: not JSON: {error.msg}") from error
    rows = rows[0] if path.suffix == ".json" and rows and isinstance(rows[0], list) else rows
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: an object with columns is needed, not {type(row).__name__}")
    return rows


def _check_columns(source: str | Path, rows: list[Row]) -> None:
    first = set(rows[0])
    for number, row in enumerate(rows, start=1):
        for column in ("chosen", "rejected", *(["prompt"] if "prompt" in first else [])):
            if column not in row:
                raise ValueError(f"{source}, row {number}: no column {column!r} (it has {', '.join(map(repr, row))})")


def _complaint(row: Row) -> str | None:
    """Return why a row cannot be used, ``None`` if it can."""
    for column in ("prompt", "chosen", "rejected"):
        value = row[column]
        if not isinstance(value, (str, list)):
            return f"{column} is {type(value).__name__}, neither text nor messages"
        if not value or (isinstance(value, str) and not value.strip()):
            return f"{column} is empty"
        if isinstance(value, list):
            if not all(isinstance(message, dict) and "role" in message for message in value):
                return f"{column} is a list of something else than messages"
            if column != "prompt" and not any(message.get("content") for message in value):
                return f"{column} is empty"
    if len({type(row[column]) for column in ("prompt", "chosen", "rejected")}) > 1:
        return "text and messages are mixed"
    return "chosen equals rejected" if row["chosen"] == row["rejected"] else None


def _usable(source: str | Path, rows: list[Any], complaint: Any, drop: bool) -> list[Any]:
    """Return the rows without a complaint; raise about the others unless they are to be dropped."""
    found = [(number, complaint(row)) for number, row in enumerate(rows, start=1)]
    bad = [(number, reason) for number, reason in found if reason]
    if not bad:
        return rows
    shown = "; ".join(f"row {number}: {reason}" for number, reason in bad[:SHOWN])
    summary = f"{source}: {len(bad)} of {len(rows)} rows cannot be used ({shown}{'; …' if len(bad) > SHOWN else ''})"
    if not drop:
        raise ValueError(f"{summary}: mend them, or leave them out with --drop-invalid")
    if len(bad) == len(rows):
        raise ValueError(f"{summary}: nothing is left")
    warnings.warn(f"{summary}; they are left out", stacklevel=4)
    return [row for row, (_, reason) in zip(rows, found, strict=True) if not reason]


Tokens = tuple[Tensor, Tensor, Tensor]


def _tokenize(row: Row, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return prompt, chosen and rejected as tokens.

    Prompt and completion are tokenised together and parted where the prompt's own tokens end, since a template or a
    merge may change the prompt's last tokens once something follows.
    """

    def ids(text: str | list[Row], **options: Any) -> list[int]:
        if isinstance(text, str):
            return list(tokenizer(text)["input_ids"])
        options = {**row.get("chat_template_kwargs", {}), **options, "tokenize": True, "return_dict": True}
        return list(cast(Any, tokenizer.apply_chat_template(text, **options))["input_ids"])

    if is_conversational(row):
        prompt = ids(row["prompt"], add_generation_prompt=True)
        whole = [ids(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    else:
        end = str(tokenizer.eos_token or "")
        prompt = ids(row["prompt"])
        whole = [ids(row["prompt"] + row[side].removesuffix(end) + end) for side in ("chosen", "rejected")]
    shared = min(common_prefix_length(prompt, sequence) for sequence in whole)
    if shared < len(prompt):
        warnings.warn(
            f"the prompt ends differently when a completion follows: {tokenizer.decode(prompt[shared:])!r} is left out",
            stacklevel=5,
        )
    chosen, rejected = (torch.tensor(sequence[shared:]) for sequence in whole)
    return torch.tensor(prompt[:shared]), chosen, rejected


def _truncated(source: str | Path, tokens: list[Tokens], max_length: int, drop: bool) -> list[Tokens]:
    """Cut completions so that no sequence is longer than ``max_length``, and say what that costs."""
    room = [max(0, max_length - len(prompt)) for prompt, *_ in tokens]
    total = sum(len(chosen) + len(rejected) for _, chosen, rejected in tokens)
    kept = sum(min(left, len(side)) for left, (_, *sides) in zip(room, tokens, strict=True) for side in sides)
    lost = f"{(total - kept) / total:.1%} of all completion tokens"
    if not all(room):
        full = [number for number, left in enumerate(room, start=1) if not left]
        summary = (
            f"{source}: {len(full)} of {len(tokens)} prompts fill --max-length {max_length} alone (row {full[0]} has "
            f"{len(tokens[full[0] - 1][0])} tokens), and {lost} would be lost"
        )
        if not drop or len(full) == len(tokens):
            raise ValueError(f"{summary}: raise --max-length, or leave such rows out with --drop-invalid")
        warnings.warn(f"{summary}; these rows are left out", stacklevel=3)
    elif kept < total:
        warnings.warn(f"{source}: --max-length {max_length} cuts off {lost}", stacklevel=3)
    return [
        (prompt, chosen[:left], rejected[:left])
        for left, (prompt, chosen, rejected) in zip(room, tokens, strict=True)
        if left
    ]
