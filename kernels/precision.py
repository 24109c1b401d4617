"""Half dtypes, and the one that sums and norms of theirs are in."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> Tensor:
    return x.to(accumulation(x.dtype))
