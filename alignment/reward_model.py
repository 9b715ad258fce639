"""Reward models r(prompt, completion): a language model with a linear head on its last token.

P. Christiano et al., *Deep reinforcement learning from human preferences*, 2017; N. Stiennon et al., *Learning to
summarize from human feedback*, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.models import resolve_dtype
from aligngym.alignment.scoring_head import (
    last_token_scores,
    reward_adapter_config,
    reward_adapter_on,
    score_last_real_token,
)
from aligngym.core.randomness import evaluating

#: The name of a reward model's adapter on a policy.
REWARD_ADAPTER = "reward"

Text = str | list[dict[str, Any]]


class RewardModel:
    """r(x, y), one number for a prompt and a completion; called like any reward function of trl's signature.

    The score is the head's output at the last real token, found by the attention mask: which side is padded, with what,
    and what else is in the batch make no difference. Where the padding token is the end-of-sequence token, transformers
    and trl themselves look for the last token that is *another* one, so that there the end is never scored.

    Args:
        classifier: ``classifier(input_ids, attention_mask)`` returns ``[B, 1]`` scores, under ``logits``.
        tokenizer: its tokenizer, with a chat template if prompts are conversations.
        batch_size: sequences scored at once.
        label: what rewards are logged as.

    Attributes:
        __name__: the label; trl reads it.
    """

    def __init__(
        self, classifier: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16, label: str = "reward"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is a number of sequences, at least 1, not {batch_size}")
        self.classifier, self.tokenizer, self.batch_size = classifier, tokenizer, batch_size
        self.__name__ = label

    @classmethod
    def for_training(
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
        """Put an adapter and a head on a causal language model: new ones, or some that were trained before.

        Args:
            name: of the language model, see :func:`~aligngym.alignment.models.load_model`.
            lora: the new adapter's shape; :func:`default_lora` by default.
            adapter: a folder with a reward adapter to continue from, instead of a new one.
            dtype: of the frozen weights; adapter and head are float32.
            seed: of the new adapter and head.
            trust_remote_code: whether to run code that comes with the model.
            **options: see the class.

        Raises:
            FileNotFoundError: if a path does not exist.
            ValueError: if the model cannot be loaded, or both ``lora`` and ``adapter`` are given.
        """
        model, tokenizer = reward_adapter_on(name, lora, adapter, dtype, seed, trust_remote_code)
        return cls(model, tokenizer, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        base: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Load a reward model: an adapter that ``aligngym reward`` trained, or any classification model of one label.

        Args:
            name: a folder with an adapter, or a Hub id or folder of a sequence-classification checkpoint.
            base: the language model below an adapter; by default the one that it remembers.
            dtype: of the frozen weights.
            device: where to put it; the accelerator by default, if there is one.
            trust_remote_code: whether to run code that comes with the model.
            **options: see the class.

        Raises:
            FileNotFoundError: if a folder does not exist.
            ValueError: if it is no reward model.
        """
        options.setdefault("label", Path(name).name)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if (Path(name) / "adapter_config.json").is_file():
            base = base or str(reward_adapter_config(Path(name)).base_model_name_or_path)
            wrapped, tokenizer = reward_adapter_on(base, None, name, dtype, 0, trust_remote_code, trainable=False)
            return cls(wrapped.to(device).eval(), tokenizer, **options)
        if str(name).startswith((".", "/", "~")) and not Path(name).exists():
            raise FileNotFoundError(f"reward model {name}: no such folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name,
                dtype=resolve_dtype(dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"cannot load the reward model {str(name)!r}: {reason}") from error
        if loading["missing_keys"]:
            raise ValueError(
                f"{name} is no reward model: it has no {', '.join(sorted(loading['missing_keys']))}; train one on it "
                "with aligngym reward"
            )
        if model.config.num_labels != 1:
            raise ValueError(f"{name} has {model.config.num_labels} labels; a reward model has one, its score")
        score_last_real_token(model)
        return cls(model.to(device).eval(), tokenizer, **options)

    @classmethod
    def sharing(cls, policy: LanguagePolicy, folder: str | Path, **options: Any) -> Self:
        """Load a reward adapter onto the policy's own model, so that both share one base in memory.

        Its LoRA weights become the frozen adapter ``"reward"`` of ``policy.model``; its head stays here.

        Args:
            policy: whose model to use; neither what it says nor what of it is trained changes.
            folder: what ``aligngym reward`` wrote.
            **options: see the class.

        Raises:
            FileNotFoundError: if there is no adapter in the folder.
            ValueError: if it is no reward model, or one of another base model or another tokenizer.
        """
        folder = Path(folder)
        config = reward_adapter_config(folder)
        own = str(policy.model.peft_config["default"].base_model_name_or_path)
        if _resolved(own) != _resolved(str(config.base_model_name_or_path)):
            raise ValueError(
                f"the reward model {folder} belongs to {config.base_model_name_or_path}, and the policy to {own}: "
                "they can share a base only if it is the same; load it with RewardModel.from_pretrained"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        differing = set(tokenizer.get_vocab().items()) ^ set(policy.tokenizer.get_vocab().items())
        if differing:
            shown = ", ".join(repr(token) for token, _ in sorted(differing)[:3])
            raise ValueError(
                f"the tokenizer of the reward model {folder} is not that of the policy's {own}: they differ in "
                f"{len(differing)} entries ({shown}, …)"
            )
        if REWARD_ADAPTER in policy.model.peft_config:
            raise ValueError("this policy carries a reward model already")
        head = _add_frozen_adapter(policy.model, config, load_file(folder / "adapter_model.safetensors"))
        options.setdefault("label", folder.name)
        return cls(_SharedClassifier(policy, head), tokenizer, **options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.classifier.parameters()).device

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
        """Return the scores as a list; other columns are ignored."""
        return [float(score) for score in self.score(prompts, completions)]

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """Return ``[B]`` scores of completions.

        Args:
            prompts: B texts, or B lists of messages, written with the tokenizer's chat template.
            completions: B texts, or B lists of messages.

        Raises:
            ValueError: if there are not as many prompts as completions, or messages without a chat template.
            TypeError: if text and messages are mixed.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: as many of each are needed")
        return self.score_tokens([self.tokens(*row) for row in zip(prompts, completions, strict=True)])

    @torch.no_grad()
    def score_tokens(self, sequences: Sequence[Tensor]) -> Tensor:
        """Return ``[B]`` scores, float32 on the processor, of B one-dimensional token sequences."""
        scores = torch.zeros(len(sequences))
        # Sequences of about the same length together, so that little padding is computed.
        order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
        with evaluating(self.classifier):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                tokens = [sequences[row] for row in rows]
                mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
                padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
                logits = self.classifier(input_ids=padded.to(self.device), attention_mask=mask.to(self.device)).logits
                scores[rows] = logits[:, 0].float().cpu()
        return scores

    def tokens(self, prompt: Text, completion: Text) -> Tensor:
        """Return the tokens that a prompt and its completion are scored by."""
        if isinstance(prompt, str) and isinstance(completion, str):
            end = str(self.tokenizer.eos_token or "")
            return torch.tensor(self.tokenizer(prompt + completion.removesuffix(end) + end)["input_ids"])
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise TypeError(
                f"prompt and completion are {type(prompt).__name__} and {type(completion).__name__}: both must be "
                "text, or both lists of messages"
            )
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.__name__}: the prompts are conversations, and its tokenizer has no chat template")
        written = self.tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)
        return torch.tensor(cast(Any, written)["input_ids"])

    def save(self, path: str | Path) -> None:
        """Write the adapter with its head, or the whole model if there is no adapter, and the tokenizer.

        Raises:
            TypeError: for a reward model that shares a policy's base; the folder that it was loaded from has it.
        """
        if isinstance(self.classifier, PeftModel):
            self.classifier.save_pretrained(str(path), save_embedding_layers=False)
        elif isinstance(self.classifier, PreTrainedModel):
            self.classifier.save_pretrained(str(path))
        else:
            raise TypeError("a reward model on a policy's base is not saved again: it is in the folder it came from")
        self.tokenizer.save_pretrained(str(path))


class _SharedClassifier(nn.Module):
    """A policy's model under its reward adapter, with the reward model's head."""

    def __init__(self, policy: LanguagePolicy, head: nn.Linear) -> None:
        super().__init__()
        # In a tuple, and so no submodule: the policy is somebody else's to train, save and move.
        self.policy = (policy,)
        self.head = head.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        (policy,) = self.policy
        self.head.to(policy.device)
        with evaluating(policy), policy.using_adapter(REWARD_ADAPTER):
            backbone = cast(nn.Module, policy.causal_model.base_model)
            scores = last_token_scores(
                backbone, self.head, input_ids.to(policy.device), attention_mask.to(policy.device)
            )
        return SequenceClassifierOutput(logits=scores)


def _resolved(name: str) -> str:
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name


def _add_frozen_adapter(model: PeftModel, config: PeftConfig, weights: dict[str, Tensor]) -> nn.Linear:
    """Add the LoRA part of a reward adapter to a model, and return its head."""
    head_name = next(name for name in weights if name.endswith("score.weight"))
    weight = weights.pop(head_name).float()
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data = weight
    config.task_type, config.inference_mode = TaskType.CAUSAL_LM, True
    cast(LoraConfig, config).modules_to_save = None
    model.add_adapter(REWARD_ADAPTER, config)
    result: Any = set_peft_model_state_dict(model, weights, adapter_name=REWARD_ADAPTER)
    if result.unexpected_keys:
        raise ValueError(f"the reward model adapts layers that the policy's model has not: {result.unexpected_keys[0]}")
    return head
