"""KromHC in its cheapest exact form, in plain PyTorch: no matrix exists.

A 2×2 factor acts on a pair of streams as e = q (x_0 - x_1), x_0' = x_0 - e, x_1' = x_1 + e: K butterfly stages, each of
which keeps the sum of the streams. The stages are symmetric and commute, so the backward is the same butterfly on the
gradient, and dq = -sum (g_0 - g_1)(x_0 - x_1) with x as it enters and g as it leaves a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import coefficients, factor_matrices


def all_pairs(factors: Sequence[int]) -> bool:
    return all(i == 2 for i in factors)


def projection_backward(
    dweight: Tensor, dbias: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, pre: Tensor, post: Tensor,
    mixing: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dalpha, dbeta, dgamma, the three scalars' in one, dstatic_alpha, dstatic_beta) for factors that are all 2×2."""
    width, n = beta.shape
    root, g = math.sqrt(width), dweight.T
    swapped, kept = alpha[:, n + 1 :: 2], alpha[:, n::2]
    groups = [n, n, swapped.shape[1]]
    along = [
        (part * raw).sum(-1)
        for part, raw in zip(g.split(groups, -1), (alpha[:, :n], beta, swapped - kept), strict=True)
    ]
    dgamma = root * (pre * along[0] + post * along[1] + mixing * along[2])
    scale = root * (1 + gamma)
    dscales = torch.stack([scale @ part for part in along])
    by_pre, by_post, by_mixing = (g * scale[:, None]).split(groups, -1)
    dalpha = torch.cat([pre * by_pre, both_ways(mixing * by_mixing)], -1)
    static = dbias.split(groups)
    dstatic_alpha = torch.cat([static[0], both_ways(static[2])])
    return dalpha.contiguous(), (post * by_post).contiguous(), dgamma, dscales, dstatic_alpha, static[1].clone()


def both_ways(gradient: Tensor) -> Tensor:
    """The gradient (…, 2 K) of pairs of logits from that of their differences (…, K)."""
    return torch.stack([-gradient, gradient], -1).flatten(-2)


def difference(x: Tensor, stage: int) -> Tensor:
    """x_0 - x_1 of the pairs of a stage: (N, 2^stage, n / 2^(stage + 1), C)."""
    a, b = x.unflatten(1, (2**stage, 2, -1)).unbind(2)
    return a - b


def butterfly(x: Tensor, q: Tensor, stage: int) -> Tensor:
    """One stage on x (N, n, C) with q (N,); stage 0 pairs streams n/2 apart."""
    a, b = x.unflatten(1, (2**stage, 2, -1)).unbind(2)
    e = q[:, None, None, None] * (a - b)
    return torch.stack([a - e, b + e], 2).flatten(1, 3)


def mix(x: Tensor, h: Tensor, factors: Sequence[int]) -> Tensor:
    """H_res X, factor after factor along its own digit of the stream index."""
    n = x.shape[1]
    if all_pairs(factors):
        for stage in range(len(factors)):
            x = butterfly(x, h[:, 2 * n + stage], stage)
        return x
    before = 1
    for size, u in zip(factors, factor_matrices(h, factors), strict=True):
        x = torch.einsum("tij,tajbc->taibc", u, x.unflatten(1, (before, size, -1))).flatten(1, 3)
        before *= size
    return x


def project(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z = W vec X / max(|vec X|, eps) and r = 1 / max(|vec X|, eps), (N, m) and (N, 1)."""
    flat = x.flatten(1)
    r = 1 / torch.linalg.vector_norm(flat, dim=-1, keepdim=True).clamp_min(eps)
    return (flat @ weight.T) * r, r


def pre(x: Tensor, weight: Tensor, bias: Tensor, factors: Sequence[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(u, h, [z | r]); the last is what the backward needs."""
    wide = x.to(weight.dtype)
    z, r = project(wide, weight, eps)
    h = coefficients(z + bias, factors)
    u = (h[:, : x.shape[1], None] * wide).sum(1)
    return u.to(x.dtype), h, torch.cat([z, r], -1)


def post(x: Tensor, y: Tensor, h: Tensor, factors: Sequence[int]) -> Tensor:
    n = x.shape[1]
    return (mix(x.to(h.dtype), h, factors) + h[:, n : 2 * n, None] * y.to(h.dtype)[:, None]).to(x.dtype)


def logit_gradient(dh: Tensor, h: Tensor, n: int) -> Tensor:
    """Through sigmoid, 2 sigmoid and sigmoid."""
    top = torch.ones(h.shape[1], dtype=h.dtype, device=h.device)
    top[n : 2 * n] = 2
    return dh * h * (1 - h / top)


def pre_backward(
    du: Tensor, dh: Tensor, x: Tensor, weight: Tensor, h: Tensor, saved: Tensor, eps: float, extra: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) for factors that are all 2×2; `extra` is what else flows into X. dX is in full precision.

    With g the gradient of the logits: dX = H_pre^T du + r g W - r^2 <g, z> X, the last term where |X| > eps.
    """
    n = x.shape[1]
    wide, du = x.to(weight.dtype), du.to(weight.dtype)
    z, r = saved[:, :-1], saved[:, -1:]
    dpre = (wide * du[:, None]).sum(-1)
    g = logit_gradient(torch.cat([dh[:, :n] + dpre, dh[:, n:]], -1), h, n)
    # The limit as `project` rounds it.
    shrink = torch.where(r < 1 / r.new_full((), eps), -r * r * (g * z).sum(-1, keepdim=True), 0)
    dx = ((r * g) @ weight).view_as(wide) + shrink[..., None] * wide + h[:, :n, None] * du[:, None]
    return dx if extra is None else dx + extra, (r * g).T @ wide.flatten(1), g.sum(0)


def post_backward(grad: Tensor, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dy, dh) for factors that are all 2×2, in full precision."""
    n, stages = x.shape[1], int(math.log2(x.shape[1]))
    grad, x, y = grad.to(h.dtype), x.to(h.dtype), y.to(h.dtype)
    dy = (h[:, n : 2 * n, None] * grad).sum(1)
    dh = [torch.zeros_like(h[:, :n]), (grad * y[:, None]).sum(-1)]
    entering = []
    for stage in range(stages):
        entering.append(difference(x, stage))
        x = butterfly(x, h[:, 2 * n + stage], stage)
    dq = []
    for stage in reversed(range(stages)):
        dq.append(-(difference(grad, stage) * entering[stage]).sum((1, 2, 3)).unsqueeze(-1))
        grad = butterfly(grad, h[:, 2 * n + stage], stage)
    return grad, dy, torch.cat([*dh, *reversed(dq)], -1)
