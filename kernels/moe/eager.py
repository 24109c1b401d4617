"""Routing by one cumulative sum, experts by one pair of matrix products each, in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import accumulation, full_precision
from .reference import OUTPUT_SALT, Routing, dropout_scale


def route(logits: Tensor, mask: Tensor | None, top_k: int, capacity: int, renormalize: bool) -> tuple[Routing, Tensor]:
    """The routing and the probabilities (T, E); capacity < 0 drops nothing."""
    tokens, count = logits.shape
    logits = full_precision(logits)
    probabilities = torch.softmax(logits, -1)
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    gates = probabilities.gather(1, experts)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    live = torch.ones(tokens, dtype=torch.bool, device=logits.device) if mask is None else mask
    hot = experts.new_zeros(tokens, count).scatter(1, experts, 1) * live[:, None]
    rank = (hot.cumsum(0) - hot).gather(1, experts)
    counts = hot.sum(0)
    kept = counts if capacity < 0 else counts.clamp_max(capacity)
    offsets = F.pad(kept.cumsum(0), (1, 0))
    fits = live[:, None] if capacity < 0 else live[:, None] & (rank < capacity)
    slots = torch.where(fits, offsets[experts] + rank, -1)
    pairs = tokens * top_k
    order = experts.new_full((pairs + 1,), -1)
    order[torch.where(fits, slots, pairs).flatten()] = torch.arange(pairs, device=logits.device)
    # not by a product: a masked token may be NaN
    mass = torch.where(live[:, None], probabilities, 0).sum(0)
    balance = (balance_slope(counts, live.sum(), top_k, gates.dtype) * mass).sum()
    return Routing(gates, balance, experts, slots, order[:pairs].clone(), offsets, counts), probabilities


def balance_slope(counts: Tensor, live: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """d balance / d p_te = E m_e / T: (E,)."""
    live = live.to(dtype).clamp_min(1)
    return counts.shape[0] * counts.to(dtype) / (live * top_k) / live


def route_backward(
    grad_gates: Tensor,
    grad_balance: Tensor,
    probabilities: Tensor,
    experts: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    renormalize: bool,
) -> Tensor:
    """dlogits (T, E) in the dtype of the probabilities."""
    if renormalize:
        chosen = probabilities.gather(1, experts)
        total = chosen.sum(-1, keepdim=True)
        grad_gates = (grad_gates - (grad_gates * chosen / total).sum(-1, keepdim=True)) / total
    tokens = probabilities.new_tensor(probabilities.shape[0]) if mask is None else mask.sum()
    slope = grad_balance * balance_slope(counts, tokens, experts.shape[1], probabilities.dtype)
    live = 1 if mask is None else mask[:, None]
    dp = (slope * live).expand_as(probabilities).scatter_add(1, experts, grad_gates.to(probabilities.dtype))
    return probabilities * (dp - (dp * probabilities).sum(-1, keepdim=True))


def gathered(rows: Tensor, slots: Tensor) -> Tensor:
    """rows[slots], zero where the slot is -1: (P, H), (T, K) -> (T, K, H)."""
    if rows.shape[0] == 0:
        return rows.new_zeros(*slots.shape, rows.shape[1])
    return torch.where(slots[..., None] >= 0, rows[slots.clamp_min(0)], 0)


def scales(
    pairs: Tensor, sizes: tuple[int, int], dropout: float, seed: Tensor | None, like: Tensor
) -> tuple[Tensor | float, Tensor | float]:
    """Dropout's factors on hidden and output rows; 1 without dropout."""
    if seed is None:
        return 1.0, 1.0
    hidden = dropout_scale(pairs, sizes[0], dropout, seed).to(like.dtype)
    return hidden, dropout_scale(pairs, sizes[1], dropout, seed, OUTPUT_SALT).to(like.dtype)


def moe_ffn(
    x: Tensor,
    gates: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    dropout: float,
    seed: Tensor | None,
    gelu_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (T, H), h (P, I), o (P, H)): h and o are the rows before their GELU, in the order of the slots and zero behind
    the last; o is empty unless `gelu_out`."""
    top_k, (_, inner, dim) = gates.shape[1], w_up.shape
    h = x.new_zeros(order.shape[0], inner)
    o = x.new_zeros(order.shape[0] if gelu_out else 0, dim)
    bounds = offsets.tolist()
    out = x.new_empty(bounds[-1], dim)
    for e, (begin, end) in enumerate(pairwise(bounds)):
        pairs = order[begin:end]
        first, second = scales(pairs, (inner, dim), dropout, seed, x)
        rows = h[begin:end] = F.linear(x[pairs // top_k], w_up[e], b_up[e])
        rows = F.linear(F.gelu(rows, approximate="tanh") * first, w_down[e], b_down[e])
        if gelu_out:
            o[begin:end] = rows
            rows = F.gelu(rows, approximate="tanh")
        out[begin:end] = rows * second
    kept = torch.where(slots >= 0, full_precision(gates), 0)  # a dropped pair's may be NaN
    y = (kept[..., None] * gathered(out, slots)).sum(1)
    return y.to(x.dtype), h, o


def moe_ffn_backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    h: Tensor,
    o: Tensor,
    dropout: float,
    seed: Tensor | None,
    gelu_out: bool,
    total_up: Tensor | None,
    total_down: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgates, db_up, db_down); the weights' gradients are written to, or added to, the totals.

    With G the output rows' gradient before the gate and D = G W_down: dgate = <D, a> + <G, b_down>, so that the
    experts' outputs need not be kept.
    """
    top_k, (count, inner, dim) = gates.shape[1], w_up.shape
    wide = accumulation(x.dtype)
    bounds = offsets.tolist()
    dgate, dx = grad.new_zeros(bounds[-1], dtype=wide), grad.new_empty(bounds[-1], dim)
    db_up, db_down = grad.new_zeros(count, inner, dtype=wide), grad.new_zeros(count, dim, dtype=wide)
    for e, (begin, end) in enumerate(pairwise(bounds)):
        pairs = order[begin:end]
        first, second = scales(pairs, (inner, dim), dropout, seed, x)
        g = grad[pairs // top_k] * second
        gate = gates.reshape(-1)[pairs, None].to(x.dtype)
        if gelu_out:
            dgate[begin:end] = (g * F.gelu(o[begin:end], approximate="tanh")).sum(-1, dtype=wide)
            g = torch.ops.aten.gelu_backward(g, o[begin:end], approximate="tanh")
        d = g @ w_down[e]
        a = F.gelu(h[begin:end], approximate="tanh") * first
        if not gelu_out:
            dgate[begin:end] = (d * a).sum(-1, dtype=wide) + (g * b_down[e]).sum(-1, dtype=wide)
        d = torch.ops.aten.gelu_backward(d * gate * first, h[begin:end], approximate="tanh")
        db_up[e], db_down[e] = d.sum(0, dtype=wide), (g * gate).sum(0, dtype=wide)
        dx[begin:end] = d @ w_up[e]
        for total, left, right in ((total_up, d, x[pairs // top_k]), (total_down, g, a * gate)):
            if total is not None:
                product = left.T @ right
                total[e] = total[e] + product if accumulate else product
    dgates = gathered(dgate[:, None], slots).view(gates.shape)
    return gathered(dx, slots).sum(1), dgates.to(gates.dtype), db_up, db_down
