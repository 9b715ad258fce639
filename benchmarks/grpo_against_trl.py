"""GRPO with a LoRA adapter, ours beside trl's ``GRPOTrainer`` with transformers' generation.

The same prompts in the same order, group size, adapter, dtype and learning rate, temperature 1, no penalty for leaving
the reference, one gradient step on every batch. All completions have the same number of tokens: neither side may end
earlier. The reward is a checksum of the text, so that it differs within every group and no row is left out.

    python benchmarks/grpo_against_trl.py [--model random-1b] [--prompts-per-step 16] [--new-tokens 256]

Losses cannot be compared, because samples differ. Instead, trl's last completions are given to our policy on the same
weights, and the largest difference between its log-probabilities and those that trl computes is the last column.
``floor`` is how often a token takes the time in which the machine copies as many bytes as the weights have that every
token needs (the cache of keys and values not counted). The work of an update is 4 FLOPs for every weight of the
decoder's products and every token, each prompt once, and for every weight of the head and every token of a completion;
``share`` is the part of the rate that the machine reaches in a large product. Sampling includes the rewards. ``start``
is from making the agent until the end of its first step; ``slowest`` the slowest step after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from against_trl import (
    CUDA,
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
    policy_options,
    sizes,
    trl_clock,
    trl_options,
)

SIDES = {
    "ours": "aligngym",
    "trl": "trl, its defaults",
    "trl-no-checkpointing": "trl, no gradient checkpointing",
}


def main(given: list[str]) -> None:
    parser = options(__doc__.splitlines()[0], SIDES, steps=4 if CUDA else 3, warm_up=2 if CUDA else 1)
    prompts = SHARED / "gsm8k_problems_train.jsonl"
    parser.add_argument("--prompts", metavar="FILE", default=str(prompts) if prompts.exists() else None)
    parser.add_argument("--prompts-per-step", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of every completion (default: %(default)s)")
    compare(parser.parse_args(given), given, SIDES, run_side, report)


def checksum(completions: list[Any], **_: Any) -> list[float]:
    """Return a number in [0, 1) for every text."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]


def read_problems(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the prompts of all steps; without a file, sums such as those of the examples."""
    count = arguments.prompts_per_step * (arguments.warm_up + arguments.steps)
    if arguments.prompts:
        rows = [{"prompt": json.loads(line)["prompt"]} for line in Path(arguments.prompts).read_text().splitlines()]
    else:
        rows = [{"prompt": f"{number} + {7 * number % 1000} ="} for number in range(100, 1000)]
    return [rows[number % len(rows)] for number in range(count)]


def run_side(arguments: argparse.Namespace) -> Result:
    """Return the seconds of every step and of the sampling in it, and what they were for."""
    from aligngym.alignment.prompts import prompt_tokens

    model, tokenizer = load(arguments)
    weights = sizes(model)
    problems = read_problems(arguments)
    result = (ours if arguments.side == "ours" else trl)(arguments, model, tokenizer, problems)
    lengths = [len(prompt_tokens(row, tokenizer)) for row in problems]
    at_once = arguments.prompts_per_step
    per_step = [sum(lengths[start : start + at_once]) for start in range(0, len(lengths), at_once)]
    return {"weights": weights, "prompt_tokens": per_step, **result}


def ours(arguments: argparse.Namespace, model: Any, tokenizer: Any, problems: list[dict[str, Any]]) -> Result:
    from aligngym.agents import GRPO
    from aligngym.alignment import LanguagePolicy, PromptSampler
    from aligngym.core import Policy, Trajectories

    class Endless(LanguagePolicy):
        @property
        def end_tokens(self) -> list[int]:
            return []

    class InOrder(PromptSampler):
        """Takes prompts as they come, and measures how long it takes."""

        seconds: list[float]

        def _next_prompts(self) -> list[int]:
            first = self._drawn * self.prompts_per_sample
            self._drawn += 1
            return [*range(first, first + self.prompts_per_sample)]

        def sample(self, policy: Policy, seed: int) -> Trajectories:
            start = now()
            trajectories = super().sample(policy, seed)
            self.seconds.append(now() - start)
            return trajectories

    started = now()
    sampler = InOrder(
        problems,
        [checksum],
        group_size=arguments.group_size,
        prompts_per_sample=arguments.prompts_per_step,
        max_new_tokens=arguments.new_tokens,
    )
    sampler.seconds = []
    agent = GRPO(
        our_policy(arguments, model, tokenizer, Endless),
        sampler,
        learning_rate=arguments.learning_rate,
        micro_batch_size=arguments.our_micro_batch_size,
        max_grad_norm=1.0,
    )
    clock = our_clock(started)
    agent.learn(arguments.warm_up + arguments.steps, progress=False, callbacks=[clock])
    return {"seconds": clock.seconds, "sampling": sampler.seconds, "startup": clock.startup, "gib": peak_gib()}


def trl(arguments: argparse.Namespace, model: Any, tokenizer: Any, problems: list[dict[str, Any]]) -> Result:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from aligngym.alignment import default_lora

    class Measuring(GRPOTrainer):
        """Measures its sampling, the rewards included."""

        seconds: list[float]

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = now()
            completions = super()._generate_and_score_completions(inputs)
            self.seconds.append(now() - start)
            return completions

    started = now()
    clock = trl_clock(started)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Measuring(
            model,
            reward_funcs=checksum,
            args=GRPOConfig(
                folder,
                num_generations=arguments.group_size,
                max_completion_length=arguments.new_tokens,
                generation_kwargs={"min_new_tokens": arguments.new_tokens},
                temperature=1.0,
                beta=0.0,
                use_vllm=False,
                shuffle_dataset=False,
                **trl_options(arguments, arguments.prompts_per_step * arguments.group_size),
            ),
            train_dataset=Dataset.from_list(problems),
            processing_class=tokenizer,
            peft_config=default_lora(),
            callbacks=[clock],
        )
        draw_adapter(trainer.model)
        trainer.seconds = []
        trainer.train()
    measured = {"seconds": clock.seconds, "sampling": trainer.seconds, "startup": clock.startup, "gib": peak_gib()}
    return measured | {"disagreement": disagreement(arguments, trainer, tokenizer)}


@torch.no_grad()
def disagreement(arguments: argparse.Namespace, trainer: Any, tokenizer: Any) -> float | str:
    """Return the largest difference between trl's log-probabilities and ours, for trl's last (micro-)batch.

    If that fails, for want of memory say, it is an error's text: the measurements are worth keeping.
    """
    from aligngym.alignment import LanguagePolicy
    from aligngym.core import PADDING, Trajectories

    # A step has used them up, but what it computed them for is still there.
    batch = trainer._buffered_inputs[0]
    prompts, completions = batch["prompt_ids"], batch["completion_ids"]
    mask = batch["completion_mask"].bool()
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    trainer.model.eval()
    try:
        sequences = torch.cat([prompts, completions], dim=1)
        theirs, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, sequences, attended, completions.shape[1]
        )
        prompts = prompts.where(batch["prompt_mask"].bool(), PADDING)
        group = prompts.unique(dim=0, return_inverse=True)[1]
        rows = Trajectories(prompts, completions.where(mask, PADDING), mask, group=group)
        policy = LanguagePolicy(trainer.model, tokenizer, **policy_options(arguments)).eval()
        return float((policy(rows).log_probs - theirs)[mask].abs().max())
    except Exception as error:  # Anything that a model and two libraries can raise.
        return repr(error)


def report(arguments: argparse.Namespace, machine: Result, results: dict[str, Result]) -> str:
    """Return a table of all sides, with ratios to ours."""
    from aligngym.commands.options import Table

    titles = "s/step|mean|sampling|update|ms/token|floor|TFLOP/s|share|GiB|time|sampling|update|memory|start|slowest"
    base = results.get("ours")
    lines = []
    for side, result in results.items():
        step, sampling, update = times = typical(arguments, result)
        token = sampling / arguments.new_tokens
        rate = update_flops(arguments, result) / update
        line = [SIDES[side], f"{step:.3g}", f"{statistics.mean(result['seconds'][arguments.warm_up :]):.3g}"]
        line += [f"{sampling:.3g}", f"{update:.3g}", f"{token * 1000:.3g}"]
        line += [f"{token * machine['bandwidth'] / result['weights']['bytes']:.1f}×"]
        line += [f"{rate / 1e12:.3g}", f"{rate / machine['flops']:.0%}", f"{result['gib']:.2f}"]
        if base is None:
            line += ["–"] * 4
        else:
            line += [f"{own / other:.2f}×" for own, other in zip(times, typical(arguments, base), strict=True)]
            line += [f"{result['gib'] / base['gib']:.2f}×"]
        line += [f"{result['startup']:.1f}", f"{max(result['seconds'][1:], default=0.0):.3g}"]
        disagrees = result.get("disagreement", "–")
        lines.append([*line, f"{disagrees:.1e}" if isinstance(disagrees, float) else disagrees[:40]])
    return str(Table(["", *titles.split("|"), "log π differs"], lines))


def typical(arguments: argparse.Namespace, result: Result) -> tuple[float, float, float]:
    """Return the median seconds of a step, of its sampling and of its update."""
    pairs = list(zip(result["seconds"], result["sampling"], strict=True))[arguments.warm_up :]
    steps, samplings = zip(*pairs, strict=True)
    return statistics.median(steps), statistics.median(samplings), statistics.median(s - g for s, g in pairs)


def update_flops(arguments: argparse.Namespace, result: Result) -> float:
    """Return the work of a typical update."""
    completions = arguments.prompts_per_step * arguments.group_size * arguments.new_tokens
    prompts = statistics.mean(result["prompt_tokens"][arguments.warm_up :])
    weights = result["weights"]
    return 4 * (weights["linear"] * (prompts + completions) + weights["head"] * completions)


if __name__ == "__main__":
    main(sys.argv[1:])
