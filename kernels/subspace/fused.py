"""The subspace ops in Triton: the head's row functions (see chunked.py), and the geodesic step, one program a class.

The step sees a class as the stack T = [S^T; B] of R = 2 KP rows, KP the subspace dimension padded to a power of two.
Its Gram matrix M = T T^T is one product, and all that the step writes is Q T for one R x R matrix Q that M determines.
A matrix "top left" has its k x k content there and zeros elsewhere; X moves bottom rows to the top.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import eager
from .chunked import Loss, accumulation

SIZES = ["rows", "classes"]
TRACE = tl.constexpr(1.0)
HALVINGS = tl.constexpr(40)
# The horizontal part takes the place of the momentum from this |A|^2 / |G|^2 on, or this lr^2 |A|^2.
RADIAL = tl.constexpr(16.0)
TURN = tl.constexpr(0.25)
# The k x k algebra of larger subspaces does not fit the registers of one program: batched products do it.
LARGEST = 16


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
    return tl.sqrt(tl.sum(z * z, 1))


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
        factor = tl.where(norm > 0, scale * dl / tl.where(norm > 0, norm, 1.0), 0.0)
        tl.store(at, tile * factor[:, None], mask=keep)


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(
    z, target, losses, classes, scale, smoothing, ignore_index,
    SOFT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # loss = mass log sum exp(l) - <q, l> with q = (1 - smoothing) target + smoothing / K, then dl = mass softmax(l) - q
    row = tl.program_id(0).to(tl.int64)
    uniform = smoothing / classes
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
    loss = mass * tl.log(total) - (1 - smoothing) * hit - uniform * along
    tl.store(losses + row, tl.where(counted > 0, loss, 0.0))
    for first in range(0, classes, BC):
        tile, at, keep, c = load_groups(z, row, first, classes, K, KP, BC)
        norm = lengths(tile)
        if SOFT:
            q = tl.load(target + row * classes + c, mask=c < classes, other=0.0).to(tl.float32)
        else:
            q = tl.where(c == label, 1.0, 0.0)
        dl = mass * tl.exp(scale * norm - peak) / total - (1 - smoothing) * q - uniform
        factor = tl.where(norm > 0, scale * dl / tl.where(norm > 0, norm, 1.0), 0.0)
        tl.store(at, tile * tl.where(counted > 0, factor, 0.0)[:, None], mask=keep)


@triton.jit
def product(a, b):
    # float32 stays float32 on the chip: no TF32
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_stack(
    weight, buffer, grad, base, cols, momentum, K: tl.constexpr, N: tl.constexpr, KP: tl.constexpr, R: tl.constexpr
):
    # T = [S^T; mu B + D], the addresses of its rows in weight or buffer, and which are which
    i = tl.arange(0, R)
    r = tl.where(i < KP, i, i - KP)
    at = base + r.to(tl.int64)[:, None] * N + cols[None, :]
    keep = (r < K)[:, None] & (cols < N)[None, :]
    top = keep & (i < KP)[:, None]
    bottom = keep & (i >= KP)[:, None]
    s = tl.load(weight + at, mask=top, other=0.0).to(tl.float32)
    b = tl.load(buffer + at, mask=bottom, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=bottom, other=0.0).to(tl.float32)
    return s + (momentum * b + d), at, top, bottom


@triton.jit
def trigonometry(h, eye, R: tl.constexpr):
    # u = cos(sqrt h) - 1 and sinc(sqrt h), top left; halved to the series' range, then doubled
    i = tl.arange(0, R)
    diagonal = i[:, None] == i[None, :]
    trace = tl.sum(tl.sum(tl.where(diagonal, h, 0.0), 1), 0)
    halvings = tl.full((), 0, tl.int32)
    shrink = tl.full((), 1.0, tl.float32)
    while (trace * shrink > TRACE) & (halvings < HALVINGS):
        shrink *= 0.25
        halvings += 1
    h *= shrink
    # -1/12! … -1/2! and 1/13! … 1/3!: six powers leave less than 1e-10
    u = h * (1.0 / 479001600)
    s = h * (1.0 / 6227020800)
    u = product(h, u - eye * (1.0 / 3628800))
    s = product(h, s - eye * (1.0 / 39916800))
    u = product(h, u + eye * (1.0 / 40320))
    s = product(h, s + eye * (1.0 / 362880))
    u = product(h, u - eye * (1.0 / 720))
    s = product(h, s - eye * (1.0 / 5040))
    u = product(h, u + eye * (1.0 / 24))
    s = product(h, s + eye * (1.0 / 120))
    u = product(h, u - eye * 0.5)
    s = product(h, s - eye * (1.0 / 6))
    s += eye
    for _ in range(halvings):
        s += product(s, u)
        u = 2.0 * product(u, u) + 4.0 * u
    return u, s


@triton.jit
def coefficients(m, a, project, KP: tl.constexpr, R: tl.constexpr, CARRY: tl.constexpr):
    # Q from M = T T^T; `project` is 1 where the bottom of T is B, 0 where it is already G
    i = tl.arange(0, R)
    shift = tl.where(i[None, :] == i[:, None] + KP, 1.0, 0.0)
    eye = tl.where((i[:, None] == i[None, :]) & (i < KP)[:, None], 1.0, 0.0)
    cross = product(product(eye, m), tl.trans(shift))
    across = project * tl.trans(cross)
    square = product(shift, product(m, tl.trans(shift))) - product(across, project * cross)
    u, sinc = trigonometry(a * a * square, eye, R)
    # S+ = (1 + u - a sinc A^T) S + a sinc B, then one Newton-Schulz step in Gram space
    top = eye + u - a * product(sinc, across) + a * product(sinc, shift)
    excess = product(product(top, m), tl.trans(top)) - eye
    top -= 0.5 * product(excess, top)
    bottom = tl.where((i[:, None] == i[None, :]) & (i >= KP)[:, None], 1.0, 0.0)
    if CARRY == 1:
        # G = B - A^T S
        bottom -= product(tl.trans(shift), across)
    if CARRY == 2:
        # G+ = (1 + u) (B - A^T S) - a sinc (G^T G) S
        turn = eye + u
        moved = product(turn, shift) - product(turn, across) - a * product(sinc, square)
        bottom = product(tl.trans(shift), moved)
    return top + bottom


@triton.jit
def step_kernel(
    weight, buffer, grad, lr, momentum,
    K: tl.constexpr, N: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, CARRY: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * K * N
    i = tl.arange(0, R)
    m = tl.zeros((R, R), tl.float32)
    for first in range(0, N, BN):
        t, _, _, _ = load_stack(weight, buffer, grad, base, first + tl.arange(0, BN), momentum, K, N, KP, R)
        m += product(t, tl.trans(t))
    diagonal = i[:, None] == i[None, :]
    shift = tl.where(i[None, :] == i[:, None] + KP, 1.0, 0.0)
    across = product(shift, tl.where((i < KP)[None, :], m, 0.0))
    everything = tl.sum(tl.sum(tl.where(diagonal & (i >= KP)[:, None], m, 0.0), 1), 0)
    radial = tl.sum(tl.sum(across * across, 1), 0)
    lower = tl.where(diagonal, 1.0, 0.0)
    whole = 1.0
    if tl.maximum(radial - RADIAL * (everything - radial), lr * lr * radial - TURN) > 0:
        # the Gram matrix of [S; G], G = B - A^T S
        whole = 0.0
        lower -= product(tl.trans(shift), across)
        m = tl.zeros((R, R), tl.float32)
        for first in range(0, N, BN):
            t, _, _, _ = load_stack(weight, buffer, grad, base, first + tl.arange(0, BN), momentum, K, N, KP, R)
            t = tl.where((i < KP)[:, None], t, product(lower, t))
            m += product(t, tl.trans(t))
    q = coefficients(m, -lr, whole, KP, R, CARRY)
    moves = lr * lr * everything != 0
    for first in range(0, N, BN):
        t, at, top, bottom = load_stack(weight, buffer, grad, base, first + tl.arange(0, BN), momentum, K, N, KP, R)
        stacked = t
        if whole == 0:
            stacked = tl.where((i < KP)[:, None], t, product(lower, t))
        moved = product(q, stacked)
        if moves:
            tl.store(weight + at, moved, mask=top)
        if CARRY == 0:
            tl.store(buffer + at, t, mask=bottom)
        else:
            tl.store(buffer + at, moved, mask=bottom)


def grouping(z: Tensor, k: int) -> dict[str, int]:
    """Classes in a tile of about 2048 numbers."""
    padded = triton.next_power_of_2(k)
    classes = triton.next_power_of_2(z.shape[-1] // k)
    return {"K": k, "KP": padded, "BC": min(max(2048 // padded, 1), max(classes, 2))}


def logits(z: Tensor, k: int, scale: float) -> Tensor:
    rows, classes = z.shape[0], z.shape[1] // k
    out = torch.empty(rows, classes, dtype=accumulation(z.dtype), device=z.device)
    if rows:
        logits_kernel[(rows,)](z, out, classes, scale, **grouping(z, k))
    return out


def logits_backward(z: Tensor, grad: Tensor, k: int, scale: float) -> Tensor:
    if z.shape[0]:
        logits_backward_kernel[(z.shape[0],)](z, grad.contiguous(), z.shape[1] // k, scale, **grouping(z, k))
    return z


def loss(z: Tensor, target: Tensor, k: int, settings: Loss) -> tuple[Tensor, Tensor]:
    rows, classes = z.shape[0], z.shape[1] // k
    losses = torch.empty(rows, dtype=accumulation(z.dtype), device=z.device)
    if rows:
        numbers = (classes, settings.scale, settings.smoothing, settings.ignore_index)
        soft = target.is_floating_point()
        loss_kernel[(rows,)](z, target.contiguous(), losses, *numbers, SOFT=soft, **grouping(z, k))
    return losses, z


def grassmann_step_(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, mode: str
) -> None:
    """Overwrites weight and buffer, of any layout."""
    if k > LARGEST:
        moved, stored = eager.grassmann_step(weight, buffer, grad, k, lr, momentum, mode)
        weight.copy_(moved)
        buffer.copy_(stored)
        return
    w, b, d = weight.contiguous(), buffer.contiguous(), grad.contiguous()
    padded = max(8, triton.next_power_of_2(k))
    n = w.shape[1]
    # as many columns at a time as leave sm_90 without spills
    columns = max(16, min(triton.next_power_of_2(n), 64 if padded == 8 else 32))
    step_kernel[(w.shape[0] // k,)](
        w, b, d, lr, momentum,
        K=k, N=n, KP=padded, R=2 * padded, CARRY=("official", "project", "transport").index(mode), BN=columns,
        num_warps=4 if padded == 8 else 8,
    )  # fmt: skip
    for tensor, result in ((weight, w), (buffer, b)):
        if result.data_ptr() != tensor.data_ptr():
            tensor.copy_(result)
