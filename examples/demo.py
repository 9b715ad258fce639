"""``make demo``: a grid world solved and learned, and a chat model aligned to a preference file.

    python examples/demo.py

Everything goes to a new folder under runs/. About three minutes on two cores, and most of a minute more the
first time, when the chat model is unpacked.
"""

import itertools
import sys
from pathlib import Path

import make_preferences
import q_learning
import solve_gridworld

from aligngym.commands.main import main as aligngym


def new_folder() -> Path:
    return next(path for number in itertools.count(1) if not (path := Path(f"runs/demo-{number}")).exists())


def heading(text: str) -> None:
    print(f"\n━━ {text} " + "━" * max(0, 100 - len(text)) + "\n", flush=True)


def main() -> None:
    folder = new_folder()
    folder.mkdir(parents=True)
    heading("1. a grid world, solved exactly")
    solve_gridworld.main(folder)
    heading("2. another one, learned by Q-learning, beside the exact values")
    q_learning.main(folder)
    heading("3. SmolLM2-135M, taught by preference pairs to answer directly")
    pairs = folder / "pairs.jsonl"
    sys.argv = ["make_preferences", str(pairs), "--pairs", "160"]
    make_preferences.main()
    options = "--kl-samples 8 --max-new-tokens 40"
    status = aligngym(["dpo", "--train", str(pairs), "--output", str(folder / "dpo"), *options.split()])
    if status:
        sys.exit(status)
    heading("where everything is")
    for name, what in {
        "gridworld.png": "the solved grid",
        "q_learning.png": "the learned one",
        "pairs.jsonl": "the preferences",
        "dpo/adapter": "the adapter, for peft",
        "dpo/report.txt": "before and after",
    }.items():
        print(f"{folder / name!s:28} {what}")


if __name__ == "__main__":
    main()
