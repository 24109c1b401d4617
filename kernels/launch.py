"""What launching a Triton kernel takes on the host, where a small layer on a GPU spends its time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """`launch` with the device of its first tensor as the current one."""

    @functools.wraps(launch)
    def guarded(*args: Any, **kwargs: Any) -> R:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return launch(*args, **kwargs)

    return guarded


# Triton's own are written for its kernels too, and take a microsecond each.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and 1."""
    return 1 << max(n - 1, 0).bit_length()
