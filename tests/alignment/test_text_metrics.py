"""Metrics against published examples, the libraries' own numbers, and arithmetic by hand."""

import builtins
import math

import pytest

from aligngym.alignment.text_metrics import BLEU, ROUGE, ExactMatch, TokenF1, distinct_n, self_bleu, squad_normalised


def test_squad_normalisation():
    """As in the official script: lower case, then punctuation, then articles, then spaces."""
    assert squad_normalised("The  Cat's\tA-team, an\nOWL!") == "cats ateam owl"
    assert squad_normalised("theatre a.") == "theatre"
    assert squad_normalised("The the") == ""


class TestSQuAD:
    # Questions and answers of figure 1 of the paper: gravity; graupel; within a cloud.
    @pytest.mark.parametrize(
        ("text", "references", "exact", "f1"),
        [
            ("gravity", ["gravity"], 1, 1),
            ("The gravity.", ["gravity"], 1, 1),
            ("graupel", ["gravity"], 0, 0),
            ("within a cloud", ["within the cloud"], 1, 1),
            # P = 2/4, R = 2/2.
            ("collide within the big cloud", ["within a cloud"], 0, 2 / 3),
            # Of two "cloud" one is shared: P = 1/2, R = 1/2.
            ("cloud cloud", ["within cloud"], 0, 1 / 2),
            # Of three "cloud" two are shared: P = 2/3, R = 2/2.
            ("cloud cloud cloud", ["cloud cloud"], 0, 4 / 5),
            ("cloud", ["gravity", "within a cloud", "clouds"], 0, 2 / 3),
            ("cloud", ["gravity", "a cloud"], 1, 1),
            ("", ["gravity"], 0, 0),
            ("the", [""], 1, 1),
            ("cloud", ["the"], 0, 0),
        ],
    )
    def test_scores(self, text, references, exact, f1):
        assert ExactMatch().score(text, references) == exact
        assert TokenF1().score(text, references) == pytest.approx(f1)


class TestAsRewards:
    def test_references_of_every_kind(self):
        completions = ["42", [{"role": "assistant", "content": "42"}], "42", "42", "42", "42"]
        answers = ["42", 42, ["x", "42"], "41", None, []]
        assert ExactMatch()(completions, answer=answers) == [1, 1, 1, 0, None, None]

    def test_another_column(self):
        metric = TokenF1(column="summary")
        assert metric.required_columns == ("summary",)
        assert metric(["a b c"], summary=["b d"], answer=["no"]) == [pytest.approx(1 / 2)]

    @pytest.mark.parametrize(("kind", "package"), [(BLEU, "sacrebleu"), (ROUGE, "rouge_score")])
    def test_a_missing_library_says_how_to_get_it(self, kind, package, monkeypatch):
        real = builtins.__import__

        def without(name, *arguments, **options):
            if name.startswith(package):
                raise ImportError(f"no {name}")
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"pip install 'aligngym\[metrics\]'"):
            kind()


class TestBLEU:
    @pytest.fixture(autouse=True)
    def library(self):
        self.sacrebleu = pytest.importorskip("sacrebleu")

    def test_by_hand(self):
        """p_1 = 4/5, p_2 = 3/4, p_3 = 2/3, p_4 = 1/2; c = 5 and r = 6."""
        found = BLEU().score("the cat sat on it", ["the cat sat on the mat"])
        assert found == pytest.approx(math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)

    def test_counts_are_clipped(self):
        """The example of Papineni et al., section 2.1: seven times "the" gets 2/7 for single words."""
        found = BLEU().score("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"])
        # No longer n-gram is right, so those count 1/2, 1/4 and 1/8 of one: smoothing method 3.
        assert found == pytest.approx((2 / 7 * (1 / 2) / 6 * (1 / 4) / 5 * (1 / 8) / 4) ** 0.25)

    @pytest.mark.parametrize(
        ("text", "references"),
        [
            ("The dog bit the man.", ["The dog bit the man.", "The dog had bit the man."]),
            ("It wasn't surprising.", ["It was not unexpected.", "No one was surprised."]),
            ("The man had just bitten him.", ["The man had bitten the dog.", "The man bit him first."]),
            ("Yes", ["Yes, it is"]),
            ("", ["Yes"]),
            ("two words", ["two words"]),
        ],
    )
    def test_is_sacrebleus(self, text, references):
        expected = self.sacrebleu.sentence_bleu(text, references).score / 100
        assert BLEU().score(text, references) == pytest.approx(expected)
        assert 0 <= BLEU().score(text, references) <= 1

    def test_settings(self):
        assert BLEU().score("ONE two", ["one two"]) < 1
        assert BLEU(lowercase=True).score("ONE two", ["one two"]) == 1
        expected = self.sacrebleu.sentence_bleu("你好吗", ["你好"], tokenize="char").score / 100
        assert BLEU(tokenize="char").score("你好吗", ["你好"]) == pytest.approx(expected)


class TestROUGE:
    @pytest.fixture(autouse=True)
    def library(self):
        self.scorer = pytest.importorskip("rouge_score.rouge_scorer")

    def test_lins_example(self):
        """Lin 2004, section 3.1: ROUGE-2 cannot tell these apart, ROUGE-L gives 3/4 and 2/4."""
        reference = ["police killed the gunman"]
        assert ROUGE("rougeL").score("police kill the gunman", reference) == pytest.approx(3 / 4)
        assert ROUGE("rougeL").score("the gunman kill police", reference) == pytest.approx(2 / 4)
        assert ROUGE("rouge2").score("police kill the gunman", reference) == pytest.approx(1 / 3)
        assert ROUGE("rouge2").score("the gunman kill police", reference) == pytest.approx(1 / 3)
        assert ROUGE("rougeL", stemmer=True).score("police kills the gunman", reference) == 1

    def test_by_hand(self):
        """Four of six and of eight words are shared: F1 = 2·4 / (6 + 8)."""
        text, reference = "a b c d x y", "d c b a p q r s"
        assert ROUGE("rouge1").score(text, [reference]) == pytest.approx(8 / 14)
        assert ROUGE("rougeL").score(text, [reference]) == pytest.approx(2 / 14)
        assert ROUGE("rouge1").score(text, ["z", reference]) == pytest.approx(8 / 14)

    @pytest.mark.parametrize("variant", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
    def test_is_rouge_scores(self, variant):
        text, reference = "The quick brown dog\njumps on the log.", "The quick brown fox jumps\nover the lazy dog"
        expected = self.scorer.RougeScorer([variant]).score(reference, text)[variant].fmeasure
        assert 0 < expected < 1
        assert ROUGE(variant).score(text, [reference]) == pytest.approx(expected)
        assert ROUGE(variant)([text], answer=[reference]) == [pytest.approx(expected)]

    def test_no_such_variant(self):
        with pytest.raises(ValueError, match="variant='rouge-L'"):
            ROUGE("rouge-L")


class TestDiversity:
    def test_distinct_n(self):
        # Words a b a b and a b: 2 of 6. Pairs ab ba ab and ab: 2 of 4.
        assert distinct_n(["a b a b", "a b"], n=1) == pytest.approx(2 / 6)
        assert distinct_n(["a b a b", "a b"], n=2) == pytest.approx(2 / 4)
        assert distinct_n([[1, 2, 1, 2], [1, 2]], n=2) == pytest.approx(2 / 4)
        assert distinct_n(["a b", "c d"]) == 1
        assert math.isnan(distinct_n(["a", ""]))
        with pytest.raises(ValueError, match="n=0"):
            distinct_n(["a"], n=0)

    def test_self_bleu(self):
        pytest.importorskip("sacrebleu")
        same = "the cat sat on the mat"
        assert self_bleu([same] * 3) == pytest.approx(1)
        # Two are alike, the third shares nothing with them.
        other = "dogs never lie here at night"
        expected = (1 + 1 + BLEU().score(other, [same, same])) / 3
        assert self_bleu([same, same, other]) == pytest.approx(expected)
        assert self_bleu(["a b c d", "e f g h"]) < 0.1
        with pytest.raises(ValueError, match="1 texts"):
            self_bleu(["a"])
