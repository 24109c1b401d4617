"""What losses over many classes share: a batch in chunks of rows, so that what is wide is alive for one chunk alone."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .precision import accumulation
from .products import add_product, product

# The class that does not count, as in PyTorch.
IGNORE = -100


def chunks(rows: int, limit: int) -> list[slice]:
    """As few slices as hold at most `limit` rows each, as even as they can be."""
    count = max(1, -(-rows // limit))
    step = max(1, -(-rows // count))
    return [slice(start, start + step) for start in range(0, rows, step)]


def chunk_rows(weight: Tensor, elements: int, least: int = 1) -> int:
    """Rows of a chunk whose product with weight (V, D) has as many numbers as `elements`, or as the weight, to whose
    gradient every chunk adds a matrix of that size."""
    return max(least, elements // weight.shape[0], weight.shape[1])


class Gradients:
    """Adds up dx = dz W and dW = dz^T x, float32 or wider, from the chunks' dz; `mask` says which are wanted."""

    def __init__(self, x: Tensor, weight: Tensor, mask: Sequence[bool]) -> None:
        self.x, self.weight, self.mask = x, weight, mask
        self.dtype = accumulation(weight.dtype)
        self.dx = x.new_empty(x.shape if mask[0] else 0, dtype=self.dtype)
        self.dweight: Tensor | None = None

    def add(self, rows: slice, dz: Tensor) -> None:
        whole = dz.dtype == self.dtype
        if self.mask[0]:
            if whole:
                torch.mm(dz, self.weight, out=self.dx[rows])
            else:
                self.dx[rows] = product(dz, self.weight)
        if self.mask[1]:
            x = self.x[rows]
            if self.dweight is None:
                self.dweight = product(dz.T, x).to(self.dtype)
            else:
                add_product(self.dweight, dz.T, x)

    def result(self, boost: float = 1.0) -> tuple[Tensor, Tensor]:
        """dx and dW from dz that were multiplied with `boost`; empty (0,) where not wanted."""
        dweight = self.dweight
        if dweight is None:  # not wanted, or of no rows
            dweight = self.weight.new_zeros(self.weight.shape if self.mask[1] else 0, dtype=self.dtype)
        return (self.dx, dweight) if boost == 1 else (self.dx.div_(boost), dweight.div_(boost))


def share(rows: Tensor, dtype: torch.dtype) -> float:
    """What a loss's gradients are multiplied with in the forward: 1 / rows, as `mean` will ask for, where that is known
    without waiting and outside of a trace, else 1; to the last bit of `dtype`."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or type(rows) is not Tensor or not rows.item():
        return 1.0
    return (torch.ones((), dtype=dtype) / rows).item()


def mean(total: Tensor, rows: Tensor) -> Tensor:
    """total / rows. Of no rows, NaN with gradients of 0, as in PyTorch; a quotient's would be 0 times infinity."""
    return total.masked_fill(rows == 0, torch.nan) / rows


def check_labels(target: Tensor, classes: int, ignore_index: int, name: str = "target") -> None:
    """ValueError for a class that there is not. On a GPU, where looking would mean waiting, it makes the loss NaN."""
    if target.is_floating_point() or target.device.type != "cpu" or target.numel() == 0:
        return
    low, high = target.aminmax()
    if low.item() >= 0 and high.item() < classes:
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise ValueError(f"{name} must be in [0, {classes}) or {ignore_index} (ignored), got {int(wrong[0])}")


def check_loss(
    x: Tensor,
    classes: int,
    target: Tensor,
    label_smoothing: float,
    reduction: str,
    soft: bool,
    name: str = "target",
) -> None:
    """ValueError or TypeError for what no cross entropy of x (…, n) takes; soft: whether probabilities are a target,
    which the caller calls `name`."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if not (isinstance(label_smoothing, Real) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    if target.dtype != torch.int64 and not (soft and target.is_floating_point()):
        allowed = "int64 classes or floating-point probabilities" if soft else "int64 classes"
        raise TypeError(f"{name} must be {allowed}, got {target.dtype}")
    expected = (*x.shape[:-1], classes) if target.is_floating_point() else x.shape[:-1]
    if target.shape != expected:
        raise ValueError(f"{name} must be {tuple(expected)} for x {tuple(x.shape)}, got {tuple(target.shape)}")
    if target.device != x.device:
        raise ValueError(f"{name} must be on the device of x ({x.device}), got {target.device}")
    if target.requires_grad:
        raise ValueError(f"{name} must not require a gradient: none flows to it; detach it")
