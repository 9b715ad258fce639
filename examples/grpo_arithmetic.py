"""A small language model learns to add on two processor cores: a short imitation, then GRPO with a verifier.

    python examples/grpo_arithmetic.py

SmolLM2-135M sees a few solved sums, so that it answers with a number and an end, and is then only told which of its
answers are right. Accuracy is measured on sums that it saw in neither stage.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from aligngym.agents import GRPO
from aligngym.alignment import (
    CompletionsLog,
    LanguagePolicy,
    PromptSampler,
    default_lora,
    final_answer,
    supervised_fine_tuning,
)
from aligngym.core import Decay, History
from aligngym.core.statistics import wilson_interval

#: Sums that neither stage sees.
UNSEEN = 200


def sums(low: int, high: int) -> list[dict[str, str]]:
    """Return all sums of two numbers from ``low`` to ``high``, in a random order that is always the same."""
    rows = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}", "answer": str(a + b)}
        for a in range(low, high + 1)
        for b in range(low, high + 1)
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[number] for number in order.tolist()]


def accuracy(policy: LanguagePolicy, problems: list[dict[str, str]], greedy: bool) -> tuple[int, str]:
    """Return how many problems are solved, and the share with its 95 % interval."""
    judge = PromptSampler(problems, [final_answer], group_size=1, max_new_tokens=6, rows_at_once=100)
    written = judge.complete(policy, judge.prepare(policy), range(len(problems)), seed=1, greedy=greedy)
    right = int(written.rewards.sum())
    low, high = wilson_interval(right, len(problems))
    return right, f"{right / len(problems):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--low", type=int, default=100, help="smallest number to add (default: %(default)s)")
    parser.add_argument("--high", type=int, default=400, help="largest number to add (default: %(default)s)")
    parser.add_argument("--demonstrations", type=int, default=128, help="solved sums to imitate (default: %(default)s)")
    parser.add_argument("--imitation-rate", type=float, default=3e-4)
    parser.add_argument("--iterations", type=int, default=70, help="of GRPO (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=24, help="in an iteration (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--dtype", default="auto", help="of the frozen weights (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=None, help="folder for metrics and completions")
    parser.add_argument("--write", type=Path, metavar="FILE.jsonl", help="write 1,000 sums, and do nothing else")
    arguments = parser.parse_args()

    problems = sums(arguments.low, arguments.high)
    if arguments.write is not None:
        arguments.write.write_text("".join(json.dumps(row) + "\n" for row in problems[:1000]))
        return
    unseen, shown, problems = problems[:UNSEEN], problems[UNSEEN : UNSEEN + arguments.demonstrations], problems[1000:]
    policy = LanguagePolicy.from_pretrained(arguments.model, lora=default_lora(16), dtype=arguments.dtype)
    table = []

    def judge(stage: str) -> None:
        greedy, drawn = (accuracy(policy, unseen, greedy)[1] for greedy in (True, False))
        table.append(f"{stage:<22}  {greedy:>20}  {drawn:>20}  {time.perf_counter() - started:>7.0f} s")
        print(table[-1], flush=True)

    started = time.perf_counter()
    judge("before")
    supervised_fine_tuning(policy, shown, epochs=1, batch_size=8, learning_rate=arguments.imitation_rate)
    judge(f"{len(shown)} sums imitated")
    sampler = PromptSampler(
        problems,
        [final_answer],
        group_size=arguments.group_size,
        prompts_per_sample=arguments.prompts,
        max_new_tokens=6,
    )
    learning_rate = Decay(arguments.learning_rate, arguments.iterations, warmup=min(3, arguments.iterations))
    agent = GRPO(policy, sampler, learning_rate=learning_rate)
    log = CompletionsLog(sampler, every=20, folder=arguments.output)
    agent.learn(arguments.iterations, output=arguments.output, callbacks=[log, History()])
    judge(f"GRPO, {arguments.iterations} iterations")

    header = f"{f'{len(unseen)} unseen sums':<22}  {'greedy [95 %]':>20}  {'drawn [95 %]':>20}  {'after':>9}"
    print("\n".join(["", header, "─" * len(header), *table]))


if __name__ == "__main__":
    main()
