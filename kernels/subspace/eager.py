"""The head's row functions and the geodesic step in plain PyTorch.

The step needs no SVD: with Delta = a G horizontal, a = -lr, and H = Delta^T Delta (k, k),

    S+ = S cos(sqrt H) + Delta sinc(sqrt H),    cos = sum (-1)^j H^j / (2j)!,    sinc = sum (-1)^j H^j / (2j+1)!,

both entire in H. The series serve angles up to about a radian; larger ones are halved first and doubled after. The
doubling works on U = cos - 1, which a small angle does not drown: U <- 2 U (U + 2), sinc <- sinc (1 + U).
Matrices are in row form throughout: W = S^T (k, n), A = W B^T = S^T B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import accumulation, full_precision
from .chunked import Loss

# Powers of H in the series, and the trace of H above which angles are halved.
SERIES = 9
TRACE = 1.0
HALVINGS = 40


def group_norms(z: Tensor, k: int) -> Tensor:
    return torch.linalg.vector_norm(full_precision(z).unflatten(-1, (-1, k)), dim=-1)


def logits(z: Tensor, k: int, scale: float) -> Tensor:
    return scale * group_norms(z, k)


def pull_back(z: Tensor, norms: Tensor, dl: Tensor, k: int, scale: float) -> Tensor:
    # dz = scale dl z / |z|, 0 where z = 0
    factor = torch.where(norms > 0, scale * dl / norms, 0)
    return (z.unflatten(-1, (-1, k)) * factor.unsqueeze(-1)).flatten(-2).to(z.dtype)


def logits_backward(z: Tensor, grad: Tensor, k: int, scale: float) -> Tensor:
    return pull_back(z, group_norms(z, k), grad, k, scale)


def distribution(target: Tensor, classes: int, settings: Loss, dtype: torch.dtype) -> Tensor:
    """What the softmax is compared with: the smoothed target (rows, K), zero in ignored rows."""
    if target.is_floating_point():
        return target.to(dtype) * (1 - settings.smoothing) + settings.smoothing / classes
    counted = (target != settings.ignore_index).unsqueeze(-1)
    q = torch.full((target.shape[0], classes), settings.smoothing / classes, dtype=dtype, device=target.device)
    hit = q.new_full((target.shape[0], 1), 1 - settings.smoothing)
    q.scatter_add_(1, torch.where(counted, target.unsqueeze(-1), 0), hit)
    return q * counted


def loss(z: Tensor, target: Tensor, k: int, settings: Loss) -> tuple[Tensor, Tensor]:
    """Losses (rows,) and dz."""
    norms = group_norms(z, k)
    values = settings.scale * norms
    q = distribution(target, values.shape[-1], settings, values.dtype)
    mass = q.sum(-1, keepdim=True)
    logp = values.log_softmax(-1)
    losses = -(q * logp).sum(-1)
    if not target.is_floating_point():  # an ignored row may be NaN
        losses = torch.where(target != settings.ignore_index, losses, 0)
    return losses, pull_back(z, norms, mass * logp.exp() - q, k, settings.scale * settings.boost)


def trigonometry(h: Tensor) -> tuple[Tensor, Tensor]:
    """cos(sqrt h) - 1 and sinc(sqrt h) of symmetric h (…, k, k)."""
    trace = h.diagonal(dim1=-2, dim2=-1).sum(-1)
    halvings = torch.ceil(0.5 * torch.log2(trace.clamp_min(TRACE) / TRACE)).clamp_max(HALVINGS).nan_to_num(0)
    h = h * torch.exp2(-2 * halvings)[..., None, None]
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    u, sinc = torch.zeros_like(h), torch.zeros_like(h)
    for j in range(SERIES, 0, -1):
        u = h @ (u + (-1) ** j / math.factorial(2 * j) * eye)
        sinc = h @ (sinc + (-1) ** j / math.factorial(2 * j + 1) * eye)
    sinc = sinc + eye
    for step in range(int(halvings.max()) if halvings.numel() else 0):
        again = (halvings > step)[..., None, None]
        sinc = torch.where(again, sinc + sinc @ u, sinc)
        u = torch.where(again, 2 * (u @ u) + 4 * u, u)
    return u, sinc


def grassmann_step(
    weight: Tensor, buffer: Tensor, grad: Tensor, k: int, lr: float, momentum: float, mode: str
) -> tuple[Tensor, Tensor]:
    dtype = accumulation(weight.dtype)
    w, b, d = (t.to(dtype).unflatten(0, (-1, k)) for t in (weight, buffer, grad))
    a = -lr
    b = momentum * b + d
    g = b - (b @ w.mT) @ w
    c = g @ g.mT
    u, sinc = trigonometry(a * a * c)
    moved = w + u @ w + a * (sinc @ g)
    # One Newton-Schulz step towards the polar factor keeps the rows orthonormal.
    excess = moved @ moved.mT - torch.eye(k, dtype=dtype, device=w.device)
    moved = moved - 0.5 * (excess @ moved)
    still = (a * a * c.diagonal(dim1=-2, dim2=-1).sum(-1) == 0)[:, None, None]
    if mode == "project":
        b = g
    elif mode == "transport":
        # the velocity at the end: G+ = G cos - S (a G^T G) sinc
        b = g + u @ g - a * ((sinc @ c) @ w)
    moved = torch.where(still, w, moved)
    return moved.flatten(0, 1).to(weight.dtype), b.flatten(0, 1).to(buffer.dtype)
