"""The head's row functions in Triton (see chunked.py)."""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2, on_its_device
from ..precision import accumulation
from ..rounding import store
from . import chunked
from .chunked import Loss
from .reference import EPS

SIZES = ["rows", "classes", "width"]


@triton.jit
def load_groups(z, row, first, classes, K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr):
    # z_i of BC classes as (BC, KP), their addresses and which exist
    c = first + tl.arange(0, BC)
    j = tl.arange(0, KP)
    at = z + row * classes * K + c[:, None] * K + j[None, :]
    keep = (c < classes)[:, None] & (j < K)[None, :]
    return tl.load(at, mask=keep, other=0.0).to(tl.float32), at, keep, c


@triton.jit
def lengths(z):
    return tl.sqrt_rn(tl.sum(z * z, 1))


@triton.jit(do_not_specialize=SIZES)
def unit_kernel(x, hat, norms, width, EPS: tl.constexpr, BN: tl.constexpr):
    # x^ = x / max(|x|, eps)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BN)
    squares = tl.zeros((BN,), tl.float32)
    for first in range(0, width, BN):
        part = tl.load(x + row * width + first + cols, mask=first + cols < width, other=0.0).to(tl.float32)
        squares += part * part
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    tl.store(norms + row, norm)
    length = tl.where(norm < EPS, EPS, norm)
    for first in range(0, width, BN):
        keep = first + cols < width
        part = tl.load(x + row * width + first + cols, mask=keep, other=0.0).to(tl.float32)
        store(hat + row * width + first + cols, tl.div_rn(part, length), keep)


@triton.jit(do_not_specialize=SIZES)
def unit_backward_kernel(x, grad, norms, dx, width, EPS: tl.constexpr, BN: tl.constexpr):
    # dx = (d - x^ <x^, d>) / |x|; a norm that is clamped is a constant
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BN)
    norm = tl.load(norms + row)
    length = tl.where(norm < EPS, EPS, norm)
    products = tl.zeros((BN,), tl.float32)
    for first in range(0, width, BN):
        keep = first + cols < width
        part = tl.load(x + row * width + first + cols, mask=keep, other=0.0).to(tl.float32)
        products += tl.div_rn(part, length) * tl.load(grad + row * width + first + cols, mask=keep, other=0.0)
    along = tl.where(norm > EPS, tl.sum(products, 0), 0.0)
    for first in range(0, width, BN):
        keep = first + cols < width
        part = tl.load(x + row * width + first + cols, mask=keep, other=0.0).to(tl.float32)
        d = tl.load(grad + row * width + first + cols, mask=keep, other=0.0).to(tl.float32)
        store(dx + row * width + first + cols, tl.div_rn(d - tl.div_rn(part, length) * along, length), keep)


@triton.jit(do_not_specialize=SIZES)
def logits_kernel(z, out, classes, scale, K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, classes, BC):
        tile, _, _, c = load_groups(z, row, first, classes, K, KP, BC)
        tl.store(out + row * classes + c, scale * lengths(tile), mask=c < classes)


@triton.jit(do_not_specialize=SIZES)
def logits_backward_kernel(z, grad, classes, scale, K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr):
    # dz = scale dl z / |z|, 0 where z = 0
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, classes, BC):
        tile, at, keep, c = load_groups(z, row, first, classes, K, KP, BC)
        norm = lengths(tile)
        dl = tl.load(grad + row * classes + c, mask=c < classes, other=0.0).to(tl.float32)
        factor = tl.where(norm > 0, tl.div_rn(scale * dl, tl.where(norm > 0, norm, 1.0)), 0.0)
        store(at, tile * factor[:, None], keep)


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(
    z, target, losses, classes, scale, smoothing, ignore_index, boost,
    SOFT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # loss = mass log sum exp(l) - <q, l> with q = (1 - smoothing) target + smoothing / K, then boost times
    # dl = mass softmax(l) - q
    row = tl.program_id(0).to(tl.int64)
    uniform = tl.div_rn(smoothing, classes.to(tl.float32))
    label = ignore_index
    if not SOFT:
        label = tl.load(target + row)
    peak = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    along = tl.full((), 0.0, tl.float32)
    hit = tl.full((), 0.0, tl.float32)
    weight = tl.full((), 0.0, tl.float32)
    for first in range(0, classes, BC):
        tile, _, _, c = load_groups(z, row, first, classes, K, KP, BC)
        value = tl.where(c < classes, scale * lengths(tile), 0.0)
        higher = tl.maximum(peak, tl.max(value, 0))
        # sums are of l - peak: what was summed before moves down when the peak goes up
        rise = higher - peak
        value = tl.where(c < classes, value - higher, 0.0)
        total = total * tl.exp(-rise) + tl.sum(tl.where(c < classes, tl.exp(value), 0.0), 0)
        peak = higher
        if SOFT:
            q = tl.load(target + row * classes + c, mask=c < classes, other=0.0).to(tl.float32)
        else:
            q = tl.where(c == label, 1.0, 0.0)
        along += tl.sum(value, 0) - rise * first
        hit += tl.sum(q * value, 0) - rise * weight
        weight += tl.sum(q, 0)
    mass = weight * (1 - smoothing) + smoothing
    counted = tl.full((), 1.0, tl.float32)
    if not SOFT:
        counted = tl.where(label == ignore_index, 0.0, 1.0)
        # a label that is no class: neither found nor ignored
        mass = tl.where((label >= 0) & (label < classes), 1.0, float("nan"))
    # in float64, whose logarithm is exact where float32's is not
    loss = (mass * tl.log(total.to(tl.float64)) - ((1 - smoothing) * hit + uniform * along)).to(tl.float32)
    tl.store(losses + row, tl.where(counted > 0, loss, 0.0))
    for first in range(0, classes, BC):
        tile, at, keep, c = load_groups(z, row, first, classes, K, KP, BC)
        norm = lengths(tile)
        if SOFT:
            q = tl.load(target + row * classes + c, mask=c < classes, other=0.0).to(tl.float32)
        else:
            q = tl.where(c == label, 1.0, 0.0)
        dl = tl.div_rn(mass * tl.exp(scale * norm - peak), total) - ((1 - smoothing) * q + uniform)
        factor = tl.where(norm > 0, tl.div_rn(scale * boost * dl, tl.where(norm > 0, norm, 1.0)), 0.0)
        store(at, tile * tl.where(counted > 0, factor, 0.0)[:, None], keep)


class Unit(chunked.Unit):
    """Each way in one kernel."""

    @on_its_device
    def __init__(self, x: Tensor) -> None:
        self.wide = x.contiguous()
        self.hat = torch.empty_like(self.wide)
        self.norm = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        self.tile = {"EPS": EPS, "BN": min(2048, next_power_of_2(x.shape[1]))}
        if x.shape[0]:
            unit_kernel[(x.shape[0],)](self.wide, self.hat, self.norm, x.shape[1], **self.tile)

    @on_its_device
    def backward(self, grad: Tensor) -> Tensor:
        dx = torch.empty_like(self.wide, dtype=torch.float32)
        if dx.shape[0]:
            unit_backward_kernel[(dx.shape[0],)](self.wide, grad, self.norm, dx, dx.shape[1], **self.tile)
        return dx


def grouping(z: Tensor, k: int) -> dict[str, int]:
    """Classes in a tile of about 2048 numbers."""
    padded = next_power_of_2(k)
    classes = next_power_of_2(z.shape[-1] // k)
    return {"K": k, "KP": padded, "BC": min(max(2048 // padded, 1), max(classes, 2))}


@on_its_device
def logits(z: Tensor, k: int, scale: float) -> Tensor:
    rows, classes = z.shape[0], z.shape[1] // k
    out = torch.empty(rows, classes, dtype=accumulation(z.dtype), device=z.device)
    if rows:
        logits_kernel[(rows,)](z, out, classes, scale, **grouping(z, k))
    return out


@on_its_device
def logits_backward(z: Tensor, grad: Tensor, k: int, scale: float) -> Tensor:
    if z.shape[0]:
        logits_backward_kernel[(z.shape[0],)](z, grad.contiguous(), z.shape[1] // k, scale, **grouping(z, k))
    return z


@on_its_device
def loss(z: Tensor, target: Tensor, k: int, settings: Loss) -> tuple[Tensor, Tensor]:
    rows, classes = z.shape[0], z.shape[1] // k
    losses = torch.empty(rows, dtype=accumulation(z.dtype), device=z.device)
    if rows:
        numbers = (classes, *settings)
        soft = target.is_floating_point()
        # scale |z| - peak without fma: 0 at the peak
        options = {"SOFT": soft, "enable_fp_fusion": False, **grouping(z, k)}
        loss_kernel[(rows,)](z, target.contiguous(), losses, *numbers, **options)
    return losses, z
