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
    active = {} if name is None else {"_active_adapter": [name]}
    with _having(layers, _disable_adapters=name is None, **active):
        yield


@contextlib.contextmanager
def without_casts(layers: Sequence[AdapterLayer], active: bool) -> Iterator[None]:
    """Keep some layers from casting their input to the dtype of their adapters for a block, if ``active``."""
    casting = [layer for layer in layers if isinstance(layer, BaseTunerLayer)] if active else []
    with _having(casting, cast_input_dtype_enabled=False):
        yield


@contextlib.contextmanager
def _having(layers: Sequence[Any], **attributes: Any) -> Iterator[None]:
    """Give some layers other attributes for a block, and then their own again.

    Not by assignment, in which a module looks for parameters first: with hundreds of layers that takes milliseconds.
    """
    before = [{name: getattr(layer, name) for name in attributes} for layer in layers]
    for layer in layers:
        vars(layer).update(attributes)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).update(own)


@contextlib.contextmanager
@torch.no_grad()
def merged_adapter(model: PreTrainedModel, layers: Sequence[AdapterLayer]) -> Iterator[None]:
    """Add the active adapter to the weights for a block, W + s·BA, so that decoding multiplies once a layer.

    The weights change where they are, because a captured CUDA graph reads them there. Afterwards they are put back as
    they were, bit for bit, which subtracting again would not do; while the block lasts both are in memory. A model with
    layers that are more than W + s·BA is left alone, and one whose adapted weights serve somewhere else too, as those
    of a head that is tied to the embeddings.

    Args:
        model: a causal language model.
        layers: its :func:`adapter_layers`.
    """
    tuned: list[Any] = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
    embeddings: Any = model.get_input_embeddings()
    if not all(_is_mergeable(layer) and layer.base_layer.weight is not embeddings.weight for layer in tuned):
        yield
        return
    merged: list[tuple[Any, Tensor, Tensor]] = []
    try:
        for layer in tuned:
            (name,) = layer.active_adapters
            weight = layer.base_layer.weight.data
            merged.append((layer, weight, weight.clone()))
            _add(weight, layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name])
            layer.merged_adapters.append(name)
        yield
    finally:
        for layer, weight, original in merged:
            weight.copy_(original)
            layer.merged_adapters.clear()


def _add(weight: Tensor, b: Tensor, a: Tensor, scaling: float) -> None:
    """Add s·BA to a weight, where it is."""
    weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=scaling)


def _is_mergeable(layer: BaseTunerLayer) -> bool:
    """Return whether a layer is W + s·BA with one adapter, which is at work and not merged yet."""
    if not isinstance(layer, LoraLinear) or type(layer.get_base_layer()) is not nn.Linear:
        return False
    if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
