"""A language model that is judged like any other agent."""

from __future__ import annotations

import math
from typing import Any

import gymnasium

from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.text_turns import Conversation, TurnFormat, speaking
from aligngym.core.randomness import derived_seed


class TextActor:
    """A language model as an actor in a text environment, for :func:`aligngym.agents.evaluate_episodes`.

    It remembers the conversation, so it must know when an episode begins; ``watching`` an environment it does::

        act = TextActor(policy, max_new_tokens=8)
        evaluate_episodes(act, act.watching(env), episodes=100)

    Playing one episode after the other is slow; a :class:`TextEnvironmentSampler` with ``greedy=True`` plays many at
    once, and its metrics are those of its episodes.

    Args:
        policy: the model.
        max_new_tokens: see :class:`TextEnvironmentSampler`, as for the remaining arguments.
        system_prompt: what was trained with.
        template_options: given to the chat template.
        greedy: whether to take the most probable tokens, instead of drawing them.
        seed: of what is drawn, for each episode and turn anew.
        decoding: further arguments of :meth:`LanguagePolicy.generate`.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        *,
        max_new_tokens: int = 16,
        system_prompt: str | None = None,
        template_options: dict[str, Any] | None = None,
        greedy: bool = True,
        seed: int = 0,
        **decoding: Any,
    ) -> None:
        self.policy = speaking(policy)
        self.format = TurnFormat(policy.tokenizer, system_prompt, **template_options or {})
        self.decoding = {"max_new_tokens": max_new_tokens, "greedy": greedy, **decoding}
        self.seed, self.episode, self.turn = seed, -1, 0
        self._said: list[int] = []
        self._conversation: Conversation | None = None

    def begin(self) -> None:
        """Forget the conversation: the next observation is the first of an episode."""
        self.episode, self.turn, self._conversation = self.episode + 1, 0, None

    def watching(self, env: gymnasium.Env[str, str]) -> gymnasium.Env[str, str]:
        """Return the environment, wrapped so that this actor begins anew with every reset."""
        return _Watched(env, self)

    def __call__(self, observation: str) -> str:
        """Return the answer to an observation.

        Raises:
            RuntimeError: if it does not know where the episode began.
            ValueError: if the conversation leaves no room for an answer.
        """
        if self.episode < 0:
            raise RuntimeError("this actor does not know where an episode begins: play in actor.watching(env)")
        if self._conversation is None:
            self._conversation = Conversation(self.format.first(observation))
        else:
            self._conversation.add(self.format.reply(observation, self._said, self.policy.end_tokens))
        if len(self._conversation) + self.decoding["max_new_tokens"] > (self.policy.context_length or math.inf):
            raise ValueError(f"turn {self.turn + 1}: no room for an answer after {len(self._conversation)} tokens")
        seed = derived_seed(self.seed, self.episode, self.turn)
        rows = self.policy.generate([self._conversation.context], seed=seed, **self.decoding)
        self._said = rows.actions[rows.mask].tolist()
        self._conversation.add(self._said, rows.log_probs[rows.mask].tolist())
        self.turn += 1
        return self.format.text(self._said)


class _Watched(gymnasium.Wrapper[str, str, str, str]):
    def __init__(self, env: gymnasium.Env[str, str], actor: TextActor) -> None:
        super().__init__(env)
        self._actor = actor

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self._actor.begin()
        return self.env.reset(seed=seed, options=options)
