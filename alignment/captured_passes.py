"""A model's passes over packed rows as CUDA graphs.

A step launches thousands of kernels, which takes the processor longer than the GPU needs to run them. A CUDA graph is
launched as one. Its tensors have fixed shapes and places, so rows are filled up to one of a few lengths with tokens
that see only each other, and whose gradient is zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from aligngym.alignment.activation_memory import ActivationMemory
from aligngym.alignment.adapters import adapters_at_work
from aligngym.alignment.fused_lora import FusedLinear
from aligngym.alignment.log_probs import hidden_states, predicting_states
from aligngym.alignment.models import draws_random_numbers
from aligngym.alignment.packing import Packing, runs_varlen

#: A shape is captured when it comes up for this time: capturing takes about as long as two passes. Where layers are
#: compiled the run is known to be long.
CAPTURED_AT, COMPILED_AT = 2, 1

#: Memory is taken for rows so many times as long as the first, because what shorter rows leave behind is too small for
#: longer ones.
ROOM = 1.25

#: How many keys there may be for each token, most of which are seen by several sequences.
KEYS_PER_TOKEN = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Shape(NamedTuple):
    """What the passes over rows of about the same length share.

    Attributes:
        tokens: of the row; at least one more than any packing that is filled up to it.
        keys: that the row's sequences see together.
        sequences: in the row.
        longest: the most keys that a sequence sees.
    """

    tokens: int
    keys: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, packing: Packing) -> Shape | None:
        """Return the smallest shape for a packing, in which at most a sixteenth of the row is filling."""
        tokens, keys = packing.input_ids.shape[1], packing.keys.shape[0]
        step = max(128, 2 ** (tokens.bit_length() - 5))
        filled = (tokens // step + 1) * step
        # The filling's tokens are keys as well.
        enough = [math.ceil(filled * ratio) for ratio in KEYS_PER_TOKEN if filled * ratio >= keys + filled - tokens]
        if not enough:
            return None
        longest = max(packing.longest, filled - tokens)
        sequences = packing.query_starts.shape[0]
        return cls(filled, enough[0], 1 << max(6, (sequences - 1).bit_length()), -(-longest // 1024) * 1024)

    def longer(self, tokens: int) -> Shape:
        """Return a shape of so many tokens that holds the same rows."""
        return Shape(tokens, self.keys + tokens - self.tokens, self.sequences, max(self.longest, tokens))


def blank(shape: Shape, packing: Packing) -> Packing:
    """Return a packing of some shape, to be filled with others, on the same device as one of them."""
    device = packing.input_ids.device
    return dataclasses.replace(
        packing,
        input_ids=torch.zeros(1, shape.tokens, dtype=torch.long, device=device),
        position_ids=torch.zeros(1, shape.tokens, dtype=torch.long, device=device),
        keys=torch.zeros(shape.keys, dtype=torch.long, device=device),
        query_starts=torch.zeros(shape.sequences + 1, dtype=torch.int32, device=device),
        key_starts=torch.zeros(shape.sequences + 1, dtype=torch.int32, device=device),
        longest=shape.longest,
    )


def fill(place: Packing, packing: Packing) -> None:
    """Copy a packing into a larger one. The rest of the row is one more sequence, and all others are empty."""
    tokens, keys, end = packing.input_ids.shape[1], packing.keys.shape[0], place.input_ids.shape[1]
    place.input_ids[:, :tokens] = packing.input_ids
    place.position_ids[:, :tokens] = packing.position_ids
    place.position_ids[:, tokens:] = 0
    for name, rest in (("keys", end), ("query_starts", end), ("key_starts", keys + end - tokens)):
        given, whole = getattr(packing, name), getattr(place, name)
        whole[: given.shape[0]] = given
        whole[given.shape[0] :] = rest
    # Those tokens see each other; the keys after them are nobody's, and past the row's end.
    place.keys[keys : keys + end - tokens] = torch.arange(tokens, end, device=place.keys.device)


class CapturedPasses:
    """Computes hidden states of packed rows, by graphs for shapes that come up often.

    Args:
        model: a transformers causal language model that runs
            :func:`~aligngym.alignment.packing.shared_prompt_attention`.

    Attributes:
        memory: what activations may take.
        random: whether the model draws random numbers while it is trained.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.memory = model, ActivationMemory(model)
        self._layer = next((layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)), None)
        self.random = any(draws_random_numbers(module) for module in model.modules())
        self.reset()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has other weights, and captures its own.
        return type(self), (self.model,)

    def reset(self, compiled: bool = False) -> None:
        """Forget all graphs, because the model's code has changed: perhaps its layers are ``compiled`` now."""
        self._compiled = compiled
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._seen: Counter[Any] = Counter()
        self._passes: dict[Any, _Pass | None] = {}
        self._pools: dict[Any, _Pool] = {}
        self._too_large: set[Any] = set()
        self._places: tuple[int, ...] = ()

    def __call__(self, packing: Packing) -> Tensor:
        """Return ``[M, H]``, the last hidden states at the places that predict the policy's tokens."""
        found = self._pass_for(packing)
        if found is None:
            with self.memory.recomputing(packing.input_ids.shape[1]):
                return predicting_states(self.model, packing)
        if not torch.is_grad_enabled():
            return found.forward(packing)
        states: Tensor = _Replayed.apply(found, packing, *found.parameters)
        return states

    def _pass_for(self, packing: Packing) -> _Pass | None:
        """Return the captured pass, which is made if the shape comes up often enough."""
        if not runs_varlen(packing.input_ids.device, self.model.dtype) or (self.model.training and self.random):
            return None
        shape = Shape.of(packing)
        if shape is None or shape.tokens > self.memory.tokens:
            return None
        with_gradient = torch.is_grad_enabled()
        adapters = self._layer and adapters_at_work(self._layer)
        # Graphs of weights that have moved read where these were.
        places = tuple(weight.data_ptr() for weight in (next(self.model.parameters()), *self._parameters[:1]))
        if places != self._places:
            self.reset(self._compiled)
            self._places = places
        at_work = (with_gradient, adapters)
        pool = self._pools.get(at_work)
        if at_work in self._too_large or (pool and pool.in_use):
            return None
        key = (shape, at_work)
        self._seen[key] += 1
        if key not in self._passes and self._seen[key] >= (COMPILED_AT if self._compiled else CAPTURED_AT):
            self._passes[key] = self._capture(packing, shape, at_work)
        return self._passes.get(key)

    def _capture(self, packing: Packing, shape: Shape, at_work: Any) -> _Pass | None:
        """Return a new pass, or ``None`` where it cannot be captured."""
        with_gradient, *_ = at_work
        parameters = self._parameters if with_gradient else []
        try:
            pool = self._pools.get(at_work)
            if pool is None or shape.tokens > pool.tokens:
                self._forget(at_work)
                longest = int(max(shape.tokens, min(ROOM * shape.tokens, self.memory.tokens))) // 128 * 128
                pool = self._pools[at_work] = _Pool(longest)
                _Pass(self.model, packing, shape.longer(longest), parameters, pool)
            return _Pass(self.model, packing, shape, parameters, pool)
        except RuntimeError as error:  # Too little memory, or a model that waits for its own results.
            warnings.warn(f"a pass cannot be captured, so it takes longer: {error}", stacklevel=2)
            if isinstance(error, torch.OutOfMemoryError):
                self._forget(at_work)
                self._too_large.add(at_work)
            return None

    def _forget(self, at_work: Any) -> None:
        """Give the memory of some passes back."""
        self._pools.pop(at_work, None)
        self._passes = {key: found for key, found in self._passes.items() if key[1] != at_work}
        torch.cuda.empty_cache()


class _Pool:
    """The memory that the graphs of passes share which never run at the same time.

    A pass with gradients keeps its activations there until its backward pass has run, or nobody can ask for it.

    Args:
        tokens: of the longest row that there is room for, when a pass over it has been captured.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        # Memory belongs to the stream that it was first used on.
        self.memory, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()
        self.handle: Any = self.memory.id
        self._owner: weakref.ref[_Owner] | None = None

    @property
    def in_use(self) -> bool:
        """Whether somebody may still ask for a backward pass whose activations are there."""
        return self._owner is not None and self._owner() is not None

    def claim(self) -> _Owner:
        """Return what the memory is in use for as long as somebody holds it."""
        owner = _Owner()
        self._owner = weakref.ref(owner)
        return owner


class _Owner:
    """Whoever may still ask for a backward pass."""


class _Pass:
    """One shape's pass.

    Args:
        model: as above.
        packing: one of this shape, to run through before capturing.
        shape: of the row.
        parameters: whose gradients are wanted; none: a forward pass only.
        pool: of the graphs' memory.
    """

    def __init__(
        self, model: PreTrainedModel, packing: Packing, shape: Shape, parameters: list[nn.Parameter], pool: _Pool
    ) -> None:
        self._model, self.pool = model, pool
        self._packing = blank(shape, packing)
        fill(self._packing, packing)
        self._copies: list[tuple[Tensor, Tensor]] = []
        with self._aliases(parameters) as aliases:
            self._capture(parameters, aliases)

    def _capture(self, parameters: list[nn.Parameter], aliases: list[nn.Parameter]) -> None:
        handle, stream = self.pool.handle, self.pool.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self.pool.memory):
            # What is compiled or planned for a new length must be so before the capture.
            states = self._run()
            self._gradient = torch.zeros_like(states)
            found = torch.autograd.grad(states, aliases, self._gradient, allow_unused=True) if aliases else ()
        torch.cuda.current_stream().wait_stream(stream)
        used = [number for number, gradient in enumerate(found) if gradient is not None]
        self.parameters = [parameters[number] for number in used]
        del states, found
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=handle, stream=stream):
            states = self._run()
        if aliases:
            with torch.cuda.graph(self._backward, pool=handle, stream=stream):
                gradients = torch.autograd.grad(states, [aliases[number] for number in used], self._gradient)
                self._gradients = torch.cat([gradient.flatten() for gradient in gradients]).float()
        self._states = states.detach()

    @contextlib.contextmanager
    def _aliases(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Put others in the place of some parameters for a block, with the same storage.

        Autograd's nodes for the parameters themselves may belong to the stream that training runs on, which a capture
        must not touch. What LoRA layers would cast to the dtype of their weights in every pass is copied at once.
        """
        dtype = self._model.dtype
        lora = [layer for layer in self._model.modules() if isinstance(layer, FusedLinear)]
        lower = {id(own) for layer in lora for own in layer.parameters() if own.dtype != dtype}
        aliases: dict[int, nn.Parameter] = {}
        for parameter in parameters:
            own = parameter.detach()
            aliases[id(parameter)] = nn.Parameter(own.to(dtype) if id(parameter) in lower else own)
            self._copies += [(aliases[id(parameter)].detach(), own)] if id(parameter) in lower else []
        places: list[tuple[nn.Module, str, Any]] = [
            (module, name, parameter)
            for module in self._model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in aliases
        ]
        for module, name, parameter in places:
            module._parameters[name] = aliases[id(parameter)]
        try:
            yield list(aliases.values())
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    def _run(self) -> Tensor:
        return hidden_states(self._model, self._packing.input_ids, self._packing.position_ids, self._packing)

    def forward(self, packing: Packing) -> Tensor:
        """Return the hidden states at the packing's predictors."""
        fill(self._packing, packing)
        if self._copies:
            copies, originals = zip(*self._copies, strict=True)
            torch._foreach_copy_(copies, originals)
        self._forward.replay()
        return self._states[packing.predictors]

    def backward(self, packing: Packing, gradient: Tensor) -> list[Tensor]:
        """Return the parameters' gradients, given that of what :meth:`forward` returned last."""
        self._gradient.zero_().index_add_(0, packing.predictors, gradient.to(self._gradient.dtype))
        self._backward.replay()
        # The graph will overwrite its own.
        pieces = self._gradients.clone().split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]


class _Replayed(torch.autograd.Function):
    """A captured pass as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, captured: _Pass, packing: Packing, *_: Tensor) -> Tensor:
        ctx.captured, ctx.packing, ctx.owner = captured, packing, captured.pool.claim()
        return captured.forward(packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.owner is None:
            raise RuntimeError("the gradients of a captured pass can be computed once only")
        ctx.owner = None
        return None, None, *ctx.captured.backward(ctx.packing, gradients[0])
