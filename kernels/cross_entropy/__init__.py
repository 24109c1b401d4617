"""Cross entropy of a linear head over a large vocabulary, whose logits are never all in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..launch import autocast_dtype, without_autocast
from ..losses import check_loss, mean, share
from ..precision import accumulation
from . import op, reference

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Softmax cross entropy of logits x W^T, equal to `F.cross_entropy(x @ weight.T, target, …)`.

    The logits (…, V) are in memory for a chunk of rows at a time, whose losses and gradients are computed at once, in
    the forward pass. Products run in x's dtype, or in autocast's; softmax, loss and the sums of gradients in float32
    (float64 for float64). Deterministic, which `F.linear_cross_entropy` (torch >= 2.14) is not on CUDA: it adds the
    targets' part of the weight's gradient by `index_add_`. A second derivative raises RuntimeError, except with
    `backend="reference"`; the transforms of torch.func and forward mode get the reference.

    Args:
        x: (…, D) features; float32, bfloat16, float16 or float64, any layout, possibly empty.
        weight: (V, D).
        target: (…) int64 classes.
        reduction: "mean" over the rows that count (NaN with gradients of 0 if none does, as in PyTorch) or "sum".
        label_smoothing: in [0, 1], as in PyTorch.
        ignore_index: the class that does not count.
        backend: "reference", "eager", "cpp" or "triton"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        A scalar, float32 or, for float64 input, float64.

    Raises:
        ValueError, TypeError: naming the argument that is wrong. A class out of range is an error on the CPU; on a GPU,
            where looking would mean waiting, it makes the loss NaN.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    _check(x, weight)
    check_loss(x, weight.shape[0], target, label_smoothing, reduction, soft=False)
    rows, flat = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype
    chosen = dispatch.requested(backend)
    counted = (flat != ignore_index).sum()
    smoothing = float(label_smoothing)
    if chosen == "reference":
        with without_autocast(x.device.type):
            total = reference.linear_cross_entropy(rows.to(dtype), weight.to(dtype), flat, smoothing, ignore_index)
    else:
        enabled = torch.is_grad_enabled()
        mask = [enabled and rows.requires_grad, enabled and weight.requires_grad]
        expected = share(counted, accumulation(dtype)) if reduction == "mean" and any(mask) else 1.0
        total = op.loss(rows, weight, flat, expected, smoothing, ignore_index, dtype, mask, chosen)[0]
    return total if reduction == "sum" else mean(total, counted)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must be (V, D) with V >= 1, got {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (…, {weight.shape[1]}), as wide as weight, got {tuple(x.shape)}")
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of weight ({weight.device}), got {x.device}")
