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

from aligngym.alignment.packing import Packing
from aligngym.alignment.row_attention import LARGEST_HEAD, attend_rows, has_row_kernel, masked_rows

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
        self._columns = torch.arange(self.capacity, device=device)
        self._reach = 0
        self._has_kernel = has_row_kernel(device.type)

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

    def put(self, module: nn.Module, key: Tensor, value: Tensor, completions: int) -> None:
        """Write what prompts begin with into the rows of their completions.

        Args:
            module: the attention layer.
            key: ``[N, P, key_heads, head_dim]`` of the first P tokens of N prompts.
            value: likewise.
            completions: rows of each prompt.
        """
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
        self._mask = self._columns[: self._reach] < self._seen[:, None]
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
        rows = query.shape[2]
        places = (self._rows[:rows], self._places)
        keys.index_put_(places, key[0].transpose(0, 1).to(keys.dtype))
        values.index_put_(places, value[0].transpose(0, 1).to(values.dtype))
        query = query[0].transpose(0, 1)
        if self._has_kernel and query.shape[-1] <= LARGEST_HEAD:
            return attend_rows(query, keys, values, self._seen, scaling)[None]
        used = self._mask.shape[1]
        return masked_rows(query, keys[:rows, :used], values[:rows, :used], self._mask, scaling)[None]


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
        self._cache.put(module, keys, values, self._completions)
        return self._packing.attend(module, query, key, value, scaling)
