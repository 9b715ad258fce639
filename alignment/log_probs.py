"""Log-probabilities of completions under a causal language model: one engine for every trainer.

Rows that share a prompt (the two answers of a preference pair, the G completions of a group) are laid end to end
behind one copy of it, and all groups of a batch form a single row without padding:

    prompt₁ a₁ a₂ … prompt₂ b₁ b₂ …

Attention lets a completion see its prompt and itself; positions restart after the prompt for every completion. What all
prompts begin with, such as a system message, stands in the first of them only. So every prompt is computed once, no
padding is computed, and the LM head runs only where a token of the policy is predicted.
:func:`padded_log_probs` is the plain way to compute the same numbers, one padded row per completion: the truth that
the packed path is tested against, and the way for models that cannot take it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aligngym.core.trajectories import PADDING, Trajectories

#: The name under which transformers knows :func:`shared_prompt_attention`.
SHARED_PROMPT_ATTENTION = "aligngym_shared_prompt"

#: Not cuDNN's, which spends a second on planning for every new length.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

#: Logits computed at once, about this many numbers: 64 MiB in float32.
LOGITS_PER_CHUNK = 2**24


def tokens_of(trajectories: Trajectories) -> list[tuple[Tensor, Tensor]]:
    """Return each row's prompt and completion tokens, without padding.

    Raises:
        ValueError: if a row has no prompt, no token that the policy wrote, or padding before its last token.
    """
    prompts = [row[row != PADDING] for row in trajectories.observations]
    completions = [row[row != PADDING] for row in trajectories.actions]
    for number, (prompt, acted) in enumerate(zip(prompts, trajectories.mask, strict=True)):
        if not len(prompt) or not acted.any():
            raise ValueError(f"row {number} of the batch has an empty {'completion' if len(prompt) else 'prompt'}")
    # Columns count from the first token of a completion, so there is no place for padding before or in it.
    for number, (row, completion) in enumerate(zip(trajectories.actions, completions, strict=True)):
        if (row[: len(completion)] == PADDING).any():
            raise ValueError(f"row {number} of the batch has padding inside its completion")
    return list(zip(prompts, completions, strict=True))


@dataclass
class Packing:
    """A batch of trajectories as one row of N tokens, M of which were written by the policy.

    Attributes:
        input_ids: ``[1, N]``.
        position_ids: ``[1, N]``, counted from 0 in each prompt, and on from its end in each completion.
        prefix: how many tokens all prompts begin with; the row begins with them.
        groups: for each group the lengths, in the packed row, of the rest of its prompt and of its completions.
        predictors: ``[M]``, the places in the packed row whose hidden states predict the policy's tokens.
        targets: ``[M]``, those tokens.
        places: the rows and columns of ``[B, T]`` that the M numbers belong to.
    """

    input_ids: Tensor
    position_ids: Tensor
    prefix: int
    groups: list[tuple[int, list[int]]]
    predictors: Tensor
    targets: Tensor
    places: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, trajectories: Trajectories) -> Packing:
        """Pack rows by ``trajectories.group``; without groups every row stands alone.

        Raises:
            ValueError: if rows of one group have different prompts, or a row is empty.
        """
        device = trajectories.actions.device
        # The layout is made of many small index operations: on the host they cost nothing.
        host = trajectories.to("cpu")
        rows = tokens_of(host)
        groups: dict[int, list[int]] = {}
        for row, group in enumerate(range(len(rows)) if host.group is None else host.group.tolist()):
            groups.setdefault(group, []).append(row)

        prefix = _shared_prefix([rows[members[0]][0] for members in groups.values()])
        pieces: list[Tensor] = []
        positions, layout, predictors, places = [], [], [], []
        end = 0
        for members in groups.values():
            prompt = rows[members[0]][0]
            present = prefix if pieces else 0
            pieces.append(prompt[present:])
            positions.append(torch.arange(present, len(prompt)))
            end += len(prompt) - present
            last_of_prompt = torch.tensor([end - 1])
            lengths = []
            for row in members:
                if not torch.equal(rows[row][0], prompt):
                    raise ValueError(f"rows {members[0]} and {row} are of one group and have different prompts")
                completion = rows[row][1]
                # The first token is predicted by the prompt's last, every other by the one before it; so the last
                # token predicts nothing and is left out.
                length = len(completion) - 1
                acted = host.mask[row, : len(completion)].nonzero()[:, 0]
                predictors.append(torch.cat([last_of_prompt, end + torch.arange(length)])[acted])
                places.append(torch.stack([torch.full_like(acted, row), acted]))
                pieces.append(completion[:-1])
                positions.append(len(prompt) + torch.arange(length))
                lengths.append(length)
                end += length
            layout.append((len(prompt) - prefix, lengths))
        row_index, column_index = torch.cat(places, dim=1).to(device)
        return cls(
            input_ids=torch.cat(pieces)[None].to(device),
            position_ids=torch.cat(positions)[None].to(device),
            prefix=prefix,
            groups=layout,
            predictors=torch.cat(predictors).to(device),
            targets=trajectories.actions[row_index, column_index],
            places=(row_index, column_index),
        )

    def scatter(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """Return ``[B, T]`` with the M numbers in their places and 0 elsewhere."""
        return numbers.new_zeros(shape).index_put(self.places, numbers)


def _shared_prefix(prompts: list[Tensor]) -> int:
    """Return how many tokens several prompts begin with in common, leaving each at least one of its own."""
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts)) - 1
    differs = (torch.stack([prompt[:shortest] for prompt in prompts]) != prompts[0][:shortest]).any(dim=0)
    return int(differs.int().argmax()) if differs.any() else shortest


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each group of a packed row; without a packing, as transformers' own SDPA does.

    Shapes are transformers': ``[1, heads, N, head_dim]`` in, ``[1, N, heads, head_dim]`` out.

    Raises:
        NotImplementedError: for attention that is more than a softmax over what the mask lets through.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"packed attention has no {option}")
    prefix = packing.prefix
    longest = prefix + max(prompt + max(lengths) for prompt, lengths in packing.groups)
    if kwargs.get("sliding_window") is not None and longest > kwargs["sliding_window"]:
        raise NotImplementedError(f"packed attention over {longest} tokens, more than the model's sliding window")
    grouped = query.shape[1] != key.shape[1]
    # A prompt and its first completion stand together already. One split, because its gradient is one concatenation;
    # that of a slice is a whole row of zeros.
    sizes = [size for prompt, (first, *others) in packing.groups for size in (prompt + first, *others)]
    sizes[0] += prefix
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    row_begin: tuple[Tensor, ...] = ()
    group_begin: tuple[Tensor, ...] = ()
    for prompt, lengths in packing.groups:
        for number in range(len(lengths)):
            sequence = next(pieces)
            # What is before it, and stands elsewhere in the row. The whole is one plainly causal sequence, which every
            # fast kernel knows how to do; that shared tokens attend again costs less than a mask over the row would.
            before = prefix + prompt if number else prefix if outputs else 0
            if before:
                begin = group_begin if number else row_begin
                sequence = tuple(torch.cat([x[:, :, :before], y], dim=2) for x, y in zip(begin, sequence, strict=True))
            row_begin = row_begin or sequence
            group_begin = group_begin if number else sequence
            q, k, v = sequence
            output = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
            )
            outputs.append(output[:, :, before:])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHARED_PROMPT_ATTENTION, shared_prompt_attention)
AttentionMaskInterface.register(SHARED_PROMPT_ATTENTION, sdpa_mask)


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[y] for M hidden states h, with the logits of one chunk in memory at a time.

    The gradient with respect to h is W[y] − Σ_v p_v W[v] whatever the loss, so it is computed while the chunk's
    logits are there; nothing of the size of the vocabulary is kept or computed again. For a frozen head only.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        size = max(1, LOGITS_PER_CHUNK // len(weight))
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        jacobian = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            # Not logsumexp: on a processor its plain float32 sum loses two digits over a whole vocabulary.
            log_table = F.linear(hidden[rows], weight, bias).float().log_softmax(dim=1)
            log_probs[rows] = log_table.gather(1, targets[rows, None])[:, 0]
            if jacobian is not None:
                jacobian[rows] = weight[targets[rows]] - log_table.exp_().to(weight.dtype) @ weight
        ctx.save_for_backward(jacobian)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return jacobian * gradients[0][:, None].to(jacobian.dtype), None, None, None


def packed_hidden_states(model: PreTrainedModel, packing: Packing) -> Tensor:
    """Return ``[M, H]``, the model's last hidden state at the places that predict the policy's tokens."""
    with sdpa_kernel(ATTENTION_KERNELS):
        hidden = model.base_model(
            input_ids=packing.input_ids,
            position_ids=packing.position_ids,
            # Any four-dimensional mask keeps transformers from making its own of N × N; the packing says who sees whom.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.input_ids.device),
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
    return hidden[packing.predictors]


def packed_log_probs(model: PreTrainedModel, trajectories: Trajectories, temperature: float = 1.0) -> Tensor:
    """Return ``[B, T]`` log π(token) by the packed path, 0 where ``mask`` is false.

    Args:
        model: a transformers causal language model that runs :data:`SHARED_PROMPT_ATTENTION`.
        trajectories: prompts, completions and the mask of the tokens that the policy wrote.
        temperature: what logits are divided by.
    """
    packing = Packing.of(trajectories)
    head = cast(nn.Linear, model.get_output_embeddings())
    # Logits are linear in the hidden state, which is far smaller than they are.
    hidden = packed_hidden_states(model, packing) / temperature
    bias = None if head.bias is None else head.bias / temperature
    return packing.scatter(TokenLogProbs.apply(hidden, head.weight, bias, packing.targets), trajectories.mask.shape)


def packed_values(model: PreTrainedModel, head: nn.Module, trajectories: Trajectories) -> Tensor:
    """Return ``[B, T]``, what ``head`` makes of the hidden state before each token, by the packed path; 0 elsewhere."""
    packing = Packing.of(trajectories)
    values = head(packed_hidden_states(model, packing).float())[:, 0]
    return packing.scatter(values, trajectories.mask.shape)


@dataclass
class PaddedRows:
    """A batch of trajectories as one padded row for each.

    Attributes:
        input_ids: ``[B, L]``.
        attends: ``[B, L]`` booleans, false on padding.
        before: ``[B, T]``, for each column of the actions the place whose hidden state predicts it.
    """

    input_ids: Tensor
    attends: Tensor
    before: Tensor

    @classmethod
    def of(cls, trajectories: Trajectories, padding_side: str = "left") -> PaddedRows:
        """Lay the rows out, with the padding on one side."""
        device = trajectories.actions.device
        rows = tokens_of(trajectories)
        sequences = [torch.cat(row) for row in rows]
        longest = max(map(len, sequences))
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
        attends = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        first = torch.empty(len(rows), 1, dtype=torch.long, device=device)
        for row, ((prompt, _), sequence) in enumerate(zip(rows, sequences, strict=True)):
            start = longest - len(sequence) if padding_side == "left" else 0
            input_ids[row, start : start + len(sequence)] = sequence
            attends[row, start : start + len(sequence)] = True
            first[row] = start + len(prompt)
        columns = torch.arange(trajectories.mask.shape[1], device=device)
        return cls(input_ids, attends, (first + columns - 1).clamp(max=longest - 1))

    def run(self, model: nn.Module) -> Any:
        """Return what a transformers model says about the rows."""
        return model(
            input_ids=self.input_ids,
            attention_mask=self.attends,
            position_ids=(self.attends.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )

    def predicting(self, outputs: Tensor) -> Tensor:
        """Return ``[B, T, …]``, the outputs ``[B, L, …]`` that stand one place before each column's token."""
        return outputs.gather(1, self.before[..., None].expand(-1, -1, outputs.shape[-1]))


def padded_log_probs(
    model: PreTrainedModel,
    trajectories: Trajectories,
    *,
    entropy: bool = False,
    padding_side: str = "left",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Return ``[B, T]`` log π(token), and entropies if asked, one padded row per completion and all logits at once.

    Args:
        model: any transformers causal language model.
        trajectories: prompts, completions and the mask of the tokens that the policy wrote.
        entropy: whether to compute the entropy of each prediction as well.
        padding_side: where the padding of the rows goes, "left" or "right"; the result does not depend on it.
        temperature: what logits are divided by.
    """
    rows = PaddedRows.of(trajectories, padding_side)
    mask = trajectories.mask
    log_table = (rows.predicting(rows.run(model).logits).float() / temperature).log_softmax(dim=-1)
    log_probs = log_table.gather(-1, trajectories.actions.where(mask, 0)[..., None])[..., 0].where(mask, 0.0)
    if not entropy:
        return log_probs, None
    return log_probs, -(log_table.exp() * log_table).sum(dim=-1).where(mask, 0.0)


def padded_values(
    model: PreTrainedModel, head: nn.Module, trajectories: Trajectories, padding_side: str = "left"
) -> Tensor:
    """Return ``[B, T]``, what ``head`` makes of the hidden state before each token, by padded rows; 0 elsewhere."""
    rows = PaddedRows.of(trajectories, padding_side)
    hidden = rows.predicting(rows.run(model.base_model).last_hidden_state)
    return head(hidden.float())[..., 0].where(trajectories.mask, 0.0)
