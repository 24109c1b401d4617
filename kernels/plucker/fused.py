"""Plücker mixing in Triton: the projection as an implicit GEMM whose left operand, the wedge, is built in registers.

Pairs are ordered by cyclic shift: entry q = (s-1) r + i is z_i y_j - z_j y_i with j = (i + s) mod r. That is every pair
once, in contiguous loads; the weight is packed into this order first, with sign -1 where i + s wraps around.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch

SIZES = ["tokens", "length"]
# Programs wanted in flight for the weight gradient: two for each multiprocessor of the largest chips.
PROGRAMS = 264
# Tiles of the matrix products, for float32 operands and for half ones.
PROJECT = {
    True: {"BM": 64, "BN": 64, "BQ": 32, "num_warps": 4},
    False: {"BM": 128, "BN": 128, "BQ": 32, "num_warps": 8},
}
INPUT_GRADIENT = {True: {"BM": 64, "BN": 64, "num_warps": 4}, False: {"BM": 64, "BN": 64, "num_warps": 4}}
WEIGHT_GRADIENT = {
    True: {"BQ": 64, "BN": 64, "BM": 32, "num_warps": 4},
    False: {"BQ": 64, "BN": 64, "BM": 32, "num_warps": 4},
}


@triton.jit
def load_rows(base, rows, cols, keep, R: tl.constexpr):
    mask = keep[:, None] & (cols < R)[None, :]
    return tl.load(base + rows[:, None] * R + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pair(zt, zs, eps):
    # c = <z_t, z_s>/|z_t|^2, delta = z_s - c z_t, N = |z_t| |delta|
    square = tl.sum(zt * zt, 1)
    ratio = tl.where(square > 0, tl.sum(zt * zs, 1) / tl.where(square > 0, square, 1.0), 0.0)
    delta = zs - ratio[:, None] * zt
    rest = tl.sum(delta * delta, 1)
    norm = tl.sqrt(square) * tl.sqrt(rest)
    return square, ratio, delta, rest, norm, 1.0 / tl.maximum(norm, eps)


@triton.jit
def count_valid(t, OFFSETS: tl.constexpr):
    count = tl.zeros_like(t)
    for k in tl.static_range(len(OFFSETS)):
        count += (t >= OFFSETS[k]).to(t.dtype)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def lexicographic(q, R: tl.constexpr):
    # where pair q of the cyclic order stands in the public weight, and with which sign
    i = q % R
    j = (i + q // R + 1) % R
    low = tl.minimum(i, j)
    high = tl.maximum(i, j)
    return low * (2 * R - low - 1) // 2 + high - low - 1, tl.where(i < j, 1.0, -1.0)


@triton.jit(do_not_specialize=SIZES)
def average_kernel(
    z, y, tokens, length, eps, OFFSETS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr
):
    # y_t = 1/n_t sum_o delta_o / max(N_o, eps)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.arange(0, RP)
    keep = rows < tokens
    t = rows % length
    zt = load_rows(z, rows, cols, keep, R)
    total = tl.zeros((BM, RP), tl.float32)
    for k in tl.static_range(len(OFFSETS)):
        valid = keep & (t >= OFFSETS[k])
        zs = load_rows(z, rows - OFFSETS[k], cols, valid, R)
        _, _, delta, _, _, inverse = pair(zt, zs, eps)
        total += tl.where(valid, inverse, 0.0)[:, None] * delta
    total /= count_valid(t, OFFSETS)[:, None]
    tl.store(y + rows[:, None] * R + cols[None, :], total, mask=keep[:, None] & (cols < R)[None, :])


@triton.jit
def pack_kernel(weight, packed, dim, R: tl.constexpr, PAIRS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr):
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    column, sign = lexicographic(q, R)
    mask = (q < PAIRS)[:, None] & (n < dim)[None, :]
    w = tl.load(weight + n[None, :] * PAIRS + column[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(packed + q.to(tl.int64)[:, None] * dim + n[None, :], w * sign[:, None], mask=mask)


@triton.jit
def wedge_tile(z, y, rows, q, keep, R: tl.constexpr, PAIRS: tl.constexpr):
    i = q % R
    j = (i + q // R + 1) % R
    mask = keep[:, None] & (q < PAIRS)[None, :]
    at = rows[:, None] * R
    zi = tl.load(z + at + i[None, :], mask=mask, other=0.0).to(tl.float32)
    zj = tl.load(z + at + j[None, :], mask=mask, other=0.0).to(tl.float32)
    yi = tl.load(y + at + i[None, :], mask=mask, other=0.0)
    yj = tl.load(y + at + j[None, :], mask=mask, other=0.0)
    return zi * yj - zj * yi


@triton.jit
def matmul(a, b, acc, DTYPE: tl.constexpr):
    # float32 stays float32 on the chip: no TF32
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def project_kernel(
    z, y, packed, bias, out, tokens, length, dim,
    FIRST: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    # g = P W + b, P rebuilt tile by tile
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    keep = rows < tokens
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, PAIRS, BQ):
        q = start + tl.arange(0, BQ)
        p = wedge_tile(z, y, rows, q, keep, R, PAIRS)
        mask = (q < PAIRS)[:, None] & (n < dim)[None, :]
        w = tl.load(packed + q[:, None] * dim + n[None, :], mask=mask, other=0.0)
        acc = matmul(p, w, acc, DTYPE)
    if HAS_BIAS:
        b = tl.load(bias + n, mask=n < dim, other=0.0).to(tl.float32)
        acc += tl.where((rows % length >= FIRST)[:, None], b[None, :], 0.0)
    tl.store(out + rows[:, None] * dim + n[None, :], acc, mask=keep[:, None] & (n < dim)[None, :])


@triton.jit(do_not_specialize=SIZES)
def wedge_backward_kernel(
    grad, z, y, packed, dz, dy, tokens, length, dim,
    R: tl.constexpr, RP: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # dz = D y, dy = -D z, where shift s of dP = G W^T is the s-th diagonal of the antisymmetric D
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i = tl.arange(0, RP)
    keep = rows < tokens
    total_z = tl.zeros((BM, RP), tl.float32)
    total_y = tl.zeros((BM, RP), tl.float32)
    for s in range(1, R // 2 + 1):
        q = (s - 1) * R + i
        live = (i < R) & (q < PAIRS)
        dp = tl.zeros((BM, RP), tl.float32)
        for start in range(0, dim, BN):
            n = start + tl.arange(0, BN)
            g = tl.load(grad + rows[:, None] * dim + n[None, :], mask=keep[:, None] & (n < dim)[None, :], other=0.0)
            w = tl.load(packed + q[None, :] * dim + n[:, None], mask=live[None, :] & (n < dim)[:, None], other=0.0)
            dp = matmul(g, w, dp, DTYPE)
        ahead = tl.where(i < R, (i + s) % R, RP)
        behind = (i + R - s) % R
        rolled = tl.gather(dp, tl.broadcast_to(behind[None, :], (BM, RP)), 1)
        back = tl.where(i < R, behind, RP)
        total_z += dp * load_rows(y, rows, ahead, keep, R) - rolled * load_rows(y, rows, back, keep, R)
        total_y -= dp * load_rows(z, rows, ahead, keep, R) - rolled * load_rows(z, rows, back, keep, R)
    mask = keep[:, None] & (i < R)[None, :]
    tl.store(dz + rows[:, None] * R + i[None, :], total_z, mask=mask)
    tl.store(dy + rows[:, None] * R + i[None, :], total_y, mask=mask)


@triton.jit
def slope(delta, h, norm, inverse, valid, eps):
    # kappa = -<h, delta> / (N max(N, eps)^2), 0 where the norm is clamped or there is no pair
    live = valid & (norm > eps)
    return tl.where(live, -inverse * inverse * tl.sum(h * delta, 1) / tl.where(live, norm, 1.0), 0.0)


@triton.jit(do_not_specialize=SIZES)
def average_backward_kernel(
    z, dy, direct, dz, tokens, length, eps,
    OFFSETS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # h = dy_t/n_t; as target: dz_t += kappa (|delta|^2 z_t - <t,s> delta) - sigma c h
    #               as source: dz_s += sigma h + kappa |z_t|^2 delta, gathered from t = s + offset
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.arange(0, RP)
    keep = rows < tokens
    t = rows % length
    here = load_rows(z, rows, cols, keep, R)
    share = load_rows(dy, rows, cols, keep, R) / count_valid(t, OFFSETS)[:, None]
    total = load_rows(direct, rows, cols, keep, R)
    for k in tl.static_range(len(OFFSETS)):
        valid = keep & (t >= OFFSETS[k])
        zs = load_rows(z, rows - OFFSETS[k], cols, valid, R)
        square, ratio, delta, rest, norm, inverse = pair(here, zs, eps)
        kappa = slope(delta, share, norm, inverse, valid, eps)
        change = rest[:, None] * here - (ratio * square)[:, None] * delta
        total += kappa[:, None] * change - tl.where(valid, inverse * ratio, 0.0)[:, None] * share

        valid = keep & (t + OFFSETS[k] < length)
        zt = load_rows(z, rows + OFFSETS[k], cols, valid, R)
        h = load_rows(dy, rows + OFFSETS[k], cols, valid, R) / count_valid(t + OFFSETS[k], OFFSETS)[:, None]
        square, ratio, delta, rest, norm, inverse = pair(zt, here, eps)
        kappa = slope(delta, h, norm, inverse, valid, eps)
        total += tl.where(valid, inverse, 0.0)[:, None] * h + (kappa * square)[:, None] * delta
    tl.store(dz + rows[:, None] * R + cols[None, :], total, mask=keep[:, None] & (cols < R)[None, :])


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    grad, z, y, partial, tokens, length, dim,
    SPLITS: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # partial[split] = P^T G over every SPLITS-th block of tokens
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    acc = tl.zeros((BQ, BN), tl.float32)
    for start in range(split * BM, tokens, SPLITS * BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        keep = rows < tokens
        p = wedge_tile(z, y, rows, q, keep, R, PAIRS)
        g = tl.load(grad + rows[:, None] * dim + n[None, :], mask=keep[:, None] & (n < dim)[None, :], other=0.0)
        acc = matmul(tl.trans(p), g, acc, DTYPE)
    at = (split.to(tl.int64) * PAIRS + q[:, None]) * dim + n[None, :]
    tl.store(partial + at, acc, mask=(q < PAIRS)[:, None] & (n < dim)[None, :])


@triton.jit
def reduce_kernel(
    partial,
    dweight,
    dim,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
):
    # dW in the public order: the splits added in a fixed order, the columns put back
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (q < PAIRS)[:, None] & (n < dim)[None, :]
    total = tl.zeros((BQ, BN), tl.float32)
    for split in range(SPLITS):
        at = (split * PAIRS + q.to(tl.int64)[:, None]) * dim + n[None, :]
        total += tl.load(partial + at, mask=mask, other=0.0)
    column, sign = lexicographic(q, R)
    tl.store(dweight + n[None, :] * PAIRS + column[:, None], total * sign[:, None], mask=mask)


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype of matrix operands: the weight's, but float32 in the interpreter, whose half-precision dot is wrong."""
    if dispatch.interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def rows_block(rank: int) -> dict[str, int]:
    """Tile of the kernels that hold whole rows of z: so small that the unrolled offsets stay in registers."""
    padded = max(triton.next_power_of_2(rank), 16)
    return {"R": rank, "RP": padded, "BM": max(16, 1024 // padded)}


def pack(weight: Tensor, rank: int) -> Tensor:
    dim, pairs = weight.shape
    packed = weight.new_empty(pairs, dim)
    grid = (triton.cdiv(pairs, 32), triton.cdiv(dim, 128))
    pack_kernel[grid](weight, packed, dim, R=rank, PAIRS=pairs, BQ=32, BN=128)
    return packed


def average(z: Tensor, offsets: tuple[int, ...], eps: float) -> Tensor:
    y = torch.empty_like(z, dtype=torch.float32)
    tokens, block = z.shape[0] * z.shape[1], rows_block(z.shape[-1])
    average_kernel[(triton.cdiv(tokens, block["BM"]),)](z, y, tokens, z.shape[1], eps, OFFSETS=offsets, **block)
    return y


def plucker_mix(z: Tensor, weight: Tensor, bias: Tensor | None, offsets: Sequence[int], eps: float) -> Tensor:
    batch, length, rank = z.shape
    dim, pairs = weight.shape
    out = weight.new_empty(batch, length, dim)
    if out.numel() == 0:
        return out
    z, weight = z.contiguous(), weight.contiguous()
    y = average(z, tuple(offsets), eps)
    tile = PROJECT[weight.dtype == torch.float32]
    grid = (triton.cdiv(batch * length, tile["BM"]), triton.cdiv(dim, tile["BN"]))
    project_kernel[grid](
        z, y, pack(weight, rank), weight if bias is None else bias.contiguous(), out, batch * length, length, dim,
        FIRST=min(offsets), R=rank, PAIRS=pairs, HAS_BIAS=bias is not None, DTYPE=operand(weight.dtype),
        **tile,
    )  # fmt: skip
    return out


def input_gradient(grad: Tensor, z: Tensor, y: Tensor, weight: Tensor, offsets: tuple[int, ...], eps: float) -> Tensor:
    batch, length, rank = z.shape
    direct, dy, dz = torch.empty_like(y), torch.empty_like(y), torch.empty_like(z)
    tokens, block = batch * length, rows_block(rank)
    tile = block | INPUT_GRADIENT[weight.dtype == torch.float32]
    wedge_backward_kernel[(triton.cdiv(tokens, tile["BM"]),)](
        grad, z, y, pack(weight, rank), direct, dy, tokens, length, weight.shape[0],
        PAIRS=weight.shape[1], DTYPE=operand(weight.dtype), **tile,
    )  # fmt: skip
    average_backward_kernel[(triton.cdiv(tokens, block["BM"]),)](
        z, dy, direct, dz, tokens, length, eps, OFFSETS=offsets, **block
    )
    return dz


def weight_gradient(grad: Tensor, z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    (dim, pairs), tokens, rank = weight.shape, z.shape[0] * z.shape[1], z.shape[-1]
    tile = WEIGHT_GRADIENT[weight.dtype == torch.float32]
    grid = (triton.cdiv(pairs, tile["BQ"]), triton.cdiv(dim, tile["BN"]))
    splits = max(1, min(PROGRAMS // (grid[0] * grid[1]), triton.cdiv(tokens, 512)))
    partial = y.new_empty(splits, pairs, dim)
    shape = {"SPLITS": splits, "R": rank, "PAIRS": pairs}
    weight_gradient_kernel[(*grid, splits)](
        grad, z, y, partial, tokens, z.shape[1], dim, DTYPE=operand(weight.dtype), **tile, **shape
    )
    dweight = torch.empty_like(weight)
    reduce_kernel[(triton.cdiv(pairs, 32), triton.cdiv(dim, 128))](partial, dweight, dim, BQ=32, BN=128, **shape)
    return dweight


def plucker_mix_backward(
    grad: Tensor, z: Tensor, weight: Tensor, offsets: Sequence[int], eps: float, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad.numel() == 0:
        return torch.zeros_like(z), torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    grad, z, weight = grad.contiguous(), z.contiguous(), weight.contiguous()
    dz = dweight = dbias = None
    if mask[0] or mask[1]:
        y = average(z, tuple(offsets), eps)
        dz = input_gradient(grad, z, y, weight, tuple(offsets), eps) if mask[0] else None
        dweight = weight_gradient(grad, z, y, weight) if mask[1] else None
    if mask[2]:
        dbias = grad[:, min(offsets) :].sum((0, 1), dtype=torch.float32).to(weight.dtype)
    return dz, dweight, dbias


@triton.jit
def blend_kernel(x, g, logit, bias, out, alpha, total, dim, BLOCK: tl.constexpr):
    # alpha = sigmoid(logit + b), out = g + alpha (x - g)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < total
    b = tl.load(bias + at % dim, mask=keep, other=0.0).to(tl.float32)
    a = tl.sigmoid(tl.load(logit + at, mask=keep, other=0.0).to(tl.float32) + b)
    xv = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    gv = tl.load(g + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(alpha + at, a, mask=keep)
    tl.store(out + at, gv + a * (xv - gv), mask=keep)


@triton.jit
def blend_backward_kernel(grad, x, g, alpha, dx, dg, dlogit, total, BLOCK: tl.constexpr):
    # dx = alpha dout, dg = (1 - alpha) dout, dlogit = dout (x - g) alpha (1 - alpha)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < total
    d = tl.load(grad + at, mask=keep, other=0.0).to(tl.float32)
    a = tl.load(alpha + at, mask=keep, other=0.0).to(tl.float32)
    xv = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    gv = tl.load(g + at, mask=keep, other=0.0).to(tl.float32)
    through = a * d
    tl.store(dx + at, through, mask=keep)
    tl.store(dg + at, d - through, mask=keep)
    tl.store(dlogit + at, through * (1 - a) * (xv - gv), mask=keep)


def gated_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dim, rows = weight.shape[0], g.view(-1, weight.shape[0])
    logit = x.view(-1, dim).to(g.dtype) @ weight[:, :dim].T
    logit = torch.addmm(logit, rows, weight[:, dim:].T)
    out, alpha = torch.empty_like(x), torch.empty_like(g)
    if x.numel():
        blend_kernel[(triton.cdiv(x.numel(), 1024),)](x, g, logit, bias, out, alpha, x.numel(), dim, BLOCK=1024)
    return out, alpha


def gated_blend_backward(
    grad: Tensor, x: Tensor, g: Tensor, weight: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dg, dlogit = torch.empty_like(x), torch.empty_like(g), torch.empty_like(g)
    if x.numel():
        grid = (triton.cdiv(x.numel(), 1024),)
        blend_backward_kernel[grid](grad, x, g, alpha, dx, dg, dlogit, x.numel(), BLOCK=1024)
    from_x, from_g = weight.chunk(2, dim=1)
    return dx + dlogit @ from_x, torch.addmm(dg, dlogit, from_g), dlogit
