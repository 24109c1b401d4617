"""Labelled texts, one or a pair a row, from local tables or the hub, by the `datasets` library."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.losses import IGNORE
from .masked import assemble
from .sources import SPLITS
from .splits import FURTHER, READERS, complete, load_splits, read_table
from .tokenizer import special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What those who publish data call the columns, in order of preference; the pairs first.
TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)


@dataclass(frozen=True)
class LabelledText:
    """A split: texts (N, one or two strings each) and classes (N,) int64."""

    texts: list[tuple[str, ...]]
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.classes)

    def part(self, rows: NDArray[np.int64]) -> "LabelledText":
        """Some of the rows."""
        return LabelledText([self.texts[row] for row in rows], self.classes[rows])


@dataclass(frozen=True)
class LabelledData:
    """A data set. key: a hash of its content. classes: their names. tested_on: the split that "test" stands for.

    splits: "train", "valid", "test", and "mismatched" where there is such a one beside the one that "test" stands for.
    """

    key: str
    classes: tuple[str, ...]
    splits: dict[str, LabelledText]
    tested_on: str


class TextBatch(NamedTuple):
    """ids, types (B, L) int64; mask (B, L) bool, False for padding; classes (B,) int64, −100 for an uncounted row."""

    ids: Tensor
    types: Tensor
    mask: Tensor
    classes: Tensor

    def chosen(self, rows: NDArray[np.int64]) -> "TextBatch":
        """Some of the rows; −1 stands for one that does not count."""
        place = torch.from_numpy(rows)
        ids, types, mask, classes = (part[place.clamp_min(0)] for part in self)
        return TextBatch(ids, types, mask, classes.where(place >= 0, IGNORE))


def load_labelled(
    source: str, text_column: str | None = None, pair_column: str | None = None, label_column: str = "label"
) -> LabelledData:
    """The labelled texts of each split ("train", "valid", "test") of a source.

    source: a json, jsonl, csv, tsv or parquet file; a folder with one or more a split; or a hub data set, "name" or
    "name:config". Without `text_column`, the columns are text, sentence1, premise, question1, question or sentence, and
    the second text's those that go with them. Labels are integers, or names, which are numbered in sorted order. A
    csv file's quotation marks enclose a field, a tsv file's are text.

    A split whose labels are all −1, which is how the hub keeps them secret, or that has none, as GLUE's own files, is
    as good as missing. Of missing ones, validation is held out of train: every tenth row of a fixed permutation; test
    too if validation was missing, otherwise validation serves as test. What has "mismatched" in its name, as MNLI's
    second validation split, is a split of its own, and takes part in no choice.

    Raises FileNotFoundError where nothing is found and ValueError for an empty split, a missing column, a text that is
    none, or a label that is out of range; each names its source.
    """
    tables = load_splits(source, tuple(READERS), read_table)
    columns = _columns(tables["train"].column_names, text_column, pair_column, label_column, source)
    return _labelled(tables, columns, source)


def encode_labelled(data: LabelledText, tokenizer: "Tokenizer", seq_len: int) -> TextBatch:
    """All rows of a split as one batch. What is too long loses the end of its longer text."""
    special = special_tokens(tokenizer)
    columns = [tokenizer.encode_batch(list(texts), add_special_tokens=False) for texts in zip(*data.texts, strict=True)]
    rows = []
    for encodings in zip(*columns, strict=True):
        segments = _shortened([np.asarray(e.ids, np.int64) for e in encodings], seq_len - 1 - len(columns))
        rows.append(assemble(segments, special, seq_len))
    ids, types, mask = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return TextBatch(ids, types, mask, torch.from_numpy(data.classes))


def _shortened(texts: list[NDArray], room: int) -> list[NDArray]:
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = (len(text) for text in texts)
    # Token by token from the longer one, as BERT does it, comes to this.
    keep = min(first, max(room - second, (room + 1) // 2))
    return [texts[0][:keep], texts[1][: room - keep]]


def _columns(
    names: list[str], text: str | None, pair: str | None, label: str, source: str
) -> tuple[tuple[str, ...], str]:
    if text is None:
        known = (c for c in TEXT_COLUMNS if c[0] in names and (c[1] is None or c[1] in names))
        text, found = next(known, (None, None))
        pair = pair or found
    if text is None:
        raise ValueError(f"data {source}: which column has the text? It has {', '.join(names)}: give --text-column")
    columns = (text,) if pair is None else (text, pair)
    for name in (*columns, label):
        if name not in names:
            raise ValueError(f"data {source}: no column {name!r}; it has {', '.join(names)}")
    return columns, label


def _labelled(tables: dict[str, Any], columns: tuple[tuple[str, ...], str], source: str) -> LabelledData:
    texts, label = columns
    labels = {split: _labels(table, label) for split, table in tables.items() if label in table.column_names}
    # Published test splits may have labels that are a secret: all −1.
    labels = {split: found for split, found in labels.items() if split == "train" or set(found) != {-1}}
    classes = _class_names(tables["train"].features[label], labels["train"], source)
    splits = {}
    for split, found in labels.items():
        where = f"data {source}: {split}"
        if not found:
            raise ValueError(f"{where}: no rows")
        rows = list(zip(*(_strings(tables[split], name, where) for name in texts), strict=True))
        splits[split] = LabelledText(rows, _numbers(found, classes, where))
    everything, splits = splits, {split: part for split, part in splits.items() if split in SPLITS}
    tested_on = complete(splits, source)
    if (further := everything.get(f"{tested_on} {FURTHER}")) is not None:
        splits[FURTHER] = further
    digest = hashlib.sha256(json.dumps([[classes], *([s.texts, s.classes.tolist()] for s in splits.values())]).encode())
    return LabelledData(digest.hexdigest()[:24], classes, splits, tested_on)


def _labels(table: Any, column: str) -> list[Any]:
    """Names where the table has them, for splits may number the classes differently."""
    labels, names = list(table[column]), getattr(table.features[column], "names", ())
    return [names[label] if isinstance(label, int) and 0 <= label < len(names) else label for label in labels]


def _class_names(feature: Any, labels: list[Any], source: str) -> tuple[str, ...]:
    if hasattr(feature, "names"):
        names = tuple(feature.names)
    elif all(isinstance(label, str) for label in labels):
        if "" in labels:
            raise ValueError(f"data {source}: row {labels.index('')} of train has no label")
        names = tuple(sorted(set(labels)))
    elif odd := [label for label in labels if not isinstance(label, int)]:
        raise ValueError(f"data {source}: labels must be integers or names, got {odd[0]!r}")
    else:
        names = tuple(str(label) for label in range(max(labels, default=0) + 1))
    if len(names) < 2:
        raise ValueError(f"data {source}: labels of two classes at least are needed, got {', '.join(names) or 'none'}")
    return names


def _numbers(labels: list[Any], classes: tuple[str, ...], where: str) -> NDArray[np.int64]:
    number = {name: index for index, name in enumerate(classes)}
    numbers = [number.get(str(int(label)) if isinstance(label, int) else label) for label in labels]
    if None in numbers:
        row = numbers.index(None)
        raise ValueError(f"{where}: label {labels[row]!r} of row {row} is none of the {len(classes)} classes of train")
    return np.array(numbers, np.int64)


def _strings(table: Any, column: str, where: str) -> list[str]:
    if column not in table.column_names:
        raise ValueError(f"{where}: no column {column!r}; it has {', '.join(table.column_names)}")
    texts = list(table[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{where}: {column}: row {row} is no text, but {text!r:.80}")
    return texts
