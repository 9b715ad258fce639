"""Attention of one new token in each of many rows, to the keys that the row has so far.

The kernels for long sequences compute a tile of 64 or 128 queries at once, of which a row that writes has as many as
heads share a key. On an H100 the kernel here takes half the time of torch's flash and flex attention (128 rows of 230
tokens, 32 heads of 64 that share 4 keys: 15, 30 and 24 µs; reading the keys and values takes 10).
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

try:  # It comes with torch for CUDA.
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def masked_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attend in each row, with a mask.

    Args:
        query: ``[B, heads, head_dim]``.
        key: ``[B, K, key_heads, head_dim]``; heads / key_heads adjacent heads share a key.
        value: likewise.
        mask: ``[B, K]`` booleans, the keys that a row sees.
        scaling: of the products; 1/√head_dim by default.

    Returns:
        ``[B, heads, head_dim]``.
    """
    # Heads that share a key are so many queries of one head.
    shared = query.unflatten(1, (key.shape[2], -1))
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(shared, key, value, mask[:, None, None], scale=scaling).flatten(1, 2)


#: Of larger heads the kernel's tiles would not fit into a GPU's fast memory.
LARGEST_HEAD = 256


@functools.cache
def has_row_kernel(device_type: str) -> bool:
    """Return whether :func:`attend_rows` runs there: on CUDA, with triton and the C compiler that it calls."""
    if device_type != "cuda" or triton is None:
        return False
    found = any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
    if not found:
        warnings.warn("there is no C compiler for triton, so writing takes longer: install gcc", stacklevel=2)
    return found


# An operation of its own, so that a compiler does not look inside.
@torch.library.custom_op("aligngym::attend_rows", mutates_args=())
def attend_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float | None) -> Tensor:
    """Attend in each row by one kernel that reads no more than the row sees.

    Args:
        query: ``[B, heads, head_dim]``, with heads of at most :data:`LARGEST_HEAD`.
        key: ``[R, capacity, key_heads, head_dim]`` with R ≥ B, of which the first B rows are read.
        value: likewise.
        seen: ``[B]``, how many keys each row sees, at least 1.
        scaling: of the products; 1/√head_dim by default.

    Returns:
        ``[B, heads, head_dim]``.
    """
    query, output = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    rows, heads, size = query.shape
    key_heads = key.shape[2]
    shared, padded = heads // key_heads, max(16, triton.next_power_of_2(size))
    large = padded * key.element_size() > 256
    _attend_row[(rows, key_heads)](
        query,
        key,
        value,
        output,
        seen,
        size**-0.5 if scaling is None else scaling,
        *key.stride()[:3],
        SIZE=size,
        PADDED_SIZE=padded,
        SHARED=shared,
        # A product of matrices has at least sixteen rows and columns.
        QUERIES=max(16, triton.next_power_of_2(shared)),
        KEYS=32 if large else 64,
        num_warps=2,
        num_stages=2 if large else 3,
    )
    return output


@attend_rows.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


if triton is not None:

    @triton.jit
    def _attend_row(  # type: ignore[no-untyped-def]
        query,
        key,
        value,
        output,
        seen,
        scaling,
        row_stride,
        key_stride,
        head_stride,
        SIZE: tl.constexpr,
        PADDED_SIZE: tl.constexpr,
        SHARED: tl.constexpr,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        """Attend in one row, for the heads that share keys; softmax(q kᵀ) v is added up from KEYS keys at a time."""
        row, head, key_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        number, column, place = tl.arange(0, QUERIES), tl.arange(0, PADDED_SIZE), tl.arange(0, KEYS)
        inside = column[None] < SIZE
        own = ((row * key_heads + head) * SHARED + number[:, None]) * SIZE + column[None]
        q = tl.load(query + own, mask=(number[:, None] < SHARED) & inside, other=0.0)
        begin = row.to(tl.int64) * row_stride + head * head_stride
        last = tl.load(seen + row)
        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, PADDED_SIZE], tl.float32)
        for start in range(0, last, KEYS):
            there = start + place < last
            offsets = begin + (start + place)[:, None] * key_stride + column[None]
            k = tl.load(key + offsets, mask=there[:, None] & inside, other=0.0)
            v = tl.load(value + offsets, mask=there[:, None] & inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            scores = tl.where(there[None], scores, float("-inf"))
            # What was added up relative to a lower maximum is scaled to the new one.
            new = tl.maximum(highest, tl.max(scores, 1))
            weights, scale = tl.exp(scores - new[:, None]), tl.exp(highest - new)
            mixed = mixed * scale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total, highest = total * scale + tl.sum(weights, 1), new
        tl.store(output + own, (mixed / total[:, None]).to(q.dtype), mask=(number[:, None] < SHARED) & inside)
