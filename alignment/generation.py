"""Writing completions: the prompt is computed once, and every token's log-probability is kept as it is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from aligngym.alignment.data import pad_tokens
from aligngym.core.trajectories import PADDING, Trajectories

#: Rows that have ended are taken out of the batch once they are more than this share of it: copying the cache of those
#: that go on costs about as much as a token.
FINISHED_SHARE = 0.25


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

    def restrict(self, log_table: Tensor) -> Tensor:
        """Return ``[N, V]`` log-probabilities of what tokens are drawn from, given those of the policy."""
        restricted = log_table
        if self.top_k and not self.greedy:
            restricted = TopKLogitsWarper(self.top_k)(None, restricted)  # type: ignore[arg-type]
        if self.top_p < 1 and not self.greedy:
            restricted = TopPLogitsWarper(self.top_p)(None, restricted)  # type: ignore[arg-type]
        return restricted if restricted is log_table else restricted.log_softmax(dim=-1)


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
    device, count, length = model.device, len(prompts) * completions, decoding.max_new_tokens
    uniforms = uniforms.to(device)
    observations = pad_tokens(list(prompts), side="left").to(device)
    actions = torch.full((count, length), PADDING, device=device)
    log_probs = torch.zeros(count, length, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    writer = _Writer(model, observations, completions)
    # The rows that are still computed, some of which have ended.
    rows = torch.arange(count, device=device)
    for t in range(length):
        log_table = (writer.logits.float() / temperature).log_softmax(dim=-1)
        drawn_from = decoding.restrict(log_table)
        tokens = log_table.argmax(dim=1) if decoding.greedy else _draw(drawn_from, uniforms[rows, t])
        goes_on = ~ended[rows]
        written = rows[goes_on]
        actions[written, t] = tokens[goes_on]
        log_probs[written, t] = drawn_from.gather(1, tokens[:, None])[goes_on, 0]
        ends = torch.isin(tokens, torch.tensor(list(end_tokens), device=device, dtype=tokens.dtype))
        ended[rows] |= ends | _stopped(tokenizer, actions[rows, : t + 1], decoding.stop)
        running = ~ended[rows]
        if t + 1 == length or not running.any():
            break
        if (~running).float().mean() > FINISHED_SHARE:
            writer.keep(running)
            rows, tokens = rows[running], tokens[running]
        writer.write(tokens)
    used = int((actions != PADDING).sum(dim=1).max())
    return completion_rows(observations, actions[:, :used], log_probs[:, :used], ended)


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


class _Writer:
    """The model's state while it writes: what it has computed of each row, and what it says of the next token.

    State-space models cannot take rows out of what they remember, and read their whole text again for every token.

    Attributes:
        logits: ``[rows, V]``, of each row's next token.
    """

    def __init__(self, model: PreTrainedModel, observations: Tensor, completions: int) -> None:
        self.model = model
        # The whole table of logits is wanted for the last token only.
        parameters = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache = None if model._is_stateful else DynamicCache(config=model.config)
        self._text = observations
        self.logits = self._compute(observations)
        if completions > 1:
            self._text = self._text.repeat_interleave(completions, dim=0)
            self.logits = self.logits.repeat_interleave(completions, dim=0)
            if self._cache is not None:
                self._cache.batch_repeat_interleave(completions)

    def write(self, tokens: Tensor) -> None:
        """Add a token to every row."""
        self._text = torch.cat([self._text, tokens[:, None]], dim=1)
        self.logits = self._compute(self._text if self._cache is None else tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but those where ``rows`` is true."""
        self._text = self._text[rows]
        if self._cache is not None:
            self._cache.batch_select_indices(rows.nonzero()[:, 0])

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


def _draw(log_table: Tensor, uniforms: Tensor) -> Tensor:
    """Return ``[N]``, from each row of log-probabilities the first index where they add up to the uniform number."""
    cumulative = log_table.exp().cumsum(dim=-1)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None])[:, 0]


def _stopped(tokenizer: PreTrainedTokenizerBase, actions: Tensor, stop: Sequence[str]) -> Tensor:
    """Return ``[N]``, whether the text of a row ends, or has just ended, with one of the ``stop`` texts."""
    stopped = torch.zeros(len(actions), dtype=torch.bool, device=actions.device)
    if stop:
        # A token has a character or a part of one; some more, for those that are no text.
        reach = max(len(text.encode()) for text in stop) + 8
        for row, tail in enumerate(actions[:, -reach:].tolist()):
            text = tokenizer.decode([token for token in tail if token != PADDING])
            stopped[row] = any(ending in text for ending in stop)
    return stopped
