"""Triton launches on the current device, wherever its tensors are."""

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
