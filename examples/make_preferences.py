"""Write a small preference set: the same questions, answered directly (chosen) and in circles (rejected).

    python examples/make_preferences.py pairs.jsonl [--pairs 200] [--seed 0]

Every answer is right, so what is preferred is the manner alone, which a small model learns in a few steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo",
    "Cuba": "Havana", "Greece": "Athens", "Chile": "Santiago", "Ireland": "Dublin", "Austria": "Vienna",
    "Portugal": "Lisbon", "Thailand": "Bangkok", "Hungary": "Budapest", "Canada": "Ottawa", "Finland": "Helsinki",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "early": "late", "heavy": "light", "open": "closed", "full": "empty", "fast": "slow",
    "wide": "narrow", "loud": "quiet", "wet": "dry", "deep": "shallow", "strong": "weak", "old": "young",
}  # fmt: skip
OPENINGS = [
    "That is a really great question, and I am happy you asked it!",
    "Well, there are many ways to look at this, and each has its merits.",
    "Let me think about that for a moment, because it deserves some care.",
    "Before I answer, it is worth saying how interesting this topic is.",
]
ENDINGS = [
    "I hope this helps, and please ask me anything else you would like to know!",
    "Of course, there is much more that could be said about all of this.",
    "Let me know whether you would like me to explain it in another way.",
    "Questions like this one always remind me how much there is to learn.",
]


def question_and_answer(random: np.random.Generator) -> tuple[str, str]:
    kind = random.integers(4)
    if kind == 0:
        a, b = random.integers(2, 60, size=2)
        return f"What is {a} + {b}?", f"{a + b}"
    if kind == 1:
        a, b = random.integers(2, 13, size=2)
        return f"What is {a} times {b}?", f"{a * b}"
    if kind == 2:
        country = str(random.choice(list(CAPITALS)))
        return f"What is the capital of {country}?", CAPITALS[country]
    word = str(random.choice(list(OPPOSITES)))
    return f"What is the opposite of {word}?", OPPOSITES[word]


def preference(random: np.random.Generator) -> dict:
    question, answer = question_and_answer(random)
    opening, ending = random.choice(OPENINGS), random.choice(ENDINGS)
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": f"{answer}."}],
        "rejected": [{"role": "assistant", "content": f"{opening} The answer is {answer}. {ending}"}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(preference(random)) for _ in range(arguments.pairs)]
    arguments.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {arguments.pairs} pairs to {arguments.file}")


if __name__ == "__main__":
    main()
