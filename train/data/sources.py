"""Where text comes from: CPython's own documentation, local files and folders, data sets of the hub."""

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")
# What the splits are called by those who publish data, in order of preference.
ALIASES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
SUFFIXES = (".tokens", ".txt", ".raw", ".parquet")
# "name" or "owner/name", perhaps with ":config".
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(:.+)?")
# Every 20th piece of a text without splits is held out for validation, and another one for testing.
HOLDOUT = 20


def load_text(source: str, column: str = "text") -> dict[str, str]:
    """The text of each split ("train", "valid", "test") of a source.

    source: "pydoc" (CPython's `pydoc_data.topics`); a text or parquet file, split here by paragraphs; a folder with
    one file or more a split (wiki.train.tokens, train.txt, validation-00000.parquet, …), whose missing validation and
    test splits are held out of train; or a hub data set, "name" or "name:config".
    column: where parquet files and hub data keep the text.

    Raises FileNotFoundError where nothing is found and ValueError for empty text, each naming the source.
    """
    path = Path(source).expanduser()
    if source == "pydoc":
        texts = {"train": pydoc_text()}
    elif path.is_dir():
        texts = _read_folder(path, column)
    elif path.is_file():
        texts = {"train": _read_file(path, column)}
    elif looks_local(source):
        raise FileNotFoundError(f"data {source}: no such file or folder")
    else:
        texts = _read_hub(source, column)
    return _complete(texts, source)


def pydoc_text() -> str:
    """The prose of CPython's help topics, without the paragraphs that topics repeat from one another."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    # Repeated paragraphs would put training text into the held-out splits.
    return "\n\n".join(dict.fromkeys(paragraphs))


def content_hash(texts: dict[str, str]) -> str:
    """A hash of the text of all splits."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split} {len(texts[split])}\n".encode())
        digest.update(texts[split].encode())
    return digest.hexdigest()[:32]


def looks_local(source: str) -> bool:
    """Whether a source that is not there was meant as a path, not as a name on the hub."""
    return source.endswith(SUFFIXES) or not HUB_NAME.fullmatch(source)


def _complete(texts: dict[str, str], source: str) -> dict[str, str]:
    if not texts.get("train", "").strip():
        raise ValueError(f"data {source}: the training text is empty")
    for split in ("valid", "test"):
        hint = ""
        if split not in texts:
            texts["train"], texts[split] = _hold_out(texts["train"])
            hint = (
                ": the last twentieth of so short a text is no word. Give more, or a folder with train, valid and test"
            )
        if not texts[split].strip():
            raise ValueError(f"data {source}: the {split} text is empty{hint}")
    return {split: texts[split] for split in SPLITS}


def _hold_out(text: str) -> tuple[str, str]:
    """Split off every 20th run of paragraphs; a text of few paragraphs gives up its last twentieth instead."""
    pieces = _pieces(text, 2000)
    if len(pieces) < HOLDOUT:
        held = len(text) // HOLDOUT
        last = len(text) - held
        # The nearest space may be far away, or nowhere: in Chinese, in sequences of bases.
        near = max(0, last - max(held, 100))
        cut = next((at for mark in " \n" if (at := text.rfind(mark, near, last) + 1)), last)
        return text[:cut], text[cut:]
    held = pieces[HOLDOUT // 2 :: HOLDOUT]
    kept = [piece for index, piece in enumerate(pieces) if index % HOLDOUT != HOLDOUT // 2]
    return "".join(kept), "".join(held)


def _pieces(text: str, size: int) -> list[str]:
    """Consecutive pieces of at least `size` characters that end where a paragraph does."""
    pieces, current, length = [], [], 0
    for paragraph in text.split("\n\n"):
        current.append(paragraph + "\n\n")
        length += len(paragraph)
        if length >= size:
            pieces.append("".join(current))
            current, length = [], 0
    return pieces + (["".join(current)] if current else [])


def _read_folder(folder: Path, column: str) -> dict[str, str]:
    files = files_below(folder, SUFFIXES)
    texts = {}
    for split, names in ALIASES.items():
        found = [path for path in files if split_of(path.relative_to(folder)) in names]
        if found:
            texts[split] = _joined([_read_file(path, column) for path in found])
    if "train" not in texts:
        raise FileNotFoundError(f"data {folder}: no train file ({', '.join('*train*' + s for s in SUFFIXES)}) in it")
    return texts


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files in a folder and the folders in it, linked ones too, whose names end so, sorted; hidden ones, which
    editors and systems leave beside the data, are left out. OSError for a folder that cannot be read."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not (name.startswith(".") or _leads_back(Path(place, name)))]
        found += [Path(place, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in suffixes]
    return sorted(found)


def _leads_back(link: Path) -> bool:
    """Whether it is a link to a folder that it is in."""
    return link.is_symlink() and link.resolve() in {path.resolve() for path in link.parents}


def _refuse(error: OSError) -> None:
    raise error


def split_of(path: Path) -> str | None:
    """The split that a file's name (or else its folder's) tells: wiki.train.tokens, train-00000-of-00001.parquet."""
    known = {alias for names in ALIASES.values() for alias in names}
    for part in reversed(path.parts):
        for word in part.replace("-", ".").replace("_", ".").lower().split("."):
            if word in known:
                return word
    return None


def _read_file(path: Path, column: str) -> str:
    if path.suffix.lower() == ".parquet":
        return _join_rows(_parquet_rows(path, column), f"data {path}: column {column!r}")
    try:
        # newline="" keeps what is in the file: bits per byte are counted on it.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"data {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parquet_rows(path: Path, column: str) -> Iterable[Any]:
    file = open_parquet(path)
    if column not in file.schema_arrow.names:
        raise ValueError(f"data {path}: no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    return read_columns(file, [column], path).column(column).to_pylist()


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`; ValueError that names the file if it can't be read."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f"data {path}: reading parquet needs pyarrow: pip install 'grassland[train]'") from error
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's errors share no base class with a name of their own
        raise ValueError(f"data {path}: not a readable parquet file ({first_line(error)})") from error


def read_columns(file: Any, columns: list[str], path: Path) -> Any:
    """The Arrow table of these columns of `open_parquet`'s file; ValueError that names the file if they are damaged."""
    try:
        return file.read(columns)
    except Exception as error:  # damage shows as OSError, ArrowInvalid and others
        raise ValueError(f"data {path}: not a readable parquet file ({first_line(error)})") from error


def load_hub(source: str) -> Any:
    """A hub data set "name" or "name:config", split name → `datasets.Dataset`; FileNotFoundError if out of reach."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        hint = "no such file or folder, and hub data needs datasets: pip install 'grassland[train]'"
        raise FileNotFoundError(f"data {source}: {hint}") from error
    # The client tries for half a minute where there is no network.
    print(f"data {source}: no such file or folder; asking the hub for it", file=sys.stderr, flush=True)
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub client raises dozens of types, from OSError to its own
        hint = f"no such file or folder, and not to be had from the hub ({first_line(error)})"
        raise FileNotFoundError(f"data {source}: {hint}") from error


def _read_hub(source: str, column: str) -> dict[str, str]:
    dataset = load_hub(source)
    texts = {}
    for split, names in ALIASES.items():
        found = next((name for name in names if name in dataset), None)
        if found is not None and column not in dataset[found].column_names:
            raise ValueError(f"data {source}: no column {column!r}; it has {', '.join(dataset[found].column_names)}")
        if found is not None:
            texts[split] = _join_rows(dataset[found][column], f"data {source}: {found}: column {column!r}")
    return texts


def _joined(texts: list[str]) -> str:
    """The texts one after the other, each on a line of its own."""
    return "".join(text if not text or text.endswith("\n") else text + "\n" for text in texts[:-1]) + texts[-1]


def _join_rows(rows: Iterable[Any], where: str) -> str:
    texts = []
    for index, row in enumerate(rows):
        if row is not None and not isinstance(row, str):
            raise ValueError(f"{where}: row {index} is no text, but {row!r:.80}")
        if row is not None:
            texts.append(row if row.endswith("\n") else row + "\n")
    return "".join(texts)


def first_line(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
