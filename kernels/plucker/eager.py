"""Plücker mixing in its collapsed form, in plain PyTorch.

All pairs of token t share z_t, the wedge is bilinear and a normaliser is a number: the mean of the normalised wedges is
one wedge, z_t ^ y_t with y_t = 1/n_t sum_o delta_o / max(|z_t ^ z_{t-o}|, eps). One projection serves all offsets.

delta_o = z_{t-o} - (<z_t, z_{t-o}>/|z_t|^2) z_t spans the same plane with z_t as z_{t-o} does. z_{t-o} in its place is
the same wedge on paper, but then a nearly parallel pair has a large component along z_t that drowns the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import full_precision
from .reference import plucker_coordinates


def shift(x: Tensor, offset: int) -> Tensor:
    """Row t of the result is row t - offset of x (B, T, …), zero where there is none; a negative offset looks ahead."""
    length = x.shape[1]
    kept = max(length - abs(offset), 0)
    if offset >= 0:
        return F.pad(x[:, :kept], (0, 0, length - kept, 0))
    return F.pad(x[:, length - kept :], (0, 0, 0, length - kept))


def counts(length: int, offsets: Sequence[int], like: Tensor) -> Tensor:
    """n_t, the number of offsets valid at token t: (T, 1)."""
    position = torch.arange(length, device=like.device).unsqueeze(-1)
    return torch.stack([position >= offset for offset in offsets]).sum(0).to(like.dtype)


def valid(like: Tensor, offset: int) -> Tensor:
    """1 where token t has a partner t - offset: (T, 1)."""
    return (torch.arange(like.shape[1], device=like.device) >= offset).unsqueeze(-1).to(like.dtype)


def residual(z: Tensor, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c = <z,s>/|z|^2, delta = s - c z and the norm |z ^ s| = |z| |delta|, which does not cancel for parallel pairs."""
    square = (z * z).sum(-1, keepdim=True)
    ratio = (z * partner).sum(-1, keepdim=True) / torch.where(square > 0, square, 1)
    delta = partner - ratio * z
    return ratio, delta, torch.linalg.vector_norm(delta, dim=-1, keepdim=True) * square.sqrt()


def average(z: Tensor, offsets: Sequence[int], eps: float) -> Tensor:
    """y (B, T, r)."""
    total = torch.zeros_like(z)
    for offset in offsets:
        _, delta, norm = residual(z, shift(z, offset))
        total = total + valid(z, offset) * delta / norm.clamp_min(eps)
    return total / counts(z.shape[1], offsets, z).clamp_min(1)


def plucker_mix(
    z: Tensor, weight: Tensor, bias: Tensor | None, offsets: Sequence[int], eps: float, context: int = 0
) -> Tensor:
    z = full_precision(z)
    p = plucker_coordinates(z[:, context:], average(z, offsets, eps)[:, context:]).to(weight.dtype)
    g = p @ weight.T
    return g if bias is None else g + bias * (counts(z.shape[1], offsets, g)[context:] > 0)


def antisymmetric(dp: Tensor, rank: int) -> Tensor:
    """D (…, r, r) with upper triangle dp (…, K)."""
    i, j = torch.triu_indices(rank, rank, offset=1, device=dp.device)
    matrix = dp.new_zeros(*dp.shape[:-1], rank, rank)
    matrix[..., i, j] = dp
    matrix[..., j, i] = -dp
    return matrix


def average_backward(z: Tensor, dy: Tensor, offsets: Sequence[int], eps: float) -> Tensor:
    """What flows into z through the partners and the norms of the pairs.

    For the pair (t, s), with h = dy_t/n_t, orthogonal to z_t, sigma = 1/max(N, eps) and kappa = -sigma^2 <h, delta>/N
    (0 where N <= eps): dz_t += kappa (|delta|^2 z_t - <t,s> delta) - sigma c h; dz_s += sigma h + kappa |z_t|^2 delta.
    """
    share = dy / counts(z.shape[1], offsets, z).clamp_min(1)
    square = (z * z).sum(-1, keepdim=True)
    dz = torch.zeros_like(z)
    for offset in offsets:
        ratio, delta, norm = residual(z, shift(z, offset))
        sigma = valid(z, offset) / norm.clamp_min(eps)
        kappa = -(sigma**2) * (share * delta).sum(-1, keepdim=True) / torch.where(norm > eps, norm, torch.inf)
        rest = (delta * delta).sum(-1, keepdim=True)
        dz = dz + kappa * (rest * z - ratio * square * delta) - sigma * ratio * share
        dz = dz + shift(sigma * share + kappa * square * delta, -offset)
    return dz


def plucker_mix_backward(
    grad: Tensor, z: Tensor, weight: Tensor, offsets: Sequence[int], eps: float, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dz, dweight, dbias), None where `mask` says that it is not needed. Only z was saved."""
    z32 = full_precision(z)
    y = average(z32, offsets, eps)
    dz = dweight = dbias = None
    if mask[0]:
        d = antisymmetric(full_precision(grad @ weight), z.shape[-1])
        direct = (d @ y.unsqueeze(-1)).squeeze(-1)
        dy = -(d @ z32.unsqueeze(-1)).squeeze(-1)
        dz = (direct + average_backward(z32, dy, offsets, eps)).to(z.dtype)
    if mask[1]:
        p = plucker_coordinates(z32, y).to(weight.dtype)
        dweight = grad.flatten(0, 1).T @ p.flatten(0, 1)
    if mask[2]:
        dbias = (grad * (counts(z.shape[1], offsets, grad) > 0)).sum((0, 1))
    return dz, dweight, dbias


def gated_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(out, alpha); [x; g] is never written."""
    from_x, from_g = weight.chunk(2, dim=1)
    alpha = torch.sigmoid(F.linear(x.to(g.dtype), from_x) + F.linear(g, from_g, bias))
    return (alpha * x + (1 - alpha) * g).to(x.dtype), alpha


def gated_blend_backward(
    grad: Tensor, x: Tensor, g: Tensor, weight: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dg, dlogit); the gradient of the weight is dlogit^T [x; g]."""
    from_x, from_g = weight.chunk(2, dim=1)
    through = alpha * grad
    dlogit = (through * (1 - alpha) * (x - g)).to(g.dtype)
    return (through + dlogit @ from_x).to(x.dtype), (grad - through + dlogit @ from_g).to(g.dtype), dlogit
