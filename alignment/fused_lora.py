"""The linear layer with a LoRA adapter as one differentiable function.

peft computes y = x Wᵀ + s · (x Aᵀ) Bᵀ as separate operations, and autograd keeps and adds up what lies between them.
The gradients are known in closed form, so it can be one function that writes into one output and keeps one small
product. On a processor that saves about a seventh of the time of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FusedLora(torch.autograd.Function):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ for inputs x ``[…, in]``, with W and b frozen.

    With g = ∂L/∂y the gradients are ∂L/∂A = s (g B)ᵀ x, ∂L/∂B = s gᵀ (x Aᵀ) and ∂L/∂x = g W + s (g B) A.
    E. Hu et al., *LoRA: low-rank adaptation of large language models*, 2021, equation 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        down, up = a.to(weight.dtype), b.to(weight.dtype)
        inner = rows @ down.T
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling, ctx.shape = scaling, x.shape
        output = nn.functional.linear(rows, weight, bias).addmm_(inner, up.T, alpha=scaling)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        inner_gradient = (gradient @ up).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ weight).addmm_(inner_gradient, down).view(ctx.shape)
        return x_gradient, None, None, inner_gradient.T @ rows, (gradient.T @ inner).mul_(ctx.scaling), None


def fuse_lora(model: nn.Module) -> None:
    """Let a model's LoRA layers use :class:`FusedLora` where they are plain ones; others stay as peft has them."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and type(layer.get_base_layer()) is nn.Linear:
            layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]


def _forward(layer: LoraLinear, by_peft: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or len(layer.active_adapters) != 1 or not _is_plain(layer, layer.active_adapters[0]):
        return by_peft(x, *args, **kwargs)
    name, base = layer.active_adapters[0], layer.get_base_layer()
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return FusedLora.apply(x, base.weight, base.bias, a, b, layer.scaling[name])


def _is_plain(layer: LoraLinear, name: str) -> bool:
    """Return whether the layer's output is that of :class:`FusedLora`, and somebody may want its gradient."""
    return (
        torch.is_grad_enabled()
        and name in layer.lora_A
        and not (layer.disable_adapters or layer.merged or name in layer.lora_variant or layer.lora_bias[name])
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not any(parameter.requires_grad for parameter in layer.get_base_layer().parameters())
    )
