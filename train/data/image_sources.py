"""Where labelled images come from: scikit-learn's digits, folders, parquet files, data sets of the hub."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .images import Arrays, Files, ImageSet, Part, Rows
from .sources import (
    ALIASES,
    SPLITS,
    files_below,
    first_line,
    load_hub,
    looks_local,
    open_parquet,
    read_columns,
    split_of,
)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp", ".gif"})
IMAGE_COLUMNS = ("image", "img", "images")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
# Larger labels are numbers of something else.
MOST_CLASSES = 1_000_000
# Every tenth image of a set without splits is held out for validation, and every tenth of the rest for testing.
HOLDOUT = 10


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set. key: a checksum of its content. tested_on: the split that "test" stands for."""

    name: str
    key: str
    classes: tuple[str, ...]
    splits: dict[str, ImageSet]
    tested_on: str


def load_images(source: str, image_column: str | None = None, label_column: str | None = None) -> ImageData:
    """The images and labels of each split ("train", "valid", "test") of a source.

    source: "digits" (scikit-learn's); a folder of class folders, or of train, valid and test folders with class
    folders; a parquet file, or a folder with one or more a split (held in memory); or a hub data set, "name" or
    "name:config". Columns are found by their type where they are not given.

    A missing validation split is held out of train: every tenth image of a fixed permutation. So is a missing test
    split if validation is missing too; where it is not, validation serves as test, as ImageNet's is used.

    Raises FileNotFoundError where nothing is found, and ValueError for an empty class folder, no images, a single
    class, labels that are out of range, or unreadable tables; each names its source.
    """
    path = Path(source).expanduser()
    columns = (image_column, label_column)
    if source == "digits":
        splits, classes = _digits()
    elif path.is_dir():
        tables = files_below(path, (".parquet",))
        splits, classes = _parquet(_by_split(path, tables), columns) if tables else _folder(path)
    elif path.is_file():
        splits, classes = _parquet({"train": [path]}, columns)
    elif looks_local(source):
        raise FileNotFoundError(f"data {source}: no such file or folder")
    else:
        splits, classes = _hub(source, columns)
    return _complete(splits, classes, source)


def _complete(splits: dict[str, ImageSet], classes: tuple[str, ...] | None, source: str) -> ImageData:
    for name in [split for split in SPLITS if split in splits]:
        if not len(splits[name]):
            raise ValueError(f"data {source}: no images in the {name} split")
    # The hub publishes test splits whose labels are a secret: all −1.
    splits = {name: part for name, part in splits.items() if name == "train" or not (part.labels == -1).all()}
    count = int(splits["train"].labels.max()) + 1
    if count > MOST_CLASSES:
        raise ValueError(f"data {source}: a label is {count - 1}; classes are numbers from 0 to {MOST_CLASSES - 1}")
    classes = classes or tuple(str(label) for label in range(count))
    if len(classes) == 1:
        hint = "give the folder of the class folders, or a column of classes"
        raise ValueError(f"data {source}: all images are of one class, {classes[0]!r}; {hint}")
    for name, part in splits.items():
        _check_labels(part, len(classes), f"data {source}: {name}")
    missing = [name for name in ("valid", "test") if name not in splits]
    tested_on = "valid" if missing == ["test"] else "test"
    if tested_on == "valid":
        splits["test"] = splits["valid"]
    for name in missing if tested_on == "test" else ():
        splits |= _hold_out(splits["train"], name, source)
    key = "-".join(f"{splits[name].crc():08x}" for name in SPLITS)
    return ImageData(Path(source).name or source, key, classes, {name: splits[name] for name in SPLITS}, tested_on)


def _hold_out(train: ImageSet, name: str, source: str) -> dict[str, ImageSet]:
    if len(train) < 3:
        raise ValueError(f"data {source}: {len(train)} images are too few to hold some out for the {name} split")
    order = np.random.default_rng(0).permutation(len(train))
    count = max(1, len(train) // HOLDOUT)
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    return {"train": Part(train, kept), name: Part(train, held)}


def _check_labels(part: ImageSet, classes: int, where: str) -> None:
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= classes))
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"{where}: label {part.labels[index]} of {part.name(index)} is out of range: there are {classes} classes, "
            f"0 to {classes - 1}"
        )


def _digits() -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    try:
        load: Any = importlib.import_module("sklearn.datasets").load_digits
    except ImportError as error:
        raise ValueError("data digits: scikit-learn is not installed: pip install 'grassland[vision]'") from error
    digits = load()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return {"train": Arrays(images, digits.target.astype(np.int64), "digits")}, tuple("0123456789")


def _folder(root: Path) -> tuple[dict[str, ImageSet], tuple[str, ...] | None]:
    folders = {name.lower(): root / name for name in _class_folders(root)}
    named = {split: next((folders[n] for n in names if n in folders), None) for split, names in ALIASES.items()}
    roots = {split: folder for split, folder in named.items() if folder is not None}
    if "train" not in roots:
        if roots and len(roots) == len(folders):
            raise FileNotFoundError(f"data {root}: no train folder beside {', '.join(sorted(folders))}")
        roots = {"train": root}
    names = _class_folders(roots["train"])
    return {split: _class_images(folder, names) for split, folder in roots.items()}, tuple(names)


def _class_folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_images(root: Path, classes: list[str]) -> Files:
    """The files of a folder's class folders; labels are places in `classes`."""
    found = _class_folders(root)
    if not found:
        raise ValueError(f"data {root}: no images in class folders in it")
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(f"data {root / unknown[0]}: there is no class of this name in train")
    paths, labels = [], []
    for name in found:
        files = sorted(str(path.relative_to(root)) for path in files_below(root / name, SUFFIXES))
        if not files:
            raise ValueError(f"data {root / name}: an empty class folder: no images in it")
        paths += files
        labels += [classes.index(name)] * len(files)
    return Files(root, paths, np.array(labels, np.int64))


def _by_split(folder: Path, tables: list[Path]) -> dict[str, list[Path]]:
    named = {path: split_of(path.relative_to(folder)) for path in tables}
    splits = {split: [p for p in tables if named[p] in names] for split, names in ALIASES.items()}
    if not splits["train"]:
        raise FileNotFoundError(f"data {folder}: no train file (*train*.parquet) in it")
    return {split: paths for split, paths in splits.items() if paths}


def _parquet(
    files: dict[str, list[Path]], columns: tuple[str | None, str | None]
) -> tuple[dict[str, ImageSet], tuple[str, ...] | None]:
    arrow: Any = importlib.import_module("pyarrow")
    splits: dict[str, ImageSet] = {}
    classes = None
    for split, paths in files.items():
        images, labels = [], []
        for path in paths:
            file = open_parquet(path)
            image, label = _columns(file.schema_arrow, columns, path)
            table = read_columns(file, [image, label], path)
            classes = _same_classes(classes, _class_names(file.schema_arrow, label), f"data {path}")
            column = table.column(image)
            try:
                images.append(column.cast(images[0].type) if images else column)
            except arrow.ArrowException as error:
                kinds = f"{column.type}, those of {paths[0].name} {images[0].type}"
                raise ValueError(f"data {path}: its images are {kinds} ({first_line(error)})") from error
            labels.append(_labels(table.column(label), str(path)))
        title = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} {split}"
        whole = arrow.chunked_array([chunk for column in images for chunk in column.chunks], images[0].type)
        splits[split] = Rows(whole, np.concatenate(labels), title)
    return splits, classes


def _same_classes(known: tuple[str, ...] | None, names: tuple[str, ...] | None, where: str) -> tuple[str, ...] | None:
    """The names of the classes, which every table that has some must have in one order."""
    if known and names and names != known:
        raise ValueError(f"{where}: its classes are {_listed(names)}, but others' are {_listed(known)}")
    return known or names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")


def _columns(schema: Any, given: tuple[str | None, str | None], path: Path) -> tuple[str, str]:
    types: Any = importlib.import_module("pyarrow").types
    kinds = (types.is_struct, types.is_binary, types.is_large_binary, types.is_binary_view)
    image = [f.name for f in schema if any(fits(f.type) for fits in kinds)]
    label = [f.name for f in schema if types.is_integer(f.type)]
    return (
        _column("image", given[0], image, IMAGE_COLUMNS, schema.names, f"data {path}"),
        _column("label", given[1], label, LABEL_COLUMNS, schema.names, f"data {path}"),
    )


def _column(
    what: str, given: str | None, fitting: list[str], preferred: tuple[str, ...], names: list[str], where: str
) -> str:
    """The column that is given, else the first usual one of the fitting type, else the only one of that type."""
    if given is not None and given not in names:
        raise ValueError(f"{where}: no column {given!r}; it has {', '.join(names)}")
    usual = next((name for name in preferred if name in fitting), None)
    if given is None and usual is None and len(fitting) > 1:
        raise ValueError(f"{where}: {what}s may be in {', '.join(fitting)}; give one as --{what}-column")
    chosen = given or usual or next(iter(fitting), None)
    if chosen is None or chosen not in fitting:
        missing = f"column {given!r} holds no {what}s" if given else f"no column holds {what}s"
        raise ValueError(f"{where}: {missing}; it has {', '.join(names)}")
    return chosen


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The names that `datasets` keeps in a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _labels(column: Any, title: str) -> NDArray[np.int64]:
    if column.null_count:
        raise ValueError(f"data {title}: {column.null_count} rows have no label")
    return np.asarray(column.to_numpy(), np.int64)


def _hub(source: str, columns: tuple[str | None, str | None]) -> tuple[dict[str, ImageSet], tuple[str, ...] | None]:
    published = load_hub(source)
    datasets: Any = importlib.import_module("datasets")
    splits: dict[str, ImageSet] = {}
    classes = None
    for split, names in ALIASES.items():
        found = next((name for name in names if name in published), None)
        if found is None:
            continue
        data, where = published[found], f"data {source}"
        kinds = data.features
        image = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
        label = [name for name, kind in kinds.items() if _is_label(kind)]
        image_name = _column("image", columns[0], image, IMAGE_COLUMNS, data.column_names, where)
        label_name = _column("label", columns[1], label, LABEL_COLUMNS, data.column_names, where)
        names = tuple(getattr(kinds[label_name], "names", None) or ()) or None
        classes = _same_classes(classes, names, f"{where}, {found}")
        # Alone: other columns would be decoded with it.
        undecoded = data.select_columns([image_name]).cast_column(image_name, datasets.Image(decode=False))
        labels = np.asarray(data.with_format("numpy")[label_name][:], np.int64)
        splits[split] = Rows(
            _HubColumn(undecoded, image_name), labels, f"{source} {found}", f"{source} {found}".encode()
        )
    if "train" not in splits:
        raise ValueError(f"data {source}: no train split; it has {', '.join(published)}")
    return splits, classes


def _is_label(kind: Any) -> bool:
    return bool(getattr(kind, "names", None)) or str(getattr(kind, "dtype", "")).startswith(("int", "uint"))


class _HubColumn:
    """The rows' dicts of bytes and path, read from disk as they are asked for."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(index)][self.name]
