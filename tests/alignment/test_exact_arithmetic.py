"""Values against Python's own exact arithmetic on random expressions, and expressions that try to hang."""

import random
import time
from fractions import Fraction

import pytest

from aligngym.alignment.exact_arithmetic import exact_value


def expression(generator, depth):
    """A random expression as text, fully parenthesised, and its value by operations on fractions."""
    if depth == 0:
        number = f"{generator.randrange(100)}.{generator.randrange(100):02}"
        return number, Fraction(number)
    (left, a), (right, b) = (expression(generator, depth - 1) for _ in range(2))
    symbol = generator.choice("+-*/")
    if symbol == "/" and b == 0:
        symbol = "+"
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[symbol]
    return f"({left} {symbol} {right})", value


def test_random_expressions_are_exact():
    generator = random.Random(0)
    for depth in (0, 1, 2, 3):
        for _ in range(50):
            text, value = expression(generator, depth)
            assert exact_value(text) == value, text
            assert exact_value(text.replace("*", r"\times ").replace("/", "÷")) == value
            assert exact_value(f"x = {text}") == value
            assert (exact_value(text, worked_out=True) is None) == (depth > 0 and not is_fraction(text, value))


def is_fraction(text, value):
    return "/" in text and text.count("(") == 1 and value.denominator > 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 - 2 - 3", "-4"),
        ("1 + 2 * 3", "7"),
        ("-2^2", "-4"),
        ("2^3^2", "512"),
        ("2^{-2}", "1/4"),
        ("(1/2)^3", "1/8"),
        ("2⁻²", "1/4"),
        ("3 m²", "3"),
        (r"\frac{1+2}{\frac{1}{2}}", "6"),
        (r"\left(1 + \tfrac{1}{2}\right) \cdot 4", "6"),
        ("1e-3", "1/1000"),
        ("1,234,567.5", "2469135/2"),
        (r"12{,}000", "12000"),
        (r"12\,000", "12000"),
        ("12\u202f000", "12000"),
        ("2 thousand", "2000"),
        ("1.5 billion dollars", "1500000000"),
        ("⅔", "2/3"),
        ("30 days.", "30"),
        ("5%", "1/20"),
        ("5 % of them", "1/20"),
    ],
)
def test_notations(text, value):
    assert exact_value(text) == Fraction(value)


@pytest.mark.parametrize("text", ["6*7", "84/2", "2^10", "(1+2)", "1/2+1/2", r"\frac{4}{2}", "5*10"])
def test_what_is_not_worked_out(text):
    assert exact_value(text) is not None
    assert exact_value(text, worked_out=True) is None


@pytest.mark.parametrize("text", ["-7", "+7", "1,000", "3/4", "-3/4", "1 1/2", "1e3", "2*10^3", "10^3", "10^-3", "25%"])
def test_what_is_worked_out(text):
    assert exact_value(text, worked_out=True) == exact_value(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9^9^9^9",
        "(9^999)^999",
        "1e999999999",
        "1e401",
        "0^-1",
        "1/0",
        "4^0.5",
        "(" * 150,
        "(" * 99 + "1",
        "9" * 201,
        "1" + " aa" * 66 + "1",
        "1" + "/a" * 99,
        "\\frac{" * 33,
        "{" * 199,
        "=" * 199,
        "1," * 99,
        "__import__('os')",
        "1 if 1 else 2",
        "[1][0]",
        "(1)(2)",
        "1_000",
        "1j",
        "True",
        "!1",
        "5 % 3",
        "5 // 2 // 0",
        "inf",
        "",
        "٣",
    ],
)
def test_what_is_no_number_is_refused_at_once(text):
    start = time.perf_counter()
    assert exact_value(text) is None
    assert time.perf_counter() - start < 0.5
