"""The geodesic step in Triton, one program a class.

A class is seen as the stack T = [S^T; B] of R = 2 KP rows, KP the subspace dimension padded to a power of two. Its Gram
matrix M = T T^T is one product, and all that the step writes is T + q T for one R x R matrix q that M determines. Both
products run on the matrix units, float32 as a sum of three bfloat16; a group of columns is one warp's.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..launch import next_power_of_2, on_its_device
from ..rounding import store
from . import eager

TRACE = tl.constexpr(1.0)
HALVINGS = tl.constexpr(40)
# The horizontal part takes the place of the momentum from this |A|^2 / |G|^2 on, or this lr^2 |A|^2.
RADIAL = tl.constexpr(16.0)
TURN = tl.constexpr(0.25)
# Triton's interpreter multiplies no bfloat16, and converts to it by cutting bits off.
PLAIN = tl.constexpr(dispatch.interpreted())
# Columns at a time and warps of the step, a group of columns a warp: for k <= 8 by n, and for k up to 16.
TILES = {
    "narrow": {"columns": 64, "num_warps": 4},
    "wide": {"columns": 128, "num_warps": 8},
    "large": {"columns": 128, "num_warps": 8},
}
WIDE = 1024
# The k x k algebra of larger subspaces does not fit the registers of one program: batched products do it.
LARGEST = 16


@triton.jit
def rounded(t):
    # to the nearest bfloat16; a NaN may be lost
    bits = t.to(tl.uint32, bitcast=True) + 0x8000
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b):
    # float32 stays float32 on the chip: no TF32
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(t):
    # a float32 that is a bfloat16 becomes one: no conversion, whose units are few
    if PLAIN:
        return t
    return (t.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def split(t):
    # t = t0 + t1 + t2, each with the 8 bits of a bfloat16
    t0 = rounded(t)
    rest = t - t0
    t1 = rounded(rest)
    return t0, t1, rest - t1


@triton.jit
def combine(q, t):
    # q T of every group to 2^-24: what is left out is q1 t2 + q2 t1 + q2 t2
    q0, q1, q2 = split(tl.broadcast_to(q[None, :, :], (t.shape[0], q.shape[0], q.shape[1])))
    q0, q1, q2 = narrow(q0), narrow(q1), narrow(q2)
    t0, t1, t2 = split(t)
    t0, t1, t2 = narrow(t0), narrow(t1), narrow(t2)
    out = tl.dot(q1, t1)
    out = tl.dot(q0, t2, out)
    out = tl.dot(q2, t0, out)
    out = tl.dot(q0, t1, out)
    out = tl.dot(q1, t0, out)
    return tl.dot(q0, t0, out)


@triton.jit
def load_stack(
    weight, buffer, grad, first, momentum,
    ADD: tl.constexpr, K: tl.constexpr, N: tl.constexpr, KP: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # T = [S^T; mu B + D], or [S^T; B], as groups of columns (W, 2 KP, BC), where its halves lie and which exist
    i = tl.arange(0, 2 * KP)[None, :, None]
    r = tl.where(i < KP, i, i - KP)
    cols = first + tl.arange(0, W)[:, None, None] * BC + tl.arange(0, BC)[None, None, :]
    at = r * N + cols
    top = (i < KP) & (r < K) & (cols < N)
    bottom = (i >= KP) & (r < K) & (cols < N)
    t = tl.load(buffer + at, mask=bottom, other=0.0).to(tl.float32)
    if ADD:
        t = momentum * t + tl.load(grad + at, mask=bottom, other=0.0).to(tl.float32)
    t += tl.load(weight + at, mask=top, other=0.0).to(tl.float32)
    return t, at, top, bottom


@triton.jit
def gram(
    weight, buffer, grad, correction, momentum,
    LOWER: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, KP: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # M = T T^T = P + Y + Y^T with P = T0 T0^T and Y = T0 T1^T + T0 T2^T + T1 T1^T / 2; KEEP: B <- mu B + D
    large = tl.zeros((W, 2 * KP, 2 * KP), tl.float32)
    small = tl.zeros((W, 2 * KP, 2 * KP), tl.float32)
    for first in range(0, N, W * BC):
        t, at, _, bottom = load_stack(weight, buffer, grad, first, momentum, ADD, K, N, KP, W, BC)
        if KEEP:
            store(buffer + at, t, bottom)
        if LOWER:
            t += combine(correction, t)
        t0, t1, t2 = split(t)
        half = narrow(0.5 * t1)
        t0, t1, t2 = narrow(t0), tl.permute(narrow(t1), (0, 2, 1)), tl.permute(narrow(t2), (0, 2, 1))
        # the matrix unit truncates what it adds up: the sum over tiles is made outside of it, hence the last argument
        large += tl.dot(t0, tl.permute(t0, (0, 2, 1)), max_num_imprecise_acc=BC)
        small = tl.dot(half, t1, small)
        small = tl.dot(t0, t2, small)
        small = tl.dot(t0, t1, small)
    y = tl.sum(small, 0)
    return tl.sum(large, 0) + (y + tl.trans(y))


@triton.jit
def finish(
    weight, buffer, grad, q, correction, momentum, moves,
    LOWER: tl.constexpr, CARRY: tl.constexpr, ADD: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, KP: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # T <- T + q T, from the columns that were read last, and are still in the cache, to those read first
    for back in range(0, N, W * BC):
        first = (N - 1) // (W * BC) * (W * BC) - back
        t, at, top, bottom = load_stack(weight, buffer, grad, first, momentum, ADD, K, N, KP, W, BC)
        out = t
        if LOWER:
            out += combine(correction, out)
        out += combine(q, out)
        if moves:
            store(weight + at, out, top)
        if CARRY > 0:
            store(buffer + at, out, bottom)
        elif ADD:
            store(buffer + at, t, bottom)


@triton.jit
def trigonometry(h, eye):
    # u = cos(sqrt h) - 1 and sinc(sqrt h) where eye is 1; halved to the series' range, then doubled
    trace = tl.sum(tl.sum(h * eye, 1), 0)
    halvings = tl.full((), 0, tl.int32)
    shrink = tl.full((), 1.0, tl.float32)
    while (trace * shrink > TRACE) & (halvings < HALVINGS):
        shrink *= 0.25
        halvings += 1
    h *= shrink
    # six powers leave less than 1e-10: -h/2! + h^2/4! - h^3/6! + h^3 (h/8! - h^2/10! + h^3/12!), sinc one factorial up
    h2 = product(h, h)
    h3 = product(h, h2)
    u = product(h3, h * (1.0 / 40320) - h2 * (1.0 / 3628800) + h3 * (1.0 / 479001600))
    s = product(h3, h * (1.0 / 362880) - h2 * (1.0 / 39916800) + h3 * (1.0 / 6227020800))
    u = ((u - h3 * (1.0 / 720)) + h2 * (1.0 / 24)) - h * 0.5
    s = (((s - h3 * (1.0 / 5040)) + h2 * (1.0 / 120)) - h * (1.0 / 6)) + eye
    for _ in range(halvings):
        s += product(s, u)
        u = 2.0 * product(u, u) + 4.0 * u
    return u, s


@triton.jit
def coefficients(m, across, a, KP: tl.constexpr, R: tl.constexpr, CARRY: tl.constexpr):
    # q of T <- T + q T from M = T T^T, and A^T of G = B - A^T S, bottom left
    i = tl.arange(0, R)
    top, left = (i < KP)[:, None], (i < KP)[None, :]
    diagonal = i[:, None] == i[None, :]
    upper = tl.where(diagonal & top, 1.0, 0.0)
    lower = tl.where(diagonal & (i >= KP)[:, None], 1.0, 0.0)
    up = tl.where(i[None, :] == i[:, None] + KP, 1.0, 0.0)
    down = tl.trans(up)
    square = tl.where(top | left, 0.0, m) - product(across, tl.trans(across))
    swept = product(square, down) if CARRY == 2 else square
    u, sinc = trigonometry(a * a * square, lower)
    carried = tl.zeros((R, R), tl.float32)
    if CARRY > 0:
        carried -= across
    if CARRY == 2:
        # G+ = (1 + u) (B - A^T S) - a sinc (G^T G) S
        carried += product(u, lower - across)
        carried -= a * product(sinc, swept)
    # S+ - S = u S + a sinc (B - A^T S)
    q = product(up, product(u, down) + a * product(sinc, lower - across))
    # one Newton-Schulz step in Gram space: S+ -= (S+ S+^T - 1) S+ / 2
    moved = product(q, m)
    excess = tl.where(top & left, (m - upper) + (moved + tl.trans(moved)), 0.0) + product(moved, tl.trans(q))
    q -= 0.5 * (excess + product(excess, q))
    return q + carried


@triton.jit
def step_kernel(
    weight, buffer, grad, lr, momentum,
    K: tl.constexpr, N: tl.constexpr, KP: tl.constexpr, CARRY: tl.constexpr, KEEP: tl.constexpr,
    W: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = 2 * KP
    base = tl.program_id(0).to(tl.int64) * K * N
    weight += base
    buffer += base
    grad += base
    i = tl.arange(0, R)
    none = tl.zeros((R, R), tl.float32)
    m = gram(weight, buffer, grad, none, momentum, False, True, KEEP, K, N, KP, W, BC)
    if KEEP:
        # other threads may read what this one has stored
        tl.debug_barrier()
    across = tl.where((i >= KP)[:, None] & (i < KP)[None, :], m, 0.0)
    everything = tl.sum(tl.sum(tl.where((i[:, None] == i[None, :]) & (i >= KP)[:, None], m, 0.0), 1), 0)
    radial = tl.sum(tl.sum(across * across, 1), 0)
    moves = lr * lr * everything != 0
    # then T becomes [S; G], G = B - A^T S, before all else
    turned = tl.maximum(radial - RADIAL * (everything - radial), lr * lr * radial - TURN) > 0
    if turned:
        m = gram(weight, buffer, grad, -across, momentum, True, not KEEP, False, K, N, KP, W, BC)
    q = coefficients(m, tl.where(turned, 0.0, across), -lr, KP, R, CARRY)
    if turned:
        finish(weight, buffer, grad, q, -across, momentum, moves, True, CARRY, not KEEP, K, N, KP, W, BC)
    else:
        finish(weight, buffer, grad, q, none, momentum, moves, False, CARRY, not KEEP, K, N, KP, W, BC)


@on_its_device
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
    padded, n = max(8, next_power_of_2(k)), w.shape[1]
    tile = TILES["large" if padded == 16 else "wide" if n >= WIDE else "narrow"]
    warps = tile["num_warps"]
    step_kernel[(w.shape[0] // k,)](
        w, b, d, lr, momentum,
        K=k, N=n, KP=padded, CARRY=("official", "project", "transport").index(mode),
        KEEP=mode == "official" and b.dtype == torch.float32,
        W=warps, BC=max(16, min(tile["columns"], next_power_of_2(n)) // warps), num_warps=warps,
    )  # fmt: skip
    for tensor, result in ((weight, w), (buffer, b)):
        if result.data_ptr() != tensor.data_ptr():
            tensor.copy_(result)
