"""Losses and gradient norms as they come, and what happens to those that are not finite."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel

# So many steps in a row without a finite gradient are no accident of the data.
MAX_SKIPS = 10


class Watch:
    """The steps since the last report: loss and gradient norm of each, and how many were skipped.

    Values stay on the device until `look`: looking at every step would make a GPU wait. Only `on_nan="skip"` has to.
    """

    def __init__(self, on_nan: str) -> None:
        self.on_nan = on_nan
        self.seen: list[tuple[float, float]] = []
        self.skipped = self.in_a_row = 0
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Take in a step. loss: this process's. norm: that of the common gradient."""
        self._pending.append(torch.stack([loss, norm.detach().to(loss)]))

    def look(self) -> list[tuple[float, float]]:
        """Loss, the mean over the processes, and norm of each step since `clear`. All processes look together."""
        if self._pending:
            self.seen += [(loss, norm) for loss, norm in parallel.mean(torch.stack(self._pending)).tolist()]
            self._pending.clear()
        return self.seen

    def clear(self) -> None:
        """Begin anew after a report."""
        self.seen, self.skipped = [], 0

    def skips(self, loss: Tensor, norm: Tensor) -> tuple[float, float] | None:
        """Whether this step is to be skipped: its loss and norm then. Always None with `on_nan="stop"`."""
        if self.on_nan != "skip":
            return None
        values = parallel.mean(torch.stack([loss, norm.detach().to(loss)])).tolist()
        if all(map(math.isfinite, values)):
            self.in_a_row = 0
            return None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return values[0], values[1]

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"seen": [list(entry) for entry in self.look()], "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.seen = [(loss, norm) for loss, norm in state["seen"]]
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class Buffers:
    """A copy of a model's buffers: a forward pass with bad data leaves its marks in running statistics."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def restore(self) -> None:
        """Put them back."""
        for buffer, copy in self._kept:
            buffer.copy_(copy)
