"""Blocks of a token file: the order in which training draws them, and the walk of an evaluation."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.losses import IGNORE


class BlockOrder:
    """Blocks without replacement, epoch after epoch, each epoch a permutation that follows from the seed.

    The whole stream of blocks is one function of the position, so a position is all that a checkpoint needs.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        self.blocks = blocks
        self.seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The blocks at positions start … start + count − 1 of the stream."""
        parts = []
        while count > 0:
            epoch, index = divmod(start, self.blocks)
            part = self._permutation(epoch)[index : index + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.blocks)
            self._epoch = epoch
        return self._order


def num_blocks(tokens: int, seq_len: int) -> int:
    """The whole blocks of `seq_len` inputs and their targets in a file of so many tokens."""
    return (tokens - 1) // seq_len


def block_batch(tokens: NDArray, blocks: NDArray[np.int64], seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (len(blocks), seq_len), int64, of whole blocks; the targets are the inputs' next tokens."""
    rows = np.stack([tokens[b * seq_len : (b + 1) * seq_len + 1] for b in blocks]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def evaluation_batches(tokens: NDArray, seq_len: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token of the file but the first exactly once as a target, in blocks without overlap.

    All batches have one shape, (batch_size, seq_len), so that compiled models see no other: the last blocks are
    filled up with targets −100, which a loss ignores.
    """
    stride = batch_size * seq_len
    for start in range(0, len(tokens) - 1, stride):
        piece = torch.from_numpy(tokens[start : start + stride + 1].astype(np.int64))
        inputs, targets = torch.zeros(stride, dtype=torch.int64), torch.full((stride,), IGNORE)
        inputs[: len(piece) - 1] = piece[:-1]
        targets[: len(piece) - 1] = piece[1:]
        yield inputs.view(batch_size, seq_len), targets.view(batch_size, seq_len)
