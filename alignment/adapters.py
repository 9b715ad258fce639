"""Which of a model's adapters is at work: the policy's, the reference's, the critic's, the reward model's, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

AdapterLayer = BaseTunerLayer | AuxiliaryTrainingWrapper


def adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    """Return the layers of a model that have adapters."""
    return [layer for layer in model.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def adapters_at_work(layer: BaseTunerLayer) -> tuple[str, ...]:
    """Return which adapters a layer computes: none if they are off, or in its weights."""
    return () if layer.merged or layer.disable_adapters else tuple(layer.active_adapters)


@contextlib.contextmanager
def using_adapter(layers: Sequence[AdapterLayer], name: str | None) -> Iterator[None]:
    """Let the adapter ``name`` be the active one of some layers for a block; ``None``: the layers without an adapter.

    Which parameters require gradients stays as it is: several adapters may be trained at once, as an actor and its
    critic are. peft's own switches change that, every time for all parameters, and take longer than a pass on a GPU.
    """
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter = layer._active_adapter if name is None else [name]
        layer._disable_adapters = name is None
    try:
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextlib.contextmanager
def without_casts(layers: Sequence[AdapterLayer], active: bool) -> Iterator[None]:
    """Keep some layers from casting their input to the dtype of their adapters for a block, if ``active``."""
    casting: list[Any] = [layer for layer in layers if isinstance(layer, BaseTunerLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in casting]
    for layer in casting:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(casting, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


@contextlib.contextmanager
@torch.no_grad()
def merged_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Add the active adapter to the weights for a block, W + s·BA, so that decoding multiplies once a layer.

    The weights change where they are, because a captured CUDA graph reads them there. Afterwards they are put back as
    they were, bit for bit, which subtracting again would not do; while the block lasts both are in memory. A model with
    layers that are more than W + s·BA is left alone, and one whose adapted weights serve somewhere else too, as those
    of a head that is tied to the embeddings.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers if _is_mergeable(layer)]
    embeddings: Any = model.get_input_embeddings()
    tied = any(weight is embeddings.weight for weight in weights)
    if len(weights) < len(layers) or tied:
        yield
        return
    merged: list[tuple[Any, Tensor, Tensor]] = []
    try:
        for layer, weight in zip(layers, weights, strict=True):
            (name,) = layer.active_adapters
            merged.append((layer, weight, weight.data.clone()))
            weight.data += layer.get_delta_weight(name).to(weight.dtype)
            layer.merged_adapters.append(name)
        yield
    finally:
        for layer, weight, original in merged:
            weight.data.copy_(original)
            layer.merged_adapters.clear()


def _is_mergeable(layer: BaseTunerLayer) -> bool:
    """Return whether a layer is W + s·BA with one adapter, which is at work and not merged yet."""
    if not isinstance(layer, LoraLinear) or type(layer.get_base_layer()) is not nn.Linear:
        return False
    if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
