"""Labelled sentence pairs in SNLI's format, and their tokens."""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.losses import IGNORE
from .sources import HOLDOUT, SPLITS
from .splits import FURTHER, load_splits
from .tokenizer import SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The order of the hub's integer labels.
LABELS = ("entailment", "neutral", "contradiction")
# What annotators did not agree on; such pairs are left out, as in every published result.
UNDECIDED = ("-", "", None, -1)
FIELDS = (("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label"))
MARKS = {"start": SPECIAL["cls"], "end": SPECIAL["sep"], "pad": SPECIAL["pad"]}
# Batches are cut to the longest pair in them, rounded up so that few shapes occur.
ROUND = 8


@dataclass(frozen=True)
class Pairs:
    """A split: premises, hypotheses and labels, indices into `LABELS`; dropped: how many had no label."""

    premises: list[str]
    hypotheses: list[str]
    labels: NDArray[np.int64]
    dropped: int

    def __len__(self) -> int:
        return len(self.labels)

    def crc(self, crc: int = 0) -> int:
        """A checksum of the content."""
        for text in ("\n".join(self.premises), "\n".join(self.hypotheses)):
            crc = zlib.crc32(text.encode(), crc)
        return zlib.crc32(self.labels.tobytes(), crc)

    def part(self, indices: Iterable[int]) -> "Pairs":
        """Some of the pairs."""
        chosen = list(indices)
        premises, hypotheses = ([side[i] for i in chosen] for side in (self.premises, self.hypotheses))
        return Pairs(premises, hypotheses, self.labels[chosen], 0)


def load_pairs(source: str) -> dict[str, Pairs]:
    """The pairs of each split ("train", "valid", "test").

    source: a folder with JSON-lines files whose names tell the split (snli_1.0_dev.jsonl …); one such file, of which
    every twentieth pair is held out for validation and another one for testing; or a hub data set "name[:config]".
    An entry has sentence1, sentence2 and gold_label, or premise, hypothesis and label (a name or 0, 1, 2). Pairs
    without a label ("-") are left out.

    Raises FileNotFoundError where nothing is found and ValueError, naming file and line, for what cannot be read.
    """
    found = load_splits(source, (".jsonl",), _entries)
    splits = {}
    for split in SPLITS:
        # MNLI's second validation split is judged with the first.
        names = [name for name in (split, f"{split} {FURTHER}") if name in found]
        if names:
            splits[split] = _pairs(row for name in names for row in _rows(found[name], f"data {source}, {name}"))
    if Path(source).expanduser().is_file():
        splits = _held_out(splits["train"], source)
    for split in SPLITS:
        if split not in splits:
            raise FileNotFoundError(f"data {source}: no {split} split")
        if not len(splits[split]):
            raise ValueError(f"data {source}: no labelled pair in the {split} split")
    return splits


def _held_out(pairs: Pairs, source: str) -> dict[str, Pairs]:
    if len(pairs) < HOLDOUT:
        raise ValueError(f"data {source}: {len(pairs)} labelled pairs are too few to hold some out, give {HOLDOUT}")
    held = {"valid": HOLDOUT // 2, "test": HOLDOUT - 1}
    splits = {split: pairs.part(range(first, len(pairs), HOLDOUT)) for split, first in held.items()}
    rest = pairs.part(i for i in range(len(pairs)) if i % HOLDOUT not in held.values())
    return {"train": rest, **splits}


def _rows(part: Any, where: str) -> Iterator[tuple[str, Any]]:
    """What `_entries` yields; of a table of the hub's the rows and where they are, with the names of their labels where
    it tells them: not all data sets number them alike."""
    if isinstance(part, Iterator):
        yield from part
        return
    names = getattr(part.features.get("label"), "names", ())
    for index, row in enumerate(part):
        label = row.get("label")
        named = isinstance(label, int) and 0 <= label < len(names)
        yield f"{where} row {index}", {**row, "label": names[label]} if named else row


def _entries(files: list[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        try:
            with file.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{file}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data {file}: not JSON lines ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"data {file}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _pairs(entries: Iterable[tuple[str, Any]]) -> Pairs:
    premises, hypotheses, labels, dropped = [], [], [], 0
    for where, entry in entries:
        premise, hypothesis, label = _fields(where, entry)
        if label in UNDECIDED:
            dropped += 1
            continue
        premises.append(premise)
        hypotheses.append(hypothesis)
        labels.append(_label(where, label))
    return Pairs(premises, hypotheses, np.asarray(labels, np.int64), dropped)


def _fields(where: str, entry: Any) -> tuple[str, str, Any]:
    for names in FIELDS:
        if isinstance(entry, Mapping) and all(name in entry for name in names):
            premise, hypothesis, label = (entry[name] for name in names)
            if not isinstance(premise, str) or not isinstance(hypothesis, str):
                raise ValueError(f"{where}: {names[0]} and {names[1]} must be text")
            return premise, hypothesis, label
    raise ValueError(f"{where}: needs {', '.join(FIELDS[0])} or {', '.join(FIELDS[1])}")


def _label(where: str, label: Any) -> int:
    if isinstance(label, str) and label in LABELS:
        return LABELS.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(LABELS):
        return label
    raise ValueError(f"{where}: label {label!r} is none of {', '.join(LABELS)}")


class PairTokens:
    """The tokens of a split's pairs, start premise end hypothesis end, cut to `max_len`."""

    def __init__(self, tokenizer: "Tokenizer", pairs: Pairs, max_len: int) -> None:
        start, end, self.pad = marks(tokenizer)
        self.rows = np.full((len(pairs), max_len), self.pad, np.int32)
        self.lengths = np.empty(len(pairs), np.int64)
        self.labels = pairs.labels
        sides = (tokenizer.encode_batch(side, add_special_tokens=False) for side in (pairs.premises, pairs.hypotheses))
        for row, (premise, hypothesis) in enumerate(zip(*sides, strict=True)):
            first, second = _truncated(premise.ids, hypothesis.ids, max_len - 3)
            ids = [start, *first, end, *second, end]
            self.rows[row, : len(ids)] = ids
            self.lengths[row] = len(ids)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, T) int64, mask (B, T) bool and labels (B,) of so many rows; label −100 for row −1."""
        longest = -(-int(self.lengths[rows].max()) // ROUND) * ROUND
        ids = torch.from_numpy(self.rows[rows, :longest].astype(np.int64))
        mask = torch.arange(ids.shape[1]) < torch.from_numpy(self.lengths[rows])[:, None]
        return ids, mask, torch.from_numpy(np.where(rows < 0, IGNORE, self.labels[rows]))


def marks(tokenizer: "Tokenizer") -> tuple[int, int, int]:
    """The ids of the marks for start, end and padding; ValueError if the vocabulary has none."""
    found = []
    for use, names in MARKS.items():
        ids = [tokenizer.token_to_id(name) for name in names]
        known = next((index for index in ids if index is not None), None)
        if known is None:
            raise ValueError(f"tokenizer: its vocabulary has no mark for {use} ({' or '.join(names)})")
        found.append(known)
    return found[0], found[1], found[2]


def _truncated(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both cut to `room` tokens together, the longer one first."""
    keep_first = max(room - len(second), room // 2)
    first = first[:keep_first]
    return first, second[: room - len(first)]
