"""What a causal language model says about rows: by packed rows where it can take them, by padded ones elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aligngym.alignment.captured_passes import CapturedPasses
from aligngym.alignment.log_probs import packed_log_probs, packed_values, padded_log_probs, padded_values
from aligngym.alignment.models import decoder_layers
from aligngym.alignment.packing import Packing, use_shared_prompt_attention
from aligngym.core.trajectories import Trajectories

#: What the packed and the padded path compute alike.
Computed = TypeVar("Computed")

#: Tokens computed at once where they are padded rows, all of whose logits are there together.
PADDED_TOKENS_AT_ONCE = 4096


class ModelEvaluator:
    """Log-probabilities and values of completions under a model, whatever adapter is at work.

    Args:
        model: any transformers causal language model.

    Attributes:
        packed: whether rows may be packed. At first it is false; see :meth:`try_packing`.
        compiled: whether torch compiles the model's layers.
        passes: what runs the model on packed rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.passes = model, CapturedPasses(model)
        self.packed = self.compiled = False
        self._last: tuple[Any, Packing] | None = None

    @property
    def steps_at_once(self) -> int:
        """How many tokens are best computed at once, in the memory that there is."""
        return self.passes.memory.tokens_at_once if self.packed else PADDED_TOKENS_AT_ONCE

    def log_probs(
        self, trajectories: Trajectories, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``[B, T]`` log π(token), 0 where ``mask`` is false, and entropies if asked.

        Args:
            trajectories: prompts, completions and the mask of the tokens that the policy wrote.
            temperature: what logits are divided by.
            entropy: whether to compute the entropy of each prediction as well.
        """
        head = self.model.get_output_embeddings()
        # Entropies need all logits anyway, and a head that is trained needs gradients that the packed path leaves out.
        if entropy or type(head) is not nn.Linear or head.weight.requires_grad:
            return padded_log_probs(self.model, trajectories, entropy=entropy, temperature=temperature)

        def packed() -> Tensor:
            layout = self.layout(trajectories)
            return packed_log_probs(self.model, trajectories, temperature, layout, self.passes, self.compiled)

        return self._packed_or_padded(
            packed, lambda: padded_log_probs(self.model, trajectories, temperature=temperature)[0]
        ), None

    def values(self, trajectories: Trajectories, head: nn.Module) -> Tensor:
        """Return ``[B, T]``, what ``head`` makes of the hidden state before each token; 0 elsewhere."""
        return self._packed_or_padded(
            lambda: packed_values(self.model, head, trajectories, self.layout(trajectories), self.passes),
            lambda: padded_values(self.model, head, trajectories),
        )

    def layout(self, trajectories: Trajectories) -> Packing:
        """Return how some rows are packed, which policy, reference and critic share."""
        rows = (trajectories.observations, trajectories.actions, trajectories.mask, trajectories.group)
        # The tensors themselves, which are kept so that no others can take their place, and how often they changed.
        known = tuple((tensor, 0 if tensor is None else tensor._version) for tensor in rows)
        if self._last is None or any(a is not b or m != n for (a, m), (b, n) in zip(known, self._last[0], strict=True)):
            self._last = known, Packing.of(trajectories)
        return self._last[1]

    def compile_layers(self) -> None:
        """Let torch compile the model's layers: the first steps after that take longer, all others less time."""
        self.compiled = True
        for layer in decoder_layers(self.model):
            layer.compile(dynamic=True)
        # Otherwise the first layer, whose input has no gradient, would be compiled once more for itself.
        self.model.get_input_embeddings().register_forward_hook(_with_gradient)
        self.passes.reset(compiled=True)

    def _packed_or_padded(self, packed: Callable[[], Computed], padded: Callable[[], Computed]) -> Computed:
        if self.packed:
            try:
                return packed()
            except NotImplementedError as error:
                warnings.warn(f"{error}; using padded rows for such batches, which is slower", stacklevel=5)
        return padded()

    @torch.no_grad()
    def try_packing(self) -> None:
        """Pack rows from now on, unless both paths differ on a few tokens.

        A model may mix tokens or shape logits in ways that packing misses.
        """
        model, device = self.model, self.model.device
        vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
        tokens = torch.arange(12, device=device) * 7 % vocabulary
        actions = torch.stack([tokens[:5], tokens[5:10]])
        probe = Trajectories(tokens[None, 5:].repeat(2, 1), actions, actions >= 0, group=torch.zeros(2))
        own_attention = model.config._attn_implementation
        padded, _ = padded_log_probs(model, probe)
        tolerance = 1e-4 if model.dtype == torch.float32 else 0.2
        try:
            self.packed = use_shared_prompt_attention(model) and torch.allclose(
                packed_log_probs(model, probe), padded, atol=tolerance
            )
        except Exception:  # A model that knows nothing of packing may fail at it in any way.
            self.packed = False
        if not self.packed:
            # Some models have no other attention that is right: Gemma 2 caps its scores, which SDPA cannot.
            model.set_attn_implementation(own_attention)
            warnings.warn(
                f"{type(model).__name__} cannot share prompts between completions; using padded rows, which is slower",
                stacklevel=4,
            )


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(torch.is_grad_enabled())
