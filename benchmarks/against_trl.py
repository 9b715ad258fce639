"""What the measurements beside trl share: the models, a process for every side, the machine's own rates, the options.

Every side runs in a process of its own, one after the other, and so does the measurement of the machine: the rate of a
large matrix product, and the bandwidth of a large copy (bytes read plus bytes written). Both sides get the same
weights: of a random model, those that its seed draws on the device, and of the adapter's A, those of another seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
#: Real data, if a checkout has it beside it.
SHARED = ROOT.parent / "shared" / "data"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
#: SmolLM2's, whose tokenizer the random models have.
VOCABULARY = 49_152
#: Llamas with random weights and a head of their own.
SHAPES = {
    "random-tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
    "random-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
    },
    "random-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
}
#: What marks the line of a side's output that is its result.
RESULT = "RESULT "

Result = dict[str, Any]


def options(description: str, sides: dict[str, str], *, steps: int, warm_up: int) -> argparse.ArgumentParser:
    """Return a parser of what both scripts can be told; ``sides`` are names with titles, ours first."""
    parser = argparse.ArgumentParser(description=description)
    others = [*sides][1:]
    parser.add_argument("--model", default="smollm2-135m", help=f"a model, or one of {', '.join(SHAPES)}")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a random model; by default that of smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=warm_up, help="steps before them (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--micro-batch-size", type=int, help="what trl computes at once; by default all of a batch")
    parser.add_argument("--our-micro-batch-size", type=int, help="what we compute at once; by default our choice")
    parser.add_argument("--compile", choices=("on", "off", "auto"), help="of our decoder layers")
    parser.add_argument("--against", nargs="*", choices=others, default=others, help="default: %(default)s")
    parser.add_argument("--timeout", type=float, metavar="S", help="give a side up after so many seconds")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--side", choices=["machine", *sides], help=argparse.SUPPRESS)
    return parser


def compare(
    arguments: argparse.Namespace,
    given: Sequence[str],
    sides: dict[str, str],
    run: Callable[[argparse.Namespace], Result],
    report: Callable[[argparse.Namespace, Result, dict[str, Result]], str],
) -> None:
    """Measure the machine and every side, print a report, and write the JSON file; or be one of these processes.

    Args:
        arguments: of :func:`options`.
        given: the same as a command line, for the processes of the sides.
        sides: names and titles.
        run: measures ``arguments.side``.
        report: makes a text of the arguments, the machine and the results of those sides that have one.
    """
    if arguments.side:
        print(RESULT + json.dumps(measured(run if arguments.side != "machine" else machine, arguments)))
        return
    limit = arguments.timeout
    here = in_a_process("machine", given)
    if "failed" in here:
        sys.exit(f"measuring the machine: {here['failed']}")
    print(", ".join(f"{name} {value}" for name, value in here["versions"].items()))
    rates = f"products {here['flops'] / 1e12:.3g} TFLOP/s in {here['dtype']}, copies {here['bandwidth'] / 1e9:.3g} GB/s"
    print(f"{here['name']}: {rates}", flush=True)
    results: dict[str, Result] = {}
    for side in ("ours", *arguments.against):
        started = time.perf_counter()
        results[side] = in_a_process(side, given, limit)
        outcome = results[side].get("failed", "done")
        print(f"  {sides[side]}: {outcome}, {time.perf_counter() - started:.0f} s in all", flush=True)
        if arguments.json:
            everything = {"options": vars(arguments), "machine": here, "sides": results}
            Path(arguments.json).write_text(json.dumps(everything, indent=1))
    succeeded = {side: result for side, result in results.items() if "failed" not in result}
    if succeeded:
        print(f"\n{report(arguments, here, succeeded)}")
    if any(result.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for result in results.values()):
        sys.exit(1)


OUT_OF_MEMORY = "out of memory"


def measured(run: Callable[[argparse.Namespace], Result], arguments: argparse.Namespace) -> Result:
    """Return what ``run`` measures, or that memory did not suffice for it."""
    try:
        return run(arguments)
    except (RuntimeError, MemoryError) as error:
        # On a GPU also a library's handle may be what no memory is left for.
        text = str(error).lower()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in text or "alloc_failed" in text:
            return {"failed": OUT_OF_MEMORY}
        raise


def in_a_process(side: str, given: Sequence[str], limit: float | None = None) -> Result:
    """Run one side in a fresh process and return its result."""
    command = [sys.executable, sys.argv[0], *given, f"--side={side}"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {limit:.0f} s"}
    for line in process.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    print(f"{side} failed:\n{process.stderr[-3000:]}", file=sys.stderr)
    # The kernel kills what takes too much of the host's memory.
    return {"failed": OUT_OF_MEMORY if process.returncode == -9 else "an error"}


def now() -> float:
    """Return the seconds of a clock, when everything that was asked of the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """Return the most memory that was taken: resident, or of the GPU since the model was there, with what is kept."""
    if CUDA:
        # Not what is allocated: that says nothing of what a captured graph writes to while it runs.
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine(arguments: argparse.Namespace) -> Result:
    """Return the machine's name, and its measured rates of multiplying and of copying."""
    from aligngym.alignment.models import resolve_dtype

    dtype = resolve_dtype(arguments.dtype)
    sizes, repeats = ((8192,), 20) if CUDA else ((2048, 3072), 2)
    flops = 0.0
    for size in sizes:
        left, right = torch.randn(2, size, size, device=DEVICE, dtype=torch.float32).to(dtype)
        for a, b in ((left, right), (left, right.T), (left.T, right)):
            flops = max(flops, 2 * size**3 / typical_seconds(partial(torch.matmul, a, b), repeats))
    source = torch.ones(2**30 if CUDA else 2**28, dtype=torch.uint8, device=DEVICE)
    copying = typical_seconds(partial(torch.empty_like(source).copy_, source), repeats)
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")}
    return {
        "name": torch.cuda.get_device_name() if CUDA else f"{_processor()}, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "flops": flops,
        "bandwidth": 2 * len(source) / copying,
        "versions": {"python": platform.python_version(), **libraries},
    }


def typical_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median of five measurements, each the mean of ``repeats`` calls in a row."""
    work()
    seconds = []
    for _ in range(5):
        start = now()
        for _ in range(repeats):
            work()
        seconds.append((now() - start) / repeats)
    return statistics.median(seconds)


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model on the device, without an adapter, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from aligngym.alignment.models import load_model, resolve_dtype
    from aligngym.core.randomness import seeded

    dtype = resolve_dtype(arguments.dtype)
    if arguments.model not in SHAPES:
        model, tokenizer = load_model(arguments.model, dtype)
        model = model.to(DEVICE)
    else:
        folder = arguments.tokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder) if folder else load_model("smollm2-135m", torch.float32)[1]
        config = LlamaConfig(
            **SHAPES[arguments.model],
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with DEVICE, seeded(0):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return model, tokenizer


def sizes(model: torch.nn.Module) -> Result:
    """Return how many weights the products of a model have, before it gets an adapter, and bytes of them all."""
    head = model.get_output_embeddings()
    products = [
        module.weight.numel()
        for module in model.modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and not isinstance(module, torch.nn.Embedding)
        and module is not head
    ]
    linear, own = sum(products), head.weight.numel()
    return {"linear": linear, "head": own, "bytes": (linear + own) * head.weight.element_size()}


@torch.no_grad()
def draw_adapter(model: torch.nn.Module) -> None:
    """Draw every LoRA A as peft does, from a seed and in the order of the layers, whoever put the adapter there."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def our_policy(arguments: argparse.Namespace, model: Any, tokenizer: Any, kind: Any = None) -> Any:
    """Return a :class:`LanguagePolicy` of the model with a new adapter."""
    from peft import get_peft_model

    from aligngym.alignment import LanguagePolicy, default_lora

    wrapped = get_peft_model(model, default_lora())
    draw_adapter(wrapped)
    return (kind or LanguagePolicy)(wrapped, tokenizer, **policy_options(arguments))


def policy_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--compile`` says to a policy."""
    choices = {"on": True, "off": False, "auto": None}
    return {} if arguments.compile is None else {"compile": choices[arguments.compile]}


def trl_options(arguments: argparse.Namespace, rows: int) -> dict[str, Any]:
    """Return what both of trl's trainers are told, for batches of ``rows`` rows."""
    at_once = arguments.micro_batch_size or rows
    if rows % at_once:
        raise ValueError(f"--micro-batch-size {at_once} does not divide the {rows} rows of a batch")
    from aligngym.alignment.models import resolve_dtype

    return {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": rows // at_once,
        "max_steps": arguments.warm_up + arguments.steps,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "use_cpu": not CUDA,
        "bf16": resolve_dtype(arguments.dtype) == torch.bfloat16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({} if arguments.side == "trl" else {"gradient_checkpointing": False}),
    }


def our_clock(started: float) -> Any:
    """Return a callback of our agents that measures every step and the start, which began at ``started``."""
    from aligngym.core import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.startup = 0.0

        def on_start(self, *_: Any) -> None:
            self.start = now()

        def on_iteration(self, agent: Any, metrics: dict[str, float]) -> None:
            end = now()
            self.startup = self.startup or end - started
            self.seconds.append(end - self.start)
            self.losses.append(metrics["loss"])
            self.start = now()

    return Clock()


def trl_clock(started: float) -> Any:
    """Return a callback of trl's trainers that measures every step and the start, which began at ``started``.

    What lies between steps (collating rows, writing logs) is not counted.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.startup = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end = now()
            self.startup = self.startup or end - started
            self.seconds.append(end - self.start)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Clock()
