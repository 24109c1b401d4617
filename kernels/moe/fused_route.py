"""Routing in Triton: probabilities and choice a block of tokens at a time, one scan over the blocks, then the slots."""

# Triton's constexpr parameters take plain values, and its language is not quite Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2, on_its_device

# Numbers of a tile, tokens (or blocks of them) by experts, and tokens of a block at most. Of more numbers, 64 experts
# spilled registers and 256 took more than a minute to compile.
TILE, BLOCK = 4096, 128
SIZES = ["tokens", "blocks", "capacity"]
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit(do_not_specialize=SIZES)
def choose_kernel(
    logits, mask, probabilities, gates, experts, histogram, sums, tokens,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, MASKED: tl.constexpr, NORMAL: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    # softmax over all experts, the K largest logits (the lower expert among equals), counts and sums of the block
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    inside = (t < tokens)[:, None] & (e < E)[None, :]
    v = tl.load(logits + t[:, None] * E + e[None, :], mask=inside, other=float("-inf"))
    top = tl.max(v, 1)
    # float64: of few tokens the balance loss shows every rounding
    precise = tl.exp(v.to(tl.float64) - tl.where(t < tokens, top, 0.0).to(tl.float64)[:, None])
    precise = precise / tl.where(t < tokens, tl.sum(precise, 1), 1.0)[:, None]
    p = precise.to(tl.float32)
    tl.store(probabilities + t[:, None] * E + e[None, :], p, mask=inside)
    live = t < tokens
    if MASKED:
        live = live & (tl.load(mask + t, mask=live, other=0) != 0)
    taken = tl.zeros((BT, EP), tl.int32)
    total = tl.zeros((BT,), tl.float32)
    chosen = ()
    # a NaN is the largest, as where PyTorch sorts: nothing is equal to it, not even itself
    v = tl.where(v == v, v, float("inf"))
    for k in tl.static_range(TOP_K):
        free = (taken == 0) & (e < E)[None, :]
        best = tl.max(tl.where(free, v, float("-inf")), 1)
        index = tl.min(tl.where(free & (v == best[:, None]), e[None, :], EP), 1)
        hit = e[None, :] == index[:, None]
        taken += hit.to(tl.int32)
        gate = tl.sum(tl.where(hit, p, 0.0), 1)
        total += gate
        chosen = chosen + (gate,)
        tl.store(experts + t * TOP_K + k, index.to(tl.int64), mask=t < tokens)
    for k in tl.static_range(TOP_K):
        gate = chosen[k]
        if NORMAL:
            gate = gate / tl.where(t < tokens, total, 1.0)
        tl.store(gates + t * TOP_K + k, gate, mask=t < tokens)
    at = tl.program_id(0).to(tl.int64) * E + e
    tl.store(histogram + at, tl.sum(tl.where(live[:, None], taken, 0), 0), mask=e < E)
    tl.store(sums + at, tl.sum(tl.where(live[:, None], precise, 0.0), 0), mask=e < E)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    histogram, sums, start, offsets, counts, balance, blocks, capacity,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    # pairs of each expert before each block, the experts' slots, and E sum_e m_e P_e
    e = tl.arange(0, EP)
    before = tl.zeros((EP,), tl.int64)
    mass = tl.zeros((EP,), tl.float64)
    for first in range(0, blocks, BB):
        b = first + tl.arange(0, BB).to(tl.int64)
        at = b[:, None] * E + e[None, :]
        inside = (b < blocks)[:, None] & (e < E)[None, :]
        count = tl.load(histogram + at, mask=inside, other=0)
        tl.store(start + at, before[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        before += tl.sum(count, 0)
        mass += tl.sum(tl.load(sums + at, mask=inside, other=0.0), 0)
    tl.store(counts + e, before, mask=e < E)
    kept = before
    if capacity >= 0:
        kept = tl.minimum(before, capacity)
    tl.store(offsets + 1 + e, tl.cumsum(kept, 0), mask=e < E)
    tl.store(offsets + e, tl.zeros((EP,), tl.int64), mask=e == 0)
    routed = tl.maximum(tl.sum(before, 0), 1).to(tl.float64)
    tl.store(balance, (E * TOP_K * tl.sum(before.to(tl.float64) * mass, 0) / (routed * routed)).to(tl.float32))


@triton.jit(do_not_specialize=SIZES)
def slot_kernel(
    experts, mask, start, offsets, slots, order, tokens, capacity,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    # a pair's rank among its expert's pairs is the number of earlier tokens that chose the expert
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    live = t < tokens
    if MASKED:
        live = live & (tl.load(mask + t, mask=live, other=0) != 0)
    hot = tl.zeros((BT, EP), tl.int32)
    for k in tl.static_range(TOP_K):
        index = tl.load(experts + t * TOP_K + k, mask=live, other=-1)
        hot += (e[None, :] == index[:, None]).to(tl.int32)
    first = tl.load(start + tl.program_id(0).to(tl.int64) * E + e, mask=e < E, other=0)
    rank = tl.cumsum(hot, 0) - hot + first[None, :]
    place = rank + tl.load(offsets + e, mask=e < E, other=0)[None, :]
    for k in tl.static_range(TOP_K):
        index = tl.load(experts + t * TOP_K + k, mask=live, other=-1)
        hit = e[None, :] == index[:, None]
        kept = live
        if capacity >= 0:
            kept = live & (tl.sum(tl.where(hit, rank, 0), 1) < capacity)
        slot = tl.where(kept, tl.sum(tl.where(hit, place, 0), 1), -1)
        tl.store(slots + t * TOP_K + k, slot, mask=t < tokens)
        tl.store(order + slot, t * TOP_K + k, mask=kept)


@triton.jit(do_not_specialize=SIZES)
def route_backward_kernel(
    grad_gates, grad_balance, probabilities, experts, counts, mask, out, tokens,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, MASKED: tl.constexpr, NORMAL: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    # dlogit = p (dp - <dp, p>), dp = d gate at the chosen experts + d balance E m_e / T
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    live = t < tokens
    if MASKED:
        live = live & (tl.load(mask + t, mask=live, other=0) != 0)
    inside = (t < tokens)[:, None] & (e < E)[None, :]
    p = tl.load(probabilities + t[:, None] * E + e[None, :], mask=inside, other=0.0)
    count = tl.load(counts + e, mask=e < E, other=0).to(tl.float32)
    routed = tl.maximum(tl.sum(count, 0), 1.0)
    slope = tl.load(grad_balance) * E * count / routed * (TOP_K / routed)
    dp = tl.where(live[:, None], slope[None, :], 0.0)
    total = tl.full((BT,), 1.0, tl.float32)
    mean = tl.zeros((BT,), tl.float32)
    if NORMAL:
        total = tl.zeros((BT,), tl.float32)
        for k in tl.static_range(TOP_K):
            index = tl.load(experts + t * TOP_K + k, mask=t < tokens, other=-1)
            chosen = tl.sum(tl.where(e[None, :] == index[:, None], p, 0.0), 1)
            total += chosen
            mean += chosen * tl.load(grad_gates + t * TOP_K + k, mask=t < tokens, other=0.0)
        total = tl.where(t < tokens, total, 1.0)
        mean = mean / total
    for k in tl.static_range(TOP_K):
        index = tl.load(experts + t * TOP_K + k, mask=t < tokens, other=-1)
        g = tl.load(grad_gates + t * TOP_K + k, mask=t < tokens, other=0.0)
        dp += tl.where(e[None, :] == index[:, None], ((g - mean) / total)[:, None], 0.0)
    tl.store(out + t[:, None] * E + e[None, :], p * (dp - tl.sum(dp * p, 1)[:, None]), mask=inside)


def sizes(experts: int, top_k: int, mask: Tensor | None) -> dict:
    return {"E": experts, "EP": next_power_of_2(experts), "TOP_K": top_k, "MASKED": mask is not None}


def tile(experts: int) -> dict[str, int]:
    """Tokens of a program, and its warps."""
    padded = next_power_of_2(experts)
    return {"BT": max(16, min(BLOCK, TILE // padded)), "num_warps": min(max(padded // 4, 4), 16)}


@on_its_device
def route(logits: Tensor, mask: Tensor | None, top_k: int, capacity: int, renormalize: bool) -> Parts:
    tokens, count = logits.shape
    index: Any = {"dtype": torch.int64, "device": logits.device}
    gates, probabilities = logits.new_empty(tokens, top_k), torch.empty_like(logits)
    experts, slots = torch.empty(tokens, top_k, **index), torch.empty(tokens, top_k, **index)
    order = torch.full((tokens * top_k,), -1, **index)
    offsets, counts, balance = torch.empty(count + 1, **index), torch.empty(count, **index), logits.new_empty(())
    size, shape = tile(count), sizes(count, top_k, mask)
    blocks = cdiv(tokens, size["BT"])
    histogram, start = torch.empty(blocks, count, **index), torch.empty(blocks, count, **index)
    sums, flags = logits.new_empty(blocks, count, dtype=torch.float64), logits if mask is None else mask
    if blocks:
        choose_kernel[(blocks,)](
            logits, flags, probabilities, gates, experts, histogram, sums, tokens, NORMAL=renormalize, **size, **shape,
        )  # fmt: skip
    shape.pop("MASKED")
    together = max(TILE // 2 // shape["EP"], 1)
    scan_kernel[(1,)](histogram, sums, start, offsets, counts, balance, blocks, capacity, BB=together, **shape)
    if blocks:
        slot_kernel[(blocks,)](
            experts, flags, start, offsets, slots, order, tokens, capacity, MASKED=mask is not None, **size, **shape
        )
    return gates, balance, experts, slots, order, offsets, counts, probabilities


@on_its_device
def route_backward(
    grad_gates: Tensor, grad_balance: Tensor, probabilities: Tensor, experts: Tensor, counts: Tensor,
    mask: Tensor | None, renormalize: bool,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(probabilities)
    tokens, count = out.shape
    if tokens:
        size = tile(count)
        route_backward_kernel[(cdiv(tokens, size["BT"]),)](
            grad_gates, grad_balance, probabilities, experts, counts, out if mask is None else mask, out, tokens,
            NORMAL=renormalize, **size, **sizes(count, experts.shape[1], mask),
        )  # fmt: skip
    return out
