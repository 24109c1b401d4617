"""From settings to a run: the processes, the folder, the device, the seeds, the task."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ..kernels import dispatch
from . import parallel
from .checkpoint import has_state
from .config import RunConfig
from .lock import LOCK_FILE, held
from .loop import Trainer
from .seeds import seed_everything
from .tasks.base import Task

C = TypeVar("C", bound=RunConfig)
AUTO = "auto"
# What a run that was killed before its first state leaves behind.
EARLY = ("metrics.jsonl", "config.json", "model.safetensors", "tokenizer.json", "state-*", "events.out.*", ".*.tmp")


def run(task: Callable[[C, torch.device], Task], config: C) -> int:
    """Train what `task` builds from the settings, with the processes that torchrun has started; the exit code.

    Nothing is written before the settings, the data and the model are known to be good. From then on the run's folder
    is its own: ValueError if another run has it.
    """
    device = pick_device(config.device)
    dispatch.requested(None)  # the environment's, which models would ask for after the first files are written
    mode = parallel.checked_mode(config.parallel, config.batch_size)
    with flushed_subnormals(), parallel.processes(mode, device):
        config = replace(config, resume=parallel.from_main(lambda: resumed_folder(config)), parallel=mode)
        parallel.from_main(lambda: check_out(config))
        begun = replace(config, resume=None if config.resume == AUTO else config.resume)
        seed_everything(config.seed)
        built = parallel.one_a_node_first(lambda: task(begun, device))
        if parallel.size() > 1:
            # The same weights everywhere, but each process its own dropout.
            seed_everything(config.seed, 0, parallel.rank())
        with own_folder(config) as folder:
            return Trainer(built, replace(begun, out=str(folder)), folder).run()


@contextmanager
def flushed_subnormals() -> Iterator[None]:
    """Numbers below 1.2e-38 count as zero on the CPU: processors take them at a fraction of their speed."""
    before = bool(torch.tensor(1e-38) * 0.1 == 0)
    # Until 2.2 NumPy measures its limits when first asked for them, keeps them, and warns of subnormals that are zero.
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def resumed_folder(config: RunConfig) -> str | None:
    """The folder of the run to continue, None for a new one. "auto" stays "auto" while `out` has no state yet.

    Raises ValueError for "auto" without `out`.
    """
    if config.resume != AUTO:
        return config.resume
    if config.out is None:
        raise ValueError("resume 'auto' needs --out, the folder to continue or to start")
    return config.out if has_state(Path(config.out)) else AUTO


@contextmanager
def own_folder(config: RunConfig) -> Iterator[Path]:
    """The folder of the run, which process 0 holds for it while this is entered.

    It is the resumed one, the given one, or the first free of runs/MODEL-DATA, …-2, …-3. Raises ValueError if another
    process has it, or if the given one has something in it.
    """
    with ExitStack() as stack:

        def hold() -> Path:
            given = config.out if config.resume in (None, AUTO) else config.resume
            folder = _made_folder(config) if given is None else Path(given)
            stack.enter_context(held(folder))
            check_out(config)  # again: another run may have come and gone since
            return folder

        folder = parallel.from_main(hold)
        try:
            yield folder
        except OSError as error:
            # That of a write to a full disk names nothing.
            error.filename = error.filename or str(folder)
            raise


def check_out(config: RunConfig) -> None:
    """ValueError if the folder that a new run is given is none, or has something in it."""
    if config.out is None or config.resume not in (None, AUTO):
        return
    folder = Path(config.out)
    if folder.is_file():
        raise ValueError(f"{folder} is a file, and a run needs a folder; give another --out")
    if folder.exists() and not (folder.is_dir() and all(_is_early(config, path) for path in folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; continue its run with --resume, or give another --out")


def _made_folder(config: RunConfig) -> Path:
    model, data = (Path(name).name or name for name in (config.model, config.data))
    base = Path("runs") / f"{model}-{data}".replace(":", "-")
    names = (base if number == 1 else base.with_name(f"{base.name}-{number}") for number in itertools.count(1))
    return next(folder for folder in names if _is_made(folder))


def _is_made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. Under torchrun "cuda" is the process's own.

    ValueError if it isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and parallel.launched():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch knows more kinds of devices than it is built for
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _is_early(config: RunConfig, path: Path) -> bool:
    return path.name == LOCK_FILE or (config.resume == AUTO and any(path.match(pattern) for pattern in EARLY))
