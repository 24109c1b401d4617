"""The resumable state of a run in one safetensors file: tensors, and the rest of the tree as JSON in its header."""

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..archs import CheckpointError, MissingCheckpointError, atomic_write, read_config
from ..archs.io import CONFIG_FILE, WEIGHTS_FILE
from .config import RunConfig
from .parallel import barrier, gather, is_main
from .shards import check_shards, read_shards, remove_shards, write_shards

STATE_FILE, PREVIOUS_FILE = "state.safetensors", "state.previous.safetensors"
FORMAT = "grassland-state-1"
# What a file that is not ours, or not what it was, can make its readers raise.
DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state`, a tree of dicts, lists, tuples, tensors and JSON scalars, into `folder`, atomically; keep the one
    before as `PREVIOUS_FILE`.

    One file holds all of it, so a kill at any instant leaves this state or the one before. Tensors that share memory
    are stored once. Shards (DTensor) lie in a folder of their own that the file names, complete before the file is.
    All processes call it together; the first one writes the file. Raises OSError (a full disk, …) with the files
    before untouched.
    """
    packed = _Packed()
    tree = packed.pack(state, "")
    written = write_shards(folder, packed.shards, state["step"]) if packed.shards else None
    if is_main():
        text = json.dumps({"state": tree, "shards": written, "run": state.get("run")})
        metadata = {"format": FORMAT, "tree": text, "crc32": str(_checksum(text, packed.tensors))}
        content = save_tensors(packed.tensors, metadata)
        atomic_write(folder / STATE_FILE, lambda file: file.write(content), keep=folder / PREVIOUS_FILE)
        remove_shards(folder, except_for={_header(folder / name).get("shards") for name in _present(folder)})
    barrier()


def load_state(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """What `save_state` wrote, tensors on the CPU, types and bits as they were; the state before if it is damaged.

    mesh: what was saved in shards comes as shards on it; without one, whole. All processes call it together.
    Raises CheckpointError that names the file and how to go on if both states are missing, corrupt or truncated.
    """
    problems: list[str] = []
    for name in (STATE_FILE, PREVIOUS_FILE):
        content, problem = _try_read(folder, name)
        if content is not None:
            try:
                state = _assemble(folder, *content, mesh)
            except DAMAGE as error:
                raise CheckpointError(f"{folder / name}: not a state of grassland's ({error!r})") from error
            if problems and is_main():
                print(f"{problems[0]}; going on from the state before, of step {state.get('step')}", file=sys.stderr)
            return state
        problems.append(problem)
    if not has_state(folder):
        path = folder / STATE_FILE
        raise MissingCheckpointError(f"{path}: no such file; nothing to resume, start a run with --out instead")
    advice = f"start anew with another --out; the best weights so far are {folder / WEIGHTS_FILE}"
    raise CheckpointError(f"{problems[0]}; {advice}")


def has_state(folder: Path) -> bool:
    """Whether there is something to resume in `folder`."""
    return bool(_present(folder))


def stored_settings(folder: Path, task: str) -> dict[str, Any]:
    """The settings of the run of `task` in `folder`: from config.json, or if that is damaged from the state's own copy.

    Raises CheckpointError that names config.json, also for a run of another task.
    """
    try:
        content = read_config(folder)
        values, found = content.get("run"), content.get("task", task)
    except CheckpointError as error:
        values = next((run for name in _present(folder) if (run := _header(folder / name).get("run"))), None)
        if values is None:
            raise
        print(f"{error}; going on with the settings that {STATE_FILE} keeps", file=sys.stderr)
        found = task
    if found != task:
        raise CheckpointError(f"{folder / CONFIG_FILE}: a run of train {found}, not of train {task}")
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: no settings of a run in it, nothing to resume")
    return values


def save_run_config(folder: Path, config: RunConfig) -> None:
    """Replace the run's settings in `folder`'s config.json, atomically, and leave the rest of it."""
    content = {**read_config(folder), "run": config.to_dict()}
    atomic_write(folder / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _present(folder: Path) -> list[str]:
    return [name for name in (STATE_FILE, PREVIOUS_FILE) if (folder / name).is_file()]


def _header(path: Path) -> dict[str, Any]:
    """What the header of a state says apart from the state, nothing if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
        return {"run": tree["run"], "shards": (tree["shards"] or {}).get("name")}
    except DAMAGE:
        return {}


def _try_read(folder: Path, name: str) -> tuple[tuple[Any, dict[str, Tensor]] | None, str]:
    """The content of a state, or None and what is wrong with it; the same in all processes."""
    content, problem = None, ""
    path = folder / name
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        content = _read(path)
        if content[0]["shards"] is not None:
            check_shards(folder, content[0]["shards"])
    except DAMAGE as error:
        problem = f"{path}: corrupt or truncated ({error})"
    problems = [found for found in gather(problem) if found]
    return (None, problems[0]) if problems else (content, "")


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


def _assemble(folder: Path, tree: Any, tensors: dict[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Any]:
    written = tree["shards"]
    if written is not None:
        tensors = {**tensors, **read_shards(folder, written, mesh)}
    return _unpack(tree["state"], tensors)


class _Packed:
    """A tree as JSON that remembers what JSON forgets: key types, tuples, and where the tensors are."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.shards: dict[str, DTensor] = {}
        self._seen: dict[tuple, str] = {}

    def pack(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            # Without its memory layout a moment of a channels-last weight would sum up in another order.
            last = isinstance(value, Tensor) and not value.is_contiguous() and _is_channels_last(value)
            stored = self._store(value, name.lstrip("."))
            return {"tensor": stored, "numpy": isinstance(value, np.ndarray), "channels_last": last}
        if isinstance(value, Mapping):
            return {"dict": [[key, self.pack(entry, f"{name}.{key}")] for key, entry in value.items()]}
        if isinstance(value, list | tuple):
            entries = [self.pack(entry, f"{name}.{index}") for index, entry in enumerate(value)]
            return entries if isinstance(value, list) else {"tuple": entries}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a training state cannot hold {type(value).__name__} at {name}")

    def _store(self, value: Tensor | np.ndarray, key: str) -> str:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
        if isinstance(tensor, DTensor):
            self.shards[key] = tensor
            return key
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and identity in self._seen:
            return self._seen[identity]
        self.tensors[key] = tensor.cpu().contiguous()
        self._seen[identity] = key
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
        crc = zlib.crc32(name.encode(), crc)
        data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy() if tensors[name].numel() else b""
        crc = zlib.crc32(data, crc)
    return crc
