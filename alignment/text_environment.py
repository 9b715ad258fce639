"""Text environments as tasks of a language model: episodes of several turns, in which only its own tokens train."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from transformers import PreTrainedTokenizerBase

from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.text_turns import Conversation, TurnFormat, rows_of, speaking
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Trajectories

#: Takes the contexts of the running episodes, their last observations and the number of the turn; gives each answer's
#: tokens and their log-probabilities.
Answers = Callable[[list[Conversation], list[str], int], list[tuple[list[int], list[float]]]]


class TextEnvironmentSampler(Sampler):
    """Whole episodes of a language model in an environment of text, in groups that share a start.

    An episode is one row: the tokens of the first prompt are its observations, and all that follow its actions, the
    model's with a true mask and the environment's, with those of the chat template, with a false one. A turn's reward
    stands at the model's last token of it, and so does the end of the episode. Every sample begins anew, and episodes
    of a group are reset with the same seed, as in :class:`aligngym.agents.EpisodeSampler`, whose seeds these are too.

    All running episodes answer at once in each turn. ``metrics`` are means over episodes: ``return``, ``length`` in
    turns, ``tokens`` of the model's own, ``truncated``, and, where the environment's infos say ``invalid`` and
    ``is_success``, the share of ``invalid`` answers and the ``success`` rate.

    Args:
        env: an environment whose observations and actions are :class:`gymnasium.spaces.Text`, a function that makes
            one, or its registered name; copies are made of it.
        tokenizer: the policy's.
        episodes: B, in one sample.
        group_size: episodes that share a start; must divide ``episodes``.
        max_turns: episodes with more turns are truncated; ``None`` trusts the environment to end them.
        max_new_tokens: of one answer.
        max_length: tokens of an episode in all, at most; an episode without room for another answer is truncated, with
            a warning and a metric ``overflow``. By default what the model has positions for.
        system_prompt: said before everything else.
        template_options: given to the chat template.
        decoding: further arguments of :meth:`LanguagePolicy.generate`: ``greedy=True`` to evaluate, ``stop``, …

    Raises:
        TypeError: for an environment without text, or one that does not show what its space promises.
        ValueError: for sizes that do not fit, or a chat template that cannot be extended turn by turn.
    """

    def __init__(
        self,
        env: str | gymnasium.Env[str, str] | Callable[[], gymnasium.Env[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        episodes: int = 16,
        group_size: int = 1,
        max_turns: int | None = None,
        max_new_tokens: int = 16,
        max_length: int | None = None,
        system_prompt: str | None = None,
        template_options: dict[str, Any] | None = None,
        **decoding: Any,
    ) -> None:
        if group_size < 1 or episodes < 1 or episodes % group_size:
            raise ValueError(f"{episodes} episodes do not divide into groups of {group_size}")
        for name, number in (("max_turns", max_turns), ("max_new_tokens", max_new_tokens), ("max_length", max_length)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is at least 1, not {number}")
        self.env = _made(env)
        self.format = TurnFormat(tokenizer, system_prompt, **template_options or {})
        self.copies = [copy.deepcopy(self.env) for _ in range(episodes)]
        self.episodes, self.group_size, self.max_turns = episodes, group_size, max_turns
        self.max_new_tokens, self.max_length = max_new_tokens, max_length
        self.decoding = decoding
        self.metrics: Metrics = {}

    def sample(self, policy: Policy, seed: int) -> Trajectories:
        policy = speaking(policy)

        def answers(running: list[Conversation], _: list[str], turn: int) -> list[tuple[list[int], list[float]]]:
            contexts = [conversation.context for conversation in running]
            options = {"max_new_tokens": self.max_new_tokens, "seed": derived_seed(seed, turn), **self.decoding}
            rows = policy.generate(contexts, **options).to("cpu")
            return [
                (tokens[mask].tolist(), log_probs[mask].tolist())
                for tokens, log_probs, mask in zip(rows.actions, rows.log_probs, rows.mask, strict=True)
            ]

        return self._play(policy, answers, seed)

    def demonstrations(self, policy: LanguagePolicy, act: Callable[[str], str], seed: int) -> Trajectories:
        """Let somebody else play, and return what the policy would have had to write, for behaviour cloning.

        Args:
            policy: whose tokens the answers become; it does not act.
            act: gives an answer for an observation.
            seed: of the episodes' starts.

        Raises:
            ValueError: if an answer is empty or longer than ``max_new_tokens``.
        """
        policy = speaking(policy)
        closing = self.format.closing(policy.end_tokens)

        def answers(_: list[Conversation], observations: list[str], turn: int) -> list[tuple[list[int], list[float]]]:
            said = []
            for text in map(act, observations):
                tokens = list(self.format.tokenizer(text, add_special_tokens=False)["input_ids"])
                if not 0 < len(tokens) <= self.max_new_tokens:
                    raise ValueError(
                        f"turn {turn + 1}: the answer {text!r} has {len(tokens)} tokens, not 1 … "
                        f"{self.max_new_tokens}: raise max_new_tokens"
                    )
                tokens = (tokens + closing)[: self.max_new_tokens]
                said.append((tokens, [0.0] * len(tokens)))
            return said

        rows = self._play(policy, answers, seed)
        rows.log_probs = None  # type: ignore[assignment]  # Nobody knows with what probability they were said.
        return rows

    def _play(self, policy: LanguagePolicy, answers: Answers, seed: int) -> Trajectories:
        groups = self.episodes // self.group_size
        seeds = np.random.SeedSequence(seed).generate_state(groups) >> 1
        group = torch.arange(groups).repeat_interleave(self.group_size)
        limit = (policy.context_length or math.inf) if self.max_length is None else self.max_length
        episodes = [
            _Episode(env, int(seeds[number]), self, policy.end_tokens, limit)
            for env, number in zip(self.copies, group.tolist(), strict=True)
        ]
        self._check_groups(episodes)
        for turn in itertools.count():
            running = [episode for episode in episodes if not episode.over]
            if not running:
                break
            said = answers([e.conversation for e in running], [e.observation for e in running], turn)
            for episode, (tokens, log_probs) in zip(running, said, strict=True):
                episode.answer(tokens, log_probs)
        rows = rows_of([e.conversation for e in episodes], [e.terminated for e in episodes], group)
        self.metrics = self._describe(episodes, rows)
        return rows.to(policy.device)

    def _check_groups(self, episodes: list[_Episode]) -> None:
        for number, episode in enumerate(episodes):
            first = episodes[number - number % self.group_size]
            if episode.conversation.prompt != first.conversation.prompt:
                raise ValueError(
                    f"two episodes of one group were reset with the same seed and began with {first.observation!r} and "
                    f"{episode.observation!r}: the environment does not draw its starts from np_random"
                )

    def _describe(self, episodes: list[_Episode], rows: Trajectories) -> Metrics:
        turns = sum(episode.turns for episode in episodes)
        metrics = {
            "return": float(rows.returns.mean()),
            "length": turns / len(episodes),
            "tokens": float(rows.lengths.float().mean()),
            "truncated": float(np.mean([not episode.terminated for episode in episodes])),
        }
        infos = [info for episode in episodes for info in episode.infos]
        if all("invalid" in info for info in infos):
            metrics["invalid"] = sum(bool(info["invalid"]) for info in infos) / turns
        if all("is_success" in info for info in infos):
            metrics["success"] = float(np.mean([bool(episode.infos[-1]["is_success"]) for episode in episodes]))
        overflow = float(np.mean([episode.overflow for episode in episodes]))
        if overflow:
            metrics["overflow"] = overflow
            warnings.warn(
                f"{overflow:.0%} of the episodes were truncated, because another turn would not have fitted into "
                f"{episodes[0].limit} tokens: shorten observations, or lower max_turns or max_new_tokens",
                stacklevel=4,
            )
        return metrics


class _Episode:
    """One episode: an environment, and what was said in it."""

    def __init__(
        self, env: gymnasium.Env[str, str], seed: int, task: TextEnvironmentSampler, ends: list[int], limit: float
    ) -> None:
        self.env, self.task, self.ends, self.limit = env, task, ends, limit
        self.observation, _ = env.reset(seed=seed)
        self.conversation = Conversation(task.format.first(self.observation))
        if self._full(self.conversation.prompt):
            raise ValueError(
                f"the first prompt has {len(self.conversation)} tokens, which leaves no room for an answer of "
                f"{task.max_new_tokens} tokens within {limit}: {self.observation[:80]!r} …"
            )
        self.turns, self.infos = 0, list[dict[str, Any]]()
        self.terminated = self.truncated = self.overflow = False

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.terminated or self.truncated

    def answer(self, tokens: list[int], log_probs: list[float]) -> None:
        """Say something, and hear what the environment says to it."""
        task, conversation = self.task, self.conversation
        self.turns += 1
        text = task.format.text(tokens)
        self.observation, reward, terminated, truncated, info = self.env.step(text)
        self.terminated, self.truncated = bool(terminated), bool(truncated) or self.turns == task.max_turns
        if not math.isfinite(reward):
            raise FloatingPointError(f"turn {self.turns}: the environment paid {reward} for {text!r}")
        self.infos.append(info)
        conversation.add(tokens, log_probs)
        conversation.rewards[-1] = float(reward)
        if self.over:
            return
        reply = task.format.reply(self.observation, tokens, self.ends)
        self.truncated = self.overflow = self._full(reply, after=len(conversation))
        if not self.over:
            conversation.add(reply)

    def _full(self, tokens: Sequence[int], after: int = 0) -> bool:
        return after + len(tokens) + self.task.max_new_tokens > self.limit


def _made(env: str | gymnasium.Env[str, str] | Callable[[], gymnasium.Env[str, str]]) -> gymnasium.Env[str, str]:
    """Return an environment, and refuse one without text."""
    made: Any = gymnasium.make(env) if isinstance(env, str) else env if isinstance(env, gymnasium.Env) else env()
    for name in ("observation_space", "action_space"):
        space = getattr(made, name, None)
        if not isinstance(space, spaces.Text):
            raise TypeError(f"the {name} of {made} is {space}, and a language model reads and writes spaces.Text")
    observation, _ = copy.deepcopy(made).reset(seed=0)
    if not isinstance(observation, str):
        raise TypeError(f"{made} showed {observation!r}, which is no text")
    return made
