"""Shards of tensors in a folder beside the state: written and cut anew by torch.distributed.checkpoint, as safetensors.

Its default format keeps pickled metadata, which can execute code when read; this one cannot.
"""

import errno
import shutil
import uuid
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, zeros

from ..archs.io import sync_folder
from . import parallel
from .data.corpus import file_crc

PREFIX = "state-"
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def write_shards(folder: Path, shards: Mapping[str, DTensor], step: int) -> dict[str, Any]:
    """Write this process's shards into a fresh folder in `folder`; its name and its files' sizes and checksums.

    All processes call it together. Raises OSError in each if one cannot write.
    """
    name = parallel.from_main(lambda: f"{PREFIX}{step:08}-{uuid.uuid4().hex[:8]}")
    place = folder / name
    try:
        save(dict(shards), storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))
    except CheckpointException as error:
        raise _first_error(error, place) from error
    parallel.from_main(lambda: sync_folder(place))
    mine = sorted(place.iterdir())[parallel.rank() :: parallel.size()]
    files = {path.name: [path.stat().st_size, file_crc(path)] for path in mine}
    return {
        "name": name,
        "files": {key: value for part in parallel.gather(files) for key, value in part.items()},
        "tensors": {key: [list(tensor.shape), DTYPES[tensor.dtype]] for key, tensor in shards.items()},
    }


def check_shards(folder: Path, written: Mapping[str, Any]) -> None:
    """Compare this process's share of the files with what `write_shards` returned. ValueError names a damaged one."""
    for name, (size, crc) in list(written["files"].items())[parallel.rank() :: parallel.size()]:
        path = folder / written["name"] / name
        if not path.is_file():
            raise ValueError(f"{path.parent.name}/{name} is missing")
        if path.stat().st_size != size or file_crc(path) != crc:
            raise ValueError(f"{path.parent.name}/{name} is not what was written")


def read_shards(folder: Path, written: Mapping[str, Any], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """The tensors that `write_shards` wrote: cut along dimension 0 on `mesh`, or whole without one."""
    targets: dict[str, Any] = {}
    for key, (shape, name) in written["tensors"].items():
        dtype = next(dtype for dtype, known in DTYPES.items() if known == name)
        if mesh is None:
            targets[key] = torch.zeros(shape, dtype=dtype)
        else:
            targets[key] = zeros(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    reader = HuggingFaceStorageReader(str(folder / written["name"]))
    with warnings.catch_warnings():
        # One process is what is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(targets, storage_reader=reader, no_dist=parallel.size() == 1)
    return targets


def remove_shards(folder: Path, except_for: Collection[str | None]) -> None:
    """Remove the folders of shards that no state names any more."""
    for path in folder.glob(f"{PREFIX}*"):
        if path.is_dir() and path.name not in except_for:
            shutil.rmtree(path)


def _first_error(error: CheckpointException, place: Path) -> Exception:
    cause = next(failure[0] for failure in error.failures.values())
    if isinstance(cause, OSError):
        return cause
    return OSError(errno.EIO, f"the shards cannot be written ({cause})", str(place))
