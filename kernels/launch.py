"""What a call takes on the host, where a small layer on a GPU spends its time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """`launch`, of Triton kernels, with the device of its first tensor as the current one."""

    @functools.wraps(launch)
    def guarded(*args: Any, **kwargs: Any) -> R:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return launch(*args, **kwargs)

    return guarded


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to; None where it is off, or where there is none, as for meta tensors."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(device: str) -> Any:
    """A context where operations keep the dtypes of their inputs: torch's, which takes microseconds, if needed."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


# Triton's own are written for its kernels too, and take a microsecond each.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and 1."""
    return 1 << max(n - 1, 0).bit_length()
