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


def clamped_norm(x: Tensor, least: float = 0.0) -> Tensor:
    """max(|x|, least) over the last dimension, which stays. Where it is `least`, derivatives of any order are 0: the
    second ones of PyTorch's norm are NaN at 0."""
    clamped = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) <= least
    return torch.where(clamped, least, torch.linalg.vector_norm(torch.where(clamped, 1, x), dim=-1, keepdim=True))
