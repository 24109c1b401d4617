"""A corpus: a tokeniser and a memory-mapped token file for each split, cached by the hash of text and tokeniser."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .sources import SPLITS, content_hash, load_text
from .tokenizer import load_tokenizer, save_tokenizer, special_tokens

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

HEADER = "header.json"
WORD, LINE = 1, 2
# Part of every key: raise it when the layout of a cache entry changes.
LAYOUT = 1


@dataclass(frozen=True)
class Split:
    """The tokens of a split, and the whitespace-separated words and UTF-8 bytes of the text they stand for.

    marks: for a corpus with marks, uint8 beside each token: WORD if it begins a word, and LINE if it begins a line.
    """

    tokens: NDArray
    words: int
    bytes: int
    marks: NDArray | None = None


@dataclass(frozen=True)
class Corpus:
    """A tokenised text. key: the hash of the text and the tokeniser."""

    key: str
    tokenizer: "Tokenizer"
    train: Split
    valid: Split
    test: Split

    @property
    def splits(self) -> dict[str, Split]:
        """All of them by their names."""
        return {name: getattr(self, name) for name in SPLITS}


def load_corpus(
    source: str, tokenizer: str, column: str = "text", cache: Path | None = None, *, marked: bool = False
) -> Corpus:
    """Read, tokenise and cache a text; see `load_text` and `load_tokenizer` for what `source` and `tokenizer` may be.

    cache: where token files are kept, else $GRASSLAND_CACHE, else ~/.cache/grassland. A damaged entry is rebuilt.
    marked: for text encoders: with `Split.marks`, and a tokeniser that has the special tokens.
    """
    texts = load_text(source, column)
    cache = cache or cache_folder()
    text_hash = content_hash(texts)
    tk = _cached_tokenizer(tokenizer, texts["train"], text_hash, cache)
    if marked:
        special_tokens(tk)
    _check_ids(tk, tokenizer)
    files = [name for split in SPLITS for name in ((split, f"{split}-marks") if marked else (split,))]
    key = _key(text_hash, tk.to_str(), *(["marks"] if marked else []))
    entry = cache / "tokens" / key
    header = _read_header(entry, files)
    if header is None:
        if entry.exists():
            print(f"cache {entry} is damaged: tokenising again", file=sys.stderr)
        _build(entry, texts, tk, files)
        header = json.loads((entry / HEADER).read_text())
    splits = {split: _open(entry, split, header, marked) for split in SPLITS}
    return Corpus(key, tk, **splits)


def cache_folder() -> Path:
    """$GRASSLAND_CACHE, or ~/.cache/grassland."""
    return Path(os.environ.get("GRASSLAND_CACHE") or "~/.cache/grassland").expanduser()


def encode(tokenizer: "Tokenizer", text: str) -> NDArray:
    """The tokens of a text, encoded line by line, in the smallest of uint16 and uint32 that holds the vocabulary."""
    return _joined((line.ids for line in _encoded_lines(tokenizer, text)), _token_dtype(tokenizer))


def encode_marked(tokenizer: "Tokenizer", text: str) -> tuple[NDArray, NDArray]:
    """`encode`, and for each token the marks WORD and LINE; words are those of the tokeniser's pre-tokeniser."""
    tokens, marks = [], []
    for line in _encoded_lines(tokenizer, text):
        tokens.append(line.ids)
        words = line.word_ids
        marks.append([WORD * (i == 0 or word != words[i - 1]) + LINE * (i == 0) for i, word in enumerate(words)])
    return _joined(tokens, _token_dtype(tokenizer)), _joined(marks, np.uint8)


def _joined(lines: Iterable[list[int]], dtype: type[np.generic]) -> NDArray:
    parts = [np.asarray(line, dtype) for line in lines]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _token_dtype(tokenizer: "Tokenizer") -> type[np.generic]:
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


def _encoded_lines(tokenizer: "Tokenizer", text: str, lines_a_batch: int = 10_000) -> Iterator["Encoding"]:
    lines = text.splitlines(keepends=True)
    for start in range(0, len(lines), lines_a_batch):
        yield from tokenizer.encode_batch(lines[start : start + lines_a_batch], add_special_tokens=False)


def _cached_tokenizer(spec: str, text: str, text_hash: str, cache: Path) -> "Tokenizer":
    if not spec.startswith("bpe:"):
        return load_tokenizer(spec)
    folder = cache / "tokenizers" / _key(text_hash, spec)
    try:
        return load_tokenizer(str(folder))
    except (FileNotFoundError, ValueError):
        tokenizer = load_tokenizer(spec, text)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def _check_ids(tokenizer: "Tokenizer", spec: str) -> None:
    """Models have an embedding for each token: the ids must be 0 … size − 1."""
    size, last = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=0)
    if last >= size:
        raise ValueError(f"tokenizer {spec}: it has {size} tokens, but one of them is number {last}: ids are left out")


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join([str(LAYOUT), *parts]).encode()).hexdigest()[:24]


def _build(entry: Path, texts: dict[str, str], tokenizer: "Tokenizer", files: list[str]) -> None:
    """Write the entry beside its place and rename it, so that no one ever sees a part of it."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        header = {}
        for split in SPLITS:
            header |= _write_split(work, split, texts[split], tokenizer, f"{split}-marks" in files)
        (work / HEADER).write_text(json.dumps(header))
        _put(work, entry, files)
    except OSError as error:  # NumPy's tells neither the file nor the reason
        raise OSError(f"cache {entry.parent}: cannot be written, the disk may be full ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put(work: Path, entry: Path, files: list[str]) -> None:
    """Rename `work` to `entry`, in place of a damaged one; a sound one, which another process has put there in the
    meantime and may be reading, stays."""
    for last in (False, True):
        try:
            work.replace(entry)
            return
        except OSError:
            if _read_header(entry, files) is not None:
                return
            if last:
                raise
        shutil.rmtree(entry, ignore_errors=True)


def _write_split(folder: Path, split: str, text: str, tokenizer: "Tokenizer", marked: bool) -> dict[str, dict]:
    """Write the files of a split; what the header says of each."""
    tokens, marks = encode_marked(tokenizer, text) if marked else (encode(tokenizer, text), None)
    counts = {"words": len(text.split()), "bytes": len(text.encode()), "tokens": len(tokens)}
    header = {split: {**counts, **_write(folder / f"{split}.npy", tokens)}}
    if marks is not None:
        header[f"{split}-marks"] = _write(folder / f"{split}-marks.npy", marks)
    return header


def _write(path: Path, values: NDArray) -> dict[str, int]:
    np.save(path, values)
    return {"size": path.stat().st_size, "crc32": file_crc(path)}


def _read_header(entry: Path, files: list[str]) -> dict | None:
    """The header of a cache entry, or None if the entry is missing or any of its files isn't what was written."""
    try:
        header = json.loads((entry / HEADER).read_text())
        sound = all(_is_sound(entry / f"{name}.npy", header[name]) for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header if sound else None


def _is_sound(path: Path, written: dict) -> bool:
    return path.stat().st_size == written["size"] and file_crc(path) == written["crc32"]


def file_crc(path: Path, chunk: int = 1 << 24) -> int:
    """The CRC-32 of a file's content."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            crc = zlib.crc32(block, crc)
    return crc


def _open(entry: Path, split: str, header: dict, marked: bool) -> Split:
    tokens = _mapped(entry / f"{split}.npy")
    marks = _mapped(entry / f"{split}-marks.npy") if marked else None
    return Split(tokens, header[split]["words"], header[split]["bytes"], marks)


def _mapped(path: Path) -> NDArray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
