"""Plücker mixing in Triton: kernels that write and differentiate wedges, PyTorch's products between them.

A chunk's wedges stay in the L2 cache between the kernel that writes them and the product that reads them. Pairs are
ordered by cyclic shift: entry q = (s-1) r + i is z_i y_j - z_j y_i with j = (i + s) mod r. That is every pair once, in
contiguous loads; the weight is packed into this order first, with sign -1 where i + s wraps around.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2, on_its_device
from ..rounding import store

SIZES = ["tokens", "length"]
# Bytes of a chunk's wedges, less than a large GPU's cache, and tokens of a chunk at least, for efficient products.
CHUNK_BYTES, CHUNK_ROWS = 1 << 25, 4096
# Tile of the kernel that writes wedges.
WEDGES = {"BM": 4, "BQ": 512, "num_warps": 4}
# Numbers of a program that blends.
BLEND = 2048
# Programs that add up columns, in each block of them.
PARTS = 128


@triton.jit
def load_rows(base, rows, cols, keep, R: tl.constexpr):
    mask = keep[:, None] & (cols < R)[None, :]
    return tl.load(base + rows[:, None] * R + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pair(zt, zs, eps):
    # c = <z_t, z_s>/|z_t|^2, delta = z_s - c z_t, N = |z_t| |delta|
    square = tl.sum(zt * zt, 1)
    ratio = tl.where(square > 0, tl.div_rn(tl.sum(zt * zs, 1), tl.where(square > 0, square, 1.0)), 0.0)
    delta = zs - ratio[:, None] * zt
    rest = tl.sum(delta * delta, 1)
    norm = tl.sqrt_rn(square) * tl.sqrt_rn(rest)
    return square, ratio, delta, rest, norm, tl.div_rn(1.0, tl.maximum(norm, eps))


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


# Tiles of these two have the pairs first: Triton lays the lanes of a gather along the first dimension, and a token's
# numbers lie together.


@triton.jit(do_not_specialize=SIZES)
def wedge_kernel(z, y, out, tokens, R: tl.constexpr, PAIRS: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr):
    # p_q = z_i y_j - z_j y_i
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    i = q % R
    j = (i + q // R + 1) % R
    mask = (q < PAIRS)[:, None] & (rows < tokens)[None, :]
    at = (rows * R)[None, :]
    zi = tl.load(z + at + i[:, None], mask=mask, other=0.0).to(tl.float32)
    zj = tl.load(z + at + j[:, None], mask=mask, other=0.0).to(tl.float32)
    yi = tl.load(y + at + i[:, None], mask=mask, other=0.0)
    yj = tl.load(y + at + j[:, None], mask=mask, other=0.0)
    store(out + (rows * PAIRS)[None, :] + q[:, None], zi * yj - zj * yi, mask=mask)


@triton.jit
def gather(base, rows, index, mask, STRIDE: tl.constexpr):
    return tl.load(base + (rows * STRIDE)[None, :] + index[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def wedge_backward_kernel(
    grad, z, y, dz, dy, tokens, R: tl.constexpr, RP: tl.constexpr, PAIRS: tl.constexpr, BM: tl.constexpr
):
    # dz = D y, dy = -D z, where shift s of dP is the s-th diagonal of the antisymmetric D
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    # 0 … RP - 1, which Triton must not know to be neighbours: it would give a lane several, and a warp several tokens
    i = tl.arange(0, RP) ^ (tokens < 0).to(tl.int32)
    keep = (rows < tokens)[None, :]
    total_z = tl.zeros((RP, BM), tl.float32)
    total_y = tl.zeros((RP, BM), tl.float32)
    for s in range(1, R // 2 + 1):
        ahead = (i + s) % R
        behind = (i + R - s) % R
        first = (s - 1) * R
        here = ((i < R) & (first + i < PAIRS))[:, None] & keep
        there = ((i < R) & (first + behind < PAIRS))[:, None] & keep
        dp = gather(grad + first, rows, i, here, PAIRS)
        rolled = gather(grad + first, rows, behind, there, PAIRS)
        total_z += dp * gather(y, rows, ahead, here, R) - rolled * gather(y, rows, behind, there, R)
        total_y -= dp * gather(z, rows, ahead, here, R) - rolled * gather(z, rows, behind, there, R)
    mask = (i < R)[:, None] & keep
    tl.store(dz + (rows * R)[None, :] + i[:, None], total_z, mask=mask)
    tl.store(dy + (rows * R)[None, :] + i[:, None], total_y, mask=mask)


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


@triton.jit
def unpack_kernel(packed, dweight, dim, R: tl.constexpr, PAIRS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr):
    # dW in the public order
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (q < PAIRS)[:, None] & (n < dim)[None, :]
    w = tl.load(packed + q.to(tl.int64)[:, None] * dim + n[None, :], mask=mask, other=0.0).to(tl.float32)
    column, sign = lexicographic(q, R)
    store(dweight + n[None, :] * PAIRS + column[:, None], w * sign[:, None], mask=mask)


@triton.jit(do_not_specialize=SIZES)
def column_sum_kernel(
    x, partial, tokens, length, dim, FIRST: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    # partial[part] = sum of x_t over the tokens t >= FIRST of every PARTS-th block
    part = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for start in range(part * BM, tokens, PARTS * BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        keep = rows < tokens
        if FIRST:
            keep = keep & (rows % length >= FIRST)
        mask = keep[:, None] & (n < dim)[None, :]
        total += tl.sum(tl.load(x + rows[:, None] * dim + n[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(partial + part * dim + n, total, mask=n < dim)


@triton.jit
def add_parts_kernel(partial, out, dim, PARTS: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (n < dim)[None, :]
    parts = tl.load(partial + tl.arange(0, PARTS)[:, None] * dim + n[None, :], mask=mask, other=0.0)
    tl.store(out + n, tl.sum(parts, 0), mask=n < dim)


def rows_block(rank: int) -> dict[str, int]:
    """Tile of the kernels that hold whole rows of z: so small that the unrolled offsets stay in registers."""
    padded = max(next_power_of_2(rank), 16)
    return {"R": rank, "RP": padded, "BM": max(16, 1024 // padded)}


def pack(weight: Tensor, rank: int) -> Tensor:
    """(pairs, d) in the cyclic order."""
    dim, pairs = weight.shape
    packed = weight.new_empty(pairs, dim)
    grid = (cdiv(pairs, 32), cdiv(dim, 128))
    pack_kernel[grid](weight, packed, dim, R=rank, PAIRS=pairs, BQ=32, BN=128)
    return packed


def unpack(packed: Tensor, weight: Tensor, rank: int) -> Tensor:
    """The gradient of `weight` from that of the packed one."""
    (dim, pairs), found = weight.shape, torch.empty_like(weight)
    grid = (cdiv(pairs, 32), cdiv(dim, 128))
    unpack_kernel[grid](packed, found, dim, R=rank, PAIRS=pairs, BQ=32, BN=128)
    return found


def average(z: Tensor, offsets: tuple[int, ...], eps: float) -> Tensor:
    y = torch.empty_like(z, dtype=torch.float32)
    tokens, block = z.shape[0] * z.shape[1], rows_block(z.shape[-1])
    average_kernel[(cdiv(tokens, block["BM"]),)](z, y, tokens, z.shape[1], eps, OFFSETS=offsets, **block)
    return y


def chunks(tokens: int, weight: Tensor) -> Iterator[slice]:
    step = max(CHUNK_ROWS, CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def wedges(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """(rows, pairs) in the weight's dtype for rows z and y."""
    tokens, rank = z.shape
    pairs = weight.shape[1]
    out = weight.new_empty(tokens, pairs)
    grid = (cdiv(tokens, WEDGES["BM"]), cdiv(pairs, WEDGES["BQ"]))
    wedge_kernel[grid](z, y, out, tokens, R=rank, PAIRS=pairs, **WEDGES)
    return out


@on_its_device
def column_sum(x: Tensor, length: int = 1, first: int = 0) -> Tensor:
    """Sum of the rows of x (tokens, d) that stand at `first` or later in their text, in float32."""
    tokens, dim = x.shape
    partial, out = (x.new_empty(*shape, dim, dtype=torch.float32) for shape in ((PARTS,), ()))
    column_sum_kernel[(PARTS, cdiv(dim, 128))](x, partial, tokens, length, dim, FIRST=first, PARTS=PARTS, BM=32, BN=128)
    add_parts_kernel[(cdiv(dim, 16),)](partial, out, dim, PARTS=PARTS, BN=16)
    return out


@on_its_device
def plucker_mix(
    z: Tensor, weight: Tensor, bias: Tensor | None, offsets: Sequence[int], eps: float, context: int = 0
) -> Tensor:
    batch, length, rank = z.shape
    out = weight.new_empty(batch, length - context, weight.shape[0])
    if out.numel() == 0:
        return out
    z, weight = z.contiguous(), weight.contiguous()
    y, packed = average(z, tuple(offsets), eps), pack(weight, rank)
    rows, y, flat = (t.contiguous().flatten(0, 1) for t in (z[:, context:], y[:, context:], out))
    for chunk in chunks(len(rows), weight):
        p = wedges(rows[chunk], y[chunk], weight)
        if bias is None:
            torch.mm(p, packed, out=flat[chunk])
        else:
            torch.addmm(bias, p, packed, out=flat[chunk])
    if bias is not None:
        out[:, : max(min(offsets) - context, 0)] = 0
    return out


@on_its_device
def plucker_mix_backward(
    grad: Tensor, z: Tensor, weight: Tensor, offsets: Sequence[int], eps: float, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad.numel() == 0:
        return torch.zeros_like(z), torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    grad, z, weight = grad.contiguous(), z.contiguous(), weight.contiguous()
    flat = grad.flatten(0, 1)
    dz, dweight = products_backward(flat, z, weight, tuple(offsets), eps, mask) if mask[0] or mask[1] else (None, None)
    dbias = column_sum(flat, z.shape[1], min(offsets)).to(weight.dtype) if mask[2] else None
    return dz, dweight, dbias


def products_backward(
    grad: Tensor, z: Tensor, weight: Tensor, offsets: tuple[int, ...], eps: float, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    tokens, pairs, (_, length, rank) = len(grad), weight.shape[1], z.shape
    block = rows_block(rank)
    y, packed, rows = average(z, offsets, eps).flatten(0, 1), pack(weight, rank), z.flatten(0, 1)
    direct, dy, total = torch.empty_like(y), torch.empty_like(y), None
    block["BM"] = max(8, block["BM"] // 2)
    for chunk in chunks(tokens, weight):
        g = grad[chunk]
        if mask[1]:
            part = wedges(rows[chunk], y[chunk], weight).T @ g
            # More than one part is added up in float32.
            total = part if total is None else total.float().add_(part)
        if mask[0]:
            dp = g @ packed.T
            wedge_backward_kernel[(cdiv(len(g), block["BM"]),)](
                dp, rows[chunk], y[chunk], direct[chunk], dy[chunk], len(g), PAIRS=pairs, **block
            )
    dz = None
    if mask[0]:
        dz = torch.empty_like(z)
        average_backward_kernel[(cdiv(tokens, block["BM"]),)](
            z, dy, direct, dz, tokens, length, eps, OFFSETS=offsets, **block
        )
    return dz, None if total is None else unpack(total, weight, rank)


@triton.jit
def blend_tile(tokens, dim, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    return n, rows[:, None] * dim + n[None, :], (rows < tokens)[:, None] & (n < dim)[None, :]


@triton.jit(do_not_specialize=SIZES)
def blend_kernel(x, g, logit, bias, out, alpha, tokens, dim, BM: tl.constexpr, BN: tl.constexpr):
    # alpha = sigmoid(logit + b), out = g + alpha (x - g)
    n, at, mask = blend_tile(tokens, dim, BM, BN)
    b = tl.load(bias + n, mask=n < dim, other=0.0).to(tl.float32)
    a = tl.sigmoid(tl.load(logit + at, mask=mask, other=0.0).to(tl.float32) + b[None, :])
    xv = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gv = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(alpha + at, a, mask=mask)
    tl.store(out + at, gv + a * (xv - gv), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def blend_backward_kernel(grad, x, g, alpha, dx, dg, dlogit, tokens, dim, BM: tl.constexpr, BN: tl.constexpr):
    # dx = alpha dout, dg = (1 - alpha) dout, dlogit = dout (x - g) alpha (1 - alpha)
    _, at, mask = blend_tile(tokens, dim, BM, BN)
    d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(alpha + at, mask=mask, other=0.0).to(tl.float32)
    xv = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gv = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    through = a * d
    tl.store(dx + at, through, mask=mask)
    tl.store(dg + at, d - through, mask=mask)
    tl.store(dlogit + at, through * (1 - a) * (xv - gv), mask=mask)


def blend_block(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile: BLEND numbers of at most 256 columns."""
    width = min(256, next_power_of_2(x.shape[1]))
    block = {"BM": BLEND // width, "BN": width}
    return (cdiv(x.shape[0], block["BM"]), cdiv(x.shape[1], width)), block


@on_its_device
def gated_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dim = weight.shape[0]
    logit = (x.to(g.dtype) @ weight[:, :dim].T).addmm_(g, weight[:, dim:].T)
    out, alpha = torch.empty_like(x), torch.empty_like(g)
    if x.numel():
        grid, block = blend_block(x)
        blend_kernel[grid](x, g, logit, bias, out, alpha, len(x), dim, **block)
    return out, alpha


@on_its_device
def gated_blend_backward(
    grad: Tensor, x: Tensor, g: Tensor, weight: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dg, dlogit = torch.empty_like(x), torch.empty_like(g), torch.empty_like(g)
    if x.numel():
        grid, block = blend_block(x)
        blend_backward_kernel[grid](grad, x, g, alpha, dx, dg, dlogit, len(x), x.shape[1], **block)
    from_x, from_g = weight.chunk(2, dim=1)
    dx = dx.addmm_(dlogit, from_x) if dx.dtype == dlogit.dtype else dx + dlogit @ from_x
    return dx, dg.addmm_(dlogit, from_g), dlogit
