"""A language model with a LoRA adapter as a policy: its actions are tokens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aligngym.alignment.adapters import AdapterLayer, adapter_layers, merged_adapter, using_adapter, without_casts
from aligngym.alignment.captured_decoding import CachedWriter
from aligngym.alignment.compilation import Compilation, constant_numbers
from aligngym.alignment.fused_lora import fuse_lora
from aligngym.alignment.generation import Decoding, complete
from aligngym.alignment.joint_products import lay_together
from aligngym.alignment.model_evaluator import ModelEvaluator
from aligngym.alignment.models import load_model
from aligngym.core.policy import Evaluation, Policy
from aligngym.core.randomness import evaluating, seeded
from aligngym.core.trajectories import Trajectories

REFERENCE_ADAPTER = "reference"
CRITIC_ADAPTER = "critic"


def default_lora(r: int = 16, dropout: float = 0.0) -> LoraConfig:
    """Return an adapter of rank ``r`` on every linear layer but the head, scaled by two.

    All layers matter more than the rank: J. Schulman et al., *LoRA without regret*, 2025.
    """
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules="all-linear")


class LanguagePolicy(Policy):
    """π(completion | prompt) of a causal language model whose adapter is trained and whose weights are not.

    The reference is the same model with the adapter off; or, for an adapter that came trained, a frozen copy of it.
    A batch is :class:`Trajectories` with the prompts' tokens as observations and the completions' as actions.

    A critic is another adapter on the same weights, and a linear head on its last hidden states; so actor, critic and
    reference (and a reward model: :meth:`RewardModel.sharing`) need the memory of one model.

    Args:
        model: a transformers causal language model wrapped by peft, with its trainable adapter active.
        tokenizer: its tokenizer.
        critic: whether to add a critic, for PPO. Its values are 0 before training.
        temperature: of the policy itself, π = softmax(logits / temperature): it acts with it, and its log-probabilities
            are judged and trained with it, so the two cannot differ.
        compile: whether torch compiles the model's layers, which takes twenty seconds and makes everything after that
            faster; ``None``: on a GPU, once a run turns out to be long enough to earn it back.
        packed: whether log-probabilities may take the packed path. It is compared with the padded one on a few tokens
            here, and not used for a model where they differ.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        critic: bool = False,
        temperature: float = 1.0,
        compile: bool | None = None,
        packed: bool = True,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is positive, not {temperature}: for the most probable token, be greedy")
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.value_head: nn.Linear | None = None
        if critic:
            self._add_critic()
        fuse_lora(model)
        lay_together(model)
        self._layers: tuple[tuple[str, ...], list[AdapterLayer]] | None = None
        self._evaluator = ModelEvaluator(self.causal_model)
        self._writer = CachedWriter(self.causal_model)
        if packed:
            with evaluating(self), self._computing():
                self._evaluator.try_packing()
        if compile:
            self.compile_layers()
        elif compile is None:
            self.callbacks = [Compilation(self)]

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        lora: LoraConfig | None = None,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        seed: int = 0,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Load a model and put an adapter on it: a new one, or one that was trained before.

        Args:
            name: a Hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m``.
            lora: the new adapter's shape; :func:`default_lora` by default.
            adapter: a folder in peft's format to continue from, instead of a new adapter.
            dtype: of the frozen weights; the adapter's own are float32. ``"auto"``: what the device is fast at.
            seed: of the new adapter's weights.
            trust_remote_code: whether to run code that comes with the model.
            options: of the class: ``critic``, ``temperature``, ``compile``, ``packed``.

        Raises:
            FileNotFoundError: if a path does not exist.
            ValueError: if the model cannot be loaded, or both ``lora`` and ``adapter`` are given.
        """
        if lora is not None and adapter is not None:
            raise ValueError("give lora for a new adapter or adapter to continue one, not both")
        model, tokenizer = load_model(name, dtype, trust_remote_code)
        if adapter is None:
            with seeded(seed):
                wrapped: PeftModel = get_peft_model(model, lora or default_lora())
        else:
            if not (Path(adapter) / "adapter_config.json").is_file():
                raise FileNotFoundError(f"{adapter}: no adapter_config.json there, so no adapter in peft's format")
            wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=True)
            wrapped.load_adapter(adapter, REFERENCE_ADAPTER, is_trainable=False)
        # Adapters remember what they belong to; a cache folder would mean nothing elsewhere.
        wrapped.peft_config["default"].base_model_name_or_path = str(name)
        with seeded(seed, 1):
            return cls(wrapped, tokenizer, **options)

    def _add_critic(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.add_adapter(CRITIC_ADAPTER, copy.deepcopy(self.model.peft_config["default"]))
        for parameter in trained:
            parameter.requires_grad_(True)
        for name, parameter in self.model.named_parameters():
            if f".{CRITIC_ADAPTER}." in name:
                parameter.requires_grad_(True)
        size = self.model.get_input_embeddings().weight.shape[1]
        self.value_head = nn.Linear(size, 1, device=self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def has_critic(self) -> bool:
        return self.value_head is not None

    @property
    def causal_model(self) -> PreTrainedModel:
        """The transformers model inside, with the adapter in its layers."""
        return cast(PreTrainedModel, self.model.get_base_model())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights, in which the model computes."""
        return cast(torch.dtype, self.causal_model.dtype)

    @property
    def context_length(self) -> int | None:
        """How many tokens the model reads at most; ``None`` if it has no limit."""
        return getattr(self.causal_model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a completion, by the model's generation settings and the tokenizer."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({end for end in [*ends, self.tokenizer.eos_token_id] if end is not None})

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        # What moves a model moves every weight to a place of its own.
        super()._apply(*arguments, **options)
        lay_together(self.model)
        return self

    @property
    def packed(self) -> bool:
        """Whether rows are packed."""
        return self._evaluator.packed

    @packed.setter
    def packed(self, packed: bool) -> None:
        self._evaluator.packed = packed

    @property
    def compiled(self) -> bool:
        """Whether torch compiles the model's layers."""
        return self._evaluator.compiled

    def compile_layers(self) -> None:
        """Let torch compile the model's layers: the first steps after that take longer, all others less time."""
        self._evaluator.compile_layers()

    @property
    def steps_at_once(self) -> int | None:
        """How many tokens are best computed at once, in the memory that there is."""
        with self._computing():
            return self._evaluator.steps_at_once

    def forward(self, trajectories: Trajectories, *, entropy: bool = False) -> Evaluation:
        with self._computing():
            log_probs, entropies = self._evaluator.log_probs(trajectories, self.temperature, entropy)
            if self.value_head is None:
                return Evaluation(log_probs, entropies, None)
            with self.using_adapter(CRITIC_ADAPTER):
                return Evaluation(log_probs, entropies, self._evaluator.values(trajectories, self.value_head))

    @torch.no_grad()
    def reference_log_probs(self, trajectories: Trajectories) -> Tensor:
        with self._as_reference(), self._computing():
            return self._evaluator.log_probs(trajectories, self.temperature)[0]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor],
        *,
        completions: int = 1,
        seed: int = 0,
        reference: bool = False,
        rows_at_once: int | None = None,
        **decoding: Any,
    ) -> Trajectories:
        """Let the model complete prompts, until its end-of-sequence token or ``max_new_tokens``.

        Args:
            prompts: N prompts, token ids of any lengths.
            completions: k, of every prompt; its own tokens are computed once for all of them.
            seed: of the samples.
            reference: whether the reference writes, instead of the policy.
            rows_at_once: completions written together, which bounds the memory for their caches; the samples do not
                depend on it.
            decoding: of :class:`~aligngym.alignment.generation.Decoding`: ``max_new_tokens``, ``greedy``, …

        Returns:
            N·k rows as :func:`~aligngym.alignment.generation.complete` describes them.
        """
        how = Decoding(**decoding)
        generator = torch.Generator().manual_seed(seed)
        # (0, 1]: at 0 even a token without probability could be drawn.
        uniforms = 1 - torch.rand(len(prompts) * completions, how.max_new_tokens, generator=generator)
        at_once = max(1, (rows_at_once or len(uniforms)) // completions)
        as_reference = self._as_reference() if reference else contextlib.nullcontext()
        with self._without_randomness(), self._computing(), as_reference, self.merged_adapter():
            parts = [
                complete(
                    self.causal_model,
                    self.tokenizer,
                    prompts[start : start + at_once],
                    completions,
                    how,
                    end_tokens=self.end_tokens,
                    uniforms=uniforms[start * completions : (start + at_once) * completions],
                    temperature=self.temperature,
                    writer=self._writer if self.packed else None,
                )
                for start in range(0, max(1, len(prompts)), at_once)
            ]
        rows = Trajectories.concatenate(parts)
        rows.group = torch.arange(len(prompts), device=self.device).repeat_interleave(completions)
        return rows

    def act(
        self, observations: Sequence[Tensor], *, greedy: bool = False, generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Complete each prompt; return the completions' tokens and ``[B, T]`` their log-probabilities."""
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        rows = self.generate(observations, greedy=greedy, seed=seed)
        with torch.no_grad():
            log_probs = self(rows).log_probs
        return [actions[mask] for actions, mask in zip(rows.actions, rows.mask, strict=True)], log_probs

    def save(self, path: str | Path) -> None:
        """Write the adapter in peft's format, and the tokenizer with its chat template, into the folder ``path``."""
        # The embeddings are the model's own: peft need not ask the Hub whether they were resized.
        self.model.save_pretrained(str(path), selected_adapters=["default"], save_embedding_layers=False)
        self.tokenizer.save_pretrained(str(path))

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Multiply in the dtype of the frozen weights, although the adapter's own weights are float32."""
        lower = self.dtype in (torch.bfloat16, torch.float16)
        # What autocast remembered of one pass or step, a captured one would read for ever.
        with (
            torch.autocast(self.device.type, dtype=self.dtype, enabled=lower, cache_enabled=False),
            without_casts(self._adapter_layers, lower),
            constant_numbers(self.compiled),
        ):
            yield

    @property
    def _adapter_layers(self) -> list[AdapterLayer]:
        """The layers with adapters, which are looked for once for as many adapters as there are."""
        names = tuple(self.model.peft_config)
        if self._layers is None or self._layers[0] != names:
            self._layers = names, adapter_layers(self.model)
        return self._layers[1]

    @contextlib.contextmanager
    def _without_randomness(self) -> Iterator[None]:
        # Going through all modules takes long, and makes a difference to those that draw random numbers; in a model
        # that no packed path runs, perhaps to others.
        matters = self.training and (self._evaluator.passes.random or not self.packed)
        with evaluating(self) if matters else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in self.model.peft_config else None
        with self._without_randomness(), self.using_adapter(name):
            yield

    def using_adapter(self, name: str | None) -> AbstractContextManager[None]:
        """Return a context in which another of the model's adapters is at work, or none.

        Which parameters require gradients does not change.
        """
        return using_adapter(self._adapter_layers, name)

    def merged_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the adapter is added to the weights, where it can be."""
        return merged_adapter(self.causal_model, self._adapter_layers)
