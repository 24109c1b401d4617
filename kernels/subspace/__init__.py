"""Grassmann class representation: subspace logits, their cross entropy, and the geodesic step (arXiv 2308.01547)."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .. import dispatch
from ..launch import autocast_dtype, without_autocast
from ..losses import check_loss, mean, share
from ..precision import HALVES, accumulation
from . import op, reference
from .op import MODES

__all__ = ["MODES", "grassmann_step", "grassmann_step_", "subspace_cross_entropy", "subspace_logits"]


def subspace_logits(x: Tensor, weight: Tensor, k: int, scale: float = 25.0, *, backend: str | None = None) -> Tensor:
    """Scaled lengths of a feature's projections onto class subspaces: scale |S_i^T x^|, x^ = x / max(|x|, 1e-12).

    Between 0 and scale where the S_i are orthonormal; k = 1 is scale |cos|. The projections (…, K, k) exist for a chunk
    of rows at a time; the backward keeps x and weight alone and projects again. Not differentiable twice, except with
    `backend="reference"`. Source: arXiv 2308.01547, equation 4.

    Args:
        x: (…, n) features; float32, bfloat16, float16 or float64, any layout, possibly empty.
        weight: (K k, n) of x's dtype; rows i k … (i+1) k - 1 are S_i^T. Under autocast, both take autocast's dtype.
        k: dimension of a subspace, 1 <= k <= n.
        scale: the paper's gamma, > 0.
        backend: "reference", "eager", "cpp" or "triton"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        (…, K); float32, float64 for float64 input.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, what it was and what is allowed.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    x, weight = _autocast(x, weight)
    _check_head(x, weight, k, scale)
    chosen = dispatch.requested(backend)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference.subspace_logits(x, weight, k, scale)
    flat = op.logits(x.reshape(-1, x.shape[-1]), weight, k, float(scale), chosen)
    return flat.view(*x.shape[:-1], weight.shape[0] // k)


def subspace_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int,
    scale: float = 25.0,
    label_smoothing: float = 0.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Softmax cross entropy of `subspace_logits`, equal to `F.cross_entropy(subspace_logits(x, …), target, …)`.

    Neither the projections (…, K, k) nor the logits (…, K) of the whole batch are ever in memory: a chunk of rows is
    projected, and its losses and gradients computed at once, in the forward pass. Accumulates in float32,
    deterministic. A second derivative raises RuntimeError, except with `backend="reference"`.

    Args:
        x, weight, k, scale, backend: as for `subspace_logits`.
        target: (…) int64 classes, or (…, K) floating-point probabilities (mixup), to which no gradient flows.
        label_smoothing: in [0, 1].
        ignore_index: the class that does not count; without effect on probabilities.
        reduction: "mean" over the rows that count (NaN with gradients of 0 if none does, as in PyTorch) or "sum".

    Returns:
        A scalar, float32 or, for float64 input, float64.

    Raises:
        ValueError, TypeError: naming the argument that is wrong. A class out of range is an error on the CPU; on a GPU,
            where looking would mean waiting, it makes the loss NaN.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    x, weight = _autocast(x, weight)
    _check_head(x, weight, k, scale)
    check_loss(x, weight.shape[0] // k, target, label_smoothing, reduction, soft=True)
    rows = x.reshape(-1, x.shape[-1])
    soft = target.is_floating_point()
    flat = target.reshape(rows.shape[0], weight.shape[0] // k) if soft else target.reshape(-1)
    counted = torch.full((), rows.shape[0], device=x.device) if soft else (flat != ignore_index).sum()
    chosen = dispatch.requested(backend)
    if chosen == "reference":
        options = (k, float(scale), float(label_smoothing), ignore_index)
        with without_autocast(x.device.type):
            total = reference.subspace_cross_entropy(rows, weight, flat, *options)
    else:
        enabled = torch.is_grad_enabled()
        mask = [enabled and rows.requires_grad, enabled and weight.requires_grad]
        expected = share(counted, accumulation(x.dtype)) if reduction == "mean" and any(mask) else 1.0
        options = (expected, k, float(scale), float(label_smoothing), ignore_index, mask, chosen)
        total = op.cross_entropy(rows, weight, flat, *options)[0]
    return total if reduction == "sum" else mean(total, counted)


def grassmann_step(
    weight: Tensor,
    buffer: Tensor,
    grad: Tensor,
    k: int,
    lr: float,
    momentum: float = 0.9,
    mode: str = "official",
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of Riemannian SGD with momentum on a product of Grassmannians, along the exact geodesic, without SVD.

    B <- momentum B + D;  G = B - S (S^T B);  S <- S cos(sqrt H) - lr G sinc(sqrt H) with H = lr^2 G^T G, both entire
    power series in the k x k matrix H. A Newton-Schulz step in Gram space keeps S^T S = I. A subspace that does not
    move (lr = 0, or B = 0) keeps its bits. Not differentiable. Source: arXiv 2308.01547, algorithm 1.

    Args:
        weight: (K k, n); rows i k … (i+1) k - 1 are S_i^T, orthonormal. float32, float64, or a half dtype, which
            computes in float32 but cannot store an orthonormal basis to better than its own precision.
        buffer: (K k, n), the momentum B, zero before the first step; of the weight's dtype, or float32.
        grad: (K k, n), the Euclidean gradient D, of the weight's dtype.
        k: dimension of a subspace, 1 <= k <= n.
        lr: step size, finite and >= 0.
        momentum: in [0, 1).
        mode: what is carried to the next step: "official" the raw B, as the official program does; "project" its
            horizontal part G, as the paper writes; "transport" G parallel-transported along the geodesic.
        backend: "reference", "eager", "cpp" or "triton"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        The next weight and buffer.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, what it was and what is allowed.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    options = _check_step(weight, buffer, grad, k, lr, momentum, mode)
    weight, buffer, grad = weight.detach(), buffer.detach(), grad.detach()
    chosen = dispatch.requested(backend)
    if chosen == "reference":
        with without_autocast(weight.device.type):
            return reference.grassmann_step(weight, buffer, grad, *options)
    return op.grassmann_step(weight, buffer, grad, *options, chosen)


def grassmann_step_(
    weight: Tensor,
    buffer: Tensor,
    grad: Tensor,
    k: int,
    lr: float,
    momentum: float = 0.9,
    mode: str = "official",
    *,
    backend: str | None = None,
) -> None:
    """`grassmann_step` in place, for optimisers: overwrites `weight` and `buffer`; the same arguments and errors."""
    options = _check_step(weight, buffer, grad, k, lr, momentum, mode)
    weight, buffer, grad = weight.detach(), buffer.detach(), grad.detach()
    chosen = dispatch.requested(backend)
    if chosen == "reference":
        with without_autocast(weight.device.type):
            moved, stored = reference.grassmann_step(weight, buffer, grad, *options)
        weight.copy_(moved)
        buffer.copy_(stored)
    else:
        op.grassmann_step_(weight, buffer, grad, *options, chosen)


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = autocast_dtype(x.device.type)
    if dtype is None or x.dtype == torch.float64:
        return x, weight
    return x.to(dtype), weight.to(dtype)


def _check_weight(weight: Tensor, k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    if weight.dim() != 2 or weight.shape[0] % k or weight.shape[0] == 0:
        raise ValueError(f"weight must be (K k, n) with k = {k} and K >= 1, got {tuple(weight.shape)}")
    if weight.shape[1] < k:
        raise ValueError(f"k must be at most n = {weight.shape[1]}, the width of weight, got {k}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")


def _check_head(x: Tensor, weight: Tensor, k: int, scale: float) -> None:
    _check_weight(weight, k)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (…, {weight.shape[1]}), as wide as weight, got {tuple(x.shape)}")
    if x.dtype != weight.dtype:
        raise TypeError(f"x must have the dtype of weight ({weight.dtype}), got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of weight ({weight.device}), got {x.device}")
    if not (isinstance(scale, Real) and 0 < scale < math.inf):
        raise ValueError(f"scale must be a finite number > 0, got {scale!r}")


def _check_step(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, mode: str
) -> tuple[int, float, float, str]:
    _check_weight(weight, k)
    for name, tensor in (("buffer", buffer), ("grad", grad)):
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ValueError(
                f"{name} must be {tuple(weight.shape)} on {weight.device}, as weight, "
                f"got {tuple(tensor.shape)} on {tensor.device}"
            )
    if grad.dtype != weight.dtype:
        raise TypeError(f"grad must have the dtype of weight ({weight.dtype}), got {grad.dtype}")
    if buffer.dtype != weight.dtype and not (buffer.dtype == torch.float32 and weight.dtype in HALVES):
        raise TypeError(f"buffer must be {weight.dtype}, as weight, or float32 beside half, got {buffer.dtype}")
    if not (isinstance(lr, Real) and 0 <= lr < math.inf):
        raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
    if not (isinstance(momentum, Real) and 0 <= momentum < 1):
        raise ValueError(f"momentum must be a number in [0, 1), got {momentum!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return k, float(lr), float(momentum), mode
