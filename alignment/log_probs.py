"""Log-probabilities of completions under a causal language model: one engine for every trainer.

The fast way computes every prompt once and no padding (:mod:`~aligngym.alignment.packing`), and runs the LM head only
where a token of the policy is predicted. :func:`padded_log_probs` is the plain way to compute the same numbers, one
padded row per completion: the truth that the packed path is tested against, and the way for models that cannot take it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from aligngym.alignment.compilation import compiled
from aligngym.alignment.packing import Attends, Packing, tokens_of
from aligngym.core.trajectories import PADDING, Trajectories

#: Not cuDNN's, which spends a second on planning for every new length.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

#: Logits computed at once, about this many numbers: 64 MiB in float32 where caches are small, and 512 on a GPU, which
#: wants large products.
LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**27}


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[y] for M hidden states h, with the logits of one chunk in memory at a time.

    The gradient with respect to h is W[y] − Σ_v p_v W[v] whatever the loss, so it is computed while the chunk's
    logits are there; nothing of the size of the vocabulary is kept or computed again. For a frozen head only.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compile: bool = False
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        softmax = compiled(_softmax) if compile else _softmax
        size = max(1, LOGITS_PER_CHUNK.get(hidden.device.type, 2**24) // len(weight))
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        jacobian = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = F.linear(hidden[rows], weight, bias)
            log_probs[rows], probabilities = softmax(logits, targets[rows], needs_gradient)
            if jacobian is not None and probabilities is not None:
                jacobian[rows] = weight[targets[rows]] - probabilities @ weight
        ctx.save_for_backward(jacobian)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return jacobian * gradients[0][:, None].to(jacobian.dtype), None, None, None, None


def _softmax(logits: Tensor, targets: Tensor, with_table: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``[N]`` log-probabilities of targets, and if asked ``[N, V]`` all probabilities."""
    # Not logsumexp: on a processor its plain float32 sum loses two digits over a whole vocabulary.
    log_table = logits.log_softmax(dim=1, dtype=torch.float32)
    log_probs = log_table.gather(1, targets[:, None])[:, 0]
    return log_probs, log_table.exp_().to(logits.dtype) if with_table else None


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, packing: Attends) -> Tensor:
    """Return ``[N, H]``, the model's last hidden states of a row ``[1, N]`` whose tokens see what ``packing`` says."""
    with sdpa_kernel(ATTENTION_KERNELS):
        hidden: Tensor = model.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            # Any four-dimensional mask keeps transformers from making its own of N × N; the packing says who sees whom.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
            use_cache=False,
            packing=packing,
        ).last_hidden_state
    return hidden[0]


def predicting_states(model: PreTrainedModel, packing: Packing) -> Tensor:
    """Return ``[M, H]``, the last hidden states at the places that predict the policy's tokens."""
    return hidden_states(model, packing.input_ids, packing.position_ids, packing)[packing.predictors]


#: What computes ``[M, H]``, the last hidden states at the places that predict the tokens of a packing.
States = Callable[[Packing], Tensor]


def packed_log_probs(
    model: PreTrainedModel,
    trajectories: Trajectories,
    temperature: float = 1.0,
    packing: Packing | None = None,
    states: States | None = None,
    compile: bool = False,
) -> Tensor:
    """Return ``[B, T]`` log π(token) by the packed path, 0 where ``mask`` is false.

    Args:
        model: a transformers causal language model that runs
            :func:`~aligngym.alignment.packing.shared_prompt_attention`.
        trajectories: prompts, completions and the mask of the tokens that the policy wrote.
        temperature: what logits are divided by.
        packing: of the trajectories, if it is known already.
        states: what computes the hidden states, the model itself by default.
        compile: whether torch compiles what lies between the head's products.
    """
    packing = packing or Packing.of(trajectories)
    head = cast(nn.Linear, model.get_output_embeddings())
    # Logits are linear in the hidden state, which is far smaller than they are.
    hidden = (states or partial(predicting_states, model))(packing) / temperature
    bias = None if head.bias is None else head.bias / temperature
    log_probs = TokenLogProbs.apply(hidden, head.weight, bias, packing.targets, compile)
    return packing.scatter(log_probs, trajectories.mask.shape)


def packed_values(
    model: PreTrainedModel,
    head: nn.Module,
    trajectories: Trajectories,
    packing: Packing | None = None,
    states: States | None = None,
) -> Tensor:
    """Return ``[B, T]``, what ``head`` makes of the hidden state before each token, by the packed path; 0 elsewhere."""
    packing = packing or Packing.of(trajectories)
    hidden = (states or partial(predicting_states, model))(packing)
    return packing.scatter(head(hidden.float())[:, 0], trajectories.mask.shape)


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
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        tokens = np.full((len(rows), longest), PADDING)
        first = np.empty((len(rows), 1), dtype=np.int64)
        for row, (prompt, completion) in enumerate(rows):
            end = longest if padding_side == "left" else len(prompt) + len(completion)
            first[row] = end - len(completion)
            tokens[row, end - len(prompt) - len(completion) : end] = np.concatenate([prompt, completion])
        columns = torch.arange(trajectories.mask.shape[1], device=device)
        input_ids = torch.from_numpy(tokens).to(device)
        before = torch.from_numpy(first).to(device) + columns - 1
        return cls(input_ids.clamp(min=0), input_ids != PADDING, before.clamp(max=longest - 1))

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
