"""Multiple-choice questions, asked with their options in every order of a circle.

A model that favours a letter is right for the wrong reason whenever the answer happens to stand there. So every
question of n options is asked n times, its options moved on by one place each time, and counts as known only if the
answer is right in all of them: circular evaluation, Y. Liu et al., *MMBench: is your multi-modal model an all-around
player?*, 2023, section 4.3. Guessing is right in all n orders with probability n⁻ⁿ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aligngym.alignment.data import Row, pad_tokens, read_rows
from aligngym.alignment.evaluation import as_metrics, mean_with_interval
from aligngym.alignment.generation import Decoding
from aligngym.alignment.language_policy import LanguagePolicy
from aligngym.alignment.prompts import Problems
from aligngym.alignment.verifiers import extract_choice
from aligngym.core.randomness import evaluating
from aligngym.core.statistics import Estimate
from aligngym.core.trajectories import PADDING, Trajectories

LETTERS = "ABCDEFGHIJ"

#: What a conversation asks for, and how a plain text leaves the letter to be written.
INSTRUCTION, OPENING = "Answer with the letter of the right option.", "Answer:"

#: Tokens that a letter may have.
LETTER_ROOM = 4


@dataclass(frozen=True)
class Question:
    """A question, its options, and which of them is right.

    Attributes:
        question: text.
        choices: two to ten texts.
        answer: the index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def rotated(self, places: int) -> Question:
        """Return the same question with its options moved up by so many places, in a circle."""
        count = len(self.choices)
        moved = tuple(self.choices[(place + places) % count] for place in range(count))
        return Question(self.question, moved, (self.answer - places) % count)

    def prompt(self, conversation: bool, system_prompt: str | None = None) -> Row:
        """Return a row with the prompt that asks it: messages, or a plain text whose next word is the letter."""
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        text = f"{self.question}\n\n{options}\n\n{INSTRUCTION if conversation else OPENING}"
        if not conversation:
            return {"prompt": text}
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        return {"prompt": [*system, {"role": "user", "content": text}]}


def load_questions(source: str | Path) -> list[Question]:
    """Read rows with ``question``, ``choices`` (a list of texts), and ``answer``, an index from 0 or a letter.

    Args:
        source: as in :func:`~aligngym.alignment.load_preferences`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, has no rows, or a row is no such question.
    """
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source}: no rows")
    return [as_question(row, f"{source}, row {number}") for number, row in enumerate(rows, start=1)]


def as_question(row: Row, place: str) -> Question:
    """Return a row as a question.

    Args:
        row: its columns.
        place: where it stands, for errors.

    Raises:
        ValueError: if it is none.
    """
    for column in ("question", "choices", "answer"):
        if column not in row:
            raise ValueError(f"{place}: no column {column!r} (it has {', '.join(map(repr, row))})")
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: question is {question!r}, and should be text")
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{place}: choices is {choices!r}, and should be a list of two to {len(LETTERS)} options")
    options = tuple(str(choice) for choice in choices)
    if len(set(options)) < len(options):
        raise ValueError(f"{place}: two of the choices {list(options)} are the same")
    index = answer
    if isinstance(answer, str) and len(answer.strip()) == 1:
        letter = answer.strip().upper()
        index = int(letter) if letter.isdecimal() else LETTERS.find(letter)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(options):
        raise ValueError(
            f"{place}: answer is {answer!r}, and should be an index from 0 to {len(options) - 1} or a letter from A to "
            f"{LETTERS[len(options) - 1]}"
        )
    return Question(question, options, index)


@dataclass(frozen=True)
class ChoiceEvaluation:
    """What was chosen, and how often it was right, with 95 % intervals.

    Attributes:
        right: for every question, whether the answer was right, once for each order of its options.
        chosen: how often each letter was chosen; ``"none"`` counts texts that choose no option.
        correct: how often each letter stood before the right option.
    """

    right: list[list[bool]]
    chosen: dict[str, int]
    correct: dict[str, int]

    @property
    def circular_accuracy(self) -> Estimate:
        """The share of questions answered rightly in every order of their options; Wilson's interval."""
        return mean_with_interval([float(all(orders)) for orders in self.right])

    @property
    def accuracy(self) -> Estimate:
        """The share of right answers over all orders; the interval is over questions."""
        return mean_with_interval([sum(orders) / len(orders) for orders in self.right])

    @property
    def position_bias(self) -> float:
        """½ Σ |share of answers with a letter − share that ought to have it|: 0 without bias, near 1 for one letter."""
        asked = sum(self.correct.values())
        letters = self.chosen.keys() | self.correct.keys()
        return sum(abs(self.chosen.get(x, 0) - self.correct.get(x, 0)) for x in letters) / (2 * asked)

    @property
    def metrics(self) -> dict[str, float]:
        """Every number by name: the accuracies with the ends of their intervals, the bias, the share of each letter."""
        asked = sum(self.correct.values())
        shares = {f"chosen/{letter}": count / asked for letter, count in self.chosen.items()}
        accuracies = {"circular_accuracy": self.circular_accuracy, "accuracy": self.accuracy}
        return as_metrics(accuracies) | {"position_bias": self.position_bias} | shares


def evaluate_choices(
    policy: LanguagePolicy,
    questions: Sequence[Question],
    *,
    by: str = "log_probs",
    circular: bool = True,
    reference: bool = False,
    conversation: bool | None = None,
    system_prompt: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    **decoding: Any,
) -> ChoiceEvaluation:
    """Ask questions with their options in every order, and count right answers and letters.

    Args:
        policy: to be judged.
        questions: at least one.
        by: ``"log_probs"`` takes the letter that is the most probable beginning of an answer, and writes nothing;
            ``"text"`` reads the letter from a greedy completion
            (:func:`~aligngym.alignment.verifiers.extract_choice`), which may think first.
        circular: whether to ask in every order; otherwise only in the one given, and both accuracies are the same.
        reference: whether to ask the reference instead of the policy.
        conversation: whether to ask by messages in the chat template; by default, if the tokenizer has one.
        system_prompt: a message before each conversation.
        batch_size: prompts read together.
        seed: of samples, for ``by="text"`` with ``greedy=False``.
        decoding: of :class:`~aligngym.alignment.generation.Decoding`, for ``by="text"``.

    Raises:
        ValueError: without questions, for another ``by`` or options that it has no use for, or if a prompt is longer
            than the model's context.
    """
    if not questions:
        raise ValueError("there are no questions")
    if by not in ("log_probs", "text"):
        raise ValueError(f"by={by!r}: 'log_probs' or 'text'")
    if by == "log_probs" and decoding:
        raise ValueError(f"{', '.join(decoding)}: nothing is written where log-probabilities choose; take by='text'")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, not {batch_size}")
    if conversation is None:
        conversation = bool(policy.tokenizer.chat_template)
    if system_prompt is not None and not conversation:
        raise ValueError("a system prompt goes before messages, and the questions are plain text")
    orders = [len(question.choices) if circular else 1 for question in questions]
    asked = [each.rotated(place) for each, count in zip(questions, orders, strict=True) for place in range(count)]
    rows = [question.prompt(conversation, system_prompt) for question in asked]
    room = decoding.get("max_new_tokens", Decoding.max_new_tokens) if by == "text" else LETTER_ROOM
    problems = Problems.of(rows, policy.tokenizer, room, policy.context_length)
    if by == "text":
        options = {"greedy": True, **decoding, "reference": reference, "rows_at_once": batch_size, "seed": seed}
        letters = _written_letters(policy, problems, options)
    else:
        letters = _probable_letters(policy, problems, asked, reference, batch_size)
    return _counted(asked, letters, orders)


def _counted(asked: Sequence[Question], letters: Sequence[str], orders: Sequence[int]) -> ChoiceEvaluation:
    """Count what was chosen where ``asked`` has ``orders[i]`` rows of the i-th question."""
    known = LETTERS[: max(len(question.choices) for question in asked)]
    chosen, correct = dict.fromkeys([*known, "none"], 0), dict.fromkeys(known, 0)
    answers = []
    for question, letter in zip(asked, letters, strict=True):
        expected = LETTERS[question.answer]
        chosen[letter if letter in LETTERS[: len(question.choices)] else "none"] += 1
        correct[expected] += 1
        answers.append(letter == expected)
    remaining = iter(answers)
    return ChoiceEvaluation([[next(remaining) for _ in range(count)] for count in orders], chosen, correct)


@torch.no_grad()
def _probable_letters(
    policy: LanguagePolicy, problems: Problems, asked: Sequence[Question], reference: bool, batch_size: int
) -> list[str]:
    """Return the letter that is most probable after each prompt: letters are completions that share their prompt."""
    chosen: list[str] = []
    with evaluating(policy):
        for start in range(0, len(asked), batch_size):
            numbers = range(start, min(start + batch_size, len(asked)))
            counts = [len(asked[number].choices) for number in numbers]
            actions = pad_tokens(
                [
                    letter
                    for number in numbers
                    for letter in letter_tokens(problems.rows[number], len(asked[number].choices), policy.tokenizer)
                ]
            ).to(policy.device)
            group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            prompts = pad_tokens([problems.tokens[number] for number in numbers], side="left")
            rows = Trajectories(
                prompts[group].to(policy.device), actions, actions != PADDING, group=group.to(policy.device)
            )
            log_probs = policy.reference_log_probs(rows) if reference else policy(rows).log_probs
            for scores in log_probs.sum(dim=1).split(counts):
                chosen.append(LETTERS[int(scores.argmax())])
    return chosen


def letter_tokens(row: Row, count: int, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Return the tokens of the first ``count`` letters as they follow a prompt.

    In a conversation an answer begins with the letter; after a plain text stands a space, and what the tokenizer makes
    of both together is cut behind the prompt.

    Raises:
        ValueError: if the tokenizer does not tell letters apart.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        before = len(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]
        found = [tokenizer(f"{prompt} {letter}")["input_ids"][before:] for letter in LETTERS[:count]]  # type: ignore[index]
    else:
        found = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in LETTERS[:count]]
    if len({tuple(tokens) for tokens in found}) < count or not all(found):
        raise ValueError(f"the tokenizer does not tell the letters {', '.join(LETTERS[:count])} apart: take by='text'")
    return [torch.tensor(tokens) for tokens in found]


def _written_letters(policy: LanguagePolicy, problems: Problems, options: dict[str, Any]) -> list[str]:
    """Return the letter that each prompt's completion chooses, or "none"."""
    rows = policy.generate(problems.tokens, **options)
    ids = [actions[mask].tolist() for actions, mask in zip(rows.actions, rows.mask, strict=True)]
    texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [extract_choice(text) or "none" for text in texts]


def chance(questions: Sequence[Question]) -> tuple[float, float]:
    """Return the accuracy and the circular accuracy of guessing: the means of 1/n and of n⁻ⁿ."""
    counts = [len(question.choices) for question in questions]
    return math.fsum(1 / n for n in counts) / len(counts), math.fsum(n**-n for n in counts) / len(counts)
