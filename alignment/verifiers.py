r"""Programs that judge completions: whether the final answer is right, a letter chosen, a format kept, a length.

A verifier rewards what it was told to, not what was meant. So an answer counts only outside the thoughts, the last one
counts where there are several, and an expression is no answer where a number is asked for, since repeating
"what is 6 × 7?" would be one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from aligngym.alignment.exact_arithmetic import NUMBER, exact_value
from aligngym.alignment.rewards import Text, completion_text

_ANSWER_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_PHRASE = re.compile(
    r"\banswer[*_]*[ \t]*(?:(?:is|are|was|would be|equals)\b|:|=)[ \t]*:?[*_]*\s*(?=\S)", re.IGNORECASE
)
#: A number that begins an answer in words, and to which no alternative follows.
_LEADING = re.compile(rf"[*_(\\$]*(?P<number>(?>{NUMBER}))(?!\s*(?:(?:or|and|to)\b|[-+*/^:,]\s*\S))")


#: What may stand before the letter of an option.
_OPENING = r"[\s*_(\[{\"'$]*(?:(?i:option|choice)\s+)?\(?"


def final_answer(completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
    r"""Reward 1 where the final answer of a completion equals the column ``answer``, otherwise 0.

    Args:
        completions: to be judged; see :func:`extract_final_answer`.
        answer: what is right, compared by :func:`same_answer`: text or a number; a list of several that are; a worked
            solution that ends in ``#### 42`` or ``\boxed{42}``; or ``None``, to which the reward does not apply.
    """
    return [_judged(completion, right) for completion, right in zip(completions, answer, strict=True)]


def _judged(completion: Text, right: Any) -> float | None:
    if right is None:
        return None
    claim = extract_final_answer(completion_text(completion))
    if claim is None:
        return 0.0
    several = right if isinstance(right, (list, tuple)) else [right]
    return float(any(same_answer(claim, _marked(str(reference)) or str(reference)) for reference in several))


def extract_final_answer(text: str) -> str | None:
    r"""Return what a text gives as its final answer, ``None`` if it gives none.

    Looked for in this order, the last of its kind: ``<answer>…</answer>``, ``\boxed{…}``, ``#### …``, "the answer is
    …", and failing these the last number. Thoughts, up to ``</think>``, do not count; those not ended hide all the
    rest.
    """
    text = _without_thoughts(text)
    explicit = _explicit(text)
    if explicit is not None:
        return explicit or None
    numbers = re.findall(NUMBER, text)
    return numbers[-1].strip() if numbers else None


def same_answer(claim: str, reference: str) -> bool:
    """Return whether two answers are the same: as numbers, exactly, or else as text.

    Numbers may be written in any of the ways that :func:`exact_value` knows: 1/2 equals 0.5, but 0.333 is not 1/3.
    Where only one of them has a percent sign it may be a unit like any other: 25% equals 0.25, and 25. Text is
    compared without case, spaces, and the punctuation and mark-up around it.
    """
    if _plain(claim) == _plain(reference):
        return True
    right = exact_value(reference)
    # Where the reference is an expression itself, its value is not what was asked for.
    found = exact_value(claim, worked_out=exact_value(reference, worked_out=True) is not None)
    if right is None or found is None:
        return False
    percents = [bool(re.search(r"%|\bpercent\b", text)) for text in (claim, reference)]
    if percents[0] != percents[1] and (100 * found == right if percents[0] else found == 100 * right):
        return True
    return found == right


def multiple_choice(completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Reward 1 where the letter chosen is the one in the column ``answer``, otherwise 0; ``None`` does not apply.

    Raises:
        ValueError: if an answer is no letter, alone or as ``(B)``.
    """
    rewards: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        letter = re.fullmatch(r"\s*\(?([A-Za-z])[).]?\s*", str(right))
        if right is not None and letter is None:
            raise ValueError(f"the answer {right!r} is no letter such as B")
        chosen = extract_choice(completion_text(completion))
        rewards.append(None if letter is None or right is None else float(chosen == letter[1].upper()))
    return rewards


def extract_choice(text: str) -> str | None:
    r"""Return the letter of the option that a text chooses, A to J, ``None`` if it chooses none.

    That is the letter with which a marked answer begins (as in :func:`extract_final_answer`), or which is the whole
    text; or else the last letter written as an option: ``(B)``, or ``B.`` or ``B)`` at the beginning of a line.
    """
    text = _without_thoughts(text)
    explicit = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b", "", _explicit(text) or "")
    alone = re.fullmatch(rf"{_OPENING}([A-Ja-j])[\s*_)\]}}.\"'$]*", explicit or text)
    begun = re.match(rf"{_OPENING}([A-J])(?![\w'])(?!(?<=I)\s+[a-z])", explicit)
    chosen = alone or begun
    if chosen:
        return chosen[1].upper()
    options = re.findall(r"\(([A-J])\)|^[ \t*_]*([A-J])[.):]", text, re.MULTILINE)
    return "".join(options[-1]) if options else None


def think_format(completions: Sequence[Text], prompts: Sequence[Text] | None = None, **_: Any) -> list[float]:
    """Reward 1 for ``<think>…</think>`` and then ``<answer>…</answer>``, each once and not empty, and nothing else.

    The format of DeepSeek-R1-Zero (D. Guo et al., 2025, table 1). A prompt that is text and ends with ``<think>`` has
    begun the completion.
    """
    rewards = []
    for row, completion in enumerate(completions):
        text = completion_text(completion)
        prompt = prompts[row] if prompts is not None else ""
        if isinstance(prompt, str) and prompt.rstrip().endswith("<think>"):
            text = "<think>" + text
        once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        kept = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
        rewards.append(float(once and kept is not None and all(part.strip() for part in kept.groups())))
    return rewards


class LengthPenalty:
    """Reward −c · max(0, |y| − n): so much less for every token |y| of a completion beyond the n that are free.

    Args:
        per_token: c.
        free: n.

    Raises:
        ValueError: if either is negative, or ``per_token`` is 0.
    """

    __name__ = "length_penalty"

    def __init__(self, per_token: float = 0.001, free: int = 0) -> None:
        if not per_token > 0 or not free >= 0:
            raise ValueError(f"per_token={per_token}, free={free}: a positive penalty and 0 or more free tokens")
        self.per_token, self.free = per_token, free

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Return the penalty of each completion."""
        return [-self.per_token * max(0, len(ids) - self.free) for ids in completion_ids]


def _without_thoughts(text: str) -> str:
    after = re.split("</think>", text, flags=re.IGNORECASE)[-1]
    return re.split("<think>", after, flags=re.IGNORECASE)[0]


def _explicit(text: str) -> str | None:
    """Return what stands in answer tags, and there what is marked, or else what is marked anywhere."""
    tagged = _ANSWER_TAGS.findall(text)
    return (_marked(tagged[-1]) or tagged[-1]).strip() if tagged else _marked(text)


def _marked(text: str) -> str | None:
    r"""Return the last answer that is marked as one, by ``\boxed``, by ``####``, or in words."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    hashes = _HASHES.findall(text)
    if hashes:
        return str(hashes[-1]).strip()
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    sentence = re.split(r"\.(?:\s|$)|\n", text[phrases[-1].end() :], maxsplit=1)[0].strip()
    number = _LEADING.match(sentence) if exact_value(sentence) is None else None
    return number["number"].strip() if number else sentence


def _boxed(text: str) -> str | None:
    r"""Return what is in the ``\boxed{…}`` that begins last, whose braces may be nested; it must have an end."""
    found: tuple[int, str | None] = (-1, None)
    opened: list[tuple[int, bool]] = []
    for brace in re.finditer(r"\\f?boxed\s*\{|[{}]", text):
        if brace[0] != "}":
            opened.append((brace.end(), len(brace[0]) > 1))
        elif opened:
            start, boxed = opened.pop()
            if boxed and start > found[0]:
                found = start, text[start : brace.start()]
    return found[1]


def _plain(text: str) -> str:
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(text.split()).strip("*_`\"'“”‘’$.,:;!?")
