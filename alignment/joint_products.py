"""Layers with the same input, as one product with all their weights.

Queries, keys and values are products with the same numbers, and so are the two sides of a gated layer. While one token
a row is computed, a product takes the time in which its weights are read, and a small one far longer: on an H100 those
of a model with four key heads take 18 µs one after the other and 7 µs at once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

#: What transformers calls such layers.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def siblings(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Yield the linear layers below a model's adapters that have the same input."""
    for module in model.modules():
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            layers = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
            alike = {(type(layer), getattr(layer, "in_features", 0)) for layer in layers}
            if len(alike) == 1 and type(layers[0]) is nn.Linear:
                yield layers  # type: ignore[misc]


def lay_together(model: nn.Module) -> None:
    """Move the weights of layers that have the same input to adjoining memory."""
    for layers in siblings(model):
        weights = [layer.weight for layer in layers]
        if not _adjoin(weights):
            parts = torch.cat([weight.detach() for weight in weights]).split([len(weight) for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part


def _adjoin(weights: Sequence[Tensor]) -> bool:
    return all(
        left.dtype == right.dtype
        and left.is_contiguous()
        and right.is_contiguous()
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.data_ptr() + left.nbytes == right.data_ptr()
        for left, right in itertools.pairwise(weights)
    )


class JointProduct:
    """x Wᵀ for layers whose weights are the rows of one matrix W, computed when the first of them asks for its own.

    Args:
        layers: whose weights adjoin (:func:`lay_together`).
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        size = layers[0].in_features
        self._weight = layers[0].weight.detach().as_strided((sum(self._sizes), size), (size, 1))
        self._input: Tensor | None = None
        self._parts: Sequence[Tensor] = ()

    def part(self, number: int, x: Tensor) -> Tensor:
        """Return ``[…, out]`` of one of the layers for inputs ``[…, in]``."""
        if x is not self._input:
            self._input, self._parts = x, nn.functional.linear(x, self._weight).split(self._sizes, dim=-1)
        part = self._parts[number]
        if number == len(self._parts) - 1:
            self._input, self._parts = None, ()
        return part


class _Sibling(nn.Linear):
    """A layer that takes its part of a joint product."""

    joint: JointProduct
    number: int

    def forward(self, x: Tensor) -> Tensor:
        part = self.joint.part(self.number, x)
        return part if self.bias is None else part + self.bias


def joint_products(model: nn.Module) -> list[JointProduct]:
    """Return the joint products of a model, as far as weights adjoin."""
    return [JointProduct(layers) for layers in siblings(model) if _adjoin([layer.weight for layer in layers])]


@contextlib.contextmanager
def computing_jointly(products: Sequence[JointProduct]) -> Iterator[None]:
    """Let the layers of some joint products compute these for a block, without gradients."""
    for product in products:
        for number, layer in enumerate(product.layers):
            vars(layer).update(joint=product, number=number)
            layer.__class__ = _Sibling
    try:
        yield
    finally:
        for layer in itertools.chain.from_iterable(product.layers for product in products):
            layer.__class__ = nn.Linear
            del layer.joint, layer.number
