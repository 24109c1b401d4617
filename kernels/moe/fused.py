"""Grouped experts in Triton: one kernel for every product over sorted rows, and kernels over the rows between products.

Row r of the sorted order belongs to pair order[r] of token order[r] // K and to the expert e with offsets[e] <= r <
offsets[e+1]. The grid is sized for the worst case on the host; a program finds its expert and its rows in `offsets`,
and leaves if there are none, so that the host never waits for the device.

Activations are kernels of their own: behind a product they would run while the tensor cores wait, out of registers, and
take longer than reading the rows again.
"""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..launch import cdiv, next_power_of_2, on_its_device
from ..rounding import DTYPES, store
from .fused_route import route, route_backward

__all__ = ["moe_ffn", "moe_ffn_backward", "route", "route_backward"]

OUTPUT_SALT = tl.constexpr(0x9E3779B9)


@triton.jit
def hashed(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout(pairs, cols, seed, threshold, scale, SALT: tl.constexpr):
    # 1 / (1 - rate) where the hash of (seed, pair, column) reaches rate 2^32, else 0
    salt = tl.full((1,), SALT, tl.int64)
    start = ((tl.load(seed) ^ salt) & 0xFFFFFFFF).to(tl.uint32)
    row = hashed(pairs.to(tl.uint32) ^ hashed(start))
    bits = hashed(row ^ cols.to(tl.uint32)).to(tl.int64)
    return tl.where(bits >= threshold, scale, 0.0)


@triton.jit
def gelu_gate(x):
    return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def gelu_parts(x):
    # gate(x) and gelu'(x). With e = exp(-|z|), sigmoid(|z|) = 1 / (1 + e) and sigmoid(-|z|) = e / (1 + e): 1 - gate
    # would cancel.
    square = x * x
    e = tl.exp(-tl.abs(1.5957691216057308 * x * (1.0 + 0.044715 * square)))
    large = 1.0 / (1.0 + e)
    small = e * large
    gate = tl.where(x < 0, small, large)
    return gate, gate + x * (small * large) * (1.5957691216057308 * (1.0 + 0.134145 * square))


@triton.jit
def matmul(a, b, acc, DTYPE: tl.constexpr):
    # float32 stays float32 on the chip: no TF32
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision="ieee")


@triton.jit
def find_rows(offsets, program, E: tl.constexpr, BM: tl.constexpr):
    # the expert of this block of rows, its first row and the end of the expert's rows; expert -1 if there is none
    expert, first, stop, before = -1, tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for e in range(E):
        begin = tl.load(offsets + e)
        end = tl.load(offsets + e + 1)
        blocks = (end - begin + BM - 1) // BM
        here = (program >= before) & (program < before + blocks)
        expert = tl.where(here, e, expert)
        first = tl.where(here, begin + (program - before) * BM, first)
        stop = tl.where(here, end, stop)
        before += blocks
    return expert, first, stop


@triton.jit
def grouped_kernel(
    a, weight, bias, out, order, offsets, inner, width,
    TOP_K: tl.constexpr, E: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # out = A W^T + b (A W if TRANSPOSED) for the rows of one expert; GATHER reads A by token
    # Programs that follow each other share their rows: those stay in the cache, and so does one expert's weight. One
    # axis, as the others end at 65,535 programs.
    blocks = tl.cdiv(width, BN)
    expert, first, stop = find_rows(offsets, tl.program_id(0) // blocks, E, BM)
    if expert < 0:
        return
    rows = first + tl.arange(0, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    keep = rows < stop
    source = rows
    if GATHER:
        source = tl.load(order + rows, mask=keep, other=0) // TOP_K
    left = (a + source * inner)[:, None]
    base = weight + expert.to(tl.int64) * inner * width
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(left + k[None, :], mask=keep[:, None] & (k < inner)[None, :], other=0.0)
        at = k[:, None] * width + n[None, :] if TRANSPOSED else n[None, :] * inner + k[:, None]
        w = tl.load(base + at, mask=(k < inner)[:, None] & (n < width)[None, :], other=0.0)
        acc = matmul(x, w, acc, DTYPE)
    if BIAS:
        acc += tl.load(bias + expert * width + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    store((out + rows * width)[:, None] + n[None, :], acc, mask=keep[:, None] & (n < width)[None, :])


@triton.jit
def activate_kernel(h, active, order, seed, threshold, scale, width, DROP: tl.constexpr, BN: tl.constexpr):
    # a = drop(gelu(h)), a row a program; `active` may be h
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    if pair < 0:
        return
    for start in range(0, width, BN):
        n = start + tl.arange(0, BN)
        v = tl.load(h + row * width + n, mask=n < width, other=0.0).to(tl.float32)
        v *= gelu_gate(v)
        if DROP:
            v *= dropout(pair, n, seed, threshold, scale, 0)
        store(active + row * width + n, v, mask=n < width)


@triton.jit
def slope_kernel(
    d, h, active, gates, start_gate, dgates, order, seed, threshold, scale, width,
    GELU: tl.constexpr, DROP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # a = drop(gelu(h)): a g (to `active`), dh = g drop gelu'(h) d (in place of d), dgates[pair] += <d, a> unless GELU
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    if pair < 0:
        return
    gate = tl.load(gates + pair)
    before = tl.load(start_gate + pair)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, width, BN):
        n = start + tl.arange(0, BN)
        at = row * width + n
        x = tl.load(h + at, mask=n < width, other=0.0).to(tl.float32)
        v = tl.load(d + at, mask=n < width, other=0.0).to(tl.float32)
        half, slope = gelu_parts(x)
        value = x * half
        if DROP:
            factor = dropout(pair, n, seed, threshold, scale, 0)
            value *= factor
            slope *= factor
        if not GELU:
            total += v * value
        store(active + at, value * gate, mask=n < width)
        store(d + at, v * gate * slope, mask=n < width)
    tl.store(dgates + pair, before + tl.sum(total, 0))


@triton.jit
def output_backward_kernel(
    grad, o, bias, order, offsets, seed, threshold, scale, g, dgate, width,
    TOP_K: tl.constexpr, E: tl.constexpr, GELU: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # G = dy_t drop act'(o); d gate gets <dy drop, act(o)> with an activation, <G, b> without
    expert, first, stop = find_rows(offsets, tl.program_id(0), E, BM)
    if expert < 0:
        return
    rows = first + tl.arange(0, BM)
    keep = rows < stop
    pair = tl.load(order + rows, mask=keep, other=0)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BN):
        n = start + tl.arange(0, BN)
        mask = keep[:, None] & (n < width)[None, :]
        v = tl.load((grad + pair // TOP_K * width)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if DROP:
            v *= dropout(pair[:, None], n[None, :], seed, threshold, scale, OUTPUT_SALT)
        if GELU:
            pre = tl.load((o + rows * width)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
            half, slope = gelu_parts(pre)
            total += v * pre * half
            v *= slope
        else:
            b = tl.load(bias + expert * width + n, mask=n < width, other=0.0).to(tl.float32)
            total += v * b[None, :]
        store((g + rows * width)[:, None] + n[None, :], v, mask=mask)
    store(dgate + pair, tl.sum(total, 1), mask=keep)


@triton.jit
def weight_gradient_kernel(
    left, right, order, offsets, total, m_size, n_size,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, ACCUMULATE: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # total[e] = (total[e] +) left_e^T right_e, over the rows of expert e; GATHER reads `right` by token
    expert = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    pair = tl.zeros((BK,), tl.int64)
    if GATHER:
        pair = tl.load(order + begin + tl.arange(0, BK), mask=begin + tl.arange(0, BK) < end, other=0)
    for start in range(begin, end, BK):
        rows = start + tl.arange(0, BK)
        keep = rows < end
        source = rows
        if GATHER:
            # one step ahead, so that the rows themselves are loaded as early as those of `left`
            source = pair // TOP_K
            pair = tl.load(order + rows + BK, mask=rows + BK < end, other=0)
        x = tl.load((left + rows * m_size)[None, :] + m[:, None], mask=keep[None, :] & (m < m_size)[:, None], other=0.0)
        inside = keep[:, None] & (n < n_size)[None, :]
        y = tl.load((right + source * n_size)[:, None] + n[None, :], mask=inside, other=0.0)
        acc = matmul(x, y, acc, DTYPE)
    at = (total + (expert.to(tl.int64) * m_size + m) * n_size)[:, None] + n[None, :]
    mask = (m < m_size)[:, None] & (n < n_size)[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    store(at, acc, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def bias_gradient_kernel(
    x, gates, order, offsets, out, width, splits, E: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    # out[split, e] = the sum over the split-th part of the rows of expert e
    expert, split = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    part = tl.cdiv(tl.cdiv(end - begin, splits), BM) * BM
    begin += split * part
    end = tl.minimum(end, begin + part)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        keep = rows < end
        v = tl.load((x + rows * width)[:, None] + n[None, :], mask=keep[:, None] & (n < width)[None, :], other=0.0)
        v = v.to(tl.float32)
        if GATED:
            pair = tl.load(order + rows, mask=keep, other=0)
            v *= tl.load(gates + pair, mask=keep, other=0.0)[:, None]
        total += v
    store(out + (split * E + expert) * width + n, tl.sum(total, 0), mask=n < width)


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    rows, gates, slots, seed, threshold, scale, out, tokens, width,
    TOP_K: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, DROP: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    # out_t = sum_k g_tk drop(act(rows[slot_tk])) over the kept pairs
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    live = t < tokens
    total = tl.zeros((BT, BN), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = t * TOP_K + k
        slot = tl.load(slots + pair, mask=live, other=-1)
        kept = slot >= 0
        mask = kept[:, None] & (n < width)[None, :]
        v = tl.load((rows + slot * width)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if GELU:
            v *= gelu_gate(v)
        if DROP:
            v *= dropout(pair[:, None], n[None, :], seed, threshold, scale, OUTPUT_SALT)
        if GATED:
            v *= tl.load(gates + pair, mask=kept, other=0.0)[:, None]
        total += v
    store((out + t * width)[:, None] + n[None, :], total, mask=live[:, None] & (n < width)[None, :])


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype of matrix operands: that of x, but float32 in the interpreter, whose half-precision dot is wrong."""
    if dispatch.interpreted():
        return tl.float32
    return DTYPES[dtype]


def tile(rows: int, cols: int, depth: int, warps: int, **options: int) -> dict[str, int]:
    return {"BM": rows, "BN": cols, "BK": depth, "num_warps": warps, **options}


# Tiles of the products from large to small, for float32 operands and for half ones. Without num_stages, three stages on
# NVIDIA and two on AMD, whose shared memory is smaller.
GROUPED = {
    True: [tile(64, 64, 32, 4), tile(32, 32, 32, 4)],
    False: [
        tile(128, 256, 64, 8),
        tile(128, 128, 64, 8),
        tile(128, 64, 64, 4),
        tile(64, 64, 64, 4),
        tile(32, 64, 128, 4),
        tile(32, 32, 128, 4, num_stages=4),
    ],
}
WEIGHT_GRADIENT = {True: tile(64, 64, 16, 4), False: tile(128, 128, 64, 4)}
# The kernels with a row a program.
ROW = {"BN": 1024, "num_warps": 4}
# Programs that fill a GPU, two a multiprocessor.
FULL = 256


def choose(tiles: list[dict[str, int]], pairs: int, experts: int, width: int) -> dict[str, int]:
    """The first tile that an expert's rows fill by half and that gives a full GPU's programs, else the last."""
    rows = cdiv(pairs, experts)
    for size in tiles:
        programs = experts * cdiv(rows, size["BM"]) * cdiv(width, size["BN"])
        if size["BM"] <= 2 * rows and programs >= FULL:
            return size
    return tiles[-1]


def noise(seed: Tensor | None, order: Tensor, rate: float) -> dict:
    """The arguments of `dropout`; without a seed, placeholders."""
    return {"seed": order if seed is None else seed, "threshold": int(rate * 2**32), "scale": 1 / (1 - rate)}


def grouped(
    a: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, offsets: Tensor, top_k: int, out: Tensor, *,
    gather: bool = False, transposed: bool = False,
) -> None:  # fmt: skip
    experts, (pairs, width), inner = weight.shape[0], out.shape, a.shape[1]
    size = choose(GROUPED[a.dtype == torch.float32], pairs, experts, width)
    blocks = cdiv(width, size["BN"]) * (cdiv(pairs, size["BM"]) + experts)
    grouped_kernel[(blocks,)](
        a, weight, a if bias is None else bias, out, order, offsets, inner, width, TOP_K=top_k, E=experts,
        GATHER=gather, TRANSPOSED=transposed, BIAS=bias is not None, DTYPE=operand(a.dtype), **size,
    )  # fmt: skip


def combine(rows: Tensor, gates: Tensor | None, slots: Tensor, drop: dict, gelu: bool, dropped: bool) -> Tensor:
    (tokens, top_k), width = slots.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    combine_kernel[(cdiv(tokens, 16), cdiv(width, 128))](
        rows, slots if gates is None else gates, slots, **drop, out=out, tokens=tokens, width=width, TOP_K=top_k,
        GATED=gates is not None, GELU=gelu, DROP=dropped, BT=16, BN=128,
    )  # fmt: skip
    return out


@on_its_device
def moe_ffn(
    x: Tensor, gates: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, w_up: Tensor, b_up: Tensor,
    w_down: Tensor, b_down: Tensor, rate: float, seed: Tensor | None, gelu_out: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pairs, top_k, (_, inner, dim) = order.shape[0], gates.shape[1], w_up.shape
    if pairs == 0:
        return torch.zeros_like(x), x.new_empty(0, inner), x.new_empty(0, dim)
    drop, dropped = noise(seed, order, rate), seed is not None
    h, o = x.new_empty(pairs, inner), x.new_empty(pairs, dim)
    active = torch.empty_like(h) if save else h
    grouped(x, w_up, b_up, order, offsets, top_k, h, gather=True)
    activate_kernel[(pairs,)](h, active, order, **drop, width=inner, DROP=dropped, **ROW)
    grouped(active, w_down, b_down, order, offsets, top_k, o)
    y = combine(o, gates, slots, drop, gelu_out, dropped)
    return y, h if save else x.new_empty(0, inner), o if save and gelu_out else x.new_empty(0, dim)


def weight_gradient(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, top_k: int, total: Tensor, gather: bool,
    accumulate: bool,
) -> None:  # fmt: skip
    (experts, rows, cols), size = total.shape, WEIGHT_GRADIENT[left.dtype == torch.float32]
    grid = (cdiv(rows, size["BM"]), cdiv(cols, size["BN"]), experts)
    weight_gradient_kernel[grid](
        left, right, order, offsets, total, rows, cols, TOP_K=top_k, GATHER=gather, ACCUMULATE=accumulate,
        DTYPE=operand(left.dtype), **size,
    )  # fmt: skip


def bias_gradient(x: Tensor, gates: Tensor | None, order: Tensor, offsets: Tensor) -> Tensor:
    experts, (pairs, width) = offsets.shape[0] - 1, x.shape
    splits = min(next_power_of_2(cdiv(pairs, 256 * experts)), 64)
    out = x.new_empty(splits, experts, width, dtype=torch.float32)
    bias_gradient_kernel[(cdiv(width, 64), experts, splits)](
        x, order if gates is None else gates, order, offsets, out, width, splits, E=experts, GATED=gates is not None,
        BM=32, BN=64,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


@on_its_device
def moe_ffn_backward(
    grad: Tensor, x: Tensor, gates: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, w_up: Tensor,
    w_down: Tensor, b_down: Tensor, h: Tensor, o: Tensor, rate: float, seed: Tensor | None, gelu_out: bool,
    total_up: Tensor | None, total_down: Tensor | None, accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    pairs, top_k, (experts, inner, dim) = order.shape[0], gates.shape[1], w_up.shape
    if pairs == 0:
        for total in (total_up, total_down):
            if total is not None and not accumulate:
                total.zero_()
        db_up, db_down = (x.new_zeros(experts, width, dtype=torch.float32) for width in (inner, dim))
        return torch.zeros_like(x), torch.zeros_like(gates), db_up, db_down
    drop, dropped = noise(seed, order, rate), seed is not None
    g, dgate = x.new_empty(pairs, dim), gates.new_empty(pairs)
    output_backward_kernel[(cdiv(pairs, 8) + experts,)](
        grad, o if gelu_out else x, b_down, order, offsets, **drop, g=g, dgate=dgate, width=dim,
        TOP_K=top_k, E=experts, GELU=gelu_out, DROP=dropped, BM=8, BN=256,
    )  # fmt: skip
    dh, active, dx = x.new_empty(pairs, inner), x.new_empty(pairs, inner), x.new_empty(pairs, dim)
    dgates = torch.zeros_like(gates)
    grouped(g, w_down, None, order, offsets, top_k, dh, transposed=True)
    slope_kernel[(pairs,)](
        dh, h, active, gates, dgate, dgates, order, **drop, width=inner, GELU=gelu_out, DROP=dropped, **ROW
    )
    if total_down is not None:
        weight_gradient(g, active, order, offsets, top_k, total_down, False, accumulate)
    if total_up is not None:
        weight_gradient(dh, x, order, offsets, top_k, total_up, True, accumulate)
    grouped(dh, w_up, None, order, offsets, top_k, dx, transposed=True)
    db_up = bias_gradient(dh, None, order, offsets)
    dx = combine(dx, None, slots, drop, False, False)
    return dx, dgates, db_up, bias_gradient(g, gates, order, offsets)
