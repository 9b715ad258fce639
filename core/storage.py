"""Files that are either the old version or the complete new one, and that never run code when they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place once the block ends without an error.

    A process killed in the middle leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tree(path: str | Path, tree: dict[str, Any]) -> None:
    """Write a nested dictionary of tensors, arrays and JSON values to one safetensors file.

    Tensors become entries of the file; everything else, with the shape of the nesting, becomes JSON in its metadata.
    Keys may be strings or integers (an optimiser's state has integer keys), tuples come back as lists.

    Raises:
        TypeError: for a value that is neither a tensor, an array nor JSON.
    """
    # Imported here, because whoever saves nothing, such as a planner, can do without.
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}

    def skeleton(node: Any) -> Any:
        if isinstance(node, dict):
            return {"dict": [[key, skeleton(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return {"list": [skeleton(value) for value in node]}
        if isinstance(node, (torch.Tensor, np.ndarray)):
            name = str(len(tensors))
            # A copy each: safetensors refuses tensors that share memory, such as tied weights.
            tensor = torch.as_tensor(node.copy()) if isinstance(node, np.ndarray) else node.detach().cpu().clone()
            tensors[name] = tensor.contiguous()
            return {"array" if isinstance(node, np.ndarray) else "tensor": name}
        return {"json": node}

    text = json.dumps(skeleton(tree))
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"tree": text})


def load_tree(path: str | Path) -> dict[str, Any]:
    """Read back what :func:`save_tree` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not one that :func:`save_tree` wrote.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    with opened as file:
        metadata = file.metadata() or {}
        if "tree" not in metadata:
            raise ValueError(f"{path}: a safetensors file, but not one that an agent saved")

        def restore(node: dict[str, Any]) -> Any:
            ((kind, value),) = node.items()
            if kind == "dict":
                return {key: restore(child) for key, child in value}
            if kind == "list":
                return [restore(child) for child in value]
            if kind == "json":
                return value
            tensor = file.get_tensor(value)
            return tensor.numpy() if kind == "array" else tensor

        return restore(json.loads(metadata["tree"]))
