"""What the commands that only use a language model share: which model, how it writes, and the prompts from a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligngym.commands.options import read_yaml

if TYPE_CHECKING:
    from aligngym.alignment import LanguagePolicy

CONFIG, ADAPTER_CONFIG, DEFAULT_MODEL = "config.yaml", "adapter_config.json", "smollm2-135m"


def add_model_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare which model to use."""
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="Hub id, local folder, .gguf file, or smollm2-135m from its package (default: that of the adapter)",
    )
    model.add_argument("--adapter", metavar="FOLDER", help="in peft's format, or the folder of a run that trained one")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: %(default)s)",
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return model


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how the model writes."""
    writing = parser.add_argument_group("how it writes")
    writing.add_argument("--samples", type=int, default=1, metavar="N", help="completions of each prompt (default: 1)")
    writing.add_argument(
        "--greedy",
        action=argparse.BooleanOptionalAction,
        help="the most probable token each time, instead of a sample (default: for a single completion)",
    )
    writing.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of samples (default: 1)")
    writing.add_argument("--top-p", type=float, default=1.0, metavar="X", help="draw among tokens of this probability")
    writing.add_argument("--top-k", type=int, default=0, metavar="N", help="draw among so many tokens (0: all)")
    writing.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="length (default: %(default)s)")
    writing.add_argument(
        "--stop", action="append", metavar="TEXT", help=r"ends a completion; may be repeated; \n is a line's end"
    )
    writing.add_argument("--system-prompt", metavar="TEXT", help="message before every conversation")
    writing.add_argument("--batch-size", type=int, default=64, metavar="N", help="completions at once (default: 64)")
    writing.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: %(default)s)")


def decoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what :class:`Decoding` is given.

    Raises:
        ValueError: for a bad number, or several completions that would all be the same.
    """
    for name in ("samples", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is at least 1, not {getattr(arguments, name)}")
    if arguments.seed < 0:
        raise ValueError(f"--seed is at least 0, not {arguments.seed}")
    greedy = arguments.samples == 1 if arguments.greedy is None else arguments.greedy
    if greedy and arguments.samples > 1:
        raise ValueError(f"--samples {arguments.samples}: greedy completions are all alike; leave out --greedy")
    if greedy and arguments.temperature != 1:
        raise ValueError(f"--temperature {arguments.temperature:g} is of samples: add --no-greedy, or more --samples")
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "greedy": greedy,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "stop": tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in arguments.stop or ()),
    }
    from aligngym.alignment.generation import Decoding

    return dataclasses.asdict(Decoding(**options))


@dataclass(frozen=True)
class Chosen:
    """Which model is meant.

    Attributes:
        model: its name.
        adapter: the folder of its adapter, in peft's format.
        reference: the folder of the adapter that training began with, if it was not a new one.
    """

    model: str
    adapter: Path | None = None
    reference: Path | None = None

    @classmethod
    def of(cls, model: str | None, adapter: str | Path | None) -> Chosen:
        """Find a model and its adapter.

        Args:
            model: its name; by default what the run or the adapter says.
            adapter: a folder in peft's format, or of a run that has one.

        Raises:
            FileNotFoundError: if there is no adapter.
            ValueError: if it is a reward model's.
        """
        if adapter is None:
            return cls(model or DEFAULT_MODEL)
        folder = Path(adapter)
        recorded: dict[str, Any] = {}
        if not (folder / ADAPTER_CONFIG).is_file():
            if not (folder / "adapter" / ADAPTER_CONFIG).is_file():
                raise FileNotFoundError(f"{folder} is no adapter in peft's format, and no finished run that has one")
            recorded = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
            folder = folder / "adapter"
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            raise ValueError(f"{folder} is an adapter for {config['task_type']}; one for CAUSAL_LM writes text")
        name = model or recorded.get("model") or config.get("base_model_name_or_path") or DEFAULT_MODEL
        began = recorded.get("adapter")
        return cls(str(name), folder, Path(began) if began else None)

    def load(self, arguments: argparse.Namespace) -> LanguagePolicy:
        """Return it as a policy. Its reference is what training began with: another adapter, or the model without."""
        from aligngym.alignment import LanguagePolicy
        from aligngym.alignment.language_policy import REFERENCE_ADAPTER

        policy = LanguagePolicy.from_pretrained(
            self.model,
            adapter=self.adapter,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            temperature=getattr(arguments, "temperature", 1.0),
        )
        if self.adapter:
            # Loaded to be trained further, an adapter would be its own reference.
            policy.model.delete_adapter(REFERENCE_ADAPTER)
        if self.reference:
            policy.model.load_adapter(str(self.reference), REFERENCE_ADAPTER, is_trainable=False)
        return policy
