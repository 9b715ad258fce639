"""Training a reward model on pairs through trl's ``RewardTrainer``, and judging it on pairs that were held back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from aligngym.alignment.data import TokenPreferences
from aligngym.alignment.reward_model import RewardModel
from aligngym.alignment.trl_trainers import TrainerAgent
from aligngym.core.objectives import bradley_terry
from aligngym.core.statistics import wilson_interval


class RewardTraining(TrainerAgent):
    """Fit a reward model to preferences, −log σ(r(x, y⁺) − r(x, y⁻)), the mean over the pairs of a batch.

    N. Stiennon et al., *Learning to summarize from human feedback*, 2020, section 3.4; the loss is that of trl's
    ``RewardTrainer``. Only differences of scores are learned: their level is arbitrary. Every step reports ``loss``,
    ``accuracy``, the mean ``margin``, ``gradient_norm`` and ``learning_rate``.

    Args:
        reward_model: from :meth:`RewardModel.for_training`.
        preferences: pairs to learn from.
        **options: see :class:`~aligngym.alignment.trl_trainers.TrainerAgent`.

    Raises:
        ValueError: if options cannot be used, or the tokenizer has neither a padding nor an end-of-sequence token.
        TypeError: for a reward model that has no adapter to train.
    """

    headline = ("loss", "accuracy")
    names: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "margin": "margin"}

    def __init__(self, reward_model: RewardModel, preferences: TokenPreferences, **options: Any) -> None:
        if not isinstance(reward_model.classifier, PeftModel):
            raise TypeError("this reward model is not to be trained: make one with RewardModel.for_training")
        if reward_model.tokenizer.eos_token is None and reward_model.tokenizer.pad_token is None:
            raise ValueError("trl pads with the tokenizer's padding or end-of-sequence token, and it has neither")
        columns = {
            f"{side}_ids": [torch.cat(pair).tolist() for pair in zip(preferences.prompts, completions, strict=True)]
            for side, completions in (("chosen", preferences.chosen), ("rejected", preferences.rejected))
        }
        super().__init__(reward_model.classifier, Dataset.from_dict(columns), **options)
        self.reward_model = reward_model

    def trainer(self, arguments: dict[str, Any], **options: Any) -> RewardTrainer:
        """Return trl's trainer."""
        return _SilentRewardTrainer(
            model=cast(PeftModel, self.model),
            # Dropout is the adapter's, and chosen by the user; the model's own is off.
            args=RewardConfig(**arguments, disable_dropout=False),
            processing_class=self.reward_model.tokenizer,
            **options,
        )

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Return the scores of ``(prompts, completions)``."""
        return self.reward_model(*observations)

    def evaluate(self, preferences: TokenPreferences) -> dict[str, float]:
        """Judge the reward model on pairs; see :func:`judge`."""
        return judge(margins(self.reward_model, preferences))


class _SilentRewardTrainer(RewardTrainer):  # type: ignore[misc]
    def _send_telemetry(self) -> None:
        """Tell nobody."""


def margins(reward_model: RewardModel, preferences: TokenPreferences) -> Tensor:
    """Return ``[N]``, r(chosen) − r(rejected) of every pair."""
    sides = (preferences.chosen, preferences.rejected)
    sequences = [
        torch.cat(pair) for completions in sides for pair in zip(preferences.prompts, completions, strict=True)
    ]
    chosen, rejected = reward_model.score_tokens(sequences).view(2, -1)
    return chosen - rejected


def judge(margin: Tensor) -> dict[str, float]:
    """Judge a reward model by its margins on pairs that it was not trained on.

    Args:
        margin: ``[N]``, r(chosen) − r(rejected).

    Returns:
        ``accuracy``, the share of pairs ranked as the people did (ties count half), with its 95 % Wilson interval
        ``accuracy_low`` … ``accuracy_high``; the mean ``loss`` and ``margin``; ``brier``, the mean of (1 − σ(margin))²
        (G. Brier, 1950), ¼ for a model that knows nothing; and ``calibration_error``, see :func:`calibration`.
    """
    accuracy = float(((margin.sign() + 1) / 2).mean())
    low, high = wilson_interval(accuracy * len(margin), len(margin))
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": float(bradley_terry(margin).mean()),
        "margin": float(margin.mean()),
        "brier": float(((1 - margin.sigmoid()) ** 2).mean()),
        "calibration_error": pair_calibration(margin).error,
    }


@dataclass(frozen=True)
class Bin:
    """Predictions whose probabilities are close to each other: how many, what they said, and what came true."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """Predicted probabilities beside how often they came true, in bins of equal width.

    Attributes:
        bins: those that are not empty.
    """

    bins: list[Bin]

    @property
    def error(self) -> float:
        """The expected calibration error Σ_b (n_b / n) |observed_b − predicted_b|.

        C. Guo et al., *On calibration of modern neural networks*, 2017, equation 3.
        """
        total = sum(one.count for one in self.bins)
        return sum(one.count * abs(one.observed - one.predicted) for one in self.bins) / total

    @property
    def rows(self) -> list[list[str]]:
        """The reliability table as text: probability, count, mean prediction, share that came true."""
        return [
            [f"{one.low:.2f} – {one.high:.2f}", str(one.count), f"{one.predicted:.3f}", f"{one.observed:.3f}"]
            for one in self.bins
        ]


def calibration(probabilities: Tensor, outcomes: Tensor, *, lowest: float = 0.0, bins: int = 10) -> Calibration:
    """Compare ``[N]`` predicted probabilities in [``lowest``, 1] with ``[N]`` outcomes in [0, 1]."""
    width = (1 - lowest) / bins
    places = ((probabilities.double() - lowest) / width).floor().clamp(0, bins - 1)
    found = []
    for number in range(bins):
        inside = places == number
        if inside.any():
            predicted, observed = (float(x[inside].double().mean()) for x in (probabilities, outcomes))
            low = lowest + number * width
            found.append(Bin(low, low + width, int(inside.sum()), predicted, observed))
    return Calibration(found)


def pair_calibration(margin: Tensor, bins: int = 10) -> Calibration:
    """Compare how sure a reward model is, σ(|margin|) in [½, 1], with how often the preferred side is the better."""
    return calibration(margin.abs().sigmoid(), (margin.sign() + 1) / 2, lowest=0.5, bins=bins)


def most_wrong(margin: Tensor, count: int) -> list[int]:
    """Return at most ``count`` pairs that are ranked wrongly, from the surest mistake on."""
    return [int(row) for row in margin.argsort(stable=True)[:count] if margin[row] < 0]
