"""Process reward models: how probable it is that each step of a solution is right.

J. Uesato et al., *Solving math word problems with process- and outcome-based feedback*, 2022; H. Lightman et al.,
*Let's verify step by step*, 2023.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aligngym.alignment.data import pad_tokens
from aligngym.alignment.reward_model import Text
from aligngym.alignment.reward_training import Calibration, calibration
from aligngym.alignment.scoring_head import PROCESS_MODEL, hidden_states, reward_adapter_config, reward_adapter_on
from aligngym.alignment.step_labels import StepBatch, StepLabels
from aligngym.core.gradient_agent import EpochOrder, GradientAgent
from aligngym.core.objectives import bradley_terry
from aligngym.core.policy import Policy
from aligngym.core.randomness import evaluating
from aligngym.core.schedules import Schedule
from aligngym.core.statistics import wilson_interval
from aligngym.core.storage import replacing
from aligngym.core.trajectories import PADDING

#: How the probabilities of the steps become one of the solution.
AGGREGATES = ("min", "product", "last")


class StepClassifier(nn.Module):
    """A language model with a scoring head, read at the last token of each step.

    Args:
        model: an adapter and a head on a language model.
    """

    #: Dropout on the adapter, if there is any, is random.
    deterministic = False
    steps_at_once = None
    callbacks = ()
    trainable_state = Policy.trainable_state
    load_trainable_state = Policy.load_trainable_state

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: StepBatch) -> Tensor:
        """Return ``[B, S]`` logits of each step being right, 0 where there is no step."""
        model = cast(PreTrainedModel, self.model.get_base_model())
        attention = (batch.tokens != PADDING).long()
        hidden = hidden_states(cast(nn.Module, model.base_model), batch.tokens.clamp(min=0), attention)
        at_ends = hidden.gather(1, batch.ends.clamp(min=0)[:, :, None].expand(-1, -1, hidden.shape[2]))
        head = cast(nn.Module, model.score)
        logits = cast(Tensor, head(at_ends.to(next(head.parameters()).dtype)))[:, :, 0]
        return logits.where(batch.mask, 0)


class ProcessRewardModel:
    """P(step t is right | prompt, steps 1 … t), a language model with a linear head at the last token of each step.

    Every step is written with the separator behind it, so that a step's last token is the same in training and scoring.
    Called with trl's signature, it is a reward function: a completion is cut into steps at the separator, and their
    probabilities become one number, the smallest, the product (Lightman et al., section 2.6 and appendix F), or the
    last.

    Args:
        classifier: an adapter and a head on a language model, see :meth:`for_training`.
        tokenizer: its tokenizer.
        separator: what ends a step.
        aggregate: ``"min"``, ``"product"`` or ``"last"``.
        batch_size: solutions scored at once.
        label: what rewards are logged as.

    Raises:
        ValueError: for another aggregate, or an empty separator.
    """

    def __init__(
        self,
        classifier: StepClassifier,
        tokenizer: PreTrainedTokenizerBase,
        *,
        separator: str = "\n",
        aggregate: str = "min",
        batch_size: int = 16,
        label: str = "process_reward",
    ) -> None:
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is one of {', '.join(AGGREGATES)}, not {aggregate!r}")
        if not separator:
            raise ValueError("the separator is what ends a step, such as a new line, and cannot be empty")
        self.classifier, self.tokenizer, self.separator = classifier, tokenizer, separator
        self.aggregate, self.batch_size, self.__name__ = aggregate, batch_size, label

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
        """Put an adapter and a head on a causal language model; see :meth:`RewardModel.for_training`."""
        model, tokenizer = reward_adapter_on(name, lora, adapter, dtype, seed, trust_remote_code, process=True)
        return cls(StepClassifier(model), tokenizer, **({} if adapter is None else _settings(Path(adapter))) | options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Load what :meth:`save` wrote, onto the language model that it remembers or ``base``.

        Raises:
            FileNotFoundError: if a path does not exist.
            ValueError: if it is no process reward model.
        """
        config = reward_adapter_config(Path(folder), process=True)
        base = base or str(config.base_model_name_or_path)
        model, tokenizer = reward_adapter_on(
            base, None, folder, dtype, 0, trust_remote_code, trainable=False, process=True
        )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(StepClassifier(model).to(device).eval(), tokenizer, **_settings(Path(folder)) | options)

    def save(self, path: str | Path) -> None:
        """Write the adapter with its head, the tokenizer and the separator into the folder ``path``."""
        self.classifier.model.save_pretrained(str(path), save_embedding_layers=False)
        self.tokenizer.save_pretrained(str(path))
        with replacing(Path(path) / PROCESS_MODEL) as temporary:
            temporary.write_text(json.dumps({"separator": self.separator}) + "\n", encoding="utf-8")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.classifier.parameters()).device

    def tokens(self, prompt: Text, steps: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens of a prompt and the steps that follow, and where the last token of each step is."""
        if isinstance(prompt, str):
            tokens = list(self.tokenizer(prompt)["input_ids"])
        elif not self.tokenizer.chat_template:
            raise ValueError(f"{self.__name__}: the prompts are conversations, and its tokenizer has no chat template")
        else:
            written = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            tokens = list(cast(Any, written)["input_ids"])
        ends = []
        for step in steps:
            # Each on its own, so that no token reaches across the end of a step.
            text = step.removesuffix(self.separator) + self.separator
            tokens += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ends.append(len(tokens) - 1)
        return torch.tensor(tokens), torch.tensor(ends)

    @torch.no_grad()
    def step_probabilities(self, prompts: Sequence[Text], steps: Sequence[Sequence[str]]) -> list[Tensor]:
        """Return for each of B solutions the probabilities ``[steps]`` that its steps are right.

        Raises:
            ValueError: if a solution has no steps, or there are not as many prompts.
        """
        if len(prompts) != len(steps) or not all(steps):
            raise ValueError(f"{len(prompts)} prompts and {len(steps)} solutions, each of at least a step, are needed")
        with evaluating(self.classifier):
            found: list[Tensor] = []
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                rows = [self.tokens(*row) for row in zip(prompts[part], steps[part], strict=True)]
                tokens, ends = (pad_tokens(list(column)) for column in zip(*rows, strict=True))
                probabilities = self.classifier(StepBatch(tokens, ends, ends).to(self.device)).sigmoid().float().cpu()
                found += [row[: len(end)] for row, (_, end) in zip(probabilities, rows, strict=True)]
        return found

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
        """Return a reward for each completion; other columns are ignored.

        A completion without any text has no step, and gets 0, the least.
        """
        texts = [
            text if isinstance(text, str) else "".join(message["content"] for message in text) for text in completions
        ]
        steps = [[step for step in text.split(self.separator) if step.strip()] for text in texts]
        rows = [row for row, found in enumerate(steps) if found]
        rewards = [0.0] * len(texts)
        scored = self.step_probabilities([prompts[row] for row in rows], [steps[row] for row in rows])
        for row, probabilities in zip(rows, scored, strict=True):
            rewards[row] = float(self.aggregated(probabilities))
        return rewards

    def aggregated(self, probabilities: Tensor) -> Tensor:
        """Return the one number that the probabilities ``[steps]`` of a solution become."""
        return {"min": probabilities.min(), "product": probabilities.prod(), "last": probabilities[-1]}[self.aggregate]


def _settings(folder: Path) -> dict[str, str]:
    found = json.loads((folder / PROCESS_MODEL).read_text(encoding="utf-8"))
    return {"separator": found["separator"]}


class ProcessRewardTraining(GradientAgent[StepBatch]):
    """Fit a process reward model to step labels by their cross-entropy, the mean over the steps of a batch.

    −y log σ(z) − (1−y) log σ(−z) for a step's logit z and label y: H. Lightman et al., 2023, section 2.6.

    Args:
        model: what is trained.
        data: solutions to learn from.
        batch_size: solutions per optimiser step, on all devices together.
        learning_rate: see :class:`GradientAgent`, as for the remaining arguments.
        **options: further arguments of :class:`GradientAgent`.
    """

    headline = ("loss", "accuracy")

    def __init__(
        self,
        model: ProcessRewardModel,
        data: StepLabels,
        *,
        batch_size: int = 8,
        learning_rate: float | Schedule = 2e-4,
        **options: Any,
    ) -> None:
        # The loop asks of a policy no more than that it can be called and knows what of it is trained.
        super().__init__(cast(Policy, model.classifier), learning_rate=learning_rate, **options)
        self.reward_model, self.data = model, data
        self.order = EpochOrder(len(data), batch_size, self.seed)

    def next_batch(self) -> StepBatch:
        """Return this process's solutions of the current step."""
        accelerator = self.accelerator
        return self.data[self.order.share(self.iteration, accelerator.process_index, accelerator.num_processes)]

    def weight(self, batch: StepBatch) -> float:
        """Return how many steps there are in a batch."""
        return float(batch.mask.sum())

    def losses(self, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B, S]`` losses, 0 where there is no step, and how often the more probable label is right."""
        logits = self.model(batch)
        # The cross-entropy of a label is that of a preference for it.
        losses = bradley_terry(logits * (2 * batch.labels - 1)) * batch.mask
        right = ((logits > 0) == (batch.labels > 0)) & batch.mask
        return losses, {"accuracy": right.float()}

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Return the probabilities of the steps of ``(prompts, steps)``."""
        return self.reward_model.step_probabilities(*observations)

    @torch.no_grad()
    def evaluate(self, data: StepLabels) -> dict[str, float]:
        """Judge the model on solutions that it was not trained on.

        Returns:
            ``accuracy``, the share of steps judged as labelled; ``solution_accuracy``, the share of solutions of which
            it is told rightly whether all steps are right, with its 95 % Wilson interval ``solution_accuracy_low`` …
            ``solution_accuracy_high`` (steps of one solution depend on each other, so they get none); ``loss``,
            ``brier`` and ``calibration_error`` of the steps; and ``right``, the share of right steps, which is the
            accuracy of calling all steps right.
        """
        logits, labels = self.step_logits(data)
        flat, truth = torch.cat(logits), torch.cat(labels)
        solutions = [float((z > 0).all() == (y > 0).all()) for z, y in zip(logits, labels, strict=True)]
        low, high = wilson_interval(sum(solutions), len(solutions))
        return {
            "accuracy": float(((flat > 0) == (truth > 0)).float().mean()),
            "solution_accuracy": sum(solutions) / len(solutions),
            "solution_accuracy_low": low,
            "solution_accuracy_high": high,
            "loss": float(bradley_terry(flat * (2 * truth - 1)).mean()),
            "brier": float(((flat.sigmoid() - truth) ** 2).mean()),
            "calibration_error": calibration(flat.sigmoid(), truth).error,
            "right": float(truth.mean()),
        }

    def calibration(self, data: StepLabels, bins: int = 10) -> Calibration:
        """Compare the probabilities of steps with how often such steps are right."""
        logits, labels = self.step_logits(data)
        return calibration(torch.cat(logits).sigmoid(), torch.cat(labels), bins=bins)

    @torch.no_grad()
    def step_logits(self, data: StepLabels) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each solution the logits and the labels of its steps."""
        self.model.eval()
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for rows in torch.arange(len(data)).split(self.reward_model.batch_size):
            batch = data[rows]
            found = self.model(batch.to(self.accelerator.device)).float().cpu()
            logits += [row[mask] for row, mask in zip(found, batch.mask, strict=True)]
            labels += [row[mask] for row, mask in zip(batch.labels, batch.mask, strict=True)]
        return logits, labels
