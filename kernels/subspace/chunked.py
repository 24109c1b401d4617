"""The head over a batch, a chunk of rows at a time: only the projections (rows, K k) of one chunk are ever alive.

The products are PyTorch's; what happens to a chunk's projections z between them comes as `rows`, an object with
`logits(z, k, scale)`, `logits_backward(z, grad, k, scale)` and `loss(z, target, k, settings)`; the last two may
overwrite z with dz = scale dl z/|z|, in the loss times `settings.boost`. `eager` and `fused` are such modules; one may
have its own `Unit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..losses import Gradients, chunk_rows, chunks
from ..precision import accumulation, full_precision
from ..products import boost
from .reference import EPS

# Projections alive at a time: 2^24 float32 are 64 MiB, or more where that is less than an efficient product's rows or,
# with gradients, than the weight.
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


def slices(rows: int, weight: Tensor) -> list[slice]:
    return chunks(rows, chunk_rows(weight, CHUNK_ELEMENTS, CHUNK_ROWS))


class Unit:
    """x^ = x / max(|x|, eps), and the way back through it."""

    def __init__(self, x: Tensor) -> None:
        wide = full_precision(x)
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


def logits(kernels: Rows, x: Tensor, weight: Tensor, k: int, scale: float) -> Tensor:
    hat = unit(kernels, x).hat
    parts = chunks(x.shape[0], max(CHUNK_ROWS, CHUNK_ELEMENTS // weight.shape[0]))
    if len(parts) == 1:
        return kernels.logits(hat @ weight.T, k, scale)
    out = x.new_empty(x.shape[0], weight.shape[0] // k, dtype=accumulation(x.dtype))
    for rows in parts:
        out[rows] = kernels.logits(hat[rows] @ weight.T, k, scale)
    return out


def logits_backward(
    kernels: Rows, grad: Tensor, x: Tensor, weight: Tensor, k: int, scale: float, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    hats = unit(kernels, x)
    gradients = Gradients(hats.hat, weight, mask)
    for rows in slices(x.shape[0], weight):
        gradients.add(rows, kernels.logits_backward(hats.hat[rows] @ weight.T, grad[rows], k, scale))
    dhat, dweight = gradients.result()
    dx = hats.backward(dhat) if mask[0] else dhat
    return dx.to(x.dtype), dweight.to(weight.dtype)


def cross_entropy(
    kernels: Rows,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    share: float,
    k: int,
    settings: Loss,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and dx and dweight times `share`, float32 or wider (empty where `mask` says that it is not
    wanted)."""
    settings = settings._replace(boost=boost(x.dtype, 2 * settings.scale))
    hats = unit(kernels, x)
    gradients = Gradients(hats.hat, weight, mask)
    losses = x.new_empty(x.shape[0], dtype=accumulation(x.dtype))
    for rows in slices(x.shape[0], weight):
        losses[rows], dz = kernels.loss(hats.hat[rows] @ weight.T, target[rows], k, settings)
        gradients.add(rows, dz)
    dhat, dweight = gradients.result(settings.boost / share)
    return losses.sum(), hats.backward(dhat) if mask[0] else dhat, dweight
