"""``aligngym dpo``: a preference file and a model in, an adapter and a before/after table out."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aligngym.commands.options import Table, add_options, option, read_options, read_yaml, write_options

if TYPE_CHECKING:
    from aligngym.alignment import DPO, LanguagePolicy, TokenPreferences


#: What the table of a finished run shows of :meth:`DPO.evaluate`, under which name and with how many digits.
SHOWN = {
    "accuracy": ("implicit-reward accuracy [95 %]", ".3f"),
    "margin": ("implicit-reward margin", ".3f"),
    "loss": ("loss", ".4f"),
    "chosen": ("log π(chosen)", ".1f"),
    "rejected": ("log π(rejected)", ".1f"),
}


@dataclass
class DPOOptions:
    """Everything that a run depends on; ``config.yaml`` in the output folder has all of it."""

    model: str = option("smollm2-135m", "Hub id, local folder, .gguf file, or smollm2-135m from its package")
    train: str | None = option(None, "preference pairs: .json, .jsonl, .csv or .parquet file, or a Hub id")
    eval: str | None = option(None, "pairs to judge the adapter on; without it, some of --train are held back")
    eval_size: int = option(100, "pairs held back for evaluation, at most a fifth of --train")
    output: str | None = option(None, "folder of the run (default: runs/dpo-MODEL-TRAIN)")
    adapter: str | None = option(None, "continue this adapter (peft's format); its frozen copy is the reference")
    loss: str = option("sigmoid", "preference loss", ("sigmoid", "robust", "ipo", "hinge", "simpo"))
    beta: float = option(0.1, "strength of the regularisation towards the reference")
    label_smoothing: float = option(0.0, "share of labels believed to be flipped (sigmoid, robust, simpo)")
    target_margin: float = option(0.0, "SimPO's margin γ")
    learning_rate: float = option(2e-4, "peak learning rate; LoRA takes about ten times that of full fine-tuning")
    schedule: str = option("linear", "how the learning rate falls", ("linear", "cosine", "constant"))
    warmup: float = option(0.1, "share of the steps over which the learning rate rises")
    epochs: float = option(1.0, "passes over the training pairs")
    max_steps: int | None = option(None, "optimiser steps in all, instead of --epochs")
    batch_size: int = option(8, "pairs per optimiser step, on all devices together")
    gradient_accumulation: int = option(1, "pieces a batch is computed in, to save memory; the step is the same")
    max_grad_norm: float = option(1.0, "longest gradient")
    lora_r: int = option(16, "rank of a new adapter")
    lora_dropout: float = option(0.0, "dropout on a new adapter's input")
    dtype: str = option("auto", "of the frozen weights", ("auto", "float32", "bfloat16", "float16"))
    max_length: int = option(1024, "most tokens of prompt and completion together")
    drop_invalid: bool = option(False, "leave out rows that cannot be used, instead of stopping at them")
    samples: int = option(3, "greedy completions to show side by side")
    kl_samples: int = option(16, "sampled completions from which the KL to the reference is estimated")
    max_new_tokens: int = option(64, "length of these completions")
    checkpoint_every: int = option(20, "steps between checkpoints, from which --resume continues")
    trackers: str = option("tensorboard", "accelerate's trackers, separated by commas")
    trust_remote_code: bool = option(False, "run code that comes with the model")
    seed: int = option(0, "of the adapter, the held-back pairs, the order of the pairs, and dropout")

    def __post_init__(self) -> None:
        for name in ("eval_size", "batch_size", "gradient_accumulation", "lora_r", "max_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup is a share of the steps, in [0, 1], not {self.warmup}")
        if self.train and not self.output:
            self.output = f"runs/dpo-{Path(self.model).stem}-{Path(self.train).stem}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    add_options(parser, DPOOptions)


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; everything that can be wrong with the input is found before the first step."""
    options = _options(arguments)
    from aligngym.alignment import DPO, LanguagePolicy, default_lora
    from aligngym.core import Constant, Decay
    from aligngym.core.tracking import check_trackers

    trackers = [name for name in options.trackers.split(",") if name]
    check_trackers(trackers)
    policy = LanguagePolicy.from_pretrained(
        options.model,
        lora=None if options.adapter else default_lora(options.lora_r, options.lora_dropout),
        adapter=options.adapter,
        dtype=options.dtype,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    options.dtype = str(policy.dtype).removeprefix("torch.")
    train, held_back = _load_pairs(options, policy)

    steps = options.max_steps
    if steps is None:
        steps = round(options.epochs * -(-len(train) // options.batch_size))
    learning_rate = (
        Constant(options.learning_rate)
        if options.schedule == "constant"
        else Decay(options.learning_rate, steps, round(options.warmup * steps), options.schedule)
    )
    agent = DPO(
        policy,
        train,
        beta=options.beta,
        loss=options.loss,
        label_smoothing=options.label_smoothing,
        target_margin=options.target_margin,
        batch_size=options.batch_size,
        micro_batch_size=-(-options.batch_size // options.gradient_accumulation),
        learning_rate=learning_rate,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
    )
    output = Path(str(options.output))
    checkpoint = output / "checkpoint.safetensors"
    if arguments.resume and checkpoint.exists():
        agent.load(checkpoint)
    elif agent.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_options(options, output / "config.yaml")
    _announce(options, policy, train, held_back, agent, steps)
    agent.learn(
        max(0, steps - agent.iteration),
        output=output,
        checkpoint_every=options.checkpoint_every,
        trackers=trackers,
    )
    if agent.is_main_process:
        policy.save(output / "adapter")
        _report(options, policy, held_back, agent, output)
    return 0


def _options(arguments: argparse.Namespace) -> DPOOptions:
    """Read the options; an output folder that holds a run is continued with ``--resume`` or refused."""
    options = read_options(DPOOptions, arguments)
    if arguments.resume and options.output and (Path(options.output) / "config.yaml").exists():
        recorded = DPOOptions(**read_yaml(Path(options.output) / "config.yaml"))
        for name, value in dataclasses.asdict(recorded).items():
            given = getattr(arguments, name, value)
            if given != value and name != "dtype":
                raise ValueError(f"--resume continues with {name}={value}, and {given} was given: leave it out")
        return recorded
    if arguments.resume:
        raise FileNotFoundError(f"--resume: no run in {options.output}: give the --output folder of one")
    if options.train is None:
        raise ValueError("--train is missing: a file of preference pairs, or a Hub id")
    output = Path(str(options.output))
    if (output / "config.yaml").exists():
        raise FileExistsError(f"{output} already holds a run: choose another --output, or continue it with --resume")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output {output} is a file: choose a folder")
    for name in ("train", "eval"):
        source = getattr(options, name)
        # Looked at now, since loading the model takes longer than seeing that a file is missing.
        if source and Path(source).suffix in (".json", ".jsonl", ".csv", ".parquet") and not Path(source).is_file():
            raise FileNotFoundError(f"--{name} {source}: no such file")
    return options


def _load_pairs(options: DPOOptions, policy: LanguagePolicy) -> tuple[TokenPreferences, TokenPreferences]:
    from aligngym.alignment import load_preferences

    def load(source: str) -> TokenPreferences:
        return load_preferences(
            source,
            policy.tokenizer,
            max_length=options.max_length,
            drop_invalid=options.drop_invalid,
            end_tokens=policy.end_tokens,
        )

    train = load(str(options.train))
    if options.eval:
        return train, load(options.eval)
    return train.hold_back(min(options.eval_size, max(1, len(train) // 5)), options.seed)


def _announce(
    options: DPOOptions,
    policy: LanguagePolicy,
    train: TokenPreferences,
    held_back: TokenPreferences,
    agent: DPO,
    steps: int,
) -> None:
    if not agent.is_main_process:
        return
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in policy.parameters())
    resumed = f", from step {agent.iteration}" if agent.iteration else ""
    where = f"{policy.device.type}, {options.dtype}, {'packed' if policy.packed else 'padded'} rows"
    source = options.eval or "held back"
    print(
        f"model    {options.model} ({where}), {trained / 1e6:.1f}M of {total / 1e6:.1f}M parameters trained\n"
        f"pairs    {len(train)} to train on ({train.num_tokens / len(train):.0f} tokens each), "
        f"{len(held_back)} to judge by ({source})\n"
        f"steps    {steps} of {options.batch_size} pairs{resumed}\n"
        f"output   {options.output}",
        flush=True,
    )


def _report(options: DPOOptions, policy: LanguagePolicy, held_back: TokenPreferences, agent: DPO, output: Path) -> None:
    from aligngym.alignment import completions_side_by_side, kl_to_reference

    result = agent.evaluate(held_back)
    prompts = list({tuple(prompt.tolist()): prompt for prompt in held_back.prompts}.values())
    kl, error = kl_to_reference(
        policy, prompts[: options.kl_samples], max_new_tokens=options.max_new_tokens, seed=options.seed
    )
    before, after = ({name: result[f"{prefix}{name}"] for name in SHOWN} for prefix in ("reference_", ""))
    rows = [
        [label, format(before[name], digits), format(after[name], digits)] for name, (label, digits) in SHOWN.items()
    ]
    rows[0][2] += f" [{result['accuracy_low']:.3f}, {result['accuracy_high']:.3f}]"
    rows.append(["KL to the reference, nats", "0", f"{kl:.2f} ± {error:.2f}"])
    lines = [f"\n{Table([f'{len(held_back)} held-back pairs', 'before', 'after'], rows)}"]
    if options.samples:
        lines.append(
            completions_side_by_side(policy, prompts[: options.samples], max_new_tokens=options.max_new_tokens)
        )
    text = "\n\n".join(lines)
    print(text)
    (output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(
        f"\nadapter         {output / 'adapter'}  (peft's format, with the tokenizer)\n"
        f"metrics         {output / 'metrics.jsonl'}, tensorboard --logdir {output}\n"
        f"the same again  aligngym dpo --config {output / 'config.yaml'} --output ANOTHER"
    )
