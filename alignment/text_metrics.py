"""Text metrics as rewards: what has no gradient can still be learned from, by policy gradients.

Each compares completions with the references in a column, ``answer`` unless another is named; a value there is a text,
a list of several that are right, or ``None``, to which the reward does not apply.
"""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from aligngym.alignment.rewards import Text, completion_text


class TextMetric(ABC):
    """A reward in [0, 1] for how like its reference a completion is.

    Args:
        column: which column holds the references.
    """

    def __init__(self, column: str = "answer") -> None:
        self.column = column
        self.required_columns = (column,)

    @abstractmethod
    def score(self, text: str, references: Sequence[str]) -> float:
        """Return how like its references a text is, from 0 to 1."""

    def __call__(self, completions: Sequence[Text], **columns: Any) -> list[float | None]:
        """Return the score of each completion, ``None`` where there is no reference."""
        scores: list[float | None] = []
        for completion, right in zip(completions, columns[self.column], strict=True):
            references = list(right) if isinstance(right, (list, tuple)) else [right]
            known = [str(reference) for reference in references if reference is not None]
            scores.append(self.score(completion_text(completion), known) if known else None)
        return scores


class ExactMatch(TextMetric):
    """1 if the text is one of the references after SQuAD's normalisation, otherwise 0.

    P. Rajpurkar et al., *SQuAD: 100,000+ questions for machine comprehension of text*, 2016, section 6.1.
    """

    __name__ = "exact_match"

    def score(self, text: str, references: Sequence[str]) -> float:
        return float(any(squad_normalised(text) == squad_normalised(reference) for reference in references))


class TokenF1(TextMetric):
    """F1 = 2PR / (P + R) of the words that text and reference share, each as often as in both; the best reference's.

    P is the share of the text's words that are in the reference, R the share of the reference's that are in the text,
    after SQuAD's normalisation. P. Rajpurkar et al., 2016, section 6.1; for empty references P. Rajpurkar et al., *Know
    what you don't know*, 2018: 1 if the text is empty too, otherwise 0.
    """

    __name__ = "token_f1"

    def score(self, text: str, references: Sequence[str]) -> float:
        return max(self._f1(squad_normalised(text).split(), squad_normalised(each).split()) for each in references)

    @staticmethod
    def _f1(words: list[str], reference: list[str]) -> float:
        if not words or not reference:
            return float(words == reference)
        return 2 * (Counter(words) & Counter(reference)).total() / (len(words) + len(reference))


class BLEU(TextMetric):
    """Sentence BLEU, min(1, exp(1 − r/c)) · (Π p_n)^{1/N}, with sacrebleu's tokens and smoothing, from 0 to 1.

    p_n is the share of n-grams that are in a reference, up to N = 4 or the longest there are; c and r the lengths of
    text and reference. K. Papineni et al., *BLEU*, 2002; M. Post, *A call for clarity in reporting BLEU scores*, 2018;
    B. Chen and C. Cherry, *A systematic comparison of smoothing techniques for sentence-level BLEU*, 2014, method 3.

    Args:
        column: see :class:`TextMetric`.
        tokenize: one of sacrebleu's tokenizers.
        lowercase: whether case is ignored.

    Raises:
        ImportError: if sacrebleu is not installed.
    """

    __name__ = "bleu"

    def __init__(self, column: str = "answer", *, tokenize: str = "13a", lowercase: bool = False) -> None:
        super().__init__(column)
        try:
            from sacrebleu.metrics import BLEU as SacreBLEU
        except ImportError as error:
            raise ImportError(f"BLEU needs sacrebleu ({error}): pip install 'aligngym[metrics]'") from error
        self._bleu = SacreBLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)

    def score(self, text: str, references: Sequence[str]) -> float:
        # Rounding can leave a perfect score at 100.00000000000004.
        return min(self._bleu.sentence_score(text, references).score / 100, 1.0)


class ROUGE(TextMetric):
    """ROUGE's F1 by Google's rouge-score, the best reference's: of n-grams, or of the longest common subsequence.

    C.-Y. Lin, *ROUGE: a package for automatic evaluation of summaries*, 2004, sections 2 and 3.

    Args:
        variant: ``rouge1``, ``rouge2``, … for n-grams, ``rougeL`` for the longest common subsequence, ``rougeLsum`` for
            that of summaries whose sentences are on lines of their own.
        column: see :class:`TextMetric`.
        stemmer: whether words are reduced to their stems (Porter).

    Raises:
        ImportError: if rouge-score is not installed.
        ValueError: if there is no such variant.
    """

    __name__ = "rouge"

    def __init__(self, variant: str = "rougeL", column: str = "answer", *, stemmer: bool = False) -> None:
        super().__init__(column)
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", variant):
            raise ValueError(f"variant={variant!r}: rouge1 to rouge9, rougeL or rougeLsum")
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError(f"ROUGE needs rouge-score ({error}): pip install 'aligngym[metrics]'") from error
        self.variant = variant
        self._rouge = RougeScorer([variant], use_stemmer=stemmer)

    def score(self, text: str, references: Sequence[str]) -> float:
        return float(self._rouge.score_multi(references, text)[self.variant].fmeasure)


def squad_normalised(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, its words parted by one space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def distinct_n(texts: Sequence[str | Sequence[Hashable]], n: int = 2) -> float:
    """Return how many of all n-grams in a set of texts are distinct: 1 if none is repeated, near 0 if all are alike.

    J. Li et al., *A diversity-promoting objective function for neural conversation models*, 2016, section 5.1. It falls
    with length, so compare sets of like lengths.

    Args:
        texts: texts, whose words are parted by spaces, or sequences of tokens.
        n: how many words are counted as one.

    Returns:
        From 0 to 1; NaN if no text has n words.

    Raises:
        ValueError: if ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: 1 or more words")
    words = [text.split() if isinstance(text, str) else list(text) for text in texts]
    grams = [tuple(each[start : start + n]) for each in words for start in range(len(each) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_bleu(texts: Sequence[str], **options: Any) -> float:
    """Return the mean BLEU of each text with all others as its references: 1 if all are alike, near 0 if diverse.

    Y. Zhu et al., *Texygen: a benchmarking platform for text generation models*, 2018, section 3.2. It takes time with
    the square of the number of texts.

    Args:
        texts: two or more, commonly the completions of one prompt.
        **options: of :class:`BLEU`.

    Raises:
        ImportError: if sacrebleu is not installed.
        ValueError: if there are fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} texts: two or more are compared with each other")
    bleu = BLEU(**options)
    scores = [bleu.score(text, [*texts[:number], *texts[number + 1 :]]) for number, text in enumerate(texts)]
    return sum(scores) / len(scores)
