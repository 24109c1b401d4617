"""Causal Grassmann Plücker mixing as the paper writes it (arXiv 2512.19428, section 3.2), any dtype.

The paper pairs t with t + offset, which shows position t its own target; here the partner is t - offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..precision import clamped_norm, full_precision


def plucker_coordinates(a: Tensor, b: Tensor) -> Tensor:
    i, j = torch.triu_indices(a.shape[-1], a.shape[-1], offset=1, device=a.device)
    return a[..., i] * b[..., j] - a[..., j] * b[..., i]


def plain_norm(p: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp_min(eps)


def literal_mix(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int],
    eps: float,
    norm: Callable[[Tensor, float], Tensor] = plain_norm,
) -> Tensor:
    """In the dtype of z."""
    length = z.shape[1]
    position = torch.arange(length, device=z.device).unsqueeze(-1)
    total = z.new_zeros(*z.shape[:2], weight.shape[0])
    count = torch.zeros_like(position)
    for offset in offsets:
        # 1. the partner of token t is z_{t - offset}, where there is one
        valid = position >= offset
        partner = torch.where(valid, z.roll(offset, dims=1), 0)
        # 2. p_ij = z_ti z_sj - z_tj z_si
        p = plucker_coordinates(z, partner)
        # 3. p^ = p / max(|p|, eps)
        p = p / norm(p, eps)
        # 4. project
        g = p @ weight.to(p.dtype).T
        total = total + torch.where(valid, g if bias is None else g + bias, 0)
        count = count + valid
    # 5. average over the offsets that exist at t
    return (total / count.clamp_min(1)).to(weight.dtype)


def plucker_mix(
    z: Tensor, weight: Tensor, bias: Tensor | None, offsets: Sequence[int], eps: float, context: int = 0
) -> Tensor:
    # where there is no pair p is 0
    return literal_mix(full_precision(z), weight, bias, offsets, eps, clamped_norm)[:, context:]


def literal_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # 1. alpha = sigmoid(W [x; g] + b)
    alpha = torch.sigmoid(torch.cat([x, g], dim=-1) @ weight.T + bias)
    # 2. h = alpha x + (1 - alpha) g
    return alpha * x + (1 - alpha) * g


def gated_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return literal_blend(*(full_precision(t) for t in (x, g, weight, bias))).to(x.dtype)
