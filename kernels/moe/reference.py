"""Routing and experts as the paper writes them (arXiv 2107.11817, section 3): the specification of every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import full_precision

# A 32-bit hash, by one multiply-and-shift round after another; the same numbers in every backend.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
OUTPUT_SALT = 0x9E3779B9
LOW = 0xFFFFFFFF


class Routing(NamedTuple):
    """Where each token goes; P = T K pairs, pair t K + k being choice k of token t.

    gates: (T, K) probabilities of the chosen experts, float32 (float64 for float64 logits); differentiable.
    balance: the balance loss, a scalar of that dtype; differentiable.
    experts: (T, K) int64, most probable first.
    slots: (T, K) int64, where the pair stands when kept pairs are ordered by expert, then token; -1 for a dropped one.
    order: (P,) int64, the pair at each slot; -1 behind the last one.
    offsets: (E + 1,) int64: expert e has the slots offsets[e] to offsets[e + 1].
    counts: (E,) int64, pairs that chose each expert, before dropping.
    """

    gates: Tensor
    balance: Tensor
    experts: Tensor
    slots: Tensor
    order: Tensor
    offsets: Tensor
    counts: Tensor


def hashed(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * MULTIPLIERS[0]) & LOW
    x = x ^ (x >> 15)
    x = (x * MULTIPLIERS[1]) & LOW
    return x ^ (x >> 16)


def dropout_scale(pairs: Tensor, width: int, rate: float, seed: Tensor, salt: int = 0) -> Tensor:
    """1 / (1 - rate) where element c of a pair's row is kept, else 0: pairs (n,) -> (n, width) float64."""
    row = hashed((pairs & LOW) ^ hashed((seed ^ salt) & LOW))
    column = torch.arange(width, device=pairs.device)
    keep = hashed(row[:, None] ^ column) >= int(rate * 2**32)
    return keep.double() / (1 - rate)


def route(logits: Tensor, mask: Tensor | None, top_k: int, capacity: int | None, renormalize: bool) -> Routing:
    """One token after another, each taking the next free place of its experts."""
    (tokens, experts), device = logits.shape, logits.device
    logits = full_precision(logits)
    probabilities = torch.softmax(logits, -1)
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    gates = probabilities.gather(1, chosen)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    live = [t for t in range(tokens) if mask is None or bool(mask[t])]
    queues: list[list[int]] = [[] for _ in range(experts)]
    for t in live:
        for k in range(top_k):
            queues[int(chosen[t, k])].append(t * top_k + k)
    counts = torch.tensor([len(queue) for queue in queues], device=device)
    kept = [queue[:capacity] for queue in queues]
    order = [pair for queue in kept for pair in queue]
    slots = torch.full((tokens * top_k,), -1, device=device)
    slots[order] = torch.arange(len(order), device=device)
    padded = torch.tensor(order + [-1] * (tokens * top_k - len(order)), dtype=torch.int64, device=device)
    offsets = torch.tensor([0, *(len(queue) for queue in kept)], device=device).cumsum(0)
    # E sum_e m_e P_e, m_e the share of the T K assignments, P_e the mean probability
    share = counts.to(gates.dtype) / max(len(live) * top_k, 1)
    balance = experts * (share * probabilities[live].sum(0) / max(len(live), 1)).sum()
    return Routing(gates, balance, chosen, slots.view(tokens, top_k), padded, offsets, counts)


def moe_ffn(
    x: Tensor,
    gates: Tensor,
    slots: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    dropout: float,
    seed: Tensor | None,
    gelu_out: bool,
) -> Tensor:
    """y_t = sum_k g_tk E_k(x_t): every expert on every token, weighted by 0 where the token did not go there."""
    tokens, top_k = gates.shape
    chosen = (slots[..., None] >= offsets[1:]).sum(-1)
    dtype = x.dtype
    x, w_up, b_up, w_down, b_down = (full_precision(t) for t in (x, w_up, b_up, w_down, b_down))
    y = torch.zeros_like(x)
    for k in range(top_k):
        pairs = torch.arange(tokens, device=x.device) * top_k + k
        for e in range(w_up.shape[0]):
            h = F.gelu(x @ w_up[e].T + b_up[e], approximate="tanh")
            if seed is not None:
                h = h * dropout_scale(pairs, h.shape[1], dropout, seed).to(h.dtype)
            o = h @ w_down[e].T + b_down[e]
            if gelu_out:
                o = F.gelu(o, approximate="tanh")
            if seed is not None:
                o = o * dropout_scale(pairs, o.shape[1], dropout, seed, OUTPUT_SALT).to(o.dtype)
            here = (slots[:, k] >= 0) & (chosen[:, k] == e)
            y = y + torch.where(here, gates[:, k], 0)[:, None].to(o.dtype) * o
    return y.to(dtype)
