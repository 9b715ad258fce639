"""Rows that share a prompt as one row of tokens without padding, and attention within it.

Rows that share a prompt (the two answers of a preference pair, the G completions of a group) are laid end to end
behind one copy of it, and all groups of a batch form a single row:

    prompt₁ a₁ a₂ … prompt₂ b₁ b₂ …

Attention lets a completion see its prompt and itself; positions restart after the prompt for every completion. What all
prompts begin with, such as a system message, stands in the first of them only. So every prompt is computed once, and no
padding is computed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aligngym.core.trajectories import PADDING, Trajectories

varlen_attn: Any = None
with contextlib.suppress(ImportError):  # It is there from torch 2.10 on.
    from torch.nn.attention.varlen import varlen_attn

#: Heads may share keys, which newer versions want to be told.
_GROUPED = {"enable_gqa": True} if varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

Tokens = np.ndarray

#: The name under which transformers knows :func:`shared_prompt_attention`.
SHARED_PROMPT_ATTENTION = "aligngym_shared_prompt"


def tokens_of(trajectories: Trajectories) -> list[tuple[Tokens, Tokens]]:
    """Return each row's prompt and completion tokens, without padding.

    Raises:
        ValueError: if a row has no prompt, no token that the policy wrote, or padding before its last token.
    """
    host = trajectories.host
    observations, actions, acted = (x.numpy() for x in (host.observations, host.actions, host.mask.any(dim=1)))
    present = actions != PADDING
    rows = []
    for number, (prompt, completion, here) in enumerate(zip(observations, actions, present, strict=True)):
        prompt = prompt[prompt != PADDING]
        if not len(prompt) or not acted[number]:
            raise ValueError(f"row {number} of the batch has an empty {'completion' if len(prompt) else 'prompt'}")
        length = int(here.sum())
        # Columns count from the first token of a completion, so there is no place for padding before or in it.
        if not here[:length].all():
            raise ValueError(f"row {number} of the batch has padding inside its completion")
        rows.append((prompt, completion[:length]))
    return rows


@dataclass
class Packing:
    """A batch of trajectories as one row of N tokens, M of which were written by the policy.

    The row consists of sequences whose tokens see each other: a prompt with its first completion, then every further
    completion, each of which sees more than itself: its own prompt, and what all prompts begin with.

    Attributes:
        input_ids: ``[1, N]``.
        position_ids: ``[1, N]``, counted from 0 in each prompt, and on from its end in each completion.
        prefix: how many tokens all prompts begin with; the row begins with them.
        groups: for each group the lengths, in the packed row, of the rest of its prompt and of its completions.
        predictors: ``[M]``, the places in the packed row whose hidden states predict the policy's tokens.
        targets: ``[M]``, those tokens.
        places: the rows and columns of ``[B, T]`` that the M numbers belong to.
        keys: ``[K]``, the places that the sequences see, one sequence after the other, each ending with itself.
        query_starts: where each of the S sequences begins in the row, ``[S + 1]`` with the end; 32-bit.
        key_starts: where each begins in ``keys``.
        longest: the most tokens that a sequence sees.
    """

    input_ids: Tensor
    position_ids: Tensor
    prefix: int
    groups: list[tuple[int, list[int]]]
    predictors: Tensor
    targets: Tensor
    places: tuple[Tensor, Tensor]
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest: int

    @classmethod
    def of(cls, trajectories: Trajectories) -> Packing:
        """Pack rows by ``trajectories.group``; without groups every row stands alone.

        Raises:
            ValueError: if rows of one group have different prompts, or a row is empty.
        """
        host = trajectories.host
        rows = tokens_of(host)
        groups: dict[int, list[int]] = {}
        numbers = range(len(rows)) if host.group is None else host.group.tolist()
        for row, group in enumerate(numbers):
            groups.setdefault(group, []).append(row)
        for first, *others in groups.values():
            for row in others:
                if not np.array_equal(rows[row][0], rows[first][0]):
                    raise ValueError(f"rows {first} and {row} are of one group and have different prompts")
        # The last token of a completion predicts nothing and is left out.
        layout = _Layout([(rows[members[0]][0], [rows[row][1][:-1] for row in members]) for members in groups.values()])
        mask = host.mask.numpy()
        predictors, places = [], []
        for row, before in zip((row for members in groups.values() for row in members), layout.before, strict=True):
            acted = mask[row].nonzero()[0]
            predictors.append(before[acted])
            places.append(np.stack([np.full_like(acted, row), acted]))
        return layout.packing(trajectories.actions, np.concatenate(predictors), np.concatenate(places, axis=1))

    @classmethod
    def of_prompts(cls, prompts: Sequence[Tensor], device: torch.device) -> Packing:
        """Pack prompts that nothing follows yet: sequence i is prompt i, and ``predictors`` are its last tokens."""
        layout = _Layout([(prompt.cpu().numpy(), [prompt.new_empty(0).numpy()]) for prompt in prompts])
        nothing = torch.empty(len(prompts), 1, dtype=torch.long, device=device)
        rows = np.arange(len(prompts))
        return layout.packing(nothing, np.array([before[0] for before in layout.before]), np.stack([rows, 0 * rows]))

    def scatter(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """Return ``[B, T]`` with the M numbers in their places and 0 elsewhere."""
        return numbers.new_zeros(shape).index_put(self.places, numbers)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attend within each sequence of the row.

        Args:
            module: the attention layer.
            query: ``[1, heads, N, head_dim]``.
            key: ``[1, key_heads, N, head_dim]``.
            value: likewise.
            scaling: of the products; 1/√head_dim by default.

        Returns:
            ``[1, N, heads, head_dim]``.
        """
        if has_varlen(query):
            return self._attend_at_once(query, key, value, scaling)
        return self._attend_one_by_one(query, key, value, scaling)

    def _attend_at_once(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attend with the kernel for sequences of several lengths, to which the keys of each are copied together."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.keys.shape[0] != key.shape[0]:
            key, value = _Take.apply(key, self.keys), _Take.apply(value, self.keys)
        return varlen_attention(query, key, value, self.query_starts, self.key_starts, self.longest, scaling)[None]

    def _attend_one_by_one(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        prefix = self.prefix
        # A prompt and its first completion stand together already. One split, because its gradient is one
        # concatenation; that of a slice is a whole row of zeros.
        sizes = [size for prompt, (first, *others) in self.groups for size in (prompt + first, *others)]
        sizes[0] += prefix
        pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
        outputs: list[Tensor] = []
        row_begin: tuple[Tensor, ...] = ()
        group_begin: tuple[Tensor, ...] = ()
        for prompt, lengths in self.groups:
            for number in range(len(lengths)):
                sequence = next(pieces)
                # What is before it, and stands elsewhere in the row. The whole is one plainly causal sequence, which
                # every fast kernel knows how to do; that shared tokens attend again costs less than a mask would.
                before = prefix + prompt if number else prefix if outputs else 0
                if before:
                    begin = group_begin if number else row_begin
                    sequence = tuple(
                        torch.cat([x[:, :, :before], y], dim=2) for x, y in zip(begin, sequence, strict=True)
                    )
                row_begin = row_begin or sequence
                group_begin = group_begin if number else sequence
                q, k, v = sequence
                output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
                outputs.append(output[:, :, before:])
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class _Layout:
    """Where every token of some groups stands in one row.

    Args:
        groups: for each its prompt, and the tokens to compute of its completions.

    Attributes:
        before: for each completion the places of the prompt's last token and of its own tokens.
    """

    def __init__(self, groups: Iterable[tuple[Tokens, list[Tokens]]]) -> None:
        groups = list(groups)
        self.prefix = _shared_prefix([prompt for prompt, _ in groups])
        self.groups: list[tuple[int, list[int]]] = []
        self.before: list[Tokens] = []
        ids: list[Tokens] = []
        positions, keys, query_lengths = [], [], []
        end = 0
        for prompt, completions in groups:
            present = self.prefix if ids else 0
            ids.append(prompt[present:])
            positions.append(np.arange(present, len(prompt)))
            rest = np.arange(end, end + len(prompt) - present)
            seen = np.concatenate([np.arange(present), rest])
            end += len(rest)
            for number, completion in enumerate(completions):
                own = np.arange(end, end + len(completion))
                self.before.append(np.concatenate([rest[-1:], own]))
                ids.append(completion)
                positions.append(len(prompt) + np.arange(len(completion)))
                end += len(completion)
                if queries := len(own) if number else len(rest) + len(own):
                    query_lengths.append(queries)
                    keys.append(np.concatenate([seen, own]))
            self.groups.append((len(prompt) - self.prefix, [len(completion) for completion in completions]))
        self._ids, self._positions = np.concatenate(ids), np.concatenate(positions)
        self._keys, self._query_lengths = keys, query_lengths

    def packing(self, actions: Tensor, predictors: Tokens, places: Tokens) -> Packing:
        """Return the layout on the device of ``[B, T]`` actions, of which some are predicted."""
        device = actions.device

        def there(numbers: Any, dtype: torch.dtype = torch.long) -> Tensor:
            tensor = torch.as_tensor(np.asarray(numbers), dtype=dtype)
            # Only from there is it copied without waiting for what the device has been given to do before.
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor
            return tensor.to(device, non_blocking=True)

        key_lengths = [len(keys) for keys in self._keys]
        row, column = there(places)
        return Packing(
            input_ids=there(self._ids)[None],
            position_ids=there(self._positions)[None],
            prefix=self.prefix,
            groups=self.groups,
            predictors=there(predictors),
            targets=actions[row, column],
            places=(row, column),
            keys=there(np.concatenate(self._keys)),
            query_starts=there(np.cumsum([0, *self._query_lengths]), torch.int32),
            key_starts=there(np.cumsum([0, *key_lengths]), torch.int32),
            longest=max(key_lengths),
        )


def _shared_prefix(prompts: list[Tokens]) -> int:
    """Return how many tokens several prompts begin with in common, leaving each at least one of its own."""
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts)) - 1
    differs = (np.stack([prompt[:shortest] for prompt in prompts]) != prompts[0][:shortest]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


class _Take(torch.autograd.Function):
    """x[places], whose gradient sums in float32 what the same place was taken for.

    Places past the end hold anything, and their gradients, whatever they are, go nowhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = x.shape[0]
        return x.index_select(0, places.clamp(max=ctx.length - 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        (gradient,) = gradients
        total = torch.zeros(ctx.length + 1, *gradient.shape[1:], dtype=torch.float32, device=gradient.device)
        return total.index_add(0, places, gradient.float())[: ctx.length].to(gradient.dtype), None


def runs_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has its kernel for sequences of several lengths there."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def has_varlen(query: Tensor) -> bool:
    """Return whether that kernel takes queries ``[…, head_dim]`` like these."""
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and runs_varlen(query.device, query.dtype)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest: int,
    scaling: float | None = None,
) -> Tensor:
    """Attend within S sequences that stand one after the other, in which a token sees those before it and itself.

    Where a sequence has fewer queries than keys, they are its last ones.

    Args:
        query: ``[N, heads, head_dim]``.
        key: ``[K, key_heads, head_dim]``.
        value: likewise.
        query_starts: where each sequence's queries begin, ``[S + 1]`` with the end; 32-bit.
        key_starts: where each sequence's keys begin, likewise.
        longest: no sequence has more keys.
        scaling: of the products; 1/√head_dim by default.

    Returns:
        ``[N, heads, head_dim]``.
    """
    starts = query_starts, key_starts
    output: Tensor = varlen_attn(
        query, key, value, *starts, longest, longest, scale=scaling, window_size=(-1, 0), **_GROUPED
    )
    return output


class Attends(Protocol):
    """What a row of tokens sees: :class:`Packing` while training, a cache while writing."""

    longest: int

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return ``[1, N, heads, head_dim]`` for queries ``[1, heads, N, head_dim]``."""


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Attends | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as a packing says; without one, as transformers' own SDPA does.

    Shapes are transformers': ``[1, heads, N, head_dim]`` in, ``[1, N, heads, head_dim]`` out.

    Raises:
        NotImplementedError: for attention that is more than a softmax over what may be seen.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"packed attention has no {option}")
    if dropout:
        raise NotImplementedError("packed attention has no dropout")
    if kwargs.get("sliding_window") is not None and packing.longest > kwargs["sliding_window"]:
        raise NotImplementedError(
            f"packed attention over {packing.longest} tokens, more than the model's sliding window"
        )
    return packing.attend(module, query, key, value, scaling), None


AttentionInterface.register(SHARED_PROMPT_ATTENTION, shared_prompt_attention)
AttentionMaskInterface.register(SHARED_PROMPT_ATTENTION, sdpa_mask)


def use_shared_prompt_attention(model: PreTrainedModel) -> bool:
    """Switch a model to the attention of the packed path; return whether it takes another attention at all."""
    try:
        model.set_attn_implementation(SHARED_PROMPT_ATTENTION)
    except (ValueError, NotImplementedError):
        return False
    return True
