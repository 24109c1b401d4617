"""Forward and backward recorded as a CUDA graph: what Python does for every kernel is done once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .watch import Buffers

# Calls before the recording, in which libraries set themselves up.
WARM_UP = 3


class Recorded:
    """`function`, recorded at its first call and replayed from then on, with the same effect on numbers alone.

    function: takes a batch of tensors on a GPU, adds gradients to the parameters of `model` and returns the loss, a
    scalar. It must not wait for the device, and what it does in Python is done once. Gradients stay where they are and
    must not be dropped. accumulate: whether calls add to them, so that they are to be zeroed; else each call
    overwrites them.
    """

    def __init__(self, function: Callable[[Sequence[Tensor]], Tensor], model: nn.Module, accumulate: bool) -> None:
        self.function, self.model, self.accumulate = function, model, accumulate
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """The loss of a batch. ValueError if its shapes are not those of the first one."""
        if self.graph is None:
            self._record(batch)
        assert self.graph is not None
        shapes, first = ([tuple(t.shape) for t in tensors] for tensors in (batch, self.batch))
        if shapes != first:
            raise ValueError(f"a recorded step takes batches of one shape: {first}, got {shapes}")
        for own, given in zip(self.batch, batch, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.loss.clone()

    def _record(self, batch: Sequence[Tensor]) -> None:
        self.batch = [tensor.clone() for tensor in batch]
        device = self.batch[0].device
        numbers, buffers = torch.cuda.get_rng_state(device), Buffers(self.model)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(self.batch)
        torch.cuda.current_stream(device).wait_stream(aside)
        self._prepare()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.function(self.batch)
        if self.accumulate:
            self._prepare()
        buffers.restore()
        torch.cuda.set_rng_state(numbers, device)
        self.graph = graph

    def _prepare(self) -> None:
        """Zeros for calls to add to, or nothing, so that the recording makes the gradients."""
        for parameter in self.model.parameters():
            if not self.accumulate:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
