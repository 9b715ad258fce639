"""Completions as they are written: tokens are drawn, recorded and looked at for an end without asking the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from aligngym.core.trajectories import PADDING

#: Probabilities are added up in chunks of so many tokens first.
CHUNK = 128


class Completions:
    """B completions as they are written, in tensors made once that are changed in place.

    The batch that is computed has slots; in the first n of them are the completions that still go on.

    Args:
        count: B.
        length: T, the most tokens of a completion.
        device: where the tensors are.

    Attributes:
        actions: ``[B, T]`` tokens, padded on the right.
        log_probs: ``[B, T]``, of what they were drawn from.
        ended: ``[B]`` booleans, whether a completion came to its own end.
        rows: ``[B]``, which completion is in a slot.
        tokens: ``[B]``, the last token in a slot.
        column: ``[1]``, how many tokens there are of each.
        uniforms: ``[B, T]`` random numbers in (0, 1], one for each token.
        temperature: ``[1]``, what logits are divided by.
    """

    def __init__(self, count: int, length: int, device: torch.device) -> None:
        self.actions = torch.full((count, length), PADDING, device=device)
        self.log_probs = torch.zeros(count, length, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.rows = torch.arange(count, device=device)
        self.tokens = torch.zeros_like(self.rows)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.uniforms = torch.ones(count, length, device=device)
        self.temperature = torch.ones(1, device=device)

    def begin(self, uniforms: Tensor, temperature: float) -> None:
        """Begin as many completions of as many tokens as there are ``[n, t]`` random numbers; other slots idle."""
        count, length = uniforms.shape
        self.actions.fill_(PADDING)
        self.log_probs.zero_()
        self.ended.zero_()[count:] = True
        torch.arange(len(self.rows), out=self.rows)
        self.column.zero_()
        self.uniforms[:count, :length] = uniforms.to(self.uniforms.device)
        self.temperature.fill_(temperature)

    def add(self, tokens: Tensor, log_probs: Tensor, end_tokens: Tensor) -> None:
        """Write a token in each of the first n slots; in those that have ended, nothing.

        Args:
            tokens: ``[n]``.
            log_probs: ``[n]``.
            end_tokens: those that end a completion.
        """
        rows = self.rows[: len(tokens)]
        ended = self.ended[rows]
        self.tokens[: len(tokens)] = tokens
        self.actions.index_put_((rows, self.column), tokens.masked_fill(ended, PADDING))
        self.log_probs.index_put_((rows, self.column), log_probs.masked_fill(ended, 0.0))
        self.ended.index_put_((rows,), ended | (tokens[:, None] == end_tokens).any(dim=1))
        self.column += 1

    def next_uniforms(self, slots: int) -> Tensor:
        """Return ``[slots]``, the random numbers of the next tokens."""
        return self.uniforms[self.rows[:slots], self.column]

    def running(self, slots: int) -> Tensor:
        """Return which of the first ``slots`` have not ended, on the processor."""
        return ~self.ended[self.rows[:slots]].cpu()

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Put what is in some slots into others, whose completions are written no more."""
        for slots in (self.rows, self.tokens):
            slots[destinations] = slots[sources]

    def end_at(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, slots: int, written: int) -> None:
        """End the completions in the first ``slots`` where the last of ``written`` tokens completes a ``stop`` text."""
        # A token has a character or a part of one; some more, for those that are no text.
        reach = max(len(text.encode()) for text in stop) + 8
        rows = self.rows[:slots]
        tails = self.actions[rows, max(0, written - reach) : written].tolist()
        texts = [tokenizer.decode([token for token in tail if token != PADDING]) for tail in tails]
        stopped = [any(ending in text for ending in stop) for text in texts]
        self.ended[rows] |= torch.tensor(stopped, device=rows.device)


def choose(scores: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose a token in each of N rows.

    Args:
        scores: ``[N, V]``, log-probabilities up to a constant for each row.
        uniforms: ``[N]`` numbers in (0, 1]; ``None``: the most probable tokens.

    Returns:
        ``[N]`` tokens, at each of which the cumulative probability comes up to the uniform number, and their
        log-probabilities.
    """
    highest = scores.amax(dim=1, keepdim=True)
    weights = (scores - highest).exp_()
    if missing := -weights.shape[1] % CHUNK:
        weights = F.pad(weights, (0, missing))
    weights = weights.unflatten(1, (-1, CHUNK))
    # Sums of chunks first: then only one chunk of each row need be gone through.
    cumulative = weights.sum(dim=2).cumsum(dim=1)
    total = cumulative[:, -1:]
    if uniforms is None:
        tokens = scores.argmax(dim=1, keepdim=True)
    else:
        tokens = _find(weights, cumulative, uniforms[:, None] * total)
    return tokens[:, 0], (scores.gather(1, tokens) - highest - total.log())[:, 0]


def _find(weights: Tensor, cumulative: Tensor, sought: Tensor) -> Tensor:
    """Return ``[N, 1]``, the first index at which weights add up to what is sought.

    Args:
        weights: ``[N, C, CHUNK]``.
        cumulative: ``[N, C]``, of the sums of chunks.
        sought: ``[N, 1]``, positive and at most the sum of all.
    """
    chunk = torch.searchsorted(cumulative, sought)
    before = F.pad(cumulative, (1, 0)).gather(1, chunk)
    within = weights.gather(1, chunk[..., None].expand(-1, -1, CHUNK))[:, 0].cumsum(dim=1)
    # The chunk's own sum may be rounded to less than the difference of the cumulative ones.
    return chunk * CHUNK + torch.searchsorted(within, torch.minimum(sought - before, within[:, -1:]))
