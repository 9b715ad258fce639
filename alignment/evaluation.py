"""How good a language model's completions are, beside those of its reference on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from aligngym.alignment.data import Row
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.prompt_sampler import Completions, PromptSampler
from aligngym.alignment.report import kl_of_completions
from aligngym.alignment.rewards import RewardFunction, Rewards
from aligngym.alignment.text_metrics import distinct_n
from aligngym.core.randomness import derived_seed
from aligngym.core.statistics import Estimate, bootstrap_interval, wilson_interval

#: Completions whose log-probabilities are computed together, where the caller does not say.
ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class CompletionEvaluation:
    """What was measured, with 95 % intervals; ``metrics`` has all of it as plain numbers.

    Attributes:
        policy: by name, of the policy's completions: ``reward`` and every ``rewards/…``; ``pass@k/…`` of components
            that are 0 or 1; ``length`` in tokens; ``unfinished``, the share that came to no end; ``distinct_1`` and
            ``distinct_2``, the shares of distinct tokens and pairs of tokens in all completions, which have no
            interval; ``distinct_2_of_prompt``, in those of one prompt, if there are several.
        reference: the same of the reference's; empty without a comparison.
        win_rate: how probable it is that the policy's completion is rewarded better than the reference's, ties half.
        kl: KL(π‖π_ref) of a completion, in nats.
        kl_standard_error: of ``kl``.
        completions: the policy's, the completions of one prompt adjacent.
        reference_completions: the reference's.
    """

    policy: dict[str, Estimate]
    completions: Completions
    reference: dict[str, Estimate] = field(default_factory=dict)
    reference_completions: Completions | None = None
    win_rate: Estimate | None = None
    kl: float = math.nan
    kl_standard_error: float = math.nan

    @property
    def metrics(self) -> dict[str, float]:
        """Every number by name: ``reward``, ``reward_low``, ``reward_high``, ``reference_reward`` and so on."""
        compared = {} if self.win_rate is None else {"win_rate": self.win_rate}
        reference = {f"reference_{name}": estimate for name, estimate in self.reference.items()}
        numbers = as_metrics({**self.policy, **compared, **reference})
        kl = {"kl": self.kl, "kl_standard_error": self.kl_standard_error}
        return numbers | ({} if self.win_rate is None else kl)


def evaluate_completions(
    policy: LanguagePolicy,
    rows: Sequence[Row],
    rewards: Rewards | Sequence[RewardFunction],
    *,
    completions: int = 1,
    greedy: bool = True,
    against_reference: bool = True,
    kl_prompts: int = 64,
    rows_at_once: int | None = None,
    seed: int = 0,
    **decoding: Any,
) -> CompletionEvaluation:
    """Let the policy complete prompts, and its reference too, and judge what both wrote.

    KL(π‖π_ref) is estimated from completions drawn from the policy as it is, whatever the others are like: the mean
    over completions of Σ_t k3_t (see :func:`~aligngym.core.objectives.kl_estimate`), up to ``max_new_tokens``.

    Args:
        policy: to be judged.
        rows: the prompts, with the columns that the rewards need.
        rewards: reward functions with trl's signature, or :class:`Rewards` with weights.
        completions: k, of every prompt.
        greedy: the most probable completion, instead of samples.
        against_reference: whether to judge the reference too, and to compare.
        kl_prompts: of how many prompts a sample is drawn for the KL, at most.
        rows_at_once: completions written and read together, to bound memory.
        seed: of samples and intervals.
        decoding: of :class:`~aligngym.alignment.generation.Decoding`: ``max_new_tokens``, ``top_p``, ``stop``, …

    Raises:
        ValueError: for several completions that are greedy, and so all alike; for a column that a reward needs and no
            row has; or for a prompt that leaves no room for a completion.
        RewardError: if a reward function fails.
    """
    if completions > 1 and greedy:
        raise ValueError(f"{completions} greedy completions of a prompt are all alike: draw them with greedy=False")
    if kl_prompts < 1:
        raise ValueError(f"kl_prompts is at least 1, not {kl_prompts}")
    sampler = PromptSampler(rows, rewards, group_size=completions, rows_at_once=rows_at_once, greedy=greedy, **decoding)
    problems = sampler.prepare(policy)
    everything = range(len(problems))
    ours = sampler.complete(policy, problems, everything, derived_seed(seed, 0))
    if not against_reference:
        return CompletionEvaluation(_measure([ours], completions)[0], ours)
    theirs = sampler.complete(policy, problems, everything, derived_seed(seed, 1), reference=True)
    measured, of_reference = _measure([ours, theirs], completions)
    divergence = kl_of_completions(
        policy,
        problems.tokens[:kl_prompts],
        rows_at_once=rows_at_once or ROWS_AT_ONCE,
        seed=derived_seed(seed, 2),
        max_new_tokens=sampler.decoding.max_new_tokens,
        stop=sampler.decoding.stop,
    )
    return CompletionEvaluation(
        measured,
        ours,
        of_reference,
        theirs,
        win_rate=mean_with_interval(wins(ours, theirs, completions)),
        kl=float(divergence.mean()),
        kl_standard_error=float(divergence.std() / len(divergence) ** 0.5),
    )


def pass_at_k(successes: ArrayLike, trials: int, k: int) -> NDArray[np.float64]:
    r"""Return how probable it is that of k completions at least one is right, without bias.

    pass@k = 1 − C(n − c, k) / C(n, k) for c right ones of n drawn: M. Chen et al., *Evaluating large language models
    trained on code*, 2021, equation 1.

    Args:
        successes: c, of any shape, such as one for each prompt.
        trials: n.
        k: at most n.

    Raises:
        ValueError: if k is not in 1 … n, or a c is not in 0 … n.
    """
    successes = np.asarray(successes, dtype=np.int64)
    if not 1 <= k <= trials:
        raise ValueError(f"k={k}: pass@k is estimated from at least k completions, and there are {trials}")
    if successes.size and not 0 <= successes.min() <= successes.max() <= trials:
        raise ValueError(f"of {trials} completions between 0 and {trials} are right, not {successes.tolist()}")
    # C(n − c, k) / C(n, k) as a product of small numbers: the factor is 0 as soon as fewer than k are wrong.
    drawn = np.arange(k)
    still_wrong = (trials - successes[..., None] - drawn).clip(min=0) / (trials - drawn)
    return np.asarray(1 - still_wrong.prod(axis=-1))


def mean_with_interval(values: ArrayLike) -> Estimate:
    """Return the mean over prompts, and a 95 % interval of what it would be over all prompts of this kind.

    Prompts are what was drawn at random; completions of one prompt are not independent of each other. Wilson's interval
    if every prompt's mean is 0 or 1, which holds for accuracies of a single completion; otherwise by the bootstrap over
    prompts.

    Args:
        values: ``[prompts]`` or ``[prompts, completions]``; NaN where there is none, which is left out.

    Returns:
        The estimate; with NaN for ends if there is only one prompt, and for all if there are no values.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    table = table[~np.isnan(table).all(axis=1)]
    if not len(table):
        return Estimate(math.nan, math.nan, math.nan)
    means = np.nanmean(table, axis=1)
    value = float(means.mean())
    if np.isin(means, (0.0, 1.0)).all():
        return Estimate(value, *wilson_interval(float(means.sum()), len(means)))
    if len(means) < 2:
        return Estimate(value, math.nan, math.nan)
    low, high = bootstrap_interval(means, np.mean)
    return Estimate(value, float(low), float(high))


def as_metrics(estimates: dict[str, Estimate]) -> dict[str, float]:
    """Return plain numbers: every value by its name, and the ends of its interval as ``…_low`` and ``…_high``."""
    numbers: dict[str, float] = {}
    for name, estimate in estimates.items():
        numbers[name] = estimate.value
        if not math.isnan(estimate.low):
            numbers |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return numbers


def wins(ours: Completions, theirs: Completions, completions: int) -> NDArray[np.float64]:
    """Return ``[prompts]``, the share of all pairs of one's and the other's completions in which ours has more reward.

    Ties count half, and so do completions that are the same, whose reward a model may judge differently in the last
    digits.
    """
    a, b = (written.rewards.view(-1, completions).double().numpy() for written in (ours, theirs))
    signs = np.sign(a[:, :, None] - b[:, None, :])
    x, y = (np.array(written.texts, dtype=object).reshape(-1, completions) for written in (ours, theirs))
    signs[(x[:, :, None] == y[:, None, :]).astype(bool)] = 0
    return np.asarray((1 + signs.mean(axis=(1, 2))) / 2)


def _measure(written: Sequence[Completions], size: int) -> list[dict[str, Estimate]]:
    """Return the estimates of each writer's completions, ``size`` of them for each prompt."""
    components = written[0].components
    binary = [name for name in components if all(_is_binary(each.components[name]) for each in written)]
    return [_estimates(each, size, binary) for each in written]


def _is_binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _estimates(written: Completions, size: int, binary: Sequence[str]) -> dict[str, Estimate]:
    def of_prompts(values: Tensor) -> Estimate:
        return mean_with_interval(values.double().cpu().view(-1, size).numpy())

    estimates = {"reward": of_prompts(written.rewards)}
    estimates |= {f"rewards/{name}": of_prompts(values) for name, values in written.components.items()}
    for name in binary if size > 1 else ():
        successes = written.components[name].view(-1, size).sum(dim=1).numpy()
        for k in sorted({2**power for power in range(1, size.bit_length())} | {size}):
            estimates[f"pass@{k}/{name}"] = mean_with_interval(pass_at_k(successes, size, k))
    trajectories = written.trajectories
    estimates["length"] = of_prompts(trajectories.lengths)
    estimates["unfinished"] = of_prompts(trajectories.truncated.any(dim=1))
    tokens = [actions[mask].tolist() for actions, mask in zip(trajectories.actions, trajectories.mask, strict=True)]
    for n in (1, 2):
        # Redrawn completions repeat each other, so a bootstrap would find less diversity than there is.
        estimates[f"distinct_{n}"] = Estimate(distinct_n(tokens, n), math.nan, math.nan)
    if size > 1:
        groups = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        estimates["distinct_2_of_prompt"] = mean_with_interval([distinct_n(group, 2) for group in groups])
    return estimates
