"""From settings to a run: the folder, the device, the seeds, the task."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from .config import RunConfig
from .loop import Trainer
from .tasks.base import Task

C = TypeVar("C", bound=RunConfig)


def run(task: Callable[[C, torch.device], Task], config: C) -> int:
    """Train what `task` builds from the settings; the exit code of the process.

    Nothing is written before the settings, the data and the model are known to be good.
    """
    folder = run_folder(config)
    device = pick_device(config.device)
    seed_everything(config.seed)
    built = task(config, device)
    return Trainer(built, replace(config, out=str(folder)), folder).run()


def run_folder(config: RunConfig) -> Path:
    """The folder of the run: the resumed one, the given one, or the first free of runs/MODEL-DATA, …-2, …-3.

    Raises ValueError if the given one already has something in it.
    """
    if config.resume:
        return Path(config.resume)
    if config.out:
        folder = Path(config.out)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"{folder} is not an empty folder; continue its run with --resume, or give another --out")
        return folder
    model, data = (Path(name).name or name for name in (config.model, config.data))
    base = Path("runs") / f"{model}-{data}".replace(":", "-")
    names = (base if number == 1 else base.with_name(f"{base.name}-{number}") for number in range(1, 1 << 31))
    return next(folder for folder in names if not folder.exists())


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. ValueError if it isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.manual_seed(seed)
