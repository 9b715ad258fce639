"""Preference and labelled data: read, checked row by row, and cut into tokens before any training starts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas
import torch
from datasets import load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt, is_conversational, maybe_convert_to_chatml
from trl.data_utils import common_prefix_length

from aligngym.alignment.token_rows import TokenLabelled, TokenPreferences
from aligngym.alignment.token_rows import pad_tokens as pad_tokens

Row = dict[str, Any]

#: Rows quoted in an error.
SHOWN = 3


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
    rows = _pairs(source, _some_rows(source), drop_invalid)
    tokens = _tokens(source, rows, PAIR, tokenizer, max_length, drop_invalid, end_tokens)
    return TokenPreferences([x.prompt for x in tokens], *([x.completions[side] for x in tokens] for side in (0, 1)))


def load_labelled(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    drop_invalid: bool = False,
    end_tokens: Collection[int] = (),
) -> TokenLabelled:
    """Read completions that are each desirable or not, and cut them into tokens, as trl does for KTO.

    Rows have ``prompt`` and ``completion``, each a string or a list of messages, and ``label``, true or false (in CSV
    also in words, or 1 and 0). Preference pairs are taken as well: first all chosen completions, as desirable, then all
    rejected ones. For the arguments see :func:`load_preferences`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: as :func:`load_preferences`, or if all rows have the same label.
    """
    rows = _some_rows(source)
    if {"chosen", "rejected"} <= set(rows[0]):
        pairs = _pairs(source, rows, drop_invalid)
        rows = [{**row, "completion": row[side], "label": side == "chosen"} for side in PAIR for row in pairs]
    else:
        _check_columns(source, rows, ("prompt", "completion", "label"))
        rows = [maybe_convert_to_chatml(row) for row in rows]
        rows = usable_rows(source, rows, partial(_complaint, columns=("prompt", "completion")), drop_invalid)
        rows = usable_rows(source, rows, _label_complaint, drop_invalid)
    tokens = _tokens(source, rows, ("completion",), tokenizer, max_length, drop_invalid, end_tokens)
    labels = [LABELS[str(x.row["label"]).lower()] for x in tokens]
    if len(set(labels)) == 1:
        kind = "desirable" if labels[0] else "undesirable"
        raise ValueError(f"{source}: every row is {kind}, and KTO learns from both kinds")
    return TokenLabelled([x.prompt for x in tokens], [x.completions[0] for x in tokens], labels)


#: The completions of a preference pair.
PAIR = ("chosen", "rejected")

#: What a label may be, as text.
LABELS = {"true": True, "1": True, "false": False, "0": False}


def _some_rows(source: str | Path) -> list[Row]:
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source}: no rows")
    return rows


def _pairs(source: str | Path, rows: list[Row], drop_invalid: bool) -> list[Row]:
    """Return preference pairs with a prompt of their own, and without what cannot be used."""
    _check_columns(source, rows, (*PAIR, *(["prompt"] if "prompt" in rows[0] else [])))
    rows = [maybe_convert_to_chatml(row) for row in rows]
    if "prompt" not in rows[0]:
        rows = [extract_prompt(row) for row in rows]
    return usable_rows(source, rows, _pair_complaint, drop_invalid)


@dataclass(frozen=True)
class TokenRow:
    """A row, and the tokens of its prompt and completions."""

    row: Row
    prompt: Tensor
    completions: list[Tensor]


def _tokens(
    source: str | Path,
    rows: list[Row],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    drop_invalid: bool,
    end_tokens: Collection[int],
) -> list[TokenRow]:
    """Cut rows into tokens, ``columns`` being those of the completions."""
    if any(map(is_conversational, rows)) and not tokenizer.chat_template:
        raise ValueError(
            f"{source}: rows are conversations, and the tokenizer has no chat template to write them with: "
            "use the model's instruct version, or plain strings"
        )
    tokens = [_tokenize(row, columns, tokenizer) for row in rows]
    if max_length is not None:
        tokens = _truncated(source, tokens, max_length, drop_invalid)
    ends = {*end_tokens, tokenizer.eos_token_id}
    if not any(ends & set(completion.tolist()) for x in tokens for completion in x.completions):
        raise ValueError(
            f"{source}: no completion contains an end-of-sequence token (id {sorted(filter(None, ends))}), so the "
            "model would never learn to stop: the chat template does not write it, or max_length cuts it off"
        )
    return tokens


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
    # A text may hold other line ends, such as U+2028, that JSON does not escape.
    lines = text.split("\n") if path.suffix == ".jsonl" else [text]
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


def _check_columns(source: str | Path, rows: list[Row], columns: Sequence[str]) -> None:
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise ValueError(f"{source}, row {number}: no column {column!r} (it has {', '.join(map(repr, row))})")


def _complaint(row: Row, columns: Sequence[str]) -> str | None:
    """Return why a row cannot be used, ``None`` if it can."""
    for column in columns:
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
    return "text and messages are mixed" if len({type(row[column]) for column in columns}) > 1 else None


def _pair_complaint(row: Row) -> str | None:
    same = "chosen equals rejected" if row["chosen"] == row["rejected"] else None
    return _complaint(row, ("prompt", *PAIR)) or same


def _label_complaint(row: Row) -> str | None:
    known = str(row["label"]).lower() in LABELS
    return None if known else f"label is {row['label']!r}, neither true nor false"


def usable_rows(source: str | Path, rows: list[Any], complaint: Any, drop: bool) -> list[Any]:
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


def _tokenize(row: Row, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Return the prompt and the completions as tokens.

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
        whole = [ids(row["prompt"] + row[column]) for column in columns]
    else:
        end = str(tokenizer.eos_token or "")
        prompt = ids(row["prompt"])
        whole = [ids(row["prompt"] + row[column].removesuffix(end) + end) for column in columns]
    shared = min(common_prefix_length(prompt, sequence) for sequence in whole)
    if shared < len(prompt):
        warnings.warn(
            f"the prompt ends differently when a completion follows: {tokenizer.decode(prompt[shared:])!r} is left out",
            stacklevel=6,
        )
    return TokenRow(row, torch.tensor(prompt[:shared]), [torch.tensor(sequence[shared:]) for sequence in whole])


def _truncated(source: str | Path, tokens: list[TokenRow], max_length: int, drop: bool) -> list[TokenRow]:
    """Cut completions so that no sequence is longer than ``max_length``, and say what that costs."""
    room = [max(0, max_length - len(x.prompt)) for x in tokens]
    total = sum(len(side) for x in tokens for side in x.completions)
    kept = sum(min(left, len(side)) for left, x in zip(room, tokens, strict=True) for side in x.completions)
    lost = f"{(total - kept) / total:.1%} of all completion tokens"
    if not all(room):
        full = [number for number, left in enumerate(room, start=1) if not left]
        summary = (
            f"{source}: {len(full)} of {len(tokens)} prompts fill --max-length {max_length} alone (row {full[0]} has "
            f"{len(tokens[full[0] - 1].prompt)} tokens), and {lost} would be lost"
        )
        if not drop or len(full) == len(tokens):
            raise ValueError(f"{summary}: raise --max-length, or leave such rows out with --drop-invalid")
        warnings.warn(f"{summary}; these rows are left out", stacklevel=4)
    elif kept < total:
        warnings.warn(f"{source}: --max-length {max_length} cuts off {lost}", stacklevel=4)
    return [
        TokenRow(x.row, x.prompt, [side[:left] for side in x.completions])
        for left, x in zip(room, tokens, strict=True)
        if left
    ]
