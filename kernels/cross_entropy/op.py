"""Registration of linear_cross_entropy: one opaque op that computes the loss and, in the same pass, its gradients.

A chunk of rows is multiplied with the weight; its logits become losses and the logits' gradient, in place where a
kernel does it; two products more make the gradients of x and of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import differentiable_loss
from ..losses import Gradients, check_labels, chunk_rows, chunks
from ..precision import HALVES, accumulation
from ..products import boost, multiplies_halves
from . import eager

# Logits alive at a time: as many bytes as malloc gives back without asking the system for new pages, and enough rows of
# a vocabulary of 30 k for an efficient product. A GPU has more to fill. As many as the weight has where that is more.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 31 << 18, 1 << 26
# For rows of 30,522 numbers cuBLAS took kernels of an older chip on an H200, at a quarter of its rate.
ALIGNMENT = 64
RowLosses = Callable[..., tuple[Tensor, Tensor]]
OP = dispatch.register(
    "linear_cross_entropy",
    cpp=(torch.float32, torch.bfloat16),
    triton=(torch.float32, *HALVES),
)


@dispatch.opaque("linear_cross_entropy")
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    share: float,
    smoothing: float,
    ignore_index: int,
    dtype: torch.dtype,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients by x (N, D) and weight, times `share` and of the dtypes that `planned` says:
    empty (0,) where `mask` says that they are not needed. dtype: of the products."""
    check_labels(target, weight.shape[0], ignore_index)
    backend, dtype, (_, saved) = planned(weight, dtype, backend)
    x, weight, target = x.to(dtype), weight.to(dtype), target.contiguous()
    if backend != "cpp":
        return chunked(rows_of(backend), x, weight, target, share, smoothing, ignore_index, mask)
    arguments = x.contiguous(), weight.contiguous(), target, share, smoothing, ignore_index, *mask, saved != dtype
    return torch.ops.grassland_cpp.linear_cross_entropy(*arguments)


def planned(
    weight: Tensor, dtype: torch.dtype, backend: str
) -> tuple[str, torch.dtype, tuple[torch.dtype, torch.dtype]]:
    """The backend, the dtype of its products, and those of the gradients of x and weight: float32 or wider, but where
    C++ multiplies bfloat16, in which x's gradient is one product and a bfloat16 weight's ends anyway."""
    backend = dispatch.pick(OP, weight.new_empty(0, dtype=dtype), backend)
    wide = accumulation(dtype)
    if backend != "cpp" or dtype != torch.bfloat16:
        return backend, dtype, (wide, wide)
    if not multiplies_halves():
        return backend, wide, (wide, wide)
    return backend, dtype, (dtype, dtype if weight.dtype == dtype else wide)


def chunked(
    row_losses: RowLosses,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    share: float,
    smoothing: float,
    ignore_index: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where PyTorch multiplies and `row_losses` does what is between the products."""
    vocab = weight.shape[0]
    weight, larger = padded(weight), boost(x.dtype, 1.0)
    elements = CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    gradients = Gradients(x, weight, mask)
    losses = x.new_empty(x.shape[0], dtype=accumulation(x.dtype))
    for rows in chunks(x.shape[0], chunk_rows(weight, elements)):
        logits = x[rows] @ weight.T
        options = (vocab, smoothing, ignore_index, larger, any(mask))
        losses[rows], dlogits = row_losses(logits, target[rows], *options)
        gradients.add(rows, dlogits)
    dx, dweight = gradients.result(larger / share)
    return losses.sum(), dx, dweight.resize_(vocab, x.shape[1]) if mask[1] else dweight  # without the padding


def rows_of(backend: str) -> RowLosses:
    """The function from logits to losses and gradients: see eager.row_losses."""
    if backend == "eager":
        return eager.row_losses
    from . import fused

    return fused.row_losses


def padded(matrix: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of what a GPU's fast products want; a CPU's do without."""
    missing = -matrix.shape[0] % ALIGNMENT
    return matrix if matrix.device.type == "cpu" or not missing else F.pad(matrix, (0, 0, 0, missing))


@linear_cross_entropy.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    share: float,
    smoothing: float,
    ignore_index: int,
    dtype: torch.dtype,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = planned(weight, dtype, backend)[2]
    dx, dweight = (
        t.new_empty(t.shape if needed else 0, dtype=kept)
        for t, needed, kept in zip((x, weight), mask, saved, strict=True)
    )
    return x.new_empty((), dtype=accumulation(dtype)), dx, dweight


loss = differentiable_loss(linear_cross_entropy, "linear_cross_entropy")
