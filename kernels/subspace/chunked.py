"""The head over a batch, a chunk of rows at a time: only the projections (rows, K k) of one chunk are ever alive.

The products are PyTorch's; what happens to a chunk's projections z between them comes as `rows`, an object with
`logits(z, k, scale)`, `logits_backward(z, grad, k, scale)` and `loss(z, target, k, settings)`; the last two may
overwrite z with dz = scale dl z/|z|. `eager` and `fused` are such modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .reference import EPS

# Projections alive at a time: 2^24 float32 are 64 MiB, or more where that is less than an efficient product's rows.
CHUNK_ELEMENTS = 1 << 24
CHUNK_ROWS = 128


class Loss(NamedTuple):
    """The settings of the cross entropy."""

    scale: float
    smoothing: float
    ignore_index: int


class Rows(Protocol):
    """What happens to a chunk of projections z (rows, K k)."""

    def logits(self, z: Tensor, k: int, scale: float) -> Tensor: ...

    def logits_backward(self, z: Tensor, grad: Tensor, k: int, scale: float) -> Tensor: ...

    def loss(self, z: Tensor, target: Tensor, k: int, settings: Loss) -> tuple[Tensor, Tensor]: ...


def chunks(rows: int, width: int) -> Iterator[slice]:
    count = max(1, -(-rows * width // max(CHUNK_ELEMENTS, CHUNK_ROWS * width)))
    step = max(1, -(-rows // count))
    return (slice(start, start + step) for start in range(0, rows, step))


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Unit:
    """x^ = x / max(|x|, eps), and the way back through it."""

    def __init__(self, x: Tensor) -> None:
        wide = x.to(accumulation(x.dtype))
        self.norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        self.wide = wide / self.norm.clamp_min(EPS)
        self.hat = self.wide.to(x.dtype)

    def backward(self, grad: Tensor) -> Tensor:
        # dx = (d - x^ <x^, d>) / |x|; a norm that is clamped is a constant
        along = (self.wide * grad).sum(-1, keepdim=True) * (self.norm > EPS)
        return ((grad - self.wide * along) / self.norm.clamp_min(EPS)).to(self.hat.dtype)


class Gradients:
    """Collects dx and dweight from the chunks' dz; `mask` says which of them are wanted."""

    def __init__(self, unit: Unit, weight: Tensor, mask: Sequence[bool]) -> None:
        wide = accumulation(weight.dtype)
        self.unit, self.weight = unit, weight
        self.x = torch.empty_like(unit.wide) if mask[0] else None
        self.total = weight.new_zeros(weight.shape, dtype=wide) if mask[1] else None

    def add(self, rows: slice, dz: Tensor) -> None:
        if self.x is not None:
            self.x[rows] = (dz @ self.weight).to(self.x.dtype)
        if self.total is not None:
            hat = self.unit.hat[rows]
            if dz.dtype == self.total.dtype:
                self.total.addmm_(dz.T, hat)
            else:
                self.total += dz.T @ hat

    def result(self) -> tuple[Tensor, Tensor]:
        dx = self.weight.new_empty(0) if self.x is None else self.unit.backward(self.x)
        dweight = self.weight.new_empty(0) if self.total is None else self.total.to(self.weight.dtype)
        return dx, dweight


def logits(kernels: Rows, x: Tensor, weight: Tensor, k: int, scale: float) -> Tensor:
    hat = Unit(x).hat
    out = x.new_empty(x.shape[0], weight.shape[0] // k, dtype=accumulation(x.dtype))
    for rows in chunks(x.shape[0], weight.shape[0]):
        out[rows] = kernels.logits(hat[rows] @ weight.T, k, scale)
    return out


def logits_backward(
    kernels: Rows, grad: Tensor, x: Tensor, weight: Tensor, k: int, scale: float, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    unit = Unit(x)
    gradients = Gradients(unit, weight, mask)
    for rows in chunks(x.shape[0], weight.shape[0]):
        gradients.add(rows, kernels.logits_backward(unit.hat[rows] @ weight.T, grad[rows], k, scale))
    return gradients.result()


def cross_entropy(
    kernels: Rows, x: Tensor, weight: Tensor, target: Tensor, k: int, settings: Loss, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, dx and dweight (empty where `mask` says that it is not wanted)."""
    unit = Unit(x)
    gradients = Gradients(unit, weight, mask)
    losses = x.new_zeros(x.shape[0], dtype=accumulation(x.dtype))
    for rows in chunks(x.shape[0], weight.shape[0]):
        losses[rows], dz = kernels.loss(unit.hat[rows] @ weight.T, target[rows], k, settings)
        gradients.add(rows, dz)
    return losses.sum(), *gradients.result()
