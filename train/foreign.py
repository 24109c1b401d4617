"""Models of other libraries in the format of `archs.save_model`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..archs import CheckpointError
from ..archs.io import CONFIG_FILE, FORMAT, VERSION, WEIGHTS_FILE, check_tensors, read_tensors, write_checkpoint


def save_foreign(
    folder: Path, model: Mapping[str, Any], tensors: Mapping[str, Tensor], extra: Mapping[str, Any]
) -> None:
    """Write config.json and model.safetensors. model: what it takes to build it."""
    write_checkpoint(folder, {"format": FORMAT, "version": VERSION, "model": model, **extra}, tensors)


def load_foreign(folder: Path, build: Callable[[], Any], device: torch.device | str, prefix: str = "") -> Any:
    """What `build` makes, with the folder's weights, in evaluation mode. prefix: of the tensors' names in the model.

    Raises CheckpointError that names the file, also for what goes wrong in `build`.
    """
    tensors = {prefix + name: tensor for name, tensor in read_tensors(folder / WEIGHTS_FILE).items()}
    try:
        model = build()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    check_tensors(model.state_dict(), tensors, folder / WEIGHTS_FILE)
    model.load_state_dict(tensors)
    return model.to(device).eval()
