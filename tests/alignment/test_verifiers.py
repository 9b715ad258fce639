"""Answers of published solutions, hand-made cases of every way to write a number, and the ways to cheat."""

import json
import os
import time
from pathlib import Path

import pytest

from aligngym.alignment.verifiers import (
    LengthPenalty,
    extract_choice,
    extract_final_answer,
    final_answer,
    multiple_choice,
    same_answer,
    think_format,
)

DATA = Path(os.environ.get("ALIGNGYM_DATA", Path(__file__).parents[3] / "shared" / "data"))


def rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestPublishedSolutions:
    """GSM8K (K. Cobbe et al., 2021), whose labels were made by people."""

    @pytest.mark.parametrize(("name", "size"), [("train", 2000), ("eval", 200)])
    def test_every_solution_has_its_answer(self, name, size):
        problems = rows(f"gsm8k_problems_{name}.jsonl")
        assert len(problems) == size
        solutions, answers = [row["solution"] for row in problems], [row["answer"] for row in problems]
        assert final_answer(solutions, answers) == [1.0] * size
        # Where nothing marks it the last number is right, but for three texts that say before what "the answer" to a
        # part of the problem is. Whole solutions serve as references.
        unmarked = final_answer([text.replace("####", "So") for text in solutions], answers)
        assert sum(unmarked) == {2000: 1997, 200: 200}[size]
        assert final_answer([f"so \\boxed{{{answer}}}" for answer in answers], solutions) == [1.0] * size
        # Another problem's answer is wrong, unless it is the same.
        others = answers[1:] + answers[:1]
        expected = [float(a.replace(",", "") == b.replace(",", "")) for a, b in zip(answers, others, strict=True)]
        assert final_answer(solutions, others) == expected

    @pytest.mark.parametrize(("name", "size"), [("train", 500), ("eval", 100)])
    def test_chosen_answers_are_right_and_rejected_ones_wrong(self, name, size):
        pairs = rows(f"gsm8k_preferences_{name}.jsonl")
        assert len(pairs) == size
        answers = [row["chosen"][0]["content"].rpartition("A:")[2] for row in pairs]
        assert final_answer([row["chosen"] for row in pairs], answers) == [1.0] * size
        assert final_answer([row["rejected"] for row in pairs], answers) == [0.0] * size

    def test_the_labels_of_both_files_agree(self):
        """The pairs carry no label; where a problem is in the other file, its label judges them."""
        known = {
            row["prompt"][0]["content"]: row["answer"]
            for name in ("train", "eval")
            for row in rows(f"gsm8k_problems_{name}.jsonl")
        }
        pairs = [
            row
            for name in ("train", "eval")
            for row in rows(f"gsm8k_preferences_{name}.jsonl")
            if row["prompt"][0]["content"] in known
        ]
        assert len(pairs) == 85
        answers = [known[row["prompt"][0]["content"]] for row in pairs]
        assert final_answer([row["chosen"] for row in pairs], answers) == [1.0] * 85
        assert final_answer([row["rejected"] for row in pairs], answers) == [0.0] * 85


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 + 5 = 10\n#### 42", "42"),
        ("#### 41\nno:\n####   1,234.50  \n", "1,234.50"),
        (r"so \boxed{\frac{1}{\sqrt{2}}} it is", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{3} and then \boxed {4}", "4"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"#### 3, or \boxed{4}", "4"),
        (r"\boxed{1} <answer> 2 </answer> \boxed{3} #### 4", "2"),
        ("<answer>1</answer><ANSWER>\n2\n</ANSWER>", "2"),
        (r"<answer>It is \boxed{7}, as 3 + 4.</answer>", "7"),
        ("<answer>The answer is 12.</answer>", "12"),
        ("<answer> </answer> 5", None),
        ("The answer is 42.", "42"),
        ("So the final answer is: 3.5 hours per day, roughly. I took 2 steps.", "3.5"),
        ("**Answer:** Paris", "Paris"),
        ("The answer is 42 because 6*7=41.", "42"),
        ("The answer is 41 or 42", "41 or 42"),
        ("The answer would be\n\n**Rome**", "**Rome**"),
        ("The answer isn't 5. The answer is not 5, the answer is 6", "6"),
        ("the answer is", None),
        (r"\boxed{\boxed{5}} }", "5"),
        (r"\boxed{\{1, {2}\}}", r"\{1, {2}\}"),
        ("<answer>1<answer>2</answer>", "2"),
        ("It costs $18.", "$18"),
        ("310-250 = <<310-250=60>>60 miles per day.", "60"),
        ("9-5", "5"),
        ("x is -5", "-5"),
        ("about 3 million people", "3 million"),
        ("so it is 25%.", "25%"),
        ("we find 1 1/2", "1 1/2"),
        (r"so $x = -\frac{1}{2}$.", r"-\frac{1}{2}"),
        ("v = .5", ".5"),
        ("nothing", None),
        ("", None),
        ("<think>it is 3\n#### 3</think>\n#### 4", "4"),
        ("it is 3\n#### 3</think>", None),
        ("<think>#### 3", None),
        ("4 <think> 5", "4"),
    ],
)
def test_what_a_text_gives_as_its_answer(text, answer):
    assert extract_final_answer(text) == answer


@pytest.mark.parametrize(
    "piece", [r"\boxed{", "<answer>", "answer is ", "#### ", "1 ", "1", r"\frac{", "1,", "{", "<think>"]
)
def test_endless_repetition_is_judged_fast(piece):
    start = time.perf_counter()
    final_answer([piece * 20_000], ["1"])
    multiple_choice([piece * 20_000], ["A"])
    assert time.perf_counter() - start < 2


SAME = [
    ("42", "42.0"),
    ("042", "42"),
    ("$1,234.50", "1234.5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("−5", "-5"),
    ("18 dollars", "18"),
    ("**18** ", "18"),
    (r"18\text{ cm}^2", "18 m"),
    ("5 km/h", "5"),
    ("90^\\circ", "90"),
    ("1/2", "0.5"),
    (r"$\dfrac{1}{2}$", ".5"),
    (r"\frac12", "2/4"),
    (r"-3\frac{1}{2}", "-3.5"),
    ("3½", "7/2"),
    ("1 1/2", "1.5"),
    ("25%", "1/4"),
    (r"25\%", "25"),
    ("25", "25 percent"),
    ("0.25", "25%"),
    ("1.5e3", "1500"),
    (r"1.5 \times 10^{3}", "1,500"),
    ("1.5 × 10⁻³", "1.5e-3"),
    ("2 million", "2,000,000"),
    ("x = 5", "5"),
    ("2 + 3 = 5", "5"),
    ("0.1", "1/10"),
    ("paris.", "Paris"),
    ("New\n York", "new york"),
    (r"\text{yes}", "Yes"),
    ("x+1", "x + 1"),
    ("", ""),
    ("(1, 2)", "(1,2)"),
    # The reference is an expression, so its value is not the question.
    ("42", "6 × 7"),
    ("6*7", "2*21"),
    ("２", "2"),
]
DIFFERENT = [
    ("41", "42"),
    ("4", "42"),
    ("-42", "42"),
    ("0.333", "1/3"),
    ("25%", "2.5"),
    ("250%", "25%"),
    ("25", "0.25"),
    ("2.5", "250"),
    ("42 million", "42"),
    ("5k", "5"),
    ("5x", "5"),
    ("5 x", "5"),
    ("5 or more", "5"),
    ("5 dozen", "5"),
    ("5 or 6", "5"),
    ("5 and a half", "5"),
    ("1,23", "123"),
    ("1, 2", "12"),
    ("42 43", "42"),
    ("yes", "no"),
    ("forty-two", "42"),
    ("42", "Paris"),
    ("5:30", "530"),
    # A question is no answer.
    ("6*7", "42"),
    ("6 × 7", "42"),
    ("84/2", "42"),
    (r"\frac{84}{2}", "42"),
    ("40+2", "42"),
    ("(40+2)", "42"),
    ("2^6-22", "42"),
    ("1/4+1/4", "1/2"),
    ("42/1", "42"),
]


@pytest.mark.parametrize(("claim", "reference"), SAME)
def test_the_same_answer(claim, reference):
    assert same_answer(claim, reference)
    assert final_answer([f"so \\boxed{{{claim}}}"], [reference]) == [float(bool(claim.strip()))]


@pytest.mark.parametrize(("claim", "reference"), DIFFERENT)
def test_another_answer(claim, reference):
    assert not same_answer(claim, reference)
    assert final_answer([f"#### {claim}"], [reference]) == [0.0]


def test_references_of_every_kind():
    """Numbers, several that are right, worked solutions, and none."""
    completions = [[{"role": "assistant", "content": "#### 7"}]] * 6
    answers = [7, 7.0, ["x", "7"], "3 + 4\n#### 7", r"thus \boxed{7}", None]
    assert final_answer(completions, answers) == [1, 1, 1, 1, 1, None]
    assert final_answer(["none", "#### 8"], [["7", "8"], ["7", "8"]]) == [0, 1]


def test_agreement_with_math_verify():
    math_verify = pytest.importorskip("math_verify")
    cases = [("42", "42"), ("1/2", "0.5"), (r"\frac{3}{4}", "0.75"), ("41", "42"), ("1,000", "1000"), ("-5", "5")]
    for claim, reference in cases:
        parsed = [math_verify.parse(f"${text}$") for text in (reference, claim)]
        assert same_answer(claim, reference) == math_verify.verify(*parsed), (claim, reference)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (b) ", "B"),
        ("**C**.", "C"),
        (r"\boxed{\text{D}}", "D"),
        ("<answer>b</answer>", "B"),
        ("The answer is B because A is wrong.", "B"),
        ("The answer is (J): water.", "J"),
        ("Answer: option C", "C"),
        ("I think it is (C), and not the (D)… no, (C).", "C"),
        ("A) water\nB) wine\nC) milk\nI take\nB) wine", "B"),
        ("A cat sat.", None),
        ("The answer is Brussels.", None),
        ("The answer is I think nothing.", None),
        ("<think>(A)</think> (B)", "B"),
        ("<think>(A)", None),
        ("", None),
    ],
)
def test_the_letter_chosen(text, letter):
    assert extract_choice(text) == letter


def test_multiple_choice():
    completions = ["The answer is B.", "(C)", "A", "hm", "B"]
    assert multiple_choice(completions, ["b", "(C)", "D.", "A", None]) == [1, 1, 0, 0, None]
    with pytest.raises(ValueError, match="answer 1 is no letter"):
        multiple_choice(["A"], [1])


GOOD = "<think>a\nb</think>\n<answer>c</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 1),
        (f"\n {GOOD} \n", 1),
        (GOOD + "!", 0),
        ("So: " + GOOD, 0),
        (GOOD + GOOD, 0),
        ("<think>a</think>", 0),
        ("<answer>c</answer>", 0),
        ("<answer>c</answer><think>a</think>", 0),
        ("<think>a<answer>c</answer></think>", 0),
        ("<think>a<think>b</think><answer>c</answer>", 0),
        ("<think>a</think><answer>b<answer>c</answer>", 0),
        ("<think>a</think><answer>c", 0),
        ("<think> </think><answer>c</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think> and <answer>c</answer>", 0),
        (GOOD.removeprefix("<think>"), 0),
    ],
)
def test_think_format(text, reward):
    assert think_format([text]) == [reward]
    assert think_format([[{"role": "assistant", "content": text}]], prompts=[[{"role": "user"}]]) == [reward]
    assert think_format([text], prompts=["Why?"]) == [reward]


def test_a_prompt_may_have_begun_the_thoughts():
    assert think_format([GOOD.removeprefix("<think>"), GOOD], prompts=["Why? <think>\n"] * 2) == [1, 0]


def test_length_penalty():
    penalty = LengthPenalty(per_token=0.25, free=2)
    assert penalty(completion_ids=[[], [1, 1], [1] * 3, [1] * 10]) == [0, 0, -0.25, -2]
    for wrong in ({"per_token": 0}, {"per_token": -1}, {"free": -1}, {"per_token": float("nan")}):
        with pytest.raises(ValueError, match="a positive penalty"):
            LengthPenalty(**wrong)
