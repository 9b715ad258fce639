"""DPO with a LoRA adapter, ours beside trl's ``DPOTrainer``: the same pairs, adapter, dtype, order and learning rate.

Each side runs in a process of its own, one after the other. What is compared is the median step after a warm-up, the
peak of resident memory (on a GPU, of allocated memory), and the losses. Both compute the reference's log-probabilities
in the first epoch; ours has them in its cache from then on, which is a second row.

    python benchmarks/dpo_against_trl.py [--pairs FILE.jsonl] [--batch-size 4] [--steps 6]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
#: Real pairs, if a checkout has them beside it; otherwise the examples' own.
SHARED_PAIRS = ROOT.parent / "shared" / "data" / "gsm8k_preferences_train.jsonl"
WARM_UP = 2
#: Options that are not handed on to the process of a side.
HERE = ("side", "against")
SIDES = {
    "ours": "aligngym, first epoch",
    "trl": "trl, its defaults",
    "trl-no-checkpointing": "trl, no gradient checkpointing",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default=str(SHARED_PAIRS) if SHARED_PAIRS.exists() else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help=f"timed steps, after {WARM_UP} to warm up")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--against", nargs="+", choices=[*SIDES][1:], default=[*SIDES][1:])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments)
        return
    if arguments.pairs is None:
        print("no pairs given, and no shared/data beside the checkout: using the examples' own, which are short")
        folder = tempfile.mkdtemp()
        arguments.pairs = f"{folder}/pairs.jsonl"
        script = [sys.executable, str(ROOT / "examples" / "make_preferences.py"), arguments.pairs, "--pairs", "200"]
        subprocess.run(script, check=True)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = {side: measure(side, arguments) for side in ("ours", *arguments.against)}
    ours = results["ours"]
    cached = {**ours, "seconds": ours["cached_seconds"]}
    rows = {"aligngym, later epochs": cached} | {SIDES[side]: result for side, result in results.items()}
    print(f"\n{'':32}{'s/step':>8}{'peak GiB':>10}{'speed':>8}{'memory':>8}{'largest loss difference':>25}")
    for name, result in rows.items():
        difference = max(abs(a - b) for a, b in zip(ours["losses"], result["losses"], strict=True))
        print(
            f"{name:32}{result['seconds']:8.2f}{result['gib']:10.2f}{result['seconds'] / ours['seconds']:7.2f}×"
            f"{result['gib'] / ours['gib']:7.2f}×{difference:25.1e}"
        )


def measure(side: str, arguments: argparse.Namespace) -> dict:
    """Run one side in a fresh process and return its median seconds per step, peak GiB and losses."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(arguments).items() if name not in HERE]
    process = subprocess.run(
        [sys.executable, __file__, *flags, f"--side={side}"], capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"{side} failed:\n{process.stderr[-3000:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    steps = result.pop("steps")
    first, later = steps[: WARM_UP + arguments.steps], steps[WARM_UP + arguments.steps :]
    result["seconds"] = statistics.median(first[WARM_UP:])
    if later:
        result["cached_seconds"] = statistics.median(later[WARM_UP:])
    print(f"  {SIDES[side]}: {result['seconds']:.2f} s/step", flush=True)
    return result


def run_side(arguments: argparse.Namespace) -> None:
    count = arguments.batch_size * (WARM_UP + arguments.steps)
    rows = [json.loads(line) for line in Path(arguments.pairs).read_text().splitlines()]
    rows = (rows * (1 + count // len(rows)))[:count]
    seconds, losses = (ours if arguments.side == "ours" else trl)(arguments, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"steps": seconds, "losses": losses, "gib": peak}))


def ours(arguments: argparse.Namespace, rows: list[dict]) -> tuple[list[float], list[float]]:
    from aligngym.alignment import DPO, LanguagePolicy, load_preferences

    policy = LanguagePolicy.from_pretrained(arguments.model, dtype=arguments.dtype)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
        file.flush()
        pairs = load_preferences(file.name, policy.tokenizer, end_tokens=policy.end_tokens)
    agent = DPO(policy, pairs, batch_size=arguments.batch_size, learning_rate=arguments.learning_rate)
    # Both sides go through the file in its order; ours does so twice.
    steps = WARM_UP + arguments.steps
    agent.order = lambda step: torch.arange(arguments.batch_size) + step % steps * arguments.batch_size
    seconds, losses = [], []
    for _ in range(2 * steps):
        start = time.perf_counter()
        losses.append(agent.iterate()["loss"])
        agent.iteration += 1
        seconds.append(time.perf_counter() - start)
    return seconds, losses[:steps]


def trl(arguments: argparse.Namespace, rows: list[dict]) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from aligngym.alignment import default_lora
    from aligngym.alignment.models import load_model
    from aligngym.core.randomness import seeded

    model, tokenizer = load_model(arguments.model, arguments.dtype)
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            seconds.append(time.perf_counter() - self.start)

        def on_log(self, args, state, control, logs=None, **__) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder, seeded(0):
        trainer = InOrder(
            model,
            args=DPOConfig(
                folder,
                per_device_train_batch_size=arguments.batch_size,
                num_train_epochs=1,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="constant",
                use_cpu=not torch.cuda.is_available(),
                bf16=model.dtype == torch.bfloat16,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **({"gradient_checkpointing": False} if arguments.side == "trl-no-checkpointing" else {}),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=default_lora(),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds, losses


if __name__ == "__main__":
    main()
