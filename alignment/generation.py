"""Writing completions: the prompt is computed once, and every token's log-probability is kept as it is drawn."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from aligngym.alignment.completions import Completions, choose
from aligngym.alignment.data import pad_tokens
from aligngym.core.trajectories import PADDING, Trajectories

#: Rows that have ended are taken out of transformers' cache once they are more than this share of it: copying the cache
#: of those that go on costs about as much as a token.
FINISHED_SHARE = 0.25

#: After so many tokens the program looks which rows have ended. On a GPU it waits for all that it has ordered, then.
LOOK_EVERY = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn from the model, and when a completion ends.

    Attributes:
        max_new_tokens: T, at most so many tokens a completion.
        greedy: the most probable token each time, instead of a sample.
        top_k: draw among the k most probable tokens only; 0: among all.
        top_p: draw among the most probable tokens that have this probability together (A. Holtzman et al., *The curious
            case of neural text degeneration*, 2020).
        stop: texts that end a completion, besides the model's own end-of-sequence tokens; they are part of it.

    Raises:
        ValueError: for a number out of its range, or an empty stop text.
    """

    max_new_tokens: int = 128
    greedy: bool = False
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is at least 1, not {self.max_new_tokens}")
        if self.top_k < 0:
            raise ValueError(f"top_k is a number of tokens, or 0 for all of them, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability in (0, 1], not {self.top_p}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is a sequence of texts that are not empty, not {self.stop!r}")

    def restrict(self, scores: Tensor) -> Tensor:
        """Return ``[N, V]`` scores, −∞ of tokens that are not drawn; a score is a log-probability and any constant."""
        if self.top_k and not self.greedy:
            scores = TopKLogitsWarper(self.top_k)(None, scores)  # type: ignore[arg-type]
        if self.top_p < 1 and not self.greedy:
            scores = TopPLogitsWarper(self.top_p)(None, scores)  # type: ignore[arg-type]
        return scores

    def choose(self, completions: Completions, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next token in each of the first n slots of some completions.

        Args:
            completions: whose random numbers and temperature are used.
            logits: ``[n, V]``.

        Returns:
            ``[n]`` tokens, and their log-probabilities in what they were drawn from.
        """
        scores = self.restrict(logits.float() / completions.temperature)
        return choose(scores, None if self.greedy else completions.next_uniforms(len(logits)))


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        prompts: N prompts, token ids of any lengths.
        copies: k, completions of every prompt.
        decoding: how tokens are drawn.
        end_tokens: tokens that end a completion.
        uniforms: ``[N·k, T]`` random numbers in (0, 1], one for every token.
        temperature: what logits are divided by.
    """

    prompts: Sequence[Tensor]
    copies: int
    decoding: Decoding
    end_tokens: Sequence[int]
    uniforms: Tensor
    temperature: float = 1.0


class Writer(Protocol):
    """A model that writes: the completions so far, and what it has computed of those that go on."""

    completions: Completions

    def begin(self, request: Request) -> int:
        """Write the first token of every completion; return how many slots are used.

        Raises:
            NotImplementedError: if this writer cannot compute such a batch.
        """

    def write(self, slots: int) -> None:
        """Write the next token in the first ``slots``."""

    def slots_for(self, running: int, slots: int) -> int:
        """Return how many slots to go on with, where so many of ``slots`` have not ended."""

    def shrink(self, slots: int, sources: Tensor, destinations: Tensor) -> None:
        """Move what is in some slots to others, and go on with the first ``slots``."""


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    completions: int,
    decoding: Decoding,
    *,
    end_tokens: Sequence[int],
    uniforms: Tensor,
    temperature: float = 1.0,
    writer: Writer | None = None,
) -> Trajectories:
    """Complete every prompt several times.

    Every row has random numbers of its own, so what it says depends neither on the rows beside it nor on when they end.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer, to look for stop texts.
        prompts: N prompts, token ids of any lengths.
        completions: k, of every prompt.
        decoding: how tokens are drawn.
        end_tokens: tokens that end a completion.
        uniforms: ``[N·k, T]`` random numbers in (0, 1], one for every token.
        temperature: what logits are divided by.
        writer: the model's state while it writes; by default one that any model can have.

    Returns:
        N·k rows, those of one prompt adjacent and of one ``group``. ``log_probs`` are those of the distribution that
        tokens were drawn from; of greedy tokens, those of the policy. ``mask`` covers the end-of-sequence token,
        ``terminated`` marks it or the token that completes a stop text, and ``truncated`` marks the last token of a
        completion that came to no end.

    Raises:
        ValueError: without a prompt, or for an empty one.
    """
    if not len(prompts) or not all(map(len, prompts)):
        raise ValueError("there is no prompt" if not len(prompts) else "a prompt has no tokens")
    writer = writer or PlainWriter(model)
    request = Request(prompts, completions, decoding, end_tokens, uniforms, temperature)
    try:
        slots = writer.begin(request)
    except NotImplementedError as error:
        warnings.warn(f"{error}; writing with transformers' own cache, which is slower", stacklevel=3)
        writer = PlainWriter(model)
        slots = writer.begin(request)
    _write_on(writer, slots, decoding, tokenizer)
    written = writer.completions
    actions, log_probs, ended = (x[: len(uniforms)] for x in (written.actions, written.log_probs, written.ended))
    used = int((actions != PADDING).sum(dim=1).max())
    observations = pad_tokens(list(prompts), side="left").to(model.device)
    # Copies, because the writer may write into its tensors again.
    return completion_rows(observations, actions[:, :used].clone(), log_probs[:, :used].clone(), ended.clone())


def _write_on(writer: Writer, slots: int, decoding: Decoding, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write until every completion has ended or has ``max_new_tokens``, taking ended ones out of the batch."""
    completions = writer.completions
    device = completions.actions.device
    look_every = 1 if decoding.stop else LOOK_EVERY.get(device.type, 1)
    for written in range(1, decoding.max_new_tokens + 1):
        if decoding.stop:
            completions.end_at(decoding.stop, tokenizer, slots, written)
        if written == decoding.max_new_tokens:
            return
        if written % look_every == 0:
            running = completions.running(slots)
            if not running.any():
                return
            fewer = writer.slots_for(int(running.sum()), slots)
            if fewer < slots:
                sources = running[fewer:].nonzero()[:, 0] + fewer
                destinations = (~running[:fewer]).nonzero()[: len(sources), 0]
                writer.shrink(fewer, sources.to(device), destinations.to(device))
                slots = fewer
        writer.write(slots)


def completion_rows(observations: Tensor, actions: Tensor, log_probs: Tensor, ended: Tensor) -> Trajectories:
    """Return N·k completions of N prompts as rows, those of one prompt adjacent and of one ``group``.

    Args:
        observations: ``[N, P]``, the prompts' tokens.
        actions: ``[N·k, T]``, the completions' tokens, padded on the right.
        log_probs: ``[N·k, T]``, of the distribution that they were drawn from.
        ended: ``[N·k]`` booleans, whether a completion came to its own end: then its last token terminates it.
    """
    mask = actions != PADDING
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    numbers = torch.arange(len(observations), device=actions.device)
    group = numbers.repeat_interleave(len(actions) // len(observations))
    return Trajectories(
        observations[group],
        actions,
        mask,
        log_probs=log_probs,
        terminated=last & ended[:, None],
        truncated=last & ~ended[:, None],
        group=group,
    )


class PlainWriter(Writer):
    """Writing with transformers' own cache, which grows with every token; for any model.

    State-space models cannot take rows out of what they remember, and read their whole text again for every token.

    Args:
        model: a causal language model.
    """

    completions: Completions

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # The whole table of logits is wanted for the last token only.
        parameters = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache = None if model._is_stateful else DynamicCache(config=model.config)

    def begin(self, request: Request) -> int:
        device, copies, uniforms = self.model.device, request.copies, request.uniforms
        self.completions = Completions(len(uniforms), uniforms.shape[1], device)
        self.completions.begin(uniforms, request.temperature)
        self._decoding = request.decoding
        self._ends = torch.tensor(list(request.end_tokens), dtype=torch.long, device=device)
        self._text = pad_tokens(list(request.prompts), side="left").to(device)
        logits = self._compute(self._text).repeat_interleave(copies, dim=0)
        self._text = self._text.repeat_interleave(copies, dim=0)
        if self._cache is not None and copies > 1:
            self._cache.batch_repeat_interleave(copies)
        self._add(logits)
        return len(logits)

    def write(self, slots: int) -> None:
        tokens = self.completions.tokens[:slots, None]
        self._text = torch.cat([self._text, tokens], dim=1)
        self._add(self._compute(self._text if self._cache is None else tokens))

    def slots_for(self, running: int, slots: int) -> int:
        return running if slots - running > FINISHED_SHARE * slots else slots

    def shrink(self, slots: int, sources: Tensor, destinations: Tensor) -> None:
        self.completions.move(sources, destinations)
        kept = torch.arange(slots, device=sources.device)
        kept[destinations] = sources
        self._text = self._text[kept]
        if self._cache is not None:
            self._cache.batch_select_indices(kept)

    def _add(self, logits: Tensor) -> None:
        self.completions.add(*self._decoding.choose(self.completions, logits), self._ends)

    def _compute(self, new: Tensor) -> Tensor:
        """Return the next token's logits after ``[rows, n]`` tokens that the model has not read yet."""
        attends = self._text != PADDING
        cached = {} if self._cache is None else {"past_key_values": self._cache}
        return self.model(
            input_ids=new.clamp(min=0),
            attention_mask=attends.long(),
            position_ids=(attends.cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :],
            use_cache=bool(cached),
            **cached,
            **self._options,
        ).logits[:, -1]
