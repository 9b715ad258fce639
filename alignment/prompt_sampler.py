"""Experience from prompts: a language model completes them, and reward functions judge what it wrote."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from aligngym.alignment.data import Row
from aligngym.alignment.generation import Decoding
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.prompts import Problems, as_completion, prompt_text
from aligngym.alignment.rewards import RewardFunction, Rewards
from aligngym.core.callbacks import Metrics
from aligngym.core.gradient_agent import EpochOrder
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Trajectories


@dataclass
class Completions:
    """What was written, in words and in tokens, and what it was worth.

    Attributes:
        trajectories: B rows, with the reward of each on its last token.
        rows: the B rows of the problems, one for each completion.
        texts: the B completions.
        rewards: ``[B]``, of the reward functions together.
        components: ``[B]`` of each reward function, NaN where it does not apply.
    """

    trajectories: Trajectories
    rows: list[Row]
    texts: list[str]
    rewards: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The B prompts, to be read by people."""
        return [prompt_text(row) for row in self.rows]

    def __getitem__(self, numbers: Tensor) -> Completions:
        """Return the completions of some numbers."""
        chosen = numbers.tolist()
        return Completions(
            self.trajectories[numbers.to(self.trajectories.mask.device)],
            [self.rows[number] for number in chosen],
            [self.texts[number] for number in chosen],
            self.rewards[numbers],
            {name: values[numbers] for name, values in self.components.items()},
        )

    @classmethod
    def concatenate(cls, parts: list[Completions]) -> Completions:
        """Join several."""
        return cls(
            Trajectories.concatenate([part.trajectories for part in parts]),
            [row for part in parts for row in part.rows],
            [text for part in parts for text in part.texts],
            torch.cat([part.rewards for part in parts]),
            {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components},
        )


class PromptSampler(Sampler):
    """Completions of prompts, in groups that share one, with rewards on their last tokens.

    A sample has ``prompts_per_sample`` · ``group_size`` completions; on several devices they are shared out among
    them. Prompts are taken in a new order every epoch.

    Args:
        problems: rows with a ``prompt``, a string or a list of messages, and the columns that the rewards need.
        rewards: reward functions with trl's signature, or :class:`Rewards` with weights.
        group_size: G, completions of each prompt.
        prompts_per_sample: N, how many prompts one sample has.
        missing_end_penalty: taken off the reward of a completion that came to no end, as trl's PPO did.
        refills: dynamic sampling (Q. Yu et al., *DAPO*, 2025, eq. 11): groups whose rewards are all alike teach
            nothing, and are replaced by groups of further prompts, drawn at most so often.
        rows_at_once: completions written together, to bound memory; ``None``: all.
        seed: of the order of the prompts.
        writer: what completes the prompts, the policy itself by default; :class:`VLLMWriter` lets a server do it.
        decoding: of :class:`~aligngym.alignment.generation.Decoding`: ``max_new_tokens``, ``top_p``, ``stop``, …

    Raises:
        ValueError: for a size below 1 or a negative number, a column that a reward needs and no row has, or refills on
            several devices.
    """

    def __init__(
        self,
        problems: Sequence[Row],
        rewards: Sequence[RewardFunction] | Rewards,
        *,
        group_size: int = 8,
        prompts_per_sample: int = 8,
        missing_end_penalty: float = 0.0,
        refills: int = 0,
        rows_at_once: int | None = None,
        seed: int = 0,
        writer: Callable[..., Trajectories] = LanguagePolicy.generate,
        **decoding: Any,
    ) -> None:
        for name, size in (("group_size", group_size), ("prompts_per_sample", prompts_per_sample)):
            if size < 1:
                raise ValueError(f"{name} is at least 1, not {size}")
        if missing_end_penalty < 0 or refills < 0:
            raise ValueError(f"missing_end_penalty={missing_end_penalty}, refills={refills}: neither can be negative")
        if not len(problems):
            raise ValueError("there are no prompts")
        if refills and PartialState().num_processes > 1:
            raise ValueError(f"refills={refills}: devices would come to draw different prompts; use one, or 0 refills")
        self.problems = problems
        self.rewards = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
        self.rewards.check(dict.fromkeys(name for row in problems for name in row))
        self.group_size, self.prompts_per_sample = group_size, prompts_per_sample
        self.missing_end_penalty, self.refills, self.rows_at_once = missing_end_penalty, refills, rows_at_once
        self.decoding = Decoding(**decoding)
        self.seed, self.writer = seed, writer
        self.metrics: Metrics = {}
        #: What the last sample consists of, for those who want to read it.
        self.last: Completions | None = None
        self._drawn = 0
        self._prepared: Problems | None = None

    def prepare(self, policy: Policy) -> Problems:
        """Cut the prompts into the policy's tokens, once; called by :meth:`sample`, or before to find errors early.

        Raises:
            TypeError: if the policy is no language model.
            ValueError: if a prompt leaves no room for a completion.
        """
        policy = writing(policy)
        if self._prepared is None or self._prepared.tokenizer is not policy.tokenizer:
            room, context = self.decoding.max_new_tokens, policy.context_length
            self._prepared = Problems.of(self.problems, policy.tokenizer, room, context)
        return self._prepared

    def sample(self, policy: Policy, seed: int) -> Trajectories:
        problems = self.prepare(policy)
        started = time.perf_counter()
        first = self._next_prompts()
        drawn = [self.complete(policy, problems, first, derived_seed(seed, 0))]
        for attempt in range(self.refills):
            if sum(int(self._speaks(completions).sum()) for completions in drawn) >= len(first):
                break
            drawn.append(self.complete(policy, problems, self._next_prompts(), derived_seed(seed, attempt + 1)))
        completions = Completions.concatenate(drawn)
        speaks = self._speaks(completions)
        if self.refills:
            # Silent groups last: they only fill up what further prompts could not.
            groups = torch.argsort((~speaks).int(), stable=True)[: len(first)]
            rows = (groups[:, None] * self.group_size + torch.arange(self.group_size)).flatten()
            completions = completions[rows]
        trajectories = completions.trajectories
        trajectories.group = torch.arange(len(first)).repeat_interleave(self.group_size).to(trajectories.mask.device)
        self.last = completions
        self.metrics = self._describe(completions) | {
            "groups_drawn": len(speaks),
            "silent_groups_drawn": 1 - float(speaks.float().mean()),
            "sampling_seconds": time.perf_counter() - started,
        }
        return trajectories

    def complete(
        self, policy: Policy, problems: Problems, numbers: Sequence[int], seed: int, **decoding: Any
    ) -> Completions:
        """Let the policy complete some of the problems, and judge what it wrote.

        Args:
            policy: a :class:`LanguagePolicy`.
            problems: prompts as tokens.
            numbers: which of them.
            seed: of the samples.
            decoding: what is different from the sampler's own way, such as ``greedy``.

        Raises:
            RewardError: if a reward function fails.
        """
        policy = writing(policy)
        trajectories = self.writer(
            policy,
            [problems.tokens[number] for number in numbers],
            completions=self.group_size,
            seed=seed,
            rows_at_once=self.rows_at_once,
            **dataclasses.asdict(self.decoding) | decoding,
        )
        repeated = [number for number in numbers for _ in range(self.group_size)]
        rows = [problems.rows[number] for number in repeated]
        ids = [actions[mask].tolist() for actions, mask in zip(trajectories.actions, trajectories.mask, strict=True)]
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers = [as_completion(row, text) for row, text in zip(rows, texts, strict=True)]
        rewards, components = self.rewards([row["prompt"] for row in rows], answers, ids, problems.columns(repeated))
        unfinished = trajectories.truncated.any(dim=1).cpu()
        rewards = rewards - self.missing_end_penalty * unfinished
        on_last = trajectories.terminated | trajectories.truncated
        trajectories.rewards = on_last * rewards.to(on_last.device)[:, None]
        return Completions(trajectories, rows, texts, rewards, components)

    def evaluate(self, policy: Policy, source: Sequence[Row] | None = None, **options: Any) -> Metrics:
        """Judge a policy by the sampler's rewards, beside its reference.

        Args:
            policy: a :class:`LanguagePolicy`.
            source: held-back problems; the sampler's own by default.
            options: of :func:`~aligngym.alignment.evaluate_completions`: ``greedy``, ``completions``, ``seed``, …
        """
        # It is made of samplers itself.
        from aligngym.alignment.evaluation import evaluate_completions

        decoding = dataclasses.asdict(self.decoding) | {"rows_at_once": self.rows_at_once, "greedy": True}
        found = evaluate_completions(writing(policy), source or self.problems, self.rewards, **decoding | options)
        return found.metrics

    def _next_prompts(self) -> list[int]:
        """Return this process's prompts of the next batch."""
        order = EpochOrder(len(self.problems), self.prompts_per_sample, derived_seed(self.seed))
        processes = PartialState()
        numbers = order(self._drawn)[processes.process_index :: processes.num_processes].tolist()
        self._drawn += 1
        return numbers

    def _speaks(self, completions: Completions) -> Tensor:
        """Return ``[groups]`` booleans, whether the rewards of a group differ."""
        groups = completions.rewards.view(-1, self.group_size)
        return (groups != groups[:, :1]).any(dim=1)

    def _describe(self, completions: Completions) -> Metrics:
        """Return the means of what was sampled."""
        trajectories = completions.trajectories
        parts = {f"rewards/{name}": float(values.nanmean()) for name, values in completions.components.items()}
        return {
            "return": float(completions.rewards.mean()),
            **parts,
            "length": float(trajectories.lengths.float().mean()),
            "unfinished": float(trajectories.truncated.any(dim=1).float().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """How many batches of prompts have been drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the next batch of prompts."""
        self._drawn = state["drawn"]


def writing(policy: Policy) -> LanguagePolicy:
    """Return the policy, if it is one that completes prompts.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(policy, LanguagePolicy):
        raise TypeError(f"prompts need a policy that writes, not {type(policy).__name__}")
    return policy
