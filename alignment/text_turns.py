"""Conversations as tokens: what a model wrote stays as it wrote it, and what others say goes in between."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from aligngym.alignment.data import pad_tokens
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.core.policy import Policy
from aligngym.core.trajectories import Trajectories

#: Stands for an answer where a template is asked what follows one.
ANSWER = "answer"


class TurnFormat:
    """What a model reads before its first answer, and between two answers.

    With a chat template observations are messages of the user and answers those of the assistant. Without one,
    observations and answers are lines: ``system_prompt ⏎ observation ⏎ answer ⏎ observation ⏎ answer …``.

    Earlier answers are never tokenised again: their text may have other tokens than the model wrote, or the template
    another form for it. Only what stands between two answers is, and that does not depend on them.

    Args:
        tokenizer: with or without a chat template.
        system_prompt: said before everything else.
        template_options: given to the chat template, such as ``enable_thinking``.

    Raises:
        ValueError: if the template writes a conversation anew with every turn, instead of adding to what it wrote.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None, **template_options: Any
    ) -> None:
        self.tokenizer, self.system_prompt, self.template_options = tokenizer, system_prompt, template_options
        self.has_template = bool(tokenizer.chat_template)
        if self.has_template:
            self._check_that_it_extends()

    def first(self, observation: str) -> list[int]:
        """Return the tokens before the first answer."""
        if self.has_template:
            return self._tokens(self._rendered(observation), add_special_tokens=False)
        begin = "" if self.system_prompt is None else f"{self.system_prompt}\n"
        return self._tokens(f"{begin}{observation}\n")

    def reply(self, observation: str, said: Sequence[int], ends: Collection[int]) -> list[int]:
        """Return the tokens between an answer and the next one.

        Args:
            observation: what is said in between.
            said: the tokens of the answer before it.
            ends: tokens that end an answer; the template's own is left out if the answer has one already.
        """
        tokens = self._tokens(self._between(observation), add_special_tokens=False)
        return tokens[len(self.closing(ends)) :] if self.has_template and said[-1] in ends else tokens

    def closing(self, ends: Collection[int]) -> list[int]:
        """Return the tokens with which an answer is ended.

        Raises:
            ValueError: if the template does not end an answer with one of ``ends``, so that a model that was trained on
                it would not know how to stop.
        """
        if not self.has_template:
            end = self.tokenizer.eos_token_id
            return [] if end is None else [end]
        tokens = self._tokens(self._between(""), add_special_tokens=False)
        found = [place for place, token in enumerate(tokens) if token in ends]
        if not found:
            raise ValueError(
                f"the chat template follows an answer with {self._between('')!r}, in which none of the tokens {ends} "
                "is that end an answer: give the model or the tokenizer its end-of-turn token"
            )
        return tokens[: found[0] + 1]

    def text(self, said: Sequence[int]) -> str:
        """Return the text of an answer."""
        # A blank before a full stop is what the model wrote, and may be a row of a map.
        return str(self.tokenizer.decode(list(said), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokens(self, text: str, **options: Any) -> list[int]:
        return list(self.tokenizer(text, **options)["input_ids"])

    def _rendered(self, *contents: str) -> str:
        """Return a conversation of observations and answers in turn, up to where the next answer begins."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        return str(
            self.tokenizer.apply_chat_template(
                system + messages, tokenize=False, add_generation_prompt=True, **self.template_options
            )
        )

    def _between(self, observation: str) -> str:
        if not self.has_template:
            return f"\n{observation}\n"
        return self._rendered("first", ANSWER, observation).removeprefix(self._rendered("first") + ANSWER)

    def _check_that_it_extends(self) -> None:
        begin, second = (self._rendered(*turns) for turns in (["first"], ["first", ANSWER, "second"]))
        third = self._rendered("first", ANSWER, "second", ANSWER, "third")
        extended = begin + ANSWER + self._between("second") + ANSWER + self._between("third")
        if not second.startswith(begin + ANSWER) or third != extended:
            raise ValueError(
                "the chat template does not extend a conversation: with the next turn, what it wrote before changes: "
                f"{third!r} instead of {extended!r}. Give it template options with which it does, or another template"
            )


@dataclass
class Conversation:
    """A prompt and everything that was said after it, token by token.

    Attributes:
        prompt: tokens before the first answer.
        actions: tokens after it.
        mask: which of them the model wrote.
        log_probs: their log-probabilities, 0 for the others.
        rewards: what followed each of them.
    """

    prompt: list[int]
    actions: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.actions)

    @property
    def context(self) -> Tensor:
        """All tokens so far."""
        return torch.tensor(self.prompt + self.actions)

    def add(self, tokens: Sequence[int], log_probs: Sequence[float] | None = None) -> None:
        """Add what the model wrote, with its log-probabilities, or what somebody else did, without."""
        self.actions += tokens
        self.mask += [log_probs is not None] * len(tokens)
        self.log_probs += [0.0] * len(tokens) if log_probs is None else log_probs
        self.rewards += [0.0] * len(tokens)


def rows_of(conversations: Sequence[Conversation], terminated: Sequence[bool], group: Tensor) -> Trajectories:
    """Return conversations as rows, each of which ends, terminated or truncated, with its last token."""

    def filled(values: Sequence[Sequence[Any]]) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True)

    mask = filled([conversation.mask for conversation in conversations])
    last = torch.zeros_like(mask)
    lengths = torch.tensor([len(conversation.actions) for conversation in conversations])
    last[torch.arange(len(mask)), lengths - 1] = True
    ends = torch.tensor(terminated)[:, None]
    return Trajectories(
        pad_tokens([torch.tensor(conversation.prompt) for conversation in conversations], side="left"),
        pad_tokens([torch.tensor(conversation.actions) for conversation in conversations]),
        mask,
        rewards=filled([conversation.rewards for conversation in conversations]),
        log_probs=filled([conversation.log_probs for conversation in conversations]),
        terminated=last & ends,
        truncated=last & ~ends,
        group=group,
    )


def speaking(policy: Policy) -> LanguagePolicy:
    """Return the policy, if it is a language model.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(policy, LanguagePolicy):
        raise TypeError(
            f"a text environment needs a language model, not {type(policy).__name__}: to train an agent on states "
            "there, wrap a TextGridWorld in NumberedText and sample with an EpisodeSampler"
        )
    return policy
