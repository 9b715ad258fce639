"""DPO with a LoRA adapter, ours beside trl's ``DPOTrainer``: the same pairs, adapter, dtype, order and learning rate.

Both compute the reference's log-probabilities in the first epoch; ours has them in its cache from then on, and so has
trl at its best flags, after a pass over all pairs that is spread over the steps of its first row.

    python benchmarks/dpo_against_trl.py [--model random-1b] [--batch-size 64] [--micro-batch-size 16] [--data long]

Work is counted alike for all sides, with each prompt once: 6 FLOPs for every weight of the decoder's products and every
token (two forward passes and the half of the backward pass that goes through activations), as many for every weight
of the head and every token of a completion, and 4 where the reference is known. ``share`` is the part of the rate that
the machine reaches in a large product. ``start`` is from making the agent until the end of its first step; ``slowest``
the slowest step after it. Losses are compared over the first twenty steps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
from against_trl import (
    CUDA,
    ROOT,
    SHARED,
    Result,
    compare,
    draw_adapter,
    load,
    now,
    options,
    our_clock,
    our_policy,
    peak_gib,
    sizes,
    trl_clock,
    trl_options,
)

SIDES = {
    "ours": "aligngym, first epoch",
    "trl": "trl, its defaults",
    "trl-no-checkpointing": "trl, no gradient checkpointing",
    "trl-best": "trl, best flags, first epoch",
}
#: Rows of the table whose reference was known before.
LATER = {"ours": "aligngym, later epochs", "trl-best": "trl, best flags, later epochs"}
#: Steps whose losses are compared.
COMPARED = 20


def main(given: list[str]) -> None:
    parser = options(__doc__.splitlines()[0], SIDES, steps=16 if CUDA else 6, warm_up=4 if CUDA else 2)
    pairs = SHARED / "gsm8k_preferences_train.jsonl"
    parser.add_argument("--pairs", metavar="FILE", default=str(pairs) if pairs.exists() else None)
    parser.add_argument("--data", choices=("pairs", "long"), default="pairs", help="long: random tokens, a long prompt")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="of the long data")
    parser.add_argument("--completion-tokens", type=int, default=200, help="of the long data")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs (default: %(default)s)")
    parser.add_argument("--compile-trl", action="store_true", help="torch_compile=True in trl's best flags")
    arguments = parser.parse_args(given)
    if arguments.pairs is None and arguments.data == "pairs":
        print("no pairs given, and no shared/data beside the checkout: using the examples' own, which are short")
        arguments.pairs = f"{tempfile.mkdtemp()}/pairs.jsonl"
        script = [sys.executable, str(ROOT / "examples" / "make_preferences.py"), arguments.pairs, "--pairs", "200"]
        subprocess.run(script, check=True)
        given = [*given, f"--pairs={arguments.pairs}"]
    compare(arguments, given, SIDES, run_side, report)


def run_side(arguments: argparse.Namespace) -> Result:
    """Return the seconds of every step, and what they were for."""
    model, tokenizer = load(arguments)
    weights = sizes(model)
    pairs = read_pairs(arguments, model, tokenizer)
    result = (ours if arguments.side == "ours" else trl)(arguments, model, tokenizer, pairs, now())
    scored = [len(chosen) + len(rejected) for chosen, rejected in zip(pairs.chosen, pairs.rejected, strict=True)]
    tokens = [len(prompt) + count for prompt, count in zip(pairs.prompts, scored, strict=True)]
    per_step = {"tokens": by_step(tokens, arguments.batch_size), "scored": by_step(scored, arguments.batch_size)}
    return {"gib": peak_gib(), "weights": weights, **per_step, **result}


def by_step(counts: list[int], batch_size: int) -> list[int]:
    """Return the sums over batches."""
    return [sum(counts[start : start + batch_size]) for start in range(0, len(counts), batch_size)]


def read_pairs(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """Return the pairs of all steps as tokens, in the order in which both sides take them."""
    from aligngym.alignment import load_preferences
    from aligngym.alignment.token_rows import TokenPreferences

    count = arguments.batch_size * (arguments.warm_up + arguments.steps)
    if arguments.data == "pairs":
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        pairs = load_preferences(arguments.pairs, tokenizer, max_length=None, end_tokens=ends)
        return pairs.subset(number % len(pairs) for number in range(count))
    generator = torch.Generator().manual_seed(0)
    special = max(tokenizer.all_special_ids) + 1

    def texts(length: int) -> list[torch.Tensor]:
        return [torch.randint(special, len(tokenizer), (length,), generator=generator) for _ in range(count)]

    completions = [texts(arguments.completion_tokens) for _ in range(2)]
    return TokenPreferences(texts(arguments.prompt_tokens), *completions)


def ours(arguments: argparse.Namespace, model: Any, tokenizer: Any, pairs: Any, started: float) -> Result:
    from aligngym.alignment import DPO
    from aligngym.core.gradient_agent import EpochOrder

    class InOrder(EpochOrder):
        def __call__(self, step: int) -> torch.Tensor:
            return torch.arange(self.batch_size) + step % self.steps_per_epoch * self.batch_size

    agent = DPO(
        our_policy(arguments, model, tokenizer),
        pairs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        micro_batch_size=arguments.our_micro_batch_size,
    )
    agent.order = InOrder(len(pairs), arguments.batch_size, 0)
    first = agent.order.steps_per_epoch
    # All steps are one run, as those of a user are: whether to compile may depend on how long it is.
    clock = our_clock(started)
    agent.learn(first + arguments.steps, progress=False, callbacks=[clock])
    seconds = {"seconds": clock.seconds[:first], "later": clock.seconds[first:]}
    return {**seconds, "losses": clock.losses[:first], "startup": clock.startup}


def trl(arguments: argparse.Namespace, model: Any, tokenizer: Any, pairs: Any, started: float) -> Result:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    from aligngym.alignment import default_lora

    class InOrder(DPOTrainer):
        """Takes tokens as they are and in their order, and measures its pass over the reference."""

        precomputation = 0.0

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *rest: Any) -> Dataset:
            start = now()
            dataset = super()._precompute_ref_logps(*rest)
            self.precomputation = now() - start
            return dataset

    best = arguments.side == "trl-best"
    sides = {"prompt_ids": pairs.prompts, "chosen_ids": pairs.chosen, "rejected_ids": pairs.rejected}
    clock = trl_clock(started)
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model,
            args=DPOConfig(
                folder,
                max_length=None,
                precompute_ref_log_probs=best,
                torch_compile=best and arguments.compile_trl,
                **trl_options(arguments, arguments.batch_size),
            ),
            train_dataset=Dataset.from_dict({name: [row.tolist() for row in rows] for name, rows in sides.items()}),
            processing_class=tokenizer,
            peft_config=default_lora(),
            callbacks=[clock],
        )
        draw_adapter(trainer.model)
        trainer.train()
    result = {"seconds": clock.seconds, "losses": clock.losses, "startup": clock.startup}
    if best:
        part = trainer.precomputation / len(clock.seconds)
        result |= {
            "precomputation": trainer.precomputation,
            "later": clock.seconds[arguments.warm_up :],
            "seconds": [seconds + part for seconds in clock.seconds],
        }
    return result


def report(arguments: argparse.Namespace, machine: Result, results: dict[str, Result]) -> str:
    """Return a table of all sides, with ratios to the first epoch of ours."""
    from aligngym.commands.options import Table

    titles = "s/step|mean|pairs/s|tokens/s|TFLOP/s|share|GiB|time|memory|start|slowest|loss differs"
    base = results.get("ours")
    timed = slice(arguments.warm_up, arguments.warm_up + arguments.steps)
    lines = []
    for side, result in results.items():
        # Later epochs begin with the pairs of the first steps.
        kinds = [(SIDES[side], result["seconds"][timed], timed, 6)]
        if side in LATER:
            where = slice(0, arguments.steps) if side == "ours" else timed
            kinds.append((LATER[side], result["later"], where, 4))
        for title, seconds, where, passes in kinds:
            tokens, scored, weights = result["tokens"][where], result["scored"][where], result["weights"]
            flops = [
                passes * (weights["linear"] * t + weights["head"] * s) for t, s in zip(tokens, scored, strict=True)
            ]
            rate = typical_rate(flops, seconds)
            step = statistics.median(seconds)
            line = [title, f"{step:.3g}", f"{statistics.mean(seconds):.3g}", f"{arguments.batch_size / step:.3g}"]
            line += [f"{typical_rate(tokens, seconds):,.0f}", f"{rate / 1e12:.3g}", f"{rate / machine['flops']:.0%}"]
            line += [f"{result['gib']:.2f}", *ratios(step, result, base, timed)]
            line += [f"{result['startup']:.1f}", f"{max(result['seconds'][1:], default=0.0):.3g}"]
            lines.append([*line, difference(result, base)])
    return str(Table(["", *titles.split("|")], lines))


def typical_rate(amounts: list[int], seconds: list[float]) -> float:
    """Return the median over steps of amounts per second."""
    return statistics.median(amount / time for amount, time in zip(amounts, seconds, strict=True))


def ratios(step: float, result: Result, base: Result | None, timed: slice) -> list[str]:
    """Return time and memory as multiples of our first epoch's."""
    if base is None:
        return ["–", "–"]
    return [f"{step / statistics.median(base['seconds'][timed]):.2f}×", f"{result['gib'] / base['gib']:.2f}×"]


def difference(result: Result, base: Result | None) -> str:
    """Return the largest difference between the losses of the first steps."""
    if base is None or result is base:
        return "–"
    return f"{max(abs(a - b) for a, b in list(zip(result['losses'], base['losses'], strict=True))[:COMPARED]):.1e}"


if __name__ == "__main__":
    main(sys.argv[1:])
