"""Writing with a cache made once; on a GPU each step is one CUDA graph, from the last tokens to the next ones drawn.

A small step is hundreds of kernels of a few microseconds, which a processor cannot order as fast as they run. A graph
is ordered at once. It reads and writes the same memory every time, so the cache, the completions and the weights stay
where they are, from one rollout to the next.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from aligngym.alignment.adapters import adapters_at_work
from aligngym.alignment.compilation import compiled
from aligngym.alignment.completions import Completions
from aligngym.alignment.generation import Decoding, Request
from aligngym.alignment.joint_products import computing_jointly, joint_products
from aligngym.alignment.log_probs import hidden_states
from aligngym.alignment.packing import Packing
from aligngym.alignment.row_cache import Prefill, RowCache

#: Steps that run as they are before one is captured: compilers and libraries do more the first time.
WARM_UP = 2

#: There are graphs for all slots, half of them, a quarter, …, down to about so many: fewer are no faster.
SMALLEST_GRAPH = 8


class CachedWriter:
    """The model's state while it writes, in memory that is kept for the next batch.

    Prompts are computed packed, each once and what all begin with once, and copied into a
    :class:`~aligngym.alignment.row_cache.RowCache`. On a CUDA device a step is captured once for each number of slots.
    Graphs are used again as long as the weights are in the same memory, whatever they are; where there is no room for
    more rows or longer ones, everything is made anew.

    Args:
        model: a causal language model that runs :func:`~aligngym.alignment.packing.shared_prompt_attention`, and whose
            logits are its head's.

    Attributes:
        captures: whether steps are captured; no longer, once a model could not be.
        graphs: those captured so far, by what they do and for how many slots.
    """

    completions: Completions
    cache: RowCache

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.captures = True
        # Going through a large model takes longer than a token.
        self._modules = list(model.modules())
        self._layer = next((layer for layer in self._modules if isinstance(layer, BaseTunerLayer)), None)
        self.graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._all_ends: dict[tuple[int, ...], Tensor] = {}
        self._weights: tuple[Any, ...] | None = None
        self._warm: Counter[tuple[Any, ...]] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has other weights, and makes its own.
        return type(self), (self.model,)

    def begin(self, request: Request) -> int:
        """See :meth:`Writer.begin <aligngym.alignment.generation.Writer.begin>`."""
        packing = Packing.of_prompts(request.prompts, self.model.device)
        count, length = request.uniforms.shape
        self._make_room(count, length, packing.longest + length)
        self._decoding = request.decoding
        # Graphs read these too.
        ends = torch.tensor(list(request.end_tokens), dtype=torch.long, device=self.model.device)
        self._ends = self._all_ends.setdefault(tuple(request.end_tokens), ends)
        self._compiled = any(module._compiled_call_impl is not None for module in self._modules)
        self._program = self._what_a_step_does(request.end_tokens)
        self.completions.begin(request.uniforms, request.temperature)
        # A prompt is computed once: that pays for no compilation.
        eager = torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext()
        with eager:
            prefill = Prefill(packing, self.cache, request.copies, length)
            hidden = hidden_states(self.model, packing.input_ids, packing.position_ids, prefill)
        self._add(hidden[packing.predictors].repeat_interleave(request.copies, dim=0))
        return self.slots_for(count, count)

    def _make_room(self, rows: int, length: int, capacity: int) -> None:
        device = self.model.device
        read = (x for module in self._modules for x in (*module._parameters.values(), *module._buffers.values()))
        weights = (device, *((x.data_ptr(), x.dtype) for x in read if x is not None))
        if weights == self._weights:
            had, had_length = self.completions.actions.shape
            if rows <= had and length <= had_length and capacity <= self.cache.capacity:
                return
            rows, length, capacity = max(rows, had), max(length, had_length), max(capacity, self.cache.capacity)
            del self.completions, self.cache
        for kept in (self.graphs, self._warm, self._all_ends):
            kept.clear()
        self._weights, self._joint = weights, joint_products(self.model)
        self.completions, self.cache = Completions(rows, length, device), RowCache(rows, capacity, device)
        if device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def _what_a_step_does(self, end_tokens: Sequence[int]) -> tuple[Any, ...]:
        """Return all that a graph depends on besides numbers in memory."""
        adapters = self._layer and adapters_at_work(self._layer)
        drawing = (self._decoding.greedy, self._decoding.top_k, self._decoding.top_p, *end_tokens)
        return adapters, drawing, self._compiled, torch.is_autocast_enabled(self.model.device.type)

    def _add(self, hidden: Tensor) -> None:
        logits = self.model.get_output_embeddings()(hidden)
        draw = compiled(_draw) if self._compiled else _draw
        draw(self.completions, self._decoding, logits, self._ends)

    def _step(self, slots: int) -> None:
        """Compute the last tokens of the first ``slots``, and draw and write the next ones."""
        with self.cache.attached(), computing_jointly(self._joint):
            places = self.cache.begin_step(slots)
            tokens = self.completions.tokens[:slots]
            hidden = hidden_states(self.model, tokens[None], places[None], self.cache)
            self.cache.end_step(slots)
            self._add(hidden)

    @property
    def _captures_here(self) -> bool:
        return self.captures and self.model.device.type == "cuda"

    def write(self, slots: int) -> None:
        """Write the next token in the first ``slots``, by a graph where there is one."""
        if not self._captures_here:
            self._step(slots)
            return
        program = (*self._program, slots)
        if program not in self.graphs and self._warm[program] >= WARM_UP:
            self._capture(program, slots)
        if program in self.graphs:
            self.graphs[program].replay()
            return
        self._warm[program] += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(slots)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, program: tuple[Any, ...], slots: int) -> None:
        """Capture a step, which does not run meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on with their own work.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._step(slots)
        except RuntimeError as error:
            self.captures = False
            warnings.warn(f"the model's step cannot be captured, so writing takes longer: {error}", stacklevel=2)
        else:
            self.graphs[program] = graph

    def slots_for(self, running: int, slots: int) -> int:
        """Return as many as are running; of captured steps, the next larger number that has a graph."""
        if not self._captures_here:
            return running
        size = len(self.completions.rows)
        while size > SMALLEST_GRAPH and -(-size // 2) >= running:
            size = -(-size // 2)
        return size

    def shrink(self, slots: int, sources: Tensor, destinations: Tensor) -> None:
        """Move what is in some slots to others; what is behind stays where it is and is not computed."""
        if len(sources):
            self.completions.move(sources, destinations)
            self.cache.move(sources, destinations)


def _draw(completions: Completions, decoding: Decoding, logits: Tensor, ends: Tensor) -> None:
    completions.add(*decoding.choose(completions, logits), ends)
