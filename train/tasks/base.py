"""What the training loop asks of a task."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import RunConfig

Batch = TypeVar("Batch")


class Task(ABC):
    """A model, the batches it learns from, its loss and how it is judged.

    With several processes each has a task of its own: `batches` gives its rows of every batch
    (`parallel.rows(batch_size)`), `evaluate` may judge its rows alone and add up (`parallel.total`); `save`, `samples`
    and `write_results` are asked of the first process only. All else is as with one process.

    name: the command. unit: what a batch is counted in ("tokens", "images"). metric: the entry of `evaluate`'s result
    that picks the best checkpoint, the smaller the better. model: on `device`. recordable: whether batches are tensors
    of one shape, and `loss` does nothing but compute with them.
    """

    name: str
    unit: str
    metric: str
    config: Any
    recordable = False

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device

    @property
    @abstractmethod
    def batches_per_epoch(self) -> float:
        """Micro-batches of all processes in one pass over the training data."""

    @property
    def units_per_batch(self) -> int:
        """Tokens or images in a micro-batch of all processes."""
        return self.config.batch_size

    @property
    @abstractmethod
    def flops_per_unit(self) -> float:
        """FLOPs of training on one token or image, forward and backward."""

    @abstractmethod
    def batches(self, position: int) -> Iterator[Any]:
        """The endless stream of micro-batches from the one numbered `position`; the same ones whenever it is asked.

        A process gets its rows of each: together they are those that one process would get.
        """

    def step_batches(self, stream: Iterator[Any], count: int) -> Iterator[Any]:
        """The next `count` micro-batches of a stream of `batches`, which make one optimiser step, each when it is asked
        for. A task whose micro-batches do not count alike in the step's mean looks at all of them first."""
        return islice(stream, count)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss, a scalar, of `model` (the task's own, perhaps compiled or wrapped) on a micro-batch; with
        several processes, one whose mean over them is that of the whole micro-batch. Of the `step_batches` of an
        optimiser step the mean, over micro-batches and processes, is that of the whole step."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The metrics of `model` on "valid" or "test"."""

    @abstractmethod
    def save(self, folder: Path, config: RunConfig) -> None:
        """Write all it takes to use the model (weights, sizes, vocabulary) and to rebuild the run into `folder`."""

    @abstractmethod
    def best_model(self, folder: Path) -> nn.Module:
        """The model that `save` last wrote into `folder`, on the device."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed: a hash of the data, for instance."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Facts about data and model for the log's first entry."""

    def judged(self, batches: Iterable[Batch], split: str) -> Iterator[Batch]:
        """Those of a split's batches that `evaluate` sees: of "valid" the first `config.valid_batches`."""
        return islice(batches, self.config.valid_batches if split == "valid" else None)

    def models(self) -> list[nn.Module]:
        """The trained model, and all others that keep pace with its weights: they are sharded alike."""
        return [self.model]

    @property
    def eval_model(self) -> nn.Module:
        """The model that is judged and saved: the trained one, unless a task averages its weights."""
        return self.model

    def optimizer_options(self) -> dict[str, Any]:
        """Further keywords for `build_optimizer`."""
        return {}

    def after_step(self) -> None:  # noqa: B027
        """What the task does after each optimiser step."""

    def train_metrics(self) -> dict[str, Any]:
        """What the task has counted since the last report, for the log's "train" event."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the task itself has to keep for a resumption, apart from the model: as for `save_state`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up what `state` returned."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on the task's device; a copy to a GPU does not wait."""
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def samples(self, model: nn.Module, count: int, seed: int) -> list[str]:
        """Output of the model to look at, one text a sample; none unless a task makes some."""
        return []

    def write_results(self, folder: Path) -> None:  # noqa: B027
        """Write what the last evaluation gave besides metrics, predictions for instance, into `folder`."""
