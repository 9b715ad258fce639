"""Supervised fine-tuning: make demonstrated answers probable, through trl's ``SFTTrainer``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from aligngym.alignment.data import Row
from aligngym.alignment.demonstrations import Demonstrations, load_demonstrations
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.trl_trainers import TrainerAgent
from aligngym.core.callbacks import Callback
from aligngym.core.randomness import evaluating
from aligngym.core.schedules import Schedule


class SupervisedFineTuning(TrainerAgent):
    """Train the adapter of a policy on demonstrations, and leave everything else of it as it was.

    Minimises −Σ log π(token | what stands before it) / n over the n learned tokens of a batch, so that pieces do not
    change a step: the first stage of L. Ouyang et al., *Training language models to follow instructions with human
    feedback*, 2022. The loss is that of trl's ``SFTTrainer``. Every step reports ``loss``, ``token_accuracy``
    (how often a learned token was the most probable one), ``entropy``, ``gradient_norm`` and ``learning_rate``.

    Args:
        policy: its trainable adapter is trained; the reference and other adapters are not.
        demonstrations: what to make probable.
        **options: see :class:`~aligngym.alignment.trl_trainers.TrainerAgent`.

    Raises:
        ValueError: if options cannot be used.
    """

    headline = ("loss", "token_accuracy")
    names: ClassVar[Mapping[str, str]] = {"mean_token_accuracy": "token_accuracy", "entropy": "entropy"}

    def __init__(self, policy: LanguagePolicy, demonstrations: Demonstrations, **options: Any) -> None:
        super().__init__(policy.model, demonstrations.as_dataset(), **options)
        self.policy = policy

    def trainer(self, arguments: dict[str, Any], **options: Any) -> SFTTrainer:
        """Return trl's trainer."""
        # Its padding is masked by the lengths, so that the end-of-sequence token may be the padding token too.
        collator = DataCollatorForLanguageModeling(pad_token_id=self.policy.tokenizer.pad_token_id or 0)
        return _SilentSFTTrainer(
            model=self.policy.model,
            args=SFTConfig(**arguments),
            processing_class=self.policy.tokenizer,
            data_collator=collator,
            **options,
        )

    def _train(self, steps: int, callbacks: list[Callback]) -> None:
        with _otherwise_unchanged(self.policy):
            super()._train(steps, callbacks)

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Let the policy act."""
        return self.policy.act(observations, greedy=greedy)[0]

    def evaluate(self, demonstrations: Demonstrations) -> dict[str, float]:
        """Return how probable held-back demonstrations are; see :func:`evaluate_demonstrations`."""
        return evaluate_demonstrations(self.policy, demonstrations, self.order.batch_size // self.pieces)


def supervised_fine_tuning(
    policy: LanguagePolicy,
    rows: Demonstrations | Sequence[Row] | str | Path,
    *,
    epochs: float = 1.0,
    learning_rate: float | Schedule = 2e-4,
    batch_size: int = 8,
    max_length: int | None = 1024,
    progress: bool = True,
    **options: Any,
) -> LanguagePolicy:
    """Train the adapter of a policy on demonstrations, in place; a stage of a recipe, in one line.

    Args:
        policy: see :class:`SupervisedFineTuning`.
        rows: demonstrations, or what :func:`load_demonstrations` makes some of.
        epochs: passes over the rows.
        learning_rate: a number, or a schedule; LoRA takes about ten times that of full fine-tuning.
        batch_size: rows of an optimiser step.
        max_length: see :func:`load_demonstrations`.
        progress: whether to show a progress bar.
        **options: further arguments of :class:`SupervisedFineTuning`.

    Returns:
        The policy itself.

    Raises:
        ValueError: if rows or options cannot be used.
        FloatingPointError: if the loss or its gradient is not finite.
    """
    if not isinstance(rows, Demonstrations):
        rows = load_demonstrations(rows, policy.tokenizer, max_length=max_length, end_tokens=policy.end_tokens)
    agent = SupervisedFineTuning(policy, rows, learning_rate=learning_rate, batch_size=batch_size, **options)
    agent.learn(epochs=epochs, progress=progress)
    return policy


class _SilentSFTTrainer(SFTTrainer):  # type: ignore[misc]
    def _send_telemetry(self) -> None:
        """Tell nobody."""


@contextlib.contextmanager
def _otherwise_unchanged(policy: LanguagePolicy) -> Iterator[None]:
    """Undo what trainers do to a model besides training it: another forward, other special tokens, another mode."""
    causal, training = policy.causal_model, policy.training
    attributes = dict(vars(causal))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    configs = [causal.config, causal.generation_config, causal.config.get_text_config()]
    special = [(config, name, getattr(config, name, None)) for config in configs for name in names]
    try:
        yield
    finally:
        for name in set(vars(causal)) - set(attributes):
            delattr(causal, name)
        vars(causal).update(attributes)
        for config, name, value in special:
            setattr(config, name, value)
        policy.train(training)


@torch.no_grad()
def evaluate_demonstrations(
    policy: LanguagePolicy, demonstrations: Demonstrations, batch_size: int = 8
) -> dict[str, float]:
    """Return how probable held-back demonstrations are to the policy, and to its reference.

    Returns:
        ``loss``, the mean of −log π over all learned tokens, in nats; ``perplexity``, e to the loss; and both for the
        reference, as ``reference_loss`` and ``reference_perplexity``.
    """
    with evaluating(policy):
        sums = torch.zeros(2, dtype=torch.float64)
        for rows in torch.arange(len(demonstrations)).split(batch_size):
            batch = demonstrations[rows].to(policy.device)
            for number, log_probs in enumerate((policy(batch).log_probs, policy.reference_log_probs(batch))):
                sums[number] -= log_probs.double().sum().cpu()
    losses = dict(zip(("loss", "reference_loss"), (sums / demonstrations.num_learned).tolist(), strict=True))
    return losses | {name.replace("loss", "perplexity"): math.exp(loss) for name, loss in losses.items()}
