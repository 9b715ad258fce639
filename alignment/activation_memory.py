"""How many tokens' activations fit into a GPU's memory, and what to do when they do not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from aligngym.alignment.adapters import adapter_layers, using_adapter, without_casts
from aligngym.alignment.log_probs import hidden_states
from aligngym.alignment.packing import Packing

#: Tokens computed at once where memory allows more: matrix products are no faster with larger ones, and the small
#: operations between them find their input in the caches.
TOKENS_AT_ONCE = 8192

#: Tokens of the pass that measures what one of them needs.
MEASURED = 512

#: The share of the memory that is free which activations may take: gradients and logits want some.
SHARE = 0.7


class ActivationMemory:
    """What a model's activations need, measured when first asked for.

    Args:
        model: a transformers causal language model that runs
            :func:`~aligngym.alignment.packing.shared_prompt_attention`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @functools.cached_property
    def tokens(self) -> float:
        """The most tokens whose activations fit into the memory that was free when this was first asked for."""
        device = self._model.device
        if device.type != "cuda":
            return float("inf")
        length = min(MEASURED, getattr(self._model.config.get_text_config(), "max_position_embeddings", MEASURED))
        row = Packing.of_prompts([torch.zeros(length, dtype=torch.long)], device)
        # Compiled layers need less, and are not to be compiled for this.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            hidden_states(self._model, row.input_ids, row.position_ids, row)  # The first call allocates more than that.
            before = torch.cuda.memory_allocated(device)
            states = hidden_states(self._model, row.input_ids, row.position_ids, row)
            needed = (torch.cuda.memory_allocated(device) - before) / length
        del states
        torch.cuda.empty_cache()
        return int(SHARE * torch.cuda.mem_get_info(device)[0] / max(needed, 1))

    @property
    def tokens_at_once(self) -> int:
        """How many tokens to compute at once. A row that is longer than the memory allows is recomputed instead."""
        return int(min(TOKENS_AT_ONCE, max(self.tokens, MEASURED)))

    def recomputing(self, tokens: int) -> contextlib.AbstractContextManager[None]:
        """Return a context in which layers keep their inputs only, if so many tokens' activations would not fit."""
        fits = not torch.is_grad_enabled() or tokens <= self.tokens
        return contextlib.nullcontext() if fits else recomputing_layers(self._model)


@contextlib.contextmanager
def recomputing_layers(model: PreTrainedModel) -> Iterator[None]:
    """Let the layers of passes in a block keep their inputs only, and compute the rest again for their gradients.

    T. Chen et al., *Training deep nets with sublinear memory cost*, 2016.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    again = _same_adapters(model)
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again())
        )
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


def _same_adapters(model: PreTrainedModel) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return what makes a context in which a model's adapters are as they are now.

    Layers are computed again when gradients are asked for: the critic's adapter, say, is no longer at work then.
    """
    layers = adapter_layers(model)
    tuned: list[Any] = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
    name = None if not tuned or tuned[0].disable_adapters else tuned[0].active_adapters[0]
    uncast = bool(tuned) and not tuned[0].cast_input_dtype_enabled

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with using_adapter(layers, name), without_casts(layers, uncast):
            yield

    return again
