"""A language model with a LoRA adapter as a policy: its actions are tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from aligngym.alignment.data import pad_tokens
from aligngym.alignment.fused_lora import fuse_lora
from aligngym.alignment.log_probs import packed_log_probs, padded_log_probs
from aligngym.alignment.models import load_model, use_shared_prompt_attention
from aligngym.core.policy import Evaluation, Policy
from aligngym.core.randomness import seeded
from aligngym.core.trajectories import PADDING, Trajectories

REFERENCE_ADAPTER = "reference"


def default_lora(r: int = 16, dropout: float = 0.0) -> LoraConfig:
    """Return an adapter of rank ``r`` on every linear layer but the head, scaled by two.

    All layers matter more than the rank: J. Schulman et al., *LoRA without regret*, 2025.
    """
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules="all-linear")


class LanguagePolicy(Policy):
    """π(completion | prompt) of a causal language model whose adapter is trained and whose weights are not.

    The reference is the same model with the adapter off; or, for an adapter that came trained, a frozen copy of it.
    A batch is :class:`Trajectories` with the prompts' tokens as observations and the completions' as actions.

    Args:
        model: a transformers causal language model wrapped by peft, with its trainable adapter active.
        tokenizer: its tokenizer.
        packed: whether log-probabilities may take the packed path. It is compared with the padded one on a few tokens
            here, and not used for a model where they differ.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, packed: bool = True) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        fuse_lora(model)
        self.packed = packed and self._packing_agrees()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        lora: LoraConfig | None = None,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        seed: int = 0,
        packed: bool = True,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a model and put an adapter on it: a new one, or one that was trained before.

        Args:
            name: a Hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m``.
            lora: the new adapter's shape; :func:`default_lora` by default.
            adapter: a folder in peft's format to continue from, instead of a new adapter.
            dtype: of the frozen weights; the adapter's own are float32. ``"auto"``: what the device is fast at.
            seed: of the new adapter's weights.
            packed: see the class.
            trust_remote_code: whether to run code that comes with the model.

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
        return cls(wrapped, tokenizer, packed=packed)

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
    def end_tokens(self) -> list[int]:
        """The tokens that end a completion, by the model's generation settings and the tokenizer."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({end for end in [*ends, self.tokenizer.eos_token_id] if end is not None})

    def forward(self, trajectories: Trajectories, *, entropy: bool = False) -> Evaluation:
        causal = self.causal_model
        with self._computing():
            # Entropies need all logits anyway, and a trained head needs gradients that the packed path leaves out.
            if self.packed and not entropy and not causal.get_output_embeddings().weight.requires_grad:
                try:
                    return Evaluation(packed_log_probs(causal, trajectories))
                except NotImplementedError as error:
                    warnings.warn(f"{error}; using padded rows for such batches, which is slower", stacklevel=2)
            return Evaluation(*padded_log_probs(causal, trajectories, entropy=entropy))

    @torch.no_grad()
    def reference_log_probs(self, trajectories: Trajectories) -> Tensor:
        with self._as_reference():
            return self(trajectories).log_probs

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor],
        *,
        max_new_tokens: int = 128,
        greedy: bool = False,
        seed: int = 0,
        reference: bool = False,
    ) -> Trajectories:
        """Let the model complete prompts, until its end-of-sequence token or ``max_new_tokens``.

        Args:
            prompts: B prompts, token ids of any lengths.
            max_new_tokens: T, at most so many tokens a completion.
            greedy: the most probable token each time, instead of a sample at temperature 1.
            seed: of the samples.
            reference: whether the reference writes, instead of the policy.

        Returns:
            B rows; ``mask`` covers the end-of-sequence token, ``terminated`` marks it, and ``truncated`` marks the
            last token of a completion that did not reach it.
        """
        ends = self.end_tokens
        observations = pad_tokens(list(prompts), side="left").to(self.device)
        was_training = self.training
        self.eval()
        with (
            self._computing(),
            self._as_reference() if reference else contextlib.nullcontext(),
            self._without_generation_settings() as causal,
            seeded(seed),
        ):
            output = causal.generate(
                input_ids=observations.clamp(min=0),
                attention_mask=(observations != PADDING).long(),
                max_new_tokens=max_new_tokens,
                do_sample=not greedy,
                # transformers' own default is 50.
                **({} if greedy else {"top_k": 0}),
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
        self.train(was_training)
        actions = output[:, observations.shape[1] :]
        is_end = torch.isin(actions, torch.tensor(ends, device=self.device))
        mask = (is_end.cumsum(1) - is_end.long()) == 0
        last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        return Trajectories(
            observations, actions.where(mask, PADDING), mask, terminated=last & is_end, truncated=last & ~is_end
        )

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
        with (
            torch.autocast(self.device.type, dtype=self.dtype, enabled=lower),
            disable_input_dtype_casting(self.model, active=lower),
        ):
            yield

    @contextlib.contextmanager
    def _without_generation_settings(self) -> Iterator[Any]:
        """Set the model's own temperature, penalties, … aside, with which it writes with other probabilities than π."""
        causal = self.causal_model
        own, causal.generation_config = causal.generation_config, GenerationConfig()
        try:
            yield causal
        finally:
            causal.generation_config = own

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            if REFERENCE_ADAPTER in self.model.peft_config:
                self.model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
                yield
            else:
                with self.model.disable_adapter():
                    yield
        finally:
            if REFERENCE_ADAPTER in self.model.peft_config:
                self.model.set_adapter("default")
            self.train(was_training)

    @torch.no_grad()
    def _packing_agrees(self) -> bool:
        """Compare both paths on a few tokens: a model may mix tokens or shape logits in ways that packing misses."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        tokens = torch.arange(12, device=self.device) * 7 % vocabulary
        actions = torch.stack([tokens[:5], tokens[5:10]])
        probe = Trajectories(tokens[None, 5:].repeat(2, 1), actions, actions >= 0, group=torch.zeros(2))
        was_training = self.training
        self.eval()
        causal = self.causal_model
        own_attention = causal.config._attn_implementation
        with self._computing():
            padded, _ = padded_log_probs(causal, probe)
            try:
                agrees = use_shared_prompt_attention(causal) and torch.allclose(
                    packed_log_probs(causal, probe), padded, atol=1e-4 if self.dtype == torch.float32 else 0.2
                )
            except Exception:  # A model that knows nothing of packing may fail at it in any way.
                agrees = False
        self.train(was_training)
        if not agrees:
            # Some models have no other attention that is right: Gemma 2 caps its scores, which SDPA cannot.
            causal.set_attn_implementation(own_attention)
            warnings.warn(
                f"{type(causal).__name__} cannot share prompts between completions; using padded rows, which is slower",
                stacklevel=3,
            )
        return agrees
