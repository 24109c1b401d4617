"""Causal Grassmann Plücker mixing (arXiv 2512.19428)."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import torch
from torch import Tensor

from .. import dispatch
from ..launch import autocast_dtype, without_autocast
from ..precision import HALVES
from . import blend, op, reference

__all__ = ["checked_offsets", "gated_blend", "plucker_coordinates", "plucker_mix"]


def plucker_coordinates(a: Tensor, b: Tensor) -> Tensor:
    """Plücker coordinates p_ij = a_i b_j - a_j b_i, i < j, of the plane spanned by a and b.

    Args:
        a, b: (…, r), any floating dtype, shapes that broadcast.

    Returns:
        (…, r(r-1)/2) in lexicographic order (0,1), (0,2), …, (r-2,r-1).

    Raises:
        ValueError: when the last dimensions of `a` and `b` differ or are smaller than 2.
    """
    if a.dim() == 0 or b.dim() == 0 or a.shape[-1] != b.shape[-1] or a.shape[-1] < 2:
        raise ValueError(
            f"a and b must share a last dimension of at least 2, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return reference.plucker_coordinates(a, b)


def plucker_mix(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Iterable[int],
    eps: float = 1e-6,
    context: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Mean over the causal offsets of the projected, normalised Plücker coordinates of token pairs.

    g_t = 1/n_t sum_{o <= t} (W p^_{t,t-o} + b), p^ = p / max(|p|, eps), p_ij = z_ti z_sj - z_tj z_si with s = t - o
    and n_t the number of offsets o <= t; g_t = 0 where n_t = 0. Source: arXiv 2512.19428, section 3.2, with the
    partner in the past, since pairing with t + o shows a position its own target.

    The backward keeps z and weight alone: O(T r) memory. It is not differentiable again, except with
    `backend="reference"`. Norms are float32 for half-precision inputs, the projection accumulates in float32.

    Args:
        z: (B, T, r), r >= 2; float32, bfloat16, float16 or float64, any layout; B and T may be 0.
        weight: (d, r(r-1)/2), columns in the order of `plucker_coordinates`; the dtype of z, or a half dtype beside
            a float32 z. Under autocast, half of the autocast dtype.
        bias: (d,) of the weight's dtype, or None.
        offsets: positive distances, in tokens, any iterable of integers; one that occurs twice counts twice.
        eps: smallest norm that is divided by, > 0.
        context: how many of the first tokens are there as partners alone, without an output; 0 to T.
        backend: "reference", "eager", "cpp", "triton" or "cuda"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        g (B, T - context, d) in the dtype of `weight`.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, what it was and what is allowed.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    dtype = autocast_dtype(z.device.type)
    if dtype is not None and z.dtype != torch.float64:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    steps = _check(z, weight, bias, offsets, eps, context)
    chosen = dispatch.requested(backend)
    if chosen == "reference":
        with without_autocast(z.device.type):
            return reference.plucker_mix(z, weight, bias, steps, eps, context)
    return op.mix(z, weight, bias, steps, float(eps), context, chosen)


def gated_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """alpha x + (1 - alpha) g with the gate alpha = sigmoid(W [x; g] + b): how Grassmann mixing joins its input.

    [x; g] is never written; the backward keeps x, g, the weight and alpha. Source: arXiv 2512.19428, section 3.2.

    Args:
        x: (…, d); float32, bfloat16, float16 or float64, any layout.
        g: (…, d), the dtype of x, or a half dtype beside a float32 x.
        weight: (d, 2 d), bias: (d,), of the dtype of g. Under autocast g, weight and bias are cast to its dtype.
        backend: "reference", "eager", "cpp" or "triton"; None picks by $GRASSLAND_BACKEND, then by device.

    Returns:
        (…, d) in the dtype of x.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, what it was and what is allowed.
        grassland.kernels.dispatch.BackendError: when a requested backend is not there.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        g, weight, bias = g.to(dtype), weight.to(dtype), bias.to(dtype)
    _check_blend(x, g, weight, bias)
    chosen = dispatch.requested(backend)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference.gated_blend(x, g, weight, bias)
    return blend.blend(x, g, weight, bias, chosen)[0]


def _check_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> None:
    dim = x.shape[-1] if x.dim() else 0
    if x.dim() == 0 or g.shape != x.shape:
        raise ValueError(f"g must have the shape of x, (…, d), got x {tuple(x.shape)} and g {tuple(g.shape)}")
    for name, tensor, shape in (("weight", weight, (dim, 2 * dim)), ("bias", bias, (dim,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for d = {dim}, got {tuple(tensor.shape)}")
        if tensor.dtype != g.dtype:
            raise TypeError(f"{name} must have the dtype of g ({g.dtype}), got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {tensor.device}")
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if g.dtype != x.dtype and not (x.dtype == torch.float32 and g.dtype in HALVES):
        raise TypeError(f"g must have the dtype of x ({x.dtype}) or be half beside float32, got {g.dtype}")


def _check(
    z: Tensor, weight: Tensor, bias: Tensor | None, offsets: Iterable[int], eps: float, context: int
) -> list[int]:
    if z.dim() != 3 or z.shape[-1] < 2:
        raise ValueError(f"z must be (B, T, r) with r >= 2, got {tuple(z.shape)}")
    pairs = z.shape[-1] * (z.shape[-1] - 1) // 2
    if weight.dim() != 2 or weight.shape[1] != pairs:
        raise ValueError(f"weight must be (d, {pairs}) for r = {z.shape[-1]}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not z.is_floating_point():
        raise TypeError(f"z must be float32, bfloat16, float16 or float64, got {z.dtype}")
    if weight.dtype != z.dtype and not (z.dtype == torch.float32 and weight.dtype in HALVES):
        raise TypeError(f"weight must have the dtype of z ({z.dtype}) or be half beside float32, got {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the dtype of weight ({weight.dtype}), got {bias.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != z.device:
            raise ValueError(f"{name} must be on the device of z ({z.device}), got {tensor.device}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if isinstance(context, bool) or not isinstance(context, int | torch.SymInt) or not 0 <= context <= z.shape[1]:
        raise ValueError(f"context must be an integer from 0 to T = {z.shape[1]}, got {context!r}")
    return list(checked_offsets(offsets))


def checked_offsets(offsets: Iterable[int]) -> tuple[int, ...]:
    """One or more positive integers, of any type that Python takes as an index; ValueError for anything else."""
    try:
        steps = tuple(0 if isinstance(delta, bool) else index(delta) for delta in offsets)
    except TypeError:
        steps = ()
    if not steps or min(steps) < 1:
        raise ValueError(f"offsets must be one or more positive integers, got {offsets!r}")
    return steps
