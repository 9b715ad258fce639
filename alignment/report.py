"""What training did to a language policy, in numbers and in its own words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.core.objectives import kl_estimate
from aligngym.core.randomness import evaluating


def kl_to_reference(
    policy: LanguagePolicy, prompts: Sequence[Tensor], *, max_new_tokens: int = 64, seed: int = 0
) -> tuple[float, float]:
    """Estimate KL(π‖π_ref) of a completion from one sample per prompt.

    Returns:
        The mean over completions of the sum over tokens of the k3 estimate, in nats, and its standard error (NaN for a
        single prompt). Completions are at most ``max_new_tokens`` long, so it is the divergence up to there.
    """
    estimates = kl_of_completions(policy, prompts, max_new_tokens=max_new_tokens, seed=seed)
    return float(estimates.mean()), float(estimates.std() / len(estimates) ** 0.5)


@torch.no_grad()
def kl_of_completions(
    policy: LanguagePolicy, prompts: Sequence[Tensor], *, rows_at_once: int | None = None, **options: Any
) -> Tensor:
    """Return ``[prompts]``, the k3 estimate of KL(π‖π_ref) of one completion of each prompt, drawn from π itself.

    Args:
        policy: π.
        prompts: token ids.
        rows_at_once: completions written and read together, to bound memory; ``None``: all.
        options: of :meth:`LanguagePolicy.generate`.
    """
    samples = policy.generate(prompts, rows_at_once=rows_at_once, **options)
    with evaluating(policy):
        estimates = [
            kl_estimate(policy(piece).log_probs, policy.reference_log_probs(piece), "k3").sum(dim=1)
            for piece in samples.split(rows_at_once or len(samples))
        ]
    return torch.cat(estimates)


def completions_side_by_side(
    policy: LanguagePolicy, prompts: Sequence[Tensor], *, max_new_tokens: int = 64, width: int = 56
) -> str:
    """Return the reference's and the policy's greedy completions of each prompt in two columns of text."""

    def text(tokens: Tensor) -> str:
        return str(policy.tokenizer.decode(tokens, skip_special_tokens=True))

    def written(reference: bool) -> list[str]:
        rows = policy.generate(prompts, max_new_tokens=max_new_tokens, greedy=True, reference=reference)
        finished = rows.mask.new_zeros(len(rows)) if rows.terminated is None else rows.terminated.any(dim=1)
        return [
            text(actions[mask]) + ("" if done else " …")
            for actions, mask, done in zip(rows.actions, rows.mask, finished, strict=True)
        ]

    before = written(reference=True)
    after = written(reference=False)
    blocks = []
    for prompt, old, new in zip(prompts, before, after, strict=True):
        question = " ".join(text(prompt).split())
        # The end of a prompt is where the question is; before it stand templates and examples.
        blocks.append(
            "▸ " + (question if len(question) <= 2 * width else "… " + question[-2 * width :].split(" ", 1)[-1])
        )
        columns = [_wrapped(text, width) for text in (old, new)]
        height = max(map(len, columns))
        for left, right in zip(*(column + [""] * (height - len(column)) for column in columns), strict=True):
            blocks.append(f"  {left.ljust(width)} │ {right}".rstrip())
    header = f"  {'before (greedy)'.ljust(width)} │ after (greedy)"
    return "\n".join([header, "─" * (2 * width + 5), *blocks])


def _wrapped(text: str, width: int) -> list[str]:
    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width) or [""]] or ["(empty)"]
