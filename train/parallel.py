"""The processes that train one model together: who they are, what each one's share is, and what they tell each other.

torchrun starts them. A run is the same run with any number of processes: `batch_size` counts the sequences of all of
them together, and a process takes its rows of every batch. Without torchrun all of this is one process, at no cost.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0; process 0 is the one that writes."""
    return dist.get_rank() if _started() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _started() else 1


def is_main() -> bool:
    """Whether this process is the one that logs and saves."""
    return rank() == 0


def rows(count: int) -> slice:
    """This process's rows of a batch of `count`, which is a multiple of the number of processes."""
    each = count // size()
    return slice(rank() * each, (rank() + 1) * each)


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, which have one shape; the tensor itself if there is one process."""
    if size() == 1:
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result


def mean(tensor: Tensor) -> Tensor:
    """The mean of the processes' tensors, which have one shape; the tensor itself if there is one process."""
    return tensor if size() == 1 else total(tensor) / size()


def gather(value: T) -> list[T]:
    """The values of all processes, by their rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns or raises in process 0, in every process."""
    if size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        # Not dist.barrier, which takes a GPU where there is one.
        total(torch.zeros(1))


def one_a_node_first(make: Callable[[], T]) -> T:
    """What `make` returns; the first process of each machine makes its own first, so that the others find its cache.

    A ValueError or OSError in one process is raised in all of them.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    made: Any = None
    for turn in (True, False):
        problem = None
        if turn is (first or size() == 1):
            try:
                made = make()
            except (ValueError, OSError) as error:
                problem = error
        for found in gather(problem):
            if found is not None:
                raise found
    return made


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error of torch's says that another process does not answer any more."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Agreement:
    """The largest number that any process has given, known to all of them at the same call.

    It is known one call late: so nobody waits for the slowest process at every step.
    """

    def __init__(self) -> None:
        self._given = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def __call__(self, number: int) -> int:
        """The largest number of the call before; alone, the number itself."""
        if size() == 1:
            return number
        known = self.settle()
        self._given = torch.tensor([number])
        self._work = dist.all_reduce(self._given, dist.ReduceOp.MAX, async_op=True)
        return known

    def settle(self) -> int:
        """Wait for the call before; its result."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._given)


def launched() -> bool:
    """Whether torchrun (or its like) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def checked_mode(mode: str | None, batch_size: int) -> str:
    """The mode that "--parallel" names, by default ddp under torchrun; ValueError if it cannot be."""
    processes = int(os.environ["WORLD_SIZE"]) if launched() else 1
    mode = mode or ("ddp" if launched() else "none")
    if mode != "none" and not launched():
        raise ValueError(
            f"parallel {mode!r} needs processes: start with torchrun --nproc-per-node N -m grassland.train …"
        )
    if mode == "none" and processes > 1:
        raise ValueError(f"parallel 'none' with {processes} processes would train {processes} times the same; use ddp")
    if batch_size % processes:
        raise ValueError(
            f"batch_size counts the batch of all {processes} processes and must be a multiple of {processes}, "
            f"got {batch_size}"
        )
    return mode


@contextmanager
def processes(mode: str, device: torch.device) -> Iterator[None]:
    """The processes are connected while this is entered; nothing happens for "none"."""
    if mode == "none":
        yield
        return
    store, number, count = next(iter(rendezvous("env://")))
    # torchrun keeps its store when it starts the processes again: what the dead ones wrote must not be found.
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()
