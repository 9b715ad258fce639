"""What every command that trains an adapter does: its options, the run's folder, the model, training, the report."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from aligngym.commands.options import Table, option, options_from_file, read_options, write_options

if TYPE_CHECKING:
    from torch import Tensor

    from aligngym.alignment import LanguagePolicy
    from aligngym.core import Agent, Callback

CONFIG, CHECKPOINT = "config.yaml", "checkpoint.safetensors"

#: What ``--compile`` means to :class:`LanguagePolicy`.
COMPILE = {"auto": None, "on": True, "off": False}

Options = TypeVar("Options", bound="AdapterOptions")


@dataclass
class AdapterOptions:
    """What a run with an adapter depends on, whatever the algorithm; ``config.yaml`` has all of it.

    A command's own dataclass adds fields, and may declare one of these again for another default or help.

    Attributes:
        command: the name of the command, for the run's folder.
        positive: options that are at least 1 if they are given.
        sources: options that name a data file or a Hub dataset; the first must be given.
    """

    command: ClassVar[str]
    positive: ClassVar[tuple[str, ...]] = ("batch_size", "gradient_accumulation", "lora_r")
    sources: ClassVar[tuple[str, ...]] = ("train",)

    model: str = option("smollm2-135m", "Hub id, local folder, .gguf file, or smollm2-135m from its package")
    train: str | None = option(None, ".json, .jsonl, .csv or .parquet file, or a Hub id")
    output: str | None = option(None, "folder of the run (default: runs/COMMAND-MODEL-TRAIN)")
    adapter: str | None = option(None, "continue this adapter (peft's format); its frozen copy is the reference")
    learning_rate: float = option(2e-4, "peak learning rate; LoRA takes about ten times that of full fine-tuning")
    schedule: str = option("linear", "how the learning rate falls", ("linear", "cosine", "constant"))
    warmup: float = option(0.1, "share of the steps over which the learning rate rises")
    epochs: float = option(1.0, "passes over the training rows")
    max_steps: int | None = option(None, "optimiser steps in all, instead of --epochs")
    batch_size: int = option(8, "rows per optimiser step, on all devices together")
    gradient_accumulation: int | None = option(
        None, "pieces a batch is computed in; the step is the same (default: what the device is best given)"
    )
    max_grad_norm: float = option(1.0, "longest gradient")
    lora_r: int = option(16, "rank of a new adapter")
    lora_dropout: float = option(0.0, "dropout on a new adapter's input")
    dtype: str = option("auto", "of the frozen weights", ("auto", "float32", "bfloat16", "float16"))
    checkpoint_every: int = option(20, "steps between checkpoints, from which --resume continues")
    trackers: str = option("tensorboard", "accelerate's trackers, separated by commas")
    trust_remote_code: bool = option(False, "run code that comes with the model")
    seed: int = option(0, "of the adapter, the order of the rows, and everything else random")

    def __post_init__(self) -> None:
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup is a share of the steps, in [0, 1], not {self.warmup}")
        if self.train and not self.output:
            self.output = f"runs/{self.command}-{Path(self.model).stem}-{Path(self.train).stem}"

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(str(self.output))

    @property
    def tracker_names(self) -> list[str]:
        """The trackers, one by one."""
        return [name for name in self.trackers.split(",") if name]

    def steps(self, rows: int) -> int:
        """Return how many optimiser steps a run over ``rows`` rows of data takes."""
        return round(self.epochs * -(-rows // self.batch_size)) if self.max_steps is None else self.max_steps

    def micro_batch_size(self, rows: int) -> int | None:
        """Return how many rows of a batch of ``rows`` are computed at once, if the run was told in how many pieces."""
        return self.gradient_accumulation and -(-rows // self.gradient_accumulation)

    def optimisation(self, steps: int) -> dict[str, Any]:
        """Return what every :class:`GradientAgent` is given for a run of ``steps`` steps."""
        from aligngym.core import Constant, Decay

        schedule = (
            Constant(self.learning_rate)
            if self.schedule == "constant"
            else Decay(self.learning_rate, steps, round(self.warmup * steps), self.schedule)
        )
        return {
            "learning_rate": schedule,
            "micro_batch_size": self.micro_batch_size(self.batch_size),
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
        }


@dataclass
class PolicyOptions(AdapterOptions):
    """Of a run that trains a language model to write, whatever it learns from."""

    compile: str = option("auto", "compile the model's layers; auto: on a GPU, in long runs", tuple(COMPILE))

    def load_policy(self, **options: Any) -> LanguagePolicy:
        """Return the model with its adapter, made with further ``options``; ``dtype`` becomes the one chosen."""
        from aligngym.alignment import LanguagePolicy, default_lora

        policy = LanguagePolicy.from_pretrained(
            self.model,
            lora=None if self.adapter else default_lora(self.lora_r, self.lora_dropout),
            adapter=self.adapter,
            dtype=self.dtype,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            compile=COMPILE[self.compile],
            **options,
        )
        self.dtype = str(policy.dtype).removeprefix("torch.")
        return policy


def run_options(kind: type[Options], arguments: argparse.Namespace) -> Options:
    """Return a command's options, after everything that can be checked before a model is loaded.

    An output folder that holds a run is continued with ``--resume``, with the options recorded there, or refused.

    Args:
        kind: the command's dataclass of options.
        arguments: what :func:`argparse` has read, with ``resume``.

    Raises:
        FileNotFoundError: for a data file that does not exist, or no run to resume.
        FileExistsError: if the output folder holds a run, or is a file.
        ValueError: for a missing source of data, an unknown tracker, or other options than the run that is resumed.
    """
    from aligngym.core.tracking import check_trackers

    options = read_options(kind, arguments)
    if arguments.resume:
        options = _recorded(options, arguments)
    else:
        _check_new(options)
    check_trackers(options.tracker_names)
    return options


def _recorded(options: Options, arguments: argparse.Namespace) -> Options:
    """Return the options of the run that is resumed."""
    if not options.output or not (options.folder / CONFIG).exists():
        raise FileNotFoundError(f"--resume: no run in {options.output}: give the --output folder of one")
    recorded = options_from_file(type(options), options.folder / CONFIG)
    for name, value in dataclasses.asdict(recorded).items():
        given = getattr(arguments, name, value)
        if given != value and name != "dtype":
            raise ValueError(f"--resume continues with {name}={value}, and {given} was given: leave it out")
    return recorded


def _check_new(options: AdapterOptions) -> None:
    kinds = {entry.name: entry.metadata["help"] for entry in dataclasses.fields(options)}
    needed = options.sources[0]
    if getattr(options, needed) is None:
        raise ValueError(f"--{needed} is missing: {kinds[needed]}")
    if (options.folder / CONFIG).exists():
        raise FileExistsError(
            f"{options.output} already holds a run: choose another --output, or continue it with --resume"
        )
    if options.folder.exists() and not options.folder.is_dir():
        raise FileExistsError(f"--output {options.output} is a file: choose a folder")
    for name in options.sources:
        source = getattr(options, name)
        # Looked at now, since loading the model takes longer than seeing that a file is missing.
        if source and Path(source).suffix in (".json", ".jsonl", ".csv", ".parquet") and not Path(source).is_file():
            raise FileNotFoundError(f"--{name} {source}: no such file")


def train_adapter(
    agent: Agent,
    policy: LanguagePolicy,
    options: AdapterOptions,
    steps: int,
    *,
    resume: bool,
    batch: str,
    facts: Mapping[str, str],
    callbacks: Sequence[Callback] = (),
) -> None:
    """Begin the run's folder or continue in it, say what is trained on what, train, and save the adapter.

    Args:
        agent: what learns.
        policy: its policy.
        options: of the run, recorded in ``config.yaml``.
        steps: iterations in all, those before an interruption included.
        resume: whether to continue from the last checkpoint, if there is one.
        batch: what a step is made of, such as ``"8 pairs"``.
        facts: further lines of the announcement, by their labels of at most eight letters.
        callbacks: of :meth:`Agent.learn`.
    """
    checkpoint = options.folder / CHECKPOINT
    if resume and checkpoint.exists():
        agent.load(checkpoint)
    elif agent.is_main_process:
        options.folder.mkdir(parents=True, exist_ok=True)
        write_options(options, options.folder / CONFIG)
    if agent.is_main_process:
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in policy.parameters())
        where = f"{policy.device.type}, {options.dtype}, {'packed' if policy.packed else 'padded'} rows"
        resumed = f", from step {agent.iteration}" if agent.iteration else ""
        lines = {
            "model": f"{options.model} ({where}), {trained / 1e6:.1f}M of {total / 1e6:.1f}M parameters trained",
            **facts,
            "steps": f"{steps} of {batch}{resumed}",
            "output": str(options.output),
        }
        print("\n".join(f"{label:<8} {text}" for label, text in lines.items()), flush=True)
    agent.learn(
        max(0, steps - agent.iteration),
        output=options.folder,
        checkpoint_every=options.checkpoint_every,
        trackers=options.tracker_names,
        callbacks=callbacks,
    )
    if agent.is_main_process:
        policy.save(options.folder / "adapter")


@dataclass
class ComparisonOptions(PolicyOptions):
    """Of a run on rows of data that ends with a table of before and after on rows that were held back."""

    positive = (*AdapterOptions.positive, "eval_size", "max_length", "max_new_tokens")
    sources = ("train", "eval")

    eval: str | None = option(None, "rows to judge the adapter on; without it, some of --train are held back")
    eval_size: int = option(100, "rows held back for evaluation, at most a fifth of --train")
    max_length: int = option(1024, "most tokens of prompt and completion together")
    drop_invalid: bool = option(False, "leave out rows that cannot be used, instead of stopping at them")
    samples: int = option(3, "greedy completions to show side by side")
    kl_samples: int = option(16, "sampled completions from which the KL to the reference is estimated")
    max_new_tokens: int = option(64, "length of these completions")

    def counts(self, train: Any, held_back: Any) -> str:
        """Return how many rows there are to train on and to judge by, in words."""
        return (
            f"{len(train)} to train on ({train.num_tokens / len(train):.0f} tokens each), "
            f"{len(held_back)} to judge by ({self.eval or 'held back'})"
        )

    def train_and_held_back(self, load: Any, policy: LanguagePolicy) -> tuple[Any, Any]:
        """Return the rows to train on and those to judge by, read with a loader such as ``load_preferences``."""

        def rows(source: str) -> Any:
            return load(
                source,
                policy.tokenizer,
                max_length=self.max_length,
                drop_invalid=self.drop_invalid,
                end_tokens=policy.end_tokens,
            )

        train = rows(str(self.train))
        if self.eval:
            return train, rows(self.eval)
        return train.hold_back(min(self.eval_size, max(1, len(train) // 5)), self.seed)


@dataclass
class TokenBatchOptions(ComparisonOptions):
    """Of such a run whose batches may be made of numbers of tokens instead of rows."""

    positive = (*ComparisonOptions.positive, "tokens_per_batch")

    tokens_per_batch: int | None = option(
        None, "instead of --batch-size: as many rows per step as fit in so many tokens, so that steps cost the same"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_batch is None:
            return
        own = {entry.name: entry.default for entry in dataclasses.fields(self)}
        for name in ("batch_size", "gradient_accumulation"):
            if getattr(self, name) != own[name]:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"--tokens-per-batch says how many rows a step has, and so does {flag}: leave one out")

    def batch(self, unit: str) -> str:
        """Return what a step is made of, in words."""
        if self.tokens_per_batch is None:
            return f"{self.batch_size} {unit}"
        return f"{unit} of at most {self.tokens_per_batch} tokens together"

    def steps_over(self, rows: Any) -> int:
        """Return how many optimiser steps a run over some rows takes."""
        from aligngym.alignment.dataset_agent import batch_order

        order = batch_order(rows, self.batch_size, self.tokens_per_batch, self.seed)
        return order.steps(self.epochs) if self.max_steps is None else self.max_steps


def report(
    options: ComparisonOptions,
    policy: LanguagePolicy,
    title: str,
    result: Mapping[str, float],
    shown: Mapping[str, tuple[str, str]],
    prompts: Sequence[Tensor],
) -> None:
    """Print and write what training changed: metrics before and after, the KL, and completions side by side.

    Args:
        options: of the run.
        policy: trained.
        title: of the table.
        result: metrics by name, those of the reference as ``reference_…``; ``accuracy`` has its interval beside it.
        shown: which of them to show, under which label and with which digits.
        prompts: to complete; each is taken once.
    """
    from aligngym.alignment import completions_side_by_side, kl_to_reference

    prompts = list({tuple(prompt.tolist()): prompt for prompt in prompts}.values())
    kl, error = kl_to_reference(
        policy, prompts[: options.kl_samples], max_new_tokens=options.max_new_tokens, seed=options.seed
    )
    rows = []
    for name, (label, digits) in shown.items():
        before, after = (format(result[f"{prefix}{name}"], digits) for prefix in ("reference_", ""))
        if name == "accuracy":
            after += f" [{result['accuracy_low']:{digits}}, {result['accuracy_high']:{digits}}]"
        rows.append([label, before, after])
    rows.append(["KL to the reference, nats", "0", f"{kl:.2f} ± {error:.2f}"])
    lines = [f"\n{Table([title, 'before', 'after'], rows)}"]
    if options.samples:
        lines.append(
            completions_side_by_side(policy, prompts[: options.samples], max_new_tokens=options.max_new_tokens)
        )
    text = "\n\n".join(lines)
    print(text)
    output = options.folder
    (output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(
        f"\nadapter         {output / 'adapter'}  (peft's format, with the tokenizer)\n"
        f"metrics         {output / 'metrics.jsonl'}, tensorboard --logdir {output}\n"
        f"the same again  aligngym {options.command} --config {output / CONFIG} --output ANOTHER"
    )
