"""Grouped experts in Triton: one kernel for every product over sorted rows, told apart by its epilogue.

Row r of the sorted order belongs to pair order[r] of token order[r] // K and to the expert e with offsets[e] <= r <
offsets[e+1]. The grid is sized for the worst case on the host; a program finds its expert and its rows in `offsets`,
and leaves if there are none, so that the host never waits for the device.
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
from .fused_route import route, route_backward

__all__ = ["moe_ffn", "moe_ffn_backward", "route", "route_backward"]

OUTPUT_SALT = tl.constexpr(0x9E3779B9)
PLAIN, UP, DOWN, SLOPE = (tl.constexpr(k) for k in range(4))


# The interpreter converts to bfloat16 by cutting bits off.
ROUND = tl.constexpr(dispatch.interpreted())


@triton.jit
def store(pointer, value, mask):
    if ROUND:  # noqa: SIM102 (each condition is decided when the kernel is compiled)
        if pointer.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    tl.store(pointer, value, mask=mask)


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
    bits = hashed(row[:, None] ^ cols.to(tl.uint32)[None, :]).to(tl.int64)
    return tl.where(bits >= threshold, scale, 0.0)


@triton.jit
def gelu_gate(x):
    return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def gelu_slope(x):
    # the gate's smaller side first: 1 - gate would cancel for large x
    side = gelu_gate(-tl.abs(x))
    slope = x * side * (1.0 - side) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return slope + tl.where(x < 0, side, 1.0 - side)


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
    a, weight, bias, extra, gates, out, out2, partial, order, offsets, seed, threshold, scale, inner, width, pairs,
    TOP_K: tl.constexpr, E: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, MODE: tl.constexpr,
    GELU: tl.constexpr, DROP: tl.constexpr, SAVE: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # acc = A W^T (A W if TRANSPOSED) for the rows of one expert, then
    #   UP:    h = acc + b, a = drop(gelu(h))
    #   DOWN:  o = acc + b, out[pair] = gate drop(act(o))
    #   SLOPE: a g (to out2), dh = g drop gelu'(h) acc, partial = <acc, a> over this block's columns
    #   PLAIN: out[pair] = acc
    # Programs that follow each other share their rows: those stay in the cache, and so does one expert's weight.
    expert, first, stop = find_rows(offsets, tl.program_id(1), E, BM)
    if expert < 0:
        return
    rows = first + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    keep = rows < stop
    pair = tl.load(order + rows, mask=keep, other=0)
    source = pair // TOP_K if GATHER else rows
    base = weight + expert.to(tl.int64) * inner * width
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + source[:, None] * inner + k[None, :], mask=keep[:, None] & (k < inner)[None, :], other=0.0)
        at = k[:, None] * width + n[None, :] if TRANSPOSED else n[None, :] * inner + k[:, None]
        w = tl.load(base + at, mask=(k < inner)[:, None] & (n < width)[None, :], other=0.0)
        acc = matmul(x, w, acc, DTYPE)
    mask = keep[:, None] & (n < width)[None, :]
    here = rows[:, None] * width + n[None, :]
    there = pair[:, None] * width + n[None, :]
    factor = 1.0
    if DROP:
        factor = dropout(pair, n, seed, threshold, scale, OUTPUT_SALT if MODE == DOWN else 0)
    if MODE == PLAIN:
        store(out + there, acc, mask=mask)
    if MODE == UP or MODE == DOWN:  # noqa: SIM109 (Triton has no tuple membership)
        acc += tl.load(bias + expert * width + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            store(out2 + here, acc, mask=mask)
    if MODE == UP:
        store(out + here, acc * gelu_gate(acc) * factor, mask=mask)
    if MODE == DOWN:
        gate = tl.load(gates + pair, mask=keep, other=0.0)
        value = acc * gelu_gate(acc) if GELU else acc
        store(out + there, value * factor * gate[:, None], mask=mask)
    if MODE == SLOPE:
        h = tl.load(extra + here, mask=mask, other=0.0).to(tl.float32)
        half = gelu_gate(h)
        gate = tl.load(gates + pair, mask=keep, other=0.0)[:, None]
        value = h * half * factor
        part = partial + tl.program_id(0).to(tl.int64) * pairs + pair
        store(part, tl.sum(tl.where(mask, acc * value, 0.0), 1), mask=keep)
        store(out2 + here, value * gate, mask=mask)
        store(out + here, acc * gate * factor * gelu_slope(h), mask=mask)


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
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, width, BN):
        n = start + tl.arange(0, BN)
        mask = keep[:, None] & (n < width)[None, :]
        v = tl.load(grad + (pair // TOP_K)[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if DROP:
            v *= dropout(pair, n, seed, threshold, scale, OUTPUT_SALT)
        if GELU:
            pre = tl.load(o + rows[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
            half = gelu_gate(pre)
            total += tl.sum(v * pre * half, 1)
            v *= gelu_slope(pre)
        else:
            b = tl.load(bias + expert * width + n, mask=n < width, other=0.0).to(tl.float32)
            total += tl.sum(v * b[None, :], 1)
        store(g + rows[:, None] * width + n[None, :], v, mask=mask)
    store(dgate + pair, total, mask=keep)


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
    for start in range(begin, end, BK):
        rows = start + tl.arange(0, BK)
        keep = rows < end
        source = rows
        if GATHER:
            source = tl.load(order + rows, mask=keep, other=0) // TOP_K
        x = tl.load(left + rows[None, :] * m_size + m[:, None], mask=keep[None, :] & (m < m_size)[:, None], other=0.0)
        inside = keep[:, None] & (n < n_size)[None, :]
        y = tl.load(right + source[:, None] * n_size + n[None, :], mask=inside, other=0.0)
        acc = matmul(x, y, acc, DTYPE)
    at = total + (expert.to(tl.int64) * m_size + m[:, None]) * n_size + n[None, :]
    mask = (m < m_size)[:, None] & (n < n_size)[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    store(at, acc, mask=mask)


@triton.jit
def bias_gradient_kernel(x, gates, order, offsets, out, width, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    expert = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BN,), tl.float32)
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        keep = rows < end
        v = tl.load(x + rows[:, None] * width + n[None, :], mask=keep[:, None] & (n < width)[None, :], other=0.0)
        v = v.to(tl.float32)
        if GATED:
            pair = tl.load(order + rows, mask=keep, other=0)
            v *= tl.load(gates + pair, mask=keep, other=0.0)[:, None]
        total += tl.sum(v, 0)
    store(out + expert * width + n, total, mask=n < width)


@triton.jit
def combine_kernel(rows, slots, out, tokens, width, TOP_K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    # out_t = sum_k rows[t K + k] over the kept pairs
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    live = t < tokens
    total = tl.zeros((BT, BN), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = t * TOP_K + k
        kept = live & (tl.load(slots + pair, mask=live, other=-1) >= 0)
        v = tl.load(rows + pair[:, None] * width + n[None, :], mask=kept[:, None] & (n < width)[None, :], other=0.0)
        total += v.to(tl.float32)
    store(out + t[:, None] * width + n[None, :], total, mask=live[:, None] & (n < width)[None, :])


@triton.jit
def gate_gradient_kernel(start, partial, slots, out, pairs, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    # d gate = start + the partial sums in their order; 0 for a dropped pair
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = (pair < pairs) & (tl.load(slots + pair, mask=pair < pairs, other=-1) >= 0)
    total = tl.load(start + pair, mask=kept, other=0.0)
    for k in range(PARTS):
        total += tl.load(partial + k * pairs + pair, mask=kept, other=0.0)
    store(out + pair, tl.where(kept, total, 0.0), mask=pair < pairs)


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype of matrix operands: that of x, but float32 in the interpreter, whose half-precision dot is wrong."""
    if dispatch.interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


# Tiles of the products, for float32 operands and for half ones.
GROUPED = {
    True: {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4},
    False: {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8},
}
WEIGHT_GRADIENT = {
    True: {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4},
    False: {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8},
}


def noise(seed: Tensor | None, order: Tensor, rate: float) -> dict:
    """The arguments of `dropout`; without a seed, placeholders."""
    return {"seed": order if seed is None else seed, "threshold": int(rate * 2**32), "scale": 1 / (1 - rate)}


def grouped(
    a: Tensor, weight: Tensor, out: Tensor, order: Tensor, offsets: Tensor, top_k: int, drop: dict, *,
    mode: tl.constexpr, bias: Tensor | None = None, extra: Tensor | None = None, gates: Tensor | None = None,
    out2: Tensor | None = None, partial: Tensor | None = None, gather: bool = False, transposed: bool = False,
    gelu: bool = False, dropped: bool = False,
) -> None:  # fmt: skip
    experts, inner = weight.shape[0], a.shape[1]
    width = weight.numel() // experts // inner
    size = GROUPED[a.dtype == torch.float32]
    grid = (triton.cdiv(width, size["BN"]), triton.cdiv(order.shape[0], size["BM"]) + experts)
    grouped_kernel[grid](
        a, weight, a if bias is None else bias, a if extra is None else extra, a if gates is None else gates, out,
        out if out2 is None else out2, out if partial is None else partial, order, offsets, **drop,
        inner=inner, width=width, pairs=order.shape[0], TOP_K=top_k, E=experts, GATHER=gather, TRANSPOSED=transposed,
        MODE=mode, GELU=gelu, DROP=dropped, SAVE=out2 is not None, DTYPE=operand(a.dtype), **size,
    )  # fmt: skip


def combine(rows: Tensor, slots: Tensor) -> Tensor:
    (tokens, top_k), width = slots.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    grid = (triton.cdiv(tokens, 16), triton.cdiv(width, 128))
    combine_kernel[grid](rows, slots, out, tokens, width, TOP_K=top_k, BT=16, BN=128)
    return out


def moe_ffn(
    x: Tensor, gates: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, w_up: Tensor, b_up: Tensor,
    w_down: Tensor, b_down: Tensor, rate: float, seed: Tensor | None, gelu_out: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pairs, top_k, (_, inner, dim) = order.shape[0], gates.shape[1], w_up.shape
    h = x.new_empty(pairs if save else 0, inner)
    o = x.new_empty(pairs if save and gelu_out else 0, dim)
    if pairs == 0:
        return torch.zeros_like(x), h, o
    common = (order, offsets, top_k, noise(seed, order, rate))
    active, out = x.new_empty(pairs, inner), x.new_empty(pairs, dim)
    dropped = seed is not None
    kept = h if save else None
    grouped(x, w_up, active, *common, mode=UP, bias=b_up, out2=kept, gather=True, dropped=dropped)
    kept = o if save and gelu_out else None
    grouped(
        active, w_down, out, *common, mode=DOWN, bias=b_down, gates=gates, out2=kept, gelu=gelu_out, dropped=dropped
    )
    return combine(out, slots), h, o


def weight_gradient(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, top_k: int, total: Tensor, gather: bool,
    accumulate: bool,
) -> None:  # fmt: skip
    (experts, rows, cols), size = total.shape, WEIGHT_GRADIENT[left.dtype == torch.float32]
    grid = (triton.cdiv(rows, size["BM"]), triton.cdiv(cols, size["BN"]), experts)
    weight_gradient_kernel[grid](
        left, right, order, offsets, total, rows, cols, TOP_K=top_k, GATHER=gather, ACCUMULATE=accumulate,
        DTYPE=operand(left.dtype), **size,
    )  # fmt: skip


def bias_gradient(x: Tensor, gates: Tensor | None, order: Tensor, offsets: Tensor) -> Tensor:
    experts, width = offsets.shape[0] - 1, x.shape[1]
    out = x.new_empty(experts, width, dtype=torch.float32)
    bias_gradient_kernel[(triton.cdiv(width, 64), experts)](
        x, order if gates is None else gates, order, offsets, out, width, GATED=gates is not None, BM=32, BN=64
    )
    return out


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
    output_backward_kernel[(triton.cdiv(pairs, 32) + experts,)](
        grad, o if gelu_out else x, b_down, order, offsets, **drop, g=g, dgate=dgate, width=dim,
        TOP_K=top_k, E=experts, GELU=gelu_out, DROP=dropped, BM=32, BN=64,
    )  # fmt: skip
    blocks = triton.cdiv(inner, GROUPED[x.dtype == torch.float32]["BN"])
    parts, partial = 0 if gelu_out else blocks, gates.new_empty(max(blocks, 1), pairs)
    dh, active, dx = x.new_empty(pairs, inner), x.new_empty(pairs, inner), x.new_empty(pairs, dim)
    common = (order, offsets, top_k, drop)
    grouped(
        g, w_down, dh, *common, mode=SLOPE, extra=h, gates=gates, out2=active, partial=partial, transposed=True,
        dropped=dropped,
    )  # fmt: skip
    if total_down is not None:
        weight_gradient(g, active, order, offsets, top_k, total_down, False, accumulate)
    if total_up is not None:
        weight_gradient(dh, x, order, offsets, top_k, total_up, True, accumulate)
    grouped(dh, w_up, dx, *common, mode=PLAIN, transposed=True)
    dgates = torch.empty_like(gates)
    gate_gradient_kernel[(triton.cdiv(pairs, 256),)](dgate, partial, slots, dgates, pairs, PARTS=parts, BLOCK=256)
    db_up = bias_gradient(dh, None, order, offsets)
    return combine(dx, slots), dgates, db_up, bias_gradient(g, gates, order, offsets)
