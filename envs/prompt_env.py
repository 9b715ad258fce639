"""One prompt, one answer, one reward: the text environment of a single step."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium import spaces

#: Characters that an answer is said to have at most; longer ones are rewarded as well.
LONGEST_ANSWER = 100_000


class PromptEnv(gymnasium.Env[str, str]):
    """Show a prompt, take a completion, pay what a verifier says, and end.

    Args:
        rows: dictionaries with a text ``prompt`` and whatever else the verifier wants to know, such as an ``answer``.
        reward: a function with trl's signature, ``f(prompts=…, completions=…, **columns)``, that returns a list with
            one number; it is given lists of one text and one value each.
        render_mode: none but ``None``.

    Raises:
        ValueError: if there is no row, or one has no text for a prompt.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own name)

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        reward: Callable[..., Sequence[float | None]],
        render_mode: str | None = None,
    ) -> None:
        if not rows:
            raise ValueError("there is no prompt: give at least one row")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise ValueError(f"row {number}: the prompt is {row.get('prompt')!r}, which is no text to complete")
        self.rows, self.reward, self.render_mode = list(rows), reward, render_mode
        prompts = [row["prompt"] for row in rows]
        self.observation_space = spaces.Text(max(map(len, prompts)), min_length=0, charset=frozenset("".join(prompts)))
        self.action_space = spaces.Text(LONGEST_ANSWER, min_length=0, charset=string.printable)
        self._row = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Draw a row, or take number ``options["row"]``, counted from 0, and return (its prompt, its number).

        Raises:
            ValueError: for a row that there is not.
        """
        super().reset(seed=seed)
        row = (options or {}).get("row")
        if row is not None and not 0 <= row < len(self.rows):
            raise ValueError(f"options: row {row} is not one of 0 … {len(self.rows) - 1}")
        self._row = int(self.np_random.integers(len(self.rows))) if row is None else int(row)
        return self.rows[self._row]["prompt"], {"row": self._row}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Return (no text, the verifier's reward, True, False, the row's number).

        Raises:
            ValueError: if the verifier does not return one finite number; the message has the completion.
        """
        row = dict(self.rows[self._row])
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        rewards = self.reward(prompts=[row["prompt"]], completions=[action], **columns)
        if len(rewards) != 1 or rewards[0] is None or not math.isfinite(rewards[0]):
            raise ValueError(f"row {self._row}: the verifier paid {rewards!r} for {action!r}, which is not one number")
        return "", float(rewards[0]), True, False, {"row": self._row}
