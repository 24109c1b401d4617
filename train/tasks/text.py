"""What the tasks on text share: rows in an order that follows from the seed, and the vocabulary beside the model."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .. import parallel
from ..config import RunConfig
from ..data import BlockOrder, save_tokenizer
from ..data.tokenizer import FILE as TOKENIZER_FILE
from ..text_model import load_text_model, save_text_model
from .base import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTask(Task):
    """A task on rows of tokens, which a subclass makes.

    key: a hash of the data. order: that of the rows in training.
    """

    key: str
    tokenizer: "Tokenizer"
    order: BlockOrder

    @abstractmethod
    def batch(self, rows: NDArray[np.int64], place: int) -> Any:
        """Those rows (B,) of the training data, a tuple of tensors. place: of the first of them in the stream."""

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """How much each split has, for the log."""

    def facts(self) -> dict[str, Any]:
        """What else config.json and the log's first entry say."""
        return {}

    def sizes(self) -> dict[str, int]:
        """The parameters, for the log."""
        return {"parameters": self.model.num_parameters()}  # type: ignore[operator]

    @property
    def batches_per_epoch(self) -> float:
        return self.order.blocks / self.config.batch_size

    def batches(self, position: int) -> Iterator[Any]:
        size = self.config.batch_size
        mine = parallel.rows(size)
        while True:
            first = position * size
            yield self.moved(self.batch(self.order.at(first, size)[mine], first + mine.start))
            position += 1

    def judged_rows(self, count: int, split: str) -> Iterator[NDArray[np.int64]]:
        """This process's rows of each batch of a split of `count` rows that `evaluate` sees, −1 for one that does not
        count: all batches have one size, and all processes have rows in each."""
        size = self.config.batch_size
        for start in self.judged(range(0, count, size), split):
            rows = np.arange(start, start + size)[parallel.rows(size)]
            yield np.where(rows < count, rows, -1)

    def moved(self, batch: Any) -> Any:
        """The batch on the task's device."""
        return tree_map_only(Tensor, self.to_device, batch)

    def save(self, folder: Path, config: RunConfig) -> None:
        if not (folder / TOKENIZER_FILE).exists():
            save_tokenizer(self.tokenizer, folder)
        self.save_model(folder, {"task": self.name, **self.facts(), "run": config.to_dict()})

    def save_model(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write weights and config.json, with what is `extra`."""
        save_text_model(self.model, folder, extra)

    def best_model(self, folder: Path) -> nn.Module:
        return load_text_model(folder, self.device)

    def identity(self) -> dict[str, Any]:
        return {"data": self.key, "vocab_size": self.tokenizer.get_vocab_size()}

    def describe(self) -> dict[str, Any]:
        return {**self.identity(), **self.facts(), **self.sizes(), "splits": self.counts()}
