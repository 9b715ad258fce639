"""Linear equations that are solved by multiplying with their matrix, which is never written down."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: What differs by less than so many roundings, relative to what it was computed from, cannot be told from 0.
ROUNDINGS = 10


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], vector: Tensor, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """Solve A x = b for a symmetric, positive (semi-)definite A that is known only through v ↦ A v.

    Iteration k minimises ½ xᵀA x − bᵀx over span{b, A b, …, A^(k−1) b}, so n iterations solve n equations, up to
    rounding, and as few as A has different eigenvalues are enough. If A is singular and b in its range, the result is
    A⁺b, the solution of least norm. M. Hestenes and E. Stiefel, *Methods of conjugate gradients for solving linear
    systems*, 1952, section 3; with curvature products in learning: J. Martens, *Deep learning via Hessian-free
    optimization*, 2010, section 4. Damping is up to the caller: ``lambda v: product(v) + damping * v``.

    Args:
        product: A v for a ``[n]`` tensor v.
        vector: ``[n]``, b, of a floating type.
        iterations: the most products to take.
        tolerance: the relative residual ‖b − A x‖ / ‖b‖ to stop at. Iterations also stop where it is within the
            rounding error of the type.

    Returns:
        ``[n]``, x, detached. It starts from 0, so every xᵀb is ≥ 0, also if iterations end before the tolerance.

    Raises:
        TypeError: if the vector is not of a floating type.
        ValueError: if it is not flat, an argument is out of range, or the product has another shape.
        FloatingPointError: if a number is not finite, or the curvature vᵀA v is negative along a direction, or 0 along
            one that is needed: then A is not positive semi-definite, or A x = b has no solution.
    """
    _check(vector, iterations, tolerance)
    rounding = ROUNDINGS * torch.finfo(vector.dtype).eps
    # The equations are linear: without its scale, no square of a tiny or huge vector leaves the range of its type.
    scale = vector.detach().abs().max().clamp(min=torch.finfo(vector.dtype).tiny)
    residual = vector.detach() / scale
    solution, direction = torch.zeros_like(residual), residual.clone()
    squared = float(residual @ residual)
    enough, largest = tolerance * math.sqrt(squared), 0.0
    for iteration in range(iterations):
        # Where the rounding of A x exceeds it, the residual says nothing more: x solves (A + E) x = b for a tiny E.
        if math.sqrt(squared) <= max(enough, rounding * largest * float(solution.norm())):
            break
        image = product(direction).detach()
        if image.shape != vector.shape:
            raise ValueError(f"product returns a tensor of shape {tuple(image.shape)} for one of {tuple(vector.shape)}")
        curvature, length = float(direction @ image), float(direction @ direction)
        if not math.isfinite(curvature):
            raise FloatingPointError(f"iteration {iteration}: vᵀA v is {curvature}; look for NaN or inf in the product")
        largest = max(largest, float(image.norm()) / math.sqrt(length))
        if curvature <= rounding * largest * length:
            raise FloatingPointError(
                f"iteration {iteration}: the curvature vᵀA v / vᵀv is {curvature / length:.3g}, and must be positive: "
                "A is not positive definite; add damping, product(v) + damping * v"
            )
        step = squared / curvature
        solution += step * direction
        residual -= step * image
        squared, before = float(residual @ residual), squared
        direction = residual + (squared / before) * direction
    return solution * scale


def _check(vector: Tensor, iterations: int, tolerance: float) -> None:
    if not vector.is_floating_point():
        raise TypeError(f"vector holds {vector.dtype}: equations are solved in floating-point numbers")
    if vector.ndim != 1:
        raise ValueError(f"vector is flat, not of shape {tuple(vector.shape)}: join its parts with torch.cat")
    if iterations < 1:
        raise ValueError(f"iterations is at least 1, not {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is a relative residual, at least 0, not {tolerance}")
    if not torch.isfinite(vector).all():
        place = int((~torch.isfinite(vector)).nonzero()[0])
        raise FloatingPointError(f"entry {place} of vector is {float(vector[place])}")
