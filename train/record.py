"""A training step recorded as CUDA graphs: what Python does for every kernel is done once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .optim import parts
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


class RecordedUpdate:
    """Clipping and the optimiser's step, recorded at the second call and replayed from then on.

    clip: scales the gradients, which stay where they are, and returns their norm. optimizer: one that `recordable`
    says yes to. Its groups keep their learning rates as plain numbers, which may change from call to call.
    """

    def __init__(self, clip: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.clip, self.optimizer = clip, optimizer
        self.graph: torch.cuda.CUDAGraph | None = None
        self.rates: list[Tensor] = []

    def __call__(self) -> Tensor:
        """The gradients' norm before clipping."""
        groups = self.optimizer.param_groups
        first = not self.rates
        if first:
            self.rates = [torch.zeros((), device=group["params"][0].device) for group in groups]
        for rate, group in zip(self.rates, groups, strict=True):
            rate.fill_(group["lr"])
        if first:  # makes the state, and loads the kernels
            with self._rates_on_device():
                return self._update()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with self._rates_on_device(), torch.cuda.graph(graph):
                self.norm = self._update()
            self.graph = graph
        self.graph.replay()
        return self.norm.clone()

    def _update(self) -> Tensor:
        norm = self.clip()
        self.optimizer.step()
        return norm

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """A checkpoint never sees them."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group.update(lr=rate, capturable=capturable)


def recordable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step is kernels alone: AdamW's, fused. The others decide in Python."""
    return all(type(part) is torch.optim.AdamW and part.defaults["fused"] for part in parts(optimizer))
