"""Train a DPO adapter on a real chat model from a preference file, in Python. About two minutes on two cores.

python examples/make_preferences.py pairs.jsonl
python examples/dpo_adapter.py pairs.jsonl [FOLDER]
"""

import sys
from pathlib import Path

from aligngym.alignment import DPO, LanguagePolicy, completions_side_by_side, load_preferences
from aligngym.core import Decay


def main(file: str, folder: Path) -> None:
    policy = LanguagePolicy.from_pretrained("smollm2-135m")
    pairs = load_preferences(file, policy.tokenizer, end_tokens=policy.end_tokens)
    train, held_back = pairs.hold_back(20, seed=0)

    agent = DPO(policy, train, beta=0.1, batch_size=8, learning_rate=Decay(5e-4, steps=12, warmup=2))
    agent.learn(12, output=folder)

    result = agent.evaluate(held_back)
    print(f"accuracy on {len(held_back)} held-back pairs: {result['accuracy']:.2f}", end=" ")
    print(f"[{result['accuracy_low']:.2f}, {result['accuracy_high']:.2f}], margin {result['margin']:.2f}\n")
    print(completions_side_by_side(policy, held_back.prompts[:2], max_new_tokens=40))
    policy.save(folder / "adapter")
    print(f"\nadapter in {folder / 'adapter'}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/dpo_adapter"))
