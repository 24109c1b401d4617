"""Checkpoints: a folder with `config.json` and `model.safetensors`, written atomically, read without running code."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .config import ModelConfig
from .registry import assembly_class
from .sharing import references

FORMAT, VERSION = "grassland", 1
# By which transformers finds `interop.hf`; the folder of a checkpoint is one of Hugging Face's too.
MODEL_TYPE = "grassland"
# What `torch.compile` puts before the names of a module's tensors.
COMPILED = "_orig_mod."
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """A checkpoint's file that is not there."""


def atomic_write(
    path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], object], *, keep: Path | None = None
) -> None:
    """Replace a file by `content` (bytes, or a function that writes into a binary file) so that a kill at any instant
    leaves either the old file or the new one, whole and on disk. Parent folders are made.

    keep: where the old file goes, in place of what is there.

    Whatever goes wrong (a full disk, an error in `content`), the old file stays and the temporary one is removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and target.exists():
            _keep(target, keep)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _keep(target: Path, keep: Path) -> None:
    # As a write that failed after this leaves them. A rename between two links to one file would do nothing.
    if keep.exists() and keep.samefile(target):
        return
    link = keep.with_name(f".{keep.name}.{uuid.uuid4().hex}.tmp")
    try:
        link.hardlink_to(target)
    except OSError:
        # A file system without links: for an instant the file is missing, but what is kept is there.
        target.replace(keep)
    else:
        link.replace(keep)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_model(model: nn.Module, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model made by `create_model`, compiled or not, into the folder `path`; each file atomically, the weights
    first.

    `config.json` is {"format": "grassland", "version": 1, "model_type": "grassland", "model": {…}, **extra}; extra must
    be JSON-safe. Tensors that the model shares between slots are stored once. ValueError, with nothing written, for a
    model whose modules are no longer those of its config, or that shares one which is no longer its own.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"model must have a ModelConfig as its .config, got {type(model).__name__} without one")
    header = {"format": FORMAT, "version": VERSION, "model_type": MODEL_TYPE, "model": config.to_dict()}
    if clash := header.keys() & (extra or {}).keys():
        raise ValueError(f"extra must not contain {sorted(clash)}")
    tensors = {name.replace(COMPILED, ""): tensor for name, tensor in model.state_dict().items()}
    if (misfit := _misfit(_expected(config), tensors)) is not None:
        raise ValueError(f"model is not what its config builds, so that load_model would fail: {misfit}")
    if (stray := _stray(model)) is not None:
        raise ValueError(f"{stray} refers to a module that is not the model's, so that load_model would give another")
    write_checkpoint(path, {**header, **(extra or {})}, tensors)


def _stray(model: nn.Module) -> str | None:
    """The first place that uses a module which the model no longer has."""
    modules = set(model.modules())
    outside = (name for name, reference in references(model) if reference.module not in modules)
    return next(outside, "").replace(COMPILED, "") or None


def write_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `content` as the folder's `config.json` and the tensors beside it, each atomically, the weights first."""
    text = json.dumps(content, indent=2) + "\n"
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    atomic_write(Path(path) / WEIGHTS_FILE, lambda file: file.write(save_tensors(dense, {"format": "pt"})))
    atomic_write(Path(path) / CONFIG_FILE, text.encode())


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint folder's `config.json`, its format checked; what `save_model` got as extra included.

    Raises CheckpointError (MissingCheckpointError if it is not there) that names the file.
    """
    file = Path(path) / CONFIG_FILE
    try:
        content = json.loads(_read(file))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a {FORMAT} checkpoint ('format' is missing or different)")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{file}: version {content.get('version')!r}, this program reads {VERSION}")
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{file}: 'model' is missing")
    return content


def load_model(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Rebuild the model that `save_model` wrote into the folder `path`, in evaluation mode.

    dtype None keeps that of each stored tensor. Raises CheckpointError that names the file: missing
    (MissingCheckpointError, also a FileNotFoundError), corrupt or truncated, or tensors that are missing, unexpected or
    of the wrong shape.
    """
    values = read_config(path)["model"]
    file = Path(path) / CONFIG_FILE
    try:
        cls = assembly_class(values.get("kind", ModelConfig.kind))
        config = cls.config_class.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    tensors = read_tensors(Path(path) / WEIGHTS_FILE)
    stored = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    check_tensors(_expected(config), tensors, Path(path) / WEIGHTS_FILE)
    model = cls(config, device=device, dtype=dtype or stored)
    if dtype is None:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensors[name].is_floating_point():
                tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
    return model.eval()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingCheckpointError(f"{file}: no such file") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError that names the file if it is missing or damaged."""
    try:
        return load_tensors(_read(file))
    except SafetensorError as error:
        raise CheckpointError(f"{file}: corrupt or truncated ({error})") from error


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """CheckpointError that names `file` and the tensors if names or shapes differ."""
    if (misfit := _misfit(expected, found)) is not None:
        raise CheckpointError(f"{file}: {misfit}")


def _expected(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of the model that a config builds, on the meta device."""
    with torch.device("meta"):
        return assembly_class(config.kind)(config).state_dict()


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes, in words."""
    if missing := sorted(expected.keys() - found.keys()):
        return f"{len(missing)} tensors are missing: {_some(missing)}"
    if surplus := sorted(found.keys() - expected.keys()):
        return f"{len(surplus)} unexpected tensors: {_some(surplus)}"
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            asked = f"{CONFIG_FILE} asks for {tuple(tensor.shape)}"
            return f"{name} has shape {tuple(found[name].shape)}, but {asked}"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
