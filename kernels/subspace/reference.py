"""Grassmann class representation as the paper writes it (arXiv 2308.01547), any dtype.

Class i is the span of S_i (n, k), orthonormal; the weight stacks S_i^T as rows i k … (i+1) k - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import clamped_norm, full_precision

# Below this norm a feature is divided by it instead, as F.normalize does.
EPS = 1e-12


def subspace_logits(x: Tensor, weight: Tensor, k: int, scale: float) -> Tensor:
    # 1. x^ = x / max(|x|, eps)      2. z_i = S_i^T x^      3. logit_i = scale |z_i|
    wide = full_precision(x)
    z = wide / clamped_norm(wide, EPS) @ full_precision(weight).T
    return scale * clamped_norm(z.unflatten(-1, (-1, k))).squeeze(-1)


def subspace_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, k: int, scale: float, smoothing: float, ignore_index: int
) -> Tensor:
    """Summed over the rows of x (N, n)."""
    logits = subspace_logits(x, weight, k, scale)
    target = target.to(logits.dtype) if target.is_floating_point() else target
    return F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum")


def project(s: Tensor, b: Tensor) -> Tensor:
    """The horizontal part of b at s: b - s (s^T b), for (…, n, k)."""
    return b - s @ (s.mT @ b)


def geodesic(s: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """exp_S(Delta) = S V cos(Sigma) V^T + U sin(Sigma) V^T with Delta = U Sigma V^T, and its velocity there."""
    u, sigma, vt = torch.linalg.svd(delta, full_matrices=False)
    cos, sin = torch.cos(sigma).unsqueeze(-2), torch.sin(sigma).unsqueeze(-2)
    end = (s @ vt.mT * cos + u * sin) @ vt
    velocity = (u * cos - s @ vt.mT * sin) * sigma.unsqueeze(-2) @ vt
    return end, velocity


def grassmann_step(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, mode: str
) -> tuple[Tensor, Tensor]:
    s, b, d = (full_precision(t).unflatten(0, (-1, k)).mT for t in (weight, buffer, grad))
    # 1. B <- mu B + D      2. G = B - S (S^T B)      3. S <- geodesic from S along -lr G
    b = momentum * b + d
    g = project(s, b)
    end, velocity = geodesic(s, -lr * g)
    if mode == "project":
        b = g
    elif mode == "transport":
        b = velocity / -lr if lr else g
    return end.mT.flatten(0, 1).to(weight.dtype), b.mT.flatten(0, 1).to(buffer.dtype)
