"""The head over a batch, a chunk of rows at a time: only the projections (rows, K k) of one chunk are ever alive.

The products are PyTorch's; what happens to a chunk's projections z between them comes as `rows`, an object with
`logits(z, k, scale)`, `logits_backward(z, grad, k, scale)` and `loss(z, target, k, settings)`; the last two may
overwrite z with dz = scale dl z/|z|. `eager` and `fused` are such modules; one may have its own `Unit`.
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of half operands in float32 where cuBLAS can write it."""
    cublas = a.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()
    if cublas and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


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


def unit(kernels: Rows, x: Tensor) -> Unit:
    """`Unit`, or what the module with the row functions has in its place."""
    return getattr(kernels, "Unit", Unit)(x)


class Gradients:
    """Collects dx and dweight from the chunks' dz; `mask` says which of them are wanted."""

    def __init__(self, unit: Unit, weight: Tensor, mask: Sequence[bool]) -> None:
        self.unit, self.weight, self.mask = unit, weight, mask
        self.x = torch.empty_like(unit.hat, memory_format=torch.contiguous_format) if mask[0] else None
        self.total: Tensor | None = None

    def add(self, rows: slice, dz: Tensor) -> None:
        if self.x is not None:
            torch.mm(dz, self.weight, out=self.x[rows])
        if self.mask[1]:
            hat = self.unit.hat[rows]
            if self.total is None:
                # a single chunk's sum needs no more digits than its result
                single = hat.shape[0] == self.unit.hat.shape[0]
                self.total = dz.T @ hat if single else product(dz.T, hat).to(accumulation(dz.dtype))
            elif dz.dtype == self.total.dtype:
                self.total.addmm_(dz.T, hat)
            else:
                self.total += product(dz.T, hat)

    def result(self) -> tuple[Tensor, Tensor]:
        nothing = self.weight.new_empty(0)
        dx = nothing if self.x is None else self.unit.backward(self.x)
        if not self.mask[1]:
            return dx, nothing.clone()
        return dx, torch.zeros_like(self.weight) if self.total is None else self.total.to(self.weight.dtype)


def logits(kernels: Rows, x: Tensor, weight: Tensor, k: int, scale: float) -> Tensor:
    hat = unit(kernels, x).hat
    slices = list(chunks(x.shape[0], weight.shape[0]))
    if len(slices) == 1:
        return kernels.logits(hat @ weight.T, k, scale)
    out = x.new_empty(x.shape[0], weight.shape[0] // k, dtype=accumulation(x.dtype))
    for rows in slices:
        out[rows] = kernels.logits(hat[rows] @ weight.T, k, scale)
    return out


def logits_backward(
    kernels: Rows, grad: Tensor, x: Tensor, weight: Tensor, k: int, scale: float, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    hats = unit(kernels, x)
    gradients = Gradients(hats, weight, mask)
    for rows in chunks(x.shape[0], weight.shape[0]):
        gradients.add(rows, kernels.logits_backward(hats.hat[rows] @ weight.T, grad[rows], k, scale))
    return gradients.result()


def cross_entropy(
    kernels: Rows, x: Tensor, weight: Tensor, target: Tensor, k: int, settings: Loss, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, dx and dweight (empty where `mask` says that it is not wanted)."""
    hats = unit(kernels, x)
    gradients = Gradients(hats, weight, mask)
    losses = x.new_empty(x.shape[0], dtype=accumulation(x.dtype))
    for rows in chunks(x.shape[0], weight.shape[0]):
        losses[rows], dz = kernels.loss(hats.hat[rows] @ weight.T, target[rows], k, settings)
        gradients.add(rows, dz)
    return losses.sum(), *gradients.result()
