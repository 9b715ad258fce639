"""Problems to be written about: prompts as tokens, with the columns that reward functions judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from aligngym.alignment.data import Row, read_rows


def load_prompts(source: str | Path, *, system_prompt: str | None = None) -> list[Row]:
    """Read rows with a ``prompt``, a string or a list of messages, and whatever else reward functions need.

    Args:
        source: as in :func:`~aligngym.alignment.load_preferences`.
        system_prompt: a message to put before every conversation.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, has no rows, or rows without a prompt; or for a system prompt before a plain
            string, or a second one.
    """
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source}: no rows")
    for number, row in enumerate(rows, start=1):
        prompt = row.get("prompt")
        if not prompt or not isinstance(prompt, (str, list)):
            what = f"its prompt is {prompt!r}" if "prompt" in row else f"it has {', '.join(map(repr, row))}"
            raise ValueError(f"{source}, row {number}: a prompt is needed, text or messages, and {what}")
        if system_prompt is not None:
            if isinstance(prompt, str):
                raise ValueError(
                    f"{source}, row {number}: a system prompt goes before messages, and this is plain text"
                )
            if prompt[0].get("role") == "system":
                raise ValueError(f"{source}, row {number}: the conversation has a system prompt already")
            row["prompt"] = [{"role": "system", "content": system_prompt}, *prompt]
    return rows


def prompt_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens of a row's prompt: a conversation as the chat template opens the answer to it.

    Raises:
        ValueError: if it is a conversation, and the tokenizer has no chat template.
    """
    if not is_conversational(row):
        return torch.tensor(tokenizer(row["prompt"])["input_ids"], dtype=torch.long)
    if not tokenizer.chat_template:
        raise ValueError(
            "prompts are conversations, and the tokenizer has no chat template to write them with: use the model's "
            "instruct version, or plain strings"
        )
    options = {**row.get("chat_template_kwargs", {}), "tokenize": True, "return_dict": True}
    written = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
    return torch.tensor(cast(Any, written)["input_ids"], dtype=torch.long)


@dataclass(frozen=True)
class Problems:
    """Rows with their prompts' tokens, checked against a model.

    Attributes:
        rows: dictionaries with a ``prompt`` and further columns.
        tokens: of each prompt.
        tokenizer: whose tokens they are.
    """

    rows: Sequence[Row]
    tokens: list[Tensor]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(
        cls, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, room: int, context: int | None = None
    ) -> Problems:
        """Cut prompts into tokens.

        Args:
            rows: the problems.
            tokenizer: of the model.
            room: tokens that a completion may have.
            context: tokens that the model reads at most, if that is limited.

        Raises:
            ValueError: without rows, for a prompt without tokens, or one that leaves no room for a completion.
        """
        if not rows:
            raise ValueError("there are no prompts")
        tokens = [prompt_tokens(row, tokenizer) for row in rows]
        for number, prompt in enumerate(tokens, start=1):
            if not len(prompt):
                raise ValueError(f"the prompt of row {number} has no tokens")
            if context is not None and len(prompt) + room > context:
                raise ValueError(
                    f"the prompt of row {number} has {len(prompt)} tokens and leaves no room for a completion of "
                    f"{room}: the model reads {context} in all; shorten it, or take a smaller max_new_tokens"
                )
        return cls(rows, tokens, tokenizer)

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Return the values of every column for some rows; ``None`` where a row has none."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return {name: [self.rows[number].get(name) for number in numbers] for name in names}


def as_completion(row: Row, text: str) -> Any:
    """Return a completion in the form of the row's prompt, as reward functions expect it: text, or one message."""
    return [{"role": "assistant", "content": text}] if is_conversational(row) else text


def prompt_text(row: Row) -> str:
    """Return a prompt to be read by people: of a conversation the last message."""
    return str(row["prompt"][-1]["content"]) if is_conversational(row) else str(row["prompt"])
