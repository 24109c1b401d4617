"""Tokenisers: trained here, read from a file, or taken from the hub; all of them `tokenizers.Tokenizer`."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...archs.io import atomic_write
from ..optional import optional
from .sources import first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"


class SpecialTokens(NamedTuple):
    """Ids: padding, what a sequence begins with, what ends a segment, what stands for a hidden token."""

    pad: int
    cls: int
    sep: int
    mask: int


# What the vocabularies of BERT's and RoBERTa's families call them; the first name is the one given here.
SPECIAL = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}


def special_tokens(tokenizer: "Tokenizer") -> SpecialTokens:
    """The special tokens of a text encoder; those that the vocabulary lacks are added to it.

    From then on text that reads like one of them is encoded as ordinary text.
    """
    ids = []
    for names in SPECIAL.values():
        known = [name for name in names if tokenizer.token_to_id(name) is not None]
        if not known:
            tokenizer.add_special_tokens([names[0]])
        ids.append(tokenizer.token_to_id((known or names)[0]))
    tokenizer.encode_special_tokens = True
    return SpecialTokens(*ids)


def load_tokenizer(spec: str, text: str = "") -> "Tokenizer":
    """The tokeniser that `spec` names; what its file says of padding and truncation is left out, texts stay whole.

    spec: "bpe:SIZE" trains a byte-level BPE of at most SIZE tokens on `text`; a path to a BERT vocab.txt (lower-case
    WordPiece), to a tokenizer.json or to a folder with one of these; or a name on the hub.

    Raises FileNotFoundError and ValueError that name the spec.
    """
    if spec.startswith("bpe:"):
        return train_bpe(text, _bpe_size(spec))
    tokenizer = _load(spec)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load(spec: str) -> "Tokenizer":
    path = Path(spec).expanduser()
    if path.is_dir():
        path = next((path / name for name in (FILE, "vocab.txt") if (path / name).is_file()), path / FILE)
    if path.is_file():
        return read_wordpiece(path) if path.suffix == ".txt" else _read_json(path)
    if spec.startswith((".", "/", "~")) or spec.endswith((".txt", ".json")):
        raise FileNotFoundError(f"tokenizer {path}: no such file")
    tk = optional("tokenizers", "train")
    try:
        return tk.Tokenizer.from_pretrained(spec)
    except Exception as error:  # the hub client's errors have no common base
        hint = f"no such file, and not to be had from the hub ({first_line(error)})"
        raise FileNotFoundError(f"tokenizer {spec}: {hint}") from error


def train_bpe(text: str, size: int) -> "Tokenizer":
    """A byte-level BPE of at most `size` tokens: 256 bytes and the merges that `text` supports, no special tokens."""
    tk = optional("tokenizers", "train")
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def read_wordpiece(path: Path) -> "Tokenizer":
    """BERT's uncased WordPiece tokeniser over the vocabulary in a vocab.txt, without [CLS] and [SEP]."""
    tk = optional("tokenizers", "train")
    # Not splitlines: U+2028 and its like are tokens of multilingual vocabularies.
    try:
        words = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    vocab: dict[str, int] = {}
    for index, word in enumerate(words):
        if vocab.setdefault(word, index) != index:
            raise ValueError(f"tokenizer {path}: {word!r} is on lines {vocab[word] + 1} and {index + 1}")
    if "[UNK]" not in vocab:
        raise ValueError(f"tokenizer {path}: not a WordPiece vocabulary, it has no [UNK]")
    tokenizer = tk.Tokenizer(tk.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tk.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tk.decoders.WordPiece(cleanup=False)
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write tokenizer.json into `folder`, atomically."""
    atomic_write(folder / FILE, tokenizer.to_str().encode())


def _read_json(path: Path) -> "Tokenizer":
    tk = optional("tokenizers", "train")
    try:
        return tk.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"tokenizer {path}: not a tokenizer.json ({first_line(error)})") from error


def _bpe_size(spec: str) -> int:
    size = spec.removeprefix("bpe:")
    if not size.isdigit() or int(size) < 256:
        raise ValueError(f"tokenizer {spec}: the size of a byte-level BPE is a number from 256 on")
    return int(size)
