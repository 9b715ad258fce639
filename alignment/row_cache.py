"""The keys and values of many rows in tensors made once, and attention of one new token a row.

While a batch of completions is written, every step computes one token of each row. All B of them are handed to the
model as one row of B tokens, as packed training batches are (:mod:`~aligngym.alignment.packing`); the cache is what
they see. A row's tokens stand at its places 0, 1, …, so there is no padding, and a token's position is its place.

Nothing in a step asks the device anything, and every tensor that is read or written stays where it is: a step can be
captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligngym.alignment.packing import Packing, has_varlen

#: Capacities are multiples of so many tokens, so that a somewhat longer prompt finds room too.
CAPACITY_STEP = 256


class RowCache:
    """Keys and values of B rows with room for ``capacity`` tokens each.

    A layer's two tensors ``[B, capacity, key_heads, head_dim]`` are attributes of the attention layer for as long as
    the cache is :meth:`attached`: there a compiled layer finds them as it finds its weights, and need not be compiled
    again for the next layer.

    Args:
        rows: B.
        capacity: tokens a row, at least; rounded up.
        device: where they are.

    Attributes:
        lengths: ``[B]``, 32-bit, how many tokens of each row are there.
        longest: the most tokens that a row will have before the cache is filled anew.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.longest = 0
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._rows = torch.arange(rows, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._key_starts, self._query_starts = self._starts * self.capacity, {1: self._starts}
        self._columns = torch.arange(self.capacity, device=device)
        self._reach = 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Give the attention layers their tensors for a block."""
        for module, tensors in self._layers.items():
            module.cached_keys, module.cached_values = tensors  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in self._layers:
                del module.cached_keys, module.cached_values

    def fill(self, prompts: list[int], completions: int, longest: int) -> None:
        """Say how long the prompts are that :class:`Prefill` will write into the first rows.

        Args:
            prompts: the length of each.
            completions: rows of each, which are adjacent.
            longest: the most tokens that a row will have.
        """
        lengths = torch.tensor(prompts, dtype=torch.int32).repeat_interleave(completions)
        self.lengths.zero_()
        self.lengths[: len(lengths)] = lengths.to(self.lengths.device)
        self.longest, self._reach = longest, max(prompts)

    def put(self, module: nn.Module, key: Tensor, value: Tensor, completions: int, heads: int) -> None:
        """Write what prompts begin with into the rows of their completions.

        Args:
            module: the attention layer, which has ``heads`` heads.
            key: ``[N, P, key_heads, head_dim]`` of the first P tokens of N prompts.
            value: likewise.
            completions: rows of each prompt.
            heads: that may share keys.
        """
        queries = heads // key.shape[2]
        self._query_starts.setdefault(queries, self._starts * queries)
        if module not in self._layers:
            shape = (len(self.lengths), self.capacity)
            # Not empty: what is masked is multiplied by 0, and memory may hold what is not a number.
            self._layers[module] = (key.new_zeros(*shape, *key.shape[2:]), value.new_zeros(*shape, *value.shape[2:]))
        prompts, length = key.shape[:2]
        for all_rows, new in zip(self._layers[module], (key, value), strict=True):
            rows = all_rows[: prompts * completions, :length]
            rows.view(prompts, completions, *new.shape[1:]).copy_(new[:, None])

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy whole rows to the places of others."""
        self.lengths[destinations] = self.lengths[sources]
        for tensors in self._layers.values():
            for tensor in tensors:
                used = tensor[:, : self._reach]
                used[destinations] = used[sources]

    def begin_step(self, rows: int) -> Tensor:
        """Prepare the first ``rows`` for one token each; return ``[rows]`` the places of these tokens."""
        lengths = self.lengths[:rows]
        # A processor can say for nothing how far the rows reach; elsewhere that would be waited for.
        self._reach = self.capacity if lengths.is_cuda else int(lengths.max()) + 1
        self._places, self._seen = lengths.long(), lengths + 1
        self._mask = (self._columns[: self._reach] < self._seen[:, None])[:, None, None]
        return self._places

    def end_step(self, rows: int) -> None:
        """Count the tokens of a step."""
        self.lengths[:rows] += 1

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Write each row's new key and value to their place, and attend to all that the row has.

        Shapes are those of :meth:`Packing.attend <aligngym.alignment.packing.Packing.attend>`, with a token for each
        of the first N rows.
        """
        keys: Tensor = module.cached_keys  # type: ignore[assignment]
        values: Tensor = module.cached_values  # type: ignore[assignment]
        heads, rows, size = query.shape[1:]
        places = (self._rows[:rows], self._places)
        keys.index_put_(places, key[0].transpose(0, 1).to(keys.dtype))
        values.index_put_(places, value[0].transpose(0, 1).to(values.dtype))
        # Heads that share keys are so many queries of one head: [rows, key_heads, heads / key_heads, head_dim].
        query = query[0].transpose(0, 1).reshape(rows, key.shape[1], -1, size)
        if has_varlen(query):
            starts = self._query_starts[query.shape[2]][: rows + 1], self._key_starts[: rows + 1]
            output = flash_rows(query, keys, values, *starts, self._seen, scaling)
        else:
            used = self._mask.shape[-1]
            output = masked_rows(query, keys[:rows, :used], values[:rows, :used], self._mask, scaling)
        return output.reshape(1, rows, heads, -1)


class Prefill:
    """What a packed row of prompts sees, which fills a cache on the way.

    Args:
        packing: of the prompts (:meth:`Packing.of_prompts <aligngym.alignment.packing.Packing.of_prompts>`).
        cache: which is filled.
        completions: rows of the cache for each prompt.
        new_tokens: how many more tokens will be written to a row.
    """

    def __init__(self, packing: Packing, cache: RowCache, completions: int, new_tokens: int) -> None:
        starts = packing.key_starts.long()
        lengths = starts.diff()
        self._packing, self._cache, self._completions = packing, cache, completions
        self.longest = packing.longest + new_tokens
        cache.fill(lengths.tolist(), completions, self.longest)
        columns = torch.arange(packing.longest, device=starts.device)
        # Past a prompt's end any token serves: nobody looks there.
        self._places = packing.keys[(starts[:-1, None] + columns).clamp(max=len(packing.keys) - 1)]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """As :meth:`Packing.attend <aligngym.alignment.packing.Packing.attend>`; keys and values go to the cache."""
        keys, values = (x[0].transpose(0, 1)[self._places] for x in (key, value))
        self._cache.put(module, keys, values, self._completions, query.shape[1])
        return self._packing.attend(module, query, key, value, scaling)


def masked_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attend in each row, with a mask.

    Args:
        query: ``[B, key_heads, n, head_dim]``.
        key: ``[B, K, key_heads, head_dim]``.
        value: likewise.
        mask: ``[B, 1, 1, K]`` booleans, the keys that a row sees.
        scaling: of the products; 1/√head_dim by default.

    Returns:
        ``[B, key_heads, n, head_dim]``.
    """
    return F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2), mask, scale=scaling)


def flash_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    seen: Tensor,
    scaling: float | None,
) -> Tensor:
    """Attend in each row with torch's flash kernel, which reads no more keys than a row sees.

    Args:
        query: ``[B, key_heads, n, head_dim]``, 16-bit numbers on a CUDA device.
        key: ``[R, capacity, key_heads, head_dim]`` with R ≥ B, of which the first B rows are read.
        value: likewise.
        query_starts: ``[B + 1]``, multiples of n, 32-bit.
        key_starts: ``[B + 1]``, multiples of the capacity, 32-bit.
        seen: ``[B]``, how many keys each row sees, 32-bit.
        scaling: of the products; 1/√head_dim by default.

    Returns:
        ``[B, key_heads, n, head_dim]``.
    """
    rows, key_heads, queries, size = query.shape
    query = query.transpose(1, 2).reshape(rows * queries, key_heads, size)
    key, value, capacity = key.flatten(0, 1), value.flatten(0, 1), key.shape[1]
    output = _flash(query, key, value, query_starts, key_starts, seen, queries, capacity, scaling)
    return output.view(rows, queries, key_heads, size).transpose(1, 2)


@torch.library.custom_op("aligngym::flash_rows", mutates_args=())
def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    seen: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float | None,
) -> Tensor:
    """Call the kernel; an operation of its own, so that a compiler does not look inside."""
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_starts,
        key_starts,
        longest_query,
        longest_key,
        0.0,  # dropout
        False,  # causal
        False,  # debugging mask
        scale=scaling,
        window_size_left=-1,
        window_size_right=-1,
        seqused_k=seen,
    )[0]
    return output


@_flash.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)
