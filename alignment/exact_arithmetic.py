r"""What a number or an arithmetic expression is worth, exactly, in the many ways in which people and models write it.

Nothing is evaluated by Python itself: a few nodes of its grammar are worked out over :class:`fractions.Fraction`,
within limits that keep every expression fast.
"""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

#: Longest text that is taken for an expression, in characters.
MAX_LENGTH = 200
#: Largest power of ten in scientific notation.
MAX_EXPONENT = 400
#: Largest power, in bits of its numerator or denominator.
MAX_BITS = 10_000

#: A regular expression for numbers in running text: 1,234.50, $5, -3/4, 1 1/2, 25%, 1.5e3, 2 million, \frac{1}{2}.
NUMBER = (
    r"(?:(?<![\w.)}\]])[-−])?(?:\\?[$€£]\s?-?)?"
    r"(?:\\[dt]?frac\{[^{}]+\}\{[^{}]+\}|\d+\s+\d+/\d+"
    r"|(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?)"
    r"(?:\s(?:hundred|thousand|million|billion|trillion)\b)?(?:\s?\\?%)?"
)

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = r"(?:[A-Za-z]{2,}|[mgshlLWVAJN])"
_ABBREVIATION = r"(?:[mck]?m|[mk]?g|m?[lL]|ft|in|lbs?|oz|s|h|hrs?|min|mph|[ap]m|st|nd|rd|th)"
_QUANTITY = re.compile(
    rf"(?P<number>[-+*/().\deE\s]*[\d).])\s*(?P<scale>(?i:{'|'.join(_SCALES)}))?\s*(?P<percent>%|(?i:percent)\b)?"
    rf"(?:(?P<abbreviation>{_ABBREVIATION})|(?:^|\s+|(?<=%))(?P<words>{_WORD}(?:[\s/.-]+{_WORD})*))?"
    r"(?:\s*\*\*\(?\d\)?)?\.?"
)
#: Words after a number that are no unit, since they change what is meant.
_NOT_UNITS = {"and", "or", "to", "half", "plus", "minus", "times", "over", "by", "if", "not", "dozen", *_SCALES}

#: What is rewritten first, in this order.
_NOTATION: list[tuple[str, str]] = [
    (r"\\left|\\right|\\[!;:(){}\[\]]|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|°|\\degree", ""),
    (r"(?<=\d)(?:\\[, ]|\{,\})(?=\d{3}(?!\d))", ""),
    (r"\\[, ]|~", " "),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\([%$])", r"\1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\times|\\cdot|[×·⋅]|(?<=\d)\s*x\s*(?=\d)", "*"),
    (r"\\div|[÷⁄]", "/"),
    (r"[−–]", "-"),
    (r"[$€£¥]", ""),
]


def exact_value(text: str, *, worked_out: bool = False) -> Fraction | None:
    r"""Return what a text is worth, ``None`` if it is no number.

    Understood are thousands separators, decimals, fractions (a/b, \frac, 1 1/2, ½), percent (25% is 1/4), scientific
    notation, millions, currencies and units, which are ignored, an equation's right side, and + − × ÷ ^ ( ).

    Args:
        text: a number, not a sentence.
        worked_out: whether an expression such as 6 × 7 is refused, so that repeating a question is no answer. What
            remains are numbers, those times a power of ten, and fractions that are no whole number.
    """
    if len(text) > MAX_LENGTH:
        return None
    found = _QUANTITY.fullmatch(_rewritten(text))
    if found is None or set((found["words"] or "").lower().split()) & _NOT_UNITS:
        return None
    # Python takes 007 for a mistake.
    source = re.sub(r"(?<![\d.])0+(?=\d)", "", found["number"].strip())
    try:
        tree = ast.parse(source, mode="eval").body
        value = _evaluate(tree, source)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    if worked_out and not (_is_number(tree) or (_is_fraction(tree) and value.denominator > 1)):
        return None
    value *= _SCALES[found["scale"].lower()] if found["scale"] else 1
    return value / 100 if found["percent"] else value


def _rewritten(text: str) -> str:
    """Return the text with the notations of typesetting turned into those of Python."""
    text = text.strip().strip("*_`\"'").strip()
    # Before these characters turn into plain spaces and digits.
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", text)
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
    for pattern, replacement in _NOTATION:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda number: number[0].replace(",", ""), text)
    text = re.sub(r"(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}|(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)", _improper, text)
    for _ in range(text.count("{")):
        text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"**(\1)", text)
    text = text.replace("^", "**")
    # The right side of x = 5, of total cost = 5 and of 2 + 3 = 5.
    return re.sub(r"^(?:(?:[^\d=]*|[-+*/().\d\s]*)=)+", "", text).strip()


def _improper(mixed: re.Match[str]) -> str:
    whole, numerator, denominator = (int(part) for part in mixed.groups() if part is not None)
    return f"{whole * denominator + numerator}/{denominator}"


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("roots are seldom rational")
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
        raise ValueError("too large a power")
    return Fraction(base ** int(exponent))


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: _power,
}


def _evaluate(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant():
            # Python has rounded it already; what was written is exact.
            written = (ast.get_source_segment(source, node) or "").lower()
            if abs(int(written.partition("e")[2] or 0)) > MAX_EXPONENT:
                raise ValueError("too large an exponent")
            return Fraction(written)
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand, source)
        case ast.UnaryOp(op=ast.UAdd()):
            return _evaluate(node.operand, source)
        case ast.BinOp() if type(node.op) in _BINARY:
            return _BINARY[type(node.op)](_evaluate(node.left, source), _evaluate(node.right, source))
    raise ValueError("no arithmetic")


def _is_literal(node: ast.expr) -> bool:
    while isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant)


def _is_number(node: ast.expr) -> bool:
    """Return whether this is a number, a power of ten, or their product."""
    while isinstance(node, ast.UnaryOp):
        node = node.operand
    match node:
        case ast.BinOp(left=ast.Constant(value=10), op=ast.Pow()):
            return _is_literal(node.right)
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.BinOp(left=ast.Constant(value=10), op=ast.Pow()) as power):
            return _is_literal(left) and _is_literal(power.right)
    return _is_literal(node)


def _is_fraction(node: ast.expr) -> bool:
    while isinstance(node, ast.UnaryOp):
        node = node.operand
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and _is_literal(node.left)
        and _is_literal(node.right)
    )
