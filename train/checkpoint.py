"""The resumable state of a run in one safetensors file: tensors, and the rest of the tree as JSON in its header."""

import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..archs import CheckpointError, MissingCheckpointError, atomic_write, read_config
from ..archs.io import CONFIG_FILE
from .config import RunConfig

STATE_FILE = "state.safetensors"
FORMAT = "grassland-state-1"


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state`, a tree of dicts, lists, tuples, tensors and JSON scalars, into `folder`, atomically.

    One file holds all of it, so a kill at any instant leaves this state or the one before. Tensors that share memory
    are stored once. Raises OSError (a full disk, …) with the file before untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, "", tensors, {}))
    metadata = {"format": FORMAT, "tree": tree, "crc32": str(_checksum(tree, tensors))}
    atomic_write(folder / STATE_FILE, lambda file: file.write(save_tensors(tensors, metadata)))


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote, tensors on the CPU, types and bits as they were.

    Raises CheckpointError that names the file and how to go on if it is missing, corrupt or truncated.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise MissingCheckpointError(f"{path}: no such file; nothing to resume, start a run with --out instead")
    try:
        tree, tensors = _read(path)
        return _unpack(tree, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        advice = f"start anew with another --out; the best weights so far are {folder / 'model.safetensors'}"
        raise CheckpointError(f"{path}: corrupt or truncated ({error}); {advice}") from error


def save_run_config(folder: Path, config: RunConfig) -> None:
    """Replace the run's settings in `folder`'s config.json, atomically, and leave the rest of it."""
    content = {**read_config(folder), "run": config.to_dict()}
    atomic_write(folder / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())


def rng_state() -> dict[str, Any]:
    """The states of the global generators of python, numpy and torch, the GPUs' included."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `rng_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    # A run may go on with another number of GPUs; each there gets its own state back.
    for device, cuda in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        # Clones: the file may be replaced while tensors that map it are alive.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if metadata["crc32"] != str(_checksum(metadata["tree"], tensors)):
        raise ValueError("its checksum is wrong")
    return json.loads(metadata["tree"]), tensors


def _pack(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> Any:
    """JSON that remembers what JSON forgets: key types, tuples, and where the tensors are."""
    if isinstance(value, Tensor | np.ndarray):
        # Without its memory layout a moment of a channels-last weight would sum up in another order.
        last = isinstance(value, Tensor) and not value.is_contiguous() and _is_channels_last(value)
        stored = _store(value, name, tensors, seen)
        return {"tensor": stored, "numpy": isinstance(value, np.ndarray), "channels_last": last}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(entry, f"{name}.{key}", tensors, seen)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        entries = [_pack(entry, f"{name}.{index}", tensors, seen) for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"tuple": entries}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a training state cannot hold {type(value).__name__} at {name}")


def _store(value: Tensor | np.ndarray, name: str, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> str:
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
    identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if tensor.numel() and identity in seen:
        return seen[identity]
    key = name.lstrip(".")
    tensors[key] = tensor.cpu().contiguous()
    seen[identity] = key
    return key


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        if value.get("channels_last"):
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.numpy() if value["numpy"] else tensor
    if "tuple" in value:
        return tuple(_unpack(entry, tensors) for entry in value["tuple"])
    return {key: _unpack(entry, tensors) for key, entry in value["dict"]}


def _checksum(tree: str, tensors: Mapping[str, Tensor]) -> int:
    crc = zlib.crc32(tree.encode())
    for name in sorted(tensors):
        data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy() if tensors[name].numel() else b""
        crc = zlib.crc32(data, crc)
    return crc
