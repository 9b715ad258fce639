"""The recipe of DeepSeek-R1 in small: cold start, GRPO, rejection sampling, and imitation of what was kept.

    python examples/r1_recipe.py

A language model is to think before it answers: to add digit by digit inside <think>, and to give the sum inside
<answer>. It imitates a few demonstrations, learns by GRPO from a verifier and a format reward, writes several answers
to further problems of which only the right ones are kept, and a fresh adapter imitates those: D. Guo et al.,
*DeepSeek-R1*, 2025, section 2.3. Accuracy is measured on sums that no stage has seen.
"""

import argparse
from collections.abc import Sequence

import torch

from aligngym.agents import GRPO
from aligngym.alignment import (
    LanguagePolicy,
    PromptSampler,
    Rewards,
    default_lora,
    evaluate_completions,
    final_answer,
    supervised_fine_tuning,
    think_format,
)
from aligngym.core import Decay

Row = dict[str, str]
REWARDS = Rewards([final_answer, think_format], [1.0, 0.2])


def problem(a: int, b: int) -> Row:
    """Return a sum of two numbers, with a demonstration that adds it digit by digit from the right."""
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    thought = f"<think>{', '.join(steps)}</think><answer>{a + b}</answer>"
    return {"prompt": f"{a} + {b} =", "completion": thought, "answer": str(a + b)}


def problems(count: int, seed: int) -> list[Row]:
    """Return different random sums of two numbers of two digits, in an order that is repeated once all are used."""
    order = torch.randperm(90**2, generator=torch.Generator().manual_seed(seed)).tolist()
    return [problem(10 + code // 90, 10 + code % 90) for code in (order * (count // len(order) + 1))[:count]]


def judge(stage: str, policy: LanguagePolicy, rows: Sequence[Row], decoding: dict[str, int]) -> None:
    """Print how many problems are solved, and how many answers have the right form."""
    found = evaluate_completions(policy, rows, REWARDS, against_reference=False, **decoding).policy
    solved, formed, length = (found[name] for name in ("rewards/final_answer", "rewards/think_format", "length"))
    interval = f"[{solved.low:.3f}, {solved.high:.3f}]"
    print(f"{stage:<34}{solved.value:>8.3f} {interval:<16}{formed.value:>8.2f}{length.value:>8.1f}", flush=True)


def kept_answers(policy: LanguagePolicy, rows: Sequence[Row], tries: int, decoding: dict[str, int]) -> list[Row]:
    """Return one right and well-formed answer to every problem that got any in so many tries: rejection sampling."""
    sampler = PromptSampler(rows, REWARDS, group_size=tries, **decoding)
    written = sampler.complete(policy, sampler.prepare(policy), range(len(rows)), seed=7)
    answers = zip(written.rows, written.texts, written.rewards.tolist(), strict=True)
    right = {row["prompt"]: text for row, text, reward in answers if reward >= sum(REWARDS.weights) - 1e-6}
    return [{"prompt": prompt, "completion": text} for prompt, text in right.items()]


def main() -> None:
    """Go through the four stages and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--demonstrations", type=int, default=512, help="of the cold start (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=20, help="of GRPO (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="in an iteration (default: %(default)s)")
    parser.add_argument("--rejection", type=int, default=200, help="problems to sample for (default: %(default)s)")
    parser.add_argument("--judged", type=int, default=100, help="unseen problems (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=44)
    options = parser.parse_args()

    sizes = [options.judged, options.demonstrations, options.iterations * options.prompts, options.rejection]
    rows = problems(sum(sizes), seed=0)
    starts = [sum(sizes[:stage]) for stage in range(5)]
    unseen, shown, practised, further = (rows[starts[stage] : starts[stage + 1]] for stage in range(4))
    decoding = {"max_new_tokens": options.max_new_tokens, "rows_at_once": 128}
    print(f"{f'{len(unseen)} unseen sums':<34}{'solved':>8} {'[95 %]':<16}{'formed':>8}{'tokens':>8}")

    def fresh() -> LanguagePolicy:
        return LanguagePolicy.from_pretrained(options.model, lora=default_lora(16), dtype=options.dtype)

    policy = fresh()
    judge("the model as it is", policy, unseen, decoding)
    supervised_fine_tuning(policy, shown, batch_size=8, learning_rate=5e-4, progress=False)
    judge(f"cold start, {len(shown)} demonstrations", policy, unseen, decoding)
    sampler = PromptSampler(practised, REWARDS, group_size=8, prompts_per_sample=options.prompts, **decoding)
    learning_rate = Decay(2e-4, options.iterations, warmup=min(3, options.iterations))
    GRPO(policy, sampler, learning_rate=learning_rate).learn(options.iterations, progress=False)
    judge(f"GRPO, {options.iterations} iterations", policy, unseen, decoding)
    kept = kept_answers(policy, further, 4, decoding)
    if not kept:
        print("no answer was right, so there is nothing to imitate: practise for longer")
        return
    student = supervised_fine_tuning(fresh(), [*shown, *kept], batch_size=8, learning_rate=5e-4, progress=False)
    judge(f"fresh adapter, {len(kept)} of {len(further)} kept", student, unseen, decoding)


if __name__ == "__main__":
    main()
