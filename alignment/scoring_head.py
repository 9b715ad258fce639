"""A language model with a linear head for scores, under an adapter: what all reward models are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from aligngym.alignment.language_policy import default_lora
from aligngym.alignment.models import load_model
from aligngym.core.randomness import seeded

#: A file beside the adapter of a process reward model, which says how it parts steps.
PROCESS_MODEL = "process_reward_model.json"


def reward_adapter_on(
    name: str | Path,
    lora: LoraConfig | None,
    adapter: str | Path | None,
    dtype: str | torch.dtype,
    seed: int,
    trust_remote_code: bool,
    *,
    trainable: bool = True,
    process: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return a language model with a scoring head under an adapter, and its tokenizer; see :meth:`RewardModel`."""
    if lora is not None and adapter is not None:
        raise ValueError("give lora for a new adapter or adapter to continue one, not both")
    if adapter is not None:
        reward_adapter_config(Path(adapter), process)
    model, tokenizer = load_model(name, dtype, trust_remote_code)
    if adapter is None:
        config = replace(lora or default_lora(), task_type=TaskType.SEQ_CLS)
        with seeded(seed):
            wrapped: PeftModel = get_peft_model(_with_head(model), config)
    else:
        wrapped = PeftModel.from_pretrained(_with_head(model), str(adapter), is_trainable=trainable)
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    for parameter in wrapped.parameters():
        # Whatever the frozen weights are, what is trained is float32; the head came with them.
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    wrapped.peft_config["default"].base_model_name_or_path = str(name)
    return wrapped, tokenizer


def _with_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return a sequence classifier of one label around a causal model's own backbone; nothing is copied."""
    config = model.config
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ValueError(f"{type(classifier).__name__} has no head named score, so no reward model can be made of it")
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    width = config.get_text_config().hidden_size
    classifier.score = nn.Linear(width, 1, bias=False)
    # N. Stiennon et al., 2020, appendix B.1: scores begin with a variance of about one.
    nn.init.normal_(classifier.score.weight, std=(width + 1) ** -0.5)
    score_last_real_token(classifier)
    return classifier


def reward_adapter_config(folder: Path, process: bool = False) -> PeftConfig:
    """Return the configuration of the adapter of an outcome or a process reward model in a folder.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is of another kind.
    """
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder}: no adapter_config.json there, so no reward adapter")
    kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    if kind != "SEQ_CLS":
        raise ValueError(f"{folder} holds an adapter of type {kind}; a reward model's is SEQ_CLS (aligngym reward)")
    if process != (folder / PROCESS_MODEL).is_file():
        found, wanted = ("an outcome", "a process") if process else ("a process", "an outcome")
        raise ValueError(f"{folder} holds {found} reward model, and {wanted} reward model is needed")
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: no adapter_model.safetensors there; other formats are not read")
    return PeftConfig.from_pretrained(str(folder))


def score_last_real_token(model: PreTrainedModel) -> None:
    """Let a decoder with a head ``score`` be scored at the last token that its attention mask has.

    Encoders, whose head is another and which look at their first token, are left as they are.
    """
    if isinstance(getattr(model, "score", None), nn.Linear):
        # The backbone and the head are looked up at each call, because peft puts its own layers in their places.
        model.forward = partial(_forward, model)  # type: ignore[method-assign]


def _forward(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
    return SequenceClassifierOutput(
        logits=last_token_scores(model.base_model, cast(nn.Module, model.score), input_ids, attention_mask)
    )


def last_token_scores(backbone: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return ``[B, 1]``, the head's output at each row's last real token.

    Args:
        backbone: a transformer without its language-model head.
        head: from hidden states to scores.
        input_ids: ``[B, T]``, padded on either side with anything.
        attention_mask: ``[B, T]``, 1 at real tokens.
    """
    hidden = hidden_states(backbone, input_ids, attention_mask)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (attention_mask * places).argmax(dim=1)
    # In float32, in which two close scores can be told apart; a head in half precision is one of a whole checkpoint.
    return cast(Tensor, head(hidden[torch.arange(len(last)), last].to(next(head.parameters()).dtype)))


def hidden_states(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return ``[B, T, d]``, the last hidden states, with positions counted from each row's first real token."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = backbone(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    return cast(Tensor, output.last_hidden_state)
