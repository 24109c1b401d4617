"""The head over a batch, a chunk of rows at a time: only the projections (rows, K k) of one chunk are ever alive.

The products are PyTorch's; what happens to a chunk's projections z between them comes as `rows`, an object with
`logits(z, k, scale)`, `logits_backward(z, grad, k, scale)` and `loss(z, target, k, settings)`; the last two may
overwrite z with dz = scale dl z/|z|, in the loss times `settings.boost`. `eager` and `fused` are such modules; one may
have its own `Unit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..products import boost, product
from .reference import EPS

# Projections alive at a time: 2^24 float32 are 64 MiB, or more where that is less than an efficient product's rows.
CHUNK_ELEMENTS = 1 << 24
CHUNK_ROWS = 128


class Loss(NamedTuple):
    """The settings of the cross entropy; boost: what its dz are multiplied with."""

    scale: float
    smoothing: float
    ignore_index: int
    boost: float = 1.0


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
        return (grad - self.wide * along) / self.norm.clamp_min(EPS)


def unit(kernels: Rows, x: Tensor) -> Unit:
    """`Unit`, or what the module with the row functions has in its place."""
    return getattr(kernels, "Unit", Unit)(x)


class Gradients:
    """Collects dx and dweight, float32 or wider, from the chunks' dz; `mask` says which of them are wanted."""

    def __init__(self, unit: Unit, weight: Tensor, mask: Sequence[bool]) -> None:
        self.unit, self.weight, self.mask = unit, weight, mask
        self.dtype = accumulation(weight.dtype)
        self.x = unit.hat.new_empty(unit.hat.shape, dtype=self.dtype) if mask[0] else None
        self.total: Tensor | None = None

    def add(self, rows: slice, dz: Tensor) -> None:
        if self.x is not None:
            if dz.dtype == self.dtype:
                torch.mm(dz, self.weight, out=self.x[rows])
            else:
                self.x[rows] = product(dz, self.weight)
        if self.mask[1]:
            hat = self.unit.hat[rows]
            if self.total is None:
                self.total = product(dz.T, hat).to(self.dtype)
            elif dz.dtype == self.dtype:
                self.total.addmm_(dz.T, hat)
            else:
                self.total += product(dz.T, hat)

    def result(self, boost: float = 1.0) -> tuple[Tensor, Tensor]:
        """dx and dweight from dz that were multiplied with `boost`; empty (0,) where not wanted."""
        dx = self.weight.new_empty(0, dtype=self.dtype)
        dweight = dx.clone()
        if self.x is not None:
            dx = self.unit.backward(self.x if boost == 1 else self.x.div_(boost))
        if self.mask[1]:
            dweight = torch.zeros_like(self.weight, dtype=self.dtype) if self.total is None else self.total
            dweight = dweight if boost == 1 else dweight.div_(boost)
        return dx, dweight


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
    dx, dweight = gradients.result()
    return dx.to(x.dtype), dweight.to(weight.dtype)


def cross_entropy(
    kernels: Rows, x: Tensor, weight: Tensor, target: Tensor, k: int, settings: Loss, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and dx and dweight, float32 or wider (empty where `mask` says that it is not wanted)."""
    settings = settings._replace(boost=boost(x.dtype, 2 * settings.scale))
    hats = unit(kernels, x)
    gradients = Gradients(hats, weight, mask)
    losses = x.new_empty(x.shape[0], dtype=accumulation(x.dtype))
    for rows in chunks(x.shape[0], weight.shape[0]):
        losses[rows], dz = kernels.loss(hats.hat[rows] @ weight.T, target[rows], k, settings)
        gradients.add(rows, dz)
    return losses.sum(), *gradients.result(settings.boost)
