"""Sequences for text encoders: spans of whole sentences, hidden words, pairs of segments.

All that is random in a sequence follows from the numbers it is drawn with, so a place in the stream is all that a
checkpoint needs, and each epoch hides other words.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.losses import IGNORE
from .corpus import LINE, WORD, Split
from .tokenizer import SpecialTokens, special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The entropy that keeps training's draws, evaluation's and the order of the blocks apart.
TRAINING, EVALUATION = 1, 2
SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


class MaskedBatch(NamedTuple):
    """ids, types (B, L) int64 and mask (B, L) bool, False for padding; of what is to be told, positions (B, P) int64
    and labels (B, P) int64, −100 where nothing is; order (B,) int64, 1 where the segments are exchanged, −100 for
    padding, or None without sentence order; weight, a scalar by which the words' mean loss is multiplied, or None."""

    ids: Tensor
    types: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    order: Tensor | None
    weight: Tensor | None = None


def assemble(segments: Sequence[NDArray], special: SpecialTokens, length: int) -> tuple[NDArray, NDArray, NDArray]:
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP], padded: ids, types (1 for B and its end), mask; each (length,)."""
    parts = [part for segment in segments for part in (segment, [special.sep])]
    content = np.concatenate([[special.cls], *parts]).astype(np.int64)
    ids = np.full(length, special.pad, np.int64)
    ids[: len(content)] = content
    place = np.arange(length)
    mask = place < len(content)
    return ids, (mask & (place >= len(segments[0]) + 2)).astype(np.int64), mask


class MaskedText:
    """The sequences of a split: [CLS] span [SEP], or with `sentence_order` [CLS] A [SEP] B [SEP].

    A span is as many whole sentences as fit; A and B are its parts before and after the start of one of its sentences,
    exchanged half of the time (arXiv 1909.11942). Of a span's tokens `mask_rate` are to be told, whole words all of
    them: 80 % of the tokens are hidden by [MASK], 10 % by any token, 10 % stay (arXiv 1810.04805).

    ValueError for a split without a sequence.
    """

    def __init__(
        self, split: Split, tokenizer: "Tokenizer", *, seq_len: int, mask_rate: float, sentence_order: bool, name: str
    ) -> None:
        if split.marks is None:
            raise ValueError("split must have marks: load_corpus(…, marked=True)")
        self.tokens, self.seq_len, self.sentence_order = split.tokens, seq_len, sentence_order
        self.mask_rate = mask_rate
        self.capacity = seq_len - (3 if sentence_order else 2)
        self.special = special_tokens(tokenizer)
        self.ordinary = np.setdiff1d(np.arange(tokenizer.get_vocab_size()), self.special)
        self.words = np.flatnonzero(split.marks & WORD)
        self.sentences = _sentence_starts(split, tokenizer)
        self.spans = _spans(len(split.tokens), self.capacity, self.sentences, self.words)
        if sentence_order:
            first, end = (np.searchsorted(self.words, edge) for edge in (self.spans[:, 0] + 1, self.spans[:, 1]))
            self.spans = self.spans[end > first]
        if not len(self.spans):
            raise ValueError(f"the {name} text is too short: not one sequence of {1 + sentence_order} words in it")

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def most_told(self) -> int:
        """P: how many tokens of a sequence are to be told at most."""
        return max(1, round(self.mask_rate * self.capacity))

    def training(self, indices: NDArray[np.int64], start: int, seed: int) -> MaskedBatch:
        """The sequences `indices`, drawn as those that stand at places start, start + 1, … of the stream."""
        return self._batch([(int(index), (seed, TRAINING, start + row)) for row, index in enumerate(indices)])

    def evaluation(self, batch_size: int, rows: slice | None = None) -> Iterator[MaskedBatch]:
        """Every sequence once, or of every batch those in `rows`; hidden in the same places whatever the seed. All
        batches have one shape: the last one is filled up with rows of padding, of which one token is seen."""
        for start in range(0, len(self), batch_size):
            chosen = range(start, start + batch_size)[rows or slice(None)]
            yield self._batch([(row, (EVALUATION, row)) for row in chosen if row < len(self)], len(chosen))

    def _batch(self, draws: Sequence[tuple[int, tuple[int, ...]]], size: int | None = None) -> MaskedBatch:
        shape, told = (size or len(draws), self.seq_len), (size or len(draws), self.most_told)
        ids, types = np.full(shape, self.special.pad), np.zeros(shape, np.int64)
        mask, positions, labels = np.zeros(shape, bool), np.zeros(told, np.int64), np.full(told, IGNORE)
        mask[:, 0] = True  # also in rows of padding: experts must have something to route
        order = np.full(len(ids), IGNORE)
        for row, (index, entropy) in enumerate(draws):
            generator = np.random.default_rng(entropy)
            segments, order[row] = self._segments(index, generator)
            texts = [self.tokens[segment].astype(np.int64) for segment in segments]
            ids[row], types[row], mask[row] = assemble(texts, self.special, self.seq_len)
            places, words = self._layout(segments)
            chosen = places[_choose_words(words, self._count(len(places)), generator)[: self.most_told]]
            positions[row, : len(chosen)] = chosen
            labels[row, : len(chosen)] = ids[row, chosen]
            ids[row, chosen] = self._hidden(ids[row, chosen], generator)
        ids, types, mask, positions, labels, order = map(torch.from_numpy, (ids, types, mask, positions, labels, order))
        return MaskedBatch(ids, types, mask, positions, labels, order if self.sentence_order else None)

    def _segments(self, index: int, generator: np.random.Generator) -> tuple[list[slice], int]:
        """Where the segments lie in the split, and whether they are exchanged."""
        start, end = self.spans[index]
        if not self.sentence_order:
            return [slice(start, end)], 0
        cuts = _between(self.sentences, start, end)
        # A span of one sentence is cut inside it.
        cut = generator.choice(cuts if len(cuts) else _between(self.words, start, end))
        exchanged = int(generator.integers(2))
        return [slice(start, cut), slice(cut, end)][:: -1 if exchanged else 1], exchanged

    def _layout(self, segments: list[slice]) -> tuple[NDArray, NDArray]:
        """For each token of the segments its place in the sequence, and the number of its word."""
        places, words = [], []
        at = count = 0
        for segment in segments:
            length = segment.stop - segment.start
            places.append(np.arange(at + 1, at + 1 + length))
            begins = np.zeros(length, np.int64)
            begins[_between(self.words, segment.start, segment.stop) - segment.start] = 1
            words.append(count + begins.cumsum())
            at, count = at + 1 + length, words[-1][-1] + 1
        return np.concatenate(places), np.concatenate(words)

    def _count(self, tokens: int) -> int:
        return max(1, round(self.mask_rate * tokens))

    def _hidden(self, ids: NDArray, generator: np.random.Generator) -> NDArray:
        draw, others = generator.random(len(ids)), generator.choice(self.ordinary, len(ids))
        return np.where(draw < 0.8, self.special.mask, np.where(draw < 0.9, others, ids))


def _choose_words(words: NDArray, count: int, generator: np.random.Generator) -> NDArray:
    """The tokens of words in random order, each of which still fits into `count` tokens; one word at least."""
    lengths = np.bincount(words)
    order, total, chosen = generator.permutation(len(lengths)), 0, np.zeros(len(lengths), bool)
    for word in order:
        if total + lengths[word] <= count:
            chosen[word] = True
            total += lengths[word]
    if not total:
        chosen[order[0]] = True
    return np.flatnonzero(chosen[words])


def _sentence_starts(split: Split, tokenizer: "Tokenizer") -> NDArray:
    """Where lines begin, and words that follow the end of a sentence."""
    vocabulary = [tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size())]
    ends = np.array([SENTENCE_END.search(token) is not None for token in vocabulary])
    starts = split.marks & LINE != 0  # type: ignore[operator]
    starts[1:] |= ends[split.tokens[:-1]] & (split.marks[1:] & WORD != 0)  # type: ignore[index]
    return np.flatnonzero(starts)


def _spans(total: int, capacity: int, sentences: NDArray, words: NDArray) -> NDArray:
    """Consecutive spans (N, 2) of at most `capacity` tokens that end where a sentence does, or where a word does."""
    spans, start = [], 0
    kinds = [np.append(starts, total) for starts in (sentences, words)]
    while start < total:
        ends = (edges[np.searchsorted(edges, start + capacity, side="right") - 1] for edges in kinds)
        end = next((int(end) for end in ends if end > start), min(start + capacity, total))
        spans.append((start, end))
        start = end
    return np.array(spans, np.int64).reshape(-1, 2)


def _between(starts: NDArray, start: int, end: int) -> NDArray:
    """Those of the sorted `starts` that lie strictly between start and end."""
    first, last = np.searchsorted(starts, [start + 1, end])
    return starts[first:last]
