"""The splits of a source of rows, from local files or the hub, and those that are missing."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..optional import optional
from .sources import ALIASES, SPLITS, files_below, first_line, load_hub, looks_local, split_of

T = TypeVar("T")


class Part(Protocol):
    """Of a data set, what can be divided into rows."""

    def __len__(self) -> int: ...

    def part(self, rows: NDArray[np.int64]) -> Any: ...


P = TypeVar("P", bound=Part)
# Words such as "null" and "None" are words. Quotation marks are text where tabs part the columns, as in GLUE's files.
CSV: dict[str, Any] = {"keep_default_na": False}
TSV = {**CSV, "delimiter": "\t", "quoting": csv.QUOTE_NONE}
# By the ending of a file's name, the reader and its options.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", CSV),
    ".tsv": ("csv", TSV),
    ".parquet": ("parquet", {}),
}
# MNLI's second validation and test split, on genres that are not in train: not part of the first one.
FURTHER = "mismatched"
# Every tenth row of a table without splits is held out for validation, and every tenth of the rest for testing.
HOLDOUT = 10


def load_splits(source: str, suffixes: tuple[str, ...], read: Callable[[list[Path]], Any]) -> dict[str, Any]:
    """What `read` makes of the files of each split of a source, or the tables (`datasets.Dataset`) of a hub data set.

    A single file is "train"; what is set apart by "mismatched" is "train mismatched" and so on. Raises
    FileNotFoundError where there is no such source, or no train split in a folder, and ValueError where there is none
    in a hub data set.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": read([path])}
    if not path.is_dir():
        if looks_local(source) or path.suffix.lower() in suffixes:
            raise FileNotFoundError(f"data {source}: no such file or folder")
        return _hub(source)
    files, found = files_below(path, suffixes), {}
    for split, names in ALIASES.items():
        chosen = [file for file in files if split_of(file.relative_to(path)) in names]
        own, further = _apart(chosen, lambda file: str(file.relative_to(path)))
        found |= {name: read(part) for name, part in ((split, own), (f"{split} {FURTHER}", further)) if part}
    if "train" not in found:
        raise FileNotFoundError(f"data {source}: no train file (*train*{', *train*'.join(suffixes)}) in it")
    return found


def complete(splits: dict[str, P], source: str) -> str:
    """Hold out, or take from one another, those of `SPLITS` that are missing; the split that "test" then stands for.

    ValueError if there is too little to hold some out.
    """
    tested_on = "test" if "test" in splits or "valid" not in splits else "valid"
    if tested_on == "valid":
        splits["test"] = splits["valid"]
    for name in [name for name in SPLITS if name not in splits]:
        train = splits["train"]
        if len(train) < 3:
            raise ValueError(f"data {source}: {len(train)} rows are too few to hold some out for {name}")
        order = np.random.default_rng(0).permutation(len(train))
        count = max(1, len(order) // HOLDOUT)
        splits["train"], splits[name] = train.part(np.sort(order[count:])), train.part(np.sort(order[:count]))
    return tested_on


def read_table(files: list[Path]) -> Any:
    """The rows of tables of one kind, as a `datasets.Dataset`."""
    reader, options = READERS.get(files[0].suffix.lower(), (None, {}))
    if reader is None:
        raise ValueError(f"data {files[0]}: not one of {', '.join(READERS)}")
    for file in files:
        if READERS[file.suffix.lower()] != (reader, options):
            raise ValueError(f"data {file}: of another kind than {files[0].name}, which is for the same split")
    datasets, names = optional("datasets", "train"), [str(file) for file in files]
    try:
        return datasets.load_dataset(reader, data_files=names, split="train", **options)
    except ImportError:
        raise
    except Exception as error:  # the readers' errors share no base class
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"data {files[0]}: not a readable table ({first_line(cause)})") from error


def _hub(source: str) -> dict[str, Any]:
    found = load_hub(source)
    tables = {}
    for split, names in ALIASES.items():
        # "train" before "train_extra".
        listed = sorted(found, key=lambda name: name not in names)
        own, further = _apart([name for alias in names for name in listed if split_of(Path(name)) == alias], str)
        # Of several, such as ANLI's rounds, the first one stands for the split.
        tables |= {name: found[part[0]] for name, part in ((split, own), (f"{split} {FURTHER}", further)) if part}
    if "train" not in tables:
        raise ValueError(f"data {source}: it has no train split, but {', '.join(found)}")
    return tables


def _apart(found: list[T], name: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """What makes up a split, and what is a further split beside it."""
    further = [one for one in found if FURTHER in re.split(r"[^a-z]+", name(one).lower())]
    own = [one for one in found if one not in further]
    return (own, further) if own else (further, [])
